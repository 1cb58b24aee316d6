"""The files that preparers write, from texts made here. Nothing is downloaded."""

import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import tracemalloc
import types

import numpy as np
import pytest
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from data import corpus
from data.corpus import Document, split_of, write_corpus
from data.download import fetch
from data.tokenizer import END_OF_TEXT, UNKNOWN, CharacterCodec, TiktokenCodec, byte_encoding, codec_for
from tests.helpers.child import wait_for
from tests.helpers.runs import error_of
from trainer.data import DATA, TokenData, load_prepare

STDLIB, TEXT, SHAKESPEARE, CHARACTERS, TINYSTORIES, OPENWEBTEXT = (
    load_prepare(DATA / name / "prepare.py")
    for name in ("stdlib", "text", "shakespeare", "shakespeare_char", "tinystories", "openwebtext")
)
END = 256
BYTES = TiktokenCodec(byte_encoding())
# GPT-2's pattern, and few merges, one of them of two newlines
RANKS = {bytes([i]): i for i in range(256)} | {b"\n\n": 256, b" a": 257, b"ab": 258, b"  ": 259, b"-\x1c": 260}
BPE = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=RANKS, special_tokens={END_OF_TEXT: 261})


@pytest.fixture(autouse=True)
def small_batches_and_no_network(monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 1024)
    monkeypatch.setattr(corpus, "CHUNK", 1000)
    monkeypatch.setenv("no_proxy", "*")
    for script in (SHAKESPEARE, TINYSTORIES, OPENWEBTEXT):
        monkeypatch.setattr(script, "encoding_for", lambda name: {"gpt2": BPE}[name])


def words(count, seed=0):
    """Random text with repeated spaces and newlines, long words, and characters of several bytes."""
    parts = "ab|a|it's|hétérogène|漢字|\U0001f600|123| |  |\n|\n\n| \n|\r\n|\t|-\x1c-".split("|")
    return "".join(np.random.default_rng(seed).choice(parts, count))


def many_texts(count):
    """{name: text} in the order of their names, with special cases."""
    special = dict(bom="\ufeffa", c="y" * 3000 + "\x7f", crlf="a\r\nb\r\n", empty="", end=f"a {END_OF_TEXT} b")
    texts = {f"{i % 7}/{i}.py": f"{i} {words(100, i)}" for i in range(count)} | {"long/long.py": words(3000, 98)}
    return dict(sorted((texts | {f"special/{name}.py": text for name, text in special.items()}).items()))


def write_files(root, texts):
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def prepare(script, out, *arguments, jobs=1):
    script.main([*map(str, arguments), f"--out={out}", f"--jobs={jobs}"])


def is_val(name, share=10):
    """Whether a document belongs to val, by the SHA-256 of its name."""
    return int(hashlib.sha256(name.encode(errors="replace")).hexdigest()[:8], 16) % share == 0


def written(out):
    """{name: content} of the files in `out`, without the lock."""
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".lock")}


def read_tokens(out, split):
    return np.fromfile(out / f"{split}.bin", dtype="<u2").tolist()


def read_documents(out, split, encoding=BYTES.encoding):
    """The texts between <|endoftext|> tokens. The first token must be one."""
    tokens = np.asarray(read_tokens(out, split))
    before, *documents = np.split(tokens, np.flatnonzero(tokens == encoding.eot_token))
    assert not len(before)
    return [encoding.decode_bytes(document[1:].tolist()).decode() for document in documents]


@pytest.mark.parametrize("name, jobs", [("text", 1), ("text", 2), ("text", 3), ("stdlib", 1)])
def test_each_document_is_in_its_split_in_the_order_of_names(name, jobs, tmp_path):
    texts, root, out = many_texts(60), tmp_path / "tests" / "in", tmp_path / "new" / "out"
    write_files(root, dict(reversed(texts.items())))
    if name == "stdlib":
        folders = "test tests a/tests a/test/b idlelib/idle_test site-packages l/dist-packages __pycache__".split()
        left_out = {f"{folder}/a.py": "" for folder in folders} | {"notes.txt": "", "latin.py": b"caf\xe9"}
        write_files(root, left_out)
        STDLIB.prepare(out, write_files(tmp_path / "old", many_texts(20)))  # is replaced
        STDLIB.prepare(out, root)
    else:
        prepare(TEXT, out, root, jobs=jobs)
    meta = json.loads((out / "meta.json").read_bytes())
    for split in ("train", "val"):
        expected = [text for name, text in texts.items() if is_val(name) == (split == "val")]
        assert len(expected) > 1 and read_documents(out, split) == expected
        content = (out / f"{split}.bin").read_bytes()
        assert meta["sha256"].pop(f"{split}.bin") == hashlib.sha256(content).hexdigest()
        assert meta["tokens"].pop(split) * 2 == len(content)
    source = str(root) if name == "text" else f"Python {sys.version.split()[0]} standard library"
    expected = {"dataset": name, "source": source, "tokenizer": "bytes", "vocab_size": 257, "dtype": "uint16"}
    counts = {"files": len(texts)} if name == "stdlib" else {"documents": len(texts), "inputs": meta.get("inputs")}
    assert meta == expected | counts | {"tokens": {}, "sha256": {}}
    assert written(out).keys() == TokenData(out, 16).fingerprint().keys() | {"meta.json"}


@pytest.mark.parametrize("folder", ["absent", "empty", "only_tests", "only_latin", "only_train"])
def test_stdlib_without_source_for_both_splits_is_refused(folder, tmp_path):
    files = {"only_tests/tests/a.py": "a", "only_latin/a.py": b"\xe9", "only_train/b.py": "b", "empty/a.txt": "a"}
    message = {"only_latin": "no text in Python 3", "only_train": "no text for val in Python 3"}
    expected = message.get(folder, f"no Python source under {tmp_path / folder}")
    assert expected in error_of(STDLIB.prepare, tmp_path / "out", write_files(tmp_path, files) / folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", [words(20_000, seed=3), "漢" * 5000], ids=["words", "no_space"])
def test_a_long_document_has_the_tokens_of_the_whole_text(text, tmp_path):
    documents = [Document([text], "train"), Document(text, "val")]  # at once, and one character at a time
    write_corpus(tmp_path, documents, TiktokenCodec(BPE), {"source": "s"})
    expected = [261, *BPE.encode_ordinary(text)]
    assert text[0] == "漢" or set(range(256, 262)) <= set(expected)
    assert read_tokens(tmp_path, "train") == read_tokens(tmp_path, "val") == expected


@pytest.mark.parametrize("split, n, size", [("train", 1, 400), ("train", 4, 400), ("val", 4, 400), ("train", 10, 9)])
def test_documents_of_one_split_are_cut_by_position(split, n, size, tmp_path):
    names = [name for name in map(str, range(500)) if is_val(name) == (split == "val")][:n]
    texts = [words(size, i) if size > 9 else "a" * 9 for i in range(n)]
    documents = [Document([text], split_of(name)) for name, text in zip(names, texts)]
    write_corpus(tmp_path, documents, BYTES, {"source": "s"}, val_share=10)
    tokens = [token for text in texts for token in [END, *text.encode()]]
    train, val = tokens[: len(tokens) * 9 // 10], tokens[len(tokens) * 9 // 10 :]
    assert (val[0] == END) == (size == 9)  # val has only one <|endoftext|> if the cut falls on it
    assert read_tokens(tmp_path, "train") == train
    assert read_tokens(tmp_path, "val") == (val if size == 9 else [END, *val])


@pytest.mark.parametrize("jobs, number", [(1, signal.SIGINT), (2, signal.SIGINT), (2, signal.SIGKILL)])
def test_a_stopped_preparation_leaves_no_corpus_and_no_process(jobs, number, tmp_path):
    root, out = write_files(tmp_path / "in", {f"{i}.txt": words(200_000, i) for i in range(12)}), tmp_path / "out"
    command = [sys.executable, str(DATA / "text" / "prepare.py"), str(root), f"--out={out}", f"--jobs={jobs}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    wait_for(lambda: any(path.stat().st_size for path in out.glob("*.bin.*.tmp")))
    os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
    printed = process.communicate(timeout=20)[0].decode()  # until all workers have closed it
    assert process.returncode == (130 if number == signal.SIGINT else -number), printed
    assert "Traceback" not in printed
    assert not any((out / name).exists() for name in ("train.bin", "val.bin", "meta.json"))


@pytest.mark.parametrize("jobs", [1, 2])
def test_memory_does_not_grow_with_the_corpus(jobs, tmp_path):
    def peak(size):
        texts = {f"{i}.txt": b"some words\n" * 500 for i in range(20 * size)}
        root = write_files(tmp_path / f"in{size}", texts | {"long.txt": b"other words\n" * (9000 * size)})
        tracemalloc.start()
        prepare(TEXT, tmp_path / f"out{size}", root, jobs=jobs)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)  # imports modules
    small, large = peak(2), peak(8)
    assert large - small < 100_000 < 8 * 9000 * len(b"other words\n"), f"{small} and {large} bytes"


CHANGES = {
    "none": lambda root, out: None,
    "force": lambda root, out: None,
    "text": lambda root, out: (root / "long/long.py").write_text("another text"),
    "same_size": lambda root, out: (root / "long/long.py").write_bytes(b"a" * (root / "long/long.py").stat().st_size),
    "name": lambda root, out: (root / "long/long.py").rename(root / "long/b.py"),
    "cut": lambda root, out: os.truncate(out / "train.bin", 10),
    "gone": lambda root, out: (out / "val.bin").unlink(),
    "meta": lambda root, out: (out / "meta.json").write_text("["),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_corpus_is_written_again_only_if_needed(change, tmp_path, capsys):
    root, out = write_files(tmp_path / "in", many_texts(20)), tmp_path / "out"
    prepare(TEXT, out, root)
    before, time = written(out), (out / "meta.json").stat().st_mtime_ns
    CHANGES[change](root, out)
    capsys.readouterr()
    prepare(TEXT, out, root, *(["--force"] if change == "force" else []))
    assert re.match(r".* is complete for .*--force" if change == "none" else "prepared ", capsys.readouterr().out)
    assert ((out / "meta.json").stat().st_mtime_ns == time) == (change == "none")
    assert (written(out) == before) == (change not in ("text", "same_size", "name"))
    TokenData(out, 16).fingerprint()


def test_files_that_are_not_text_are_counted_and_left_out(tmp_path, capsys):
    texts = {f"{i}.txt": words(50, i) for i in range(40)}
    binary = {"latin.txt": b"caf\xe9", "cut.txt": b"\xc3", "late.txt": b"a" * 5000 + b"\xff", "nul.bin": b"a\0"}
    root = write_files(tmp_path / "in", texts | binary | {".git/config": "hidden", ".env": "hidden"})
    (root / "\udcff.txt").write_text("the name is not UTF-8")
    (tmp_path / "single").write_text("another source")
    for force in ([], ["--force"]):  # the second time the folder holds the corpus itself
        prepare(TEXT, root / "out", root, tmp_path / "single", *force)
        assert "not UTF-8 text: 4, such as" in capsys.readouterr().out
        found = [text for split in ("train", "val") for text in read_documents(root / "out", split)]
        assert sorted(found) == sorted([*texts.values(), "the name is not UTF-8", "another source"])


NOT_DOCUMENTS = {"cut": b"{", "list": b"[]", "number": b'{"text": 1}', "key": b'{"txt": "a"}', "latin": b"\xff"}
MISTAKES = [
    (TEXT, "absent", "no file or folder absent"),
    (TEXT, "", "FILE_OR_FOLDER"),
    (TEXT, "a.txt --tokeniser=gpt2", "no setting 'tokeniser'"),
    (TEXT, "a.txt --sources=b", "no setting 'sources'"),
    (TEXT, "a.txt --tokenizer=words", "must be one of 'bytes', 'gpt2'"),
    (TEXT, "a.txt --jobs=0", "--jobs=0 must be"),
    (TEXT, "a.txt --out=", "--out='' must not be empty"),
    (TEXT, "a.txt --out=a.txt/out", "a.txt"),
    (TEXT, "a.txt --out=a.txt", "a.txt"),
    (TEXT, "empty.txt", "no text in empty.txt"),
    (SHAKESPEARE, "--input=empty.txt", "no text in empty.txt"),
    (CHARACTERS, "--input=empty.txt", "no text in empty.txt"),
    *((OPENWEBTEXT, f"--input={name}.jsonl", f"{name}.jsonl must be a JSON object") for name in NOT_DOCUMENTS),
]


@pytest.mark.parametrize(("script", "arguments", "expected"), MISTAKES)
def test_mistakes_are_errors_of_one_line_and_write_nothing(script, arguments, expected, tmp_path, monkeypatch):
    lines = {f"{name}.jsonl": b'{"text": "a"}\n' + line for name, line in NOT_DOCUMENTS.items()}
    monkeypatch.chdir(write_files(tmp_path, lines | {"a.txt": "some text" * 9, "empty.txt": ""}))
    assert expected in error_of(script.main, ["--out=out", "--jobs=1", *arguments.split()])
    assert not (tmp_path / "out").exists() and (tmp_path / "a.txt").read_text() == "some text" * 9


def test_stdlib_has_no_options_and_help_writes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(STDLIB, "prepare", pytest.fail)
    assert "no setting 'out'" in error_of(STDLIB.main, ["--out=elsewhere"])
    STDLIB.main(["--help"])
    assert capsys.readouterr().out.startswith(STDLIB.__doc__)


@pytest.mark.parametrize("script", [SHAKESPEARE, CHARACTERS])
def test_shakespeare_is_split_at_nine_tenths_of_the_characters(script, tmp_path):
    text = words(3000)
    out = tmp_path / "out"
    prepare(script, out, f"--input={write_files(tmp_path, {'mine.txt': text}) / 'mine.txt'}")
    meta, cut, characters = json.loads((out / "meta.json").read_text()), int(len(text) * 0.9), sorted(set(text))
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        bpe, plain = [261, *BPE.encode_ordinary(part)], [characters.index(c) for c in part]
        assert read_tokens(out, split) == (bpe if script is SHAKESPEARE else plain)
        assert script is SHAKESPEARE or codec_for(meta, "").decode(plain) == part
    expected = ("gpt2", 262) if script is SHAKESPEARE else ("characters", len(characters))
    assert (meta["tokenizer"], meta["vocab_size"], meta.get("characters", characters)) == (*expected, characters)
    TokenData(out, 16).fingerprint()


def test_characters_that_do_not_fit_into_16_bits_are_refused(tmp_path):
    characters = [chr(i) for i in range(0x11000) if not 0xD800 <= i < 0xE000]
    documents = [Document(["\0" + characters[65535]], split) for split in ("train", "val")]
    write_corpus(tmp_path, documents, CharacterCodec.from_list(characters[:65536]), {"source": "s"})
    assert read_tokens(tmp_path, "train") == [0, 65535]
    too_many = CharacterCodec.from_list(characters[:65537])
    assert "16 bits" in error_of(write_corpus, tmp_path, documents, too_many, {"source": "s"})
    codec = CharacterCodec({"b": 0, "a": 3}, {0: "b", 3: "a"})  # of a vocabulary with gaps
    assert (codec.size, codec.decode([3, 0, 7])) == (4, f"ab{UNKNOWN}")


def test_tinystories_keep_their_splits_however_small(tmp_path, monkeypatch):
    stories = {"train": [f"story {i}\n\n{words(i).strip()}x" for i in range(300)], "val": ["one", "two"]}
    for split, (name, _) in TINYSTORIES.FILES.items():
        text = f"\n{END_OF_TEXT}\n".join(stories[split])
        write_files(tmp_path, {name: text + END_OF_TEXT * (split == "train")})  # after the last story or not
    prepare(TINYSTORIES, tmp_path, f"--input={tmp_path}")
    assert {split: read_documents(tmp_path, split, BPE) for split in stories} == stories
    assert json.loads((tmp_path / "meta.json").read_text())["documents"] == 302
    monkeypatch.setattr(TINYSTORIES, "MAX_STORY", 5000)
    (tmp_path / name).write_text("a" * 10_000)
    assert "not TinyStories" in error_of(prepare, TINYSTORIES, tmp_path / "out", f"--input={tmp_path}")
    assert not (tmp_path / "out").exists()


def hub(rows):
    """A stand-in for the module `datasets`."""

    def load_dataset(name, **options):
        assert (name, options) == ("Skylion007/openwebtext", {"split": "train", "streaming": True})
        return rows()

    return types.SimpleNamespace(load_dataset=load_dataset)


def interrupted_rows():
    yield {"text": "a"}
    raise OSError("late\nsecond line")


@pytest.mark.parametrize("source", ["file", "hub"])
def test_openwebtext_keeps_one_document_in_2000_for_val(source, tmp_path, monkeypatch):
    texts = [f"document {i} {words(i % 30, i)}" for i in range(9000)]
    first = next(text for text in (f"{i}".ljust(1000, "x") for i in range(99999)) if is_val(text, 2000))
    texts += [first, first + "yy", "a lone surrogate: \ud800"]  # the hash is that of the first 1000 characters
    monkeypatch.setitem(sys.modules, "datasets", hub(lambda: [{"text": text} for text in texts]))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(OPENWEBTEXT, tmp_path, *([f"--input={tmp_path / 'a.jsonl'}"] if source == "file" else []))
    for split in ("train", "val"):
        expected = [text.replace("\ud800", "?") for text in texts if is_val(text[:1000], 2000) == (split == "val")]
        assert read_documents(tmp_path, split, BPE) == expected
        assert split == "train" or 0 < len(expected) < 15


@pytest.mark.parametrize("datasets", [None, hub(lambda: 1 / 0), hub(interrupted_rows)])
def test_openwebtext_that_cannot_be_loaded_says_where_to_get_it(datasets, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    message = error_of(prepare, OPENWEBTEXT, tmp_path / "out")
    assert message.count("huggingface.co/datasets/Skylion007/openwebtext ") == 1 and not (tmp_path / "out").exists()


@pytest.fixture
def server():
    """A server of 3,000,000 bytes: url, the status and length that it announces, and its number of requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests += 1
            self.send_response(self.server.status)
            self.send_header("Content-Length", self.server.length)
            self.end_headers()
            self.wfile.write(b"a" * 3_000_000)

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        running.url, running.status, running.length = f"http://127.0.0.1:{running.server_port}/file", 200, 3_000_000
        running.requests = 0
        threading.Thread(target=running.serve_forever, args=(0.01,)).start()
        yield running
        running.shutdown()


def test_a_download_is_complete_and_happens_once(server, tmp_path):
    (tmp_path / "file.1.tmp").write_text("of a killed attempt")
    for _ in range(2):
        assert fetch(server.url, tmp_path / "file", "3 MB").read_bytes() == b"a" * 3_000_000
    assert server.requests == 1 and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("answer", [None, {"length": 3_000_001}, {"status": 404}, {"status": 503}])
@pytest.mark.parametrize("script", [SHAKESPEARE, CHARACTERS, TINYSTORIES])
def test_a_failed_download_leaves_no_file_and_says_where_to_put_it(script, answer, server, tmp_path, monkeypatch):
    vars(server).update(answer or {"url": "http://127.0.0.1:1/file"})  # no server
    monkeypatch.setattr(script, "HERE", tmp_path)
    monkeypatch.setattr(script, "URL" if script is TINYSTORIES else "SHAKESPEARE_URL", server.url)
    message = error_of(prepare, script, tmp_path / "out")
    assert message.startswith(f"cannot download {server.url}") and f"put it at {tmp_path}/" in message
    assert not list(tmp_path.iterdir())
