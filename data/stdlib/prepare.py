"""A corpus that every machine has: the source of the Python standard library of the interpreter that runs this.

    python data/stdlib/prepare.py

Writes train.bin and val.bin (uint16, one token a byte, <|endoftext|> before each file) and meta.json beside itself.
Tests and site-packages are left out; a file goes to val by the hash of its name. Another Python version gives another
corpus: meta.json has its version and the files' sha256.
"""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trainer.errors import UserError, run
from trainer.files import whole_file
from trainer.tokenizer import BYTE_TOKENIZER, END_OF_TEXT, byte_encoding

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
VAL_SHARE = 10  # one file in this many


def source_files(root: Path) -> list[Path]:
    """The .py files under root, sorted by name, without tests and installed packages."""
    files = (p.relative_to(root) for p in root.rglob("*.py"))
    return sorted((p for p in files if not LEFT_OUT.intersection(p.parts)), key=lambda p: p.as_posix())


def split_of(name: str) -> str:
    """'train' or 'val', by the file's name alone."""
    digest = hashlib.sha256(name.encode()).digest()
    return "val" if int.from_bytes(digest[:4], "big") % VAL_SHARE == 0 else "train"


def prepare(out: Path, root: Path | None = None) -> None:
    """Write the corpus of the source tree `root` (default: the standard library's) into the folder `out`.

    Raises UserError if nothing is found or `out` cannot be written.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    encoding = byte_encoding()
    end_of_text = np.array([encoding.encode_single_token(END_OF_TEXT)], dtype=np.uint16)
    pieces: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    for path in source_files(root):
        try:
            text = (root / path).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a few files of the library are in other encodings
        tokens = encoding.encode_to_numpy(text, disallowed_special=())
        pieces[split_of(path.as_posix())] += [end_of_text, tokens.astype(np.uint16)]
    empty = [split for split, found in pieces.items() if not found]
    if empty:
        raise UserError(f"no Python source for {' and '.join(empty)} under {root}: it must be installed as .py files")

    meta = {
        "dataset": "stdlib",
        "source": f"Python {sys.version.split()[0]} standard library",
        "files": sum(len(found) for found in pieces.values()) // 2,
        "tokenizer": BYTE_TOKENIZER,
        "vocab_size": encoding.n_vocab,
        "dtype": "uint16",
        "tokens": {},
        "sha256": {},
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for split, found in pieces.items():
            content = np.concatenate(found).tobytes()
            meta["tokens"][split] = len(content) // 2
            meta["sha256"][f"{split}.bin"] = hashlib.sha256(content).hexdigest()
            with whole_file(out / f"{split}.bin") as f:
                f.write(content)
        # last: its presence says that the others are whole
        with whole_file(out / "meta.json") as f:
            f.write(json.dumps(meta, indent=2).encode() + b"\n")
    except OSError as e:
        raise UserError(f"cannot write the corpus to {out}: {e.strerror}") from None
    counts = ", ".join(f"{split} {n:,}" for split, n in meta["tokens"].items())
    print(f"prepared {meta['source']}: {counts} tokens in {out}")


if __name__ == "__main__":
    run(lambda arguments: prepare(Path(__file__).resolve().parent))
