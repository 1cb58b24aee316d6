"""Is training with beta better than without? Train arms over seeds, or take runs that exist, and test the difference.

    python compare.py config/study.py --seeds=8              train what is not there yet, then report
    python compare.py config/study.py --seeds=8 --arms=off,on --jobs=2 --chrono_eta=1e-3 --out_dir=out/eta
    python compare.py out/study                              compare runs that exist, also by their folders
    python compare.py out/vertical_slice out/beta_off ...    --out_dir= for the report
    python compare.py --wandb=entity/project                 compare the runs of a W&B project
    python compare.py --plan out/pilot --margin=0.02         how many pairs decide about a margin, by a pilot's spread

Arms: off, on, shuffled (a placebo: beta follows another expert's coherence) and load (a load-balancing bias). Runs with
the same seed start from the same weights and see the same data: they are a pair. The margin, a key of the config, is
the difference in validation loss, in nats, up to which two arms count as equivalent. Ctrl-C loses nothing: the same
command goes on. Other settings are train.py's; with --wandb_log=True the comparison is a W&B run too. Needs
requirements-compare.txt.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from trainer import settings as setting
from trainer.errors import UserError, run_script
from trainer.interrupt import Interrupt
from trainer.lock import folder_lock

try:
    from comparison import planning, report, sweep, wandb_runs
    from comparison.analysis import conclusion
    from comparison.runs import Run, expand, group_into_arms, load_run, load_runs, lost_seeds
except ModuleNotFoundError as e:
    sys.exit(f"error: comparing needs {e.name}: pip install -r requirements-compare.txt")

from trainer.arms import ARMS

MARGIN = setting.keys()["margin"]
STUDY = ("seeds", "arms", "jobs")  # options of training a study


def main(arguments: list[str]) -> int:
    """Returns the exit status: 0, 1 if a run of the study failed, 128 + its number after a signal."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    own, rest = own_options(arguments)
    folders = [Path(a) for a in rest if not a.startswith("-") and not a.endswith(".py")]
    other = [a for a in rest if Path(a) not in folders]
    if "plan" in own:
        wrong = other + [f"--{name}" for name in own if name not in ("plan", "margin")]
        if wrong:
            raise UserError(f"{wrong[0]}: --plan takes folders of runs and --margin")
        print(planning.plan(folders, plan_margin(own)))
        return 0
    wandb_log, has_failed = "--wandb_log=True" in rest, False
    if "wandb" in own:
        sources, load, out = wandb_runs.fetch(own["wandb"]), wandb_runs.load, Path("out") / "wandb_comparison"
    elif folders:
        wrong = [a for a in other if a != "--wandb_log=True"] + [f"--{name}" for name in own if name in STUDY]
        if wrong:
            raise UserError(f"{wrong[0]}: give a config file to train, or folders of runs to compare, not both")
        sources, load, out = expand(folders), load_run, Path(os.path.commonpath([os.path.abspath(f) for f in folders]))
    else:
        settings = setting.from_arguments([*rest, "--arm="])
        arms = own.get("arms", ",".join(ARMS)).split(",")
        seeds, jobs = whole_number(own, "seeds", 8), whole_number(own, "jobs", os.cpu_count() or 1)
        out, wandb_log = Path(own.get("out_dir", settings.out_dir)), settings.wandb_log
        study, failed, signal_status = train_study(rest, out, arms, seeds, jobs)
        if signal_status:
            return signal_status
        sources, load, has_failed = study, sweep.load, bool(failed)
    out = Path(own.get("out_dir", out))
    write_report(sources, load, out, shlex.join(["python", "compare.py", *arguments]), wandb_log)
    return 1 if has_failed else 0


def train_study(
    arguments: list[str], out: Path, arms: list[str], seeds: int, jobs: int
) -> tuple[list[sweep.Job], list[sweep.Job], int]:
    """Train the unfinished runs of a study, `jobs` at a time. Returns (all jobs, failed jobs, exit status of a signal).

    arguments: of train.py. Raises UserError as `sweep.plan`.
    """
    with Interrupt() as interrupt, folder_lock(out):
        study = sweep.plan(arguments, out, arms, seeds)
        print(f"{len(study)} runs: {', '.join(arms)}, {seeds} seeds; {jobs} at a time, in {out}")
        failed = sweep.train_all(study, jobs, interrupt)
    return study, failed, interrupt.exit_status


def write_report(sources: Iterable[Any], load: Callable[[Any], Run], out: Path, command: str, wandb_log: bool) -> None:
    """Compare the runs that `load` makes of the sources, write the report into `out` and print the verdicts.

    Raises UserError if fewer than two runs can be compared, or if the report cannot be written.
    """
    runs, unusable = load_runs(sources, load)
    left_out = [str(e) for e in unusable]
    if len(runs) < 2:
        raise UserError("; ".join(left_out) or "a comparison needs at least two runs, and there is one")
    arms, differing, left_out_of_arms = group_into_arms(runs)
    lost = lost_seeds(unusable, arms)
    comparison = report.compare(arms, differing, left_out + left_out_of_arms, lost, command, out)
    figures = report.write(out, comparison)
    if wandb_log:
        wandb_runs.log(out, comparison, figures)
    print("\n".join([conclusion(comparison.analysis), *(f"- {sentence}" for sentence in comparison.sentences)]))
    for reason in comparison.left_out:
        print(f"left out: {reason}")
    print(f"the report is {out / 'report.html'} (and report.md); its numbers are in {out / 'comparison.json'}")


def plan_margin(own: dict[str, str]) -> float | None:
    """The value of --margin; None if it is not given. Raises UserError."""
    if "margin" not in own:
        return None
    margin = setting.check(MARGIN, setting.parse_value(MARGIN, own["margin"]), "--plan")
    if margin is None:
        raise UserError(f"--plan: margin={own['margin']} must be {MARGIN.expected()}")
    return margin


def own_options(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """--seeds, --arms, --jobs, --wandb, --plan, --out_dir, and the arguments that are train.py's or folders."""
    own, rest = {}, []
    names = (*STUDY, "wandb", "out_dir", *(["margin"] if "--plan" in arguments else []))
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument == "--plan":
            own["plan"] = ""
        elif argument.startswith("--") and equals and name in names:
            own[name] = value
        elif argument.startswith(("--seed=", "--arm=")):
            raise UserError(f"{argument}: the study sets this itself; give --seeds=N and --arms=A,B")
        else:
            rest.append(argument)
    return own, rest


def whole_number(own: dict[str, str], name: str, default: int) -> int:
    text = own.get(name, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--{name}={text} must be a whole number at least 1")
    return int(text)


if __name__ == "__main__":
    run_script(main)
