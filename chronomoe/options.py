"""Dataclass fields that declare their type, default, range, meaning and role."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

MAX_MAGNITUDE = {int: 2**63, float: 1e38}  # upper limits of settings, which int64 and float32 hold
MAX_SHOWN = 200  # characters of a string in a message
# what a change of a setting affects
Role = Literal[
    "model",  # shapes of the weights; it cannot change on resume
    "computed",  # what a run computes
    "data",  # name of the dataset; runs are compared by the sha256 of their data
    "numerics",  # precision of what a run computes; not read from a checkpoint of nanoMoE
    "length",  # number of steps; it can grow on resume
    "machine",  # where a run computes, and therefore rounding; not read from a checkpoint
    "logging",  # what a run writes, and when
    "start",  # one start of the program; not read from a checkpoint
    "study",  # how a comparison judges a run
    "arm",  # arm of a comparison that the run belongs to
    "seed",  # random numbers; runs with the same seed are a pair
]
BOUNDS = {"least": "at least", "above": "above", "most": "at most", "below": "below"}


def option(
    default: Any,
    help: str,
    *,
    role: Role = "computed",
    only_with: str | None = None,
    group: str = "",
    choices: tuple[Any, ...] | None = None,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> Any:
    """Declare a dataclass field with its meaning and range.

    Args:
        default: default value.
        help: meaning, for --help.
        role: what a change of the value affects.
        only_with: name of a field; while that is off, the value has no effect. Or 'NAME=VALUE': without this value.
        group: heading in --help above this field and those after it.
        choices: allowed values.
        above, below: exclusive bounds.
        least, most: inclusive bounds.
    """
    limits = {"choices": choices, "above": above, "least": least, "below": below, "most": most}
    return dataclasses.field(
        default=default, metadata={"help": help, "role": role, "only_with": only_with, "group": group, **limits}
    )


@dataclasses.dataclass(frozen=True)
class Option:
    """A field that was declared with `option`."""

    name: str
    default: Any
    type: Any
    metadata: Mapping[str, Any]

    @property
    def optional(self) -> bool:
        """Whether None is allowed."""
        return isinstance(self.type, types.UnionType)

    @property
    def kind(self) -> type:
        """bool, int, float or str."""
        return typing.get_args(self.type)[0] if self.optional else self.type

    @property
    def role(self) -> Role:
        return self.metadata["role"]

    @property
    def only_with(self) -> str | None:
        return self.metadata["only_with"]

    def check(self, value: Any) -> Any:
        """Convert the value to the option's type. Raises ValueError for a wrong type or a value out of range.

        A string is any text if the default is empty; otherwise it is a name, which is not empty.
        """
        if value is None and self.optional:
            return None
        kind, m = self.kind, self.metadata
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
        if is_number and kind in MAX_MAGNITUDE and abs(value) >= MAX_MAGNITUDE[kind]:
            raise ValueError(
                f"{self.name}={shown(value)} must be {self.expected()}, of a size below {MAX_MAGNITUDE[kind]:g}"
            )
        if kind is float and is_number:
            value = float(value)
        elif kind is int and is_number and value == int(value):
            value = int(value)
        elif kind in (int, float) or not isinstance(value, kind):
            raise ValueError(f"{self.name}={shown(value)} must be {self.expected()}")
        elif kind is str and self.default != "":
            self._check_name(value)
        if (
            (m["choices"] is not None and value not in m["choices"])
            or (m["least"] is not None and not value >= m["least"])
            or (m["above"] is not None and not value > m["above"])
            or (m["most"] is not None and not value <= m["most"])
            or (m["below"] is not None and not value < m["below"])
        ):
            near = difflib.get_close_matches(str(value), m["choices"] or (), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{self.name}={shown(value)} must be {self.expected()}{hint}")
        return value

    def _check_name(self, value: str) -> None:
        """Raise ValueError for a string that no path and no argument of a program can be."""
        if not value:
            raise ValueError(f"{self.name}='' must not be empty")
        try:
            is_valid = b"\0" not in os.fsencode(value)
        except UnicodeEncodeError:
            is_valid = False
        if not is_valid:
            raise ValueError(f"{self.name}={shown(value)} holds a character that the system cannot encode")

    def expected(self) -> str:
        """Describe the allowed values."""
        m = self.metadata
        if m["choices"] is not None:
            return "one of " + ", ".join(repr(c) for c in m["choices"])
        words = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}[self.kind]
        limits = " and ".join(f"{word} {m[name]}" for name, word in BOUNDS.items() if m[name] is not None)
        none = " or None" if self.optional else ""
        return f"{words} {limits}".rstrip() + none


def shown(value: Any) -> str:
    """A value of any size and kind as Python writes it, shortened to some hundred characters."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = MAX_SHOWN
    try:
        return short.repr(value)
    except Exception:  # of an integer with too many digits, or of a class that the user wrote
        return f"{type(value).__name__} that cannot be written"


@functools.cache
def options_of(owner: type, prefix: str = "") -> Mapping[str, Option]:
    """The options of a dataclass by name, in the order of declaration. Each name gets the prefix."""
    hints = typing.get_type_hints(owner)
    declared = [f for f in dataclasses.fields(owner) if "help" in f.metadata]
    found = {}
    for f in declared:
        only_with = f.metadata["only_with"]
        metadata = {**f.metadata, "only_with": prefix + only_with if only_with else None}
        found[prefix + f.name] = Option(prefix + f.name, f.default, hints[f.name], types.MappingProxyType(metadata))
    return types.MappingProxyType(found)


def check_options(instance: Any) -> None:
    """Convert a dataclass instance's options to their types. Raises ValueError for a wrong type or range."""
    for name, declared in options_of(type(instance)).items():  # type: ignore[arg-type]
        value = getattr(instance, name)
        if getattr(value, "size", None) == 1 and hasattr(value, "item"):
            value = value.item()  # a numpy scalar
        object.__setattr__(instance, name, declared.check(value))  # the dataclass may be frozen


def is_active(name: str, values: Mapping[str, Any], declared: Mapping[str, Option]) -> bool:
    """Whether the value of an option has an effect: the option it is only used with is on, and has an effect too."""
    only_with = declared[name].only_with if name in declared else None
    if only_with is None:
        return True
    other, _, needed = only_with.partition("=")
    value = values.get(other)
    return (str(value) == needed if needed else bool(value)) and is_active(other, values, declared)


def same_option(owner: type, name: str, default: Any = dataclasses.MISSING, *, group: str = "") -> Any:
    """The option `name` of the dataclass `owner` as a field of another dataclass, in `group`.

    default: another default.
    """
    f = next(f for f in dataclasses.fields(owner) if f.name == name)
    return dataclasses.field(
        default=f.default if default is dataclasses.MISSING else default, metadata={**f.metadata, "group": group}
    )
