"""Batches, how they are dealt to ranks, and datasets that are refused."""

import hashlib
import json
import os
import pickle
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from tests.helpers.runs import TINY, one_line, write_dataset
from trainer import data as trainer_data
from trainer.data import EVAL_SEED, GPT2_VOCAB_SIZE, BatchLoader, TokenData, open_dataset
from trainer.errors import UserError

BLOCK = 8
TOKENS = [(31 * i + 5) % 65536 for i in range(5000)]  # all different


def write_tokens(folder, train, val=None, meta=None):
    folder.mkdir(parents=True, exist_ok=True)
    for split, tokens in (("train", train), ("val", train if val is None else val)):
        (folder / f"{split}.bin").write_bytes(np.asarray(tokens, dtype="<u2").tobytes())
    if meta is not None:
        (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def data(tmp_path):
    return TokenData(write_tokens(tmp_path / "data", TOKENS, meta={"vocab_size": 65536}), BLOCK)


def test_batches_start_at_words_of_a_philox_keyed_by_seed_split_step_and_micro_batch(data):
    places = [(0, 0, 0), (1337, 41, 3), (2**40, 10**6, 7), (0, 0, 1)]
    calls = [(split, *place) for split in ("train", "val") for place in places]
    for rows, call in [(6, call) for call in calls] + [(11, call) for call in reversed(calls)]:  # there is no state
        entropy = np.random.SeedSequence([call[1], ["train", "val"].index(call[0]), *call[2:]])
        starts = [int(word) % (len(TOKENS) - BLOCK) for word in np.random.Philox(entropy).random_raw(rows)]
        x, y = data.batch(*call, rows)
        assert x.dtype == y.dtype == torch.int64
        assert x.tolist() == [TOKENS[start : start + BLOCK] for start in starts]
        assert y.tolist() == [TOKENS[start + 1 : start + BLOCK + 1] for start in starts]
    first = data.batch("train", 1337, 0, 0, 6)[0][:, 0].tolist()
    assert [TOKENS.index(token) for token in first] == [2587, 619, 3917, 4369, 1333, 3767]  # recorded


@pytest.mark.parametrize("positions", [1, 3])
def test_batches_reach_every_start_and_the_last_token(positions, tmp_path):
    data = TokenData(write_tokens(tmp_path, range(BLOCK + positions)), BLOCK)
    x, y = data.batch("train", 0, 0, 0, 60)
    assert set(x[:, 0].tolist()) == set(range(positions))
    assert y.max() == BLOCK + positions - 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_get_their_micro_batches_also_if_they_are_prefetched(world_size, device, data, monkeypatch):
    threads, moved, batch = [], [], data.batch
    monkeypatch.setattr(data, "batch", lambda *place: threads.append(threading.current_thread()) or batch(*place))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(BatchLoader, "_to_device", lambda self, pair: moved.append(self.device.type) or pair)
    for rank in range(world_size):
        loader = BatchLoader(data, 7, 4, 6, torch.device(device), SimpleNamespace(rank=rank, world_size=world_size))
        threads.clear()
        for step in (0, 1, 2, 9, 3):  # steps 0, 9 and 3 are not announced by the step before
            expected = [batch("train", 7, step, index, 4) for index in range(6) if index % world_size == rank]
            expected.append(batch("val", EVAL_SEED, 0, step, 4))
            found = [*loader.training(step), loader.validation(step)]
            assert len(found) == len(expected)
            assert all(torch.equal(a, b) for pairs in zip(found, expected) for a, b in zip(*pairs))
        assert threads.count(threading.main_thread()) == 5 + (3 if device == "cuda" else 5 * 6 // world_size)
    assert set(moved) == {device}


def test_every_evaluation_of_a_run_uses_the_same_validation_batches(tmp_path, monkeypatch):
    drawn, batch = [], TokenData.batch
    monkeypatch.setattr(TokenData, "batch", lambda self, *place: drawn.append(place) or batch(self, *place))
    settings = TINY | dict(dataset=write_dataset(tmp_path / "data", 61), out_dir=tmp_path / "out", seed=5)
    assert train.main([f"--{key}={value}" for key, value in settings.items()]) == 0
    evaluated = [place for place in drawn if place[0] == "val"]
    assert evaluated == [("val", 0, 0, i, TINY["batch_size"]) for i in range(2)] * 3  # at steps 0, 3 and 6
    assert drawn[2:4] == [("train", 5, 0, micro, TINY["batch_size"]) for micro in range(2)]


def test_a_fingerprint_is_taken_of_files_whose_size_or_time_changed_and_compared_with_meta_json(data, monkeypatch):
    found, path = data.fingerprint(), data.folder / "train.bin"
    stat, sha256 = path.stat(), hashlib.sha256(path.read_bytes()).hexdigest()
    assert found["train.bin"] == {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256}
    write_tokens(data.folder, TOKENS[::-1], TOKENS, {"vocab_size": 65536, "sha256": {"val.bin": sha256}})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    changed = TokenData(data.folder, BLOCK)
    assert changed.fingerprint(found)["train.bin"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() != sha256
    changed.meta["sha256"]["train.bin"] = sha256
    with pytest.raises(UserError, match=r"train.bin is not the file that .*meta.json describes"):
        changed.fingerprint(found)
    monkeypatch.setattr(TokenData, "_check_tokens", None)  # unchanged files are not read again
    assert data.fingerprint(found) == found


@pytest.mark.parametrize("position", [0, 30, 39])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_token_outside_the_vocabulary_is_refused(split, position, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_data, "CHUNK", 16)
    tokens = [59] * 40
    folder = write_tokens(tmp_path, tokens, meta={"vocab_size": 60})
    TokenData(folder, BLOCK).fingerprint()
    tokens[position] = 60
    np.asarray(tokens, "<u2").tofile(folder / f"{split}.bin")
    for read in (lambda data: data.fingerprint(), lambda data: data.batch(split, 0, 0, 0, 1)):
        with pytest.raises(UserError, match=f"{folder / split}.bin holds the token id 60, .* vocabulary of 60"):
            read(TokenData(folder, 39))


def test_a_missing_dataset_is_refused_with_a_list_of_those_that_exist():
    with pytest.raises(UserError, match=r"no_such_dataset.*stdlib"):
        open_dataset("no_such_dataset", BLOCK)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    "content, expected",
    [
        (None, "a dataset is train.bin and val.bin"),
        (b"", "0 bytes"),
        (b"\1\0" * 40 + b"\1", "81 bytes"),
        (b"\1\0" * BLOCK, f"{BLOCK} tokens, too few for block_size={BLOCK}"),
    ],
)
def test_a_token_file_that_cannot_be_used_is_refused(split, content, expected, tmp_path):
    path = write_tokens(tmp_path, [1] * 40) / f"{split}.bin"
    TokenData(tmp_path, BLOCK)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError) as error:
        TokenData(tmp_path, BLOCK)
    assert str(path) in one_line(error) and expected in str(error.value)


class Bomb:
    """Creates the folder `harm` when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    "name, content",
    [
        *(("meta.json", bad) for bad in (b"", b'{"vocab_size": 65', b"\xff\xfe", b"[65]", b"{}")),
        *(("meta.json", b'{"vocab_size": %s}' % bad) for bad in (b'"65"', b"null", b"true", b"0", b"65537")),
        ("meta.json", b'{"vocab_size": 65, "dtype": "uint32"}'),
        *(("meta.pkl", bad) for bad in (b"", pickle.dumps({"vocab_size": 65})[:-4], pickle.dumps([65]), b"}Na.")),
        *(("meta.pkl", bad) for bad in (b"}]Ns.", b"cone\ntwo\n.", b"\x80\x04\x8c\x03a\nb\x8c\x01c\x93.")),
        ("meta.pkl", b"\x80\x04\x95" + b"\xff" * 8 + b"}."),  # a frame larger than memory
        *(("meta.pkl", pickle.dumps(Bomb(), protocol)) for protocol in range(6)),
        *(("meta.pkl", pickle.dumps({"vocab_size": 65, "itos": [Bomb()]}, protocol)) for protocol in range(6)),
    ],
)
def test_a_damaged_or_harmful_meta_file_is_refused_and_runs_nothing(name, content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tokens(tmp_path, [1] * 40)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        TokenData(tmp_path, BLOCK)
    assert str(tmp_path / name) in one_line(error)
    assert not (tmp_path / "harm").exists()
    if b"harm" in content:
        pickle.loads(content)
        assert (tmp_path / "harm").exists()


def test_nanogpts_meta_pkl_gives_the_vocabulary(tmp_path):
    write_tokens(tmp_path, [1] * 40)
    assert TokenData(tmp_path, BLOCK).vocab_size == GPT2_VOCAB_SIZE == 50304
    meta = {"vocab_size": 65, "itos": {0: "\n", 1: "a"}, "stoi": {"\n": 0, "a": 1}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    data = TokenData(tmp_path, BLOCK)
    assert (data.meta, data.vocab_size) == (meta, 65)
