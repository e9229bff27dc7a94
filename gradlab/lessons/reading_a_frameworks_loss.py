"""Checks of lesson 6: what a loss that somebody wrote descends, and how to mend it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from scipy import optimize
from torch import Tensor

from gradlab._common.names import check_name
from gradlab.audit import LossError, audit
from gradlab.lessons.lesson import Reply

EXERCISES = ("guess", "silent", "repair")

OBJECTIVES = ("reverse_kl", "reverse_kl_frozen_prefix", "forward_kl", "forward_kl_frozen_prefix", "chi2_frozen_prefix", "zero")
#: Bound on the value in the lesson's loss, as frameworks ship it.
BOUND = 10.0


def kl_loss(log_probs: Tensor, ref_log_probs: Tensor, response_mask: Tensor) -> Tensor:
    """The loss of the lesson: k3 with its value clamped, summed over tokens."""
    log_ratio = log_probs - ref_log_probs
    value = torch.exp(-log_ratio) - 1 + log_ratio
    return (value.clamp(-BOUND, BOUND) * response_mask).sum(-1).mean()


def guess(answer: str) -> Reply:
    """Which objective does the loss descend near the reference, on-policy? One of the names that are listed."""
    check_name("objective", answer, OBJECTIVES)
    found = audit(kl_loss).on_policy.text
    named = {"reverse_kl": "reverse KL", "forward_kl": "forward KL", "chi2_frozen_prefix": "χ²"}
    kind = named.get(answer.removesuffix("_frozen_prefix"), named.get(answer, "nothing"))
    right = kind in found.partition(" near ")[0] and answer.endswith("_frozen_prefix") == ("frozen prefixes" in found)
    return Reply(right, f"On-policy it {found}.")


def silent(answer: float) -> Reply:
    """Below which log-ratio ℓ is the gradient of this loss exactly 0? To 0.01."""
    given = float(answer)

    def value(log_ratio: float) -> float:
        at = torch.tensor([[log_ratio]], dtype=torch.float64)
        nothing, bound = torch.zeros_like(at), float("inf")
        kernel = torch.exp(-(at - nothing)) - 1 + at
        return float(kernel.clamp(-bound, bound)) - BOUND

    edge = float(optimize.brentq(value, -10, -0.1))
    if abs(given - edge) <= 0.01:
        return Reply(
            True, f"At ℓ = {edge:.3f} the value is {BOUND:g}. A token that the policy has dropped is not brought back."
        )
    if abs(given + edge) <= 0.01:
        return Reply(False, "Mind the sign: a token that the policy has dropped has log π < log ref.")
    if abs(given + BOUND) <= 0.01:
        return Reply(False, "The clamp is on the value, e^{−ℓ} − 1 + ℓ, and not on the log-ratio.")
    return Reply(False, f"At ℓ = {given:g} the value is {value(given) + BOUND:.3g}, and the clamp is at {BOUND:g}.")


def repair(answer: Callable[..., Any]) -> Reply:
    """Write a loss that descends the reverse KL with frozen prefixes on-policy and off-policy, without clamps."""
    if not callable(answer):
        raise ValueError("it has to be a function, of log_probs, old_log_probs, ref_log_probs and mask")
    try:
        found = audit(answer)
    except LossError as error:
        return Reply(False, f"It cannot be called: {error}")
    if reason := found.why_not("reverse_kl_frozen_prefix"):
        return Reply(False, f"{reason}. Which kernel has the gradient of the reverse KL as a loss?")
    if reason := found.why_not("reverse_kl_frozen_prefix", off_policy=True):
        return Reply(
            False, f"{reason}. The data come from the policy of old_log_probs: each token needs a weight, and it is detached."
        )
    wrong = [probe for probe in found.failures if probe.name in ("clamps", "padding")]
    if wrong:
        return Reply(False, f"It descends the right objective, and then: {wrong[0].finding}.")
    return Reply(True, f"On-policy it {found.on_policy.text}, and off-policy it {found.off_policy.text}.")
