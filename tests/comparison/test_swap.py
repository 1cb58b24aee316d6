"""Swapped betas: the numbers against a slow version, planted history, verdicts, and what is refused."""

import contextlib
import copy
import dataclasses
import io
import itertools
import json
from collections import Counter
from statistics import fmean, pstdev
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

import compare
import train
from chronomoe.router import ChronoRouter
from comparison import swap
from comparison.probe import open_data, routing_with
from comparison.runs import load_run
from comparison.swap import BETAS, DERANGEMENTS, SIDES, Cell, Pair, Swap, check_pair, derangements, measure_models
from model import GPT, GPTConfig
from tests.comparison.studies import BASE, START, change_config, make_run, write
from tests.helpers import reference
from tests.helpers.models import SHAPE, assert_same, build, chrono, record_routers
from tests.helpers.runs import ROOT, arguments, error_of, write_dataset
from trainer.data import EVAL_SEED

BATCHES, BATCH_SIZE = 2, 2
SCHEDULES = {"A": "code@0", "B": "code@0 prose@50"}


def dataset(seed):
    """Batches of random tokens from the lower or upper half of the vocabulary."""

    def batch(split, entropy, step, micro, batch_size):
        assert (split, entropy, step) == ("val", EVAL_SEED, 0)
        generator = torch.Generator().manual_seed(1000 * seed + micro)
        ids = torch.randint(32, (batch_size, SHAPE["block_size"] + 1), generator=generator) + 32 * (seed % 2)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    return Mock(batch=batch)


DATA = {"code": dataset(0), "prose": dataset(1)}


def model_pair(**changes):
    """Two models with other weights, beta, logit_std and r."""
    models = [build(chrono(k_max=0.9, **changes), seed=seed)[0].eval() for seed in (1, 2)]
    for model in models:
        state = model.router_state
        state.beta_coeff.normal_(std=0.6)
        state.logit_std.uniform_(0.5, 2)
        state.relevance.uniform_(0.3, 0.9)
    return models


def run_of(side, seed=1, **changes):
    settings = dict(top_k=2, data_schedule=SCHEDULES[side], dataset="code", first_step=0)
    return make_run(seed, arm="on", **settings | changes)


def pair_of(cells, seed=1, margin=0.02):
    return Pair(run_of("A", seed, margin=margin), run_of("B", seed, margin=margin), cells)


def slow_forward(model, beta, top_k, inputs, targets):
    """(loss, [(experts, routing probabilities) of each token] of each layer) of a new model."""
    copied = GPT(GPTConfig(**vars(model.config) | {"top_k": top_k}))
    copied.load_state_dict(copy.deepcopy(model.state_dict()) | {"router_state.beta_coeff": beta})
    found, layers = record_routers(copied.eval()), []
    loss = F.cross_entropy(copied(inputs, targets)[0].flatten(0, 1), targets.flatten())
    for layer, (hidden, _) in enumerate(found):
        state = copied.router_state
        bias = beta[layer].clamp(-0.9, 0.9) * state.logit_std[layer] * state.relevance[layer]
        router = copied.transformer.h[copied.config.moe_blocks[layer]].mlp.router
        rows = (hidden @ router.w_g.weight.t() + bias).double().tolist()
        layers.append(
            [(sorted(range(len(row)), key=lambda e: -row[e])[:top_k], reference.softmax(row)) for row in rows]
        )
    return loss.item(), layers


@torch.no_grad()
def slow_cell(model, betas, own, data, top_k):
    """Cell by loops over batches, betas, layers and tokens."""
    losses, changed, js, cv = [], [], [], []
    for beta, micro in itertools.product(betas, range(BATCHES)):
        batch = data.batch("val", EVAL_SEED, 0, micro, BATCH_SIZE)
        _, before = slow_forward(model, own, top_k, *batch)
        loss, after = slow_forward(model, beta, top_k, *batch)
        losses.append(loss)
        for of_layer_before, of_layer in zip(before, after):
            changed += [len(set(a[0]) - set(b[0])) / top_k for a, b in zip(of_layer, of_layer_before)]
            js += [reference.js_divergence(a[1], b[1]) for a, b in zip(of_layer, of_layer_before)]
            load = Counter(e for experts, _ in of_layer for e in experts)
            counts = [load[e] for e in range(model.config.n_exp)]
            cv.append(pstdev(counts) / fmean(counts))
    return Cell(*map(fmean, (losses, changed, js, cv)))


@torch.no_grad()
def test_every_cell_is_that_of_a_model_with_the_swapped_state(monkeypatch):
    monkeypatch.setattr(swap, "DERANGEMENTS", 2)
    a, b = model_pair()
    top_ks = [1, 2, 8]
    cells = measure_models(a, b, 5, DATA, top_ks, BATCHES, BATCH_SIZE)
    assert cells.keys() == set(itertools.product(SIDES, BETAS, DATA, top_ks))
    for weights, model, partner in (("A", a, b), ("B", b, a)):
        own = model.router_state.beta_coeff
        betas = {"own": [own], "other": [partner.router_state.beta_coeff], "zero": [own * 0]}
        betas["permuted"] = derangements(own, 5)
        for (beta, several), text, k in itertools.product(betas.items(), DATA, (1, 2)):
            expected = dataclasses.asdict(slow_cell(model, several, own, DATA[text], k))
            found = dataclasses.asdict(cells[weights, beta, text, k])
            assert found == pytest.approx(expected, abs=2e-6), (weights, beta, text, k)
            assert beta == "own" or (found["set_changed"] > 0.05 and found["js"] > 1e-3)
        assert cells[weights, "other", "code", 8].set_changed == 0  # at top_k = E every expert is chosen
    pair = pair_of(cells)
    for k in top_ks:
        loss = {key: cells[(*key, k)].loss for key in itertools.product(SIDES, ("own", "other"), DATA)}
        on_code, on_prose = (
            loss["A", "own", t] - loss["A", "other", t] + loss["B", "other", t] - loss["B", "own", t] for t in DATA
        )
        assert pair.interaction(k) == pytest.approx((on_code - on_prose) / 2, abs=1e-12) != 0
        helps = loss["A", "other", "prose"] - loss["A", "own", "prose"]
        helps += loss["B", "other", "code"] - loss["B", "own", "code"]
        assert pair.transfer(k) == pytest.approx(helps / 2, abs=1e-12)


@torch.no_grad()
def test_the_order_of_the_folders_does_not_matter():
    a, b = model_pair()
    cells = measure_models(a, b, 5, DATA, [1, 2], BATCHES, BATCH_SIZE)
    swapped = measure_models(b, a, 5, DATA, [1, 2], BATCHES, BATCH_SIZE)
    assert cells == {("BA"[SIDES.index(weights)], *key): cell for (weights, *key), cell in swapped.items()}
    there, back = pair_of(cells), Pair(run_of("B"), run_of("A"), swapped)
    assert there.interaction(2) == pytest.approx(back.interaction(2), abs=1e-12)
    assert there.transfer(1) == pytest.approx(back.transfer(1), abs=1e-12)


@torch.no_grad()
def test_equal_betas_change_nothing_and_the_models_stay_as_they_were():
    a, b = model_pair()
    b.router_state.beta_coeff.copy_(a.router_state.beta_coeff)
    states = [{name: value.clone() for name, value in model.state_dict().items()} for model in (a, b)]
    random_state = torch.get_rng_state()
    cells = measure_models(a, b, 5, DATA, [1, 2, 8], BATCHES, BATCH_SIZE)
    pair = pair_of(cells)
    for weights, text, k in itertools.product(SIDES, DATA, [1, 2, 8]):
        other, own = cells[weights, "other", text, k], cells[weights, "own", text, k]
        assert other == own and (own.set_changed, own.js) == (0, 0)
        assert pair.change(weights, "zero", text, k) != 0
    assert [pair.interaction(k) for k in (1, 2, 8)] == [0, 0, 0]

    def check_unchanged():
        for model, before in zip((a, b), states):
            assert_same(model.state_dict(), before)
            routers = [m for m in model.modules() if isinstance(m, ChronoRouter)]
            assert [(r.top_k, len(r._forward_hooks)) for r in routers] == [(2, 0)] * 2
        assert torch.equal(torch.get_rng_state(), random_state)

    check_unchanged()
    with pytest.raises(KeyboardInterrupt):
        with routing_with(a, 1, torch.zeros(2, 8), lambda *_: None):
            raise KeyboardInterrupt
    check_unchanged()


def planted():
    """A model of two experts in which beta alone chooses, and expert e makes token e likely, whatever the input is."""
    config = chrono(k_max=5.0, bridge=False)
    sizes = dict(block_size=16, vocab_size=2, n_layer=1, n_head=1, n_embd=4, bias=True, n_exp=2, top_k=1, stride=1)
    model = GPT(GPTConfig(**sizes, chrono=config)).eval()
    for p in model.parameters():
        p.zero_()
    model.transformer.ln_f.weight.fill_(1)
    model.lm_head.weight.copy_(torch.tensor([[1.0, -1, 0, 0], [-1, 1, 0, 0]]))
    model.transformer.h[0].mlp.experts.proj_bias[:, 0] = 100 * torch.tensor([[1.0, -1, 0, 0], [-1, 1, 0, 0]])
    return model


@torch.no_grad()
def test_planted_history_has_its_known_size_and_sign():
    a, b = planted(), planted()
    toward = torch.tensor([[1.0, -1.0]])
    a.router_state.beta_coeff.copy_(toward)
    b.router_state.beta_coeff.copy_(-toward)
    texts = {"code": 0, "prose": 1}  # the only token of each
    data = {text: Mock(batch=lambda *_, t=token: [torch.full((3, 16), t)] * 2) for text, token in texts.items()}
    pair = pair_of(measure_models(a, b, 1, data, [1, 2], BATCHES, BATCH_SIZE))
    # after the last norm a state along (1, -1, 0, 0) is sqrt(2) (1, -1, 0, 0), with logits +-2 sqrt(2); with both
    # experts the sum still points to the expert of the larger gate
    gap = 4 * 2**0.5
    right, wrong = (F.softplus(torch.tensor(x)).item() for x in (-gap, gap))
    for k in (1, 2):
        assert pair.interaction(k) == pytest.approx(2 * (right - wrong), rel=1e-3) and pair.interaction(k) < -10
        assert pair.transfer(k) == pytest.approx(right - wrong, rel=1e-3)
        for weights, beta in itertools.product(SIDES, BETAS):
            own_text = (weights == "A") == (beta == "own")
            for text in texts:
                expected = right if (text == "code") == own_text else wrong
                if beta in ("own", "other", "permuted"):  # with two experts, permuted is the other's beta
                    assert pair.cells[weights, beta, text, k].loss == pytest.approx(expected, abs=5e-3)
    a.router_state.beta_coeff.neg_()
    b.router_state.beta_coeff.neg_()
    harmful = pair_of(measure_models(a, b, 1, data, [1], BATCHES, BATCH_SIZE))
    assert harmful.interaction(1) == pytest.approx(-pair.interaction(1), rel=1e-6)


def test_permutations_move_every_beta_within_its_layer():
    beta = torch.arange(24.0).view(3, 8)
    found = derangements(beta, 1)
    assert len(found) == DERANGEMENTS
    for permuted in found:
        assert not (permuted == beta).any() and torch.equal(permuted.sort(-1).values, beta)
    orders = [tuple((row % 8).tolist()) for permuted in found for row in permuted]
    assert len(set(orders)) > 0.8 * len(orders)  # drawn for each layer anew
    assert all(map(torch.equal, found, derangements(beta, 1)))
    assert not all(map(torch.equal, found, derangements(beta, 2)))
    (permuted, *_) = derangements(torch.tensor([[1.0, 2.0]]), 0)
    assert permuted.tolist() == [[2.0, 1.0]]


def fabricated(interactions, margin=0.02, left_out=(), **schedules):
    """A Swap whose pairs have these interactions at top_k 2, and none at the others."""
    found = []
    for seed, value in enumerate(interactions):
        cells = {key: Cell(2.0, 0.0, 0.0, 0.5) for key in itertools.product(SIDES, BETAS, DATA, range(1, 5))}
        cells["A", "other", "code", 2] = Cell(2.0 - 2 * value, 0.1, 0.01, 0.5)
        pair = pair_of(cells, seed, margin)
        runs = [
            dataclasses.replace(r, config=r.config | {"data_schedule": schedules.get(side, SCHEDULES[side])})
            for side, r in zip(SIDES, (pair.a, pair.b))
        ]
        found.append(Pair(*runs, cells))
    return Swap(found, [*DATA], [1, 2, 3, 4], list(left_out), "python compare.py --swap a b", BATCHES, BATCH_SIZE)


NOISE = [0.001, -0.002, 0.0015, -0.001, 0.002, -0.0005]
VERDICTS = {  # name: (swap, verdict, conclusion, words)
    "helps": (dict(interactions=[-0.05 + n for n in NOISE]), "effect", "The loss is lower with the beta that",
              "An effect (exact p = 0.0312): a beta is better on its own last text."),
    "harms": (dict(interactions=[0.05 + n for n in NOISE]), "effect", "The loss is higher with the beta that",
              "a beta is worse on its own last text."),
    "helps within the margin": (dict(interactions=[-0.005 + n for n in NOISE]), "effect", "by less than the margin of",
                                "An effect"),
    "none": (dict(interactions=NOISE), "no effect", "neither better nor worse on its own last text by the margin",
             "No effect larger than the margin of 0.02 nats: two one-sided tests, p = 0.0156, 90% interval"),
    "no margin": (dict(interactions=NOISE, margin=None), "undecided", "declare no margin", "Undecided (exact p = "),
    "five pairs": (dict(interactions=NOISE[:5]), "none", "No verdict: 5 pairs of runs are too few, a verdict needs 6.",
                   "over 5 pairs. No verdict: 5 pairs"),
    "one pair": (dict(interactions=[-9.0]), "none", "No verdict: 1 pair of runs is too", "-9.0000 nats over 1 pair."),
    "left out": (dict(interactions=[-9 + n for n in NOISE], left_out=["x"]), "none", "No verdict: runs are left out",
                 "No verdict: runs are left out"),
    "same end": (dict(interactions=[-9 + n for n in NOISE], A="prose@0 code@9", B="code@0"), "none",
                 "both runs end with the same text, code, so", "other beta minus own at top_k=2: "),
}  # fmt: skip


@pytest.mark.parametrize("name", VERDICTS)
def test_verdict_is_on_the_interaction_at_the_top_k_of_training(name):
    made, verdict, concluded, said = VERDICTS[name]
    s = fabricated(**made)
    assert (s.verdict, s.top_k) == (verdict, 2) and concluded in s.conclusion
    assert said in " ".join(s.sentences)
    assert any("An effect" in sentence for sentence in s.sentences) == (verdict == "effect")
    if s.has_interaction:
        assert s.interactions[2] == pytest.approx(made["interactions"]) and s.interactions[1] == [0] * len(s.pairs)
        assert "top_k=1, where choice is forced: +0.0000 nats" in s.sentences[1]
    numbers = json.loads(json.dumps(swap.as_json(s, "today"), allow_nan=False))
    assert numbers["verdict"] == verdict and len(numbers["pairs"]) == len(made["interactions"])


def test_texts_are_those_of_the_schedule_and_top_ks_are_few_for_many_experts():
    assert swap.texts_of({"data_schedule": "a@0 data/b@400 a@500", "dataset": "a"}) == ["a", "data/b", "a"]
    assert swap.texts_of({"data_schedule": "", "dataset": "a"}) == swap.texts_of({"dataset": "a"}) == ["a"]
    assert swap.top_ks_of(8, 2) == list(range(1, 9))
    assert swap.top_ks_of(48, 6) == [1, 2, 4, 6, 8, 16, 32, 48] and swap.top_ks_of(64, 8) == [1, 2, 4, 8, 16, 32, 64]


REFUSED = {  # message: changes of run B
    "must differ in data_schedule or dataset alone, but learning_rate is 0.0006 and 0.5": dict(learning_rate=0.5),
    "but margin is 0.02 and 0.5": dict(margin=0.5),
    "but n_embd is 768 and 16": dict(n_embd=16),
    "but weights_sha256 is None and 'abc'": dict(weights_sha256="abc"),
    "but vocab_size is 257 and 600": dict(vocab_size=600),
    "but first_step is 0 and 50": dict(first_step=50),
    "their code_sha256 differs or is not recorded": dict(history=[START | {"code_sha256": "d"}]),
    "were trained on the same text": dict(data_schedule=SCHEDULES["A"]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_pair_that_differs_in_more_than_its_text_is_refused(message):
    check_pair(run_of("A"), run_of("B", data_sha256=BASE["data_sha256"] | {"prose/train.bin": "b"}))
    check_pair(run_of("A", data_schedule=""), run_of("A", data_schedule="", data_sha256={"train.bin": "b"}))
    assert message in error_of(check_pair, run_of("A"), run_of("B", **REFUSED[message]))


def test_runs_are_paired_by_seed_within_one_arm(tmp_path):
    for name, side, seed, arm in (
        ("a/on_1", "A", 1, "on"), ("a/on_2", "A", 2, "on"), ("a/off_1", "A", 1, "off"), ("b/on_3", "B", 3, "on"),
        ("c/off_1", "B", 1, "off"), ("d/x", "A", 1, "on"), ("d/y", "A", 1, "on"),
    ):  # fmt: skip
        run = make_run(seed, arm=arm, data_schedule=SCHEDULES[side], dataset="code")
        write(tmp_path / name, run)
    a = tmp_path / "a"
    found, left_out = swap.runs_by_seed(a, None)
    assert {seed: run.arm for seed, run in found.items()} == {1: "on", 2: "on"} and not left_out
    assert "beta is off (chrono_beta=False)" in error_of(swap.runs_by_seed, a, "off")
    assert "beta is off" in error_of(swap.runs_by_seed, tmp_path / "c", None)
    assert "no run of the arm 'load'" in error_of(swap.runs_by_seed, a, "load")
    assert "have the same seed, 1" in error_of(swap.runs_by_seed, tmp_path / "d", None)
    same = error_of(swap.swap, a, tmp_path / "b", None, "")
    assert "have no run with the same seed: they have 1, 2 and 3" in same
    change_config(a / "on_2", learning_rate=0.5)
    for seed in (1, 2):
        write(tmp_path / "e" / f"on_{seed}", run_of("B", seed, learning_rate=(6e-4, 0.5)[seed - 1]))
    assert "differ in learning_rate" in error_of(swap.swap, a, tmp_path / "e", None, "")
    (a / "on_2" / "metrics.jsonl").write_text("")
    (reason,) = swap.runs_by_seed(a, None)[1]
    assert "at step 0 of 100" in reason


def test_every_text_of_either_run_is_evaluated_and_a_run_without_partner_is_named(tmp_path, monkeypatch):
    for side, seeds in (("A", (1, 2)), ("B", (2, 3))):
        for seed in seeds:
            write(tmp_path / side / f"on_{seed}", run_of(side, seed))
    opened, measured = {}, []
    monkeypatch.setattr(swap, "load_trained", lambda run: (build(chrono())[0], {}))
    monkeypatch.setattr(swap, "open_data", lambda runs, text, model: opened.setdefault(text, [r.name for r in runs]))
    monkeypatch.setattr(swap, "measure_pair", lambda *args: measured.append(args[:-1]))
    s = swap.swap(tmp_path / "A", tmp_path / "B", None, "")
    names = [str(tmp_path / side / "on_2") for side in SIDES]
    assert opened == {"code": names, "prose": names[1:]}
    (((a, b, data, top_ks),),) = [measured]
    assert [a.name, b.name] == names and data == opened and top_ks == s.top_ks == [*range(1, 9)]
    assert s.texts == ["code", "prose"] and (s.batches, s.batch_size) == (swap.BATCHES, swap.BATCH_SIZE)
    assert [reason.rpartition("/")[2] for reason in s.left_out] == [
        f"on_{seed}: the other folder has no run of seed {seed}" for seed in (1, 3)
    ]


def test_models_of_other_shapes_are_refused():
    a, b = (build(chrono(), **changes)[0] for changes in ({}, dict(n_exp=4)))
    assert "different names or shapes" in error_of(measure_models, a, b, 1, DATA, [1], BATCHES, BATCH_SIZE)


def test_files_of_a_dataset_are_those_that_every_run_on_it_was_trained_on(tmp_path):
    model, _ = build(chrono())
    digests = {}
    for name in ("code", "prose"):
        folder = write_dataset(tmp_path / name, 64, seed=len(name))
        digests[str(folder)] = json.loads((folder / "meta.json").read_text())["sha256"]
    code, prose = digests
    both = digests[code] | {f"prose/{file}": sha256 for file, sha256 in digests[prose].items()}
    run = make_run(1, dataset=code, data_sha256=both)
    alone = make_run(2, dataset=prose, data_sha256=digests[prose])
    assert open_data([run, alone], prose, model).folder == tmp_path / "prose"
    assert open_data([run], code, model).vocab_size == 64
    for wrong in ({}, digests[code], {"prose/train.bin": "x"}, {"prose/val.bin": "x"}):
        config = alone.config | {"dataset": code, "data_sha256": (both if len(wrong) == 1 else {}) | wrong}
        refusal = error_of(open_data, [run, dataclasses.replace(alone, config=config)], prose, model)
        assert f"the files of {prose} are not those that off2 was" in refusal


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of two seeds each, trained on other datasets, with a beta that moves fast."""
    folder = tmp_path_factory.mktemp("swap")
    sizes = dict(n_layer=2, n_head=1, n_embd=8, n_exp=3, top_k=2, block_size=8, batch_size=2, max_iters=6)
    settings = sizes | dict(warmup_iters=0, eval_interval=3, eval_iters=1, log_interval=1, device="cpu", arm="on")
    settings |= dict(chrono_eta=0.1, chrono_k_max=1.0, chrono_center=True)
    with contextlib.redirect_stdout(io.StringIO()):
        for side, seed in itertools.product(("a", "b"), (1, 2)):
            data = folder / f"data_{side}"
            data = data if data.exists() else write_dataset(data, 11, seed=ord(side))
            own = settings | dict(dataset=data, seed=seed, out_dir=folder / side / f"on_seed{seed}")
            assert train.main([str(ROOT / "config" / "study.py"), *arguments(own)]) == 0
    return folder / "a", folder / "b"


def test_compare_swaps_trained_runs_and_writes_all_numbers(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(swap, "BATCHES", BATCHES)
    out = tmp_path / "swap"
    assert compare.main(["--swap", *map(str, trained), f"--out_dir={out}"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("No verdict: 2 pairs of runs are too few") and "Interaction at top_k=2" in said
    numbers = json.loads((out / "swap.json").read_text())
    assert (numbers["batches"], numbers["batch_size"]) == (BATCHES, 16)
    assert numbers["last_texts"] == dict(zip("AB", numbers["texts"])) and numbers["top_k"] == 2
    assert [pair["seed"] for pair in numbers["pairs"]] == [1, 2] and len(numbers["pairs"][0]["cells"]) == 2 * 4 * 2 * 3
    a, b = (load_run(folder / "on_seed2") for folder in trained)
    models = [swap.load_trained(run)[0] for run in (a, b)]
    data = {run.config["dataset"]: open_data([run], run.config["dataset"], models[0]) for run in (a, b)}
    expected = measure_models(*models, 2, data, [1, 2, 3], BATCHES, 16)
    for cell in numbers["pairs"][1]["cells"]:
        key = tuple(cell[name] for name in ("weights", "beta", "text", "top_k"))
        assert {name: cell[name] for name in vars(expected[key])} == pytest.approx(vars(expected[key]))
    pair = Pair(a, b, expected)
    assert numbers["interaction"]["2"]["pairs"][1] == pytest.approx(pair.interaction(2)) != 0
    page = (out / "swap.html").read_text()
    assert page.index("No verdict") < page.index("What was tested") < page.index("<figure>") and len(page) < 2_000_000
    assert "default-src 'none'" in page and "differ from the start" in page
    assert len(list((out / "swap_figures").glob("*.png"))) == 3


def test_a_wrong_command_or_a_signal_ends_with_one_line(trained, tmp_path, monkeypatch, capsys):
    a, b = map(str, trained)
    assert "as in python compare.py --swap out/a out/b, not 1" in error_of(compare.main, ["--swap", a])
    assert "--seeds: --swap takes two folders" in error_of(compare.main, ["--swap", a, b, "--seeds=2"])
    assert "--arms=on,off must be one arm" in error_of(compare.main, ["--swap", a, b, "--arms=on,off"])
    assert "does not exist" in error_of(compare.main, ["--swap", a, str(tmp_path / "none")])
    assert "trained on the same text" in error_of(compare.main, ["--swap", a, a])
    monkeypatch.setattr(swap, "measure_models", Mock(side_effect=KeyboardInterrupt))
    assert compare.main(["--swap", a, b, f"--out_dir={tmp_path / 'out'}"]) == 130
    assert capsys.readouterr().out == "stopped; nothing was written\n" and not (tmp_path / "out").exists()
