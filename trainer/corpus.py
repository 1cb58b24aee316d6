"""Text of any size to train.bin and val.bin (uint16) and meta.json, in memory that does not grow with it.

Every document is preceded by <|endoftext|>, as in data/stdlib: id 50256 of GPT-2, 256 of bytes; characters have none. A
document goes to val by the hash of its name. A long document is tokenized in pieces that end where a word does, which
gives the tokens of the whole.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

from trainer.errors import UserError
from trainer.files import INCOMPLETE, atomic_write, atomic_writes, parse_json, read_text, remove_partial_files
from trainer.lock import folder_lock

SPLITS = ("train", "val")
VAL_SHARE = 10  # one document in this many
PIECE = 1 << 20  # characters tokenized at a time
CHUNK = 1 << 20  # bytes read at a time
WAITING = 2  # batches under way for each process
LONGEST_WAIT = 3600.0  # seconds for another preparation of the same dataset to end
CHARACTER_TOKENIZER = "characters"
# spaces that every regex engine takes for one: GPT-2's pattern never spans the place before them
WORD_END = re.compile(r"\S(?=[ \n])")


class Document(NamedTuple):
    texts: Iterable[str]  # its text, in parts
    name: str = ""  # what its split is chosen by; without one, its first thousand characters
    split: str | None = None  # 'train' or 'val', where that is fixed


class Characters:
    """A vocabulary of single characters, in the order of their code points."""

    name = CHARACTER_TOKENIZER
    eot_token = None

    def __init__(self, texts: Iterable[str]):
        self.characters = sorted(set().union(*texts))
        self.codes = np.array([ord(c) for c in self.characters], dtype=np.uint32)
        self.n_vocab = len(self.characters)
        if self.n_vocab > 65536:
            raise UserError(f"{self.n_vocab} different characters do not fit into 16 bits")

    def encode_to_numpy(self, text: str, disallowed_special=()) -> np.ndarray:
        """Token ids, as tiktoken's method of that name."""
        return np.searchsorted(self.codes, np.frombuffer(text.encode("utf-32-le"), dtype="<u4"))


Encoding = tiktoken.Encoding | Characters


def write_corpus(
    out: Path,
    documents: Iterable[Document],
    encoding: Encoding,
    about: dict[str, Any],
    jobs: int,
    force: bool = False,
    total: int | None = None,
    val_share: int = VAL_SHARE,
) -> bool:
    """Write the documents into the folder `out`, unless what `about` describes is there; whether it was written.

    about: `dataset`, `source` and what else meta.json should say; another value of any is another corpus.
    total: bytes of text, for the time left. Where a split gets less than a tenth of its share (of one document, say),
    val is the last tenth of all tokens instead. The result does not depend on jobs.
    Raises UserError if there is no text, or `out` cannot be written.
    """
    about = about | {"tokenizer": encoding.name, "vocab_size": encoding.n_vocab, "dtype": "uint16"}
    if not force and _is_complete(out, about):
        print(f"{out} is complete for {about['source']}; --force prepares it again")
        return False
    replace_dataset(
        out, lambda files: about | _write_tokens(files, documents, encoding, about["source"], jobs, total, val_share)
    )
    return True


def replace_dataset(
    out: Path, write: Callable[[dict[str, BinaryIO]], dict[str, Any]], unless: Callable[[], bool] | None = None
) -> None:
    """Replace the dataset in `out` by another, so that one which is not whole is never read.

    The new token files are written beside the old. Then meta.json says that the dataset is incomplete, until they have
    replaced the old ones: wherever this is interrupted, trainer.data reads the old dataset, the new one, or refuses.

    Args:
        write: writes the tokens of each split into its file, and returns what meta.json says.
        unless: if another process prepares the dataset, wait for it; then do nothing if this returns True.

    Raises UserError if `out` cannot be written, or without `unless` if another process prepares it.
    """
    with folder_lock(out, wait=LONGEST_WAIT if unless else 0, option="--out"):
        if unless and unless():
            return
        try:
            paths = [out / f"{split}.bin" for split in SPLITS]
            for path in (*paths, out / "meta.json"):
                remove_partial_files(path)
            with atomic_writes(paths, before=lambda: _write_meta(out, {INCOMPLETE: "being written"})) as files:
                meta = write(dict(zip(SPLITS, files)))
            _write_meta(out, meta)
        except OSError as e:
            raise UserError(f"cannot write the corpus to {out}: {e.strerror or e}") from None
    counts = ", ".join(f"{split} {n:,}" for split, n in meta["tokens"].items())
    print(f"prepared {meta['source']}: {counts} tokens in {out}")


def _write_meta(out: Path, meta: dict[str, Any]) -> None:
    with atomic_write(out / "meta.json") as f:
        f.write(json.dumps(meta, indent=2).encode() + b"\n")


def _is_complete(out: Path, about: dict[str, Any]) -> bool:
    try:
        meta = parse_json(read_text(out / "meta.json"))
        sizes = {split: (out / f"{split}.bin").stat().st_size for split in SPLITS}
        return about.items() <= meta.items() and all(sizes[split] == 2 * meta["tokens"][split] for split in SPLITS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _write_tokens(files, documents, encoding, source, jobs, total, val_share) -> dict[str, Any]:
    """Write train.bin and val.bin; returns what meta.json says of them."""
    count = _Count()
    bar = tqdm(total=total, desc=f"preparing {source}", unit="B", unit_scale=True, delay=1, mininterval=1)
    encoded = _encode_all(encoding, _batches(documents, val_share, count), jobs)
    with bar, contextlib.closing(encoded):
        for tokens, text_bytes in encoded:
            for split, content in tokens.items():
                files[split].write(content)
            count.text_bytes += text_bytes
            bar.update(text_bytes)
    if not count.text_bytes:
        raise UserError(f"there is no text in {source}")
    sizes = [f.tell() for f in files.values()]
    if not count.fixed and min(sizes) * 10 * val_share < sum(sizes):
        _split_by_position(files["train"], files["val"], encoding.eot_token)
    empty = [split for split, f in files.items() if not f.tell()]
    if empty:
        raise UserError(f"there is no text for {' and '.join(empty)} in {source}")
    return {"documents": count.documents} | tokens_in(files)


def tokens_in(files: dict[str, BinaryIO]) -> dict[str, Any]:
    """What meta.json says of token files that are open for writing: their number of tokens and their sha256."""
    tokens = {split: f.tell() // 2 for split, f in files.items()}
    return {"tokens": tokens, "sha256": {f"{split}.bin": _sha256(f) for split, f in files.items()}}


@dataclass
class _Count:
    documents: int = 0
    text_bytes: int = 0
    fixed: bool = False  # a document's split was given


def _batches(documents: Iterable[Document], val_share: int, count: _Count) -> Iterator[list[tuple[str, bool, str]]]:
    """Lists of (split, whether it starts a document, text) of about PIECE characters."""
    batch, size = [], 0
    for document in documents:
        count.documents += 1
        count.fixed |= document.split is not None
        split = document.split
        for i, text in enumerate(_pieces(document.texts)):
            split = split or split_of(document.name or text[:1000], val_share)
            batch.append((split, i == 0, text))
            size += len(text) + 1
            if size >= PIECE:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def split_of(name: str, val_share: int) -> str:
    """'train' or 'val', by the hash of the document's name."""
    digest = hashlib.sha256(name.encode(errors="replace")).digest()
    return "val" if int.from_bytes(digest[:4], "big") % val_share == 0 else "train"


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """The same text in pieces of at most PIECE characters; one empty piece for no text."""
    text, first = "", True
    for part in texts:
        text += part
        while len(text) > PIECE:
            ends = [match.end() for match in WORD_END.finditer(text, PIECE - PIECE // 16, PIECE + 1)]
            cut = ends[-1] if ends else PIECE
            yield text[:cut]
            text, first = text[cut:], False
    if text or first:
        yield text


def _encode_all(encoding: Encoding, batches: Iterator, jobs: int) -> Iterator[tuple[dict[str, bytes], int]]:
    """_encode of every batch, in their order, with a bounded number of batches in memory."""
    first = list(itertools.islice(batches, 2))
    batches = itertools.chain(first, batches)
    if jobs == 1 or len(first) < 2:
        yield from (_encode(encoding, batch) for batch in batches)
        return
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start_worker, (encoding,))
    try:
        waiting = deque()
        for batch in batches:
            with _interrupts_held():
                waiting.append(pool.submit(_work, batch))
            if len(waiting) >= WAITING * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("a tokenizing process was killed; if memory ran out, give a smaller --jobs") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let a process that is started here leave Ctrl-C to its parent from its first moment."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_encoding: Encoding | None = None  # of a worker


def _start_worker(encoding: Encoding) -> None:
    global _encoding
    _encoding = encoding
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(batch: list[tuple[str, bool, str]]) -> tuple[dict[str, bytes], int]:
    return _encode(_encoding, batch)


def _encode(encoding: Encoding, batch: list[tuple[str, bool, str]]) -> tuple[dict[str, bytes], int]:
    """The tokens of each split, and the bytes of text that they stand for."""
    found: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    text_bytes = 0
    for split, starts, text in batch:
        content = text.encode(errors="replace")
        text_bytes += len(content)
        if starts and encoding.eot_token is not None:
            found[split].append(_as_bytes(encoding.eot_token))
        if content:
            # "<|endoftext|>" in a text is text
            found[split].append(_as_bytes(encoding.encode_to_numpy(content.decode(), disallowed_special=())))
    return {split: b"".join(pieces) for split, pieces in found.items()}, text_bytes


def _as_bytes(tokens: np.ndarray | int) -> bytes:
    return np.asarray(tokens).astype("<u2").tobytes()


def _split_by_position(train: BinaryIO, val: BinaryIO, end_of_text: int | None) -> None:
    """Move val's tokens to the end of train, and then the last tenth of all to val."""
    with open(val.name, "rb") as f:
        val.flush()
        shutil.copyfileobj(f, train, CHUNK)
    val.seek(0)
    val.truncate()
    cut = train.tell() // 2 * 9 // 10 * 2
    with open(train.name, "rb") as f:
        train.flush()
        f.seek(cut)
        first = f.read(2)
        if end_of_text is not None and first != _as_bytes(end_of_text):
            val.write(_as_bytes(end_of_text))
        val.write(first)
        shutil.copyfileobj(f, val, CHUNK)
    train.seek(cut)
    train.truncate()


def _sha256(written: BinaryIO) -> str:
    sha256 = hashlib.sha256()
    written.flush()
    with open(written.name, "rb") as f:
        while chunk := f.read(CHUNK):
            sha256.update(chunk)
    return sha256.hexdigest()


def texts_of(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file, in parts. Raises UserError if it cannot be read or is something else."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as f:
            while chunk := f.read(CHUNK):
                yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None


def by_position(path: Path) -> Iterator[Document]:
    """A file as two documents: its first nine tenths, counted in characters, for train, and the rest for val."""
    length = sum(len(text) for text in texts_of(path))
    cut = length * 9 // 10
    yield Document(_part(path, 0, cut), split="train")
    yield Document(_part(path, cut, length), split="val")


def _part(path: Path, start: int, end: int) -> Iterator[str]:
    at = 0
    for text in texts_of(path):
        yield text[max(start - at, 0) : max(end - at, 0)]
        at += len(text)


def stat_fingerprint(files: Iterable[tuple[str, Path]]) -> tuple[str, int]:
    """What tells these files from others, by their names, sizes and times of change; and their bytes in all."""
    sha256, total = hashlib.sha256(), 0
    for name, path in files:
        try:
            stat = path.stat()
        except OSError as e:
            raise UserError(f"cannot read {path}: {e.strerror}") from None
        sha256.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
        total += stat.st_size
    return sha256.hexdigest(), total


@dataclass
class Options:
    """What the command lines of preparers give."""

    out: Path
    sources: list[Path] = field(default_factory=list)
    input: Path | None = None
    tokenizer: str = "bytes"
    jobs: int = 1
    force: bool = False


def read_options(arguments: list[str], usage: str, out: Path, names: tuple[str, ...]) -> Options:
    """Options of a command line; `names` are those that it takes besides --out, --jobs and --force.

    'sources' among them stands for paths. Raises UserError for others, SystemExit after --help.
    """
    if "--help" in arguments or "-h" in arguments:
        print(usage)
        raise SystemExit(0)
    values: dict[str, Any] = {"out": out, "sources": [], "jobs": _cores()}
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        if argument == "--force":
            values["force"] = True
        elif not argument.startswith("-") and "sources" in names:
            values["sources"].append(Path(argument))
        elif not (argument.startswith("--") and value and name in ("out", "jobs", *names) and name != "sources"):
            raise UserError(f"{argument} is not an option here; --help shows them")
        elif name == "jobs":
            if not value.isdecimal() or int(value) < 1:
                raise UserError(f"{argument} must be a whole number at least 1")
            values["jobs"] = int(value)
        else:
            values[name] = value if name == "tokenizer" else Path(value)
    return Options(**values)


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1
