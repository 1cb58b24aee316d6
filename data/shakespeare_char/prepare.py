"""Prepare Tiny Shakespeare with one token per character.

    python data/shakespeare_char/prepare.py [--input=FILE] [--out=FOLDER] [--jobs=N] [--force]

Downloads input.txt (1.1 MB) unless it exists or --input is given. Writes train.bin (2.0 MB, 1,003,854 tokens), val.bin
(223 kB, 111,540) and meta.json beside this file or to --out. The vocabulary is the sorted characters of the text (65);
id i is the i-th of `characters` in meta.json. The first nine tenths are for training. The tokens are those of nanoGPT,
without <|endoftext|>.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.corpus import split_file, stat_fingerprint, texts_of, write_corpus
from data.download import SHAKESPEARE_URL, fetch
from data.options import read_options
from data.tokenizer import CharacterCodec
from trainer.errors import UserError, run_script

HERE = Path(__file__).resolve().parent


def main(arguments: list[str]) -> None:
    options = read_options(arguments, __doc__, HERE, ("input",))
    path = options.input or fetch(SHAKESPEARE_URL, HERE / "input.txt", "1.1 MB")
    fingerprint, total = stat_fingerprint([(path.name, path)])
    characters = sorted({c for text in texts_of(path) for c in text})
    if not characters:
        raise UserError(f"there is no text in {path}")
    codec = CharacterCodec.from_list(characters)
    about = {"dataset": "shakespeare_char", "source": path.name, "inputs": fingerprint, "characters": characters}
    write_corpus(options.out, split_file(path), codec, about, jobs=options.jobs, force=options.force, total=total)


if __name__ == "__main__":
    run_script(main)
