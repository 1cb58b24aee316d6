"""bench.py: what it compares is comparable, and it says when it cannot tell. Nothing here is timed."""

import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
from benchmark.layer import competitors
from benchmark.rates import make_dense
from benchmark.scaling import FORMULAS, Sizes, count, groups
from benchmark.step import SliceStep
from benchmark.timing import median_interval, rows
from trainer.errors import UserError

CPU = torch.device("cpu")


def times(spread, turns, ratio, seed=0):
    """Two competitors on a machine that slows down threefold meanwhile, with log-normal noise on each time."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.linspace(0, math.log(3), turns)
    first, second = (drift + spread * torch.randn(turns, generator=generator) for _ in range(2))
    return {"first": (10 * first.exp()).tolist(), "second": (10 * ratio * second.exp()).tolist()}


def test_a_drifting_machine_does_not_hide_a_ratio_and_a_noisy_one_is_called_noisy():
    _, second = rows([times(spread=0.01, turns=30, ratio=1.1)])
    assert abs(second.ratio - 1.1) < 0.01 and second.low < second.ratio < second.high and not second.noisy
    _, second = rows([times(spread=0.3, turns=30, ratio=1.1)])
    assert second.noisy
    _, second = rows([times(spread=0.0, turns=5, ratio=1.1)])
    assert second.noisy and second.interval is None  # five turns tell nothing with 95%
    _, second = rows([times(spread=0.01, turns=30, ratio=ratio) for ratio in (1.1, 1.1, 1.4)])
    assert second.noisy and second.turns == 90  # no interval of theirs tells what the next process will find
    assert second.by_process == pytest.approx((1.1, 1.1, 1.4), rel=0.02)


@pytest.mark.parametrize("turns", [6, 7, 15, 60])
def test_the_interval_of_a_median_holds_the_true_one_in_95_of_100_runs(turns):
    generator = torch.Generator().manual_seed(turns)
    samples = torch.randn(4000, turns, generator=generator).exp()  # its median is 1
    inside = sum(low <= 1 <= high for low, high in map(median_interval, samples.tolist()))
    assert inside / len(samples) > 0.94
    assert median_interval([1.0] * 5) is None


@pytest.mark.parametrize("shape", [(512, 128, 8, 2), (256, 64, 16, 4)])
def test_the_dense_mlp_does_the_layers_multiplications(shape):
    N, D, E, K = shape
    work, skew = competitors(*shape, CPU)
    counted = {}
    for name in ("dense MLP", "MoE layer, balanced"):
        with FlopCounterMode(display=False) as counter:
            work[name]()
        counted[name] = counter.get_total_flops()
    router = 3 * 2 * N * D * E
    sums = 2 * 2 * K * N * D  # of outputs and gates, for coherence: counted if it is a product
    assert counted["dense MLP"] == 3 * 2 * K * N * 2 * 4 * D * D
    assert router <= counted["MoE layer, balanced"] - counted["dense MLP"] <= router + sums
    assert skew > 1.5


@pytest.mark.parametrize("sizes", [Sizes(2, 8, 32, 2, 256), Sizes(3, 16, 48, 4, 128), Sizes(1, 32, 16, 3, 64)])
def test_the_formulas_of_the_scaling_document_hold(sizes):
    for name, counted in count(sizes).items():
        assert counted == pytest.approx(FORMULAS[name](sizes), rel=0.005), name


def test_statistics_of_many_layers_run_in_groups(monkeypatch):
    monkeypatch.setattr("chronomoe.statistics.LARGEST", 2 * 16 * 64)
    monkeypatch.setattr("benchmark.scaling.LARGEST", 2 * 16 * 64)
    sizes = Sizes(5, 16, 8, 2, 64)
    assert groups(sizes) == 3
    assert count(sizes)["statistics: operators"] == FORMULAS["statistics: operators"](sizes)


def test_the_dense_gpt_does_the_moe_gpts_multiplications():
    counted = []
    for prepare in (None, make_dense):
        step = SliceStep(CPU, (), batch_size=1, prepare=prepare, n_layer=2)
        with FlopCounterMode(display=False) as counter:
            step()
        counted.append(counter.get_total_flops())
    assert 0 <= counted[0] / counted[1] - 1 < 0.005  # the router's


def test_json_goes_to_a_program_and_tables_to_a_person(capsys):
    assert bench.main(["data", "--quick", "--seconds=0.05", "--json", "--device=cpu"]) == 0
    said = capsys.readouterr()
    answer = json.loads(said.out)
    assert answer["command"] == "python bench.py data --quick --seconds=0.05 --json --device=cpu"
    assert {"device", "threads", "torch", "git", "date"} <= answer.keys()
    (table,) = answer["tables"]
    assert [number["unit"] for number in table["numbers"]] == ["batches a second"] * 2
    assert "12 x 1024 tokens" in said.err


def test_layers_are_compared_with_the_dense_mlp_first(capsys):
    assert bench.main(["layer", "--quick", "--seconds=0", "--json", "--device=cpu"]) == 0
    tables = json.loads(capsys.readouterr().out)["tables"]
    assert [(table["N"], table["E"]) for table in tables] == [(1024, 8), (1024, 64)]
    for table in tables:
        names = [row["name"] for row in table["rows"]]
        assert names[:3] == ["dense MLP", "MoE layer, balanced", "MoE layer, skewed"] and names[4] == "one-hot dispatch"
        assert table["rows"][0]["ratio"] == 1 and all(row["median_ms"] > 0 for row in table["rows"])


def test_what_there_is_not_is_told_in_a_line():
    with pytest.raises(UserError, match="no part 'steps': there are layer, step, memory"):
        bench.main(["steps"])
    with pytest.raises(UserError, match=r"no model\.py there"):
        bench.main(["profile", "--against=data", "--device=cpu"])
