"""The corpus that prepare.py writes, the batches cut from it, and files that are not what they should be."""

import hashlib
import itertools
import json
import os
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import train
from trainer.data import DATA, EVAL_SEED, GPT2_VOCAB_SIZE, Prefetcher, TokenData, load_prepare, open_dataset
from trainer.errors import UserError
from trainer.tokenizer import END_OF_TEXT, byte_encoding

PREPARE = load_prepare(DATA / "stdlib" / "prepare.py")
END = 256
BLOCK = 8


def one_line(error):
    message = str(error.value)
    assert message
    assert "\n" not in message, message
    return message


def source_tree(root, order=0):
    """{name: bytes} of the files that belong into the corpus; others lie beside them. Written in a shuffled order."""
    rng = np.random.default_rng(order)
    texts = [
        f"def f{i}():\n    return {i**7}  # h\u00e9t\u00e9rog\u00e8ne \u6f22\u5b57 \U0001f600\n".encode()
        for i in range(60)
    ]
    kept = {f"module_{i}.py": text for i, text in enumerate(texts)}
    kept |= {
        "package/__init__.py": b"",
        "package/windows.py": b"a = 1\r\nb = 2\r\n\r\n",
        "package/special.py": f"mark = '{END_OF_TEXT}'\n".encode(),
        "package/marked.py": b"\xef\xbb\xbfa = 1\n",
        "package/no_newline.py": b"x = '" + b"y" * 3000 + b"'\t\x00\x7f",
        "package/latest.py": b"a name that begins like tests\n",
    }
    left_out = {
        "test/test_a.py": b"left out",
        "tests/a.py": b"left out",
        "package/tests/b.py": b"left out",
        "package/test/deep/c.py": b"left out",
        "idlelib/idle_test/d.py": b"left out",
        "site-packages/numpy/e.py": b"left out",
        "lib/dist-packages/f.py": b"left out",
        "package/__pycache__/g.py": b"left out",
        "package/latin.py": "caf\u00e9 left out\n".encode("latin-1"),
        "package/notes.txt": b"left out",
    }
    files = list((kept | left_out).items())
    for i in rng.permutation(len(files)):
        name, content = files[i]
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return kept


def written(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


def documents(content):
    """The byte strings between the end-of-text tokens of a .bin file."""
    tokens = np.frombuffer(content, dtype="<u2").tolist()
    assert tokens[0] == END
    starts = [i for i, token in enumerate(tokens) if token == END] + [len(tokens)]
    encoding = byte_encoding()
    return [encoding.decode_bytes(tokens[a + 1 : b]) for a, b in itertools.pairwise(starts)]


def belongs_to_val(name):
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 10 == 0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root, out = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("out") / "new" / "folder"
    kept = source_tree(root)
    PREPARE.prepare(out, root)
    return root, out, kept


def test_the_corpus_is_the_source_files_bytes_sorted_by_name(corpus):
    _, out, kept = corpus
    files = written(out)
    assert files.keys() == {"train.bin", "val.bin", "meta.json"}
    for split in ("train", "val"):
        names = sorted(name for name in kept if belongs_to_val(name) == (split == "val"))
        assert len(names) > 1
        assert documents(files[f"{split}.bin"]) == [kept[name] for name in names]
    assert b"left out" not in np.frombuffer(files["train.bin"] + files["val.bin"], "<u2").astype(np.uint8).tobytes()


def test_meta_json_describes_the_files_beside_it(corpus):
    _, out, kept = corpus
    meta = json.loads((out / "meta.json").read_bytes())
    assert meta["vocab_size"] == 257
    assert meta["dtype"] == "uint16"
    for split in ("train", "val"):
        content = (out / f"{split}.bin").read_bytes()
        assert meta["sha256"][f"{split}.bin"] == hashlib.sha256(content).hexdigest()
        assert meta["tokens"][split] * 2 == len(content)
    total = sum(len(content) + 1 for content in kept.values())
    assert sum(meta["tokens"].values()) == total


def test_meta_json_counts_the_files_that_are_in_the_corpus(corpus):
    _, out, kept = corpus
    assert json.loads((out / "meta.json").read_bytes())["files"] == len(kept)


def test_preparing_twice_gives_the_same_bytes(corpus, tmp_path):
    root, out, _ = corpus
    PREPARE.prepare(tmp_path / "again", root)
    assert written(tmp_path / "again") == written(out)
    # another order of creation, another place
    source_tree(tmp_path / "elsewhere" / "tests" / "root", order=1)
    PREPARE.prepare(tmp_path / "third", tmp_path / "elsewhere" / "tests" / "root")
    assert written(tmp_path / "third") == written(out)


def test_a_files_split_does_not_depend_on_its_content_or_its_neighbours(corpus, tmp_path):
    _, out, kept = corpus
    root = tmp_path / "root"
    # every file holds its own name, and a third of them are gone
    for name in sorted(kept)[::3] + sorted(kept)[1::3]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    PREPARE.prepare(tmp_path / "out", root)
    was_in_val = set(documents((out / "val.bin").read_bytes()))
    is_in_val = {name.decode() for name in documents((tmp_path / "out" / "val.bin").read_bytes())}
    remaining = {path.relative_to(root).as_posix() for path in root.rglob("*.py")}
    assert is_in_val
    assert is_in_val == {name for name in remaining if kept[name] in was_in_val}


@pytest.mark.parametrize("root", ["absent", "empty", "only_tests"])
def test_a_root_without_source_is_refused_and_writes_nothing(root, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "only_tests" / "tests").mkdir(parents=True)
    (tmp_path / "only_tests" / "tests" / "a.py").write_text("a = 1")
    with pytest.raises(UserError) as error:
        PREPARE.prepare(tmp_path / "out", tmp_path / root)
    assert str(tmp_path / root) in one_line(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_is_refused(out, corpus, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError) as error:
        PREPARE.prepare(tmp_path / out, corpus[0])
    assert str(tmp_path / out) in one_line(error)
    assert (tmp_path / "file").read_text() == "in the way"


def write_tokens(folder, train_tokens, val_tokens=None, meta=None):
    folder.mkdir(parents=True, exist_ok=True)
    val_tokens = train_tokens if val_tokens is None else val_tokens
    for split, tokens in (("train", train_tokens), ("val", val_tokens)):
        (folder / f"{split}.bin").write_bytes(np.asarray(tokens, dtype="<u2").tobytes())
    if meta is not None:
        (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def counting(tmp_path):
    """Token i of both splits is i, so that a row's first token is its start."""
    return TokenData(write_tokens(tmp_path / "counting", range(5000), meta={"vocab_size": 65536}), BLOCK)


def philox(key, counter):
    """Philox4x64-10 (Salmon et al. 2011) of one 256-bit counter: four 64-bit words."""
    mask = 2**64 - 1
    words, (k0, k1) = [counter >> 64 * i & mask for i in range(4)], key
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [(b >> 64) ^ words[1] ^ k0, b & mask, (a >> 64) ^ words[3] ^ k1, a & mask]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return words


def starts_of(split, seed, step, micro, rows, positions):
    entropy = [seed, ["train", "val"].index(split), step, micro]
    key = [int(word) for word in np.random.SeedSequence(entropy).generate_state(2, np.uint64)]
    words = [word for block in range(1, rows // 4 + 2) for word in philox(key, block)]
    return [word % positions for word in words[:rows]]


@pytest.mark.parametrize("split", ["train", "val"])
def test_starts_are_words_of_a_philox_keyed_by_seed_split_step_and_micro_batch(split, counting):
    for seed, step, micro in [(0, 0, 0), (1337, 41, 3), (2**40, 10**6, 7)]:
        x, y = counting.batch(split, seed, step, micro, 6)
        starts = starts_of(split, seed, step, micro, 6, 5000 - BLOCK)
        assert x.dtype == y.dtype == torch.int64
        assert x.tolist() == [list(range(start, start + BLOCK)) for start in starts]
        assert y.tolist() == [list(range(start + 1, start + BLOCK + 1)) for start in starts]


def test_starts_are_the_recorded_ones(counting):
    # so that a run of today repeats under another numpy
    assert counting.batch("train", 1337, 0, 0, 6)[0][:, 0].tolist() == [2587, 619, 3917, 4369, 1333, 3767]


def test_targets_are_the_inputs_shifted_by_one(tmp_path):
    tokens = np.random.default_rng(5).integers(0, 1000, 400)
    x, y = TokenData(write_tokens(tmp_path, tokens), BLOCK).batch("train", 3, 1, 4, 16)
    assert torch.equal(x[:, 1:], y[:, :-1])
    windows = {tuple(tokens[i : i + BLOCK + 1]) for i in range(len(tokens) - BLOCK)}
    assert {(*row, last) for row, last in zip(x.tolist(), y[:, -1].tolist())} <= windows


def test_a_batch_does_not_depend_on_what_was_drawn_before(counting):
    calls = [(s, seed, step, m) for s in ("train", "val") for seed in (0, 9) for step in (0, 1, 5) for m in (0, 1)]
    forwards = {call: counting.batch(*call, 4)[0] for call in calls}
    fresh = TokenData(counting.folder, BLOCK)
    torch.manual_seed(77)
    np.random.seed(77)  # noqa: NPY002
    for call in reversed(calls):
        assert torch.equal(fresh.batch(*call, 4)[0], forwards[call])


def test_every_argument_changes_the_batch(counting):
    calls = [
        (s, seed, step, m) for s in ("train", "val") for seed in (0, 1, 2) for step in (0, 1, 2) for m in (0, 1, 2)
    ]
    batches = {tuple(counting.batch(*call, 4)[0][:, 0].tolist()) for call in calls}
    assert len(batches) == len(calls)


def test_a_larger_batch_begins_with_the_smaller_one(counting):
    small, large = (counting.batch("train", 4, 2, 0, rows)[0] for rows in (3, 11))
    assert torch.equal(large[:3], small)


def test_batches_reach_every_window_and_the_last_token(tmp_path):
    data = TokenData(write_tokens(tmp_path, range(BLOCK + 3)), BLOCK)
    x, y = data.batch("train", 0, 0, 0, 60)
    assert set(x[:, 0].tolist()) == {0, 1, 2}
    assert y.max() == BLOCK + 2


def test_validation_batches_are_the_same_in_every_evaluation_of_every_run(tmp_path, monkeypatch):
    rng = np.random.default_rng(2)
    folder = write_tokens(tmp_path / "data", rng.integers(0, 61, 900), rng.integers(0, 61, 900), {"vocab_size": 61})
    drawn = []
    original = TokenData.batch

    def spy(self, split, seed, step, micro, batch_size):
        x, y = original(self, split, seed, step, micro, batch_size)
        drawn.append((split, tuple(x.reshape(-1).tolist())))
        return x, y

    monkeypatch.setattr(TokenData, "batch", spy)
    shape = ["--n_layer=1", "--n_head=1", "--n_embd=4", "--block_size=8", "--batch_size=2", "--device=cpu"]
    steps = ["--max_iters=4", "--eval_interval=2", "--eval_iters=3", "--gradient_accumulation_steps=2"]
    runs = []
    for seed in (1, 2):
        drawn.clear()
        arguments = [*shape, *steps, f"--dataset={folder}", f"--out_dir={tmp_path / str(seed)}", f"--seed={seed}"]
        assert train.main(arguments) == 0
        runs.append({split: [batch for s, batch in drawn if s == split] for split in ("train", "val")})
    first, second = runs
    # evaluations at steps 0, 2 and 4
    assert first["val"] == second["val"] == first["val"][:3] * 3
    assert len(set(first["val"])) == 3
    data = TokenData(folder, 8)
    fixed = [tuple(original(data, "val", EVAL_SEED, 0, i, 2)[0].reshape(-1).tolist()) for i in range(3)]
    assert first["val"][:3] == fixed
    # 4 steps of 2 micro-batches, all different
    assert len(set(first["train"]) | set(second["train"])) == 16


def test_a_dataset_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(UserError) as error:
        open_dataset("no_such_dataset", BLOCK)
    assert re.search("no_such_dataset.*stdlib", one_line(error))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    "content, expected",
    [
        pytest.param(None, "a dataset is train.bin and val.bin", id="missing"),
        pytest.param(b"", "0 bytes", id="empty"),
        pytest.param(b"\1\0" * 40 + b"\1", "81 bytes", id="odd_length"),
        pytest.param(b"\1\0" * BLOCK, f"{BLOCK} tokens, too few for block_size={BLOCK}", id="a_token_short"),
    ],
)
def test_a_token_file_that_cannot_be_used_is_refused(split, content, expected, tmp_path):
    write_tokens(tmp_path, [1] * 40)
    TokenData(tmp_path, BLOCK)
    path = tmp_path / f"{split}.bin"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        TokenData(tmp_path, BLOCK)
    message = one_line(error)
    assert str(path) in message
    assert expected in message


def test_a_token_file_one_token_longer_than_a_block_is_enough(tmp_path):
    data = TokenData(write_tokens(tmp_path, range(BLOCK + 1)), BLOCK)
    assert data.batch("val", 0, 0, 0, 2)[1].tolist() == [list(range(1, BLOCK + 1))] * 2


@pytest.mark.parametrize("place", ["input", "target"])
def test_a_token_beyond_the_vocabulary_is_refused(place, tmp_path):
    tokens = [5] * (BLOCK + 1)
    tokens[0 if place == "input" else -1] = 60
    data = TokenData(write_tokens(tmp_path, tokens, [59] * (BLOCK + 1), {"vocab_size": 60}), BLOCK)
    data.batch("val", 0, 0, 0, 1)
    with pytest.raises(UserError) as error:
        data.batch("train", 0, 0, 0, 1)
    message = one_line(error)
    assert all(part in message for part in (str(tmp_path / "train.bin"), "60"))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b'{"vocab_size": 65', id="cut_short"),
        pytest.param(b"\xff\xfe", id="not_text"),
        pytest.param(b"[65]", id="list"),
        pytest.param(b"{}", id="no_vocab_size"),
        pytest.param(b'{"vocab_size": "65"}', id="string"),
        pytest.param(b'{"vocab_size": null}', id="null"),
        pytest.param(b'{"vocab_size": 0}', id="zero"),
        pytest.param(b'{"vocab_size": 65537}', id="beyond_16_bits"),
    ],
)
def test_a_bad_meta_json_is_refused(content, tmp_path):
    write_tokens(tmp_path, [1] * 40)
    (tmp_path / "meta.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        TokenData(tmp_path, BLOCK)
    assert str(tmp_path / "meta.json") in one_line(error)


def test_nanogpts_meta_pkl_gives_the_vocabulary(tmp_path):
    write_tokens(tmp_path, [1] * 40)
    assert TokenData(tmp_path, BLOCK).vocab_size == GPT2_VOCAB_SIZE == 50304
    characters = sorted("hello, world\n")
    meta = {
        "vocab_size": 65,
        "itos": dict(enumerate(characters)),
        "stoi": {c: i for i, c in enumerate(characters)},
    }
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    data = TokenData(tmp_path, BLOCK)
    assert data.vocab_size == 65
    assert data.meta == meta


class Bomb:
    """Unpickled, it makes the folder `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("hidden", [False, True])
def test_a_meta_pkl_that_would_run_code_is_refused_and_runs_nothing(hidden, protocol, tmp_path):
    bomb = Bomb(tmp_path / "harm")
    content = pickle.dumps({"vocab_size": 65, "itos": [bomb]} if hidden else bomb, protocol)
    pickle.loads(content)
    assert bomb.path.exists()  # it is armed
    bomb.path.rmdir()
    write_tokens(tmp_path, [1] * 40)
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError) as error:
        TokenData(tmp_path, BLOCK)
    assert str(tmp_path / "meta.pkl") in one_line(error)
    assert not bomb.path.exists()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(pickle.dumps({"vocab_size": 65})[:-4], id="cut_short"),
        pytest.param(pickle.dumps([65]), id="list"),
        pytest.param(b"}Na.", id="append_to_a_dict"),
        pytest.param(b"}]Ns.", id="list_as_a_key"),
        pytest.param(b"\x80\x04\x95" + b"\xff" * 8 + b"}.", id="frame_beyond_memory"),
        pytest.param(b"cone\ntwo\n.", id="class"),
        pytest.param(b"\x80\x04\x8c\x03a\nb\x8c\x01c\x93.", id="class_with_a_newline"),
    ],
)
def test_a_damaged_meta_pkl_is_refused(content, tmp_path):
    write_tokens(tmp_path, [1] * 40)
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError) as error:
        TokenData(tmp_path, BLOCK)
    assert str(tmp_path / "meta.pkl") in one_line(error)


def test_batches_made_ahead_are_the_batches_in_whatever_order_they_are_asked_for(counting):
    ahead = Prefetcher(counting, 4, torch.device("cpu"))
    assert ahead.pool is None
    ahead.pool = ThreadPoolExecutor(1)
    made_by = []
    make = ahead._make
    ahead._make = lambda *place: made_by.append(threading.current_thread() is threading.main_thread()) or make(*place)
    places = [("train", 1, step, micro) for step in range(3) for micro in range(2)]
    for place, following in zip(places, [*places[1:], None]):
        for ours, theirs in zip(ahead.batch(*place, following=following), counting.batch(*place, 4)):
            assert torch.equal(ours, theirs)
        if place == places[2]:  # an evaluation comes between
            assert torch.equal(ahead.batch("val", 0, 0, 3)[0], counting.batch("val", 0, 0, 3, 4)[0])
    assert made_by.count(True) == 2 and made_by.count(False) == 5
    ahead.batch(*places[0], following=("train", 1, 9, 9))
    assert torch.equal(ahead.batch(*places[1])[0], counting.batch(*places[1], 4)[0])
