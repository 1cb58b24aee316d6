"""Tiny Shakespeare in GPT-2's tokens, for fine-tuning.

    python data/shakespeare/prepare.py [--input=FILE] [--out=FOLDER] [--jobs=N] [--force]

Downloads input.txt (1.1 MB) unless it or --input is there, and writes train.bin (604 kB, 301,967 tokens), val.bin
(72 kB, 36,060) and meta.json beside itself or into --out. The first nine tenths of the characters are for training, as
in nanoGPT; each split begins with <|endoftext|>.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trainer.corpus import by_position, read_options, stat_fingerprint, write_corpus
from trainer.download import fetch
from trainer.errors import run_script
from trainer.tokenizer import encoding_for

HERE = Path(__file__).resolve().parent
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def main(arguments: list[str]) -> None:
    options = read_options(arguments, __doc__, HERE, ("input",))
    path = options.input or fetch(URL, HERE / "input.txt", "1.1 MB")
    look, total = stat_fingerprint([(path.name, path)])
    about = {"dataset": "shakespeare", "source": path.name, "inputs": look}
    write_corpus(options.out, by_position(path), encoding_for("gpt2"), about, options.jobs, options.force, total)


if __name__ == "__main__":
    run_script(main)
