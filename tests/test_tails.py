"""Heavy tails of k3's value, against closed forms, plain sums and plain draws."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.integrate import quad

import gradlab as gl
from gradlab.questions import tails
from gradlab.questions.tails import chi2

PAIR = gl.Scenario(gl.Gaussian(0.1, 0.2), gl.Gaussian(0, 1), name="pair")


def bandit(p, q):
    return gl.Scenario(gl.Bandit(np.log(p)), gl.Bandit(np.log(q)))


def one_token(chance, tokens=5, share=0.2):
    return bandit(*([p, *[(1 - p) / (tokens - 1)] * (tokens - 1)] for p in (chance, share)))


@pytest.mark.parametrize("pair", [((0.3, 0.8), (0, 1)), ((0, 1), (1, 1.1)), ((-1, 2), (0.5, 1.5))])
def test_closed_form_of_the_variance_of_k3(pair):
    scenario = gl.Scenario(*(gl.Gaussian(*each) for each in pair))
    assert tails.k3_variance(scenario) == pytest.approx(gl.exact.value_moments("k3", scenario).variance, rel=1e-9)


def test_closed_form_on_a_bandit_is_a_sum_over_tokens():
    p, q = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
    k3 = q / p - 1 - np.log(q / p)
    assert tails.k3_variance(bandit(p, q)) == pytest.approx(p @ k3**2 - (p @ k3) ** 2, rel=1e-12)
    assert chi2(bandit(p, q)) == pytest.approx(q @ (q / p) - 1, rel=1e-12)


@pytest.mark.parametrize(("std", "infinite"), [(0.2, True), (0.7, True), (0.715, False), (1.5, False)])
def test_the_variance_is_infinite_up_to_half_the_variance_of_the_reference(std, infinite):
    assert math.isinf(tails.k3_variance(gl.Scenario(gl.Gaussian(0.1, std), gl.Gaussian(0, 1)))) == infinite


@pytest.mark.parametrize("n", [1e2, 1e4, 1e6])
def test_share_of_rare_events_of_a_gaussian_pair(n):
    """The same by integrating over the event itself, whose ends come from the level of δ rather than from a radius."""
    p, q = stats.norm(0.1, 0.2), stats.norm(0, 1)
    found = tails.rare_share(PAIR, [n]).iloc[0]

    def k3(x):
        log_ratio = p.logpdf(x) - q.logpdf(x)
        return q.pdf(x) - p.pdf(x) + p.pdf(x) * log_ratio

    # Symmetric about 0.1/0.96, where log δ = a (x − c)² + … is smallest.
    centre = 0.1 / 0.04 / (1 / 0.04 - 1)
    low, high = 0.0, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if p.sf(centre + middle) + p.cdf(centre - middle) > 1 / n else (low, middle)
    beyond = quad(k3, centre + low, 40)[0] + quad(k3, -40, centre - low)[0]
    assert found["share"] == pytest.approx(beyond / 1.1344379124341, rel=1e-6)
    assert found["truncated_mean"] == pytest.approx(1.1344379124341 - beyond, rel=1e-6)
    assert found["reference_probability"] == pytest.approx(q.sf(centre + low) + q.cdf(centre - low), rel=1e-9)


def test_share_of_rare_events_of_a_bandit_is_that_of_its_largest_ratios():
    scenario = one_token(1e-3)
    frame = tails.rare_share(scenario, [10, 1000, 4000])
    delta = 0.2 / 1e-3
    token = 1e-3 * (delta - 1 - math.log(delta))
    rest = scenario.kl() - token  # spread evenly over a probability of 0.999
    np.testing.assert_allclose(frame["share"] * scenario.kl(), [token + rest * 0.099 / 0.999, token, token / 4], rtol=1e-9)
    np.testing.assert_allclose(frame["reference_probability"], [0.2 + 0.8 * 0.099 / 0.999, 0.2, 0.05], rtol=1e-9)


def test_running_moments_are_those_of_the_draws():
    sizes = [10, 1000, tails.CHUNK + 5]
    frame = tails.running(["k1", "k3"], PAIR, sizes, runs=2, seed=3)
    for run in range(2):
        # What `running` draws: chunks end where a size is reached.
        rng = np.random.default_rng(np.random.SeedSequence(3, spawn_key=(12, run)))
        x = 0.1 + 0.2 * rng.standard_normal(sizes[-1])
        log_ratio = stats.norm.logpdf(x, 0.1, 0.2) - stats.norm.logpdf(x)
        for kernel, values in (("k1", log_ratio), ("k3", np.exp(-log_ratio) - 1 + log_ratio)):
            rows = frame[(frame["run"] == run) & (frame["kernel"] == kernel)]
            np.testing.assert_allclose(rows["mean"], [values[:n].mean() for n in sizes], rtol=1e-9)
            np.testing.assert_allclose(rows["std"], [values[:n].std(ddof=1) for n in sizes], rtol=1e-9)


def test_running_does_not_depend_on_the_number_of_jobs():
    frames = [tails.running(["k3"], PAIR, [10, 300], runs=3, seed=1, jobs=jobs) for jobs in (1, 2)]
    pd.testing.assert_frame_equal(*frames)


def test_running_mean_of_k1_is_the_kl_and_of_k3_falls_short():
    frame = tails.running(["k1", "k3"], PAIR, [100_000], runs=21, seed=5).groupby("kernel")["mean"].median()
    assert frame["k1"] == pytest.approx(PAIR.kl(), rel=0.005)
    assert 0.6 < frame["k3"] / PAIR.kl() < 0.85


def test_median_over_runs_has_an_interval_of_order_statistics():
    values = np.arange(1.0, 26.0)
    frame = pd.DataFrame({"scenario": "s", "kernel": "k3", "samples": 5, "kl": 1.0, "mean": values[::-1]})
    row = tails.over_runs(frame, ["mean"]).iloc[0]
    # 25 runs: the 8th and the 18th value cover the median with probability 0.9567, the 9th and the 17th with 0.89.
    assert [row[f"mean{end}"] for end in ("", "_low", "_high")] == [13, 8, 18]
    assert row["mean_q10"] == pytest.approx(3.4)


def test_dropped_token_exact_quantiles_match_counted_samples():
    scenario = one_token(2e-3)
    sizes = [10, 500, 5_000, 100_000]
    exact, drawn = tails.dropped(scenario, sizes), tails.dropped(scenario, sizes, runs=4000, seed=2)
    for column in ("mean_ratio_q10", "mean_ratio_q90"):
        np.testing.assert_allclose(exact[column], drawn[column], rtol=0.1)
    inside = (drawn["mean_ratio_low"] <= exact["mean_ratio"] + 1e-9) & (exact["mean_ratio"] - 1e-9 <= drawn["mean_ratio_high"])
    assert inside.all()
    assert exact["mean_ratio"].iloc[0] < 0.2
    assert exact["mean_ratio"].iloc[-1] == pytest.approx(1, abs=0.02)
    np.testing.assert_allclose(exact["p_never_sampled"], [(1 - 2e-3) ** n for n in sizes], rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: tails.k3_variance(gl.Scenario(gl.Tree.random(2, 2), gl.Tree.random(2, 2, seed=1))), "one step"),
        (lambda: tails.rare_share(gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(0, 0.5)), [100]), "narrower"),
        (lambda: tails.rare_share(PAIR, [1]), "at least 2"),
        (lambda: tails.running(["k3"], one_token(0.1), [10], 2), "gl.Gaussian"),
        (lambda: tails.running(["full"], PAIR, [10], 2), "unknown kernel 'full'"),
        (lambda: tails.running(["k3"], PAIR, [10, 10], 2), "increase"),
        (lambda: tails.dropped(bandit([0.1, 0.2, 0.7], [0.3, 0.4, 0.3]), [10]), "two values"),
    ],
)
def test_what_makes_no_sense_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()
