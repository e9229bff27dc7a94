"""Checks of lesson 5: when a bias matters, and when a sample cannot know."""

from __future__ import annotations

import numpy as np

from gradlab.lessons.lesson import Reply
from gradlab.measure import measure
from gradlab.policies import Bandit, Gaussian
from gradlab.questions.tails import k3_variance
from gradlab.scenario import Scenario
from gradlab.study.report import cell

EXERCISES = ("guess", "matters", "finite")


def near() -> Scenario:
    """The bandit of the lesson, near its reference."""
    policy = Bandit.random(10, seed=0)
    return Scenario(policy, policy.perturbed(kl=0.1, seed=1))


def dropped() -> Scenario:
    """A policy that has nearly dropped a token to which the reference gives a fifth."""
    reference = np.log([0.2, *[0.8 / 9] * 9])
    policy = reference.copy()
    policy[0] = -9.0
    return Scenario(Bandit(policy), Bandit(reference))


def guess(answer: float) -> Reply:
    """In how many of 100 batches of 64 is the dropped token drawn at least once? Give a number of batches."""
    probability = float(dropped().policy.table.softmax(-1)[0, 0])
    truth = 100 * (1 - (1 - probability) ** 64)
    given = float(answer)
    if given < 0 or given > 100:
        raise ValueError("a number from 0 to 100 is asked for")
    if abs(given - truth) <= 1:
        return Reply(
            True, f"Its probability is {probability:.2g}: in {truth:.1f} of 100 batches, and the others know nothing of it."
        )
    return Reply(False, f"It is drawn in {truth:.1f} of 100 batches: its probability is {probability:.2g}.")


def matters(answer: float) -> Reply:
    """From which batch size on is the squared bias of k3 as loss larger than its variance, near the reference? To 5 %."""
    given = float(answer)
    found = measure("k3-loss", near())
    bias, noise = cell(found, "bias"), cell(found, "noise")
    truth = noise / bias**2
    if abs(given / truth - 1) <= 0.05:
        return Reply(True, f"From {truth:.0f} responses on. It is the column `crossover`.")
    if abs(given * bias / noise - 1) <= 0.05:
        return Reply(False, "The bias has to be squared: a batch of B errs by bias² + noise/B.")
    if given <= 0:
        return Reply(False, "A batch has at least one response.")
    return Reply(False, f"There the squared bias is {bias**2 * given / noise:.2g} times the variance; it should be 1 times.")


def finite(answer: float) -> Reply:
    """Policy N(0, σ), reference N(0, 1): what is the smallest σ at which the variance of k3's value is finite? To 1 %."""
    given = float(answer)
    if not 0 < given < 10:
        raise ValueError("a standard deviation between 0 and 10 is asked for")

    def variance(std: float) -> float:
        return k3_variance(Scenario(Gaussian(0, std), Gaussian(0, 1)))

    above, below = variance(1.01 * given), variance(0.99 * given)
    if np.isfinite(above) and not np.isfinite(below):
        return Reply(True, "E[δ²] = ∫ ref²/π exists if π falls off at most twice as fast as ref: σ² > ½.")
    if not np.isfinite(above):
        square = " Is that the variance, and not the standard deviation?" if np.isfinite(variance(1.01 * given**0.5)) else ""
        return Reply(False, f"At σ = {given:g} the variance is infinite.{square}")
    return Reply(False, f"At σ = {given:g} the variance is {variance(given):.3g}, and a little below it is finite, too.")
