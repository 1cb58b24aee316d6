"""Time and profile the training step of a checkout, for profile.py.

    python benchmark/one_step.py CHECKOUT SHAPE STEPS

Uses only functions that old checkouts have too, so that they can be compared with this one. So it does not use
trainer/step.py.
"""

import inspect
import json
import os
import resource
import statistics
import sys
import time


def main(checkout: str, shape: str, steps: int) -> None:
    sys.path[0] = checkout  # instead of the folder of this file
    import torch
    from torch.profiler import ProfilerActivity, profile

    from chronomoe import ChronoConfig, ChronoLoop
    from model import GPT, GPTConfig
    from trainer.flops import flops_per_token
    from trainer.guard import NonFiniteGuard

    shapes = {
        "slice": (16, dict(n_layer=4, n_head=4, n_embd=128, block_size=128, vocab_size=257)),
        "nanoMoE": (4, dict(n_layer=6, n_head=6, n_embd=384, block_size=1024, vocab_size=50304)),
    }
    rows, arguments = shapes[shape]
    config = GPTConfig(
        n_exp=8, top_k=2, bias=False, use_aux_loss=True, use_router_z_loss=True, use_switch_tfm_init=True,
        router_use_full_prec=True,
        chrono=ChronoConfig(router=True, coherence=True, beta=True, bridge=True, lifecycle=True), **arguments,
    )  # fmt: skip
    model = GPT(config, torch.Generator().manual_seed(0))
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.99), "cpu")
    loop, guard = ChronoLoop(model.router_state, config.moe_blocks), NonFiniteGuard(model)
    ids = torch.randint(257, (rows, config.block_size + 1), generator=torch.Generator().manual_seed(1))
    idx, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    parameters = inspect.signature(model.forward).parameters
    options = {"return_trace": True}
    if "logged" in parameters:
        options |= {"logged": False, "return_logits": False}
    elif "return_logits" in parameters:  # before `logged`, "state" left out the fields that are only logged
        options |= {"return_trace": "state", "return_logits": False}

    def step() -> None:
        _, loss, trace = model(idx, targets, **options)
        loss.backward()
        norms = guard.norms()
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, torch.linalg.vector_norm(norms))
        optimizer.found_inf = found_inf = guard.check(trace, norms, 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loop.step(trace, found_inf)

    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1000)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    operators = {event.key: event.self_cpu_time_total / 1000 for event in profiled.key_averages()}
    most = sorted(operators, key=operators.get, reverse=True)[:12]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if os.path.exists("/proc/self/status"):  # ru_maxrss would include the process that started this one
        with open("/proc/self/status") as status:
            peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    answer = {
        "ms": statistics.median(times[1:]),
        "peak_bytes": peak,
        "operators": {name: operators[name] for name in most},
        "all_operators_ms": sum(operators.values()),
        "flops": flops_per_token(model) * idx.numel(),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
