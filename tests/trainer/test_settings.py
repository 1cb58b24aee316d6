"""Settings: the documented keys and defaults, one line for every mistake, and config files that say what they mean."""

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from trainer import errors
from trainer.arms import ARMS
from trainer.errors import UserError
from trainer.settings import from_arguments, keys

ROOT = Path(__file__).parents[2]
CONFIG_FILES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "config").rglob("*.py") if p.name != "__init__.py")
SWITCHES = ["chrono_router", "chrono_coherence", "chrono_beta", "chrono_bridge", "chrono_lifecycle"]
STEP_FILES = [
    "config/steps/step1_router.py",
    "config/steps/step2_coherence.py",
    "config/steps/step3_beta.py",
    "config/steps/step4_bridge.py",
    "config/steps/step5_lifecycle.py",
]

# The tables of the design page and of nanoMoE's train.py, written out by hand.
CHRONO = dict.fromkeys(SWITCHES, False) | {
    "chrono_signal": "coherence",
    "chrono_k_max": 0.3,
    "chrono_eta": 1e-4,
    "chrono_tau": 0.5,
    "chrono_center": False,
    "chrono_gates": "biased",
    "chrono_logit_std_alpha": 0.99,
    "chrono_alpha_fast": 0.9,
    "chrono_alpha_mid": 0.99,
    "chrono_alpha_slow": 0.999,
    "chrono_ema_debias": True,
    "chrono_reference": "mixture",
    "chrono_window": 1000,
    "chrono_bridge_signal": "js",
    "chrono_bridge_threshold": None,
    "chrono_bridge_scope": "batch",
    "chrono_prune_phi": 0.3,
    "chrono_prune_min_tokens": 1000,
    "chrono_prune_min_updates": 100,
    "chrono_unused_tokens": 100,
    "chrono_unused_after": 1000,
    "chrono_starving_phi": 0.5,
}
NANOMOE = {
    "out_dir": "out",
    "eval_interval": 2000,
    "log_interval": 1,
    "eval_iters": 200,
    "eval_only": False,
    "always_save_checkpoint": True,
    "checkpoint_interval": 0,
    "checkpoint_minutes": 10.0,
    "init_from": "scratch",
    "wandb_log": True,
    "wandb_project": "nano-moe",
    "wandb_run_name": "gpt2-124M-owt",
    "dataset": "openwebtext",
    "gradient_accumulation_steps": 40,
    "batch_size": 12,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "dropout": 0.0,
    "bias": False,
    "n_exp": 1,
    "top_k": 2,
    "use_aux_loss": False,
    "use_router_z_loss": False,
    "use_noisy_top_k": False,
    "aux_loss_weight": 0.001,
    "router_z_loss_weight": 0.01,
    "train_capacity": 1.25,
    "eval_capacity": 2.0,
    "min_capacity": 4,
    "stride": 2,
    "use_switch_tfm_init": False,
    "switch_tfm_init_scale": 1.0,
    "router_use_full_prec": False,
    "learning_rate": 6e-4,
    "max_iters": 600000,
    "weight_decay": 1e-1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "decay_lr": True,
    "warmup_iters": 2000,
    "lr_decay_iters": 600000,
    "min_lr": 6e-5,
    "backend": "nccl",
    "device": "cuda",
    "dtype": "float16",
    "compile": True,
}
OTHERWISE_THAN_NANOMOE = {
    "wandb_log": False,
    "wandb_project": "nano-chronomoe",
    "wandb_run_name": "",
    "train_capacity": None,
    "eval_capacity": None,
    "device": "auto",
    "dtype": "auto",
    "compile": False,
}
DEFAULTS = NANOMOE | OTHERWISE_THAN_NANOMOE | CHRONO
DEFAULTS |= {"seed": 1337, "arm": "off", "margin": None, "norm_topk_prob": True}
CHOICES = {
    "init_from": ["scratch", "resume"],
    "dtype": ["auto", "float32", "bfloat16", "float16"],
    "chrono_signal": ["coherence", "shuffled", "load"],
    "chrono_gates": ["biased", "clean"],
    "chrono_reference": ["mixture", "leave_one_out"],
    "chrono_bridge_signal": ["js", "overlap"],
    "chrono_bridge_scope": ["batch", "token"],
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def flat(*arguments):
    return from_arguments(list(arguments)).flat()


def differing(a, b):
    assert a.keys() == b.keys()
    return {key for key in a if a[key] != b[key]}


def refusal(arguments, monkeypatch, capfd):
    """The one line that `python train.py arguments` leaves on stderr, run in this process; exit status 2."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        errors.run(train.main)
    out, err = capfd.readouterr()
    assert exit.value.code == 2
    assert out == ""
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    return err


def write(tmp_path, text, name="own.py"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_keys_and_defaults_are_the_documented_ones():
    found = flat()
    assert found == DEFAULTS
    assert {key: type(value) for key, value in found.items()} == {key: type(v) for key, v in DEFAULTS.items()}


def test_help_lists_every_key_with_default_meaning_and_choices(capsys):
    assert train.main(["--help"]) == 0
    text = capsys.readouterr().out
    listed = re.findall(r"^  (\w+) = (.+)\n      (\S.+)$", text, flags=re.MULTILINE)
    assert {name: ast.literal_eval(default) for name, default, _ in listed} == DEFAULTS | {"arm": ""}
    assert len(listed) == len(DEFAULTS)
    meanings = {name: meaning for name, _, meaning in listed}
    assert [name for name, key in keys().items() if not meanings[name].startswith(key.metadata["help"])] == []
    for name, choices in CHOICES.items():
        # the default is beside the name
        assert [c for c in choices if c not in meanings[name] and c != DEFAULTS[name]] == []


@pytest.mark.parametrize("name", CHOICES)
def test_every_documented_choice_is_taken(name):
    for choice in CHOICES[name]:
        assert flat(f"--{name}={choice}")[name] == choice


@pytest.mark.parametrize(
    "arguments, expected",
    [
        pytest.param(["--n_exps=4"], ["--n_exps=4", "'n_exps'", "did you mean n_exp?"], id="wrong_key"),
        pytest.param(["--chrono_bta=True"], ["'chrono_bta'", "did you mean chrono_beta?"], id="wrong_chrono_key"),
        pytest.param(["--zzz=1"], ["'zzz'", "--help"], id="key_like_no_other"),
        pytest.param(["--n_exp"], ["--n_exp", "--key=value"], id="no_value"),
        pytest.param(["-n_exp=4"], ["-n_exp=4", "--key=value"], id="one_dash"),
        pytest.param(
            ["--n_exp=many"], ["command line", "n_exp='many'", "a whole number at least 1"], id="word_for_int"
        ),
        pytest.param(["--n_exp=2.5"], ["n_exp=2.5", "a whole number at least 1"], id="fraction_for_int"),
        pytest.param(["--n_exp=True"], ["n_exp=True", "a whole number at least 1"], id="bool_for_int"),
        pytest.param(["--n_layer=None"], ["n_layer=None", "a whole number at least 1"], id="none_for_int"),
        pytest.param(["--compile=1"], ["compile=1", "True or False"], id="int_for_bool"),
        pytest.param(["--chrono_router=true"], ["chrono_router='true'", "True or False"], id="lower_case_bool"),
        pytest.param(["--learning_rate=fast"], ["learning_rate='fast'", "a number at least 0"], id="word_for_float"),
        pytest.param(["--train_capacity=big"], ["train_capacity='big'", "a number above 0 or None"], id="capacity"),
        pytest.param(["--n_layer=0"], ["n_layer=0", "at least 1"], id="below_least"),
        pytest.param(["--dropout=1.0"], ["dropout=1.0", "at least 0 and below 1"], id="not_below"),
        pytest.param(["--chrono_alpha_slow=1.0"], ["chrono_alpha_slow=1.0", "below 1"], id="alpha_of_one"),
        pytest.param(["--chrono_tau=1.5"], ["chrono_tau=1.5", "at least -1 and at most 1"], id="above_most"),
        pytest.param(["--chrono_bridge_threshold=0"], ["chrono_bridge_threshold=0", "above 0"], id="not_above"),
        pytest.param(["--chrono_k_max=-1"], ["chrono_k_max=-1", "at least 0"], id="negative"),
        pytest.param(["--seed=-1"], ["seed=-1", "at least 0"], id="negative_seed"),
        pytest.param(["--min_lr=nan"], ["min_lr='nan'", "a number at least 0"], id="nan"),
        pytest.param(["--min_lr=1e999"], ["min_lr=inf", "number at least 0"], id="infinite_float"),
        pytest.param(["--max_iters=1e999"], ["max_iters=", "a whole number at least 0"], id="infinite_int"),
        pytest.param(["--min_lr=1" + "0" * 400], ["min_lr=", "a number"], id="int_beyond_float"),
        pytest.param(["--n_exp={[]: 1}"], ["n_exp=", "a whole number at least 1"], id="impossible_literal"),
        pytest.param(["--chrono_signal=coherenc"], ["'shuffled'", "did you mean 'coherence'?"], id="choice"),
        pytest.param(["--dtype=bf16"], ["dtype='bf16'", "did you mean 'bfloat16'?"], id="dtype"),
        pytest.param(["--init_from=gtp2"], ["init_from='gtp2'", "did you mean 'gpt2'"], id="init_from"),
        pytest.param(["--n_exp=4", "--top_k=5"], ["top_k=5", "n_exp=4"], id="top_k_above_n_exp"),
        pytest.param(["--n_embd=10", "--n_head=3"], ["n_embd=10", "n_head=3"], id="heads"),
        pytest.param(
            ["config/vertical_slce.py"],
            ["config/vertical_slce.py", "No such file", "did you mean config/vertical_slice.py?"],
            id="missing_config_file",
        ),
        pytest.param(["config"], ["config", "directory"], id="folder_as_config_file"),
    ],
)
def test_a_mistake_on_the_command_line_gets_one_line(arguments, expected, monkeypatch, capfd):
    line = refusal(arguments, monkeypatch, capfd)
    assert [part for part in expected if part not in line] == [], line


def test_a_seed_that_the_generators_cannot_take_gets_one_line(tmp_path, monkeypatch, capfd):
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        (tmp_path / "data" / f"{split}.bin").write_bytes(bytes(200))
    small = ["--n_layer=1", "--n_head=1", "--n_embd=4", "--block_size=4", "--device=cpu", "--max_iters=0"]
    run = [f"--dataset={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}", *small]
    assert "seed" in refusal([*run, f"--seed={10**20}"], monkeypatch, capfd)


@pytest.mark.parametrize(
    "device",
    ["banana", pytest.param("cuda:63", id="absent_gpu"), pytest.param("meta", id="device_without_data"), ""],
)
def test_a_device_that_cannot_train_gets_one_line(device, tmp_path, monkeypatch, capfd):
    line = refusal([f"--device={device}", f"--dataset={tmp_path}", f"--out_dir={tmp_path}"], monkeypatch, capfd)
    assert f"device={device!r}" in line
    assert "--device=cpu" in line


@pytest.mark.parametrize(
    "on, needed",
    [
        ({"chrono_beta", "chrono_coherence"}, "chrono_router=True"),
        ({"chrono_beta", "chrono_router"}, "chrono_coherence=True"),
        ({"chrono_bridge", "chrono_coherence"}, "chrono_router=True"),
        ({"chrono_lifecycle", "chrono_router"}, "chrono_coherence=True"),
    ],
)
def test_a_step_without_one_that_it_reads_from_gets_one_line(on, needed, monkeypatch, capfd):
    arguments = ["--n_exp=4", *(f"--{key}=True" for key in on)]
    step = next(key for key in SWITCHES[2:] if key in on)
    line = refusal(arguments, monkeypatch, capfd)
    assert f"{step}=True" in line
    assert needed in line
    assert flat(*arguments, f"--{needed}")[step] is True


@pytest.mark.parametrize("step", SWITCHES)
def test_a_step_in_a_dense_model_gets_one_line(step, monkeypatch, capfd):
    on = {step, *(["chrono_router"] if step in ("chrono_beta", "chrono_bridge") else [])}
    on |= {"chrono_coherence"} if step in ("chrono_beta", "chrono_lifecycle") else set()
    arguments = [f"--{key}=True" for key in on]
    assert "n_exp" in refusal(arguments, monkeypatch, capfd)
    assert flat(*arguments, "--n_exp=2")[step] is True


@pytest.mark.parametrize(
    "text, expected",
    [
        pytest.param("n_exp = 4\nn_layer = = 3\n", ["line 2", "invalid syntax"], id="syntax"),
        pytest.param("n_exp = 4\n\nn_layer = 1 // 0\n", ["line 3", "ZeroDivisionError"], id="raises"),
        pytest.param("import no_such_module\n", ["line 1", "no_such_module"], id="import"),
        pytest.param("raise ValueError('one\\ntwo')\n", ["line 1", "ValueError", "one"], id="raises_two_lines"),
        pytest.param("n_exps = 4\n", ["'n_exps'", "did you mean n_exp?"], id="unknown_variable"),
        pytest.param("n_exp = 4\nhalf = n_exp // 2\n", ["'half'"], id="helper_variable"),
        pytest.param("n_exp = 'four'\n", ["n_exp='four'", "a whole number at least 1"], id="wrong_type"),
        pytest.param("n_exp = [4]\n", ["n_exp=[4]", "a whole number at least 1"], id="list"),
        pytest.param("dropout = 2\n", ["dropout=2", "below 1"], id="out_of_range"),
        pytest.param("max_iters = float('nan')\n", ["max_iters=nan", "a whole number"], id="nan_for_int"),
        pytest.param("max_iters = float('inf')\n", ["max_iters=inf", "a whole number"], id="infinite_int"),
    ],
)
def test_a_mistake_in_a_config_file_gets_one_line_that_names_the_file(text, expected, tmp_path, monkeypatch, capfd):
    path = write(tmp_path, text)
    line = refusal([path], monkeypatch, capfd)
    assert path in line
    assert [part for part in expected if part not in line] == [], line


def test_a_config_file_that_is_not_text_gets_one_line(tmp_path, monkeypatch, capfd):
    (tmp_path / "own.py").write_bytes(b"n_exp = 4  # \xff\n")
    assert "not UTF-8" in refusal([str(tmp_path / "own.py")], monkeypatch, capfd)


def test_a_syntax_error_in_an_imported_config_file_names_that_file(tmp_path, monkeypatch, capfd):
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path, "n_exp = 4\nn_layer = = 3\n", "imported_with_a_mistake.py")
    path = write(tmp_path, "# one\n# two\n# three\nfrom imported_with_a_mistake import *\n")
    line = refusal([path], monkeypatch, capfd)
    assert "imported_with_a_mistake.py, line 2" in line


def test_the_real_program_prints_one_line_and_exits_with_status_2(tmp_path):
    broken = write(tmp_path, "n_exp = 4\nn_layer = = 3\n")
    cases = {
        ("--chrono_bta=True",): "did you mean chrono_beta?",
        (broken,): f"{broken}, line 2",
        ("config/plain.py", "--chrono_router=True", "--chrono_beta=True"): "needs chrono_coherence=True",
    }
    command = [sys.executable, "train.py"]
    pipes = dict(cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = {case: subprocess.Popen([*command, *case], env=environment, **pipes) for case in cases}
    for case, process in running.items():
        out, err = process.communicate(timeout=60)
        assert process.returncode == 2
        assert out == ""
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        assert cases[case] in err


def test_values_take_the_type_of_their_key():
    found = flat("--learning_rate=1", "--max_iters=1e3", "--n_exp=4.0", "--wandb_run_name=1e3", "--train_capacity=2")
    values = [found[key] for key in ("learning_rate", "max_iters", "n_exp", "wandb_run_name", "train_capacity")]
    assert values == [1.0, 1000, 4, "1e3", 2.0]
    assert [type(value) for value in values] == [float, int, int, str, float]
    assert flat("--train_capacity=2", "--train_capacity=None")["train_capacity"] is None
    assert flat("--wandb_run_name=a=b")["wandb_run_name"] == "a=b"


def test_later_files_win_and_the_command_line_wins_over_all_wherever_it_stands(tmp_path):
    first = write(tmp_path, "n_exp = 4\nbatch_size = 3\nseed = 1\n", "first.py")
    second = write(tmp_path, "batch_size = 5\nseed = 2\n", "second.py")
    found = flat(first, second)
    assert (found["n_exp"], found["batch_size"], found["seed"]) == (4, 5, 2)
    assert flat(second, first)["batch_size"] == 3
    for arguments in (["--seed=7", first, second], [first, "--seed=7", second], [first, second, "--seed=7"]):
        found = flat(*arguments)
        assert (found["n_exp"], found["batch_size"], found["seed"]) == (4, 5, 7)
    assert differing(flat(first), flat()) == {"n_exp", "batch_size", "seed"}


def test_a_config_file_may_hold_python(tmp_path):
    text = """
import math
import time
from pathlib import Path

_experts = 4


def half(n):
    return n // 2


class Shape:
    width = 8 * half(16)


sizes = [2, 4]
wandb_run_name = "run " + time.strftime("%Y")
n_exp = _experts
top_k = half(n_exp)
n_embd, n_head = Shape.width, sizes[1]
max_iters = 5 * 8
lr_decay_iters = max_iters
min_lr = 1e-3 / 10
learning_rate = math.sqrt(1e-6)
"""
    found = flat(write(tmp_path, text))
    expected = {
        "wandb_run_name": "run " + time.strftime("%Y"),
        "n_exp": 4,
        "n_embd": 64,
        "n_head": 4,
        "max_iters": 40,
        "lr_decay_iters": 40,
        "min_lr": 1e-4,
        "learning_rate": pytest.approx(1e-3),
    }
    # top_k is half of 4, which is its default
    assert found["top_k"] == 2
    assert {key: found[key] for key in differing(found, DEFAULTS)} == expected


def test_every_config_file_loads():
    assert set(CONFIG_FILES) >= {"config/vertical_slice.py", "config/beta_off.py", "config/plain.py", *STEP_FILES}
    folders = []
    for path in CONFIG_FILES:
        found = flat(str(ROOT / path))
        assert differing(found, DEFAULTS)
        folders.append(found["out_dir"])
    # so that one run does not meet another's files
    assert len(set(folders)) == len(folders)


def test_the_vertical_slice_has_all_five_steps_on():
    found = flat("config/vertical_slice.py")
    assert [found[key] for key in SWITCHES] == [True] * 5


def test_an_arm_sets_its_keys_over_config_files_and_contradicts_no_explicit_key(tmp_path):
    load = flat("config/vertical_slice.py", "--arm=load")
    assert {key: load[key] for key in ARMS["load"]} == ARMS["load"] and load["arm"] == "load"
    with pytest.raises(UserError, match=r"chrono_eta=0\.5, but arm='load' means chrono_eta=0\.001"):
        from_arguments(["config/vertical_slice.py", "--arm=load", "--chrono_eta=0.5"])
    wrong = write(tmp_path, "from config.vertical_slice import *\narm = 'off'\n")
    with pytest.raises(UserError, match="chrono_beta=True, but arm='off' means chrono_beta=False"):
        from_arguments([wrong])
    assert flat(wrong, "--arm=shuffled")["chrono_signal"] == "shuffled"
    assert flat(write(tmp_path, "from config.beta_off import *\narm = 'off'\n"))["arm"] == "off"
    with pytest.raises(UserError, match=r"chrono_beta=True \(arm='load' sets it\) needs chrono_router=True"):
        from_arguments(["--n_exp=4", "--arm=load"])


def test_beta_off_differs_from_the_slice_in_beta_alone():
    off = flat("config/beta_off.py")
    assert differing(flat("config/vertical_slice.py"), off) == {"arm", "chrono_beta", "out_dir"}
    assert off["chrono_beta"] is False


def test_plain_differs_from_the_slice_in_the_five_switches_alone():
    plain = flat("config/plain.py")
    assert differing(flat("config/vertical_slice.py"), plain) == {*SWITCHES, "arm", "out_dir"}
    assert not any(plain[key] for key in SWITCHES)


@pytest.mark.parametrize("step", range(5))
def test_each_step_file_turns_on_one_more_switch(step):
    before = flat(STEP_FILES[step - 1] if step else "config/plain.py")
    after = flat(STEP_FILES[step])
    arm = {"arm"} if SWITCHES[step] == "chrono_beta" else set()
    assert differing(before, after) == {SWITCHES[step], "out_dir"} | arm
    assert [after[key] for key in SWITCHES] == [i <= step for i in range(5)]


def test_the_last_step_file_is_the_vertical_slice():
    assert differing(flat("config/vertical_slice.py"), flat(STEP_FILES[-1])) == {"out_dir"}


def test_the_page_for_nanomoes_users_has_every_setting_and_our_defaults():
    page = (ROOT / "docs" / "from_nanomoe.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| `(.*?)` \|", page, flags=re.MULTILINE)
    ours = {name: default for name, _, default in rows}
    new = {"seed", "arm", "margin", "norm_topk_prob", "checkpoint_interval", "checkpoint_minutes"}
    expected = {name for name in DEFAULTS if not name.startswith("chrono_")} - new
    (listed,) = re.findall(r"^New keys: (.*?), and those", page, flags=re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", listed)) == new
    assert ours.keys() == expected
    assert ours == {name: str(DEFAULTS[name]) for name in expected}
