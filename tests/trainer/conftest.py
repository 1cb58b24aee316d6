import shutil

import pytest

import train
from tests.helpers.runs import FULL, TINY, VOCAB, arguments, write_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "letters", VOCAB)


@pytest.fixture(scope="session")
def start(dataset):
    """start(out_dir, **settings) runs train.py's main in this process. without: settings of TINY to leave out."""

    def run(out, without=(), **changes):
        settings = {key: value for key, value in TINY.items() if key not in without}
        return train.main(arguments(settings | {"dataset": dataset, "out_dir": out} | changes))

    return run


@pytest.fixture(scope="session")
def keys(dataset):
    """keys(out_dir, **settings): the command line of a tiny run with all five steps, dropout, noise, decisions."""
    return lambda out, **changes: arguments(TINY | FULL | {"dataset": dataset, "out_dir": out} | changes)


@pytest.fixture(scope="session")
def resume(keys):
    """resume(out_dir, **settings) resumes such a run in this process. Returns the exit status."""
    return lambda out, **changes: train.main(keys(out, **{"init_from": "resume"} | changes))


@pytest.fixture(scope="session")
def full_run(tmp_path_factory, keys):
    """Such a run, finished. Do not write to it."""
    out = tmp_path_factory.mktemp("runs") / "full"
    assert train.main(keys(out)) == 0
    return out


@pytest.fixture(scope="session")
def half_run(tmp_path_factory, keys):
    """The first three steps of `full_run`. Do not write to it."""
    out = tmp_path_factory.mktemp("runs") / "half"
    assert train.main(keys(out, max_iters=3)) == 0
    return out


@pytest.fixture
def out(tmp_path_factory):
    """A folder for a run, which does not exist."""
    return tmp_path_factory.mktemp("run") / "out"


@pytest.fixture
def log(tmp_path):
    """A file for the output of a process."""
    return tmp_path / "log"


@pytest.fixture
def full(full_run, tmp_path):
    """A copy of `full_run`."""
    return shutil.copytree(full_run, tmp_path / "full")


@pytest.fixture
def half(half_run, tmp_path):
    """A copy of `half_run`."""
    return shutil.copytree(half_run, tmp_path / "half")
