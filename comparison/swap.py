"""Swap the betas of two runs: is a beta better on the text that it was trained with?

Runs A and B have the same seed and settings but other training text (data_schedule or dataset), so they start from the
same weights. On the weights W of each, the beta of A and the beta of B are evaluated. With L the validation loss in
nats per token, the interaction is

    D(W, text)  = L(W, beta of A, text) - L(W, beta of B, text)
    interaction = mean over W of [D(W, last text of A) - D(W, last text of B)]

The last text of a run is the last dataset of its schedule. The primary number of a pair is its interaction at the
top_k of training; negative: a beta lowers the loss on the text that it was trained with. It is the only one with a
verdict. The interaction at any other top_k, and the change of the loss against the weights' own beta, are described.
The betas on the weights of a run are

    own       trained with these weights
    other     trained with the weights of the other run
    zero      0
    permuted  own beta, permuted among the experts of each layer so that every expert gets that of another expert;
              means over DERANGEMENTS permutations, drawn from the seed of the run

Only beta_coeff is swapped. Beta is in units of logit_std, which stays that of the weights, as does r, the strength that
the bridge set in the last step of training (with bridge_scope='token', r follows from the beta in use).

Models are evaluated in float32 on the CPU. Shapes: L MoE layers, E experts, N tokens, K top_k.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import altair as alt
import torch
from torch import Tensor
from tqdm import tqdm

from chronomoe import Routing
from chronomoe.bridge import compute_js_divergence
from chronomoe.schedule import parse_schedule
from comparison.analysis import number, what_would_decide
from comparison.figures import Figure, chart, png
from comparison.probe import load_trained, open_data, routing_with
from comparison.report import image_name, page, write_files
from comparison.runs import PAIR_KEYS, Run, differing, expand, load_runs, value_of
from comparison.statistics import MIN_PAIRS, Contrast, contrast
from comparison.tables import Table, provenance
from model import GPT
from trainer.data import EVAL_SEED, TokenData
from trainer.errors import UserError

TEMPLATE = Path(__file__).with_name("swap.html.j2")
SIDES = ("A", "B")
BETAS = ("own", "other", "zero", "permuted")
COLOURS = {"other": "#2f7fc1", "zero": "#808080", "permuted": "#c9650b"}
TEXT_KEYS = {"data_schedule", "data_sha256"}  # besides `dataset`, in which the runs of a pair may differ
BATCHES, BATCH_SIZE = 8, 16  # validation batches, and sequences in each
DERANGEMENTS = 4
ALL_UP_TO = 8  # experts; with more, top_k is 1, 2, 4, ... and E
FIGURES = "swap_figures"

Key = tuple[str, str, str, int]  # weights and beta, text, top_k


@dataclass(frozen=True)
class Cell:
    """Weights with a beta on a text at a top_k: means over batches, and over layers and tokens."""

    loss: float  # nats per token
    set_changed: float  # share of the top-K set that is not in the set with own beta, 0 to 1
    js: float  # JS divergence of the routing probabilities and those with own beta, nats
    load_cv: float  # coefficient of variation of the load over experts


@dataclass(frozen=True)
class Pair:
    """What was measured on two runs."""

    a: Run
    b: Run
    cells: dict[Key, Cell]

    @property
    def seed(self) -> int:
        return self.a.seed

    def change(self, weights: str, beta: str, text: str, top_k: int) -> float:
        """The loss with a beta minus the loss with own beta."""
        return self.cells[weights, beta, text, top_k].loss - self.cells[weights, "own", text, top_k].loss

    def interaction(self, top_k: int) -> float:
        """See the top of this file."""
        last_a, last_b = last_text(self.a.config), last_text(self.b.config)

        def d(weights: str, text: str) -> float:  # beta of A minus beta of B
            change = self.change(weights, "other", text, top_k)
            return -change if weights == "A" else change

        return sum(d(weights, last_a) - d(weights, last_b) for weights in SIDES) / 2

    def transfer(self, top_k: int) -> float:
        """Loss with the other beta minus own, on the last text of the other beta; mean over the weights."""
        on = {"A": last_text(self.b.config), "B": last_text(self.a.config)}
        return sum(self.change(weights, "other", on[weights], top_k) for weights in SIDES) / 2


@dataclass(frozen=True)
class Swap:
    """The pairs of two folders and what they show."""

    pairs: list[Pair]
    texts: list[str]
    top_ks: list[int]
    left_out: list[str]  # a reason for each run that is left out
    command: str
    batches: int
    batch_size: int

    @property
    def top_k(self) -> int:
        """That of training."""
        return value_of(self.pairs[0].a.config, "top_k")

    @property
    def last(self) -> tuple[str, str]:
        """The last texts of A and of B."""
        return last_text(self.pairs[0].a.config), last_text(self.pairs[0].b.config)

    @property
    def has_interaction(self) -> bool:
        return self.last[0] != self.last[1]

    @cached_property
    def interactions(self) -> dict[int, list[float]]:
        """Of each pair, by top_k; empty if both runs end with the same text."""
        return {k: [pair.interaction(k) for pair in self.pairs] for k in self.top_ks} if self.has_interaction else {}

    @cached_property
    def primary(self) -> Contrast | None:
        """The interaction at the top_k of training; None without two pairs."""
        values = self.interactions.get(self.top_k, [])
        return contrast(values, self.pairs[0].a.config.get("margin")) if len(values) > 1 else None

    @property
    def why_no_verdict(self) -> str | None:
        if not self.has_interaction:
            return f"both runs end with the same text, {self.last[0]}, so there is no interaction"
        if self.left_out:
            return "runs are left out, so their results are not known"
        if len(self.pairs) < MIN_PAIRS:
            count = "1 pair of runs is" if len(self.pairs) == 1 else f"{len(self.pairs)} pairs of runs are"
            return f"{count} too few, a verdict needs {MIN_PAIRS}"
        return None

    @property
    def verdict(self) -> str:
        """'effect', 'no effect', 'undecided', or 'none' without a verdict."""
        if self.why_no_verdict is not None:
            return "none"
        return "effect" if self.primary.is_effect else "no effect" if self.primary.is_equivalent else "undecided"

    @property
    def conclusion(self) -> str:
        """The verdict in one sentence."""
        if self.verdict == "none":
            return f"No verdict: {self.why_no_verdict}."
        c = self.primary
        if self.verdict == "effect":
            word = "lower" if c.mean < 0 else "higher"
            size = f", by less than the margin of {c.margin:g} nats" if c.is_equivalent else ""
            return (
                f"The loss is {word} with the beta that was trained on a text than with the other beta, relative to "
                f"the other text{size}. Weights that adapted to their own beta can cause this too: see the other beta "
                "on its own last text."
            )
        if self.verdict == "no effect":
            return (
                f"A beta is neither better nor worse on its own last text by the margin of {c.margin:g} nats or more, "
                "relative to the other text."
            )
        return f"Undecided: a beta may be better on the text that it was trained with, or not; {what_would_decide(c)}."

    @property
    def sentences(self) -> list[str]:
        """The findings in words."""
        found = []
        if self.has_interaction:
            found.append(f"Interaction at top_k={self.top_k}, that of training: {self._primary_in_words}")
            if self.top_k != 1:
                found.append(f"Interaction at top_k=1, where choice is forced: {over_pairs(self.interactions[1])}.")
            transfer = over_pairs([pair.transfer(self.top_k) for pair in self.pairs])
            found.append(
                "The other beta on its own last text, with weights that it was not trained with, changes the loss "
                f"against own beta by {transfer}."
            )
        for beta in BETAS[1:]:
            found.append(
                f"Mean over weights and texts, {beta} beta minus own at top_k={self.top_k}: "
                f"{over_pairs(self.mean_changes(beta, self.top_k))}."
            )
        return found

    @property
    def _primary_in_words(self) -> str:
        said, c = f"{over_pairs(self.interactions[self.top_k])}. ", self.primary
        if self.verdict == "none":
            return f"{said}No verdict: {self.why_no_verdict}."
        p = f"{'exact' if c.is_exact else 'sampled'} p = {c.p:.3g}"
        if self.verdict == "effect":
            return f"{said}An effect ({p}): a beta is {'better' if c.mean < 0 else 'worse'} on its own last text."
        if self.verdict == "no effect":
            return (
                f"{said}No effect larger than the margin of {c.margin:g} nats: two one-sided tests, "
                f"p = {c.p_equivalence:.3g}, 90% interval {number(c.inner_low)} to {number(c.inner_high)}."
            )
        return f"{said}Undecided ({p}): {what_would_decide(c)}."

    def mean_changes(self, beta: str, top_k: int) -> list[float]:
        """Change of the loss against own beta for each pair, mean over weights and texts."""
        cells = list(itertools.product(SIDES, self.texts))
        return [sum(pair.change(w, beta, text, top_k) for w, text in cells) / len(cells) for pair in self.pairs]

    def mean_of(self, field: str, weights: tuple[str, ...], beta: str, texts: list[str], top_k: int) -> float:
        """A field of the cells, mean over pairs, weights and texts."""
        values = [getattr(p.cells[w, beta, t, top_k], field) for p in self.pairs for w in weights for t in texts]
        return sum(values) / len(values)


def over_pairs(values: list[float]) -> str:
    """The mean of pairs in nats, with its 95% interval if there are enough pairs."""
    count = "1 pair" if len(values) == 1 else f"{len(values)} pairs"
    mean = number(sum(values) / len(values))
    if len(values) < MIN_PAIRS:
        return f"{mean} nats over {count}"
    c = contrast(values)
    return f"{mean} nats over {count} (95% interval {number(c.low)} to {number(c.high)})"


def texts_of(config: dict[str, Any]) -> list[str]:
    """The datasets that a run was trained on, in the order of its schedule."""
    schedule = config.get("data_schedule")
    return [dataset for dataset, _ in parse_schedule(schedule)] if schedule else [config["dataset"]]


def last_text(config: dict[str, Any]) -> str:
    return texts_of(config)[-1]


def swap(folder_a: Path, folder_b: Path, arm: str | None, command: str) -> Swap:
    """Measure the pairs of two folders. Raises UserError if there is none, or if a pair cannot be swapped.

    folder_a, folder_b: of one run, or of runs with several seeds. arm: as in `runs_by_seed`.
    """
    (a, left_out_a), (b, left_out_b) = runs_by_seed(folder_a, arm), runs_by_seed(folder_b, arm)
    both = sorted(a.keys() & b.keys())
    if not both:
        seeds = " and ".join(", ".join(map(str, sorted(side))) for side in (a, b))
        raise UserError(f"{folder_a} and {folder_b} have no run with the same seed: they have {seeds}")
    for seed in both:
        check_pair(a[seed], b[seed])
        for side in (a, b):
            check_same(side[both[0]], side[seed])
    alone = [
        f"{run.name}: the other folder has no run of seed {seed}" for seed, run in (a | b).items() if seed not in both
    ]
    runs = [side[seed] for seed in both for side in (a, b)]
    texts = list(dict.fromkeys(text for run in runs for text in texts_of(run.config)))
    model, _ = load_trained(runs[0])
    data = {text: open_data([run for run in runs if text in texts_of(run.config)], text, model) for text in texts}
    top_ks = top_ks_of(model.config.n_exp, model.config.top_k)
    steps = len(runs) * len(texts) * len(top_ks) * BATCHES * (len(BETAS) - 1 + DERANGEMENTS)
    with tqdm(total=steps, desc="forwards", leave=False, disable=None) as bar:
        found = [measure_pair(a[seed], b[seed], data, top_ks, bar) for seed in both]
    return Swap(found, texts, top_ks, [*left_out_a, *left_out_b, *alone], command, BATCHES, BATCH_SIZE)


def runs_by_seed(folder: Path, arm: str | None) -> tuple[dict[int, Run], list[str]]:
    """The runs of a folder by seed, and a reason for each run that cannot be used.

    arm: of the runs. None: the only arm in the folder, or 'on' among several. Raises UserError if there is no run of
    the arm, its beta is off, or there are two of one seed.
    """
    runs, unusable = load_runs(expand([folder]))
    found = {run.arm for run in runs}
    arm = arm or (next(iter(found)) if len(found) == 1 else "on")
    left_out = [str(e) for e in unusable if e.arm in (None, arm)]
    by_seed: dict[int, Run] = {}
    for run in (run for run in runs if run.arm == arm):
        if not value_of(run.config, "chrono_beta"):
            raise UserError(f"{run.name}: beta is off (chrono_beta=False), so there is no beta to swap")
        if run.seed in by_seed:
            raise UserError(f"{run.name} and {by_seed[run.seed].name} have the same seed, {run.seed}")
        by_seed[run.seed] = run
    if not by_seed:
        raise UserError("; ".join(left_out or map(str, unusable)) or f"{folder} has no run of the arm {arm!r}")
    return by_seed, left_out


def check_pair(a: Run, b: Run) -> None:
    """Raises UserError unless two runs started from the same weights and differ in their training text alone."""
    different = [key for key in differing(a.config, b.config) if key not in TEXT_KEYS]
    if a.arm != b.arm:
        different.insert(0, "arm")
    if different:
        values = " and ".join(repr(value_of(run.config, different[0])) for run in (a, b))
        raise UserError(
            f"{a.name} and {b.name} must differ in data_schedule or dataset alone, but {different[0]} is {values}"
        )
    for key in PAIR_KEYS:
        if len(a.values_over_starts(key) | b.values_over_starts(key)) > 1:
            raise UserError(f"{a.name} and {b.name}: their {key} differs or is not recorded")
    if is_same_text(a, b):
        raise UserError(f"{a.name} and {b.name} were trained on the same text, so there is nothing to compare")


def check_same(first: Run, run: Run) -> None:
    """Raises UserError unless a run has the settings and the training text of the first run of its folder."""
    other = differing(first.config, run.config)
    if other or not is_same_text(first, run):
        raise UserError(f"{run.name} and {first.name} differ in {other[0] if other else 'data_schedule'}")


def is_same_text(a: Run, b: Run) -> bool:
    """Whether two runs were trained on the same text in the same order."""
    schedules = {run.config.get("data_schedule") or "" for run in (a, b)}
    return len(schedules) == 1 and a.config.get("data_sha256") == b.config.get("data_sha256")


def top_ks_of(experts: int, trained: int) -> list[int]:
    """The values of top_k to evaluate: all of them, or with many experts powers of two, E and that of training."""
    if experts <= ALL_UP_TO:
        return list(range(1, experts + 1))
    return sorted({trained, experts, *(2**i for i in range(experts.bit_length()) if 2**i <= experts)})


def measure_pair(a: Run, b: Run, data: dict[str, TokenData], top_ks: list[int], bar: Any) -> Pair:
    """Evaluate every beta on the weights of both runs. Raises UserError as `load_trained` and `measure_models`."""
    models = [load_trained(run)[0] for run in (a, b)]
    return Pair(a, b, measure_models(*models, a.seed, data, top_ks, BATCHES, BATCH_SIZE, bar))


def measure_models(
    a: GPT,
    b: GPT,
    seed: int,
    data: dict[str, TokenData],
    top_ks: list[int],
    batches: int,
    batch_size: int,
    bar: Any = None,
) -> dict[Key, Cell]:
    """Evaluate every beta on the weights of both models. Their top_k and beta are the same afterwards.

    seed: of the permutations. data: by text. bar: is advanced at each forward. Raises UserError if shapes differ.
    """
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (a, b)]
    if shapes[0] != shapes[1]:
        raise UserError("the two models have weights of different names or shapes, so their betas cannot be swapped")
    cells: dict[Key, Cell] = {}
    for weights, model, partner in (("A", a, b), ("B", b, a)):
        own = model.router_state.beta_coeff.clone()
        betas = {
            "own": [own],
            "other": [partner.router_state.beta_coeff.clone()],
            "zero": [torch.zeros_like(own)],
            "permuted": derangements(own, seed),
        }
        for text, top_k in itertools.product(data, top_ks):
            found = evaluate(model, betas, data[text], top_k, batches, batch_size, bar)
            cells |= {(weights, beta, text, top_k): cell for beta, cell in found.items()}
    return cells


def derangements(beta: Tensor, seed: int) -> list[Tensor]:
    """DERANGEMENTS permutations of beta [L, E] within each layer, in which no expert keeps its own beta."""
    generator = torch.Generator().manual_seed(seed)
    place, found = torch.arange(beta.shape[1]), []
    for _ in range(DERANGEMENTS):
        rows = []
        for row in beta:
            order = place
            while (order == place).any():
                order = torch.randperm(len(place), generator=generator)
            rows.append(row[order])
        found.append(torch.stack(rows))
    return found


@torch.no_grad()
def evaluate(
    model: GPT,
    betas: dict[str, list[Tensor]],
    data: TokenData,
    top_k: int,
    batches: int,
    batch_size: int,
    bar: Any = None,
) -> dict[str, Cell]:
    """Evaluate betas [L, E] at a top_k on the fixed validation batches.

    betas: by name, the betas whose mean is returned; those of `own` are the reference of the routing.
    """
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in betas}
    for i in range(batches):
        x, y = data.batch("val", EVAL_SEED, 0, i, batch_size)
        reference: list[Routing] = []
        for name in sorted(betas, key=lambda name: name != "own"):
            for beta in betas[name]:
                routings: list[Routing] = []
                with routing_with(model, top_k, beta, lambda _, routing, found=routings: found.append(routing)):
                    loss = model(x, y, return_logits=False)[1].item()
                reference = reference or routings
                values = [loss, *routing_change(reference, routings)]
                sums[name] += torch.tensor(values, dtype=torch.float64) / len(betas[name])
                if bar is not None:
                    bar.update()
    return {name: Cell(*(total / batches).tolist()) for name, total in sums.items()}


def routing_change(reference: list[Routing], routings: list[Routing]) -> tuple[float, float, float]:
    """(share of the top-K set that is not in the reference's, JS divergence, load CV), means over layers and tokens.

    Both are complete forwards: in later layers the hidden states differ too.
    """
    values = []
    for before, after in zip(reference, routings):
        kept = (after.experts.unsqueeze(-1) == before.experts.unsqueeze(-2)).any(-1)  # [N, K]
        js = compute_js_divergence(before.z_biased.softmax(-1), after.z_biased.softmax(-1))
        load = after.tokens_per_expert
        values.append(
            torch.stack([(~kept).double().mean(), js.double(), (load.std(correction=0) / load.mean()).double()])
        )
    return tuple(torch.stack(values).mean(0).tolist())


def write(out: Path, s: Swap) -> None:
    """Write swap.html, swap.json and the figures into `out`. Raises UserError if a file cannot be written."""
    drawn = draw(s)
    today = str(date.today())
    html = page(
        TEMPLATE,
        drawn,
        s=s,
        figures=drawn,
        interactions=interactions_table(s),
        changes=changes_table(s),
        pairs=pairs_table(s),
        made=made(s, today),
    )
    write_files(
        out,
        {
            **{image_name(FIGURES, figure): png(figure) for figure in drawn},
            "swap.html": html,
            "swap.json": json.dumps(as_json(s, today), indent=1) + "\n",
        },
    )


def made(s: Swap, today: str) -> Table:
    sides = zip(SIDES, ([pair.a for pair in s.pairs], [pair.b for pair in s.pairs]))
    found = provenance({side: {run.seed: run for run in runs} for side, runs in sides}, s.command, today)
    evaluated = f"{s.batches} validation batches of {s.batch_size} sequences per text, the same for every beta"
    permuted = f"{DERANGEMENTS} permutations of own beta per layer, from the seed of the run"
    return Table(found.columns, [*found.rows, ["evaluated", evaluated], ["permuted", permuted]])


def agree_until(a: Run, b: Run) -> int | None:
    """The last logged step before the training losses of two runs first differ; None if they differ at once."""
    steps, losses = a.series("train/loss")
    others = dict(zip(*b.series("train/loss")))
    same = itertools.takewhile(lambda of_step: others.get(of_step[0]) == of_step[1], zip(steps, losses))
    return max((step for step, _ in same), default=None)


def pairs_table(s: Swap) -> Table:
    def schedule(run: Run) -> str:
        return run.config.get("data_schedule") or run.config["dataset"]

    rows = []
    for pair in s.pairs:
        until = agree_until(pair.a, pair.b)
        logs = "differ from the start" if until is None else f"equal up to step {until}"
        rows.append([str(pair.seed), pair.a.name, schedule(pair.a), pair.b.name, schedule(pair.b), logs])
    return Table(["seed", "A", "text of A", "B", "text of B", "logged training losses"], rows)


def interval(values: list[float]) -> str:
    if len(values) < MIN_PAIRS:
        return ""
    c = contrast(values)
    return f"{number(c.low)} to {number(c.high)}"


def interactions_table(s: Swap) -> Table:
    rows = []
    for k, values in s.interactions.items():
        note = f"top_k of training: {s.verdict}" if k == s.top_k and s.verdict != "none" else ""
        note = note or ("top_k of training" if k == s.top_k else "")
        rows.append([str(k), str(len(values)), number(sum(values) / len(values)), interval(values), note])
    return Table(["top_k", "pairs", "interaction, nats", "95% interval", "note"], rows)


def changes_table(s: Swap) -> Table:
    """The change of the loss against own beta, per weights, text, beta and top_k."""
    rows = []
    for weights, text, beta, k in itertools.product(SIDES, s.texts, BETAS[1:], s.top_ks):
        values = [pair.change(weights, beta, text, k) for pair in s.pairs]
        changed = s.mean_of("set_changed", (weights,), beta, [text], k)
        mean = number(sum(values) / len(values))
        rows.append([f"{beta} - own", weights, text, str(k), mean, interval(values), f"{changed:.2%}"])
    columns = ["beta", "weights of", "text", "top_k", "change of the loss, nats", "95% interval", "set changed"]
    return Table(columns, rows)


def draw(s: Swap) -> list[Figure]:
    """The figures of the page."""
    found = []
    if s.has_interaction:
        caption = (
            f"Below 0: a beta lowers the loss on the text that it was trained with. Circles: pairs. Bars: mean and, "
            f"with {MIN_PAIRS} pairs, 95% interval. Training used top_k={s.top_k}."
        )
        found.append(Figure("Interaction", caption, [by_top_k(s.interactions, "interaction, nats")]))
    panels = []
    for weights, text in itertools.product(SIDES, s.texts):
        rows = [
            {"beta": beta, "top_k": k, "change": sum(values) / len(values)}
            for beta, k in itertools.product(BETAS[1:], s.top_ks)
            for values in [[pair.change(weights, beta, text, k) for pair in s.pairs]]
        ]
        role = " (its last text)" if text == s.last[SIDES.index(weights)] else ""
        panels.append(lines(rows, "change", f"weights of {weights} on {Path(text).name}{role}"))
    found.append(
        Figure("Loss against own beta", "Loss with another beta minus the loss with own beta, nats; mean over pairs.",
               panels, 2),
    )  # fmt: skip
    panels = []
    for field, label in {
        "set_changed": "share of the top-K set changed",
        "js": "JS divergence of the routing, nats",
        "load_cv": "load CV",
    }.items():
        shown = BETAS if field == "load_cv" else BETAS[1:]
        rows = [
            {"beta": beta, "top_k": k, field: s.mean_of(field, SIDES, beta, s.texts, k)}
            for beta, k in itertools.product(shown, s.top_ks)
        ]
        panels.append(lines(rows, field, label))
    caption = "The first two compare with the routing with own beta. Means over pairs, weights and texts."
    return [*found, Figure("Routing", caption, panels, 3)]


def lines(rows: list[dict[str, Any]], field: str, title: str) -> alt.LayerChart:
    """A line per beta against top_k."""
    shown = {
        beta: colour for beta, colour in ({"own": "#2f8f43"} | COLOURS).items() if any(r["beta"] == beta for r in rows)
    }
    colour = alt.Color("beta:N", scale=alt.Scale(domain=list(shown), range=list(shown.values())))
    x = alt.X("top_k:O", axis=alt.Axis(labelAngle=0, labelOverlap=True))
    tooltip = ["beta:N", "top_k:O", alt.Tooltip(f"{field}:Q", format=".4g")]
    zero = chart([{"zero": 0}]).mark_rule(color="currentColor", opacity=0.5).encode(alt.Y("zero:Q", title=None))
    drawn = chart(rows).mark_line(point=alt.OverlayMarkDef(size=50))
    drawn = drawn.encode(x, alt.Y(f"{field}:Q", title=None, axis=alt.Axis(tickCount=5)), colour, tooltip=tooltip)
    return alt.layer(zero, drawn).properties(height=150, title=title)


def by_top_k(values: dict[int, list[float]], title: str) -> alt.LayerChart:
    """Pairs, mean and 95% interval of a number against top_k."""
    dots = [{"top_k": k, "value": value} for k, of_pairs in values.items() for value in of_pairs]
    bars = []
    for k, of_pairs in values.items():
        bar: dict[str, float] = {"top_k": k, "mean": sum(of_pairs) / len(of_pairs)}
        if len(of_pairs) >= MIN_PAIRS:
            c = contrast(of_pairs)
            bar |= {"low": c.low, "high": c.high}
        bars.append(bar)
    x = alt.X("top_k:O", axis=alt.Axis(labelAngle=0, labelOverlap=True))

    def y(field: str) -> alt.Y:
        return alt.Y(f"{field}:Q", title=title, axis=alt.Axis(tickCount=5))

    layers = [chart([{"zero": 0}]).mark_rule(color="currentColor", opacity=0.5).encode(y("zero"))]
    numbers = [alt.Tooltip(f"{name}:Q", format="+.2g") for name in ("mean", "low", "high")]
    if "low" in bars[0]:
        wide = chart(bars).mark_rule(color=COLOURS["other"], strokeWidth=14)
        layers.append(wide.encode(x, y("low"), alt.Y2("high"), opacity=alt.value(0.35), tooltip=numbers))
    tick = chart(bars).mark_tick(color="currentColor", thickness=3, size=26, orient="horizontal")
    layers.append(tick.encode(x, y("mean"), tooltip=numbers[:1]))
    points = chart(dots).mark_circle(color=COLOURS["other"], size=55, opacity=0.9)
    layers.append(points.encode(x, y("value"), tooltip=["top_k:O", alt.Tooltip("value:Q", format="+.2g")]))
    return alt.layer(*layers).properties(height=240)


def as_json(s: Swap, today: str) -> dict[str, Any]:
    """The content of swap.json: the findings, and all numbers of every pair."""

    def statistics(values: list[float], margin: float | None = None) -> dict[str, Any]:
        numbers = asdict(contrast(values, margin)) if len(values) > 1 else {}
        finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in numbers.items()}
        return {"pairs": values, "mean": sum(values) / len(values)} | finite

    margin = s.pairs[0].a.config.get("margin")
    return {
        "command": s.command,
        "date": today,
        "conclusion": s.conclusion,
        "verdict": s.verdict,
        "sentences": s.sentences,
        "left_out": s.left_out,
        "texts": s.texts,
        "last_texts": dict(zip(SIDES, s.last)),
        "top_k": s.top_k,
        "batches": s.batches,
        "batch_size": s.batch_size,
        "derangements": DERANGEMENTS,
        "interaction": {
            k: statistics(values, margin if k == s.top_k else None) for k, values in s.interactions.items()
        },
        "change": [
            {"weights": weights, "beta": beta, "text": text, "top_k": k}
            | statistics([pair.change(weights, beta, text, k) for pair in s.pairs])
            for weights, text, beta, k in itertools.product(SIDES, s.texts, BETAS[1:], s.top_ks)
        ],
        "pairs": [
            {
                "seed": pair.seed,
                "A": pair.a.name,
                "B": pair.b.name,
                "cells": [
                    dict(zip(("weights", "beta", "text", "top_k"), key)) | asdict(cell)
                    for key, cell in pair.cells.items()
                ],
            }
            for pair in s.pairs
        ],
    }
