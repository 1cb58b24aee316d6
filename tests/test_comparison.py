"""The comparison of runs: what is paired, what is left out and why, what the report says; and a real small study."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import compare
from comparison.analysis import analyse, conclusion, same_against_same, steps_to_loss, verdict
from comparison.runs import group_into_arms, load_run, load_runs, pairs
from trainer.arms import ARMS
from trainer.errors import UserError

ROOT = Path(__file__).parent.parent
BASE = {
    **dict(dataset="stdlib", data_sha256={"train.bin": "a"}, max_iters=100, eval_interval=10, eval_iters=2),
    **dict(batch_size=4, block_size=8, gradient_accumulation_steps=1, n_layer=2, n_head=1, n_embd=8, n_exp=4),
    **dict(top_k=2, stride=2, bias=False, chrono_beta=False, chrono_signal="coherence", chrono_eta=1e-4, threads=2),
}
ON = {"chrono_beta": True}


def write_run(folder, seed, shift=0.0, steps=100, **changes):
    """A run whose validation loss falls from 3 to 2 + shift + a seed's own luck."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(BASE | {"seed": seed, "out_dir": str(folder)} | changes))
    luck = float(np.random.default_rng(seed).normal(0, 0.05))
    lines = []
    for step in range(0, steps + 1, 10):
        loss = 2 + math.exp(-step / 20) + (shift + luck) * step / 100
        routing = {"routing/L0/load_cv": 0.5, "routing/L0/neff": 7.0, "coherence/L0/layer": 0.6 + shift}
        lines.append(json.dumps({"step": step, "val/loss": loss} | (routing if step else {})))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def arms_of(tmp_path, effect, noise=0.003, seeds=8, placebo=0.0):
    folders = []
    for seed in range(seeds):
        own = np.random.default_rng(100 + seed).normal(0, noise, 2)
        folders.append(write_run(tmp_path / f"off{seed}", seed))
        folders.append(write_run(tmp_path / f"on{seed}", seed, effect + own[0], **ON))
        folders.append(write_run(tmp_path / f"shuffled{seed}", seed, placebo + own[1], **ON, chrono_signal="shuffled"))
    runs, left_out = load_runs(folders)
    assert not left_out
    return group_into_arms(runs)[0]


def test_a_run_whose_settings_changed_on_the_way_is_left_out(tmp_path):
    history = [
        {"step": 0, "changed": {}},
        {"step": 50, "changed": {"chrono_eta": [1e-4, 1e-3], "max_iters": [50, 100]}},
    ]
    folders = [write_run(tmp_path / "a", 1, history=history[:1]), write_run(tmp_path / "b", 2, history=history)]
    runs, left_out = load_runs(folders)
    assert [run.seed for run in runs] == [1]
    (line,) = left_out
    assert str(tmp_path / "b") in line and "chrono_eta" in line and "max_iters" not in line


def test_a_real_effect_is_found_and_its_size_is_right(tmp_path):
    primary, secondary, check = analyse(arms_of(tmp_path, effect=-0.05))
    on_off = primary[0]
    assert (on_off.a, on_off.b) == ("on", "off")
    assert on_off.contrast.mean == pytest.approx(-0.05 * 0.9, abs=0.005)  # the mean of steps 80, 90 and 100
    assert "lowers the loss" in verdict(on_off)
    assert conclusion(primary).startswith("Beta lowers the validation loss, and more than")
    assert all(row.corrected >= row.contrast.p for row in secondary)
    assert check[0].contrast.mean == pytest.approx(-0.05, abs=0.005)


def test_an_effect_that_the_placebo_has_too_is_not_coherences(tmp_path):
    primary, *_ = analyse(arms_of(tmp_path, effect=-0.05, placebo=-0.05))
    assert "no more than a beta that follows another expert's coherence" in conclusion(primary)


def test_no_effect_is_said_plainly_with_what_could_have_been_found(tmp_path):
    primary, *_ = analyse(arms_of(tmp_path, effect=0.0))
    assert conclusion(primary) == "No effect of beta on the validation loss was found."
    assert "no effect found" in verdict(primary[0])
    assert f"{primary[0].contrast.smallest_found:.4f} nats" in verdict(primary[0])


def test_off_against_off_claims_an_effect_in_about_five_of_a_hundred_pairings(tmp_path):
    runs = load_runs([write_run(tmp_path / f"off{seed}", seed) for seed in range(16)])[0]
    said = same_against_same(group_into_arms(runs)[0])
    assert "16 runs into 8 pairs" in said
    assert float(said.split("pairs, ")[1].split("%")[0]) < 9
    assert same_against_same(group_into_arms(runs[:11])[0]) is None


def test_five_pairs_get_no_verdict(tmp_path):
    primary, *_ = analyse(arms_of(tmp_path, effect=-0.5, seeds=5))
    assert conclusion(primary).startswith("No verdict")
    assert "no verdict" in verdict(primary[0]) and "0.0625" in verdict(primary[0])


def test_runs_are_paired_by_seed_alone(tmp_path):
    folders = [write_run(tmp_path / f"a{seed}", seed) for seed in (1, 2, 3)]
    folders += [write_run(tmp_path / f"b{seed}", seed, **ON) for seed in (3, 2, 7)]
    arms, differing, left_out = group_into_arms(load_runs(folders)[0])
    assert [(a.seed, b.seed) for a, b in pairs(arms, "on", "off")] == [(2, 2), (3, 3)]
    assert differing == {"chrono_beta": ["false", "true"]} and not left_out
    assert list(arms) == ["off", "on"]


def cut_last_line(folder):
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])


def nan_loss(folder):
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + json.dumps({"step": 100, "val/loss": None}) + "\n")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "metrics.jsonl").unlink(), "no metrics.jsonl"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "not that of a run"),
        (cut_last_line, "line 11 of metrics.jsonl is cut"),
        (nan_loss, "no number"),
        (lambda f: (f / "metrics.jsonl").write_text('{"step": 40, "val/loss": 2}\n'), "step 40 of 100, still training"),
        (lambda f: (f / "decisions.jsonl").write_text("x"), "decisions.jsonl: cannot be read"),
    ],
)
def test_a_run_that_cannot_be_used_is_left_out_with_one_line(tmp_path, damage, said):
    good, bad = write_run(tmp_path / "good", 1), write_run(tmp_path / "bad", 2)
    damage(bad)
    runs, left_out = load_runs([good, bad])
    assert [run.folder for run in runs] == [good]
    assert len(left_out) == 1 and said in left_out[0] and str(bad) in left_out[0] and "\n" not in left_out[0]
    with pytest.raises(UserError):
        load_run(bad)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data_sha256": {"train.bin": "b"}}, "data_sha256"),
        ({"n_embd": 16}, "n_embd is 16"),
        ({"max_iters": 90}, "max_iters is 90"),
    ],
)
def test_runs_on_other_data_or_of_another_shape_are_refused(tmp_path, changes, said):
    folders = [write_run(tmp_path / "a", 1), write_run(tmp_path / "b", 1, **ON, **changes)]
    runs, left_out = load_runs(folders)
    assert len(runs) == 1 and said in left_out[0]


def test_doubles_and_strangers_within_an_arm_are_left_out_and_other_versions_told(tmp_path):
    folders = [
        write_run(tmp_path / "a", 1),
        write_run(tmp_path / "b", 1),
        write_run(tmp_path / "c", 2, chrono_eta=0.5),
        write_run(tmp_path / "d", 2, threads=1),
    ]
    arms, differing, left_out = group_into_arms(load_runs(folders)[0])
    assert {run.folder.name for run in arms["off"].values()} == {"a", "d"}
    assert len(left_out) == 2
    assert "seed 1 of this arm is already" in left_out[0] and "chrono_eta is 0.5" in left_out[1]
    assert differing["threads"] == ["1", "2"]


def test_time_to_a_loss_is_linear_between_evaluations(tmp_path):
    run = load_run(write_run(tmp_path / "a", 1))
    _, losses = run.series("val/loss")
    assert steps_to_loss(run, (losses[3] + losses[4]) / 2) == pytest.approx(35)
    assert steps_to_loss(run, 99) == 0 and math.isnan(steps_to_loss(run, 0))


TINY = [
    *("--n_layer=1", "--n_head=1", "--n_embd=8", "--n_exp=3", "--block_size=8", "--batch_size=2", "--max_iters=8"),
    *("--eval_interval=2", "--eval_iters=2", "--log_interval=2", "--device=cpu", "--warmup_iters=0"),
]


def write_dataset(folder):
    folder.mkdir()
    for split in ("train", "val"):
        np.random.default_rng(0).integers(0, 11, 400).astype("<u2").tofile(folder / f"{split}.bin")
    (folder / "meta.json").write_text('{"vocab_size": 11}')
    return folder


def test_a_study_trains_every_arm_resumes_what_stopped_and_reports(tmp_path, monkeypatch, capsys):
    out = tmp_path / "study"
    command = ["config/study.py", *TINY, f"--dataset={write_dataset(tmp_path / 'data')}", f"--out_dir={out}"]
    # one run has stopped half-way
    stopped = [*command, "--max_iters=4", "--lr_decay_iters=600", "--seed=1", f"--out_dir={out / 'on_seed1'}"]
    subprocess.run([sys.executable, "train.py", *stopped], cwd=ROOT, check=True, capture_output=True)
    monkeypatch.chdir(ROOT)
    assert compare.main([*command, "--seeds=2", "--arms=off,on", "--jobs=2"]) == 0
    assert "No verdict" in capsys.readouterr().out
    for name in ("off_seed1", "off_seed2", "on_seed1", "on_seed2"):
        steps = [json.loads(line)["step"] for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        assert steps == [0, 2, 4, 6, 8]
    assert "resume:" in (out / "on_seed1" / "train.log").read_text()
    first = json.loads((out / "off_seed1" / "metrics.jsonl").read_text().splitlines()[0])
    same = json.loads((out / "on_seed1" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["val/loss"] == same["val/loss"]  # same seed: same initial weights
    numbers = json.loads((out / "comparison.json").read_text())
    assert numbers["primary"][0]["n"] == 2 and numbers["differing"]["chrono_beta"] == ["false", "true"]
    assert [p["top_k"] for p in numbers["probes"]["on"]] == [1, 2, 3]
    assert numbers["probes"]["on"][-1]["set_changed"] == 0  # every expert is chosen at top_k = E

    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 10 and "<script" not in page and 'src="' not in page and "@import" not in page
    assert page.index("No verdict") < page.index("<svg")
    report = (out / "report.md").read_text()
    assert all((out / line.split("(")[1].rstrip(")")).exists() for line in report.splitlines() if line[:2] == "![")

    before = {p: p.stat().st_mtime_ns for p in out.glob("*/metrics.jsonl")}
    assert compare.main([*command, "--seeds=2", "--arms=off,on", "--jobs=2"]) == 0  # finished runs are kept
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("*/metrics.jsonl")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["config/study.py", "--arms=of"], "there is no arm 'of'"),
        (["config/study.py", "--seeds=0"], "--seeds=0 must be a whole number"),
        (["config/study.py", "--seed=3"], "give --seeds=N"),
        (["config/study.py", "--chrono_bta=1"], "did you mean chrono_beta?"),
        (["out/none_there"], "no config.json"),
        (["config/study.py", "out/x"], "not both"),
    ],
)
def test_a_mistake_gets_one_line(arguments, said):
    with pytest.raises(UserError) as error:
        compare.main(arguments)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_arms_differ_from_on_only_in_what_drives_beta():
    driver = {"chrono_beta", "chrono_signal"}
    assert set(ARMS["off"]) | set(ARMS["on"]) | set(ARMS["shuffled"]) == driver
    assert ARMS["load"]["use_aux_loss"] is False and ARMS["load"]["chrono_gates"] == "clean"


class FakeRun:
    """A finished run as wandb.Api gives it."""

    job_type = "beta_on"

    def __init__(self, folder):
        run = load_run(folder)
        self.name, self.config, self.rows = folder.name, run.config | {"_wandb": {}}, run.lines

    def scan_history(self):
        return iter([row | {"_step": row["step"], "_timestamp": 1.0, "note": "x"} for row in reversed(self.rows)])


def test_runs_from_wandb_compare_as_those_on_disk(tmp_path, monkeypatch, capsys):
    import wandb

    folders = [write_run(tmp_path / f"off{seed}", seed) for seed in range(6)]
    folders += [write_run(tmp_path / f"on{seed}", seed, -0.2, **ON) for seed in range(6)]
    fakes = [FakeRun(folder) for folder in folders]
    unfinished = FakeRun(folders[0])
    unfinished.rows = unfinished.rows[:3]
    comparison = FakeRun(folders[0])
    comparison.job_type = "comparison"
    monkeypatch.setattr(
        wandb, "Api", lambda: type("Api", (), {"runs": lambda self, _: [*fakes, unfinished, comparison]})()
    )
    monkeypatch.chdir(tmp_path)
    assert compare.main(["--wandb=entity/project"]) == 0
    said = capsys.readouterr().out
    assert "Beta lowers the validation loss" in said and "still training or stopped" in said
    theirs = json.loads((tmp_path / "out" / "wandb_comparison" / "comparison.json").read_text())
    compare.main([str(folder) for folder in folders])
    ours = json.loads((tmp_path / "comparison.json").read_text())
    assert theirs["primary"] == ours["primary"]


def test_wandb_that_does_not_answer_gets_one_line(monkeypatch):
    import wandb

    def fail():
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(wandb, "Api", fail)
    with pytest.raises(UserError) as error:
        compare.main(["--wandb=entity/project"])
    assert "entity/project" in str(error.value) and "\n" not in str(error.value)


def test_the_comparison_is_an_offline_wandb_run_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folders = [
        write_run(tmp_path / f"{arm}{seed}", seed, **(ON if arm == "on" else {}))
        for arm in ("on", "off")
        for seed in (1, 2)
    ]
    assert compare.main([*map(str, folders), "--wandb_log=True"]) == 0
    assert "wandb sync" in capsys.readouterr().out
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    images = list((folder / "files" / "media" / "images").rglob("*.png"))
    assert len(images) >= 4 and list((folder / "files" / "media" / "table").rglob("*.json"))
