"""Prepare formal proofs: Metamath's set.mm (logic, set theory and mathematics built on them).

    apt install metamath-databases
    python data/formal/prepare.py [--input=FILE] [--out=FOLDER] [--jobs=N] [--force]

Reads the set.mm of Debian's package (41 MB), or --input. Writes train.bin and val.bin (uint16, one token per byte,
<|endoftext|> before each section) and meta.json beside this file or to --out. A section begins at a comment with a
heading. One section in ten is for validation, chosen by the hash of its title.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.corpus import Document, split_of, stat_fingerprint, texts_of, write_corpus
from data.options import read_options
from data.tokenizer import TiktokenCodec, byte_encoding
from trainer.errors import UserError, run_script

HERE = Path(__file__).resolve().parent
SET_MM = Path("/usr/share/metamath/databases/set.mm")  # in Debian's package
# Metamath's four levels of headings: a comment with one of these lines, and then the title
SECTION = re.compile(r"(?<=\n)(?=\$\(\n(?:####|#\*#\*|=-=-|-\.-\.))")
TITLE = re.compile(r"\$\(\n.*\n(.*)\n")


def sections(texts: Iterable[str]) -> Iterator[str]:
    """Cut a text, given in parts, before each heading. The sections together are the text."""
    rest = ""
    for text in texts:
        *complete, rest = SECTION.split(rest + text)
        yield from complete
    yield rest


def title(section: str) -> str:
    """The title of a section; empty for text before the first heading."""
    found = TITLE.match(section)
    return found[1].strip() if found else ""


def prepare(
    out: Path,
    unless: Callable[[], bool] | None = None,
    path: Path | None = None,
    jobs: int = 1,
    force: bool = False,
) -> None:
    """Write the corpus of the file `path` (default: that of Debian's package) to the folder `out`.

    unless, jobs, force: as in data.corpus.write_corpus. Raises UserError if `path` cannot be read or has no text for a
    split, or if `out` cannot be written.
    """
    path = path or SET_MM
    if not path.is_file():
        raise UserError(
            f"there is no file {path}: apt install metamath-databases, or run data/formal/prepare.py --input=FILE"
        )
    fingerprint, total = stat_fingerprint([(path.name, path)])
    documents = (Document([section], split_of(title(section))) for section in sections(texts_of(path)))
    about = {"dataset": "formal", "source": path.name, "inputs": fingerprint}
    codec = TiktokenCodec(byte_encoding())
    write_corpus(out, documents, codec, about, jobs=jobs, force=force, total=total, count_key="sections", unless=unless)


def main(arguments: list[str]) -> None:
    options = read_options(arguments, __doc__, HERE, ("input",))
    prepare(options.out, path=options.input, jobs=options.jobs, force=options.force)


if __name__ == "__main__":
    run_script(main)
