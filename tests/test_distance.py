"""Bands, slopes and batch sizes over random scenarios, against plain loops, planted power laws and drawn batches."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import gradlab as gl
from gradlab.questions import distance

KLS = (1e-4, 1e-3, 1e-2, 1.0)
BANDITS = distance.sweep(distance.random_policies("bandit", 3, seed=1), KLS)
TREES = distance.sweep(distance.random_policies("tree", 2, seed=1), KLS)


@pytest.mark.parametrize("family", ["bandit", "tree", "markov"])
def test_a_sweep_keeps_the_policy_and_the_direction(family):
    (name, policy), *_ = distance.random_policies(family, 1, seed=4).items()
    near, far = distance.sweep({name: policy}, (1e-6, 0.5))
    assert near.kl() == pytest.approx(1e-6, rel=1e-6)
    assert far.kl() == pytest.approx(0.5, rel=1e-9)
    assert near.label == far.label == f"random {family} 0"
    steps = [(s.reference.parameters - policy.parameters).numpy() for s in (near, far)]
    assert steps[0] @ steps[1] / np.linalg.norm(steps[0]) / np.linalg.norm(steps[1]) == pytest.approx(1, abs=1e-9)


def test_families_and_seeds_have_policies_of_their_own():
    first, again, other = (distance.random_policies("bandit", 4, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name].table, again[name].table) for name in first)
    assert not any(
        x.table.shape == y.table.shape and torch.equal(x.table, y.table)
        for x, y in zip(first.values(), other.values(), strict=True)
    )
    with pytest.raises(ValueError, match="'bandit', 'tree' or 'markov'"):
        distance.random_policies("gaussian", 1)


def test_bands_are_order_statistics_and_keep_infinities():
    frame = pd.DataFrame({"family": ["a"] * 5 + ["b"] * 2, "x": [3.0, 1.0, np.inf, 2.0, np.nan, np.inf, np.inf]})
    found = distance.bands(frame, ["x"], ["family"]).set_index("family")
    assert found["scenarios"].to_list() == [5, 2]
    assert found.loc["a", ["x_min", "x_low", "x_high", "x_max"]].to_list() == [1, 1, np.inf, np.inf]
    assert found.loc["a", "x"] in (2, 3)
    assert found.loc["b", "x"] == np.inf


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 0.5, 1.0])
def test_slopes_recover_planted_power_laws(exponent):
    rng = np.random.default_rng(2)
    rows = []
    for i in range(3):
        for kl in np.geomspace(1e-4, 1, 7):
            bias = 0.3 * kl**exponent * np.exp(0.02 * rng.normal()) * (1 if kl < 0.01 else 50)
            rows.append(
                {
                    "family": "bandit",
                    "scenario": f"s{i}",
                    "estimator": "k3-loss",
                    "target": "reverse_kl",
                    "kl": kl,
                    "bias": bias,
                }
            )
    frame = pd.DataFrame(rows).sample(frac=1, random_state=0)
    found = distance.slopes(frame, points=3)
    assert len(found) == 3
    for row in found.to_dict("records"):
        part = frame[frame["scenario"] == row["scenario"]].nsmallest(3, "kl")
        fit = stats.linregress(np.log(part["kl"]), np.log(part["bias"]))
        assert (row["slope"], row["slope_error"]) == pytest.approx((fit.slope, fit.stderr), rel=1e-9)
        assert row["factor"] == pytest.approx(np.exp(fit.intercept), rel=1e-9)
        assert row["slope"] == pytest.approx(exponent, abs=0.05)
        assert (row["kl_min"], row["kl_max"]) == (part["kl"].min(), part["kl"].max())


def test_slopes_leave_rounding_and_short_sweeps_out():
    frame = gl.measure(["k2-loss", "k3-loss"], BANDITS)
    assert set(distance.slopes(frame, points=3)["estimator"]) == {"k3-loss"}
    assert distance.slopes(frame, points=5).empty
    with pytest.raises(ValueError, match="at least 3 points"):
        distance.slopes(frame, points=2)


@pytest.mark.parametrize(("scenarios", "credit"), [(BANDITS, "token"), (TREES, "token"), (TREES, "sequence")])
def test_half_the_squared_gap_is_the_leading_error_of_k3(scenarios, credit):
    """What is left falls as KL^½; with the claimed term doubled, or of the other sign, it would not fall at all."""
    frame = distance.remainders(scenarios, credit)
    near, nearer = (frame[np.isclose(frame["kl"], kl, rtol=1e-6)]["remainder"].to_numpy() for kl in (1e-2, 1e-4))
    assert (nearer < 0.08).all()
    np.testing.assert_allclose(near / nearer, 10, rtol=0.6)


@pytest.mark.parametrize("factor", [2.0, -1.0])
def test_a_wrong_second_order_is_told_from_the_right_one(factor, monkeypatch):
    right = distance.second_order
    monkeypatch.setattr(distance, "second_order", lambda rollout: factor * right(rollout))
    assert distance.remainders(BANDITS[:1], "token")["remainder"].iloc[0] > 0.9


def test_remainder_on_a_bandit_by_hand():
    p, q = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
    delta, score = q / p, np.eye(4) - p
    error = (p * (-np.log(delta) - (1 - delta))) @ score
    left = error - (p * 0.5 * (delta - 1) ** 2) @ score
    found = distance.remainders([gl.Scenario(gl.Bandit(np.log(p)), gl.Bandit(np.log(q)))])["remainder"].iloc[0]
    assert found == pytest.approx(np.linalg.norm(left) / np.linalg.norm(error), rel=1e-10)
    with pytest.raises(ValueError, match="token"):
        distance.remainders(BANDITS, "to_go")


def test_versus_finds_the_batch_size_at_which_the_errors_meet():
    frame = gl.measure(["k3-loss", "k1-reward-to-go"], TREES)
    found = distance.versus(frame, "k3-loss", "k1-reward-to-go").set_index(["scenario", "kl"])
    for key, part in frame.groupby(["scenario", "kl"]):
        k3, k1 = (part[part["estimator"] == name].iloc[0] for name in ("k3-loss", "k1-reward-to-go"))
        row = found.loc[key]
        assert row["norm_ratio"] == pytest.approx(k3["gradient_norm"] / k1["gradient_norm"], rel=1e-12)
        assert row["noise_ratio"] == pytest.approx(k3["noise"] / k1["noise"], rel=1e-12)
        error = [lambda size, e=e: e["bias"] ** 2 + e["noise"] / size for e in (k3, k1)]
        meet = row["overtaken"]
        if meet == 0:
            assert k3["noise"] > k1["noise"]
        else:
            assert error[0](meet) == pytest.approx(error[1](meet), rel=1e-9)
            assert error[0](2 * meet) > error[1](2 * meet)
    # The one without bias stays ahead once it is.
    assert (distance.versus(frame, "k1-reward-to-go", "k3-loss")["overtaken"] == np.inf).all()


def test_versus_of_two_estimators_of_one_mean_never_meet():
    frame = gl.measure(["full-both", "k1-reward-to-go"], TREES)
    assert (distance.versus(frame, "full-both", "k1-reward-to-go")["overtaken"] == np.inf).all()
    assert (distance.versus(frame, "k1-reward-to-go", "full-both")["overtaken"] == 0).all()


def test_batches_are_what_drawn_batches_show():
    scenarios = [s for s in BANDITS if s.kl() > 0.5]
    exact = distance.bands(distance.batches(gl.measure("k3-loss", scenarios), [1, 30, 3000]), ["rmse"], ["batch"])
    drawn = distance.sampled_rmse("k3-loss", scenarios, [1, 30, 3000], replicates=400, seed=3)
    np.testing.assert_allclose(drawn["rmse"], exact["rmse"], rtol=0.1)
    inside = (drawn["rmse_low"] <= 1.02 * exact["rmse"]) & (exact["rmse"] <= 1.02 * drawn["rmse_high"])
    assert inside.sum() >= 2


def test_one_seed_draws_the_same_batches():
    frames = [distance.sampled_rmse(["k2-loss", "k3-loss"], BANDITS[:2], [10, 100], replicates=8, seed=1) for _ in range(2)]
    pd.testing.assert_frame_equal(*frames)


def test_scenarios_made_to_be_noisy_are():
    full, k1 = gl.exact.moments([gl.ESTIMATORS[name] for name in ("full-both", "k1-reward-to-go")], distance.compensating())
    assert torch.allclose(full.mean, k1.mean, atol=1e-12)
    assert full.trace_cov > 1.15 * k1.trace_cov
    world = distance.sharing()
    names = ("full-loss", "k2-loss")
    full, k2 = gl.exact.moments([gl.ESTIMATORS[name] for name in names], world)
    assert torch.allclose(full.mean, k2.mean, atol=1e-12)
    assert full.trace_cov > 1.6 * k2.trace_cov
    # By enumerating all eight responses, without dynamic programming.
    p, q = ({(): [0.9, 0.1], 0: row, 1: [0.5, 0.5]} for row in ([0.3, 0.7], [0.99, 0.01]))
    first, second, chance = [], [], []
    for y in np.ndindex(2, 2, 2):
        rows, probability = np.zeros((2, 3, 2)), 1.0
        for previous, token in zip([(), *y[:2]], y, strict=True):
            pi, ref = np.array(p[previous]), np.array(q[previous])
            at = 0 if previous == () else 1 + previous
            log_ratio = np.log(pi / ref)
            rows[0, at] += pi * (log_ratio - pi @ log_ratio)
            rows[1, at] += log_ratio[token] * (np.eye(2)[token] - pi)
            probability *= pi[token]
        first.append(rows[0].ravel())
        second.append(rows[1].ravel())
        chance.append(probability)
    for found, gradients in ((full, np.array(first)), (k2, np.array(second))):
        mean = chance @ gradients
        assert found.trace_cov == pytest.approx(chance @ np.square(gradients).sum(-1) - mean @ mean, rel=1e-10)
        np.testing.assert_allclose(found.mean, mean, atol=1e-12)


def test_a_direction_that_leaves_float64_before_it_is_far_enough_is_replaced():
    # Two tokens, one of probability 1e-4: where the noise lowers it, KL = 1 asks for a log-ratio of 10⁴ nats.
    policy = gl.Bandit([0.0, np.log(1e-4)])
    away = next(seed for seed in range(10) if policy.perturbed(scale=1, seed=seed).table.softmax(-1)[0, 1] < 1e-4)
    with pytest.raises(ValueError, match=f"direction of seed {away} reaches a KL of 1.0 nats"):
        policy.perturbed(kl=1.0, seed=away)
    for seed in range(10):
        (scenario,) = distance.sweep({"two tokens": policy}, [1.0], seed)
        assert scenario.kl() == pytest.approx(1)
    with pytest.raises(ValueError, match="none of 32 directions reaches"):
        distance.sweep({"two tokens": policy}, [1e8])
