"""Tiny Shakespeare, one token a character.

    python data/shakespeare_char/prepare.py [--input=FILE] [--out=FOLDER] [--jobs=N] [--force]

Downloads input.txt (1.1 MB) unless it or --input is there, and writes train.bin (2.0 MB, 1,003,854 tokens), val.bin
(223 kB, 111,540) and meta.json beside itself or into --out. The vocabulary is the text's characters (65), sorted; id i
is the i-th of `characters` in meta.json. The first nine tenths are for training: the tokens are nanoGPT's, without
<|endoftext|>.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trainer.corpus import Characters, by_position, read_options, stat_fingerprint, texts_of, write_corpus
from trainer.download import fetch
from trainer.errors import run_script

HERE = Path(__file__).resolve().parent
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def main(arguments: list[str]) -> None:
    options = read_options(arguments, __doc__, HERE, ("input",))
    path = options.input or fetch(URL, HERE / "input.txt", "1.1 MB")
    look, total = stat_fingerprint([(path.name, path)])
    encoding = Characters(texts_of(path))
    about = {"dataset": "shakespeare_char", "source": path.name, "inputs": look, "characters": encoding.characters}
    write_corpus(options.out, by_position(path), encoding, about, options.jobs, options.force, total)


if __name__ == "__main__":
    run_script(main)
