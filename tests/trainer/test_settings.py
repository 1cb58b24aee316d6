"""Settings of train.py: defaults, roles and ranges, arms, the loop's steps, and the config files in config/."""

import re

import pytest

import train
from tests.helpers.runs import ALL_ON, FULL, ROOT, TINY, arguments, error_of
from trainer.arms import ARMS
from trainer.environment import check_torch
from trainer.errors import UserError
from trainer.settings import from_arguments, keys

CONFIG_FILES = sorted(str(p) for p in (ROOT / "config").rglob("*.py") if p.name != "__init__.py")
SLICE, OFF, PLAIN = (str(ROOT / "config" / f"{name}.py") for name in ("vertical_slice", "beta_off", "plain"))
STEP_FILES = sorted(path for path in CONFIG_FILES if "/steps/" in path)
SWITCHES = list(ALL_ON)


def flat(*arguments):
    return from_arguments(list(arguments)).flat()


def differing(a, b):
    assert a.keys() == b.keys()
    return {key for key in a if a[key] != b[key]}


def test_keys_defaults_roles_and_allowed_values_are_the_recorded_ones():
    recorded = (ROOT / "tests" / "settings.txt").read_text().splitlines()
    found = [f"{key.name} | {key.default!r} | {key.role} | {key.expected()}" for key in keys().values()]
    assert ["key | default | role | allowed values", *found] == [re.sub(r" *\| ", " | ", line) for line in recorded]
    assert flat() == {name: key.default for name, key in keys().items()} | {"arm": "off"}


FOREVER = ("max_iters", "gradient_accumulation_steps", "eval_iters")  # settings whose largest value takes forever
LARGEST = {float: 9.9e37, int: 2**63 - 1}
EXTREMES = [(key.name, LARGEST[key.kind]) for key in keys().values() if key.kind in LARGEST and key.name not in FOREVER]
EXTREMES += [(key.name, 5e-324) for key in keys().values() if key.kind is float]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), EXTREMES)
def test_the_largest_and_smallest_number_of_a_setting_trains_or_is_one_line(name, value, dataset, out):
    switches = dict(use_aux_loss=True, use_router_z_loss=True, use_switch_tfm_init=True, train_capacity=1.0)
    settings = TINY | FULL | switches | dict(max_iters=1, eval_iters=1, dataset=dataset, out_dir=out)
    try:
        assert train.main(arguments(settings | {name: value})) == 0
    except UserError as e:
        assert f"{name}=" in str(e) or name == "block_size"  # the data are too short
        assert not out.exists()


def test_the_page_for_nanomoes_users_has_every_key_and_our_defaults():
    page = (ROOT / "docs" / "from_nanomoe.md").read_text()
    nanomoes = dict(re.findall(r"^\| `(\w+)` \| `.*?` \| `(.*?)` \|", page, flags=re.MULTILINE))
    (added,) = re.findall(r"^New keys: (.*?), and\sthose", page, flags=re.MULTILINE | re.DOTALL)
    ours = {key: str(value) for key, value in flat().items() if not key.startswith("chrono_")}
    assert nanomoes.items() <= ours.items() and ours.keys() - nanomoes.keys() == set(re.findall(r"`(\w+)`", added))


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


@pytest.mark.parametrize(("version", "notes"), [("2.11.0+cu130", 0), ("2.13.1", 0), ("2.14.0a0+git", 1), ("3.0.0", 1)])
def test_a_version_of_torch_that_is_not_tested_is_noted_and_an_old_one_refused(version, notes):
    assert len(check_torch(version)) == notes
    assert "install 2.11 to 2.13" in error_of(check_torch, "2.10.1")
