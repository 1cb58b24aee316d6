"""OpenWebText, an open copy of GPT-2's training data, in GPT-2's tokens.

    pip install datasets
    python data/openwebtext/prepare.py [--input=FILE] [--out=FOLDER] [--jobs=N] [--force]

Reads the 8,013,769 documents of Skylion007/openwebtext from Hugging Face while it tokenizes, keeping no copy (40 GB of
text), and writes train.bin (about 18 GB, 9 billion tokens), val.bin (about 9 MB) and meta.json beside itself or into
--out, with <|endoftext|> before each document. One document in 2000 is for validation, by the hash of its beginning.
--input: a local file instead, with a JSON object with the key "text" in each line; needs no `datasets`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trainer.corpus import Document, read_options, stat_fingerprint, write_corpus
from trainer.errors import UserError, first_line, run_script
from trainer.files import parse_json
from trainer.tokenizer import encoding_for

HERE = Path(__file__).resolve().parent
NAME = "Skylion007/openwebtext"
TEXT_BYTES = 39_769_491_688
VAL_SHARE = 2000


def unreadable(reason: str) -> UserError:
    return UserError(
        f"cannot read https://huggingface.co/datasets/{NAME} ({reason}): download it elsewhere and give --input=FILE, "
        'with a JSON object with the key "text" in each line'
    )


def hub_documents() -> Iterator[Document]:
    try:
        from datasets import load_dataset

        rows = load_dataset(NAME, split="train", streaming=True)
    except ImportError:
        raise unreadable("it needs `pip install datasets`") from None
    except Exception as e:  # of several libraries
        raise unreadable(first_line(e)) from None

    def documents() -> Iterator[Document]:
        try:
            for row in rows:
                yield Document([row["text"]])
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
                yield Document([row["text"]])
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f'{path} must hold a JSON object with the key "text" in each line ({first_line(e)})') from None


def main(arguments: list[str]) -> None:
    options = read_options(arguments, __doc__, HERE, ("input",))
    if options.input:
        look, total = stat_fingerprint([(options.input.name, options.input)])
        about = {"dataset": "openwebtext", "source": options.input.name, "inputs": look}
        documents = file_documents(options.input)
    else:
        about, total, documents = {"dataset": "openwebtext", "source": NAME}, TEXT_BYTES, hub_documents()
    encoding = encoding_for("gpt2")
    write_corpus(options.out, documents, encoding, about, options.jobs, options.force, total, VAL_SHARE)


if __name__ == "__main__":
    run_script(main)
