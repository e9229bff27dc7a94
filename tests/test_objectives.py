"""Targets of the whole objective: against slow loops, central differences and closed forms; rewards and what is refused."""

import math

import numpy as np
import oracles
import oracles_objective
import pytest
import torch
import worlds

import gradlab as gl

GIVEN = {"reward": {}, "regularised": {"beta": 0.3}, "pass_at_k": {"k": 3}, "entropy": {}}


def rewarded(shape: str, binary: bool, off_policy: bool = False, seed: int = 0) -> tuple[gl.Scenario, dict]:
    """A random scenario with a random reward, and that reward as the oracles take it."""
    world = worlds.scenario(shape, off_policy, seed)
    everything = oracles.responses(world.policy.vocab, world.policy.length, world.policy.eos)
    rng = np.random.default_rng([seed, 7])
    values = rng.integers(2, size=len(everything)) if binary else rng.normal(size=len(everything))
    table = dict(zip(everything, values.astype(float).tolist(), strict=True))

    def reward(rollout: gl.Rollout) -> torch.Tensor:
        return torch.tensor(
            [table[tuple(y[: int(m.sum())].tolist())] for y, m in zip(rollout.tokens, rollout.mask, strict=True)],
            dtype=torch.float64,
        )

    return gl.Scenario(world.policy, world.reference, world.behaviour, reward=reward), table


@pytest.mark.parametrize("shape", worlds.SHAPES)
@pytest.mark.parametrize("name", GIVEN)
def test_against_slow_loops(name, shape):
    world, table = rewarded(shape, binary=name == "pass_at_k")
    policy, reference = world.policy.table, world.reference.table

    def loop(logits):
        return oracles_objective.objective(name, logits, reference, table, world.policy.eos, **GIVEN[name])

    assert gl.exact.objective(name, world, **GIVEN[name]) == pytest.approx(float(loop(policy)), rel=1e-12)
    worlds.assert_same(
        gl.exact.gradient(name, world, **GIVEN[name]), oracles_objective.differentiate(loop, policy), tolerance=1e-12
    )


def test_a_reward_per_token_is_summed_and_nothing_behind_the_end_counts():
    policy = gl.Tree.random(vocab=3, length=3, seed=1, eos=1)
    per_token = gl.Scenario(policy, policy, reward=lambda rollout: rollout.tokens.double() + 1)
    whole = gl.Scenario(policy, policy, reward=lambda rollout: ((rollout.tokens + 1) * rollout.mask).sum(-1).double())
    worlds.assert_same(gl.exact.gradient("reward", per_token), gl.exact.gradient("reward", whole), tolerance=1e-14)


@pytest.mark.parametrize("policy", [gl.Tree.random(3, 3, seed=2, eos=0), gl.Markov.random(3, 4, seed=3, eos=2)])
def test_a_table_of_rewards_is_the_sum_over_responses(policy):
    numbers = np.random.default_rng(0).normal(size=policy.table.shape)
    table = gl.TableReward(policy, numbers)
    by_visits = gl.Scenario(policy, policy, reward=table)
    by_responses = gl.Scenario(policy, policy, reward=lambda rollout: table(rollout))
    assert gl.exact.objective("reward", by_visits) == pytest.approx(gl.exact.objective("reward", by_responses), rel=1e-12)
    worlds.assert_same(gl.exact.gradient("reward", by_visits), gl.exact.gradient("reward", by_responses), tolerance=1e-12)


def test_a_long_chain_has_an_exact_reward():
    """Two tokens, the second of which never changes back: the expected number of firsts is a geometric sum."""
    stay = math.log(0.9 / 0.1)
    chain = gl.Markov([stay, 0.0], [[stay, 0.0], [-500.0, 0.0]], length=64)
    world = gl.Scenario(chain, chain, reward=gl.TableReward(chain, [[1.0, 0.0]] * 3))
    expected = sum(0.9**t for t in range(1, 65))
    assert -gl.exact.objective("reward", world) == pytest.approx(expected, rel=1e-12)
    assert gl.exact.objective("regularised", world, beta=0.5) == pytest.approx(-expected, rel=1e-12)


def test_gaussians():
    """E x² = m² + s²; entropy log s + ½ log 2πe; P(x > 0) = Φ(m/s), whose density is that of a jump."""
    m, s = 0.4, 0.8
    world = gl.Scenario(gl.Gaussian(m, s), gl.Gaussian(0, 1), reward=lambda rollout: rollout.tokens[:, 0].square())
    assert -gl.exact.objective("reward", world) == pytest.approx(m * m + s * s, rel=1e-10)
    worlds.assert_same(gl.exact.gradient("reward", world), [-2 * m, -2 * s], tolerance=1e-9)
    assert gl.exact.objective("entropy", world) == pytest.approx(-math.log(s) - 0.5 * math.log(2 * math.pi * math.e), rel=1e-12)
    worlds.assert_same(gl.exact.gradient("entropy", world), [0, -1 / s], tolerance=1e-12)

    class Positive:
        kinks = (0.0,)

        def __call__(self, rollout):
            return (rollout.tokens[:, 0] > 0).double()

    world = gl.Scenario(gl.Gaussian(m, s), gl.Gaussian(0, 1), reward=Positive())
    density = math.exp(-0.5 * (m / s) ** 2) / math.sqrt(2 * math.pi)
    assert -gl.exact.objective("reward", world) == pytest.approx(0.5 * math.erfc(-m / s / math.sqrt(2)), rel=1e-9)
    worlds.assert_same(gl.exact.gradient("reward", world), [-density / s, density * m / s**2], tolerance=1e-8)


def test_language_models_average_over_prompts():
    policy = gl.policies.small("addition", "few", prompts=["12+34=", "50+07="])
    reference = gl.policies.small("addition", "reference", prompts=["12+34=", "50+07="])
    world = gl.Scenario(policy, reference, reward=gl.training.task_reward("addition", policy))
    alone = []
    for prompt in ("12+34=", "50+07="):
        one = gl.policies.small("addition", "few", prompts=[prompt])
        alone.append(gl.Scenario(one, one, reward=gl.training.task_reward("addition", one)))
    for name, given in (("reward", {}), ("pass_at_k", {"k": 4}), ("entropy", {})):
        each = [gl.exact.objective(name, case, **given) for case in alone]
        assert gl.exact.objective(name, world, **given) == pytest.approx(np.mean(each), rel=1e-9)
    solved = [-gl.exact.objective("reward", case) for case in alone]
    assert 0 < min(solved) < max(solved) < 1
    slope = torch.stack([4 * (1 - p) ** 3 * gl.exact.gradient("reward", case) for p, case in zip(solved, alone, strict=True)])
    worlds.assert_same(gl.exact.gradient("pass_at_k", world, k=4), slope.mean(0), tolerance=1e-5)  # float32


def test_measure_compares_with_them():
    world, _ = rewarded("tree", binary=False)
    frame = gl.measure("k1-reward-to-go", world, target=["reverse_kl", "regularised"], beta=0.2)
    truth = gl.exact.gradient("regularised", world, beta=0.2)
    gap = gl.exact.moments(gl.ESTIMATORS["k1-reward-to-go"], world).mean - truth
    assert frame.bias[0] == 0
    assert frame.bias[1] == pytest.approx(float(gap.norm() / truth.norm()), rel=1e-12)


BANDIT = gl.Bandit([0.0, 1.0, 2.0])


def of(reward):
    return gl.Scenario(BANDIT, BANDIT, reward=reward)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: of([1.0, 0.0, 0.0]), r"reward must be a function of a rollout.*got list; .*TableReward"),
        (lambda: gl.Scenario(BANDIT, BANDIT, old=gl.Bandit([0.0, 1.0])), "old does not share the policy's support"),
        (lambda: gl.exact.gradient("reward", of(None)), r"the scenario has no reward; give one, gl.Scenario\(…, reward=fn\)"),
        (lambda: gl.exact.gradient("reward", of(lambda r: r.tokens.double()[:, :, None])), r"per token, \[3, 1\], got \[3, 1, 1\]"),
        (lambda: gl.exact.gradient("reward", of(lambda r: 1.0)), "got float"),
        (lambda: gl.exact.gradient("reward", of(lambda r: torch.full((3,), math.nan))), "got nan for response 0"),
        (lambda: gl.exact.gradient("reward", of(lambda r: torch.tensor([0, math.inf, 0]))), "got inf for response 1"),
        (lambda: gl.exact.gradient("regularised", of(lambda r: torch.ones(3))), "needs beta: give beta=0.04"),
        (lambda: gl.exact.gradient("regularised", of(lambda r: torch.ones(3)), beta=math.inf), "beta must be a finite number"),
        (lambda: gl.exact.gradient("regularised", of(lambda r: torch.ones(3)), bta=1), "unknown parameter .*'bta'; did you mean 'beta'"),
        (lambda: gl.exact.gradient("reverse_kl", of(None), beta=1), "'reverse_kl' has no parameters, got beta"),
        (lambda: gl.exact.gradient("rewards", of(None)), "unknown target 'rewards'; did you mean 'reward'"),
        (lambda: gl.exact.gradient("pass_at_k", of(lambda r: torch.tensor([0, 1, 0.5])), k=2), "rewards of 0 and 1, got 0.5; threshold"),
        (lambda: gl.exact.gradient("pass_at_k", of(lambda r: torch.ones(3)), k=0), "k must be a positive whole number"),
        (lambda: gl.exact.gradient("utility", of(lambda r: torch.ones(3)), utility=2), r"utility must be a gl.utility"),
        (lambda: gl.TableReward(BANDIT, [1.0, 2.0]), r"shape of the policy's, \[1, 3\], got \[2\]"),
        (lambda: gl.TableReward(BANDIT, [1.0, 2.0, math.nan]), "NaN or infinite"),
        (lambda: gl.TableReward(gl.Gaussian(0, 1), [1.0]), "a Gaussian has no table of tokens"),
        (lambda: gl.measure("k2-loss", of(lambda r: torch.ones(3)), target="regularised"), "needs beta"),
        (lambda: gl.measure("k2-loss", of(None), beta=0.1), "none of the targets reverse_kl has a parameter 'beta'"),
    ],
)  # fmt: skip
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_list():
    assert list(gl.OBJECTIVES) == ["reward", "regularised", "pass_at_k", "utility", "entropy"]
    assert all(each.name == name and each.statement and each.source for name, each in gl.OBJECTIVES.items())
