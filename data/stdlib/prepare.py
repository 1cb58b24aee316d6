"""Prepare a corpus that every machine has: the source of the Python standard library of this interpreter.

    python data/stdlib/prepare.py

Writes train.bin and val.bin (uint16, one token per byte, <|endoftext|> before each file) and meta.json beside this
file. Tests and installed packages are left out. One file in ten is for validation, chosen by the hash of its name.
Another Python version gives another corpus; meta.json has the version and the SHA-256 of the files.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.corpus import Document, split_of, texts_of, write_corpus
from data.options import asks_for_help
from data.tokenizer import TiktokenCodec, byte_encoding
from trainer.errors import UserError, run_script

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def source_files(root: Path) -> list[Path]:
    """The .py files under root, sorted by name, without tests and installed packages."""
    files = (p.relative_to(root) for p in root.rglob("*.py"))
    return sorted((p for p in files if not LEFT_OUT.intersection(p.parts)), key=lambda p: p.as_posix())


def documents(root: Path, files: list[Path]) -> Iterator[Document]:
    for path in files:
        try:
            text = "".join(texts_of(root / path))
        except UserError:  # a few files of the library are not UTF-8
            continue
        yield Document([text], split_of(path.as_posix()))


def prepare(out: Path, root: Path | None = None, unless: Callable[[], bool] | None = None) -> None:
    """Write the corpus of the source tree `root` (default: the standard library) to the folder `out`.

    unless: as in data.corpus.write_corpus. Raises UserError if there are no source files or `out` cannot be written.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = source_files(root)
    if not files:
        raise UserError(f"there is no Python source under {root}: install the standard library as .py files")
    about = {"dataset": "stdlib", "source": f"Python {sys.version.split()[0]} standard library"}
    codec = TiktokenCodec(byte_encoding())
    write_corpus(out, documents(root, files), codec, about, force=True, count_key="files", unless=unless)


def main(arguments: list[str]) -> None:
    if not asks_for_help(arguments, __doc__):
        prepare(Path(__file__).resolve().parent)


if __name__ == "__main__":
    run_script(main)
