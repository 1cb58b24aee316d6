"""With every step off the model computes what nanoMoE computes: values recorded from it, in tests/golden."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig, MOELayer

GOLDEN = Path(__file__).parent / "golden"
LAYERS = ["layer_bias", "layer_capacity", "layer_dropless", "layer_min_capacity", "layer_top1"]
MODELS = ["gpt_small", "gpt_dense", "gpt_bias_nodrop"]


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as z:
        return {key: json.loads(str(z[key])) if key in ("config", "optimizer") else z[key] for key in z.files}


def weights(recorded, prefix):
    return {key[len(prefix) :]: torch.from_numpy(v) for key, v in recorded.items() if key.startswith(prefix)}


def close(ours, theirs, rtol=1e-4):
    """Relative to the tensor's own size: single entries near zero are rounding."""
    theirs = torch.as_tensor(theirs)
    torch.testing.assert_close(ours.detach(), theirs.to(ours.dtype), rtol=rtol, atol=rtol * theirs.abs().max().item())


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_matches_nanomoe(name, mode):
    recorded = load(name)
    layer = MOELayer(GPTConfig(n_head=1, router_use_full_prec=True, **recorded["config"]))
    layer.load_state_dict(weights(recorded, "weight."))
    layer.train(mode == "train")
    x = torch.from_numpy(recorded["input"]).requires_grad_()

    y, trace = layer(x, None, with_stats=True)
    (
        (y * torch.from_numpy(recorded["output_cotangent"])).sum()
        + trace.routing.aux_loss
        + trace.routing.router_z_loss
    ).backward()

    close(y, recorded[f"{mode}_output"])
    close(trace.routing.aux_loss, recorded[f"{mode}_aux_loss"])
    close(trace.routing.router_z_loss, recorded[f"{mode}_router_z_loss"])
    close(x.grad, recorded[f"{mode}_grad_input"])
    gradients = {key: p.grad for key, p in layer.named_parameters()}
    expected = weights(recorded, f"{mode}_grad.")
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        close(gradient, expected[key])

    capacity = layer.capacity(x.shape[0] * x.shape[1])
    assert capacity == recorded[f"{mode}_capacity"]
    kept = trace.routing.tokens_per_expert if trace.kept is None else trace.kept
    assert kept.long().tolist() == recorded[f"{mode}_used_capacity"].tolist()
    dropped = trace.routing.tokens_per_expert.sum() - kept.sum()
    assert dropped == recorded[f"{mode}_tokens_dropped"]


def test_dropless_equals_a_capacity_that_never_binds():
    recorded = load("layer_dropless")
    config = recorded["config"] | {"train_capacity": None}
    layer = MOELayer(GPTConfig(n_head=1, **config))
    layer.load_state_dict(weights(recorded, "weight."))
    assert layer.capacity(32) is None
    close(layer(torch.from_numpy(recorded["input"]), None, False)[0], recorded["train_output"])


def train_steps(model, optimizer, recorded, grad_clip=1.0):
    """Rows (loss with auxiliaries, gradient norm), one a step, as nanoMoE's loop does without accumulation."""
    rows = []
    for idx, targets in zip(torch.from_numpy(recorded["idx"]), torch.from_numpy(recorded["targets"])):
        _, loss = model(idx, targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        rows.append((loss.item(), norm.item()))
    return torch.tensor(rows, dtype=torch.float64)


def close_weights(model, expected):
    """All but the keys' biases: softmax over keys cancels them, so AdamW divides their rounding by their rounding."""
    ours = model.state_dict()
    width = model.config.n_embd
    for key, value in expected.items():
        cancelled = slice(width, 2 * width) if key.endswith("c_attn.bias") else slice(0, 0)
        keep = torch.ones(len(value), dtype=torch.bool)
        keep[cancelled] = False
        close(ours[key][keep], value[keep])


def build(config, state):
    model = GPT(GPTConfig(**config))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.startswith("router_state.") for key in missing)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_follow_nanomoe(name):
    recorded = load(name)
    initial = weights(recorded, "initial.")
    initial["transformer.wte.weight"] = initial["lm_head.weight"]
    model = build(recorded["config"], initial)
    close(
        model(torch.from_numpy(recorded["idx"])[0], torch.from_numpy(recorded["targets"])[0])[0],
        recorded["step0_logits"],
    )

    o = recorded["optimizer"]
    optimizer = model.configure_optimizers(o["weight_decay"], o["learning_rate"], tuple(o["betas"]), "cpu")
    close(train_steps(model, optimizer, recorded, o["grad_clip"]), recorded["loss_and_grad_norm"])
    close_weights(model, weights(recorded, "final."))

    model.eval()
    idx, targets = torch.from_numpy(recorded["idx"])[0], torch.from_numpy(recorded["targets"])[0]
    with torch.no_grad():
        _, loss, trace = model(idx, targets, return_trace=True)
        logits, _ = model(idx)
    # nanoMoE's evaluation loss includes the auxiliaries
    config = model.config
    theirs = loss + config.aux_loss_weight * trace.aux_loss + config.router_z_loss_weight * trace.router_z_loss
    close(theirs, recorded["final_eval_loss"])
    close(logits, recorded["final_last_logits"])


def test_checkpoint_continues_with_its_optimizer():
    checkpoint = torch.load(GOLDEN / "nanomoe_ckpt.pt", weights_only=True)
    recorded = load("nanomoe_ckpt_continued")
    model = build(checkpoint["model_args"], checkpoint["model"])
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    optimizer.load_state_dict(checkpoint["optimizer"])
    close(train_steps(model, optimizer, recorded), recorded["loss_and_grad_norm"])
    close_weights(model, weights(recorded, "final."))


def test_weights_have_nanomoe_names_and_order():
    checkpoint = torch.load(GOLDEN / "nanomoe_ckpt.pt", weights_only=True)
    model = GPT(GPTConfig(**checkpoint["model_args"]))
    ours = [key for key in model.state_dict() if not key.startswith("router_state.")]
    assert ours == list(checkpoint["model"])
