"""Seeds of a run's random streams, so that no two streams draw the same numbers.

Initial weights are drawn from the run's seed itself, and batches as in trainer/data.py; everything else by a seed from
this file.
"""

from __future__ import annotations

import hashlib

import numpy as np

DROPOUT_AND_NOISE = "dropout and router noise"  # by rank; by rank and step for a rank that joins on resume
PERMUTATION = "permutation of signal 'shuffled'"  # and all other random numbers of the signals
HELD_OUT = "batches of training text for signal 'worth'"
DAMAGE = "damage assay"  # of audit.py, by layer


def stream_seed(seed: int, name: str, *indices: int) -> int:
    """Seed, below 2^63, of the stream `name`. Indices distinguish streams of one name, for example by rank.

    torch's CPU generator uses the low 32 bits: among a thousand streams two coincide with a probability of 1e-4.
    """
    purpose = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    (state,) = np.random.SeedSequence(seed, spawn_key=(purpose, *indices)).generate_state(1, np.uint64)
    return int(state) >> 1
