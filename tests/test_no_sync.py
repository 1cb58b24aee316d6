"""No host sync in a training step, shown without a GPU: fake tensors have no values, so reading one raises."""

from functools import partial

import pytest
import torch
from common import chrono
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode

import model as model_module
from chronomoe import ChronoLoop
from cross_entropy import linear_cross_entropy
from model import GPT, GPTConfig, MLPExperts
from trainer.guard import NonFiniteGuard


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


def run_step(plant=lambda trace: None, trace="state", **chrono_changes):
    """Two steps of two micro-batches as train.py takes them, under FakeTensorMode: forward to optimizer and loop."""
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
        guard = NonFiniteGuard(model)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
        idx, targets = torch.randint(64, (2, 16)), torch.randint(64, (2, 16))
        for _ in range(2):
            with NoHostCopy():
                total = None
                for _ in range(2):
                    _, loss, seen = model(idx, targets, return_trace=trace, return_logits=False)
                    loss.backward()
                    total = seen if total is None else total + seen
                plant(total)
                norms = guard.norms()
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, torch.linalg.vector_norm(norms))
                optimizer.found_inf = found_inf = guard.check(total, norms, 1)
            optimizer.step()
            optimizer.zero_grad()
            with NoHostCopy():
                loop.step(total, found_inf)


SETTINGS = [
    {},
    {"bridge_scope": "token", "bridge_signal": "overlap"},
    {"signal": "load", "gates": "clean"},
    {"signal": "shuffled", "center": True, "reference": "leave_one_out", "ema_debias": False},
]


@pytest.mark.parametrize("trace", ["state", True])
@pytest.mark.parametrize("changes", SETTINGS)
def test_a_training_step_never_waits_for_the_device(changes, trace, monkeypatch):
    monkeypatch.setattr(model_module, "linear_cross_entropy", partial(linear_cross_entropy, largest=64 * 10))
    run_step(trace=trace, **changes)


@pytest.mark.parametrize(
    "plant",
    [
        lambda t: t.js[0].item(),
        lambda t: t.chosen.tolist(),
        lambda t: bool(t.js[0] > 0),
        lambda t: t.chosen.nonzero(),
        lambda t: torch.bincount(t.chosen.flatten().long()),
        lambda t: t.chosen[t.chosen > 0],
        lambda t: t.chosen.cpu(),
        lambda t: torch.tensor([1.0]),
        lambda t: t.chosen.__setitem__(t.chosen > 0, 1.0),
    ],
)
def test_a_planted_sync_is_caught(plant):
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException, HostCopy)):
        run_step(plant, trace=True)
