"""Checks of lesson 1: what an estimator of the KL is worth as a value, and as a loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import optimize

from gradlab.components import values
from gradlab.lessons.lesson import Reply
from gradlab.measure import measure
from gradlab.policies import Bandit, Gaussian
from gradlab.questions.bandits import field
from gradlab.scenario import Scenario
from gradlab.study.report import cell

EXERCISES = ("guess", "overtakes", "raises")

KERNELS = ("k1", "k2", "k3")
#: Step on the logits, as in the analyses.
STEP = 0.1


def guess(answer: str) -> Reply:
    """Which of "k1", "k2", "k3" has, when it is used as a loss, the gradient of the KL as its expected gradient?"""
    if answer not in KERNELS:
        raise ValueError('it is one of "k1", "k2", "k3"')
    four = Scenario(Bandit([1.0, 0.5, 0.0, -0.5]), Bandit([0.0, 0.5, 0.0, 0.5]))
    found = measure(f"{answer}-loss", four)
    bias, size = cell(found, "bias"), cell(found, "gradient_norm")
    if bias < 1e-9:
        return Reply(True, f"As a loss {answer} has a relative bias of 0, though its value is biased.")
    zero = ": its expected gradient is 0" if size < 1e-9 else ", though its value is unbiased"
    return Reply(False, f"As a loss {answer} has a relative bias of {bias:.2f}{zero}.")


def _deviations(mean: float) -> tuple[float, float]:
    """Standard deviations of k1 and k3 for N(0, 1) ‖ N(mean, 1), relative to the KL."""
    found = values(["k1", "k3"], Scenario(Gaussian(0, 1), Gaussian(mean, 1))).set_index("kernel")["std"]
    return float(found["k1"]), float(found["k3"])


def overtakes(answer: float) -> Reply:
    """At which KL, in nats, does the standard deviation of k3 pass that of k1, for N(0, 1) against N(m, 1)? To 1 %."""
    given = float(answer)
    if not 0 < given < 10:
        raise ValueError("a KL between 0 and 10 nats is asked for")

    def log_ratio(mean: float) -> float:
        k1, k3 = _deviations(mean)
        return math.log(k3 / k1)

    meet = float(optimize.brentq(log_ratio, 0.5, 2.0))
    truth = meet**2 / 2
    if abs(given / truth - 1) <= 0.01:
        return Reply(True, f"They are equal at {truth:.4f} nats. Nearer, k3 is the quieter value, and farther off k1.")
    if abs(given / meet - 1) <= 0.01:
        return Reply(False, "That is the distance m of the means. The KL of two Gaussians of variance 1 is m²/2.")
    k1, k3 = _deviations((2 * given) ** 0.5)
    return Reply(
        False, f"At {given:g} nats the standard deviation of k3 is {k3 / k1:.3f} times that of k1; it should be 1 times."
    )


def raises(answer: tuple[Sequence[float], Sequence[float]]) -> Reply:
    """Give two lists of three probabilities, (policy, reference), at which a step of 0.1 with k3 as loss raises the KL."""
    policy, reference = (_probabilities(part) for part in answer)
    found = field(["k3-loss", "k2-loss"], [policy], reference, STEP)
    rise, k2 = (cell(found, "rise", estimator=name) for name in ("k3-loss", "k2-loss"))
    cosine = cell(found, "cosine", estimator="k3-loss")
    if rise > 0:
        return Reply(
            True,
            f"The step raises the KL by {rise:.4g} nats; with k2 as loss it falls by {-k2:.4g}. The expected gradient of k3 "
            f"and the true one have a cosine of {cosine:.3f}.",
        )
    return Reply(
        False,
        f"The step lowers the KL by {-rise:.4g} nats, at a cosine of {cosine:.3f} with the true gradient. k3 as loss descends the "
        "other KL, KL(ref‖π), whose gradient is π − ref. Where is that large, while π log(π/ref) is small? Make a token rare in the "
        "policy that is frequent in the reference, and another one rare in the reference.",
    )


def _probabilities(given: Any) -> list[float]:
    p = np.asarray(given, dtype=float)
    if p.shape != (3,) or (p <= 0).any() or abs(p.sum() - 1) > 1e-6:
        raise ValueError("each of the two is three positive probabilities that add up to 1, as in ([.2, .3, .5], [.5, .3, .2])")
    return [float(x) for x in p / p.sum()]
