"""Write report.html, report.md, comparison.json and the figures of a comparison."""

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
    detectable,
    verdict,
    why_no_verdict,
)
from comparison.probe import Probe, probe
from comparison.runs import Arms, Run, effective
from trainer.errors import UserError
from trainer.files import atomic_write, parse_json, read_text

COLUMNS = ["outcome", "contrast", "pairs", "mean difference", "95% interval", "p", "verdict", POWER_COLUMN]
NOTE = (
    "Only the validation loss has a verdict. This outcome, its contrasts and their order were fixed in advance. 'on' "
    "against 'off' is tested at 5%. 'on' against 'shuffled' is tested at 5%, only if the first contrast has an effect. "
    "So a study without any effect reports one in at most 5% of cases. p is from the sign-flip test, and the intervals "
    "are obtained by inverting this test. The margin was declared in the settings of the runs: 'no effect' means that "
    "two one-sided tests at 5% exclude an effect as large as the margin. These tests assume that the differences are "
    "symmetric about their mean. The other rows are described by intervals, which are not corrected for multiple "
    "comparisons. The last column is for planning: with this number of pairs, an effect of this size is detected in "
    "80% of studies, given the observed standard deviation. Its 95% interval reflects that the standard deviation is "
    "estimated from these pairs. Smaller effects are detected less often. Layer coherence is not an outcome, because "
    "beta selects for it; it is a check that beta acted."
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The content of a report."""

    arms: Arms
    differing: dict[str, list[str]]  # settings that differ, with their values
    left_out: list[str]  # a reason for each run that is left out
    command: str
    analysis: Analysis
    probes: dict[str, list[Probe]]  # by arm, of one model per arm
    earlier: list[dict[str, Any]]  # studies of the earlier reports in the same folder; see `study`
    earlier_unknown: str | None = None  # why the earlier reports are not known

    @property
    def rows(self) -> list[Row]:
        return [*self.analysis.primary, *self.analysis.described, *self.analysis.check]

    @property
    def sentences(self) -> list[str]:
        """Warnings that concern the verdicts, then the verdicts in words, one per contrast."""
        verdicts = [verdict(self.analysis, r) for r in self.analysis.primary]
        return [*self.analysis.warnings, *self.changes, *verdicts]

    @property
    def changes(self) -> list[str]:
        """A warning for each earlier report on the same study that had other pairs or another number of steps."""
        found = []
        if self.earlier_unknown is not None:
            found.append(
                f"Whether this study was changed after an earlier report is not known: {self.earlier_unknown}."
            )
        now = self.study
        for before in self.earlier:
            if now is None or before["study"] != now["study"]:
                continue
            if (before["seeds"], before["steps"]) != (now["seeds"], now["steps"]):
                found.append(
                    f"This study was changed after its report was written: on {before['date']} it had "
                    f"{len(before['seeds'])} pairs of {before['steps']} steps, now it has {len(now['seeds'])} of "
                    f"{now['steps']}. If runs are chosen after a result is known, a study reports effects more often "
                    "than p indicates."
                )
        return found

    @property
    def study(self) -> dict[str, Any] | None:
        """The first contrast's date, pairs and steps, and a digest of the settings of its arms."""
        row = self.analysis.row(FIRST)
        if row is None:
            return None
        runs = [next(iter(self.arms[arm].values())) for arm in FIRST]
        settings = [
            {k: v for k, v in effective(run.config).items() if k not in ("max_iters", "margin")} for run in runs
        ]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return {"date": str(date.today()), "study": digest, "seeds": sorted(row.differences), "steps": runs[0].steps}

    @property
    def shown(self) -> dict[str, Run]:
        """The run of each arm that per-expert figures show, of the same seed if possible."""
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
    """Analyse the arms, and probe one trained model of each arm that has a beta.

    lost: seeds of runs that cannot be used, by arm. out: folder of the report.
    """
    comparison = Comparison(arms, differing, list(left_out), command, analyse(arms, lost), {}, *earlier_studies(out))
    for arm, run in comparison.shown.items():
        if run.config.get("chrono_beta"):
            try:
                comparison.probes[arm] = probe(run)
            except UserError as e:
                comparison.left_out.append(f"constraint probe of {arm} ({run.name}): {e}")
    return comparison


def earlier_studies(out: Path) -> tuple[list[dict[str, Any]], str | None]:
    """(studies of the earlier reports in `out`, oldest first; why they are not known, or None)."""
    path = out / "comparison.json"
    try:
        before = parse_json(read_text(path))
        studies = [
            {"date": str(k["date"]), "study": str(k["study"]), "seeds": [*k["seeds"]], "steps": int(k["steps"])}
            for k in before["looks"]
        ]
        unknown = before.get("lost_looks")
        return studies, None if unknown is None else str(unknown)
    except FileNotFoundError:
        return [], None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return [], f"{path} was damaged or written by an older version"


def write(out: Path, comparison: Comparison) -> dict[str, Path]:
    """Write report.html, report.md, comparison.json and figures/ into `out`. Returns the figures' paths by title.

    Raises UserError if a file cannot be written.
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
            ("comparison.json", json.dumps(as_json(comparison), indent=1) + "\n"),
        ):
            with atomic_write(out / name) as f:
                f.write(content.encode())
        return {title: out / name for title, _, name, _ in drawn}
    except OSError as e:
        raise UserError(f"cannot write the report to {out}: {e.strerror}") from None


def draw(c: Comparison) -> list[tuple[str, str, Figure]]:
    """(title, caption, figure) of every figure that the runs have data for."""
    start = next(iter(c.shown.values())).steps // 10
    band = "Mean over seeds; the band reaches from the lowest to the highest seed."
    seeds = {run.seed for run in c.shown.values()}
    one = f"Seed {min(seeds)} of each arm." if len(seeds) == 1 else "One run of each arm."
    found = [
        ("Paired differences", "Each dot is one seed. Square and bar: mean and 95% interval. Shaded: the margin.",
         figures.differences(c.analysis.primary) if c.analysis.primary else None),
        ("Validation loss", f"{band} The first tenth of the steps is left out.",
         figures.curves(c.arms, "val/loss", "validation loss, nats per token", skip=start)),
        ("Disagreement", f"JS divergence of clean and applied routing. {band}",
         figures.curves(c.arms, "js", "JS, nats", log=True)),
        ("Relevance", f"Strength with which beta is applied. {band}",
         figures.curves(c.arms, "relevance", "r", ylim=(-0.05, 1.05))),
        ("Load", f"Coefficient of variation of the load over experts. {band}",
         figures.curves(c.arms, "load_cv", "load CV")),
        ("Layer coherence", f"Not an outcome, but a check that beta acts. {band}",
         figures.curves(c.arms, "layer", "token-weighted mean phi_slow")),
        ("Coherence of every expert", one, figures.experts(c.shown, "phi_slow", "phi_slow")),
        ("Coherence at the end", one, figures.heatmaps(c.shown, "phi_slow", "phi_slow")),
        ("Beta of every expert", one, figures.experts(c.shown, "beta", "beta")),
        ("Beta at the end", one, figures.heatmaps(c.shown, "beta", "beta")),
        ("Prune proposals", f"Proposals only: no expert was pruned. {one}", figures.proposals(c.shown)),
        ("Constraint probe", "The trained model evaluated at other values of top_k, with its beta and with beta 0: "
         f"difference in loss in nats, share of the top-K set changed, gate mass moved. {one}",
         figures.probe(c.probes) if c.probes else None),
    ]  # fmt: skip
    return [(title, caption, figure) for title, caption, figure in found if figure is not None]


def as_svg(figure: Figure) -> str:
    """The figure as an <svg> element with a transparent background."""
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
        steps=f"{first.steps:,}",
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
    lines += ["", f"{_counts(c)}; {first.steps:,} steps on {first.config['dataset']}. {date.today()}."]
    if c.left_out:
        lines += ["", "Left out:", "", *(f"- {reason}" for reason in c.left_out)]
    lines += ["", "Settings that differ between these runs:", ""]
    lines += [f"- `{key}`: {', '.join(values)}" for key, values in c.differing.items()]
    lines += ["", "## All contrasts", "", NOTE, "", _table(COLUMNS), _table(["---"] * len(COLUMNS))]
    lines += [_table(cells(c.analysis, r)) for r in c.rows]
    for title, caption, path in drawn:
        lines += ["", f"## {title}", "", f"![{title}]({path})", "", caption]
    return "\n".join([*lines, "", "## Command", "", f"    {c.command}"]) + "\n"


def as_json(c: Comparison) -> dict[str, Any]:
    """The content of comparison.json: the numbers of the report, and the validation losses of each run."""

    def row(r: Row) -> dict[str, Any]:
        k = r.contrast
        numbers = dataclasses.asdict(k) | {"planning": k.detectable if k.is_enough else None}
        numbers |= {"pairs_to_decide": k.pairs_to_decide, "verdict": short_verdict(c.analysis, r)}
        # JSON has no infinity
        finite = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in numbers.items()}
        named = {"outcome": r.outcome.name, "a": r.a, "b": r.b, "differences": r.differences}
        return named | {"confounders": r.confounders} | finite

    losses = {
        arm: {seed: dict(zip(*run.series("val/loss"))) for seed, run in sorted(members.items())}
        for arm, members in c.arms.items()
    }
    study = c.study
    is_new = study is not None and not any(before | {"date": None} == study | {"date": None} for before in c.earlier)
    return {
        "command": c.command,
        "date": str(date.today()),
        "conclusion": conclusion(c.analysis),
        "verdicts": c.sentences,
        "differing": c.differing,
        "left_out": c.left_out,
        "looks": [*c.earlier, *([study] if is_new else [])],
        "lost_looks": c.earlier_unknown,
        **{name: [row(r) for r in getattr(c.analysis, name)] for name in ("primary", "described", "check")},
        "probes": {arm: [dataclasses.asdict(p) for p in found] for arm, found in c.probes.items()},
        "validation_loss": losses,
    }


def _counts(c: Comparison) -> str:
    return "Runs: " + ", ".join(f"{arm} {len(members)}" for arm, members in c.arms.items())


def short_verdict(analysis: Analysis, r: Row) -> str:
    """'effect', 'no effect', 'undecided', or 'none' for a row without a verdict."""
    if r not in analysis.primary or why_no_verdict(analysis, (r.a, r.b)) is not None:
        return "none"
    return "effect" if r.contrast.is_effect else "no effect" if r.contrast.is_equivalent else "undecided"


def cells(analysis: Analysis, r: Row) -> list[str]:
    """The cells of a row under COLUMNS."""
    c, judged = r.contrast, short_verdict(analysis, r)
    difference = f"{c.mean:+.4g} {r.outcome.unit}".strip()
    interval = f"{c.low:+.4g} to {c.high:+.4g}" if c.is_enough else ""
    p = "" if judged == "none" else f"{c.p:.3g}" if c.is_exact else f"{c.p:.3g} (sampled)"
    note = "confounded" if r.confounders else judged if r in analysis.primary else ""
    return [r.outcome.name, f"{r.a} - {r.b}", str(c.n), difference, interval, p, note, detectable(c)]


def _table(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
