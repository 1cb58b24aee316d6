"""benchmark.gpu without a GPU: a stage cannot lose the results of others, and targets and tables follow the results."""

import json
import os
import signal
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from benchmark import gpu, layer, markdown
from benchmark.grouped import GroupedLayer
from benchmark.stages import Stage, merged, run_stages
from benchmark.timing import Effort, Report
from trainer.errors import UserError

CPU = torch.device("cpu")
WRITES = """
import json, os, signal, subprocess, sys, time
def write(*names, end="\\n"):
    numbers = [{"name": name, "value": len(name), "unit": "letters"} for name in names]
    with open(sys.argv[-1], "a") as f:
        f.write(json.dumps({"part": "p", "title": "t", "numbers": numbers}) + end)
"""


SEGV = "os.kill(os.getpid(), signal.SIGSEGV)"


def stage(name, code, seconds=20.0):
    return Stage(name, (sys.executable, "-c", WRITES + code), seconds)


def names(result):
    return [number["name"] for table in result["tables"] for number in table["numbers"]]


def is_running(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_stage_that_raises_crashes_hangs_or_is_skipped_does_not_affect_the_others(tmp_path):
    sleeper = "child = subprocess.Popen(['sleep', '600']); open(sys.argv[-1] + '.pid', 'w').write(str(child.pid))"
    stages = [
        stage("good", "write('a', 'bb'); write('bb', 'ccc')"),
        stage("raises", "write('a'); raise ValueError('the reason')"),
        stage("crashes", "write('a'); write('cut', end='')\nos.truncate(sys.argv[-1], 90)\n" + SEGV),
        stage("hangs", f"write('a'); {sleeper}; time.sleep(600)", seconds=1.5),
        stage("long", "write('a')", seconds=1000),
        stage("last", "print('not a table'); write('a')"),
    ]  # fmt: skip
    saved = []
    run_stages(stages, tmp_path, 100, saved.append)
    last = {result["name"]: result for result in saved[-1]}
    assert [result["status"] for result in saved[-1]] == ["ok", "failed", "failed", "timeout", "skipped", "ok"]
    assert [names(result) for result in saved[-1]] == [["a", "bb", "ccc"], ["a"], ["a"], ["a"], [], ["a"]]
    assert last["raises"]["reason"] == "exit status 1: ValueError: the reason"
    assert last["crashes"]["reason"] == "SIGSEGV, see crashes.log"
    assert 2.9 < last["hangs"]["seconds"] < 30 and last["hangs"]["reason"] == "ended after 3 s"
    assert "1000 s expected" in last["long"]["reason"]
    child = int((tmp_path / "hangs.jsonl.pid").read_text())
    for _ in range(100):
        if not is_running(child):
            break
        time.sleep(0.05)
    assert not is_running(child)
    finished = [sum(result["status"] != "not run" for result in each) for each in saved]
    assert finished == sorted(finished) and {*finished} == {*range(7)}  # saved after every stage


def test_the_time_for_all_stages_is_a_limit(tmp_path):
    saved = []
    began = time.monotonic()
    run_stages([stage("hangs", "time.sleep(600)", 3), stage("next", "write('a')", 3)], tmp_path, 2.0, saved.append)
    assert time.monotonic() - began < 20
    assert [result["status"] for result in saved[-1]] == ["timeout", "skipped"]


def test_ctrl_c_keeps_what_is_done(tmp_path):
    stages = [
        stage("done", "write('a')"),
        stage("interrupted", "write('bb'); os.kill(os.getppid(), signal.SIGINT); time.sleep(600)"),
        stage("next", "write('ccc')"),
    ]
    saved = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_stages(stages, tmp_path, 100, saved.append)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [result["status"] for result in saved[-1]] == ["ok", "interrupted", "not run"]
    assert [names(result) for result in saved[-1]] == [["a"], ["bb"], []]


def test_tables_with_one_title_become_one_and_the_last_entry_of_a_name_counts():
    def check(name, ok):
        return json.dumps({"part": "p", "title": "t", "checks": [{"name": name, "ok": ok, "detail": ""}]})

    other = {"part": "q", "title": "t", "rows": [], "pairs": {}}
    (table, second) = merged([check("a", False), json.dumps(other), check("b", True), check("a", True), '{"part": "p'])
    assert [(each["name"], each["ok"]) for each in table["checks"]] == [("a", True), ("b", True)] and second == other


def comparison(part, facts, ratios, pairs):
    """A table of Report with these ratios; the quartiles are 1% from each."""
    report = Report()
    report.comparison(part, "title", {name: [1.0] * 7 for name in ratios}, **facts)
    (table,) = report.tables
    for row in table["rows"]:
        row |= {"ratio": ratios[row["name"]], "low": 0.99 * ratios[row["name"]], "high": 1.01 * ratios[row["name"]]}
    table["pairs"] = {
        name: table["rows"][0] | {"ratio": ratio, "low": 0.99 * ratio, "high": 1.01 * ratio}
        for name, ratio in pairs.items()
    }
    return table


def test_targets_are_met_missed_or_not_measured():
    N, D, E, K = gpu.LAYERS[0]
    at = dict(N=N, D=D, E=E, K=K)
    pairs = {f"MoE layer, balanced / {name}": ratio for name, ratio in
             {"grouped layer": 0.8, "transformers, grouped_mm": 1.02}.items()}  # fmt: skip
    fast = {"dense GPT": 1.0, "all steps on": 1.11}
    tables = [
        comparison("layer", at, {"dense MLP": 1.0, "MoE layer, balanced": 1.14}, pairs),
        comparison("step", dict(shape="nanoMoE", variant="fused"), fast, {"all steps on / all steps off": 1.004}),
        comparison("step", dict(shape="slice", variant="compiled"), fast | {"all steps on": 1.12},
                   {"all steps on / all steps off": 1.006}),
        {"part": "step", "title": "rates", "numbers": []},
    ]  # fmt: skip
    found = {target["name"]: target for target in gpu.targets(tables)}
    where = "N=16384, D=768, E=8, K=2"
    expected = {
        f"MoE layer / dense MLP, {where}": (1.14, True),
        f"MoE layer / grouped layer, {where}": (0.8, True),
        f"MoE layer / transformers, grouped_mm, {where}": (1.02, False),
        f"MoE layer / transformers, eager, {where}": (None, None),
        "MoE layer / grouped layer, N=4096, D=768, E=8, K=2": (None, None),
        "step, all steps on / off: nanoMoE, fused": (1.004, True),
        "step, all steps on / off: slice, compiled": (1.006, False),
        "MFU, MoE GPT / dense GPT: slice, compiled": (1 / 1.12, False),
        "MFU, MoE GPT / dense GPT: nanoMoE, compiled": (None, None),
        "step, all steps on / off: slice, eager": (None, None),
    }
    for name, (value, met) in expected.items():
        assert (found[name]["value"], found[name]["met"]) == (value, met), name
    for target in found.values():
        assert target["value"] is None or target["low"] < target["value"] < target["high"]
    too_slow = comparison("layer", at, {"dense MLP": 1.0, "MoE layer, balanced": 1.16}, pairs)
    assert gpu.targets([too_slow])[0]["met"] is False


def test_results_and_markdown_are_written_from_the_tables(tmp_path):
    N, D, E, K = gpu.LAYERS[0]
    ratios = {"dense MLP": 1.0, "MoE layer, balanced": 1.25}
    report = Report()
    report.numbers("p", "numbers of it", [("whole | part", 1234567, ""), ("share", 12.3456, "%")])
    report.checks("p", "checks", [("a", True, ""), ("b", False, "float<4>"), ("c", None, "2.13")])
    tables = [comparison("layer", dict(N=N, D=D, E=E, K=K), ratios, {"b / a": 0.5}), *report.tables]
    tables = json.loads(json.dumps(tables))
    stages = [
        {"name": "layer", "status": "ok", "seconds": 12.34, "reason": "", "tables": tables},
        {"name": "next", "status": "failed", "seconds": 1.0, "reason": "SIGSEGV: end", "tables": []},
    ]
    gpu.save_results(tmp_path, "the command", stages)
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["command"] == "the command" and results["stages"] == stages
    text = (tmp_path / "gpu.md").read_text()
    assert markdown.document(results) == text
    lines = text.splitlines()
    assert lines.index("**Numbers of it**") > lines.index("**Stages**") > lines.index("**Targets**")
    for line in (
        "| MoE layer / dense MLP, N=16384, D=768, E=8, K=2 | at most 1.15 | 1.250 (1.238 to 1.262) | missed |",
        "| layer | 12 s | ok |",
        "| next | 1 s | failed: SIGSEGV: end |",
        "| dense MLP | 1.00 ms | 1 |",
        "| MoE layer, balanced | 1.00 ms | 1.250 (1.238 to 1.262) noisy: not known to 5% |",
        "| b / a |  | 0.500 (0.495 to 0.505) noisy: not known to 5% |",
        "7 turns.",
        "| whole \\| part | 1,234,567 |",
        "| share | 12.35 % |",
        "| a | ok |",
        "| b | failed: float\\<4> |",
        "| c | 2.13 |",
    ):
        assert line in lines, line


def test_a_stage_measures_what_the_targets_look_for(monkeypatch):
    monkeypatch.setattr(gpu, "SHAPES", {"slice": dict(batch_size=1, n_layer=2, n_embd=32, block_size=16)})
    monkeypatch.setattr(gpu, "measured_steps", lambda: [("slice", "eager")])
    monkeypatch.setattr(gpu, "LAYERS", [(64, 32, 4, 2)])
    monkeypatch.setattr(gpu, "Effort", lambda *_: Effort(0, 1, 1))

    def mixtral(D, E, K, implementation, generator):
        return None if implementation == "eager" else torch.nn.Linear(D, 2 * D)  # its backward raises

    monkeypatch.setattr(layer, "mixtral", mixtral)
    report = Report()
    gpu.measure_layers(report, CPU)
    gpu.measure_step(report, CPU, "slice", "eager")
    found = {target["name"]: target["met"] for target in gpu.targets(report.tables)}
    at = "N=64, D=32, E=4, K=2"
    missing = {f"MoE layer / transformers, {implementation}, {at}" for implementation in ("eager", "grouped_mm")}
    assert {name for name, met in found.items() if met is None} == missing and len(found) == 6
    (left_out,) = [table for table in report.tables if "checks" in table]
    assert left_out["checks"][0]["name"] == f"transformers, grouped_mm, {at}"
    numbers = {n["name"]: n["value"] for table in report.tables for n in table.get("numbers", [])}
    assert numbers["dense GPT"] > 0 and numbers["active parameters"] > 0


def test_outcomes_of_tests_survive_a_crash_of_their_process(tmp_path, monkeypatch):
    tests = tmp_path / "test_crashing.py"
    tests.write_text(
        "import os, signal, pytest\n"
        "pytestmark = pytest.mark.cuda\n"
        "def test_passes(): pass\n"
        "def test_fails(): raise ValueError('the reason')\n"
        "def test_crashes(): os.kill(os.getpid(), signal.SIGSEGV)\n"
        "@pytest.mark.parametrize('x', [1, 2])\n"
        "def test_next(x): assert x == 1\n"
        "def test_is_skipped(): pytest.skip('no device')\n"
        "def test_crashes_at_the_end(): os._exit(134)\n"
    )
    file = tmp_path / "tests.jsonl"
    file.touch()
    monkeypatch.setenv("OUTCOMES", str(file))
    monkeypatch.setattr(gpu, "CUDA_TESTS", str(tests))
    gpu.run_tests(Report(), CPU)
    (table,) = merged(file.read_text().splitlines())
    found = {check["name"]: (check["ok"], check["detail"]) for check in table["checks"]}
    ended = (False, "the process ended during this test")
    assert found["test_passes"][0] is True and found["test_next[1]"][0] is True
    assert found["test_fails"] == (False, "ValueError: the reason")
    assert found["test_crashes"] == found["test_crashes_at_the_end"] == ended
    assert found["test_next[2]"][0] is False and "assert 2 == 1" in found["test_next[2]"][1]
    assert found["test_is_skipped"] == (False, "skipped") and len(found) == 7
    tests.write_text("raise ValueError\n")
    file.write_text("")
    with pytest.raises(RuntimeError, match="before it ran a test"):
        gpu.run_tests(Report(), CPU)


def test_grouped_layer_is_the_weighted_sum_of_its_experts():
    N, D, E, K = 50, 24, 6, 2
    grouped = GroupedLayer(D, E, K, torch.Generator().manual_seed(0))
    x = torch.randn(1, N, D)
    scores, chosen = grouped.router(x[0]).softmax(-1).topk(K)
    gates = torch.zeros(N, E).scatter(1, chosen, scores)
    outputs = [(F.silu(x[0] @ gate) * (x[0] @ up)) @ down for gate, up, down in
               zip(grouped.gate, grouped.up, grouped.down)]  # fmt: skip
    expected = torch.einsum("ne,end->nd", gates, torch.stack(outputs))
    torch.testing.assert_close(grouped(x)[0], expected)
    products = sum(p[0].numel() for p in (grouped.gate, grouped.up, grouped.down))
    assert abs(products / (2 * 4 * D * D) - 1) < 0.01  # those of an MLP of width 4 D


def test_mistakes_are_one_line(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="no stage 'layers': there are facts, layer,"):
        gpu.main(["layers"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        gpu.main([f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_a_stage_without_a_device_fails_and_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = signal.getsignal(signal.SIGTERM)
    try:
        status = gpu.main(["facts", f"--out={tmp_path}"])
    finally:
        signal.signal(signal.SIGTERM, before)
    (result,) = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    if torch.cuda.device_count():
        assert status == 0 and result["status"] == "ok"
    else:
        assert status == 1 and ("CUDA" in result["reason"] or "NVIDIA" in result["reason"])
