"""Write report.html, report.md, comparison.json and the figures of a comparison.

The page is one file that loads nothing: Vega-Lite's JavaScript and the figures' data are in it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
import vl_convert

from comparison import figures, tables
from comparison.analysis import (
    FIRST,
    Analysis,
    Row,
    analyse,
    conclusion,
    phases,
    single_pair,
    upper_bound,
    verdict,
)
from comparison.figures import COLOURS, Figure
from comparison.probe import Probe, probe
from comparison.runs import Arms, Run, effective
from comparison.tables import COLUMNS, DRIVERS, Table, as_text, cells, protocol_warnings, short_verdict
from trainer.errors import UserError
from trainer.files import atomic_write, parse_json, read_text
from trainer.settings import domain

TESTED = (
    "Each layer of these language models sends a token to a few of its experts; coherence is the cosine between the "
    "sum of an expert's outputs and the sum of its layer's outputs over the tokens of a training step.",
    "Beta is a slow bias on this routing that follows coherence, so that coherent experts are chosen more often; the "
    "bridge weakens beta in layers where it disagrees with the router.",
    "Runs with beta are compared with runs of the same seed in which beta stays 0 (off), and with a placebo (shuffled) "
    "in which the beta of each expert follows the coherence of another expert: only if on differs from the placebo "
    "too can coherence be the cause.",
)
TEMPLATE = Path(__file__).with_name("report.html.j2")
STUDY_COMMAND = "python compare.py config/study.py --seeds=8"
FEW = "Intervals and tests need six pairs."
NOTE = (
    "Only the first outcome has a verdict. This outcome, its contrasts and their order were fixed in advance. 'on' "
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

AUDIT_NOTE = (
    "audit.py has measured how much the loss rises when an expert is masked (its worth). Shown is the mean over runs "
    "of the rank correlation within a layer, with its 95% interval if there are six runs. audit.html has the details."
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
    next_command: str = STUDY_COMMAND  # that would give a verdict, if there are too few pairs
    audit: Table | None = None  # what audit.py has measured of these runs

    @property
    def rows(self) -> list[Row]:
        return [*self.analysis.primary, *self.analysis.described, *self.analysis.check]

    @property
    def sentences(self) -> list[str]:
        """Warnings that concern the verdicts, then the verdicts in words, one per contrast."""
        verdicts = [single_pair(self.analysis, *arms) for arms in self.analysis.single]
        verdicts += [verdict(self.analysis, r) for r in self.analysis.primary]
        bound = upper_bound(self.analysis)
        return [
            *self.analysis.warnings,
            *self.changes,
            *protocol_warnings(self.arms),
            *verdicts,
            *([bound] if bound else []),
            *self.next_step,
        ]

    @property
    def next_step(self) -> list[str]:
        """What gives a verdict, if there are too few pairs for one."""
        row = self.analysis.row(FIRST)
        return [] if row is not None and row.contrast.is_enough else [f"{self.next_words}: {self.next_command}"]

    @property
    def next_words(self) -> str:
        return "For a verdict on another model" if self.next_command == STUDY_COMMAND else "For a verdict"

    @property
    def is_tested(self) -> bool:
        """Whether any contrast has enough pairs for intervals and tests."""
        return any(r.contrast.is_enough for r in self.rows)

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
        digest, steps = study_digest(self.arms), next(iter(self.arms[FIRST[0]].values())).steps
        return {"date": str(date.today()), "study": digest, "seeds": sorted(row.differences), "steps": steps}

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
    next_command: str = STUDY_COMMAND,
    audit: Table | None = None,
) -> Comparison:
    """Analyse the arms, and probe one trained model of each arm that has a beta.

    lost: seeds of runs that cannot be used, by arm. out: folder of the report. next_command, audit: see Comparison.
    """
    earlier = earlier_studies(out)
    comparison = Comparison(
        arms, differing, list(left_out), command, analyse(arms, lost), {}, *earlier, next_command, audit
    )
    for arm, run in comparison.shown.items():
        if run.config.get("chrono_beta"):
            try:
                comparison.probes[arm] = probe(run)
            except UserError as e:
                comparison.left_out.append(f"constraint probe of {arm} ({run.name}): {e}")
    return comparison


def study_digest(arms: Arms) -> str | None:
    """A digest of the settings of the first contrast's arms, except margin and steps; None without these arms."""
    if not all(arms.get(arm) for arm in FIRST):
        return None
    runs = [next(iter(arms[arm].values())) for arm in FIRST]
    settings = [{k: v for k, v in effective(run.config).items() if k not in ("max_iters", "margin")} for run in runs]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def folder_for(out: Path, arms: Arms) -> tuple[Path, str | None]:
    """The folder for a report on these runs, and a line for the user unless it is `out` and replaces no other report.

    A report on other runs of another study is kept: the folder is then `out` with a number.
    """
    folder, number, note = out, 1, None
    while True:
        try:
            before = parse_json(read_text(folder / "comparison.json"))
            curves = {
                (arm, int(seed)): curve for arm, of in before["validation_loss"].items() for seed, curve in of.items()
            }
            same = [key for key, curve in curves.items() if _is_same(arms.get(key[0], {}).get(key[1]), curve)]
            studies, when = [look["study"] for look in before["looks"]], before["date"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return folder, note  # no report, or a damaged one; see earlier_studies
        if same or study_digest(arms) in studies:
            if len(same) < len(curves):
                note = f"the report of {when} on {len(curves)} runs in {folder} is replaced"
            return folder, note
        number += 1
        folder = out.with_name(f"{out.name}_{number}")
        note = f"{out} has the report of other runs, so this one is in {folder}"


def _is_same(run: Run | None, curve: dict[str, float]) -> bool:
    """Whether an earlier report has this run: their validation losses agree at the last step that both have."""
    losses = {} if run is None else dict(zip(*run.series("val/loss")))
    common = [int(step) for step in curve if int(step) in losses]
    return bool(common) and losses[max(common)] == curve[str(max(common))]


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
    drawn = [(figure, image_name("figures", figure)) for figure in draw(comparison)]
    write_files(
        out,
        {
            **{name: figures.png(figure) for figure, name in drawn},
            "report.html": as_html(comparison, [figure for figure, _ in drawn]),
            "report.md": as_markdown(comparison, drawn),
            "comparison.json": json.dumps(as_json(comparison), indent=1) + "\n",
        },
    )
    return {figure.title: out / name for figure, name in drawn}


def image_name(folder: str, figure: Figure) -> str:
    """The path of a figure's PNG."""
    return f"{folder}/{re.sub('[^a-z0-9]+', '_', figure.title.lower())}.png"


def write_files(out: Path, contents: dict[str, str | bytes]) -> None:
    """Write the files of a report, given by their path in `out`. Raises UserError if one cannot be written."""
    try:
        for name, content in contents.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(out / name) as f:
                # the name of a folder need not be text
                f.write(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))
    except OSError as e:
        raise UserError(f"cannot write the report to {out}: {e.strerror}") from None


def draw(c: Comparison) -> list[Figure]:
    """The figures that the runs have data for."""
    start = next(iter(c.shown.values())).steps // 10
    seeds = {run.seed for run in c.shown.values()}
    one = f"Seed {min(seeds)} of each arm." if len(seeds) == 1 else "One run of each arm."
    lines = "Thin lines: seeds. Thick lines: their mean."
    pairs_of_loss = [r for r in c.rows if r.outcome is c.analysis.outcome]
    with_beta = {arm: run for arm, run in c.shown.items() if run.config.get("chrono_beta")}
    arms_with_beta = {arm: c.arms[arm] for arm in with_beta}

    texts = [phase.domain for phase in phases(next(iter(c.shown.values())))]
    other_texts = [text for text in dict.fromkeys(texts) if text != texts[0]]

    def curve(title: str, caption: str, *args: Any, **options: Any) -> tuple[Any, ...]:
        chart = figures.curves(*args, **options)
        return title, f"{caption} {lines}".strip(), None if chart is None else [chart], 1, True

    def single(title: str, caption: str, chart: Any) -> tuple[Any, ...]:
        return title, caption, None if chart is None else [chart]

    found = [
        single("Paired differences", "A dot is a pair, that is one seed. Line and bar: mean and 95% interval. Grey: "
               "the margin.", figures.differences(pairs_of_loss) if pairs_of_loss else None),
        curve("Validation loss", "The first tenth of the steps is left out.", c.arms, "val/loss",
              "validation loss, nats per token", skip=start),
        *(curve(f"Validation loss in {text}", "The first tenth of the steps is left out.", c.arms, f"{text}/loss",
                f"validation loss in {text}, nats per token", skip=start) for text in other_texts),
        ("Strength of beta", "Solid: it rises. Dashed: it falls. Thin lines: seeds.", figures.ramp(c.arms), 3),
        curve("Load", "Coefficient of variation of the load over experts.", c.arms, "load_cv", "load CV"),
        curve("Layer coherence", "Not an outcome: beta selects for it. It shows whether beta acts.", c.arms, "layer",
              "token-weighted mean phi_slow"),
        curve("Disagreement", "How far beta moves the routing.", arms_with_beta, "js",
              "JS divergence of clean and applied routing, nats", reference=None, spec=".3g"),
        curve("Relevance", "Strength of beta; the bridge lowers it where beta disagrees with the router.",
              arms_with_beta, "relevance", "relevance r, 0 to 1", reference=None, domain=(0, 1.05)),
        single("Coherence at the end", f"phi_slow by layer and expert. {one}",
               figures.heatmap(c.shown, "phi_slow", "phi_slow", False)),
        single("Beta at the end", f"By layer and expert, on one scale. {one}",
               figures.heatmap(with_beta, "beta", "beta", True)),
        ("Coherence of every expert", one, figures.experts(c.shown, "phi_slow", "phi_slow", True), 2),
        ("Beta of every expert", f"Each panel has its own scale. {one}",
         figures.experts(with_beta, "beta", "beta", False), 2),
        single("Prune proposals", f"Proposals only: no expert was pruned. {one}", figures.proposals(c.shown)),
        ("Constraint probe", f"The trained model at other values of top_k, with its beta and with beta 0. {one}",
         figures.probe(c.probes) if c.probes else None, 3),
    ]  # fmt: skip
    return [Figure(*parts) for parts in found if parts[2]]


def as_html(c: Comparison, drawn: list[Figure]) -> str:
    differ, shared = tables.settings(c.arms)
    return page(
        TEMPLATE,
        drawn,
        c=c,
        conclusion=conclusion(c.analysis),
        facts=_facts(c),
        tested=TESTED,
        drivers=DRIVERS,
        colours=COLOURS,
        arms=tables.by_arm(c.arms, c.analysis),
        measures=tables.measures_by_arm(c.arms),
        contrasts=contrasts(c),
        note=NOTE if c.is_tested else FEW,
        audit_note=AUDIT_NOTE,
        seeds=sorted(set().union(*c.arms.values())),
        figures=drawn,
        differ=differ,
        shared=shared,
        made=tables.provenance(c.arms, c.command, str(date.today())),
    )


def page(template: Path, drawn: list[Figure], **values: Any) -> str:
    """A page as one file. template: TEMPLATE, or one that extends it; values: what it shows besides the figures."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, TEMPLATE.parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    specifications = {
        f"chart{i}_{j}": specification
        for i, figure in enumerate(drawn)
        for j, specification in enumerate(figures.specifications(figure))
    }
    return environment.get_template(template.name).render(
        values,
        # in a <script>, where only < could end it
        specifications=json.dumps(specifications, separators=(",", ":")).replace("<", "\\u003c"),
        script=_script(),
    )


@functools.cache  # takes a second
def _script() -> str:
    """The script of the page, with Vega-Lite's."""
    script = TEMPLATE.with_name("report.js").read_text(encoding="utf-8")
    return vl_convert.javascript_bundle(script).replace("</script", "<\\/script")


def as_markdown(c: Comparison, drawn: list[tuple[Figure, str]]) -> str:
    differ, _ = tables.settings(c.arms)
    lines = ["# Beta on against beta off", "", f"**{as_text(conclusion(c.analysis))}**", ""]
    lines += [f"- {as_text(sentence)}" for sentence in c.sentences]
    lines += ["", as_text(_facts(c)), "", " ".join(TESTED), ""]
    lines += tables.by_arm(c.arms, c.analysis).as_markdown()
    if c.left_out:
        lines += ["", "Left out:", "", *(f"- {as_text(reason)}" for reason in c.left_out)]
    lines += ["", "## Losses and routing", "", *tables.measures_by_arm(c.arms).as_markdown()]
    if c.rows:
        lines += ["", "## All contrasts", "", NOTE if c.is_tested else FEW, "", *contrasts(c).as_markdown()]
    if c.audit is not None:
        lines += ["", "## Worth of experts", "", AUDIT_NOTE, "", *c.audit.as_markdown()]
    for figure, path in drawn:
        lines += ["", f"## {figure.title}", "", f"![{figure.title}]({path})", "", figure.caption]
    if differ.rows:
        lines += ["", "## Settings that differ", "", *differ.as_markdown()]
    lines += ["", "## How it was made", "", *tables.provenance(c.arms, c.command, str(date.today())).as_markdown()]
    return "\n".join(lines) + "\n"


def contrasts(c: Comparison) -> Table:
    """All contrasts, with their intervals and verdicts."""
    return Table(COLUMNS, [cells(c.analysis, r) for r in c.rows])


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
        "single_pairs": {" - ".join(arms): pair for arms, pair in c.analysis.single.items()},
        "measures": tables.measures(c.arms),
        "audit": None if c.audit is None else [dict(zip(c.audit.columns, row)) for row in c.audit.rows],
        "probes": {arm: [dataclasses.asdict(p) for p in found] for arm, found in c.probes.items()},
        "validation_loss": losses,
    }


def _facts(c: Comparison) -> str:
    run = next(iter(c.shown.values()))
    counts = ", ".join(f"{arm} {len(members)}" for arm, members in c.arms.items())
    margin = run.config.get("margin")
    declared = "" if margin is None else f" Margin, declared before the runs: {margin:g} nats."
    texts = ", ".join(f"{phase.domain} from step {phase.start}" for phase in phases(run))
    texts = texts or domain(run.config["dataset"])
    return f"Runs: {counts}; {run.steps:,} steps on {texts}. Losses are in nats per token, lower is better.{declared}"
