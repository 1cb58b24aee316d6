"""CUDA graphs, with a stand-in for the capture: a replay calls the recorded function and writes to the same tensors."""

import itertools
from contextlib import nullcontext

import pytest
import torch

from tests.helpers.models import adamw, assert_same, build, chrono, state_of, tokens, training_step
from trainer import graphs
from trainer.device import kernel_fusion
from trainer.errors import UserError


@pytest.fixture
def recorded(monkeypatch):
    """Replaces the capture. The number of captures and of replays."""
    count = {"captures": 0, "replays": 0}

    def capture(work, pool):
        count["captures"] += 1
        trace = [work() for _ in range(graphs.WARM_UP)][-1]

        def replay():
            count["replays"] += 1
            for name, value in work().present().items():
                getattr(trace, name).copy_(value)

        return trace, replay

    monkeypatch.setattr(graphs, "capture", capture)
    return count


@pytest.mark.parametrize(("micro_batches", "signal"), [(1, "coherence"), (3, "first_order")])
def test_replayed_steps_leave_the_same_bits_as_steps_without_graphs(micro_batches, signal, recorded):
    states = []
    for cuda_graphs in (False, True):
        model, loop = build(chrono(eta=0.1, signal=signal), dropout=0.1, use_noisy_top_k=True)
        step = training_step(model, loop, adamw(model), micro_batches=micro_batches, cuda_graphs=cuda_graphs)
        torch.manual_seed(0)
        batches = [tokens(seed, batch=4) for seed in range(micro_batches)]
        found = [step(batches, number, lr=1e-2, logged=number % 2 == 0) for number in range(1, 6)]
        traces = {f"{i} {name}": value for i, r in enumerate(found) for name, value in r.trace.present().items()}
        states.append(state_of(model, loop) | traces)
    assert recorded == {"captures": 2, "replays": 5 * micro_batches}
    assert_same(*states)


def test_cuda_graphs_on_a_cpu_are_refused(start, out):
    with pytest.raises(UserError, match="cuda_graphs=True needs CUDA and one rank"):
        start(out, cuda_graphs=True)
    assert not (out / "metrics.jsonl").exists()


def test_where_torch_compile_fails_compile_is_refused_and_fuse_is_left_out(start, out, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("Failed to find C compiler\nand more")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(UserError, match=r"compile=True needs .* failed: RuntimeError: Failed to find C compiler$"):
        start(out, compile=True)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)  # no CUDA here
    context, (note,) = kernel_fusion(compile=False, fuse=True, device=torch.device("cuda"))
    assert isinstance(context, nullcontext) and "kernels are not fused" in note


def test_kernels_are_fused_on_cuda_and_where_the_model_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: x)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    for compile, fuse, device in itertools.product((False, True), (False, True), ("cpu", "cuda")):
        context, notes = kernel_fusion(compile, fuse, torch.device(device))
        is_fused = compile or (fuse and device == "cuda")
        assert isinstance(context, nullcontext) != is_fused
        assert notes == ["the first steps are slow, because torch.compile runs"] * is_fused
