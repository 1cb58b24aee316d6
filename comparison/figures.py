"""The report's figures, from the runs' logged lines."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from comparison.analysis import Row
from comparison.runs import Run

COLOURS = {"off": "#7f7f7f", "on": "#1f77b4", "shuffled": "#ff7f0e", "load": "#2ca02c"}

Arms = dict[str, dict[int, Run]]


def curves(arms: Arms, name: str, label: str, log: bool = False) -> Figure:
    """A metric by arm against the step: mean over seeds, and a band from the lowest to the highest seed.

    name: a metric, or an ending such as "/js", whose mean over layers is drawn.
    """
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for arm, members in arms.items():
        rows = [_series(run, name) for run in members.values()]
        rows = [row for row in rows if row]
        steps = sorted(set.intersection(*(set(row) for row in rows))) if rows else []
        if not steps:
            continue
        values = np.array([[row[step] for step in steps] for row in rows])
        colour = COLOURS.get(arm)
        axis.plot(steps, values.mean(0), color=colour, label=f"{arm} ({len(rows)})")
        axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    axis.set(xlabel="step", ylabel=label, yscale="log" if log else "linear")
    return _finished(figure, axis)


def differences(rows: list[Row]) -> Figure:
    """Each pair's difference in the primary outcome, its mean and 95% interval, a column a contrast."""
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for column, r in enumerate(rows):
        values = list(r.differences.values())
        spread = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else [0]
        axis.plot(column + np.asarray(spread), values, "o", color="#1f77b4", alpha=0.6, markersize=5)
        c = r.contrast
        axis.errorbar(column + 0.25, c.mean, [[c.mean - c.low], [c.high - c.mean]], fmt="s", color="black", capsize=4)
    axis.axhline(0, color="0.5", linewidth=1, linestyle=":")
    axis.set_xticks(range(len(rows)), [f"{r.a} - {r.b}" for r in rows])
    axis.set(xlim=(-0.5, max(len(rows), 1) - 0.5), ylabel=f"difference, {rows[0].outcome.unit}" if rows else "")
    return _finished(figure, axis, legend=False)


def _series(run: Run, name: str) -> dict[int, float]:
    found = {}
    for line in run.lines:
        values = [v for n, v in line.items() if (n == name or (name[0] == "/" and n.endswith(name))) and v is not None]
        if values:
            found[line["step"]] = sum(values) / len(values)
    return found


def _finished(figure: Figure, axis, legend: bool = True) -> Figure:
    axis.spines[["top", "right"]].set_visible(False)
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=9)
    return figure
