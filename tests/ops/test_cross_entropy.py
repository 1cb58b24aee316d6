"""Cross-entropy of an output layer in chunks, against torch's cross-entropy of all logits."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import model as model_module
from ops.cross_entropy import linear_cross_entropy
from tests.helpers.models import Operators, build, tokens

N, D, V = 50, 16, 70


def inputs(dtype, num_tokens=N):
    x, weight = (torch.randn(n, D, dtype=dtype, requires_grad=True) for n in (num_tokens, V))
    targets = torch.randint(V, (num_tokens,))
    targets[[3, 49]] = -1
    return x, weight, targets


def of_all_logits(x, weight, targets):
    return F.cross_entropy(x @ weight.t(), targets, ignore_index=-1)


@pytest.mark.parametrize("tokens_at_a_time", [1, 7, 25, 49])
def test_loss_and_gradients_are_those_of_all_logits(tokens_at_a_time):
    x, weight, targets = inputs(torch.float64)
    results = []
    for loss_of in (of_all_logits, partial(linear_cross_entropy, max_logits=V * tokens_at_a_time + 1)):
        loss = loss_of(x, weight, targets)
        results.append((loss, *torch.autograd.grad(3 * loss, (x, weight))))
        with torch.no_grad():
            assert torch.equal(loss_of(x, weight, targets), loss)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_bfloat16_sums_its_chunks_in_float32():
    x, weight, targets = inputs(torch.float32, num_tokens=500)
    (exact,) = torch.autograd.grad(of_all_logits(x, weight, targets), weight)
    errors = []
    for max_logits in (V * 500, V):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = linear_cross_entropy(x, weight, targets, max_logits)
        (gradient,) = torch.autograd.grad(loss, weight)
        assert loss.dtype == gradient.dtype == torch.float32
        errors.append(((gradient - exact).norm() / exact.norm()).item())
    assert 1e-4 < errors[0] < 2e-2 and errors[1] < 1.5 * errors[0]


def test_the_loss_is_not_finite_if_a_logit_is_not_and_nan_if_no_target_counts():
    x, weight, targets = inputs(torch.float32)
    with torch.no_grad():
        x[10] = torch.inf
    assert not linear_cross_entropy(x, weight, targets, max_logits=V * 8).isfinite()
    assert linear_cross_entropy(x[:4], weight, torch.full((4,), -1), max_logits=V).isnan()


@pytest.mark.parametrize("wrong", [-100, -2, V, V + 30])
@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("max_logits", [V * N, V * 8])
def test_a_target_outside_the_vocabulary_raises(max_logits, with_grad, wrong):
    x, weight, targets = inputs(torch.float32)
    targets[20] = wrong
    with torch.set_grad_enabled(with_grad), pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(x, weight, targets, max_logits)


def test_second_derivatives_are_refused():
    x, weight, targets = inputs(torch.float64)
    for outer in (lambda loss: loss, lambda loss: 3 * loss**2):  # the incoming gradient is a constant, or is not
        loss = outer(linear_cross_entropy(x, weight, targets, max_logits=V * 8))
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(loss + (x**3).sum(), x, create_graph=True)


def test_a_step_of_the_model_has_the_same_gradients_without_all_logits_in_memory(monkeypatch):
    vocabulary, allowed = 4096, 4096 * 12
    results = []
    for max_logits in (1 << 30, allowed):
        monkeypatch.setattr(model_module, "linear_cross_entropy", partial(linear_cross_entropy, max_logits=max_logits))
        model, _ = build(vocab_size=vocabulary)
        idx, targets = tokens(0)
        with Operators() as operators:
            logits, loss = model(idx, targets, return_logits=False)
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
        bounded = operators.largest <= max(allowed, model.lm_head.weight.numel())
        assert logits is None and bounded == (max_logits == allowed)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model(idx, targets)[1], loss)
