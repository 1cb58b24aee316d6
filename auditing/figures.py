"""The figures of the audit as Vega-Lite charts. Their fields have fixed names; names of runs are not in them.

Large models have more layers, experts and runs than a page can show: each function draws at most a fixed number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import altair as alt
import numpy as np

from auditing.agreement import Agreement
from auditing.damage import DAMAGES, SIGNALS, Detection, Moved
from auditing.measure import Measured
from auditing.routing import Picture
from auditing.subsets import EVERY, MaskedSets
from comparison.figures import cells, chart, layer_scale, step_axis, thinned, unit_of

MAX_POINTS = 8_000  # of the scatter plots together
MAX_CELLS = 10_000  # of the co-activation together
MAX_LAYERS = 5  # with a panel of their own
MAX_THRESHOLDS = 200  # of the ROC curve
ACCENT = "#2f7fc1"
COLOURS = {  # of the choices in the curves of rises
    "phi_slow": "#2f7fc1",
    "load": "#c9650b",
    "reap": "#2f8f43",
    "first_order": "#9a5fc0",
    "aimer": "#b5476b",
    "random": "#8a6d3b",
    "best choice": "currentColor",
}
TRAJECTORIES = tuple(signal for signal in SIGNALS if signal.startswith("phi_"))

T = TypeVar("T")


def spaced(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly spaced, with the first and the last one."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, most - 1))] for i in range(most)]


def rounded(value: float) -> float | None:
    """The value with five digits; None if it is not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def correlations(found: list[Agreement], seeds: list[int]) -> alt.LayerChart:
    """The rank correlation of each criterion with worth: runs, mean, 95% interval."""
    order = [a.criterion for a in found]
    dots = [
        {"criterion": a.criterion, "seed": seed, "correlation": rounded(value)}
        for a in found
        for seed, value in zip(seeds, a.per_run)
        if math.isfinite(value)
    ]
    bars = []
    for a in found:
        if a.pooled is not None:
            bar = {"criterion": a.criterion, "mean": rounded(a.pooled.mean)}
            bars.append(bar | ({"low": a.pooled.low, "high": a.pooled.high} if a.pooled.is_enough else {}))
    y = alt.Y("criterion:N", sort=order, title=None)

    def x(field: str) -> alt.X:
        scale = alt.Scale(domain=[-1, 1])
        return alt.X(f"{field}:Q", title="rank correlation with worth", axis=alt.Axis(tickCount=5), scale=scale)

    layers = [chart([{"zero": 0}]).mark_rule(color="currentColor", opacity=0.5).encode(x("zero"))]
    numbers = [alt.Tooltip(f"{field}:Q", format="+.2f") for field in ("mean", "low", "high")]
    if any("low" in bar for bar in bars):
        interval = chart([bar for bar in bars if "low" in bar]).mark_rule(color=ACCENT, strokeWidth=12)
        layers.append(interval.encode(x("low"), alt.X2("high"), y, opacity=alt.value(0.35), tooltip=numbers))
    if bars:
        tick = chart(bars).mark_tick(color="currentColor", thickness=3, size=18)
        layers.append(tick.encode(x("mean"), y, tooltip=numbers[:1]))
    tooltip = ["criterion:N", "seed:O", alt.Tooltip("correlation:Q", format="+.2f")]
    points = chart(dots).mark_circle(color=ACCENT, size=40, opacity=0.9)
    layers.append(points.encode(x("correlation"), y, tooltip=tooltip))
    return alt.layer(*layers).properties(height=alt.Step(26))


def shown_points(runs: list[Measured], criteria: int) -> tuple[list[Measured], list[int]]:
    """The runs and the indices of the layers whose experts the scatter plots show."""
    layers, experts = runs[0].worth.shape
    count = max(1, MAX_POINTS // (criteria * experts))  # of layers, over the runs
    return runs[: max(1, count // layers)], spaced(range(layers), count)


def scatter(runs: list[Measured], found: list[Agreement]) -> list[alt.Chart]:
    """Worth against each criterion: a panel per criterion, a dot per expert, a colour per layer."""
    runs, layers = shown_points(runs, len(found))
    names = [f"L{runs[0].blocks[layer]}" for layer in layers]
    legend = alt.Legend() if len(names) <= 4 else None
    colour = alt.Color("layer:N", scale=layer_scale(names), legend=legend)
    panels = []
    for a in found:
        rows = [
            {
                "seed": run.run.seed,
                "layer": name,
                "expert": list(range(run.worth.shape[1])),
                **{
                    field: [rounded(v) for v in values[layer]]
                    for field, values in (("worth", run.worth), ("error", run.error), ("score", score))
                },
            }
            for run in runs
            for score in [run.scores[a.criterion]]
            for layer, name in zip(layers, names)
        ]
        text = "format(datum.worth, '+.4f') + ' ± ' + format(datum.error, '.4f')"
        dots = (
            chart(rows)
            .transform_flatten(["expert", "worth", "error", "score"])
            .transform_calculate(text=text)
            .mark_circle(size=22, opacity=0.7)
            .encode(
                alt.X(
                    "score:Q",
                    title=None,
                    scale=alt.Scale(zero=False),
                    axis=alt.Axis(tickCount=3, format=",.3~r", labelOverlap=True),
                ),
                alt.Y("worth:Q", title=None, axis=alt.Axis(tickCount=4, format=",.3~r")),
                colour,
                tooltip=[
                    "seed:O",
                    "layer:N",
                    "expert:O",
                    alt.Tooltip("text:N", title="worth"),
                    alt.Tooltip("score:Q", title=a.criterion, format=".4g"),
                ],
            )
        )
        panels.append(dots.properties(height=150, title=a.criterion))
    return panels


def worth(run: Measured) -> alt.LayerChart:
    """The worth of every expert of a run, by layer and expert."""
    unit = unit_of(run.worth.ravel().tolist())
    rows = [
        {
            "row": f"L{block}",
            "expert": e,
            "value": rounded(run.worth[layer, e]),
            "error": rounded(run.error[layer, e]),
            "cell": f"{round(run.worth[layer, e] / unit, 3 if unit == 1 else 2) + 0.0:.{3 if unit == 1 else 2}f}",
        }
        for layer, block in enumerate(run.blocks)
        for e in range(run.worth.shape[1])
    ]
    tooltip = [
        alt.Tooltip("row:N", title="layer"),
        "expert:O",
        alt.Tooltip("value:Q", title="worth", format="+.4g"),
        alt.Tooltip("error:Q", title="standard error", format=".2g"),
    ]
    title = "nats per token" if unit == 1 else f"nats per token, in units of {unit:g}"
    return cells(rows, alt.Scale(scheme="viridis"), tooltip).properties(title=title)


def places(masked_sets: list[MaskedSets]) -> list[str]:
    """The places that get a panel: every layer, and some of the layers."""
    found = list(dict.fromkeys(r.place for r in masked_sets))
    layers = spaced([place for place in found if place != EVERY], MAX_LAYERS)
    return [*layers, *(place for place in found if place == EVERY)]


def masked_sets(runs: list[list[MaskedSets]]) -> list[alt.LayerChart]:
    """The rise of the loss against the number of masked experts: a panel per place, means over runs."""
    every = [r for sets in runs for r in sets]
    chosen = [name for name in COLOURS if name in every[0].criteria or name == "best choice"]
    scale = alt.Scale(domain=chosen, range=[COLOURS[name] for name in chosen])
    panels = []
    for place in places(every):
        sizes = sorted({r.size for r in every if r.place == place})
        lines, band = [], []
        for size in sizes:
            at = [r for r in every if (r.place, r.size) == (place, size)]
            rises = {name: [r.best if name == "best choice" else r.criteria[name] for r in at] for name in chosen}
            lines += [{"choice": n, "size": size, "rise": rounded(float(np.mean(v)))} for n, v in rises.items()]
            low, high = np.mean([np.quantile(r.random, (0.05, 0.95)) for r in at], axis=0)
            band.append({"size": size, "low": rounded(low), "high": rounded(high)})
        axis = alt.Axis(values=sizes, format="d", grid=False)
        x = alt.X("size:Q", title="masked experts", axis=axis, scale=alt.Scale(nice=False, zero=False))
        area = chart(band).mark_area(color="currentColor", opacity=0.12)
        area = area.encode(x, alt.Y("low:Q", title=None), alt.Y2("high"))
        legend = alt.Legend(columns=4, symbolType="stroke")
        line = chart(lines).mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=25)).encode(
            x,
            alt.Y("rise:Q", title=None),
            alt.Color("choice:N", scale=scale, legend=legend),
            tooltip=["choice:N", "size:O", alt.Tooltip("rise:Q", format="+.4f")],
        )  # fmt: skip
        panels.append(alt.layer(area, line).properties(height=200, title=f"{place}: rise of the loss, nats per token"))
    return panels


def roc(points: list[dict[str, float]]) -> alt.LayerChart:
    """The ROC curve of the rule over its threshold."""
    rows = [{name: rounded(value) for name, value in p.items()} for p in spaced(points, MAX_THRESHOLDS)]
    scale, axis = alt.Scale(domain=[0, 1]), alt.Axis(tickCount=5)
    x = alt.X("others:Q", title="share of the other experts", scale=scale, axis=axis)
    y = alt.Y("cheap:Q", title="share of the cheap experts", scale=scale, axis=axis)
    order = alt.Order("others:Q")
    ends = chart([{"others": 0, "cheap": 0}, {"others": 1, "cheap": 1}])
    diagonal = ends.mark_line(color="currentColor", opacity=0.4, strokeDash=[4, 4], strokeWidth=1).encode(x, y)
    tooltip = [alt.Tooltip(f"{field}:Q", format=".3g") for field in ("threshold", "cheap", "others")]
    curve = chart(rows).mark_line(color=ACCENT, strokeWidth=2, interpolate="step-after")
    return alt.layer(diagonal, curve.encode(x, y, order, tooltip=tooltip)).properties(height=280)


def detected(found: list[Detection]) -> alt.LayerChart:
    """The share of the damaged experts that each signal detects, with the median delay."""
    rows = [
        {
            "row": d.damage,
            "signal": d.signal,
            "value": rounded(d.detected),
            "delay": d.delay,
            "cell": f"{d.detected:.0%}" + ("" if d.delay is None else f" in {d.delay:g}"),
        }
        for d in found
    ]
    tooltip = [
        alt.Tooltip("row:N", title="damage"),
        "signal:N",
        alt.Tooltip("value:Q", title="detected", format=".0%"),
        alt.Tooltip("delay:Q", title="median steps to the alarm"),
    ]
    return cells(rows, alt.Scale(scheme="viridis", domain=[0, 1]), tooltip, "signal", list(SIGNALS))


def trajectories(moved: list[Moved]) -> list[alt.LayerChart]:
    """The change of phi after the damage, mean over the damaged experts: a panel per damage."""
    panels = []
    colour = alt.Color("signal:N", scale=alt.Scale(domain=list(TRAJECTORIES)), legend=alt.Legend(columns=2))
    for damage in DAMAGES:
        cases = [m for m in moved if m.damage == damage]
        if not cases:
            continue
        rows = []
        for signal in TRAJECTORIES:
            length = min(len(m.change[signal]) for m in cases)
            mean = np.mean([m.change[signal][:length] for m in cases], axis=0)
            steps, (values,) = thinned(list(range(1, length + 1)), [mean.tolist()], 1)
            rows.append({"signal": signal, "step": steps, "change": values})
        lines = chart(rows).transform_flatten(["step", "change"]).mark_line(strokeWidth=1.8)
        tooltip = ["signal:N", "step:Q", alt.Tooltip("change:Q", format="+.3f")]
        lines = lines.encode(step_axis(), alt.Y("change:Q", title=None), colour, tooltip=tooltip)
        zero = chart([{"change": 0}]).mark_rule(color="currentColor", opacity=0.4).encode(alt.Y("change:Q", title=None))
        panels.append(alt.layer(zero, lines).properties(height=170, title=damage))
    return panels


def shown_layers(picture: Picture) -> list[int]:
    """The indices of the layers whose co-activation is shown."""
    layers, experts, _ = picture.coactivation.shape
    return spaced(range(layers), max(1, min(MAX_LAYERS - 1, MAX_CELLS // experts**2)))


def domains(picture: Picture) -> list[alt.LayerChart]:
    """The share of each domain's tokens that each expert gets: a panel per layer, with one scale."""
    largest = max(of_domain.max().item() for of_domain in picture.domains.values()) or 1.0
    scale = alt.Scale(scheme="viridis", domain=[0, rounded(largest)])
    tooltip = [alt.Tooltip("row:N", title="domain"), "expert:O", alt.Tooltip("value:Q", title="share", format=".1%")]
    return [
        cells(
            [
                {"row": name, "expert": e, "value": rounded(v), "cell": f"{v:.0%}"}
                for name, of_domain in picture.domains.items()
                for e, v in enumerate(of_domain[layer].tolist())
            ],
            scale,
            tooltip,
        ).properties(title=f"L{picture.blocks[layer]}")
        for layer in shown_layers(picture)
    ]


def coactivation(picture: Picture) -> list[alt.Chart]:
    """The share of an expert's tokens that also go to another one: a panel per layer, with one scale."""
    of_layer = {layer: picture.coactivation[layer].tolist() for layer in shown_layers(picture)}
    rows = {
        layer: [
            {"expert": i, "other": j, "share": rounded(share)}
            for i, of_expert in enumerate(shares)
            for j, share in enumerate(of_expert)
            if i != j
        ]
        for layer, shares in of_layer.items()
    }
    largest = max(row["share"] or 0.0 for found in rows.values() for row in found) or 1.0
    scale = alt.Scale(scheme="viridis", domain=[0, largest])
    colour = alt.Color("share:Q", scale=scale, legend=alt.Legend(format=".0%", tickCount=3))
    tooltip = [
        alt.Tooltip("expert:O", title="of the tokens of expert"),
        alt.Tooltip("share:Q", format=".1%"),
        alt.Tooltip("other:O", title="also go to expert"),
    ]
    axis = alt.Axis(labelAngle=0, labelOverlap=True)
    y, x = alt.Y("expert:O", axis=axis), alt.X("other:O", title="other expert", axis=axis)
    return [
        chart(found)
        .mark_rect()
        .encode(x, y, colour, tooltip=tooltip)
        .properties(height=260, title=f"L{picture.blocks[layer]}")
        for layer, found in rows.items()
    ]
