"""No host sync in a training step, shown without a GPU: fake tensors have no values, so reading one raises."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode

import model as model_module
from chronomoe import ChronoLoop
from model import GPT, GPTConfig
from ops.cross_entropy import linear_cross_entropy
from ops.experts import MLPExperts
from tests.helpers.models import chrono, training_step


class HostCopy(Exception):
    pass


class NoHostCopy(TorchFunctionMode):
    """What FakeTensorMode lets pass but a GPU would wait for: copies to and from the host, and masked assignment."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("cpu", "numpy", "tensor", "as_tensor", "__repr__", "__format__"):
            raise HostCopy(name)
        if name == "__setitem__" and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool:
            raise HostCopy("masked assignment")
        return func(*args, **kwargs)


def take_steps(logged=False, plant=lambda trace: None, **chrono_changes):
    """Two TrainingSteps of two micro-batches under FakeTensorMode. plant: called with the trace, within the step."""
    with FakeTensorMode():
        config = GPTConfig(
            block_size=16, vocab_size=64, n_layer=4, n_head=2, n_embd=32, n_exp=4, top_k=2, bias=True, dropout=0.1,
            use_aux_loss=True, use_router_z_loss=True, use_noisy_top_k=True, chrono=chrono(**chrono_changes),
        )  # fmt: skip
        model = GPT(config)
        for module in model.modules():
            if isinstance(module, MLPExperts):
                module.use_grouped_mm = True
        loop = ChronoLoop(model.router_state, config.moe_blocks)
        loop_step = loop.step
        loop.step = lambda trace, found_inf: (plant(trace), loop_step(trace, found_inf))
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
        optimizer.step = allowed(optimizer.step)
        step = training_step(model, loop, optimizer, micro_batches=2)
        batch = torch.randint(64, (2, 16)), torch.randint(64, (2, 16))
        for number in (1, 2):
            with NoHostCopy():
                step([batch, batch], number, logged=logged)


def allowed(work):
    """torch's optimizer counts its steps in CPU tensors, and copies nothing from the device."""

    def call(*args, **kwargs):
        with torch._C.DisableTorchFunction():
            return work(*args, **kwargs)

    return call


SETTINGS = [
    {},
    {"bridge_scope": "token", "bridge_signal": "overlap"},
    {"signal": "load", "gates": "clean"},
    {"signal": "shuffled", "center": True, "reference": "leave_one_out", "ema_debias": False},
]


@pytest.mark.parametrize("logged", [False, True])
@pytest.mark.parametrize("changes", SETTINGS)
def test_a_training_step_never_waits_for_the_device(changes, logged, monkeypatch):
    monkeypatch.setattr(model_module, "linear_cross_entropy", partial(linear_cross_entropy, max_logits=64 * 10))
    take_steps(logged, **changes)


@pytest.mark.parametrize(
    "plant",
    [
        lambda t: t.js[0].item(),
        lambda t: t.tokens_per_expert.tolist(),
        lambda t: bool(t.js[0] > 0),
        lambda t: t.tokens_per_expert.nonzero(),
        lambda t: torch.bincount(t.tokens_per_expert.flatten().long()),
        lambda t: t.tokens_per_expert[t.tokens_per_expert > 0],
        lambda t: t.tokens_per_expert.cpu(),
        lambda t: torch.tensor([1.0]),
        lambda t: t.tokens_per_expert.__setitem__(t.tokens_per_expert > 0, 1.0),
    ],
)
def test_a_planted_sync_is_caught(plant):
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException, HostCopy)):
        take_steps(True, plant)
