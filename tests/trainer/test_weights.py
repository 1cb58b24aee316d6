"""Runs that start from weights: another run's, nanoMoE's, GPT-2's; and dense MLPs that become experts."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

import train
from model import GPT, GPTConfig
from tests.helpers.runs import ALL_ON, ROOT, TINY, VOCAB, checkpoint, metrics, one_line, write_dataset
from trainer import weights
from trainer.errors import UserError
from trainer.settings import from_arguments


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "letters", VOCAB)


@pytest.fixture(scope="module")
def start(dataset):
    def run(out, without=(), **changes):
        own = {key: value for key, value in TINY.items() if key not in without}
        settings = own | {"dataset": dataset, "out_dir": out} | changes
        return train.main([f"--{key}={value}" for key, value in settings.items()])

    return run


SHAPE = ("n_layer", "n_head", "n_embd", "n_exp", "block_size", "bias")


@pytest.fixture(scope="module")
def dense(tmp_path_factory, start):
    """A dense run of three steps."""
    out = tmp_path_factory.mktemp("runs") / "dense"
    assert start(out, n_exp=1, max_iters=3, bias=True) == 0
    return out


@pytest.fixture(scope="module")
def moe(tmp_path_factory, start):
    out = tmp_path_factory.mktemp("runs") / "moe"
    assert start(out, max_iters=3, **ALL_ON, chrono_eta=0.1) == 0
    return out


def first_loss(out):
    return metrics(out)[0]["val/loss"]


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_new_run_starts_from_another_runs_weights_with_a_fresh_loop(as_folder, moe, start, tmp_path):
    source = moe if as_folder else moe / "ckpt.pt"
    out = tmp_path / "out"
    assert start(out, without=SHAPE, init_from=source, max_iters=1, learning_rate=0, min_lr=0, **ALL_ON) == 0
    before, after = checkpoint(moe), checkpoint(out)
    assert after["model_args"]["n_embd"] == before["model_args"]["n_embd"]
    for name, value in before["model"].items():
        if name == "router_state.beta_coeff":
            assert value.abs().max() > 0.01 > after["model"][name].abs().max()  # one step's drift
        elif not name.startswith("router_state."):
            assert torch.equal(after["model"][name], value), name
    assert after["iter_num"] == 1 and after["chrono"]["coherence"]["step"] == 1
    assert [line["step"] for line in metrics(out)] == [0, 1]


@pytest.mark.parametrize("options", [dict(), dict(top_k=1), dict(n_exp=8, stride=1, **ALL_ON)])
def test_upcycled_the_model_computes_what_the_dense_one_does(options, dense, start, tmp_path, capsys):
    out = tmp_path / "out"
    assert start(out, without=SHAPE, init_from=dense, max_iters=0, **dict(n_exp=4) | options) == 0
    assert "dense MLPs became" in capsys.readouterr().out
    assert first_loss(out) == pytest.approx(metrics(dense)[-1]["val/loss"], rel=1e-6)


def test_upcycled_experts_are_trained_apart(dense, start, tmp_path):
    out = tmp_path / "out"
    assert start(out, without=SHAPE, init_from=dense, max_iters=3, n_exp=4) == 0
    experts = checkpoint(out)["model"]["transformer.h.0.mlp.experts.c_fc"]
    assert not torch.equal(experts[0], experts[1])


def test_the_context_may_be_shorter_and_nothing_else_may_differ(moe, start, tmp_path):
    assert start(tmp_path / "short", without=SHAPE, init_from=moe, max_iters=0, block_size=8) == 0
    for key, value in (("n_embd", 32), ("n_layer", 2), ("block_size", 64), ("n_exp", 8), ("bias", True)):
        with pytest.raises(UserError) as error:
            start(tmp_path / "out", without=SHAPE, init_from=moe, **{key: value})
        assert one_line(error).startswith(f"{key}={value}, but the weights of")


OTHER = dict(
    **dict(n_exp=4, top_k=3, dropout=0.25, train_capacity=1.5, eval_capacity=1.25, min_capacity=2),
    **dict(use_aux_loss=True, aux_loss_weight=0.02, use_router_z_loss=True, router_z_loss_weight=0.003),
    **dict(router_use_full_prec=True, use_noisy_top_k=True, use_switch_tfm_init=True, switch_tfm_init_scale=0.5),
)


def settings_of(out, names):
    config = json.loads((out / "config.json").read_text())
    return {name: config[name] for name in names}


def test_every_setting_of_the_model_goes_with_its_weights_unless_another_is_given(start, tmp_path):
    source, same, other = tmp_path / "source", tmp_path / "same", tmp_path / "other"
    start(source, **OTHER, max_iters=1)
    start(same, without=SHAPE, init_from=source, max_iters=0)
    assert settings_of(same, OTHER) == OTHER
    assert first_loss(same) == pytest.approx(metrics(source)[-1]["val/loss"], rel=1e-6)
    given = dict(top_k=1, dropout=0.0, eval_capacity=None)
    start(other, without=SHAPE, init_from=source, max_iters=0, **given)
    assert settings_of(other, OTHER) == OTHER | given


def test_a_dense_checkpoint_does_not_decide_the_settings_of_experts(start, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    start(source, **OTHER | dict(n_exp=1, use_noisy_top_k=False), max_iters=1)
    start(out, without=SHAPE, init_from=source, n_exp=4, max_iters=0)
    defaults = from_arguments([]).flat()
    assert settings_of(out, OTHER) == {key: defaults[key] for key in OTHER} | dict(n_exp=4, dropout=0.25)


def test_evaluation_only_of_a_path_evaluates_the_checkpoint_with_its_beta(start, tmp_path, capsys):
    source = tmp_path / "source"
    strong = dict(chrono_eta=1.0, chrono_k_max=3.0, chrono_bridge=False, chrono_gates="clean")
    start(source, **ALL_ON | strong, max_iters=3)
    expected = metrics(source)[-1]["val/loss"]

    def evaluated(init_from, **changes):
        capsys.readouterr()
        assert start(tmp_path / "no_run", without=SHAPE, init_from=init_from, eval_only=True, **changes) == 0
        return float(re.search(rf"validation loss of {source}: ([0-9.]+) nats", capsys.readouterr().out)[1])

    assert evaluated(source) == pytest.approx(expected, abs=1e-4)
    assert evaluated(f"auto:{source}") == pytest.approx(expected, abs=1e-4)
    off = {name: False for name in ALL_ON}
    assert abs(evaluated(source, **off) - expected) > 3e-4
    assert abs(evaluated(source, chrono_k_max=0.1) - expected) > 3e-4
    assert not (tmp_path / "no_run").exists()


def test_training_from_a_checkpoint_with_beta_says_that_beta_starts_at_0(moe, dense, start, tmp_path, capsys):
    for source, told in ((moe, 1), (dense, 0)):
        capsys.readouterr()
        start(tmp_path / source.name, without=SHAPE, init_from=source, max_iters=0)
        assert capsys.readouterr().out.count("starts at 0") == told
    assert not settings_of(tmp_path / "moe", ["chrono_beta"])["chrono_beta"]


def test_nanomoes_settings_of_the_model_go_with_its_weights(start, tmp_path):
    source = ROOT / "tests" / "golden" / "nanomoe_ckpt.pt"
    args = torch.load(source, weights_only=True)["model_args"]
    out, data = tmp_path / "out", write_dataset(tmp_path / "data", args.pop("vocab_size"))
    start(out, without=SHAPE, init_from=source, dataset=data, max_iters=0)
    assert settings_of(out, args) == args


def test_nanomoes_weights_start_a_run_in_their_shape(start, tmp_path):
    source = ROOT / "tests" / "golden" / "nanomoe_ckpt.pt"
    args = torch.load(source, weights_only=True)["model_args"]
    data = write_dataset(tmp_path / "data", args["vocab_size"])
    out = tmp_path / "out"
    assert start(out, without=SHAPE, init_from=source, dataset=data, max_iters=1, **ALL_ON) == 0
    assert checkpoint(out)["model_args"]["n_embd"] == args["n_embd"]


@pytest.mark.parametrize(
    "source, expected",
    [
        ("resum", "did you mean 'resume'"),
        ("gtp2", "did you mean 'gpt2'"),
        ("no/such/file.pt", "there is no checkpoint"),
    ],
)
def test_weights_that_are_not_there_get_one_line(source, expected, start, tmp_path):
    with pytest.raises(UserError) as error:
        start(tmp_path / "out", init_from=source)
    assert expected in one_line(error)
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_get_one_line(moe, start, tmp_path):
    saved = checkpoint(moe)
    del saved["model"]["transformer.h.0.ln_1.weight"]
    torch.save(saved, tmp_path / "bad.pt")
    with pytest.raises(UserError) as error:
        start(tmp_path / "out", without=SHAPE, init_from=tmp_path / "bad.pt")
    assert "it lacks transformer.h.0.ln_1.weight" in one_line(error)


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """A small GPT-2 as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    shape = dict(vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    torch.manual_seed(0)
    # nanoGPT computes the exact GELU where GPT-2 has an approximation of it
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, activation_function="gelu")).eval()
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    return folder, model


def test_gpt2s_weights_compute_what_transformers_computes(gpt2_folder):
    folder, theirs = gpt2_folder
    ours = GPT.from_pretrained(str(folder)).eval()
    idx = torch.randint(VOCAB, (3, 20))
    with torch.no_grad():
        logits, _ = ours(idx, idx)
        torch.testing.assert_close(logits, theirs(idx).logits, rtol=1e-4, atol=1e-5)


def test_a_run_starts_from_gpt2_dense_or_upcycled(gpt2_folder, start, tmp_path):
    folder, _ = gpt2_folder
    assert start(tmp_path / "dense", without=SHAPE, init_from=folder, block_size=16, max_iters=0) == 0
    upcycled = dict(init_from=folder, block_size=16, max_iters=2, n_exp=4, stride=1)
    assert start(tmp_path / "moe", without=SHAPE, **upcycled) == 0
    assert first_loss(tmp_path / "moe") == pytest.approx(first_loss(tmp_path / "dense"), rel=1e-6)
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["bias"] is True


def test_gpt2_without_a_network_gets_one_line(start, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(weights, "HUB", "localhost")
    with pytest.raises(UserError) as error:
        start(tmp_path / "out", without=SHAPE, init_from="gpt2")
    assert "cannot be loaded" in one_line(error) and "save_pretrained" in one_line(error)


def test_a_machine_without_transformers_gets_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        weights.find("gpt2")


def test_data_without_a_meta_file_takes_the_vocabulary_of_the_weights(moe, start, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(write_dataset(tmp_path / "letters", VOCAB), data)
    (data / "meta.json").unlink()
    assert start(tmp_path / "out", without=SHAPE, init_from=moe, dataset=data, max_iters=0) == 0
    assert checkpoint(moe)["model_args"]["vocab_size"] == VOCAB
    tokens = np.fromfile(data / "val.bin", dtype=np.uint16)
    tokens[-1] = VOCAB
    tokens.tofile(data / "val.bin")
    with pytest.raises(UserError, match=f"token id {VOCAB}"):
        start(tmp_path / "other", without=SHAPE, init_from=moe, dataset=data, max_iters=0)


def test_upcycling_copies_biases_and_weights_to_every_expert():
    dense = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=4, bias=True))
    moe = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=4, bias=True, n_exp=3, stride=1))
    source = {n: v for n, v in dense.state_dict().items() if not n.startswith("router_state.")}
    with torch.no_grad():
        for value in source.values():
            value.normal_()
    assert weights.put(source, "dense", moe) == ["1 dense MLPs became 3 experts each"]
    experts = moe.transformer.h[0].mlp.experts
    for e in range(3):
        assert torch.equal(experts.c_fc[e], source["transformer.h.0.mlp.c_fc.weight"].t())
        assert torch.equal(experts.proj_bias[e, 0], source["transformer.h.0.mlp.c_proj.bias"])
