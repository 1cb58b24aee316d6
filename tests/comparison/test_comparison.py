"""What is compared: runs that can be used, pairs, verdicts, warnings and plans, on runs that are made up."""

import dataclasses
import json
import math
import os
from types import SimpleNamespace

import pytest

import compare
from chronomoe.signals import SIGNALS
from comparison import report, wandb_runs
from comparison.analysis import FIRST, SECOND, analyse, conclusion, last_quarter, steps_to_loss, verdict
from comparison.probe import probe
from comparison.report import short_verdict
from comparison.runs import RUN_FILES, checked, group_into_arms, load_run, load_runs, lost_seeds, pairs
from tests.comparison.studies import START, arms_of, change_config, change_lines, make_run, make_study, write
from tests.helpers.runs import error_of
from trainer.arms import ARMS, CUSTOM, arm_of
from trainer.settings import Settings

MARGIN = "the margin of 0.02"
PLACEBO = "a beta that follows another expert's coherence"
AN_EFFECT = "Beta lowers the validation loss"
VERDICTS = {  # name: (study, JSON verdicts of `on` - `off` and `on` - `shuffled`, conclusion, verdict on `on` - `off`)
    "an effect": (dict(effect=-0.05), ["effect", "effect"],
        f"{AN_EFFECT}, and the loss is lower than with {PLACEBO}.",
        "An effect (exact p = 0.00781): the loss is lower with 'on' than with 'off'."),
    "an effect for the worse": (dict(effect=0.05), ["effect", "effect"],
        f"Beta raises the validation loss, and the loss is higher than with {PLACEBO}.", "is higher with 'on' than"),
    "an effect within the margin": (dict(effect=-0.01, noise=0.001), ["effect", "effect"],
        f"{AN_EFFECT}, by less than {MARGIN} nats", f"lower with 'on' than with 'off', by less than {MARGIN}."),
    "an effect that the placebo also has": (dict(effect=-0.05, placebo=-0.05), ["effect", "no effect"],
        f"gives the same loss within {MARGIN} nats, so coherence is not the cause", "An effect"),
    "the same without a margin": (dict(effect=-0.05, placebo=-0.05, margin=None), ["effect", "undecided"],
        f"{AN_EFFECT}; whether the loss differs from that with {PLACEBO} is undecided.", "An effect"),
    "no effect": (dict(effect=0.0, placebo=0.5), ["no effect", "none"],
        f"Beta has no effect on the validation loss larger than {MARGIN} nats.", f"No effect larger than {MARGIN} na"),
    "undecided about a tiny margin": (dict(effect=0.0, noise=0.06, margin=1e-7), ["undecided", "none"],
        ", over 100000 pairs (over 100000 to over 100000) decide", "Undecided (exact p"),
    "undecided without a margin": (dict(effect=0.0, margin=None), ["undecided", "none"],
        "Undecided: beta may lower the validation loss, raise it or do neither; the runs declare no margin", ""),
    "five pairs": (dict(effect=-0.5, seeds=5), ["none", "none"],
        "No verdict: 5 pairs of runs are too few, a verdict needs 6: runs with nearly", "No verdict: 5 pairs"),
}  # fmt: skip


@pytest.mark.parametrize("name", VERDICTS)
def test_verdict_is_that_of_the_study(name):
    study, short, concluded, said = VERDICTS[name]
    analysis = analyse(arms_of(make_study(**study)))
    assert concluded in conclusion(analysis)
    first, second = analysis.primary
    assert (first.a, first.b, second.a, second.b) == (*FIRST, *SECOND) == ("on", "off", "on", "shuffled")
    assert said in verdict(analysis, first) and [short_verdict(analysis, row) for row in analysis.primary] == short
    assert [bool(report.cells(analysis, row)[5]) for row in analysis.primary] == [name != "none" for name in short]  # p
    assert {short_verdict(analysis, row) for row in (*analysis.described, *analysis.check)} == {"none"}
    noise = study.get("noise", 0.003)
    for row in (first, analysis.check[0]):  # loss and layer coherence of `on` minus those of `off`
        assert list(row.differences.values()) == pytest.approx([study["effect"]] * row.contrast.n, abs=4 * noise)
    if short == ["no effect", "none"]:
        untested = "No verdict: it is tested only if 'on' against 'off' has an effect."
        assert verdict(analysis, second).endswith(untested)


def test_outcomes_are_means_after_three_quarters_and_steps_between_evaluations():
    run = make_run(1)
    _, losses = run.series("val/loss")
    assert steps_to_loss(run, (losses[3] + losses[4]) / 2) == pytest.approx(35)
    assert steps_to_loss(run, 99) == 0 and math.isnan(steps_to_loss(run, 0))
    lines = [{"step": 75, "a/L0/x": 9.0}, {"step": 76, "a/L0/x": 1.0, "a/L2/x": 3.0, "ax": 9}, {"step": 100, "x": 5.0}]
    run = dataclasses.replace(run, lines=[*lines, {"step": 90, "a/L0/x": None}])
    assert last_quarter(run, "x") == 3.0 and math.isnan(last_quarter(run, "y"))
    metrics = [{"x": 1.0}, {"neff": 7.0}, {"neff": 7.0}]
    runs = [make_run(seed, 0.0, arm, metrics[seed]) for arm in ("off", "on") for seed in range(3)]
    neff = next(row for row in analyse(arms_of(runs)).described if "Neff" in row.outcome.name)
    assert neff.differences == {1: 0.0, 2: 0.0}  # without the pair that has no value


CONFOUNDED = {  # key: (value in `on`, value in the others)
    **dict(learning_rate=(3e-2, 3e-3), n_embd=(16, 768), top_k=(1, 2), dtype=("bfloat16", "float32")),
    **dict(aux_loss_weight=(0.1, 0.001), eval_iters=(1, 200), vocab_size=(600, 257)),
    **dict(weights_sha256=("abc", None), data_sha256=({"train.bin": "b"}, {"train.bin": "a"})),
    **dict(history=([START | {"step": 50}], [START]), chrono_gates=("clean", "biased")),
}


@pytest.mark.parametrize("key", CONFOUNDED)
def test_arms_that_differ_in_other_settings_get_no_verdict(key):
    own, others = ({key: value} for value in CONFOUNDED[key])
    study = make_study(effect=-0.5, use_aux_loss=True, on=own, off=others, shuffled=others)
    against = SECOND if key == "chrono_gates" else FIRST  # gates have no effect while beta is off
    reason = f"'on' and '{against[1]}' also differ in {'first_step' if key == 'history' else key} ("
    analysis = analyse(arms_of(study))
    row = analysis.row(against)
    assert f"No verdict: {reason}" in verdict(analysis, row) and any(reason in line for line in analysis.warnings)
    assert short_verdict(analysis, row) == "none" and "confounded" in report.cells(analysis, row)
    assert against == SECOND or conclusion(analysis).startswith(f"No verdict: {reason}")


def test_settings_without_effect_and_of_the_machine_do_not_separate_runs():
    changes = [
        dict(chrono_eta=0.5, chrono_k_max=9.0, chrono_gates="clean", chrono_bridge=True),  # beta is off
        dict(aux_loss_weight=0.9, warmup_iters=7),  # use_aux_loss and decay_lr are off
        dict(ranks=2, backend="gloo", threads=7, device="cuda:1", dataset="/elsewhere/stdlib"),
        *[dict(checkpoint_minutes=1.0, wandb_log=True, chrono_prune_phi=0.1)] * 3,
    ]
    runs = [make_run(seed, decay_lr=False, **changed) for seed, changed in enumerate(changes)]
    runs += [make_run(seed, arm="on", chrono_gates="clean", decay_lr=False) for seed in range(6)]
    del runs[3].config["eval_iters"]  # of a version without this setting: it has the default value
    analysis = analyse(arms_of(runs))
    assert short_verdict(analysis, analysis.row(FIRST)) != "none" and not analysis.warnings
    analysis = analyse(arms_of(make_study(effect=0.0, on={"torch": "2.11"}, off={"torch": "2.13"})))
    assert analysis.warnings == ["all runs of 'on' and 'off' differ in torch, so rounding may differ"]
    assert conclusion(analysis).startswith("Beta has no effect")


def test_arms_are_defined_by_what_drives_beta():
    load = dict(chrono_gates="clean", chrono_eta=1e-3, chrono_k_max=10.0, chrono_bridge=False, use_aux_loss=False)
    beta_on = {
        "on" if signal == "coherence" else signal: {"chrono_beta": True, "chrono_signal": signal} for signal in SIGNALS
    }
    assert ARMS == beta_on | {"off": {"chrono_beta": False}, "load": beta_on["load"] | load}
    assert all(arm_of(Settings().flat() | settings) == arm for arm, settings in ARMS.items())
    assert arm_of(Settings().flat() | ARMS["load"] | {"chrono_eta": 0.5}) == CUSTOM
    assert compare.Options().arms == "off,on,shuffled,load"


def test_study_changed_after_its_report_gets_a_warning(tmp_path):
    runs = make_study(effect=0.0, seeds=10)

    def warnings(runs, text="after its report was written"):
        comparison = report.compare(arms_of(runs), {}, [], {}, "", tmp_path)
        (tmp_path / "comparison.json").write_text(json.dumps(report.as_json(comparison)))
        return [line for line in comparison.sentences if text in line]

    def on_off(seeds, **changes):
        return [make_run(seed, arm=arm, **changes) for seed in range(seeds) for arm in ("off", "on")]

    shorter = [dataclasses.replace(run, config=run.config | {"max_iters": 90}, lines=run.lines[:-1]) for run in runs]
    assert not warnings(on_off(8)) and not warnings(on_off(8, margin=0.5))
    assert not warnings(runs[:24])  # another arm with the same pairs
    (line,) = warnings(runs)
    assert "it had 8 pairs of 100 steps, now it has 10 of 100" in line
    assert [len(warnings(changed)) for changed in (runs[:18], shorter)] == [2, 3]  # fewer pairs, fewer steps
    assert not warnings(on_off(8, learning_rate=0.1))  # another study in the same folder
    (tmp_path / "comparison.json").write_text("{}")
    for _ in range(2):  # the second report still has the warning
        assert warnings(runs, "changed after an earlier report is not known")


def as_pipe(path):
    """Replace the file by a named pipe. Opening it to read waits for a writer."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


RESUMED = {"step": 50, "changed": {"chrono_eta": [1e-4, 1e-3], "max_iters": [50, 100], "device": ["cuda", "cpu"]}}
DAMAGE = {  # the reason that is given: what is done to the folder of a run
    "no metrics.jsonl": lambda f: (f / "metrics.jsonl").unlink(),
    "cannot be read": lambda f: (f / "config.json").write_text("{"),
    "no config.json": lambda f: (f / "config.json").unlink(),
    "not that of a run": lambda f: (f / "config.json").write_text("[]"),
    "eval_interval=0 must be a whole number at least 1": lambda f: change_config(f, eval_interval=0),
    "line 11 of metrics.jsonl is cut": lambda f: change_lines(f, lambda lines: [*lines[:-1], lines[-1][:-9]]),
    "line 5 of metrics.jsonl is cut or": lambda f: change_lines(f, lambda lines: [*lines[:4], "{}", *lines[5:]]),
    "validation loss is not a num": lambda f: change_lines(f, lambda x: [*x[:-1], '{"step": 100, "val/loss": null}']),
    "step 40 of 100, still training": lambda f: change_lines(f, lambda lines: lines[:5]),
    "the evaluation of step 80 is missing": lambda f: change_lines(f, lambda lines: lines[:8] + lines[9:]),
    "the evaluation of step 0 is missing": lambda f: change_lines(f, lambda lines: lines[1:]),
    "step 80 is logged after step 80": lambda f: change_lines(f, lambda lines: lines[:9] + lines[8:]),
    "up to step 110, beyond": lambda f: change_lines(f, lambda lines: [*lines, '{"step": 110, "val/loss": 2}']),
    "a metric is not a number": lambda f: change_lines(f, lambda x: [x[0][:-1] + ', "x": "y"}', *x[1:]]),
    "not a number, or not below 1e+100": lambda f: change_lines(
        f, lambda x: [x[0][:-1] + f', "x": {10**400}}}', *x[1:]]
    ),
    "a metric is not a number, or": lambda f: change_lines(f, lambda x: [x[0][:-1] + ', "x": NaN}', *x[1:]]),
    "config.json: cannot be read (it is not a regular": lambda f: as_pipe(f / "config.json"),
    "metrics.jsonl: cannot be read (it is not a regular": lambda f: as_pipe(f / "metrics.jsonl"),
    "ckpt.pt: cannot be read (it is not a regular": lambda f: (f / "ckpt.pt").mkdir(),
    "decisions.jsonl: cannot be read (it is not a regular": lambda f: as_pipe(f / "decisions.jsonl"),
    "decisions.jsonl: cannot be read ('int'": lambda f: (f / "decisions.jsonl").write_text("5\n"),
    "decisions.jsonl: cannot be read (a name holds": lambda f: (f / "decisions.jsonl").write_text(
        '{"expert_id": "\\ud800", "reason": "", "action": "open", "step": 1}\n'
    ),
    "its settings are not those of a run: data_schedule: 'prose' must be VALUE@STEP": lambda f: change_config(
        f, data_schedule="prose"
    ),
    "must be a number from 0 to 1": lambda f: change_config(f, chrono_ramp="2@0"),
    "chrono_signal=['load'] must be one of": lambda f: change_config(f, chrono_signal=["load"]),
    f"evaluation of step {10**18} is missing": lambda f: change_lines(
        change_config(f, max_iters=2 * 10**18, history=[START | {"step": 10**18 - 1}]),
        lambda lines: [*lines, json.dumps({"step": 2 * 10**18, "val/loss": 2.0})],
    ),
    "step 0 of 0": lambda f: change_lines(change_config(f, max_iters=0), lambda lines: []),
    "the line of step 5 is missing": lambda f: change_config(f, log_interval=5),
    "its logs are incomplete: 2 lines are damaged": lambda f: change_config(f, incomplete=["2 lines are damaged"]),
    "no history of its starts": lambda f: change_config(f, history=...),
    "it has no history": lambda f: change_config(f, history=["x"]),
    "it was resumed with another chrono_eta,": lambda f: change_config(f, history=[START, START | RESUMED]),
    "its initial weights are not known": lambda f: change_config(f, weights_sha256="unknown"),
    "dataset is missing": lambda f: change_config(f, dataset=...),
    "without its arm": lambda f: change_config(f, arm=...),
    "there is no arm ''": lambda f: change_config(f, arm=""),
    "arm='best' must be one of": lambda f: change_config(f, arm="best"),
    "its arm is 'on', but chrono_beta is False": lambda f: change_config(f, arm="on"),
    "arm=['on'] must be one of": lambda f: change_config(f, arm=["on"]),
    "seed=[1] must be a whole number": lambda f: change_config(f, seed=[1]),
    "decisions.jsonl: cannot be read (Expecting": lambda f: (f / "decisions.jsonl").write_text("x"),
    "decisions.jsonl: cannot be read ('expert_id'": lambda f: (f / "decisions.jsonl").write_text('{"x": 1}\n'),
}


ANY = {"off": {"unknown"}, "on": {"unknown"}}
LOST = {  # what is lost with the run, if not seed 2 of 'off'
    **dict.fromkeys(("no metrics.jsonl", "cannot be read", "no config.json", "not that of a run"), ANY),
    **dict.fromkeys((f"{name}: cannot be read (it is not a regular" for name in RUN_FILES), ANY),
    "seed=[1] must be a whole number": {"off": {"unknown"}},
    "arm=['on'] must be one of": {"off": {"2"}, "on": {"2"}},
    "arm='best' must be one of": {"best": {"2"}},
    "its arm is 'on', but chrono_beta is False": {"on": {"2"}},
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_unusable_run_is_left_out_with_one_line_and_its_arm_and_seed_are_lost(tmp_path, reason):
    good, bad = (write(tmp_path / name, make_run(seed)) for name, seed in (("good", 1), ("bad", 2)))
    DAMAGE[reason](bad)
    runs, (unusable,) = load_runs([good, bad])
    assert [run.folder for run in runs] == [good]
    assert reason in str(unusable) and str(bad) in str(unusable) and "\n" not in str(unusable)
    assert lost_seeds([unusable], {"off": {1: runs[0]}, "on": {}}) == LOST.get(reason, {"off": {"2"}})


def test_run_of_any_arm_and_with_additional_lines_can_be_compared(tmp_path):
    assert load_run(write(tmp_path / "custom", make_run(1, arm=CUSTOM))).arm == CUSTOM
    history = [START, START | {"step": 95, "changed": {"max_iters": [95, 100], "log_interval": [10, 5]}}]
    longer = write(tmp_path / "longer", make_run(1, history=history, log_interval=5))
    change_lines(longer, lambda lines: [*lines[:-1], '{"step": 95, "val/loss": 50.0}', lines[-1]])
    assert load_run(longer).series("val/loss") == make_run(1).series("val/loss")  # evaluations of its schedule only


def test_runs_are_grouped_into_arms_and_paired_by_seed():
    arms = arms_of([make_run(seed) for seed in (1, 2, 3)] + [make_run(seed, arm="on") for seed in (3, 2, 7)])
    assert [(a.name, b.name) for a, b in pairs(arms, "on", "off")[0]] == [("on2", "off2"), ("on3", "off3")]
    first = make_run(3, learning_rate=0.5)  # the majority decides, not the first run
    runs = [checked(run) for run in (first, make_run(1), make_run(1), make_run(2, threads=1))]
    arms, differing, left_out = group_into_arms(runs)
    assert list(arms["off"].values()) == [runs[1], runs[3]] and differing == {"threads": ["1", "2"]}
    assert "learning_rate is 0.5, in" in left_out[0] and "seed 1 of arm 'off' is already" in left_out[1]


def test_runs_of_a_pair_need_the_same_code():
    other = {"code_sha256": "d", "history": [START | {"code_sha256": "d"}]}
    runs = [make_run(seed, **(other if seed == 3 else {})) for seed in range(4)]
    runs += [make_run(seed, arm="on", **(other if seed > 1 else {})) for seed in range(4)]
    mixed = [START, START | {"step": 50, "code_sha256": "d"}]
    redone = [START | {"code_sha256": "d"}, START]  # killed before its first checkpoint
    runs += [make_run(seed, arm=arm, history=h) for arm in ("off", "on") for seed, h in ((4, mixed), (5, redone))]
    good, left_out = pairs(arms_of(runs), "on", "off")
    assert [x.seed for x, _ in good] == [0, 1, 3, 5]
    assert len(left_out) == 2 and "seed 2" in left_out[0] and "seed 4" in left_out[1]
    assert analyse(arms_of(runs)).warnings == left_out


def test_verdict_needs_all_runs_that_were_started(tmp_path, capsys):
    """Otherwise the verdict would be about the runs that survived, and beta may be why others did not."""
    for run in make_study(effect=-0.05):
        write(tmp_path / "runs" / run.name, run)
    for seed in (2, 5):
        change_lines(tmp_path / "runs" / f"on{seed}", lambda lines: lines[:5])
    out = f"--out_dir={tmp_path / 'report'}"
    assert compare.main([str(tmp_path / "runs"), out]) == 0
    lost = "No verdict: runs of 'on' cannot be used (seed 2, 5), so their results are not known"
    said = capsys.readouterr().out
    assert f"\n{lost}" in said and said.count("still training or stopped") == 2
    again = [write(tmp_path / f"again{seed}", make_run(seed, -0.05, "on")) for seed in (2, 5)]
    figures = tmp_path / "report" / "figures"  # a folder without a run
    assert compare.main([str(tmp_path / "runs"), *map(str, again), str(figures), out]) == 0
    assert "\nBeta lowers" in capsys.readouterr().out


def test_undecided_study_and_plan_state_how_many_more_pairs_decide(tmp_path, capsys):
    shifts = enumerate([0.8, 1.0, 1.2, 1.0, 1.1, -0.01])
    runs = [make_run(seed, x, arm, margin=1.1) for seed, on in shifts for arm, x in (("off", 0.0), ("on", on))]
    assert conclusion(analyse(arms_of(runs))).endswith("more pairs are needed, and these pairs do not show how many.")
    runs = make_study(effect=0.0, noise=0.06)
    for run in runs:
        write(tmp_path / "pilot" / run.name, run)
    analysis, pilot = analyse(arms_of(runs)), ["--plan", str(tmp_path / "pilot")]
    n, low, high = analysis.row(FIRST).contrast.pairs_to_decide
    assert 8 < n and low < n < high
    assert f"about {n} pairs ({low} to {high}) decide about 0.02 nats" in conclusion(analysis)
    for margin in (["--margin=0.02"], []):  # by default the one that the runs declare
        assert compare.main([*pilot, *margin]) == 0
        assert f"\n{n} pairs ({low} to {high}) decide about a margin of 0.02 nats" in capsys.readouterr().out
    compare.main([*pilot, "--margin=1e-6"])
    assert "over 100000 pairs (over 100000 to over 100000)" in capsys.readouterr().out
    assert "margin=None must be a number" in error_of(compare.main, [*pilot, "--margin=None"])
    assert "no config.json" in error_of(compare.main, ["--plan", str(tmp_path / "none")])
    assert "pairs of runs, beta on and off" in error_of(compare.main, ["--plan", str(tmp_path / "pilot" / "on1")])


def wandb_run(run, rows, job_type="beta_on"):
    """A finished run as wandb.Api returns it."""
    history = [row | {"_step": row["step"], "_timestamp": 1.0, "note": "x"} for row in reversed(rows)]
    config = run.config | {"_wandb": {}}
    return SimpleNamespace(name=run.name, config=config, job_type=job_type, scan_history=lambda: iter(history))


def test_runs_from_wandb_give_the_same_report_as_from_disk(tmp_path, monkeypatch, capsys):
    import wandb

    runs = make_study(effect=-0.2, seeds=6)
    found = [wandb_run(run, run.lines) for run in runs] + [wandb_run(runs[0], runs[0].lines[:3])]  # still training
    found += [wandb_run(runs[0], runs[0].lines, of_report) for of_report in ("comparison", "audit")]
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs=lambda project: found))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    assert compare.main(["--wandb=entity/project"]) == 0
    said = capsys.readouterr().out
    assert "Beta lowers the validation loss" in said and "still training or stopped" in said and "already" not in said
    folders = [str(write(tmp_path / "runs" / run.name, run)) for run in runs]
    assert compare.main([*folders, "--wandb_log=True"]) == 0  # the report is an offline W&B run too
    assert "wandb sync" in capsys.readouterr().out
    reports = tmp_path / "out" / "wandb_comparison", tmp_path / "out" / "compare_off0_on0_shuffled0_15_more"
    theirs, ours = (json.loads((folder / "comparison.json").read_text()) for folder in reports)
    assert theirs["primary"] == ours["primary"]
    (logged,) = (reports[1] / "wandb").glob("offline-run-*/files/media")
    assert len(list(logged.rglob("*.png"))) >= 4
    (table,) = (json.loads(path.read_text()) for path in (logged / "table").glob("contrasts*.json"))
    first, expected = dict(zip(table["columns"], table["data"][0])), ours["primary"][0]
    assert first["mean difference"] == expected["mean"] and first["95% low"] == expected["low"]
    assert [first[name] for name in ("a", "b", "pairs", "p")] == ["on", "off", 6, expected["p"]]
    monkeypatch.setattr(wandb, "Api", lambda: 1 / 0)
    assert error_of(compare.main, ["--wandb=entity/project"]).startswith("--wandb=entity/project: W&B did not answer (")
    monkeypatch.chdir(tmp_path / "runs")
    assert "not on this machine" in error_of(probe, wandb_runs.load(found[1]))  # though a folder has the run's name
    found[1].config["history"] = [START, START | RESUMED]
    assert "resumed with another chrono_eta" in error_of(wandb_runs.load, found[1])
