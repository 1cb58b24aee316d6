"""Is training with beta better than without? Train arms over seeds, or take runs that exist, and test the difference.

    python compare.py config/study.py --seeds=8              train what is not there yet, then report
    python compare.py config/study.py --seeds=8 --arms=off,on --jobs=2 --chrono_eta=1e-3 --out_dir=out/eta
    python compare.py out/vertical_slice out/beta_off ...    compare runs that exist; --out_dir= for the report
    python compare.py --wandb=entity/project                 compare the runs of a W&B project

Arms: off, on, shuffled (a placebo: beta follows another expert's coherence) and load (the load-balancing bias). Runs
with the same seed start from the same weights and see the same data: they are a pair. Ctrl-C loses nothing: the same
command goes on. Other settings are train.py's; with --wandb_log=True the comparison is a W&B run too. Needs
requirements-compare.txt.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from trainer import settings as setting
from trainer.errors import UserError, run

try:
    from comparison import report, sweep, wandb_runs
    from comparison.analysis import conclusion
    from comparison.runs import group_into_arms, load_run, load_runs
    from trainer.arms import ARMS
except ModuleNotFoundError as e:
    sys.exit(f"error: comparing needs {e.name}: pip install -r requirements-compare.txt")

STUDY = ("seeds", "arms", "jobs")  # options of training a study


def main(arguments: list[str]) -> int:
    """Returns the exit status: 0, or 1 where a run of the study failed."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    own, rest = own_options(arguments)
    folders = [a for a in rest if not a.startswith("-") and not a.endswith(".py")]
    wandb_log, failed = "--wandb_log=True" in rest, []
    if "wandb" in own:
        sources, out = wandb_runs.fetch(own["wandb"]), Path("out") / "wandb_comparison"
    elif folders:
        wrong = [a for a in rest if a not in folders and a != "--wandb_log=True"] + [
            f"--{n}" for n in own if n in STUDY
        ]
        if wrong:
            raise UserError(f"{wrong[0]}: give a config file to train, or folders of runs to compare, not both")
        sources, out = map(Path, folders), Path(os.path.commonpath([os.path.abspath(f) for f in folders]))
    else:
        settings = setting.from_arguments(rest)
        arms = own.get("arms", ",".join(ARMS)).split(",")
        seeds, jobs = whole_number(own, "seeds", 8), whole_number(own, "jobs", os.cpu_count() or 1)
        out, wandb_log = Path(own.get("out_dir", settings.out_dir)), settings.wandb_log
        planned = sweep.plan(rest, out, settings.max_iters, arms, seeds)
        print(f"{len(planned)} runs: {', '.join(arms)}, {seeds} seeds; {jobs} at a time, in {out}")
        failed = sweep.train_all(planned, jobs)
        sources = [job.out_dir for job in planned]

    runs, left_out = load_runs(sources, wandb_runs.load if "wandb" in own else load_run)
    if len(runs) < 2:
        raise UserError("; ".join(left_out) or "one run: comparing takes two")
    arms_found, differing, doubles = group_into_arms(runs)
    command = shlex.join(["python", "compare.py", *arguments])
    comparison = report.compare(arms_found, differing, left_out + doubles, command)
    out = Path(own.get("out_dir", out))
    drawn = report.write(out, comparison)
    if wandb_log:
        wandb_runs.log(out, comparison, drawn)
    print("\n".join([conclusion(comparison.primary), *(f"- {s}" for s in comparison.sentences)]))
    for reason in comparison.left_out:
        print(f"left out: {reason}")
    print(f"the report is {out / 'report.html'} (and report.md); its numbers are in {out / 'comparison.json'}")
    return 1 if failed else 0


def own_options(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """--seeds, --arms, --jobs, --wandb and --out_dir, and the arguments that are train.py's or folders."""
    own, rest = {}, []
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and equals and name in (*STUDY, "wandb", "out_dir"):
            own[name] = value
        elif argument.startswith(("--seed=", "--init_from=")):
            raise UserError(f"{argument}: the study sets this itself; give --seeds=N")
        else:
            rest.append(argument)
    return own, rest


def whole_number(own: dict[str, str], name: str, default: int) -> int:
    text = own.get(name, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--{name}={text} must be a whole number at least 1")
    return int(text)


if __name__ == "__main__":
    run(main)
