"""Properties that need a GPU: `pytest -m cuda`. The vertical slice's shape in bfloat16, experts through grouped_mm."""

import gc
import os
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import train
from chronomoe.fuse import fusion
from ops.dispatch import plan_dispatch
from ops.experts import MLPExperts
from ops.segment_sums import segment_sums
from tests.helpers.models import assert_same, build, chrono, state_of, tokens, training_step
from tests.helpers.runs import arguments, differing_state, metrics
from trainer.device import deterministic_algorithms

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once

bfloat16 = partial(torch.autocast, "cuda", dtype=torch.bfloat16)
SHAPE = dict(block_size=128, vocab_size=257, n_head=4, n_embd=128, use_switch_tfm_init=True, router_use_full_prec=True)


@pytest.fixture(autouse=True)
def fused():
    """Kernels are fused, as in train.py."""
    torch._dynamo.reset()
    with fusion():
        yield


def slice_on_gpu(n_layer=4, compiled=False, cuda_graphs=False):
    """Model, loop, 20 batches, and step(number, logged), which takes a TrainingStep and returns its loss."""
    model, loop = build(chrono(eta=0.05, bridge_threshold=0.01), device="cuda", n_layer=n_layer, **SHAPE)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cuda")
    forward = torch.compile(model, fullgraph=True) if compiled else None
    step = training_step(model, loop, optimizer, autocast=bfloat16, forward=forward, cuda_graphs=cuda_graphs)
    batches = [tuple(x.cuda() for x in tokens(seed, batch=16, model=model)) for seed in range(20)]
    return model, loop, batches, lambda n, logged=True: step([batches[n % 20]], n, logged=logged).trace.cross_entropy


@pytest.mark.parametrize("logged", [True, False])
def test_a_step_does_not_synchronize(logged):
    _, loop, _, step = slice_on_gpu()
    for number in (1, 2, 3):
        step(number, logged)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in (4, 5, 6):
            step(number, logged)
        with pytest.raises(RuntimeError):
            loop.coherence.phi("slow").sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loop.coherence.step == 6


def twenty_steps(**options):
    """State after 20 steps, the losses, and phi after the first step."""
    model, loop, _, step = slice_on_gpu(**options)
    first = step(1)
    phi = loop.coherence.phi("slow").clone()
    losses = torch.stack([first, *(step(number) for number in range(2, 21))])
    return state_of(model, loop) | {"losses": losses, "first phi": phi}


@pytest.mark.parametrize("compiled", [False, True])
def test_two_runs_with_deterministic_algorithms_are_bit_equal(compiled):
    with deterministic_algorithms():
        assert_same(twenty_steps(compiled=compiled), twenty_steps(compiled=compiled))


def test_steps_replayed_as_graphs_are_bit_equal_to_steps_without_graphs():
    with deterministic_algorithms():
        assert_same(twenty_steps(cuda_graphs=True), twenty_steps())


def test_a_fused_and_a_compiled_model_compute_what_the_eager_one_does():
    """In the first step; later, rounding in bfloat16 changes the routing of single tokens, and runs diverge."""
    with fusion(None):
        eager = twenty_steps()
    for found in (twenty_steps(), twenty_steps(compiled=True)):
        torch.testing.assert_close(found["losses"][0], eager["losses"][0], rtol=5e-3, atol=0)
        torch.testing.assert_close(found["first phi"], eager["first phi"], rtol=0, atol=0.05)
        assert (found["losses"][-1] - eager["losses"][-1]).abs() < 0.1 * (eager["losses"][0] - eager["losses"][-1])


def test_the_loop_takes_at_most_twelve_fused_kernels_and_as_many_eager_ones_for_any_number_of_layers():
    counts = []
    for backend, n_layer in ((None, 4), (None, 32), ("inductor", 4), ("inductor", 32)):
        with fusion(backend):
            model, loop, batches, _ = slice_on_gpu(n_layer)
            trace = model(*batches[0], return_trace=True, logged=False)[2]
            for _ in range(3):
                loop.step(trace)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                loop.step(trace)
                torch.cuda.synchronize()
        counts.append(sum(e.count for e in seen.key_averages() if e.self_device_time_total > 0))
    assert counts[0] == counts[1] > 12
    assert all(0 < count <= 12 for count in counts[2:])


def test_memory_does_not_grow():
    *_, step = slice_on_gpu()
    held = set()
    for number in range(1, 1001):
        step(number, logged=False)
        if number % 100 == 0:
            gc.collect()
            held.add(torch.cuda.memory_allocated())
    assert len(held) == 1


def test_grouped_mm_is_used_in_bfloat16_and_agrees_with_the_loop_over_experts():
    outputs = []
    for grouped in (None, True, False):
        model, _, batches, _ = slice_on_gpu()
        experts = [model.transformer.h[block].mlp.experts for block in model.config.moe_blocks]
        assert not experts[0].uses_grouped_mm(torch.empty(8, 128, device="cuda"))
        for module in experts:
            module.use_grouped_mm = grouped
        with bfloat16():
            _, loss, trace = model(*batches[0], return_trace=True)
        loss.backward()
        outputs.append((loss.detach(), trace.gated_output, experts[0].c_fc.grad))
    for chosen, by_groups, by_loop in zip(*outputs):
        assert torch.equal(chosen, by_groups)
        assert (by_groups - by_loop).norm() < 0.02 * by_loop.norm()


@pytest.mark.parametrize("sizes", [[5000, 0, 3, 2997], [0, 0, 0, 8000], [2000] * 4, [0, 0, 0, 0]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_per_expert_agree_with_float64_and_repeat_bit_for_bit(sizes, dtype):
    S, D = sum(sizes), 200
    weights, y = torch.rand(2, S, device="cuda"), torch.randn(S, D, device="cuda", dtype=dtype, requires_grad=True)
    offsets = torch.tensor(sizes, device="cuda").cumsum(0).int()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        sums = segment_sums(weights, y, offsets)
        torch.cuda.synchronize()
    assert {"_sum_chunks", "_add_parts"} <= {e.key for e in seen.key_averages()}
    assert torch.equal(segment_sums(weights, y, offsets), sums) and not sums.requires_grad
    compiled = torch.compile(segment_sums, fullgraph=True, dynamic=False)(weights, y, offsets)
    expected, size = (segment_sums(weights.double(), x, offsets) for x in (y, y.abs()))
    assert all(((found - expected).abs() <= 1e-6 * size).all() for found in (sums, compiled))


def test_a_row_that_is_not_finite_changes_the_sums_of_its_expert_only():
    weights, y = torch.rand(2, 900, device="cuda"), torch.randn(900, 64, device="cuda")
    offsets = torch.tensor([300, 300, 500, 900], device="cuda").int()
    expected = segment_sums(weights, y, offsets)
    y[499, 3] = torch.nan
    changed = (segment_sums(weights, y, offsets) != expected).nonzero().tolist()
    assert changed == [[0, 2, 3], [1, 2, 3]]


def test_gradients_of_experts_without_tokens_are_zero():
    """grouped_mm must write zeros: the memory that it gets holds NaN here."""
    experts = MLPExperts(8, 128, bias=True, dropout=0.0).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    for p in experts.parameters():
        p.data.normal_(std=0.02, generator=generator)
    with_tokens, without = torch.tensor([1, 2, 4, 5, 6], device="cuda"), [0, 3, 7]
    choice = with_tokens[torch.randint(5, (4096, 1), device="cuda", generator=generator)]
    rows, grad = (torch.randn(4096, 128, device="cuda", generator=generator) for _ in range(2))
    found = []
    for grouped in (True, False):
        experts.use_grouped_mm = grouped
        torch.full((1 << 26,), torch.nan, device="cuda")  # freed at once
        experts.zero_grad()
        x = rows.clone().requires_grad_()
        with bfloat16():
            y, sums = experts(x, plan_dispatch(choice, 8), torch.ones(1, 4096, device="cuda"))
        y.backward(grad.to(y.dtype))
        found.append([y.detach().float(), sums, x.grad, *(p.grad for p in experts.parameters())])
        assert all(p.grad[without].eq(0).all() for p in experts.parameters())
    for by_groups, by_loop in zip(*found):
        assert (by_groups - by_loop).norm() < 0.02 * by_loop.norm()


SLICE = dict(device="cuda", wandb_log=False)


@pytest.mark.parametrize(("dtype", "cuda_graphs"), [("bfloat16", False), ("bfloat16", True), ("float16", False)])
def test_a_resumed_run_is_bit_equal_to_one_that_was_not_stopped(tmp_path, dtype, cuda_graphs):
    settings = SLICE | dict(
        dtype=dtype, cuda_graphs=cuda_graphs, eval_iters=2, eval_interval=10, log_interval=5, max_iters=20
    )
    settings |= dict(dropout=0.1, use_noisy_top_k=True, gradient_accumulation_steps=2, deterministic=True)
    whole, out = tmp_path / "whole", tmp_path / "out"
    for changes in (dict(out_dir=whole), dict(out_dir=out, max_iters=10), dict(out_dir=out, init_from="resume")):
        assert train.main(["config/vertical_slice.py", *arguments(settings | changes)]) == 0
    assert differing_state(whole, out) == set()
    assert metrics(out, timeless=True) == metrics(whole, timeless=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_slice_trains(tmp_path, dtype):
    settings = SLICE | dict(dtype=dtype, max_iters=60, out_dir=tmp_path, eval_iters=4)
    assert train.main(["config/vertical_slice.py", *arguments(settings)]) == 0
    lines = metrics(tmp_path)
    assert lines[-1]["val/loss"] < 3.2 < lines[0]["val/loss"]
    assert lines[-1]["coherence/L0/phi_slow_max"] > 0
