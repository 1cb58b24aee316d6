"""The plan's five success criteria, on short real training runs of the vertical slice through train.py."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from chronomoe import ChronoConfig, ChronoLoop
from chronomoe.coherence import coherence
from model import GPT, GPTConfig
from tests.helpers.models import train_step
from trainer import data as trainer_data

ROOT = Path(__file__).parents[2]
STEPS = 150


def run(config, out, *arguments):
    """Train a config of the repository through train.py; returns its logged lines."""
    status = train.main([str(ROOT / config), f"--out_dir={out}", "--wandb_log=False", "--eval_iters=4", *arguments])
    assert status == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def load(out, chrono, fresh=True):
    """The trained model of a run, with other settings of the loop and, if `fresh`, the loop's state as new."""
    saved = torch.load(out / "ckpt.pt", weights_only=True)
    model = GPT(GPTConfig(**saved["model_args"], chrono=chrono))
    model.load_state_dict(
        {k: v for k, v in saved["model"].items() if not fresh or "router_state" not in k}, strict=False
    )
    loop = ChronoLoop(model.router_state, model.config.moe_blocks)
    if not fresh:
        loop.load_state_dict(saved["chrono"])
    return model, loop, saved


ALL = dict(router=True, coherence=True, beta=True, bridge=True, lifecycle=True)


@pytest.fixture(scope="module", autouse=True)
def all_threads():
    """These runs are long enough to share."""
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def corpus():
    """The real corpus, prepared where the repository would."""
    return trainer_data.open_dataset("stdlib", 128)


@pytest.fixture(scope="module")
def slice_run(tmp_path_factory, corpus):
    """(folder, lines) of the first 150 steps of the vertical slice, every step logged."""
    out = tmp_path_factory.mktemp("slice")
    return out, run("config/vertical_slice.py", out, f"--max_iters={STEPS}", "--log_interval=1", "--eval_interval=50")


@pytest.fixture(scope="module")
def stress_run(tmp_path_factory, corpus):
    """(folder, lines) of 240 steps of config/bridge_stress.py at half the batch."""
    out = tmp_path_factory.mktemp("stress")
    arguments = ["--max_iters=240", "--log_interval=2", "--eval_interval=40", "--batch_size=8"]
    return out, run("config/bridge_stress.py", out, *arguments)


def by_expert(lines, metric, L=(0, 2)):
    """Values [steps, layers, experts] of the lines that have them; None becomes nan."""
    rows = [
        [[line[f"expert/L{layer}_E{e}/{metric}"] for e in range(8)] for layer in L] for line in lines if "lr" in line
    ]
    return np.array(rows, dtype=float)


def by_layer(lines, metric, L=(0, 2)):
    return np.array([[line[f"{metric.format(layer)}"] for layer in L] for line in lines if "lr" in line])


def test_criterion_1_beta_is_applied_and_disagreement_logged(slice_run):
    _, lines = slice_run
    beta, js = by_expert(lines, "beta"), by_layer(lines, "routing/L{}/js")
    assert (beta[0] != 0).any() and np.abs(beta[-1]).max() > np.abs(beta[0]).max()
    assert (js[1] > 0).all() and (js[-20:].mean(0) > js[1:21].mean(0)).all()
    assert (by_layer(lines, "routing/L{}/overlap")[1:] > 0).all()


def test_criterion_2_coherence_is_updated_every_step(slice_run):
    out, lines = slice_run
    chrono = torch.load(out / "ckpt.pt", weights_only=True)["chrono"]["coherence"]
    load = by_expert(lines, "load")
    assert (chrono["update_count"].numpy() == (load > 0).sum(0)).all()
    assert chrono["step"] == STEPS
    fast = by_expert(lines, "phi_fast")
    assert ((np.diff(fast, axis=0) != 0) == (load[1:] > 0))[10:].mean() > 0.999
    expected = np.round(load * 2 * 16 * 128).sum(0)
    assert (chrono["total_tokens_seen"].numpy() == expected).all()


def test_criterion_3_beta_falls_below_tau_and_rises_above(slice_run):
    _, lines = slice_run
    beta, phi, load = by_expert(lines, "beta"), by_expert(lines, "phi_slow"), by_expert(lines, "load")
    moved, pull = np.diff(beta, axis=0), phi[1:] - 0.5
    got_tokens = load[1:] > 0
    assert (moved[~got_tokens] == 0).all()
    observed = got_tokens & (np.abs(pull) > 1e-3)
    assert observed.sum() > 1000 and (pull[observed] > 0).any() and (pull[observed] < 0).any()
    assert (np.sign(moved[observed]) == np.sign(pull[observed])).all()
    np.testing.assert_allclose(moved[observed], 1e-4 * pull[observed], atol=1e-8)


def test_criterion_4_the_bridge_works_under_stress(stress_run):
    _, lines = stress_run
    r = by_layer(lines, "routing/L{}/relevance")
    last_half = r[len(r) // 2 :]
    assert (last_half.min(1) < 1).mean() >= 0.2
    # without alternation: no swing up and down between logged steps
    swings = np.diff(last_half, axis=0)
    back_and_forth = (swings[1:] * swings[:-1] < 0) & (np.minimum(abs(swings[1:]), abs(swings[:-1])) > 0.25)
    assert back_and_forth.mean() < 0.02


def test_criterion_4_the_bridge_lowers_the_js_of_the_routing_used(stress_run, corpus):
    out, _ = stress_run
    batch = corpus.batch("train", 77, 0, 0, 16)
    js = {}
    for bridge in (True, False):
        model, _, saved = load(out, ChronoConfig(**(ALL | dict(bridge=bridge, k_max=6.0))), fresh=False)
        assert saved["model"]["router_state.relevance"].min() < 0.95
        with torch.no_grad():
            trace = model(*batch, return_trace=True)[2]
        js[bridge] = (trace.js / trace.tokens).max()
    assert js[True] < 0.95 * js[False]


def test_criterion_4_relevance_returns_to_one_when_beta_is_reset(stress_run, corpus):
    out, _ = stress_run
    model, loop, _ = load(out, ChronoConfig(**(ALL | dict(k_max=6.0))), fresh=False)
    assert model.router_state.relevance.min() < 1
    model.router_state.beta_coeff.zero_()
    with torch.no_grad():
        loop.step(model(*corpus.batch("train", 77, 0, 0, 16), return_trace=True)[2])
    assert (model.router_state.relevance == 1).all()


def test_the_closed_loop_is_stable(slice_run, stress_run):
    """Over the last half: beta's spread within what the clamp allows, r within 0..1, validation loss not rising."""
    for (_, lines), k_max in ((slice_run, 0.3), (stress_run, 6.0)):
        spread = by_layer(lines, "beta/L{}/spread")
        r = by_layer(lines, "routing/L{}/relevance")
        assert np.isfinite(spread).all() and spread.max() <= 2 * k_max
        assert r.min() >= 0 and r.max() <= 1
        losses = [line["val/loss"] for line in lines if "val/loss" in line]
        assert max(losses[len(losses) // 2 :]) <= losses[len(losses) // 2 - 1]


def frozen_noise(model, block, expert, size, seed=0):
    """Replace an expert's weights by noise of `size` times their standard deviation; returns what does so again."""
    experts, generator = model.transformer.h[block].mlp.experts, torch.Generator().manual_seed(seed)
    weights = (experts.c_fc, experts.c_proj)
    noise = [size * w[expert].std() * torch.randn(w[expert].shape, generator=generator) for w in weights]

    @torch.no_grad()
    def restore():
        for w, n in zip(weights, noise):
            w[expert] = n

    restore()
    return restore


@pytest.mark.parametrize(("block", "expert"), [(0, 5)])
def test_criterion_5_an_expert_of_noise_is_proposed_and_its_twin_is_not(slice_run, corpus, block, expert):
    out, _ = slice_run
    status, structure = {}, {}
    # early in training healthy experts wander around the default threshold of 0.3
    config = ChronoConfig(**ALL, prune_phi=0.15)
    for noisy in (True, False):
        model, loop, _ = load(out, config)
        restore = frozen_noise(model, block, expert, 1.0) if noisy else lambda: None
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
        for step in range(104):  # low_coherence needs over 100 updates
            train_step(model, loop, optimizer, [corpus.batch("train", 9, step, 0, 8)])
            restore()
        status[noisy] = {(d.expert_id, d.reason) for d in loop.report()}
        structure[noisy] = {name: p.shape for name, p in model.state_dict().items()}
        tokens = loop.coherence.total_tokens_seen
        assert (tokens > 0).all()  # nothing is removed: every expert still gets tokens
    assert status[True] - status[False] == {(f"L{block}_E{expert}", "low_coherence")}
    assert status[False] <= status[True]
    assert structure[True] == structure[False]


def starve(model, block, expert):
    """Keep an expert from being chosen: its logit becomes the lowest by far."""
    router = model.transformer.h[block].mlp.router
    logits = router.clean_logits

    def without(x):
        z = logits(x)[0].clone()
        z[:, expert] -= 100.0
        return z, None

    router.clean_logits = without


@pytest.mark.parametrize(("starving_phi", "proposed"), [(0.2, True), (0.99, False)])
def test_criterion_5_a_starved_expert_is_proposed_unless_the_layer_starves(slice_run, corpus, starving_phi, proposed):
    out, _ = slice_run
    config = ChronoConfig(**ALL, unused_after=6, window=4, starving_phi=starving_phi)
    model, loop, _ = load(out, config)
    starve(model, 2, 3)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    for step in range(8):
        train_step(model, loop, optimizer, [corpus.batch("train", 9, step, 0, 8)])
    found = [(d.expert_id, d.reason, d.step) for d in loop.report()]
    assert found == ([("L2_E3", "low_observability", 6)] if proposed else [])


def test_loud_noise_fools_the_mixture_and_not_leave_one_out(slice_run, corpus):
    """The other side of coherence: an expert three times too loud is much of the mixture that it is compared with."""
    out, _ = slice_run
    batch = corpus.batch("train", 5, 0, 0, 16)
    phi = {}
    for size in (1.0, 3.0):
        model, _, _ = load(out, ChronoConfig(coherence=True))
        frozen_noise(model, 2, 5, size)
        with torch.no_grad():
            trace = model(*batch, return_trace=True)[2]
        for rule in ("mixture", "leave_one_out"):
            phi[size, rule] = coherence(trace.output[1], trace.gated_output[1], rule)
    assert phi[1.0, "mixture"][5] < 0.3  # noise of the right size is found
    assert phi[3.0, "mixture"][5] > 0.45  # loud noise passes as coherent
    others = [e for e in range(8) if e != 5]
    assert phi[3.0, "mixture"][others].mean() < phi[1.0, "mixture"][others].mean() - 0.05  # and its neighbours suffer
    assert phi[3.0, "leave_one_out"][5] < 0.2


def test_a_missing_stdlib_corpus_is_prepared_on_the_way(tmp_path, monkeypatch, capsys):
    shutil.copytree(
        ROOT / "data" / "stdlib", tmp_path / "stdlib", ignore=lambda *_: ["train.bin", "val.bin", "meta.json"]
    )
    monkeypatch.setattr(trainer_data, "DATA", tmp_path)
    data = trainer_data.open_dataset("stdlib", 128)
    assert data.vocab_size == 257 and len(data.tokens["train"]) > 1_000_000
    assert "prepared Python" in capsys.readouterr().out


@pytest.mark.slow
def test_the_slice_reaches_its_validation_loss(tmp_path, corpus):
    """1000 steps: below 1.90 nats per byte, every step's promises kept, and loud noise has phi near 1."""
    lines = run("config/vertical_slice.py", tmp_path)
    assert lines[-1]["step"] == 1000 and lines[-1]["val/loss"] < 1.90
    model, _, _ = load(tmp_path, ChronoConfig(coherence=True))
    frozen_noise(model, 0, 0, 3.0)
    with torch.no_grad():
        trace = model(*corpus.batch("train", 5, 0, 0, 16), return_trace=True)[2]
    mixture, alone = (coherence(trace.output[0], trace.gated_output[0], rule) for rule in ("mixture", "leave_one_out"))
    print(f"val/loss {lines[-1]['val/loss']:.4f}; loud noise: mixture {mixture[0]:.2f}, leave_one_out {alone[0]:.2f}")
    assert mixture[0] > 0.6 and abs(alone[0]) < 0.1
