"""Write audit.html, audit.json and the figures of an audit.

The page is one file that loads nothing, in the look of compare.py's report.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from auditing import figures
from auditing.agreement import Agreement, over_runs, verdict
from auditing.criteria import CRITERIA, PRIMARY
from auditing.damage import DAMAGES, FALSE_ALARMS
from auditing.results import AuditedRun, Group, as_json
from auditing.subsets import DRAWN, EVERY
from comparison.figures import Figure, png
from comparison.report import image_name, page, write_files
from comparison.statistics import MIN_PAIRS, Contrast
from comparison.tables import Table, provenance
from comparison.wandb_runs import log_report
from data.tokenizer import UNKNOWN, Codec, codec_for
from trainer.data import DATA, read_meta
from trainer.errors import UserError

TEMPLATE = Path(__file__).with_name("audit.html.j2")
MOST_ROWS = 200  # of a table
MEASURED = (
    "The worth of an expert is the rise of the validation loss, in nats per token, when the expert is masked from "
    "routing, so that its tokens go to their next best experts. A criterion is a number per expert that is known "
    "without masking it; the expert with the lowest is pruned first. It is judged by Spearman's rank correlation with "
    "worth, in each layer, averaged over the layers. The run is the unit: intervals and p are from the sign-flip test "
    "over runs, and are not corrected for the number of criteria."
)

Part = str | Table | Figure


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page with a heading. Its texts, tables and figures are shown in their order."""

    title: str
    parts: list[Part]


@dataclasses.dataclass(frozen=True)
class Arm:
    """What the page shows of an arm."""

    name: str
    answer: str  # to the primary question
    sentences: list[str]  # the other answers that concern it
    of_others: list[str]  # the answers on the other criteria
    sections: list[Section]

    @property
    def figures(self) -> list[Figure]:
        return [part for section in self.sections for part in section.parts if isinstance(part, Figure)]


def write(out: Path, groups: list[Group], left_out: list[str], command: str, date: str) -> dict[str, Path]:
    """Write audit.html, audit.json and audit_figures/ into `out`. Returns the figures' paths by title.

    Raises UserError if a file cannot be written.
    """
    arms = [arm_of(group, "" if len(groups) == 1 else f"{group.arm}: ") for group in groups]
    drawn = {figure.title: (figure, image_name("audit_figures", figure)) for arm in arms for figure in arm.figures}
    write_files(
        out,
        {
            **{name: png(figure) for figure, name in drawn.values()},
            "audit.html": as_html(arms, left_out, made(groups, command, date)),
            "audit.json": json.dumps(as_json(groups, left_out, command, date), separators=(",", ":")) + "\n",
        },
    )
    return {title: out / name for title, (_, name) in drawn.items()}


def log(out: Path, groups: list[Group], command: str, drawn: dict[str, Path]) -> None:
    """Log answers, ranking and figures as a W&B run with job type `audit`. drawn: figures' paths by title."""
    log_report(
        out,
        "audit",
        groups[0].runs[0].measured.run.config,
        {"command": command},
        lambda wandb: _content(wandb, groups, drawn),
        ("audit.html", "audit.json"),
    )


def _content(wandb: Any, groups: list[Group], drawn: dict[str, Path]) -> dict[str, Any]:
    ranking = [{"arm": group.arm} | row for group in groups for row in ranking_rows(group)]
    sentences = [[group.arm, sentence] for group in groups for sentence in group.sentences]
    return {
        "sentences": wandb.Table(columns=["arm", "sentence"], data=sentences),
        "ranking": wandb.Table(columns=list(ranking[0]), data=[list(row.values()) for row in ranking]),
        **{f"figures/{title}": wandb.Image(str(path)) for title, path in drawn.items()},
    }


def as_html(arms: list[Arm], left_out: list[str], made: Table) -> str:
    drawn = [figure for arm in arms for figure in arm.figures]
    numbers = {figure.title: i for i, figure in enumerate(drawn)}
    return page(TEMPLATE, drawn, arms=arms, left_out=left_out, numbers=numbers, made=made)


def made(groups: list[Group], command: str, date: str) -> Table:
    """How the audit was made."""
    found = provenance(
        {g.arm: {run.measured.run.seed: run.measured.run for run in g.runs} for g in groups}, command, date
    )
    counts = sorted({len(m.base) for g in groups for m in g.measured})
    names = ", ".join(run.name for g in groups for run in g.runs)
    return Table(found.columns, [*found.rows, ["runs", names], ["batches", ", ".join(map(str, counts))]])


def arm_of(group: Group, prefix: str = "") -> Arm:
    """prefix: of the titles of figures, which differ between arms."""
    sections = [
        _measured(group),
        _ranking(group),
        _worth(group),
        _masked_sets(group),
        _proposals(group),
        _healing(group),
        _damage(group),
        _router(group),
    ]
    named = [
        Section(
            section.title,
            [
                dataclasses.replace(part, title=prefix + part.title) if isinstance(part, Figure) else part
                for part in section.parts
                if not isinstance(part, Table) or part.rows
            ],
        )
        for section in sections
        if section is not None
    ]
    return Arm(group.arm, group.answer, [*group.unreliable, *group.on_phi], group.on_others, named)


def labels(runs: list[AuditedRun]) -> list[str]:
    """The last part of each run's name, or the whole name where these are not unique. As text that can be encoded."""
    short = [Path(run.name).name for run in runs]
    names = short if len(set(short)) == len(short) and all(short) else [run.name for run in runs]
    return [name.encode(errors="backslashreplace").decode() for name in names]


def listed(items: Iterable[Any]) -> str:
    """The items as 'a, b and c'."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last


def signed(value: float | None, digits: int = 2) -> str:
    """The value with its sign; empty if it is not a number."""
    return "" if value is None or math.isnan(value) else f"{value:+.{digits}f}"


def tested(c: Contrast | None) -> Contrast | None:
    """The statistics, if there are enough runs for a test."""
    return c if c is not None and c.is_enough else None


def interval(c: Contrast | None, digits: int = 2) -> str:
    return "" if c is None or tested(c) is None else f"{signed(c.low, digits)} to {signed(c.high, digits)}"


def few(group: Group) -> list[str]:
    """That there are too few runs for verdicts."""
    n = len(group.runs)
    if n >= MIN_PAIRS:
        return []
    return [f"Intervals and verdicts need six runs of an arm, which differ in their seed; there {_count(n)}."]


def _count(n: int) -> str:
    return "is 1" if n == 1 else f"are {n}"


def _measured(group: Group) -> Section:
    m = group.measured[0]
    layers, experts = m.worth.shape
    counts = sorted({len(measured.base) for measured in group.measured})
    seeds = listed(measured.run.seed for measured in group.measured)
    runs = "1 run, seed" if len(group.runs) == 1 else f"{len(group.runs)} runs, seeds"
    facts = (
        f"Arm {group.arm}: {runs} {seeds}, with "
        f"{layers} MoE {'layer' if layers == 1 else 'layers'} of {experts} experts and top_k {m.top_k}. Worth was "
        f"measured on {listed(counts)} validation batches. The share of its variance between the experts of a layer "
        f"that is not error of measurement is {group.reliability.min():.2f} or more."
    )
    shown = f"Figures of one run show seed {m.run.seed}." if len(group.runs) > 1 else ""
    return Section("What was measured", [MEASURED, f"{facts} {shown}".strip(), *few(group)])


def mean_of(a: Agreement) -> float:
    """The mean correlation over runs; NaN if it is not defined."""
    values = a.per_run[~np.isnan(a.per_run)]
    return float(values.mean()) if len(values) else math.nan


def ranked(group: Group) -> list[Agreement]:
    """The agreements, the highest mean correlation first."""
    return sorted(group.agreements.values(), key=lambda a: -np.nan_to_num(mean_of(a), nan=-2.0))


def ranking_rows(group: Group) -> list[dict[str, Any]]:
    """The ranking as numbers; None for one that does not exist."""
    rows = []
    for a in ranked(group):
        c = tested(a.pooled)
        numbers = {
            "mean rank correlation": mean_of(a),
            "95% low": c.low if c else math.nan,
            "95% high": c.high if c else math.nan,
            "p": c.p if c else math.nan,
            "with outputs zeroed": mean_of(group.agreements_zeroed[a.criterion]),
            "experts with tokens": mean_of(group.agreements_used[a.criterion]),
            "all experts together": _mean(a.all_experts),
        }
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        rows.append({"criterion": a.criterion, "runs": len(a.per_run)} | finite | {"verdict": verdict(a.pooled)})
    return rows


def _mean(values: Iterable[float]) -> float:
    """The mean without NaN; NaN if there is nothing else."""
    found = [v for v in values if not math.isnan(v)]
    return float(np.mean(found)) if found else math.nan


def _ranking(group: Group) -> Section:
    found = ranked(group)
    blocks = group.measured[0].blocks
    shown = figures.spaced(range(len(blocks)), figures.MAX_LAYERS)
    rows = []
    for a, numbers in zip(found, ranking_rows(group)):
        c = tested(a.pooled)
        rows.append([
            a.criterion,
            signed(numbers["mean rank correlation"]),
            interval(c),
            "" if c is None else f"{c.p:.3g}" if c.is_exact else f"{c.p:.3g} (sampled)",
            verdict(c).removeprefix("ranks experts ").removeprefix("is ") if c else "",
            *(signed(_mean(a.by_layer[:, layer])) for layer in shown),
            signed(numbers["with outputs zeroed"]),
            signed(numbers["experts with tokens"]) if group.unused else "",
            signed(numbers["all experts together"]),
        ])  # fmt: skip
    columns = ["criterion", "mean rank correlation", "95% interval", "p", "verdict"]
    columns += [f"L{blocks[layer]}" for layer in shown] + [
        "with outputs zeroed",
        "experts with tokens",
        "all experts together",
    ]
    about = (
        "Rank correlation of each criterion with worth, mean over runs. 1: the criterion ranks the experts of a layer "
        "as their worth does; 0: it knows nothing of worth. L: in that layer alone. With outputs zeroed: worth is the "
        "rise when the expert's output is set to zero and its tokens stay. Experts with tokens: without those that had "
        "none on the validation batches. All experts together: the experts of all layers are ranked together."
    )
    if len(shown) < len(blocks):
        about += f" {len(shown)} of the {len(blocks)} layers are shown."
    seeds = [m.run.seed for m in group.measured]
    caption = "A dot is a run." + (" Line: mean." if len(seeds) > 1 else "")
    caption += " Bar: 95% interval." if len(seeds) >= MIN_PAIRS else ""
    definitions = [[a.criterion, " ".join((CRITERIA[a.criterion].__doc__ or "").split())] for a in found]
    return Section(
        "Which criteria know what an expert is worth",
        [
            about,
            *few(group),
            Table(columns, rows),
            Figure("Rank correlation with worth", caption, [figures.correlations(found, seeds)]),
            "The criteria. g: gate, y: output of the expert, w: its weights; sums are over the tokens it processed.",
            Table(["criterion", "definition"], definitions),
        ],
    )


def _worth(group: Group) -> Section:
    found, runs = ranked(group), group.measured
    shown, layers = figures.shown_points(runs, len(found))
    count, of = len(layers), len(runs[0].blocks)
    caption = (
        "A dot is an expert. Upwards: worth, nats per token. To the right: the criterion. The order is that of the "
        "table above. Colours: layers" + (", the first in blue to the last in red." if count > 8 else ".")
    )
    if len(shown) < len(runs):
        caption += f" {len(shown)} of the {len(runs)} runs are shown."
    if count < of:
        caption += f" {count} of the {of} layers are shown."
    low, high = runs[0].worth.min(), runs[0].worth.max()
    one = (
        f"The rise of the loss when the expert is masked, from {signed(low, 4)} (dark) to {signed(high, 4)} (bright) "
        f"nats per token. Seed {runs[0].run.seed}."
    )
    return Section(
        "Worth",
        [
            Figure("Worth of every expert", one, [figures.worth(runs[0])]),
            Figure("Worth against each criterion", caption, figures.scatter(runs, found), 3),
        ],
    )


def _masked_sets(group: Group) -> Section | None:
    found = [run.masked_sets for run in group.runs if run.masked_sets]
    if not found:
        return None
    every = [r for sets in found for r in sets]
    sizes = sorted({r.size for r in every})
    exact = sorted(
        {r.size for r in every if r.is_exact} - {r.size for r in every if not r.is_exact and r.place != EVERY}
    )
    caption = (
        "The loss rises by this much if the experts that a criterion ranks lowest are masked together; mean over runs. "
        "Black: the best choice. Grey: 5% to 95% of the random choices."
    )
    if exact:
        caption += f" In one layer, the best choice of {listed(exact)} experts is exact."
    approximate = [size for size in sizes if size not in exact]
    if approximate:
        caption += (
            f" In one layer, that of {listed(approximate)} experts is an approximation: greedy, or a criterion's."
        )
    shown = figures.places(every)
    if EVERY in shown:
        caption += " In every layer at once, it is an approximation: the layers' best together, or a better one."
    layers = len({r.place for r in every} - {EVERY})
    if len([place for place in shown if place != EVERY]) < layers:
        caption += f" {len(shown) - (EVERY in shown)} of the {layers} layers are shown."
    places = [("in a layer", False)] + [("in every layer", True)] * (EVERY in shown)
    cases = [(size, name, is_every) for name, is_every in places for size in sizes]
    beaten = [(r, r.beaten) for r in every]
    rows = []
    for a in ranked(group):
        shares = [
            _mean(b[a.criterion] for r, b in beaten if r.size == size and (r.place == EVERY) == is_every)
            for size, _, is_every in cases
        ]
        rows.append([a.criterion, *("" if math.isnan(share) else f"{share:.2f}" for share in shares)])
    return Section(
        "Several experts at once",
        [
            Figure("Rise of the loss", caption, figures.masked_sets(found), 2),
            "The share of random choices of as many experts that raise the loss more than the criterion's choice, mean "
            f"over layers and runs. 1: better than all; 0.5: chance. In every layer, and where a layer has too many "
            f"choices to measure all, there are {DRAWN} random choices.",
            Table(["criterion", *(f"{size} {name}" for size, name, _ in cases)], rows),
        ],
    )


def _proposals(group: Group) -> Section:
    named = [(label, p) for label, run in zip(labels(group.runs), group.runs) for p in run.proposals]
    rows = [
        [
            label,
            p.expert,
            p.reason.replace("_", " "),
            "open" if p.is_open else "withdrawn",
            f"{p.worth:+.4f} ± {p.error:.4f}",
            f"{p.worth_less} of {p.others}",
        ]
        for label, p in named[:MOST_ROWS]
    ]
    parts: list[Part] = ["Proposals only: no expert was pruned in training."]
    if not rows:
        parts = ["No expert was proposed for pruning in training."]
    if len(named) > MOST_ROWS:
        parts.append(f"The first {MOST_ROWS} of {len(named)} are listed.")
    columns = ["run", "expert", "reason", "status", "cost, nats per token", "other experts of the layer worth less"]
    parts.append(Table(columns, rows))
    if group.roc:
        caption = (
            f"The rule: propose an expert if {PRIMARY} is below a threshold. Cheap: the experts of the lowest quarter "
            "of worth in their layer. Each point is a threshold, over the experts of all runs. Dashed: chance."
        )
        parts.append(Figure("Rule of low coherence", caption, [figures.roc(group.roc)]))
    return Section("Proposed prunes", parts)


def _healing(group: Group) -> Section | None:
    found = [h for run in group.runs for h in run.healing]
    if not found:
        return None
    rows = []
    for name in group.agreements:
        of = [h for h in found if h.criterion == name]
        if of:
            at_once, at_end = (np.array([getattr(h, field) for h in of]) for field in ("at_once", "at_end"))
            start, end = over_runs(at_once), over_runs(at_end)
            left = f"{at_end.mean() / at_once.mean():.0%}" if at_once.mean() > 0 else ""
            means = [signed(at_once.mean(), 4), interval(start, 4), signed(at_end.mean(), 4), interval(end, 4)]
            rows.append((at_end.mean(), [name, *means, left]))
    rows.sort(key=lambda row: row[0])
    pruned, steps = found[0].pruned, found[0].steps
    return Section(
        "Healing",
        [
            f"In every layer, the {'expert' if pruned == 1 else f'{pruned} experts'} that the criterion ranks lowest "
            f"{'is' if pruned == 1 else 'are'} pruned, and the model is trained for {steps} more steps. The numbers "
            "are the validation loss minus that of the same model without pruning, after the same steps, in nats per "
            "token; mean over runs, with 95% intervals if there are six runs.",
            Table(
                ["criterion", "rise at once", "95% interval", f"rise after {steps} steps", "95% interval", "left"],
                [row for _, row in rows],
            ),
        ],
    )


def _damage(group: Group) -> Section | None:
    found = group.detections
    if not found:
        return None
    moved = [m for run in group.runs for m in run.moved]
    length = max((len(values) for m in moved for values in m.change.values()), default=0)
    share = f"{FALSE_ALARMS:.0%}"
    of = (
        "the undamaged twins of the other runs"
        if len([run for run in group.runs if run.moved]) > 1
        else ("its own undamaged twin, because there is one run")
    )
    delay = {d.delay for d in found}
    rows = [
        [
            f"{d.damage}, {d.signal}",
            f"{d.detected:.0%}",
            "" if d.delay is None else f"{d.delay:g}",
            f"{d.accused:.0%}",
            "" if d.accused_elsewhere is None else f"{d.accused_elsewhere:.0%}",
        ]
        for d in found
    ]
    return Section(
        "Damage",
        [
            f"An expert of each layer was damaged, and the model trained for {length} more steps: "
            f"{len([m for m in moved if m.damage]) // len(DAMAGES)} experts for each kind of damage. A signal raises "
            f"an alarm for an expert when it has moved by more than a threshold, which {share} of the experts of {of} "
            "exceed within the same number of steps.",
            Figure(
                "Which signals notice a damaged expert",
                "The share of the damaged experts that the signal raises an alarm for"
                + (", and the median number of steps until then." if delay != {None} else "."),
                [figures.detected(found)],
            ),
            Figure(
                "Coherence after the damage",
                "The change of phi of the damaged expert since the damage, mean over the damaged experts.",
                figures.trajectories(moved),
                2,
            ),
            "Accused: the share of the healthy experts that the signal raises an alarm for.",
            Table(
                ["damage and signal", "detected", "median steps", "accused, same layer", "accused, other layers"], rows
            ),
        ],
    )


def _router(group: Group) -> Section:
    run = group.runs[0]
    picture, seed = run.picture, run.measured.run.seed
    layers = figures.shown_layers(picture)
    of = "" if len(layers) == len(picture.blocks) else f" {len(layers)} of the {len(picture.blocks)} layers are shown."
    about = f"As OLMoE describes routers, on validation text. Seed {seed}.{of}"
    parts: list[Part] = [about]
    if run.measured.top_k > 1:
        caption = (
            "The share of the tokens of an expert (row) that also go to another one (column). A router that chose at "
            f"random would have {(run.measured.top_k - 1) / (picture.share.shape[1] - 1):.2f}. Seed {seed}."
        )
        parts.append(Figure("Co-activation", caption, figures.coactivation(picture), min(2, len(layers))))
    codec = codec_of(run)
    rows = [
        [
            f"L{picture.blocks[layer]} E{e}",
            f"{share:.1%}",
            special_text(picture.special[picture.blocks[layer], e], codec),
        ]
        for layer in layers
        for e, share in enumerate(picture.share[layer].tolist())
    ]
    if len(rows) > MOST_ROWS:
        parts.append(f"The first {MOST_ROWS} of {len(rows)} experts are listed.")
    tokens = "tokens that it takes the largest share of"
    parts += [
        f"The {tokens.replace('it takes', 'each expert takes')}, with this share and their number in the text. All "
        "experts of a layer together have a share of top_k.",
        Table(["expert", "share of the layer's choices", tokens], rows[:MOST_ROWS]),
    ]
    if picture.domains:
        caption = (
            "The share of the tokens of each domain (row) that go to each expert. Without specialization it is "
            f"{run.measured.top_k / picture.share.shape[1]:.0%} for every expert, if the load is even. Seed {seed}."
        )
        parts.append(Figure("Specialization by domain", caption, figures.domains(picture), 1))
    if picture.saturation:
        columns = ["layer", *(f"step {step}" for step in picture.saturation)]
        saturated = [
            [f"L{block}", *(f"{of_layer[layer]:.1%}" for of_layer in picture.saturation.values())]
            for layer, block in enumerate(picture.blocks)
        ]
        parts += [
            f"Saturation: the share of the experts that a token goes to at the last step, {run.measured.run.steps}, "
            "and went to at an earlier checkpoint.",
            Table(columns, saturated),
        ]
    return Section("The router", parts)


def codec_of(run: AuditedRun) -> Codec | None:
    """The tokenizer of the run's dataset; None if it is not available."""
    name = run.measured.run.config.get("dataset")
    if not isinstance(name, str):
        return None
    try:
        folder = next((path for path in (DATA / name, Path(name)) if os.path.isdir(path)), None)
        return None if folder is None else codec_for(read_meta(folder), str(folder))
    except (UserError, OSError, ValueError):
        return None


def special_text(special: list[tuple[int, float, int]], codec: Codec | None) -> str:
    """The tokens as text, with their shares and counts."""
    return ", ".join(f"{token_text(i, codec)} {share:.0%} of {count}" for i, share, count in special)


def token_text(token: int, codec: Codec | None) -> str:
    """The token as a string in quotes; its id if it is not text of its own."""
    text = "" if codec is None else codec.decode([token])
    return f"id {token}" if not text or UNKNOWN in text else json.dumps(text, ensure_ascii=False)
