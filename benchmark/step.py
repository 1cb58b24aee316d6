"""Time the training step of the slice, what each of the loop's five steps adds, and statistics and loop alone."""

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
from benchmark.timing import Effort, Report, autocast, clock, replaced, stopwatch, time_in_turns
from chronomoe import ChronoConfig, ChronoLoop, MoETrace
from chronomoe.config import STEPS
from model import GPT, GPTConfig
from trainer.checkpointer import Checkpointer, copy_to_cpu
from trainer.distributed import World
from trainer.graphs import GraphedBackward
from trainer.guard import NonFiniteGuard
from trainer.progress import Progress
from trainer.settings import given
from trainer.step import StepResult, TrainingStep

SLICE = Path(__file__).parent.parent / "config" / "vertical_slice.py"
# functions that compute statistics in forward, as (owner, name)
STATISTICS = (
    (model_module, "collect_trace"),
    (model_module, "row_weights"),
    (experts_module, "_weighted_sum"),
    (experts_module, "segment_sums"),
)


class SliceStep:
    """A TrainingStep of the slice on a fixed batch of random tokens. Calling it takes one training step.

    Args:
        device: device of the model.
        steps: the loop's steps that are on.
        batch_size: sequences per batch; None: the slice's.
        prepare: function that changes the model, before it is moved to the device.
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
        self.always_logged = False

    def __call__(self, logged: bool = False) -> StepResult:
        return self.step([self.batch], step=1, logged=logged or self.always_logged)

    def compile(self) -> None:
        """Compile the model, as train.py does with compile=True."""
        torch._dynamo.config.capture_scalar_outputs = True
        self.step.forward = torch.compile(self.model)
        self.always_logged = True  # as in train.py: a second kind of step would be a second graph

    def use_graphs(self) -> None:
        """Replay forward and backward as CUDA graphs, as train.py does with cuda_graphs=True."""
        self.step.backward = GraphedBackward(self.step.backward, self.model.parameters())

    def logged(self) -> None:
        """Take a training step that logs: compute all metrics and copy them to the host."""
        self(logged=True)
        self.loop.read()


def measure(report: Report, device: torch.device, effort: Effort, quick: bool) -> None:
    """The five steps of the loop added one by one; all on against all off; one-hot dispatch; statistics and loop."""
    work: dict[str, Callable[[], object]] = {"all steps off": SliceStep(device, ())}
    for count, name in enumerate(STEPS, 1):
        work[f"+ {name}"] = SliceStep(device, STEPS[:count])
    title = "training step of config/vertical_slice.py, the five steps added one by one"
    report.comparison("step", title, time_in_turns(work, device, effort))

    on = SliceStep(device)
    work = {"all steps off": SliceStep(device, ()), "all steps on": on, "all steps on, and logged": on.logged}
    longer = Effort(2 * effort.seconds, effort.least, 4 * effort.most)
    report.comparison("step", "the same, all on against all off", time_in_turns(work, device, longer))

    work = {
        "all steps on": SliceStep(device),
        "all off, one-hot dispatch": SliceStep(device, (), prepare=one_hot.use_one_hot),
    }
    report.comparison("step", "the same, against one-hot dispatch", time_in_turns(work, device, effort))
    measure_statistics_and_loop(report, device, effort)


def measure_statistics_and_loop(report: Report, device: torch.device, effort: Effort) -> None:
    """Time of statistics and loop inside a training step, and repeated alone, with code and data in the cache."""
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

    def repeated_statistics() -> None:
        for call in calls:
            call()

    assert step.loop.last is not None
    alone = {"statistics in forward": repeated_statistics, "the loop": partial(step.loop.step, step.loop.last)}
    short = Effort(min(effort.seconds, 2), effort.least, 1000)
    ms = {name: statistics.median(time_in_turns({name: work}, device, short)[name]) for name, work in alone.items()}
    whole = statistics.median(steps[2:]) * 1000
    lines += [(f"{name}, repeated alone", value, "ms") for name, value in ms.items()]
    lines += [("together, repeated alone", 100 * sum(ms.values()) / whole, "% of the step")]
    title = f"statistics and loop in a training step of {whole:.1f} ms ({len(shares)} steps)"
    report.numbers("step", title, lines)


def recorded_calls(step: SliceStep) -> list[partial]:
    """The calls of the functions in STATISTICS that one training step makes."""
    calls: list[partial] = []

    def recording(function: Callable) -> Callable:
        def call(*args, **kwargs):
            calls.append(partial(function, *args, **kwargs))
            return function(*args, **kwargs)

        return call

    with replaced({place: recording(getattr(*place)) for place in STATISTICS}):
        step()
    return calls


def measure_saving(report: Report, device: torch.device, effort: Effort, quick: bool) -> None:
    """Time of copying the state, of Checkpointer.save in the training loop, and of a save with the write to disk."""
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
        for turn in range(-2, effort.least):  # not in alternating order: `save` needs an idle writing thread
            for name, each in work.items():
                start = clock(device)
                each()
                if turn >= 0:
                    times[name].append((clock(device) - start) * 1000)
    title = "saving a checkpoint of config/vertical_slice.py: time during which training waits"
    report.comparison("saving", title, times)


def across_ranks(report: Report, world: World, device: torch.device, turns: int) -> None:
    """Time of the trace's all-reduce and of the ranks' agreement on stopping, in a training step of the slice."""
    step = SliceStep(device, world=world)
    spent = {"step": 0.0, "all-reduce of the trace": 0.0, "agreement": 0.0}
    times: dict[str, list[float]] = {name: [] for name in spent}
    reduce = MoETrace.summed_over_ranks

    def timed_reduce(trace: MoETrace) -> MoETrace:
        if trace.is_reduced:
            return trace
        clock(device)
        world.barrier()  # waiting for a slower rank is not communication
        start = clock(device)
        total = reduce(trace)
        spent["all-reduce of the trace"] = clock(device) - start
        return total

    with replaced({(MoETrace, "summed_over_ranks"): timed_reduce}):
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
    if world.is_main:
        size = sum(x.numel() * x.element_size() for x in trace.present().values())
        title = f"training step of config/vertical_slice.py on {world.world_size} ranks; the trace is {size:,} bytes"
        report.comparison("ranks", title, times, bytes=size, ranks=world.world_size)
