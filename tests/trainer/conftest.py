import pytest

import train
from tests.helpers.runs import ALL_ON, NOISY, TINY, VOCAB, write_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "letters", VOCAB)


@pytest.fixture(scope="session")
def start(dataset):
    """start(out_dir, **settings) runs train.py's main in this process."""

    def run(out, **changes):
        settings = TINY | {"dataset": dataset, "out_dir": out} | changes
        return train.main([f"--{key}={value}" for key, value in settings.items()])

    return run


@pytest.fixture(scope="session")
def keys(dataset):
    """keys(out_dir, **settings): the command line of a tiny run with all five steps, dropout and router noise."""

    def arguments(out, **changes):
        settings = TINY | ALL_ON | NOISY | {"dataset": dataset, "out_dir": out} | changes
        return [f"--{key}={value}" for key, value in settings.items()]

    return arguments


@pytest.fixture(scope="session")
def full_run(tmp_path_factory, keys):
    """A finished run with all five steps, dropout and router noise. Do not write to it."""
    out = tmp_path_factory.mktemp("runs") / "full"
    assert train.main(keys(out)) == 0
    return out
