"""Prepare tables: the properties of Unicode characters, from this interpreter's module unicodedata.

    python data/tables/prepare.py

Writes train.bin and val.bin (uint16, one token per byte, <|endoftext|> before each table) and meta.json beside this
file. A table is a line of column names, and one line per character for up to 128 consecutive code points. One table in
ten is for validation, chosen by the hash of its first code point. Characters without a name, or whose name ends with
their code point, as of most ideographs, are left out. Another version of Unicode, that is of Python, gives another
corpus; meta.json has the version.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.corpus import Document, split_of, write_corpus
from data.options import asks_for_help
from data.tokenizer import TiktokenCodec, byte_encoding
from trainer.errors import run_script

ROWS = 128  # code points per table
COLUMNS = "code,utf8,name,category,bidirectional,combining,width,mirrored,numeric,decomposition"


def row(code: int) -> str:
    """The line of a code point, or nothing if it is left out."""
    c = chr(code)
    name = unicodedata.name(c, "")
    if not name or name.endswith(f"-{code:04X}"):
        return ""
    numeric = unicodedata.numeric(c, None)
    cells = (
        f"{code:04X}",
        c.encode().hex(" "),
        name,
        unicodedata.category(c),
        unicodedata.bidirectional(c),
        str(unicodedata.combining(c)),
        unicodedata.east_asian_width(c),
        str(unicodedata.mirrored(c)),
        "" if numeric is None else f"{numeric:g}",
        unicodedata.decomposition(c),
    )
    return ",".join(cells) + "\n"


def documents(codes: range) -> Iterator[Document]:
    for start in codes[::ROWS]:
        rows = "".join(map(row, range(start, min(start + ROWS, codes.stop))))
        if rows:
            yield Document([f"{COLUMNS}\n{rows}"], split_of(f"{start:04X}"))


def prepare(out: Path, unless: Callable[[], bool] | None = None, codes: range = range(sys.maxunicode + 1)) -> None:
    """Write the corpus of the code points `codes` to the folder `out`.

    unless: as in data.corpus.write_corpus. Raises UserError if there is no text for a split or `out` cannot be written.
    """
    about = {"dataset": "tables", "source": f"Unicode {unicodedata.unidata_version} characters"}
    codec = TiktokenCodec(byte_encoding())
    write_corpus(out, documents(codes), codec, about, force=True, count_key="tables", unless=unless)


def main(arguments: list[str]) -> None:
    if not asks_for_help(arguments, __doc__):
        prepare(Path(__file__).resolve().parent)


if __name__ == "__main__":
    run_script(main)
