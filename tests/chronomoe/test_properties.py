"""Whatever the bytes: files that a person or a crash has spoilt get one clear line, and never a traceback."""

import json
from pathlib import Path

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

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
# near misses are likelier to hurt than noise
spoilt = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.sampled_from([b"[" * 5_000, b'{"a":' * 5_000, b"1" * 5_000, b"\xff\xfe{", b"\0" * 50, b"NaN", b"1e999"]),
)


def tidy(action):
    """action() must work, or raise a UserError of one line."""
    try:
        return action()
    except UserError as e:
        assert str(e) and "\n" not in str(e)
        return None


values = st.one_of(
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["", "None", "True", "[]", "()", "-0", "1e400", "nan", "inf", "'", "0x", "9" * 5000, "(" * 300, "\0"]
    ),
    st.recursive(st.integers(), lambda inner: st.lists(inner, max_size=3), max_leaves=5).map(repr),
)


@often
@given(st.lists(st.tuples(st.sampled_from(sorted(keys())) | st.text(max_size=8), values), min_size=1, max_size=4))
def test_settings_on_the_command_line(pairs):
    tidy(lambda: from_arguments([f"--{key}={value}" for key, value in pairs]))


@often
@given(st.lists(st.tuples(st.sampled_from(sorted(keys())), values), min_size=1, max_size=4))
def test_settings_in_a_config_file(tmp_path, pairs):
    path = tmp_path / "config.py"
    path.write_bytes("\n".join(f"{key} = {value}" for key, value in pairs).encode("utf-8", "replace"))
    tidy(lambda: read_config_file(str(path), keys()))


@often
@given(spoilt)
def test_a_dataset_with_a_spoilt_meta_json(tmp_path, content):
    (tmp_path / "meta.json").write_bytes(content)
    tidy(lambda: read_meta(tmp_path))


@often
@given(st.dictionaries(st.sampled_from(["vocab_size", "dtype", "sha256", "tokenizer"]), json_values, max_size=4))
def test_a_meta_json_whose_values_are_of_any_type(tmp_path, meta):
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    tidy(lambda: read_meta(tmp_path))


@often
@given(st.binary(max_size=200))
def test_a_dataset_with_a_spoilt_meta_pkl(tmp_path, content):
    (tmp_path / "meta.pkl").write_bytes(content)
    tidy(lambda: read_meta(tmp_path))


@often
@given(spoilt)
def test_a_run_with_a_spoilt_config_json(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert isinstance(history_in(tmp_path / "config.json"), list)
    tidy(lambda: load_run(tmp_path))


@often
@given(st.dictionaries(st.sampled_from(["seed", "max_iters", "history"]), json_values, max_size=3), json_values)
def test_a_run_whose_files_hold_values_of_any_type(tmp_path, config, value):
    (tmp_path / "config.json").write_text(json.dumps({"seed": 1, "max_iters": 1} | config))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": value, "val/loss": value}) + "\n")
    (tmp_path / "decisions.jsonl").write_text(json.dumps(value) + "\n")
    assert isinstance(history_in(tmp_path / "config.json"), list)
    tidy(lambda: load_run(tmp_path))


@often
@given(
    st.lists(spoilt | st.integers(0, 5).map(lambda step: b'{"step": %d}' % step), max_size=6),
    st.none() | st.integers(0, 6),
)
def test_spoilt_lines_in_metrics_jsonl_are_left_out(tmp_path, parts, keep):
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
    tidy(lambda: load_run(tmp_path))


@settings(often, max_examples=100)
@given(spoilt)
def test_a_spoilt_checkpoint(tmp_path, content):
    Path(tmp_path / "ckpt.pt").write_bytes(content)
    assert tidy(lambda: newest(tmp_path)) is None
