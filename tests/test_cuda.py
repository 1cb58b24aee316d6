"""What only a GPU can show: `pytest -m cuda`. The slice's shape in bfloat16, experts through grouped_mm."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import train
from chronomoe import ChronoLoop
from model import GPT, GPTConfig
from ops.experts import MLPExperts
from tests.helpers.models import chrono, train_step
from tests.helpers.runs import differing_state, metrics

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def slice_model(n_layer=4, **changes):
    config = GPTConfig(
        block_size=128, vocab_size=257, n_layer=n_layer, n_head=4, n_embd=128, bias=False, n_exp=8, use_aux_loss=True,
        use_router_z_loss=True, use_switch_tfm_init=True, router_use_full_prec=True, chrono=chrono(**changes),
    )  # fmt: skip
    model = GPT(config, torch.Generator().manual_seed(0)).cuda()
    return model, ChronoLoop(model.router_state, config.moe_blocks)


def batches(steps, seed=0):
    ids = torch.randint(257, (steps, 16, 129), generator=torch.Generator().manual_seed(seed)).cuda()
    return [(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in ids]


def bfloat16():
    return torch.autocast("cuda", dtype=torch.bfloat16)


def step(model, loop, optimizer, x, y, compiled=None, logged=True):
    return train_step(model, loop, optimizer, [(x, y)], compiled, logged=logged, autocast=bfloat16)


def run(steps=20):
    model, loop = slice_model(eta=0.05, bridge_threshold=0.01)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cuda")
    losses = [step(model, loop, optimizer, x, y) for x, y in batches(steps)]
    return torch.stack(losses), {**model.state_dict(), **loop.state_dict()["coherence"]}


@pytest.mark.parametrize("logged", [True, False])
def test_a_step_does_not_wait_for_the_device(logged):
    model, loop = slice_model()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cuda")
    data = batches(6)
    for x, y in data[:3]:
        step(model, loop, optimizer, x, y, logged=logged)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in data[3:]:
            step(model, loop, optimizer, x, y, logged=logged)
        with pytest.raises(RuntimeError):
            loop.coherence.phi("slow").sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loop.coherence.step == 6


def test_two_runs_are_bit_equal():
    (losses, state), (again, state_again) = run(), run()
    assert torch.equal(losses, again)
    for name, value in state.items():
        assert torch.equal(value, state_again[name]), name


def test_compiled_without_graph_breaks_it_trains_as_eager_does_within_bfloat16():
    runs = []
    for compiled in (False, True):
        model, loop = slice_model(eta=0.05, bridge_threshold=0.01)
        forward = None
        if compiled:
            forward = torch.compile(model, fullgraph=True)
            loop.compile()
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cuda")
        losses = [step(model, loop, optimizer, x, y, forward) for x, y in batches(20)]
        runs.append((torch.stack(losses), loop.coherence.phi("slow")))
    torch.testing.assert_close(*(losses for losses, _ in runs), rtol=0.01, atol=0)
    torch.testing.assert_close(*(phi for _, phi in runs), rtol=0, atol=0.02)


def test_the_loop_is_as_many_kernels_for_any_number_of_layers():
    counts = {}
    for compiled in (False, True):
        for n_layer in (4, 32):
            model, loop = slice_model(n_layer)
            if compiled:
                loop.compile()
            x, y = batches(1)[0]
            _, _, trace = model(x, y, return_trace=True, logged=False)
            for _ in range(3):
                loop.step(trace)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                loop.step(trace)
                torch.cuda.synchronize()
            counts[compiled, n_layer] = sum(e.count for e in seen.key_averages() if e.self_device_time_total > 0)
    assert counts[False, 4] == counts[False, 32] and counts[True, 4] == counts[True, 32] < 20


def test_memory_does_not_grow():
    model, loop = slice_model()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cuda")
    x, y = batches(1)[0]
    held = []
    for count in range(1000):
        step(model, loop, optimizer, x, y, logged=False)
        if count % 100 == 99:
            held.append(torch.cuda.memory_allocated())
    assert len(set(held)) == 1


def test_grouped_experts_agree_with_the_loop_over_slices():
    outputs = []
    x, y = batches(1)[0]
    for grouped in (True, False):
        model, _ = slice_model()
        for module in model.modules():
            if isinstance(module, MLPExperts):
                module.use_grouped_mm = grouped
        with torch.autocast("cuda", dtype=torch.bfloat16):
            _, loss, trace = model(x, y, return_trace=True)
        loss.backward()
        outputs.append((loss.detach(), trace.gated_output, model.transformer.h[0].mlp.experts.c_fc.grad))
    for a, b in zip(*outputs):
        assert (a - b).norm() < 0.02 * b.norm()


def test_bfloat16_takes_the_grouped_path_by_itself():
    model, _ = slice_model()
    experts = model.transformer.h[0].mlp.experts
    rows = torch.randn(8, 128, device="cuda")
    assert not experts._uses_grouped_mm(rows)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert experts._uses_grouped_mm(rows)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_was_not(tmp_path, dtype):
    keys = ["config/vertical_slice.py", "--device=cuda", f"--dtype={dtype}", "--wandb_log=False", "--eval_iters=2"]
    keys += ["--eval_interval=10", "--log_interval=5", "--dropout=0.1", "--use_noisy_top_k=True"]
    keys += ["--gradient_accumulation_steps=2"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert train.main([*keys, f"--out_dir={whole}", "--max_iters=20"]) == 0
    assert train.main([*keys, f"--out_dir={out}", "--max_iters=10"]) == 0
    assert train.main([*keys, f"--out_dir={out}", "--max_iters=20", "--init_from=resume"]) == 0
    assert differing_state(whole, out) == set()
    assert metrics(out, timeless=True) == metrics(whole, timeless=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_slice_trains(tmp_path, dtype):
    arguments = ["config/vertical_slice.py", "--device=cuda", f"--dtype={dtype}", "--max_iters=60", "--wandb_log=False"]
    assert train.main([*arguments, f"--out_dir={tmp_path}", "--eval_iters=4"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["val/loss"] < 3.2 < lines[0]["val/loss"]
    assert lines[-1]["coherence/L0/phi_slow_max"] > 0
