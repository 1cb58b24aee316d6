"""Dispatch, experts and combine, against a loop over tokens."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmark.one_hot import one_hot_moe
from chronomoe import RouterBias
from ops.dispatch import from_experts, kept_gates, plan_dispatch, to_experts
from ops.experts import MLPExperts
from tests.helpers import reference
from tests.helpers.models import Operators, chrono, moe_layer


@pytest.mark.parametrize("capacity", [None, 0.6])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_outputs_gradients_and_sums_agree_with_a_loop_over_tokens(top_k, capacity):
    moe = moe_layer(top_k=top_k, train_capacity=capacity, chrono=chrono())
    bias = RouterBias(torch.tensor([0.0, 0, 0, 0, -100]), torch.ones(()))  # the last expert gets no token
    x = torch.randn(3, 9, 16, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(x)
    y, trace = moe(x, bias, return_trace=True)
    inputs = [x, *moe.parameters()]
    gradients = torch.autograd.grad((y * cotangent).sum(), inputs)

    rows = x.view(-1, 16)
    routing = moe.router(rows, bias)
    weights = dict(moe.experts.named_parameters())
    out, of_choice, kept = reference.moe_layer(rows, routing.experts, routing.gates, weights, moe.capacity(27))
    assert kept.all() == (capacity is None)
    torch.testing.assert_close(y.view_as(out), out)
    expected = torch.autograd.grad((out.view_as(x) * cotangent).sum(), inputs, allow_unused=True)
    for ours, theirs in zip(gradients, expected):
        torch.testing.assert_close(ours, theirs)
    assert not gradients[-1][4].any()
    for e in range(5):
        of_expert = (kept & (routing.experts == e)).unsqueeze(-1) * of_choice
        sums = torch.stack([of_expert.sum((0, 1)), (routing.gates.unsqueeze(-1) * of_expert).sum((0, 1))])
        torch.testing.assert_close(trace.outputs[:, e], sums)
    counts = [(kept & (routing.experts == e)).sum().item() for e in range(5)]
    assert capacity is None or trace.kept_per_expert.tolist() == counts


def test_first_and_second_derivatives_of_dispatch_and_combine_are_right():
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    plan = plan_dispatch(torch.tensor([[0, 1], [2, 0], [1, 2], [2, 1], [0, 2], [1, 0]]), 4)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, g: from_experts(to_experts(x, plan) ** 2, g, plan), (x, gates))


def test_the_gradient_of_tokens_in_bfloat16_is_summed_over_choices_in_float32():
    plan = plan_dispatch(torch.tensor([[0, 1, 2]]), 3)
    x = torch.ones(1, 2, requires_grad=True)
    rows = to_experts(x, plan, torch.bfloat16)
    assert rows.dtype == torch.bfloat16
    rows.backward(torch.tensor([[256.0, 1], [1, 1], [1.5, 1]]).bfloat16())
    assert torch.equal(x.grad, torch.tensor([[258.5, 3]]))  # 258.5 is not a bfloat16 number


def test_there_can_be_more_experts_than_an_int16_holds():
    plan = plan_dispatch(torch.tensor([[40_000], [7], [39_999], [32_768]]), 40_001)
    assert plan.experts.tolist() == [7, 32_768, 39_999, 40_000]
    assert plan.tokens.tolist() == [1, 3, 2, 0]
    assert plan.offsets[[6, 7, 39_998, 39_999, 40_000]].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("trained", [["c_fc"], ["fc_bias"], ["c_fc", "c_proj", "fc_bias", "proj_bias"]])
def test_second_derivatives_of_the_loop_over_experts_are_refused(trained):
    """Its backward uses saved hidden rows as constants, so they would be wrong."""
    experts = moe_layer().experts
    for name, p in experts.named_parameters():
        p.requires_grad_(name in trained)
    plan = plan_dispatch(torch.randint(5, (9, 2)), 5)
    y = experts(torch.randn(18, 16, dtype=torch.float64), plan, None)[0]
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(y.sum(), getattr(experts, trained[0]), create_graph=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("capacity", [None, 0.6])
def test_grouped_mm_agrees_with_the_loop_over_experts_within_bfloat16(capacity, bias):
    moe = moe_layer(torch.float32, n_embd=32, bias=bias, train_capacity=capacity)
    x, weights = torch.randn(64, 32, requires_grad=True), torch.rand(2, 128)
    plan = plan_dispatch(torch.randint(5, (64, 2)), 5, moe.capacity(64))
    gates = kept_gates(torch.rand(64, 2), plan)
    results = []
    for grouped in (False, True):
        moe.experts.use_grouped_mm = grouped
        rows, sums = moe.experts(to_experts(x, plan), plan, weights)
        y = from_experts(rows, gates, plan).float()
        results.append([y, sums.float(), *torch.autograd.grad(y.square().sum(), [x, *moe.experts.parameters()])])
    for a, b in zip(*results):
        assert (a - b).norm() < 0.02 * a.norm()


def test_memory_of_a_layer_does_not_grow_with_experts_times_tokens():
    """There is no [N, E, capacity] or [N, E, D] tensor: the largest is the experts' hidden layer or their weights."""
    moe = moe_layer(torch.float32, n_exp=16, n_embd=32, chrono=chrono())
    N = 512
    with Operators() as operators:
        moe(torch.randn(1, N, 32), None, return_trace=True)[0].sum().backward()
    assert operators.largest <= max(2 * N * 4 * 32, moe.experts.c_fc.numel())


@pytest.mark.parametrize("factor", [None, 0.8])
def test_the_benchmarks_one_hot_dispatch_computes_the_same(factor):
    moe = moe_layer(torch.float32, bias=False, train_capacity=factor)
    x = torch.randn(30, 16)
    routing, experts = moe.router(x), moe.experts
    theirs = one_hot_moe(x, routing.experts, routing.gates, experts.c_fc, experts.c_proj, moe.capacity(30) or 30)
    torch.testing.assert_close(moe(x.unsqueeze(0), None, False)[0][0], theirs)


@pytest.mark.parametrize(
    ("capability", "width", "dtype", "expected"),
    [
        *[((9, 0), 16, torch.bfloat16, True), ((10, 0), 16, torch.bfloat16, True)],
        *[((8, 0), 16, torch.bfloat16, False), ((12, 0), 16, torch.bfloat16, False)],
        *[((9, 0), 12, torch.bfloat16, False), ((9, 0), 16, torch.float16, False)],
    ],
)
def test_grouped_mm_is_chosen_where_it_does_not_synchronize(capability, width, dtype, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    experts = MLPExperts(2, width, bias=False, dropout=0.0)
    with FakeTensorMode():
        rows = torch.empty(4, width, dtype=dtype, device="cuda")
    assert experts.uses_grouped_mm(rows) == expected
