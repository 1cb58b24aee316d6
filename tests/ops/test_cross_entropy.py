"""The output layer's loss in chunks, against torch's cross-entropy of whole logits."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
from ops.cross_entropy import linear_cross_entropy
from tests.helpers.models import build, tokens

N, D, V = 50, 16, 70


def inputs(dtype):
    x = torch.randn(N, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (N,))
    targets[[3, 49]] = -1
    return x, weight, targets


def whole(x, weight, targets):
    return F.cross_entropy(x @ weight.t(), targets, ignore_index=-1)


@pytest.mark.parametrize("tokens_at_a_time", [1, 7, 25, 49])
def test_chunks_agree_with_whole_logits(tokens_at_a_time):
    x, weight, targets = inputs(torch.float64)
    (3 * whole(x, weight, targets)).backward()
    expected = x.grad, weight.grad
    x.grad = weight.grad = None
    loss = linear_cross_entropy(x, weight, targets, largest=V * tokens_at_a_time + 1)
    (3 * loss).backward()
    torch.testing.assert_close(loss, whole(x, weight, targets), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((x.grad, weight.grad), expected, rtol=1e-12, atol=1e-12)


def test_without_gradients_only_the_loss_is_computed():
    x, weight, targets = inputs(torch.float64)
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, targets, largest=V * 8)
    torch.testing.assert_close(loss, whole(x, weight, targets).detach())


def test_bfloat16_sums_its_chunks_in_float32():
    x, weight, targets = inputs(torch.float32)
    whole(x, weight, targets).backward()
    exact = weight.grad
    errors = []
    for largest in (V * N, V):
        weight.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = linear_cross_entropy(x, weight, targets, largest)
        loss.backward()
        assert loss.dtype == torch.float32 and weight.grad.dtype == torch.float32
        errors.append(((weight.grad - exact).norm() / exact.norm()).item())
    assert 1e-4 < errors[0] < 2e-2 and errors[1] < 1.5 * errors[0]


def test_logits_that_are_not_finite_give_a_loss_that_is_not_finite():
    x, weight, targets = inputs(torch.float32)
    with torch.no_grad():
        x[10] = torch.inf
    assert not linear_cross_entropy(x, weight, targets, largest=V * 8).isfinite()
    assert linear_cross_entropy(x[:4], weight, torch.full((4,), -1), largest=V).isnan()


@pytest.mark.parametrize("wrong", [-100, -2, V, V + 30])
@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("largest", [V * N, V * 8])
def test_a_target_that_is_no_class_raises_in_chunks_as_with_whole_logits(largest, with_grad, wrong):
    x, weight, targets = inputs(torch.float32)
    targets[20] = wrong
    with torch.set_grad_enabled(with_grad), pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(x, weight, targets, largest)


def test_second_derivatives_are_refused_not_wrong():
    x, weight, targets = inputs(torch.float64)
    for loss_of in (lambda loss: loss, lambda loss: 3 * loss**2):  # the incoming gradient is a constant, or is not
        loss = loss_of(linear_cross_entropy(x, weight, targets, largest=V * 8))
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(loss + (x**3).sum(), x, create_graph=True)


class Sizes(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_a_step_of_the_model_holds_no_more_logits_than_allowed(monkeypatch):
    """And its loss and gradients are those of whole logits."""
    vocabulary, allowed = 4096, 4096 * 12
    results = []
    for at_most in (1 << 30, allowed):
        monkeypatch.setattr(model_module, "linear_cross_entropy", partial(linear_cross_entropy, largest=at_most))
        model, _ = build(vocab_size=vocabulary)
        idx, targets = tokens(0)
        with Sizes() as sizes:
            logits, loss, trace = model(idx, targets, return_trace=True, return_logits=False)
            loss.backward()
        assert logits is None and trace.cross_entropy.isfinite()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
        of_logits, of_weights = idx.numel() * vocabulary, model.lm_head.weight.numel()
        assert sizes.largest == of_logits if at_most > of_logits else sizes.largest <= max(allowed, of_weights)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    assert torch.equal(model(idx, targets)[1], model(idx, targets, return_logits=True)[1])
