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


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
json_values = st.recursive(scalars, lambda x: st.lists(x) | st.dictionaries(st.text(max_size=8), x), max_leaves=8)
keys_of_files = ["vocab_size", "sha256", "seed", "max_iters", "history", "step", "val/loss"]
objects = json_values | st.dictionaries(st.sampled_from(keys_of_files), json_values)
deep = [b"[" * 5_000, b'{"a":' * 5_000, b"1" * 5_000, b"\xff\xfe{", b"\0" * 50, b"NaN", b"1e999"]
text = st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass"))
# almost valid contents find more than noise
contents = (
    st.binary(max_size=200) | text | st.sampled_from(deep) | objects.map(lambda x: json.dumps(x).encode() + b"\n")
)
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


FILES = ["meta.json", "meta.pkl", "ckpt.pt", "config.json", "decisions.jsonl", "metrics.jsonl"]


@pytest.mark.parametrize("name", FILES)
@settings(often, max_examples=60)
@given(
    lines=st.lists(contents | st.integers(0, 5).map(lambda n: b'{"step": %d}' % n)), keep=st.none() | st.integers(0, 6)
)
def test_a_folder_with_a_file_of_any_contents(name, tmp_path, lines, keep):
    (tmp_path / "config.json").write_text('{"seed": 1, "max_iters": 1}')
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "val/loss": 1.0}\n')
    (tmp_path / name).write_bytes(b"\n".join(lines))
    for read in (read_meta, load_run):
        works_or_is_refused(lambda read=read: read(tmp_path))
    assert works_or_is_refused(lambda: newest(tmp_path)) is None
    assert isinstance(history_in(tmp_path / "config.json"), list)
    assert Job("on", 1, tmp_path, [], 10).done >= 0
    log = JsonLines(metrics, keep, 3)
    log.write({"step": 4})
    log.close()
    found = metrics.read_bytes().splitlines()
    assert len(found) == log.count and all("step" in parse_json(line) for line in found)
    works_or_is_refused(lambda: load_run(tmp_path))
