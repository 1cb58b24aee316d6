"""Random streams of a run: different for each purpose, rank and seed, and none repeats the initial weights."""

import itertools
from types import SimpleNamespace

import pytest
import torch

import train
from chronomoe.beta import derangement
from model import GPT, GPTConfig
from tests.helpers.runs import ALL_ON, TINY, write_dataset
from trainer import resume
from trainer.settings import from_values
from trainer.streams import DROPOUT_AND_NOISE, PERMUTATION, stream_seed

SEEDS = [*range(20), 1337, 1338, 2**32, 2**62]


def test_streams_of_every_seed_purpose_and_rank_are_different():
    ranks = [(rank,) for rank in range(16)]
    steps = [(rank, step) for rank in range(1, 4) for step in (0, 1, 250, 1_000_003)]
    places = [(PERMUTATION,), *((DROPOUT_AND_NOISE, *place) for place in ranks + steps)]
    found = [stream_seed(seed, *place) for seed, place in itertools.product(SEEDS, places)]
    assert all(0 <= seed < 2**63 for seed in found)
    used = [seed % 2**32 for seed in found + SEEDS[:-2]]  # by torch's generator on a CPU; initial weights take the seed
    assert len(set(used)) == len(used)


def test_a_stream_stays_the_same_in_every_version():
    assert stream_seed(1337, DROPOUT_AND_NOISE, 0) == 575017620961677467


@pytest.fixture
def first_noise(monkeypatch):
    """The router noise drawn first, [N, E]."""
    drawn = []
    randn_like = torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda x: drawn.append(randn_like(x)) or drawn[-1])
    return drawn


def test_router_noise_is_independent_of_the_initial_weights(first_noise, tmp_path):
    settings = TINY | dict(seed=5, max_iters=1, use_noisy_top_k=True, out_dir=tmp_path / "out")
    dataset = write_dataset(tmp_path / "data", 61)
    assert train.main([f"--{key}={value}" for key, value in settings.items()] + [f"--dataset={dataset}"]) == 0
    noise = first_noise[0].flatten()
    for seed in (5, 6):  # one rank's stream must not be that of the next seed either
        drawn = torch.randn(61 * 16, generator=torch.Generator().manual_seed(seed))  # the embeddings, over 0.02
        assert torch.corrcoef(torch.stack([noise, drawn[: len(noise)]]))[0, 1].abs() < 0.3
    assert torch.initial_seed() == stream_seed(5, DROPOUT_AND_NOISE, 0)


def test_a_rank_that_joins_on_resume_begins_a_stream_of_its_own():
    state = {"cpu": torch.get_rng_state()}
    seeds = {stream_seed(5, DROPOUT_AND_NOISE, rank) for rank in range(4)} | set(range(100))
    for seed, rank, step in itertools.product((5, 6), (1, 2), (10, 11)):
        ranks, saved = SimpleNamespace(rank=rank, count=3), {"random": [state], "iter_num": step}
        (note,) = resume.restore_random_state(saved, torch.device("cpu"), ranks, seed)
        assert "3 ranks, before 1" in note
        assert torch.initial_seed() not in seeds
        seeds.add(torch.initial_seed())


def test_the_shuffled_signals_permutation_has_a_stream_and_the_initial_weights_have_the_seed():
    keys = dict(n_layer=4, n_head=2, n_embd=16, n_exp=8, block_size=16, seed=5, chrono_signal="shuffled")
    s = from_values(keys | ALL_ON)
    model, _, loop = train.build(s, SimpleNamespace(vocab_size=61), torch.device("cpu"))
    assert torch.equal(loop.follows, derangement(2, 8, stream_seed(5, PERMUTATION)))
    assert not torch.equal(loop.follows, derangement(2, 8, 5))
    other = GPT(GPTConfig(**s.model_args(61)), torch.Generator().manual_seed(5))
    for name, p in model.named_parameters():
        assert torch.equal(p, other.get_parameter(name)), name


def test_a_resumed_shuffled_run_keeps_its_permutation_also_one_of_an_older_version(tmp_path):
    dataset = write_dataset(tmp_path / "data", 61)
    settings = TINY | ALL_ON | dict(seed=5, max_iters=2, chrono_signal="shuffled", dataset=dataset)
    command = [f"--{key}={value}" for key, value in settings.items()]
    out = tmp_path / "out"
    assert train.main([*command, f"--out_dir={out}"]) == 0
    saved = torch.load(out / "ckpt.pt", weights_only=True)
    follows = saved["chrono"]["shuffled"]["follows"]
    other = derangement(*follows.shape, 99)
    cases = {"kept": ({"shuffled": {"follows": other}}, other), "old": ({}, derangement(*follows.shape, 5))}
    for name, (change, expected) in cases.items():
        chrono = {key: value for key, value in saved["chrono"].items() if key != "shuffled"} | change
        (tmp_path / name).mkdir()
        torch.save(saved | {"chrono": chrono}, tmp_path / name / "ckpt.pt")
        assert train.main([f"--out_dir={tmp_path / name}", "--init_from=resume", "--max_iters=3", "--device=cpu"]) == 0
        resumed = torch.load(tmp_path / name / "ckpt.pt", weights_only=True)
        assert torch.equal(resumed["chrono"]["shuffled"]["follows"], expected)
