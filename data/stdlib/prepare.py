"""A corpus that every machine has: the source of the Python standard library of the interpreter that runs this.

    python data/stdlib/prepare.py

Writes train.bin and val.bin (uint16, one token a byte, <|endoftext|> before each file) and meta.json beside itself.
Tests and site-packages are left out; a file goes to val by the hash of its name. Another Python version gives another
corpus: meta.json has its version and the files' sha256.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trainer.corpus import replace_dataset, tokens_in
from trainer.errors import UserError, run_script
from trainer.tokenizer import BYTE_TOKENIZER, END_OF_TEXT, byte_encoding

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
VAL_SHARE = 10  # one file in this many


def source_files(root: Path) -> list[Path]:
    """The .py files under root, sorted by name, without tests and installed packages."""
    files = (p.relative_to(root) for p in root.rglob("*.py"))
    return sorted((p for p in files if not LEFT_OUT.intersection(p.parts)), key=lambda p: p.as_posix())


def split_of(name: str) -> str:
    """'train' or 'val', by the file's name alone."""
    digest = hashlib.sha256(name.encode()).digest()
    return "val" if int.from_bytes(digest[:4], "big") % VAL_SHARE == 0 else "train"


def prepare(out: Path, root: Path | None = None, unless: Callable[[], bool] | None = None) -> None:
    """Write the corpus of the source tree `root` (default: the standard library's) into the folder `out`.

    unless: as in trainer.corpus.replace_dataset. Raises UserError if nothing is found or `out` cannot be written.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    replace_dataset(out, lambda files: _write_tokens(files, root), unless)


def _write_tokens(files: dict[str, BinaryIO], root: Path) -> dict[str, Any]:
    """Write the tokens of each split; returns what meta.json says."""
    encoding = byte_encoding()
    end_of_text = np.array([encoding.encode_single_token(END_OF_TEXT)], dtype=np.uint16)
    count = 0
    for path in source_files(root):
        try:
            text = (root / path).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a few files of the library are in other encodings
        tokens = encoding.encode_to_numpy(text, disallowed_special=())
        files[split_of(path.as_posix())].write(np.concatenate([end_of_text, tokens.astype(np.uint16)]).tobytes())
        count += 1
    empty = [split for split, f in files.items() if not f.tell()]
    if empty:
        raise UserError(f"no Python source for {' and '.join(empty)} under {root}: it must be installed as .py files")
    return {
        "dataset": "stdlib",
        "source": f"Python {sys.version.split()[0]} standard library",
        "files": count,
        "tokenizer": BYTE_TOKENIZER,
        "vocab_size": encoding.n_vocab,
        "dtype": "uint16",
    } | tokens_in(files)


if __name__ == "__main__":
    run_script(lambda arguments: prepare(Path(__file__).resolve().parent))
