"""One truth on all ranks: two gloo processes hold bit-identical state, equal to one process's up to rounding."""

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.models import adamw, build, chrono, draw_beta, loop_state, tokens, train_step

STEPS = 5
CONFIG = dict(eta=0.1, k_max=2.0, bridge_threshold=2e-4, prune_phi=0.9, prune_min_tokens=10, prune_min_updates=1)


def micro_batch(step, index):
    return tokens(100 * step + index, batch=4)


def start():
    model, loop = build(chrono(**CONFIG))
    draw_beta(model, size=0.5)
    return model, loop


def train_alone():
    model, loop = start()
    optimizer = adamw(model)
    for step in range(STEPS):
        train_step(model, loop, optimizer, [micro_batch(step, 0), micro_batch(step, 1)])
    return loop_state(loop) | {name: p.detach().clone() for name, p in model.named_parameters()}


def train_rank(rank, folder, disturb):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, loop = start()
    if disturb and rank == 1:
        model.router_state.beta_coeff[0, 0] += 1e-6
    # otherwise DDP copies rank 0's beta over the others', and hides what this test looks for
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = adamw(model)
    for step in range(STEPS):
        train_step(model, loop, optimizer, [micro_batch(step, rank)], wrapped)
    state = loop_state(loop) | {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.save(state, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def run_ranks(folder, disturb=False):
    mp.spawn(train_rank, args=(str(folder), disturb), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_ranks_agree_bit_for_bit_and_with_one_process(tmp_path):
    first, second = run_ranks(tmp_path)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert first["lifecycle.open"].any() and first["router.relevance"].min() < 1
    for name, value in train_alone().items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_a_beta_that_differs_on_one_rank_is_seen(tmp_path):
    first, second = run_ranks(tmp_path, disturb=True)
    assert not torch.equal(first["router.beta_coeff"], second["router.beta_coeff"])


@pytest.mark.parametrize("bridge", [True, False])
def test_what_is_added_up_over_ranks_for_state_is_the_same_tensor_whether_or_not_the_step_logs(bridge, monkeypatch):
    """With three ranks or more a sum's last bits depend on its place in the tensor."""
    model, _ = build(chrono(**CONFIG, bridge=bridge))
    reduced = {True: [], False: []}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for logged, tensors in reduced.items():
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, tensors=tensors: tensors.append(x.clone()))
        trace = model(*micro_batch(1, 0), return_trace=True, logged=logged)[2]
        summed = trace.summed_over_ranks()
        for name, value in trace.present().items():
            assert torch.equal(getattr(summed, name), value), name
    assert len(reduced[False]) == 1 and len(reduced[True]) == 2
    assert torch.equal(reduced[False][0], reduced[True][0])
