"""audit.py: what it keeps, continues, refuses and leaves alone; pruned, damaged and untouched twins."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import audit
import train
from auditing import damage, healing, measure, report
from auditing.cache import Cache
from auditing.damage import Moved, detections, threshold
from auditing.twins import Twin
from comparison.runs import load_run
from tests.comparison.studies import change_config
from tests.helpers.runs import (
    ALL_ON,
    ROOT,
    VOCAB,
    arguments,
    differing,
    error_of,
    val_losses,
    write_dataset,
    write_skewed_dataset,
)  # fmt: skip
from trainer import checkpoint
from trainer.data import EVAL_SEED, TokenData
from trainer.interventions import masked, moe_layer
from trainer.weights import build_model

TINY = ALL_ON | dict(
    **dict(n_layer=3, n_head=2, n_embd=16, n_exp=4, block_size=16, batch_size=4, gradient_accumulation_steps=1),
    **dict(max_iters=12, lr_decay_iters=12, warmup_iters=0, learning_rate=1e-2, min_lr=1e-3, dropout=0.1),
    **dict(eval_interval=6, eval_iters=2, log_interval=6, device="cpu", wandb_log=False, use_noisy_top_k=True),
)
FEW = ["--batches=2", "--max_batches=3", "--subset_batches=1", "--device=cpu"]
QUICK = ["--batches=2", "--max_batches=2", "--subset_batches=0", "--device=cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a dataset, and two runs in `study`. Do not write to it."""
    folder = tmp_path_factory.mktemp("audit")
    data = write_skewed_dataset(folder / "data")
    for seed in (1, 2):
        out = folder / "study" / f"on{seed}"
        train.main(arguments(TINY | dict(dataset=data, out_dir=out, arm="on", seed=seed)))
    return folder


@pytest.fixture
def study(folder, tmp_path):
    """A copy of the two runs."""
    return shutil.copytree(folder / "study", tmp_path / "study")


@pytest.fixture
def one(study):
    """A copy of the first run."""
    return study / "on1"


@pytest.fixture(autouse=True)
def numbers_only(monkeypatch):
    """Reports without pages and figures, which have tests of their own."""

    def write(out, groups, left_out, command, date, *more):
        out.mkdir(parents=True, exist_ok=True)
        numbers = audit_json(groups, left_out)
        (out / "audit.json").write_text(json.dumps(numbers))
        return {}

    monkeypatch.setattr(report, "write", write)


def audit_json(groups, left_out):
    from auditing.results import as_json

    return as_json(groups, left_out, "", "")


def audited(*given):
    """The numbers of an audit that succeeds."""
    assert audit.main([str(a) for a in given]) == 0
    out = next((str(a).split("=", 1)[1] for a in given if str(a).startswith("--out_dir=")), str(given[0]))
    with open(os.path.join(out, "audit.json")) as f:
        return json.load(f)


def files_of(folder):
    """{path: digest} of all files in a folder."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def cache_lines(run):
    return [json.loads(line) for line in (run / measure.CACHE).read_text().splitlines()]


def test_an_audit_changes_nothing_in_the_folder_of_a_run_but_its_own(study, tmp_path, monkeypatch):
    monkeypatch.setattr(damage, "WARMUP", 1)
    before = files_of(study)
    everything = [*FEW, "--heal=1", "--damage=1", f"--out_dir={tmp_path / 'report'}"]
    numbers = audited(study, *everything)
    after = files_of(study)
    assert {path: after[path] for path in before} == before
    assert all(path.split("/")[1] == "audit" for path in after.keys() - before.keys())
    (arm,) = numbers["arms"].values()
    assert numbers["left_out"] == [] and arm["runs"].keys() == {str(study / "on1"), str(study / "on2")}
    first = cache_lines(study / "on1")
    again = audited(study, *everything)
    assert again == numbers and cache_lines(study / "on1") == first  # nothing is measured twice
    for run in arm["runs"].values():
        assert {r["place"] for r in run["masked_sets"]} == {"L0", "L2", "every layer"}
        assert {h["criterion"] for h in run["healing"]} == run["scores"].keys()
        for place in ("L0", "L2"):
            (single,) = (r for r in run["masked_sets"] if (r["place"], r["size"]) == (place, 1))
            assert single["is_exact"] and single["best"] == pytest.approx(min(single["random"]))
    assert len(arm["detections"]) == len(damage.DAMAGES) * len(damage.SIGNALS)


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [0, 2, 7])
def test_an_audit_that_fails_in_between_continues_where_it_stopped(one, folder, after, monkeypatch, tmp_path):
    whole = shutil.copytree(folder / "study" / "on1", tmp_path / "other" / "on1")
    expected = audited(whole, *FEW)
    append, written = Cache.append, []

    def dies(self, line):
        if len(written) == after:
            with open(self.path, "ab") as f:
                f.write(json.dumps(line).encode()[: 10 * after])  # a part of a line
            raise Killed
        append(self, line)
        written.append(line)

    monkeypatch.setattr(Cache, "append", dies)
    with pytest.raises(Killed):
        audit.main([str(one), *FEW])
    monkeypatch.setattr(Cache, "append", lambda self, line: (append(self, line), written.append(line)))
    found = audited(one, *FEW)
    assert str(found["arms"]).replace(str(one), "") == str(expected["arms"]).replace(str(whole), "")
    assert cache_lines(one) == cache_lines(whole) and written == cache_lines(whole)[1:]


SIGKILLED = """
import os, signal, sys
from auditing import measure
import audit
measured = measure.measure_batch
def measure_batch(trained, index):
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return measured(trained, index)
measure.measure_batch = measure_batch
audit.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_an_audit_that_is_killed_continues_where_it_stopped(one, folder, tmp_path):
    child = subprocess.run([sys.executable, "-c", SIGKILLED, str(one), *QUICK], cwd=ROOT, capture_output=True)
    assert child.returncode == -signal.SIGKILL
    assert [line.get("batch") for line in cache_lines(one) if "batch" in line] == [0]
    whole = shutil.copytree(folder / "study" / "on1", tmp_path / "other" / "on1")
    found, expected = audited(one, *QUICK), audited(whole, *QUICK)
    assert str(found["arms"]).replace(str(one), "") == str(expected["arms"]).replace(str(whole), "")


def test_a_signal_ends_the_audit_and_keeps_what_was_measured(one, monkeypatch, capsys):
    measured = measure.measure_batch

    def interrupted(trained, index):
        if index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return measured(trained, index)

    monkeypatch.setattr(measure, "measure_batch", interrupted)
    assert audit.main([str(one), *QUICK]) == 128 + signal.SIGTERM
    assert "to continue: repeat the command" in capsys.readouterr().out
    assert [line["batch"] for line in cache_lines(one) if "batch" in line] == [0] and not (one / "audit.json").exists()


def test_a_signal_during_the_last_measurement_of_a_run_ends_the_audit(study, monkeypatch):
    picture = audit.routing.picture

    def interrupted(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return picture(*given)

    monkeypatch.setattr(audit.routing, "picture", interrupted)
    assert audit.main([str(study), *QUICK]) == 128 + signal.SIGTERM
    assert not (study / "on2" / measure.CACHE).exists()


GARBAGE = {
    "half a line": lambda content: content[:-20],
    "no line": lambda content: b"",
    "garbage": lambda content: b"\x00\xff{" * 100,
    "lines of another program": lambda content: content[: content.index(b"\n") + 1] + b'{"batch": 0}\n',
    "garbage in the middle": lambda content: content.replace(b'{"batch": 1', b'{{"batch": 1'),
    "another value": lambda content: b"[1, 2]\n" + content,
    "deep": lambda content: content.split(b"\n")[0] + b"\n" + b"[" * 100_000 + b"\n",
    "another checkpoint": lambda content: content.replace(b'_sha256": "', b'_sha256": "0'),
    "another version": lambda content: content.replace(b'"version": ', b'"version": 9'),
    "another device": lambda content: content.replace(b'"device": "cpu"', b'"device": "cuda"'),
}


def test_a_damaged_cache_is_measured_again(one):
    expected = audited(one, *QUICK)
    path, lines = one / measure.CACHE, cache_lines(one)
    content, identity = path.read_bytes(), {k: v for k, v in lines[0]["identity"].items() if k != "version"}
    for name, change in GARBAGE.items():
        path.write_bytes(change(content))
        assert path.read_bytes() != content, name
        found = Cache(path, identity).lines
        assert found == lines[1 : 1 + len(found)] and len(found) < len(lines) - 1, name
        assert cache_lines(one) == lines[: 1 + len(found)], name
    for name in ("garbage in the middle", "another checkpoint"):
        path.write_bytes(GARBAGE[name](content))
        assert audited(one, *QUICK) == expected and cache_lines(one) == lines, name


def test_something_else_in_the_place_of_the_cache_is_one_line(study):
    (study / "on1" / "audit").mkdir()
    path = study / "on1" / measure.CACHE
    for make in (os.mkdir, os.mkfifo, lambda path: os.symlink("/nonexistent/x", path)):
        make(path)
        assert str(path) in error_of(audit.main, [str(study / "on1"), *QUICK])
        path.rmdir() if path.is_dir() else path.unlink()
    os.mkfifo(path)
    (reason,) = audited(study, *QUICK)["left_out"]
    assert str(path) in reason and "\n" not in reason


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut_lines(run):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))


def replace_checkpoint(run, make):
    (run / "ckpt.pt").unlink()
    make(run / "ckpt.pt")


BROKEN = {
    "damaged checkpoint": (lambda run: flip(run / "ckpt.pt"), "ckpt.pt is damaged"),
    "cut checkpoint": (lambda run: os.truncate(run / "ckpt.pt", 5000), "cannot be read"),
    "no checkpoint": (lambda run: (run / "ckpt.pt").unlink(), "the audit needs the checkpoint of the last step"),
    "older checkpoint": (lambda run: shutil.copy(run / "ckpt_previous.pt", run / "ckpt.pt"), "is of step 6"),
    "folder as checkpoint": (lambda run: replace_checkpoint(run, os.mkdir), "ckpt.pt"),
    "fifo as checkpoint": (lambda run: replace_checkpoint(run, os.mkfifo), "ckpt.pt"),
    "unfinished": (cut_lines, "at step 6 of 12, still training or stopped"),
    "another learning rate": (lambda run: change_config(run, learning_rate=0.5), "learning_rate is"),
    "audit is a file": (lambda run: (run / "audit").write_text("mine"), "audit"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_run_that_cannot_be_audited_is_one_line(study, name):
    break_run, message = BROKEN[name]
    break_run(study / "on2")
    said = error_of(audit.main, [str(study / "on2"), *QUICK])
    assert message in said and "on2" in said


@pytest.mark.parametrize("name", ["damaged checkpoint", "unfinished", "another learning rate"])
def test_the_other_runs_are_audited(study, name):
    BROKEN[name][0](study / "on2")
    numbers = audited(study, *QUICK)
    (reason,) = numbers["left_out"]
    assert BROKEN[name][1] in reason and "on2" in reason and "\n" not in reason
    assert [list(arm["runs"]) for arm in numbers["arms"].values()] == [[str(study / "on1")]]


SMALL = dict(max_iters=2, eval_interval=2, log_interval=2, lr_decay_iters=2)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(n_exp=1, **dict.fromkeys(ALL_ON, False), use_noisy_top_k=False), "the model has no experts to audit"),
        (dict(n_exp=2), "every token uses all 2 experts, so none can be masked"),
    ],
)
def test_a_model_without_experts_to_mask_is_one_line(folder, tmp_path, changes, message):
    out = tmp_path / "run"
    train.main(arguments(TINY | SMALL | dict(dataset=folder / "data", out_dir=out) | changes))
    assert message in error_of(audit.main, [str(out), *QUICK])


@pytest.mark.parametrize(
    "changes",
    [
        dict(n_exp=2, top_k=1, n_layer=1, norm_topk_prob=False),
        dict(n_exp=3, top_k=1, **dict.fromkeys(ALL_ON, False)),
        dict(eval_capacity=0.5, min_capacity=1, chrono_bridge_scope="token", bias=True),
    ],
    ids=["two experts in one layer", "no loop", "capacity and bridge per token"],
)
def test_unusual_runs_are_audited(folder, tmp_path, changes, monkeypatch):
    monkeypatch.setattr(damage, "WARMUP", 1)
    out = tmp_path / "run"
    train.main(arguments(TINY | SMALL | dict(dataset=folder / "data", out_dir=out) | changes))
    has_phi = changes.get("chrono_coherence", True)
    (arm,) = audited(out, *FEW, "--heal=1", *["--damage=1"] * has_phi)["arms"].values()
    (run,) = arm["runs"].values()
    assert ("phi_slow" in run["scores"]) == has_phi and run["masked_sets"] and run["healing"]
    assert ("phi was not measured in training (step 2 was off)." in "".join(arm["sentences"])) != has_phi


def test_changed_data_are_one_line(one, tmp_path, folder):
    data = shutil.copytree(folder / "data", tmp_path / "data")
    out = tmp_path / "run"
    train.main(arguments(TINY | SMALL | dict(dataset=data, out_dir=out)))
    tokens = np.fromfile(data / "val.bin", dtype="<u2")
    tokens[::-1].tofile(data / "val.bin")
    assert "val.bin" in error_of(audit.main, [str(out), *QUICK])


def test_wrong_arguments_are_one_line(one, tmp_path):
    (tmp_path / "empty").mkdir()
    for given, message in [
        (["--heal=1"], "give the folder of a run"),
        ([tmp_path / "nothing"], "nothing does not exist"),
        ([tmp_path / "empty"], "this is no run"),
        ([one / "ckpt.pt"], "ckpt.pt"),
        ([one, "--batches=1"], "batches"),
        ([one, "--max_batches=x"], "max_batches"),
        ([one, "--nonsense=1"], "nonsense"),
        ([one, *QUICK, "--heal=1", "--prune=3"], "prune"),
        ([one, *QUICK, "--device=nonsense"], "device"),
    ]:
        assert message in error_of(audit.main, [str(a) for a in given]), given


def test_damage_without_coherence_is_one_line(folder, tmp_path):
    out = tmp_path / "run"
    train.main(arguments(TINY | SMALL | dict.fromkeys(ALL_ON, False) | dict(dataset=folder / "data", out_dir=out)))
    assert "--damage needs a run with chrono_coherence=True" in error_of(audit.main, [str(out), *QUICK, "--damage=1"])


def test_other_files_named_pt_do_not_end_the_audit(one):
    os.mkdir(one / "a.pt")
    os.mkfifo(one / "b.pt")
    (one / "c.pt").write_bytes(b"garbage")
    torch.save({"iter_num": 3}, one / "d.pt")
    (arm,) = audited(one, *QUICK)["arms"].values()
    (run,) = arm["runs"].values()
    assert list(run["saturation"]) == ["6"] and all(0 < s <= 1 for s in run["saturation"]["6"])


@contextlib.contextmanager
def twin_of(folder):
    run = load_run(folder)
    with measure.opened(run, "--compile=False", "--fuse=False", device="cpu") as trained:
        yield Twin(run, trained)


def state_of(twin):
    run = twin.trained
    state = {"model": run.model.state_dict(), "optimizer": run.checkpointer.optimizer.state_dict()}
    state |= {"loop": run.loop.state_dict(), "random": torch.get_rng_state(), "step": run.progress.step}
    return json.loads(json.dumps(state, default=lambda x: x.tolist()))


def test_a_twin_is_the_run_continued_and_restart_returns_to_its_checkpoint(one, folder):
    with twin_of(one) as twin:
        twin.restart()
        first = state_of(twin)
        losses = []
        for _ in range(2):
            for _ in range(6):
                twin.step()
            losses.append(twin.validation_loss())
        moved = state_of(twin)
        assert moved != first and differing(moved["optimizer"], first["optimizer"])
        with pytest.raises(Killed), masked(twin.trained.model, {0: (1,)}):
            twin.step()
            raise Killed
        twin.restart()
        assert state_of(twin) == first
        for _ in range(12):
            twin.step()
        assert state_of(twin) == moved and twin.validation_loss() == losses[1]
        saved = checkpoint.load(one / "ckpt.pt")
        assert not differing(twin.saved["model"], saved["model"])
        assert not differing(twin.saved["optimizer"], saved["optimizer"])
    settings = dict(dataset=folder / "data", out_dir=one, init_from="resume", max_iters=24)
    assert train.main(arguments(TINY | settings)) == 0
    assert val_losses(one)[-2:] == losses


def test_masked_experts_get_no_gradient_and_only_drift(one):
    with twin_of(one) as twin:
        twin.restart()
        model = twin.trained.model
        parameters = {(block, name): p for block in (0, 2) for name, p in moe_layer(model, block).named_parameters()}
        rows = {key: p for key, p in parameters.items() if len(p) == 4}
        assert {name for _, name in rows} >= {"router.w_g.weight", "experts.c_fc", "experts.c_proj"}
        gradients = []
        hook = twin.trained.checkpointer.optimizer.register_step_pre_hook(
            lambda *_: gradients.append({key: p.grad[1].abs().max().item() for key, p in rows.items()})
        )
        with masked(model, {0: (1,), 2: (1,)}):
            results = [twin.step() for _ in range(3)]
        hook.remove()
        assert all(value == 0 for step in gradients for value in step.values()) and len(gradients) == 3
        assert all(result.found_inf == 0 and result.trace.kept_per_expert[:, 1].sum() == 0 for result in results)
        assert all(p.isfinite().all() for p in model.parameters())
        assert model.router_state.logit_std.isfinite().all() and twin.trained.loop.coherence.phi_slow.isfinite().all()
        twin.step()
        assert len(gradients) == 3


def test_healing_without_steps_is_the_rise_at_once_and_twice_the_same(one, tmp_path):
    def healed(name, steps):
        run = load_run(one)
        with measure.opened_to_measure(run, "cpu") as trained:
            found = measure.measure(run, trained, Cache(tmp_path / name / "a", {}), 2, 2)
        with twin_of(one) as twin:
            return found, healing.heal(found, twin, Cache(tmp_path / name / "b", {}), steps, 1)

    (found, first), (_, again) = healed("x", 3), healed("y", 3)
    assert first == again and {h.criterion for h in first} == found.scores.keys()
    assert all(np.isfinite([h.at_once, h.at_end]).all() and h.steps == 3 for h in first)
    # the run's validation batches are the first of the audit's
    run = load_run(one)
    with measure.opened_to_measure(run, "cpu") as trained:
        for h in first:
            worst = {b: (int(found.scores[h.criterion][layer].argmin()),) for layer, b in enumerate(found.blocks)}
            batches = [measure.Batch(trained.model, *trained.batches.validation(i), criteria=False) for i in (0, 1)]
            rise = np.mean([batch.loss_masked(worst) - batch.loss for batch in batches])
            assert h.at_once == pytest.approx(rise, abs=2e-6), h.criterion


@pytest.mark.parametrize("name", damage.DAMAGES)
def test_damaged_weights_are_what_they_should_be_and_are_held(one, name, monkeypatch):
    monkeypatch.setattr(damage, "WARMUP", 1)
    with twin_of(one) as twin:
        twin.restart()
        twin.step()
        experts = moe_layer(twin.trained.model, 2).experts
        before = {key: p.detach().clone() for key, p in experts.named_parameters()}
        seen, step = [], twin.trained.training_step.backward

        def recorded(*given):
            seen.append({key: p.detach().clone() for key, p in experts.named_parameters()})
            return step(*given)

        twin.trained.training_step.backward = recorded
        change, largest = damage._train(twin, name, 1, 3, 4, 7)
        assert len(seen) == 5
        for weights in seen[1:]:
            for key, w in weights.items():
                old, new = before[key][3], w[3]
                expected = {"zeroed": 0 * old, "frozen": old, "scaled x3": old * (3 if "proj" in key else 1)}
                if name in expected:
                    torch.testing.assert_close(new, expected[name], rtol=1e-6, atol=0)
                else:
                    assert torch.equal(new, seen[1][key][3])
                    assert new.std() / old.std() == pytest.approx(3 if "x3" in name else 1, rel=0.1)
        assert not torch.equal(seen[1]["c_fc"][0], seen[4]["c_fc"][0])  # the others train on
        assert change.keys() == largest.keys() == set(damage.SIGNALS) and len(change["load"]) == 4
        for signal_name, moved in change.items():
            assert np.abs(moved).max() == pytest.approx(largest[signal_name][1][3]), signal_name


def test_the_assay_is_deterministic_and_continues(one, tmp_path, monkeypatch):
    monkeypatch.setattr(damage, "WARMUP", 2)
    monkeypatch.setattr(damage, "DAMAGES", {key: damage.DAMAGES[key] for key in ("zeroed", "noise")})
    found = []
    for name in ("x", "y"):
        with twin_of(one) as twin:
            found.append(damage.assay("run", 1, twin, Cache(tmp_path / name / "c", {}), 2))
    first, again = ([vars(m) for m in moved] for moved in found)
    assert str(first) == str(again) and [m["damage"] for m in first] == ["", "zeroed", "zeroed", "noise", "noise"]
    lines = (tmp_path / "x" / "c").read_bytes().splitlines(keepends=True)
    (tmp_path / "x" / "c").write_bytes(b"".join(lines[:3]))
    with twin_of(one) as twin:
        monkeypatch.setattr(
            damage, "_train", lambda *given, train=damage._train: calls.append(given[1:4]) or train(*given)
        )
        calls = []
        assert str([vars(m) for m in damage.assay("run", 1, twin, Cache(tmp_path / "x" / "c", {}), 2)]) == str(first)
    assert len(calls) == 3 and (tmp_path / "x" / "c").read_bytes() == b"".join(lines)


def twins(rng, layers=2, experts=8):
    return [Moved("", 0, 0, {}, {name: np.abs(rng.normal(size=(layers, experts))) for name in damage.SIGNALS})]


def test_the_threshold_gives_5_percent_false_alarms_on_undamaged_twins():
    rng = np.random.default_rng(0)
    for runs in (1, 7, 40):
        others = [twins(rng) for _ in range(runs)]
        values = np.concatenate([moved[0].largest["load"].ravel() for moved in others])
        assert 0.05 - 1 / len(values) - 1e-9 <= (values > threshold(others, "load")).mean() <= 0.05
    fresh = [
        (twins(rng)[0].largest["load"] > threshold([twins(rng) for _ in range(7)], "load")).mean() for _ in range(300)
    ]
    assert np.mean(fresh) == pytest.approx(0.05, abs=0.015)


def test_detections_are_those_computed_by_hand():
    def moved(kind, change, others):
        largest = np.array([[max(map(abs, change)), others[0]], others[1:]]) if kind else np.array(others).reshape(2, 2)
        return Moved(kind, 0, 0, {"load": np.array(change)} if kind else {}, {"load": largest})

    calm = moved("", [], [0.1, 0.2, 0.3, 0.4])  # the threshold of the other run: 0.4
    wild = moved("", [], [1.0, 1.0, 2.0, 1.0])  # 2
    runs = [
        [calm, moved("zeroed", [0.5, -2.5, 1.0], [1.9, 2.5, 0.1])],  # threshold 2: alarm in step 2
        [wild, moved("zeroed", [0.1, 0.4, -0.41], [0.5, 0.1, 0.3])],  # threshold 0.4: alarm in step 3
    ]
    monkeypatched = {name: m for name, m in damage.DAMAGES.items() if name == "zeroed"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(damage, "DAMAGES", monkeypatched)
        patch.setattr(damage, "SIGNALS", ("load",))
        (found,) = detections(runs)
        assert (found.cases, found.detected, found.delay) == (2, 1.0, 2.5)
        assert found.accused == 0.5 and found.accused_elsewhere == 0.25
        runs[0][1] = moved("zeroed", [0.5, -2.0, 1.0], [1.9, 2.5, 0.1])
        (found,) = detections(runs)
        assert found.detected == 0.5 and found.delay is None
        (found,) = detections(runs[:1])  # a run alone has its own threshold
        assert (found.cases, found.detected, found.delay) == (1, 1.0, 1.0)


def test_the_picture_of_the_router_is_that_of_counting_tokens(one, monkeypatch):
    monkeypatch.setattr(audit.routing, "LEAST_COUNT", 10)
    run = load_run(one)
    with measure.opened_to_measure(run, "cpu") as trained:
        found = audit.routing.picture(run, trained, 2)
        before = build_model(checkpoint.load(one / checkpoint.PREVIOUS), "").eval()
        batches = [trained.batches.validation(i)[0] for i in range(2)]
        now, then = (
            [token for x in batches for token in zip(x.flatten().tolist(), *audit.routing.choices(model, x).tolist())]
            for model in (trained.model, before)
        )
    for layer, block in enumerate(found.blocks):
        sets = [(token[0], set(token[1 + layer])) for token in now]
        for e in range(4):
            mine = [chosen for _, chosen in sets if e in chosen]
            assert found.share[layer, e] == pytest.approx(len(mine) / (2 * len(sets)))
            for other in range(4):
                expected = sum(other in chosen for chosen in mine) / max(1, len(mine))
                assert found.coactivation[layer, e, other] == pytest.approx(expected)
            shares = {}
            for v in {v for v, _ in sets}:
                of_id = [chosen for i, chosen in sets if i == v]
                if len(of_id) >= audit.routing.LEAST_COUNT and any(e in chosen for chosen in of_id):
                    shares[v] = sum(e in chosen for chosen in of_id) / len(of_id), len(of_id)
            best = sorted((share for share, _ in shares.values()), reverse=True)[: audit.routing.SHOWN_TOKENS]
            special = found.special[block, e]
            assert [share for _, share, _ in special] == pytest.approx(best)
            assert all(shares[v] == pytest.approx((share, count)) for v, share, count in special)
        kept = [len(set(a[1 + layer]) & set(b[1 + layer])) / 2 for a, b in zip(now, then)]
        assert found.saturation[6][layer] == pytest.approx(np.mean(kept)) and list(found.saturation) == [6]
    assert 0 < found.saturation[6][0] < 1 and any(found.special.values())


def test_specialization_by_domain_is_the_share_of_each_datasets_tokens_that_an_expert_gets(folder, tmp_path):
    other, out = write_dataset(tmp_path / "numbers", VOCAB, seed=9), tmp_path / "run"
    data = folder / "data"
    schedule = dict(dataset=data, data_schedule=f"{data}@0 {other}@3")
    train.main(arguments(TINY | schedule | dict(out_dir=out, arm="on", chrono_router=True, chrono_coherence=True)))
    with measure.opened_to_measure(load_run(out), "cpu") as trained:
        found = audit.routing.domain_specialization(trained, 2)
        assert [*found] == ["data", "numbers"]
        for name, text in (("data", data), ("numbers", other)):
            inputs = torch.cat([TokenData(text, 16).batch("val", EVAL_SEED, 0, i, 4)[0] for i in (0, 1)])
            for layer, chosen in enumerate(audit.routing.choices(trained.model, inputs)):
                shares = [sum(e in token for token in chosen.tolist()) / len(chosen) for e in range(4)]
                assert found[name][layer].tolist() == pytest.approx(shares)
    assert not torch.equal(found["data"], found["numbers"])


def test_a_run_on_one_dataset_has_no_specialization_by_domain(one):
    with measure.opened_to_measure(load_run(one), "cpu") as trained:
        assert audit.routing.domain_specialization(trained, 2) == {}
