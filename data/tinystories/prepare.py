"""Prepare TinyStories (Eldan and Li 2023; the stories by GPT-4) in GPT-2's tokens.

    python data/tinystories/prepare.py [--input=FOLDER] [--out=FOLDER] [--jobs=N] [--force]

Downloads TinyStoriesV2-GPT4-train.txt (2.2 GB) and TinyStoriesV2-GPT4-valid.txt (23 MB) unless they are beside this
file or in --input. Writes train.bin (about 1.1 GB), val.bin (about 11 MB) and meta.json beside this file or to --out,
with <|endoftext|> before each story.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.corpus import Document, stat_fingerprint, texts_of, write_corpus
from data.download import fetch
from data.options import read_options
from data.tokenizer import END_OF_TEXT, TiktokenCodec, encoding_for
from trainer.errors import UserError, run_script

HERE = Path(__file__).resolve().parent
URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"
FILES = {
    "train": ("TinyStoriesV2-GPT4-train.txt", "2.2 GB"),
    "val": ("TinyStoriesV2-GPT4-valid.txt", "23 MB"),
}
MAX_STORY = 1 << 24  # characters; a story has about 800


def stories(path: Path) -> Iterator[str]:
    """The texts between <|endoftext|>, without surrounding white space."""
    rest = ""
    for text in texts_of(path):
        *complete, rest = (rest + text).split(END_OF_TEXT)
        if len(rest) > MAX_STORY:
            raise UserError(f"{path} has {MAX_STORY} characters without {END_OF_TEXT}: it is not TinyStories")
        yield from filter(None, map(str.strip, complete))
    if rest.strip():
        yield rest.strip()


def main(arguments: list[str]) -> None:
    options = read_options(arguments, __doc__, HERE, ("input",))
    if options.input:
        paths = {split: options.input / name for split, (name, _) in FILES.items()}
    else:
        paths = {split: fetch(f"{URL}/{name}", HERE / name, size) for split, (name, size) in FILES.items()}
    fingerprint, total = stat_fingerprint((path.name, path) for path in paths.values())
    documents = (Document([story], split) for split, path in paths.items() for story in stories(path))
    about = {"dataset": "tinystories", "source": "TinyStoriesV2-GPT4", "inputs": fingerprint}
    codec = TiktokenCodec(encoding_for("gpt2"))
    write_corpus(options.out, documents, codec, about, jobs=options.jobs, force=options.force, total=total)


if __name__ == "__main__":
    run_script(main)
