"""TensorBoard's event files, read back with TensorBoard's own reader."""

import sys

import pytest

from chronomoe.metrics import SUMMARY
from tests.helpers import runs


def test_a_resumed_run_has_each_step_once_and_no_chart_per_expert(start, out):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert start(out, **runs.FULL, tensorboard=True, max_iters=3) == 0
    saved = (out / "ckpt.pt").read_bytes()
    assert start(out, **runs.FULL, tensorboard=True, init_from="resume", max_iters=5) == 0
    (out / "ckpt.pt").write_bytes(saved)  # as after a crash
    assert start(out, **runs.FULL, tensorboard=True, init_from="resume") == 0
    found = reader.EventAccumulator(str(out / "tensorboard"), {reader.HISTOGRAMS: 0}).Reload()
    tags = found.Tags()
    assert {*SUMMARY, "train/loss", "val/loss"} <= set(tags["scalars"]) and len(tags["scalars"]) < 40
    assert set(tags["histograms"]) == {"experts/phi_slow", "experts/beta", "experts/load"}
    steps, losses = zip(*((e.step, e.value) for e in found.Scalars("train/loss")))
    logged = [line["train/loss"] for line in runs.metrics(out) if "train/loss" in line]
    assert list(steps) == [1, 2, 3, 4, 5, 6] and losses == pytest.approx(logged)
    assert [e.step for e in found.Histograms("experts/beta")] == [3, 6]
    assert "Prune proposals/text_summary" in tags["tensors"]


@pytest.mark.parametrize("fault", ["missing", "blocked"])
def test_a_failure_is_reported_once_and_training_continues(fault, start, out, monkeypatch, capsys):
    if fault == "missing":
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    else:
        out.mkdir()
        (out / "tensorboard").write_text("a file")
    assert start(out, tensorboard=True) == 0 and runs.steps(out)[-1] == runs.STEPS
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "TensorBoard" in line)
    assert line.endswith("continuing without it") and (fault == "blocked" or "pip install tensorboard" in line)


def test_the_validation_loss_of_each_text_has_a_chart(start, dataset, out, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    other = runs.write_dataset(tmp_path / "numbers", runs.VOCAB, seed=9)
    assert start(out, tensorboard=True, data_schedule=f"{dataset}@0 {other}@3", max_iters=3) == 0
    found = reader.EventAccumulator(str(out / "tensorboard")).Reload()
    for name in ("val/loss", "val/letters/loss", "val/numbers/loss"):
        losses = [line[name] for line in runs.metrics(out) if name in line]
        assert [e.value for e in found.Scalars(name)] == pytest.approx(losses) and len(losses) == 2
