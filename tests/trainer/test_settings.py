"""Settings of train.py: recorded defaults and roles, arms, the loop's steps, and the config files in config/."""

import re

import pytest

from tests.helpers.runs import ALL_ON, ROOT, error_of
from trainer.arms import ARMS
from trainer.settings import from_arguments, keys

CONFIG_FILES = sorted(str(p) for p in (ROOT / "config").rglob("*.py") if p.name != "__init__.py")
SLICE, OFF, PLAIN = (str(ROOT / "config" / f"{name}.py") for name in ("vertical_slice", "beta_off", "plain"))
STEP_FILES = sorted(path for path in CONFIG_FILES if "/steps/" in path)
SWITCHES = list(ALL_ON)

ADDED = dict(seed=1337, arm="off", margin=None, norm_topk_prob=True, checkpoint_interval=0, checkpoint_minutes=10.0)
LOOP = dict(
    **dict(signal="coherence", k_max=0.3, eta=1e-4, tau=0.5, center=False, gates="biased", reference="mixture"),
    **dict(logit_std_alpha=0.99, alpha_fast=0.9, alpha_mid=0.99, alpha_slow=0.999, ema_debias=True, window=1000),
    **dict(bridge_signal="js", bridge_threshold=None, bridge_scope="batch", starving_phi=0.5, unused_after=1000),
    **dict(prune_phi=0.3, prune_min_tokens=1000, prune_min_updates=100, unused_tokens=100),
)
LOOP = dict.fromkeys(ALL_ON, False) | {f"chrono_{name}": value for name, value in LOOP.items()}
# every other key has the role 'computed'
ROLES = {
    "model": "block_size n_layer n_head n_embd bias n_exp use_noisy_top_k stride",
    "data": "dataset",
    "numerics": "dtype compile",
    "length": "max_iters",
    "machine": "backend device",
    "logging": "log_interval always_save_checkpoint checkpoint_interval checkpoint_minutes chrono_lifecycle "
    "chrono_window chrono_prune_phi chrono_prune_min_tokens chrono_prune_min_updates chrono_unused_tokens "
    "chrono_unused_after chrono_starving_phi",
    "start": "out_dir init_from eval_only wandb_log wandb_project wandb_run_name",
    "study": "margin",
    "arm": "arm",
    "seed": "seed",
}

# allowed values; every other key takes a string, or True or False
ALLOWED = {
    "a whole number at least 0": "seed checkpoint_interval min_capacity max_iters warmup_iters lr_decay_iters "
    "chrono_prune_min_tokens chrono_prune_min_updates chrono_unused_tokens chrono_unused_after",
    "a whole number at least 1": "eval_interval eval_iters log_interval gradient_accumulation_steps batch_size "
    "block_size n_layer n_head n_embd n_exp top_k stride chrono_window",
    "a number at least 0": "checkpoint_minutes aux_loss_weight router_z_loss_weight learning_rate weight_decay "
    "grad_clip min_lr chrono_k_max chrono_eta",
    "a number at least 0 and below 1": "dropout beta1 beta2 chrono_logit_std_alpha chrono_alpha_fast "
    "chrono_alpha_mid chrono_alpha_slow",
    "a number at least -1 and at most 1": "chrono_tau chrono_prune_phi chrono_starving_phi",
    "a number above 0": "switch_tfm_init_scale",
    "a number above 0 or None": "margin train_capacity eval_capacity chrono_bridge_threshold",
    "one of 'auto', 'float32', 'bfloat16', 'float16'": "dtype",
    "one of '', 'off', 'on', 'shuffled', 'load', 'custom'": "arm",
    "one of 'coherence', 'shuffled', 'load'": "chrono_signal",
    "one of 'biased', 'clean'": "chrono_gates",
    "one of 'mixture', 'leave_one_out'": "chrono_reference",
    "one of 'js', 'overlap'": "chrono_bridge_signal",
    "one of 'batch', 'token'": "chrono_bridge_scope",
}


def flat(*arguments):
    return from_arguments(list(arguments)).flat()


def differing(a, b):
    assert a.keys() == b.keys()
    return {key for key in a if a[key] != b[key]}


def test_keys_and_defaults_are_those_of_the_page_for_nanomoes_users_and_the_recorded_ones():
    page = (ROOT / "docs" / "from_nanomoe.md").read_text()
    (added,) = re.findall(r"^New keys: (.*?), and those", page, flags=re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", added)) == ADDED.keys()
    nanomoes = dict(re.findall(r"^\| `(\w+)` \| `.*?` \| `(.*?)` \|", page, flags=re.MULTILINE))
    recorded = {key: str(value) for key, value in (ADDED | LOOP).items()}
    assert {key: str(value) for key, value in flat().items()} == nanomoes | recorded


def test_roles_and_allowed_values_are_the_recorded_ones():
    def by_key(recorded):
        return {name: value for value, names in recorded.items() for name in names.split()}

    assert {name: key.role for name, key in keys().items() if key.role != "computed"} == by_key(ROLES)
    plain = ("a string", "True or False")
    assert {name: key.expected() for name, key in keys().items() if key.expected() not in plain} == by_key(ALLOWED)


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_step_runs_with_experts_and_the_steps_that_it_needs_only(switch):
    needs = {"beta": ("router", "coherence"), "bridge": ("router",), "lifecycle": ("coherence",)}
    on = [switch, *(f"chrono_{name}" for name in needs.get(switch.removeprefix("chrono_"), ()))]
    found = flat("--n_exp=2", *(f"--{key}" for key in on))
    assert {key for key in SWITCHES if found[key]} == set(on)
    assert "set n_exp above 1" in error_of(flat, *(f"--{key}" for key in on))
    for missing in on[1:]:
        message = error_of(flat, "--n_exp=2", *(f"--{key}" for key in on if key != missing))
        assert f"{switch}=True needs {missing}=True" in message


def test_an_arm_sets_its_keys_over_config_files_and_contradicts_no_explicit_key(tmp_path):
    def config(text):
        (tmp_path / "own.py").write_text(text)
        return str(tmp_path / "own.py")

    load = flat(SLICE, "--arm=load")
    assert {key: load[key] for key in ARMS["load"]} == ARMS["load"] and load["arm"] == "load"
    contradiction = "chrono_eta=0.5, but arm='load' means chrono_eta=0.001: leave one"
    assert contradiction in error_of(flat, SLICE, "--arm=load", "--chrono_eta=0.5")
    wrong = config("from config.vertical_slice import *\narm = 'off'\n")
    assert "chrono_beta=True, but arm='off' means chrono_beta=False" in error_of(flat, wrong)
    assert flat(wrong, "--arm=shuffled")["chrono_signal"] == "shuffled"
    assert flat(wrong, "--arm=")["arm"] == "on"
    assert flat(config("from config.beta_off import *\narm = 'off'\n"))["arm"] == "off"
    assert flat(SLICE, "--chrono_signal=load")["arm"] == "custom"


def test_every_config_file_loads_and_differs_from_the_slice_only_as_it_says():
    assert {SLICE, OFF, PLAIN, *STEP_FILES} <= set(CONFIG_FILES) and len(STEP_FILES) == 5
    found = [flat(path) for path in CONFIG_FILES]
    assert all(differing(settings, flat()) for settings in found)
    assert len({settings["out_dir"] for settings in found}) == len(found)
    on = flat(SLICE)
    assert [on[key] for key in SWITCHES] == [True] * 5
    assert differing(on, flat(OFF)) == {"arm", "chrono_beta", "out_dir"}
    assert differing(on, flat(PLAIN)) == {*SWITCHES, "arm", "out_dir"}
    for i, path in enumerate(STEP_FILES):
        before, after = flat(STEP_FILES[i - 1] if i else PLAIN), flat(path)
        arm = {"arm"} if SWITCHES[i] == "chrono_beta" else set()
        assert differing(before, after) == {SWITCHES[i], "out_dir"} | arm
        assert [after[key] for key in SWITCHES] == [j <= i for j in range(5)]
    assert differing(on, after) == {"out_dir"}
