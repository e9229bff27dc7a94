"""Planted mistakes: wrong losses, as plain functions of a rollout, must get the exact wrong verdict that theory predicts.

Every case has the right loss next to the wrong one, the target it was meant for, and the gradient the wrong one has instead,
derived by hand. Losses are written out here without any estimator of gradlab.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor
from worlds import SHAPES, assert_same, combination, scenario

import gradlab as gl

EVERY, FIXED, ENDING = list(SHAPES), ["bandit", "tree", "deep"], ["eos", "eos first"]
LONG = [shape for shape in SHAPES if shape != "bandit"]


@dataclass(frozen=True)
class Plant:
    """A mistake: its gradient `becomes` a combination of targets or an array, its relative bias and cosine if closed-form."""

    name: str
    right: Callable[[gl.Rollout], Tensor]
    wrong: Callable[[gl.Rollout], Tensor]
    target: str
    becomes: dict[str, float] | Callable[[gl.Scenario], Tensor]
    shapes: list[str]
    off_policy: bool = False
    bias: float | Callable[[gl.Scenario], float] | None = None
    cosine: float | None = None

    def expected(self, world):
        return combination(self.becomes, world) if isinstance(self.becomes, dict) else torch.as_tensor(self.becomes(world))


# ----------------------------------------------------------------------------------------------------- building blocks


def k3(x):
    return torch.expm1(-x) + x


def k3_upside_down(x):
    return torch.expm1(x) - x


def to_go(x):
    """Σ_{u ≥ t}."""
    return x.flip(-1).cumsum(-1).flip(-1)


def after(x):
    """Σ_{u > t}."""
    return to_go(x) - x


def before(x):
    """Σ_{u < t}."""
    return x.cumsum(-1) - x


def k1_reward(credit, sign=1):
    return lambda r: (sign * credit(r.log_ratio).detach() * r.log_prob).sum(-1)


def k2_of_response(r):
    return 0.5 * r.log_ratio.sum(-1).square()


def k2_per_token(r):
    return 0.5 * r.log_ratio.square().sum(-1)


def k3_per_token(r):
    return k3(r.log_ratio).sum(-1)


def k3_in_reward(r):
    return (to_go(k3(r.log_ratio)).detach() * r.log_prob).sum(-1)


def frozen_rao_blackwell(r):
    w = before(r.log_weight).exp().detach()
    return (w * r.divergence("full")).sum(-1)


def complete_rao_blackwell(r):
    w = before(r.log_weight).exp().detach()
    return frozen_rao_blackwell(r) + (w * r.divergence("full").detach() * before(r.log_prob)).sum(-1)


def k3_weighted(ratio, detach=False):
    """`ratio(log ρ) · k3` per token."""
    return lambda r: ((ratio(r.log_weight).exp().detach() if detach else ratio(r.log_weight).exp()) * k3(r.log_ratio)).sum(-1)


def k1_reward_weighted(log_weight):
    return lambda r: (log_weight(r).sum(-1).exp() * r.log_ratio.sum(-1)).detach() * r.log_prob.sum(-1)


def taken(logits, tokens):
    """log-probability of every token, padding included."""
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def same(x):
    return x


def whole(x):
    return x.sum(-1, keepdim=True)


# ------------------------------------------------------------------------------------------ what they turn into, by hand


def toward_uniform(target):
    """E[log π · score] is the gradient of Σ π log π = KL(π‖uniform) + const."""

    def gradient(world):
        flat = world.policy.with_parameters(torch.zeros_like(world.policy.parameters))
        return gl.exact.gradient("reverse_kl", world) + gl.exact.gradient(target, gl.Scenario(world.policy, flat))

    return gradient


def with_prefixes_of_the_policy(target):
    return lambda world: gl.exact.gradient(target, world.on_policy())


def of_one_position(terms):
    """Σ_v terms_v (onehot_v − π), for terms computed from (π, ref, μ)."""

    def gradient(world):
        p, r, m = (policy.table[0].softmax(-1).numpy() for policy in (world.policy, world.reference, world.sampler))
        c = terms(p, r, m)
        return torch.from_numpy(c - p * c.sum())

    return gradient


def without_the_end_token(world):
    """Σ_rows visits Σ_{v ≠ eos} π ℓ (onehot_v − π)."""
    p, r = world.policy.table.softmax(-1), world.reference.table.softmax(-1)
    c = p * (p / r).log() * (torch.arange(p.shape[1]) != world.policy.eos)
    return (world.policy.occupancy()[:, None] * (c - p * c.sum(-1, keepdim=True))).flatten()


def with_padding(world):
    """Behind its end a response is padded with the end token: each adds π(y) ℓ (onehot − π) in a row that should be unused."""
    vocab, length, eos = world.policy.vocab, world.policy.length, world.policy.eos
    p, r = (policy.table.softmax(-1).numpy() for policy in (world.policy, world.reference))
    gradient = gl.exact.gradient("reverse_kl_frozen_prefix", world).reshape(p.shape).numpy().copy()
    for y in oracles.responses(vocab, length, eos):
        probability, row = float(oracles.log_probability(world.policy.table, y).exp()), 0
        for t, token in enumerate([*y, *[eos] * (length - len(y))]):
            if t >= len(y):
                gradient[row] += probability * np.log(p[row, eos] / r[row, eos]) * (np.eye(vocab)[eos] - p[row])
            row = vocab * row + 1 + token
    return torch.from_numpy(gradient.ravel())


def length_minus(share):
    return lambda world: abs(share(world.policy.length) - 1)


PLANTS = [
    Plant(
        "sign flip",
        k2_of_response,
        lambda r: -k2_of_response(r),
        "reverse_kl",
        {"reverse_kl": -1},
        EVERY,
        bias=2,
        cosine=-1,
    ),
    Plant(
        "sign flip in reward",
        k1_reward(to_go),
        k1_reward(to_go, -1),
        "reverse_kl",
        {"reverse_kl": -1},
        EVERY,
        bias=2,
        cosine=-1,
    ),
    Plant(
        # ∇ also reaches Σ_u ℓ_u, whose score at u multiplies Σ_{t ≤ u} log π_t: only t = u survives the expectation.
        "missing detach, to-go",
        k1_reward(to_go),
        lambda r: (to_go(r.log_ratio) * r.log_prob).sum(-1),
        "reverse_kl",
        toward_uniform("reverse_kl_frozen_prefix"),
        EVERY,
    ),
    Plant(
        "missing detach, return",
        k1_reward(whole),
        lambda r: r.log_ratio.sum(-1) * r.log_prob.sum(-1),
        "reverse_kl",
        toward_uniform("reverse_kl"),
        FIXED,
    ),
    Plant(
        "mean for sum",
        k2_per_token,
        lambda r: k2_per_token(r) / r.mask.sum(-1),
        "reverse_kl_frozen_prefix",
        lambda world: gl.exact.gradient("reverse_kl_frozen_prefix", world) / world.policy.length,
        ["tree", "deep"],
        bias=length_minus(lambda length: 1 / length),
        cosine=1,
    ),
    Plant(
        "off by one: rewards after the token only",
        k1_reward(to_go),
        k1_reward(after),
        "reverse_kl",
        {"reverse_kl": 1, "reverse_kl_frozen_prefix": -1},
        LONG,
    ),
    Plant(
        "off by one at one position: nothing is left",
        k1_reward(to_go),
        k1_reward(after),
        "reverse_kl",
        {"zero": 1},
        ["bandit"],
        bias=1,
        cosine=math.nan,
    ),
    Plant(
        "no credit for what a token leads to",
        k1_reward(to_go),
        k1_reward(same),
        "reverse_kl",
        {"reverse_kl_frozen_prefix": 1},
        LONG,
    ),
    Plant(
        # E_μ[(μ/π) ℓ score] = Σ_v (μ²/π) ℓ (onehot − π)
        "wrong sampler: ratio swapped",
        k1_reward_weighted(lambda r: r.log_weight),
        k1_reward_weighted(lambda r: -r.log_weight),
        "reverse_kl",
        of_one_position(lambda p, r, m: m**2 / p * np.log(p / r)),
        ["bandit"],
        off_policy=True,
    ),
    Plant(
        "wrong sampler: stale data taken for fresh",
        k1_reward_weighted(lambda r: r.log_weight),
        k1_reward_weighted(lambda r: 0 * r.log_weight),
        "reverse_kl",
        of_one_position(lambda p, r, m: m * np.log(p / r)),
        ["bandit"],
        off_policy=True,
    ),
    Plant(
        "wrong sampler: ratio to the reference",
        k1_reward_weighted(lambda r: r.log_weight),
        k1_reward_weighted(lambda r: r.log_ratio),
        "reverse_kl",
        of_one_position(lambda p, r, m: m * p / r * np.log(p / r)),
        ["bandit"],
        off_policy=True,
    ),
    Plant(
        "dropped score term of Rao–Blackwell",
        complete_rao_blackwell,
        frozen_rao_blackwell,
        "reverse_kl",
        {"reverse_kl_frozen_prefix": 1},
        LONG,
    ),
    Plant(
        "dropped score term of Rao–Blackwell, off-policy",
        complete_rao_blackwell,
        frozen_rao_blackwell,
        "reverse_kl",
        with_prefixes_of_the_policy("reverse_kl_frozen_prefix"),
        LONG,
        off_policy=True,
    ),
    Plant(
        "dropped score term of k3",
        lambda r: k3_in_reward(r) + k3_per_token(r),
        k3_per_token,
        "reverse_kl",
        {"forward_kl_frozen_prefix": 1},
        EVERY,
    ),
    Plant(
        "dropped direct term of k3",
        lambda r: k3_in_reward(r) + k3_per_token(r),
        k3_in_reward,
        "reverse_kl",
        {"reverse_kl": 1, "forward_kl_frozen_prefix": -1},
        EVERY,
    ),
    Plant(
        "ratio upside down",
        k3_per_token,
        lambda r: k3_upside_down(r.log_ratio).sum(-1),
        "forward_kl_frozen_prefix",
        {"chi2_frozen_prefix": 1},
        EVERY,
    ),
    Plant(
        "log-ratio upside down in reward",
        k1_reward(whole),
        lambda r: (-r.log_ratio).sum(-1).detach() * r.log_prob.sum(-1),
        "reverse_kl",
        {"reverse_kl": -1},
        EVERY,
        bias=2,
        cosine=-1,
    ),
    Plant(
        # e^{−sg ℓ} − 1 + ℓ: k1 is all that is differentiated
        "detached ratio in k3",
        k3_per_token,
        lambda r: (torch.expm1(-r.log_ratio.detach()) + r.log_ratio).sum(-1),
        "forward_kl_frozen_prefix",
        {"zero": 1},
        EVERY,
        bias=1,
        cosine=math.nan,
    ),
    Plant(
        "one factor of k2 detached",
        k2_of_response,
        lambda r: 0.5 * r.log_ratio.sum(-1).detach() * r.log_ratio.sum(-1),
        "reverse_kl",
        {"reverse_kl": 0.5},
        EVERY,
        bias=0.5,
        cosine=1,
    ),
    Plant(
        "detached token weight on k3",
        k3_weighted(same),
        k3_weighted(same, detach=True),
        "reverse_kl_frozen_prefix",
        {"forward_kl_frozen_prefix": 1},
        EVERY,
        off_policy=True,
    ),
    Plant(
        "detached sequence weight broadcast on k3 per token",
        k3_weighted(whole),
        k3_weighted(whole, detach=True),
        "reverse_kl",
        with_prefixes_of_the_policy("forward_kl_frozen_prefix"),
        EVERY,
        off_policy=True,
    ),
    Plant(
        "token weight where the prefix is needed",
        k3_weighted(lambda x: x.cumsum(-1)),
        k3_weighted(same),
        "reverse_kl",
        {"reverse_kl_frozen_prefix": 1},
        LONG,
        off_policy=True,
    ),
    Plant(
        # Σ_t k3(S) = T k3(S)
        "log-ratio of the response broadcast on k3 per token",
        lambda r: k3(r.log_ratio.sum(-1)),
        lambda r: k3(whole(r.log_ratio).expand_as(r.log_ratio)).sum(-1),
        "forward_kl",
        lambda world: world.policy.length * gl.exact.gradient("forward_kl", world),
        ["tree", "deep"],
        bias=length_minus(lambda length: length),
        cosine=1,
    ),
    Plant(
        "end token left out of the mask",
        k2_per_token,
        lambda r: 0.5 * (r.log_ratio.square() * (r.tokens != 1)).sum(-1),
        "reverse_kl_frozen_prefix",
        without_the_end_token,
        ["eos"],
    ),
    Plant(
        "padding not masked",
        k2_per_token,
        lambda r: 0.5 * (taken(r.logits, r.tokens) - taken(r.reference_logits, r.tokens)).square().sum(-1),
        "reverse_kl_frozen_prefix",
        with_padding,
        ENDING,
    ),
    Plant(
        "k3 of tokens for k3 of the response",
        lambda r: k3(r.log_ratio.sum(-1)),
        k3_per_token,
        "forward_kl",
        {"forward_kl_frozen_prefix": 1},
        LONG,
    ),
    Plant(
        "k2 of tokens for k2 of the response",
        k2_of_response,
        k2_per_token,
        "reverse_kl",
        {"reverse_kl_frozen_prefix": 1},
        LONG,
    ),
]


@pytest.mark.parametrize(("plant", "shape"), [pytest.param(p, s, id=f"{p.name}-{s}") for p in PLANTS for s in p.shapes])
def test_planted(plant, shape):
    for seed in range(2):
        world = scenario(shape, plant.off_policy, seed)
        frame = gl.measure({"right": plant.right, "wrong": plant.wrong}, world, plant.target).set_index("estimator")
        right, wrong = frame.loc["right"], frame.loc["wrong"]
        assert right["bias"] < 1e-10
        assert right["cosine"] == pytest.approx(1, abs=1e-10)
        assert right["crossover"] == math.inf

        truth, expected = gl.exact.gradient(plant.target, world), plant.expected(world)
        size = float(truth.norm())
        assert_same(gl.exact.moments(plant.wrong, world).mean, expected, size)
        bias, norm = float((expected - truth).norm()) / size, float(expected.norm())
        assert bias > 1e-2  # it is caught, with this verdict:
        assert wrong["bias"] == pytest.approx(bias, rel=1e-10)
        if norm > 1e-12:
            assert wrong["cosine"] == pytest.approx(float(expected @ truth) / (norm * size), abs=1e-10)
        if plant.bias is not None:
            closed = plant.bias(world) if callable(plant.bias) else plant.bias
            assert wrong["bias"] == pytest.approx(closed, rel=1e-10)
        if plant.cosine is not None:
            assert wrong["cosine"] == pytest.approx(plant.cosine, abs=1e-10, nan_ok=True)


@pytest.mark.parametrize("shape", EVERY)
def test_a_fully_detached_loss_is_refused(shape):
    """There is no gradient to measure: said so, rather than measured as zero."""

    def dead_k2(r):
        return 0.5 * r.log_ratio.detach().sum(-1).square()

    with pytest.raises(ValueError, match=r"dead_k2 does not depend on the policy's logits.*detached"):
        gl.measure(dead_k2, scenario(shape))


@pytest.mark.parametrize(("loss", "shape"), [(lambda r: r.log_ratio, "[9, 2]"), (lambda r: r.log_ratio.mean(), "[]")])
def test_a_loss_without_one_value_per_response_is_refused(loss, shape):
    with pytest.raises(ValueError, match=r"must return one value per response, \[9\], got") as caught:
        gl.exact.moments(loss, scenario("tree"))
    assert str(caught.value).endswith(shape)


@pytest.mark.parametrize("shape", ENDING)
def test_mean_for_sum_of_k1_drives_the_length(shape):
    """With an end token the mean over a response's tokens turns the zero gradient of k1 into that of E[1/L]."""
    world = scenario(shape)
    losses = {"sum": lambda r: r.log_ratio.sum(-1), "mean": lambda r: r.log_ratio.sum(-1) / r.mask.sum(-1)}
    frame = gl.measure(losses, world, ["inverse_length", "reverse_kl"]).set_index(["estimator", "target"])
    assert frame.loc["sum", "gradient_norm"].max() < 1e-14
    assert frame.loc[("sum", "reverse_kl"), "bias"] == pytest.approx(1, abs=1e-12)
    assert math.isnan(frame.loc[("sum", "reverse_kl"), "cosine"])
    assert frame.loc[("mean", "inverse_length"), "bias"] < 1e-10
    assert frame.loc[("mean", "inverse_length"), "target_norm"] > 0.02


@pytest.mark.parametrize("shape", ENDING)
def test_mean_for_sum_biases_with_an_end_token(shape):
    """Σ_L of the part of the frozen-prefix gradient that responses of length L carry, divided by L."""
    world = scenario(shape)

    def of_length(n):
        return lambda r: k2_per_token(r) * (r.mask.sum(-1) == n)

    def mean(r):
        return k2_per_token(r) / r.mask.sum(-1)

    parts = [gl.exact.moments(of_length(n), world).mean for n in range(1, world.policy.length + 1)]
    assert_same(sum(parts), gl.exact.gradient("reverse_kl_frozen_prefix", world))
    assert_same(gl.exact.moments(mean, world).mean, sum(part / n for n, part in enumerate(parts, 1)))
    row = gl.measure(mean, world, "reverse_kl_frozen_prefix").iloc[0]
    assert row["cosine"] < 1 - 1e-3


@pytest.mark.parametrize("shape", EVERY)
def test_mistakes_that_are_none(shape):
    """Earlier rewards only add noise; the square does not tell a ratio from its inverse; neither may be accused."""
    world = scenario(shape)

    def one_too_many(r):
        earlier = torch.cat([torch.zeros_like(r.log_ratio[:, :1]), r.log_ratio[:, :-1]], -1)
        return ((to_go(r.log_ratio) + earlier).detach() * r.log_prob).sum(-1)

    def inverse(r):
        return 0.5 * (-r.log_ratio).sum(-1).square()

    def with_k1(r):
        return k2_of_response(r) + r.log_ratio.sum(-1)

    losses = {"right": k1_reward(to_go), "early": one_too_many, "k2": k2_of_response, "inverse": inverse, "k1": with_k1}
    frame = gl.measure(losses, world).set_index("estimator")
    assert (frame["bias"] < 1e-10).all()
    noise = frame["noise"]
    assert noise["inverse"] == noise["k2"]
    assert abs(noise["early"] / noise["right"] - 1) > 1e-3 or shape == "bandit"
    assert abs(noise["k1"] / noise["k2"] - 1) > 1e-2


@pytest.mark.parametrize("shape", EVERY)
def test_plain_functions_measure_like_the_estimators_they_spell_out(shape):
    world = scenario(shape, off_policy=True)
    pairs = {
        "k1-reward-to-go": k1_reward(to_go),
        "k2-loss-sequence": k2_of_response,
        "k3-loss": k3_per_token,
        "k3-both": lambda r: k3_in_reward(r) + k3_per_token(r),
        "k3-loss-token": k3_weighted(same),
        "full-both-prefix": complete_rao_blackwell,
    }
    for name, function in pairs.items():
        known, spelt = gl.exact.moments([gl.ESTIMATORS[name], function], world)
        assert_same(spelt.mean, known.mean, tolerance=1e-12, what=name)
        assert spelt.trace_cov == pytest.approx(known.trace_cov, rel=1e-11)


def test_a_mistake_shows_in_samples_too():
    """Sampled, the interval of the bias holds 2 for a sign flip, far from 0, and 0 for the right loss."""
    losses = {"right": k2_of_response, "wrong": lambda r: -k2_of_response(r)}
    frame = gl.measure(losses, scenario("eos"), samples=50_000, seed=3).set_index("estimator")
    assert frame.loc["wrong", "bias_low"] < 2 < frame.loc["wrong", "bias_high"]
    assert frame.loc["wrong", "bias_low"] > 1.8
    assert frame.loc["right", "bias_low"] == 0
    assert frame.loc["right", "bias_high"] < 0.2
    assert frame.loc["wrong", "cosine_high"] < -0.98
