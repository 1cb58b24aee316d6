"""What a training step costs with the loop on and off, and a MoE layer against a dense MLP of the same multiplications.

    python bench.py                      the vertical slice's shape, on CUDA if there is one
    python bench.py --repeats=50 --device=cpu

Competitors are timed in turn within one run, so that a machine whose speed drifts slows them alike; medians are
printed, with the ratio's spread over the middle half of the turns. On CUDA the experts run in bfloat16.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from chronomoe import ChronoConfig, ChronoLoop
from model import GPT, MLP, GPTConfig, MOELayer
from train import pick_device
from trainer.checkpoint import Keeper, copied
from trainer.errors import run
from trainer.guard import NonFiniteGuard
from trainer.ranks import Ranks, joined
from trainer.settings import read_config_file

sys.path.insert(0, str(Path(__file__).parent / "tests"))

from reference import one_hot_moe


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        with joined(device.type, "nccl") as ranks:
            across_ranks(ranks, pick_device(options.device, ranks), options.repeats)
        return 0
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine}; torch {torch.__version__}; {options.repeats} turns")

    print("\nwhole step of config/vertical_slice.py (forward, backward, clipping, AdamW, loop)")
    on, off = slice_step(device, steps_on=True), slice_step(device, steps_on=False)
    compare({"all steps off": off, "all steps on": on}, options.repeats, device)

    print("\nMoE layer, forward and backward, N=4096 tokens, E=8, K=2")
    for width in (128, 384):
        print(f"D={width}")
        compare(layers(device, width, num_tokens=4096), max(options.repeats // 3, 5), device)

    print("\na checkpoint of config/vertical_slice.py: how long saving holds training up")
    with tempfile.TemporaryDirectory() as folder:
        compare(saving(device, Path(folder)), max(options.repeats // 3, 5), device)
    return 0


def compare(competitors: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> None:
    """Time the competitors in turn and print each one's median, and its ratio to the first."""
    times: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in range(repeats + 2):
        for name, work in competitors.items():
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= 2:  # the first two turns warm up
                times[name].append((time.perf_counter() - start) * 1000)
    first = next(iter(times.values()))
    for name, ms in times.items():
        ratios = [a / b for a, b in zip(ms, first)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"  {name:24} {statistics.median(ms):9.2f} ms   {middle:6.3f} ({low:.3f} to {high:.3f})")


def autocast(device: torch.device):
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


def across_ranks(ranks: Ranks, device: torch.device, repeats: int) -> None:
    """What the trace's all-reduce and the hosts' agreement take of a step of the slice, on every rank."""
    model, optimizer, keys = slice_parts(device, steps_on=True)
    averaged = ranks.wrap(model, device)
    loop, guard = ChronoLoop(model.router_state, model.config.moe_blocks), NonFiniteGuard(model)
    ids = torch.randint(257, (keys["batch_size"], keys["block_size"] + 1), device=device)
    times: dict[str, list[float]] = {"step": [], "all-reduce of the trace": [], "agreement": []}
    for turn in range(repeats + 2):
        began = time.perf_counter()
        with autocast(device):
            _, loss, trace = averaged(ids[:, :-1], ids[:, 1:], return_trace=True)
        loss.backward()
        ranks.wait()  # or waiting for the slower rank would count as communication
        before = clock(device)
        total = trace.summed_over_ranks()
        reduced = clock(device)
        norms = guard.norms()
        optimizer.found_inf = guard.check(total, norms, 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loop.step(total, optimizer.found_inf)
        ranks.wait()
        agreeing = clock(device)
        ranks.agree(0, 0)
        end = clock(device)
        if turn >= 2:
            for name, took in zip(times, (end - began, reduced - before, end - agreeing)):
                times[name].append(took * 1000)
    if ranks.first:
        size = sum(x.numel() * x.element_size() for x in total.present().values())
        print(f"{ranks.count} ranks, {device}; torch {torch.__version__}; {repeats} steps of config/vertical_slice.py")
        step = statistics.median(times["step"])
        for name, ms in times.items():
            print(f"  {name:24} {statistics.median(ms):9.3f} ms   {statistics.median(ms) / step:.4f} of a step")
        print(f"  the trace is {size:,} bytes")


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def slice_parts(device: torch.device, steps_on: bool) -> tuple[GPT, torch.optim.Optimizer, dict[str, object]]:
    """The slice's model, its optimizer and its settings."""
    keys = read_config_file(str(Path(__file__).parent / "config" / "vertical_slice.py"))
    names = set(GPTConfig.__dataclass_fields__)
    steps = dict(router=True, coherence=True, beta=True, bridge=True, lifecycle=True) if steps_on else {}
    shape = {key: value for key, value in keys.items() if key in names}
    config = GPTConfig(vocab_size=257, bias=False, chrono=ChronoConfig(**steps), **shape)
    model = GPT(config, torch.Generator().manual_seed(0)).to(device)
    return model, model.configure_optimizers(0.1, 1e-4, (0.9, 0.99), device.type), keys


def slice_step(device: torch.device, steps_on: bool) -> Callable[[], object]:
    """One training step at the slice's shape, on a fixed batch of random tokens."""
    model, optimizer, keys = slice_parts(device, steps_on)
    config = model.config
    loop = ChronoLoop(model.router_state, config.moe_blocks)
    guard = NonFiniteGuard(model)
    ids = torch.randint(257, (keys["batch_size"], config.block_size + 1), generator=torch.Generator().manual_seed(1))
    ids = ids.to(device)
    idx, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> None:
        with autocast(device):
            _, loss, trace = model(idx, targets, return_trace=True)
        loss.backward()
        norms = guard.norms()
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, torch.linalg.vector_norm(norms))
        optimizer.found_inf = found_inf = guard.check(trace, norms, 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loop.step(trace, found_inf)

    return step


def saving(device: torch.device, folder: Path) -> dict[str, Callable[[], object]]:
    """Copying the state, what Keeper.save takes of the training loop, and the whole of it with the disk."""
    model, optimizer, _ = slice_parts(device, steps_on=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": 1}
    keeper = Keeper(folder, print, lambda: None, interval=0, minutes=0)

    def save_and_wait() -> None:
        keeper.save(state)
        keeper.wait()

    def save() -> None:
        keeper.save(state)

    def wait() -> None:
        keeper.wait()

    # in this order `save` finds the thread idle, and does not wait for an earlier one
    return {
        "copying the state": lambda: copied(state),
        "save": save,
        "writing what was left": wait,
        "save and write": save_and_wait,
    }


def layers(device: torch.device, width: int, num_tokens: int) -> dict[str, Callable[[], object]]:
    """A dense MLP of the same multiplications (on K times the tokens), our layer, and nanoMoE's one-hot dispatch."""
    config = GPTConfig(n_embd=width, n_head=1, n_exp=8, top_k=2, bias=False)
    torch.manual_seed(0)
    dense, moe = MLP(config).to(device), MOELayer(config).to(device)
    with torch.no_grad():
        for p in (*dense.parameters(), *moe.parameters()):
            p.normal_(std=0.02)
    capacity = MOELayer(replace(config, train_capacity=1.25)).capacity(num_tokens)  # nanoMoE's default
    x = torch.randn(1, num_tokens, width, device=device, requires_grad=True)
    twice = torch.randn(1, config.top_k * num_tokens, width, device=device, requires_grad=True)

    def through(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def work() -> None:
            with autocast(device):
                y = forward()
            y.backward(torch.ones_like(y))

        return work

    def by_one_hot() -> torch.Tensor:
        routing = moe.router(x[0])
        return one_hot_moe(x[0], routing.experts, routing.gates, moe.experts.c_fc, moe.experts.c_proj, capacity)

    return {
        "dense MLP": through(lambda: dense(twice)),
        "MoE layer": through(lambda: moe(x, None, False)[0]),
        "one-hot, capacity 1.25": through(by_one_hot),
    }


if __name__ == "__main__":
    run(main)
