"""metrics.jsonl, decisions.jsonl, config.json and the console; and logs that are damaged before a resume."""

import json
import math
import os
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import child, runs
from trainer import checkpointer, environment, timer
from trainer.data import TokenData
from trainer.files import JsonLines
from trainer.settings import from_arguments

TOKENS = 2 * 4 * 16  # micro-batches, sequences, tokens


def metric_names(blocks, experts, groups="routing: load_cv dropped; expert: load", more=()):
    """The documented names. groups: of the metrics per layer and per expert."""
    names = {"step", "tokens", "time/step_ms", "time/tokens_per_s", "lr", "grad_norm", *more}
    names |= {"train/loss", "train/aux_loss", "train/router_z_loss", "train/skipped"}
    for group, metrics in (part.strip().split(": ") for part in groups.split(";")):
        suffixes = [f"_E{e}" for e in range(experts)] if group == "expert" else [""]
        names |= {f"{group}/L{b}{suffix}/{metric}" for b in blocks for suffix in suffixes for metric in metrics.split()}
    return names


ALL_GROUPS = """routing: load_cv dropped js flip flip_set overlap relevance logit_std neff saturation;
    beta: mean std min max spread clamped; coherence: layer phi_slow_min phi_slow_max starving;
    expert: load phi_fast phi_mid phi_slow beta"""


NAMES = [
    (runs.FULL, metric_names([0, 2], 4, ALL_GROUPS, ["lifecycle/candidates"])),
    (dict(n_layer=4, stride=3), metric_names([0, 3], 4)),
    (dict(n_exp=1), metric_names([], 0)),
]


@pytest.mark.parametrize(("changes", "names"), NAMES)
def test_each_step_has_one_line_with_the_documented_names_whose_values_agree(changes, names, start, out):
    start(out, **changes)
    found = runs.metrics(out)
    assert [line["step"] for line in found] == list(range(runs.STEPS + 1))
    assert found[0].keys() == {"step", "val/loss"}
    for line in found[1:]:
        assert line.keys() == names | ({"val/loss"} if line["step"] % 3 == 0 else set())
        assert line["tokens"] == line["step"] * TOKENS
        assert line["time/tokens_per_s"] == pytest.approx(TOKENS * 1000 / line["time/step_ms"])
        loads = [value for name, value in line.items() if name.endswith("/load")]
        assert not loads or sum(loads) == pytest.approx(2)  # of two layers


def test_values_that_are_not_finite_are_null_in_every_file(start, out, log):
    start(out, **runs.FULL, learning_rate=1e30, min_lr=1e30, grad_clip=0)  # the weights overflow in the second step
    found = runs.metrics(out)
    assert found[-1]["train/loss"] is found[-1]["val/loss"] is None
    for name in ("metrics.jsonl", "decisions.jsonl", "config.json"):
        assert (out / name).stat().st_size and not re.search(r"NaN|Infinity", (out / name).read_text())
    JsonLines(log, None, 0).write({"a": math.nan, "b": math.inf, "c": -math.inf, "d": None, "e": 1e300})
    assert runs.lines(log) == [{"a": None, "b": None, "c": None, "d": None, "e": 1e300}]


def test_logged_and_evaluated_steps_have_lines_and_step_times_exclude_evaluations_and_saving(start, monkeypatch, out):
    """On a clock on which a micro-batch takes a second, a validation batch 100 and copying the state 1000."""
    clock, draw, copy = [0.0], TokenData.batch, checkpointer.copy_to_cpu

    def slow_draw(data, split, *place):
        child.wait_for(lambda: all(thread.name != "checkpoint" for thread in threading.enumerate()))  # no save is late
        clock[0] += 1 if split == "train" else 100
        return draw(data, split, *place)

    def slow_copy(value, seen=None):
        clock[0] += 1000 * (seen is None)  # not of a part
        return copy(value, seen)

    monkeypatch.setattr(TokenData, "batch", slow_draw)
    monkeypatch.setattr(checkpointer, "copy_to_cpu", slow_copy)
    monkeypatch.setattr(timer, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    start(out, log_interval=2, eval_interval=3, checkpoint_interval=5)
    found = runs.metrics(out)
    assert [line["step"] for line in found] == [0, 2, 3, 4, 6]
    assert [line["step"] for line in found if "val/loss" in line] == [0, 3, 6]
    times = {line["step"]: line["time/step_ms"] for line in found if "train/loss" in line}
    assert times == {2: 2000, 4: 2000, 6: 2000}
    assert clock[0] == 6 * 2 + 3 * 2 * 100 + 3 * 1000


def test_config_json_has_every_setting_and_the_environment(full_run, dataset):
    found, settings = runs.config_of(full_run), from_arguments([]).flat()
    given = runs.TINY | runs.FULL | {"dataset": str(dataset), "out_dir": str(full_run)}
    assert {key: found[key] for key in settings} == settings | given | {"dtype": "float32", "arm": "on"}
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=runs.ROOT, capture_output=True, text=True)
    assert (found["git_commit"] or "").removesuffix("-dirty") == head.stdout.strip()
    assert found["threads"] == torch.get_num_threads() and found["ranks"] == 1
    assert found["torch"] == torch.__version__ and sys.version.startswith(found["python"])
    assert found["data_sha256"] == json.loads((dataset / "meta.json").read_text())["sha256"]
    assert found["weights_from"] is found["weights_sha256"] is None and found["incomplete"] == []


@pytest.fixture
def git(tmp_path, monkeypatch):
    """git(*arguments) runs git in a folder that stands for the checkout. Returns what it prints."""

    def run(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(environment, "ROOT", tmp_path)
    return run


def test_the_commit_is_that_of_git_describe_and_reading_it_writes_nothing(tmp_path, git):
    assert environment.git_commit() is None
    git("init")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "a change")
    for content, is_dirty in (("a", False), ("changed", True)):
        (tmp_path / "file").write_text(content)
        os.utime(tmp_path / "file", (1, 1))  # git has to look at the content
        before = (tmp_path / ".git" / "index").stat()
        found = environment.git_commit()
        assert (tmp_path / ".git" / "index").stat() == before
        assert found == git("describe", "--always", "--dirty", "--abbrev=40") and found.endswith("-dirty") == is_dirty


def test_the_protocols_commit_is_the_last_one_that_changed_it(tmp_path, git):
    path, other = tmp_path / "protocol.md", tmp_path / "other"
    path.write_text("a")
    assert environment.last_commit("protocol.md") is None  # outside of git
    git("init")
    assert environment.last_commit("protocol.md") is None
    git("add", "protocol.md")
    git("commit", "-m", "a protocol")
    commit = git("rev-parse", "HEAD")
    other.write_text("b")
    git("add", "other")
    git("commit", "-m", "another file")
    other.write_text("changed")
    assert environment.last_commit("protocol.md") == commit != git("rev-parse", "HEAD")
    path.write_text("changed")
    assert environment.last_commit("protocol.md") == f"{commit}-dirty"
    (tmp_path / "new.md").write_text("not committed")
    assert environment.last_commit("new.md") is environment.last_commit("absent.md") is None


def test_a_run_records_the_commit_of_its_protocol_at_each_start(start, out, monkeypatch):
    for step, commit in ((1, "first"), (2, "second")):
        monkeypatch.setattr(environment, "last_commit", lambda path, commit=commit: f"{commit} of {path}")
        assert start(out, protocol="plan.md", init_from="auto", max_iters=step) == 0
    found = runs.config_of(out)
    assert [this["protocol_commit"] for this in found["history"]] == ["first of plan.md", "second of plan.md"]
    assert start(out, protocol="", init_from="resume", max_iters=3) == 0
    assert "protocol_commit" not in runs.config_of(out)["history"][2]


@pytest.mark.parametrize(("top_k", "norm_topk_prob"), [(1, True), (1, False), (2, True)])
def test_settings_are_resolved_and_an_untrained_router_is_warned_about(top_k, norm_topk_prob, start, capsys, out):
    assert start(out, max_iters=0, device="auto", dtype="auto", top_k=top_k, norm_topk_prob=norm_topk_prob) == 0
    is_warned = "does not train the router; set norm_topk_prob=False" in capsys.readouterr().out
    assert is_warned == (top_k == 1 and norm_topk_prob)
    found, cuda = runs.config_of(out), torch.cuda.is_available()
    assert found["dtype"] in (("bfloat16", "float16") if cuda else ("float32",))
    assert found["device"] == ("cuda" if cuda else "cpu")


def test_decisions_have_a_line_for_each_candidate_that_opens_or_is_withdrawn(start, tmp_path):
    few_tokens = dict(chrono_unused_after=2, chrono_unused_tokens=250, chrono_starving_phi=-1, max_iters=4)
    found = []
    for interval in (1, 100):
        start(tmp_path / str(interval), **runs.ALL_ON, **few_tokens, log_interval=interval)
        decisions = runs.lines(tmp_path / str(interval) / "decisions.jsonl")
        found.append(sorted((d["step"], d["expert_id"], d["action"]) for d in decisions))
    opened, withdrawn = ({d[1] for d in found[0] if d[2] == action} for action in ("open", "withdrawn"))
    assert 0 < len(withdrawn) < len(opened) and len(found[0]) == len(opened) + len(withdrawn)
    # the only log line is that of the last step: what is open there has the step at which it opened
    assert found[1] == [d for d in found[0] if d[1] not in withdrawn]


# what is left of the lines of a log, and how many of them are readable
DAMAGE = {
    "deleted": lambda found: (None, 0),
    "empty": lambda found: ([], 0),
    "missing": lambda found: ([*found[:1], *found[2:]], len(found) - 1),
    "damaged": lambda found: ([found[0], found[1][: len(found[1]) // 2] + b"\n", *found[2:]], len(found) - 1),
    "repeated": lambda found: ([found[0], *found], len(found)),
    "changed": lambda found: ([*found[:1], found[1].replace(b"0.", b"1.", 1), *found[2:]], len(found)),
    "cut": lambda found: ([*found[:-1], found[-1][:-10]], len(found) - 1),
}


def damage_log(path, how):
    """Damage a log. Returns how many of its lines are readable."""
    found = path.read_bytes().splitlines(keepends=True)
    left, readable = DAMAGE[how](found)
    path.unlink()
    if left is not None:
        path.write_bytes(b"".join(left))
    assert left != found
    return readable


@pytest.mark.parametrize("name", ["metrics", "decisions"])
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_log_is_reported_and_the_run_stays_marked_as_incomplete(how, name, half, full_run, resume, capsys):
    expected = runs.lines(half / f"{name}.jsonl")
    kept = damage_log(half / f"{name}.jsonl", how)
    assert resume(half, max_iters=4) == 0
    (sentence,) = runs.config_of(half)["incomplete"]
    assert f"incomplete: {sentence}" in capsys.readouterr().out.splitlines()
    number = str(len(expected)) if kept == len(expected) else f"{len(expected) - kept} of {len(expected)} lines"
    assert name in sentence and number in sentence
    found = [line for line in runs.lines(half / f"{name}.jsonl") if line["step"] <= 3]
    assert len(found) == kept and (how == "changed" or found == [line for line in expected if line in found])
    # the mark survives the loss of config.json
    (half / "config.json").write_text("{")
    assert resume(half) == 0
    assert runs.config_of(half)["incomplete"] == runs.checkpoint(half)["incomplete"] == [sentence]
    assert not runs.differing_state(half, full_run, without=("incomplete", "lines"))


@pytest.mark.parametrize("how", ["deleted", "missing", "damaged", "repeated"])
def test_without_digests_the_lines_are_counted(how, half, resume):
    torch.save({k: v for k, v in runs.checkpoint(half).items() if k != "lines_sha256"}, half / "ckpt.pt")
    damage_log(half / "metrics.jsonl", how)
    for length in (4, runs.STEPS):
        assert resume(half, max_iters=length) == 0
        assert len(runs.checkpoint(half)["incomplete"]) == 1


def test_lines_of_earlier_steps_are_dropped(log):
    log.write_text('{"step": 2}\n{"step": 1}\n{"step": 3}\n')
    opened = JsonLines(log, 3, 5, "another digest", one_per_step=False)
    assert opened.damage == "log: 1 of 3 lines up to step 5 are missing or damaged"
    assert [line["step"] for line in runs.lines(log)] == [2, 3]


CHANGED = {"learning_rate": [1e-2, 5e-3], "max_iters": [3, 4]}


def test_what_only_config_json_has_is_kept(half, resume, monkeypatch):
    """A start that found damage and was killed before its first checkpoint."""
    intact = (half / "metrics.jsonl").read_bytes()
    damage_log(half / "metrics.jsonl", "missing")
    with monkeypatch.context() as m:
        m.setattr(checkpointer.Checkpointer, "save", lambda *args, **options: None)
        assert resume(half, max_iters=4, learning_rate=5e-3) == 0
    (mark,) = runs.config_of(half)["incomplete"]
    (half / "metrics.jsonl").write_bytes(intact)  # or the damage would be found again
    assert resume(half) == 0
    assert runs.checkpoint(half)["incomplete"] == runs.config_of(half)["incomplete"] == [mark]
    assert [s["changed"] for s in runs.checkpoint(half)["history"]] == [{}, CHANGED, {"max_iters": [3, 6]}]


@pytest.mark.parametrize("damage", ["deleted", "{", "", "shorter"])
def test_the_history_survives_damage_to_config_json(damage, half, resume):
    assert resume(half, max_iters=4, learning_rate=5e-3) == 0
    config = runs.config_of(half)
    shorter = json.dumps(config | {"history": config["history"][:1]})
    (half / "config.json").unlink()
    if damage != "deleted":
        (half / "config.json").write_text(shorter if damage == "shorter" else damage)
    assert resume(half, learning_rate=5e-3) == 0
    history = runs.config_of(half)["history"]
    assert history == runs.checkpoint(half)["history"] and history[:2] == config["history"] and len(history) == 3
    assert history[1]["changed"] == CHANGED and runs.config_of(half)["incomplete"] == []


def test_a_history_that_neither_file_has_is_reported_as_lost(half, resume):
    torch.save({k: v for k, v in runs.checkpoint(half).items() if k != "history"}, half / "ckpt.pt")
    (half / "config.json").write_text("")
    assert resume(half) == 0
    assert runs.config_of(half)["incomplete"] == ["config.json: the history of the run's starts is lost"]
    assert len(runs.config_of(half)["history"]) == 1
