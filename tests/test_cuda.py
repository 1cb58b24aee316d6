"""Properties that need a GPU: `pytest -m cuda`. The vertical slice's shape in bfloat16, experts through grouped_mm."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import train
from chronomoe import ChronoLoop
from model import GPT, GPTConfig
from ops.experts import MLPExperts
from tests.helpers.models import assert_same, chrono, state_of, tokens, training_step
from tests.helpers.runs import differing_state, metrics

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def slice_model(n_layer=4):
    config = GPTConfig(
        block_size=128, vocab_size=257, n_layer=n_layer, n_head=4, n_embd=128, bias=False, n_exp=8, use_aux_loss=True,
        use_router_z_loss=True, use_switch_tfm_init=True, router_use_full_prec=True,
        chrono=chrono(eta=0.05, bridge_threshold=0.01),
    )  # fmt: skip
    model = GPT(config, torch.Generator().manual_seed(0)).cuda()
    return model, ChronoLoop(model.router_state, config.moe_blocks)


def batch(model, seed=0):
    return tuple(x.cuda() for x in tokens(seed, batch=16, model=model))


def bfloat16():
    return torch.autocast("cuda", dtype=torch.bfloat16)


def step_of(model, loop, forward=None):
    """step(seed, logged) takes one TrainingStep and returns its cross-entropy."""
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cuda")
    step = training_step(model, loop, optimizer, autocast=bfloat16, forward=forward)
    return lambda seed, logged=True: step([batch(model, seed)], seed + 1, logged=logged).trace.cross_entropy


@pytest.mark.parametrize("logged", [True, False])
def test_a_step_does_not_synchronize(logged):
    model, loop = slice_model()
    step = training_step(model, loop, model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cuda"), autocast=bfloat16)
    batches = [batch(model, seed) for seed in range(6)]
    for number in (1, 2, 3):
        step([batches[number - 1]], number, logged=logged)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in (4, 5, 6):
            step([batches[number - 1]], number, logged=logged)
        with pytest.raises(RuntimeError):
            loop.coherence.phi("slow").sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loop.coherence.step == 6


def test_two_runs_are_bit_equal():
    runs = []
    for _ in range(2):
        model, loop = slice_model()
        step = step_of(model, loop)
        losses = torch.stack([step(seed) for seed in range(20)])
        runs.append(state_of(model, loop) | {"losses": losses})
    assert_same(*runs)


def test_compiled_in_one_graph_it_trains_as_eager_does_within_bfloat16():
    runs = []
    for compiled in (False, True):
        model, loop = slice_model()
        if compiled:
            loop.compile()
        step = step_of(model, loop, torch.compile(model, fullgraph=True) if compiled else None)
        losses = torch.stack([step(seed) for seed in range(20)])
        runs.append((losses, loop.coherence.phi("slow")))
    torch.testing.assert_close(*(losses for losses, _ in runs), rtol=0.01, atol=0)
    torch.testing.assert_close(*(phi for _, phi in runs), rtol=0, atol=0.02)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_number_of_kernels_of_the_loop_does_not_depend_on_the_number_of_layers(compiled):
    counts = []
    for n_layer in (4, 32):
        model, loop = slice_model(n_layer)
        if compiled:
            loop.compile()
        trace = model(*batch(model), return_trace=True, logged=False)[2]
        for _ in range(3):
            loop.step(trace)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            loop.step(trace)
            torch.cuda.synchronize()
        counts.append(sum(e.count for e in seen.key_averages() if e.self_device_time_total > 0))
    assert counts[0] == counts[1] > 0


def test_memory_does_not_grow():
    step = step_of(*slice_model())
    held = set()
    for count in range(1000):
        step(0, logged=False)
        if count % 100 == 99:
            held.add(torch.cuda.memory_allocated())
    assert len(held) == 1


def test_grouped_mm_is_used_in_bfloat16_and_agrees_with_the_loop_over_experts():
    outputs = []
    for grouped in (None, True, False):
        model, _ = slice_model()
        experts = [module for module in model.modules() if isinstance(module, MLPExperts)]
        for module in experts:
            module.use_grouped_mm = grouped
        with bfloat16():
            _, loss, trace = model(*batch(model), return_trace=True)
            assert experts[0]._uses_grouped_mm(torch.empty(8, 128, device="cuda")) == (grouped is not False)
        loss.backward()
        outputs.append((loss.detach(), trace.gated_output, experts[0].c_fc.grad))
    assert not slice_model()[0].transformer.h[0].mlp.experts._uses_grouped_mm(torch.empty(8, 128, device="cuda"))
    for chosen, by_groups, by_loop in zip(*outputs):
        assert torch.equal(chosen, by_groups)
        assert (by_groups - by_loop).norm() < 0.02 * by_loop.norm()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_resumed_run_is_bit_equal_to_one_that_was_not_stopped(tmp_path, dtype):
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
    lines = metrics(tmp_path)
    assert lines[-1]["val/loss"] < 3.2 < lines[0]["val/loss"]
    assert lines[-1]["coherence/L0/phi_slow_max"] > 0
