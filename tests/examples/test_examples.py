"""The programs in examples/, at tiny sizes."""

import re

import numpy as np
import pytest

from trainer.errors import UserError

pytest.importorskip("transformers")

from examples import finetune_trainer, olmoe_from_scratch

TINY = ["--steps=3", "--batch=2", "--length=16", "--width=16", "--layers=1", "--experts=4", "--val_batches=2"]


def test_olmoe_is_trained_with_beta_on_and_off(tmp_path, capsys):
    for split in ("train", "val"):
        np.random.default_rng(0).integers(257, size=200).astype(np.uint16).tofile(tmp_path / f"{split}.bin")
    olmoe_from_scratch.main([f"--data={tmp_path}", *TINY])
    out = capsys.readouterr().out
    found = re.search(r"validation loss: beta off (\S+), beta on (\S+) nats", out)
    assert 5 < float(found[1]) < 7 and 5 < float(found[2]) < 7
    spreads = [float(x) for x in re.findall(r"beta spread (\S+)", out)]
    assert spreads[0] == 0 < spreads[1] and "One pair proves nothing" in out


def test_missing_or_short_data_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"train.bin cannot be read: .*; --data is a folder"):
        olmoe_from_scratch.main([f"--data={tmp_path}", *TINY])
    for split in ("train", "val"):
        np.zeros(9, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    with pytest.raises(UserError, match="has 9 tokens, too few for --length=16"):
        olmoe_from_scratch.main([f"--data={tmp_path}", *TINY])


def test_a_model_is_tuned_with_trainer_and_saved(tmp_path, capsys):
    pytest.importorskip("accelerate")
    options = ["--steps=5", "--batch=2", "--length=16", f"--out={tmp_path / 'out'}"]
    finetune_trainer.main(options)
    out = capsys.readouterr().out
    assert "chrono/coherence/layer" in out and "saved to" in out and (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(UserError, match="out has no tokenizer: save one"):
        finetune_trainer.main([*options, f"--model={tmp_path / 'out'}"])
    with pytest.raises(UserError, match=r"none cannot be loaded: .*; give the name of a model") as e:
        finetune_trainer.main([*options, f"--model={tmp_path / 'none'}"])
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="has 3 tokens, fewer than --length=16"):
        (tmp_path / "text").write_text("abc")
        finetune_trainer.main([*options, f"--text={tmp_path / 'text'}"])
    with pytest.raises(UserError, match="cannot be read as UTF-8 text"):
        finetune_trainer.main([*options, f"--text={tmp_path}"])
