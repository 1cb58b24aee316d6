"""A training step never synchronizes, shown without a GPU: fake tensors have no values, so reading one raises."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode

import model as model_module
from ops.cross_entropy import linear_cross_entropy
from tests.helpers.models import adamw, build, chrono, training_step


class HostCopy(Exception):
    pass


class NoHostCopy(TorchFunctionMode):
    """Raises where FakeTensorMode does not but a GPU would wait: copies to and from the host, masked assignment."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        # torch's own clipping moves a tensor to the device of the gradients, a torch.device
        to_cpu = name == "to" and any(x == "cpu" for x in (*args[1:], *kwargs.values()) if isinstance(x, str))
        masks = name == "__setitem__" and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool
        if to_cpu or masks or name in ("cpu", "numpy", "tensor", "as_tensor", "__repr__", "__format__"):
            raise HostCopy(name)
        return func(*args, **kwargs)


def take_steps(logged=True, place="loop", plant=lambda x: None, **changes):
    """Two TrainingSteps of two micro-batches under FakeTensorMode. Calls plant at that place with tokens_per_expert."""
    with FakeTensorMode():
        model, loop = build(chrono(**changes), dropout=0.1, bias=True, use_noisy_top_k=True)
        for block in model.config.moe_blocks:
            model.transformer.h[block].mlp.experts.use_grouped_mm = True
        optimizer = adamw(model)
        # torch's optimizer counts its steps in CPU tensors, and copies nothing from the device
        optimizer.step = partial(without_function_mode, optimizer.step)
        step = training_step(model, loop, optimizer, micro_batches=2)
        owner, name = {"forward": (step, "forward"), "guard": (step.guard, "check"), "loop": (loop, "step")}[place]
        work = getattr(owner, name)

        def planted(*args, **options):
            out = work(*args, **options)
            trace = out[2] if place == "forward" else args[0]
            plant(trace.tokens_per_expert)
            return out

        setattr(owner, name, planted)
        batch = torch.randint(64, (2, 16)), torch.randint(64, (2, 16))
        for number in (1, 2):
            with NoHostCopy():
                step([batch, batch], number, lr=1e-3, logged=logged)


def without_function_mode(work):
    with torch._C.DisableTorchFunction():
        return work()


SETTINGS = [
    dict(),
    dict(bridge_scope="token", bridge_signal="overlap"),
    dict(signal="load", gates="clean"),
    dict(signal="shuffled", center=True, reference="leave_one_out", ema_debias=False),
    dict(signal="first_order", ramp="0@0 1@5 0@9"),
    dict(signal="reap", center=True),
    dict(signal="walk"),
    dict(signal="frozen", spread=0.1),
    dict(signal="leave_one_out"),
    dict(signal="worth"),
]


@pytest.mark.parametrize("logged", [False, True])
@pytest.mark.parametrize("changes", SETTINGS)
def test_a_training_step_does_not_synchronize(changes, logged, monkeypatch):
    monkeypatch.setattr(model_module, "linear_cross_entropy", partial(linear_cross_entropy, max_logits=64 * 10))
    take_steps(logged, **changes)


PLANTS = [
    lambda x: x[0, 0].item(),
    lambda x: x.nonzero(),
    lambda x: torch.bincount(x.flatten().long()),
    lambda x: x[x > 0],
    lambda x: x.cpu(),
    lambda x: x.to("cpu"),
    lambda x: torch.tensor([1.0]),
    lambda x: x.__setitem__(x > 0, 1.0),
]


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("place", ["forward", "guard", "loop"])
def test_a_planted_synchronization_is_caught(place, plant):
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException, HostCopy)):
        take_steps(place=place, plant=plant)
