"""Your own text: files, and folders with all that is in them.

    python data/text/prepare.py FILE_OR_FOLDER... [--out=FOLDER] [--tokenizer=bytes|gpt2] [--jobs=N] [--force]

Writes train.bin, val.bin (uint16, <|endoftext|> before each file) and meta.json into --out, by default beside this
file; then train with --dataset=text, or --dataset=FOLDER. A token is a byte (needs no network) or one of GPT-2's (about
four bytes of English; downloads its vocabulary once). A token takes two bytes: with bytes, twice the text's size.

Every file that is UTF-8 text without NUL is taken, except hidden ones; the others are counted. One file in ten is for
validation, by the hash of its name within its folder; of a single file it is the last tenth. Memory does not grow with
the text.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trainer.corpus import Document, read_options, stat_fingerprint, texts_of, write_corpus
from trainer.errors import UserError, run_script
from trainer.tokenizer import BYTE_TOKENIZER, GPT2_TOKENIZER, encoding_for

HERE = Path(__file__).resolve().parent
WRITTEN = ("train.bin", "val.bin", "meta.json")  # and what their names begin


def files_of(sources: list[Path], out: Path) -> Iterator[tuple[str, Path]]:
    """(name within its source, path) of every file, without hidden ones and those of a corpus in `out`."""
    out = out.resolve()
    for source in sources:
        if source.is_file():
            yield source.name, source
            continue
        for folder, below, names in os.walk(source):
            below[:] = sorted(name for name in below if not name.startswith("."))
            is_out = Path(folder).resolve() == out
            for name in sorted(names):
                path = Path(folder) / name
                own = (is_out and name.startswith(WRITTEN)) or path.resolve() == Path(__file__).resolve()
                if not name.startswith(".") and not own and path.is_file():
                    yield path.relative_to(source).as_posix(), path


def is_text(path: Path) -> bool:
    """Whether all of it is UTF-8 without NUL."""
    try:
        return all("\0" not in text for text in texts_of(path))
    except UserError:
        return False


def main(arguments: list[str]) -> None:
    options = read_options(arguments, __doc__, HERE, ("sources", "tokenizer"))
    if not options.sources:
        raise UserError("no text given: python data/text/prepare.py FILE_OR_FOLDER...")
    for source in options.sources:
        if not source.exists():
            raise UserError(f"there is no file or folder {source}")
    if options.tokenizer not in (BYTE_TOKENIZER, GPT2_TOKENIZER):
        raise UserError(f"--tokenizer={options.tokenizer} can be {BYTE_TOKENIZER} or {GPT2_TOKENIZER}")
    encoding = encoding_for(options.tokenizer)
    look, total = stat_fingerprint(files_of(options.sources, options.out))
    left_out = []

    def documents() -> Iterator[Document]:
        for name, path in files_of(options.sources, options.out):
            if is_text(path):
                yield Document(texts_of(path), name)
            else:
                left_out.append(str(path))

    # a name need not be text
    source = ", ".join(map(str, options.sources)).encode(errors="replace").decode()
    about = {"dataset": "text", "source": source, "inputs": look}
    try:
        write_corpus(options.out, documents(), encoding, about, options.jobs, options.force, total)
    finally:
        if left_out:
            print(f"files left out that cannot be read as UTF-8 text: {len(left_out)}, such as {left_out[0]!r}")


if __name__ == "__main__":
    run_script(main)
