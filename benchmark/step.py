"""The training step of the slice: what each of the five steps adds, and where the loop's time goes."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import model as model_module
from benchmark import one_hot
from benchmark.timing import Effort, Report, autocast, clock, in_turns, stopwatch
from chronomoe import ChronoConfig, ChronoLoop
from model import GPT, GPTConfig
from trainer.checkpoint import Keeper, copied
from trainer.guard import NonFiniteGuard
from trainer.ranks import Ranks
from trainer.settings import read_config_file

SLICE = Path(__file__).parent.parent / "config" / "vertical_slice.py"
FIVE = ("router", "coherence", "beta", "bridge", "lifecycle")
STATISTICS = ("collect_trace", "row_weights", "_weighted_sum", "_sums_by_selector")  # in model.py, gathered in forward


class TrainingStep:
    """train.py's step on one fixed batch of random tokens: call it to take one. `prepare` may change the model."""

    def __init__(
        self,
        device: torch.device,
        steps: tuple[str, ...] = FIVE,
        batch_size: int | None = None,
        prepare: Callable[[GPT], object] | None = None,
        **changes,
    ):
        keys = read_config_file(str(SLICE)) | changes
        shape = {key: value for key, value in keys.items() if key in GPTConfig.__dataclass_fields__}
        shape = dict(vocab_size=257, bias=False) | shape
        config = GPTConfig(chrono=ChronoConfig(**dict.fromkeys(steps, True)), **shape)
        self.device = device
        model = GPT(config, torch.Generator().manual_seed(0))
        if prepare is not None:
            prepare(model)
        self.model = model.to(device)
        self.forward = self.model
        self.optimizer = self.model.configure_optimizers(0.1, 1e-4, (0.9, 0.99), device.type)
        self.loop = ChronoLoop(self.model.router_state, config.moe_blocks)
        self.guard = NonFiniteGuard(self.model)
        rows = batch_size or keys["batch_size"]
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(config.vocab_size, (rows, config.block_size + 1), generator=generator).to(device)
        self.batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def __call__(self, observe: bool | str = "state") -> None:
        with autocast(self.device):
            _, loss, trace = self.forward(*self.batch, return_trace=observe, return_logits=False)
        loss.backward()
        norms = self.guard.norms()
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), 1.0, torch.linalg.vector_norm(norms))
        self.optimizer.found_inf = found_inf = self.guard.check(trace, norms, 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loop.step(trace, found_inf)

    def logged(self) -> None:
        """A step that logs: everything is observed, and read."""
        self(observe=True)
        self.loop.read()


def measure(report: Report, device: torch.device, effort: Effort, quick: bool) -> None:
    """The steps of the loop added one by one; all on and off; one-hot dispatch; statistics and loop by themselves."""
    work: dict[str, Callable[[], None]] = {"all steps off": TrainingStep(device, ())}
    for count, name in enumerate(FIVE, 1):
        work[f"+ {name}"] = TrainingStep(device, FIVE[:count])
    title = "training step of config/vertical_slice.py, the five steps added one by one"
    report.compare("step", title, in_turns(work, device, effort))

    on = TrainingStep(device)
    work = {"all steps off": TrainingStep(device, ()), "all steps on": on, "all steps on, and logged": on.logged}
    title = "the same, all on against all off"
    report.compare("step", title, in_turns(work, device, Effort(2 * effort.seconds, effort.least, 4 * effort.most)))

    plain = TrainingStep(device, (), prepare=one_hot.put_into)
    work = {"all steps on": TrainingStep(device), "all off, one-hot dispatch": plain}
    report.compare("step", "the same, against one-hot dispatch", in_turns(work, device, effort))
    by_themselves(report, device, effort)


def by_themselves(report: Report, device: torch.device, effort: Effort) -> None:
    """Statistics in forward and the loop: inside a step, where the caches hold other things, and repeated."""
    places = [(model_module, name) for name in STATISTICS] + [(ChronoLoop, "step")]
    steps: list[float] = []
    spent: list[dict[str, float]] = []
    step = TrainingStep(device)
    began = clock(device)
    while len(steps) < effort.least + 2 or (clock(device) - began < effort.seconds and len(steps) < effort.most):
        with stopwatch(device, places) as seconds:
            start = clock(device)
            step()
            steps.append(clock(device) - start)
        spent.append(seconds)
    shares = [{name: value / total for name, value in each.items()} for each, total in zip(spent, steps)][2:]
    inside = {
        "statistics in forward": statistics.median(sum(share[name] for name in STATISTICS) for share in shares),
        "the loop": statistics.median(share["step"] for share in shares),
        "together": statistics.median(sum(share.values()) for share in shares),
    }
    lines = [(f"{name}, in the step", 100 * share, "% of the step") for name, share in inside.items()]

    calls = recorded_calls(step, STATISTICS)
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


def recorded_calls(step: TrainingStep, names: tuple[str, ...]) -> list[tuple[Callable, tuple, dict]]:
    """The calls that one step makes to functions of model.py: (function, arguments, keyword arguments)."""
    calls: list[tuple[Callable, tuple, dict]] = []
    originals = {name: getattr(model_module, name) for name in names}

    def recording(work: Callable) -> Callable:
        def call(*args, **kwargs):
            calls.append((work, args, kwargs))
            return work(*args, **kwargs)

        return call

    for name, work in originals.items():
        setattr(model_module, name, recording(work))
    try:
        step()
    finally:
        for name, work in originals.items():
            setattr(model_module, name, work)
    return calls


def measure_saving(report: Report, device: torch.device, effort: Effort, quick: bool) -> None:
    """Copying the state, what Keeper.save takes of the training loop, and the whole of it with the disk."""
    step = TrainingStep(device)
    step()
    state = {"model": step.model.state_dict(), "optimizer": step.optimizer.state_dict(), "iter_num": 1}
    with tempfile.TemporaryDirectory() as folder:
        keeper = Keeper(Path(folder), print, lambda: None, interval=0, minutes=0)

        def save_and_wait() -> None:
            keeper.save(state)
            keeper.wait()

        work = {
            "copying the state": lambda: copied(state),
            "save": lambda: keeper.save(state),
            "writing what was left": keeper.wait,
            "save and write": save_and_wait,
        }
        times: dict[str, list[float]] = {name: [] for name in work}
        for turn in range(-2, effort.least):  # in this order `save` finds the thread idle
            for name, each in work.items():
                start = clock(device)
                each()
                if turn >= 0:
                    times[name].append((clock(device) - start) * 1000)
    report.compare("saving", "a checkpoint of config/vertical_slice.py: how long it holds training up", times)


def across_ranks(report: Report, ranks: Ranks, device: torch.device, turns: int) -> None:
    """What the trace's all-reduce and the hosts' agreement take of a step of the slice."""
    step = TrainingStep(device)
    averaged = ranks.wrap(step.model, device)
    times: dict[str, list[float]] = {"step": [], "all-reduce of the trace": [], "agreement": []}
    for turn in range(-2, turns):
        began = clock(device)
        with autocast(device):
            _, loss, trace = averaged(*step.batch, return_trace="state", return_logits=False)
        loss.backward()
        ranks.wait()  # or waiting for the slower rank would count as communication
        before = clock(device)
        total = trace.summed_over_ranks()
        reduced = clock(device)
        norms = step.guard.norms()
        step.optimizer.found_inf = step.guard.check(total, norms, 1)
        step.optimizer.step()
        step.optimizer.zero_grad(set_to_none=True)
        step.loop.step(total, step.optimizer.found_inf)
        ranks.wait()
        agreeing = clock(device)
        ranks.agree(0, 0)
        end = clock(device)
        if turn >= 0:
            for name, took in zip(times, (end - began, reduced - before, end - agreeing)):
                times[name].append(took * 1000)
    if ranks.first:
        size = sum(x.numel() * x.element_size() for x in total.present().values())
        title = f"step of config/vertical_slice.py on {ranks.count} ranks; the trace is {size:,} bytes"
        report.compare("ranks", title, times, bytes=size, ranks=ranks.count)
