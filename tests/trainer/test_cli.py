"""The command line of every program: values get the type of their option, and each mistake gets one line."""

import io
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest

import bench
import compare
import sample
import train
from chronomoe.options import option, options_of
from tests.helpers.runs import ROOT, error_of
from trainer import cli
from trainer.errors import run_script
from trainer.settings import keys

PROGRAMS = {
    "train": (train.main, keys()),
    "sample": (sample.main, options_of(sample.SampleSettings)),
    "compare": (compare.main, options_of(compare.Options)),
    "bench": (bench.main, options_of(bench.Options)),
}

# program, command line, parts of the message
MISTAKES = [
    ("train", "--n_exps=4", "--n_exps=4", "'n_exps'", "did you mean n_exp?"),
    ("train", "--zzz=1", "'zzz'", "--help"),
    ("train", "--n_exp", "--n_exp=VALUE", "a whole number at least 1"),
    ("train", "-n_exp=4", "-n_exp=4", "--key=value"),
    ("train", "--n_exp=many", "--n_exp='many'", "a whole number at least 1"),
    ("train", "--n_exp=2.5", "n_exp=2.5", "a whole number at least 1"),
    ("train", "--n_exp=True", "n_exp=True", "a whole number at least 1"),
    ("train", "--n_exp={[]:1}", "n_exp=", "a whole number at least 1"),
    ("train", "--n_layer=None", "n_layer=None", "a whole number at least 1"),
    ("train", f"--seed={10**20}", "seed=", "of a size below 9.22337e+18"),
    ("train", "--chrono_router=yes", "chrono_router='yes'", "True or False"),
    ("train", "--eta=1", "'eta'", "did you mean chrono_eta?"),
    ("train", "--min_lr=nan", "min_lr='nan'", "a number at least 0"),
    ("train", "--min_lr=1" + "0" * 400, "min_lr=", "a number"),
    ("train", "--min_lr=1" + "0" * 5000, "min_lr=", "a number at least 0"),
    ("train", "--min_lr=1e38", "min_lr=1e+38", "a number at least 0, of a size below 1e+38"),
    ("train", "--seed=inf", "seed='inf'", "a whole number at least 0"),
    ("train", "--chrono_k_max=1e299", "chrono_k_max=1e+299", "of a size below 1e+38"),
    ("train", "--out_dir=", "--out_dir='' must not be empty"),
    ("train", "--dataset=", "--dataset='' must not be empty"),
    ("train", "--out_dir=\ud800", "--out_dir='\\ud800'", "cannot encode"),
    ("train", "--out_dir=a\0b", "--out_dir='a\\x00b'", "cannot encode"),
    ("train", "--dtype=bf16", "dtype='bf16'", "did you mean 'bfloat16'?"),
    ("train", "--init_from=gtp2", "init_from='gtp2'", "did you mean 'gpt2'"),
    ("train", "--n_exp=4 --top_k=5", "top_k=5", "n_exp=4"),
    ("train", "--n_embd=10 --n_head=3", "n_embd=10", "n_head=3"),
    ("train", "--n_exp=4 --arm=load", "chrono_beta=True (arm='load' sets it) needs chrono_router=True"),
    ("train", "--device=banana", "device='banana'", "--device=cpu"),
    ("train", "--device=cuda:63", "device='cuda:63'", "--device=cpu"),  # absent
    ("train", "--device=meta", "device='meta'", "--device=cpu"),  # holds no data
    ("train", "config/vertical_slce.py", "No such file", "did you mean config/vertical_slice.py?"),
    ("train", ".", "config file .", "directory"),
    ("sample", "--promt=a", "did you mean prompt?"),
    ("sample", "--n_layer=3", "n_layer is a key of train.py", "--out_dir"),
    ("sample", "--prompt", "--prompt=VALUE"),
    ("sample", "--beta=of", "beta='of'", "'on', 'off'"),
    ("sample", "--out_dir=", "--out_dir='' must not be empty"),
    ("sample", "--top_k=0", "top_k=0", "at least 1 or None"),
    ("sample", "--out_dir=nowhere", "there is no checkpoint in nowhere"),
    ("sample", "--init_from=gtp2", "did you mean 'gpt2'?"),
    ("sample", "--prompt=FILE:no.txt", "cannot read the prompt no.txt", "No such file"),
    ("compare", "config/study.py --sees=3", "did you mean seeds?"),
    ("compare", "config/study.py --seeds=0", "--seeds=0 must be a whole number at least 1"),
    ("compare", "config/study.py --seeds=1" + "0" * 5000, "--seeds='1000", "a whole number at least 1"),
    ("compare", "config/study.py --seeds=100001", "--seeds=100001", "at least 1 and at most 100000"),
    ("compare", "config/study.py --out_dir=", "--out_dir='' must not be empty"),
    ("compare", "config/study.py --seed=3", "--seeds=N", "--arms=A,B"),
    ("compare", "config/study.py --arm=off", "--seeds=N", "--arms=A,B"),
    ("compare", "config/study.py --n_exp=x", "n_exp='x'", "a whole number at least 1"),
    ("compare", "config/study.py out/x", "config/study.py", "not both"),
    ("compare", "x" * 300, "xxx does not exist"),
    ("compare", "out/x --n_exp=3", "--n_exp", "not both"),
    ("compare", "--wandb=me/mine out/x", "out/x", "project alone"),
    ("compare", "--plan out/x --jobs=3", "--jobs", "--plan takes folders"),
    ("compare", "--plan out/x --margin=0", "margin=0.0", "above 0"),
    ("bench", "--quik", "did you mean quick?"),
    ("bench", "--seconds", "--seconds=VALUE"),
    ("bench", "--quick=3", "quick=3", "True or False"),
    ("bench", "steps", "no part 'steps'", "layer, step, memory"),
]
# content of a config file, parts of the message besides the path
FILE_MISTAKES = [
    ("n_exp = 4\nn_layer = = 3\n", "line 2", "invalid syntax"),
    ("\n\n\nfrom imported_with_a_mistake import *\n", "line 2"),
    ("n_exp = 4\n\nn_layer = 1 // 0\n", "line 3", "ZeroDivisionError"),
    ("import no_such_module\n", "line 1", "no_such_module"),
    ("raise ValueError('one\\ntwo')\n", "line 1", "ValueError: one"),
    ("n_exps = 4\n", "'n_exps'", "did you mean n_exp?"),
    ("n_exp = 4\nhalf = n_exp // 2\n", "'half'"),
    ("n_exp = [4]\n", "n_exp=[4]", "a whole number at least 1"),
    ("max_iters = float('nan')\n", "max_iters=nan", "a whole number"),
    ("n_exp = 4  # \udcff\n", "not UTF-8"),
    ("n_exp = 4\0\n", "null bytes"),
    ("n_exp = 4\nn_layer = 1inutes\n", "line 2", "invalid"),
    ("n_exp = 4\nraise GeneratorExit\n", "line 2", "GeneratorExit"),
    ("raise type('E', (Exception,), {'__str__': lambda e: 1})()\n", "line 1", "E: its message cannot be written"),
    ("raise SystemExit('enough')\n", "line 1", "SystemExit: enough"),
    ("def f(): f()\nf()\n", "line 2", "RecursionError"),
    ("import asyncio\nraise asyncio.CancelledError\n", "line 2", "CancelledError"),
    ("seed = 10**5000\n", "seed=int that cannot be written", "a whole number at least 0"),
    ("n_exps = [4]\n", "'n_exps'", "did you mean n_exp?"),
    ("out_dir = ''\n", "out_dir='' must not be empty"),
    ("out_dir = 'a' * 5000 + '\\0'\n", "out_dir='aaaa", "cannot encode"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m[0]} {m[1][:30]}")
def test_a_mistake_on_the_command_line_is_one_line(mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, command, *expected = mistake
    message = error_of(PROGRAMS[program][0], command.split(" "))
    assert all(part in message for part in expected), message
    assert len(message) < 1000


@pytest.mark.parametrize("mistake", FILE_MISTAKES, ids=lambda m: m[1])
def test_a_mistake_in_a_config_file_is_one_line_that_names_the_file(mistake, tmp_path, monkeypatch, recwarn):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "imported_with_a_mistake.py").write_text("n_exp = 4\nn_layer = = 3\n")
    content, *expected = mistake
    path = tmp_path / ("imported_with_a_mistake.py" if "import *" in content else "own.py")
    (tmp_path / "own.py").write_bytes(content.encode(errors="surrogateescape"))
    message = error_of(train.main, [str(tmp_path / "own.py")])
    assert not [w for w in recwarn if w.category is SyntaxWarning]
    assert all(part in message for part in (str(path), *expected)), message
    assert len(message) < 1000


def test_every_script_prints_one_line_and_exits_with_2():
    pipes = dict(cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running = [subprocess.Popen([sys.executable, f"{name}.py", "--zzz=1"], **pipes) for name in PROGRAMS]
    for process in running:
        printed = process.communicate(timeout=120)
        assert printed == ("", "error: --zzz=1: there is no setting 'zzz'; --help lists them\n")
        assert process.returncode == 2


@pytest.mark.parametrize(
    ("shell", "expected"),
    [
        ("train.py --help >&-", ("", "", 0)),
        ("train.py --help >/dev/full", ("", "error: cannot write to stdout: No space left on device\n", 2)),
        ("bench.py --zzz >/dev/full 2>&-", ("", "", 2)),
        ("train.py --out_dir=日本 --init_from=resume", ("", "error: there is no checkpoint \\u65e5\\u672c/ckpt.pt", 2)),
        ("compare.py --plan 日本", ("", "error: \\u65e5\\u672c: no config.json", 2)),
    ],
)
def test_what_the_streams_do_not_take_is_not_a_traceback(shell, expected, tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = ["sh", "-c", f"exec {sys.executable} {ROOT}/{shell}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr[: len(expected[1])], done.returncode) == expected
    assert done.stderr.count("\n") == (1 if expected[1] else 0)


def test_a_character_that_stdout_cannot_encode_is_printed_as_its_code(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed := io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit, match="0"):
        run_script(lambda arguments: print("\u65e5 \udcff"))
    assert printed.getvalue() == b"\\u65e5 \\udcff\n"


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_during_the_imports_ends_the_program_and_prints_nothing(program, tmp_path):
    """Libraries turn an interrupt of their import into other errors, as this torch does."""
    (tmp_path / "torch.py").write_text(
        "import time\nprint('importing', flush=True)\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    1 / 0\n"
    )
    command, environment = [sys.executable, f"{ROOT}/{program}.py", "--help"], {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(command, env=os.environ | environment, stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == -signal.SIGINT


def test_a_closed_stdout_is_not_a_traceback(monkeypatch):
    def script_whose_reader_is_gone(arguments):
        raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", None)
    with pytest.raises(SystemExit, match="141"):
        run_script(script_whose_reader_is_gone)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_lists_every_option_with_default_meaning_and_choices(program, capsys):
    main, options = PROGRAMS[program]
    assert main(["--help"]) == main(["-h"]) == 0
    listed = re.findall(r"^  --(\w+)=(.*)\n((?: {6}\S.*\n?)+)", capsys.readouterr().out, flags=re.MULTILINE)
    meanings = {name: (default, " ".join(meaning.split())) for name, default, meaning in listed}
    assert len(listed) == 2 * len(meanings)
    assert meanings.keys() == options.keys()
    for name, declared in options.items():
        default, meaning = meanings[name]
        assert default == str(declared.default) and meaning.startswith(declared.metadata["help"])
        assert all(repr(choice) in meaning for choice in declared.metadata["choices"] or ())


@dataclass
class Options:
    count: int = option(1, "number", least=1)
    rate: float | None = option(None, "rate")
    name: str = option("", "name")
    folder: str | None = option(None, "folder")
    force: bool = option(False, "whether")


KNOWN = options_of(Options)


def test_values_get_the_type_of_their_option():
    line = cli.parse(["--count=2e1", "--rate=2", "--name=1e3", "--folder=12", "--force"], KNOWN)
    assert repr(line.values) == "{'count': 20, 'rate': 2.0, 'name': '1e3', 'folder': '12', 'force': True}"
    values = cli.parse(["--rate=None", "--folder=None", "--name=None", "--force=False"], KNOWN).values
    assert values == {"rate": None, "folder": None, "name": "None", "force": False}
    apart = cli.parse(["--count", "2", "--force", "a", "--force", "false", "--rate", "-1"], KNOWN, positional=True)
    assert apart.values == {"count": 2, "force": False, "rate": -1.0} and apart.arguments == ["a"]
    assert cli.parse(["--count=2", "--count=3", "--name=a=b"], KNOWN).values == {"count": 3, "name": "a=b"}


def test_arguments_without_dashes_are_returned_where_a_program_takes_them():
    assert cli.parse(["a.py", "--count=2", "b"], KNOWN, positional=True).arguments == ["a.py", "b"]
    assert error_of(cli.parse, ["--count=2", "b"], KNOWN).startswith("b: write options as --")


def test_an_alias_sets_its_option_and_the_last_one_wins(tmp_path):
    known = {**KNOWN, "title": KNOWN["name"]}
    assert cli.parse(["--title=a", "--name=b", "--title=c"], known).values == {"name": "c"}
    (tmp_path / "own.py").write_text("title = 3\n")
    assert "title=3 must be a string" in error_of(cli.parse, [str(tmp_path / "own.py")], known, config_files=True)


def test_later_config_files_win_and_the_command_line_wins_over_all(tmp_path):
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_text("\ufeffcount = 3\nrate = 1\n", encoding="utf-8")  # some editors write a byte order mark
    second.write_text(
        "import numpy as np\n_n = 5\nsizes = [2]\ndef same(n): return n\nclass Shape: width = 8\n"  # its own names
        "count = np.int64(same(_n))\nforce = np.bool_(True)\n"
    )
    files = [str(first), str(second)]
    for arguments in (["--count=7", *files], [files[0], "--count=7", files[1]], [*files, "--count=7"]):
        assert cli.parse(arguments, KNOWN, config_files=True).values == {"count": 7, "rate": 1.0, "force": True}
    values = cli.parse(files, KNOWN, config_files=True).values
    assert values == {"count": 5, "rate": 1.0, "force": True} and type(values["count"]) is int
    assert cli.parse(files[::-1], KNOWN, config_files=True).values["count"] == 3
