"""Give the programs random settings, files and folders, and list the cases that do not end in one clear line.

    python tests/fuzz.py                         ten minutes
    python tests/fuzz.py --seconds=60 --seed=2
    python tests/fuzz.py --kind=compare          only cases of one kind
    python tests/fuzz.py --seed=2 --case=12345   only this case, with its output

A case starts from valid settings and from the files of small runs, which are trained first, and changes them at random.
It is a function of seed and number. It must end within 10 seconds (60 with figures or in a process of its own), with
exit status 0, or with 2 and one line on stderr, or with 1 after training. A refused start must leave every file as it
was, and no file of others may change. Cases run in processes with a memory limit; a case that exceeds it must end in
one line too. Exit status 1 if a case fails.

kinds: settings    command lines
       config      config files
       data        meta.json, meta.pkl and token files
       bytes       bytes of checkpoints: flipped, cut, spliced, zipped again, and in torch's format before 1.6
       structure   values in checkpoints
       logs        config.json, metrics.jsonl and decisions.jsonl of a run
       compare     folders of runs, and settings of a study
       train, sample, report    train.py, sample.py and compare.py, without starting a process
       process     these programs, each in a process of its own

POSIX only.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.errors import UserError, first_line, run_script  # first, so that Ctrl-C during the other imports is quiet

# isort: split

import contextlib
import functools
import gc
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch._dynamo  # the first optimizer imports it, which takes seconds

import bench
import compare
import sample
import train
from chronomoe.options import Option, option, options_of
from comparison import planning, report, sweep
from comparison.runs import expand, group_into_arms, load_runs, lost_seeds
from data.options import read_options
from data.tokenizer import codec_for
from tests.helpers.mutations import Mutations
from tests.helpers.runs import NANOMOE, arguments, write_dataset
from trainer import checkpoint, cli, environment, messages, resume, runlog, setup
from trainer import settings as setting
from trainer.data import open_dataset
from trainer.distributed import World
from trainer.files import JsonLines
from trainer.interrupt import Interrupt
from trainer.memory import check_memory
from trainer.settings import Settings

ROOT = Path(__file__).parents[1]
SECONDS, PROCESS_SECONDS = 10, 60  # that a case may take
GRACE = 5  # seconds after which a case that ignores its alarm is killed
MEMORY = 2 << 30  # bytes that a case may allocate, and the largest file
CASES_PER_WORKER = 5000  # a new process then starts with fresh memory
LONGEST = 5000  # characters of a line on stderr
SHOWN = 2  # cases of the same failure that are printed
LINE_SECONDS = 10  # between lines of progress
RUNS = [("off", 1), ("on", 1), ("off", 2), ("on", 2)]  # arms and seeds of the runs that cases start from
VOCAB = 32  # that of nanoMoE's checkpoint
TINY = {
    **dict(n_layer=1, n_head=2, n_embd=8, n_exp=3, top_k=2, block_size=8, batch_size=2, gradient_accumulation_steps=1),
    **dict(max_iters=4, lr_decay_iters=4, warmup_iters=1, eval_interval=2, eval_iters=2, log_interval=1),
    **dict(dataset="data", device="cpu", margin=0.02, chrono_unused_after=1, chrono_unused_tokens=10**9),
    **{f"chrono_{step}": True for step in ("router", "coherence", "bridge", "lifecycle")},
}
# settings with values that only take long, so cases give them small values and values that are refused
MEASURES = {"n_layer", "n_head", "n_embd", "n_exp", "block_size", "batch_size"}
LIMITED = MEASURES | {"gradient_accumulation_steps", "eval_iters", "max_iters", "num_samples", "max_new_tokens"}
FIXED = dict(wandb_log=False, compile=False, device="cpu")  # without a network or a compiler
LOGS = ["config.json", "metrics.jsonl", "decisions.jsonl"]
OTHERS = "thesis.txt"  # a file that no run has written
CONFIG_LINES = [
    *("import math", "x = [1, 2]", "def f(): f()", "f()", "raise ValueError('a\\nb')", "1/0", "raise SystemExit(0)"),
    *(
        "raise SystemExit",
        "exit('bye')",
        "assert False, 'no'",
        "import no_such_module",
        "from train import *",
        "lambda: 0",
    ),
    *(
        "class A:\n    def __repr__(self): raise ValueError\n    __str__ = __repr__",
        "seed = A()",
        "raise BaseException",
    ),
    *(
        "class B(int):\n    __index__ = __eq__ = lambda *a: 1/0",
        "seed = B(1)",
        "class S(str): pass",
        "out_dir = S('x')",
    ),
    *(
        "raise GeneratorExit",
        "raise StopIteration",
        "import numpy as np",
        "seed = np.int64(3)",
        "dropout = np.float32(0)",
    ),
    *("seed = bytearray(1 << 50)", "a = b = c = 1", "seed: int = 3", "del seed", "from __future__ import annotations"),
    *(
        "\tx = 1",
        "seeds = [1]",
        "n_heads = 3",
        "_ = 3",
        "yield 1",
        "return",
        "await x",
        "# coding: latin-1",
        "\f",
        "if 1:",
    ),
    *("eval_iters = (1,", "learning_rates = {1: 2}", "raise MemoryError", "raise OSError(28, 'full')", "f'{1'"),
    *("raise UnicodeDecodeError('utf-8', b'', 0, 1, 'x')", "raise type('E', (Exception,), {'__str__': lambda s: 1})()"),
]


class Hang(BaseException):
    """The case takes too long."""


class Material:
    """What cases start from: the files of a dataset and of small runs, which are trained in `folder`."""

    def __init__(self, folder: Path):
        write_dataset(folder / "data", VOCAB)
        meta = json.loads((folder / "data" / "meta.json").read_text())
        characters = [chr(33 + i) for i in range(VOCAB)]
        self.meta = meta | {"stoi": {c: i for i, c in enumerate(characters)}, "itos": dict(enumerate(characters))}
        (folder / "data" / "meta.json").write_text(json.dumps(meta | {"characters": characters, "dtype": "uint16"}))
        for arm, seed in RUNS:
            status = train.main(arguments(TINY | dict(arm=arm, seed=seed, out_dir=f"{arm}_seed{seed}")))
            assert status == 0
        arms, differing, _ = group_into_arms(load_runs(expand([folder]))[0])
        compared = report.compare(arms, differing, [], {}, "", folder)
        self.report = json.dumps(report.as_json(compared)).encode()
        self.data = contents(folder / "data")
        self.runs = {f"{arm}_seed{seed}": contents(folder / f"{arm}_seed{seed}") for arm, seed in RUNS}
        self.states = [torch.load(path, weights_only=True) for path in (folder / "on_seed1" / checkpoint.NAME, NANOMOE)]
        self.checkpoints = [self.runs["on_seed1"][checkpoint.NAME], NANOMOE.read_bytes()]
        for state in self.states:
            legacy = io.BytesIO()
            torch.save(state, legacy, _use_new_zipfile_serialization=False)
            self.checkpoints.append(legacy.getvalue())


class Case(Mutations):
    """The random choices of one case, which fills the current folder."""

    def __init__(self, rng: random.Random, material: Material):
        super().__init__(rng)
        self.material = material
        self.writes = False  # then texts name only files in the current folder

    def argument(self) -> str:
        """A text that a command line can hold."""
        text = self.text().replace("\0", "").encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
        return text.replace("..", "_").replace("gpt2", "_").lstrip("/~") if self.writes else text

    def setting(self, key: Option) -> str:
        """A value as it is written on a command line."""
        rng, choices = self.rng, key.metadata["choices"]
        if self.writes and key.name in LIMITED:
            refused = ["0", "-1", "2.5", str(1 << 63), "nan", "x", *["1000000000000"] * (key.name in MEASURES)]
            return rng.choice(["1", "2", "3", rng.choice(refused)])
        pick = rng.randrange(6)
        if pick == 0 and choices:
            return str(rng.choice(choices))
        if pick <= 1:
            return str(key.default)
        if pick == 2 and key.kind is bool:
            return rng.choice(["True", "False", "1", "0", "true"])
        return repr(self.number()) if pick <= 4 else self.argument()

    def options(self, known: Mapping[str, Option], most: int = 5) -> list[str]:
        """Options as users write them, and mistakes."""
        rng, found = self.rng, []
        for name in rng.choices(list(known), k=rng.randrange(most)):
            text = self.setting(known[name])
            if self.often(0.05):
                name = rng.choice([name[:-1], name + "s", name.upper(), self.argument()])
            form = rng.randrange(20)
            if form == 0:
                found += [f"--{name}"]
            elif form == 1:
                found += [f"--{name}", text]
            elif form == 2:
                found += [rng.choice([f"-{name}={text}", f"{name}={text}", self.argument(), f"--{name}=={text}"])]
            else:
                found += [f"--{name}={text}"]
        return [argument for argument in found if not (self.writes and argument.endswith(".py"))]

    def config_file(self, known: Mapping[str, Option]) -> bytes:
        """The source of a config file."""
        rng, lines = self.rng, []
        for _ in range(rng.randrange(5)):
            name = rng.choice(list(known))
            default = repr(known[name].default)
            value = rng.choice([default, default, default, self.setting(known[name]), repr(self.json())])
            lines.append(rng.choice([*[f"{name} = {value}"] * 5, rng.choice(CONFIG_LINES)]))
        source = rng.choice(["\n", "\n", "\r\n", "; "]).join(lines).encode("utf-8", "surrogatepass")
        # no power, which takes long, no loop, and no shift
        return self.damaged(source).replace(b"**", b"").replace(b"<<", b"") if self.often(0.2) else source

    def changed_json(self, content: bytes) -> bytes:
        if self.often(0.25):
            return self.damaged(content)
        value = json.loads(content)
        for _ in range(self.rng.choice([1, 1, 2, 3])):
            value = self.mutated(value, self.json)
        return json.dumps(value).encode()

    def changed_lines(self, content: bytes) -> bytes:
        rng, lines = self.rng, content.splitlines(keepends=True)
        for _ in range(rng.choice([1, 1, 2])):
            i = rng.randrange(len(lines)) if lines else 0
            pick = rng.randrange(7)
            if pick <= 1 and lines and lines[i].strip():
                with contextlib.suppress(ValueError, RecursionError):  # it is changed already
                    lines[i] = json.dumps(self.mutated(json.loads(lines[i]), self.json)).encode() + b"\n"
            elif pick == 2 and lines:
                del lines[i]
            elif pick == 3:
                lines.insert(i, json.dumps(self.json()).encode() + b"\n")
            elif pick == 4 and lines:
                lines.insert(i, lines[rng.randrange(len(lines))])
            elif pick == 5:
                lines = self.damaged(b"".join(lines)).splitlines(keepends=True)
            else:
                lines = [line.replace(b"\n", rng.choice([b"\r\n", b"", b"\n\n"])) for line in lines]
        return b"".join(lines)

    def changed_checkpoint(self) -> bytes:
        """The bytes of a checkpoint, with changes that checksums may not show."""
        content = self.rng.choice(self.material.checkpoints)
        pick = self.rng.randrange(6)
        if pick <= 1 and content.startswith(checkpoint.ZIP):
            return self.zipped_again(content)
        if pick == 2:  # parts of two checkpoints
            other = self.rng.choice(self.material.checkpoints)
            return content[: self.rng.randrange(len(content))] + other[self.rng.randrange(len(other)) :]
        return self.damaged(content)

    def zipped_again(self, content: bytes) -> bytes:
        """The members of an archive in a new one, with valid checksums, one of them changed."""
        rng, out = self.rng, io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", allowZip64=True) as new:
            names = old.namelist()
            pickled = next(name for name in names if name.endswith("data.pkl"))
            changed = pickled if self.often(0.7) else rng.choice([*names, ""])
            method = rng.choice([zipfile.ZIP_STORED] * 6 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of names that are there twice
                for name in names:
                    member = old.read(name)
                    if name == changed:
                        member = self.damaged(member) if self.often(0.95) else bytes(1 << 23)
                        name = rng.choice([name] * 8 + ["x", "archive/../x", "x" + self.text()[:99]])
                        name = name.encode("utf-8", "replace").decode()
                    if not (name == changed and self.often(0.05)):
                        new.writestr(name, member, method)
        found = out.getvalue()
        if self.often(0.5):
            digest = checkpoint.DIGEST + hashlib.sha256(found).hexdigest().encode()
            found = (
                found[: -checkpoint.COMMENT_LENGTH] + len(digest).to_bytes(checkpoint.COMMENT_LENGTH, "little") + digest
            )
        return found

    def changed_state(self) -> dict[str, Any]:
        """The values of a checkpoint, some of them changed."""
        state: Any = self.rng.choice(self.material.states)
        for _ in range(self.rng.choice([0, 1, 1, 1, 2, 4])):
            key = self.rng.choice(list(state))
            if self.often(0.15):
                state = self.mutated(state, self.value)
            elif self.often(0.2):
                state = state | {key: self.value()}
            else:
                state = state | {key: self.mutated(state[key], self.value)}
            if not isinstance(state, dict) or not state:
                break
        return state

    def write_dataset(self, changes: float = 0.0) -> None:
        """Write the dataset into `data`; a change of each file has this probability."""
        Path("data").mkdir()
        for name, content in self.material.data.items():
            if name == "meta.json" and self.often(changes):
                content = self.changed_json(content)
            elif self.often(changes / 2):
                tokens = bytes(self.rng.choices([0, 1, VOCAB - 1, VOCAB, 255], k=self.rng.randrange(9)))
                content = self.rng.choice([b"", tokens, self.damaged(content)])
            Path("data", name).write_bytes(content)

    def write_run(self, folder: str, source: str, names: list[str], changes: float = 0.3) -> None:
        """Write the files of a run; a change of each of the names has this probability."""
        Path(folder).mkdir(parents=True)
        for name, content in self.material.runs[source].items():
            path = Path(folder, name)
            if name in names and self.often(changes):
                if name.endswith(".pt") and self.often():
                    self.write_state(path)
                    continue
                content = self.changed_file(name, content)
            path.write_bytes(content)
        for name in names:
            if self.often(0.03):
                self.change_kind_of_file(Path(folder, name))

    def changed_file(self, name: str, content: bytes) -> bytes:
        if name.endswith(".pt"):
            return self.changed_checkpoint()
        return self.changed_json(content) if name.endswith(".json") else self.changed_lines(content)

    def write_state(self, path: Path) -> None:
        state = self.changed_state()
        if path.name == checkpoint.NAME and self.often(0.8):
            checkpoint.write(path.parent, state)
        else:
            torch.save(state, path, _use_new_zipfile_serialization=self.often(0.8))

    def change_kind_of_file(self, path: Path) -> None:
        """Replace a file by nothing, an empty file, a folder, a named pipe or a link."""
        path.unlink(missing_ok=True)
        makers: list[Callable[[], Any]] = [
            lambda: None,
            path.touch,
            path.mkdir,
            lambda: os.mkfifo(path),
            lambda: path.symlink_to("nothing"),
            lambda: path.symlink_to(path.name),
            lambda: path.symlink_to("."),
        ]
        self.rng.choice(makers)()


def contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder by name, without locks."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and not p.name.startswith(".lock")}


def settings(c: Case) -> Callable[[], object]:
    known = setting.keys()
    pick = c.rng.randrange(10)
    if pick == 0:
        line = c.options(dict(options_of(sample.SampleSettings)))
        return lambda: sample.from_arguments(line)
    if pick == 1:
        line = c.options(known | dict(options_of(compare.Options)))
        return lambda: compare.read_options(line)
    if pick == 2:
        line = c.options(dict(options_of(bench.Options)))
        return lambda: cli.parse(line, options_of(bench.Options), positional=True)
    if pick == 3:
        words = {
            name: options_of(Settings)["wandb_project"] for name in ("out", "input", "tokenizer", "jobs", "force", "x")
        }
        line = [argument for argument in c.options(words) if not cli.asks_for_help([argument])]
        return lambda: read_options(line, "", Path("x"), ("input", "tokenizer", "sources"))
    line = arguments(TINY) * c.often() + c.options(known, 8)
    return lambda: accept(setting.from_arguments(line))


def accept(s: Settings) -> None:
    """What is computed from settings before a run is built."""
    check_memory(s, VOCAB, torch.device("cpu"))
    messages.reach_line(s.chrono)
    runlog.wandb_identity(s, s.flat())


def config(c: Case) -> Callable[[], object]:
    known = setting.keys()
    names = c.rng.choice([["a.py"], ["a.py", "b.py"]])
    for name in names:
        Path(name).write_bytes(c.config_file(known) if c.often(0.97) else c.rng.randbytes(99))
    line = names + c.options(known, 2)
    return lambda: accept(setting.from_arguments(line))


def data(c: Case) -> Callable[[], object]:
    c.write_dataset(changes=0.4)
    meta = Path("data", "meta.json")
    if c.often(0.4):
        meta.unlink()
        value: Any = c.material.meta
        others = [c.json, lambda: c.shared(60), lambda: {1}, lambda: b"a", lambda: (1, "a"), lambda: 1j, c.scalar]
        for _ in range(c.rng.choice([0, 1, 1, 2])):
            value = c.mutated(value, lambda: c.rng.choice(others)())
        pickled = pickle.dumps(value, protocol=c.rng.randrange(6))
        meta.with_suffix(".pkl").write_bytes(c.damaged(pickled) if c.often(0.5) else pickled)
    if c.often(0.05):
        c.change_kind_of_file(c.rng.choice([*Path("data").iterdir()]))
    block_size, text = c.rng.choice([1, 8, 8, 8, 2999, 3000, 1 << 40]), c.rng.choice(["", "ABC", "!", c.text()])

    def read() -> None:
        found = open_dataset("data", block_size)
        found.fingerprint({"train.bin": {"bytes": 6000, "mtime_ns": 0, "sha256": "x"}})
        found.batch("train", 1, 0, 0, 2)
        codec = codec_for(found.meta or {"tokenizer": "bytes"}, "data")
        codec.decode([*codec.encode(text), *codec.start, 0, VOCAB, 10**6])

    return read


def checkpoint_bytes(c: Case) -> Callable[[], object]:
    c.write_dataset()
    Path("run").mkdir()
    both = [checkpoint.NAME, checkpoint.PREVIOUS]
    for name in c.rng.choice([both, both[:1], both[:1], both[1:]]):
        Path("run", name).write_bytes(c.changed_checkpoint())
    return use_checkpoint(c)


def structure(c: Case) -> Callable[[], object]:
    c.write_dataset()
    Path("run").mkdir()
    c.write_state(Path("run", checkpoint.NAME))
    return use_checkpoint(c)


def use_checkpoint(c: Case) -> Callable[[], object]:
    """Use the checkpoints in `run`: resume, start from them, sample, or read their numbers."""
    pick, c.writes = c.rng.randrange(5), True
    if pick == 0:
        return lambda: sample.load(sample.SampleSettings(out_dir="run", device="cpu", dataset=""))
    if pick == 1:
        return read_numbers
    given = {"dataset": "data"} | FIXED
    if pick == 2:
        source = c.rng.choice(["run", "run/ckpt.pt", "auto:run"])
        given |= {"out_dir": "new", "init_from": source, "eval_only": c.often(0.2)}
        given |= {"n_exp": 3, "norm_topk_prob": True} if c.often(0.3) else {}
    else:
        given |= {"out_dir": "run", "init_from": c.rng.choice(["resume", "auto"])}
    if c.often(0.2):
        given |= {"max_iters": 10}
    return lambda: start(given)


def read_numbers() -> None:
    """Read checkpoints as a study does, without their tensors."""
    for path in Path("run").glob("*.pt"):
        with contextlib.suppress(checkpoint.Damaged, OSError):
            checkpoint.without_tensors(path)
    sweep.config_of(Path("run"))
    checkpoint.newest(Path("run"))


def start(given: dict[str, Any]) -> None:
    """Set up a run as train.py does, and close it."""
    with contextlib.ExitStack() as stack:
        setup.set_up(given, World(), Interrupt(), stack)


def logs(c: Case) -> Callable[[], object]:
    c.write_run("run", "on_seed1", LOGS, changes=0.6)
    if c.often():
        for path in Path("run").glob("*.pt"):
            path.unlink()
    if c.often(0.3):
        c.write_dataset()
        init_from = c.rng.choice(["resume", "auto", "scratch"])
        given = TINY | FIXED | dict(seed=1, out_dir="run", init_from=init_from, max_iters=8)
        return lambda: start(given)
    init_from = c.rng.choice(["auto", "auto", "auto", "scratch"])
    keep, upto, one = c.rng.choice([None, 0, 1, 3, 5, 9]), c.rng.choice([0, 2, 4, 10]), c.often()

    def read() -> None:
        folder = Path("run")
        runlog.history_in(folder / "config.json")
        runlog.is_complete(folder, 2)
        sweep.config_of(folder)
        job = sweep.Job("on", 1, folder, [], 4)
        assert isinstance(job.finished, bool) and job.done >= 0
        load_runs([folder])
        resume.run_folder({"out_dir": "run", "init_from": init_from})
        log = JsonLines(folder / "metrics.jsonl", keep, upto, one_per_step=one)
        log.write({"step": upto + 1})
        log.close()

    return read


def write_study(c: Case) -> None:
    """Write runs into `study`, some of them changed."""
    Path("study").mkdir()
    names = [*LOGS, checkpoint.NAME]
    changes = c.rng.choice([0.0, 0.1, 0.3])
    for run in c.material.runs:
        if c.often(0.85):
            c.write_run(f"study/{run}", run, names, changes)
    if c.often(0.3):
        Path("study", "comparison.json").write_bytes(c.changed_json(c.material.report))


def compared(c: Case) -> Callable[[], object]:
    write_study(c)
    pick = c.rng.randrange(4)
    if pick == 0:
        margin = c.rng.choice([None, 0.02, 1e-30, 1e30])
        return lambda: planning.plan([Path("study")], margin)
    if pick == 1:
        c.write_dataset()
        c.writes = True
        line = [*arguments(TINY | FIXED), *c.options(setting.keys()), *arguments(FIXED | dict(dataset="data"))]
        arms = c.rng.choice([["off", "on"], ["on"], ["off", "on", "shuffled", "load"], [c.argument()], ["on", "on"]])

        def plan() -> None:
            for job in sweep.plan(line, Path("study"), arms, 2):
                assert isinstance(job.finished, bool)
            load_runs(sweep.plan(line, Path("study"), arms, 2), sweep.load)

        return plan
    draws = c.often(0.1)
    if c.often(0.1):
        c.write_dataset()

    def read() -> None:
        runs, unusable = load_runs(expand([Path("study")]))
        if len(runs) < 2:
            raise UserError("; ".join(map(str, unusable)) or "there are fewer than two runs")
        arms, differing, left_out = group_into_arms(runs)
        out, _ = report.folder_for(Path("study"), arms)
        found = report.compare(arms, differing, left_out, lost_seeds(unusable, arms), "", out)
        json.dumps(report.as_json(found), allow_nan=False)
        report.as_markdown(found, []).encode(errors="backslashreplace")
        if draws:
            report.draw(found)

    return read


def write_all(c: Case) -> None:
    """Write a dataset and a run, both perhaps changed, and a file of another program."""
    c.write_dataset(changes=c.rng.choice([0.0, 0.0, 0.3]))
    if c.often(0.85):
        names = [*LOGS, checkpoint.NAME, checkpoint.PREVIOUS, checkpoint.BEST]
        c.write_run("run", "on_seed1", names, changes=c.rng.choice([0.0, 0.1, 0.4]))
        for name in names:
            if c.often(0.1):
                with contextlib.suppress(OSError):
                    Path("run", name).unlink()
    if c.often(0.1):
        Path("run").mkdir(exist_ok=True)
        path = Path("run", c.rng.choice(LOGS))
        if not os.path.lexists(path) or path.is_file():
            path.write_bytes(c.rng.choice([b"", b"{}", b'{"step": 1}\n', b"notes\n"]))


def train_line(c: Case) -> list[str]:
    write_all(c)
    c.writes = True
    line = [*arguments(TINY), *c.options(setting.keys())]
    sources = ["scratch", "resume", "resume", "auto", "auto", "run", "run/ckpt.pt", "auto:run", c.argument()]
    line += [f"--init_from={c.rng.choice(sources)}"]
    line += [f"--out_dir={c.rng.choice([*['run', 'new'] * 5, 'a/b', OTHERS, c.argument()])}"]
    if c.often(0.1):
        Path("a.py").write_bytes(c.config_file({k: o for k, o in setting.keys().items() if k not in LIMITED}))
        line = ["a.py", *line]
    if c.often(0.9):
        line += ["--dataset=data"]
    # a checkpoint can hold any number of steps
    return [*line, *arguments(FIXED | dict(max_iters=c.rng.choice([0, 2, 2, 5, 6]), eval_iters=1))]


def sample_line(c: Case) -> list[str]:
    write_all(c)
    c.writes = True
    known = {k: o for k, o in options_of(sample.SampleSettings).items() if k not in ("init_from", "compile")}
    line = ["--num_samples=1", "--max_new_tokens=3", *c.options(known), "--device=cpu"]
    if c.often(0.9):
        line += ["--out_dir=run"]
    return line + ([f"--prompt={c.argument()}"] if c.often() else [])


def report_line(c: Case) -> list[str]:
    write_study(c)
    c.writes = True
    if c.often(0.3):
        c.write_dataset()
    own = {k: o for k, o in options_of(compare.Options).items() if k != "wandb"}
    folders = [["study"], ["study/on_seed1", "study/off_seed1"], [c.argument()], ["study", OTHERS], ["data"], []]
    line = [*c.rng.choice([folders[0], *folders]), *c.options(own, 3)]
    line += c.options(setting.keys(), 2) if c.often(0.2) else []
    line += c.rng.choice([["--plan", "--margin=0.02"], [], []])
    return [a for a in line if "wandb" not in a]


PROGRAMS = {"train": (train, train_line), "sample": (sample, sample_line), "compare": (compare, report_line)}


def program(name: str) -> Callable[[Case], Callable[[], object]]:
    module, line_of = PROGRAMS[name]

    def prepare(c: Case) -> Callable[[], object]:
        line = line_of(c)
        return lambda: module.main(line)

    return prepare


def process(c: Case) -> Callable[[], object]:
    name = c.rng.choice(list(PROGRAMS))
    line = PROGRAMS[name][1](c)

    def run() -> int:
        command = [sys.executable, str(ROOT / f"{name}.py"), *line]
        return subprocess.run(command, timeout=PROCESS_SECONDS, stdin=subprocess.DEVNULL).returncode

    return run


@dataclass(frozen=True)
class Kind:
    """A kind of cases: `prepare` fills the current folder and returns what must end well."""

    prepare: Callable[[Case], Callable[[], object]]
    weight: float
    seconds: float = SECONDS


KINDS = {
    "settings": Kind(settings, 45),
    "config": Kind(config, 16),
    "data": Kind(data, 16),
    "bytes": Kind(checkpoint_bytes, 7),
    "structure": Kind(structure, 5),
    "logs": Kind(logs, 8),
    "compare": Kind(compared, 1.2),
    "train": Kind(program("train"), 2),
    "sample": Kind(program("sample"), 1),
    "report": Kind(program("compare"), 0.1, PROCESS_SECONDS),
    "process": Kind(process, 0.01, PROCESS_SECONDS),
}


@dataclass
class Options:
    """The options of fuzz.py."""

    seconds: float = option(600.0, "seconds to run", above=0)
    seed: int = option(1, "seed of all cases", least=0)
    kind: str | None = option(None, "only cases of this kind; None: of all kinds", choices=tuple(KINDS))
    case: int | None = option(None, "run only the case of this number, and print its output", least=0)
    jobs: int | None = option(None, "processes; None: the number of CPU cores", least=1)


TRAINS = ("train", "process")


@dataclass
class Result:
    """How a case ended. failure: what is wrong, or an empty text."""

    kind: str
    status: int | None = None
    failure: str = ""
    place: str = ""  # where, to count equal failures
    output: str = ""
    seconds: float = 0.0


def kind_and_rng(options: Options, number: int) -> tuple[str, random.Random]:
    """The kind of a case, and its random numbers."""
    rng = random.Random(f"{options.seed}/{number}")
    drawn = rng.choices(list(KINDS), [kind.weight for kind in KINDS.values()])[0]
    return options.kind or drawn, rng


def run_case(options: Options, number: int, material: Material) -> Result:
    """Run a case in the current folder, which is empty. stdout and stderr are files."""
    name, rng = kind_and_rng(options, number)
    result, began = Result(name), time.perf_counter()
    case = Case(rng, material)
    Path(OTHERS).write_text("chapter 1")
    try:
        action = KINDS[name].prepare(case)
    except Exception as e:
        _describe(result, e, "the fuzzer: ")
        return result
    before = snapshot()
    for stream in (sys.stdout, sys.stderr):
        stream.seek(0)
        stream.truncate()
    alarmed = []

    def alarm(*_: object) -> None:
        alarmed.append(True)
        raise Hang

    def main(_: list[str]) -> int:
        status = action()
        return status if isinstance(status, int) else 0

    limit_memory(MEMORY)
    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, KINDS[name].seconds)
    try:
        with warnings.catch_warnings():  # each case shows its own
            run_script(main)
    except SystemExit as e:
        result.status = e.code if isinstance(e.code, int) else 1
    except BaseException as e:
        _describe(result, e)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    result.seconds = time.perf_counter() - began
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    out, err = (Path(stream.name).read_text(errors="replace") for stream in (sys.stdout, sys.stderr))
    result.output = (result.output + out[:3000] + err[:6000]).strip()
    if alarmed:
        _describe(result, Hang(f"over {KINDS[name].seconds} s"))
    if not result.failure:
        result.failure = result.place = (
            wrong_end(name, result.status, out, err) or wrong_files(result.status, before) or ""
        )
    return result


def _describe(result: Result, e: BaseException, prefix: str = "") -> None:
    """Describe an exception that a user would see, with the last line of the project that it passed."""
    frames = [f for f in traceback.extract_tb(e.__traceback__) if f.filename.startswith(str(ROOT))]
    own = [f for f in frames if Path(f.filename) != Path(__file__)] or frames
    where = f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}" if own else ""
    result.place = f"{prefix}{type(e).__name__} {where}"
    result.failure = f"{prefix}{type(e).__name__}: {first_line(e)[:150]} {where}"
    result.output += "".join(traceback.format_exception(e))[-4000:]


def wrong_end(kind: str, status: int | None, out: str, err: str) -> str | None:
    """What is wrong with the exit status or the output, or None."""
    if "Traceback" in out + err:
        return "a traceback is printed"
    if status == 2:
        if not err.startswith("error: ") or len(err.splitlines()) != 1:
            return f"stderr is not one line but {err[:200]!r}"
    elif status != 0 and not (status == 1 and kind in TRAINS and "at step" in out):
        return f"exit status {status}"
    return "a line on stderr is too long" if max(map(len, err.splitlines()), default=0) > LONGEST else None


def snapshot() -> dict[str, Any]:
    """The contents of files, and the targets of links, below the current folder, without locks."""
    found: dict[str, Any] = {}
    for folder, folders, files in os.walk("."):
        for name in files + folders:
            path = os.path.join(folder, name)
            if os.path.islink(path):
                found[path] = os.readlink(path)
            elif os.path.isfile(path) and not name.startswith(".lock"):
                found[path] = Path(path).read_bytes()
            else:
                found[path] = None
    return found


def wrong_files(status: int | None, before: dict[str, Any]) -> str | None:
    """A file that a refused start has changed, or that no run has written and any start has changed; or None."""
    now = snapshot()
    for path, content in before.items():
        if (status == 2 or path.startswith(("./data/", f"./{OTHERS}"))) and now.get(path, ...) != content:
            return f"{path} has changed, exit status {status}"
    return None


def work(connection: Connection, options: Options, material: Material, folder: Path) -> None:
    """Run the cases whose numbers arrive, until there are no more."""
    os.setpgrp()  # Ctrl-C is for the parent
    for stream in ("stdout", "stderr"):
        f = open(folder / stream, "w+", encoding="utf-8", errors="backslashreplace")
        os.dup2(f.fileno(), getattr(sys, stream).fileno())
        setattr(sys, stream, f)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    here = folder / "case"
    parent = os.getppid()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            while not connection.poll(1):
                if os.getppid() != parent:  # it was killed
                    return
            number = connection.recv()
            os.chdir(folder)
            shutil.rmtree(here, ignore_errors=True)
            here.mkdir()
            os.chdir(here)
            connection.send(run_case(options, number, material))


def limit_memory(more: int) -> None:
    """Let this process allocate this many bytes more than now. Address space that is only reserved does not count."""
    size = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (size + more, resource.RLIM_INFINITY))


@dataclass
class Worker:
    """A process that runs cases, and the case that it runs now."""

    process: multiprocessing.process.BaseProcess
    connection: Connection
    number: int = 0
    deadline: float = 0.0
    left: int = CASES_PER_WORKER

    def give(self, options: Options, number: int) -> None:
        self.number, self.left = number, self.left - 1
        self.deadline = time.monotonic() + KINDS[kind_and_rng(options, number)[0]].seconds + GRACE
        self.connection.send(number)

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


@dataclass
class Count:
    """Results of one kind."""

    cases: int = 0
    refused: int = 0
    failures: int = 0
    seconds: float = 0.0


@dataclass
class Tally:
    """Counts the results, and prints failures."""

    options: Options
    counts: dict[str, Count] = field(default_factory=lambda: {name: Count() for name in KINDS})
    places: Counter[str] = field(default_factory=Counter)

    def add(self, number: int, result: Result) -> None:
        count = self.counts[result.kind]
        count.cases += 1
        count.seconds += result.seconds
        count.refused += not result.failure and result.status == 2
        if result.failure:
            count.failures += 1
            self.places[f"{result.kind}: {result.place}"] += 1
            if self.places[f"{result.kind}: {result.place}"] <= SHOWN:
                only = f" --kind={result.kind}" if self.options.kind else ""
                command = f"--seed={self.options.seed}{only} --case={number}"
                print(f"FAILED {result.kind} {command}: {result.failure}", flush=True)

    @property
    def cases(self) -> int:
        return sum(count.cases for count in self.counts.values())

    @property
    def failures(self) -> int:
        return sum(count.failures for count in self.counts.values())

    def table(self, seconds: float) -> str:
        """Results by kind."""
        head = ("kind", "cases", "refused", "accepted", "failures", "ms per case")
        rows = [head]
        for name, n in [*self.counts.items(), ("all", self.total())]:
            if n.cases:
                accepted = n.cases - n.refused - n.failures
                ms = f"{1000 * n.seconds / n.cases:.1f}"
                rows.append((name, f"{n.cases:,}", f"{n.refused:,}", f"{accepted:,}", f"{n.failures:,}", ms))
        lines = [f"{row[0]:<12}" + "".join(f"{cell:>13}" for cell in row[1:]) for row in rows]
        more = [f"{n} times {place}" for place, n in self.places.most_common()]
        rate = self.cases / seconds
        last = f"{self.cases:,} cases in {seconds:.0f} s with seed {self.options.seed}, {rate:.0f} per second, "
        return "\n".join([*lines, *more, f"{last}{self.failures} failures"])

    def total(self) -> Count:
        counts = self.counts.values()
        names = ("cases", "refused", "failures", "seconds")
        return Count(*(sum(getattr(count, name) for count in counts) for name in names))


def fuzz(options: Options, material: Material, folder: Path) -> Tally:
    """Run cases for the given time, and count how they end. Ctrl-C ends it early."""
    context = multiprocessing.get_context("fork")
    tally, numbers, folders = Tally(options), itertools.count(), itertools.count()

    def started() -> Worker:
        ours, theirs = context.Pipe()
        (scratch := folder / str(next(folders))).mkdir()
        process = context.Process(target=work, args=(theirs, options, material, scratch), daemon=True)
        process.start()
        theirs.close()
        worker = Worker(process, ours)
        worker.give(options, next(numbers))
        return worker

    began = printed = time.monotonic()
    again: set[int] = set()  # cases that are run a second time
    workers = [started() for _ in range(options.jobs or os.cpu_count() or 1)]
    try:
        while (now := time.monotonic()) < began + options.seconds:
            ready = wait([worker.connection for worker in workers], timeout=0.5)
            for i, worker in enumerate(workers):
                if worker.connection in ready:
                    try:
                        result = worker.connection.recv()
                        if result.place.startswith(Hang.__name__) and worker.number not in again:
                            again.add(worker.number)  # other processes may have held it up
                            worker.give(options, worker.number)
                            continue
                        tally.add(worker.number, result)
                    except (EOFError, ConnectionResetError):
                        worker.process.join()
                        how = f"the process ended with {worker.process.exitcode}"
                        tally.add(worker.number, Result(kind_and_rng(options, worker.number)[0], None, how, how))
                        worker.left = 0
                elif now > worker.deadline:
                    how = "it hangs, and ignores its alarm"
                    tally.add(worker.number, Result(kind_and_rng(options, worker.number)[0], None, how, how))
                    worker.left = 0
                else:
                    continue
                if worker.left:
                    worker.give(options, next(numbers))
                else:
                    worker.stop()
                    workers[i] = started()
            if now - printed > LINE_SECONDS:
                printed, left = now, began + options.seconds - now
                print(f"{tally.cases:,} cases, {tally.failures} failures, {left:.0f} s left", flush=True)
    except KeyboardInterrupt:
        print()
    for worker in workers:
        worker.stop()
    print(tally.table(time.monotonic() - began))
    return tally


@contextlib.contextmanager
def in_folder() -> Iterator[Path]:
    """A temporary folder as the current one."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def prepared() -> Material:
    """Train the runs in a process: torch cannot fork after it has used threads."""
    with in_folder() as folder:
        ours, theirs = multiprocessing.Pipe()

        def make() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                material = Material(folder)
            theirs.send_bytes(pickle.dumps(material))

        process = multiprocessing.get_context("fork").Process(target=make)
        process.start()
        theirs.close()
        found = pickle.loads(ours.recv_bytes())
        process.join()
        return found


def main(arguments: list[str]) -> int:
    """Returns the exit status: 1 if a case failed."""
    if cli.asks_for_help(arguments):
        print(cli.help_text(__doc__, options_of(Options)))
        return 0
    options = Options(**cli.parse(arguments, options_of(Options)).options)
    torch.set_num_threads(1)
    for name in [name for name in os.environ if name.startswith(("WANDB_", "TORCHELASTIC_"))]:
        del os.environ[name]
    os.environ["HF_HUB_OFFLINE"] = "1"
    environment.git_commit = functools.cache(environment.git_commit)  # it starts two processes
    material = prepared()
    gc.freeze()
    with in_folder() as folder:
        if options.case is None:
            return int(fuzz(options, material, folder).failures > 0)
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=work, args=(theirs, options, material, folder))
        process.start()
        theirs.close()
        ours.send(options.case)
        try:
            result = ours.recv()
        except EOFError:
            process.join()
            result = Result("", None, f"the process ended with {process.exitcode}")
        process.kill()
        print(f"{result.output}\nkind {result.kind}, exit status {result.status}, {result.seconds:.2f} s")
        print(f"FAILED: {result.failure}" if result.failure else "passed")
        return int(bool(result.failure))


if __name__ == "__main__":
    run_script(main)
