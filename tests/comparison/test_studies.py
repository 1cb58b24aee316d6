"""Studies that train small runs: what is kept, continued, refused and reported; the probe; the picture of a run."""

import contextlib
import dataclasses
import io
import itertools
import json
import runpy
import shutil
import signal
import subprocess
import sys
from unittest.mock import Mock, PropertyMock

import pytest
import torch

import compare
import train
from comparison.probe import probe, probe_model
from comparison.runs import load_run
from comparison.sweep import Job, config_of, plan, train_all
from tests.comparison.studies import change_config
from tests.helpers import child
from tests.helpers.child import wait_for
from tests.helpers.models import build, chrono, tokens
from tests.helpers.runs import ROOT, arguments, error_of, write_dataset
from trainer.data import EVAL_SEED
from trainer.lock import folder_lock

STUDY = str(ROOT / "config" / "study.py")
TINY = arguments(
    dict(n_layer=1, n_head=1, n_embd=8, n_exp=3, block_size=8, batch_size=2, max_iters=8, warmup_iters=0)
    | dict(eval_interval=2, eval_iters=2, log_interval=2, device="cpu")
)
NAMES = [f"{arm}_seed{seed}" for arm in ("off", "on") for seed in (1, 2)]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(arguments of train.py, folder) of a study whose run on_seed1 existed before, with half of the steps."""
    folder = tmp_path_factory.mktemp("study")
    out, settings = folder / "study", [STUDY, *TINY, f"--dataset={write_dataset(folder / 'data', 11)}"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train.main([*settings, "--max_iters=4", "--arm=on", "--seed=1", f"--out_dir={out / 'on_seed1'}"])
        assert compare.main([*settings, "--seeds=2", "--arms=off,on", "--jobs=2", f"--out_dir={out}"]) == 0
    lines = printed.getvalue()
    assert "No verdict: 2 pairs" in lines and "left out" not in lines and "\r" not in lines
    assert "4 of 4 runs finished, 32 of 32 steps\nevaluating the trained models" in lines
    assert f"For a verdict: python compare.py {STUDY}" in lines and "--seeds=8\n" in lines
    return settings, out


def test_study_trains_every_arm_continues_shorter_runs_and_reports(study, tmp_path, monkeypatch):
    _, out = study
    runs = [load_run(out / name) for name in NAMES]
    assert all([line["step"] for line in run.lines] == [0, 2, 4, 6, 8] for run in runs)
    assert [f"{run.arm}_seed{run.seed}" for run in runs] == NAMES and [len(run.history) for run in runs] == [1, 1, 2, 1]
    first = [run.lines[0]["val/loss"] for run in runs]
    assert first[:2] == first[2:] and first[0] != first[1]  # the same seed has the same initial weights
    numbers = json.loads((out / "comparison.json").read_text())
    assert numbers["primary"][0]["n"] == 2 and numbers["differing"]["chrono_beta"] == ["false", "true"]
    assert [p["top_k"] for p in numbers["probes"]["on"]] == [1, 2, 3] and "off" not in numbers["probes"]
    page, report = ((out / name).read_text() for name in ("report.html", "report.md"))
    assert page.index("No verdict") < page.index("What was tested") < page.index("<figure>") and len(page) < 2_000_000
    assert "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'" in page  # it loads nothing
    pictures = [line.split("(")[1].rstrip(")") for line in report.splitlines() if line.startswith("![")]
    assert len(pictures) >= 10 and all((out / picture).exists() for picture in pictures)
    monkeypatch.setattr(sys, "argv", ["figure.py", str(out / "on_seed1"), str(tmp_path / "picture.png")])
    runpy.run_path(str(ROOT / "docs" / "figure.py"), run_name="__main__")
    assert (tmp_path / "picture.png").stat().st_size > 20_000


def test_finished_runs_are_kept_only_for_the_same_settings_data_and_arm(study, tmp_path):
    settings, out = study
    for more, arms in (([], ["off", "on"]), (["--chrono_eta=0.5"], ["off"])):  # where beta is off, eta has no effect
        assert all(job.finished for job in plan([*settings, *more], out, arms, 2))
    refused = {
        "--learning_rate=0.9": "off_seed1 holds a run with learning_rate=0.003, but learning_rate=0.9 is requested",
        "--chrono_eta=0.5": "on_seed1 holds a run with chrono_eta=0.0001, but chrono_eta=0.5 is requested",
        "--margin=0.5": "holds a run with margin=0.02, but margin=0.5 is requested",
        "--max_iters=6": "holds a run with max_iters=8, but max_iters=6 is requested",
        f"--dataset={write_dataset(tmp_path / 'data', 11, seed=1)}": "holds a run with data_sha256=",
        f"--init_from={out / 'off_seed1' / 'ckpt.pt'}": "holds a run with weights_sha256=None",
        "--init_from=resume": "init_from='resume'",
        "--eval_only=True": "a study trains its runs",
    }
    for argument, message in refused.items():
        assert message in error_of(plan, [*settings, argument], out, ["off", "on"], 2)
    (job,) = plan([*settings, "--chrono_eta=0.5"], tmp_path / "load", ["load"], 1)
    assert "--chrono_eta=0.5" not in job.arguments  # the arm defines it
    assert "there is no arm 'of'" in error_of(plan, settings, out, ["of"], 2)
    assert "an arm is given twice" in error_of(plan, settings, out, ["on", "on"], 2)
    shutil.copytree(out / "off_seed1", tmp_path / "arm" / "on_seed1")
    assert "on_seed1 holds a run with arm='off'" in error_of(plan, settings, tmp_path / "arm", ["on"], 1)
    shutil.copytree(out / "off_seed1", tmp_path / "vocabulary" / "off_seed1")
    change_config(tmp_path / "vocabulary" / "off_seed1", vocab_size=600)
    assert "vocab_size=600, but vocab_size=11" in error_of(plan, settings, tmp_path / "vocabulary", ["off"], 1)


def test_a_finished_study_on_several_texts_is_kept_only_for_the_same_texts(tmp_path):
    one, two = (write_dataset(tmp_path / name, 11, seed) for seed, name in enumerate(("one", "two")))
    settings, out = [STUDY, *TINY, f"--dataset={one}", "--max_iters=2"], tmp_path / "study"
    texts = f"--data_schedule={one}@0 {two}@1"
    (job,) = plan([*settings, texts], out, ["off"], 1)
    assert train.main(job.arguments) == 0
    assert plan([*settings, texts], out, ["off"], 1)[0].finished
    refused = error_of(plan, [*settings, f"--data_schedule={one}@0 {two}@2"], out, ["off"], 1)
    assert "holds a run with data_schedule=" in refused
    assert "no folder" in error_of(
        plan, [*settings, f"--data_schedule={one}@0 nothing@1"], tmp_path / "new", ["off"], 1
    )
    shutil.rmtree(two)
    write_dataset(two, 11, seed=9)
    assert "holds a run with data_sha256=" in error_of(plan, [*settings, texts], out, ["off"], 1)


def test_study_starts_all_arms_from_the_weights_that_its_config_names(study, tmp_path):
    settings, out = study
    source, config = out / "off_seed1" / "ckpt.pt", tmp_path / "from_weights.py"
    config.write_text(f"from config.study import *\ninit_from = {str(source)!r}\n")
    settings = [str(config), *settings[1:], "--max_iters=2"]
    assert all(train.main(job.arguments) == 0 for job in plan(settings, tmp_path, ["off", "on"], 1))
    found = [load_run(tmp_path / f"{arm}_seed1").config for arm in ("off", "on")]
    assert found[0]["weights_sha256"] == found[1]["weights_sha256"] is not None
    assert [c["weights_from"] for c in found] == [str(source)] * 2
    assert all(job.finished for job in plan(settings, tmp_path, ["off", "on"], 1))
    refusal = error_of(plan, [*settings, "--init_from=scratch"], tmp_path, ["off", "on"], 1)
    assert "holds a run with weights_sha256=" in refusal


SLOW_SIGNALS = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGHUP)]


@pytest.mark.parametrize("number", [signal.SIGKILL, *SLOW_SIGNALS], ids=lambda number: number.name)
def test_stopped_study_saves_its_runs_and_the_same_command_continues_them(tmp_path, number):
    out, data = tmp_path / "study", write_dataset(tmp_path / "data", 11)
    settings = [STUDY, *TINY, f"--dataset={data}", "--max_iters=500", "--eval_interval=250", "--log_interval=100"]
    command = [*settings, f"--out_dir={out}", "--seeds=1", "--arms=off,on", "--jobs=2"]
    jobs = plan(settings, out, ["off", "on"], 1)
    logs = [job.out_dir / "metrics.jsonl" for job in jobs]
    with (tmp_path / "log").open("wb") as log:
        study = subprocess.Popen([sys.executable, "compare.py", *command], cwd=ROOT, stdout=log, stderr=log)
        wait_for(lambda: all(path.exists() and path.stat().st_size > 0 for path in logs), 60)
        study.send_signal(number)
        status = study.wait(60)
    assert status == (-number if number == signal.SIGKILL else 128 + number)
    assert "failed" not in (tmp_path / "log").read_text()
    if number != signal.SIGKILL:
        assert not any(job.locked for job in jobs) and all((job.out_dir / "ckpt.pt").exists() for job in jobs)
        return
    for job in plan(settings, out, ["off", "on"], 1):  # at once, while the runs of the killed study are still ending
        wait_for(lambda job=job: not job.locked)
        assert not job.finished and child.run(job.arguments, tmp_path / "log") == 0
        history = json.loads((job.out_dir / "config.json").read_text())["history"]
        assert job.finished and len(history) == 2 and all(start["step"] < 500 for start in history)


def test_run_that_another_process_writes_is_not_started(tmp_path):
    interrupt = Mock()
    type(interrupt).received = PropertyMock(side_effect=itertools.chain([0, 0], itertools.repeat(signal.SIGINT)))
    with folder_lock(tmp_path / "on_seed1"):
        assert train_all([Job("on", 1, tmp_path / "on_seed1", ["--help"], 4)], 1, interrupt) == []
    assert not (tmp_path / "on_seed1" / "train.log").exists()


def test_a_study_stops_if_its_first_runs_fail_and_goes_on_after_a_later_failure(tmp_path, monkeypatch, capsys):
    """The child writes the files of a finished run if its argument is a folder, else it fails."""
    script = tmp_path / "child.py"
    write_files = "[(out / n).write_text('{\"step\": 4}\\n') for n in ('config.json', 'metrics.jsonl')]"
    script.write_text(
        f"import pathlib, sys\nout = pathlib.Path(sys.argv[1])\n{write_files} if out.is_dir() else sys.exit('boom')"
    )
    monkeypatch.setattr("comparison.sweep.TRAIN", script)

    def jobs(*succeeds):
        folders = [tmp_path / f"{len(succeeds)}_{i}" for i in range(len(succeeds))]
        return [Job("on", i, f, [str(f) if ok else "none"], 4) for i, (f, ok) in enumerate(zip(folders, succeeds))]

    interrupt = Mock(received=0)
    failure = error_of(train_all, started := jobs(False, False, True), 1, interrupt)
    assert failure.startswith("the first run failed") and "exit status 1; boom; see " in failure
    assert not started[1].out_dir.exists()
    assert [job.seed for job in train_all(jobs(True, False, True, False), 2, interrupt)] == [1, 3]
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("failed: ") for line in printed) == 3
    assert printed[-1] == "2 of 4 runs finished, 8 of 16 steps"


def test_a_study_needs_a_config(tmp_path):
    assert "as in python compare.py config/study.py --seeds=3, or" in error_of(compare.main, ["--seeds=3"])


def test_changed_log_or_checkpoint_of_a_finished_run_is_detected(study, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(study[1] / "on_seed1", folder)
    text = (folder / "metrics.jsonl").read_text()
    place = text.rindex('"val/loss": ') + len('"val/loss": ')
    (folder / "metrics.jsonl").write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
    assert "metrics.jsonl is not what the run wrote" in error_of(load_run, folder)
    (folder / "metrics.jsonl").write_text(text)
    change_config(folder, max_iters=8.0, vocab_size=...)
    run = load_run(folder)
    assert run.steps == 8 and isinstance(run.steps, int) and run.config["vocab_size"] == 11
    assert len(probe(run, batches=1)) == 3
    other = dataclasses.replace(run, config=run.config | {"data_sha256": {"train.bin": "a"}})
    assert "are not those that" in error_of(probe, other, 1)
    saved = torch.load(folder / "ckpt.pt", weights_only=True)
    del saved["config"]  # a checkpoint need not have one
    torch.save(saved, folder / "without.pt")
    damaged = bytearray((folder / "ckpt.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    for content, message in {
        bytes(damaged): "ckpt.pt is damaged",
        (folder / "ckpt_previous.pt").read_bytes(): "is of step 6, the run ended at 8",
        (study[1] / "on_seed2" / "ckpt.pt").read_bytes(): "is of another run: its seed is 2",
    }.items():
        (folder / "ckpt.pt").write_bytes(content)
        assert message in error_of(probe, run, 1)
    (folder / "without.pt").replace(folder / "ckpt.pt")
    assert "is of another run: its seed is 1337" in error_of(probe, run, 1)
    (folder / "config.json").unlink()
    assert "seed" not in config_of(folder)
    (folder / "ckpt.pt").unlink()
    assert "there is no" in error_of(probe, run, 1)


@torch.no_grad()
def test_probe_measures_the_effect_of_beta_and_restores_the_model():
    model, _ = build(chrono(), beta=0.3)
    model.eval()
    beta, data = model.router_state.beta_coeff.clone(), Mock()
    data.batch.side_effect = lambda split, seed, step, micro, batch_size: tokens(micro, batch_size)
    found = probe_model(model, data, batches=2, batch_size=4)
    assert {call.args[:3] for call in data.batch.mock_calls} == {("val", EVAL_SEED, 0)}
    assert torch.equal(model.router_state.beta_coeff, beta)

    def mean_loss():  # at the model's own top_k of 2
        return sum(model(*tokens(micro, 4))[1].item() for micro in range(2)) / 2

    with_beta = mean_loss()
    model.router_state.beta_coeff.zero_()
    assert [p.top_k for p in found] == list(range(1, 9)) and found[1].loss == pytest.approx(with_beta, rel=1e-5)
    assert found[1].loss_difference == pytest.approx(with_beta - mean_loss(), abs=1e-5) != pytest.approx(0, abs=1e-4)
    assert 0 < found[1].set_changed < 1 and found[-1].set_changed == 0  # at top_k = E every expert is chosen
