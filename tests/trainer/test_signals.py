"""Signals and schedules of text in whole runs: exact resume, ranks, the measured worth, validation of every dataset."""

import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from chronomoe.signals import SIGNALS
from tests.helpers import child, runs
from trainer import timer
from trainer.data import EVAL_SEED, TokenData, fingerprint
from trainer.interventions import masked
from trainer.settings import from_values
from trainer.setup import open_run
from trainer.streams import HELD_OUT, stream_seed
from trainer.weights import build_model
from trainer.worth import WorthMeter

DRIVEN = runs.FULL | dict(chrono_eta=0.1, chrono_k_max=2.0, chrono_spread=0.1, worth_interval=2, worth_batches=3)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A second dataset with the vocabulary of the first."""
    return runs.write_dataset(tmp_path_factory.mktemp("data") / "numbers", runs.VOCAB, seed=9)


@pytest.fixture(scope="module")
def schedule(dataset, other):
    return f"{dataset}@0 {other}@2 {dataset}@5"


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_resumed_run_of_every_signal_and_a_ramp_is_the_unbroken_one(signal, start, tmp_path):
    ramp = {} if signal == "frozen" else dict(chrono_ramp="0.5@0 1@3 0@6")
    settings = DRIVEN | ramp | dict(chrono_signal=signal)
    assert start(tmp_path / "whole", **settings) == 0
    assert start(tmp_path / "out", **settings, max_iters=3) == 0
    assert start(tmp_path / "out", **settings, init_from="resume", max_iters=6) == 0
    runs.assert_same_run(tmp_path / "out", tmp_path / "whole")
    beta = runs.checkpoint(tmp_path / "whole")["model"]["router_state.beta_coeff"]
    assert (beta.abs().max() > 1e-3) == (signal == "frozen")  # the ramp ends at 0
    assert any(line.get("beta/L0/spread") for line in runs.metrics(tmp_path / "out"))


@pytest.mark.parametrize("signal", ["first_order", "worth"])
def test_ranks_compute_the_signal_of_one_process(signal, keys, out, log, tmp_path):
    settings = DRIVEN | dict(dropout=0, use_noisy_top_k=False, learning_rate=1e-3, chrono_signal=signal)
    assert child.run_ranks(keys(out, **settings), 2, log) == [0, 0]
    assert train.main(keys(tmp_path / "alone", **settings)) == 0
    a, b = (runs.checkpoint(folder)["chrono"]["signals"] for folder in (out, tmp_path / "alone"))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert a["score_ema"].std() > 1e-7


def test_the_worth_is_the_rise_of_the_loss_of_held_out_training_batches(dataset, other, out):
    schedule = f"{dataset}@0 {other}@4"
    settings = DRIVEN | dict(dataset=dataset, data_schedule=schedule, out_dir=out, chrono_signal="worth", max_iters=5)
    assert train.main(runs.arguments(runs.TINY | settings)) == 0
    with open_run(runs.arguments(runs.TINY | settings | dict(init_from="resume", max_iters=9))) as run:
        before = torch.get_rng_state()
        run.worth.measure(4)
        assert torch.equal(torch.get_rng_state(), before) and run.model.training
        model, data = run.model.eval(), TokenData(other, 16)  # step 4 is the first on the other text
        for layer, block in enumerate(model.config.moe_blocks):
            for expert in range(4):
                rises = []
                for index in range(3):
                    batch = data.batch("train", stream_seed(1337, HELD_OUT), 4, index, 4)
                    with torch.no_grad():
                        plain = model(*batch)[1]
                        with masked(model, {block: (expert,)}):
                            rises.append(model(*batch)[1] - plain)
                found = run.loop.signals.worth[layer, expert]
                torch.testing.assert_close(found, torch.stack(rises).mean(), rtol=1e-3, atol=1e-6)
        assert run.loop.signals.worth.abs().max() > 1e-5


def test_measuring_the_worth_does_not_change_training(start, tmp_path, capsys):
    settings = runs.FULL | dict(chrono_beta=False)
    assert start(tmp_path / "a", **settings) == start(tmp_path / "b", **settings, chrono_signal="worth") == 0
    assert runs.differing_state(tmp_path / "a", tmp_path / "b", without=("lines",)) >= {"/chrono/signals/worth"}
    assert not [x for x in runs.differing_state(tmp_path / "a", tmp_path / "b") if not x.startswith("/chrono/signals")]
    assert "signal worth: 1 measurements took" in capsys.readouterr().out


def test_the_worth_is_measured_before_each_interval_and_outside_of_the_step_times(start, out, monkeypatch):
    """On a clock on which a micro-batch takes a second and a measurement 100."""
    clock, measured, draw = [0.0], [], TokenData.batch

    def slow_draw(data, split, *place):
        clock[0] += split == "train"
        return draw(data, split, *place)

    def slow_measure(meter, step):
        clock[0] += 100
        measured.append(step)

    monkeypatch.setattr(TokenData, "batch", slow_draw)
    monkeypatch.setattr(WorthMeter, "measure", slow_measure)
    monkeypatch.setattr(timer, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert start(out, **DRIVEN, chrono_signal="worth") == 0
    assert measured == [0, 2, 4]
    assert {line["time/step_ms"] for line in runs.metrics(out)[1:]} == {2000}


@pytest.mark.parametrize(("coherence", "signal"), [(True, "worth"), (True, "reap"), (False, "worth")])
def test_the_worth_is_measured_only_for_its_signal_and_with_coherence(coherence, signal):
    s = from_values(dict(chrono_router=True, chrono_coherence=coherence, chrono_signal=signal, n_exp=4))
    assert s.measures_worth == (coherence and signal == "worth")


def test_the_worth_needs_an_expert_that_can_be_masked(start, out):
    message = runs.error_of(start, out, **runs.FULL, chrono_signal="worth", top_k=4)
    assert "top_k" in message and "n_exp=4" in message


def test_a_schedule_changes_the_training_text_at_its_steps_and_validates_all(start, schedule, dataset, other, out):
    drawn = []
    original = TokenData.batch

    def batch(self, *place):
        drawn.append((self.folder, *place[:4]))
        return original(self, *place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenData, "batch", batch)
        assert start(out, **runs.FULL, data_schedule=schedule) == 0
    texts = [dataset, dataset, other, other, other, dataset]
    expected = [(text, "train", 1337, step, i) for step, text in enumerate(texts) for i in (0, 1)]
    assert [place for place in drawn if place[1] == "train"] == expected
    model = build_model(runs.checkpoint(out), "the run").eval()
    last = runs.metrics(out)[-1]
    for folder in (dataset, other):
        with torch.no_grad():
            batches = [TokenData(folder, 16).batch("val", EVAL_SEED, 0, i, 4) for i in (0, 1)]
            losses = [model(*b)[1].item() for b in batches]
        assert last[f"val/{folder.name}/loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert last["val/loss"] == last[f"val/{dataset.name}/loss"] != last[f"val/{other.name}/loss"]
    assert set(runs.config_of(out)["data_sha256"]) == {"train.bin", "val.bin", "numbers/train.bin", "numbers/val.bin"}
    assert sum("val/numbers/loss" in line for line in runs.metrics(out)) == 3


def test_a_run_says_when_each_text_begins_and_an_evaluation_gives_the_loss_in_each(start, schedule, out, capsys):
    assert start(out, **DRIVEN, data_schedule=schedule, chrono_signal="reap", eval_interval=6) == 0
    printed = capsys.readouterr().out
    for name, steps in (("letters", "0, 5"), ("numbers", "2")):
        assert f"data: {name}, 3,000 train and 3,000 val tokens, vocabulary 61; from step {steps}\n" in printed
    assert f"beta follows {SIGNALS['reap'].what}\n" in printed
    assert start(out, init_from="resume", eval_only=True, without=runs.TINY) == 0
    printed, last = capsys.readouterr().out, runs.metrics(out)[-1]
    for of, metric in (("", "val/loss"), (" of letters", "val/letters/loss"), (" of numbers", "val/numbers/loss")):
        assert f"validation loss{of} at step 6: {last[metric]:.4f} nats per token" in printed


def test_every_text_has_the_vocabulary_of_the_weights(full_run, out, tmp_path):
    small = [runs.write_dataset(tmp_path / name, 8) for name in ("one", "two")]
    settings = dict(dataset=small[0], data_schedule=f"{small[0]}@0 {small[1]}@3", init_from=full_run / "ckpt.pt")
    with open_run(runs.arguments(runs.TINY | runs.FULL | settings | dict(out_dir=out))) as run:
        assert [data.vocab_size for data in run.batches.texts.values()] == [runs.VOCAB] * 2


def test_files_of_each_text_are_known_by_its_name_and_not_read_again(dataset, tmp_path, monkeypatch):
    copy = runs.write_dataset(tmp_path / "copy", runs.VOCAB, seed=9)
    for split in ("train", "val"):  # the same size and time do not make it the same file
        stat = os.stat(dataset / f"{split}.bin")
        os.utime(copy / f"{split}.bin", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    texts = {str(folder): TokenData(folder, 16) for folder in (dataset, copy)}
    first = TokenData(dataset, 16).fingerprint()
    found = fingerprint(texts, first)
    assert found == first | {f"copy/{name}": file for name, file in TokenData(copy, 16).fingerprint().items()}
    assert found["copy/train.bin"] != found["train.bin"]
    monkeypatch.setattr(TokenData, "_check_tokens", lambda *_: pytest.fail("read again"))
    assert fingerprint(texts, found) == found


@pytest.mark.parametrize("broken", [1, 2, 3, 5])
def test_a_run_resumed_within_a_schedule_is_the_unbroken_one(broken, start, schedule, tmp_path):
    settings = runs.FULL | dict(data_schedule=schedule, eval_interval=1)
    assert start(tmp_path / "whole", **settings) == 0
    assert start(tmp_path / "out", **settings, max_iters=broken) == 0
    assert start(tmp_path / "out", init_from="resume", max_iters=6, without=runs.TINY) == 0
    runs.assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_a_schedule_of_one_dataset_is_the_run_without(start, dataset, full_run, out):
    assert start(out, **runs.FULL, data_schedule=f"{dataset}@0 {dataset}@3") == 0
    assert runs.differing_state(out, full_run) == set()


def test_branches_of_one_seed_are_the_same_run_until_their_schedules_part(start, dataset, other, tmp_path):
    for name, text in (("a", dataset), ("b", other)):
        assert start(tmp_path / name, **runs.FULL, data_schedule=f"{dataset}@0 {text}@4") == 0
    a, b = ({line["step"]: line["train/loss"] for line in runs.metrics(tmp_path / n)[1:]} for n in "ab")
    assert [step for step in a if a[step] == b[step]] == [1, 2, 3, 4]


def test_two_ranks_follow_the_schedule_as_one_process(keys, schedule, out, log, tmp_path):
    settings = dict(data_schedule=schedule, dropout=0, use_noisy_top_k=False, learning_rate=1e-3)
    assert child.run_ranks(keys(out, **settings), 2, log) == [0, 0]
    assert train.main(keys(tmp_path / "alone", **settings)) == 0
    names = ("train/loss", "val/loss", "val/numbers/loss")
    a, b = ([line.get(n, 0) for line in runs.metrics(folder) for n in names] for folder in (out, tmp_path / "alone"))
    assert a == pytest.approx(b, rel=1e-4)


WRONG = {
    "{one}": "'{one}' must be VALUE@STEP",
    "{one}@1": "must begin at step 0",
    "{two}@0": "they must be the same",
    "{one}@0 {two}@3 {one}@3": "its steps must rise",
    "{one}@0 nothing@3": "no folder",
    "{one}@0 {small}@3": "a vocabulary of 8",
    "{one}@0 {words}@3": "has the tokenizer 'words'",
    "{one}@0 {twin}@3": "have one name in the logs, 'letters'",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_schedule_is_one_line(text, start, dataset, other, out, tmp_path):
    (tmp_path / "twin").mkdir()
    twin = runs.write_dataset(tmp_path / "twin" / "letters", runs.VOCAB)
    small = runs.write_dataset(tmp_path / "small", 8)
    words = runs.write_dataset(tmp_path / "words", runs.VOCAB)
    (words / "meta.json").write_text(json.dumps({"vocab_size": runs.VOCAB, "tokenizer": "words"}))
    folders = dict(one=dataset, two=other, small=small, twin=twin, words=words)
    assert WRONG[text].format(**folders) in runs.error_of(start, out, **runs.FULL, data_schedule=text.format(**folders))
    assert not out.exists()


def test_changed_text_of_a_later_phase_is_refused_on_resume(start, dataset, out, tmp_path):
    later = runs.write_dataset(tmp_path / "later", runs.VOCAB, seed=9)
    settings = runs.FULL | dict(data_schedule=f"{dataset}@0 {later}@5")
    assert start(out, **settings, max_iters=3) == 0
    tokens = np.fromfile(later / "train.bin", dtype="<u2")[::-1]
    tokens.tofile(later / "train.bin")
    (later / "meta.json").write_text(json.dumps({"vocab_size": runs.VOCAB}))
    message = runs.error_of(start, out, **settings, init_from="resume")
    assert "later/train.bin" in message and "has changed since the run began" in message


def test_a_resume_with_another_signal_forgets_the_score_of_the_first(start, out):
    assert start(out, **DRIVEN, chrono_signal="reap", max_iters=4) == 0
    assert start(out, **DRIVEN, chrono_signal="worth", init_from="resume") == 0
    signals = runs.checkpoint(out)["chrono"]["signals"]
    assert signals["score_count"].max() == 2 and signals["step"] == 2
    # the worth was measured once, before both steps
    count = signals["score_count"]
    score = signals["score_ema"] / -torch.expm1(count.clamp_min(1) * math.log(0.999))
    torch.testing.assert_close(score, signals["worth"].where(count > 0, 0.0), rtol=1e-3, atol=1e-7)
