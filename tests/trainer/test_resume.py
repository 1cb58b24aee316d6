"""Resuming: the same run as an unbroken one, settings, data and random streams; no run is overwritten."""

import itertools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from chronomoe.signals import derangement
from model import GPT, GPTConfig
from tests.helpers import models, runs
from trainer.checkpointer import Checkpointer
from trainer.data import TokenData
from trainer.progress import Progress
from trainer.resume import upgraded
from trainer.settings import from_values
from trainer.setup import build
from trainer.streams import DROPOUT_AND_NOISE, PERMUTATION, stream_seed
from trainer.weights import weights_sha256


def saved_with(**changes):
    return lambda out: torch.save(runs.checkpoint(out) | changes, out / "ckpt.pt")


def append_noise(out):
    for path in out.glob("*.jsonl"):
        path.write_text(path.read_text() + '{"step": 4}\n{"step": 4}\nnoise\n{"st')


HARMLESS = {
    "nothing": lambda out: None,
    "lines after the checkpoint": append_noise,
    "no digest": saved_with(lines_sha256={}),
}


@pytest.mark.parametrize("change", HARMLESS)
def test_a_resumed_run_has_the_settings_and_the_bits_of_an_unbroken_one(change, full_run, half, dataset):
    HARMLESS[change](half)
    given = dict(out_dir=half, dataset=dataset, init_from="resume", max_iters=runs.STEPS)
    assert train.main(runs.arguments(given)) == 0
    runs.assert_same_run(half, full_run)
    assert runs.config_of(half)["incomplete"] == []


def test_two_runs_with_one_seed_are_bit_identical_and_with_two_seeds_are_not(full_run, keys, tmp_path):
    torch.manual_seed(99)
    for seed in (1337, 2):
        assert train.main(keys(tmp_path / str(seed), seed=seed)) == 0
    runs.assert_same_run(tmp_path / "1337", full_run)
    matrices = {f"/model/{name}" for name, value in runs.checkpoint(full_run)["model"].items() if value.ndim > 1}
    assert matrices - {"/model/router_state.relevance"} <= runs.differing_state(tmp_path / "2", full_run)


def test_a_run_killed_long_after_its_checkpoint_does_the_lost_steps_again(keys, resume, tmp_path):
    """Candidates open at step 3, are saved at step 3 and are reported at step 4."""
    whole, late = tmp_path / "whole", dict(chrono_unused_after=3, log_interval=2)
    assert train.main(keys(whole, **late)) == 0
    assert [d["step"] for d in runs.lines(whole / "decisions.jsonl")] == [3] * 8
    killed = shutil.copytree(whole, tmp_path / "killed")
    os.replace(killed / "ckpt_previous.pt", killed / "ckpt.pt")
    os.truncate(killed / "metrics.jsonl", (killed / "metrics.jsonl").stat().st_size - 100)
    assert resume(killed, **late) == 0
    runs.assert_same_run(killed, whole)


def test_coherence_that_is_switched_on_later_counts_the_steps_of_the_run(start, out):
    start(out, max_iters=3)
    watched = runs.ALL_ON | dict(chrono_prune_phi=1, chrono_prune_min_tokens=0, chrono_prune_min_updates=1)
    assert start(out, **watched, init_from="resume") == 0
    assert {d["step"] for d in runs.lines(out / "decisions.jsonl")} == {5}  # after two updates


def test_evaluating_or_resuming_a_finished_run_leaves_its_checkpoint_and_logs_as_they_are(full, resume, capsys):
    before = runs.snapshot(full)
    assert resume(full, eval_only=True, max_iters=4) == 0  # also below the checkpoint's step
    loss = runs.val_losses(full)[-1]
    assert f"validation loss at step 6: {loss:.4f} nats per token, over 2 batches" in capsys.readouterr().out
    assert runs.snapshot(full) == before
    assert resume(full) == 0
    after = runs.snapshot(full)
    assert all(after[name][0] == before[name][0] for name in before if name != "config.json")


def test_changed_settings_are_printed_and_recorded_in_the_history(start, capsys, out):
    start(out, max_iters=3)
    start(out, init_from="resume", learning_rate=2e-3, top_k=1)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resume:")]
    changed = ["top_k=1, before 2", "learning_rate=0.002, before 0.01", "max_iters=6, before 3"]
    assert printed == [f"resume: {change}" for change in changed]
    start(out, init_from="resume", learning_rate=3e-3, top_k=1, max_iters=7)
    history = runs.config_of(out)["history"]
    assert [(start["step"], start["changed"]) for start in history] == [
        (0, {}),
        (3, {"top_k": [2, 1], "learning_rate": [0.01, 0.002], "max_iters": [3, 6]}),
        (6, {"learning_rate": [0.002, 0.003], "max_iters": [6, 7]}),
    ]
    assert {"time", "host", "threads", "torch", "git_commit"} <= history[0].keys()


def test_changed_settings_of_the_optimizer_take_effect(half, resume):
    assert resume(half, max_iters=4, weight_decay=0.75, beta2=0.5) == 0
    decays, others = runs.checkpoint(half)["optimizer"]["param_groups"]
    assert (decays["weight_decay"], others["weight_decay"]) == (0.75, 0.0)
    assert decays["betas"] == others["betas"] == (0.9, 0.5)


def test_a_resumed_run_belongs_to_the_arm_that_its_settings_define(start, out):
    load = runs.ALL_ON | dict(chrono_signal="load")  # with other settings than those of the arm
    cases = [(load, "custom"), (dict(chrono_signal="shuffled"), "shuffled"), (dict(chrono_signal="coherence"), "on")]
    for step, (changes, arm) in enumerate([*cases, (dict(learning_rate=1e-3), "on")], 1):
        assert start(out, init_from="auto", **changes, max_iters=step) == 0
        assert runs.config_of(out)["arm"] == arm


SHAPE = dict(n_layer=2, n_head=1, n_embd=32, n_exp=8, block_size=8, stride=1, bias=True, use_noisy_top_k=False)
REFUSED = [
    *(({key: value}, f"{key}={value}, but the checkpoint") for key, value in SHAPE.items()),
    (dict(block_size=64), "a model's shape cannot change"),
    (dict(max_iters=4), "max_iters=4, but the checkpoint in run is of step 6"),
    (dict(dataset="larger"), f"has {runs.VOCAB} token ids, the dataset"),
    (dict(init_from="scratch"), "holds a run already"),
    (dict(init_from="run"), "holds a run already"),
    (dict(out_dir="new"), "there is no checkpoint new/ckpt.pt"),
    (dict(out_dir="new", init_from="resum"), "did you mean 'resume'"),
    (dict(out_dir="new", init_from="no/such/file.pt"), "there is no checkpoint no/such/file.pt"),
    *((dict(out_dir="new", init_from=source), "auto:PATH") for source in ("auto:", "auto:resume", "auto:auto:x")),
    *((dict(out_dir="new", init_from="scratch") | {key: "x" * 300}, "x" * 300) for key in ("dataset", "out_dir")),
    (dict(out_dir="new", init_from="x" * 300), "x" * 300),
    (dict(out_dir="file/out", init_from="scratch"), "cannot write to file/out"),
    *((dict(out_dir="x\0y", init_from=source), "cannot encode") for source in ("auto", "resume", "scratch")),
    (dict(out_dir="new", init_from="x\0y"), "cannot encode"),
    (dict(out_dir="new", init_from="scratch", dataset="another_file"), "train.bin is not the file that"),
]


@pytest.mark.parametrize(("changes", "expected"), REFUSED)
def test_what_cannot_start_gets_one_line_and_changes_nothing(changes, expected, full, resume, monkeypatch):
    monkeypatch.chdir(full.parent)
    full = full.rename("run")
    Path("file").write_text("in the way")
    runs.write_dataset(Path("larger"), runs.VOCAB + 1)
    another_file = runs.write_dataset(Path("another_file"), runs.VOCAB)
    shutil.copy(another_file / "val.bin", another_file / "train.bin")
    before, names = runs.snapshot(full), sorted(os.listdir())
    assert expected in runs.error_of(resume, "run", **changes)
    assert runs.snapshot(full) == before and sorted(os.listdir()) == names


def test_auto_does_not_overwrite_the_logs_of_a_run_whose_checkpoints_are_gone(start, out):
    assert start(out, max_iters=4, eval_interval=1) == 0
    for path in out.glob("ckpt*"):
        path.unlink()
    before = runs.snapshot(out)
    assert "has the logs of a run but no checkpoint" in runs.error_of(start, out, init_from="auto", max_iters=9)
    assert runs.snapshot(out) == before
    # a run with few evaluations that has ended
    (out / "metrics.jsonl").write_text("".join(f"{json.dumps({'step': step})}\n" for step in range(5)))
    assert "has the logs of a run but no checkpoint" in runs.error_of(start, out, init_from="auto", max_iters=9)
    # runs that were killed while they wrote their first checkpoint: the last one, or an earlier one
    (out / "ckpt.pt.1.tmp").write_text("")
    assert start(out, init_from="auto") == 0
    for path in out.glob("ckpt*"):
        path.unlink()
    (out / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in runs.metrics(out)[:3]))
    assert start(out, init_from="auto") == 0
    assert runs.steps(out) == list(range(runs.STEPS + 1))


def only(name, content="{}\n"):
    """Leave nothing in a folder but this file."""

    def leave(out):
        for path in out.iterdir():
            path.unlink()
        (out / name).write_text(content)

    return leave


def in_place(name, make):
    """Replace a file of the run by something else."""

    def replace(out):
        (out / name).unlink(missing_ok=True)
        make(out / name)

    return replace


SPECIAL = {"FIFO": os.mkfifo, "folder": os.mkdir, "link to nothing": lambda path: path.symlink_to("nothing")}
# what is in out_dir, and what the message says
NOT_OWN = {
    "a model of transformers": (only("config.json", '{"model_type": "gpt2"}'), "config.json is not of a run"),
    "a damaged config.json": (only("config.json", "{"), "config.json is not of a run"),
    "other decisions": (only("decisions.jsonl"), "decisions.jsonl is there without the config.json of a run"),
    "other metrics": (only("metrics.jsonl"), ""),
    **{
        f"a {kind} as {name}": (in_place(name, make), "is not a regular file")
        for kind, make in SPECIAL.items()
        for name in ("config.json", "metrics.jsonl", "decisions.jsonl", "ckpt.pt", "ckpt_best.pt", ".lock")
    },
}


@pytest.mark.parametrize("init_from", ["scratch", "auto", "resume"])
@pytest.mark.parametrize("name", NOT_OWN)
def test_files_that_no_run_has_written_are_not_changed(name, init_from, half, resume):
    change, expected = NOT_OWN[name]
    change(half)
    before = runs.snapshot(half), sorted(os.listdir(half))
    message = runs.error_of(resume, half, init_from=init_from)
    assert f"{half}" in message and (expected in message or init_from != "auto")
    assert (runs.snapshot(half), sorted(os.listdir(half))) == before


def test_a_link_in_the_place_of_the_locks_holder_is_not_followed(half, resume, tmp_path):
    (tmp_path / "target").write_text("unchanged")
    (half / ".lock.holder").symlink_to(tmp_path / "target")
    assert resume(half, max_iters=4) == 0
    assert (tmp_path / "target").read_text() == "unchanged"


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_file_that_cannot_be_read_is_not_taken_as_absent(name, half, resume, monkeypatch):
    def read(handle, size):
        if os.readlink(f"/proc/self/fd/{handle}").endswith(name):
            raise OSError(5, "Input/output error")
        return original(handle, size)

    for path in half.glob("ckpt*"):
        path.unlink()
    before, original = runs.snapshot(half), os.read
    monkeypatch.setattr(os, "read", read)
    assert f"cannot read {half / name}: Input/output error" in runs.error_of(resume, half, init_from="auto")
    monkeypatch.undo()
    assert runs.snapshot(half) == before


def test_a_folder_that_cannot_be_read_is_not_taken_as_empty(half, resume, monkeypatch):
    def lstat(path):
        raise OSError(5, "Input/output error")

    before = runs.snapshot(half)
    with monkeypatch.context() as m:
        m.setattr(os, "lstat", lstat)
        assert f"cannot read {half}: Input/output error" in runs.error_of(resume, half, init_from="auto")
    assert runs.snapshot(half) == before


def test_a_start_that_is_refused_because_the_disk_is_full_leaves_nothing(start, out, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    out.mkdir()
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in runs.error_of(start, out)
    assert set(os.listdir(out)) <= {".lock"}


def test_data_that_changed_since_the_run_began_are_refused(keys, resume, tmp_path, out):
    data = runs.write_skewed_dataset(tmp_path / "data")
    assert train.main(keys(out, dataset=data, max_iters=3)) == 0
    before, content = runs.snapshot(out), (data / "train.bin").read_bytes()
    (data / "train.bin").write_bytes(content[2:] + content[:2])
    message = runs.error_of(resume, out, dataset=data)
    assert "train.bin of" in message and "has changed since the run began (sha256" in message
    assert runs.snapshot(out) == before


def test_a_copy_of_the_dataset_is_no_change_of_data_and_another_dataset_is_recorded(
    half, resume, tmp_path, monkeypatch, dataset, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dataset, "copy", copy_function=shutil.copyfile)
    runs.write_dataset(Path("other"), runs.VOCAB, seed=9)
    for split in ("train", "val"):  # the same size and time do not make it the same file
        shutil.copystat(dataset / f"{split}.bin", f"other/{split}.bin")
    copied, other = {"max_iters": [3, 4], "dataset": [str(dataset), "./copy"]}, {"dataset": ["./copy", "./other"]}
    sha256 = [json.loads(Path(name, "meta.json").read_text())["sha256"] for name in ("copy", "other")]
    for data, changed in (("./copy", copied), ("./other", other | {"max_iters": [4, 6], "data_sha256": sha256})):
        assert resume(half, dataset=data, max_iters=changed["max_iters"][1]) == 0
        assert runs.config_of(half)["history"][-1]["changed"] == changed
        assert f"resume: dataset={data}" in capsys.readouterr().out
    assert runs.config_of(half)["data_sha256"] == sha256[1]


def test_the_fingerprint_is_that_of_the_open_files_even_if_they_are_replaced(tmp_path):
    folder, other = runs.write_skewed_dataset(tmp_path / "data"), runs.write_dataset(tmp_path / "other", runs.VOCAB)
    expected, opened = TokenData(folder, 8).fingerprint(), TokenData(folder, 8)
    for path in other.iterdir():
        path.replace(folder / path.name)
    assert opened.fingerprint() == expected != TokenData(folder, 8).fingerprint()


def test_nanomoes_checkpoint_is_resumed_in_its_shape_and_recorded_as_the_origin(start, tmp_path, out):
    out.mkdir()
    shutil.copy(runs.NANOMOE, out / "ckpt.pt")
    original = runs.checkpoint(out)
    data = runs.write_dataset(tmp_path / "data", original["model_args"]["vocab_size"])
    for length in (11, 12):
        assert start(out, without=runs.SHAPE, init_from="resume", dataset=data, max_iters=length) == 0
        saved = runs.checkpoint(out)
        assert original["model_args"].items() <= saved["model_args"].items()
        for record in (saved, runs.config_of(out)):
            assert record["weights_from"] == str(out / "ckpt.pt")
            assert record["weights_sha256"] == weights_sha256(original["model"])
    assert runs.steps(out) == [11, 12]


def make_older(out, **changes):
    """Rewrite the checkpoints as an older version did."""
    missing = ("weights_from", "weights_sha256", "history", "incomplete", "lines_sha256")
    for path in out.glob("*.pt"):
        saved = {key: value for key, value in torch.load(path, weights_only=True).items() if key not in missing}
        torch.save(saved | changes, path)


@pytest.mark.parametrize(("init_from", "origin"), [("scratch", None), ("resume", "unknown"), ("gpt2", "unknown")])
def test_a_checkpoint_of_an_older_version_is_resumed(init_from, origin, half, full_run, resume):
    config = {key: value for key, value in runs.checkpoint(half)["config"].items() if key not in ("margin", "arm")}
    make_older(half, config=config | {"init_from": init_from})
    assert resume(half, margin=0.7) == 0
    config = runs.config_of(half)
    assert config["weights_from"] == config["weights_sha256"] == origin == runs.checkpoint(half)["weights_from"]
    assert config["history"][1]["changed"] == {"margin": [None, 0.7], "max_iters": [3, 6]}  # margin was at its default
    assert config["arm"] == "on" and config["incomplete"] == [] and len(config["history"]) == 2
    assert runs.metrics(half, timeless=True) == runs.metrics(full_run, timeless=True)


def test_an_older_versions_best_loss_without_its_checkpoint_is_not_used(half, resume):
    (half / "ckpt_best.pt").unlink()
    make_older(half, best_val_loss=0.5)  # of step 0
    assert resume(half) == 0
    best = runs.checkpoint(half, "ckpt_best.pt")
    assert best["iter_num"] == runs.STEPS and best["best_val_loss"] == runs.metrics(half)[-1]["val/loss"]


def test_dtype_auto_on_resume_is_the_dtype_of_the_run(half, resume):
    make_older(half, config=runs.checkpoint(half)["config"] | {"dtype": "bfloat16"})
    assert "dtype='bfloat16' needs CUDA" in runs.error_of(resume, half, dtype="auto")


SEEDS = [*range(20), 1337, 1338, 2**32, 2**62]


def test_streams_of_every_seed_purpose_and_rank_are_different():
    ranks = [(rank,) for rank in range(16)]
    steps = [(rank, step) for rank in range(1, 4) for step in (0, 1, 250, 1_000_003)]
    streams = [(PERMUTATION,), *((DROPOUT_AND_NOISE, *indices) for indices in ranks + steps)]
    found = [stream_seed(seed, *stream) for seed, stream in itertools.product(SEEDS, streams)]
    assert all(0 <= seed < 2**63 for seed in found)
    used = [seed % 2**32 for seed in found + SEEDS[:-2]]  # by torch's CPU generator; initial weights use the run's seed
    assert len(set(used)) == len(used)
    assert stream_seed(1337, DROPOUT_AND_NOISE, 0) == 575017620961677467  # the same in every version


def test_a_rank_that_joins_on_resume_begins_a_stream_of_its_own(tmp_path):
    seeds = {stream_seed(5, DROPOUT_AND_NOISE, rank) for rank in range(4)} | set(range(100))
    model, _ = models.build(n_layer=1)
    optimizer, progress = models.adamw(model), Progress()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **progress.state_dict()}
    saved["random"] = [{"cpu": torch.get_rng_state()}]
    for seed, rank, step in itertools.product((5, 6), (1, 2), (10, 11)):
        world = SimpleNamespace(rank=rank, world_size=3)
        checkpointer = Checkpointer(tmp_path, model, optimizer, {}, progress, torch.device("cpu"), world, seed)
        (note,) = checkpointer.restore(saved | {"iter_num": step})
        assert "3 ranks, before 1" in note
        assert torch.initial_seed() not in seeds
        seeds.add(torch.initial_seed())


def test_the_permutation_is_drawn_from_its_stream_and_the_initial_weights_from_the_seed():
    keys = dict(n_layer=4, n_head=2, n_embd=16, n_exp=8, block_size=16, seed=5, chrono_signal="shuffled")
    s = from_values(keys | runs.ALL_ON)
    model, _, loop = build(s, 61, torch.device("cpu"))
    assert torch.equal(loop.signals.follows, derangement(2, 8, stream_seed(5, PERMUTATION)))
    other = GPT(GPTConfig(**s.model_args(61)), torch.Generator().manual_seed(5))
    models.assert_same(dict(model.named_parameters()), dict(other.named_parameters()))


@pytest.mark.parametrize("is_saved", [True, False])  # an older version did not save the permutation
def test_noise_has_a_stream_and_a_resumed_shuffled_run_keeps_its_permutation(is_saved, start, out):
    settings = runs.ALL_ON | dict(seed=5, chrono_signal="shuffled")
    assert start(out, **settings, max_iters=2) == 0
    assert torch.initial_seed() == stream_seed(5, DROPOUT_AND_NOISE, 0)
    saved = runs.checkpoint(out)
    follows = saved["chrono"].pop("signals")["follows"]
    expected = derangement(*follows.shape, 99 if is_saved else 5)
    saved["chrono"] |= {"shuffled": {"follows": expected}} if is_saved else {}
    torch.save(saved, out / "ckpt.pt")
    assert start(out, **settings, init_from="resume") == 0
    assert torch.equal(runs.checkpoint(out)["chrono"]["signals"]["follows"], expected)


def test_a_run_of_an_older_version_gets_the_signals_state_of_a_new_run_but_its_permutation(half):
    saved = runs.checkpoint(half)
    del saved["chrono"]["signals"]
    model, _, loop = build(from_values(saved["config"]), runs.VOCAB, torch.device("cpu"))
    found = upgraded(saved, model)["chrono"]["signals"]
    models.assert_same(found, loop.signals.state_dict() | {"follows": derangement(2, 4, 1337)})
    assert found["key"] == stream_seed(1337, PERMUTATION) % 2**62
