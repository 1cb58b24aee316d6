"""Options: the library checks types and ranges itself; `needs`; the default of the bridge's threshold."""

import dataclasses

import numpy as np
import pytest
import torch

import train
from chronomoe import ChronoConfig
from chronomoe.options import is_active, options_of
from model import GPTConfig
from tests.helpers.runs import ALL_ON, TINY, arguments, checkpoint, write_dataset
from trainer.settings import Settings, keys

WRONG = [
    (ChronoConfig, dict(signal="laod"), "'reap', 'worth'; did you mean 'load'?"),
    (ChronoConfig, dict(bridge_threshold=0), "bridge_threshold=0.0 must be a number above 0 or None"),
    (ChronoConfig, dict(eta=float("nan")), "eta=nan must be a number"),
    (ChronoConfig, dict(tau=1.5), "tau=1.5 must be a number at least -1 and at most 1"),
    (ChronoConfig, dict(alpha_slow=1.0), "below 1"),
    (GPTConfig, dict(stride=0), "stride=0 must be a whole number at least 1"),
    (GPTConfig, dict(chrono=None), "must be a ChronoConfig"),
]


@pytest.mark.parametrize(("owner", "values", "message"), WRONG, ids=[str(values) for _, values, _ in WRONG])
def test_the_library_refuses_a_wrong_type_or_value(owner, values, message):
    with pytest.raises(ValueError) as error:
        owner(**values)
    assert message in str(error.value)


def test_numbers_of_other_types_are_converted():
    config = GPTConfig(n_layer=2.0, n_exp=np.int64(4), dropout=np.float32(0.5))
    found = [config.n_layer, config.n_exp, config.dropout]
    assert found == [2, 4, 0.5] and [type(value) for value in found] == [int, int, float]


def test_a_key_of_the_model_has_one_declaration():
    ours, models = options_of(Settings), options_of(GPTConfig)
    assert {f.name for f in dataclasses.fields(GPTConfig)} == {*models, "chrono"}
    assert models.keys() - ours.keys() == {"vocab_size"}
    for name in models.keys() & ours.keys():
        assert models[name].metadata | {"group": ""} == ours[name].metadata | {"group": ""}
        assert models[name].type == ours[name].type


def test_an_option_is_active_if_all_that_it_needs_is_on():
    known = keys()
    assert all(key.only_with is None or key.only_with.partition("=")[0] in known for key in known.values())
    on = {"chrono_router": True, "chrono_beta": True, "chrono_bridge": True}
    assert is_active("chrono_bridge_threshold", on, known)
    for needed in ("chrono_bridge", "chrono_beta"):  # directly and indirectly
        assert not is_active("chrono_bridge_threshold", on | {needed: False}, known)
    assert is_active("learning_rate", {}, known)


def test_the_default_threshold_of_the_bridge_follows_its_signal():
    assert ChronoConfig().disagreement_threshold == 0.2
    overlap = dataclasses.replace(ChronoConfig(), bridge_signal="overlap")
    assert overlap.disagreement_threshold == 0.1
    assert dataclasses.replace(overlap, bridge_threshold=0.3).disagreement_threshold == 0.3


@pytest.mark.parametrize("saved", [None, 0.2])  # an older version saved the default as a number
def test_the_default_threshold_of_the_bridge_follows_its_signal_on_resume(saved, tmp_path, capsys):
    data = write_dataset(tmp_path / "data", 61)
    settings = TINY | ALL_ON | dict(max_iters=1, dataset=data, out_dir=tmp_path)
    assert train.main(arguments(settings)) == 0
    found = checkpoint(tmp_path)
    assert found["config"]["chrono_bridge_threshold"] is None
    found["config"]["chrono_bridge_threshold"] = saved
    torch.save(found, tmp_path / "ckpt.pt")
    resumed = dict(init_from="resume", chrono_bridge_signal="overlap", max_iters=2)
    assert train.main(arguments(settings | resumed)) == 0
    assert "above overlap 0.1" in capsys.readouterr().out
