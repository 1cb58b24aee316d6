"""Prepare OpenWebText, an open copy of GPT-2's training data, in GPT-2's tokens.

    pip install datasets
    python data/openwebtext/prepare.py [--input=FILE] [--out=FOLDER] [--jobs=N] [--force]

Streams the 8,013,769 documents of Skylion007/openwebtext (40 GB of text) from Hugging Face and keeps no copy. Writes
train.bin (about 18 GB, 9 billion tokens), val.bin (about 9 MB) and meta.json beside this file or to --out, with
<|endoftext|> before each document. One document in 2000 is for validation, chosen by the hash of its first 1000
characters. --input reads a local file instead, in which each line is a JSON object with the key "text"; this does not
need `datasets`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.corpus import Document, split_of, stat_fingerprint, write_corpus
from data.options import read_options
from data.tokenizer import TiktokenCodec, encoding_for
from trainer.errors import UserError, first_line, run_script
from trainer.files import parse_json

HERE = Path(__file__).resolve().parent
NAME = "Skylion007/openwebtext"
TEXT_BYTES = 39_769_491_688
VAL_SHARE = 2000


def document(text: str) -> Document:
    return Document([text], split_of(text[:1000], VAL_SHARE))


def unreadable(reason: str) -> UserError:
    return UserError(
        f"cannot read https://huggingface.co/datasets/{NAME} ({reason}): download it elsewhere and use --input=FILE, "
        'in which each line is a JSON object with the key "text"'
    )


def hub_documents() -> Iterator[Document]:
    try:
        from datasets import load_dataset

        rows = load_dataset(NAME, split="train", streaming=True)
    except ImportError:
        raise unreadable("it needs `pip install datasets`") from None
    except Exception as e:  # errors of several libraries
        raise unreadable(first_line(e)) from None

    def documents() -> Iterator[Document]:
        try:
            for row in rows:
                yield document(row["text"])
        except Exception as e:
            raise unreadable(first_line(e)) from None

    return documents()


def file_documents(path: Path) -> Iterator[Document]:
    try:
        with path.open("rb") as f:
            for number, line in enumerate(f, 1):
                row = parse_json(line)
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise ValueError(f'line {number} has no "text"')
                yield document(row["text"])
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f'each line of {path} must be a JSON object with the key "text" ({first_line(e)})') from None


def main(arguments: list[str]) -> None:
    options = read_options(arguments, __doc__, HERE, ("input",))
    if options.input:
        fingerprint, total = stat_fingerprint([(options.input.name, options.input)])
        about = {"dataset": "openwebtext", "source": options.input.name, "inputs": fingerprint}
        documents = file_documents(options.input)
    else:
        about, total, documents = {"dataset": "openwebtext", "source": NAME}, TEXT_BYTES, hub_documents()
    write = dict(jobs=options.jobs, force=options.force, total=total, val_share=VAL_SHARE)
    write_corpus(options.out, documents, TiktokenCodec(encoding_for("gpt2")), about, **write)


if __name__ == "__main__":
    run_script(main)
