import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def seeded():
    """Fresh but repeatable random inputs."""
    torch.manual_seed(20260101)
