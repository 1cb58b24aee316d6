"""The figures of the report as Vega-Lite charts. Each function returns None if no run has the metric.

The page draws them with the colour of its text (`ON_PAGE`); a PNG has a white ground (`ON_WHITE`).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import altair as alt
import vl_convert
from altair import Undefined

from comparison.analysis import Row, is_ramp, strengths
from comparison.probe import Probe
from comparison.runs import Arms, Run, pairs
from trainer.arms import ARMS, CUSTOM, DEFAULT_ARMS

MORE = ("#b5476b", "#0d8a8a", "#8a6d3b", "#6f7d1c", "#7a6fd0", "#c0562f")
COLOURS = {  # of the arms, in the order in which they are drawn
    **{"off": "#808080", "on": "#2f7fc1", "shuffled": "#c9650b", "load": "#2f8f43"},
    **dict(zip((arm for arm in ARMS if arm not in DEFAULT_ARMS), itertools.cycle(MORE))),
    CUSTOM: "#9a5fc0",
}
MAX_POINTS = 200, 24_000  # of one line, of one figure
WIDTH = 620  # of a PNG without its axis labels, in CSS pixels

# parameters of the curves, which the page's controls set
SHOWN_ARMS, SHOWN_SEED, SHOWN_VALUE = "arms", "seed", "show"


@dataclass(frozen=True)
class Figure:
    """Charts with one title and caption. The page puts them side by side where there is room."""

    title: str
    caption: str
    panels: list[Any]
    columns: int = 1  # of the PNG
    has_controls: bool = False  # whether the page's controls change it


def config(ink: str, font: str) -> dict[str, Any]:
    """Vega-Lite's configuration for a colour of text and axes."""
    text = {"labelColor": ink, "titleColor": ink, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
    axis = {"domain": False, "grid": True, "gridColor": ink, "gridOpacity": 0.15, "tickColor": ink, "tickOpacity": 0.4}
    return {
        "background": None,
        "font": font,
        "view": {"stroke": None},
        "axis": text | axis,
        "axisBand": {"grid": False, "ticks": False},
        "legend": text | {"orient": "top", "title": None, "symbolOpacity": 1, "symbolStrokeWidth": 3},
        "title": {"anchor": "start", "color": ink, "fontSize": 13, "fontWeight": "normal", "offset": 8},
        "range": {"category": ["#2f7fc1", "#c9650b", "#2f8f43", "#9a5fc0", "#b5476b", "#6f7d1c", "#0d8a8a", "#8a6d3b"]},
    }


ON_PAGE = config("currentColor", "system-ui, sans-serif")
ON_WHITE = config("#333333", "sans-serif") | {"background": "white", "padding": 12}


def specifications(figure: Figure) -> list[dict[str, Any]]:
    """The Vega-Lite specification of each panel, as wide as the element that holds it."""
    fit = {"autosize": {"type": "fit-x", "contains": "padding"}, "config": ON_PAGE}
    return [panel.properties(width="container").to_dict() | fit for panel in figure.panels]


def png(figure: Figure) -> bytes:
    """The figure as a PNG with all of its panels."""
    width = WIDTH if figure.columns == 1 else (WIDTH - 70) // figure.columns
    panels = [panel.properties(width=width) for panel in figure.panels]
    whole = panels[0]
    if len(panels) > 1:
        whole = alt.concat(*panels, columns=figure.columns).resolve_scale(color="independent")
    return vl_convert.vegalite_to_png(whole.to_dict() | {"config": ON_WHITE}, scale=2)


def thinned(steps: list[int], values: list[list[float]], lines: int) -> tuple[list[int], list[list[float]]]:
    """At most as many points as a figure of this number of lines may have, the last one included; rounded values."""
    most = max(2, min(MAX_POINTS[0], MAX_POINTS[1] // max(1, lines)))
    every = math.ceil(len(steps) / most)
    kept = slice((len(steps) - 1) % every if steps else 0, None, every)
    return steps[kept], [[None if v is None else float(f"{v:.5g}") for v in series[kept]] for series in values]


def chart(rows: list[dict[str, Any]]) -> alt.Chart:
    """A chart of rows that the page holds."""
    return alt.Chart(alt.InlineData(values=rows))


def step_axis(**options: Any) -> alt.X:
    """The axis of training steps."""
    return alt.X("step:Q", title="step", axis=alt.Axis(tickCount=5, grid=False), scale=alt.Scale(nice=False), **options)


def _by_arm(arms: list[str], **options: Any) -> alt.Color:
    shown = [arm for arm in COLOURS if arm in arms]
    return alt.Color("arm:N", scale=alt.Scale(domain=shown, range=[COLOURS[arm] for arm in shown]), **options)


def curve_rows(arms: Arms, name: str, reference: str | None, skip: int) -> list[dict[str, Any]]:
    """A row per run that has the metric: arm, seed, steps, values, and differences to the paired run of `reference`."""
    found = {
        (arm, seed): means
        for arm, members in arms.items()
        for seed, run in members.items()
        if (means := {step: sum(v) / len(v) for step, v in run.values(name).items() if step >= skip})
    }
    partners = {}
    if reference in arms:
        for arm in arms:
            partners |= {(arm, x.seed): found.get((reference, x.seed)) for x, _ in pairs(arms, arm, reference)[0]}
    rows = []
    for (arm, seed), means in sorted(found.items(), key=lambda item: [*COLOURS].index(item[0][0])):
        partner = partners.get((arm, seed)) or {}
        steps = sorted(means)
        difference = [means[step] - partner[step] if step in partner else None for step in steps]
        steps, (values, difference) = thinned(steps, [[means[step] for step in steps], difference], len(found))
        rows.append({"arm": arm, "seed": str(seed), "step": steps, "value": values, "difference": difference})
    return rows


def curves(
    arms: Arms,
    name: str,
    label: str,
    reference: str | None = "off",
    skip: int = 0,
    spec: str = ".4f",
    domain: tuple[float, float] | None = None,
) -> alt.LayerChart | None:
    """A metric against the step by arm: a thin line per seed, a thick line for their mean.

    name: the mean over layers is drawn; see `Run.values`. reference: the arm whose run with the same seed is
    subtracted; None: the values are drawn. skip: first step that is drawn. spec: format of the values. domain: of the
    axis of values.
    """
    rows = curve_rows(arms, name, reference, skip)
    if not rows:
        return None
    shown = list(dict.fromkeys(row["arm"] for row in rows))
    if reference is None:
        title, y, params, sign = label, "datum.value", [], "''"
    else:
        is_difference = f"{SHOWN_VALUE} == 'difference'"
        title = alt.expr(f"{is_difference} ? {f'{label}: difference to {reference}'!r} : {label!r}")
        y, params = f"{is_difference} ? datum.difference : datum.value", [alt.param(SHOWN_VALUE, value="difference")]
        sign = f"({is_difference} ? '+' : '')"
    base = (
        chart(rows)
        .transform_filter(f"indexof({SHOWN_ARMS}, datum.arm) >= 0")
        .transform_filter(f"{SHOWN_SEED} == 'all' || datum.seed == {SHOWN_SEED}")
        .transform_flatten(["step", "value", "difference"])
        .transform_calculate(y=y)
        .transform_filter("isValid(datum.y)")
    )
    scale = alt.Scale(zero=False) if domain is None else alt.Scale(domain=domain)
    y_axis, colour = alt.Y("y:Q", title=None, scale=scale), _by_arm(shown)
    thin = base.mark_line(strokeWidth=1, opacity=0.35).encode(step_axis(), y_axis, colour, alt.Detail("seed:N"))
    mean = base.mark_line(strokeWidth=2.5).encode(step_axis(), alt.Y("mean(y):Q", title=None, scale=scale), colour)
    hover = alt.selection_point(on="pointerover", clear="pointerout", fields=["step"], empty=False)
    gaps = max(1, max(len(row["step"]) for row in rows) - 1)
    texts = {
        f"text_{arm}": f"isValid(datum['{arm}']) ? format(datum['{arm}'], {sign} + '{spec}') : '-'" for arm in shown
    }
    rule = (
        base.transform_pivot("arm", value="y", groupby=["step"], op="mean")
        .transform_calculate(**texts)
        .mark_rule(color="currentColor", strokeWidth=alt.expr(f"width / {gaps}"))  # a band per step, for the pointer
        .encode(
            step_axis(),
            opacity=alt.condition(hover, alt.value(0.15), alt.value(0)),
            tooltip=[alt.Tooltip("step:Q"), *(alt.Tooltip(f"text_{arm}:N", title=arm) for arm in shown)],
        )
        .add_params(hover)
    )
    params += [alt.param(SHOWN_ARMS, value=shown), alt.param(SHOWN_SEED, value="all")]
    return alt.layer(thin, mean, rule).add_params(*params).properties(height=240, title=alt.TitleParams(text=title))


def differences(rows: list[Row]) -> alt.LayerChart:
    """Differences of the pairs in the primary outcome, one line per contrast: pairs, mean, 95% interval, margin."""
    names = [f"{r.a} - {r.b}" for r in rows]
    dots = [
        {"contrast": name, "seed": seed, "difference": difference}
        for name, r in zip(names, rows)
        for seed, difference in r.differences.items()
    ]
    bars = [
        {"contrast": name, "mean": r.contrast.mean}
        | ({"low": r.contrast.low, "high": r.contrast.high} if r.contrast.is_enough else {})
        | ({"margin": r.contrast.margin, "minus": -r.contrast.margin} if r.contrast.margin is not None else {})
        for name, r in zip(names, rows)
    ]
    y = alt.Y("contrast:N", sort=names, title=None)

    def x(field: str) -> alt.X:
        return alt.X(f"{field}:Q", title=f"difference, {rows[0].outcome.unit}", axis=alt.Axis(tickCount=5))

    numbers = [alt.Tooltip(f"{field}:Q", format="+.4f") for field in ("mean", "low", "high")]
    layers = []
    if any("margin" in bar for bar in bars):
        band = chart([bar for bar in bars if "margin" in bar]).mark_rect(color="currentColor", opacity=0.1)
        layers.append(band.encode(x("minus"), alt.X2("margin"), y))
    layers.append(chart([{"zero": 0}]).mark_rule(color="currentColor", opacity=0.5).encode(x("zero")))
    if any("low" in bar for bar in bars):
        interval = chart([bar for bar in bars if "low" in bar]).mark_rule(color=COLOURS["on"], strokeWidth=14)
        layers.append(interval.encode(x("low"), alt.X2("high"), y, opacity=alt.value(0.35), tooltip=numbers))
    tick = chart(bars).mark_tick(color="currentColor", thickness=3, size=26)
    layers.append(tick.encode(x("mean"), y, tooltip=numbers[:1]))
    tooltip = [alt.Tooltip("seed:O"), alt.Tooltip("difference:Q", format="+.4f")]
    points = chart(dots).mark_circle(color=COLOURS["on"], size=55, opacity=0.9)
    layers.append(points.encode(x("difference"), y, tooltip=tooltip))
    return alt.layer(*layers).properties(height=alt.Step(52))


def ramp(arms: Arms) -> list[alt.LayerChart] | None:
    """Metrics against the strength of beta, where it rises and where it falls; None unless all runs have a ramp."""
    if not all(is_ramp(run) for members in arms.values() for run in members.values()):
        return None
    labels = {"neff": "Neff, experts", "flip": "tokens whose first expert changed, share", "val/loss": "loss, nats"}
    panels = []
    for metric, label in labels.items():
        rows = []
        for arm, members in arms.items():
            for run in members.values():
                strength = dict(zip(*strengths(run)))
                top = max(strength, key=lambda step: strength[step])
                rows += [
                    {"arm": arm, "seed": run.seed, "strength": round(strength[step], 6), label: sum(v) / len(v)}
                    | {"branch": branch}
                    for step, v in run.values(metric).items()
                    for branch in (["rises"] * (step <= top) + ["falls"] * (step >= top))
                ]
        if not rows:
            continue
        x = alt.X("strength:Q", title="strength of beta", axis=alt.Axis(tickCount=5, grid=False))
        dash = alt.StrokeDash("branch:N", scale=alt.Scale(domain=["rises", "falls"], range=[[1, 0], [5, 3]]))
        base = chart(rows).encode(x, _by_arm([*arms]), dash)
        scale = alt.Scale(zero=False)
        thin = base.mark_line(strokeWidth=0.7, opacity=0.25)
        thin = thin.encode(alt.Y(f"{label}:Q", title=None, scale=scale), alt.Detail("seed:N"))
        mean = base.mark_line(strokeWidth=2.5).encode(alt.Y(f"mean({label}):Q", title=None, scale=scale))
        panels.append(alt.layer(thin, mean).properties(height=190, title=label))
    return panels or None


def experts(runs: dict[str, Run], metric: str, label: str, one_scale: bool) -> list[alt.LayerChart] | None:
    """A metric of every expert against the step, one panel per arm, one colour per layer.

    one_scale: the panels have the same axis of values.
    """
    tables = {arm: run.by_expert(metric) for arm, run in runs.items()}
    tables = {arm: table for arm, table in tables.items() if table}
    if not tables:
        return None
    count = sum(map(len, tables.values()))
    every = [v for table in tables.values() for _, values in table.values() for v in values]
    domain = alt.Scale(domain=[min(every), max(every)], nice=True) if one_scale else alt.Scale(zero=False)
    layers = [f"L{layer}" for layer in sorted({layer for table in tables.values() for layer, _ in table})]
    panels = []
    for arm, table in tables.items():
        rows = []
        for (layer, expert), (steps, values) in table.items():
            kept, (thin,) = thinned(steps, [values], count)
            last = float(f"{values[-1]:.4g}")
            rows.append({"layer": f"L{layer}", "expert": expert, "step": kept, label: thin, "last": last})
        y = alt.Y(f"{label}:Q", title=None, scale=domain)
        base = chart(rows).transform_flatten(["step", label])
        lines = base.mark_line(strokeWidth=1.3).encode(
            step_axis(), y, alt.Color("layer:N", scale=layer_scale(layers)), alt.Detail("expert:N")
        )
        tooltip = [
            alt.Tooltip("layer:N"),
            alt.Tooltip("expert:O"),
            alt.Tooltip("last:Q", title=f"{label} at the end"),
        ]
        wide = base.mark_line(strokeWidth=9, opacity=0).encode(step_axis(), y, alt.Detail(["layer:N", "expert:N"]))
        title = f"{arm}: {label}"
        panels.append(alt.layer(lines, wide.encode(tooltip=tooltip)).properties(height=190, title=title))
    return panels


def layer_scale(layers: list[str]) -> alt.Scale:
    """A colour per layer."""
    return alt.Scale(domain=layers) if len(layers) <= 8 else alt.Scale(domain=layers, scheme="turbo")


def heatmap(runs: dict[str, Run], metric: str, label: str, is_signed: bool) -> alt.LayerChart | None:
    """The last value of a metric by layer and expert, a row per arm and layer, with one scale for all arms.

    is_signed: the colours diverge from 0.
    """
    rows = [
        {"row": f"{arm} L{layer}", "expert": expert, "value": values[-1]}
        for arm, run in runs.items()
        for (layer, expert), (_, values) in run.by_expert(metric).items()
    ]
    if not rows:
        return None
    unit = unit_of([row["value"] for row in rows])
    digits = 2 if not is_signed else 3 if unit == 1 else 1
    for row in rows:
        row["cell"] = f"{round(row['value'] / unit, digits) + 0.0:.{digits}f}"  # 0.0: no -0.000
    limit = max(abs(row["value"]) for row in rows) or 1.0
    diverging = alt.Scale(scheme="redblue", reverse=True, domain=[-limit, limit])
    title = label if unit == 1 else f"{label}, in units of {unit:g}"
    tooltip = [alt.Tooltip("row:N", title="layer"), "expert:O", alt.Tooltip("value:Q", title=label, format=".4g")]
    return cells(rows, diverging if is_signed else alt.Scale(scheme="viridis"), tooltip).properties(title=title)


def unit_of(values: list[float]) -> float:
    """The power of ten that cells show values in: 1, or less if all values are small."""
    largest = max(map(abs, values))
    return 10.0 ** math.floor(math.log10(largest)) if 0 < largest < 0.01 else 1.0


def cells(
    rows: list[dict[str, Any]],
    scale: alt.Scale,
    tooltip: list[Any],
    column: str = "expert",
    order: list[str] | None = None,
) -> alt.LayerChart:
    """A heatmap with text. Each row has the fields row, `column`, value, which is coloured, and cell, its text.

    order: of the columns; None: sorted.
    """
    count, characters = len({row[column] for row in rows}), max(len(row["cell"]) for row in rows)
    colour = alt.Color("value:Q", scale=scale, legend=None)
    base = chart(rows).encode(
        alt.X(f"{column}:O", title=column, sort=order or Undefined, axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        alt.Y("row:N", title=None, sort=None),
        tooltip=tooltip,
    )
    # black or white, whichever has the higher contrast with the cell
    ink = alt.expr("luminance(scale('color', datum.value)) > 0.179 ? 'black' : 'white'")
    size = f"min(12, width / {count} / {0.62 * characters})"  # fits the cell; not drawn if too small to read
    text = base.mark_text(fill=ink, fontSize=alt.expr(size), opacity=alt.expr(f"{size} < 7 ? 0 : 1"))
    return alt.layer(base.mark_rect().encode(colour), text.encode(text="cell:N")).properties(height=alt.Step(26))


def proposals(runs: dict[str, Run]) -> alt.Chart | None:
    """The steps during which each expert was proposed for pruning, as bars; None if none was."""
    rows = [
        {"expert": f"{arm} {expert}", "reason": reason.replace("_", " "), "step": start, "end": end}
        for arm, run in runs.items()
        for expert, reason, start, end in open_times(run)
    ]
    if not rows:
        return None
    tooltip = ["expert:N", "reason:N", alt.Tooltip("step:Q", title="from"), alt.Tooltip("end:Q", title="to")]
    bars = chart(rows).mark_bar(opacity=0.8).encode(step_axis(), alt.X2("end"), tooltip=tooltip)
    return bars.encode(alt.Y("expert:N", title=None), alt.Color("reason:N")).properties(height=alt.Step(20))


def probe(probes: dict[str, list[Probe]]) -> list[alt.Chart]:
    """The effect of beta against top_k: loss difference, share of the set changed, gate mass moved."""
    labels = {
        "loss_difference": "loss with beta - loss without, nats",
        "set_changed": "share of the top-K set changed",
        "gate_mass_moved": "gate mass moved",
    }
    panels = []
    for field, label in labels.items():
        rows = [
            {"arm": arm, "top_k": p.top_k, field: getattr(p, field)} for arm, found in probes.items() for p in found
        ]
        x = alt.X("top_k:O", axis=alt.Axis(labelAngle=0, labelOverlap=True))
        tooltip = ["arm:N", "top_k:O", alt.Tooltip(f"{field}:Q", format="+.4g")]
        lines = chart(rows).mark_line(point=alt.OverlayMarkDef(size=50))
        lines = lines.encode(x, alt.Y(f"{field}:Q", title=None), _by_arm([*probes]), tooltip=tooltip)
        panels.append(lines.properties(height=150, title=label))
    return panels


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
