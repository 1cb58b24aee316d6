"""Random streams of a run: different for each purpose, rank and seed, and different from the initial weights."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from chronomoe.beta import derangement
from model import GPT, GPTConfig
from tests.helpers import models
from tests.helpers.runs import ALL_ON, checkpoint
from trainer.checkpointer import Checkpointer
from trainer.progress import Progress
from trainer.settings import from_values
from trainer.setup import build
from trainer.streams import DROPOUT_AND_NOISE, PERMUTATION, stream_seed

SEEDS = [*range(20), 1337, 1338, 2**32, 2**62]


def test_streams_of_every_seed_purpose_and_rank_are_different():
    ranks = [(rank,) for rank in range(16)]
    steps = [(rank, step) for rank in range(1, 4) for step in (0, 1, 250, 1_000_003)]
    streams = [(PERMUTATION,), *((DROPOUT_AND_NOISE, *indices) for indices in ranks + steps)]
    found = [stream_seed(seed, *stream) for seed, stream in itertools.product(SEEDS, streams)]
    assert all(0 <= seed < 2**63 for seed in found)
    used = [seed % 2**32 for seed in found + SEEDS[:-2]]  # by torch's CPU generator; initial weights use the run's seed
    assert len(set(used)) == len(used)
    assert stream_seed(1337, DROPOUT_AND_NOISE, 0) == 575017620961677467  # the same in every version


def test_a_rank_that_joins_on_resume_begins_a_stream_of_its_own(tmp_path):
    seeds = {stream_seed(5, DROPOUT_AND_NOISE, rank) for rank in range(4)} | set(range(100))
    model, _ = models.build(n_layer=1)
    optimizer, progress = models.adamw(model), Progress()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **progress.state_dict()}
    saved["random"] = [{"cpu": torch.get_rng_state()}]
    for seed, rank, step in itertools.product((5, 6), (1, 2), (10, 11)):
        world = SimpleNamespace(rank=rank, world_size=3)
        checkpointer = Checkpointer(tmp_path, model, optimizer, {}, progress, torch.device("cpu"), world, seed)
        (note,) = checkpointer.restore(saved | {"iter_num": step})
        assert "3 ranks, before 1" in note
        assert torch.initial_seed() not in seeds
        seeds.add(torch.initial_seed())


def test_the_permutation_is_drawn_from_its_stream_and_the_initial_weights_from_the_seed():
    keys = dict(n_layer=4, n_head=2, n_embd=16, n_exp=8, block_size=16, seed=5, chrono_signal="shuffled")
    s = from_values(keys | ALL_ON)
    model, _, loop = build(s, 61, torch.device("cpu"))
    assert torch.equal(loop.follows, derangement(2, 8, stream_seed(5, PERMUTATION)))
    other = GPT(GPTConfig(**s.model_args(61)), torch.Generator().manual_seed(5))
    models.assert_same(dict(model.named_parameters()), dict(other.named_parameters()))


@pytest.mark.parametrize("is_saved", [True, False])  # an older version did not save the permutation
def test_noise_has_a_stream_and_a_resumed_shuffled_run_keeps_its_permutation(is_saved, start, out):
    settings = ALL_ON | dict(seed=5, chrono_signal="shuffled")
    assert start(out, **settings, max_iters=2) == 0
    assert torch.initial_seed() == stream_seed(5, DROPOUT_AND_NOISE, 0)
    saved = checkpoint(out)
    follows = saved["chrono"].pop("shuffled")["follows"]
    expected = derangement(*follows.shape, 99 if is_saved else 5)
    saved["chrono"] |= {"shuffled": {"follows": expected}} if is_saved else {}
    torch.save(saved, out / "ckpt.pt")
    assert start(out, **settings, init_from="resume") == 0
    assert torch.equal(checkpoint(out)["chrono"]["shuffled"]["follows"], expected)
