"""Weights & Biases: read the runs of a project, and log a comparison as a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from chronomoe.metrics import SUMMARY
from comparison.analysis import Analysis, Row, conclusion
from comparison.report import Comparison, short_verdict
from comparison.runs import Run, Unusable, checked
from trainer.errors import UserError, first_line
from trainer.wandb_run import WandbRun

REPORTS = ("comparison", "audit")  # job types of runs that are reports


def fetch(project: str) -> list[Any]:
    """The training runs of `entity/project`. Raises UserError if W&B does not answer."""
    import wandb

    try:
        return [run for run in wandb.Api().runs(project) if run.job_type not in REPORTS]
    except Exception as e:
        raise UserError(f"--wandb={project}: W&B did not answer ({type(e).__name__}: {first_line(e)})") from None


def load(source: Any) -> Run:
    """Convert a run of the W&B API. Raises Unusable. Prune proposals and checkpoints are not in W&B."""
    config: dict[str, Any] = {}
    try:
        config = {key: value for key, value in source.config.items() if not key.startswith("_")}
        lines = [plain(row) for row in source.scan_history() if row.get("step") is not None]
    except Exception as e:
        raise Unusable(f"W&B run {source.name}: cannot be read ({type(e).__name__}: {first_line(e)})", config) from None
    lines.sort(key=lambda line: line["step"])
    try:
        return checked(Run(source.name, config, lines, decisions=[]))
    except UserError as e:
        raise Unusable(str(e), config) from None


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row of W&B's history as a line of metrics.jsonl: only numbers, without W&B's own columns and our summaries."""
    names = [name for name in row if not name.startswith("_") and name not in SUMMARY]
    numbers = {name: row[name] for name in names if isinstance(row[name], (int, float))}
    values = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
    return values | {"step": int(row["step"])}


def log(out: Path, comparison: Comparison, drawn: dict[str, Path]) -> None:
    """Log verdict, table and figures as a W&B run with job type `comparison`. drawn: figures' paths by title."""
    log_report(
        out,
        "comparison",
        next(iter(comparison.shown.values())).config,
        {"command": comparison.command, "differing": comparison.differing},
        lambda wandb: _content(wandb, comparison, drawn),
        ("report.html", "report.md", "comparison.json"),
    )


def log_report(
    out: Path,
    job_type: str,
    settings: Mapping[str, Any],
    config: dict[str, Any],
    content: Callable[[Any], dict[str, Any]],
    files: Iterable[str],
) -> None:
    """Log a report as a W&B run.

    Args:
        out: folder of the report.
        job_type: one of REPORTS.
        settings: of a run of the report; they say to which project, and whether the files are uploaded.
        config: of the W&B run.
        content: makes what is logged, given wandb.
        files: names in `out`.
    """
    project = settings.get("wandb_project", "nano-chronomoe")
    run = WandbRun(print, out, project=project, name=f"{job_type} {out.name}", job_type=job_type, config=config)
    run.attempt("log", lambda wandb, r: r.log(content(wandb)))
    if settings.get("wandb_artifacts"):
        run.artifact("report", "report", [out / name for name in files])
    run.finish()


def _content(wandb: Any, comparison: Comparison, drawn: dict[str, Path]) -> dict[str, Any]:
    rows = [_numbers(comparison.analysis, r) for r in comparison.rows]
    sentences = [conclusion(comparison.analysis), *comparison.sentences]
    table = {"contrasts": wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])} if rows else {}
    return {
        **table,
        "verdict": wandb.Table(columns=["verdict"], data=[[sentence] for sentence in sentences]),
        **{f"figures/{title}": wandb.Image(str(path)) for title, path in drawn.items()},
    }


def _numbers(analysis: Analysis, r: Row) -> dict[str, str | int | float | None]:
    """A row of the table of contrasts; None for a number that does not exist."""
    c, verdict = r.contrast, short_verdict(analysis, r)
    numbers = {
        "mean difference": c.mean,
        "standard deviation": c.sd,
        "95% low": c.low,
        "95% high": c.high,
        "p": math.nan if verdict == "none" else c.p,
        "margin": math.nan if c.margin is None else c.margin,
    }
    return {
        **{"outcome": r.outcome.name, "unit": r.outcome.unit, "a": r.a, "b": r.b, "pairs": c.n},
        **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        **{"verdict": verdict, "confounders": ", ".join(r.confounders)},
    }
