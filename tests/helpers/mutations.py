"""Random values, and random changes of values and of bytes, for tests/fuzz.py."""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

INTEGERS = [0, 1, -1, 2, 3, 7, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63)]
INTEGERS += [10**30, -(10**400), 10**3000]
FLOATS = [0.0, -0.0, 5e-324, 1e-45, 1e-9, 0.5, 0.99999999, 1.5, -1.5, 3.4e38, 1e39, 1.7e308, math.inf, -math.inf]
FLOATS += [math.nan]
TEXTS = ["", " ", "None", "True", "false", "nan", "inf", "1e999", "-0", "1_000", "0x10", "\0", "\n", "a\r\nb", "\u2028"]
TEXTS += ["\ud800", "\udcff", "é", "漢字", "\U0001f468\u200d\U0001f469", "\u202eabc", "\u0663", "\x1b[31m", "\ufeff"]
TEXTS += ["{id}", "%s%n", "{0.__class__}", "<script>", "'\"`", "$(x)", "--help", "-", "a/b", "a=b", "[]", "()", "{}"]
TEXTS += ["x" * 300, "é" * 5000, "9" * 5000, "1," * 3000, "(" * 300, "[" * 20_000, "-" * 20_000 + "1", "{'a':" * 200]
ALPHABETS = ["01", "abc", "0123456789.-+e", "\"'\\,:{}[]()#=_ \n\t", "\0\x07\x1b\x7f\x85\xa0", "éßЖ漢\u0301\U0001f600"]
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
DTYPES += [torch.complex64, torch.float8_e4m3fn]


class Mutations:
    """Values and changes that follow from the state of `rng`."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def often(self, probability: float = 0.5) -> bool:
        return self.rng.random() < probability

    def text(self) -> str:
        rng = self.rng
        if self.often(0.6):
            return rng.choice(TEXTS)
        return "".join(rng.choices(rng.choice(ALPHABETS), k=rng.randrange(12)))

    def number(self) -> int | float:
        rng = self.rng
        pick = rng.randrange(4)
        if pick == 0:
            return rng.choice(INTEGERS)
        if pick == 1:
            return rng.choice(FLOATS)
        return rng.randint(-3, 12) if pick == 2 else rng.uniform(-2, 2)

    def scalar(self) -> Any:
        return self.rng.choice([lambda: None, lambda: self.often(), self.number, self.text])()

    def json(self, depth: int = 3) -> Any:
        """A value that json.dumps accepts."""
        rng = self.rng
        if depth == 0 or self.often(0.6):
            return self.scalar()
        if self.often(0.03):
            return self.nested(rng.choice([20, 50, 200]), self.often())
        if self.often():
            return [self.json(depth - 1) for _ in range(rng.randrange(4))]
        return {self.text(): self.json(depth - 1) for _ in range(rng.randrange(4))}

    def nested(self, depth: int, as_dict: bool = False) -> Any:
        """A list in a list, or a dict in a dict, `depth` deep."""
        value: Any = self.scalar()
        for _ in range(depth):
            value = {"a": value} if as_dict else [value]
        return value

    def shared(self, depth: int) -> Any:
        """A list that is small in a file, and has 2^depth elements when it is printed."""
        value: Any = [self.scalar()] * 2
        for _ in range(depth):
            value = [value, value]
        return value

    def value(self, depth: int = 3) -> Any:
        """A value that torch.save writes and torch.load returns."""
        rng = self.rng
        if self.often(0.3):
            return self.tensor()
        if self.often(0.6):
            return self.json(depth)
        few = range(rng.randrange(3))
        makers: list[Callable[[], Any]] = [
            lambda: tuple(self.value(depth - 1) for _ in few) if depth else (),
            lambda: OrderedDict((self.scalar(), self.scalar()) for _ in few),
            lambda: {rng.randrange(9) for _ in few},
            lambda: bytes(rng.randbytes(rng.randrange(9))),
            lambda: complex(rng.random(), 1),
            lambda: torch.Size([2, 3]),
            lambda: rng.choice(DTYPES),
            lambda: torch.device("cpu"),
            lambda: self.shared(rng.choice([3, 12, 60])),
            lambda: {self.scalar(): self.value(depth - 1) for _ in few} if depth else {},
        ]
        return rng.choice(makers)()

    def tensor(self) -> torch.Tensor:
        rng = self.rng
        shape = rng.choice([(), (0,), (1,), (2,), (3, 2), (1, 1, 1), (0, 3), (5, 3, 8), (8, 8), (61, 8), (5056,)])
        x = torch.rand(shape, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
        makers: list[Callable[[], torch.Tensor]] = [
            lambda: torch.zeros(1).expand(rng.choice([(3,), (5, 3), (1 << 20, 1 << 20)])),
            x.to_sparse,
            lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
            lambda: torch.empty(shape, device="meta"),
            lambda: x.mT if x.dim() > 1 else x,
            lambda: x * rng.choice([math.nan, math.inf, 1e38]),
            lambda: x.to(rng.choice(DTYPES)),
            lambda: x,
        ]
        return rng.choice(makers)()

    def mutated(self, value: Any, other: Callable[[], Any]) -> Any:
        """A copy of nested dicts, lists and tuples with one random change. other: makes a new value."""
        path = self._path(value)
        target = value
        for key in path:
            target = target[key]
        return _replaced(value, path, self._changed(target, other))

    def _path(self, value: Any) -> list[Any]:
        path: list[Any] = []
        while isinstance(value, (dict, list, tuple)) and value and self.often(0.85):
            key = self.rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
            path.append(key)
            value = value[key]
        return path

    def _changed(self, value: Any, other: Callable[[], Any]) -> Any:
        rng = self.rng
        if isinstance(value, dict) and self.often(0.8):
            pick = rng.randrange(4)
            if pick == 0 or not value:
                return {**value, self.scalar() if self.often(0.2) else self.text(): other()}
            key = rng.choice(list(value))
            if pick == 1:
                return {k: v for k, v in value.items() if k != key}
            if pick == 2:
                return {**value, key: value[rng.choice(list(value))]}
            return {self.text() if k == key else k: v for k, v in value.items()}
        if isinstance(value, (list, tuple)) and value and self.often(0.8):
            items = list(value)
            i = rng.randrange(len(items))
            pick = rng.randrange(4)
            if pick == 0:
                del items[i]
            elif pick == 1:
                items.insert(i, items[rng.randrange(len(items))])
            elif pick == 2:
                items.append(other())
            else:
                rng.shuffle(items)
            return items if self.often(0.9) else tuple(items)
        if isinstance(value, bool) and self.often():
            return not value
        if isinstance(value, (int, float)) and self.often():
            return rng.choice([value + 1, value - 1, -value, value * 2, float(value) if abs(value) < 1e300 else value])
        if isinstance(value, str) and self.often():
            i = rng.randint(0, len(value))
            return rng.choice([value[:i], value[:i] + self.text() + value[i:], value.upper(), value + " "])
        if isinstance(value, torch.Tensor) and self.often():
            return self._changed_tensor(value)
        return rng.choice([other, lambda: [value], lambda: {"a": value}])()

    def _changed_tensor(self, x: torch.Tensor) -> torch.Tensor:
        makers: list[Callable[[], torch.Tensor]] = [
            lambda: x.to(self.rng.choice(DTYPES)),
            lambda: x.unsqueeze(0),
            lambda: x.flatten(),
            lambda: torch.full_like(x, self.rng.choice([0, 1, 100])),
            lambda: x * self.rng.choice([math.nan, math.inf, -1, 1e30]),
            lambda: x[..., :1] if x.dim() else x,
            lambda: torch.cat([x, x]) if x.dim() else x,
            lambda: x.mT.contiguous() if x.dim() > 1 else x,
        ]
        try:
            return self.rng.choice(makers)()
        except RuntimeError:  # not every layout and dtype has every operation
            return x

    def damaged(self, content: bytes) -> bytes:
        """The bytes with one to four random changes."""
        found = bytearray(content)
        rng = self.rng
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            size = len(found)
            i, j = sorted((rng.randint(0, size), rng.randint(0, size)))
            pick = rng.randrange(10)
            if pick <= 2 and size:
                found[min(i, size - 1)] ^= 1 << rng.randrange(8)
            elif pick == 3 and size:
                found[min(i, size - 1)] = rng.choice([0, 10, 34, 123, 255])
            elif pick == 4:
                del found[i:]
            elif pick == 5:
                del found[i : i + rng.randrange(1, 40)]
            elif pick == 6:
                found[i:i] = rng.randbytes(rng.randrange(1, 20))
            elif pick == 7:
                found[i:i] = found[j : j + rng.randrange(1, 200)]
            elif pick == 8:
                found[i:i] = self.text().encode("utf-8", "surrogatepass")[:5000]
            else:
                found[i : i + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, (1 << rng.randrange(63)).to_bytes(8, "little")])
        return bytes(found)


def _replaced(value: Any, path: list[Any], new: Any) -> Any:
    if not path:
        return new
    key, *rest = path
    inner = _replaced(value[key], rest, new)
    if isinstance(value, dict):
        return {k: inner if k is key or k == key else v for k, v in value.items()}
    items = [*value]
    items[key] = inner
    return items if isinstance(value, list) else tuple(items)
