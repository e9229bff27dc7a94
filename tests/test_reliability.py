"""Rows called reliable have intervals that hold; the others say that they cannot know."""

from __future__ import annotations

import math

import numpy as np
import pytest
import simulation
import torch
from scipy import stats

import gradlab as gl
from gradlab import reliability
from gradlab.cli import measure
from gradlab.ledger.form import Claim
from gradlab.ledger.verify import settle
from gradlab.moments import gradients
from gradlab.policies import LanguageModel
from gradlab.policies.transformer import Transformer
from gradlab.rollout import Rollout
from gradlab.solvers import montecarlo

OPEN = {"bias": (0, math.inf), "cosine": (-1, 1), "noise": (0, math.inf), "crossover": (0, math.inf)}


def drawn_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(montecarlo, "COUNTED_RESPONSES", 0)


def test_reliable_rows_cover_and_light_tails_are_not_marked() -> None:
    frame = simulation.table(40, [300, 10_000], every=5)
    for column, known in {"bias": "mean_known", "cosine": "mean_known", "noise": "noise_known"}.items():
        for row in frame[frame[known]].to_dict("records"):
            hits = stats.binomtest(round(row[column] * row["runs"]), row["runs"], 0.95, alternative="less")
            assert hits.pvalue > 1e-5, row
        held = frame.loc[frame[known], column]
        assert held.mean() > 0.93
        assert len(held) > 25
    unmarked = frame["mean_known"] & frame["noise_known"]
    assert frame.loc[unmarked, "crossover"].min() > 0.8
    light, heavy = frame[frame["light"]], frame[~frame["light"]]
    assert unmarked[light.index].mean() > 0.8
    # Without the marks intervals would claim what they do not have.
    assert heavy.loc[~heavy["noise_known"], "noise"].min() < 0.3
    assert heavy.loc[~heavy["mean_known"], "bias"].min() < 0.7


def test_equal_rare_events_carry_a_sum_if_there_are_enough() -> None:
    for expected, enough in ((1.5, False), (15, False), (30, True), (400, True)):
        rates, sizes = np.array([expected, 1e6]), np.array([1e9, 1e-9])
        known = reliability.assess(rates, sizes, 3)
        assert (known.mean, known.noise) == (enough, enough)
        assert known.unseen == pytest.approx(math.exp(-expected), rel=1e-3)


def test_what_is_too_rare_to_be_met_must_not_matter() -> None:
    common, often = np.array([3.0, 1.0]), np.array([5e4, 5e4])
    for size, harmless in ((1e3, True), (1e9, False)):
        known = reliability.assess(np.r_[1e-3, often], np.r_[size, common], 3)
        assert known.noise is harmless
    assert not reliability.assess(np.array([1e-9, 1e3]), np.array([np.inf, 1.0]), 3).mean


@pytest.mark.parametrize("name", ["k3-loss", "full-both-prefix", "k1-reward-return", "user"])
@pytest.mark.parametrize("kind", ["tree", "markov", "gaussian"])
def test_distances_from_the_mean_are_those_of_whole_gradients(kind: str, name: str) -> None:
    policy = {
        "tree": gl.Tree.random(3, 2, seed=0, eos=1),
        "markov": gl.Markov.random(3, 3, seed=0),
        "gaussian": gl.Gaussian(0, 1),
    }[kind]
    scenario = gl.Scenario(policy, policy.perturbed(scale=0.5, seed=1), policy.perturbed(scale=0.3, seed=2))
    rollout = Rollout.enumerated(scenario)
    loss = (lambda r: (r.log_ratio.square() * r.mask_float).sum(-1)) if name == "user" else gl.ESTIMATORS[name]
    batch = gradients([gl.ESTIMATORS["k2-loss"], loss], rollout)
    centres = batch.mean(rollout.weight) + 0.1
    table = batch.tables(1).flatten(1)
    found = reliability.squared_norms(batch, centres)[1]
    torch.testing.assert_close(found, (table - centres[1]).square().sum(-1), rtol=1e-9, atol=1e-11)


def test_looking_one_token_ahead_on_a_bandit_is_its_law() -> None:
    scenario = simulation.dropped(-7)
    loss = gl.ESTIMATORS["k3-loss"]
    rates, sizes = reliability._one_step_ahead([loss], scenario, 1000, seed=0)
    batch = gradients([loss], Rollout.enumerated(scenario))
    np.testing.assert_allclose(rates, batch.rollout.weight.numpy(), rtol=1e-12)
    np.testing.assert_allclose(sizes[0], batch.tables(0).flatten(1).square().sum(-1).numpy(), rtol=1e-12)


@pytest.mark.parametrize(
    "name", ["k3-loss", "k1-loss-mean", "full-loss", "k3-loss-prefix", "k1-reward-to-go", "k1-loss-prefix"]
)
def test_what_tokens_add_sums_up_to_the_second_moment(name: str) -> None:
    """On a tree, whose steps have rows of their own, a response's `‖g‖²` is the sum of what its tokens add."""
    policy = gl.Tree.random(3, 3, seed=3)
    scenario = gl.Scenario(policy, policy.perturbed(scale=0.5, seed=4), policy.perturbed(scale=0.2, seed=5))
    loss = gl.ESTIMATORS[name]
    batch = gradients([loss], Rollout.enumerated(scenario))
    sums = [
        float(rates @ sizes[0])
        for rates, sizes in (reliability._one_step_ahead([loss], scenario, 10_000, seed) for seed in range(12))
    ]
    truth = float(batch.square(batch.rollout.weight)[0])
    error = np.std(sums) / 12**0.5
    # Of credit for later tokens and of their weights a token may also take away, so that sizes add up to more.
    assert truth - 5 * error - 1e-9 <= np.mean(sums)
    if name not in ("k1-reward-to-go", "k1-loss-prefix"):
        assert np.mean(sums) <= truth + 5 * error + 1e-9


def test_a_dropped_mode_opens_its_ends_and_settles_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    frame = gl.measure(["k3-loss", "k2-loss", "full-loss"], simulation.dropped(-9), samples=1000)
    k3, k2, full = (row for row in frame.itertuples())
    assert [k3.reliable, k2.reliable, full.reliable] == [False, False, True]
    for column, ends in OPEN.items():
        assert (getattr(k3, f"{column}_low"), getattr(k3, f"{column}_high")) == ends
    # The mean of k2 is known from so many, its noise is not.
    assert k2.bias_high < math.inf
    assert (k2.noise_low, k2.noise_high) == OPEN["noise"]
    assert k3.unseen == pytest.approx(0.857, abs=0.001)  # unmet with probability .857, and nearly all of the second moment
    claim = Claim("x", "", "", "", "03_objectives", (), "bias", ">", 0.01, 0.0)
    rows = frame[frame["estimator"] == "k3-loss"]
    assert settle(claim, rows).verdict == "UNDECIDED"
    measure.show(frame)
    assert "2 of 3 rows are not reliable" in capsys.readouterr().out
    assert reliability.unreliable_rows_message(frame[frame["estimator"] == "full-loss"]) is None


def test_exact_rows_have_nothing_to_be_told() -> None:
    frame = gl.measure(["k3-loss"], simulation.sine(False))
    assert frame[["reliable", "unseen", "crossover_low", "crossover_high"]].isna().all(axis=None)
    assert reliability.unreliable_rows_message(frame) is None


def test_a_gaussian_without_a_second_moment_is_never_reliable() -> None:
    scenario = gl.Scenario(gl.Gaussian(0, 0.6), gl.Gaussian(0.1, 1))
    for samples in (300, 100_000):
        row = gl.measure("k3-loss", scenario, samples=samples).iloc[0]
        assert not row["reliable"]
        assert row["noise_high"] == math.inf
        assert row["unseen"] == pytest.approx(1)


def test_drawn_and_counted_bandits_are_told_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["k3-loss", "k2-loss", "k1-loss"]
    worlds = [simulation.dropped(logit) for logit in (-4, -6, -9)]
    counted = gl.measure(names, worlds, samples=2000)
    drawn_one_by_one(monkeypatch)
    drawn = gl.measure(names, worlds, samples=2000)
    assert (drawn["method"] == "drawn").all()
    assert not counted["reliable"].all()
    assert (~drawn["reliable"] | counted["reliable"]).all()  # the sample may say no where the law does not
    assert (drawn["reliable"] == counted["reliable"]).mean() > 0.7


def test_reliable_rows_of_drawn_sequences_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighted off-policy on a tree, where tokens are looked up at visited prefixes only."""
    scenario, names = (
        simulation.sine(True),
        ["k3-loss", "k3-loss-prefix", "k3-loss-sequence-weight", "k1-reward-sequence-weight"],
    )
    exact = gl.measure(names, scenario).set_index("estimator")
    drawn_one_by_one(monkeypatch)
    runs = [gl.measure(names, scenario, samples=600, seed=seed).set_index("estimator") for seed in range(20)]
    for column in ("bias", "noise", "cosine"):
        for n in names:
            held = [
                run.loc[n, f"{column}_low"] - 1e-9 <= exact.loc[n, column] <= run.loc[n, f"{column}_high"] + 1e-9
                for run in runs
            ]
            assert stats.binomtest(sum(held), len(held), 0.95, alternative="less").pvalue > 1e-4, (column, n)
    assert np.mean([run["reliable"].mean() for run in runs]) > 0.5


def test_weights_of_long_responses_are_told_from_the_batches() -> None:
    """Sequence weights of 48 steps: no single token is rare, their product is."""
    policy = gl.Markov.random(4, 48, seed=0)
    scenario = gl.Scenario(policy, policy.perturbed(kl=0.5, seed=1), policy.perturbed(kl=2.5, seed=2))
    frame = gl.measure(["k2-loss", "k1-reward-sequence-weight"], scenario, samples=4000).set_index("estimator")
    assert bool(frame.loc["k2-loss", "reliable"])
    assert not frame.loc["k1-reward-sequence-weight", "reliable"]


def test_a_users_loss_that_is_drawn_has_batches_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(rollout: Rollout) -> torch.Tensor:
        return (0.5 * rollout.log_ratio.square()).sum(-1)

    scenario = simulation.sine(False)
    assert np.isfinite(gl.measure(mine, scenario, samples=1000)["unseen"].iloc[0])
    drawn_one_by_one(monkeypatch)
    row = gl.measure(mine, scenario, samples=4000).iloc[0]
    assert np.isnan(row["unseen"])
    assert row["reliable"]


def test_a_sample_never_says_that_there_is_no_bias() -> None:
    frame = gl.measure(["k1-reward-to-go", "k3-loss", "full-both"], simulation.sine(False), samples=5000)
    exact = gl.measure(["k1-reward-to-go", "k3-loss", "full-both"], simulation.sine(False))
    assert np.isfinite(frame["crossover_low"]).all()
    assert not np.isinf(frame["crossover"]).any()
    assert (frame["crossover_low"] <= exact["crossover"]).all()
    assert (exact["crossover"] <= frame["crossover_high"]).all()
    unknown = frame["bias"] == 0
    assert frame.loc[unknown, "crossover"].isna().all()
    biased = frame[frame["estimator"] == "k3-loss"].iloc[0]
    assert biased["crossover"] == pytest.approx(biased["noise"] / biased["bias"] ** 2)
    assert 0 < biased["crossover_low"] < biased["crossover"] < biased["crossover_high"] < math.inf


def test_language_models_are_looked_up_too() -> None:
    torch.manual_seed(0)
    policy = LanguageModel(Transformer(5, 8, width=16, layers=1, heads=2).double(), [[1, 2], [3]], 3, eos=0)
    reference = policy.with_parameters(policy.parameters + 0.1 * torch.randn(len(policy.parameters)).double())
    frame = gl.measure(["k3-loss", "k1-reward-loo"], gl.Scenario(policy, reference), samples=256)
    assert frame["reliable"].notna().all()
    assert frame["unseen"].between(0, 1).all()


def test_a_target_that_is_estimated_must_be_known_as_well() -> None:
    sure, lost = reliability.Reliability(True, True, 0.1), reliability.Reliability(False, True, 0.4)
    both = sure.against(lost)
    assert (both.mean, both.noise, both.unseen) == (False, False, 0.4)


def test_rounding_does_not_order_events_of_one_size():
    """Events of equal size and different rates, each size a unit in the last place off one way or the other."""
    rng = np.random.default_rng(0)
    rates, sizes = rng.exponential(0.5, 60), np.repeat(rng.exponential(1.0, 12), 5)
    plain = reliability.assess(rates, sizes, 10)
    for seed in range(20):
        nudged = np.nextafter(sizes, np.random.default_rng(seed).choice([0.0, 10.0], 60))
        found = reliability.assess(rates, nudged, 10)
        assert found.unseen == pytest.approx(plain.unseen, rel=1e-12)
        assert (found.mean, found.noise) == (plain.mean, plain.noise)
    # An event counts as unseen when nothing of its size or above was seen.
    by_size = [(float(rates[sizes >= s].sum()), float((rates * sizes)[sizes == s].sum())) for s in np.unique(sizes)]
    assert plain.unseen == pytest.approx(sum(part * math.exp(-above) for above, part in by_size) / (rates @ sizes), rel=1e-12)
