"""The comparison of runs: what is paired, what is left out and why, what the report says; and real small studies."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import compare
from comparison import wandb_runs
from comparison.analysis import FIRST, SECOND, analyse, conclusion, no_verdict, steps_to_loss, verdict
from comparison.probe import probe
from comparison.runs import group_into_arms, load_run, load_runs, pairs
from trainer.arms import ARMS, CUSTOM, arm_of
from trainer.errors import UserError
from trainer.settings import COMPARED, ROLES, Settings, keys

ROOT = Path(__file__).parents[2]
START = {"step": 0, "changed": {}, "code_sha256": "c", "matmul_precision": "highest"}
BASE = Settings().flat() | {
    **dict(dataset="stdlib", data_sha256={"train.bin": "a"}, weights_sha256=None, weights_from=None, incomplete=[]),
    **dict(max_iters=100, eval_interval=10, log_interval=10, n_exp=4, chrono_router=True, chrono_coherence=True),
    **dict(margin=0.02, threads=2, ranks=1, code_sha256="c", history=[START], vocab_size=257),
}


def write_run(folder, seed, shift=0.0, steps=100, arm="off", **changes):
    """A run whose validation loss falls from 3 to 2 + shift + a seed's own luck."""
    folder.mkdir(parents=True)
    config = BASE | {"seed": seed, "out_dir": str(folder), "arm": arm} | ARMS.get(arm, {}) | changes
    (folder / "config.json").write_text(json.dumps(config))
    luck = float(np.random.default_rng(seed).normal(0, 0.05))
    lines = []
    for step in range(0, steps + 1, 10):
        loss = 2 + math.exp(-step / 20) + (shift + luck) * step / 100
        routing = {"routing/L0/load_cv": 0.5, "routing/L0/neff": 7.0, "coherence/L0/layer": 0.6 + shift}
        lines.append(json.dumps({"step": step, "val/loss": loss} | (routing if step else {})))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_study(tmp_path, effect, noise=0.003, seeds=8, placebo=0.0, changes=()):
    """Folders of `off`, `on` and `shuffled` runs; changes: keys by arm."""
    changes = dict(changes)
    folders = []
    for seed in range(seeds):
        own = np.random.default_rng(100 + seed).normal(0, noise, 2)
        shifts = {"off": 0.0, "on": effect + own[0], "shuffled": placebo + own[1]}
        for arm, shift in shifts.items():
            folders.append(write_run(tmp_path / f"{arm}{seed}", seed, shift, arm=arm, **changes.get(arm, {})))
    return folders


def arms_of(tmp_path, effect, **options):
    runs, left_out = load_runs(write_study(tmp_path, effect, **options))
    assert not left_out
    arms, _, left_out = group_into_arms(runs)
    assert not left_out
    return arms


def test_a_real_effect_is_found_and_its_size_is_right(tmp_path):
    analysis = analyse(arms_of(tmp_path, effect=-0.05))
    on_off = analysis.row(FIRST)
    assert on_off.contrast.mean == pytest.approx(-0.05 * 0.9, abs=0.005)  # the mean of steps 80, 90 and 100
    assert "An effect (exact p = 0.00781): the loss is lower with 'on' than with 'off'." in verdict(analysis, on_off)
    assert conclusion(analysis).startswith("Beta lowers the validation loss, and the loss is lower than with a beta")
    assert analysis.check[0].contrast.mean == pytest.approx(-0.05, abs=0.005)


def test_an_effect_that_the_placebo_has_too_is_not_coherences(tmp_path):
    analysis = analyse(arms_of(tmp_path, effect=-0.05, placebo=-0.05))
    assert "gives the same loss within the margin of 0.02 nats, so coherence is not the cause" in conclusion(analysis)


def test_an_effect_without_a_margin_leaves_the_placebo_undecided(tmp_path):
    no_margin = {arm: {"margin": None} for arm in ARMS}
    analysis = analyse(arms_of(tmp_path, effect=-0.05, placebo=-0.05, changes=no_margin))
    assert conclusion(analysis).endswith("follows another expert's coherence is undecided.")


def test_three_verdicts(tmp_path):
    none = analyse(arms_of(tmp_path / "none", effect=0.0))
    assert conclusion(none) == "Beta has no effect on the validation loss larger than the margin of 0.02 nats."
    assert "No effect larger than the margin of 0.02 nats: two one-sided tests" in verdict(none, none.row(FIRST))
    noisy = analyse(arms_of(tmp_path / "noisy", effect=0.0, noise=0.06))
    n, low, high = noisy.row(FIRST).contrast.pairs_to_decide
    assert 8 < n and low < n < high
    assert conclusion(noisy).startswith("Undecided: ") and f"about {n} pairs ({low} to {high}) decide" in conclusion(
        noisy
    )
    tiny = analyse(arms_of(tmp_path / "tiny", effect=0.0, noise=0.06, changes={a: {"margin": 1e-7} for a in ARMS}))
    assert "about over 100000 pairs" not in conclusion(tiny) and "over 100000 pairs" in conclusion(tiny)
    undeclared = {arm: {"margin": None} for arm in ARMS}
    silent = analyse(arms_of(tmp_path / "silent", effect=0.0, changes=undeclared))
    assert conclusion(silent).startswith("Undecided: ") and "the runs declare no margin" in conclusion(silent)


def test_a_small_effect_is_said_to_be_within_the_margin(tmp_path):
    analysis = analyse(arms_of(tmp_path, effect=-0.01, noise=0.001))
    assert "lower with 'on' than with 'off', by less than the margin of 0.02." in verdict(analysis, analysis.row(FIRST))
    assert "lowers the validation loss, by less than the margin of 0.02 nats" in conclusion(analysis)


def test_the_placebo_gets_no_verdict_where_no_effect_was_found(tmp_path):
    analysis = analyse(arms_of(tmp_path, effect=0.0, placebo=0.5))
    assert "tested only where 'on' against 'off' finds an effect" in verdict(analysis, analysis.row(SECOND))


def test_five_pairs_get_no_verdict(tmp_path):
    analysis = analyse(arms_of(tmp_path, effect=-0.5, seeds=5))
    assert conclusion(analysis).startswith("No verdict: 5 pairs cannot give a p below 0.0625")
    assert "No verdict" in verdict(analysis, analysis.row(FIRST))


CONFOUNDED = [
    ("learning_rate", 3e-2, 3e-3),
    ("weights_sha256", "abc", None),
    ("data_sha256", {"train.bin": "b"}, {"train.bin": "a"}),
    ("n_embd", 16, 768),
    ("top_k", 1, 2),
    ("chrono_gates", "clean", "biased"),
    ("dtype", "bfloat16", "float32"),
    ("aux_loss_weight", 0.1, 0.001),
    ("margin", 0.5, 0.02),
    ("eval_iters", 1, 200),
]


@pytest.mark.parametrize(("key", "one", "other"), CONFOUNDED, ids=[key for key, *_ in CONFOUNDED])
def test_arms_that_differ_in_more_than_what_defines_them_get_no_verdict(tmp_path, key, one, other, capsys):
    common = {"use_aux_loss": True}
    against = "shuffled" if key == "chrono_gates" else "off"  # where beta is off the gates do nothing
    changes = {"on": common | {key: one}, "off": common | {key: other}, "shuffled": common | {key: other}}
    folders = write_study(tmp_path / "runs", effect=-0.5, changes=changes)
    compare.main([str(folder) for folder in folders] + [f"--out_dir={tmp_path / 'report'}"])
    said = capsys.readouterr().out.splitlines()
    if against == "off":
        assert said[0].startswith(f"No verdict: 'on' and 'off' differ also in {key} (")
    assert any(f"'on' and '{against}' differ also in {key}" in line for line in said)
    numbers = json.loads((tmp_path / "report" / "comparison.json").read_text())
    rows = [row for row in numbers["primary"] if (row["a"], row["b"]) == ("on", against)]
    assert [row["verdict"] for row in rows] == ["none"]
    report = (tmp_path / "report" / "report.md").read_text()
    assert report.index(key) < report.index("## All contrasts")
    if against == "off":
        assert "lowers" not in "\n".join(said) + report


def test_settings_that_do_nothing_or_only_round_otherwise_are_no_reason_to_leave_a_run_out(tmp_path):
    odd = {
        0: dict(arm="off", chrono_eta=0.5, chrono_k_max=9.0, chrono_gates="clean", chrono_bridge=True),
        1: dict(arm="off", ranks=2, backend="gloo", threads=7, device="cuda:1"),
        2: dict(arm="off", aux_loss_weight=0.9, warmup_iters=7),
        3: dict(arm="off"),
        4: dict(
            arm="off", decay_lr=False, log_interval=5, checkpoint_minutes=1.0, wandb_log=True, chrono_prune_phi=0.1
        ),
        5: dict(arm="off", dataset="/elsewhere/stdlib"),
    }
    usual = dict(decay_lr=False)
    folders = [write_run(tmp_path / f"off{seed}", seed, **usual | changes) for seed, changes in odd.items()]
    for seed in (4,):
        lines = (tmp_path / f"off{seed}" / "metrics.jsonl").read_text().splitlines()
        extra = [json.dumps({"step": step, "train/loss": 1.0}) for step in range(5, 100, 10)]
        ordered = sorted([*lines, *extra], key=lambda line: json.loads(line)["step"])
        (tmp_path / f"off{seed}" / "metrics.jsonl").write_text("\n".join(ordered) + "\n")
    folders += [write_run(tmp_path / f"on{seed}", seed, arm="on", chrono_gates="clean", **usual) for seed in odd]
    runs, unreadable = load_runs(folders)
    arms, differing, left_out = group_into_arms(runs)
    assert not unreadable and not left_out
    assert {arm: len(members) for arm, members in arms.items()} == {"off": 6, "on": 6}
    assert no_verdict(analyse(arms), FIRST) is None
    assert differing["ranks"] == ["1", "2"] and "wandb_log" not in differing


def test_a_runs_arm_is_the_stored_one_and_has_to_fit_its_settings(tmp_path):
    with pytest.raises(UserError, match="its arm is 'on', but chrono_signal is 'load'"):
        load_run(write_run(tmp_path / "a", 1, arm="on", chrono_signal="load"))
    with pytest.raises(UserError, match="arm='best' must be one of"):
        load_run(write_run(tmp_path / "b", 1, arm="best"))
    old = write_run(tmp_path / "old", 1)
    config = json.loads((old / "config.json").read_text())
    del config["arm"]
    (old / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="without the arm"):
        load_run(old)
    assert load_run(write_run(tmp_path / "c", 1, arm=CUSTOM)).arm == CUSTOM


def test_every_arm_is_defined_and_named():
    for arm, settings in ARMS.items():
        flat = Settings().flat() | settings
        assert arm_of(flat) == arm
    assert arm_of(Settings().flat() | ARMS["load"] | {"chrono_eta": 0.5}) == CUSTOM


def test_every_setting_has_a_role_and_what_is_computed_is_compared():
    assert {key.role for key in keys().values()} <= ROLES.keys()
    compared = {name for name, key in keys().items() if key.role in COMPARED}
    free = {"seed", "arm", "out_dir", "init_from", "device", "backend", "dataset", "eval_only"}
    logging = {"log_interval", "always_save_checkpoint", "checkpoint_interval", "checkpoint_minutes"}
    logging |= {"chrono_lifecycle", "chrono_window"}
    prunes = {n for n in keys() if n.startswith(("chrono_prune", "chrono_unused", "chrono_starving"))}
    assert keys().keys() - compared == free | logging | prunes | {n for n in keys() if n.startswith("wandb")}


def test_runs_of_a_pair_come_from_the_same_code(tmp_path):
    other = {"code_sha256": "d", "history": [START | {"code_sha256": "d"}]}
    folders = [write_run(tmp_path / f"off{seed}", seed, **(other if seed == 3 else {})) for seed in range(4)]
    folders += [write_run(tmp_path / f"on{seed}", seed, arm="on", **(other if seed > 1 else {})) for seed in range(4)]
    mixed = [START, START | {"step": 50, "code_sha256": "d"}]
    folders += [write_run(tmp_path / f"{arm}4", 4, arm=arm, history=mixed) for arm in ("off", "on")]
    redone = [START | {"code_sha256": "d"}, START]  # killed before its first checkpoint
    folders += [write_run(tmp_path / f"{arm}5", 5, arm=arm, history=redone) for arm in ("off", "on")]
    arms, *_ = group_into_arms(load_runs(folders)[0])
    good, left_out = pairs(arms, "on", "off")
    assert [x.seed for x, _ in good] == [0, 1, 3, 5]
    assert len(left_out) == 2 and "seed 2" in left_out[0] and "seed 4" in left_out[1]
    assert analyse(arms).warnings == left_out


def test_a_run_whose_settings_changed_on_the_way_is_left_out(tmp_path):
    history = [
        START,
        START
        | {"step": 50, "changed": {"chrono_eta": [1e-4, 1e-3], "max_iters": [50, 100], "device": ["cuda", "cpu"]}},
    ]
    folders = [write_run(tmp_path / "a", 1, history=history[:1]), write_run(tmp_path / "b", 2, history=history)]
    runs, left_out = load_runs(folders)
    assert [run.seed for run in runs] == [1]
    (line,) = map(str, left_out)
    assert str(tmp_path / "b") in line and "another chrono_eta," in line


def test_runs_are_paired_by_seed_alone(tmp_path):
    folders = [write_run(tmp_path / f"a{seed}", seed) for seed in (1, 2, 3)]
    folders += [write_run(tmp_path / f"b{seed}", seed, arm="on") for seed in (3, 2, 7)]
    arms, differing, left_out = group_into_arms(load_runs(folders)[0])
    assert [(a.seed, b.seed) for a, b in pairs(arms, "on", "off")[0]] == [(2, 2), (3, 3)]
    assert differing == {"chrono_beta": ["false", "true"]} and not left_out
    assert list(arms) == ["off", "on"]


def lines_of(folder, change):
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("".join(line + "\n" for line in change(lines)))


def config_of(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


DAMAGE = [
    (lambda f: (f / "metrics.jsonl").unlink(), "no metrics.jsonl"),
    (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    (lambda f: (f / "config.json").write_text("[]"), "not that of a run"),
    (lambda f: config_of(f, eval_interval=0), "eval_interval=0 must be a whole number at least 1"),
    (lambda f: lines_of(f, lambda lines: [*lines[:-1], lines[-1][:-9]]), "line 11 of metrics.jsonl is cut"),
    (lambda f: lines_of(f, lambda lines: [*lines[:-1], '{"step": 100, "val/loss": null}']), "not a number"),
    (lambda f: lines_of(f, lambda lines: lines[:5]), "step 40 of 100, still training"),
    (lambda f: lines_of(f, lambda lines: lines[:8] + lines[9:]), "the evaluation of step 80 is missing"),
    (lambda f: lines_of(f, lambda lines: lines[1:]), "the evaluation of step 0 is missing"),
    (lambda f: lines_of(f, lambda lines: lines[:9] + lines[8:]), "step 80 is logged after step 80"),
    (lambda f: lines_of(f, lambda lines: [*lines, '{"step": 110, "val/loss": 2}']), "beyond its max_iters of 100"),
    (lambda f: config_of(f, log_interval=5), "the line of step 5 is missing"),
    (lambda f: config_of(f, max_iters=90), "beyond its max_iters of 90"),
    (lambda f: config_of(f, incomplete=["2 lines of metrics.jsonl are damaged"]), "logs are not whole: 2 lines of"),
    (lambda f: config_of(f, history=...), "no history of its starts"),
    (lambda f: config_of(f, history=["x"]), "no history of its starts"),
    (lambda f: config_of(f, weights_sha256="unknown"), "which weights it started from is not known"),
    (lambda f: (f / "decisions.jsonl").write_text("x"), "decisions.jsonl: cannot be read"),
    (lambda f: (f / "decisions.jsonl").write_text('{"x": 1}\n'), "decisions.jsonl: cannot be read ("),
    (lambda f: config_of(f, dataset=...), "dataset is missing"),
    (lambda f: config_of(f, arm=""), "there is no arm ''"),
    (lambda f: config_of(f, margin="0.1"), "margin='0.1' must be a number"),
    (lambda f: config_of(f, margin=True), "margin=True must be a number"),
    (
        lambda f: lines_of(f, lambda lines: [lines[0].replace("}", ', "x": "y"}'), *lines[1:]]),
        "a metric is not a number",
    ),
    (lambda f: (config_of(f, max_iters=0), lines_of(f, lambda lines: [])), "step 0 of 0"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGE, ids=[said for _, said in DAMAGE])
def test_a_run_that_cannot_be_used_is_left_out_with_one_line(tmp_path, damage, said):
    good, bad = write_run(tmp_path / "good", 1), write_run(tmp_path / "bad", 2)
    damage(bad)
    runs, left_out = load_runs([good, bad])
    assert [run.folder for run in runs] == [good]
    (reason,) = map(str, left_out)
    assert said in reason and str(bad) in reason and "\n" not in reason
    with pytest.raises(UserError):
        load_run(bad)


def test_a_run_that_was_made_longer_counts_with_the_evaluations_of_its_schedule(tmp_path):
    history = [START, START | {"step": 95, "changed": {"max_iters": [95, 100]}}]
    folder = write_run(tmp_path / "a", 1, history=history)
    extra = json.dumps({"step": 95, "val/loss": 50.0})
    lines_of(folder, lambda lines: [*lines[:-1], extra, lines[-1]])
    assert load_run(folder).series("val/loss")[0] == list(range(0, 101, 10))


def test_doubles_and_strangers_within_an_arm_are_left_out_and_other_versions_told(tmp_path):
    folders = [
        write_run(tmp_path / "stranger", 3, learning_rate=0.5),  # the first one does not decide
        write_run(tmp_path / "a", 1),
        write_run(tmp_path / "b", 1),
        write_run(tmp_path / "d", 2, threads=1),
    ]
    arms, differing, left_out = group_into_arms(load_runs(folders)[0])
    assert {Path(run.name).name for run in arms["off"].values()} == {"a", "d"}
    assert "learning_rate is 0.5, in" in left_out[0] and "seed 1 of arm 'off' is already" in left_out[1]
    assert differing["threads"] == ["1", "2"]


def test_time_to_a_loss_is_linear_between_evaluations(tmp_path):
    run = load_run(write_run(tmp_path / "a", 1))
    _, losses = run.series("val/loss")
    assert steps_to_loss(run, (losses[3] + losses[4]) / 2) == pytest.approx(35)
    assert steps_to_loss(run, 99) == 0 and math.isnan(steps_to_loss(run, 0))


def test_a_run_that_could_not_be_used_takes_the_verdict_away(tmp_path, capsys):
    """Or else the verdict would be about the runs that survived, and beta may be why others did not."""
    folders = write_study(tmp_path / "runs", effect=-0.05)
    for seed in (2, 5):
        lines_of(tmp_path / "runs" / f"on{seed}", lambda lines: lines[:5])
    out = f"--out_dir={tmp_path / 'report'}"
    compare.main([str(tmp_path / "runs"), out])
    said = capsys.readouterr().out
    assert said.startswith(
        "No verdict: runs of 'on' could not be used (seed 2, 5), and what they would show is not known"
    )
    assert "lower" not in said
    # the user's own choice of runs is another matter, and a run that is there twice is not lost
    chosen = [str(folder) for folder in folders if not folder.name.endswith(("2", "5"))]
    compare.main([*chosen, out])
    assert capsys.readouterr().out.startswith("Beta lowers the validation loss")
    write_run(tmp_path / "again", 2, -0.05, arm="on")
    write_run(tmp_path / "again5", 5, -0.05, arm="on")
    compare.main([*map(str, folders), str(tmp_path / "again"), str(tmp_path / "again5"), out])
    assert capsys.readouterr().out.startswith("Beta lowers the validation loss")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: (f / "config.json").write_text("{"),
        lambda f: (f / "config.json").unlink(),
        lambda f: config_of(f, arm=...),
        lambda f: config_of(f, seed=[1]),
        lambda f: config_of(f, arm=["on"]),
    ],
)
def test_a_run_whose_arm_or_seed_is_not_known_may_be_any(tmp_path, spoil, capsys):
    write_study(tmp_path / "runs", effect=-0.05)
    spoil(write_run(tmp_path / "runs" / "on99", 99, arm="on"))
    compare.main([str(tmp_path / "runs"), f"--out_dir={tmp_path / 'report'}"])
    assert capsys.readouterr().out.startswith("No verdict: runs of 'on' could not be used (seed ")


def test_a_folder_that_holds_no_run_takes_nothing_away(tmp_path, capsys):
    folders = write_study(tmp_path / "runs", effect=-0.05)
    (tmp_path / "figures").mkdir()
    compare.main([*map(str, folders), str(tmp_path / "figures"), f"--out_dir={tmp_path / 'report'}"])
    assert capsys.readouterr().out.startswith("Beta lowers the validation loss")


def test_a_study_changed_after_its_report_says_so(tmp_path, capsys):
    folders = write_study(tmp_path / "runs", effect=0.0, seeds=10)
    names = [f"--out_dir={tmp_path / 'report'}"]

    def said(runs):
        compare.main([*map(str, runs), *names])
        return [line for line in capsys.readouterr().out.splitlines() if "after its report was written" in line]

    on_off = [folder for folder in folders[:24] if not folder.name.startswith("shuffled")]
    assert not said(on_off)
    assert not said(on_off)  # the same again
    assert not said(folders[:24])  # another arm beside the same pairs
    (line,) = said(folders)
    assert "it had 8 pairs of 100 steps, now it has 10 of 100" in line
    assert line[2:] in (tmp_path / "report" / "report.html").read_text().replace("&#39;", "'")
    assert len(said(folders[:18])) == 2  # fewer pairs than either
    other = [
        write_run(tmp_path / f"{arm}{seed}", seed, arm=arm, learning_rate=0.1)
        for arm in ("off", "on")
        for seed in (1, 2)
    ]
    assert not said(other)  # another study in the same folder
    (tmp_path / "report" / "comparison.json").write_text("{}")
    for _ in range(2):  # and that is not forgotten
        compare.main([*map(str, folders), *names])
        assert "changed after an earlier report is not known" in capsys.readouterr().out


def test_an_undecided_study_never_asks_for_pairs_that_it_has(tmp_path):
    for seed, effect in enumerate([0.8, 1.0, 1.2, 1.0, 1.1, -0.01]):
        write_run(tmp_path / f"off{seed}", seed, margin=1.1)
        write_run(tmp_path / f"on{seed}", seed, effect / 0.9, arm="on", margin=1.1)
    analysis = analyse(group_into_arms(load_runs(tmp_path.iterdir())[0])[0])
    assert analysis.row(FIRST).contrast.p == pytest.approx(0.0625)
    assert conclusion(analysis).endswith("it takes more pairs, and how many cannot be told from these.")


def test_runs_that_begin_at_other_steps_or_with_another_vocabulary_get_no_verdict(tmp_path):
    for key, one in (("vocab_size", {"vocab_size": 600}), ("first_step", {"history": [START | {"step": 50}]})):
        arms = arms_of(tmp_path / key, effect=-0.5, changes={"on": one})
        assert conclusion(analyse(arms)).startswith(f"No verdict: 'on' and 'off' differ also in {key} (")


def test_arms_on_other_machines_are_told(tmp_path):
    analysis = analyse(arms_of(tmp_path, effect=0.0, changes={"on": {"torch": "2.11"}, "off": {"torch": "2.13"}}))
    assert any("'on' and 'off' differ in torch, and so perhaps in rounding" in line for line in analysis.warnings)


def test_a_plan_says_how_many_pairs_decide(tmp_path, capsys):
    write_study(tmp_path / "pilot", effect=0.0, noise=0.02)
    assert compare.main(["--plan", str(tmp_path / "pilot"), "--margin=0.02"]) == 0
    said = capsys.readouterr().out
    numbers = analyse(group_into_arms(load_runs((tmp_path / "pilot").iterdir())[0])[0]).row(FIRST).contrast
    n, low, high = numbers.pairs_to_decide
    assert f"{n} pairs ({low} to {high}) decide about a margin of 0.02 nats" in said
    with pytest.raises(UserError, match=r"margin='x' must be a number above 0"):
        compare.main(["--plan", str(tmp_path / "pilot"), "--margin=x"])
    with pytest.raises(UserError, match="margin=None must be a number"):
        compare.main(["--plan", str(tmp_path / "pilot"), "--margin=None"])
    with pytest.raises(UserError, match="no config"):
        compare.main(["--plan", str(tmp_path / "none"), "--margin=0.02"])
    with pytest.raises(UserError, match="--plan takes folders"):
        compare.main(["--plan", str(tmp_path / "pilot"), "--seeds=3"])
    compare.main(["--plan", str(tmp_path / "pilot"), "--margin=1e-6"])
    assert "over 100000 pairs (over 100000 to over 100000)" in capsys.readouterr().out


TINY = [
    *("--n_layer=1", "--n_head=1", "--n_embd=8", "--n_exp=3", "--block_size=8", "--batch_size=2", "--max_iters=8"),
    *("--eval_interval=2", "--eval_iters=2", "--log_interval=2", "--device=cpu", "--warmup_iters=0"),
]


def write_dataset(folder, seed=0):
    folder.mkdir()
    for split in ("train", "val"):
        np.random.default_rng(seed).integers(0, 11, 400).astype("<u2").tofile(folder / f"{split}.bin")
    (folder / "meta.json").write_text('{"vocab_size": 11}')
    return folder


@pytest.fixture(scope="module")
def small_study(tmp_path_factory):
    """(command, folder) of a finished study of two arms and two seeds, one run of which had stopped half-way."""
    folder = tmp_path_factory.mktemp("study")
    out = folder / "study"
    command = ["config/study.py", *TINY, f"--dataset={write_dataset(folder / 'data')}", "--seeds=2", "--arms=off,on"]
    command += ["--jobs=2", f"--out_dir={out}"]
    settings = [a for a in command if not a.startswith(("--seeds", "--arms", "--jobs", "--out_dir"))]
    stopped = [*settings, "--max_iters=4", "--arm=on", "--seed=1", f"--out_dir={out / 'on_seed1'}"]
    subprocess.run([sys.executable, "train.py", *stopped], cwd=ROOT, check=True, capture_output=True)
    done = subprocess.run([sys.executable, "compare.py", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "No verdict: 2 pairs" in done.stdout, done.stderr
    return command, out


def contents(folder):
    files = (p for p in folder.rglob("*") if p.is_file() and p.suffix in (".json", ".jsonl", ".pt", ".log"))
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def test_a_study_trains_every_arm_resumes_what_stopped_and_reports(small_study):
    _, out = small_study
    for name in ("off_seed1", "off_seed2", "on_seed1", "on_seed2"):
        steps = [json.loads(line)["step"] for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        assert steps == [0, 2, 4, 6, 8]
        assert json.loads((out / name / "config.json").read_text())["arm"] == name.split("_")[0]
    assert "resume:" in (out / "on_seed1" / "train.log").read_text()
    first = json.loads((out / "off_seed1" / "metrics.jsonl").read_text().splitlines()[0])
    same = json.loads((out / "on_seed1" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["val/loss"] == same["val/loss"]  # same seed: same initial weights
    numbers = json.loads((out / "comparison.json").read_text())
    assert numbers["primary"][0]["n"] == 2 and numbers["differing"]["chrono_beta"] == ["false", "true"]
    assert [p["top_k"] for p in numbers["probes"]["on"]] == [1, 2, 3]
    assert numbers["probes"]["on"][-1]["set_changed"] == 0  # every expert is chosen at top_k = E

    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 10 and "<script" not in page and 'src="' not in page and "@import" not in page
    assert page.index("No verdict") < page.index("<svg")
    report = (out / "report.md").read_text()
    assert all((out / line.split("(")[1].rstrip(")")).exists() for line in report.splitlines() if line[:2] == "![")


def test_finished_runs_are_kept_only_for_the_settings_data_and_arm_they_had(small_study, tmp_path, monkeypatch, capsys):
    command, out = small_study
    monkeypatch.chdir(ROOT)
    runs = {name: contents(out / name) for name in ("off_seed1", "off_seed2", "on_seed1", "on_seed2")}
    assert compare.main(command) == 0
    before = contents(out)
    assert runs == {name: contents(out / name) for name in runs}
    refused = {
        "--learning_rate=0.9": "off_seed1 holds a run with learning_rate=0.003, and learning_rate=0.9 is asked for",
        "--chrono_eta=0.5": "on_seed1 holds a run with chrono_eta=0.0001, and chrono_eta=0.5 is asked for",
        "--margin=0.5": "holds a run with margin=0.02, and margin=0.5 is asked for",
        "--max_iters=6": "holds a run with max_iters=8, and max_iters=6 is asked for",
    }
    for argument, said in refused.items():
        with pytest.raises(UserError) as error:
            compare.main([*command, argument])
        assert said in str(error.value) and "\n" not in str(error.value)
    data = tmp_path / "data"
    write_dataset(data, seed=1)
    with pytest.raises(UserError, match="holds a run with data_sha256="):
        compare.main([*command, f"--dataset={data}"])
    meta = Path(next(a for a in command if a.startswith("--dataset=")).partition("=")[2]) / "meta.json"
    meta.write_text('{"vocab_size": 600}')
    with pytest.raises(UserError, match="holds a run with vocab_size=11, and vocab_size=600"):
        compare.main(command)
    meta.write_text('{"vocab_size": 11}')
    shutil.copytree(out, tmp_path / "study")
    (tmp_path / "study" / "on_seed1").rename(tmp_path / "study" / "x")
    (tmp_path / "study" / "off_seed1").rename(tmp_path / "study" / "on_seed1")
    with pytest.raises(UserError, match=r"on_seed1 holds a run with (arm|chrono_beta)="):
        compare.main([*command, f"--out_dir={tmp_path / 'study'}"])
    assert before == contents(out)
    # beta is off there: what follows from eta is nothing
    assert compare.main([*command, "--chrono_eta=0.5", "--arms=off"]) == 0
    capsys.readouterr()


def test_a_study_of_more_steps_goes_on_from_the_finished_runs(small_study, tmp_path, monkeypatch, capsys):
    command, out = small_study
    monkeypatch.chdir(ROOT)
    shutil.copytree(out, tmp_path / "study")
    longer = [*command, "--max_iters=10", "--seeds=1", f"--out_dir={tmp_path / 'study'}"]
    assert compare.main(longer) == 0
    assert "left out" not in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in (tmp_path / "study/on_seed1/metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 2, 4, 6, 8, 10]


def test_a_study_starts_from_the_weights_that_its_config_names(small_study, tmp_path, monkeypatch):
    command, out = small_study
    monkeypatch.chdir(ROOT)
    config = tmp_path / "from_weights.py"
    source = out / "off_seed1" / "ckpt.pt"
    config.write_text(f"from config.study import *\ninit_from = {str(source)!r}\n")
    options = [a for a in command[1:] if not a.startswith(("--out_dir", "--seeds"))]
    own = [str(config), *options, "--max_iters=2", "--seeds=1", f"--out_dir={tmp_path / 'study'}"]
    assert compare.main(own) == 0
    found = [json.loads((tmp_path / "study" / f"{arm}_seed1" / "config.json").read_text()) for arm in ("off", "on")]
    assert found[0]["weights_sha256"] == found[1]["weights_sha256"] is not None
    assert {config["weights_from"] for config in found} == {str(source)}
    assert compare.main(own) == 0  # and finds them again
    with pytest.raises(UserError, match="holds a run with weights_sha256="):
        compare.main([*own, "--init_from=scratch"])
    with pytest.raises(UserError, match="init_from='resume'"):
        compare.main([*own, "--init_from=resume"])


def processes_of(folder):
    """Process ids of the train.py's that write into a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.endswith(b"train.py") for word in words) and str(folder).encode() in b" ".join(words):
            found.append(int(path.parent.name))
    return found


def wait_until(condition, seconds=40):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the runs' processes in /proc")
@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGHUP))],
    ids=lambda number: number.name,
)
def test_a_signal_to_the_study_ends_its_runs_saved_and_the_same_command_goes_on(tmp_path, number):
    out = tmp_path / "study"
    data = write_dataset(tmp_path / "data")
    command = [sys.executable, "compare.py", "config/study.py", *TINY, f"--dataset={data}", f"--out_dir={out}"]
    command += [
        "--max_iters=1000",
        "--eval_interval=500",
        "--log_interval=100",
        "--seeds=1",
        "--arms=off,on",
        "--jobs=2",
    ]
    logs = [out / f"{arm}_seed1" / "metrics.jsonl" for arm in ("off", "on")]
    with (tmp_path / "log").open("wb") as log:
        study = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        wait_until(lambda: all(path.exists() and path.stat().st_size > 0 for path in logs))
        study.send_signal(number)
        status = study.wait(30)
    assert status == (-number if number == signal.SIGKILL else 128 + number)
    assert "failed" not in (tmp_path / "log").read_text()
    if number == signal.SIGKILL:  # the same command at once, while the runs of the first are still ending
        again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert again.returncode == 0 and "failed" not in again.stdout + again.stderr
        assert all(json.loads(path.read_text().splitlines()[-1])["step"] == 1000 for path in logs)
        starts = [json.loads((path.parent / "config.json").read_text())["history"] for path in logs]
        assert all([start["step"] < 1000 for start in history] == [True, True] for history in starts)
        return
    assert not processes_of(tmp_path)
    assert all((path.parent / "ckpt.pt").exists() for path in logs)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["config/study.py", "--arms=of"], "there is no arm 'of'"),
        (["config/study.py", "--arms=on,on"], "an arm is there twice"),
        (["config/study.py", "--eval_only=True"], "a study trains its runs"),
        (["config/study.py", "--seeds=0"], "--seeds=0 must be a whole number"),
        (["config/study.py", "--seed=3"], "give --seeds=N"),
        (["config/study.py", "--chrono_bta=1"], "did you mean chrono_beta?"),
        (["out/none_there"], "no config.json"),
        (["config/study.py", "out/x"], "not both"),
    ],
)
def test_a_mistake_gets_one_line(arguments, said):
    with pytest.raises(UserError) as error:
        compare.main(arguments)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_arms_differ_from_on_only_in_what_drives_beta():
    driver = {"chrono_beta", "chrono_signal"}
    assert set(ARMS["off"]) | set(ARMS["on"]) | set(ARMS["shuffled"]) == driver
    assert ARMS["load"]["use_aux_loss"] is False and ARMS["load"]["chrono_gates"] == "clean"


class FakeRun:
    """A finished run as wandb.Api gives it."""

    job_type = "beta_on"

    def __init__(self, folder):
        run = load_run(folder)
        self.name, self.config, self.rows = folder.name, run.config | {"_wandb": {}}, run.lines

    def scan_history(self):
        return iter([row | {"_step": row["step"], "_timestamp": 1.0, "note": "x"} for row in reversed(self.rows)])


def test_runs_from_wandb_compare_as_those_on_disk(tmp_path, monkeypatch, capsys):
    import wandb

    folders = [write_run(tmp_path / f"off{seed}", seed) for seed in range(6)]
    folders += [write_run(tmp_path / f"on{seed}", seed, -0.2, arm="on") for seed in range(6)]
    fakes = [FakeRun(folder) for folder in folders]
    unfinished = FakeRun(folders[0])
    unfinished.rows = unfinished.rows[:3]
    comparison = FakeRun(folders[0])
    comparison.job_type = "comparison"
    monkeypatch.setattr(
        wandb, "Api", lambda: type("Api", (), {"runs": lambda self, _: [*fakes, unfinished, comparison]})()
    )
    monkeypatch.chdir(tmp_path)
    assert compare.main(["--wandb=entity/project"]) == 0
    said = capsys.readouterr().out
    assert "Beta lowers the validation loss" in said and "still training or stopped" in said
    theirs = json.loads((tmp_path / "out" / "wandb_comparison" / "comparison.json").read_text())
    compare.main([str(folder) for folder in folders])
    ours = json.loads((tmp_path / "comparison.json").read_text())
    assert theirs["primary"] == ours["primary"]


def test_a_run_from_wandb_is_refused_as_from_disk_and_has_no_checkpoint_here(tmp_path, monkeypatch):
    history = [START, START | {"step": 50, "changed": {"learning_rate": [1e-3, 1e-2]}}]
    resumed = write_run(tmp_path / "resumed", 1)
    source = FakeRun(resumed)
    source.config["history"] = history
    with pytest.raises(UserError, match="resumed with another learning_rate"):
        wandb_runs.load(source)
    source.config.pop("history")
    with pytest.raises(UserError, match="no history"):
        wandb_runs.load(source)
    # a folder of the same name here is another run's
    monkeypatch.chdir(tmp_path)
    run = wandb_runs.load(FakeRun(write_run(tmp_path / "mine", 1, arm="on")))
    assert run.name == "mine" and (tmp_path / "mine").is_dir()
    with pytest.raises(UserError, match="not here"):
        probe(run)


def test_a_digit_changed_in_a_finished_runs_logs_is_seen(small_study, tmp_path):
    _, out = small_study
    folder = tmp_path / "run"
    shutil.copytree(out / "on_seed1", folder)
    load_run(folder)
    text = (folder / "metrics.jsonl").read_text()
    place = text.rindex('"val/loss": ') + len('"val/loss": ')
    (folder / "metrics.jsonl").write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
    with pytest.raises(UserError, match=r"metrics\.jsonl is not what the run wrote"):
        load_run(folder)
    (folder / "metrics.jsonl").write_text(text)
    (folder / "decisions.jsonl").unlink()
    assert load_run(folder).decisions == []
    config_of(folder, max_iters=8.0, vocab_size=...)
    run = load_run(folder)
    assert run.steps == 8 and isinstance(run.steps, int) and run.config["vocab_size"] == 11


def test_the_probe_reads_the_last_checkpoint_or_none(small_study, tmp_path):
    _, out = small_study
    folder = tmp_path / "run"
    shutil.copytree(out / "on_seed1", folder)
    run = load_run(folder)
    assert len(probe(run, batches=1)) == 3
    content = bytearray((folder / "ckpt.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "ckpt.pt").write_bytes(content)
    assert (folder / "ckpt_previous.pt").exists()
    with pytest.raises(UserError, match=r"ckpt\.pt is damaged"):
        probe(run, batches=1)
    shutil.copy(folder / "ckpt_previous.pt", folder / "ckpt.pt")
    with pytest.raises(UserError, match="is of step 6, the run ended at 8"):
        probe(run, batches=1)
    shutil.copy(out / "on_seed2" / "ckpt.pt", folder / "ckpt.pt")
    with pytest.raises(UserError, match="is of another run: its seed is 2"):
        probe(run, batches=1)
    (folder / "ckpt.pt").unlink()
    with pytest.raises(UserError, match="there is no"):
        probe(run, batches=1)


def test_wandb_that_does_not_answer_gets_one_line(monkeypatch):
    import wandb

    def fail():
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(wandb, "Api", fail)
    with pytest.raises(UserError) as error:
        compare.main(["--wandb=entity/project"])
    assert "entity/project" in str(error.value) and "\n" not in str(error.value)


def test_the_comparison_is_an_offline_wandb_run_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folders = [write_run(tmp_path / f"{arm}{seed}", seed, arm=arm) for arm in ("on", "off") for seed in (1, 2)]
    assert compare.main([*map(str, folders), "--wandb_log=True"]) == 0
    assert "wandb sync" in capsys.readouterr().out
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    images = list((folder / "files" / "media" / "images").rglob("*.png"))
    assert len(images) >= 4 and list((folder / "files" / "media" / "table").rglob("*.json"))
