"""The audit of attached models, against interventions on the plain model."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from auditing.attached import audit
from auditing.criteria import CRITERIA
from chronomoe import ChronoConfig, attach
from tests.helpers import reference
from tests.helpers.hub import EXPERTS, build, tokens

pytest.importorskip("transformers")

ON = ChronoConfig(router=True, coherence=True, beta=True, k_max=1.0)


def loader(count=2):
    return [{"input_ids": x, "labels": x} for x in (tokens(2, 12, seed) for seed in range(count))]


def plain_loss(model, batch):
    with torch.no_grad():
        return model(**batch, output_router_logits=False).loss.item()


@pytest.fixture(scope="module")
def audited():
    torch.manual_seed(1)
    model = build("gpt_oss")
    handle = attach(model, ON)
    x = tokens()
    model(input_ids=x, labels=x).loss.backward()
    handle.step()
    beta = handle.loop.router_state.beta_coeff
    beta.copy_(torch.rand(beta.shape) * 2 - 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.zero_grad()
    found = audit(handle, iter(loader()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())
    return handle, found


def test_worth_is_the_rise_without_the_expert(audited):
    """The routers of gpt-oss have a bias on their logits, which takes beta and the mask in a plain model."""
    handle, found = audited
    plain, state = build("gpt_oss").eval(), handle.loop.router_state
    routers = [layer.mlp.router for layer in plain.model.layers]
    with torch.no_grad():
        for i, router in enumerate(routers):
            router.bias += state.beta_coeff[i] * state.logit_std[i]
    base = [plain_loss(plain, batch) for batch in loader()]
    assert found.base == pytest.approx(base, abs=1e-6) and found.blocks == [0, 1]
    rises = np.zeros((2, 2, EXPERTS))
    for i, router in enumerate(routers):
        for e in range(EXPERTS):
            kept = router.bias[e].item()
            router.bias.data[e] = -1e9
            rises[:, i, e] = [plain_loss(plain, batch) - b for batch, b in zip(loader(), base)]
            router.bias.data[e] = kept
    assert found.masked == pytest.approx(rises, abs=2e-6) and np.abs(rises).max() > 1e-3
    assert found.worth == pytest.approx(rises.mean(0), abs=2e-6)


def test_scores_equal_a_slow_version(audited):
    handle, found = audited
    assert found.scores.keys() == CRITERIA.keys()
    model, phis = handle.model.eval(), []
    sums = {name: np.zeros((2, EXPERTS)) for name in ("load", "gate", "ean", "gated_norm", "first_order")}
    for batch in loader():
        seen, hooks = {}, []
        for i, layer in enumerate(handle.layers):

            def keep(router, args, output, i=i, seen=seen):
                output[1].retain_grad()
                seen[i] = args[0].detach(), output[1], output[2]

            hooks.append(layer.router.register_forward_hook(keep))
        model.zero_grad()
        model(**batch, output_router_logits=False).loss.backward()
        for hook in hooks:
            hook.remove()
        phis.append([])
        for i, (hidden, weights, experts) in seen.items():
            module = handle.layers[i].experts
            y = torch.zeros(*experts.shape, hidden.shape[1])
            for n, chosen in enumerate(experts.tolist()):
                for k, e in enumerate(chosen):
                    h = hidden[n] @ module.gate_up_proj[e] + module.gate_up_proj_bias[e]
                    gate, up = h[::2].clamp(max=module.limit), h[1::2].clamp(-module.limit, module.limit)
                    hidden_e = (up + 1) * gate * torch.sigmoid(gate * module.alpha)
                    y[n, k] = (hidden_e @ module.down_proj[e] + module.down_proj_bias[e]).detach()
                    g, norm = weights[n, k].item(), y[n, k].norm().item()
                    sums["load"][i, e] += 1
                    sums["gate"][i, e] += g
                    sums["ean"][i, e] += norm
                    sums["gated_norm"][i, e] += g * norm
                    sums["first_order"][i, e] += abs(g * weights.grad[n, k].item())
            kept = torch.ones_like(experts, dtype=torch.bool)
            phis[-1].append(
                [reference.phi(y, experts, weights.detach(), kept, EXPERTS, leave_one_out) for leave_one_out in (0, 1)]
            )
    model.zero_grad()
    model.train()
    tokens_of = np.maximum(sums["load"], 1)
    expected = {
        "load": sums["load"], "ean": sums["ean"], "first_order": sums["first_order"],
        "mean_gate": sums["gate"] / tokens_of, "reap": sums["gated_norm"] / tokens_of, "man": sums["ean"] / tokens_of,
    }  # fmt: skip
    by_batch = np.array(phis)  # [n, L, 2, E], NaN without tokens
    for j, name in enumerate(("phi_val", "phi_leave_one_out")):
        mean = [[[x for x in by_batch[:, i, j, e] if not math.isnan(x)] for e in range(EXPERTS)] for i in range(2)]
        expected[name] = np.array([[sum(v) / len(v) if v else 0.0 for v in row] for row in mean])
    expected["phi_slow"] = handle.loop.coherence.phi("slow").numpy()
    for i, layer in enumerate(handle.layers):
        for e in range(EXPERTS):
            w = torch.cat([layer.experts.gate_up_proj[e].flatten(), layer.experts.down_proj[e].flatten()]).double()
            aimer = -(w.abs().mean() / w.square().mean().sqrt()).item()
            assert found.scores["aimer"][i, e] == pytest.approx(aimer)
    for name, values in expected.items():
        assert found.scores[name] == pytest.approx(values, rel=1e-4, abs=1e-6), name


def test_correlations_are_spearmans(audited):
    _, found = audited
    assert found.correlations.keys() == found.scores.keys()
    for name in ("load", "reap"):
        expected = [stats.spearmanr(*pair).statistic for pair in zip(found.scores[name], found.worth)]
        assert found.correlations[name] == pytest.approx(expected)


def test_a_frozen_model_without_step_2_is_audited_too():
    model = build("olmoe").requires_grad_(False).eval()
    found = audit(attach(model, ChronoConfig()), loader(1))
    assert "phi_slow" not in found.scores and (found.scores["first_order"] > 0).any()
    assert np.isinf(found.error).all() and not model.training


def test_batches_that_cannot_be_audited_are_refused():
    handle = attach(build("olmoe"), ON)
    with pytest.raises(ValueError, match="at least one batch"):
        audit(handle, [])
    with pytest.raises(ValueError, match=r"no loss for a batch of \['input_ids'\]: give it labels"):
        audit(handle, [{"input_ids": tokens()}])
    assert handle.model.training
