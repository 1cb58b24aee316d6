"""Weights & Biases: offline without a login or network, and never the reason that a run ends or waits."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from unittest.mock import MagicMock

import pytest

from comparison import sweep, wandb_runs
from tests.helpers import child, runs
from trainer import errors, sinks
from trainer.arms import ARMS, DEFAULT_ARMS
from trainer.runlog import wandb_identity
from trainer.settings import from_arguments

SHOWN = """grad_norm lifecycle/candidates load/cv load/cv_max load/dropped lr time/tokens_per_s val/loss
    beta/clamped beta/spread beta/spread_max coherence/layer coherence/phi_max coherence/phi_min coherence/starving
    routing/flip routing/flip_max routing/js routing/js_max routing/neff_min routing/relevance routing/relevance_min
    train/aux_loss train/loss train/router_z_loss train/skipped"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """W&B as on a machine without a login, with fresh settings."""
    wandb = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith(("WANDB_", "NETRC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    wandb.teardown()
    yield wandb
    wandb.teardown()


@pytest.fixture
def fake_run(wandb, monkeypatch):
    """Stands for wandb's run."""
    run = MagicMock(id="abc", url="http://127.0.0.1:9/abc")
    run.settings.sync_dir = "nowhere"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", MagicMock(return_value=run))
    return run


def about_wandb(capfd):
    return [line for line in "".join(capfd.readouterr()).splitlines() if re.search("w&b|wandb", line, re.IGNORECASE)]


def records(folder):
    """The records of a run's .wandb file by type, in order. Its blocks of 32 KiB hold chunks of records, as LevelDB's
    log does: checksum (4 bytes), length (2), kind (1: whole, 2 to 4: first, middle and last part), content.
    """
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    content, at, record, found = path.read_bytes(), 7, b"", {}
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            parsed, record = wandb_internal_pb2.Record.FromString(record), b""
            name = parsed.WhichOneof("record_type")
            found.setdefault(name, []).append(getattr(parsed, name))
    return found


def values(items):
    """Values by name of the items of a history, summary or config record, as W&B's API returns them."""
    found = {}
    for item in items:
        *outer, name = item.nested_key or [item.key]
        inner = found
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[name] = json.loads(item.value_json)
    return found


@pytest.mark.parametrize("shape", [dict(n_layer=3, n_exp=4), dict(n_layer=5, n_exp=8)])
def test_its_own_file_has_every_value_but_shows_a_fixed_number_of_charts(shape, start, out, wandb):
    options = dict(wandb_tags="first, second", wandb_notes="why", wandb_group="mine", wandb_artifacts=True, max_iters=3)
    assert start(out, **runs.FULL, wandb_log=True, chrono_signal="shuffled", **shape, **options) == 0
    wandb.teardown()  # W&B's process writes the last records when it ends
    (folder,) = out.glob("wandb/offline-run-*")
    found, logged = records(folder), runs.metrics(out)
    run = found["run"][0]
    assert (run.job_type, run.run_group, run.notes, run.display_name) == ("shuffled", "mine", "why", "out")
    assert {"beta", "signal:shuffled", "seed:1337", "first", "second"} <= set(run.tags)
    assert values(run.config.update)["arm"] == "shuffled"
    history = [values(row.item) for row in found["history"]]
    assert [wandb_runs.plain(row) for row in history] == [
        {name: value for name, value in line.items() if value is not None} for line in logged
    ]
    metric = {m.name: m for m in found["metric"]}
    charts = {name for row in history for name in row if name[0] != "_" and name != "experts"}
    assert {name for name in charts if not metric[name].options.hidden} == set(SHOWN.split())
    assert all(metric[name].step_metric == "step" for name in charts - {"step"})
    summary = {}
    for record in found["summary"]:
        summary |= values(record.update)
    losses = [line["val/loss"] for line in logged if "val/loss" in line]
    assert summary["val/loss"] == {"min": min(losses), "last": losses[-1]}
    assert not any(name.startswith(("expert/", "routing/L")) for name in summary)
    last = history[-1]
    for name, of_layers in (("routing/js", "routing/L.*/js"), ("load/cv", "routing/L.*/load_cv")):
        layers = [value for key, value in last.items() if re.fullmatch(of_layers, key)]
        assert last[name] == pytest.approx(sum(layers) / len(layers)) and last[f"{name}_max"] == max(layers)
    assert last["coherence/phi_min"] == min(v for k, v in last.items() if k.endswith("phi_slow_min"))
    (table,) = (json.loads(path.read_text()) for path in folder.glob("files/media/table/experts_*.json"))
    assert table["columns"] == ["block", "expert", "phi_slow", "beta", "load"]
    assert {(b, e): phi for b, e, phi, *_ in table["data"]} == {
        (b, e): logged[-1][f"expert/L{b}_E{e}/phi_slow"]
        for b in range(0, shape["n_layer"], 2)
        for e in range(shape["n_exp"])
    }
    (alert,) = found["alert"]  # all experts are proposed in one step
    assert alert.title == "Prune proposals" and "L2_E3" in alert.text
    said = "".join(record.line for record in found["output_logger"])
    assert "model: " in said and re.search(r"^ *3 ", said, re.MULTILINE) and "done at step 3" in said
    files = {a.type: {entry.path for entry in a.manifest.contents} for a in found["artifact"]}
    assert files["model"] == {"ckpt.pt", "ckpt_best.pt"}


def test_without_a_login_it_is_offline_and_a_resumed_run_has_one_id_and_one_group(start, out, wandb, capfd):
    assert start(out, **runs.ALL_ON, wandb_log=True, max_iters=3) == 0
    (line,) = about_wandb(capfd)
    (folder,) = out.glob("wandb/offline-run-*")
    assert "offline (not logged in" in line and line.endswith(f"wandb sync {folder}")
    assert start(out, **runs.ALL_ON, wandb_log=True, init_from="resume", max_iters=3) == 0
    wandb.teardown()
    (line,) = about_wandb(capfd)
    folders = sorted(out.glob("wandb/offline-run-*"))
    assert line.endswith(f"wandb sync {' '.join(map(str, folders))}")
    found = [records(folder)["run"][0] for folder in folders]
    assert [run.run_id for run in found] == [runs.checkpoint(out)["wandb_id"]] * 2
    assert found[0].run_group == found[1].run_group != ""


def test_with_a_login_but_no_network_it_is_offline_after_a_few_seconds(start, out, wandb, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    before = time.monotonic()
    assert start(out, wandb_log=True) == 0 and time.monotonic() - before < 15
    (line,) = about_wandb(capfd)
    assert "offline (http://127.0.0.1:9 cannot be reached)" in line


@pytest.mark.parametrize(("failing", "verb"), [("define_metric", "log"), ("write_logs", "log"), ("finish", "finish")])
def test_a_failure_is_reported_once_and_training_continues(failing, verb, start, out, fake_run, monkeypatch, capfd):
    monkeypatch.setattr(errors, "_exit_handlers_run", [True])
    getattr(fake_run, failing).side_effect = ConnectionError("the first line\nthe second")
    assert start(out, wandb_log=True) == 0 and runs.steps(out)[-1] == runs.STEPS
    assert [call[0] for call in fake_run.method_calls].count(failing) == 1
    assert fake_run.method_calls[-1][0] == failing
    (line,) = (line for line in about_wandb(capfd) if "could not" in line)
    assert line == f"W&B: could not {verb} (ConnectionError: the first line); continuing without it"
    assert errors._exit_handlers_run == [False]  # those of W&B would hang


def test_a_server_that_does_not_answer_is_reported_once(start, out, fake_run, monkeypatch, capfd):
    answers, before = threading.Event(), threading.enumerate()

    def log(*args, **options):
        answers.wait(10)
        raise ConnectionError("too late")

    fake_run.log.side_effect = log
    monkeypatch.setattr(sinks, "MAX_QUEUED", 3)
    assert start(out, wandb_log=True) == 0
    answers.set()
    for thread in set(threading.enumerate()) - {*before}:
        thread.join(10)
    (reported,) = (line for line in about_wandb(capfd) if "could not" in line)
    assert "could not keep up (TimeoutError: 3 calls are waiting)" in reported


def test_a_machine_without_wandb_trains_and_reports_it_once(start, out, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert start(out, wandb_log=True) == 0
    (line,) = about_wandb(capfd)
    assert "continuing without it" in line and runs.steps(out)[-1] == runs.STEPS


def test_it_gets_the_lines_after_the_checkpoint_and_config_json(half, resume, wandb, fake_run):
    (half / "decisions.jsonl").unlink()
    assert resume(half, wandb_log=True, learning_rate=5e-3) == 0
    assert [call.kwargs["step"] for call in fake_run.log.call_args_list] == [4, 5, 6]
    config = runs.config_of(half)
    assert wandb.init.call_args.kwargs["config"] == config and config["incomplete"]
    assert config["history"][1]["changed"]["learning_rate"] == [1e-2, 5e-3]


def test_the_validation_loss_of_each_text_is_logged_and_has_a_chart(start, dataset, out, fake_run, tmp_path):
    other = runs.write_dataset(tmp_path / "numbers", runs.VOCAB, seed=9)
    assert start(out, wandb_log=True, data_schedule=f"{dataset}@0 {other}@3", max_iters=3) == 0
    logged = [call.args[0] for call in fake_run.log.call_args_list]
    defined = {call.args[0]: call.kwargs for call in fake_run.define_metric.call_args_list}
    for name in ("val/letters/loss", "val/numbers/loss"):
        assert [line[name] for line in logged if name in line] == [v[name] for v in runs.metrics(out) if name in v]
        assert defined[name] == {"step_metric": "step"}


def test_skipped_steps_give_one_alert_per_logged_step(start, out, fake_run):
    start(out, wandb_log=True, learning_rate=1e30, min_lr=1e30, grad_clip=0, log_interval=2)
    texts = [call.args[1] for call in fake_run.alert.call_args_list if call.args[0] == "Skipped steps"]
    assert [text.split(":")[0] for text in texts] == ["step 2", "step 4", "step 6"]


def identity(*arguments):
    settings = from_arguments(list(arguments))
    return wandb_identity(settings, settings.flat())


def test_the_job_type_is_the_arm_and_the_group_is_the_rest():
    on, off = (str(runs.ROOT / "config" / name) for name in ("vertical_slice.py", "beta_off.py"))
    same = [identity(on), identity(off), identity(on, "--arm=shuffled"), identity(on, "--seed=2", "--margin=0.1")]
    assert [found["job_type"] for found in same] == ["on", "off", "shuffled", "on"]
    assert len({found["group"] for found in same}) == 1 and same[0]["tags"] != same[3]["tags"]
    changes = (
        "n_exp=16 chrono_eta=0.01 chrono_k_max=1 chrono_center=True chrono_bridge=False learning_rate=1 max_iters=9"
    )
    groups = [identity(on, f"--{change}")["group"] for change in changes.split()]
    assert len({same[0]["group"], *groups}) == 8 and identity(on, "--arm=load")["job_type"] == "load"
    assert "eta0.01-kmax0.3" in groups[1] and "-center-" in groups[3]
    assert "accepts tags of up to 64" in runs.error_of(from_arguments, [f"--wandb_tags=a,{'b' * 65}"])


def test_a_study_has_one_group_and_a_sweep_trains_every_arm_in_folders_of_their_own(tmp_path, monkeypatch, dataset):
    yaml = pytest.importorskip("yaml")
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    study = [str(runs.ROOT / "config" / "study.py"), f"--dataset={dataset}", "--wandb_log=True", "--chrono_eta=0.01"]
    study.append("--chrono_spread=0.1")
    jobs = sweep.plan(study, tmp_path, list(ARMS), 1)
    assert len({identity(*job.arguments)["group"] for job in jobs}) == 1
    config = yaml.safe_load((runs.ROOT / "config" / "sweep.yaml").read_text())
    command, parameters = create_sweep_command(config["command"]), config["parameters"]
    monkeypatch.chdir(runs.ROOT)
    for arm in parameters["arm"]["values"]:
        chosen = create_sweep_command_args({"args": {"arm": {"value": arm}, "seed": {"value": 3}}})
        line = [part for piece in command[3:] for part in (chosen["args"] if piece == "${args}" else [piece])]
        monkeypatch.setenv("WANDB_RUN_ID", f"id-{arm}")
        found = from_arguments(line)
        assert (found.arm, found.seed, found.out_dir, found.wandb_log) == (arm, 3, f"out/sweep/id-{arm}", True)
    assert parameters["arm"]["values"] == [*DEFAULT_ARMS]
    monkeypatch.delenv("WANDB_RUN_ID")
    assert "WANDB_RUN_ID, which is not set" in runs.error_of(from_arguments, line)


def test_on_a_disk_that_is_full_it_prints_one_line_and_claims_nothing_about_the_logs(keys, out, log, tmp_path):
    environment = {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    command = keys(out, wandb_log=True, max_iters=10, eval_interval=100)
    assert child.run(command, log, file_limit=8000, environment=environment) == 1
    text = log.read_text()
    assert "Traceback" not in text and "Logging error" not in text
    started, failed = (line for line in text.splitlines() if line.startswith("W&B"))
    assert "W&B: offline" in started and re.search("could not finish .*File too large|is incomplete", failed)
    assert (
        "lines of" in text
        and "are lost" in text
        and "complete" not in text.partition("W&B: offline")[2].replace(failed, "")
    )


DIES = lambda server: os.kill(server, signal.SIGKILL), "could not log .*; continuing without it"
HANGS = lambda server: os.kill(server, signal.SIGSTOP), "could not finish .*wandb sync"
DISK_FULL = lambda server: child.set_file_limit(server, 20_000), "is incomplete .file too large"


@pytest.mark.parametrize(
    "fault", [DIES, *(pytest.param(fault, marks=pytest.mark.slow) for fault in (HANGS, DISK_FULL))]
)
def test_a_fault_of_its_process_is_reported_once_and_training_continues(fault, keys, out, log, tmp_path):
    (plant, expected), is_stopped = fault, fault is HANGS
    command = keys(out, wandb_log=True, eval_interval=100_000, max_iters=100_000 if is_stopped else 100)
    process = child.start(command, log, 2, environment={"WANDB_MODE": "offline", "HOME": str(tmp_path)})
    server = int(subprocess.check_output(["pgrep", "-P", str(process.pid), "wandb-core"]))
    try:
        plant(server)
        status = child.stop(process, signal.SIGTERM) if is_stopped else child.finish(process)
    finally:
        with contextlib.suppress(OSError):
            os.kill(server, signal.SIGKILL)
    assert status == (128 + signal.SIGTERM if is_stopped else 0)
    first, failure = (line for line in log.read_text().splitlines() if line.startswith("W&B") or "Traceback" in line)
    assert "offline" in first and re.search(expected, failure)
    assert runs.checkpoint(out)["iter_num"] == runs.steps(out)[-1] and (is_stopped or runs.steps(out)[-1] == 100)
