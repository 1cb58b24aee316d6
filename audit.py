"""Measure what each expert of finished runs is worth, and which criteria know it.

    python audit.py out/vertical_slice                   one run
    python audit.py out/study                            all runs in a folder; verdicts need six seeds of an arm
    python audit.py out/study --heal=100 --damage=200    also prune and train on; also damage an expert and train on

The worth of an expert is the rise of the validation loss when it is masked from routing. The report is audit.html in
the folder, or in out/audit_... for several folders. What was measured is kept in the folder of each run, so after
Ctrl-C the same command continues. Needs requirements-compare.txt.
"""

from __future__ import annotations

from trainer.errors import UserError, run_script  # first, so that Ctrl-C during the other imports is quiet

# isort: split

import os
import shlex
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from chronomoe.options import option, options_of, same_option
from trainer import cli
from trainer.lock import folder_lock
from trainer.memory import one_line_out_of_memory
from trainer.settings import Settings

try:
    from auditing import damage, healing, measure, report, routing, subsets
    from auditing.results import AuditedRun, Group
    from auditing.twins import Twin
    from comparison.runs import Run, expand, group_into_arms, load_runs, named_after
except ModuleNotFoundError as e:
    sys.exit(f"error: auditing needs {e.name}: pip install -r requirements-compare.txt")

PRINTED = 10  # open proposals


@dataclass
class Options:
    """The options of audit.py."""

    batches: int = option(20, "validation batches that worth is measured on at least", least=2)
    max_batches: int = option(80, "batches at most: their number is doubled while the error of worth is large", least=2)
    subset_batches: int = option(
        5, "batches on which sets of 1, 2 and 4 experts are masked; 0: no such search", least=0
    )
    heal: int = option(0, "training steps after pruning what each criterion would prune; 0: none", least=0)
    prune: int = option(1, "experts per layer that --heal prunes", least=1, only_with="heal")
    damage: int = option(0, "training steps after damaging an expert; 0: none", least=0)
    out_dir: str | None = option(None, "folder of the report; None: that of the runs")
    wandb_log: bool = same_option(Settings, "wandb_log")
    device: str = same_option(Settings, "device")


def main(arguments: list[str]) -> int:
    """Returns the exit status: 0, or 128 + its number after a signal."""
    known = options_of(Options)
    if not arguments or cli.asks_for_help(arguments):
        print(cli.help_text(__doc__, known))
        return 0
    line = cli.parse(cli.joined(arguments, known), known, positional=True)
    options, folders = Options(**line.options), [Path(a) for a in line.arguments]
    if line.options.get("max_batches", options.batches) < options.batches:
        raise UserError(f"--max_batches={options.max_batches} must be at least --batches={options.batches}")
    if not folders:
        raise UserError("give the folder of a run, as in python audit.py out/vertical_slice")
    for folder in folders:
        if not os.path.exists(folder):
            raise UserError(f"{folder} does not exist")
    out = Path(options.out_dir or (folders[0] if len(folders) == 1 else named_after(folders, "audit")))
    runs, unusable = load_runs(expand(folders))
    left_out = [str(e) for e in unusable]
    arms, _, differing = group_into_arms(runs)
    left_out += differing
    groups = []
    try:
        with one_line_out_of_memory("give --device=cpu"):
            for arm, members in arms.items():
                found = []
                for _, run in sorted(members.items()):
                    print(f"auditing {run.name}", flush=True)
                    try:
                        found.append(audit(run, options))
                    except damage.NotMeasured:
                        raise
                    except UserError as e:
                        left_out.append(str(e))
                if found:
                    groups.append(Group(arm, found))
    except measure.Stopped as e:
        print("stopped; what was measured is kept; to continue: repeat the command")
        return e.status
    if not groups:
        raise UserError("; ".join(left_out))
    command = shlex.join(["python", "audit.py", *arguments])
    drawn = report.write(out, groups, left_out, command, str(date.today()))
    if options.wandb_log:
        report.log(out, groups, command, drawn)
    for group in groups:
        print("\n".join([f"arm {group.arm}:", *(f"- {sentence}" for sentence in group.sentences)]))
        proposals = [f"- {p.run}: {p.sentence}" for run in group.runs for p in run.proposals if p.is_open]
        for proposal in proposals[:PRINTED]:
            print(proposal)
        if len(proposals) > PRINTED:
            print(f"- and {len(proposals) - PRINTED} more open proposals, in the report")
    for reason in left_out:
        print(f"left out: {reason}")
    print(f"the report is {out / 'audit.html'}; its numbers are in {out / 'audit.json'}")
    return 0


def audit(run: Run, o: Options) -> AuditedRun:
    """Measure one run. Raises UserError if it cannot be audited, Stopped after a signal."""
    healed: list[healing.Healing] = []
    moved: list[damage.Moved] = []
    with folder_lock(measure.folder_of(run) / measure.CACHE.parent, option="run"):
        with measure.opened_to_measure(run, o.device) as trained:
            cache = measure.cache_of(run, trained)
            measured = measure.measure(run, trained, cache, o.batches, max(o.batches, o.max_batches))
            picture = routing.picture(run, trained, o.batches)
            masked_sets = []
            if o.subset_batches:
                masked_sets = subsets.masked_sets(measured, subsets.Rises(trained, cache, o.subset_batches))
        if o.heal or o.damage:
            with measure.opened(run, device=o.device) as trained:
                twin = Twin(run, trained)
                if o.heal:
                    healed = healing.heal(measured, twin, cache, o.heal, o.prune)
                if o.damage:
                    moved = damage.assay(run.name, run.seed, twin, cache, o.damage)
    return AuditedRun(measured, picture, masked_sets, healed, moved)


if __name__ == "__main__":
    run_script(main)
