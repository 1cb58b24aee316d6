"""The figures of the report. Each function returns a matplotlib figure, or None if no run has the metric."""

from __future__ import annotations

import math

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from comparison.analysis import Row
from comparison.probe import Probe
from comparison.runs import Arms, Run

COLOURS = {"off": "#8c8c8c", "on": "#2f7fc1", "shuffled": "#e07b1a", "load": "#3a9a4b"}
INK = "#808080"  # readable on white and on black

matplotlib.rcParams.update(
    {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
        **{"svg.fonttype": "none", "svg.hashsalt": "comparison", "font.size": 10, "font.family": "sans-serif"},
    }
)


def subplots(rows: int = 1, columns: int = 1, height: float = 3.2, **options):
    """Subplots that are legible on the screen of a phone; height: of a row, in inches."""
    return plt.subplots(rows, columns, figsize=(5.0, height * rows), layout="constrained", **options)


def curves(arms: Arms, name: str, label: str, skip: int = 0, log: bool = False, **limits) -> Figure | None:
    """A metric by arm against the step: the mean over seeds, and a band from the lowest to the highest seed.

    name: the mean over layers is drawn; see `Run.values`. skip: first step that is drawn.
    """
    figure, axis = subplots()
    for arm, members in arms.items():
        found = [run.values(name) for run in members.values()]
        seeds = [{step: sum(values) / len(values) for step, values in of_run.items()} for of_run in found if of_run]
        steps = [step for step in sorted(set.intersection(*map(set, seeds))) if step >= skip] if seeds else []
        if not steps:
            continue
        values = np.array([[of_seed[step] for step in steps] for of_seed in seeds])
        if log and not (values > 0).any():
            continue
        axis.plot(steps, values.mean(0), color=COLOURS.get(arm), label=f"{arm} ({len(seeds)} seeds)")
        axis.fill_between(steps, values.min(0), values.max(0), color=COLOURS.get(arm), alpha=0.18, linewidth=0)
    if not axis.lines:
        plt.close(figure)
        return None
    axis.set(xlabel="step", ylabel=label, yscale="log" if log else "linear", **limits)
    axis.legend(fontsize=9)
    return figure


def differences(rows: list[Row]) -> Figure:
    """Differences of the pairs in the primary outcome, their mean, 95% interval and margin; one column per contrast."""
    figure, axis = subplots()
    for column, r in enumerate(rows):
        values = list(r.differences.values())
        axis.plot(column + np.linspace(-0.12, 0.12, len(values)), values, "o", color=COLOURS["on"], alpha=0.7)
        c = r.contrast
        bar = [[c.mean - c.low], [c.high - c.mean]] if c.is_enough else None
        axis.errorbar(column + 0.25, c.mean, bar, fmt="s", color=INK, capsize=4)
        if c.margin is not None:
            axis.fill_between([column - 0.4, column + 0.4], -c.margin, c.margin, color=INK, alpha=0.12, linewidth=0)
    axis.axhline(0, color=INK, linewidth=1, linestyle=":")
    axis.set_xticks(range(len(rows)), [f"{r.a} - {r.b}" for r in rows])
    axis.set(xlim=(-0.5, len(rows) - 0.5), ylabel=f"difference in loss, {rows[0].outcome.unit}")
    return figure


def experts(runs: dict[str, Run], metric: str, label: str) -> Figure | None:
    """A metric of every expert against the step, one panel per arm, one colour per layer."""
    found = {arm: run.by_expert(metric) for arm, run in runs.items()}
    found = {arm: table for arm, table in found.items() if table}
    if not found:
        return None
    figure, axes = subplots(math.ceil(len(found) / 2), 2, height=2.4, squeeze=False, sharex=True)
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    for axis, (arm, table) in zip(axes.flat, found.items()):
        layers = sorted({layer for layer, _ in table})
        for (layer, _), (steps, values) in table.items():
            axis.plot(steps, values, color=f"C{layers.index(layer)}", linewidth=0.9, alpha=0.8)
        axis.set_title(arm)
    figure.supxlabel("step", fontsize=10, color=INK)
    figure.supylabel(label, fontsize=10, color=INK)
    colours = [plt.Line2D([], [], color=f"C{i}", label=f"L{layer}") for i, layer in enumerate(layers)]
    axes.flat[0].legend(handles=colours, fontsize=8)
    return figure


def heatmaps(runs: dict[str, Run], metric: str, label: str) -> Figure | None:
    """The last value of a metric by layer and expert, one panel per arm."""
    tables = {}
    for arm, run in runs.items():
        last = {key: values[-1] for key, (_, values) in run.by_expert(metric).items()}
        if last:
            layers, columns = sorted({layer for layer, _ in last}), sorted({e for _, e in last})
            tables[arm] = layers, np.array([[last.get((layer, e), np.nan) for e in columns] for layer in layers])
    if not tables:
        return None
    height = 0.6 + 0.3 * max(len(layers) for layers, _ in tables.values())
    figure, axes = subplots(len(tables), 1, height=height, squeeze=False, sharex=True)
    for axis, (arm, (layers, table)) in zip(axes.flat, tables.items()):
        limit = np.nanmax(abs(table)) or 1.0  # per arm: betas of two arms may differ by orders of magnitude
        image = axis.imshow(table, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axis.set_yticks(range(len(layers)), [f"L{layer}" for layer in layers])
        axis.set_title(arm)
        figure.colorbar(image, ax=axis, label=label)
    axes.flat[-1].set_xlabel("expert")
    return figure


def proposals(runs: dict[str, Run]) -> Figure | None:
    """The steps during which each expert was proposed for pruning, as bars; None if none was."""
    bars = [(arm, *bar) for arm, run in runs.items() for bar in open_times(run)]
    if not bars:
        return None
    names = sorted({f"{arm} {expert}" for arm, expert, *_ in bars}, reverse=True)
    figure, axis = subplots(height=max(1.6, 0.22 * len(names) + 1))
    for arm, expert, reason, start, end in bars:
        hatch = "///" if reason == "low_observability" else None
        axis.barh(f"{arm} {expert}", end - start, left=start, color=COLOURS.get(arm), height=0.6, hatch=hatch)
    axis.set(xlabel="step; hatched: low observability, plain: low coherence")
    axis.set_yticks(names)
    return figure


def probe(probes: dict[str, list[Probe]]) -> Figure:
    """The effect of beta against top_k: loss difference, share of the set changed, gate mass moved."""
    figure, axes = subplots(3, 1, height=2.2, sharex=True)
    panels = (
        ("loss_difference", "loss difference"),
        ("set_changed", "set changed"),
        ("gate_mass_moved", "gate mass moved"),
    )
    for axis, (field, label) in zip(axes, panels):
        for arm, found in probes.items():
            values = [getattr(p, field) for p in found]
            axis.plot([p.top_k for p in found], values, "o-", color=COLOURS.get(arm), label=arm)
        axis.set_ylabel(label, fontsize=9)
        axis.axhline(0, color=INK, linewidth=0.8, linestyle=":")
    axes[-1].set_xlabel("top_k")
    axes[0].legend(fontsize=9)
    return figure


def open_times(run: Run) -> list[tuple[str, str, int, int]]:
    """(expert, reason, step opened, step withdrawn or last step) of every prune proposal."""
    opened: dict[tuple[str, str], int] = {}
    bars = []
    for decision in run.decisions:
        key = decision["expert_id"], decision["reason"]
        if decision["action"] == "open":
            opened[key] = decision["step"]
        elif key in opened:
            bars.append((*key, opened.pop(key), decision["step"]))
    return bars + [(*key, start, run.steps) for key, start in opened.items()]
