"""Ranges hold where they are declared, in the library too; the threshold of the bridge follows its signal."""

import dataclasses

import numpy as np
import pytest
import torch

import train
from chronomoe import ChronoConfig
from chronomoe.options import is_active, options_of
from model import GPTConfig
from tests.helpers.runs import ALL_ON, TINY, write_dataset
from trainer.settings import Settings, keys

WRONG = [
    (
        ChronoConfig,
        dict(signal="laod"),
        "signal='laod' must be one of 'coherence', 'shuffled', 'load'; did you mean 'load'?",
    ),
    (ChronoConfig, dict(gates="Clean"), "did you mean 'clean'?"),
    (ChronoConfig, dict(bridge_threshold=0), "bridge_threshold=0.0 must be a number above 0 or None"),
    (ChronoConfig, dict(eta=-5), "eta=-5.0 must be a number at least 0"),
    (ChronoConfig, dict(eta=float("nan")), "eta=nan must be a number"),
    (ChronoConfig, dict(alpha_slow=1.0), "below 1"),
    (ChronoConfig, dict(window=1.5), "window=1.5 must be a whole number"),
    (ChronoConfig, dict(router=1), "router=1 must be True or False"),
    (GPTConfig, dict(stride=0), "stride=0 must be a whole number at least 1"),
    (GPTConfig, dict(dropout=2), "dropout=2.0 must be a number at least 0 and below 1"),
    (GPTConfig, dict(train_capacity=0), "above 0 or None"),
    (GPTConfig, dict(vocab_size="57"), "vocab_size='57' must be a whole number"),
]


@pytest.mark.parametrize(("owner", "values", "said"), WRONG, ids=[said[:30] for *_, said in WRONG])
def test_a_value_out_of_range_is_refused_by_the_library(owner, values, said):
    with pytest.raises(ValueError) as error:
        owner(**values)
    assert said in str(error.value)


def test_numbers_of_other_types_are_converted_and_the_loops_settings_are_a_chronoconfig():
    config = GPTConfig(n_layer=2.0, n_exp=np.int64(4), dropout=np.float32(0.5))
    assert (config.n_layer, config.n_exp, config.dropout) == (2, 4, 0.5)
    assert [type(v) for v in (config.n_layer, config.n_exp, config.dropout)] == [int, int, float]
    for wrong in (None, {"router": True}):
        with pytest.raises(ValueError, match="must be a ChronoConfig"):
            GPTConfig(chrono=wrong)
    with pytest.raises(ValueError, match=r"at least 1, of a size below 9\.22337e\+18"):
        ChronoConfig(window=2**70)


def test_a_key_of_the_model_has_one_description():
    ours, models = options_of(Settings), options_of(GPTConfig)
    assert {f.name for f in dataclasses.fields(GPTConfig)} == {*models, "chrono"}
    assert models.keys() - ours.keys() == {"vocab_size"}
    for name, option in models.items():
        if name in ours:
            assert option.metadata == ours[name].metadata and option.type == ours[name].type


def test_an_option_is_active_where_all_that_it_needs_is():
    known = keys()
    assert all(key.needs is None or key.needs in known for key in known.values())
    on = {"chrono_router": True, "chrono_beta": True, "chrono_bridge": True}
    assert is_active("chrono_bridge_threshold", on, known)
    assert not is_active("chrono_bridge_threshold", on | {"chrono_beta": False}, known)
    assert is_active("learning_rate", {}, known)


def test_the_bridges_threshold_follows_its_signal():
    assert ChronoConfig().disagreement_threshold == 0.2
    assert ChronoConfig(bridge_signal="overlap").disagreement_threshold == 0.1
    assert ChronoConfig(bridge_signal="overlap", bridge_threshold=0.3).disagreement_threshold == 0.3
    assert dataclasses.replace(ChronoConfig(), bridge_signal="overlap").disagreement_threshold == 0.1


@pytest.mark.parametrize("saved", [None, 0.2])  # an older version saved the default as a number
def test_the_bridges_threshold_follows_its_signal_on_resume(saved, tmp_path, capsys):
    settings = TINY | ALL_ON | dict(max_iters=1, dataset=write_dataset(tmp_path / "data", 61))
    out = tmp_path / "out"
    assert train.main([*(f"--{key}={value}" for key, value in settings.items()), f"--out_dir={out}"]) == 0
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    assert checkpoint["config"]["chrono_bridge_threshold"] is None
    checkpoint["config"]["chrono_bridge_threshold"] = saved
    torch.save(checkpoint, out / "ckpt.pt")
    capsys.readouterr()
    again = ["--init_from=resume", "--chrono_bridge_signal=overlap", "--max_iters=2", "--device=cpu"]
    assert train.main([f"--out_dir={out}", *again]) == 0
    assert "above overlap 0.1" in capsys.readouterr().out
