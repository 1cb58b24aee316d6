"""Tokens to experts and back: against a loop over tokens, in order, in capacity and bit for bit."""

import pytest
import torch

from benchmark.one_hot import one_hot_moe
from model import GPTConfig, MOELayer
from ops.dispatch import from_experts, kept_gates, plan_dispatch, to_experts
from tests.helpers import reference


def layer(dtype=torch.float64, **changes):
    torch.manual_seed(1)
    args = dict(n_embd=16, n_head=1, n_exp=5, top_k=2, bias=True) | changes
    moe = MOELayer(GPTConfig(**args))
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(std=0.3)
    return moe.to(dtype)


@pytest.mark.parametrize("capacity", [None, 0.6])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_output_and_gradients_agree_with_a_loop_over_tokens(top_k, capacity):
    moe = layer(top_k=top_k, train_capacity=capacity, min_capacity=1)
    x = torch.randn(3, 9, 16, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(x)
    y, _ = moe(x, None, False)
    (y * cotangent).sum().backward()
    ours = [x.grad] + [p.grad for p in moe.parameters()]

    other = layer(top_k=top_k, train_capacity=capacity, min_capacity=1)
    x2 = x.detach().clone().requires_grad_()
    rows = x2.view(-1, 16)
    routing = other.router(rows)
    weights = dict(other.experts.named_parameters())
    out, _, kept = reference.moe_layer(rows, routing.experts, routing.gates, weights, other.capacity(27))
    (out.view_as(x) * cotangent).sum().backward()
    assert kept.all() == (capacity is None)
    torch.testing.assert_close(y.view_as(out), out)
    for a, b in zip(ours, [x2.grad] + [p.grad for p in other.parameters()]):
        torch.testing.assert_close(a, b)


def test_gather_backward_is_right():
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    plan = plan_dispatch(torch.tensor([[0, 1], [2, 0], [1, 2], [2, 1], [0, 2], [1, 0]]), 4)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, g: from_experts(to_experts(x, plan) ** 2, g, plan), (x, gates))


@pytest.mark.parametrize("trained", [["c_fc"], ["fc_bias"], ["c_fc", "c_proj", "fc_bias", "proj_bias"]])
def test_second_derivatives_of_the_loop_over_experts_are_refused(trained):
    """Its backward takes the hidden rows as constants, so they would be wrong."""
    experts = layer().experts
    for name, p in experts.named_parameters():
        p.requires_grad_(name in trained)
    plan = plan_dispatch(torch.randint(5, (9, 2)), 5)
    y = experts(torch.randn(18, 16, dtype=torch.float64), plan, None)[0]
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(y.sum(), getattr(experts, trained[0]), create_graph=True)


def test_capacity_follows_the_top_k_that_the_router_uses():
    """comparison/probe.py evaluates at other top_k: a capacity of the configured one would drop most slots."""
    moe = layer(torch.float32, n_exp=8, eval_capacity=1.25, min_capacity=1).eval()
    x = torch.randn(2, 32, 16)
    for top_k, slots in ((1, 10), (2, 20), (8, 80)):
        moe.router.top_k = top_k
        assert moe.capacity(64) == slots
        routing, kept, _ = moe(x, None, False)[1]
        assert routing.tokens_per_expert.sum() == 64 * top_k
    assert torch.equal(kept, routing.tokens_per_expert)  # every expert gets each of the 64 tokens, and has room for 80


def test_slots_are_sorted_by_expert_first_choices_first():
    experts = torch.randint(7, (40, 3))
    plan = plan_dispatch(experts, 7, capacity=5)
    slots = [(int(experts[n, k]), k * 40 + n) for k in range(3) for n in range(40)]
    assert plan.order.tolist() == [slot for _, slot in sorted(slots)]
    assert plan.inverse[plan.order].tolist() == list(range(120))
    counts = [sum(e == expert for e, _ in slots) for expert in range(7)]
    assert plan.ends.tolist() == torch.tensor(counts).cumsum(0).tolist()
    gates = torch.rand(40, 3) + 1
    kept = kept_gates(gates, plan) > 0
    used = [0] * 7
    for k in range(3):
        for n in range(40):
            e = int(experts[n, k])
            assert kept[n, k] == (used[e] < 5)
            used[e] += 1


def test_experts_without_tokens_get_no_gradient_and_change_nothing():
    moe = layer(torch.float32, n_exp=5)
    plan = plan_dispatch(torch.tensor([[1, 3]] * 6), 5)
    x = torch.randn(6, 16)
    rows, sums = moe.experts(to_experts(x, plan), plan, torch.ones(2, 12))
    assert rows.shape == (12, 16)
    rows.sum().backward()
    empty = [0, 2, 4]
    assert (moe.experts.c_fc.grad[empty] == 0).all() and (moe.experts.c_fc.grad[[1, 3]] != 0).any()
    assert (sums[:, empty] == 0).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("capacity", [None, 0.6])
def test_grouped_path_agrees_with_the_loop_within_bfloat16(bias, capacity):
    results = []
    weights = torch.rand(2, 128)
    for grouped in (False, True):
        moe = layer(torch.float32, n_embd=32, bias=bias, train_capacity=capacity, min_capacity=1)
        moe.experts.use_grouped_mm = grouped
        x = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
        plan = plan_dispatch(torch.randint(5, (64, 2), generator=torch.Generator().manual_seed(4)), 5, moe.capacity(64))
        gates = kept_gates(torch.rand(64, 2, generator=torch.Generator().manual_seed(5)), plan)
        rows, sums = moe.experts(to_experts(x.flatten(0, 1), plan), plan, weights)
        y = from_experts(rows, gates, plan)
        y.float().square().sum().backward()
        results.append([y.float(), sums.float(), x.grad] + [p.grad for p in moe.experts.parameters()])
    for a, b in zip(*results):
        assert (a - b).norm() < 0.02 * a.norm()


def test_forward_and_backward_repeat_bit_for_bit():
    grads = []
    for _ in range(2):
        moe = layer(torch.float32, n_embd=64)
        x = torch.randn(8, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y, _ = moe(x, None, False)
        y.square().sum().backward()
        grads.append([y, x.grad] + [p.grad for p in moe.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_memory_of_a_forward_does_not_grow_with_experts_times_tokens():
    """No [N, E, capacity] or [N, E, D] tensor: the largest tensor autograd sees is the experts' hidden layer."""
    moe = layer(torch.float32, n_exp=16, n_embd=32)
    sizes = []

    class Largest(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t))
            return out

    N = 512
    with Largest():
        moe(torch.randn(1, N, 32), None, True)
    assert max(sizes) <= max(2 * N * 32, 2 * N * 4 * 32, moe.experts.c_fc.numel())


@pytest.mark.parametrize("factor", [None, 0.8])
def test_one_hot_dispatch_of_the_benchmark_computes_the_same(factor):
    moe = layer(torch.float32, bias=False, train_capacity=factor)
    x = torch.randn(30, 16)
    routing = moe.router(x)
    experts = moe.experts
    slots = moe.capacity(30) or 30
    theirs = one_hot_moe(x, routing.experts, routing.gates, experts.c_fc, experts.c_proj, slots)
    torch.testing.assert_close(moe(x.unsqueeze(0), None, False)[0][0], theirs)
