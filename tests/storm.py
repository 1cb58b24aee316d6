"""Kill runs at any time until they are finished, and compare them with runs that were not disturbed, bit for bit.

    python tests/storm.py                       20 kills of each kind
    python tests/storm.py --kills=500 --seed=2
    python tests/storm.py --kind=study

Every third kill comes as soon as a checkpoint is being written, the others at random times. Runs that have survived 20
kills are finished and compared, and new ones are started. Exit status 1 if a run differs.

kinds: single      one process: it is killed
       ranks       two ranks: one of them is killed, and the other ends
       torchrun    two ranks under torchrun: torchrun or a rank is killed; after a rank, torchrun starts both again
       study       compare.py with two arms and two seeds, two runs at a time: compare.py or a run is killed

Linux only.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from chronomoe.options import option, options_of
from tests.helpers import child, runs
from trainer import cli
from trainer.errors import run_script
from trainer.interrupt import _exists

KILLS_OF_A_RUN = 20
SECONDS = 120  # in which a process must start to train, or end

# evaluations as long as the steps between them, checkpoints between evaluations, decisions of both kinds
RUN = (
    runs.TINY
    | runs.FULL
    | dict(n_embd=64, max_iters=120, lr_decay_iters=120, eval_interval=8, eval_iters=25, log_interval=3)
    | dict(checkpoint_interval=6, chrono_eta=1e-2, chrono_k_max=1.0, chrono_window=20, chrono_unused_after=20)
    | dict(chrono_prune_phi=0.5, chrono_prune_min_tokens=100, chrono_prune_min_updates=5, chrono_alpha_slow=0.9)
    | dict(chrono_unused_tokens=1500)
)
STUDY = RUN | dict(max_iters=60, lr_decay_iters=60, chrono_alpha_slow=0.8)


@dataclass
class Attempt:
    """The processes of one command."""

    roots: list[int]  # process ids; if one of them is killed, all end
    statuses: Callable[[], list[int | None]]  # of the roots; None while one is running

    @property
    def ended(self) -> bool:
        return None not in self.statuses()

    def children(self) -> list[int]:
        """Process ids of the runs or ranks that a program has started."""
        found = []
        for root in self.roots:
            with suppress(OSError):
                ids = " ".join(path.read_text() for path in Path(f"/proc/{root}/task").glob("*/children")).split()
                found += [int(i) for i in ids if b"train.py" in Path(f"/proc/{i}/cmdline").read_bytes()]
        return found


@dataclass
class Tally:
    kills: int = 0
    of_children: int = 0
    in_writes: int = 0
    compared: int = 0


def start_ranks(count: int) -> Callable[[list[str], Path], Attempt]:
    """A function that starts ranks, which need no torchrun, in processes that have imported torch."""

    def start(arguments: list[str], log: Path) -> Attempt:
        processes = child.start_ranks(arguments, count, log) if count > 1 else [child.start(arguments, log)]
        return Attempt([p.pid for p in processes], lambda: [p.exitcode for p in processes])

    return start


def start_program(*command: str) -> Callable[[list[str], Path], Attempt]:
    """A function that starts a program with more arguments."""

    def start(arguments: list[str], log: Path) -> Attempt:
        with log.open("ab") as f:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(
                [sys.executable, *command, *arguments], cwd=runs.ROOT, env=environment, stdout=f, stderr=f
            )
        return Attempt([process.pid], lambda: [process.poll()])

    return start


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1000")
KINDS: dict[str, Callable[[list[str], Path], Attempt]] = {
    "single": start_ranks(1),
    "ranks": start_ranks(2),
    "torchrun": start_program(*TORCHRUN, "--monitor-interval=0.1", "train.py"),
    "study": start_program("compare.py", "config/study.py", "--seeds=2", "--arms=off,on", "--jobs=2"),
}


@dataclass
class Options:
    kills: int = option(KILLS_OF_A_RUN, "kills of each kind", least=1)
    seed: int = option(0, "seed of the times and of the choice of processes", least=0)
    kind: str | None = option(None, "the only kind; None: all", choices=tuple(KINDS))


class Storm:
    """Runs of one kind in a folder, and the same runs without a kill."""

    def __init__(self, kind: str, folder: Path, draws: random.Random):
        self.kind, self.folder, self.draws = kind, folder, draws
        self.tally = Tally()
        self.calm, self.out, self.log = folder / "calm", folder / "storm", folder / "log"
        self.dataset = runs.write_skewed_dataset(folder / "data")  # the loss falls, so there are best checkpoints
        self.finish(self.calm)
        for run in self.runs(self.calm):
            decisions = {line["action"] for line in runs.lines(run / "decisions.jsonl")}
            assert decisions == {"open", "withdrawn"}, f"{run}: {decisions}"
        of_run = (line.get("time/step_ms", 0) for line in runs.metrics(self.runs(self.calm)[0]))
        self.seconds = sum(of_run) / 1000

    def runs(self, out: Path) -> list[Path]:
        """The folders of the runs of one command."""
        return sorted(path.parent for path in out.rglob("metrics.jsonl"))

    def start(self, out: Path) -> Attempt:
        settings = (STUDY if self.kind == "study" else RUN | {"init_from": "auto"}) | {"dataset": self.dataset}
        return KINDS[self.kind](runs.arguments(settings | {"out_dir": out}), self.log)

    def finish(self, out: Path) -> None:
        """Run the command to its end."""
        attempt = self.start(out)
        child.wait_for(lambda: attempt.ended, SECONDS)
        assert not any(attempt.statuses()), f"{attempt.statuses()}\n{self.log.read_text()[-2000:]}"

    def signs(self, out: Path) -> int:
        """How often a process has begun to train, or a report has begun."""
        logs = [self.log, *out.glob("*/train.log")]
        texts = [log.read_text(errors="replace") for log in logs if log.exists()]
        return sum(text.count("loop:") + text.count("evaluating the trained") for text in texts)

    def kill(self, kills: int) -> None:
        """Kill the run so many times, then finish it, compare it and remove it."""
        until, attempt = self.tally.kills + kills, self.start(self.out)
        while self.tally.kills < until:
            left = self.unfinished()
            self.wait(attempt, left, 4 * self.seconds / KILLS_OF_A_RUN)
            children = attempt.children()
            if attempt.ended:
                if not any(attempt.statuses()):  # it was finished before it could be killed
                    self.compare()
                attempt = self.start(self.out)
                continue
            process = self.draws.choice([*attempt.roots, *children])
            in_write = not self.unfinished() <= left
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
                self.tally.kills += 1
                self.tally.of_children += process in children
                self.tally.in_writes += in_write
            if process in attempt.roots:
                child.wait_for(lambda a=attempt: a.ended, SECONDS)
                if self.kind != "study":  # the runs of a killed study may still be ending while the next one starts
                    child.wait_for(lambda running=children: not any(map(_exists, running)), SECONDS)
                attempt = self.start(self.out)
        child.wait_for(lambda: attempt.ended, SECONDS)
        self.finish(self.out)
        self.compare()

    def unfinished(self) -> set[Path]:
        """Checkpoints that are being written, or that a killed process has left."""
        return set(self.out.rglob("ckpt.pt.*.tmp"))

    def wait(self, attempt: Attempt, left: set[Path], most: float) -> None:
        """Wait until the next kill is due, or the attempt has ended. left: files of killed processes."""
        if self.tally.kills % 3 == 2:
            child.wait_for(lambda: attempt.ended or not self.unfinished() <= left, SECONDS)
            return
        before = self.signs(self.out)
        child.wait_for(lambda: attempt.ended or self.signs(self.out) > before, SECONDS)
        time.sleep(self.draws.uniform(0, most))

    def compare(self) -> None:
        """Compare the finished runs with those that were not disturbed, and remove them."""
        names = [path.relative_to(self.calm) for path in self.runs(self.calm)]
        assert names == [path.relative_to(self.out) for path in self.runs(self.out)]
        for name in names:
            assert_same(self.out / name, self.calm / name)
            assert runs.steps(self.out / name)[-1] == runs.config_of(self.calm / name)["max_iters"]
        left = [*self.out.rglob("*.tmp")]
        assert not left, left
        assert "Traceback" not in self.log.read_text(), self.log.read_text()[-3000:]
        self.tally.compared += len(names)
        shutil.rmtree(self.out)
        self.log.unlink()


def assert_same(out: Path, calm: Path) -> None:
    runs.assert_same_run(out, calm)
    assert runs.differing_state(out, calm, "ckpt_best.pt") == set()


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    if cli.asks_for_help(arguments):
        print(cli.help_text(__doc__, options_of(Options)))
        return 0
    options = Options(**cli.parse(arguments, options_of(Options)).options)
    os.chdir(runs.ROOT)
    for kind in [options.kind] if options.kind else KINDS:
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            storm = Storm(kind, Path(folder), random.Random(options.seed))
            while storm.tally.kills < options.kills:
                storm.kill(min(KILLS_OF_A_RUN, options.kills - storm.tally.kills))
            t, seconds = storm.tally, time.monotonic() - began
            print(
                f"{kind}: {t.kills} kills, {t.of_children} of them of a child process and {t.in_writes} while a "
                f"checkpoint was being written; {t.compared} runs are those that were not disturbed, bit for bit; "
                f"{seconds:.0f} s",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    run_script(main)
