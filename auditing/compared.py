"""The section of compare.py's report on runs that have been audited."""

from __future__ import annotations

import statistics

from auditing.agreement import RIVALS, agreements, proposals
from auditing.criteria import PRIMARY
from auditing.measure import from_cache
from comparison.runs import Arms
from comparison.tables import Table


def table(arms: Arms) -> Table | None:
    """For each arm with audited runs: how phi_slow and its rivals agree with worth, and what open proposals cost.

    None if no run has measurements of its last checkpoint.
    """
    rows = []
    for arm, members in arms.items():
        runs = [measured for run in members.values() if (measured := from_cache(run)) is not None]
        if not runs:
            continue
        found, cells = agreements(runs), []
        for name in (PRIMARY, *RIVALS):
            pooled = found[name].pooled if name in found else None
            if pooled is None:
                cells.append("" if name not in found else f"{found[name].per_run[0]:+.2f}")
            elif pooled.is_enough:
                cells.append(f"{pooled.mean:+.2f} ({pooled.low:+.2f} to {pooled.high:+.2f})")
            else:
                cells.append(f"{pooled.mean:+.2f}")
        open_ones = [p.worth for run in runs for p in proposals(run) if p.is_open]
        cost = f"{len(open_ones)}, mean {statistics.mean(open_ones):+.4f} nats" if open_ones else "0"
        rows.append([arm, str(len(runs)), *cells, cost])
    if not rows:
        return None
    names = [f"{name} and worth" for name in (PRIMARY, *RIVALS)]
    return Table(["arm", "audited runs", *names, "open proposals and their cost"], rows)
