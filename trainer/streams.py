"""Seeds of a run's random streams, so that no two of them draw the same numbers.

Initial weights are drawn from the run's seed itself, batches as trainer/data.py says; all else by a seed from here.
"""

from __future__ import annotations

import hashlib

import numpy as np

DROPOUT_AND_NOISE = "dropout and router noise"  # by rank; by rank and step where a resumed run begins another
PERMUTATION = "permutation of signal 'shuffled'"


def stream_seed(seed: int, name: str, *indices: int) -> int:
    """Seed, below 2^63, of the stream `name` of a run with this seed. Indices number streams of one name, as by rank.

    torch's generator on a CPU takes the low 32 bits: two of a thousand streams coincide with a probability of 1e-4.
    """
    purpose = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    (state,) = np.random.SeedSequence(seed, spawn_key=(purpose, *indices)).generate_state(1, np.uint64)
    return int(state) >> 1
