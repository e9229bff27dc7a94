"""Baselines of the reward: noise by loops over whole groups, by closed forms, and by exact moments of the losses."""

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

import gradlab as gl

Array = NDArray[np.float64]
LOGITS = [0.3, -0.6, 0.5, 0.1]
REWARDS = {"binary": [1.0, 0.0, 1.0, 0.0], "several": [2.0, -1.0, 0.5, 0.0]}


def world(name: str) -> tuple[gl.Scenario, Array, Array, Array]:
    """A bandit with this reward, its probabilities `[4]`, rewards `[4]` and scores `[4, 4]`."""
    policy = gl.Bandit(LOGITS)
    scenario = gl.Scenario(policy, policy, reward=gl.TableReward(policy, REWARDS[name]))
    probability = np.exp(LOGITS) / np.exp(LOGITS).sum()
    return scenario, probability, np.array(REWARDS[name]), np.eye(4) - probability


def constant(probability: Array, reward: Array, score: Array, baseline: float) -> float:
    """`E‖s‖²(r − b)² − ‖E s r‖²`, the noise with a constant baseline."""
    mean = (probability * reward) @ score
    return float(probability @ ((score**2).sum(-1) * (reward - baseline) ** 2) - mean @ mean)


def leave_one_out(probability: Array, reward: Array, score: Array, group: int) -> float:
    """Noise with the exact mean, and `(Var r · E‖s‖² + ‖E s r‖²) / (G − 1)` for estimating it."""
    expected, mean = float(probability @ reward), (probability * reward) @ score
    spread, size = probability @ (reward - expected) ** 2, probability @ (score**2).sum(-1)
    return constant(probability, reward, score, expected) + float(spread * size + mean @ mean) / (group - 1)


def by_groups(probability: Array, reward: Array, score: Array, group: int, scale: float) -> float:
    """`G` times the covariance trace of a group's average gradient, advantages `scale · (r − mean)`, over all groups."""
    mean, second = np.zeros(4), 0.0
    for ys in product(range(4), repeat=group):
        index = list(ys)
        gradient = (scale * (reward[index] - reward[index].mean())) @ score[index] / group
        chance = probability[index].prod()
        mean, second = mean + chance * gradient, second + chance * gradient @ gradient
    return group * float(second - mean @ mean)


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("group", [2, 3, 5])
def test_the_noise_of_leave_one_out_is_that_of_the_mean_and_of_estimating_it(name: str, group: int) -> None:
    scenario, probability, reward, score = world(name)
    expected = leave_one_out(probability, reward, score, group)
    assert by_groups(probability, reward, score, group, group / (group - 1)) == pytest.approx(expected, rel=1e-12)
    assert gl.exact.moments(gl.PolicyLoss("leave_one_out", group), scenario).trace_cov == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("group", [2, 8, 64])
def test_the_group_mean_is_a_leave_one_out_of_smaller_scale(name: str, group: int) -> None:
    scenario, probability, reward, score = world(name)
    scale = (group - 1) / group
    own, others = (gl.exact.moments(gl.PolicyLoss(each, group), scenario) for each in ("mean", "leave_one_out"))
    np.testing.assert_allclose(own.mean, scale * others.mean, rtol=1e-12)
    assert own.trace_cov == pytest.approx(scale**2 * others.trace_cov, rel=1e-12)
    assert others.trace_cov == pytest.approx(leave_one_out(probability, reward, score, group), rel=1e-12)


@pytest.mark.parametrize("name", REWARDS)
def test_no_constant_baseline_is_less_noisy_than_the_optimal_one(name: str) -> None:
    """The optimal one is `E‖s‖²r / E‖s‖²`; another's noise is above it by `E‖s‖² (b − b*)²`."""
    scenario, probability, reward, score = world(name)
    square = probability * (score**2).sum(-1)
    best = float(square @ reward / square.sum())
    least = constant(probability, reward, score, best)
    for baseline in (0.0, float(probability @ reward), best + 0.3):
        above = float(square.sum() * (baseline - best) ** 2)
        assert constant(probability, reward, score, baseline) == pytest.approx(least + above, rel=1e-12)
        assert above > 0
    none = gl.exact.moments(gl.PolicyLoss("reward"), scenario).trace_cov
    assert none == pytest.approx(constant(probability, reward, score, 0.0), rel=1e-12)
    assert none > least


def test_leave_one_out_can_be_noisier_than_no_baseline() -> None:
    """Where almost every response is wrong, the mean is nearly 0 and estimating it from one other costs more than it saves."""
    policy = gl.Bandit([-3.0, 0.0, 0.0, 0.0])
    scenario = gl.Scenario(policy, policy, reward=gl.TableReward(policy, [1.0, 0.0, 0.0, 0.0]))
    none = gl.exact.moments(gl.PolicyLoss("reward"), scenario).trace_cov
    pair, many = (gl.exact.moments(gl.PolicyLoss("leave_one_out", group), scenario).trace_cov for group in (2, 64))
    assert pair > 1.2 * none
    assert many < 1.05 * none


@pytest.mark.parametrize(("logit", "low", "high"), [(-1.1, 0.85, 0.87), (0.0, 0.68, 0.70), (3.0, 50, 70)])
def test_a_mean_helps_rare_successes_and_harms_frequent_ones(logit: float, low: float, high: float) -> None:
    """One right response among four: without a baseline only right ones pull, whose scores vanish as they become certain."""
    policy = gl.Bandit([logit, 0.0, 0.0, 0.0])
    scenario = gl.Scenario(policy, policy, reward=gl.TableReward(policy, [1.0, 0.0, 0.0, 0.0]))
    none = gl.exact.moments(gl.PolicyLoss("reward"), scenario).trace_cov
    p = np.exp(logit) / (np.exp(logit) + 3)
    assert none == pytest.approx(p * (1 - p) ** 3 * 4 / 3, rel=1e-12)
    assert low < gl.exact.moments(gl.PolicyLoss("leave_one_out", 64), scenario).trace_cov / none < high
