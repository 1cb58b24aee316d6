"""Write a text corpus as train.bin and val.bin (uint16 token ids) and meta.json. Memory does not grow with the text.

Each document begins with <|endoftext|> if the tokenizer has that token. A long document is tokenized in pieces that end
at word ends, which gives the same tokens as the whole document.
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
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from data.tokenizer import Codec
from trainer.errors import UserError
from trainer.files import (
    INCOMPLETE,
    atomic_write,
    atomic_writes,
    parse_json,
    partial_files,
    read_text,
    remove_partial_files,
)
from trainer.lock import folder_lock

SPLITS = ("train", "val")
VAL_SHARE = 10  # one document in 10 is for validation
MAX_VOCABULARY = 1 << 16  # token ids are uint16
PIECE = 1 << 20  # characters tokenized at a time
CHUNK = 1 << 20  # bytes read at a time
BATCHES_PER_PROCESS = 2  # submitted and not yet written
LOCK_TIMEOUT = 3600.0  # seconds to wait for another preparation of the same dataset
# GPT-2's pattern never matches across the position before one of these spaces
WORD_END = re.compile(r"\S(?=[ \n])")


class Document(NamedTuple):
    texts: Iterable[str]  # parts of its text, in order
    split: str  # 'train' or 'val'


class Piece(NamedTuple):
    split: str
    is_first: bool  # of its document
    text: str


class Encoded(NamedTuple):
    content: dict[str, bytes]  # token ids of each split
    documents: int  # number of documents that begin here
    text_bytes: int


def split_of(name: str, val_share: int = VAL_SHARE) -> str:
    """Choose 'train' or 'val' by the hash of a name: 'val' for one name in val_share."""
    digest = hashlib.sha256(name.encode(errors="replace")).digest()
    return "val" if int.from_bytes(digest[:4], "big") % val_share == 0 else "train"


def write_corpus(
    out: Path,
    documents: Iterable[Document],
    codec: Codec,
    about: dict[str, Any],
    *,
    jobs: int = 1,
    force: bool = False,
    total: int | None = None,
    val_share: int | None = None,
    count_key: str = "documents",
    unless: Callable[[], bool] | None = None,
) -> None:
    """Write a corpus to the folder `out`, unless `out` already holds the corpus that `about` describes.

    The new token files are written beside the old ones. Then meta.json is marked as incomplete until they have replaced
    the old ones. If this is interrupted, trainer.data reads the old dataset or the new one, or raises UserError.

    Args:
        about: entries of meta.json. `dataset` and `source` are required. A corpus with another value is replaced.
        jobs: number of processes. The files do not depend on it.
        force: replace the corpus even if it is complete.
        total: bytes of text, for the progress bar.
        val_share: if a split has less than a tenth of its share of the tokens, where val's share is 1 / val_share, use
            the last tenth of all tokens as val instead. None: keep the documents' splits.
        count_key: entry of meta.json for the number of documents.
        unless: wait while another process prepares the dataset, then return if `unless()` is true.

    Raises UserError if a split has no text, if `out` cannot be written, or, without `unless`, if another process
    prepares the dataset.
    """
    source = about["source"]
    if codec.size > MAX_VOCABULARY:
        raise UserError(f"{source} has {codec.size} different characters; at most {MAX_VOCABULARY} fit into 16 bits")
    about = about | {"tokenizer": codec.name, "vocab_size": codec.size, "dtype": "uint16"}
    paths = [out / f"{split}.bin" for split in SPLITS]
    written = [*paths, out / "meta.json"]
    if not force and _is_complete(out, about):
        print(f"{out} is complete for {source}; use --force to prepare it again")
        if any(map(partial_files, written)):
            with contextlib.suppress(UserError), folder_lock(out):  # of a process that was killed, or that is writing
                _remove_all_partial_files(written)
        return
    with folder_lock(out, wait=LOCK_TIMEOUT if unless else 0, option="--out"):
        if unless and unless():
            return
        try:
            _remove_all_partial_files(written)
            with atomic_writes(paths, before=lambda: _write_meta(out, {INCOMPLETE: "being written"})) as opened:
                files = dict(zip(SPLITS, opened))
                count = _write_tokens(files, documents, codec, source, jobs, total, val_share)
                tokens = {split: f.tell() // 2 for split, f in files.items()}
                sha256 = {f"{split}.bin": _sha256(f) for split, f in files.items()}
            _write_meta(out, about | {count_key: count, "tokens": tokens, "sha256": sha256})
        except OSError as e:
            raise UserError(f"cannot write the corpus to {out}: {e.strerror or e}") from None
    print(f"prepared {source}: {', '.join(f'{split} {n:,}' for split, n in tokens.items())} tokens in {out}")


def _remove_all_partial_files(paths: list[Path]) -> None:
    for path in paths:
        remove_partial_files(path)


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


def _write_tokens(
    files: dict[str, BinaryIO],
    documents: Iterable[Document],
    codec: Codec,
    source: str,
    jobs: int,
    total: int | None,
    val_share: int | None,
) -> int:
    """Write the tokens of each split to its file. Returns the number of documents."""
    count = text_bytes = 0
    bar = tqdm(total=total, desc=f"preparing {source}", unit="B", unit_scale=True, delay=1, mininterval=1)
    with bar, contextlib.closing(_encode_all(codec, _batches(documents), jobs)) as batches:
        for encoded in batches:
            for split, content in encoded.content.items():
                files[split].write(content)
            count += encoded.documents
            text_bytes += encoded.text_bytes
            bar.update(encoded.text_bytes)
    if not text_bytes:
        raise UserError(f"there is no text in {source}")
    sizes = [f.tell() for f in files.values()]
    if val_share and min(sizes) * 10 * val_share < sum(sizes):
        _split_by_position(files["train"], files["val"], codec.end_of_text)
    empty = [split for split, f in files.items() if not f.tell()]
    if empty:
        raise UserError(f"there is no text for {' and '.join(empty)} in {source}")
    return count


def _batches(documents: Iterable[Document]) -> Iterator[list[Piece]]:
    """Lists of pieces with about PIECE characters in total."""
    batch, size = [], 0
    for document in documents:
        for i, text in enumerate(_pieces(document.texts)):
            batch.append(Piece(document.split, i == 0, text))
            size += len(text) + 1
            if size >= PIECE:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Cut a document into pieces of at most PIECE characters. An empty document has one empty piece."""
    text = ""
    for part in texts:
        text += part
        while len(text) > PIECE:
            ends = [match.end() for match in WORD_END.finditer(text, PIECE - PIECE // 16, PIECE + 1)]
            cut = ends[-1] if ends else PIECE
            yield text[:cut]
            text = text[cut:]
    yield text


def _encode_all(codec: Codec, batches: Iterator[list[Piece]], jobs: int) -> Iterator[Encoded]:
    """Encode all batches, in order, with a bounded number of them in memory."""
    first = list(itertools.islice(batches, 2))
    batches = itertools.chain(first, batches)
    if jobs == 1 or len(first) < 2:
        yield from (_encode(codec, batch) for batch in batches)
        return
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start_worker, (codec,))
    try:
        submitted = deque()
        for batch in batches:
            with _interrupts_blocked():
                submitted.append(pool.submit(_encode_in_worker, batch))
            if len(submitted) >= BATCHES_PER_PROCESS * jobs:
                yield submitted.popleft().result()
        while submitted:
            yield submitted.popleft().result()
    except BrokenProcessPool:
        raise UserError("a tokenizing process was killed; if memory ran out, use a smaller --jobs") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block Ctrl-C. A process that starts meanwhile inherits this, and only its parent receives Ctrl-C."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker_codec: Codec | None = None


def _start_worker(codec: Codec) -> None:
    global _worker_codec
    _worker_codec = codec
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # not blocked on Windows
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this worker when its parent is killed. It would wait for batches forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_worker(batch: list[Piece]) -> Encoded:
    return _encode(_worker_codec, batch)


def _encode(codec: Codec, batch: list[Piece]) -> Encoded:
    content: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    text_bytes = 0
    for piece in batch:
        utf8 = piece.text.encode(errors="replace")  # text from JSON may hold lone surrogates
        text_bytes += len(utf8)
        if piece.is_first and codec.end_of_text is not None:
            content[piece.split].append(_as_bytes(codec.end_of_text))
        content[piece.split].append(_as_bytes(codec.encode_plain(utf8.decode())))
    documents = sum(piece.is_first for piece in batch)
    return Encoded({split: b"".join(parts) for split, parts in content.items()}, documents, text_bytes)


def _as_bytes(tokens: np.ndarray | int) -> bytes:
    return np.asarray(tokens).astype("<u2").tobytes()


def _split_by_position(train: BinaryIO, val: BinaryIO, end_of_text: int | None) -> None:
    """Append val's tokens to train, then move the last tenth of all tokens to val."""
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
    """Read a UTF-8 file in parts. Raises UserError if it cannot be read or is not UTF-8."""
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


def split_file(path: Path) -> Iterator[Document]:
    """The first nine tenths of a file's characters as a document for train, and the rest as one for val."""
    length = sum(len(text) for text in texts_of(path))
    cut = length * 9 // 10
    yield Document(_characters(path, 0, cut), "train")
    yield Document(_characters(path, cut, length), "val")


def _characters(path: Path, start: int, end: int) -> Iterator[str]:
    position = 0
    for text in texts_of(path):
        yield text[max(start - position, 0) : max(end - position, 0)]
        position += len(text)


def stat_fingerprint(files: Iterable[tuple[str, Path]]) -> tuple[str, int]:
    """SHA-256 of the names, sizes and modification times of files (name, path), and their total size in bytes.

    Detects changes without reading the files. Raises UserError if a file is missing.
    """
    sha256, total = hashlib.sha256(), 0
    for name, path in files:
        try:
            stat = path.stat()
        except OSError as e:
            raise UserError(f"cannot read {path}: {e.strerror}") from None
        sha256.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
        total += stat.st_size
    return sha256.hexdigest(), total
