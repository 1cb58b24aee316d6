"""A preparation that is interrupted anywhere leaves the old dataset, the new one, or one that is refused."""

import os
import pickle
import shutil
import signal
import sysconfig
import threading
import time

import pytest

from data.corpus import Document, write_corpus
from data.tokenizer import CharacterCodec
from tests.data.builders import BLOCK, prepare, prepare_text, write_files, write_tokens
from trainer import data as trainer_data
from trainer.data import DATA, GPT2_VOCAB_SIZE, TokenData, open_dataset
from trainer.errors import UserError
from trainer.lock import folder_lock

FILES = ("train.bin", "val.bin", "meta.json")
KILLED = 9
PREPARERS = {"text": lambda out, root: prepare_text(root, f"--out={out}"), "stdlib": prepare.stdlib.prepare}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Python files, some for each split."""
    texts = {f"module_{i}.py": f"def f{i}():\n    return {i**7}\n" for i in range(30)}
    return write_files(tmp_path_factory.mktemp("root"), texts)


def write_old(out, kind):
    """An old dataset: with meta.json, with nanoGPT's meta.pkl, without either, or none at all."""
    if kind != "none":
        write_tokens(out, [40] * 400, [30] * 400, {"vocab_size": 50} if kind == "json" else None)
    if kind == "pkl":
        (out / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 50, "stoi": {"a": 0}, "itos": {0: "a"}}))


def seen(folder):
    """(vocabulary, tokens of train, tokens of val) that training reads, or the error message, which is one line."""
    try:
        data = open_dataset(str(folder), BLOCK)
        data.fingerprint()
        return data.vocab_size, *(data.tokens[split].tobytes() for split in ("train", "val"))
    except UserError as e:
        assert "\n" not in str(e)
        return str(e)


def killed_before(operation, action):
    """Run action() in a process that ends before its n-th change of a name or wait for the disk; whether it did."""
    pid = os.fork()
    if pid == 0:
        status, count = 1, 0
        signal.alarm(60)

        def counting(function):
            def call(*args, **options):
                nonlocal count
                count += 1
                if count == operation:
                    os._exit(KILLED)
                return function(*args, **options)

            return call

        try:
            for name in ("replace", "fsync", "unlink", "open"):
                setattr(os, name, counting(getattr(os, name)))
            action()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, KILLED)
    return status == KILLED


@pytest.mark.parametrize("name, kind", [("text", "json"), ("text", "no_meta"), ("text", "pkl"), ("stdlib", "none")])
def test_a_killed_preparation_leaves_the_old_dataset_the_new_one_or_a_refusal(name, kind, root, tmp_path):
    write_old(tmp_path / "old", kind)
    before = seen(tmp_path / "old")
    assert kind == "none" or before[0] == (GPT2_VOCAB_SIZE if kind == "no_meta" else 50)
    PREPARERS[name](tmp_path / "new", root)
    after = seen(tmp_path / "new")
    assert after[0] == 257
    kinds, operation, killed = [], 0, True
    while killed:
        operation += 1
        out = tmp_path / str(operation)
        write_old(out, kind)
        killed = killed_before(operation, lambda out=out: PREPARERS[name](out, root))
        found = seen(out)
        assert found in (before, after) or "preparation was interrupted; prepare it again" in found or kind == "none"
        kinds.append("old" if found == before else "new" if found == after else "refused")
        PREPARERS[name](out, root)  # leaves a complete dataset and nothing else
        assert seen(out) == after
        assert {path.name for path in out.iterdir()} - {".lock", ".lock.holder", "meta.pkl"} == set(FILES)
    assert operation > 10
    assert kinds == sorted(kinds, key=("old", "refused", "new").index)
    assert set(kinds) == {"refused", "new"} | ({"old"} if kind != "none" else set())


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


def test_an_error_while_tokens_are_written_leaves_the_old_dataset(tmp_path):
    def documents():
        yield Document(["a" * 100], "train")
        raise OSError(28, "No space left on device")

    write_old(tmp_path, "json")
    before = seen(tmp_path)
    with pytest.raises(UserError, match="No space left"):
        write_corpus(tmp_path, documents(), CharacterCodec.from_list(["a"]), {"source": "s"})
    assert seen(tmp_path) == before


def test_a_dataset_that_is_replaced_while_it_is_being_opened_is_refused(root, tmp_path, monkeypatch):
    write_old(tmp_path, "no_meta")
    open_file, prepared = TokenData._open, []

    def prepare_first(self, split):
        prepared or prepared.append(PREPARERS["text"](tmp_path, root))
        return open_file(self, split)

    monkeypatch.setattr(TokenData, "_open", prepare_first)
    assert "prepared again while it was being opened" in seen(tmp_path)
    assert seen(tmp_path)[0] == 257


@pytest.fixture
def stdlib(root, tmp_path, monkeypatch):
    """A folder data/stdlib whose corpus is made from `root`."""
    (tmp_path / "stdlib").mkdir()
    shutil.copy(DATA / "stdlib" / "prepare.py", tmp_path / "stdlib")
    monkeypatch.setattr(trainer_data, "DATA", tmp_path)
    paths = sysconfig.get_paths() | {"stdlib": str(root)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    return tmp_path / "stdlib"


def test_an_interrupted_stdlib_is_prepared_again_on_first_use(stdlib, capsys):
    write_tokens(stdlib, [1] * 40, meta={"incomplete": "being written"})
    for expected in ("prepared Python", ""):
        assert open_dataset("stdlib", BLOCK).vocab_size == 257
        assert capsys.readouterr().out.startswith(expected)


def test_processes_that_need_stdlib_at_once_prepare_it_once(stdlib, capsys):
    opened = []
    threads = [threading.Thread(target=lambda: opened.append(open_dataset("stdlib", BLOCK))) for _ in range(3)]
    with folder_lock(stdlib):
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        assert not opened and not (stdlib / "meta.json").exists()
    for thread in threads:
        thread.join(20)
    assert len(opened) == 3 and len({data.tokens["train"].tobytes() for data in opened}) == 1
    assert capsys.readouterr().out.count("prepared Python") == 1


@pytest.mark.parametrize("name", PREPARERS)
def test_a_second_preparation_at_once_is_refused_and_changes_nothing(name, root, tmp_path):
    write_old(tmp_path, "json")
    before = seen(tmp_path)
    with folder_lock(tmp_path), pytest.raises(UserError, match=r"another process is writing to [^\n]*--out"):
        PREPARERS[name](tmp_path, root)
    assert seen(tmp_path) == before
