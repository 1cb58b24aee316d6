"""Tables of bench.py and of benchmark.gpu as Markdown, for docs/benchmarks.md.

python -m benchmark.markdown bench.json
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from benchmark.timing import Row, format_number, format_ratio, verdict

MET = {True: "met", False: "missed", None: "not measured"}


def document(results: dict) -> str:
    """Targets, stages and tables of `python bench.py --json` or of benchmark.gpu."""
    parts = []
    if "targets" in results:
        parts += ["**Targets**", grid(["", "target", "measured", ""], map(target_cells, results["targets"]))]
    tables = results.get("tables", [])
    if "stages" in results:
        stages = results["stages"]
        ended = [(s["name"], f"{s['seconds']:.0f} s", f"{s['status']}: {s['reason']}".strip(": ")) for s in stages]
        parts += ["**Stages**", grid(["", "time", ""], ended)]
        tables = [table for stage in stages for table in stage["tables"]]
    for table in tables:
        parts.append(f"**{cell(table['title'][0].upper() + table['title'][1:])}**")
        parts += body(table)
    return "\n\n".join(parts) + "\n"


def body(table: dict) -> list[str]:
    """A table of Report: competitors, numbers or checks."""
    if "numbers" in table:
        return [grid(["", ""], [[n["name"], f"{format_number(n['value'])} {n['unit']}"] for n in table["numbers"]])]
    if "checks" in table:
        return [grid(["", ""], [[check["name"], verdict(check)] for check in table["checks"]])]
    first, *others = table["rows"]
    lines = [[first["name"], f"{first['median_ms']:.2f} ms", "1"]]
    lines += [[row["name"], f"{row['median_ms']:.2f} ms", ratio(row)] for row in others]
    lines += [[name, "", ratio(row)] for name, row in table["pairs"].items()]
    return [grid(["", "median", "ratio (quartiles)"], lines), f"{first['turns']} turns."]


def ratio(row: dict) -> str:
    text = format_ratio(Row(**{name: value for name, value in row.items() if name != "noisy"}))
    return " ".join(text.split())


def target_cells(target: dict) -> list[str]:
    measured = "-" if target["value"] is None else "{value:.3f} ({low:.3f} to {high:.3f})".format(**target)
    return [target["name"], f"{target['bound']} {target['limit']:g}", measured, MET[target["met"]]]


def grid(header: list[str], lines) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in rows)


def cell(text: str) -> str:
    """The text without characters that Markdown would interpret."""
    return re.sub(r"([|<`*])", r"\\\1", text.strip())


if __name__ == "__main__":
    print(document(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
