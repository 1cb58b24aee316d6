"""Worth and criteria against slow versions without the experts in the weights, and experts whose worth is planted."""

import itertools
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from auditing.cache import Cache
from auditing.criteria import CRITERIA, scores
from auditing.measure import Measured, observed, of_model
from auditing.subsets import Rises, lowest, masked_sets
from chronomoe import ChronoConfig
from tests.helpers import reference
from tests.helpers.models import build, chrono, tokens
from trainer.interventions import SUMS, Batch, masked

BRIDGE = dict(beta=0.7, bridge_scope="token", bridge_threshold=0.005)
CASES = {
    "top_k=2": {},
    "top_k=1": dict(top_k=1),
    "all but one chosen": dict(n_exp=3),
    "bias": dict(bias=True),
    "softmax over all": dict(norm_topk_prob=False),
    "softmax over all, top_k=1": dict(norm_topk_prob=False, top_k=1, bias=True),
    "every block": dict(stride=1, n_layer=2),
    "one layer": dict(n_layer=1),
    "two experts": dict(n_exp=2, top_k=1, norm_topk_prob=False),
    "capacity": dict(eval_capacity=0.9, min_capacity=1),
    "capacity, top_k=1": dict(eval_capacity=0.7, min_capacity=1, top_k=1, norm_topk_prob=False, bias=True),
    "beta": dict(beta=0.7),
    "beta, biased gates": dict(beta=0.7, gates="biased"),
    "beta, biased softmax over all": dict(beta=0.7, gates="biased", norm_topk_prob=False),
    "beta, capacity": dict(beta=0.7, eval_capacity=0.8, min_capacity=1),
    "bridge per token": BRIDGE,
    "bridge per token, biased softmax over all": BRIDGE | dict(gates="biased", norm_topk_prob=False, bias=True),
    "bridge per token, top_k=1, overlap": BRIDGE | dict(top_k=1, bridge_signal="overlap", bridge_threshold=0.08),
    "bridge per token, capacity": BRIDGE | dict(eval_capacity=0.8, min_capacity=1),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def random_model(case, dtype=torch.float64):
    """A model with random weights, in which the routing differs between tokens, and its loop."""
    loop_keys = ("gates", "bridge_scope", "bridge_signal", "bridge_threshold")
    loop_settings = {key: case[key] for key in loop_keys if key in case}
    changes = {key: value for key, value in case.items() if key not in loop_keys}
    config = chrono(lifecycle=False, **loop_settings) if "beta" in case else ChronoConfig(coherence=True)
    shape = dict(n_layer=3, n_embd=16, n_exp=5, block_size=10, vocab_size=24)
    model, loop = build(config, **shape | changes)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    model.router_state.relevance.copy_(torch.linspace(0.4, 0.8, len(model.config.moe_blocks)))
    return model.to(dtype).eval().requires_grad_(False), loop


def slow(model, inputs, targets, masks=None, zeroed=None):
    """The loss [], and of each MoE layer (experts, gates, outputs, kept), where the weights have no masked experts.

    zeroed: (block, expert) whose outputs are zero.
    """
    t, masks, found = model.transformer, masks or {}, []
    layer_of = {block: i for i, block in enumerate(model.config.moe_blocks)}
    x = t.wte(inputs) + t.wpe.weight[: inputs.shape[1]]
    for i, block in enumerate(t.h):
        x = x + block.attn(block.ln_1(x))
        h = block.ln_2(x)
        if i not in layer_of:
            x = x + block.mlp(h)
            continue
        keep = [e for e in range(model.config.n_exp) if e not in masks.get(i, ())]
        weights = {name: p[keep].clone() for name, p in block.mlp.experts.named_parameters()}
        if zeroed and zeroed[0] == i:
            for name in {"c_proj", "proj_bias"} & weights.keys():
                weights[name][keep.index(zeroed[1])] = 0
        flat = h.flatten(0, 1)
        experts, gates = slow_routing(model, layer_of[i], flat @ block.mlp.router.w_g.weight[keep].t(), keep)
        gates.requires_grad_()
        mixture, *rest = reference.moe_layer(flat, experts, gates, weights, block.mlp.capacity(len(flat)))
        found.append((torch.tensor(keep)[experts], gates, *rest))
        x = x + mixture.view_as(x)
    logits = t.ln_f(x).flatten(0, 1) @ model.lm_head.weight.t()
    return F.cross_entropy(logits, targets.flatten()), found


def slow_routing(model, layer, z, keep):
    """(experts, gates) [N, K] of a layer without the experts that are not in `keep`, from its clean logits z."""
    c, state, biased = model.config.chrono, model.router_state, z
    if c.router:
        beta = state.beta_coeff[layer, keep].clamp(-c.k_max, c.k_max) * state.logit_std[layer]
        strength = torch.full((len(z), 1), float(state.relevance[layer]), dtype=z.dtype)
        if c.bridge_scope == "token":
            measure = reference.js_divergence if c.bridge_signal == "js" else reference.overlap
            of_token = [measure(*map(reference.softmax, (a.tolist(), (a + beta).tolist()))) for a in z.detach()]
            threshold = c.disagreement_threshold
            strength = [min(1.0, max(0.0, (3 * threshold - d) / (2 * threshold))) for d in of_token]
            strength = torch.tensor(strength, dtype=z.dtype)[:, None]
            assert len(strength.unique()) > 2 or len(keep) < model.config.n_exp  # the case is not trivial
        biased = z + strength * beta
    experts = torch.tensor([sorted(range(len(keep)), key=lambda e: -row[e])[: model.config.top_k] for row in biased])
    applied = z if c.gates == "clean" else biased
    probabilities = (applied.gather(1, experts) if model.config.norm_topk_prob else applied).softmax(-1)
    return experts, probabilities if model.config.norm_topk_prob else probabilities.gather(1, experts)


def masks_of(model):
    """Every expert, then pairs in one layer, and in every layer, as many as leave top_k."""
    blocks, experts, most = model.config.moe_blocks, range(model.config.n_exp), model.config.n_exp - model.config.top_k
    found = [{block: (e,)} for block in blocks for e in experts]
    found += [{block: (e % len(experts),) for e, block in enumerate(blocks, 1)}]
    if most >= 2:
        pairs = list(itertools.combinations(experts, 2))
        found += [{block: pair} for block in blocks for pair in pairs[::4]]
        found += [dict(zip(blocks, itertools.cycle(pairs[2:]))), dict.fromkeys(blocks, pairs[-1])]
    return found


@each_case
def test_masked_loss_is_that_of_a_model_without_the_experts(case):
    model, _ = random_model(case)
    inputs, targets = tokens(1, 1, model)
    batch = Batch(model, inputs, targets, criteria=False)
    assert batch.loss == pytest.approx(slow(model, inputs, targets)[0].item(), abs=1e-10)
    rises = []
    for masks in masks_of(model):
        expected = slow(model, inputs, targets, masks)[0].item()
        assert batch.loss_masked(masks) == pytest.approx(expected, abs=1e-10), masks
        rises.append(abs(expected - batch.loss))
    assert np.median(rises) > 1e-3  # the case is not trivial


@each_case
def test_zeroed_loss_is_that_of_a_model_whose_expert_has_no_output(case):
    model, _ = random_model(case)
    inputs, targets = tokens(1, 1, model)
    batch = Batch(model, inputs, targets, criteria=False)
    for block, e in itertools.product(model.config.moe_blocks, range(model.config.n_exp)):
        expected = slow(model, inputs, targets, zeroed=(block, e))[0].item()
        assert batch.loss_zeroed(block, e) == pytest.approx(expected, abs=1e-10), (block, e)


@pytest.mark.parametrize("name", ["capacity", "bridge per token, biased softmax over all"])
def test_worth_in_float32_has_an_error_below_1e_6(name):
    model, _ = random_model(CASES[name], torch.float32)
    exact = random_model(CASES[name])[0]
    inputs, targets = tokens(1, 1, model)
    batch, loss = Batch(model, inputs, targets, criteria=False), slow(exact, inputs, targets)[0]
    for masks in masks_of(model):
        expected = (slow(exact, inputs, targets, masks)[0] - loss).item()
        assert batch.loss_masked(masks) - batch.loss == pytest.approx(expected, abs=2e-6), masks


def test_masks_that_leave_fewer_than_top_k_are_refused_and_hooks_are_removed():
    model, _ = random_model({})
    inputs, targets = tokens(1, 1, model)
    before = model(inputs, targets)[1].item()
    batch = Batch(model, inputs, targets)
    with pytest.raises(ValueError, match="block 2: 4 masked experts leave fewer than top_k=2"):
        batch.loss_masked({0: (1,), 2: (0, 1, 2, 3)})
    with pytest.raises(RuntimeError, match="inside"), masked(model, {0: (0, 1, 2)}):
        raise RuntimeError("inside")
    assert model(inputs, targets)[1].item() == before
    assert all(not m._forward_hooks for m in model.modules())


def slow_scores(model, loop, batches, seed):
    """The scores of CRITERIA [L, E], by loops over batches, tokens and choices."""
    E, layers = model.config.n_exp, len(model.config.moe_blocks)
    total = {name: np.zeros((layers, E)) for name in ("tokens", "gate", "norm", "gated", "first_order")}
    phi = {
        True: [[[] for _ in range(E)] for _ in range(layers)],
        False: [[[] for _ in range(E)] for _ in range(layers)],
    }
    for inputs, targets in batches:
        loss, found = slow(model, inputs, targets)
        gradients = torch.autograd.grad(loss, [gates for _, gates, _, _ in found])
        for layer, ((experts, gates, y, kept), gradient) in enumerate(zip(found, gradients)):
            gates, y = gates.detach(), y.detach()
            for n, k in kept.nonzero().tolist():
                e, g, norm = int(experts[n, k]), gates[n, k].item(), y[n, k].norm().item()
                total["tokens"][layer, e] += 1
                total["gate"][layer, e] += g
                total["norm"][layer, e] += norm
                total["gated"][layer, e] += g * norm
                total["first_order"][layer, e] += abs(g * gradient[n, k].item())
            for alone, of_expert in phi.items():
                for e, value in enumerate(reference.phi(y, experts, gates, kept, E, alone)):
                    of_expert[layer][e] += [value] * (not np.isnan(value))
    mean_phi = {a: [[np.mean(v) if v else 0.0 for v in row] for row in of_layer] for a, of_layer in phi.items()}
    aimer = []
    for block in model.config.moe_blocks:
        experts = model.transformer.h[block].mlp.experts
        flat = [[*experts.c_fc[e].flatten().tolist(), *experts.c_proj[e].flatten().tolist()] for e in range(E)]
        aimer.append([-np.mean(np.abs(w)) / np.sqrt(np.mean(np.square(w))) for w in flat])
    count = np.maximum(total["tokens"], 1)
    return {
        **{f"phi_{clock}": loop.coherence.phi(clock).double().numpy() for clock in ("slow", "mid", "fast")},
        **{"phi_val": mean_phi[False], "phi_leave_one_out": mean_phi[True], "aimer": aimer},
        **{"load": total["tokens"], "mean_gate": total["gate"] / count, "ean": total["norm"]},
        **{"reap": total["gated"] / count, "man": total["norm"] / count, "first_order": total["first_order"]},
        "random": torch.rand(layers, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).numpy(),
    }


def fast_scores(model, loop, batches, seed=5):
    """The same by the audit's code."""
    lines = []
    for inputs, targets in batches:
        batch = Batch(model, inputs, targets)
        lines.append({name: [getattr(layer, name).tolist() for layer in batch.sums] for name in SUMS})
    found = scores(observed(lines, of_model(types.SimpleNamespace(model=model, loop=loop)), seed))
    return {name: score.numpy() for name, score in found.items()}


@each_case
def test_criteria_are_those_of_a_loop_over_tokens(case):
    model, loop = random_model(case)
    for clock in ("fast", "mid", "slow"):
        getattr(loop.coherence, f"phi_{clock}").uniform_(-1, 1)
    loop.coherence.update_count.fill_(3)
    if model.config.n_exp > 3:  # an expert without tokens
        with torch.no_grad():
            model.transformer.h[0].mlp.router.w_g.weight[1].mul_(1e-3)
    batches = [tokens(seed, 1, model) for seed in (1, 2)]
    found, expected = fast_scores(model, loop, batches), slow_scores(model, loop, batches, 5)
    assert list(found) == list(CRITERIA)
    for name in CRITERIA:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-9, err_msg=name)


def test_first_order_is_the_derivative_of_the_loss_by_a_gate():
    model, _ = random_model(dict(norm_topk_prob=False, bias=True))
    inputs, targets = tokens(3, 1, model)
    inputs, targets = inputs[:, :4], targets[:, :4]
    batch = Batch(model, inputs, targets)
    for layer, block in enumerate(model.config.moe_blocks):
        routing, expected = batch.layers[block].routing, np.zeros(model.config.n_exp)
        for n, k in itertools.product(range(4), range(2)):
            losses = []
            for step in (1e-4, -1e-4):
                hook = model.transformer.h[block].mlp.router.register_forward_hook(
                    lambda _, __, r, n=n, k=k, s=step: r._replace(gates=r.gates.index_put(
                        (torch.tensor(n), torch.tensor(k)), torch.tensor(s, dtype=r.gates.dtype), accumulate=True))
                )  # fmt: skip
                losses.append(model(inputs, targets)[1].item())
                hook.remove()
            slope = (losses[0] - losses[1]) / 2e-4
            expected[routing.experts[n, k]] += abs(routing.gates[n, k].item() * slope)
        np.testing.assert_allclose(batch.sums[layer].first_order, expected, atol=1e-7)


def test_an_expert_without_output_has_no_zeroed_worth_and_criteria_of_outputs_rank_it_last():
    model, loop = random_model(dict(bias=True))
    for block in model.config.moe_blocks:
        experts = model.transformer.h[block].mlp.experts
        experts.c_proj[2] = 0
        experts.proj_bias[2] = 0
    inputs, targets = tokens(1, 4, model)
    batch, found = Batch(model, inputs, targets), fast_scores(model, loop, [tokens(1, 4, model)])
    for layer, block in enumerate(model.config.moe_blocks):
        assert found["load"][layer, 2] > 0
        assert batch.loss_zeroed(block, 2) == pytest.approx(batch.loss, abs=1e-12)
        assert abs(batch.loss_masked({block: (2,)}) - batch.loss) > 1e-4  # its tokens go to others
        for name in ("ean", "man", "reap", "first_order"):  # sums of |y|, or of |g y dL/d(mixture)|, 0 only for it
            assert lowest(found[name][layer], 1) == (2,) and found[name][layer, 2] == 0, name
        # phi of an output of length zero is 0, which is above that of experts that point away from the mixture
        assert found["phi_val"][layer, 2] == found["phi_leave_one_out"][layer, 2] == 0


def planted_model(top_k):
    """A model of one layer in which token v prefers expert v mod 5, and what the experts add is in their biases.

    Expert 0 alone predicts the targets of its tokens. 1 and 2 are the same, with the same router row, and predict those
    of their tokens. 3 does little. 4 is the next choice of all tokens. Returns (model, loop, batches).
    """
    shape = dict(n_layer=1, n_embd=20, vocab_size=20, n_exp=5, top_k=top_k, bias=True)
    model, loop = build(ChronoConfig(coherence=True), **shape)
    model.double().eval().requires_grad_(False)
    for name, p in model.named_parameters():
        p.fill_(float("ln_" in name and name.endswith("weight")))
    model.lm_head.weight.copy_(torch.eye(20))
    layer, v = model.transformer.h[0].mlp, torch.arange(20)
    layer.router.w_g.weight.fill_(-10.0)
    layer.router.w_g.weight[4] = 0.0
    for expert, group in enumerate(([0], [1, 2], [1, 2], [3], [4])):
        layer.router.w_g.weight[expert, torch.isin(v % 5, torch.tensor(group))] = 10.0
    for expert, (target, size) in enumerate([(5, 6.0), (6, 6.0), (6, 6.0), (7, 0.2), (8, 0.5)]):
        layer.experts.proj_bias[expert, 0, target] = size
    inputs = [tokens(seed, 4, model)[0] for seed in (1, 2)]
    return model, loop, [(x, torch.tensor([5, 6, 6, 7, 8])[x % 5]) for x in inputs]


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_vital_expert_comes_out_on_top_and_subsets_find_two_that_replace_each_other(top_k, tmp_path):
    model, loop, batches = planted_model(top_k)
    of_batch = [Batch(model, *pair) for pair in batches]
    base = np.array([batch.loss for batch in of_batch])
    masked_losses = np.array([[[b.loss_masked({0: (e,)}) for e in range(5)]] for b in of_batch])
    zeroed = np.array([[[b.loss_zeroed(0, e) for e in range(5)]] for b in of_batch])
    rises = (masked_losses - base[:, None, None], zeroed - base[:, None, None])
    found = fast_scores(model, loop, batches)
    measured = Measured(types.SimpleNamespace(seed=1), [0], top_k, base, *rises, found)
    found["oracle"] = measured.worth
    worth = measured.worth[0]
    assert worth.argmax() == 0 and worth[0] > 0.3
    assert worth[1:3] == pytest.approx([0, 0], abs=1e-3) and worth[3] > 2e-3
    trained = types.SimpleNamespace(
        model=model,
        batches=types.SimpleNamespace(validation=lambda i: batches[i]),
        interrupt=types.SimpleNamespace(received=0),
    )
    by_size = {r.size: r for r in masked_sets(measured, Rises(trained, Cache(tmp_path / "audit" / "c", {}), 2))}
    assert by_size.keys() == ({1, 2, 4} if top_k == 1 else {1, 2})
    assert by_size[1].best == pytest.approx(0, abs=1e-3) and by_size[1].is_exact
    pair = by_size[2]
    assert pair.criteria["oracle"] > 0.3  # one by one, 1 and 2 are worth nothing
    assert pair.best < pair.criteria["oracle"] / 3 and pair.best == min(pair.random) and len(pair.random) == 10
    assert 0 < pair.beaten["oracle"] < 0.5
