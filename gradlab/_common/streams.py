"""Random streams: every draw comes from one entropy and a key, never from a global generator."""

from __future__ import annotations

import numpy as np

from gradlab._common.names import check_seed


def generator(seed: int, *key: int) -> np.random.Generator:
    """The generator of the stream `key` of an entropy. Raises `ValueError` unless `seed` is a whole number from 0 on."""
    check_seed(seed)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
