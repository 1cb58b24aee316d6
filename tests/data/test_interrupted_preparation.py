"""A preparation that is interrupted anywhere leaves the old dataset, the new one, or one that is refused."""

import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import sysconfig
import threading
import time

import pytest

from data import corpus
from data.corpus import Document, write_corpus
from data.tokenizer import CharacterCodec
from tests.helpers.runs import error_of, write_dataset
from trainer import data as trainer_data
from trainer.data import DATA, GPT2_VOCAB_SIZE, TokenData, load_prepare, open_dataset
from trainer.errors import UserError
from trainer.lock import folder_lock

BLOCK = 8
TEXT, STDLIB = (load_prepare(DATA / name / "prepare.py") for name in ("text", "stdlib"))
PREPARERS = {"text": lambda out, root: TEXT.main([str(root), f"--out={out}", "--jobs=1"]), "stdlib": STDLIB.prepare}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Python files, some for each split."""
    root = tmp_path_factory.mktemp("root")
    for i in range(30):
        (root / f"module_{i}.py").write_text(f"def f{i}():\n    return {i**7}\n")
    return root


def write_old(out, kind):
    """An old dataset: with meta.json, with nanoGPT's meta.pkl, without either, or none at all."""
    if kind != "none":
        write_dataset(out, 50)
    if kind in ("pkl", "no_meta"):
        (out / "meta.json").unlink()
    if kind == "pkl":
        (out / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 50, "stoi": {"a": 0}, "itos": {0: "a"}}))
    return out


def seen(folder):
    """(vocabulary, tokens of train, tokens of val) that training reads, or the error message."""
    try:
        data = open_dataset(str(folder), BLOCK)
        data.fingerprint()
        return data.vocab_size, *(data.tokens[split].tobytes() for split in ("train", "val"))
    except UserError as e:
        return str(e)


def killed_before(operation, action):
    """Run action() in a process that ends before its n-th change of a name or wait for the disk; whether it did."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        count = itertools.count(1)
        for name in ("replace", "fsync", "unlink", "open"):
            original = getattr(os, name)

            def call(*args, original=original, **options):
                return os._exit(9) if next(count) == operation else original(*args, **options)

            setattr(os, name, call)
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.mark.parametrize("name, kind", [("text", "json"), ("text", "no_meta"), ("text", "pkl"), ("stdlib", "none")])
def test_a_killed_preparation_leaves_the_old_dataset_the_new_one_or_a_refusal(name, kind, root, tmp_path):
    before = seen(write_old(tmp_path / "old", kind))
    assert kind == "none" or before[0] == (GPT2_VOCAB_SIZE if kind == "no_meta" else 50)
    PREPARERS[name](tmp_path / "new", root)
    after = seen(tmp_path / "new")
    assert after[0] == 257
    kinds, operation, killed = [], 0, True
    while killed:
        operation += 1
        out = write_old(tmp_path / str(operation), kind)
        killed = killed_before(operation, lambda out=out: PREPARERS[name](out, root))
        found = seen(out)
        assert found in (before, after) or "preparation was interrupted; prepare it again" in found or kind == "none"
        kinds.append("old" if found == before else "new" if found == after else "refused")
        PREPARERS[name](out, root)  # leaves a complete dataset and nothing else
        assert seen(out) == after
        assert len([*out.glob("*.bin"), *out.glob("meta.json")]) == 3 and not [*out.glob("*.tmp")]
    assert operation > 10 and kinds == sorted(kinds, key=("old", "refused", "new").index)
    assert set(kinds) == {"refused", "new"} | ({"old"} if kind != "none" else set())


def test_what_a_killed_forced_preparation_left_beside_a_complete_dataset_is_removed_by_the_next_one(root, tmp_path):
    PREPARERS["text"](tmp_path, root)
    before, left = sorted(os.listdir(tmp_path)), tmp_path / "train.bin.1.tmp"
    left.write_bytes(b"half")
    with folder_lock(tmp_path):
        PREPARERS["text"](tmp_path, root)
        assert left.exists()  # its process may be alive
    PREPARERS["text"](tmp_path, root)
    assert sorted(os.listdir(tmp_path)) == before


def test_files_are_on_the_disk_before_they_replace_others_in_a_safe_order(root, tmp_path, monkeypatch):
    synced, replaced, fsync, replace = [], [], os.fsync, os.replace

    def logged_fsync(handle):
        synced.append(os.fstat(handle).st_ino)
        if synced[-1] == tmp_path.stat().st_ino:
            replaced.append("sync")
        fsync(handle)

    def logged_replace(source, target):
        assert source.stat().st_ino in synced
        replaced.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    PREPARERS["text"](tmp_path, root)
    assert replaced == ["meta.json", "sync", "train.bin", "val.bin", "sync", "meta.json", "sync"]


def full_disk():
    raise OSError(28, "No space left on device")


def kill_workers():
    for worker in multiprocessing.active_children():
        worker.kill()


@pytest.mark.parametrize(("harm", "jobs", "expected"), [(full_disk, 1, "No space left"), (kill_workers, 2, "--jobs")])
def test_an_error_while_tokens_are_written_leaves_the_old_dataset(harm, jobs, expected, tmp_path, monkeypatch):
    def documents():
        for _ in range(9):
            yield Document(["a" * 1000], "train")
            harm()

    monkeypatch.setattr(corpus, "PIECE", 1000)
    out, codec = write_old(tmp_path / "out", "json"), CharacterCodec.from_list(["a"])
    before = seen(out)
    assert expected in error_of(write_corpus, out, documents(), codec, {"source": "s"}, jobs=jobs)
    assert seen(out) == before


@pytest.mark.parametrize("name", PREPARERS)
def test_a_second_preparation_at_once_is_refused_and_changes_nothing(name, root, tmp_path):
    out = write_old(tmp_path / "out", "json")
    before = seen(out)
    with folder_lock(out):
        message = error_of(PREPARERS[name], out, root)
    assert message.startswith("another process is writing to ") and "--out" in message and seen(out) == before


def test_a_dataset_that_is_replaced_while_it_is_being_opened_is_refused(root, tmp_path, monkeypatch):
    out, open_file, prepared = write_old(tmp_path / "out", "no_meta"), TokenData._open, []

    def prepare_first(self, split):
        prepared or prepared.append(PREPARERS["text"](out, root))
        return open_file(self, split)

    monkeypatch.setattr(TokenData, "_open", prepare_first)
    assert "prepared again while it was being opened" in seen(out)
    assert seen(out)[0] == 257


def test_processes_that_need_an_interrupted_stdlib_at_once_prepare_it_once(root, tmp_path, monkeypatch, capsys):
    stdlib, opened = write_old(tmp_path / "stdlib", "json"), []
    (stdlib / "meta.json").write_text('{"incomplete": "being written"}')
    shutil.copy(DATA / "stdlib" / "prepare.py", stdlib)
    paths = sysconfig.get_paths() | {"stdlib": str(root)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    monkeypatch.setattr(trainer_data, "DATA", tmp_path)
    threads = [threading.Thread(target=lambda: opened.append(open_dataset("stdlib", BLOCK))) for _ in range(3)]
    with folder_lock(stdlib):
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        assert not opened and "interrupted" in seen(stdlib)
    for thread in threads:
        thread.join(20)
    assert len(opened) == 3 and {data.vocab_size for data in opened} == {257}
    assert capsys.readouterr().out.count("prepared Python") == 1
