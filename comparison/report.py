"""report.html, report.md and the figures: the verdict first, then what it rests on."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from comparison import figures
from comparison.analysis import Row, analyse, conclusion, same_against_same, verdict
from comparison.probe import Probe, probe
from comparison.runs import Run
from trainer.errors import UserError
from trainer.files import whole_file

COLUMNS = ["outcome", "contrast", "pairs", "mean difference", "95% interval", "p", "found in 80%"]
NOTE = (
    "The primary outcome and its two contrasts were fixed in advance. p is the exact sign-flip test's; those of the "
    "secondary outcomes are corrected for their number (Holm). The last column is the effect that so many pairs, with "
    "the spread observed, find in 80% of studies. Layer coherence is a check that beta acted and no outcome, because "
    "beta selects for it."
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All that a report tells."""

    arms: dict[str, dict[int, Run]]
    differing: dict[str, list[str]]  # settings, and the values they have
    left_out: list[str]
    command: str
    primary: list[Row]
    secondary: list[Row]
    check: list[Row]
    probes: dict[str, list[Probe]]  # by arm, of one seed's models

    @property
    def sentences(self) -> list[str]:
        """The verdicts in words, one a contrast, and what comparing like with like gives."""
        like = same_against_same(self.arms)
        return [verdict(r) for r in self.primary] + ([like] if like else [])

    @property
    def shown(self) -> dict[str, Run]:
        """One run an arm, of the same seed where possible: what per-expert figures show."""
        common = set.intersection(*(set(members) for members in self.arms.values()))
        seed = min(common) if common else None
        return {arm: members.get(seed, next(iter(members.values()))) for arm, members in self.arms.items()}


def compare(
    arms: dict[str, dict[int, Run]], differing: dict[str, list[str]], left_out: list[str], command: str
) -> Comparison:
    """Analyse the arms and probe one trained model of each that has a beta."""
    comparison = Comparison(arms, differing, list(left_out), command, *analyse(arms), probes={})
    for arm, run in comparison.shown.items():
        if run.config.get("chrono_beta"):
            try:
                comparison.probes[arm] = probe(run.folder)
            except UserError as e:
                comparison.left_out.append(f"constraint probe of {arm}: {e}")
    return comparison


def write(out: Path, comparison: Comparison) -> dict[str, Path]:
    """Write report.html, report.md, comparison.json and figures/ into `out`; returns the figures by title.

    Raises UserError if it cannot.
    """
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        drawn = []
        for title, caption, figure in draw(comparison):
            name = f"figures/{re.sub('[^a-z]+', '_', title.lower())}.png"
            figure.savefig(out / name, dpi=130, facecolor="white")
            drawn.append((title, caption, name, as_svg(figure)))
            plt.close(figure)
        for name, content in (
            ("report.html", as_html(comparison, [(title, caption, svg) for title, caption, _, svg in drawn])),
            ("report.md", as_markdown(comparison, [(title, caption, name) for title, caption, name, _ in drawn])),
            ("comparison.json", json.dumps(as_numbers(comparison), indent=1) + "\n"),
        ):
            with whole_file(out / name) as f:
                f.write(content.encode())
        return {title: out / name for title, _, name, _ in drawn}
    except OSError as e:
        raise UserError(f"cannot write the report to {out}: {e.strerror}") from None


def draw(c: Comparison) -> list[tuple[str, str, Figure]]:
    """(title, caption, figure) of everything there is to draw."""
    start = next(iter(c.shown.values())).config["max_iters"] // 10
    band = "Mean over seeds; the band reaches from the lowest to the highest seed."
    seeds = {run.seed for run in c.shown.values()}
    one = f"Seed {min(seeds)} of each arm." if len(seeds) == 1 else "One run of each arm."
    found = [
        ("Paired differences", "A dot a seed; square and bar: mean and 95% interval.",
         figures.differences(c.primary) if c.primary else None),
        ("Validation loss", f"{band} The first tenth is left out.",
         figures.curves(c.arms, "val/loss", "validation loss, nats per token", skip=start)),
        ("Disagreement", f"Clean against used routing. {band}", figures.curves(c.arms, "/js", "JS, nats", log=True)),
        ("Relevance", f"Strength with which beta is applied. {band}",
         figures.curves(c.arms, "/relevance", "r", ylim=(-0.05, 1.05))),
        ("Load", f"Coefficient of variation of the experts' loads. {band}",
         figures.curves(c.arms, "/load_cv", "load CV")),
        ("Layer coherence", f"A check that beta acts, no outcome. {band}",
         figures.curves(c.arms, "/layer", "token-weighted mean phi_slow")),
        ("Coherence of every expert", one, figures.experts(c.shown, "phi_slow", "phi_slow")),
        ("Coherence at the end", one, figures.heatmaps(c.shown, "phi_slow", "phi_slow")),
        ("Beta of every expert", one, figures.experts(c.shown, "beta", "beta")),
        ("Beta at the end", one, figures.heatmaps(c.shown, "beta", "beta")),
        ("Prune proposals", f"A dry run: none was executed. {one}", figures.proposals(c.shown)),
        ("Constraint probe", "The trained model evaluated at other top_k, with its beta less with beta 0: loss in "
         f"nats, share of the top-K set changed, gate mass moved. {one}",
         figures.probe(c.probes) if c.probes else None),
    ]  # fmt: skip
    return [(title, caption, figure) for title, caption, figure in found if figure is not None]


def as_svg(figure: Figure) -> str:
    """The figure as an <svg> element without background."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def as_html(c: Comparison, drawn: list[tuple[str, str, str]]) -> str:
    template = (Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    first = next(iter(c.shown.values()))
    return environment.from_string(template).render(
        conclusion=conclusion(c.primary),
        verdicts=c.sentences,
        counts=_counts(c),
        steps=f"{first.config['max_iters']:,}",
        dataset=first.config["dataset"],
        date=date.today(),
        left_out=c.left_out,
        differing=c.differing,
        figures=drawn,
        note=NOTE,
        columns=COLUMNS,
        rows=[cells(r) for r in (*c.primary, *c.secondary, *c.check)],
        command=c.command,
    )


def as_markdown(c: Comparison, drawn: list[tuple[str, str, str]]) -> str:
    first = next(iter(c.shown.values()))
    lines = ["# Beta on against beta off", "", f"**{conclusion(c.primary)}**", ""]
    lines += [f"- {sentence}" for sentence in c.sentences]
    lines += ["", f"{_counts(c)}; {first.config['max_iters']:,} steps on {first.config['dataset']}. {date.today()}."]
    if c.left_out:
        lines += ["", "Left out:", "", *(f"- {reason}" for reason in c.left_out)]
    lines += ["", "Settings in which these runs differ:", ""]
    lines += [f"- `{key}`: {', '.join(values)}" for key, values in c.differing.items()]
    lines += ["", "## All contrasts", "", NOTE, "", _table(COLUMNS), _table(["---"] * len(COLUMNS))]
    lines += [_table(cells(r)) for r in (*c.primary, *c.secondary, *c.check)]
    for title, caption, path in drawn:
        lines += ["", f"## {title}", "", f"![{title}]({path})", "", caption]
    return "\n".join([*lines, "", "## The command", "", f"    {c.command}"]) + "\n"


def as_numbers(c: Comparison) -> dict[str, Any]:
    """comparison.json: what the report says, and each run's validation losses."""

    def plain(r: Row) -> dict[str, Any]:
        numbers = dataclasses.asdict(r.contrast)
        # JSON has no infinity
        numbers["smallest_found"] = r.contrast.smallest_found if r.contrast.enough else None
        named = {"outcome": r.outcome.name, "a": r.a, "b": r.b, "differences": r.differences}
        return named | {"p_holm": r.corrected} | numbers

    losses = {
        arm: {seed: dict(zip(*run.series("val/loss"))) for seed, run in sorted(members.items())}
        for arm, members in c.arms.items()
    }
    return {
        "command": c.command,
        "date": str(date.today()),
        "conclusion": conclusion(c.primary),
        "verdicts": c.sentences,
        "differing": c.differing,
        "left_out": c.left_out,
        **{name: [plain(r) for r in getattr(c, name)] for name in ("primary", "secondary", "check")},
        "probes": {arm: [dataclasses.asdict(p) for p in found] for arm, found in c.probes.items()},
        "validation_loss": losses,
    }


def _counts(c: Comparison) -> str:
    return "Runs: " + ", ".join(f"{arm} {len(members)}" for arm, members in c.arms.items())


def cells(r: Row) -> list[str]:
    c = r.contrast
    p = c.p if r.corrected is None else r.corrected
    difference = f"{c.mean:+.4g} {r.outcome.unit}".strip()
    found = [f"{p:.3g}", f"{c.smallest_found:.3g}"] if c.enough else ["none", "none"]
    return [r.outcome.name, f"{r.a} - {r.b}", str(c.n), difference, f"{c.low:+.4g} to {c.high:+.4g}", *found]


def _table(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
