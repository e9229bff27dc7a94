"""What the policy part of a loss that makes its own advantages ascends: a utility of the success probability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gradlab.audit.batch import Batch, Subject
from gradlab.audit.engine import ExpectedGradient
from gradlab.audit.identify import Identification
from gradlab.audit.parts import reward_gradients, success
from gradlab.audit.synthetic import Tokens, coefficients, responses
from gradlab.estimators.utility import Utility, utility

#: Responses to one prompt in the group whose advantages are read off.
GROUP = 8
#: Advantages whose utility is looked for, the plainest first, with what it is called.
KNOWN: tuple[tuple[str, dict[str, int], str], ...] = (
    ("leave_one_out", {}, "p, the success probability"),
    ("group_std", {}, "2 arcsin √p as groups grow: rewards divided by the standard deviation of the group"),
    ("pass_at_k", {"k": 2}, "pass@2"),
    ("pass_at_k", {"k": 4}, "pass@4"),
)


def parallel(found: Identification, on: Sequence[ExpectedGradient], tolerance: float) -> Identification:
    """The verdict, or where nothing fits all worlds at once but each has a multiple of ∇E r of its own, that utility."""
    if found.combination or not all(f.finite and float(f.mean.norm()) > tolerance * f.size for f in on):
        return found
    slopes, errors = [], []
    for f in on:
        goal = reward_gradients(f.case)["reward"]
        slope = float(f.mean @ goal / goal.square().sum())
        slopes.append(slope)
        errors.append(float((f.mean - slope * goal).norm() / f.mean.norm()))
    if max(errors) > tolerance or min(slopes) <= 0:
        return found
    at = ", ".join(f"{s:.4g} at p = {success(f.case):.3f}" for s, f in zip(slopes, on, strict=True))
    text = f"is −U'(p) times the gradient of the success probability p, in every world; U'(p) = {at}"
    return replace(found, combination={"utility": 1.0}, error=max(errors), scope="everywhere", text=text)


def advantages_of(subject: Subject, rewards: Tensor) -> Tensor:
    """The advantages `[G]` that a loss gives equal responses with these rewards, read off its coefficients on-policy."""
    rows = [Tokens.at(0.3, -0.2, advantage=1.0 if r > 0 else -1.0) for r in rewards.tolist()]
    # Advantages that are passed are those of a large group.
    probe_batch, _ = responses(*rows, columns=3, vocab=subject.vocab or 2)
    given = torch.where(probe_batch.mask.bool(), (rewards - rewards.mean())[:, None], probe_batch.advantages)
    found, _ = coefficients(subject, replace(probe_batch, advantages=given, rewards=rewards))
    return -found[:, 0]


def ascended(subject: Subject) -> tuple[Utility, str] | None:
    """The utility of a loss that makes its advantages out of rewards, up to a factor, and its name; `None` without one."""

    def function(rewards: Tensor) -> Tensor:
        rows = rewards.reshape(-1, rewards.shape[-1])
        return torch.stack([advantages_of(subject, row) for row in rows]).reshape(rewards.shape)

    found = utility(function, group=GROUP)
    assert found is not None
    assert found.jumps is not None
    own = np.array(found.jumps)
    if not np.isfinite(own).all() or not np.abs(own).max() > 0:
        return None
    for kind, options, words in KNOWN:
        known = utility(kind, group=GROUP, k=options.get("k"))
        assert known is not None
        assert known.jumps is not None
        other = np.array(known.jumps)
        factor = float(own @ other / (other @ other))
        if factor > 0 and np.abs(own - factor * other).max() <= 1e-3 * np.abs(own).max():
            return found, words
    return found, ""


def rewards_matter(subject: Subject) -> bool:
    """Whether the gradient depends on the rewards, and not only on the advantages that are passed."""
    probe_batch, _ = responses(Tokens.at(0.3, -0.2), Tokens.at(0.1, 0.2, advantage=-1.0), columns=3, vocab=subject.vocab or 2)

    def gradient(batch: Batch) -> Tensor:
        return coefficients(subject, batch)[0]

    other = replace(probe_batch, rewards=torch.zeros_like(probe_batch.rewards))
    x, y = gradient(probe_batch), gradient(other)
    size = float(x.norm())
    return math.isfinite(size) and float((x - y).norm()) > 1e-9 * size
