"""Compare training with beta and without: train each arm with several seeds, or read runs, and test the difference.

    python compare.py config/study.py --seeds=8              train the runs that do not exist yet, then report
    python compare.py config/study.py --seeds=8 --arms=off,on --jobs=2 --chrono_eta=1e-3 --out_dir=out/eta
    python compare.py out/study                              compare the runs in a folder
    python compare.py out/vertical_slice out/beta_off ...    compare these runs; the report is in out/compare_...
    python compare.py --wandb=entity/project                 compare the runs of a W&B project
    python compare.py --plan out/pilot --margin=0.02         number of pairs that decide about a margin, from a pilot
    python compare.py --swap out/a out/b                     swap the betas of runs on different text
    python compare.py --dose out/off out/weak out/strong ... compare several strengths of beta with beta off

Arms: off, on, and one for each other signal that beta can follow, such as shuffled (a placebo: the coherence of another
expert). Runs with the same seed have the same initial weights and data: they are a pair. To continue after Ctrl-C,
repeat the command. Other keys are those of train.py; with --wandb_log=True the comparison is a W&B run too. Needs
requirements-compare.txt.
"""

from __future__ import annotations

from trainer.errors import UserError, run_script  # first, so that Ctrl-C during the other imports is quiet

# isort: split

import os
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chronomoe.options import option, options_of, same_option
from trainer import cli
from trainer import settings as setting
from trainer.arms import ARMS, CUSTOM, DEFAULT_ARMS
from trainer.interrupt import Interrupt
from trainer.lock import folder_lock
from trainer.settings import Settings

try:
    from auditing import compared
    from comparison import dose, planning, report, swap, sweep, wandb_runs
    from comparison.analysis import conclusion
    from comparison.runs import Run, expand, group_into_arms, load_run, load_runs, lost_seeds, named_after
    from comparison.statistics import MAX_PAIRS
    from comparison.tables import measures_by_arm
except ModuleNotFoundError as e:
    sys.exit(f"error: comparing needs {e.name}: pip install -r requirements-compare.txt")


@dataclass
class Options:
    """The options of compare.py. Only `margin` is passed on to train.py, as are all other keys."""

    seeds: int = option(8, "train with the seeds 1, 2, ... up to this", least=1, most=MAX_PAIRS)
    arms: str = option(
        ",".join(DEFAULT_ARMS),
        f"arms to train, separated by commas, of {', '.join(ARMS)}; with --swap, the arm whose betas are swapped",
    )
    jobs: int | None = option(None, "runs to train at a time; None: the number of CPU cores", least=1)
    wandb: str | None = option(None, "ENTITY/PROJECT in W&B whose runs to compare")
    plan: bool = option(False, "print how many pairs decide about a margin, and exit")
    swap: bool = option(False, "swap the betas of two folders of runs that differ in their training text")
    dose: bool = option(False, "compare the strengths of beta (chrono_eta, chrono_k_max) that the runs of arm on have")
    margin: float | None = same_option(Settings, "margin")
    out_dir: str | None = option(None, "folder of the study and the report; None: that of the config file or the runs")


def main(arguments: list[str]) -> int:
    """Returns the exit status: 0, 1 if a run of the study failed, 128 + its number after a signal."""
    if not arguments or cli.asks_for_help(arguments):
        print(cli.help_text(__doc__, options_of(Options)))
        return 0
    arguments, own, line = read_options(arguments)
    folders = [Path(a) for a in line.arguments if not a.endswith(".py")]
    configs = [a for a in line.arguments if a.endswith(".py")]
    given = [*configs, *(f"--{name}" for name in line.options)]
    wandb_log, failed = line.options.get("wandb_log", False), []
    next_command, command = report.STUDY_COMMAND, shlex.join(["python", "compare.py", *arguments])
    if own.plan:
        refuse_others(given, ["--plan", "--margin"], "--plan takes folders of runs and --margin")
        if own.margin is None and "margin" in line.options:
            raise UserError("--plan: margin=None must be a number above 0")
        print(planning.plan(folders, own.margin))
        return 0
    if own.swap:
        return swap_betas(folders, given, own, line.options.get("arms"), command)
    if own.dose:
        refuse_others(given, ["--dose", "--out_dir"], "--dose takes folders of runs and --out_dir")
        return compare_strengths(folders, Path(own.out_dir or named_after(folders, "dose")), command)
    if own.wandb is not None:
        allowed = ["--wandb", "--out_dir", "--wandb_log"]
        refuse_others([*map(str, folders), *given], allowed, "--wandb compares the runs of a W&B project alone")
        sources, load, out = wandb_runs.fetch(own.wandb), wandb_runs.load, Path("out") / "wandb_comparison"
    elif folders:
        both = "give a config file to train, or folders of runs to compare, not both"
        refuse_others(given, ["--out_dir", "--wandb_log"], both)
        refuse_missing(folders)
        sources, load = expand(folders), load_run
        out = folders[0] if len(folders) == 1 else named_after(folders, "compare")
    elif not configs:
        what = shlex.join(["python", "compare.py", "config/study.py", *arguments])
        raise UserError(f"{given[0]}: give a config file to train, as in {what}, or folders of runs to compare")
    else:
        passed_on = [a for a in arguments if cli.option_name(a) not in options_of(Options).keys() - {"margin"}]
        settings = setting.from_arguments([*passed_on, "--arm="])
        arms, jobs = own.arms.split(","), own.jobs or os.cpu_count() or 1
        out, wandb_log = Path(own.out_dir or settings.out_dir), settings.wandb_log
        if os.path.exists(out / "config.json"):
            raise UserError(f"{out} holds a run: give the study another --out_dir")
        study, failed, signal_status = train_study(passed_on, out, arms, own.seeds, jobs)
        if signal_status:
            return signal_status
        changed = ["seeds"] if {"on", "off"} <= set(arms) else ["seeds", "arms"]
        kept = [a for a in arguments if cli.option_name(a) not in changed]
        next_command = shlex.join(["python", "compare.py", *kept, "--seeds=8"])
        sources, load = study, sweep.load
    out = Path(own.out_dir or out)
    write_report(sources, load, out, command, wandb_log, next_command)
    for job in failed:
        print(f"failed: {job.out_dir}: {job.error}")
    return 1 if failed else 0


def refuse_others(given: list[str], allowed: list[str], reason: str) -> None:
    """Raise UserError if an argument is not allowed."""
    for argument in given:
        if argument not in allowed:
            raise UserError(f"{argument}: {reason}")


def swap_betas(folders: list[Path], given: list[str], own: Options, arm: str | None, command: str) -> int:
    """Swap the betas of two folders, write swap.html and print the findings. Returns the exit status."""
    takes = "--swap takes two folders of runs, --arms and --out_dir"
    refuse_others(given, ["--swap", "--arms", "--out_dir"], takes)
    if len(folders) != 2:
        raise UserError(f"{takes}, as in python compare.py --swap out/a out/b, not {len(folders)} folders")
    if arm is not None and arm not in (*ARMS, CUSTOM):
        raise UserError(f"--arms={arm} must be one arm: {', '.join((*ARMS, CUSTOM))}")
    refuse_missing(folders)
    out = Path(own.out_dir or named_after(folders, "swap"))
    try:
        found = swap.swap(*folders, arm, command)
        swap.write(out, found)
    except KeyboardInterrupt:
        print("stopped; nothing was written")
        return 130
    print("\n".join([found.conclusion, *(f"- {sentence}" for sentence in found.sentences)]))
    for reason in found.left_out:
        print(f"left out: {reason}")
    print(f"the report is {out / 'swap.html'}; its numbers are in {out / 'swap.json'}")
    return 0


def compare_strengths(folders: list[Path], out: Path, command: str) -> int:
    """Compare the strengths of beta in these folders, write dose.md and print the table. Returns the exit status."""
    refuse_missing(folders)
    found = dose.compare(folders, command)
    dose.write(out, found)
    print("\n".join(dose.table(found).as_lines()))
    for reason in found.left_out:
        print(f"left out: {reason}")
    print(f"the report is {out / 'dose.md'}; its numbers are in {out / 'dose.json'}")
    return 0


def refuse_missing(folders: list[Path]) -> None:
    """Raise UserError if a folder does not exist."""
    for folder in folders:
        if not os.path.exists(folder):  # Path.exists raises an error for a name that is too long
            raise UserError(f"{folder} does not exist")


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


def write_report(
    sources: Iterable[Any],
    load: Callable[[Any], Run],
    out: Path,
    command: str,
    wandb_log: bool,
    next_command: str,
) -> None:
    """Compare the runs that `load` makes of the sources, write the report into `out` and print the verdicts.

    next_command: that would give a verdict, if there are too few pairs. Raises UserError if fewer than two runs can be
    compared, or if the report cannot be written.
    """
    runs, unusable = load_runs(sources, load)
    left_out = [str(e) for e in unusable]
    if len(runs) < 2:
        raise UserError("; ".join(left_out) or "a comparison needs at least two runs, and there is one")
    arms, differing, left_out_of_arms = group_into_arms(runs)
    lost = lost_seeds(unusable, arms)
    out, note = report.folder_for(out, arms)
    print("evaluating the trained models and writing the report", flush=True)
    audit = compared.table(arms)
    comparison = report.compare(arms, differing, left_out + left_out_of_arms, lost, command, out, next_command, audit)
    figures = report.write(out, comparison)
    if wandb_log:
        wandb_runs.log(out, comparison, figures)
    print("\n".join([conclusion(comparison.analysis), *(f"- {sentence}" for sentence in comparison.sentences)]))
    if not comparison.analysis.primary:
        print("\n".join(measures_by_arm(arms).as_lines()))
    for reason in comparison.left_out:
        print(f"left out: {reason}")
    if note is not None:
        print(note)
    print(f"the report is {out / 'report.html'} (and report.md); its numbers are in {out / 'comparison.json'}")


def read_options(arguments: list[str]) -> tuple[list[str], Options, cli.CommandLine]:
    """The arguments as --key=value, the options of compare.py, and the command line, which includes those of train.py.

    Raises UserError for an unknown option or a wrong value.
    """
    hints = dict.fromkeys(("seed", "arm"), "a study sets seed and arm itself; give --seeds=N and --arms=A,B")
    own = options_of(Options)
    known = {name: key for name, key in setting.keys().items() if name not in hints} | dict(own)
    arguments = cli.joined(arguments, known)
    line = cli.parse(arguments, known, positional=True, hints=hints)
    return arguments, Options(**{name: value for name, value in line.options.items() if name in own}), line


if __name__ == "__main__":
    run_script(main)
