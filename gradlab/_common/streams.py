"""Random streams: every draw comes from one entropy and the key of a registered stream, never from a global generator."""

from __future__ import annotations

import numpy as np

from gradlab._common.names import check_name, check_seed

#: All streams, each used by one function, and the first part of their keys. The logits of random policies have the empty key.
STREAMS = {
    "policies.perturbed": 1,
    "montecarlo": 2,
    "components.values": 3,
    "analysis.03": 4,
    "sequences.lazy_chain": 5,
    "sequences.differences": 6,
    "analysis.07": 7,
    "analysis.07.rewards": 8,
    "small.held_out": 9,
    "distance.random_policies": 10,
    "analysis.09": 11,
    "tails.running": 12,
    "training": 13,
    "log_ratios": 14,
    "analysis.11.engines": 15,
    "reliability": 16,
    "asymmetry": 17,
    "compositions": 18,
    "tails.dropped": 19,
    "analysis.10.sums": 20,
    "analysis.10.engines": 21,
    "distance.bootstrap": 22,
    "child": 23,
    "behaviour.missing_support": 24,
    "check": 25,
    "audit.padding": 26,
    "smollm2.reinforce": 27,
    "language": 28,
    "analysis.14.bandits": 33,
    "metrics": 40,
    "analysis.05": 29,
    "analysis.11.questions": 30,
    "records.changes": 31,
    "records.corrections": 32,
    "corrections": 42,
    "analysis.19.rewards": 43,
    "audit.rewards": 34,
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
    parts = (byte for part in key for byte in (part.encode() if isinstance(part, str) else (part,)))
    return np.random.SeedSequence(seed, spawn_key=(STREAMS[stream], *parts))


def child(seed: int, number: int) -> int:
    """The seed of a numbered scenario of a run, where a function takes a whole number: the number itself if the run's seed is 0.

    So a scenario of a default run can be made by hand, and runs with other seeds share none, as they would if numbers were added.
    """
    return int(sequence(seed, "child", number).generate_state(1)[0]) if seed else number
