"""Builders that the tests in this folder share."""

import json
import types

import numpy as np

from trainer.data import DATA, load_prepare

BLOCK = 8
NAMES = ("stdlib", "text", "shakespeare", "shakespeare_char", "tinystories", "openwebtext")
prepare = types.SimpleNamespace(**{name: load_prepare(DATA / name / "prepare.py") for name in NAMES})


def prepare_text(*arguments, jobs=1):
    prepare.text.main([*map(str, arguments), f"--jobs={jobs}"])


def write_files(root, texts):
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def write_tokens(folder, train, val=None, meta=None):
    folder.mkdir(parents=True, exist_ok=True)
    for split, tokens in (("train", train), ("val", train if val is None else val)):
        (folder / f"{split}.bin").write_bytes(np.asarray(tokens, dtype="<u2").tobytes())
    if meta is not None:
        (folder / "meta.json").write_text(json.dumps(meta))
    return folder
