"""Runs that start from weights: another run's, nanoMoE's, GPT-2's; and dense MLPs that become experts."""

import hashlib
import re
import sys

import numpy as np
import pytest
import torch

from model import GPT
from tests.helpers import runs
from trainer import weights
from trainer.settings import from_arguments
from trainer.weights import find_weights, weights_sha256

UNTRAINED = dict(learning_rate=0, min_lr=0)


@pytest.fixture(scope="module")
def begin(start):
    """begin(out_dir, source, **settings) starts a run from weights, with their shape."""
    return lambda out, source, **more: start(out, without=runs.SHAPE, **dict(init_from=source, max_iters=0) | more)


@pytest.fixture(scope="module")
def dense(tmp_path_factory, start):
    """A dense run of three steps. Do not write to it."""
    out = tmp_path_factory.mktemp("runs") / "dense"
    assert start(out, n_exp=1, max_iters=3, bias=True) == 0
    return out


@pytest.fixture(scope="module")
def moe(tmp_path_factory, start):
    """A run of three steps with a strong beta. Do not write to it."""
    out = tmp_path_factory.mktemp("runs") / "moe"
    strong = dict(chrono_eta=1.0, chrono_k_max=3.0, chrono_bridge=False, chrono_gates="clean")
    assert start(out, **runs.ALL_ON | strong, max_iters=3) == 0
    return out


def test_a_new_run_starts_from_a_runs_weights_with_a_fresh_loop(moe, begin, capsys, out):
    assert begin(out, moe, max_iters=1, **UNTRAINED, **runs.ALL_ON) == 0
    assert f"weights: beta starts at 0, not at that of {moe}" in capsys.readouterr().out
    after = runs.checkpoint(out)
    for name, value in runs.checkpoint(moe)["model"].items():
        if name == "router_state.beta_coeff":
            assert value.abs().max() > 0.01 > after["model"][name].abs().max()  # one step's drift
        elif not name.startswith("router_state."):
            assert torch.equal(after["model"][name], value), name
    assert after["iter_num"] == 1 and after["chrono"]["coherence"]["step"] == 1
    assert runs.steps(out) == [0, 1]


def test_weights_of_another_shape_get_one_line_except_for_a_shorter_context(moe, begin, tmp_path, out):
    assert begin(tmp_path / "short", moe, block_size=8, max_iters=1, **UNTRAINED) == 0
    cropped, saved = (
        runs.checkpoint(folder)["model"]["transformer.wpe.weight"] for folder in (tmp_path / "short", moe)
    )
    assert torch.equal(cropped, saved[:8])
    for key, value in dict(n_embd=32, n_layer=2, block_size=64, n_exp=8, bias=True).items():
        assert runs.error_of(begin, out, moe, **{key: value}).startswith(f"{key}={value}, but the weights of")
    saved = runs.checkpoint(moe)
    del saved["model"]["transformer.h.0.ln_1.weight"]
    torch.save(saved, tmp_path / "bad.pt")
    assert "it lacks transformer.h.0.ln_1.weight" in runs.error_of(begin, out, tmp_path / "bad.pt")


OTHER = dict(
    **dict(n_exp=4, top_k=3, dropout=0.25, train_capacity=1.5, eval_capacity=1.25, min_capacity=2),
    **dict(use_aux_loss=True, aux_loss_weight=0.02, use_router_z_loss=True, router_z_loss_weight=0.003),
    **dict(router_use_full_prec=True, use_noisy_top_k=True, use_switch_tfm_init=True, switch_tfm_init_scale=0.5),
)


def settings_of(out, names):
    return {name: runs.config_of(out)[name] for name in names}


def test_the_settings_of_the_model_are_those_of_its_weights_unless_others_are_given(start, begin, tmp_path):
    source, same, other, dense, to_experts = (tmp_path / name for name in ("source", "same", "other", "dense", "moe"))
    assert start(source, **OTHER, max_iters=1) == 0
    assert begin(same, source) == 0 and settings_of(same, OTHER) == OTHER
    assert runs.val_losses(same)[0] == pytest.approx(runs.val_losses(source)[-1], rel=1e-6)
    given = dict(top_k=1, dropout=0.0, eval_capacity=None)
    begin(other, source, **given)
    assert settings_of(other, OTHER) == OTHER | given
    # a dense checkpoint does not fix the settings of experts
    assert start(dense, **OTHER | dict(n_exp=1, use_noisy_top_k=False), max_iters=1) == 0
    begin(to_experts, dense, n_exp=4)
    defaults = from_arguments([]).flat()
    assert settings_of(to_experts, OTHER) == {key: defaults[key] for key in OTHER} | dict(n_exp=4, dropout=0.25)


def test_evaluation_only_of_a_path_uses_the_checkpoints_loop_and_writes_nothing(moe, begin, tmp_path, capsys):
    def evaluated(init_from, **changes):
        assert begin(tmp_path / "no_run", init_from, eval_only=True, **changes) == 0
        return float(re.search(rf"validation loss of {moe}: ([0-9.]+) nats", capsys.readouterr().out)[1])

    expected = runs.val_losses(moe)[-1]
    assert evaluated(moe) == pytest.approx(expected, abs=1e-4) == evaluated(f"auto:{moe}")
    for changes in (dict.fromkeys(runs.ALL_ON, False), dict(chrono_k_max=0.1)):
        assert abs(evaluated(moe, **changes) - expected) > 3e-4
    assert not (tmp_path / "no_run").exists()


def test_nanomoes_weights_start_a_run_with_their_settings(start, begin, tmp_path, out):
    args = torch.load(runs.NANOMOE, weights_only=True)["model_args"]
    data = runs.write_dataset(tmp_path / "data", args.pop("vocab_size"))
    assert begin(out, runs.NANOMOE, dataset=data, max_iters=1, **runs.ALL_ON) == 0
    assert settings_of(out, args) == args
    assert runs.checkpoint(out)["model_args"].items() >= args.items()


def test_data_without_a_meta_file_have_the_vocabulary_of_the_weights(moe, begin, tmp_path, out):
    data = runs.write_dataset(tmp_path / "data", runs.VOCAB)
    (data / "meta.json").unlink()
    assert begin(out, moe, dataset=data, max_iters=1) == 0
    assert runs.checkpoint(out)["model_args"]["vocab_size"] == runs.VOCAB
    tokens = np.fromfile(data / "val.bin", dtype=np.uint16)
    tokens[-1] = runs.VOCAB
    tokens.tofile(data / "val.bin")
    assert f"token id {runs.VOCAB}" in runs.error_of(begin, tmp_path / "other", moe, dataset=data)


@pytest.mark.parametrize("options", [dict(), dict(top_k=1), dict(stride=1, **runs.ALL_ON)])
def test_upcycled_experts_compute_what_the_dense_model_does_and_are_trained_apart(options, dense, begin, out, capsys):
    assert begin(out, dense, max_iters=3, n_exp=4, **options) == 0
    assert f"{3 if 'stride' in options else 2} dense MLPs became 4 experts each" in capsys.readouterr().out
    assert runs.val_losses(out)[0] == pytest.approx(runs.val_losses(dense)[-1], rel=1e-6)
    experts = runs.checkpoint(out)["model"]["transformer.h.0.mlp.experts.c_fc"]
    assert (experts != experts[:1]).any()


def test_the_digest_of_weights_covers_names_dtypes_shapes_and_bytes_in_the_order_of_names():
    found = {"b": torch.arange(6.0).reshape(2, 3).t(), "a": torch.ones(2, dtype=torch.bfloat16)}
    documented = b"a torch.bfloat16 [2]\n\x80\x3f\x80\x3fb torch.float32 [3, 2]\n"
    documented += np.float32([0, 3, 1, 4, 2, 5]).tobytes()
    assert weights_sha256(found) == hashlib.sha256(documented).hexdigest()


def origin(out):
    """(weights_from, weights_sha256) of config.json and of the checkpoint, which must agree."""
    config, saved = runs.config_of(out), runs.checkpoint(out)
    found = config["weights_from"], config["weights_sha256"]
    assert found == (saved["weights_from"], saved["weights_sha256"])
    return found


@pytest.mark.parametrize("init_from", ["{}", "auto:{}"])
def test_where_the_weights_came_from_is_recorded_and_survives_every_resume(init_from, moe, dense, begin, tmp_path):
    for source, changes in ((moe / "ckpt.pt", {}), (dense, dict(n_exp=4))):
        out = tmp_path / source.name
        saved = torch.load(source if source.is_file() else source / "ckpt.pt")
        expected = str(source), weights_sha256(weights.without_state(saved["model"]))
        again = ["resume", "auto", f"auto:{source}", "auto:no/such/file"]
        for length, named in enumerate([init_from.format(source), *again], 1):
            assert begin(out, named, max_iters=length, **changes) == 0
            assert origin(out) == expected
        assert runs.steps(out) == list(range(6))


def test_auto_starts_from_its_source_or_from_scratch_only_without_a_checkpoint(start, tmp_path):
    for name, init_from, length in (("a", "auto", 1), ("a", "auto:gpt2", 2), ("b", "auto:scratch", 1)):
        assert start(tmp_path / name, init_from=init_from, max_iters=length) == 0
        assert origin(tmp_path / name) == (None, None) and runs.steps(tmp_path / name)[-1] == length


def test_gpt2s_weights_compute_what_transformers_computes_dense_or_upcycled(begin, tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = dict(vocab_size=runs.VOCAB, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    # nanoGPT computes the exact GELU, GPT-2 an approximation
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, activation_function="gelu")).eval()
    theirs.save_pretrained(folder := tmp_path / "gpt2")
    idx = torch.randint(runs.VOCAB, (3, 20))
    with torch.no_grad():
        logits = GPT.from_pretrained(str(folder)).eval()(idx, idx)[0]
        torch.testing.assert_close(logits, theirs(idx).logits, rtol=1e-4, atol=1e-5)
    assert begin(tmp_path / "dense", folder, block_size=16) == 0
    assert begin(tmp_path / "moe", folder, block_size=16, max_iters=2, n_exp=4, stride=1) == 0
    assert runs.val_losses(tmp_path / "moe")[0] == pytest.approx(runs.val_losses(tmp_path / "dense")[0], rel=1e-6)
    assert runs.config_of(tmp_path / "moe")["bias"] is True


def test_gpt2_without_a_network_or_without_transformers_gets_one_line(begin, tmp_path, monkeypatch, out):
    pytest.importorskip("transformers")
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(weights, "HUB", "localhost")
    assert "give the folder as init_from" in runs.error_of(begin, out, "gpt2")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in runs.error_of(find_weights, "gpt2")
