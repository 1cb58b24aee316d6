"""What the values in a checkpoint must be, and a limit on values that a file can hold.

torch.load returns plain containers, numbers, texts and tensors, but any of them in any place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chronomoe.options import shown

MOST_VALUES = 1 << 20  # in containers of a file; a text counts as one value per CHARACTERS
CHARACTERS = 64
DEEPEST = 20  # nesting of containers
MOST_BITS = 63  # of an integer


class WrongStructure(ValueError):
    """A value that is not what the file must hold. The message names the value."""


@dataclass(frozen=True)
class Leaf:
    """A value that is not checked further. `what` describes it in messages."""

    what: str
    is_valid: Callable[[Any], bool]


@dataclass(frozen=True)
class Each:
    """A dict with any keys of a type."""

    key: type
    value: Spec


# a dict: these keys, of which those that end with ? may be missing, and any others; a list: of any length
Spec = Leaf | Each | dict[str, Any] | list[Any]


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _is_count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def _is_share(x: Any) -> bool:
    return _is_number(x) and 0 <= x < 1


def _is_plain_tensor(x: Any) -> bool:
    """Whether x is a dense tensor whose elements are all in the file."""
    is_dense = isinstance(x, Tensor) and x.layout == torch.strided and x.device.type == "cpu" and not x.is_quantized
    return is_dense and x.numel() * x.element_size() <= x.untyped_storage().nbytes()


def _is_one_number(x: Any) -> bool:
    return _is_plain_tensor(x) and x.numel() == 1 and not x.is_complex()


def _is_setting(x: Any) -> bool:
    return x is None or isinstance(x, (bool, int, float, str))


def _is_line(x: Any) -> bool:
    is_named = isinstance(x, dict) and all(isinstance(name, str) for name in x)
    return is_named and _is_count(x.get("step")) and all(v is None or _is_number(v) for v in x.values())


def _is_json(x: Any) -> bool:
    if isinstance(x, dict):
        return all(isinstance(key, str) and _is_json(value) for key, value in x.items())
    return all(map(_is_json, x)) if isinstance(x, list) else _is_setting(x)


ANY_TENSOR = Leaf("a tensor", _is_plain_tensor)
ONE_NUMBER = Leaf("a tensor with one number", _is_one_number)
BYTES = Leaf("a tensor of bytes", lambda x: _is_plain_tensor(x) and x.dtype == torch.uint8)
COUNT = Leaf("an integer from 0", _is_count)
NUMBER = Leaf("a number", _is_number)
NOT_NEGATIVE = Leaf("a number from 0", lambda x: _is_number(x) and 0 <= x < math.inf)
BETAS = Leaf("two numbers from 0 to 1", lambda x: isinstance(x, (list, tuple)) and [*map(_is_share, x)] == [True] * 2)
OFF = Leaf("False, as AdamW here does not use it", lambda x: x is False)
TEXT = Leaf("a text", lambda x: isinstance(x, str))
TEXT_OR_NONE = Leaf("a text or None", lambda x: x is None or isinstance(x, str))
SETTING = Leaf("a number, a text, True, False or None", _is_setting)
JSON_OBJECT = Leaf("a dict of plain values", lambda x: isinstance(x, dict) and _is_json(x))
LINE_OR_NONE = Leaf("None, or numbers by name with a step", lambda x: x is None or _is_line(x))
BEST_LOSS = Leaf("a number", lambda x: x is None or _is_number(x) or _is_one_number(x))  # nanoMoE saves a tensor

# nanoMoE's checkpoints have the first six keys
CHECKPOINT: dict[str, Spec] = {
    "model": Each(str, ANY_TENSOR),
    "optimizer": {
        "state": Each(int, {"step": ONE_NUMBER, "exp_avg": ANY_TENSOR, "exp_avg_sq": ANY_TENSOR}),
        "param_groups": [
            {
                "params": [COUNT],
                **dict(lr=NUMBER, betas=BETAS, eps=NOT_NEGATIVE, weight_decay=NOT_NEGATIVE),
                **{"amsgrad?": OFF, "maximize?": OFF, "capturable?": OFF, "differentiable?": OFF},
            }
        ],
    },
    "model_args": Each(str, SETTING),
    "iter_num": COUNT,
    "best_val_loss?": BEST_LOSS,
    "config?": Each(str, SETTING),
    "unfinished?": LINE_OR_NONE,
    "chrono?": Each(str, Each(str, ANY_TENSOR)),
    "guard?": {
        **dict(total=ONE_NUMBER, in_a_row=ONE_NUMBER, first_step=ONE_NUMBER, first_bad=ANY_TENSOR, reported=COUNT)
    },
    "scaler?": Each(str, NUMBER),
    "random?": [{"cpu": BYTES, "cuda?": BYTES}],  # by rank
    "data?": Each(str, {"sha256": TEXT, "bytes": COUNT, "mtime_ns": NUMBER}),
    "lines?": Each(str, COUNT),
    "lines_sha256?": Each(str, TEXT),
    "history?": [JSON_OBJECT],
    "incomplete?": [TEXT],
    **{"weights_from?": TEXT_OR_NONE, "weights_sha256?": TEXT_OR_NONE, "wandb_id?": TEXT_OR_NONE},
}


def check(value: Any, spec: Spec, name: str = "") -> None:
    """Raise WrongStructure for the first value that is not what `spec` says. Check the extent first."""
    if isinstance(spec, Leaf):
        if not spec.is_valid(value):
            raise WrongStructure(f"its {name} must be {spec.what}, not {brief(value)}")
    elif isinstance(spec, list):
        if not isinstance(value, list):
            raise WrongStructure(f"its {name} must be a list, not {brief(value)}")
        for i, item in enumerate(value):
            check(item, spec[0], f"{name}/{i}")
    elif not isinstance(value, dict):
        raise WrongStructure(f"its {name} must be a dict, not {brief(value)}" if name else "it is not a dict")
    elif isinstance(spec, Each):
        for key, item in value.items():
            if not isinstance(key, spec.key):
                raise WrongStructure(f"the keys of its {name} must be {spec.key.__name__}, not {brief(key)}")
            check(item, spec.value, f"{name}/{key}")
    else:
        missing = [key for key in spec if not key.endswith("?") and key not in value]
        if missing:
            raise WrongStructure(f"it lacks {', '.join(sorted(f'{name}/{key}' if name else key for key in missing))}")
        for key, item in spec.items():
            key = key.removesuffix("?")
            if key in value:
                check(value[key], item, f"{name}/{key}" if name else key)


def check_extent(value: Any) -> None:
    """Raise WrongStructure if nested containers hold too many values. A shared one counts as often as it appears.

    A file of some hundred bytes can hold shared lists in lists whose printing would take forever.
    """
    used, stack = 0, [(value, 0)]
    while stack:
        found, depth = stack.pop()
        if isinstance(found, int) and found.bit_length() > MOST_BITS:
            raise WrongStructure(f"it holds an integer of {found.bit_length()} bits")
        if not isinstance(found, (dict, list, tuple, set, frozenset, str, bytes, bytearray)):
            continue
        is_text = isinstance(found, (str, bytes, bytearray))
        used += len(found) // CHARACTERS if is_text else len(found)
        if used > MOST_VALUES or depth > DEEPEST:
            raise WrongStructure("it holds too many values in each other")
        if not is_text:
            items: Iterable[Any] = (*found.keys(), *found.values()) if isinstance(found, dict) else found
            stack.extend((item, depth + 1) for item in items)


def brief(value: Any) -> str:
    """A short description of any value."""
    return shown(value) if _is_setting(value) else f"a {type(value).__name__}"
