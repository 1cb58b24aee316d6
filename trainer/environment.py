"""The environment of a run, as config.json records it: what affects its results besides its settings."""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError

ROOT = Path(__file__).parent.parent
UNKNOWN = "unknown"  # initial weights of runs of an older version
CODE = ("train.py", "model.py", "ops/*.py", "chronomoe/*.py", "trainer/*.py")  # files that a training run executes
OLDEST_TORCH, NEWEST_TORCH = (2, 11), (2, 13)  # that the tests have run on

# Keys of config.json besides the settings, with their roles: those of settings, 'pair' (the two runs of a
# pair must agree) and 'record' (not compared).
ENVIRONMENT = {
    "data_sha256": "computed",  # of the token files, by file name
    "vocab_size": "model",
    "weights_sha256": "computed",  # of the initial weights; None: from scratch
    "matmul_precision": "pair",  # torch.get_float32_matmul_precision()
    "code_sha256": "pair",  # of the files that a training run executes
    "ranks": "machine",
    "threads": "machine",  # per rank
    "python": "machine",
    "torch": "machine",
    "platform": "machine",
    "git_commit": "machine",
    "weights_from": "record",  # init_from of the first start
    "protocol_commit": "record",  # last commit of the file `protocol`; None: not in git
    "incomplete": "record",  # what is missing from the logs
    "history": "record",  # starts of the program
}


def check_torch(version: str = torch.__version__) -> list[str]:
    """Notes on the version of torch. Raises UserError if it is too old."""
    found = tuple(int(part) for part in version.split(".")[:2])
    oldest, newest = (".".join(map(str, v)) for v in (OLDEST_TORCH, NEWEST_TORCH))
    if found < OLDEST_TORCH:
        raise UserError(f"torch {version} is too old: install {oldest} to {newest}")
    return [f"torch {version} is not tested; {oldest} to {newest} are"] if found > NEWEST_TORCH else []


def describe_environment(protocol: str = "") -> dict[str, Any]:
    """Versions, threads, code and protocol of this process, by the keys of config.json."""
    return {
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "git_commit": git_commit(),
        "code_sha256": code_sha256(),
    } | ({"protocol_commit": last_commit(protocol)} if protocol else {})


def git_commit() -> str | None:
    """The commit of this checkout, with '-dirty' if files differ from it; None outside git."""
    try:
        commit = _git("describe", "--always", "--abbrev=40")
        # describe --dirty would rewrite the index, and on a full disk leave its lock behind
        changes = _git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changes else commit


def last_commit(path: str) -> str | None:
    """The last commit of a file of this checkout, with '-dirty' if the file differs from it; None if there is none."""
    try:
        commit = _git("log", "-1", "--format=%H", "--", path)
        changes = _git("--no-optional-locks", "status", "--porcelain", "--", path)
    except (OSError, subprocess.CalledProcessError):
        return None
    return (f"{commit}-dirty" if changes else commit) if commit else None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


@functools.cache
def code_sha256() -> str:
    """Digest of the names and contents of the files that a training run executes."""
    sha256 = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in ROOT.glob(pattern)):
        content = path.read_bytes()
        sha256.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return sha256.hexdigest()
