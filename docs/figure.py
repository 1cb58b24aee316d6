"""Draw the picture in docs/logging.md: loss, disagreement, coherence and beta of a training run.

python docs/figure.py out/vertical_slice docs/vertical_slice.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import altair as alt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from comparison.figures import Figure, experts, png
from comparison.runs import Run


def lines(run: Run, names: dict[str, str], title: str, scale: alt.Scale, **axis: Any) -> alt.Chart:
    """Metrics of a run against the step. names: metric by label. axis: of the values."""
    rows = [
        {"metric": label, "step": step, "value": value}
        for label, name in names.items()
        for step, value in zip(*run.series(name))
    ]
    chart = alt.Chart(alt.InlineData(values=rows)).mark_line(strokeWidth=1.5, clip=True)
    x = alt.X("step:Q", axis=alt.Axis(tickCount=5, grid=False))
    y = alt.Y("value:Q", title=None, scale=scale, axis=alt.Axis(**axis))
    return chart.encode(x, y, alt.Color("metric:N", sort=[*names])).properties(height=190, title=title)


def draw(run: Run) -> Figure:
    """Losses and JS above, phi_slow and beta of every expert below, one colour per layer."""
    losses = run.series("train/loss")[1] + run.series("val/loss")[1]
    js = sorted({name for line in run.lines for name in line if name.startswith("routing/") and name.endswith("/js")})
    loss = {"train": "train/loss", "validation": "val/loss"}
    panels = [
        lines(run, loss, "cross-entropy, nats per token", alt.Scale(domain=[min(losses), 4])),
        lines(run, {name.split("/")[1]: name for name in js}, "JS, clean against biased routing, nats",
              alt.Scale(type="log"), format=".0e", tickCount=5),
        *(experts({run.name: run}, "phi_slow", "phi_slow of each expert", one_scale=False) or []),
        *(experts({run.name: run}, "beta", "beta of each expert", one_scale=False) or []),
    ]  # fmt: skip
    return Figure("A run", "", panels, columns=2)


if __name__ == "__main__":
    folder, picture = map(Path, sys.argv[1:])
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    picture.write_bytes(png(draw(Run(folder.name, {}, [json.loads(line) for line in text.splitlines()], []))))
