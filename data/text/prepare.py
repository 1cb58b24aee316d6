"""Prepare your own text: files, and folders with all files in them.

    python data/text/prepare.py FILE_OR_FOLDER... [--out=FOLDER] [--tokenizer=bytes|gpt2] [--jobs=N] [--force]

Writes train.bin, val.bin (uint16, <|endoftext|> before each file) and meta.json to --out, by default beside this file.
Then train with --dataset=text, or --dataset=FOLDER. A token is a byte, which needs no network, or one of GPT-2's tokens
(about four bytes of English), whose vocabulary is downloaded once. A token takes two bytes on the disk.

Files that are UTF-8 text without NUL are used, except hidden ones; the others are counted. One file in ten is for
validation, chosen by the hash of its name within its folder; of a single file, the last tenth. Memory does not grow
with the text.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.corpus import VAL_SHARE, Document, split_of, stat_fingerprint, texts_of, write_corpus
from data.options import read_options
from data.tokenizer import TiktokenCodec, encoding_for
from trainer.errors import UserError, run_script

HERE = Path(__file__).resolve().parent
WRITTEN = ("train.bin", "val.bin", "meta.json")  # also prefixes of temporary files


def files_of(sources: list[Path], out: Path) -> Iterator[tuple[str, Path]]:
    """(name within its source, path) of every file, without hidden files and those of a corpus in `out`."""
    out = out.resolve()
    for source in sources:
        if source.is_file():
            yield source.name, source
            continue
        for folder, subfolders, names in os.walk(source):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            is_out = Path(folder).resolve() == out
            for name in sorted(names):
                path = Path(folder) / name
                own = (is_out and name.startswith(WRITTEN)) or path.resolve() == Path(__file__).resolve()
                if not name.startswith(".") and not own and path.is_file():
                    yield path.relative_to(source).as_posix(), path


def is_text(path: Path) -> bool:
    """Whether the file is UTF-8 without NUL."""
    try:
        return all("\0" not in text for text in texts_of(path))
    except UserError:
        return False


def main(arguments: list[str]) -> None:
    options = read_options(arguments, __doc__, HERE, ("sources", "tokenizer"))
    if not options.sources:
        raise UserError("no text given; use: python data/text/prepare.py FILE_OR_FOLDER...")
    for source in options.sources:
        if not source.exists():
            raise UserError(f"there is no file or folder {source}")
    codec = TiktokenCodec(encoding_for(options.tokenizer))
    fingerprint, total = stat_fingerprint(files_of(options.sources, options.out))
    left_out = []

    def documents() -> Iterator[Document]:
        for name, path in files_of(options.sources, options.out):
            if is_text(path):
                yield Document(texts_of(path), split_of(name))
            else:
                left_out.append(str(path))

    source = ", ".join(map(str, options.sources)).encode(errors="replace").decode()  # file names may not be UTF-8
    about = {"dataset": "text", "source": source, "inputs": fingerprint}
    write = dict(jobs=options.jobs, force=options.force, total=total, val_share=VAL_SHARE)
    try:
        write_corpus(options.out, documents(), codec, about, **write)
    finally:
        if left_out:
            print(f"left out files that are not UTF-8 text: {len(left_out)}, such as {left_out[0]!r}")


if __name__ == "__main__":
    run_script(main)
