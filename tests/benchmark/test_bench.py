"""bench.py: competitors are comparable, ratios have their uncertainty, costs scale as documented. Nothing is timed."""

import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
from benchmark import scaling
from benchmark.layer import competitors
from benchmark.rates import make_dense
from benchmark.step import SliceStep
from benchmark.timing import median_interval, rows
from tests.helpers.runs import error_of
from trainer.errors import UserError

CPU = torch.device("cpu")


def times(spread, turns, ratio):
    """Two competitors on a machine whose speed falls to a third, with log-normal noise on each time."""
    drift = torch.linspace(0, math.log(3), turns)
    first, second = (drift + spread * torch.randn(turns) for _ in range(2))
    return {"first": (10 * first.exp()).tolist(), "second": (10 * ratio * second.exp()).tolist()}


def test_ratio_is_found_on_a_drifting_machine_and_marked_if_it_is_noisy():
    _, second = rows([times(spread=0.01, turns=30, ratio=1.1)])
    assert abs(second.ratio - 1.1) < 0.01 and second.low < second.ratio < second.high and not second.noisy
    assert rows([times(spread=0.3, turns=30, ratio=1.1)])[1].noisy
    _, second = rows([times(spread=0.0, turns=5, ratio=1.1)])
    assert second.noisy and second.interval is None  # five turns have no 95% interval
    _, second = rows([times(spread=0.01, turns=30, ratio=ratio) for ratio in (1.1, 1.1, 1.4)])
    assert second.noisy and second.turns == 90  # the intervals of processes do not predict the next process
    assert second.by_process == pytest.approx((1.1, 1.1, 1.4), rel=0.02)


@pytest.mark.parametrize("turns", [6, 7, 15, 60])
def test_interval_of_a_median_covers_it_in_95_percent(turns):
    inside = [low <= 1 <= high for low, high in map(median_interval, torch.randn(4000, turns).exp().tolist())]
    assert sum(inside) / len(inside) > 0.94 and median_interval([1.0] * 5) is None


def flops(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", [(512, 128, 8, 2), (256, 64, 16, 4)])
def test_dense_mlp_and_dense_gpt_have_as_many_multiplications(shape):
    N, D, E, K = shape
    work, skew = competitors(*shape, CPU)
    dense, moe = flops(work["dense MLP"]), flops(work["MoE layer, balanced"])
    router, sums = 3 * 2 * N * D * E, 2 * 2 * K * N * D  # sums for coherence
    assert dense == 3 * 2 * K * N * 2 * 4 * D * D and moe - dense == router + sums
    assert skew > 1.5
    gpts = [flops(SliceStep(CPU, (), 1, prepare, n_layer=2, n_exp=E, top_k=K)) for prepare in (None, make_dense)]
    assert 0 < gpts[0] / gpts[1] - 1 < 0.005  # the router


def counts(name, changes):
    """The counts at sizes that `changes` lists by letter. Counts that do not depend on torch must be exact."""
    found = []
    for values in zip(*changes.values()):
        sizes = scaling.Sizes(**dict(L=2, E=8, D=32, K=2, N=64) | dict(zip(changes, values)))
        counted = scaling.count(sizes)
        assert all(counted[exact] == scaling.FORMULAS[exact](sizes) for exact in scaling.EXACT)
        found.append(counted[name])
    return found


LINEAR = {  # counts that depend on the version of torch are only tested for how they grow
    "loop: bytes read and written": [dict(L=[1, 2, 3])],
    "statistics: bytes read and written": [dict(L=[1, 2, 3]), dict(N=[32, 64, 96])],
    "layer: bytes kept for backward": [dict(N=[32, 64, 96])],
    "layer: operators, a loop over experts": [dict(E=[4, 8, 12])],
    "statistics: operators": [dict(L=[3, 5, 7], E=[16] * 3)],  # 2, 3 and 4 groups of at most two layers
}


def test_costs_scale_as_documented(monkeypatch):
    for name in ("loop: operators", "statistics: operators", "layer: operators, experts grouped"):
        assert len(set(counts(name, dict(L=[1, 2, 4], E=[8, 16, 8], D=[32, 32, 48], N=[64, 32, 128])))) == 1, name
    for module in ("chronomoe.statistics", "benchmark.scaling"):
        monkeypatch.setattr(f"{module}.MAX_ENTRIES", 2 * 16 * 64)
    assert [scaling.groups(scaling.Sizes(L, 16, 8, 2, 64)) for L in (3, 5, 7)] == [2, 3, 4]
    for name, changes in ((name, changes) for name, cases in LINEAR.items() for changes in cases):
        small, middle, large = counts(name, changes)
        assert large - middle == middle - small > 0, name


def test_json_goes_to_stdout_and_tables_to_stderr(capsys, monkeypatch):
    assert bench.main(["data", "--quick", "--seconds=0.05", "--json", "--device=cpu"]) == 0
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert answer["command"] == "python bench.py data --quick --seconds=0.05 --json --device=cpu"
    assert {"device", "threads", "torch", "git", "date"} <= answer.keys()
    (table,) = answer["tables"]
    assert [number["unit"] for number in table["numbers"]] == ["batches per second"] * 2
    assert "12 x 1024 tokens" in printed.err
    monkeypatch.setattr("benchmark.layer.mixtral", lambda *_: None)  # slow with 64 experts
    assert bench.main(["layer", "--quick", "--seconds=0", "--json", "--device=cpu"]) == 0
    tables = json.loads(capsys.readouterr().out)["tables"]
    assert [(table["N"], table["E"]) for table in tables] == [(1024, 8), (1024, 64)]
    for table in tables:
        names = [row["name"] for row in table["rows"]]
        assert names[:3] == ["dense MLP", "MoE layer, balanced", "MoE layer, skewed"] and names[4] == "one-hot dispatch"
        assert table["rows"][0]["ratio"] == 1 and all(row["median_ms"] > 0 for row in table["rows"])


def test_profile_against_a_folder_without_a_checkout_is_refused():
    with pytest.raises(UserError, match=r"no model\.py there"):
        bench.main(["profile", "--against=data", "--device=cpu"])


@pytest.mark.slow
def test_running_out_of_memory_and_a_step_that_fails_without_a_message_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(bench.PARTS, "data", lambda *_: torch.empty(10**15))
    assert error_of(bench.main, ["data"]).startswith("out of memory")
    (tmp_path / "model.py").write_text("import os\nos._exit(3)\n")
    (tmp_path / "chronomoe.py").write_text("ChronoConfig = ChronoLoop = None\n")
    message = error_of(bench.main, ["profile", "--quick", f"--against={tmp_path}"])
    assert message == f"the training step of {tmp_path} fails: exit status 3"
