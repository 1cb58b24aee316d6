"""Measurements of a run, kept in its folder so that an interrupted audit continues where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.files import atomic_write, open_regular, parse_json
from trainer.interventions import SUMS

VERSION = 1  # of what is measured; another version is measured anew
# keys of a line: what the file belongs to, the model, a batch, a set of masked experts, a pruned and a damaged twin
KINDS = {
    frozenset(keys)
    for keys in (
        ("identity",),
        ("model",),
        ("batch", "loss", "masked", "zeroed", *SUMS),
        ("masks", "losses"),
        ("heal", "steps", "losses"),
        ("damage", "steps", "change", "largest"),
    )
}


class Cache:
    """A file with one JSON object per line, valid for one checkpoint.

    Args:
        path: of the file. If it was written for another `identity`, it is replaced.
        identity: what the measurements belong to.

    Raises UserError if the file cannot be read or written.
    """

    def __init__(self, path: Path, identity: dict[str, Any]):
        self.path = path
        self.lines: list[dict[str, Any]] = []
        first = {"identity": identity | {"version": VERSION}}
        try:
            found = complete_lines(path)
            if not found or found[0] != first:
                path.parent.mkdir(exist_ok=True)
                found = [first]
            # written anew because a kill can leave half a line
            with atomic_write(path) as f:
                f.writelines(json.dumps(line).encode() + b"\n" for line in found)
        except OSError as e:
            raise UserError(f"cannot write {path}: {e.strerror}") from None
        self.lines = found[1:]

    def append(self, line: dict[str, Any]) -> None:
        """Add a line. Raises UserError if it cannot be written."""
        try:
            with open(self.path, "ab", buffering=0) as f:
                f.write(json.dumps(line).encode() + b"\n")
        except OSError as e:
            raise UserError(f"cannot write {self.path}: {e.strerror}") from None
        self.lines.append(line)

    def values(self, key: str) -> dict[Any, Any]:
        """{line[key]: line} of the lines that have the key; a later line replaces an earlier one."""
        return {line[key]: line for line in self.lines if key in line}


def complete_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file up to the first that is none of KINDS; [] without a file."""
    if not os.path.lexists(path):
        return []
    found = []
    with open_regular(path) as f:
        for line in f:
            try:
                value = parse_json(line) if line.endswith(b"\n") else None
            except ValueError:
                value = None
            if not isinstance(value, dict) or frozenset(value) not in KINDS:
                break
            found.append(value)
    return found


def file_sha256(path: Path) -> str:
    """SHA-256 of a file. Raises UserError if it cannot be read."""
    sha256 = hashlib.sha256()
    try:
        with open_regular(path) as f:
            while content := f.read(1 << 20):
                sha256.update(content)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    return sha256.hexdigest()
