"""A preparation that is killed at any step leaves the old dataset, the new one, or one that is refused."""

import functools
import json
import os
import pickle
import shutil
import signal
import sysconfig
import threading
import time

import numpy as np
import pytest

from trainer import data as trainer_data
from trainer.corpus import replace_dataset
from trainer.data import DATA, GPT2_VOCAB_SIZE, load_prepare, open_dataset
from trainer.errors import UserError
from trainer.lock import folder_lock

TEXT, STDLIB = (load_prepare(DATA / name / "prepare.py") for name in ("text", "stdlib"))
BLOCK = 8
TOKENS = 400  # of the old dataset, per split
KILLED = 9


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Python files, some of which fall into each split."""
    root = tmp_path_factory.mktemp("root")
    for i in range(30):
        (root / f"module_{i}.py").write_text(f"def f{i}():\n    return {i**7}\n")
    return root


def prepare_text(out, root):
    TEXT.main([str(root), f"--out={out}", "--jobs=1", "--force"])


def old_dataset(out, kind):
    """An old dataset in `out`: another corpus, nanoGPT's files with or without a meta.pkl, or none."""
    if kind == "empty":
        return
    out.mkdir()
    for split in ("train", "val"):
        np.full(TOKENS, 40 if split == "train" else 30, dtype="<u2").tofile(out / f"{split}.bin")
    if kind == "whole":
        (out / "meta.json").write_text(json.dumps({"vocab_size": 50}))
    if kind == "nanogpt_characters":
        (out / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 50, "stoi": {"a": 0}, "itos": {0: "a"}}))


def seen(folder):
    """(vocabulary, tokens of train, tokens of val) as training sees them, or the refusal, which is one line."""
    try:
        data = open_dataset(str(folder), BLOCK)
        data.fingerprint()
        return data.vocab_size, *(data.tokens[split].tobytes() for split in ("train", "val"))
    except UserError as e:
        assert "\n" not in str(e)
        return str(e)


def killed_before(operation, action):
    """Run action() in a process that ends before its n-th change of a file's name or wait for the disk.

    Returns whether it was killed; if not, it came to its end.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        signal.alarm(60)
        try:
            count = [0]

            def counting(function):
                def call(*args, **options):
                    count[0] += 1
                    if count[0] == operation:
                        os._exit(KILLED)
                    return function(*args, **options)

                return call

            for name in ("replace", "fsync", "unlink", "open"):
                setattr(os, name, counting(getattr(os, name)))
            action()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, KILLED)
    return status == KILLED


@pytest.mark.parametrize(
    "prepare, kind",
    [(prepare_text, "whole"), (prepare_text, "nanogpt")]
    + [(STDLIB.prepare, kind) for kind in ("whole", "empty", "nanogpt_characters")],
)
def test_a_killed_preparation_leaves_the_old_dataset_the_new_one_or_a_refusal(prepare, kind, root, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old_dataset(old, kind)
    before = seen(old)
    assert kind == "empty" or before[0] == (GPT2_VOCAB_SIZE if kind == "nanogpt" else 50)
    prepare(new, root)
    after = seen(new)
    assert after[0] == 257
    found, operation, killed = [], 0, True
    while killed:
        operation += 1
        out = tmp_path / str(operation)
        old_dataset(out, kind)
        killed = killed_before(operation, functools.partial(prepare, out, root))
        found.append(seen(out))
        assert found[-1] in (before, after) or "preparation was interrupted" in found[-1] or kind == "empty"
        # another attempt makes it whole, and leaves nothing else
        prepare(out, root)
        assert seen(out) == after
        names = {path.name for path in out.iterdir() if not path.name.startswith(".lock")}
        assert names - {"meta.pkl"} == {"train.bin", "val.bin", "meta.json"}
    assert operation > 10
    kinds = [("old", "new", "refused")[0 if f == before else 1 if f == after else 2] for f in found]
    assert kinds == sorted(kinds, key=("old", "refused", "new").index)  # in this order, and never back
    assert set(kinds) == {"refused", "new"} | ({"old"} if kind != "empty" else set())


@pytest.mark.parametrize("moved", [0, 1])
def test_an_error_while_the_files_are_moved_leaves_a_refusal(moved, root, tmp_path, monkeypatch):
    out, replace = tmp_path / "out", os.replace
    old_dataset(out, "whole")

    def fail(source, target):
        if target.suffix == ".bin":
            fail.count += 1
            if fail.count > moved:
                raise OSError(5, "Input/output error")
        replace(source, target)

    fail.count = 0
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="Input/output error"):
        prepare_text(out, root)
    monkeypatch.undo()
    assert "preparation was interrupted; prepare it again" in seen(out)
    # the folder needs no --force, whatever its files look like
    TEXT.main([str(root), f"--out={out}", "--jobs=1"])
    assert seen(out)[0] == 257


def test_an_error_while_the_tokens_are_written_leaves_the_old_dataset(tmp_path):
    old_dataset(tmp_path / "out", "whole")
    before = seen(tmp_path / "out")

    def write(files):
        files["train"].write(b"\1\0" * 100)
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        replace_dataset(tmp_path / "out", write)
    assert seen(tmp_path / "out") == before


def test_a_dataset_that_is_replaced_while_it_is_opened_is_refused(root, tmp_path, monkeypatch):
    """meta.json is read, the files are replaced, and only then opened."""
    out = tmp_path / "out"
    old_dataset(out, "nanogpt")
    open_file, calls = trainer_data.TokenData._open, []

    def prepared_first(self, split):
        if not calls:
            calls.append(prepare_text(out, root))
        return open_file(self, split)

    monkeypatch.setattr(trainer_data.TokenData, "_open", prepared_first)
    assert "prepared again while it was opened" in seen(out)
    assert seen(out)[0] == 257


@pytest.fixture
def stdlib(root, tmp_path, monkeypatch):
    """A folder data/stdlib whose corpus is made of `root`."""
    folder = tmp_path / "data" / "stdlib"
    folder.mkdir(parents=True)
    shutil.copy(DATA / "stdlib" / "prepare.py", folder)
    monkeypatch.setattr(trainer_data, "DATA", tmp_path / "data")
    paths = sysconfig.get_paths()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths | {"stdlib": str(root)})
    return folder


def test_stdlib_is_prepared_again_after_an_interrupted_preparation(stdlib, root, capsys):
    operation, refused = 0, 0
    while killed_before(operation := operation + 1, lambda: STDLIB.prepare(stdlib, root)):
        refused += (stdlib / "meta.json").exists() and "interrupted" in seen(stdlib)
        assert open_dataset("stdlib", BLOCK).vocab_size == 257
        assert "prepared Python" in capsys.readouterr().out or "train.bin" not in seen(stdlib)
        for name in ("train.bin", "val.bin", "meta.json"):
            (stdlib / name).unlink()
    assert refused >= 3


def test_of_two_preparations_of_stdlib_at_once_one_waits_and_takes_what_the_other_wrote(stdlib, root, capsys):
    opened = []
    threads = [threading.Thread(target=lambda: opened.append(open_dataset("stdlib", BLOCK))) for _ in range(3)]
    with folder_lock(stdlib):
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        assert not opened and not (stdlib / "meta.json").exists()
    for thread in threads:
        thread.join(20)
    assert len({data.tokens["train"].tobytes() for data in opened}) == 1 and len(opened) == 3
    assert capsys.readouterr().out.count("prepared Python") == 1


@pytest.mark.parametrize("prepare", [prepare_text, STDLIB.prepare], ids=["corpus", "stdlib"])
def test_a_second_preparation_is_refused_and_changes_nothing(prepare, root, tmp_path):
    out = tmp_path / "out"
    old_dataset(out, "whole")
    before = seen(out)
    with folder_lock(out), pytest.raises(UserError, match="another process is writing to") as error:
        prepare(out, root)
    assert "\n" not in str(error.value)
    assert seen(out) == before
