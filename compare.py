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
from pathlib import Path

from trainer import settings as setting
from trainer.errors import UserError, run_script
from trainer.interrupt import Interrupt
from trainer.lock import folder_lock

try:
    from comparison import report, sweep, wandb_runs
    from comparison.analysis import FIRST, conclusion, margin_of
    from comparison.runs import expand, group_into_arms, load_run, load_runs
    from comparison.statistics import MOST_PAIRS, pairs_needed
except ModuleNotFoundError as e:
    sys.exit(f"error: comparing needs {e.name}: pip install -r requirements-compare.txt")

from trainer.arms import ARMS

MARGIN = setting.keys()["margin"]
STUDY = ("seeds", "arms", "jobs")  # options of training a study


def main(arguments: list[str]) -> int:
    """Returns the exit status: 0, 1 where a run of the study failed, 128 + its number after a signal."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    own, rest = own_options(arguments)
    folders = [Path(a) for a in rest if not a.startswith("-") and not a.endswith(".py")]
    wandb_log, failed = "--wandb_log=True" in rest, []
    if "plan" in own:
        other = [a for a in rest if Path(a) not in folders] + [f"--{n}" for n in own if n not in ("plan", "margin")]
        if other:
            raise UserError(f"{other[0]}: --plan takes folders of runs and --margin")
        print(planned(folders, own.get("margin")))
        return 0
    if "wandb" in own:
        sources, load, out = wandb_runs.fetch(own["wandb"]), wandb_runs.load, Path("out") / "wandb_comparison"
    elif folders:
        wrong = [a for a in rest if Path(a) not in folders and a != "--wandb_log=True"] + [
            f"--{n}" for n in own if n in STUDY
        ]
        if wrong:
            raise UserError(f"{wrong[0]}: give a config file to train, or folders of runs to compare, not both")
        sources, load, out = expand(folders), load_run, Path(os.path.commonpath([os.path.abspath(f) for f in folders]))
    else:
        settings = setting.from_arguments([*rest, "--arm="])
        arms = own.get("arms", ",".join(ARMS)).split(",")
        seeds, jobs = whole_number(own, "seeds", 8), whole_number(own, "jobs", os.cpu_count() or 1)
        out, wandb_log = Path(own.get("out_dir", settings.out_dir)), settings.wandb_log
        with Interrupt() as interrupt, folder_lock(out):
            study = sweep.plan(rest, out, arms, seeds)
            print(f"{len(study)} runs: {', '.join(arms)}, {seeds} seeds; {jobs} at a time, in {out}")
            failed = sweep.train_all(study, jobs, interrupt)
        if interrupt.received:
            return interrupt.exit_status
        sources, load = study, sweep.load

    runs, unusable = load_runs(sources, load)
    left_out = [str(e) for e in unusable]
    if len(runs) < 2:
        raise UserError("; ".join(left_out) or "one run: comparing takes two")
    arms_found, differing, doubles = group_into_arms(runs)
    lost: dict[str, set[str]] = {}  # seeds by arm; a run of an unknown arm may be of any
    for e in (e for e in unusable if e.is_run):
        for arm in [e.arm] if e.arm else arms_found:
            if e.seed is None or e.seed not in arms_found.get(arm, {}):
                lost.setdefault(arm, set()).add("unknown" if e.seed is None else str(e.seed))
    out = Path(own.get("out_dir", out))
    command = shlex.join(["python", "compare.py", *arguments])
    comparison = report.compare(arms_found, differing, left_out + doubles, lost, command, out)
    drawn = report.write(out, comparison)
    if wandb_log:
        wandb_runs.log(out, comparison, drawn)
    print("\n".join([conclusion(comparison.analysis), *(f"- {s}" for s in comparison.sentences)]))
    for reason in comparison.left_out:
        print(f"left out: {reason}")
    print(f"the report is {out / 'report.html'} (and report.md); its numbers are in {out / 'comparison.json'}")
    return 1 if failed else 0


def planned(folders: list[Path], margin: str | None) -> str:
    """How many pairs decide about a margin, by the spread of a pilot's pairs. Raises UserError if it has too few."""
    runs, unusable = load_runs(expand(folders))
    left_out = [str(e) for e in unusable]
    arms = group_into_arms(runs)[0] if runs else {}
    if not all(arm in arms for arm in FIRST):
        raise UserError("; ".join(left_out) or "--plan needs folders with pairs of runs, beta on and off")
    if margin is None:
        declared = margin_of(arms, *FIRST)
        if declared is None:
            raise UserError("--plan needs --margin=NATS: the runs declare none")
    else:
        declared = setting.check(MARGIN, setting.parse_value(MARGIN, margin), "--plan")
        if declared is None:
            raise UserError(f"--plan: margin={margin} must be {MARGIN.expected()}")
    analysis = report.analyse(arms)
    row = analysis.row(FIRST)
    if row is None:
        raise UserError("--plan needs two pairs of runs or more, beta on and off, with the same seeds")
    c = row.contrast
    needed = (pairs_needed(sd, declared) for sd in (c.sd, *c.sd_interval))
    n, low, high = (f"over {MOST_PAIRS}" if pairs is None else str(pairs) for pairs in needed)
    lines = [
        f"{c.n} pairs of 'on' and 'off' differ with a standard deviation of {c.sd:.4f} nats "
        f"(95% interval {c.sd_interval[0]:.4f} to {c.sd_interval[1]:.4f})",
        f"{n} pairs ({low} to {high}) decide about a margin of {declared:g} nats: in 80% of studies they exclude "
        "effects as large if there is none, and find one as large if there is",
    ]
    return "\n".join([*analysis.warnings, *lines, *(f"left out: {reason}" for reason in left_out)])


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
