"""What the preparers in data/ write, from texts made here: nothing is downloaded."""

import http.server
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from tests.helpers.child import wait_for
from trainer import corpus
from trainer.corpus import Characters, Document, split_of, write_corpus
from trainer.data import DATA, TokenData, load_prepare
from trainer.download import fetch
from trainer.errors import UserError, run_script
from trainer.lock import folder_lock
from trainer.tokenizer import END_OF_TEXT, byte_encoding

TEXT, SHAKESPEARE, CHARACTERS, TINYSTORIES, OPENWEBTEXT = (
    load_prepare(DATA / name / "prepare.py")
    for name in ("text", "shakespeare", "shakespeare_char", "tinystories", "openwebtext")
)
END = 256
# GPT-2's way to cut text into words, with few merges, one of them of two newlines
STAND_IN = tiktoken.Encoding(
    "gpt2",
    pat_str=r50k_pat_str,
    mergeable_ranks={bytes([i]): i for i in range(256)} | {b"\n\n": 256, b" a": 257, b"ab": 258, b"  ": 259},
    special_tokens={END_OF_TEXT: 260},
)


@pytest.fixture(autouse=True)
def small_batches_and_no_network(monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 1024)
    monkeypatch.setattr(corpus, "CHUNK", 1000)
    monkeypatch.setenv("no_proxy", "*")
    for prepare in (SHAKESPEARE, TINYSTORIES, OPENWEBTEXT):
        monkeypatch.setattr(prepare, "encoding_for", lambda name: {"gpt2": STAND_IN}[name])


def written(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")}


def tokens(out, split):
    return np.fromfile(out / f"{split}.bin", dtype="<u2").tolist()


def documents(out, split, encoding=None):
    encoding = encoding or byte_encoding()
    found = tokens(out, split)
    assert found[0] == encoding.eot_token
    starts = [i for i, token in enumerate(found) if token == encoding.eot_token] + [len(found)]
    return [encoding.decode_bytes(found[a + 1 : b]).decode() for a, b in itertools.pairwise(starts)]


def words(count, seed=0):
    """Text with runs of spaces and newlines, long enough words, and characters of several bytes."""
    rng = np.random.default_rng(seed)
    parts = [
        "ab",
        "a",
        "it's",
        "hétérogène",
        "漢字",
        "\U0001f600",
        "123",
        " ",
        "  ",
        "\n",
        "\n\n",
        " \n",
        "\r\n",
        "\t",
        "--",
    ]
    return "".join(parts[i] for i in rng.integers(len(parts), size=count))


def folder_of(root, texts):
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def many(count=60, size=100):
    return {f"below/{i % 7}/{i}.txt": words(size, i) for i in range(count)} | {"long.md": words(3000, -1 % 99)}


def prepare_text(*arguments):
    TEXT.main([str(a) for a in arguments])


def one_line(error):
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


def status_of(prepare, arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        run_script(prepare.main)
    return stop.value.code


def test_documents_come_back_from_the_tokens_each_in_its_split(tmp_path):
    texts = many() | {
        "empty.txt": "",
        "marked.txt": f"a {END_OF_TEXT} b",
        "windows.txt": "a\r\nb\r\n",
        "bom.txt": "\ufeffa",
    }
    out = tmp_path / "out"
    prepare_text(folder_of(tmp_path / "in", texts), f"--out={out}", "--jobs=1")
    for split in ("train", "val"):
        expected = [text for name, text in texts.items() if split_of(name, 10) == split]
        assert len(expected) > 1
        assert sorted(documents(out, split)) == sorted(expected)
    meta = json.loads((out / "meta.json").read_text())
    assert meta["documents"] == len(texts)
    assert (meta["dataset"], meta["tokenizer"], meta["vocab_size"], meta["dtype"]) == ("text", "bytes", 257, "uint16")
    assert sum(meta["tokens"].values()) == sum(len(text.encode()) + 1 for text in texts.values())
    data = TokenData(out, 16)
    assert {name: look["sha256"] for name, look in data.fingerprint().items()} == meta["sha256"]


def test_the_result_does_not_depend_on_processes_or_place(tmp_path):
    for i, jobs in enumerate((1, 2, 3)):
        root = folder_of(tmp_path / str(i) / "in", dict(reversed(many().items())) if i else many())
        prepare_text(root, f"--out={tmp_path / str(i) / 'out'}", f"--jobs={jobs}")
    first, *others = [written(tmp_path / str(i) / "out") for i in range(3)]
    assert first.keys() == {"train.bin", "val.bin", "meta.json"}
    for other in others:
        assert other["train.bin"] == first["train.bin"]
        assert other["val.bin"] == first["val.bin"]


def test_pieces_of_a_long_document_have_the_tokens_of_the_whole(tmp_path):
    text = words(20_000, seed=3)
    write_corpus(tmp_path, [Document([text], split="train"), Document(text, split="val")], STAND_IN, {"source": "s"}, 1)
    expected = [STAND_IN.eot_token, *STAND_IN.encode_ordinary(text)]
    assert {256, 257, 258, 259} <= set(expected)
    assert tokens(tmp_path, "train") == expected
    # given a character at a time
    assert tokens(tmp_path, "val") == expected


def test_text_without_a_space_is_cut_anywhere(tmp_path):
    (tmp_path / "a.txt").write_text("漢" * 5000)
    prepare_text(tmp_path / "a.txt", f"--out={tmp_path}", "--jobs=1")
    both = [t for split in ("train", "val") for t in tokens(tmp_path, split) if t != END]
    assert bytes(both).decode() == "漢" * 5000


@pytest.mark.parametrize("names", [["a"], [f"{i}" for i in range(4)]])
@pytest.mark.parametrize("split", ["train", "val"])
def test_documents_that_all_fall_into_one_split_are_cut_by_position(split, names, tmp_path):
    texts = [(f"{name}{i}", words(400, i)) for name in names for i in range(500)]
    texts = [(name, text) for name, text in texts if split_of(name, 10) == split][: len(names)]
    write_corpus(tmp_path, [Document([text], name) for name, text in texts], byte_encoding(), {"source": "s"}, 1)
    train, val = tokens(tmp_path, "train"), tokens(tmp_path, "val")
    whole = [token for _, text in texts for token in [END, *text.encode()]]
    assert train == whole[: len(whole) * 9 // 10]
    assert val == [END, *whole[len(whole) * 9 // 10 :]]
    TokenData(tmp_path, 16).fingerprint()


def start(root, out, jobs):
    command = [sys.executable, str(DATA / "text" / "prepare.py"), str(root), f"--out={out}", f"--jobs={jobs}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_stopped_preparation_leaves_no_corpus_and_the_next_one_is_the_same(jobs, number, tmp_path):
    root = folder_of(tmp_path / "in", {f"{i}.txt": words(300_000, i) for i in range(12)})
    out = tmp_path / "out"
    process = start(root, out, jobs)
    wait_for(lambda: any(path.stat().st_size for path in out.glob("*.bin.*.tmp")))
    os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
    # the end of what it prints: its workers are gone too
    printed = process.communicate(timeout=20)[0].decode()
    assert process.returncode == (130 if number == signal.SIGINT else -number), printed
    assert "Traceback" not in printed
    assert not any((out / name).exists() for name in ("train.bin", "val.bin", "meta.json"))
    prepare_text(root, f"--out={out}", "--jobs=1")
    prepare_text(root, f"--out={tmp_path / 'other'}", "--jobs=1")
    assert written(out) == written(tmp_path / "other")


MEASURE = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert not stop.code
# ru_maxrss would include the process that this one was forked from
own = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak", own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("jobs", [1, 2])
def test_memory_does_not_grow_with_the_corpus(jobs, tmp_path):
    peaks = []
    for million in (6, 60):
        root = folder_of(tmp_path / str(million), {f"{i}.txt": b"some words\n" * 9000 for i in range(million * 5)})
        (root / "long.txt").write_bytes(b"other words\n" * (million * 500_000 // 12))
        script, out = DATA / "text" / "prepare.py", tmp_path / f"out{million}"
        command = [sys.executable, "-c", MEASURE, script, root, f"--out={out}", f"--jobs={jobs}"]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks.append([int(n) >> 10 for n in re.search(r"peak (\d+) (\d+)", printed).groups()])
        assert (out / "train.bin").stat().st_size > 1.5e6 * million
    assert all(large - small < 30 for small, large in zip(*peaks)), f"{peaks} MiB"


def test_a_corpus_that_is_complete_is_left_alone(tmp_path, capsys):
    root, out = folder_of(tmp_path / "in", many(20)), tmp_path / "out"
    prepare_text(root, f"--out={out}", "--jobs=1")
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    before = written(out)
    capsys.readouterr()
    prepare_text(root, f"--out={out}", "--jobs=2")
    assert re.fullmatch(r".* is complete for .*--force.*\n", capsys.readouterr().out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times

    prepare_text(root, f"--out={out}", "--jobs=1", "--force")
    assert written(out) == before
    assert (out / "train.bin").stat().st_mtime_ns != times[out / "train.bin"]


@pytest.mark.parametrize("change", ["text", "cut", "gone", "meta"])
def test_another_source_or_a_damaged_corpus_is_prepared_again(change, tmp_path):
    root, out = folder_of(tmp_path / "in", many(20)), tmp_path / "out"
    prepare_text(root, f"--out={out}", "--jobs=1")
    before = written(out)
    if change == "text":
        (root / "long.md").write_text("another text")
    elif change == "cut":
        os.truncate(out / "train.bin", 10)
    elif change == "gone":
        (out / "val.bin").unlink()
    else:
        (out / "meta.json").write_text("[")
    prepare_text(root, f"--out={out}", "--jobs=1")
    assert (written(out) == before) == (change != "text")
    TokenData(out, 16).fingerprint()


def test_no_meta_json_describes_files_that_were_half_replaced(tmp_path, monkeypatch):
    root, out = folder_of(tmp_path / "in", many(20)), tmp_path / "out"
    prepare_text(root, f"--out={out}", "--jobs=1")
    (root / "long.md").write_text("another text")
    replace = os.replace

    def fail_for_train(source, target):
        if target.name == "train.bin":
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_for_train)
        with pytest.raises(UserError, match="No space left"):
            prepare_text(root, f"--out={out}", "--jobs=1")
    with pytest.raises(UserError, match="preparation was interrupted"):
        TokenData(out, 16)
    prepare_text(root, f"--out={out}", "--jobs=1")
    TokenData(out, 16).fingerprint()


class Deadly:
    """Ends the process that unpickles it."""

    name, n_vocab, eot_token = "deadly", 1, None

    def __reduce__(self):
        return os._exit, (1,)


def test_a_process_that_dies_is_one_line(tmp_path):
    with pytest.raises(UserError) as error:
        write_corpus(tmp_path / "out", [Document([words(2000)])] * 3, Deadly(), {"source": "s"}, 2)
    assert "--jobs" in one_line(error)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_another_preparation_writes_to_is_refused(tmp_path):
    with folder_lock(tmp_path / "out"), pytest.raises(UserError, match="another process is writing"):
        prepare_text(folder_of(tmp_path / "in", many(3)), f"--out={tmp_path / 'out'}", "--jobs=1")


def test_files_that_are_no_text_are_told_and_left_out(tmp_path, capsys):
    texts = {f"{i}.txt": words(50, i) for i in range(40)}
    other = {
        "latin.txt": "café".encode("latin-1"),
        "cut.txt": "é".encode()[:1],
        "late.txt": b"a" * 5000 + b"\xff",
        "nul.bin": b"a\0",
    }
    hidden = {".git/config": "hidden", ".env": "hidden"}
    root = folder_of(tmp_path / "in", texts | other | hidden)
    with open(os.fsencode(root) + b"/\xff.txt", "w") as f:
        f.write("of an odd name")
    out = root / "out"
    prepare_text(root, f"--out={out}", "--jobs=1")
    assert "left out that cannot be read as UTF-8 text: 4" in capsys.readouterr().out
    found = documents(out, "train") + documents(out, "val")
    assert sorted(found) == sorted([*texts.values(), "of an odd name"])
    # its own files are no input
    prepare_text(root, f"--out={out}", "--jobs=1", "--force")
    assert documents(out, "train") + documents(out, "val") == found


@pytest.mark.parametrize(
    "arguments, expected",
    [
        pytest.param(["absent"], "no file or folder absent", id="missing"),
        pytest.param([], "FILE_OR_FOLDER", id="none"),
        pytest.param(["a.txt", "--tokeniser=gpt2"], "--tokeniser=gpt2 is not an option", id="unknown"),
        pytest.param(["a.txt", "--sources=b"], "--sources=b is not an option", id="not_a_path"),
        pytest.param(["a.txt", "--tokenizer=words"], "can be bytes or gpt2", id="tokenizer"),
        pytest.param(["a.txt", "--jobs=0"], "--jobs=0 must be", id="no_jobs"),
        pytest.param(["a.txt", "--out="], "--out= is not", id="nowhere"),
        pytest.param(["a.txt", "--out=a.txt/out"], "a.txt", id="not_a_folder"),
        pytest.param(["empty.txt"], "no text in empty.txt", id="empty"),
        pytest.param(["a.txt", "folder"], None, id="fine"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder_of(tmp_path, {"a.txt": words(50), "folder/b.txt": words(50), "empty.txt": ""}))
    arguments = arguments if any(a.startswith("--out") for a in arguments) else [*arguments, "--out=out"]
    assert status_of(TEXT, [*arguments, *(["--jobs=1"] if "--jobs=0" not in arguments else [])], monkeypatch) == (
        2 if expected else 0
    )
    error = capsys.readouterr().err
    if expected:
        assert re.fullmatch(f"error: .*{re.escape(expected)}.*\n", error)
        assert not (tmp_path / "out").exists()


def test_shakespeare_char_has_the_sorted_characters_and_nanogpts_split(tmp_path):
    text = words(3000)
    (tmp_path / "mine.txt").write_bytes(text.encode())
    out = tmp_path / "out"
    CHARACTERS.main([f"--input={tmp_path / 'mine.txt'}", f"--out={out}", "--jobs=2"])
    meta = json.loads((out / "meta.json").read_text())
    assert meta["characters"] == sorted(set(text))
    assert (meta["tokenizer"], meta["vocab_size"]) == ("characters", len(set(text)))
    cut = int(len(text) * 0.9)
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        assert tokens(out, split) == [meta["characters"].index(c) for c in part]
    data = TokenData(out, 16)
    assert data.vocab_size == len(set(text))
    data.fingerprint()


def test_characters_beyond_16_bits_are_refused():
    every = [chr(i) for i in range(0x10FFFF) if not 0xD800 <= i < 0xE000]
    assert Characters(every[:65536]).encode_to_numpy("\0" + every[65535]).tolist() == [0, 65535]
    with pytest.raises(UserError, match="16 bits"):
        Characters(every[:65537])


def test_shakespeare_is_split_by_characters(tmp_path):
    text = words(3000)
    (tmp_path / "mine.txt").write_bytes(text.encode())
    SHAKESPEARE.main([f"--input={tmp_path / 'mine.txt'}", f"--out={tmp_path}", "--jobs=1"])
    cut = int(len(text) * 0.9)
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        assert tokens(tmp_path, split) == [260, *STAND_IN.encode_ordinary(part)]


def test_tinystories_are_split_as_published(tmp_path):
    stories = {"train": [f"story {i}\n\n{words(i).strip()}x" for i in range(300)], "val": ["one", "two"]}
    for split, (name, _) in TINYSTORIES.FILES.items():
        (tmp_path / name).write_bytes(f"\n{END_OF_TEXT}\n".join(stories[split]).encode() + b"\n" + END_OF_TEXT.encode())
    TINYSTORIES.main([f"--input={tmp_path}", f"--out={tmp_path}", "--jobs=1"])
    assert {split: documents(tmp_path, split, STAND_IN) for split in stories} == stories
    assert json.loads((tmp_path / "meta.json").read_text())["documents"] == 302


def test_a_file_that_is_not_tinystories_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TINYSTORIES, "LONGEST", 5000)
    for name, _ in TINYSTORIES.FILES.values():
        (tmp_path / name).write_text("a" * 10_000)
    with pytest.raises(UserError, match="not TinyStories"):
        TINYSTORIES.main([f"--input={tmp_path}", f"--out={tmp_path / 'out'}", "--jobs=1"])
    assert not (tmp_path / "out").exists()


def web_texts():
    return [f"document {i} {words(i % 30, i)}" for i in range(9000)]


def belongs_to_val(text):
    return split_of(text[:1000], 2000) == "val"


def test_openwebtext_reads_lines_of_json_and_keeps_one_document_in_2000_for_val(tmp_path):
    texts = web_texts()
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    OPENWEBTEXT.main([f"--input={tmp_path / 'a.jsonl'}", f"--out={tmp_path}", "--jobs=1"])
    assert 0 < sum(map(belongs_to_val, texts)) < 15
    for split in ("train", "val"):
        expected = [text for text in texts if belongs_to_val(text) == (split == "val")]
        assert documents(tmp_path, split, STAND_IN) == expected


@pytest.mark.parametrize("line", ["{", "[]", '{"text": 1}', '{"txt": "a"}', "\udcff"])
def test_a_line_that_is_no_document_is_refused(line, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as error:
        OPENWEBTEXT.main([f"--input={tmp_path / 'a.jsonl'}", f"--out={tmp_path / 'out'}", "--jobs=1"])
    assert str(tmp_path / "a.jsonl") in one_line(error)


def hub(rows):
    """A module `datasets` whose only dataset has these rows; an exception among or instead of them is raised."""

    def read():
        for row in rows:
            if isinstance(row, Exception):
                raise row
            yield row

    def load_dataset(name, split, streaming):
        assert (name, split, streaming) == ("Skylion007/openwebtext", "train", True)
        if isinstance(rows, Exception):
            raise rows
        return read()

    return types.SimpleNamespace(load_dataset=load_dataset)


def test_openwebtext_streams_from_the_hub(tmp_path, monkeypatch):
    texts = web_texts()
    monkeypatch.setitem(sys.modules, "datasets", hub([{"text": text} for text in texts]))
    OPENWEBTEXT.main([f"--out={tmp_path}", "--jobs=1"])
    assert documents(tmp_path, "train", STAND_IN) == [text for text in texts if not belongs_to_val(text)]


@pytest.mark.parametrize(
    "module", [None, hub(ConnectionError("no route\nto host")), hub([{"text": "a"}, OSError("late")])]
)
def test_openwebtext_without_hub_is_one_line(module, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert status_of(OPENWEBTEXT, [f"--out={tmp_path / 'out'}", "--jobs=1"], monkeypatch) == 2
    error = capsys.readouterr().err
    assert re.search("error: .*huggingface.co/datasets/Skylion007/openwebtext.*--input=FILE.*\n$", error)
    assert error.count("error:") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prepare", [SHAKESPEARE, CHARACTERS, TINYSTORIES])
def test_a_download_that_fails_says_what_to_put_where(prepare, tmp_path, monkeypatch, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/file"
        monkeypatch.setattr(prepare, "URL", url)
        monkeypatch.setattr(prepare, "HERE", tmp_path)
        assert status_of(prepare, [f"--out={tmp_path / 'out'}"], monkeypatch) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(f"error: cannot download {url}.*put it at {tmp_path}/.*\n", error)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def server():
    """(url, log of requests, settings): answers with `content`, claiming `length` bytes."""
    log, settings = [], {"content": b"a" * 3_000_000, "length": 3_000_000, "status": 200}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            log.append(self.path)
            self.send_response(settings["status"])
            self.send_header("Content-Length", str(settings["length"]))
            self.end_headers()
            self.wfile.write(settings["content"])

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{http_server.server_port}/file", log, settings
        http_server.shutdown()
        thread.join()


def test_a_download_is_whole_and_happens_once(server, tmp_path):
    url, log, _ = server
    (tmp_path / "file.1.tmp").write_text("of a killed attempt")
    for _ in range(2):
        assert fetch(url, tmp_path / "file", "3 MB").read_bytes() == b"a" * 3_000_000
    assert log == ["/file"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("change", [{"length": 3_000_001}, {"status": 404}, {"status": 503}])
def test_a_download_that_breaks_off_leaves_no_file(change, server, tmp_path):
    url, _, settings = server
    settings.update(change)
    with pytest.raises(UserError, match="cannot download"):
        fetch(url, tmp_path / "file", "3 MB")
    assert not list(tmp_path.iterdir())
