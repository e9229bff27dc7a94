"""Where log-ratios lie: shares of tokens against slow loops, and intervals that cover."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gradlab as gl
from gradlab import ratios
from gradlab.policies import LanguageModel
from gradlab.policies.transformer import Transformer

RANGES = [(-np.inf, -0.5), (-0.5, 0.0), (0.0, 0.5), (0.5, np.inf), (-np.inf, 0.0)]


@pytest.fixture(scope="module")
def scenario():
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    net = Transformer(5, 8, width=16, layers=1, heads=2).double()
    torch.random.set_rng_state(state)
    reference = LanguageModel(net, [[1, 2], [3]], 3, eos=0)
    noise = torch.randn(len(reference.parameters), generator=torch.Generator().manual_seed(1)).double()
    return gl.Scenario(reference.with_parameters(reference.parameters + 0.15 * noise), reference, name="tiny")


def slow(scenario: gl.Scenario, low: float, high: float) -> list[float]:
    """Shares by a loop over every response, every prefix of it and every token."""
    policy, reference = scenario.policy, scenario.reference
    prompts, tokens, mask = policy.enumerate()
    log_p, log_ref = policy.logits(prompts, tokens).log_softmax(-1), reference.logits(prompts, tokens).log_softmax(-1)
    found, total = np.zeros(3), 0.0
    for i in range(len(tokens)):
        taken = [float(log_p[i, t, tokens[i, t]]) for t in range(3) if mask[i, t]]
        weight = np.exp(sum(taken)) / len(policy.prompts)
        for t in range(len(taken)):
            total += weight
            for v in range(policy.vocab):
                if low <= float(log_p[i, t, v] - log_ref[i, t, v]) < high:
                    found += weight * np.array([float(log_p[i, t, v].exp()), float(log_ref[i, t, v].exp()), 1 / policy.vocab])
    return list(found / total)


def test_shares_are_those_of_slow_loops(scenario):
    frame = ratios.masses(scenario, RANGES)
    for row, (low, high) in zip(frame.itertuples(), RANGES, strict=True):
        assert [row.policy, row.reference, row.vocabulary] == pytest.approx(slow(scenario, low, high), abs=1e-12)
    assert frame["policy"].iloc[:4].sum() == pytest.approx(1, abs=1e-12)
    assert frame["policy"].iloc[0] > 0.01, "the policies must differ"
    assert frame["policy"].iloc[4] == pytest.approx(frame["policy"].iloc[:2].sum(), abs=1e-12)
    assert set(frame.columns) == set(ratios.COLUMNS)


def test_a_table_is_counted_by_its_occupancy():
    policy = gl.Tree.random(3, 2, seed=0)
    scenario = gl.Scenario(policy, policy.perturbed(kl=0.5, seed=1))
    frame = ratios.histogram(scenario, [-1.0, 0.0, 1.0])
    rows, p, ref = policy.occupancy(), policy.table.softmax(-1), scenario.reference.table.softmax(-1)
    above = (p / ref).log() >= 1
    assert frame["policy"].iloc[-1] == pytest.approx(float((rows[:, None] * p * above).sum() / rows.sum()), abs=1e-12)
    assert frame[["policy", "reference", "vocabulary"]].sum().tolist() == pytest.approx([1, 1, 1], abs=1e-12)


def test_sampled_shares_cover_the_exact_ones(scenario):
    """95 % intervals of 40 runs hold the exact shares about 95 times in a hundred: at least 33 of 40 everywhere."""
    exact = ratios.masses(scenario, RANGES)
    hits = np.zeros((len(RANGES), 3))
    for seed in range(40):
        drawn = ratios.masses(scenario, RANGES, samples=150, seed=seed)
        for k, name in enumerate(("policy", "reference", "vocabulary")):
            hits[:, k] += (drawn[f"{name}_low"] <= exact[name]) & (exact[name] <= drawn[f"{name}_high"])
            assert (drawn[f"{name}_high"] - drawn[f"{name}_low"] < 0.2).all()
    assert hits.min() >= 33
    again = ratios.masses(scenario, RANGES, samples=150, seed=39)
    assert again.equals(drawn)


def test_bad_input_is_refused(scenario):
    with pytest.raises(ValueError, match="a Gaussian has none"):
        ratios.masses(gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(1, 1)), RANGES)
    with pytest.raises(ValueError, match="leave samples out"):
        ratios.masses(gl.Scenario(gl.Bandit([0.0, 1.0]), gl.Bandit([1.0, 0.0])), RANGES, samples=10)
