"""Shares of over- and under-sampled tokens, tails, and restoring times, each against a second route."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from worlds import TREES, assert_prints, scenario

import gradlab as gl
from gradlab.questions import asymmetry, restoring, tails

NAMES = ["k1-loss", "k2-loss", "k3-loss", "k2-loss-sequence", "k3-loss-sequence", "k1-reward-to-go", "mse-sampled-loss"]
SHARES = [f"{side}_{what}" for side in ("under", "over") for what in ("mass", "expected", "pull", "second")]


def by_autograd(estimator, world):
    """Shares and skewness response by response: the coefficient of each token is read off the loss by autograd."""
    rollout = gl.Rollout.enumerated(world)
    log_p = world.policy.table.log_softmax(-1)
    true = gl.exact.gradient("reverse_kl", world)
    direction = (true / true.norm()).view_as(log_p)
    totals, x = dict.fromkeys(SHARES, 0.0), []
    leaf = rollout.differentiable()
    loss = estimator(leaf)
    (cotangent,) = torch.autograd.grad(loss.sum(), leaf.table)
    cotangent = cotangent.view(*rollout.tokens.shape, -1)
    for i, weight in enumerate(rollout.weight.tolist()):
        ratios = [float(rollout.log_ratio[i, t]) for t in range(rollout.tokens.shape[1])]
        x.append(0.0)
        for t in range(rollout.tokens.shape[1]):
            if not rollout.mask[i, t]:
                continue
            row, token = int(rollout.contexts[i, t]), int(rollout.tokens[i, t])
            score = -log_p[row].exp()
            score[token] += 1
            g = cotangent[i, t]
            a = float(g @ score / (score @ score))
            along = float(g @ direction[row])
            x[-1] += along
            ell = sum(ratios) if estimator.credit == "sequence" else ratios[t]
            side = "under" if ell < 0 else "over"
            for what, part in (("mass", abs(a)), ("expected", along), ("pull", abs(along)), ("second", float(g @ g))):
                totals[f"{side}_{what}"] += weight * part
    shares = {}
    for what in ("mass", "expected", "pull", "second"):
        both = totals[f"under_{what}"] + totals[f"over_{what}"]
        shares |= {f"{side}_{what}": totals[f"{side}_{what}"] / both for side in ("under", "over")}
    w, x = rollout.weight.numpy(), np.array(x)
    centred = x - w @ x
    return shares | {"skewness": (w @ centred**3) / (w @ centred**2) ** 1.5}


@pytest.mark.parametrize("shape", ["bandit", *TREES])
def test_shares_match_a_loop_over_responses(shape):
    world = scenario(shape)
    found = asymmetry.measure(NAMES[1:], world).set_index("estimator")
    for name in NAMES[1:]:
        expected = by_autograd(gl.ESTIMATORS[name], world)
        for column, value in expected.items():
            assert found.loc[name, column] == pytest.approx(value, rel=1e-9, abs=1e-12), (name, column)


def test_totals_are_the_moments_of_the_library():
    world = scenario("bandit")
    for name in ("k2-loss", "k3-loss"):
        parts, moments = asymmetry.per_token(name, world), gl.exact.moments(gl.ESTIMATORS[name], world)
        true = gl.exact.gradient("reverse_kl", world)
        assert parts["expected"].sum() == pytest.approx(float(moments.mean @ true / true.norm()), rel=1e-12)
        assert parts["second"].sum() == pytest.approx(moments.trace_cov + float(moments.mean @ moments.mean), rel=1e-12)


@pytest.mark.parametrize("shape", ["bandit", *TREES])
def test_the_mean_coefficient_of_k3_is_split_evenly(shape):
    found = asymmetry.measure(["k3-loss", "k2-loss"], scenario(shape)).set_index("estimator")
    assert found.loc["k3-loss", "under_mass"] == pytest.approx(0.5, abs=1e-12)
    assert found.loc["k2-loss", "under_mass"] < 0.49
    for what in ("mass", "pull", "second"):  # termwise: |1 − e^{−ℓ}| > |ℓ| exactly where ℓ < 0
        assert found.loc["k3-loss", f"under_{what}"] > found.loc["k2-loss", f"under_{what}"]


def test_planted_mistakes_lose_the_even_split():
    """The ratio upside down and a clamp both break E[1 − δ] = 0, which the even split rests on."""
    wrong = {"upside down": gl.Estimator("k3_swapped"), "clamped": gl.Estimator("k3", clamp_log_ratio=0.3)}
    found = asymmetry.measure(wrong, scenario("bandit")).set_index("estimator")
    assert (found["under_mass"] - 0.5).abs().min() > 0.02


def test_nothing_has_no_shares():
    row = asymmetry.measure("k1-loss", scenario("bandit")).iloc[0]
    assert np.isnan(row["under_expected"])
    assert np.isnan(row["over_expected"])
    assert 0 < row["under_second"] < 1


def dropped_mode() -> gl.Scenario:
    ref = np.array([0.2] + [0.8 / 9] * 9)
    logits = np.log(ref)
    logits[0] = -9
    return gl.Scenario(gl.Bandit(logits), gl.Bandit(np.log(ref)))


def test_dropped_mode_by_hand():
    """The published digits, from two-valued sums written out."""
    p = np.exp(-9) / (np.exp(-9) + 0.8)
    down, up = np.log(p / 0.2), np.log((1 - p) / 0.8)
    found = asymmetry.measure(["k2-loss", "k3-loss"], dropped_mode()).set_index("estimator")
    for name, c, printed, noise in (
        ("k3-loss", lambda x: 1 - np.exp(-x), "-0.19985", "10.06"),
        ("k2-loss", lambda x: x, "-0.00114", "9.76"),
    ):
        on_j = p * c(down) * (1 - p), -(1 - p) * c(up) * p
        assert_prints(sum(on_j), printed)
        square = p * (c(down) * (1 - p)) ** 2 + (1 - p) * (c(up) * p) ** 2
        assert_prints((square - sum(on_j) ** 2) ** 0.5 / 8 / abs(sum(on_j)), noise)
        assert found.loc[name, "under_expected"] == pytest.approx(on_j[0] / sum(on_j), rel=1e-9)
    assert_prints(100 * found.loc["k3-loss", "under_expected"], "99.98")
    assert found.loc["k3-loss", "largest_token"] == "token 0"
    assert found.loc["k3-loss", "largest_probability"] == pytest.approx(1.542e-4, rel=5e-4)


def test_intervals_cover_the_exact_shares():
    """Columns of one run share its draws, so coverage is judged column by column: 0.95 ± 3.4 standard errors of 200 runs."""
    world, runs = scenario("tree"), 200
    exact = asymmetry.measure(["k2-loss", "k3-loss"], world)
    hits = dict.fromkeys(asymmetry.SAMPLED, 0)
    for seed in range(runs):
        found = asymmetry.measure(["k2-loss", "k3-loss"], world, samples=6_400, seed=seed)
        for column in hits:
            inside = (found[f"{column}_low"] <= exact[column]) & (exact[column] <= found[f"{column}_high"])
            hits[column] += inside.to_numpy()
    for column, count in hits.items():
        assert (np.abs(count / runs - 0.95) < 3.4 * (0.95 * 0.05 / runs) ** 0.5).all(), (column, count / runs)
    assert asymmetry.measure(["k2-loss", "k3-loss"], world, samples=6_400, seed=runs - 1).equals(found)


def test_hill_and_the_exact_tail_index():
    rng = np.random.default_rng(0)
    assert tails.hill(rng.pareto(2.5, 400_000) + 1, 4_000) == pytest.approx(2.5, rel=0.05)
    for ratio in (0.5, 0.8):
        world = gl.Scenario(gl.Gaussian(0.3, ratio), gl.Gaussian(0, 1))
        alpha = tails.tail_index(world)
        # The moment of order q of δ is finite iff q < α: its integrand's exponent changes sign there.
        for order, finite in ((0.98 * alpha, True), (1.02 * alpha, False)):
            assert ((order * (1 / ratio**2 - 1) - 1 / ratio**2) < 0) is finite
    assert np.isinf(tails.tail_index(gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(1, 1))))
    infinite = gl.exact.value_moments("k3", gl.Scenario(gl.Gaussian(0, 0.7), gl.Gaussian(0, 1)))
    assert np.isinf(infinite.variance)
    assert tails.tail_index(gl.Scenario(gl.Gaussian(0, 0.7), gl.Gaussian(0, 1))) < 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: asymmetry.measure("full-loss", scenario("bandit")), "whole vocabulary"),
        (lambda: asymmetry.measure("k1-reward-loo", scenario("bandit")), "compares responses"),
        (lambda: asymmetry.measure(lambda r: r.log_prob.sum(-1), scenario("bandit")), "function"),
        (lambda: asymmetry.measure("k2-loss", scenario("gaussian")), "Bandit or a gl.Tree"),
        (lambda: tails.hill([1.0, 2.0], 2), "more than k"),
        (lambda: tails.tail_index(scenario("bandit")), "Gaussian"),
        (lambda: restoring.times("k2-loss", [0.2, 0.8], 2, [1.0]), "between 0 and 1"),
        (lambda: restoring.times("k2-loss", [0.2, 0.8], 0, [0.5]), "counts as restored"),
        (lambda: restoring.times("k2-loss", [0.2, 0.8], 0, [1.0], step=0), "positive"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---- restoring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [-5.0, -2.0, 2.0, 5.0])
@pytest.mark.parametrize("name", ["k2-loss", "k3-loss"])
def test_small_steps_take_the_time_of_the_flow(name, shift):
    """With equal others one number is left, the log-odds off; the time of the flow is then an integral."""
    ref, others = 0.2, 9
    c = {"k2-loss": lambda x: x, "k3-loss": lambda x: 1 - np.exp(-x)}[name]

    def speed(d):
        z = np.log(ref / (1 - ref)) + d
        p = 1 / (1 + np.exp(-z))
        on, off = c(np.log(p / ref)), c(np.log((1 - p) / (1 - ref)))
        pull = p * (1 - p) * (on - off)
        return pull * (1 + 1 / others)  # the token's logit goes down by pull, every other one up by its share

    expected = quad(lambda d: 1 / speed(d), np.sign(shift) * np.log(2), shift)[0]
    q = [ref, *[(1 - ref) / others] * others]
    found = restoring.times(name, q, 0, [shift], step=0.02, limit=100_000).iloc[0]
    assert found["restored"]
    assert found["time"] == pytest.approx(expected, abs=0.05, rel=0.02)


def test_a_bound_is_not_taken_for_a_time():
    q = [0.01, *[0.99 / 9] * 9]
    times = restoring.times(["k2-loss", "k3-loss", "k1-loss"], q, 0, [-8, -2, 2, 8], step=1.0, limit=300)
    found = restoring.compared(times, "k2-loss").set_index(["estimator", "shift"])
    assert not found.loc[("k2-loss", -8), "restored"]
    assert np.isnan(found.loc[("k2-loss", -8), "versus_k2"])
    assert not found["restored"].loc["k1-loss"].any()
    assert np.isnan(found.loc[("k1-loss", -8), "dropped_versus_inflated"])
    assert found.loc[("k3-loss", -8), "dropped_versus_inflated"] > 1
    assert found["dropped_versus_inflated"].xs(2, level="shift").isna().all()
    assert found.loc[("k3-loss", 2), "versus_k2"] == pytest.approx(
        found.loc[("k3-loss", 2), "steps"] / found.loc[("k2-loss", 2), "steps"]
    )


def test_paths_start_and_end_where_they_should():
    q = [0.2, *[0.8 / 9] * 9]
    found = restoring.paths(["k3-loss", "k1-loss"], q, 0, -5.0, steps=200)
    k3, k1 = (found[found["estimator"] == name] for name in ("k3-loss", "k1-loss"))
    assert k3["probability"].iloc[0] == pytest.approx(0.2 * np.exp(-5) / (0.8 + 0.2 * np.exp(-5)))
    assert k3["probability"].iloc[-1] == pytest.approx(0.2, rel=1e-6)
    assert (k3["kl"].diff().dropna() <= 1e-15).all()
    assert np.ptp(k1["probability"]) < 1e-12


def test_hill_of_four_numbers():
    assert tails.hill(np.exp([0.0, 3.0, 1.0, -2.0]), 2) == pytest.approx(
        1 / 2
    )  # log(x₁/x₃) = 3 and log(x₂/x₃) = 1, of −2 nothing
    assert tails.hill([-8.0, 4.0, 0.0, 2.0], 2) == pytest.approx(1 / (1.5 * np.log(2)))


def test_a_token_as_likely_as_in_the_reference_is_on_no_side():
    policy = gl.Bandit([0.0, 1.0, 2.0])
    row = asymmetry.measure("k3-loss", gl.Scenario(policy, gl.Bandit([0.0, 1.0, 2.0]))).iloc[0]
    assert row["under_probability"] == 0
    assert row[["under_mass", "largest_expected", "skewness"]].isna().all()
