"""The README's picture: loss, coherence, beta and disagreement of a run, from its metrics.jsonl.

python docs/figure.py out/vertical_slice docs/vertical_slice.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GROUPS = [("expert", "phi_slow", "coherence (phi_slow)"), ("expert", "beta", "beta")]


def series(lines: list[dict], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the lines that have a value of that name."""
    found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def draw(lines: list[dict], title: str):
    """A figure of two rows: losses and JS, then phi_slow and beta of every expert, one colour a layer."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    losses, js, phi, beta = axes.flat
    losses.plot(*series(lines, "train/loss"), color="0.75", linewidth=1, label="train")
    losses.plot(*series(lines, "val/loss"), color="tab:blue", marker="o", markersize=3, label="validation")
    losses.set(ylabel="cross-entropy, nats per token", ylim=(None, 4))
    losses.legend(frameon=False)
    names = sorted({name for line in lines for name in line})
    for name in (n for n in names if n.startswith("routing/") and n.endswith("/js")):
        js.plot(*series(lines, name), label=name.split("/")[1])
    js.set(ylabel="JS, clean against biased routing", yscale="log")
    js.legend(frameon=False)
    layers = sorted({n.split("/")[1].split("_")[0] for n in names if n.startswith("expert/")})
    for axis, (group, metric, label) in zip((phi, beta), GROUPS):
        for name in (n for n in names if n.startswith(f"{group}/") and n.endswith(f"/{metric}")):
            layer = name.split("/")[1].split("_")[0]
            axis.plot(*series(lines, name), color=f"C{layers.index(layer)}", linewidth=1)
        axis.set(xlabel="step", ylabel=f"{label} of each expert")
    phi.axhline(0.5, color="0.3", linestyle=":", linewidth=1)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    return figure


if __name__ == "__main__":
    run, picture = Path(sys.argv[1]), Path(sys.argv[2])
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    figure = draw([json.loads(line) for line in text.splitlines()], f"{run.name}: blue layer L0, orange layer L2")
    figure.savefig(picture, dpi=130)
