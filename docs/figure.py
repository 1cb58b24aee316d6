"""Draw the README's picture: loss, disagreement, coherence and beta of a training run.

python docs/figure.py out/vertical_slice docs/vertical_slice.png
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from comparison.runs import Run


def draw(run: Run) -> Figure:
    """Losses and JS above, phi_slow and beta of every expert below, one colour per layer."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    losses, js, phi, beta = axes.flat
    losses.plot(*run.series("train/loss"), color="0.75", linewidth=1, label="train")
    losses.plot(*run.series("val/loss"), color="tab:blue", marker="o", markersize=3, label="validation")
    losses.set(ylabel="cross-entropy, nats per token", ylim=(None, 4))
    for name in sorted({name for line in run.lines for name in line if re.fullmatch(r"routing/L\d+/js", name)}):
        js.plot(*run.series(name), label=name.split("/")[1])
    js.set(ylabel="JS, clean against biased routing", yscale="log")
    for axis in (losses, js):
        axis.legend(frameon=False)
    for axis, metric, label in ((phi, "phi_slow", "coherence (phi_slow)"), (beta, "beta", "beta")):
        table = run.by_expert(metric)
        blocks = sorted({block for block, _ in table})
        for (block, _), series in table.items():
            axis.plot(*series, color=f"C{blocks.index(block)}", linewidth=1)
        axis.set(xlabel="step", ylabel=f"{label} of each expert")
    phi.axhline(0.5, color="0.3", linestyle=":", linewidth=1)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{run.name}: blue layer L0, orange layer L2", fontsize=10)
    return figure


if __name__ == "__main__":
    folder, picture = map(Path, sys.argv[1:])
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    run = Run(folder.name, {}, [json.loads(line) for line in text.splitlines()], [])
    draw(run).savefig(picture, dpi=130)
