"""Two gloo ranks hold bit-identical state, equal to that of one process up to rounding."""

import pytest
import torch
import torch.multiprocessing as mp

from tests.helpers.models import adamw, assert_same, build, chrono, state_of, tokens, training_step
from trainer.distributed import World

CONFIG = dict(eta=0.1, k_max=2.0, bridge_threshold=2e-4, prune_phi=0.9, prune_min_tokens=10, prune_min_updates=1)


def train(world, disturb=False):
    """Five steps of four micro-batches over all ranks. Returns all state, and the losses of the traces."""
    model, loop = build(chrono(**CONFIG), beta=0.5)
    forward, losses = world.wrap_ddp(model, torch.device("cpu")), []
    model.router_state.beta_coeff[0, 0] += 1e-6 * disturb
    options = dict(micro_batches=4 // world.world_size, forward=forward, world=world)
    step = training_step(model, loop, adamw(model), **options)
    for number in range(5):
        batches = [tokens(100 * number + i, batch=4) for i in range(world.rank, 4, world.world_size)]
        losses.append(step(batches, number).trace.cross_entropy)
    return state_of(model, loop) | {"losses": torch.stack(losses)}


def train_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    world = World(rank, 2)
    torch.save([train(world), train(world, disturb=rank == 1)], f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_agree_bit_for_bit_and_with_one_process(tmp_path):
    mp.spawn(train_rank, args=(str(tmp_path),), nprocs=2)
    (first, disturbed), (second, other) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert_same(first, second)
    assert first["lifecycle.open"].any() and first["router.relevance"].min() < 1
    torch.testing.assert_close(first, train(World()), rtol=1e-4, atol=1e-5)
    # a difference between ranks is not hidden by a broadcast of buffers
    assert not torch.equal(disturbed["router.beta_coeff"], other["router.beta_coeff"])


@pytest.mark.parametrize("bridge", [True, False])
def test_the_tensor_that_is_summed_for_the_state_does_not_depend_on_logging(bridge, monkeypatch):
    """With three ranks or more, the last bits of a sum depend on its offset in the tensor."""
    model, _ = build(chrono(**CONFIG, bridge=bridge))
    reduced = {True: [], False: []}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for logged, tensors in reduced.items():
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, tensors=tensors: tensors.append(x.clone()))
        trace = model(*tokens(1), return_trace=True, logged=logged)[2]
        summed = trace.summed_over_ranks()
        assert_same(summed.present(), trace.present())
        assert summed.summed_over_ranks() is summed
    assert len(reduced[False]) == 1 and len(reduced[True]) == 2
    assert torch.equal(reduced[False][0], reduced[True][0])
