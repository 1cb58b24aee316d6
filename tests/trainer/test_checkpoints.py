"""Checkpoints: their contents, when and how they are written, and what happens to damaged files."""

import errno
import hashlib
import os
import pickle
import random
import re
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

import train
from tests.helpers import child, runs
from tests.helpers.models import adamw, build, chrono, tokens, train_step
from trainer import checkpoint, checkpointer, files, structure
from trainer.checkpointer import Checkpointer, copy_to_cpu
from trainer.distributed import World
from trainer.guard import NonFiniteGuard
from trainer.progress import Progress
from trainer.runlog import NoLog


def test_a_checkpoint_has_exactly_these_keys_and_agrees_with_the_logs(full_run):
    saved, lines, config = runs.checkpoint(full_run), runs.metrics(full_run), runs.config_of(full_run)
    assert saved.keys() == {
        *("model", "optimizer", "chrono", "guard", "scaler", "random", "model_args", "iter_num", "best_val_loss"),
        *("unfinished", "config", "data", "weights_from", "weights_sha256"),
        *("lines", "lines_sha256", "history", "incomplete", "wandb_id"),
    }
    beta = saved["model"]["router_state.beta_coeff"]
    assert beta.all() and beta.tolist() == [[lines[-1][f"expert/L{b}_E{e}/beta"] for e in range(4)] for b in (0, 2)]
    assert saved["config"] == {key: config[key] for key in saved["config"]}
    assert saved["model"]["lm_head.weight"].data_ptr() == saved["model"]["transformer.wte.weight"].data_ptr()
    for name, digest in saved["lines_sha256"].items():
        assert digest == hashlib.sha256((full_run / f"{name}.jsonl").read_bytes()).hexdigest()


class Log(NoLog):
    """Keeps lines. `sync` waits until `is_open`."""

    def __init__(self):
        self.lines, self.is_open = [], True

    def info(self, line):
        self.lines.append(line)

    def sync(self):
        child.wait_for(lambda: self.is_open)


def checkpointer_of(out, seed=1, **options):
    """A Checkpointer whose every state depends on the seed."""
    model, loop = build(chrono(eta=0.1), seed=seed, beta=seed)
    optimizer, guard, progress = adamw(model, seed * 1e-3), NonFiniteGuard(model), Progress()
    train_step(model, loop, optimizer, [tokens(seed)])
    guard.total += seed
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**seed)
    scaler.scale(torch.ones(()))  # creates its state
    progress.step, progress.best_val_loss, progress.pending = seed, 1.5 * seed, {"step": seed}
    states = model, optimizer, {"chrono": loop, "guard": guard, "scaler": scaler}, progress
    made = Checkpointer(out, *states, device=torch.device("cpu"), world=World(), seed=0, **options)
    made.begin(Log(), {"model_args": {}}, is_saved=False)
    return made


def state_of(c):
    return copy_to_cpu({name: s.state_dict() for name, s in (c.states | {"progress": c.progress}).items()})


def test_restore_loads_every_state_that_save_saved(tmp_path):
    saving, restored = (checkpointer_of(tmp_path, seed) for seed in (1, 2))
    changed = runs.differing(state_of(saving), state_of(restored))
    assert {path.split("/")[1] for path in changed} == state_of(saving).keys()
    saving.save(is_best=True)
    saving.wait()
    drawn = torch.rand(3)  # after the save
    assert restored.restore(checkpoint.load(tmp_path / "ckpt.pt")) == []
    assert runs.differing(state_of(saving), state_of(restored)) == set()
    assert torch.equal(torch.rand(3), drawn)


def test_a_save_returns_while_the_disk_hangs_and_writes_the_state_of_its_call(tmp_path):
    saving = checkpointer_of(tmp_path, interval=2)
    saving.log.is_open, saving.progress.step = False, 1
    before = state_of(saving)["model"]
    saving.save()
    saving.model.lm_head.weight.data.fill_(9)
    assert saving.saved_step is None
    saving.progress.step = 2
    assert not saving.is_due()  # postponed until the disk is free
    saving.log.is_open, saving.progress.step = True, 3
    saving.wait()
    assert saving.is_due()
    assert saving.saved_step == 1 and runs.differing(runs.checkpoint(tmp_path)["model"], before) == set()


@pytest.mark.parametrize("options, expected", [({"interval": 4}, [4, 8]), ({"minutes": 0.5}, [3, 6, 9]), ({}, [])])
def test_saves_are_due_by_steps_and_by_time(options, expected, tmp_path, monkeypatch):
    now, saved = [0.0], []
    monkeypatch.setattr(checkpointer.time, "monotonic", lambda: now[0])
    saving = checkpointer_of(tmp_path, **options)
    for saving.progress.step in range(10):
        if saving.is_due():
            saving.save()
            saving.wait()
            assert not saving.is_due()
            saved.append(saving.progress.step)
        now[0] += 12
    assert saved == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_not_saved_and_reported_once(bad, tmp_path):
    saving = checkpointer_of(tmp_path)
    for saving.progress.step in (1, 2, 3):
        saving.save()
        saving.wait()
        saving.optimizer.state[saving.model.lm_head.weight]["exp_avg"][0, 0] = bad
    assert runs.checkpoint(tmp_path)["iter_num"] == saving.saved_step == 1
    (line,) = saving.log.lines
    assert "optimizer/state/0/exp_avg holds numbers that are not finite" in line and "without protection" in line


@pytest.mark.parametrize("has_links", [True, False])
def test_the_last_two_checkpoints_and_the_best_are_kept(has_links, keys, tmp_path, monkeypatch, out):
    data = runs.write_skewed_dataset(tmp_path / "data")
    if not has_links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError("no hard links")))
    more = dict(max_iters=40, eval_interval=4, checkpoint_interval=5, learning_rate=0.03, decay_lr=False)
    assert train.main(keys(out, dataset=data, **more)) == 0
    found = {path.name: checkpoint.load(path) for path in out.glob("*.pt")}
    losses = {line["step"]: line["val/loss"] for line in runs.metrics(out)[1:] if "val/loss" in line}
    best = min(losses, key=losses.get)
    numbers = {name: saved["iter_num"] for name, saved in found.items()}
    assert numbers.pop("ckpt_previous.pt") in (35, 36)  # 35 if the disk is slow
    assert numbers == {"ckpt.pt": 40, "ckpt_best.pt": best} and best < 40
    assert found["ckpt_best.pt"]["best_val_loss"] == losses[best]


def test_a_checkpoint_and_the_log_are_on_the_disk_before_it_gets_its_name(start, monkeypatch, out):
    events = []
    for call in (os.fsync, os.link, os.replace):

        def record(*args, call=call):
            path = os.readlink(f"/proc/self/fd/{args[0]}") if call.__name__ == "fsync" else args[1]
            events.append(f"{call.__name__} {Path(path).name.replace(f'.{os.getpid()}', '')}")
            return call(*args)

        monkeypatch.setattr(os, call.__name__, record)
    start(out, max_iters=2, eval_interval=1)
    text = ", ".join(events)
    assert "fsync config.json.tmp, replace config.json, fsync out" in text
    write = "fsync metrics.jsonl, fsync decisions.jsonl, fsync ckpt.pt.tmp, "
    best, previous = (f"link {name}.tmp, replace {name}, " for name in ("ckpt_best.pt", "ckpt_previous.pt"))
    rename = "fsync ckpt.pt.tmp, replace ckpt.pt, fsync out"
    assert write + best + rename in text
    assert text.endswith((write + best + previous + rename, write + previous + rename))


def test_without_hard_links_a_copy_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    synced, original = [], os.fsync
    monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError("no hard links")))
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino) or original(handle))
    (tmp_path / "a").write_text("content")
    files.link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "content" and synced == [(tmp_path / "b").stat().st_ino]


def test_a_full_disk_is_reported_once_and_training_continues_until_there_is_space(keys, tmp_path, out, log):
    """No file may exceed 10 kB, which stops checkpoints and the log; after step 32 there is space again."""
    many = dict(max_iters=64, lr_decay_iters=64, eval_interval=8, log_interval=2)
    calm = tmp_path / "calm"
    assert train.main(keys(calm, **many)) == 0
    process = child.start(keys(out, **many), log, until_step=32, file_limit=10_000)
    child.set_file_limit(process.pid, None)
    assert child.finish(process) == 0
    reported = sorted(line for line in log.read_text().splitlines() if re.search("cannot|again|wait", line))
    patterns = [
        "cannot save step 8 in .*: File too large; .* without protection",
        "cannot write .*metrics.jsonl: File too large; ",
        "saved step .*: protected again",
        "the lines that were waiting are written",
    ]
    assert all(re.match(pattern, line) for pattern, line in zip(patterns, reported, strict=True)), reported
    runs.assert_same_run(out, calm)


def test_a_disk_that_stays_full_leaves_the_older_checkpoint_and_exit_status_1(half, keys, log):
    before = (half / "ckpt.pt").read_bytes()
    assert child.run(keys(half, init_from="resume"), log, file_limit=100_000) == 1
    assert (half / "ckpt.pt").read_bytes() == before and len(before) > 100_000
    assert not list(half.glob("*.tmp"))
    assert runs.steps(half) == list(range(runs.STEPS + 1))
    text = log.read_text()
    assert "the state of step 6 is not saved (File too large); the newest checkpoint is of step 3" in text
    assert "Traceback" not in text


def flipped_at(content, place):
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


@pytest.mark.parametrize("damage", [lambda content, place: content[:place], flipped_at])
def test_a_checkpoint_damaged_at_any_byte_is_replaced_by_the_previous_one(damage, full):
    content, intact = (full / "ckpt.pt").read_bytes(), runs.checkpoint(full)
    previous = checkpoint.load(full / "ckpt_previous.pt")
    places = random.Random(7).sample(range(len(content)), 40)
    for place in [*places, 0, 1, *range(len(content) - 100, len(content), 3), len(content) - 1]:
        (full / "ckpt.pt").write_bytes(damage(content, place))
        found, notes, damaged = checkpoint.newest(full)
        if damaged:
            assert damaged == [full / "ckpt.pt"]
            assert len(notes) == 2 and "ckpt.pt is damaged" in notes[0] and "ckpt_previous.pt, step 3" in notes[1]
            assert runs.differing(found, previous) == set()
        else:  # only the mark of the digest is lost
            assert place >= len(content) - 75 and runs.differing(found, intact) == set()


@pytest.mark.parametrize("content", [b"damaged", None])
def test_a_run_whose_newest_checkpoint_is_lost_continues_from_the_previous_one(content, full, full_run, resume, capsys):
    (full / "ckpt.pt").unlink()
    if content is not None:
        (full / "ckpt.pt").write_bytes(content)
    assert resume(full, max_iters=3) == 0
    assert f"continuing from {full / 'ckpt_previous.pt'}, step 3" in capsys.readouterr().out
    assert content is None or runs.checkpoint(full)["iter_num"] == 3  # written again
    assert resume(full) == 0
    runs.assert_same_run(full, full_run)
    assert [path.read_bytes() for path in full.glob("*.damaged")] == [content] * (content is not None)
    assert checkpoint.load(full / "ckpt_previous.pt")["iter_num"] == 3  # not the damaged one


class Bomb:
    """Creates the folder "harm" when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


def changed(**changes):
    return lambda path: torch.save(torch.load(path) | changes, path)


UNUSABLE = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "text": lambda path: path.write_bytes(b"not a checkpoint\n"),
    "text_with_a_dot": lambda path: path.write_bytes(b".gitkeep\n"),
    "list": lambda path: torch.save([1, 2], path),
    "model_alone": lambda path: torch.save({"model": {}}, path),
    "no_loop": changed(chrono={}),
    "no_guard": changed(guard={}),
    "no_weights": changed(model={}),
    "no_random_state": changed(random=[{}]),
    "step_is_text": changed(iter_num="6"),
    "nanomoe_flipped": lambda path: path.write_bytes(flipped_at(runs.NANOMOE.read_bytes(), 40_000)),
    "code_in_torch_format": lambda path: torch.save(Bomb(), path),
    "code_within_settings": changed(config=Bomb()),
    "code_in_a_pickle": lambda path: path.write_bytes(pickle.dumps(Bomb(), protocol=2)),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_checkpoint_gets_one_line_executes_nothing_and_is_not_changed(name, full, resume, monkeypatch):
    monkeypatch.chdir(full.parent)
    for other in ("ckpt_previous.pt", "ckpt_best.pt"):
        (full / other).unlink()
    UNUSABLE[name](full / "ckpt.pt")
    before = runs.snapshot(full)
    assert str(full / "ckpt.pt") in runs.error_of(resume, full)
    assert runs.snapshot(full) == before
    assert not os.path.exists("harm")


def in_optimizer(**changes):
    def change(saved):
        saved["optimizer"]["param_groups"][0] |= changes

    return change


# a change of a checkpoint, and what the message says
WRONG = {
    "random": (dict(random=3), "its random must be a list, not 3"),
    "random_of_a_rank": (dict(random=[{"cpu": [1]}]), "its random/0/cpu must be a tensor of bytes, not a list"),
    "data": (dict(data={"val.bin": {}}), "it lacks data/val.bin/bytes"),
    "lines": (dict(lines={"metrics": -1}), "its lines/metrics must be an integer from 0, not -1"),
    "digests": (dict(lines_sha256=[1]), "its lines_sha256 must be a dict"),
    "unfinished": (dict(unfinished={"a": 1}), "its unfinished must be None, or numbers by name with a step"),
    "weights_sha256": (dict(weights_sha256=torch.ones(2)), "its weights_sha256 must be a text or None, not a Tensor"),
    "history": (dict(history=[{"step": torch.ones(2)}]), "its history/0 must be a dict of plain values"),
    "config": (dict(config={"dataset": ["x"]}), "its config/dataset must be a number, a text,"),
    "betas": (in_optimizer(betas=None), "its optimizer/param_groups/0/betas must be two numbers from 0 to 1, not None"),
    "betas_nan": (in_optimizer(betas=(0.9, float("nan"))), "param_groups/0/betas must be two numbers"),
    "amsgrad": (in_optimizer(amsgrad=True), "param_groups/0/amsgrad must be False"),
    "moments": (lambda saved: saved["optimizer"]["state"][0].pop("exp_avg"), "it lacks optimizer/state/0/exp_avg"),
    "guard": (lambda saved: saved["guard"].update(in_a_row=1.5), "its guard/in_a_row must be a tensor with one number"),
    "large": (lambda saved: saved["guard"].update(reported=2**70), "it holds an integer of 71 bits"),
    "weight": (lambda saved: saved["model"].update({"lm_head.weight": "x"}), "model/lm_head.weight must be a tensor"),
    "expanded": (lambda saved: saved["model"].update(a=torch.ones(1).expand(1 << 40)), "its model/a must be a tensor"),
    "lists_in_model_args": (
        dict(model_args={"n_head": runs.shared_lists(15)}),
        "its model_args/n_head must be",
    ),
    "wide_lists": (dict(model_args={"n_head": runs.shared_lists(11, 4)}), "too many values"),
    "deep_lists": (dict(model_args={"n_head": runs.shared_lists(100, 1)}), "too many values"),
    "many_lists": (dict(model_args={"n_head": runs.shared_lists(60)}), "too many values"),
    "lists_in_unfinished": (dict(unfinished=runs.shared_lists(30)), "too many values"),
    "keys_of_a_number": (lambda saved: saved["model"].update({3: torch.ones(1)}), "the keys of its model must be str"),
    "step_of_a_tensor": (dict(iter_num=torch.tensor(3)), "its iter_num must be an integer from 0, not a Tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_checkpoint_with_a_wrong_value_gets_one_line_with_its_name_and_nothing_is_changed(
    name, half, resume, start, tmp_path
):
    change, expected = WRONG[name]
    saved = runs.checkpoint(half)
    if callable(change):
        change(saved)
    else:
        saved |= change
    torch.save(saved, half / "ckpt.pt")
    before = runs.snapshot(half)
    for call in (lambda: resume(half), lambda: start(tmp_path / "new", init_from=half)):
        message = runs.error_of(call)
        assert message.startswith(f"{half / 'ckpt.pt'} is not a training checkpoint: ") and expected in message
    assert runs.snapshot(half) == before and not (tmp_path / "new").exists()
    with pytest.raises(checkpoint.Damaged, match=re.escape(expected)):
        checkpoint.without_tensors(half / "ckpt.pt")


def test_loading_a_checkpoint_with_a_tensor_of_another_kind_gives_no_warning(half, resume):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # making such a tensor is deprecated
        quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    torch.save(runs.checkpoint(half) | {"best_val_loss": quantized}, half / "ckpt.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch.load would raise
        assert "its best_val_loss must be a number" in runs.error_of(resume, half)
        with pytest.raises(checkpoint.Damaged, match="its best_val_loss must be a number"):
            checkpoint.without_tensors(half / "ckpt.pt")


def test_a_message_about_a_long_value_of_a_checkpoint_is_short(half, resume):
    torch.save(runs.checkpoint(half) | {"config": {"seed": "x" * 10**6}}, half / "ckpt.pt")
    message = runs.error_of(resume, half)
    assert message.startswith(f"{half / 'ckpt.pt'}: seed='xxx") and len(message) < 5000
    assert message.endswith("xxx' must be a whole number at least 0")


def test_checkpoints_that_a_run_and_nanomoe_write_are_not_refused(full_run):
    for path in (*full_run.glob("*.pt"), runs.NANOMOE):
        structure.check(torch.load(path), structure.CHECKPOINT)
        assert checkpoint.load(path).keys() == checkpoint.without_tensors(path).keys()


def test_a_compressed_checkpoint_is_refused_before_it_is_read(full, monkeypatch):
    """A file of 37 MB that would take 8 GB, for example."""
    path = full / "ckpt.pt"
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(full / "small.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for member in stored.namelist():
            small.writestr(member, stored.read(member))
    (full / "small.pt").replace(path)
    monkeypatch.setattr(torch, "load", pytest.fail)
    monkeypatch.setattr(zipfile.ZipFile, "testzip", pytest.fail)
    for read in (checkpoint.load, checkpoint.without_tensors):
        with pytest.raises(checkpoint.Damaged, match="compressed"):
            read(path)


def test_a_note_says_that_damage_to_a_checkpoint_without_checksums_cannot_be_detected(half, resume, start, capsys, out):
    assert resume(half, max_iters=4) == 0
    assert "no checksums" not in capsys.readouterr().out
    torch.save(runs.checkpoint(half), half / "ckpt.pt", _use_new_zipfile_serialization=False)
    assert start(out, init_from=half, max_iters=0) == resume(half) == 0
    assert capsys.readouterr().out.count(f"{half / 'ckpt.pt'} is in torch's format before 1.6") == 2


EIO, EACCES = (OSError(number, os.strerror(number)) for number in (errno.EIO, errno.EACCES))


@pytest.mark.parametrize("place", range(0, 24, 3))
@pytest.mark.parametrize(("errors", "expected"), [([EIO], None), ([EIO] * 99, "Input/output"), ([EACCES], "denied")])
def test_an_error_of_the_system_while_a_checkpoint_is_read_is_no_damage(
    errors, expected, place, full, monkeypatch, resume
):
    """place: how many reads succeed before the error."""

    def read(handle, size):
        is_checkpoint = os.readlink(f"/proc/self/fd/{handle}").endswith("ckpt.pt")
        error = results.pop(0) if results and is_checkpoint else None
        if error is not None:
            raise error
        return original(handle, size)

    before, results, original = runs.snapshot(full), [None] * place + errors, os.read
    monkeypatch.setattr(os, "read", read)
    monkeypatch.setattr(checkpoint, "RETRY_AFTER", (0, 0))
    if expected is None:
        assert runs.differing(checkpoint.load(full / "ckpt.pt"), runs.checkpoint(full)) == set()
    else:
        message = runs.error_of(resume, full)
        assert expected in message and f"cannot read {full / 'ckpt.pt'}" in message
    assert runs.snapshot(full) == before


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_a_lack_of_memory_is_no_damage(error, full, resume, monkeypatch):
    before = runs.snapshot(full)
    monkeypatch.setattr(torch, "load", lambda *args, **options: (_ for _ in ()).throw(error))
    assert "there is not enough memory" in runs.error_of(resume, full)
    assert runs.snapshot(full) == before
