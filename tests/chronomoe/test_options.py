"""Options check their ranges in the library too, and the bridge's default threshold follows its signal."""

import dataclasses

import numpy as np
import pytest
import torch

import train
from chronomoe import ChronoConfig
from chronomoe.options import is_active, options_of
from model import GPTConfig
from tests.helpers.runs import ALL_ON, TINY, checkpoint, write_dataset
from trainer.settings import Settings, keys

WRONG = [
    (ChronoConfig, "signal", "laod", "must be one of 'coherence', 'shuffled', 'load'; did you mean 'load'?"),
    (ChronoConfig, "bridge_threshold", 0, "=0.0 must be a number above 0 or None"),
    (ChronoConfig, "eta", -5, "=-5.0 must be a number at least 0"),
    (ChronoConfig, "eta", float("nan"), "=nan must be a number"),
    (ChronoConfig, "alpha_slow", 1.0, "below 1"),
    (ChronoConfig, "window", 1.5, "=1.5 must be a whole number"),
    (ChronoConfig, "window", 2**70, "at least 1, of a size below 9.22337e+18"),
    (ChronoConfig, "router", 1, "=1 must be True or False"),
    (ChronoConfig, "beta", True, "=True needs router=True"),
    (GPTConfig, "stride", 0, "=0 must be a whole number at least 1"),
    (GPTConfig, "dropout", 2, "=2.0 must be a number at least 0 and below 1"),
    (GPTConfig, "train_capacity", 0, "above 0 or None"),
    (GPTConfig, "vocab_size", "57", "='57' must be a whole number"),
    (GPTConfig, "chrono", {"router": True}, "must be a ChronoConfig"),
]


@pytest.mark.parametrize(("owner", "name", "value", "message"), WRONG)
def test_a_value_out_of_range_is_refused(owner, name, value, message):
    with pytest.raises(ValueError) as error:
        owner(**{name: value})
    assert str(error.value).startswith(name) and message in str(error.value)


def test_numbers_are_converted_to_the_declared_type():
    config = GPTConfig(n_layer=2.0, n_exp=np.int64(4), dropout=np.float32(0.5))
    found = [(type(value), value) for value in (config.n_layer, config.n_exp, config.dropout)]
    assert found == [(int, 2), (int, 4), (float, 0.5)]


def test_the_models_options_are_declared_once():
    ours, models = options_of(Settings), options_of(GPTConfig)
    assert {f.name for f in dataclasses.fields(GPTConfig)} == {*models, "chrono"}
    assert models.keys() - ours.keys() == {"vocab_size"}
    for name in models.keys() & ours.keys():
        assert models[name].metadata == ours[name].metadata and models[name].type == ours[name].type


def test_an_option_is_active_if_everything_it_needs_is_on():
    known = keys()
    assert all(key.needs is None or key.needs in known for key in known.values())
    on = {"chrono_router": True, "chrono_beta": True, "chrono_bridge": True}
    assert is_active("chrono_bridge_threshold", on, known) and is_active("learning_rate", {}, known)
    assert not is_active("chrono_bridge_threshold", on | {"chrono_beta": False}, known)


@pytest.mark.parametrize("saved", [None, 0.2])  # an older version saved the default as a number
def test_the_default_threshold_follows_the_bridges_signal_also_on_resume(saved, tmp_path, capsys):
    assert ChronoConfig().disagreement_threshold == 0.2
    assert ChronoConfig(bridge_signal="overlap").disagreement_threshold == 0.1
    assert ChronoConfig(bridge_signal="overlap", bridge_threshold=0.3).disagreement_threshold == 0.3
    settings = TINY | ALL_ON | dict(max_iters=1, dataset=write_dataset(tmp_path / "data", 61), out_dir=tmp_path)
    assert train.main([f"--{key}={value}" for key, value in settings.items()]) == 0
    state = checkpoint(tmp_path)
    assert state["config"]["chrono_bridge_threshold"] is None
    state["config"]["chrono_bridge_threshold"] = saved
    torch.save(state, tmp_path / "ckpt.pt")
    capsys.readouterr()
    changes = ["--init_from=resume", "--chrono_bridge_signal=overlap", "--max_iters=2", "--device=cpu"]
    assert train.main([f"--out_dir={tmp_path}", *changes]) == 0
    assert "above overlap 0.1" in capsys.readouterr().out
