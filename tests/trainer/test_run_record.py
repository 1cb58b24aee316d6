"""What config.json and a checkpoint record of a run: where its weights and data come from, its starts, its logs."""

import hashlib
import json
import shutil
import types

import pytest
import torch

import train
from tests.helpers.runs import (
    ALL_ON,
    NOISY,
    ROOT,
    STEPS,
    TINY,
    VOCAB,
    FailingRun,
    checkpoint,
    differing_state,
    lines,
    metrics,
    one_line,
    snapshot,
    write_dataset,
)
from trainer import checkpoint as checkpoints
from trainer import timer, weights
from trainer.data import TokenData
from trainer.errors import UserError

SHAPE = ("n_layer", "n_head", "n_embd", "n_exp", "block_size")
DECISIVE = dict(chrono_unused_after=1, chrono_unused_tokens=10**9, chrono_starving_phi=-1)  # decisions at step 1
RECORD = ("weights_from", "weights_sha256", "history", "incomplete", "lines_sha256")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "letters", VOCAB)


@pytest.fixture(scope="module")
def start(dataset):
    """start(out_dir, **keys) runs train.py's main in this process. without: keys of TINY that are not given."""

    def run(out, without=(), **changes):
        own = {key: value for key, value in TINY.items() if key not in without}
        settings = own | {"dataset": dataset, "out_dir": out} | changes
        return train.main([f"--{key}={value}" for key, value in settings.items()])

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, start):
    """A run of six steps with every step of the loop and lines in both logs. Not to be written to."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert start(out, **ALL_ON, **NOISY, **DECISIVE) == 0
    return out


@pytest.fixture
def half(half_run, tmp_path):
    """A copy of the first three steps of `whole`."""
    shutil.copytree(half_run, tmp_path / "half")
    return tmp_path / "half"


@pytest.fixture(scope="module")
def half_run(tmp_path_factory, start):
    out = tmp_path_factory.mktemp("runs") / "half"
    assert start(out, **ALL_ON, **NOISY, **DECISIVE, max_iters=3) == 0
    return out


def config_of(out):
    return json.loads((out / "config.json").read_text())


def as_before(out, without=RECORD, **changes):
    """Make the checkpoints in a folder those of an older version, which had not these keys."""
    for path in out.glob("*.pt"):
        saved = {key: value for key, value in torch.load(path, weights_only=True).items() if key not in without}
        torch.save(saved | changes, path)


# Weights


def digest_of(path):
    """The digest that is documented, over the weights of a checkpoint file."""
    sha256 = hashlib.sha256()
    found = torch.load(path, weights_only=True)["model"]
    for name in sorted(found):
        if not name.startswith("router_state."):
            value = found[name]
            sha256.update(f"{name} {value.dtype} {list(value.shape)}\n".encode() + value.numpy().tobytes())
    return sha256.hexdigest()


def origin(out):
    """(weights_from, weights_sha256), which config.json and the checkpoint must agree in."""
    config, saved = config_of(out), checkpoint(out)
    found = config["weights_from"], config["weights_sha256"]
    assert found == (saved["weights_from"], saved["weights_sha256"])
    return found


def test_the_digest_of_weights_depends_on_names_shapes_types_and_bytes():
    base = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}
    others = [
        {"b": base["b"], "c": base["a"]},
        base | {"a": base["a"].reshape(3, 2)},
        base | {"b": base["b"].half()},
        base | {"a": base["a"] + torch.tensor([[0, 0, 0], [0, 0, 1e-6]])},
        {"a": base["a"]},
    ]
    digests = {weights.digest(found) for found in [base, *others]}
    assert len(digests) == 6
    strided = base["a"].t().contiguous().t()
    assert weights.digest({"b": base["b"], "a": strided}) == weights.digest(base)


def test_a_run_from_scratch_has_no_weights_of_another(whole):
    assert origin(whole) == (None, None)


@pytest.mark.parametrize("init_from", ["{}", "auto:{}"])
def test_where_the_weights_came_from_is_recorded_and_outlives_every_resume(init_from, whole, start, tmp_path):
    out, source = tmp_path / "out", whole / "ckpt.pt"
    expected = str(source), digest_of(source)
    named = init_from.format(source)
    assert start(out, without=SHAPE, init_from=named, max_iters=1) == 0
    assert metrics(out)[0]["val/loss"] == pytest.approx(metrics(whole)[-1]["val/loss"], abs=1e-3)
    assert origin(out) == expected
    for steps, again in ((2, "resume"), (3, "auto"), (4, f"auto:{source}"), (5, "auto:no/such/file")):
        assert start(out, without=SHAPE, init_from=again, max_iters=steps) == 0
        assert origin(out) == expected
    assert [line["step"] for line in metrics(out)] == list(range(6))


def test_upcycled_weights_are_recorded_as_they_were_found(start, tmp_path):
    dense, out = tmp_path / "dense", tmp_path / "out"
    start(dense, n_exp=1, max_iters=1)
    start(out, without=SHAPE, init_from=dense, n_exp=4, max_iters=1)
    assert origin(out) == (str(dense), digest_of(dense / "ckpt.pt"))


def test_auto_with_a_source_resumes_if_there_is_a_checkpoint_and_auto_alone_starts_from_scratch(start, tmp_path):
    assert start(tmp_path / "out", init_from="auto", max_iters=1) == 0
    assert origin(tmp_path / "out") == (None, None)
    assert start(tmp_path / "out", init_from="auto:gpt2", max_iters=2) == 0
    assert origin(tmp_path / "out") == (None, None)
    assert start(tmp_path / "other", init_from="auto:scratch", max_iters=1) == 0
    assert origin(tmp_path / "other") == (None, None)


@pytest.mark.parametrize("source", ["", "resume", "auto", "auto:gpt2"])
def test_auto_takes_only_weights_as_its_source(source, start, tmp_path):
    with pytest.raises(UserError) as error:
        start(tmp_path / "out", init_from=f"auto:{source}")
    assert f"init_from='auto:{source}'" in one_line(error) and "auto:PATH" in one_line(error)
    assert not (tmp_path / "out").exists()


def test_nanomoes_checkpoint_is_the_origin_of_the_run_that_goes_on_from_it(start, tmp_path):
    out, source = tmp_path / "out", ROOT / "tests" / "golden" / "nanomoe_ckpt.pt"
    out.mkdir()
    shutil.copy(source, out / "ckpt.pt")
    expected = str(out / "ckpt.pt"), digest_of(source)
    data = write_dataset(tmp_path / "data", checkpoint(out)["model_args"]["vocab_size"])
    for steps in (11, 12):
        assert start(out, without=SHAPE, init_from="resume", dataset=data, max_iters=steps) == 0
        assert origin(out) == expected


@pytest.mark.parametrize("init_from, expected", [("scratch", None), ("resume", "unknown"), ("gpt2", "unknown")])
def test_a_checkpoint_of_an_older_version_does_not_hide_where_its_weights_came_from(
    init_from, expected, half, start, tmp_path
):
    as_before(half, config=checkpoint(half)["config"] | {"init_from": init_from})
    assert start(half, **ALL_ON, **NOISY, **DECISIVE, init_from="resume") == 0
    assert origin(half) == (expected, expected)


# Length


def test_a_run_cannot_become_shorter(whole, start, capsys):
    before = snapshot(whole)
    with pytest.raises(UserError) as error:
        start(whole, **ALL_ON, **NOISY, **DECISIVE, init_from="resume", max_iters=4)
    assert "max_iters=4" in one_line(error) and "step 6" in one_line(error)
    assert start(whole, init_from="resume", max_iters=4, eval_only=True, **NOISY) == 0
    assert snapshot(whole) == before


# Logs


def resume_whole(start, out, **changes):
    assert start(out, **ALL_ON, **NOISY, **DECISIVE, init_from="resume", **changes) == 0


def spoil(path, how):
    """Damage a log of some lines, none of them the last alone."""
    found = path.read_bytes().splitlines(keepends=True)
    if how == "deleted":
        path.unlink()
        return 0
    changed = {
        "empty": [],
        "missing": [*found[:1], *found[2:]],
        "damaged": [found[0], found[1][: len(found[1]) // 2] + b"\n", *found[2:]],
        "repeated": [found[0], *found[:2], *found[2:]],
        "changed": [*found[:1], found[1].replace(b"0.", b"1.", 1), *found[2:]],
        "cut": [*found[:-1], found[-1][:-10]],
    }[how]
    assert changed != found
    path.write_bytes(b"".join(changed))
    return {"empty": 0, "repeated": len(found), "changed": len(found)}.get(how, len(found) - 1)


@pytest.mark.parametrize("name", ["metrics", "decisions"])
@pytest.mark.parametrize("how", ["deleted", "empty", "missing", "damaged", "repeated", "changed", "cut"])
def test_a_log_that_is_not_whole_is_told_and_the_run_stays_marked(how, name, half, whole, start, capsys):
    expected = lines(half / f"{name}.jsonl")
    kept = spoil(half / f"{name}.jsonl", how)
    resume_whole(start, half, max_iters=4)
    (sentence,) = config_of(half)["incomplete"]
    said = [line for line in capsys.readouterr().out.splitlines() if f"{name}.jsonl" in line and "incomplete" in line]
    assert said == [f"incomplete: {sentence}"]
    number = str(len(expected)) if kept == len(expected) else f"{len(expected) - kept} of {len(expected)} lines"
    assert name in sentence and number in sentence
    found = [line for line in lines(half / f"{name}.jsonl") if line["step"] <= 3]
    assert len(found) == kept
    assert all(line in expected for line in found) or how == "changed"
    # the mark survives a later start, and the loss of config.json
    (half / "config.json").write_text("{")
    resume_whole(start, half)
    assert config_of(half)["incomplete"] == checkpoint(half)["incomplete"] == [sentence]
    assert weights.digest(checkpoint(half)["model"]) == weights.digest(checkpoint(whole)["model"])


def test_a_mark_that_only_config_json_has_yet_is_kept(half, start, monkeypatch):
    """A start that found damage and was killed before its first checkpoint."""
    spoil(half / "metrics.jsonl", "missing")
    before = (half / "ckpt.pt").read_bytes()
    monkeypatch.setattr(train.checkpoints.Checkpointer, "save", lambda *args, **options: None)
    resume_whole(start, half, max_iters=4)
    monkeypatch.undo()
    assert (half / "ckpt.pt").read_bytes() == before
    marked = config_of(half)["incomplete"]
    resume_whole(start, half)
    assert config_of(half)["incomplete"] == marked and len(marked) == 1


def test_lines_after_the_checkpoint_mark_nothing(whole, half, start):
    """A run that was killed: its logs went on, the last line is half written."""
    for name in ("metrics", "decisions"):
        later = (half / f"{name}.jsonl").read_text() + '{"step": 4}\n{"step": 4}\nnoise\n{"st'
        (half / f"{name}.jsonl").write_text(later)
    resume_whole(start, half)
    assert config_of(half)["incomplete"] == checkpoint(half)["incomplete"] == []
    assert metrics(half, timeless=True) == metrics(whole, timeless=True)
    assert lines(half / "decisions.jsonl") == lines(whole / "decisions.jsonl")


@pytest.mark.parametrize("how", [None, "deleted", "missing", "damaged", "repeated"])
def test_without_digests_the_lines_are_counted(how, half, start):
    as_before(half)
    if how:
        spoil(half / "metrics.jsonl", how)
    resume_whole(start, half)
    assert len(config_of(half)["incomplete"]) == (how is not None)
    resume_whole(start, half)
    assert len(checkpoint(half)["incomplete"]) == (how is not None)


def test_the_digests_in_a_checkpoint_are_those_of_the_logs(whole):
    for name in ("metrics", "decisions"):
        content = (whole / f"{name}.jsonl").read_bytes()
        assert checkpoint(whole)["lines_sha256"][name] == hashlib.sha256(content).hexdigest()
        assert content


# History


CHANGED = {"learning_rate": [1e-2, 5e-3], "max_iters": [3, 4]}


@pytest.mark.parametrize("damage", [lambda path: path.write_text("{"), lambda path: path.unlink(), None])
def test_the_history_outlives_config_json(damage, half, start):
    resume_whole(start, half, max_iters=4, learning_rate=5e-3)
    before = config_of(half)["history"]
    if damage:
        damage(half / "config.json")
    else:
        (half / "config.json").write_text(json.dumps(config_of(half) | {"history": before[:1]}))
    resume_whole(start, half, learning_rate=5e-3)
    config, saved = config_of(half), checkpoint(half)
    assert config["history"] == saved["history"]
    assert config["history"][:2] == before and len(config["history"]) == 3
    assert config["history"][1]["changed"] == CHANGED
    assert config["incomplete"] == []


def test_a_start_after_the_checkpoint_stays_in_the_history(half, start, monkeypatch):
    monkeypatch.setattr(train.checkpoints.Checkpointer, "save", lambda *args, **options: None)
    resume_whole(start, half, max_iters=4, learning_rate=5e-3)
    monkeypatch.undo()
    resume_whole(start, half)
    assert [s["changed"] for s in checkpoint(half)["history"]] == [{}, CHANGED, {"max_iters": [3, 6]}]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_history_that_is_nowhere_is_said_to_be_lost(damaged, half, start):
    as_before(half)
    if damaged:
        (half / "config.json").write_text("")
    resume_whole(start, half)
    assert ["history" in sentence for sentence in config_of(half)["incomplete"]] == [True] * damaged
    assert len(config_of(half)["history"]) == 2 - damaged


def test_wandb_gets_the_history_and_what_is_incomplete(half, start, monkeypatch):
    wandb = pytest.importorskip("wandb")
    spoil(half / "metrics.jsonl", "missing")
    identity = {}
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", lambda **given: identity.update(given) or FailingRun(None))
    resume_whole(start, half, wandb_log=True, learning_rate=5e-3)
    config = config_of(half)
    assert identity["config"] == config
    assert config["history"][1]["changed"]["learning_rate"] == [1e-2, 5e-3] and config["incomplete"]


def test_a_key_that_an_older_checkpoint_lacks_was_at_its_default(half, start):
    config = {key: value for key, value in checkpoint(half)["config"].items() if key not in ("margin", "arm")}
    as_before(half, config=config)
    resume_whole(start, half, margin=0.7)
    changed = config_of(half)["history"][1]["changed"]
    assert changed["margin"] == [None, 0.7] and "arm" not in changed
    assert config_of(half)["arm"] == "on"


def test_dtype_auto_on_resume_is_the_runs_own(half, start):
    as_before(half, config=checkpoint(half)["config"] | {"dtype": "bfloat16"})
    with pytest.raises(UserError, match="dtype='bfloat16' needs CUDA"):
        resume_whole(start, half, dtype="auto")


def test_a_resumed_run_has_the_arm_that_its_keys_make(start, tmp_path):
    steps = ALL_ON | {"chrono_signal": "load"}  # with other keys than the arm's: custom
    assert start(tmp_path / "out", **steps, max_iters=1) == 0
    assert config_of(tmp_path / "out")["arm"] == "custom"
    for step, signal, arm in ((2, "shuffled", "shuffled"), (3, "coherence", "on")):
        assert start(tmp_path / "out", init_from="resume", chrono_signal=signal, max_iters=step) == 0
        assert config_of(tmp_path / "out")["arm"] == arm
    assert start(tmp_path / "out", init_from="resume", learning_rate=1e-3) == 0
    assert config_of(tmp_path / "out")["arm"] == "on"


@pytest.mark.parametrize(
    "damage", [{"lines_sha256": [1]}, {"lines": {"metrics": "a"}}, {"lines_sha256": {"metrics": 3}}]
)
def test_a_damaged_record_of_the_logs_counts_as_missing(damage, half, start):
    torch.save(checkpoint(half) | damage, half / "ckpt.pt")
    resume_whole(start, half)
    assert metrics(half)[-1]["step"] == STEPS


def test_auto_does_not_begin_again_over_the_logs_of_a_run_whose_checkpoints_are_gone(start, tmp_path):
    out = tmp_path / "out"
    assert start(out, max_iters=4, eval_interval=1) == 0
    for path in out.glob("ckpt*"):
        path.unlink()
    before = snapshot(out)
    with pytest.raises(UserError) as error:
        start(out, init_from="auto", max_iters=9, eval_interval=1)
    assert "logs of a run and no checkpoint" in one_line(error)
    assert snapshot(out) == before
    # killed while its first checkpoint was being written
    kept = [line for line in (out / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= 2]
    (out / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    assert start(out, init_from="auto") == 0


# Data


def test_other_contents_under_another_name_are_a_change_of_data(half, start, tmp_path, dataset):
    other = write_dataset(tmp_path / "other", VOCAB, seed=9)
    shas = [json.loads((folder / "meta.json").read_text())["sha256"] for folder in (dataset, other)]
    # the same size and time of change do not make it the same file
    for split in ("train", "val"):
        shutil.copystat(dataset / f"{split}.bin", other / f"{split}.bin")
    resume_whole(start, half, dataset=other)
    changed = config_of(half)["history"][1]["changed"]
    assert changed["data_sha256"] == shas and changed["dataset"] == [str(dataset), str(other)]
    assert config_of(half)["data_sha256"] == shas[1]


def test_the_same_contents_under_another_name_are_no_change_of_data(half, start, tmp_path, dataset, whole):
    shutil.copytree(dataset, tmp_path / "copy", copy_function=shutil.copyfile)
    resume_whole(start, half, dataset=tmp_path / "copy")
    assert config_of(half)["history"][1]["changed"].keys() == {"dataset", "max_iters"}
    assert {path for path in differing_state(half, whole) if not path.startswith("/data/")} == set()


def test_the_fingerprint_is_that_of_the_files_that_are_read(tmp_path):
    """Though others take their places in between."""
    folder, other = write_dataset(tmp_path / "data", VOCAB), write_dataset(tmp_path / "other", VOCAB, seed=9)
    opened = TokenData(folder, 8)
    for split in ("train", "val"):
        (other / f"{split}.bin").replace(folder / f"{split}.bin")
    (other / "meta.json").replace(folder / "meta.json")
    opened.meta.pop("sha256", None)
    found = opened.fingerprint()
    assert TokenData(folder, 8).fingerprint(found) != found


# Time and the best loss


def test_step_times_hold_no_evaluation_and_no_saving(start, tmp_path, monkeypatch):
    """On a clock on which a micro-batch takes a second, a validation batch 100 and copying a state 1000."""
    clock = [0.0]
    batch, copied = TokenData.batch, checkpoints.copied

    def slow_batch(self, split, *rest):
        clock[0] += 1 if split == "train" else 100
        return batch(self, split, *rest)

    def slow_copied(value, seen=None):
        clock[0] += 1000 * (seen is None)
        return copied(value, seen)

    monkeypatch.setattr(timer, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(TokenData, "batch", slow_batch)
    monkeypatch.setattr(checkpoints, "copied", slow_copied)
    start(tmp_path / "out", log_interval=2, eval_interval=3, checkpoint_interval=5)
    found = [line["time/step_ms"] for line in metrics(tmp_path / "out") if "time/step_ms" in line]
    assert found == [2000, 2000, 2000]
    assert clock[0] == 6 * 2 + 3 * 2 * 100 + 3 * 1000


def test_the_best_loss_is_that_of_a_checkpoint(start, tmp_path, capsys):
    out = tmp_path / "out"
    start(out, learning_rate=1.0, min_lr=1.0)  # worse than the untrained model
    losses = [line["val/loss"] for line in metrics(out) if "val/loss" in line]
    assert losses[0] < min(losses[1:])
    best = checkpoint(out, "ckpt_best.pt")
    assert checkpoint(out)["best_val_loss"] == best["best_val_loss"] == min(losses[1:])
    assert f"best validation loss {min(losses[1:]):.4f}" in capsys.readouterr().out


def test_a_best_loss_of_an_older_version_without_its_checkpoint_is_forgotten(half, start):
    (half / "ckpt_best.pt").unlink()
    as_before(half, best_val_loss=0.5)  # of step 0
    resume_whole(start, half)
    best = checkpoint(half, "ckpt_best.pt")
    assert best["iter_num"] == STEPS and best["best_val_loss"] == metrics(half)[-1]["val/loss"]


def test_without_steps_the_loss_of_step_0_is_told(start, tmp_path, capsys):
    start(tmp_path / "out", max_iters=0)
    loss = metrics(tmp_path / "out")[0]["val/loss"]
    assert f"done at step 0, validation loss at step 0: {loss:.4f} nats per token\n" in capsys.readouterr().out
