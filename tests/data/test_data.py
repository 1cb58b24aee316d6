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
from tests.helpers.runs import TINY, arguments, error_of, shared_lists, write_dataset
from trainer import data as trainer_data
from trainer.data import GPT2_VOCAB_SIZE, BatchLoader, TokenData, open_dataset

BLOCK = 8
TOKENS = [(31 * i + 5) % 65536 for i in range(5000)]  # all different


def write_tokens(folder, tokens, **meta):
    """A dataset with these tokens in both splits, and a meta.json if `meta` is given."""
    for split in ("train", "val"):
        np.asarray(tokens, "<u2").tofile(folder / f"{split}.bin")
    if meta:
        (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def data(tmp_path):
    return TokenData(write_tokens(tmp_path, TOKENS, vocab_size=65536), BLOCK)


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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_get_their_micro_batches_also_if_they_are_prefetched(world_size, device, data, monkeypatch):
    threads, moved, batch = [], [], data.batch
    monkeypatch.setattr(data, "batch", lambda *place: threads.append(threading.current_thread()) or batch(*place))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(BatchLoader, "_to_device", lambda self, pair: moved.append(self.device.type) or pair)
    for rank in range(world_size):
        world = SimpleNamespace(rank=rank, world_size=world_size)
        loader = BatchLoader({"text": data}, [("text", 0)], 7, 4, 6, torch.device(device), world)
        threads.clear()
        for step in (0, 1, 2, 9, 3):  # steps 0, 9 and 3 are not announced by the step before
            expected = [batch("train", 7, step, index, 4) for index in range(6) if index % world_size == rank]
            expected.append(batch("val", 0, 0, step, 4))
            found = [*loader.training(step), loader.validation(step)]
            assert [[x.tolist() for x in pair] for pair in found] == [[x.tolist() for x in pair] for pair in expected]
        assert threads.count(threading.main_thread()) == 5 + (3 if device == "cuda" else 5 * 6 // world_size)
    assert set(moved) == {device}


def test_a_run_trains_on_the_batches_of_its_seed_and_validates_on_the_same_ones_each_time(tmp_path, monkeypatch):
    drawn, batch, data = [], TokenData.batch, write_dataset(tmp_path / "data", 61)

    def recorded(self, *place):
        if self.folder == data:  # a thread of an earlier test may still load batches
            drawn.append(place)
        return batch(self, *place)

    monkeypatch.setattr(TokenData, "batch", recorded)
    settings = TINY | dict(dataset=data, out_dir=tmp_path / "out", seed=5, max_iters=3)
    assert train.main(arguments(settings)) == 0
    validation = [("val", 0, 0, i, 4) for i in (0, 1)]  # before step 0 and after the last one
    training = [("train", 5, step, micro, 4) for step in range(3) for micro in (0, 1)]
    assert drawn == [*validation, *training, *validation]


def test_a_fingerprint_is_taken_of_files_whose_size_or_time_changed_and_compared_with_meta_json(data, monkeypatch):
    found, path = data.fingerprint(), data.folder / "train.bin"
    stat, sha256 = path.stat(), hashlib.sha256(path.read_bytes()).hexdigest()
    assert found["train.bin"] == {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256}
    np.asarray(TOKENS[::-1], "<u2").tofile(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    changed = TokenData(data.folder, BLOCK)
    assert changed.fingerprint(found)["train.bin"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() != sha256
    changed.meta["sha256"] = {"train.bin": sha256, "val.bin": sha256}
    assert "train.bin is not the file that" in error_of(changed.fingerprint, found)
    monkeypatch.setattr(TokenData, "_check_tokens", None)  # unchanged files are not read again
    assert data.fingerprint(found) == found


@pytest.mark.parametrize("position", [0, 30, 39])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_token_outside_the_vocabulary_is_refused(split, position, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_data, "CHUNK", 16)
    tokens = [59] * 40
    TokenData(write_tokens(tmp_path, tokens, vocab_size=60), BLOCK).fingerprint()
    tokens[position] = 60
    np.asarray(tokens, "<u2").tofile(tmp_path / f"{split}.bin")
    data = TokenData(tmp_path, 39)
    expected = f"{tmp_path / split}.bin holds the token id 60, beyond the vocabulary of 60"
    assert error_of(data.fingerprint) == error_of(data.batch, split, 0, 0, 0, 1) == expected


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_token_file_that_cannot_be_used_is_refused(split, tmp_path):
    assert "stdlib" in error_of(open_dataset, "no_such_dataset", BLOCK)  # a list of those that exist
    path = write_tokens(tmp_path, [1] * 40) / f"{split}.bin"
    path.unlink()
    assert f"{path}: No such file or directory; a dataset is" in error_of(TokenData, tmp_path, BLOCK)
    for size, message in ((0, "0 bytes"), (81, "81 bytes"), (16, "8 tokens, too few for block_size=8")):
        path.write_bytes(b"\1" * size)
        assert f"{path} holds {message}" in error_of(TokenData, tmp_path, BLOCK)


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
        (
            "meta.pkl",
            b"}X\n\0\0\0vocab_size]q\0" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60)) + b"s.",
        ),
        *(("meta.pkl", pickle.dumps({"vocab_size": bad})) for bad in (shared_lists(60), 10**5000)),
        *(("meta.pkl", pickle.dumps({"vocab_size": 65, key: shared_lists(60)})) for key in ("dtype", "itos")),
        ("meta.pkl", b"\x80\x04\x95" + b"\xff" * 8 + b"}."),  # a frame larger than memory
        ("meta.pkl", b"\x80\x05\x96" + (1 << 62).to_bytes(8, "little") + b"}."),  # a bytearray larger than memory
        *(("meta.pkl", pickle.dumps(Bomb(), protocol)) for protocol in range(6)),
        *(("meta.pkl", pickle.dumps({"vocab_size": 65, "itos": [Bomb()]}, protocol)) for protocol in range(6)),
    ],
)
def test_a_damaged_or_harmful_meta_file_is_refused_and_runs_nothing(name, content, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_tokens(tmp_path, [1] * 40)
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in error_of(TokenData, tmp_path, BLOCK)
    assert not (tmp_path / "harm").exists() and capfd.readouterr().err == ""
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


@pytest.mark.parametrize("name", ["meta.json", "meta.pkl", "train.bin", "val.bin"])
def test_a_fifo_in_the_place_of_a_file_of_a_dataset_is_refused_at_once(name, tmp_path):
    write_tokens(tmp_path, [1] * 40)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    message = error_of(TokenData, tmp_path, BLOCK)
    assert str(tmp_path / name) in message and "it is not a regular file" in message


def test_a_file_that_is_shortened_while_a_run_reads_it_gets_one_line(data):
    os.truncate(data.folder / "val.bin", 100)
    data.batch("train", 1, 0, 0, 2)
    for read in (lambda: data.batch("val", 1, 0, 0, 2), data.fingerprint):
        assert f"{data.folder / 'val.bin'} has changed from" in error_of(read)
