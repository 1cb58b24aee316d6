"""Prepare Tiny Shakespeare in GPT-2's tokens, for fine-tuning.

    python data/shakespeare/prepare.py [--input=FILE] [--out=FOLDER] [--jobs=N] [--force]

Downloads input.txt (1.1 MB) unless it exists or --input is given. Writes train.bin (604 kB, 301,967 tokens), val.bin
(72 kB, 36,060) and meta.json beside this file or to --out. The first nine tenths of the characters are for training, as
in nanoGPT. Each split begins with <|endoftext|>.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.corpus import split_file, stat_fingerprint, write_corpus
from data.download import SHAKESPEARE_URL, fetch
from data.options import read_options
from data.tokenizer import TiktokenCodec, encoding_for
from trainer.errors import run_script

HERE = Path(__file__).resolve().parent


def main(arguments: list[str]) -> None:
    options = read_options(arguments, __doc__, HERE, ("input",))
    path = options.input or fetch(SHAKESPEARE_URL, HERE / "input.txt", "1.1 MB")
    fingerprint, total = stat_fingerprint([(path.name, path)])
    codec = TiktokenCodec(encoding_for("gpt2"))
    about = {"dataset": "shakespeare", "source": path.name, "inputs": fingerprint}
    write_corpus(options.out, split_file(path), codec, about, jobs=options.jobs, force=options.force, total=total)


if __name__ == "__main__":
    run_script(main)
