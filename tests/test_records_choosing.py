"""The frontier of reward against KL from responses, against the optimum itself; equivalent coefficients against arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

import gradlab as gl
from gradlab._common.streams import generator
from gradlab.records import budget, equivalents, frontier

REWARD = np.array([0.0, 0.3, 1.0, 0.5])


def drawn(counts: np.ndarray, policy: gl.Bandit, reference: gl.Bandit, **columns: object) -> gl.Records:
    """Each token as often as `counts` says, as responses of one token."""
    tokens = np.repeat(np.arange(len(counts)), counts)
    log_p, log_ref = (p.table.log_softmax(-1).numpy().ravel()[tokens][:, None] for p in (policy, reference))
    return gl.Records.from_arrays(
        token_id=tokens[:, None], logprob=log_p, ref_logprob=log_ref, reward=REWARD[tokens], **columns
    )


def optimum(reference: np.ndarray, beta: float) -> tuple[float, float]:
    p = reference * np.exp(REWARD / beta)
    p /= p.sum()
    return float(p @ REWARD), float(p @ np.log(p / reference))


def test_listed_responses_give_the_optimum_exactly():
    """Counts in proportion to the policy are its expectation; another policy than the reference draws."""
    policy, reference = gl.Bandit(np.log([0.4, 0.3, 0.1, 0.2])), gl.Bandit(np.log([0.1, 0.4, 0.2, 0.3]))
    records = drawn(np.array([400, 300, 100, 200]), policy, reference)
    frame = frontier(records, [0.1, 0.3, 1.0, 5.0])
    for row in frame.to_dict("records"):
        reward, kl = optimum(np.array([0.1, 0.4, 0.2, 0.3]), row["beta"])
        assert (row["reward"], row["kl"]) == pytest.approx((reward, kl), rel=1e-9)
    assert frame["kl"].is_monotonic_decreasing
    tilted = gl.optima.tilted(REWARD, [0.1, 0.4, 0.2, 0.3], 0.3)
    assert frame.loc[1, "reward"] == pytest.approx(float(np.asarray(tilted) @ REWARD), rel=1e-6)


def test_the_beta_of_a_budget_has_that_kl():
    policy = reference = gl.Bandit(np.zeros(4))
    records = drawn(np.full(4, 100), policy, reference)
    found = budget(records, 0.2)
    assert found["kl"] == pytest.approx(0.2, rel=1e-6)
    assert optimum(np.full(4, 0.25), found["beta"])[1] == pytest.approx(0.2, rel=1e-6)
    with pytest.raises(ValueError, match=r"between .* and 1\.39 nats per response; got a budget of 2"):
        budget(records, 2.0)


def test_intervals_hold_and_rows_beyond_what_the_responses_hold_say_so():
    policy = reference = gl.Bandit(np.zeros(4))
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(300):
        row = frontier(drawn(rng.multinomial(400, np.full(4, 0.25)), policy, reference), [0.5]).iloc[0]
        assert row["reliable"]
        inside.append(row["kl_low"] <= optimum(np.full(4, 0.25), 0.5)[1] <= row["kl_high"])
    assert 0.92 <= np.mean(inside) <= 0.98
    far = gl.Bandit(np.log([0.9, 0.05, 0.001, 0.049]))  # which hardly ever draws what is rewarded
    counts = np.random.default_rng(1).multinomial(2000, [0.9, 0.05, 0.001, 0.049])
    assert not frontier(drawn(counts, far, reference), [0.1])["reliable"].any()


def test_prompts_are_tilted_one_by_one():
    """Two prompts whose rewards differ by a constant have one optimum; pooled, the better prompt would be preferred."""
    policy = reference = gl.Bandit(np.zeros(4))
    one = drawn(np.full(4, 50), policy, reference).held()
    (block,) = list(one)
    columns = {name: np.concatenate([block.padded(name) if block[name].shape != (200,) or name == "token_id" else block[name]] * 2)
               for name in ("logprob", "ref_logprob")}  # fmt: skip
    reward = np.concatenate([block["reward"], block["reward"] + 5])
    both = gl.Records.from_arrays(
        **{k: v.reshape(400, 1) for k, v in columns.items()}, reward=reward, group_id=np.repeat(["a", "b"], 200)
    )
    row = frontier(both, [0.5]).iloc[0]
    reward, kl = optimum(np.full(4, 0.25), 0.5)
    assert (row["reward"], row["kl"]) == pytest.approx((reward + 2.5, kl), rel=1e-9)


def test_the_bias_of_the_kl_is_that_of_small_groups():
    """Groups of eight: the jackknife's bias against the mean error over many groups."""
    rng, reference = np.random.default_rng(0), gl.Bandit(np.zeros(4))
    tokens = rng.integers(0, 4, 8 * 4000)
    log_p = np.full((len(tokens), 1), np.log(0.25))
    records = gl.Records.from_arrays(
        logprob=log_p, ref_logprob=log_p, reward=REWARD[tokens], group_id=np.arange(len(tokens)) // 8
    )
    row = frontier(records, [0.5]).iloc[0]
    error = row["kl"] - optimum(np.full(4, 0.25), 0.5)[1]
    assert error < -0.005
    assert row["bias"] == pytest.approx(error, rel=0.25)
    assert reference.vocab == 4


def test_equivalent_coefficients_are_what_arithmetic_says():
    policy = gl.Tree.random(3, 4, seed=0, eos=0)
    scenario = gl.Scenario(policy, policy.perturbed(scale=0.5, seed=1))
    rollout = gl.Rollout.from_sampler(scenario, 200, generator(0, "montecarlo"))
    frame = equivalents(gl.Records.from_rollout(rollout), 0.1).set_index(["estimator", "normalise"])["coefficient"]
    ratio, mask = rollout.log_ratio.numpy(), rollout.mask.numpy()
    length = mask.sum(1)
    k2, k3 = np.abs(ratio) * mask, np.abs(1 - np.exp(-ratio)) * mask
    assert frame["k2-loss", "sum"] == pytest.approx(0.1)
    assert frame["k3-loss", "sum"] == pytest.approx(0.1 * k2.sum() / k3.sum())
    assert frame["k2-loss", "mean"] == pytest.approx(0.1 * k2.sum() / (k2.sum(1) / length).sum())
    assert frame["k2-loss", "token_mean"] == pytest.approx(0.1 * length.mean())
    assert frame["k2-loss", "fixed"] == pytest.approx(0.1 * length.max())


def test_what_is_missing_is_said():
    log_p = [[-1.0], [-2.0]]
    with pytest.raises(ValueError, match="needs rewards; the records hold mask, logprob, ref_logprob"):
        frontier(gl.Records.from_arrays(logprob=log_p, ref_logprob=log_p))
    with pytest.raises(ValueError, match="log-probabilities of the policy and of the reference; the records hold"):
        frontier(gl.Records.from_arrays(logprob=log_p, reward=[0, 1]))
    records = gl.Records.from_arrays(logprob=log_p, ref_logprob=log_p, reward=[1.0, 1.0])
    with pytest.raises(ValueError, match="all rewards are equal"):
        frontier(records)
    with pytest.raises(ValueError, match="beta"):
        frontier(gl.Records.from_arrays(logprob=log_p, ref_logprob=log_p, reward=[1.0, 0.0]), [0.0])
