"""Random streams: every draw comes from one entropy and the key of a registered stream, never from a global generator."""

from __future__ import annotations

import zlib

import numpy as np

from gradlab._common.names import check_name, check_seed

#: All streams, each used by one function, and the first part of their keys. The logits of random policies have the empty key.
STREAMS = {
    "policies.perturbed": 1,
    "montecarlo": 2,
    "components.values": 3,
    "sequences.lazy_chain": 5,
    "sequences.differences": 6,
    "small.held_out": 9,
    "distance.random_policies": 10,
    "behaviour.missing_support": 11,
    "tails.running": 12,
    "training": 13,
    "log_ratios": 14,
    "reliability": 16,
    "asymmetry": 17,
    "compositions": 18,
    "tails.dropped": 19,
    "smollm2.reinforce": 20,
    "language": 21,
    "distance.bootstrap": 22,
    "child": 23,
    "check": 25,
    "audit.padding": 26,
    "analysis": 24,
}


def generator(seed: int, stream: str | None = None, *key: int | str) -> np.random.Generator:
    """The generator of a stream, or of a part `key` of it. Raises `ValueError` unless `seed` is a whole number from 0 on."""
    return np.random.default_rng(sequence(seed, stream, *key))


def sequence(seed: int, stream: str | None = None, *key: int | str) -> np.random.SeedSequence:
    """What `generator` is seeded with, to be sent to another process. Raises `ValueError` as `generator` does."""
    check_seed(seed)
    if stream is None:
        return np.random.SeedSequence(seed)
    check_name("stream", stream, STREAMS)
    return np.random.SeedSequence(seed, spawn_key=(STREAMS[stream], *map(_part, key)))


def child(seed: int, *key: int | str) -> int:
    """A seed of its own for each key, where a function takes a whole number: sums of seeds would meet those of other runs."""
    return int(sequence(seed, "child", *key).generate_state(1)[0])


def _part(part: int | str) -> int:
    return zlib.crc32(part.encode()) if isinstance(part, str) else part
