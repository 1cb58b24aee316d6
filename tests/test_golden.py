"""With all steps off the model computes what nanoMoE computes: values recorded from nanoMoE, in tests/golden."""

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
        loaded = {key: json.loads(str(z[key])) if key in ("config", "optimizer") else z[key] for key in z.files}
    return {key: torch.from_numpy(v) if isinstance(v, np.ndarray) and v.ndim else v for key, v in loaded.items()}


def weights(recorded, prefix):
    return {key[len(prefix) :]: v for key, v in recorded.items() if key.startswith(prefix)}


def close(ours, theirs, rtol=1e-4):
    """Relative to the tensor's own size, because entries near zero are rounding."""
    theirs = torch.as_tensor(theirs)
    torch.testing.assert_close(ours.detach(), theirs.to(ours.dtype), rtol=rtol, atol=rtol * theirs.abs().max().item())


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_what_nanomoe_does(name, mode):
    recorded = load(name)
    layer = MOELayer(GPTConfig(n_head=1, router_use_full_prec=True, **recorded["config"]))
    layer.load_state_dict(weights(recorded, "weight."))
    layer.train(mode == "train")
    x = recorded["input"].requires_grad_()
    y, trace = layer(x, None, return_trace=True)
    routing = trace.routing
    ((y * recorded["output_cotangent"]).sum() + routing.aux_loss + routing.router_z_loss).backward()

    gradients = {key: p.grad for key, p in layer.named_parameters()}
    assert gradients.keys() == weights(recorded, f"{mode}_grad.").keys()
    found = {"output": y, "aux_loss": routing.aux_loss, "router_z_loss": routing.router_z_loss, "grad_input": x.grad}
    for name, value in (found | {f"grad.{key}": gradient for key, gradient in gradients.items()}).items():
        close(value, recorded[f"{mode}_{name}"])
    assert layer.capacity(x.shape[0] * x.shape[1]) == recorded[f"{mode}_capacity"]
    kept = routing.tokens_per_expert if trace.kept_per_expert is None else trace.kept_per_expert
    assert kept.tolist() == recorded[f"{mode}_used_capacity"].tolist()
    assert routing.tokens_per_expert.sum() - kept.sum() == recorded[f"{mode}_tokens_dropped"]


def build(config, state):
    model = GPT(GPTConfig(**config))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.startswith("router_state.") for key in missing)
    return model


def check_training(model, optimizer, recorded, grad_clip=1.0):
    """Train as nanoMoE's loop does. Compares loss with auxiliaries and gradient norm per step, and the last weights."""
    rows = []
    for idx, targets in zip(recorded["idx"], recorded["targets"]):
        _, loss = model(idx, targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        rows.append((loss.item(), norm.item()))
    close(torch.tensor(rows, dtype=torch.float64), recorded["loss_and_grad_norm"])
    ours, width = model.state_dict(), model.config.n_embd
    for key, value in weights(recorded, "final.").items():
        keep = torch.ones(len(value), dtype=torch.bool)
        if key.endswith("c_attn.bias"):
            # softmax cancels the biases of keys: their gradient is rounding, which AdamW divides by its own size
            keep[width : 2 * width] = False
        close(ours[key][keep], value[keep])


@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_follow_nanomoe(name):
    recorded = load(name)
    initial = weights(recorded, "initial.")
    initial["transformer.wte.weight"] = initial["lm_head.weight"]
    model = build(recorded["config"], initial)
    idx, targets = recorded["idx"][0], recorded["targets"][0]
    close(model(idx, targets)[0], recorded["step0_logits"])
    o = recorded["optimizer"]
    optimizer = model.configure_optimizers(o["weight_decay"], o["learning_rate"], tuple(o["betas"]), "cpu")
    check_training(model, optimizer, recorded, o["grad_clip"])

    _, loss, trace = model.eval()(idx, targets, return_trace=True)
    # nanoMoE's evaluation loss includes the auxiliaries
    c = model.config
    theirs = loss + c.aux_loss_weight * trace.aux_loss + c.router_z_loss_weight * trace.router_z_loss
    close(theirs, recorded["final_eval_loss"])
    close(model(idx)[0], recorded["final_last_logits"])


def test_a_checkpoint_of_nanomoe_continues_with_its_optimizer():
    checkpoint = torch.load(GOLDEN / "nanomoe_ckpt.pt", weights_only=True)
    model = build(checkpoint["model_args"], checkpoint["model"])
    assert [key for key in model.state_dict() if not key.startswith("router_state.")] == list(checkpoint["model"])
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    optimizer.load_state_dict(checkpoint["optimizer"])
    check_training(model, optimizer, load("nanomoe_ckpt_continued"))
