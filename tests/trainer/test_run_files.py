"""What a run leaves in out_dir and in W&B, on tiny runs of train.py: names, repetition, resumption, damaged files."""

import hashlib
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import train
from tests.helpers.runs import (
    ALL_ON,
    NOISY,
    ROOT,
    SLOTS,
    STEPS,
    TINY,
    VOCAB,
    checkpoint,
    differing_state,
    lines,
    metrics,
    one_line,
    snapshot,
    write_dataset,
)
from trainer.data import TokenData
from trainer.errors import UserError
from trainer.runlog import RunLog, wandb_identity
from trainer.settings import from_arguments


def metric_names(blocks, experts, chrono):
    """The design page's names; of the loop's those that exist without a step, and with all five."""
    names = {"step", "tokens", "time/step_ms", "time/tokens_per_s", "lr", "grad_norm"}
    names |= {"train/loss", "train/aux_loss", "train/router_z_loss", "train/skipped"}
    groups = {"routing": ["load_cv", "dropped"]}
    per_expert = ["load"]
    if chrono:
        groups["routing"] += ["js", "flip", "flip_set", "overlap", "relevance", "logit_std", "neff", "saturation"]
        groups["beta"] = ["mean", "std", "min", "max", "spread", "clamped"]
        groups["coherence"] = ["layer", "phi_slow_min", "phi_slow_max", "starving"]
        per_expert += ["phi_fast", "phi_mid", "phi_slow", "beta"]
        names.add("lifecycle/candidates")
    for block in blocks:
        names |= {f"{group}/L{block}/{name}" for group, found in groups.items() for name in found}
        names |= {f"expert/L{block}_E{e}/{name}" for e in range(experts) for name in per_expert}
    return names


def assert_named(found, names):
    """One line a step from 0 on, with `names`; val/loss at steps 0, 3 and 6; only that at step 0."""
    assert [line["step"] for line in found] == list(range(STEPS + 1))
    assert found[0].keys() == {"step", "val/loss"}
    for line in found[1:]:
        assert line.keys() == names | ({"val/loss"} if line["step"] % 3 == 0 else set())


def test_with_all_steps_on_metrics_have_the_documented_names_by_block(full_run):
    assert_named(metrics(full_run), metric_names([0, 2], 4, chrono=True))


def test_with_all_steps_off_metrics_have_the_names_that_need_no_step(start, tmp_path):
    start(tmp_path / "out", n_layer=4, stride=3)
    assert_named(metrics(tmp_path / "out"), metric_names([0, 3], 4, chrono=False))


def test_a_dense_run_has_no_names_of_experts(start, tmp_path):
    start(tmp_path / "out", n_exp=1)
    assert_named(metrics(tmp_path / "out"), metric_names([], 0, chrono=False))


def test_logged_numbers_agree_with_the_settings_and_each_other(full_run):
    for line in metrics(full_run)[1:]:
        step = line["step"]
        assert line["tokens"] == step * SLOTS // 2
        assert line["time/tokens_per_s"] == pytest.approx(SLOTS // 2 * 1000 / line["time/step_ms"])
        done = (step - 1 - 2) / (STEPS - 2)
        decayed = 1e-3 + 0.5 * (1 + math.cos(math.pi * done)) * (1e-2 - 1e-3)
        assert line["lr"] == pytest.approx(1e-2 * step / 3 if step <= 2 else decayed)
        for block in (0, 2):
            beta = [line[f"expert/L{block}_E{e}/beta"] for e in range(4)]
            slow = [line[f"expert/L{block}_E{e}/phi_slow"] for e in range(4)]
            assert line[f"beta/L{block}/mean"] == pytest.approx(sum(beta) / 4, abs=1e-9)
            assert line[f"beta/L{block}/spread"] == pytest.approx(max(beta) - min(beta), abs=1e-9)
            assert line[f"coherence/L{block}/phi_slow_min"] == min(slow)
            assert line[f"coherence/L{block}/phi_slow_max"] == max(slow)
            assert sum(line[f"expert/L{block}_E{e}/load"] for e in range(4)) == pytest.approx(1)


def test_steps_between_log_lines_and_evaluations_leave_no_line(start, tmp_path):
    start(tmp_path / "out", log_interval=2, eval_interval=3, max_iters=6)
    found = metrics(tmp_path / "out")
    assert [line["step"] for line in found] == [0, 2, 3, 4, 6]
    assert [line["step"] for line in found if "val/loss" in line] == [0, 3, 6]
    assert [line["step"] for line in found if "train/loss" in line] == [2, 4, 6]


OVERFLOW = dict(learning_rate=1e30, min_lr=1e30, grad_clip=0)  # weights of 1e30 overflow in the second step


def test_json_has_null_where_a_run_has_no_number(start, tmp_path):
    out = tmp_path / "out"
    lifecycle = dict(chrono_unused_after=1, chrono_unused_tokens=10**9, chrono_starving_phi=-1)
    start(out, **ALL_ON, **lifecycle, **OVERFLOW)
    found = metrics(out)
    assert None in [line.get("train/loss") for line in found[2:]]
    assert found[-1]["val/loss"] is None
    assert lines(out / "decisions.jsonl")
    for name in ("metrics.jsonl", "decisions.jsonl", "config.json"):
        assert not re.search(r"NaN|Infinity", (out / name).read_text())


def test_infinite_and_undefined_values_are_written_as_null(tmp_path):
    settings = from_arguments([f"--out_dir={tmp_path / 'out'}"])
    (tmp_path / "out").mkdir()
    log = RunLog(settings, settings.flat(), {})
    log.write({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": None, "e": 1e300, "f": 0.1})
    log.close()
    expected = {"step": 1, "a": None, "b": None, "c": None, "d": None, "e": 1e300, "f": 0.1}
    assert metrics(tmp_path / "out") == [expected]


def test_the_best_validation_loss_outlives_an_evaluation_without_a_number(start, tmp_path):
    start(tmp_path / "out", eval_interval=1, max_iters=2)
    start(tmp_path / "out", **OVERFLOW, eval_interval=1, init_from="resume")
    losses = [line["val/loss"] for line in metrics(tmp_path / "out")[1:]]
    assert None in losses
    assert checkpoint(tmp_path / "out")["best_val_loss"] == min(loss for loss in losses if loss is not None)


def test_config_json_holds_every_key_and_what_the_run_ran_on(full_run, dataset):
    found = json.loads((full_run / "config.json").read_text())
    given = TINY | ALL_ON | NOISY | {"dataset": str(dataset), "out_dir": str(full_run)}
    keys = from_arguments([]).flat()
    assert {key: found[key] for key in keys} == keys | given | {"dtype": "float32", "arm": "on"}
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    commit = found["git_commit"]
    assert (commit.removesuffix("-dirty") if commit else "") == head.stdout.strip()
    assert found["threads"] == torch.get_num_threads()
    assert found["torch"] == torch.__version__
    assert sys.version.startswith(found["python"])
    for split in ("train", "val"):
        content = (dataset / f"{split}.bin").read_bytes()
        assert found["data_sha256"][f"{split}.bin"] == hashlib.sha256(content).hexdigest()


def test_config_json_says_what_auto_became(start, tmp_path):
    start(tmp_path / "out", device="auto", dtype="auto", max_iters=0)
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    cuda = torch.cuda.is_available()
    assert found["dtype"] in (("bfloat16", "float16") if cuda else ("float32",))
    assert found["device"] == ("cuda" if cuda else "cpu")


@pytest.mark.parametrize("count", [1, 5, 6])
def test_a_run_does_exactly_max_iters_steps_and_saves_the_last(count, start, tmp_path, monkeypatch):
    drawn = []
    original = TokenData.batch

    def spy(self, split, seed, step, micro, batch_size):
        drawn.append((split, step, micro))
        return original(self, split, seed, step, micro, batch_size)

    monkeypatch.setattr(TokenData, "batch", spy)
    start(tmp_path / "out", **ALL_ON, max_iters=count)
    train_batches = [(step, micro) for split, step, micro in drawn if split == "train"]
    assert train_batches == [(step, micro) for step in range(count) for micro in range(2)]
    saved = checkpoint(tmp_path / "out")
    assert saved["iter_num"] == count
    assert {float(state["step"]) for state in saved["optimizer"]["state"].values()} == {count}
    assert saved["chrono"]["coherence"]["step"] == count
    assert metrics(tmp_path / "out")[-1]["step"] == count


def test_no_steps_leave_one_line_and_no_checkpoint(start, tmp_path):
    assert start(tmp_path / "out", max_iters=0) == 0
    assert [line.keys() for line in metrics(tmp_path / "out")] == [{"step", "val/loss"}]
    assert not (tmp_path / "out" / "ckpt.pt").exists()


def test_a_new_run_into_the_folder_of_another_is_refused_and_changes_nothing(full_run, start):
    before = snapshot(full_run)
    logs = {"config.json", "metrics.jsonl", "decisions.jsonl"}
    assert before.keys() == logs | {"ckpt.pt", "ckpt_previous.pt", "ckpt_best.pt"}
    with pytest.raises(UserError) as error:
        start(full_run, seed=5)
    message = one_line(error)
    assert all(part in message for part in (str(full_run), "--init_from=resume", "--out_dir"))
    assert snapshot(full_run) == before


def test_resuming_where_there_is_no_checkpoint_is_refused_and_makes_nothing(start, tmp_path):
    with pytest.raises(UserError) as error:
        start(tmp_path / "out", init_from="resume")
    assert all(part in one_line(error) for part in (str(tmp_path / "out" / "ckpt.pt"), "--init_from=auto"))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_refused(start, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError) as error:
        start(tmp_path / "file" / "out")
    assert str(tmp_path / "file" / "out") in one_line(error)


def test_a_resumed_run_is_bit_identical_to_an_unbroken_one(full_run, start, tmp_path):
    out = tmp_path / "out"
    start(out, **ALL_ON, **NOISY, max_iters=3)
    assert checkpoint(out)["iter_num"] == 3
    shutil.copytree(out, tmp_path / "other")
    assert start(out, **ALL_ON, **NOISY, init_from="resume") == 0
    assert differing_state(out, full_run) == set()
    assert metrics(out, timeless=True) == metrics(full_run, timeless=True)
    assert lines(out / "decisions.jsonl") == lines(full_run / "decisions.jsonl")

    # the generator's state is part of it: without it dropout and router noise would be others
    saved = checkpoint(tmp_path / "other")
    saved["random"] = [{"cpu": torch.Generator().manual_seed(1).get_state()}]
    torch.save(saved, tmp_path / "other" / "ckpt.pt")
    start(tmp_path / "other", **ALL_ON, **NOISY, init_from="resume")
    assert "/model/transformer.wte.weight" in differing_state(tmp_path / "other", full_run)


def test_resuming_a_finished_run_changes_neither_its_state_nor_its_metrics(full_run, start, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(full_run, out)
    assert start(out, **ALL_ON, **NOISY, init_from="resume") == 0
    assert differing_state(out, full_run) == set()
    assert (out / "metrics.jsonl").read_bytes() == (full_run / "metrics.jsonl").read_bytes()
    assert (out / "decisions.jsonl").read_bytes() == (full_run / "decisions.jsonl").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_it_and_lets_the_run_go_on(number, full_run, start, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    ticks = []
    monkeypatch.setattr(
        RunLog, "tick", lambda self: ticks.append(1) or (len(ticks) == 2 and signal.raise_signal(number))
    )
    assert start(out, **ALL_ON, **NOISY) == 128 + number
    monkeypatch.undo()
    assert "--init_from=resume" in capsys.readouterr().out
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert checkpoint(out)["iter_num"] == 2
    assert start(out, **ALL_ON, **NOISY, init_from="resume") == 0
    assert differing_state(out, full_run) == set()
    assert metrics(out, timeless=True) == metrics(full_run, timeless=True)


WITH_CANDIDATES = dict(chrono_unused_after=2, chrono_unused_tokens=150, chrono_starving_phi=-1)


def test_decisions_hold_a_line_for_every_candidate_that_opens_or_is_withdrawn(start, tmp_path):
    start(tmp_path / "out", **ALL_ON, **WITH_CANDIDATES, log_interval=4)
    start(tmp_path / "watched", **ALL_ON, **WITH_CANDIDATES)
    expected = []
    for block in (0, 2):
        for e in range(4):
            tokens, was_open = 0, False
            for line in metrics(tmp_path / "watched")[1:]:
                tokens += round(line[f"expert/L{block}_E{e}/load"] * SLOTS)
                is_open = line["step"] >= 2 and tokens < 150
                if is_open != was_open:
                    action = "open" if is_open else "withdrawn"
                    expected.append((line["step"], f"L{block}_E{e}", action))
                was_open = is_open
    assert {action for _, _, action in expected} == {"open", "withdrawn"}
    found = lines(tmp_path / "watched" / "decisions.jsonl")
    assert sorted((d["step"], d["expert_id"], d["action"]) for d in found) == sorted(expected)
    assert {d["reason"] for d in found} == {"low_observability"}
    # a coarser log tells the same steps of what is open at its lines
    coarse = lines(tmp_path / "out" / "decisions.jsonl")
    assert {(d["step"], d["expert_id"], d["action"]) for d in coarse} <= set(expected)


def test_candidates_that_open_between_the_last_log_line_and_the_end_are_told(start, tmp_path):
    never_enough = WITH_CANDIDATES | dict(chrono_unused_tokens=10**9)
    start(tmp_path / "out", **ALL_ON, **never_enough, log_interval=100)
    found = lines(tmp_path / "out" / "decisions.jsonl")
    assert sorted(d["expert_id"] for d in found) == [f"L{block}_E{e}" for block in (0, 2) for e in range(4)]
    assert {d["step"] for d in found} == {2}


def test_a_run_killed_after_its_checkpoint_and_resumed_leaves_the_files_of_an_unbroken_one(
    start, tmp_path, monkeypatch
):
    # candidates open at step 3, are saved at step 3 and are reported at step 4, which the resumed run does again
    keys = ALL_ON | NOISY | dict(chrono_unused_after=3, chrono_unused_tokens=10**9, chrono_starving_phi=-1)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    original = train.checkpoints.write

    def write_and_keep(out_dir, state, best):
        original(out_dir, state, best)
        shutil.copy(out_dir / "ckpt.pt", tmp_path / f"{state['iter_num']}.pt")

    monkeypatch.setattr(train.checkpoints, "write", write_and_keep)
    start(straight, **keys, log_interval=2)
    decisions = lines(straight / "decisions.jsonl")
    assert {d["step"] for d in decisions} == {3}
    assert len(decisions) == 8

    shutil.copytree(straight, killed)
    shutil.copy(tmp_path / "3.pt", killed / "ckpt.pt")
    written = (killed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(written[:-1]) + written[-1][: len(written[-1]) // 2])
    assert start(killed, **keys, log_interval=2, init_from="resume") == 0
    assert differing_state(killed, straight) == set()
    assert metrics(killed, timeless=True) == metrics(straight, timeless=True)
    assert lines(killed / "decisions.jsonl") == decisions


def test_two_runs_from_one_seed_are_bit_identical_and_from_two_are_not(full_run, start, tmp_path):
    torch.manual_seed(99)
    start(tmp_path / "same", **ALL_ON, **NOISY)
    start(tmp_path / "other", **ALL_ON, **NOISY, seed=2)
    assert differing_state(tmp_path / "same", full_run) == set()
    assert metrics(tmp_path / "same", timeless=True) == metrics(full_run, timeless=True)
    differing = differing_state(tmp_path / "other", full_run)
    weights = {f"/model/{name}" for name, value in checkpoint(full_run)["model"].items() if value.ndim > 1}
    assert weights - {"/model/router_state.relevance"} <= differing


def test_a_checkpoint_holds_the_loops_state_and_loads_without_code(full_run):
    saved = checkpoint(full_run)
    last = metrics(full_run)[-1]
    for row, block in enumerate((0, 2)):
        for e in range(4):
            beta = saved["model"]["router_state.beta_coeff"][row, e].item()
            assert beta == last[f"expert/L{block}_E{e}/beta"] != 0
    assert saved["config"] == {key: json.loads((full_run / "config.json").read_text())[key] for key in saved["config"]}
    assert saved["best_val_loss"] == min(line["val/loss"] for line in metrics(full_run)[1:] if "val/loss" in line)


def test_evaluation_only_of_a_saved_run_tells_its_loss_and_changes_nothing(full_run, start, capsys):
    before = snapshot(full_run)
    capsys.readouterr()
    assert start(full_run, **ALL_ON, **NOISY, init_from="resume", eval_only=True) == 0
    assert f"{metrics(full_run)[-1]['val/loss']:.4f}" in capsys.readouterr().out
    assert snapshot(full_run) == before


def resume_without_keys(out, dataset, **changes):
    keys = {"init_from": "resume", "out_dir": out, "dataset": dataset} | changes
    return train.main([f"--{key}={value}" for key, value in keys.items()])


def test_a_run_resumed_without_its_settings_keeps_them(full_run, start, tmp_path, dataset, capsys):
    out = tmp_path / "out"
    start(out, **ALL_ON, **NOISY, max_iters=3)
    assert resume_without_keys(out, dataset, max_iters=STEPS) == 0
    assert differing_state(out, full_run) == set()
    assert metrics(out, timeless=True) == metrics(full_run, timeless=True)
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("resume:")] == [
        "resume: max_iters=6, before 3"
    ]


@pytest.mark.parametrize(
    "key, value",
    [("n_layer", 2), ("n_head", 1), ("n_embd", 32), ("n_exp", 8), ("block_size", 8), ("block_size", 64)]
    + [("stride", 1), ("bias", True), ("use_noisy_top_k", False)],
)
def test_another_shape_on_resume_is_refused_by_the_name_of_its_key(key, value, full_run, start):
    before = snapshot(full_run)
    with pytest.raises(UserError) as error:
        start(full_run, **ALL_ON, **(NOISY | {key: value}), init_from="resume")
    assert one_line(error).startswith(f"{key}={value}, but the checkpoint")
    assert snapshot(full_run) == before


def test_decisions_count_the_trainers_steps_where_coherence_is_switched_on_later(start, tmp_path):
    out = tmp_path / "out"
    start(out, max_iters=3)
    watched = ALL_ON | dict(chrono_prune_phi=1, chrono_prune_min_tokens=0, chrono_prune_min_updates=1)
    assert start(out, **watched, init_from="resume") == 0
    # low_coherence needs two updates: those of steps 4 and 5
    assert {d["step"] for d in lines(out / "decisions.jsonl")} == {5}


@pytest.mark.parametrize(
    "keys, warned", [(dict(top_k=1), True), (dict(top_k=1, norm_topk_prob=False), False), ({}, False)]
)
def test_a_router_that_the_cross_entropy_cannot_train_is_told_at_start(keys, warned, start, tmp_path, capsys):
    assert start(tmp_path / "out", max_iters=0, **keys) == 0
    said = capsys.readouterr().out
    assert ("does not train the router; set norm_topk_prob=False" in said) == warned


def test_changed_settings_are_told_and_stay_in_config_jsons_history(start, tmp_path, capsys):
    out = tmp_path / "out"
    start(out, max_iters=3)
    capsys.readouterr()
    start(out, init_from="resume", learning_rate=2e-3, top_k=1)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resume:")]
    assert said == [
        "resume: top_k=1, before 2",
        "resume: learning_rate=0.002, before 0.01",
        "resume: max_iters=6, before 3",
    ]
    start(out, init_from="resume", learning_rate=3e-3, top_k=1, max_iters=7)
    config = json.loads((out / "config.json").read_text())
    assert config["learning_rate"] == 3e-3
    assert [(start["step"], start["changed"]) for start in config["history"]] == [
        (0, {}),
        (3, {"top_k": [2, 1], "learning_rate": [0.01, 0.002], "max_iters": [3, 6]}),
        (6, {"learning_rate": [0.002, 0.003], "max_iters": [6, 7]}),
    ]
    assert {"time", "host", "threads", "torch", "git_commit"} <= config["history"][0].keys()


def test_steps_on_a_dense_checkpoint_are_refused(start, tmp_path):
    out = tmp_path / "out"
    start(out, n_exp=1, max_iters=3)
    with pytest.raises(UserError) as error:
        start(out, init_from="resume", chrono_router=True)
    assert "n_exp" in one_line(error)


def test_a_dataset_may_be_a_path_from_the_working_directory(start, dataset, tmp_path, monkeypatch):
    shutil.copytree(dataset, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert start("out", dataset="./mine", max_iters=1) == 0


def test_nanomoes_checkpoint_is_resumed_in_its_own_shape(start, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(ROOT / "tests" / "golden" / "nanomoe_ckpt.pt", out / "ckpt.pt")
    original = checkpoint(out)
    shape = ("n_layer", "n_head", "n_embd", "n_exp", "block_size", "vocab_size", "train_capacity", "eval_capacity")
    dataset = write_dataset(tmp_path / "data", original["model_args"]["vocab_size"])
    rest = {key: TINY[key] for key in ("batch_size", "eval_interval", "eval_iters", "log_interval", "device")}
    assert resume_without_keys(out, dataset, **rest, max_iters=original["iter_num"] + 2) == 0
    saved = checkpoint(out)
    assert saved["iter_num"] == original["iter_num"] + 2
    assert {key: saved["model_args"][key] for key in shape} == {key: original["model_args"][key] for key in shape}
    steps = [line["step"] for line in metrics(out)]
    assert steps == [original["iter_num"] + 1, original["iter_num"] + 2]


def test_resuming_with_a_larger_vocabulary_is_refused_and_changes_nothing(full_run, start, tmp_path):
    before = snapshot(full_run)
    with pytest.raises(UserError) as error:
        start(full_run, **ALL_ON, init_from="resume", dataset=write_dataset(tmp_path / "more", VOCAB + 1))
    assert all(part in one_line(error) for part in ("61", "62", str(tmp_path / "more")))
    assert snapshot(full_run) == before


class Bomb:
    """Unpickled, it makes the folder `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["torch", "hidden", "pickle"])
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_nothing(form, full_run, start, tmp_path):
    out, bomb = tmp_path / "out", Bomb(tmp_path / "harm")
    shutil.copytree(full_run, out)
    if form == "pickle":
        (out / "ckpt.pt").write_bytes(pickle.dumps(bomb, protocol=2))
        pickle.loads((out / "ckpt.pt").read_bytes())
    else:
        torch.save(bomb if form == "torch" else checkpoint(out) | {"config": bomb}, out / "ckpt.pt")
        torch.load(out / "ckpt.pt", weights_only=False)
    assert bomb.path.exists()  # it is armed
    bomb.path.rmdir()
    before = snapshot(out)
    with pytest.raises(UserError) as error:
        start(out, **ALL_ON, **NOISY, init_from="resume")
    assert str(out / "ckpt.pt") in one_line(error)
    assert not bomb.path.exists()
    assert snapshot(out) == before


def cut(content, share):
    return content[: int(len(content) * share)]


def in_torch_format(value, path):
    torch.save(value, path)
    return path.read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content, path: b"", id="empty"),
        pytest.param(lambda content, path: cut(content, 0.001), id="first_bytes"),
        pytest.param(lambda content, path: cut(content, 0.5), id="half"),
        pytest.param(lambda content, path: content[:-1], id="last_byte_lost"),
        pytest.param(lambda content, path: b"not a checkpoint\n", id="text"),
        pytest.param(lambda content, path: b".gitkeep\n", id="text_with_a_dot"),
        pytest.param(lambda content, path: in_torch_format([1, 2], path), id="list"),
        pytest.param(lambda content, path: in_torch_format({"model": {}}, path), id="model_alone"),
        pytest.param(lambda content, path: in_torch_format(torch.load(path) | {"chrono": {}}, path), id="no_coherence"),
        pytest.param(lambda content, path: in_torch_format(torch.load(path) | {"model": {}}, path), id="no_weights"),
    ],
)
def test_a_damaged_checkpoint_gets_one_line_and_changes_nothing(damage, full_run, start, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(full_run, out)
    path = out / "ckpt.pt"
    path.write_bytes(damage(path.read_bytes(), path))
    (out / "ckpt_previous.pt").unlink()
    (out / "ckpt_best.pt").unlink()
    before = snapshot(out)
    with pytest.raises(UserError) as error:
        start(out, **ALL_ON, **NOISY, init_from="resume")
    assert str(path) in one_line(error)
    assert snapshot(out) == before


@pytest.fixture
def out(tmp_path_factory):
    """A folder whose path does not hold "wandb", as tmp_path does here: it is looked for in what is printed."""
    return tmp_path_factory.mktemp("run") / "out"


@pytest.fixture
def logged_out(tmp_path, monkeypatch):
    """W&B as on a machine that has never logged in; its settings are read anew."""
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    wandb.teardown()
    yield wandb
    wandb.teardown()


def about_wandb(capfd):
    out, err = capfd.readouterr()
    return [line for line in (out + err).splitlines() if re.search("w&b|wandb", line, re.IGNORECASE)]


def offline_folders(out):
    return sorted((out / "wandb").glob("offline-run-*"))


def test_without_a_login_wandb_is_offline_and_one_line_names_the_folder_to_sync(start, out, logged_out, capfd):
    assert start(out, **ALL_ON, wandb_log=True, max_iters=3) == 0
    (line,) = about_wandb(capfd)
    assert "offline" in line and "not logged in" in line
    (folder,) = offline_folders(out)
    assert re.search(r"wandb sync (.+)$", line)[1] == str(folder)
    logged_out.teardown()  # its service writes the last records when it ends
    (record,) = folder.glob("*.wandb")
    content = record.read_bytes()
    for name in metrics(out)[-1]:
        assert name.encode() in content
    assert record.name == f"run-{checkpoint(out)['wandb_id']}.wandb"

    # a resumed run is the same one to W&B, in a folder of its own
    assert start(out, **ALL_ON, wandb_log=True, init_from="resume") == 0
    assert len(about_wandb(capfd)) == 1
    assert [[f.name for f in folder.glob("*.wandb")] for folder in offline_folders(out)] == [[record.name]] * 2
    assert [line["step"] for line in metrics(out)] == list(range(STEPS + 1))


def test_with_a_login_and_no_network_wandb_is_offline_soon_and_says_why(start, out, logged_out, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    before = time.monotonic()
    assert start(out, wandb_log=True) == 0
    assert time.monotonic() - before < 15
    (line,) = about_wandb(capfd)
    assert "offline" in line and "http://127.0.0.1:9 cannot be reached" in line
    (folder,) = offline_folders(out)
    assert str(folder) in line


class FailingRun:
    """Stands for wandb's run; `failing` is the method that raises."""

    id = "abc"
    url = "http://127.0.0.1:9/abc"
    settings = type("Settings", (), {"sync_dir": "nowhere"})

    def __init__(self, failing):
        self.failing = failing
        self.calls = []

    def _call(self, name):
        self.calls.append(name)
        if name == self.failing:
            raise ConnectionError("the first line\nthe second")

    def define_metric(self, *args, **kwargs):
        self._call("start")

    def log(self, *args, **kwargs):
        self._call("log")

    def finish(self):
        self._call("finish")


@pytest.mark.parametrize(
    "failing, calls",
    [("start", ["start"]), ("log", ["start", "log"]), ("finish", ["start", *["log"] * (STEPS + 1), "finish"])],
)
def test_a_wandb_that_fails_does_not_end_training_and_is_told_once(
    failing, calls, start, out, logged_out, monkeypatch, capfd
):
    run = FailingRun(failing)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(logged_out, "init", lambda **identity: run)
    assert start(out, wandb_log=True) == 0
    assert run.calls == calls
    told = [line for line in about_wandb(capfd) if "could not" in line]
    assert told == [f"W&B: could not {failing} (ConnectionError: the first line); going on without it"]
    assert [line["step"] for line in metrics(out)] == list(range(STEPS + 1))


def test_a_machine_without_wandb_trains_and_says_so_once(start, out, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert start(out, wandb_log=True) == 0
    (line,) = about_wandb(capfd)
    assert "going on without it" in line
    assert metrics(out)[-1]["step"] == STEPS


def test_what_reaches_wandb_is_what_metrics_jsonl_holds(start, out, logged_out, monkeypatch):
    run = FailingRun(None)
    sent, identity = [], {}
    run.log = lambda values, step: sent.append((step, values))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(logged_out, "init", lambda **given: identity.update(given) or run)
    start(out, **ALL_ON, wandb_log=True)
    found = metrics(out)
    assert [step for step, _ in sent] == [line["step"] for line in found]
    assert [values for _, values in sent] == [{k: v for k, v in line.items() if v is not None} for line in found]
    config = json.loads((out / "config.json").read_text())
    assert identity["config"] == config


def test_runs_with_beta_on_and_off_share_a_wandb_group_and_differ_in_job_type():
    on, off, other_seed, other_shape = (
        wandb_identity(from_arguments([str(ROOT / path), *more]))
        for path, *more in (
            ["config/vertical_slice.py"],
            ["config/beta_off.py"],
            ["config/vertical_slice.py", "--seed=2"],
            ["config/vertical_slice.py", "--n_exp=16"],
        )
    )
    assert on["group"] == off["group"] == other_seed["group"] != other_shape["group"]
    assert on["project"] == off["project"]
    assert on["job_type"] == other_seed["job_type"] != off["job_type"]
    assert on["name"] != off["name"]
    assert on["tags"] != other_seed["tags"]
