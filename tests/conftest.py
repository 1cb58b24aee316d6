import signal

import pytest
import torch

from tests.helpers import child

# Tests send signals to child processes, which inherit that nohup or & lets pytest ignore them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Results depend on the number of threads, and two threads are slow on a shared core."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_process_left_running():
    yield
    child.kill_all()


@pytest.fixture(autouse=True)
def seeded():
    """Fresh but repeatable random inputs."""
    torch.manual_seed(20260101)
