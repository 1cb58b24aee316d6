"""Values by training step, written as 'VALUE@STEP VALUE@STEP ...'."""

from __future__ import annotations

import functools
import itertools
import math


def parse_schedule(text: str) -> list[tuple[str, int]]:
    """(value, step) of each entry. Raises ValueError unless the steps are whole numbers that rise from 0."""
    found = []
    for entry in text.split():
        value, at, step = entry.rpartition("@")
        if not (at and value and step.isdecimal() and step.isascii() and len(step) < 16):
            raise ValueError(f"{entry!r} must be VALUE@STEP")
        found.append((value, int(step)))
    steps = [step for _, step in found]
    if not found or steps[0] != 0 or any(a >= b for a, b in itertools.pairwise(steps)):
        raise ValueError(f"{text!r} must begin at step 0, and its steps must rise")
    return found


@functools.cache
def parse_ramp(text: str) -> list[tuple[float, int]]:
    """(strength, step) of each point of a ramp. Raises ValueError for a strength that is not in 0 to 1."""
    points = []
    for value, step in parse_schedule(text):
        try:
            strength = float(value)
        except ValueError:
            strength = math.nan
        if not 0 <= strength <= 1:  # False for NaN
            raise ValueError(f"the strength {value!r} must be a number from 0 to 1")
        points.append((strength, step))
    return points
