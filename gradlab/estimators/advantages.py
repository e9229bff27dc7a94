"""Advantages: what a response's reward becomes beside the other rewards of its group, or of the batch.

An advantage maps the rewards of groups `[…, G]` to as many numbers. Those of a batch subtract and divide by constants, the mean and
the standard deviation of a large one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradlab._common.names import check_name, check_real, check_whole

#: Rewards of groups `[…, G]` → advantages `[…, G]`.
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Advantage:
    """A kind of advantage: what it is, where it is from, whether it compares a group, divides by the batch, and is linear."""

    name: str
    statement: str
    source: str
    grouped: bool = True
    batch: bool = False
    linear: bool = True


ADVANTAGES: dict[str, Advantage] = {
    each.name: each
    for each in (
        Advantage("reward", "r", "REINFORCE, Williams (1992)", grouped=False),
        Advantage("mean", "r − mean", "Dr. GRPO, arXiv 2503.20783"),
        Advantage("leave_one_out", "r − mean of the others", "RLOO, arXiv 2402.14740"),
        Advantage("group_std", "(r − mean) / (std + ε)", "GRPO, arXiv 2402.03300", linear=False),
        Advantage(
            "batch_std", "(r − mean of the batch) / (std of the batch + ε)", "REINFORCE++, arXiv 2501.03262", False, True
        ),
        Advantage(
            "mean_batch_std",
            "(r − mean) / (std of that over the batch + ε)",
            "REINFORCE++-baseline, arXiv 2501.03262",
            True,
            True,
        ),
        Advantage(
            "pass_at_k",
            "k where right, k·(share of k−1 others with one right) where wrong",
            "PKPO, arXiv 2505.15201",
            linear=False,
        ),
    )
}
STDS = ("population", "sample")
#: Rewards whose standard deviation is a smaller share of their size are equal.
EQUAL = 1e-13


def within_group(
    kind: str | Function, *, std: Literal["population", "sample"] = "population", epsilon: float = 0.0, k: int | None = None
) -> Function:
    """The part of an advantage that compares a group: a function of rewards `[…, G]`.

    std: population (divide by G) or sample (by G − 1). A group of rewards that are equal but for rounding has advantage 0 with any
    `epsilon`.
    Raises `ValueError` for an unknown kind, with the nearest; its function for rewards that are not 0 or 1 where only those will do.
    """
    if callable(kind):
        return lambda rewards: _checked(kind, rewards)
    check_name("advantage", kind, ADVANTAGES)
    if kind == "group_std":
        return lambda rewards: _standardised(rewards, std, epsilon)
    if kind == "pass_at_k":
        assert k is not None
        return lambda rewards: _pass_at_k(rewards, k)
    return {"leave_one_out": _leave_one_out, "mean": _centred, "mean_batch_std": _centred}.get(kind, lambda rewards: rewards)


def check(kind: str | Function, group: int | None, std: str, epsilon: float, k: int | None) -> None:
    """Raise `ValueError` for what an advantage cannot be."""
    if not callable(kind):
        check_name("advantage", kind, ADVANTAGES)
    check_name("std", std, STDS)
    check_real("epsilon", epsilon)
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon is added to a standard deviation: a number from 0 on, got {epsilon!r}")
    if group is not None:
        check_whole("group", group)
    if (callable(kind) or ADVANTAGES[kind].grouped) and (group is None or group < 2):
        what = getattr(kind, "__name__", "a function") if callable(kind) else repr(kind)
        raise ValueError(
            f"advantage {what} compares the responses to one prompt: give group=, a whole number of at least 2, got {group!r}"
        )
    if (kind == "pass_at_k") != (k is not None):
        raise ValueError(f"k belongs to advantage='pass_at_k', which needs it: got advantage={kind!r}, k={k!r}")
    if k is not None:
        check_whole("k", k)
        if group is not None and k > group:
            raise ValueError(f"pass@k is estimated from at least k responses: got k={k}, group={group}")


def _checked(function: Function, rewards: Tensor) -> Tensor:
    found = function(rewards)
    if not isinstance(found, Tensor) or found.shape != rewards.shape or not bool(torch.isfinite(found).all()):
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"an advantage maps the rewards of groups {list(rewards.shape)} to as many finite numbers, got {shape}; each row is a group"
        )
    return found.double()


def _gaps(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards less the first of the group, whose differences are exactly 0 where all are equal, and their mean."""
    apart = rewards - rewards[..., :1]
    return apart, apart.mean(-1, keepdim=True)


def _centred(rewards: Tensor) -> Tensor:
    apart, mean = _gaps(rewards)
    return apart - mean


def _leave_one_out(rewards: Tensor) -> Tensor:
    size = rewards.shape[-1]
    return _centred(rewards) * size / (size - 1)


def _standardised(rewards: Tensor, std: str, epsilon: float) -> Tensor:
    centred, size = _centred(rewards), rewards.shape[-1]
    spread = (centred.square().sum(-1, keepdim=True) / (size if std == "population" else size - 1)).sqrt()
    # Rewards that differ by rounding are equal: nothing of it may be blown up to the size of a standard deviation.
    apart = spread > EQUAL * rewards.abs().amax(-1, keepdim=True)
    return torch.where(apart, centred / (spread + epsilon), 0.0)


def _pass_at_k(rewards: Tensor, k: int) -> Tensor:
    """`k` for a right response; for a wrong one `k` times the share of the (k−1)-subsets of the others that hold a right one."""
    other = rewards[(rewards != 0) & (rewards != 1)]
    if len(other):
        raise ValueError(f"pass@k needs rewards of 0 and 1, got {float(other.flatten()[0]):g}; threshold the reward")
    size = rewards.shape[-1]
    right = rewards.sum(-1, keepdim=True)
    ways = [1 - math.comb(size - 1 - c, k - 1) / math.comb(size - 1, k - 1) for c in range(size)]
    share = torch.tensor([*ways, 1.0], dtype=torch.float64)[right.long()]
    return torch.where(rewards == 1, float(k), k * share)
