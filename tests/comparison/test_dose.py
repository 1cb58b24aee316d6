"""Dose and response: each strength of beta against beta off, by seed."""

import json

import pytest

import compare
from tests.comparison.studies import make_run, write
from tests.helpers.runs import error_of

EFFECTS = {(1e-3, 0.1): 0.0, (1e-2, 1.0): -0.02, (1e-1, 10.0): 0.05}


@pytest.fixture
def folders(tmp_path):
    """A folder of runs without beta, and one per strength."""
    made = [tmp_path / "off"]
    for seed in range(8):
        write(tmp_path / "off" / f"seed{seed}", make_run(seed))
    metrics = {"routing/L0/neff": 7.0, "routing/L0/flip_set": 0.25, "routing/L2/flip_set": 0.75}
    for (eta, k_max), effect in EFFECTS.items():
        made.append(tmp_path / f"eta{eta}")
        for seed in range(8):
            keys = dict(chrono_eta=eta, chrono_k_max=k_max)
            run = make_run(seed, effect + 0.0001 * seed, "on", metrics, **keys)
            write(made[-1] / f"seed{seed}", run)
    return made


def test_each_strength_is_compared_with_the_runs_without_beta(folders, tmp_path, capsys):
    assert compare.main(["--dose", *map(str, reversed(folders)), f"--out_dir={tmp_path / 'out'}"]) == 0
    found = json.loads((tmp_path / "out" / "dose.json").read_text())
    strengths = {(s["eta"], s["k_max"]): s for s in found["strengths"]}
    assert [*strengths] == sorted(EFFECTS) and found["left_out"] == []
    for strength, effect in EFFECTS.items():
        loss = strengths[strength]["rows"][0]
        assert loss["mean"] == pytest.approx(effect + 0.00035) and loss["n"] == 8
        assert loss["low"] < loss["mean"] < loss["high"] and [*loss["differences"]] == [str(i) for i in range(8)]
        assert strengths[strength]["share of the top-K set that beta changes"] == 0.5
    printed = capsys.readouterr().out
    assert "0.01, 1" in printed and "-0.0197" in printed
    assert (tmp_path / "out" / "figures" / "dose_and_response.png").read_bytes()[1:4] == b"PNG"
    assert "![Dose and response](figures/dose_and_response.png)" in (tmp_path / "out" / "dose.md").read_text()


def test_runs_with_other_settings_or_arms_are_named_and_left_out(folders, tmp_path, capsys):
    write(folders[1] / "other", make_run(8, arm="on", chrono_eta=1e-3, chrono_k_max=0.1, batch_size=7))
    write(folders[1] / "load", make_run(8, arm="load"))
    assert compare.main(["--dose", *map(str, folders), f"--out_dir={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    assert "left out: " in printed and "batch_size is 7" in printed and "its arm is 'load'" in printed


def test_a_strength_that_differs_in_another_setting_is_not_compared(folders, tmp_path, capsys):
    for seed in range(8):
        write(tmp_path / "wide" / f"seed{seed}", make_run(seed, arm="on", chrono_eta=0.5, batch_size=7))
    assert compare.main(["--dose", *map(str, folders), str(tmp_path / "wide"), f"--out_dir={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    assert "\n0.5, 0.3" not in printed and "eta, k_max = 0.5, 0.3: its runs also differ in batch_size" in printed


def test_too_few_strengths_and_other_options_are_one_line(folders, tmp_path):
    assert "two strengths" in error_of(compare.main, ["--dose", *map(str, folders[:2])])
    assert "two strengths" in error_of(compare.main, ["--dose", *map(str, folders[1:])])
    assert "--dose takes folders" in error_of(compare.main, ["--dose", "--seeds=3", *map(str, folders)])
    assert "does not exist" in error_of(compare.main, ["--dose", str(tmp_path / "nothing")])
