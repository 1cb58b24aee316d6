"""Run everything that needs a GPU: the tests marked `cuda`, training runs, timings, kernels, and the targets.

    python -m benchmark.gpu                     all stages, at most nine minutes on one GPU
    python -m benchmark.gpu layer kernels       some stages

Writes to --out: gpu.json, after every stage; gpu.md, the same as tables for docs/benchmarks.md; and the output of each
stage. A stage that crashes or hangs does not affect the others, and Ctrl-C keeps what is done. Needs no network.

stages, the most important first:
       facts                      device, versions, matmul rate
       layer                      the MoE layer, a dense MLP, and other MoE layers
       step-SHAPE                 training step without the loop's five steps, with them, and of a dense GPT
       tests                      pytest -m cuda
       train                      600 steps of train.py with the five steps on, beta off, all off
       waits, kernels             waits for the GPU, held memory; kernels by number and time
       step-SHAPE-VARIANT         the training step replayed as CUDA graphs; without fused kernels; compiled as a whole
       repeats                    tensors that differ between two runs
       repeats-deterministic      the same with deterministic algorithms
"""

from __future__ import annotations

from trainer.errors import UserError, first_line, run_script  # first, so that Ctrl-C during the other imports is quiet

# isort: split

import faulthandler
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from benchmark import layer, markdown, rates
from benchmark.rates import make_dense
from benchmark.stages import Stage, run_stages
from benchmark.step import SliceStep
from benchmark.timing import Effort, Report, clock, time_in_turns, verdict
from chronomoe.fuse import fusion
from chronomoe.options import option, options_of
from trainer import cli
from trainer.device import deterministic_algorithms, kernel_fusion
from trainer.environment import describe_environment
from trainer.files import atomic_write
from trainer.flops import flops_per_token, peak

ROOT = Path(__file__).parent.parent
LAYERS = [(16384, 768, 8, 2), (4096, 768, 8, 2), (16384, 768, 32, 2)]  # N, D, E, K
GPT2 = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304)
SHAPES = rates.ON_GPU | {
    "GPT-2": GPT2 | dict(top_k=1, norm_topk_prob=False, batch_size=16),  # 124 M active parameters
}
# how a step runs; all but 'eager' with fused kernels
VARIANTS: dict[str, Callable[[SliceStep], object]] = {
    "eager": lambda step: None,
    "fused": lambda step: None,
    "graphs": SliceStep.use_graphs,
    "compiled": SliceStep.compile,
}
CUDA_TESTS = "tests/test_cuda.py"  # collecting all tests would import what only others need
CONFIGS = ("vertical_slice", "beta_off", "plain")


def measure_facts(report: Report, device: torch.device) -> None:
    """Device, versions, and the measured matmul rate."""
    properties = torch.cuda.get_device_properties(device)
    assumed = peak(device, "bfloat16")
    found = {
        "device": properties.name,
        "compute capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "multiprocessors": str(properties.multi_processor_count),
        "peak in trainer/flops.py": f"{assumed / 1e12:g} TFLOP/s" if assumed else "unknown",
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        "CPU": f"{platform.machine()}, {os.cpu_count()} cores",
        "nvidia-smi: driver, clocks, power limit, temperature, utilization": nvidia_smi(),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }
    found |= {name: str(value) for name, value in describe_environment().items()}
    for package in ("triton", "transformers", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    report.checks("facts", "where it ran", [(name, None, value) for name, value in found.items()])
    rate = rates.matmul_rates(device, Effort(2, 7, 100))["torch.mm"]
    report.numbers("facts", "matmul rate, measured in bfloat16", [("torch.mm", rate / 1e12, "TFLOP/s")])


def nvidia_smi() -> str:
    query = "driver_version,clocks.sm,clocks.max.sm,power.limit,temperature.gpu,utilization.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as e:
        return type(e).__name__


def measure_layers(report: Report, device: torch.device) -> None:
    """The competitors of bench.py at LAYERS. One that raises an error is left out."""
    for shape in LAYERS:
        work, skew = layer.competitors(*shape, device)
        for name, competitor in [*work.items()]:
            try:
                competitor()
            except RuntimeError as e:
                del work[name]
                where = ", ".join(f"{letter}={size}" for letter, size in zip("NDEK", shape))
                report.checks("layer", "competitors that are left out", [(f"{name}, {where}", False, first_line(e))])
        layer.compare(report, shape, [{"times": time_in_turns(work, device, Effort(3, 7, 60)), "skew": skew}])


def has_steps_off(shape: str, variant: str) -> bool:
    """Whether the step with the loop off is measured. Compiling takes a minute or more at the larger shapes."""
    return variant != "compiled" or shape == "slice"


def in_variant(variant: str) -> AbstractContextManager[None]:
    """The context in which the steps of a variant run."""
    return fusion(None if variant == "eager" else "inductor")


def measure_step(report: Report, device: torch.device, shape: str, variant: str) -> None:
    """The training step of the dense GPT, and of the MoE GPT with all five steps of the loop off and on."""
    moe = SliceStep(device, **SHAPES[shape])
    work = {"dense GPT": SliceStep(device, (), prepare=make_dense, **SHAPES[shape])}
    if has_steps_off(shape, variant):
        work["all steps off"] = SliceStep(device, (), **SHAPES[shape])
    work["all steps on"] = moe
    with in_variant(variant):
        for name, step in work.items():
            VARIANTS[variant](step)
            began = clock(device)
            step()
            first = (f"{name}, {shape}, {variant}", clock(device) - began, "s")
            report.numbers("step", "time of the first training step, with compiling", [first])
        times = time_in_turns(work, device, Effort(5, 7, 60))
    tokens = moe.batch[0].numel()
    title = f"training step at the shape of {shape}, {variant}, {tokens} tokens"
    pairs = [("all steps on", "all steps off")]
    report.comparison("step", title, times, pairs, shape=shape, variant=variant)
    flops, assumed = flops_per_token(moe.model) * tokens, peak(device, "bfloat16")
    lines: list[tuple[str, float, str]] = [("active parameters", moe.model.num_active_params(), "")]
    for name, ms in times.items():
        seconds = statistics.median(ms) / 1000
        lines.append((name, round(tokens / seconds), "tokens/s"))
        if assumed:
            lines.append((f"{name}: MFU", 100 * flops / seconds / assumed, "%"))
    report.numbers("step", f"rates of the {title}", lines)


def run_tests(report: Report, device: torch.device) -> None:
    """Run the tests marked `cuda`. After a crash, the tests that follow run in a new process."""
    import pytest

    from benchmark import outcomes  # the plugin, which writes the tables itself

    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "benchmark.outcomes", "-p", "no:cacheprovider"]
    command += ["--tb=short"]  # the long form prints tensors
    command += ["-o", "faulthandler_timeout=60", "-o", "faulthandler_exit_on_timeout=true"]  # seconds per test
    command += [CUDA_TESTS]
    while True:
        before = len(outcomes.seen())
        status = subprocess.run(command, cwd=ROOT).returncode
        checks = [*outcomes.seen().values()]
        if len(checks) == before and (status != pytest.ExitCode.NO_TESTS_COLLECTED or not checks):
            raise RuntimeError(f"pytest ended with status {status} before it ran a test")
        if len(checks) == before or checks[-1]["detail"] != outcomes.STARTED:
            return


def measure_training(report: Report, device: torch.device) -> None:
    """600 steps of train.py with each of CONFIGS."""
    changes = ["--device=cuda", "--wandb_log=False", "--max_iters=600", "--lr_decay_iters=600", "--eval_interval=200"]
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "train.py", f"config/{name}.py", f"--out_dir={folder}", *changes]
            status = subprocess.run(command, cwd=ROOT).returncode
            text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8") if status == 0 else ""
        check = (name, status == 0, f"exit status {status}")
        report.checks("train", "runs of train.py that end without an error", [check])
        lines = [json.loads(line) for line in text.splitlines()]
        if lines:
            ms = statistics.median([line["time/step_ms"] for line in lines if "time/step_ms" in line][2:])
            numbers = [("validation loss", lines[-1]["val/loss"], "nats per token"), ("step", ms, "ms")]
            if "time/mfu" in lines[-1]:
                numbers.append(("MFU, last line", 100 * lines[-1]["time/mfu"], "%"))
            named = [(f"{name}: {what}", value, unit) for what, value, unit in numbers]
            report.numbers("train", "runs of train.py, 600 steps", named)


def measure_waits(report: Report, device: torch.device) -> None:
    rates.waits(report, device)
    rates.held_memory(report, device)


def measure_kernels(report: Report, device: torch.device) -> None:
    rates.kernels(report, device)


def measure_repeats(report: Report, device: torch.device, deterministic: bool) -> None:
    """Which tensors differ after 10 steps of two runs. The cuda tests have the slice with deterministic algorithms."""
    cases = [("nanoMoE", "fused")]
    if not deterministic:
        cases += [("slice", variant) for variant in ("eager", "fused", "compiled")]
    title = f"two runs of 10 steps, deterministic={deterministic}"
    with deterministic_algorithms() if deterministic else nullcontext():
        for shape, variant in cases:
            first, second = (state_after(10, device, shape, variant) for _ in range(2))
            differing = [name for name in first if not torch.equal(first[name], second[name])]
            detail = f"{len(differing)} of {len(first)} tensors differ"
            if differing:
                detail += f": {', '.join(differing[:8])}"
            ok = not differing if deterministic else None
            report.checks("repeats", title, [(f"{shape}, {variant}", ok, detail)])


def state_after(steps: int, device: torch.device, shape: str, variant: str) -> dict[str, Tensor]:
    """Weights and state of the loop after some training steps, by name."""
    step = SliceStep(device, **SHAPES[shape])
    VARIANTS[variant](step)
    with in_variant(variant):
        for _ in range(steps):
            step()
    state, _ = tree_flatten_with_path([step.model.state_dict(), step.loop.state_dict()])
    return {".".join(str(key.key) for key in path[1:]): value.cpu() for path, value in state}


# Stages, the most important first: (seconds expected on an H100, function).
STAGES: dict[str, tuple[float, Callable[[Report, torch.device], object]]] = {
    "facts": (20, measure_facts),
    "layer": (35, measure_layers),
    "step-nanoMoE": (40, partial(measure_step, shape="nanoMoE", variant="fused")),
    "step-GPT-2": (40, partial(measure_step, shape="GPT-2", variant="fused")),
    "tests": (100, run_tests),
    "train": (75, measure_training),
    "step-slice": (35, partial(measure_step, shape="slice", variant="fused")),
    "step-slice-graphs": (35, partial(measure_step, shape="slice", variant="graphs")),
    "step-slice-eager": (20, partial(measure_step, shape="slice", variant="eager")),
    "waits": (20, measure_waits),
    "kernels": (25, measure_kernels),
    "step-slice-compiled": (50, partial(measure_step, shape="slice", variant="compiled")),
    "step-nanoMoE-compiled": (130, partial(measure_step, shape="nanoMoE", variant="compiled")),
    "repeats": (35, partial(measure_repeats, deterministic=False)),
    "repeats-deterministic": (20, partial(measure_repeats, deterministic=True)),
    "step-GPT-2-compiled": (200, partial(measure_step, shape="GPT-2", variant="compiled")),
}


def measured_steps() -> list[tuple[str, str]]:
    """Shape and variant of each stage that measures a training step."""
    partials = [work for _, work in STAGES.values() if isinstance(work, partial)]
    return [(work.keywords["shape"], work.keywords["variant"]) for work in partials if work.func is measure_step]


def run_stage(name: str, file: str) -> None:
    """Run a stage in this process. Its tables are appended to the file."""

    def write(table: dict) -> None:
        with open(file, "a", encoding="utf-8") as f:
            f.write(json.dumps(table) + "\n")

    faulthandler.enable()
    os.environ["OUTCOMES"] = file  # for benchmark.outcomes
    torch.set_float32_matmul_precision("high")  # as train.py does
    device = torch.device("cuda")
    fused, notes = kernel_fusion(compile=False, fuse=True, device=device)
    print(*notes, sep="\n")
    with fused:
        STAGES[name][1](Report(on_table=write), device)
    sys.stdout.flush()
    os._exit(0)  # on CUDA a thread of autograd can abort the process while Python exits


def targets(tables: list[dict]) -> list[dict]:
    """The targets with the measured ratios. `value` and `met` are None for what was not measured."""

    def of(row: str, **facts) -> dict | None:
        for table in tables:
            if "rows" in table and all(table.get(name) == value for name, value in facts.items()):
                rows = {each["name"]: each for each in table["rows"]} | table["pairs"]
                return rows.get(row)
        return None

    def compared(name: str, bound: str, limit: float, row: dict | None, inverse: bool = False) -> dict:
        value, low, high = (row["ratio"], row["low"], row["high"]) if row else (None, None, None)
        if row and inverse:
            value, low, high = 1 / row["ratio"], 1 / row["high"], 1 / row["low"]
        met = None if value is None else value <= limit if bound == "at most" else value >= limit
        return {"name": name, "bound": bound, "limit": limit, "value": value, "low": low, "high": high, "met": met}

    found = []
    sizes = [dict(zip("NDEK", shape)) for shape in LAYERS]
    at = [", ".join(f"{letter}={size}" for letter, size in each.items()) for each in sizes]
    row = of("MoE layer, balanced", part="layer", **sizes[0])
    found.append(compared(f"MoE layer / dense MLP, {at[0]}", "at most", 1.15, row))
    for shape, variant in measured_steps():
        facts = dict(part="step", shape=shape, variant=variant)
        name, row = f"step, all steps on / off: {shape}, {variant}", of("all steps on / all steps off", **facts)
        if has_steps_off(shape, variant):
            found.append(compared(name, "at most", 1.005, row))
        if variant != "fused":  # a dense GPT has nothing to fuse
            name, row = f"MFU, MoE GPT / dense GPT: {shape}, {variant}", of("all steps on", **facts)
            found.append(compared(name, "at least", 0.9, row, inverse=True))
    for other in ("grouped layer", "transformers, grouped_mm", "transformers, eager"):
        for each, where in zip(sizes, at):
            row = of(f"MoE layer, balanced / {other}", part="layer", **each)
            found.append(compared(f"MoE layer / {other}, {where}", "at most", 1.0, row))
    return found


@dataclass
class Options:
    """The options of benchmark.gpu."""

    out: str = option("out/gpu", "folder of the results")
    seconds: float = option(530.0, "time for all stages", above=0)


def main(arguments: list[str]) -> int:
    if cli.asks_for_help(arguments):
        print(cli.help_text(__doc__, options_of(Options)))
        return 0
    line = cli.parse(arguments, options_of(Options), positional=True)
    options = Options(**line.options)
    unknown = [name for name in line.arguments if name not in STAGES]
    if unknown:
        raise UserError(f"no stage {unknown[0]!r}: there are {', '.join(STAGES)}")
    if not torch.cuda.is_available():
        raise UserError(f"torch {torch.__version__} finds no CUDA device; bench.py measures on a CPU")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    print(f"results: {out / 'gpu.json'}, {out / 'gpu.md'}", flush=True)
    command = "python -m benchmark.gpu " + shlex.join(arguments)
    call = "import sys; from benchmark.gpu import run_stage; run_stage(*sys.argv[1:])"
    stages = [Stage(name, (sys.executable, "-c", call, name), STAGES[name][0]) for name in line.arguments or STAGES]
    save = partial(save_results, out, command.strip())
    environment = os.environ | {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    results = run_stages(stages, out, options.seconds, save, environment)
    tables = [table for result in results for table in result.tables]
    for target in targets(tables):
        print("  ".join(f"{text:{width}}" for text, width in zip(markdown.target_cells(target), (64, 14, 24, 12))))
    failed = [check for table in tables for check in table.get("checks", []) if check["ok"] is False]
    for check in failed:
        print(f"{check['name']}: {verdict(check)}")
    print(f"{len(failed)} checks failed; results: {out / 'gpu.json'}, {out / 'gpu.md'}")
    return int(bool(failed) or any(result.status in ("failed", "timeout") for result in results))


def save_results(out: Path, command: str, stages: list[dict]) -> None:
    """Write gpu.json and gpu.md."""
    tables = [table for stage in stages for table in stage["tables"]]
    results = {"command": command, "targets": targets(tables), "stages": stages}
    for name, text in {"gpu.json": json.dumps(results, indent=1), "gpu.md": markdown.document(results)}.items():
        with atomic_write(out / name) as f:
            f.write(text.encode())


if __name__ == "__main__":
    run_script(main)
