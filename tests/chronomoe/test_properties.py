"""Files and settings with random contents cause one clear line, never a traceback."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comparison.runs import load_run
from comparison.sweep import Job
from trainer.checkpoint import newest
from trainer.cli import read_config_file
from trainer.data import read_meta
from trainer.errors import UserError
from trainer.files import JsonLines, parse_json
from trainer.runlog import history_in
from trainer.settings import from_arguments, keys

often = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def nested(inner):
    return st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
json_values = st.recursive(scalars, nested, max_leaves=8)
objects = st.dictionaries(st.sampled_from(["vocab_size", "sha256", "seed", "max_iters", "history"]), json_values)
deep = [b"[" * 5_000, b'{"a":' * 5_000, b"1" * 5_000, b"\xff\xfe{", b"\0" * 50, b"NaN", b"1e999"]
text = st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass"))
# almost valid contents find more than noise
contents = st.binary(max_size=200) | text | (json_values | objects).map(lambda x: json.dumps(x).encode())
contents |= st.sampled_from(deep)
odd = ["", "None", "True", "[]", "()", "-0", "1e400", "nan", "inf", "'", "0x", "9" * 5000, "(" * 300, "\0"]
lists = st.recursive(st.integers(), lambda inner: st.lists(inner, max_size=3), max_leaves=5)
values = st.text(max_size=12) | (st.integers() | st.floats()).map(str) | st.sampled_from(odd) | lists.map(repr)


def works_or_is_refused(action):
    """Call action, which may raise a UserError of one line."""
    try:
        return action()
    except UserError as e:
        assert str(e) and "\n" not in str(e)
        return None


@often
@given(st.lists(st.tuples(st.sampled_from(sorted(keys())) | st.text(max_size=8), values), min_size=1, max_size=4))
def test_settings_on_the_command_line_and_in_a_config_file(tmp_path, pairs):
    works_or_is_refused(lambda: from_arguments([f"--{key}={value}" for key, value in pairs]))
    path = tmp_path / "config.py"
    path.write_bytes("\n".join(f"{key} = {value}" for key, value in pairs).encode("utf-8", "replace"))
    works_or_is_refused(lambda: read_config_file(str(path), keys()))


@pytest.mark.parametrize("name", ["meta.json", "meta.pkl", "ckpt.pt"])
@often
@given(content=contents)
def test_a_file_with_any_contents(name, tmp_path, content):
    (tmp_path / name).write_bytes(content)
    result = works_or_is_refused(lambda: newest(tmp_path) if name == "ckpt.pt" else read_meta(tmp_path))
    assert name != "ckpt.pt" or result is None


@often
@given(contents, objects, json_values)
def test_a_run_whose_files_have_any_contents(tmp_path, content, config, value):
    valid = json.dumps({"seed": 1, "max_iters": 1} | config).encode()
    for of_config, line in ((content, {"step": 1}), (valid, {"step": value, "val/loss": value})):
        (tmp_path / "config.json").write_bytes(of_config)
        (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (tmp_path / "decisions.jsonl").write_text(json.dumps(value) + "\n")
        assert isinstance(history_in(tmp_path / "config.json"), list)
        works_or_is_refused(lambda: load_run(tmp_path))


@often
@given(st.lists(contents | st.integers(0, 5).map(lambda n: b'{"step": %d}' % n)), st.none() | st.integers(0, 6))
def test_lines_of_metrics_jsonl_that_are_not_json_are_left_out(tmp_path, parts, keep):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(parts))
    assert Job("on", 1, tmp_path, [], 10).done >= 0
    log = JsonLines(path, keep, 3)
    log.write({"step": 4})
    log.close()
    found = path.read_bytes().splitlines()
    assert len(found) == log.count
    assert all("step" in parse_json(line) for line in found)
    (tmp_path / "config.json").write_text('{"seed": 1, "max_iters": 1}')
    works_or_is_refused(lambda: load_run(tmp_path))
