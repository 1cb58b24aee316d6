"""The training step of the slice: what each of the five steps adds, and where the loop's time goes."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import model as model_module
import ops.experts as experts_module
from benchmark import one_hot
from benchmark.timing import Effort, Report, autocast, clock, in_turns, stopwatch
from chronomoe import ChronoConfig, ChronoLoop, MoETrace
from chronomoe.config import STEPS
from model import GPT, GPTConfig
from trainer.checkpointer import Checkpointer, copy_to_cpu
from trainer.distributed import World
from trainer.guard import NonFiniteGuard
from trainer.progress import Progress
from trainer.settings import given
from trainer.step import StepResult, TrainingStep

SLICE = Path(__file__).parent.parent / "config" / "vertical_slice.py"
# functions that compute statistics in forward
STATISTICS = (
    (model_module, "collect_trace"),
    (model_module, "row_weights"),
    (experts_module, "_weighted_sum"),
    (experts_module, "_weighted_sums_by_mask"),
)


class SliceStep:
    """A TrainingStep of the slice on one fixed batch of random tokens. Call it to take one step.

    Args:
        device: where it runs.
        steps: steps of the plan that are on.
        batch_size: sequences per batch; None: the slice's.
        prepare: may change the model before it is moved to the device.
        world: the ranks.
        changes: settings that differ from the slice's.
    """

    def __init__(
        self,
        device: torch.device,
        steps: tuple[str, ...] = STEPS,
        batch_size: int | None = None,
        prepare: Callable[[GPT], object] | None = None,
        world: World | None = None,
        **changes,
    ):
        keys = given([str(SLICE)]) | changes
        shape = {key: value for key, value in keys.items() if key in GPTConfig.__dataclass_fields__}
        shape = dict(vocab_size=257, bias=False) | shape
        config = GPTConfig(chrono=ChronoConfig(**dict.fromkeys(steps, True)), **shape)
        model = GPT(config, torch.Generator().manual_seed(0))
        if prepare is not None:
            prepare(model)
        self.model = model.to(device)
        self.optimizer = self.model.configure_optimizers(0.1, 1e-4, (0.9, 0.99), device.type)
        self.loop = ChronoLoop(self.model.router_state, config.moe_blocks)
        self.step = TrainingStep(
            self.model, self.optimizer, self.loop, NonFiniteGuard(self.model),
            torch.amp.GradScaler(device.type, enabled=False), autocast=partial(autocast, device),
            forward=(world or World()).wrap_ddp(self.model, device), world=world,
        )  # fmt: skip
        rows = batch_size or keys["batch_size"]
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(config.vocab_size, (rows, config.block_size + 1), generator=generator).to(device)
        self.batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def __call__(self, logged: bool = False) -> StepResult:
        return self.step([self.batch], step=1, logged=logged)

    def logged(self) -> None:
        """A step that logs: it computes and reads all metrics."""
        self(logged=True)
        self.loop.read()


def measure(report: Report, device: torch.device, effort: Effort, quick: bool) -> None:
    """The steps of the loop added one by one; all on and off; one-hot dispatch; statistics and loop by themselves."""
    work: dict[str, Callable[[], None]] = {"all steps off": SliceStep(device, ())}
    for count, name in enumerate(STEPS, 1):
        work[f"+ {name}"] = SliceStep(device, STEPS[:count])
    title = "training step of config/vertical_slice.py, the five steps added one by one"
    report.compare("step", title, in_turns(work, device, effort))

    on = SliceStep(device)
    work = {"all steps off": SliceStep(device, ()), "all steps on": on, "all steps on, and logged": on.logged}
    title = "the same, all on against all off"
    report.compare("step", title, in_turns(work, device, Effort(2 * effort.seconds, effort.least, 4 * effort.most)))

    plain = SliceStep(device, (), prepare=one_hot.put_into)
    work = {"all steps on": SliceStep(device), "all off, one-hot dispatch": plain}
    report.compare("step", "the same, against one-hot dispatch", in_turns(work, device, effort))
    by_themselves(report, device, effort)


def by_themselves(report: Report, device: torch.device, effort: Effort) -> None:
    """Statistics in forward and the loop: inside a step, where the caches hold other things, and repeated."""
    places = [*STATISTICS, (ChronoLoop, "step")]
    steps: list[float] = []
    spent: list[dict[str, float]] = []
    step = SliceStep(device)
    began = clock(device)
    while len(steps) < effort.least + 2 or (clock(device) - began < effort.seconds and len(steps) < effort.most):
        with stopwatch(device, places) as seconds:
            start = clock(device)
            step()
            steps.append(clock(device) - start)
        spent.append(seconds)
    shares = [{name: value / total for name, value in each.items()} for each, total in zip(spent, steps)][2:]
    inside = {
        "statistics in forward": statistics.median(sum(share[name] for _, name in STATISTICS) for share in shares),
        "the loop": statistics.median(share["step"] for share in shares),
        "together": statistics.median(sum(share.values()) for share in shares),
    }
    lines = [(f"{name}, in the step", 100 * share, "% of the step") for name, share in inside.items()]

    calls = recorded_calls(step)
    trace = step.loop.last

    def repeated_statistics() -> None:
        for work, args, kwargs in calls:
            work(*args, **kwargs)

    alone = {}
    for name, work in {"statistics in forward": repeated_statistics, "the loop": lambda: step.loop.step(trace)}.items():
        found = in_turns({name: work}, device, Effort(min(effort.seconds, 2), effort.least, 1000))
        alone[name] = statistics.median(found[name])
    whole = statistics.median(steps[2:]) * 1000
    lines += [(f"{name}, repeated by itself", ms, "ms") for name, ms in alone.items()]
    lines += [("together, repeated by themselves", 100 * sum(alone.values()) / whole, "% of the step")]
    report.tell("step", f"statistics and loop in a step of {whole:.1f} ms ({len(shares)} steps)", lines)


def recorded_calls(step: SliceStep) -> list[tuple[Callable, tuple, dict]]:
    """The calls that one step makes to the functions in STATISTICS: (function, arguments, keyword arguments)."""
    calls: list[tuple[Callable, tuple, dict]] = []
    originals = [(owner, name, getattr(owner, name)) for owner, name in STATISTICS]

    def recording(work: Callable) -> Callable:
        def call(*args, **kwargs):
            calls.append((work, args, kwargs))
            return work(*args, **kwargs)

        return call

    for owner, name, work in originals:
        setattr(owner, name, recording(work))
    try:
        step()
    finally:
        for owner, name, work in originals:
            setattr(owner, name, work)
    return calls


def measure_saving(report: Report, device: torch.device, effort: Effort, quick: bool) -> None:
    """Time of copying the state, of Checkpointer.save within the training loop, and of the whole save with the disk."""
    step = SliceStep(device)
    step()
    progress = Progress()
    progress.step = 1
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(Path(folder), step.model, step.optimizer, {}, progress, device, World(), seed=0)

        def save_and_wait() -> None:
            checkpointer.save()
            checkpointer.wait()

        work = {
            "copying the state": lambda: copy_to_cpu([step.model.state_dict(), step.optimizer.state_dict()]),
            "save": checkpointer.save,
            "waiting for the write": checkpointer.wait,
            "save and write": save_and_wait,
        }
        times: dict[str, list[float]] = {name: [] for name in work}
        for turn in range(-2, effort.least):  # in this order `save` finds the thread idle
            for name, each in work.items():
                start = clock(device)
                each()
                if turn >= 0:
                    times[name].append((clock(device) - start) * 1000)
    report.compare("saving", "a checkpoint of config/vertical_slice.py: how long it holds up training", times)


def across_ranks(report: Report, world: World, device: torch.device, turns: int) -> None:
    """Time of the trace's all-reduce and of the agreement between hosts in a step of the slice."""
    step = SliceStep(device, world=world)
    spent = {"step": 0.0, "all-reduce of the trace": 0.0, "agreement": 0.0}
    times: dict[str, list[float]] = {name: [] for name in spent}
    reduce = MoETrace.summed_over_ranks

    def timed_reduce(trace: MoETrace) -> MoETrace:
        if trace.is_reduced:
            return trace
        clock(device)
        world.barrier()  # waiting for the slower rank is not communication
        start = clock(device)
        total = reduce(trace)
        spent["all-reduce of the trace"] = clock(device) - start
        return total

    MoETrace.summed_over_ranks = timed_reduce
    try:
        for turn in range(-2, turns):
            start = clock(device)
            trace = step().trace
            world.barrier()
            agreeing = clock(device)
            world.all_reduce_max(0, 0)
            end = clock(device)
            spent |= {"step": end - start, "agreement": end - agreeing}
            if turn >= 0:
                for name, seconds in spent.items():
                    times[name].append(seconds * 1000)
    finally:
        MoETrace.summed_over_ranks = reduce
    if world.is_main:
        size = sum(x.numel() * x.element_size() for x in trace.present().values())
        title = f"step of config/vertical_slice.py on {world.world_size} ranks; the trace is {size:,} bytes"
        report.compare("ranks", title, times, bytes=size, ranks=world.world_size)
