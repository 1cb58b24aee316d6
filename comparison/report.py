"""report.html, report.md and the figures: the verdict first, then what it rests on."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import re
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from comparison import figures
from comparison.analysis import (
    FIRST,
    POWER_COLUMN,
    Analysis,
    Row,
    analyse,
    conclusion,
    no_verdict,
    planning_figure,
    verdict,
)
from comparison.probe import Probe, probe
from comparison.runs import Arms, Run, effective
from trainer.errors import UserError
from trainer.files import atomic_write, parse_json, read_text

COLUMNS = ["outcome", "contrast", "pairs", "mean difference", "95% interval", "p", "verdict", POWER_COLUMN]
NOTE = (
    "One outcome has a verdict, the validation loss. It, its contrasts and their order were fixed in advance: 'on' "
    "against 'off' is tested at 5%; 'on' against 'shuffled' at 5%, only where the first finds an effect. So a study "
    "without any effect claims one in at most 5% of cases. p is that of the sign-flip test, and the intervals invert "
    "that test. The margin was declared in the settings of the runs: 'no effect' says that two one-sided tests at 5% "
    "exclude effects as large. These tests take the differences to be symmetric about their mean. The other rows are "
    "described by intervals, not corrected for their number. The last column is for planning: the effect that so many "
    "pairs find in 80% of studies, by the spread seen, with the 95% interval that follows from knowing the spread from "
    "these pairs only. Smaller effects are found too, less often. Layer coherence is a check that beta acted and no "
    "outcome, because beta selects for it."
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All that a report tells."""

    arms: Arms
    differing: dict[str, list[str]]  # settings, and the values they have
    left_out: list[str]
    command: str
    analysis: Analysis
    probes: dict[str, list[Probe]]  # by arm, of one seed's models
    looks: list[dict[str, Any]]  # what the reports that were written here before looked at
    lost_looks: str | None = None  # why that is not known

    @property
    def rows(self) -> list[Row]:
        return [*self.analysis.primary, *self.analysis.described, *self.analysis.check]

    @property
    def sentences(self) -> list[str]:
        """What bears on the verdict, then the verdicts in words, one for each contrast."""
        verdicts = [verdict(self.analysis, r) for r in self.analysis.primary]
        return [*self.analysis.warnings, *self.extensions, *verdicts]

    @property
    def extensions(self) -> list[str]:
        """A sentence for each earlier report over other pairs of the same study, or over other steps."""
        found = []
        if self.lost_looks is not None:
            found.append(f"Whether this study was changed after an earlier report is not known: {self.lost_looks}.")
        for before in self.looks:
            now = self.look
            if now is None or before["study"] != now["study"]:
                continue
            if (before["seeds"], before["steps"]) != (now["seeds"], now["steps"]):
                found.append(
                    f"This study was changed after its report was written: on {before['date']} it had "
                    f"{len(before['seeds'])} pairs of {before['steps']} steps, now it has {len(now['seeds'])} of "
                    f"{now['steps']}. A study whose runs are chosen after a look at its result claims effects more "
                    "often than p says."
                )
        return found

    @property
    def look(self) -> dict[str, Any] | None:
        """What this report shows of the first contrast: its study, by a digest of the settings, its pairs and steps."""
        row = self.analysis.row(FIRST)
        if row is None:
            return None
        runs = [next(iter(self.arms[arm].values())) for arm in FIRST]
        settings = [
            {k: v for k, v in effective(run.config).items() if k not in ("max_iters", "margin")} for run in runs
        ]
        study = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return {"date": str(date.today()), "study": study, "seeds": sorted(row.differences), "steps": runs[0].steps}

    @property
    def shown(self) -> dict[str, Run]:
        """One run of each arm, of the same seed where possible: what per-expert figures show."""
        common = set.intersection(*(set(members) for members in self.arms.values()))
        seed = min(common) if common else None
        return {arm: members.get(seed, next(iter(members.values()))) for arm, members in self.arms.items()}


def compare(
    arms: Arms,
    differing: dict[str, list[str]],
    left_out: list[str],
    lost: dict[str, set[str]],
    command: str,
    out: Path,
) -> Comparison:
    """Analyse the arms and probe one trained model of each that has a beta.

    lost: seeds of runs that could not be used, by arm. out: where the report will be.
    """
    comparison = Comparison(arms, differing, list(left_out), command, analyse(arms, lost), {}, *earlier_looks(out))
    for arm, run in comparison.shown.items():
        if run.config.get("chrono_beta"):
            try:
                comparison.probes[arm] = probe(run)
            except UserError as e:
                comparison.left_out.append(f"constraint probe of {arm} ({run.name}): {e}")
    return comparison


def earlier_looks(out: Path) -> tuple[list[dict[str, Any]], str | None]:
    """What the reports that were written into `out` before looked at, the oldest first; or why that is not known."""
    path = out / "comparison.json"
    try:
        before = parse_json(read_text(path))
        looks = [
            {"date": str(k["date"]), "study": str(k["study"]), "seeds": [*k["seeds"]], "steps": int(k["steps"])}
            for k in before["looks"]
        ]
        lost = before.get("lost_looks")
        return looks, None if lost is None else str(lost)
    except FileNotFoundError:
        return [], None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return [], f"{path} was damaged or written by an older version"


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
            with atomic_write(out / name) as f:
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
        ("Paired differences", "Each dot is one seed; square and bar: mean and 95% interval; shaded: the margin.",
         figures.differences(c.analysis.primary) if c.analysis.primary else None),
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
        conclusion=conclusion(c.analysis),
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
        rows=[cells(c.analysis, r) for r in c.rows],
        command=c.command,
    )


def as_markdown(c: Comparison, drawn: list[tuple[str, str, str]]) -> str:
    first = next(iter(c.shown.values()))
    lines = ["# Beta on against beta off", "", f"**{conclusion(c.analysis)}**", ""]
    lines += [f"- {sentence}" for sentence in c.sentences]
    lines += ["", f"{_counts(c)}; {first.config['max_iters']:,} steps on {first.config['dataset']}. {date.today()}."]
    if c.left_out:
        lines += ["", "Left out:", "", *(f"- {reason}" for reason in c.left_out)]
    lines += ["", "Settings in which these runs differ:", ""]
    lines += [f"- `{key}`: {', '.join(values)}" for key, values in c.differing.items()]
    lines += ["", "## All contrasts", "", NOTE, "", _table(COLUMNS), _table(["---"] * len(COLUMNS))]
    lines += [_table(cells(c.analysis, r)) for r in c.rows]
    for title, caption, path in drawn:
        lines += ["", f"## {title}", "", f"![{title}]({path})", "", caption]
    return "\n".join([*lines, "", "## The command", "", f"    {c.command}"]) + "\n"


def as_numbers(c: Comparison) -> dict[str, Any]:
    """comparison.json: what the report says, and each run's validation losses."""

    def plain(r: Row) -> dict[str, Any]:
        k = r.contrast
        numbers = dataclasses.asdict(k) | {"planning": k.planning if k.enough else None}
        numbers |= {"pairs_to_decide": k.pairs_to_decide, "verdict": short_verdict(c.analysis, r)}
        # JSON has no infinity
        finite = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in numbers.items()}
        named = {"outcome": r.outcome.name, "a": r.a, "b": r.b, "differences": r.differences}
        return named | {"confounders": r.confounders} | finite

    losses = {
        arm: {seed: dict(zip(*run.series("val/loss"))) for seed, run in sorted(members.items())}
        for arm, members in c.arms.items()
    }
    return {
        "command": c.command,
        "date": str(date.today()),
        "conclusion": conclusion(c.analysis),
        "verdicts": c.sentences,
        "differing": c.differing,
        "left_out": c.left_out,
        "looks": [*c.looks, *([c.look] if c.look and not any(_same_look(k, c.look) for k in c.looks) else [])],
        "lost_looks": c.lost_looks,
        **{name: [plain(r) for r in getattr(c.analysis, name)] for name in ("primary", "described", "check")},
        "probes": {arm: [dataclasses.asdict(p) for p in found] for arm, found in c.probes.items()},
        "validation_loss": losses,
    }


def _counts(c: Comparison) -> str:
    return "Runs: " + ", ".join(f"{arm} {len(members)}" for arm, members in c.arms.items())


def _same_look(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a | {"date": None} == b | {"date": None}


def short_verdict(analysis: Analysis, r: Row) -> str:
    """'effect', 'no effect', 'undecided', or 'none' for a row that has no verdict."""
    if r not in analysis.primary or no_verdict(analysis, (r.a, r.b)) is not None:
        return "none"
    return "effect" if r.contrast.found else "no effect" if r.contrast.equivalent else "undecided"


def cells(analysis: Analysis, r: Row) -> list[str]:
    """The row of the table under COLUMNS."""
    c, judged = r.contrast, short_verdict(analysis, r)
    difference = f"{c.mean:+.4g} {r.outcome.unit}".strip()
    interval = f"{c.low:+.4g} to {c.high:+.4g}" if c.enough else ""
    p = "" if judged == "none" else f"{c.p:.3g}" if c.exact else f"{c.p:.3g} (sampled)"
    note = "confounded" if r.confounders else judged if r in analysis.primary else ""
    return [r.outcome.name, f"{r.a} - {r.b}", str(c.n), difference, interval, p, note, planning_figure(c)]


def _table(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
