"""report.md and its figures: the verdict first, then what it rests on."""

from __future__ import annotations

import dataclasses
import json
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from comparison import figures
from comparison.analysis import Row, analyse, conclusion, verdict
from comparison.runs import Run
from trainer.errors import UserError
from trainer.files import whole_file


def write(
    out: Path, arms: dict[str, dict[int, Run]], differing: dict[str, list[str]], left_out: list[str], command: str
) -> str:
    """Write report.md, comparison.json and figures/ into `out`; returns the report. Raises UserError if it cannot."""
    primary, secondary, check = analyse(arms)
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        drawn = _draw(out / "figures", arms, primary)
        report = _markdown(arms, primary, secondary, check, differing, left_out, command, drawn)
        with whole_file(out / "report.md") as f:
            f.write(report.encode())
        with whole_file(out / "comparison.json") as f:
            content = _numbers(arms, primary, secondary, check, differing, left_out, command)
            f.write(json.dumps(content, indent=1).encode() + b"\n")
    except OSError as e:
        raise UserError(f"cannot write the report to {out}: {e.strerror}") from None
    return report


def _draw(folder: Path, arms: dict[str, dict[int, Run]], primary: list[Row]) -> dict[str, str]:
    drawn = {
        "Validation loss": figures.curves(arms, "val/loss", "validation loss, nats per token"),
        "Layer coherence": figures.curves(arms, "/layer", "token-weighted mean phi_slow"),
        "Disagreement": figures.curves(arms, "/js", "JS, clean against used routing"),
        "Spread of beta": figures.curves(arms, "/spread", "max - min of a layer's beta"),
        "Load": figures.curves(arms, "/load_cv", "CV of the experts' loads"),
    }
    if primary:
        drawn = {"Paired differences": figures.differences(primary)} | drawn
    paths = {}
    for title, figure in drawn.items():
        name = title.lower().replace(" ", "_") + ".png"
        figure.savefig(folder / name, dpi=130)
        plt.close(figure)
        paths[title] = f"figures/{name}"
    return paths


def _markdown(
    arms: dict[str, dict[int, Run]],
    primary: list[Row],
    secondary: list[Row],
    check: list[Row],
    differing: dict[str, list[str]],
    left_out: list[str],
    command: str,
    drawn: dict[str, str],
) -> str:
    first = next(iter(next(iter(arms.values())).values()))
    counts = ", ".join(f"{name} {len(members)}" for name, members in arms.items())
    lines = [
        "# Beta on against beta off",
        "",
        f"**{conclusion(primary)}**",
        "",
        *(f"- {verdict(r)}" for r in primary),
        "",
        f"Runs: {counts}, of {first.config['max_iters']} steps on {first.config['dataset']}. {date.today()}. Command:",
        "",
        f"    {command}",
        "",
        "Settings in which these runs differ:",
        "",
        *(f"- `{key}`: {', '.join(values)}" for key, values in differing.items()),
    ]
    if left_out:
        lines += ["", "Left out:", "", *(f"- {reason}" for reason in left_out)]
    lines += [
        "",
        "## Contrasts",
        "",
        "The primary outcome and its two contrasts were fixed in advance. p is the exact sign-flip test's; those of",
        "the other outcomes are corrected for their number (Holm). The last column is the effect that so many pairs,",
        "with the spread observed, find in 80% of studies.",
        "",
        "| outcome | contrast | pairs | mean difference | 95% interval | p | found in 80% |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_table_row(r, f"{r.contrast.p:.3g}") for r in primary),
        *(_table_row(r, f"{r.corrected:.3g}") for r in secondary),
        "",
        "Did beta act? Layer coherence is a check, not an outcome: beta selects for it.",
        "",
        "| outcome | contrast | pairs | mean difference | 95% interval | p | found in 80% |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_table_row(r, f"{r.contrast.p:.3g}") for r in check),
    ]
    for title, path in drawn.items():
        lines += ["", f"## {title}", "", f"![{title}]({path})"]
    return "\n".join(lines) + "\n"


def _table_row(r: Row, p: str) -> str:
    c = r.contrast
    cells = [r.outcome.name, f"{r.a} - {r.b}", str(c.n), f"{c.mean:+.4g} {r.outcome.unit}".strip()]
    cells += [
        f"{c.low:+.4g} to {c.high:+.4g}",
        p if c.enough else "none",
        f"{c.smallest_found:.3g}" if c.enough else "none",
    ]
    return "| " + " | ".join(cells) + " |"


def _numbers(
    arms: dict[str, dict[int, Run]],
    primary: list[Row],
    secondary: list[Row],
    check: list[Row],
    differing: dict[str, list[str]],
    left_out: list[str],
    command: str,
) -> dict[str, Any]:
    def plain(r: Row) -> dict[str, Any]:
        numbers = dataclasses.asdict(r.contrast)
        # JSON has no infinity
        numbers["smallest_found"] = r.contrast.smallest_found if r.contrast.enough else None
        named = {"outcome": r.outcome.name, "a": r.a, "b": r.b, "differences": r.differences}
        return named | {"p_holm": r.corrected} | numbers

    return {
        "command": command,
        "date": str(date.today()),
        "conclusion": conclusion(primary),
        "differing": differing,
        "left_out": left_out,
        "validation_loss": {
            arm: {seed: dict(zip(*run.series("val/loss"))) for seed, run in sorted(members.items())}
            for arm, members in arms.items()
        },
        "primary": [plain(r) for r in primary],
        "secondary": [plain(r) for r in secondary],
        "check": [plain(r) for r in check],
    }
