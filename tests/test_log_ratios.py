"""Where log-ratios lie: shares of tokens against slow loops, and intervals that cover."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import gradlab as gl
from gradlab.policies import LanguageModel
from gradlab.policies.transformer import Transformer
from gradlab.questions import log_ratios

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
    listed = policy.enumerate()
    prompts, tokens, mask = listed.prompts, listed.tokens, listed.mask
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
    frame = log_ratios.masses(scenario, RANGES)
    for row, (low, high) in zip(frame.itertuples(), RANGES, strict=True):
        assert [row.policy, row.reference, row.vocabulary] == pytest.approx(slow(scenario, low, high), abs=1e-12)
    assert frame["policy"].iloc[:4].sum() == pytest.approx(1, abs=1e-12)
    assert frame["policy"].iloc[0] > 0.01, "the policies must differ"
    assert frame["policy"].iloc[4] == pytest.approx(frame["policy"].iloc[:2].sum(), abs=1e-12)
    assert set(frame.columns) == set(log_ratios.COLUMNS)


def test_a_table_is_counted_by_its_occupancy():
    policy = gl.Tree.random(3, 2, seed=0)
    scenario = gl.Scenario(policy, policy.perturbed(kl=0.5, seed=1))
    frame = log_ratios.histogram(scenario, [-1.0, 0.0, 1.0])
    rows, p, ref = policy.occupancy(), policy.table.softmax(-1), scenario.reference.table.softmax(-1)
    above = (p / ref).log() >= 1
    assert frame["policy"].iloc[-1] == pytest.approx(float((rows[:, None] * p * above).sum() / rows.sum()), abs=1e-12)
    assert frame[["policy", "reference", "vocabulary"]].sum().tolist() == pytest.approx([1, 1, 1], abs=1e-12)


def test_sampled_shares_cover_the_exact_ones(scenario):
    """95 % intervals of 20 runs hold the exact shares: at least 16 of 20 everywhere."""
    exact = log_ratios.masses(scenario, RANGES)
    hits = np.zeros((len(RANGES), 3))
    for seed in range(20):
        drawn = log_ratios.masses(scenario, RANGES, samples=150, seed=seed)
        for k, name in enumerate(("policy", "reference", "vocabulary")):
            hits[:, k] += (drawn[f"{name}_low"] <= exact[name]) & (exact[name] <= drawn[f"{name}_high"])
            assert (drawn[f"{name}_high"] - drawn[f"{name}_low"] < 0.35).all()
    assert hits.min() >= 16
    again = log_ratios.masses(scenario, RANGES, samples=150, seed=19)
    surer = log_ratios.masses(scenario, RANGES, samples=150, seed=19, level=0.999)
    assert (surer["policy_low"] < again["policy_low"]).any()
    assert (surer["policy_high"] > again["policy_high"]).all()
    pd.testing.assert_frame_equal(again, drawn, rtol=1e-12)


def test_ends_hold_for_every_mass_however_rare():
    """Masses of 0 and 1 in `n` responses of one token are binomial: coverage at every probability by summing its law."""
    n = 64
    hits = np.tri(n + 1, n, -1)  # k of n responses hold the mass
    low, high = log_ratios.bounds(hits.T, np.ones(n), 1, np.ones(n + 1))
    assert (low[1:] > 0).all()
    assert (high - low > 1e-3).all()
    assert high[0] == pytest.approx(1 - (0.05 / 6) ** (1 / n), abs=0.03)  # three bets share the error
    for p in np.r_[np.geomspace(1e-6, 0.5, 60), 1 - np.geomspace(1e-6, 0.4, 40)]:
        law = stats.binom(n, p).pmf(np.arange(n + 1))
        assert law @ ((low <= p) & (p <= high)) >= 0.95, f"coverage at a mass of {p}"


@pytest.mark.parametrize("n", [64, 500])
def test_ends_hold_where_few_responses_bring_all_of_it(n):
    """A mass of 7e-5 that one response in fifty shows, in responses of 1 to 6 tokens; the delta method covers a third."""
    rng = np.random.default_rng([n, 3])
    lengths = rng.integers(1, 7, size=(300, n))
    found = (rng.random((300, n)) < 0.02) * 3.5e-3 * lengths
    truth, limit = 7e-5, np.array([0.01])
    ends = np.array([log_ratios.bounds(f[:, None], lengths_, 6, limit) for f, lengths_ in zip(found, lengths, strict=True)])[
        ..., 0
    ]
    assert ((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean() >= 0.95
    assert (ends[:, 1] > ends[:, 0]).all()
    assert ends[:, 1].max() < 0.01 * 10 / n + 0.001


def test_what_the_range_itself_allows_bounds_the_mass(scenario):
    """Where ℓ < −3 the policy has at most e^−3 of what the reference has there, whatever the responses show."""
    drawn = log_ratios.masses(scenario, [(-np.inf, -3.0), (3.0, np.inf)], samples=16, seed=0)
    assert (drawn[["policy", "reference", "vocabulary"]] == 0).all(axis=None), "nothing of the kind is drawn"
    assert 0 < drawn["policy_high"].iloc[0] < np.exp(-3)
    assert 0 < drawn["reference_high"].iloc[1] < np.exp(-3)
    assert (drawn["vocabulary_high"] > 0.1).all()


def test_bad_input_is_refused(scenario):
    with pytest.raises(ValueError, match="a Gaussian has none"):
        log_ratios.masses(gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(1, 1)), RANGES)
    with pytest.raises(ValueError, match="leave samples out"):
        log_ratios.masses(gl.Scenario(gl.Bandit([0.0, 1.0]), gl.Bandit([1.0, 0.0])), RANGES, samples=10)


def test_a_token_on_the_edge_belongs_to_the_range_above():
    policy, reference = gl.Bandit([0.0, 1.0, 2.0]), gl.Bandit([0.0, 1.0, 2.0])
    found = log_ratios.masses(gl.Scenario(policy, reference), [(-np.inf, 0.0), (0.0, np.inf), (0.0, 0.1)])
    assert found["policy"].tolist() == pytest.approx([0, 1, 1])
    assert found["vocabulary"].tolist() == pytest.approx([0, 1, 1])
