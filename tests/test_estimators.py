"""The algebra of estimators: surrogate against closed-form coefficients, moments against the oracle, refusals, names."""

import copy
import dataclasses
import pickle
import random

import numpy as np
import oracles
import pytest
import torch
import worlds

import gradlab as gl
from gradlab.estimators.coefficients import coefficients
from gradlab.estimators.estimator import raw_weights
from gradlab.moments import cotangent

#: Values of every field, the default first; `group` follows from the baseline.
FIELDS = {
    "kernel": ["k1", "k2", "k3", "abs", "k3_swapped", "mse_sampled", "full", "mse"],
    "placement": ["loss", "reward", "loss+reward", "straight_through"],
    "credit": ["token", "to_go", "return", "sequence"],
    "weight": ["none", "token", "prefix", "sequence"],
    "differentiate_weight": [False, True],
    "truncate": [None, 1.0, 1.2],
    "clip": [None, 0.1],
    "normalise": ["sum", "mean", "token_mean", "fixed"],
    "clamp_log_ratio": [None, 0.4],
    "clamp_value": [None, 0.15],
    "gradient_kernel": [None, "k1", "k3", "abs", "k3_swapped", "mse_sampled"],
    "baseline": [None, "kl", "group_mean", "leave_one_out"],
}
RARE = {"truncate", "clip", "normalise", "clamp_log_ratio", "clamp_value", "gradient_kernel", "baseline"}
#: Fields that a group baseline goes with.
GROUPED = {"placement": ["reward"], "credit": ["return", "sequence"], "baseline": ["group_mean", "leave_one_out"]}
GROUPED |= {name: FIELDS[name][:1] for name in ("differentiate_weight", "clip", "gradient_kernel")}


def grid(seed: int, size: int, **fixed: list) -> list[gl.Estimator]:
    """`size` different valid estimators, drawn at random from everything the fields allow."""
    draw, found = random.Random(seed), {}
    while len(found) < size:
        chosen = {
            name: draw.choice(values) if name not in RARE or draw.random() < 0.3 else values[0]
            for name, values in (FIELDS | fixed).items()
        }
        if chosen["baseline"] in ("group_mean", "leave_one_out"):
            chosen["group"] = draw.choice([2, 3])
        try:
            found[gl.Estimator(**chosen)] = None
        except ValueError as error:
            assert "impossible estimator" in str(error)  # noqa: PT017 - any other refusal is a mistake of this grid
    return list(found)


def test_grid_reaches_every_corner():
    everything = [e for seed in range(10) for e in grid(seed, 300)]
    for name, values in FIELDS.items():
        assert {getattr(e, name) for e in everything} == set(values)
    seen = {(e.placement, e.credit, e.weight, e.differentiate_weight) for e in everything}
    whole = {c for c in seen if c[1] == "sequence"}
    assert len(whole) == 3 * 3  # weights: none, sequence, differentiated sequence
    assert len(seen - whole) == (1 + 3 + 3 + 1) * 7  # straight_through and loss know one credit, the others three


# ------------------------------------------------------------------------------- surrogate against coefficients


def score(rollout: gl.Rollout) -> torch.Tensor:
    """∇log π(y_t|s_t) in the parameters of the step, `[n, t, v]`, by hand."""
    if rollout.family.name == "normal":
        mean, std = rollout.logits.unbind(-1)
        z = (rollout.tokens - mean) / std
        return torch.stack([z / std, (z**2 - 1) / std], -1)
    return torch.eye(rollout.logits.shape[-1])[rollout.tokens] - rollout.logits.softmax(-1)


def slope(kernel: str, rollout: gl.Rollout) -> torch.Tensor:
    """Gradient of a vocabulary kernel in the parameters of the step, `[n, t, v]`, by hand (KL of normals only)."""
    if rollout.family.name == "normal":
        (m, s), (m_ref, s_ref) = rollout.logits.unbind(-1), rollout.reference_logits.unbind(-1)
        return torch.stack([(m - m_ref) / s_ref**2, s / s_ref**2 - 1 / s], -1)
    p, r = rollout.logits.softmax(-1), rollout.reference_logits.softmax(-1)
    of_p = (p / r).log() if kernel == "full" else p - r
    return p * (of_p - (p * of_p).sum(-1, keepdim=True))


def by_hand(e: gl.Estimator, rollout: gl.Rollout) -> torch.Tensor:
    """Per-sample gradients `[n, t, v]` from the closed-form coefficients."""
    found = coefficients(e, rollout)
    gradient = found.score[..., None] * score(rollout)
    return gradient if found.direct is None else gradient + found.direct[..., None] * slope(e.kernel, rollout)


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("shape", [*worlds.SHAPES, "gaussian"])
def test_coefficients_are_autograd_of_the_surrogate(shape, off_policy):
    rollout = gl.Rollout.from_sampler(worlds.scenario(shape, off_policy), 24, np.random.default_rng(0))
    seed = [*worlds.SHAPES, "gaussian"].index(shape) + 10 * off_policy
    estimators = [*gl.ESTIMATORS.values(), *grid(seed, 150)]
    if shape == "gaussian":  # the gradient of its MSE is not written out here
        estimators = [e for e in estimators if e.kernel != "mse"]
    moving = 0
    for e in estimators:
        found = by_hand(e, rollout)
        autograd = cotangent(e, rollout) if e(rollout.differentiable()).requires_grad else torch.zeros_like(found)
        worlds.assert_same(found, autograd, scale=max(float(autograd.norm()), 1e-2), tolerance=1e-12, what=e.name)
        assert not found[~rollout.mask].any()
        moving += bool(autograd.norm() > 1e-2)
    assert moving > 0.85 * len(estimators)


@pytest.mark.parametrize("weight", ["token", "prefix", "sequence"])
def test_a_ratio_on_the_edge_of_the_clip_is_not_clipped(weight):
    rollout = gl.Rollout.from_sampler(worlds.scenario("tree", off_policy=True), 24, np.random.default_rng(0))
    weights = gl.Estimator("k1", "reward", weight=weight)
    ratios = {float(w) for w in raw_weights(weights, rollout).unique() if 0.5 <= w < 2 and w != 1}  # 1 ± ε is exact there
    assert min(ratios) < 1 < max(ratios)
    for ratio in ratios:
        clip = abs(ratio - 1)
        assert ratio in (1 + clip, 1 - clip)
        e = gl.Estimator("k1", "reward", "return", weight=weight, clip=clip)
        worlds.assert_same(by_hand(e, rollout), cotangent(e, rollout), tolerance=1e-12, what=e.name)


def test_coefficients_on_a_weighted_rollout():
    rollout = gl.Rollout.enumerated(worlds.scenario("eos", off_policy=True))
    for e in grid(99, 150, baseline=[None, "kl"]):
        worlds.assert_same(by_hand(e, rollout), cotangent(e, rollout), tolerance=1e-12, what=e.name)


# ------------------------------------------------------------------------------- values and groups against the oracle


def oracle_losses(e: gl.Estimator, rollout: gl.Rollout, world: gl.Scenario) -> tuple[list[float], torch.Tensor]:
    """Surrogate of every drawn response, and the gradient of their sum, with group baselines by plain loops."""
    logits, reference, behaviour, _ = worlds.arrays(world)
    theta, mu = torch.tensor(logits, requires_grad=True), logits if behaviour is None else behaviour
    drawn = [tuple(y[live].tolist()) for y, live in zip(rollout.tokens, rollout.mask, strict=True)]
    at = [oracles.steps(*(oracles.rows_along(rows, y) for rows in (theta, reference, mu)), y) for y in drawn]
    rewards = [float(oracles.coefficients(e, steps)[0].detach()) if e.grouped else 0.0 for steps in at]
    everything = oracles.responses(theta.shape[1], world.policy.length, world.policy.eos)
    mean_length = sum(len(y) * float(oracles.log_probability(mu, y).exp()) for y in everything)
    losses = []
    for i, steps in enumerate(at):
        baseline = 0.0
        if e.grouped:
            start = i - i % e.group
            group = [j for j in range(start, start + e.group) if j != i or e.baseline == "group_mean"]
            baseline = sum(rewards[j] for j in group) / len(group)
        losses.append(oracles.surrogate(e, steps, world.policy.length, mean_length, baseline))
    total = sum(losses)
    gradient = torch.autograd.grad(total, theta)[0] if total.requires_grad else torch.zeros_like(theta)
    return [float(loss.detach()) for loss in losses], gradient


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("shape", ["bandit", "eos"])
def test_surrogates_of_drawn_responses_against_the_oracle(shape, off_policy):
    world = worlds.scenario(shape, off_policy)
    rollout = gl.Rollout.from_sampler(world, 6, np.random.default_rng(1))
    some = grid(300 + off_policy, 40)
    some += [e for e in grid(310 + off_policy, 60, **GROUPED) if e.grouped]
    assert sum(e.grouped for e in some) > 15
    for e in some:
        losses, gradient = oracle_losses(e, rollout, world)
        worlds.assert_same(e(rollout), losses, max(np.linalg.norm(losses), 1e-3), tolerance=1e-12, what=e.name)
        found = torch.zeros_like(gradient).index_add_(0, rollout.contexts.flatten(), by_hand(e, rollout).flatten(0, 1))
        worlds.assert_same(found, gradient, max(float(gradient.norm()), 1e-3), tolerance=1e-11, what=e.name)


# ------------------------------------------------------------------------------------ moments against the oracle


def assert_moments(estimators: list[gl.Estimator], world: gl.Scenario) -> None:
    """Mean and trace of all of them, in one pass, against the oracle one by one."""
    for e, found in zip(estimators, gl.exact.moments(estimators, world), strict=True):
        mean, trace = oracles.moments(e, *worlds.arrays(world))
        scale = max(np.linalg.norm(mean), trace**0.5)
        worlds.assert_same(found.mean, mean, max(scale, 1e-3), what=e.name)
        assert found.trace_cov == pytest.approx(trace, rel=1e-10, abs=1e-10 * max(scale**2, 1e-3)), e.name
        assert (found.samples, found.method) == (None, "enumeration")


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("shape", worlds.SHAPES)
def test_moments_against_the_oracle(shape, off_policy):
    seed = 100 + list(worlds.SHAPES).index(shape) + 10 * off_policy
    assert_moments(grid(seed, 50, baseline=[None, "kl"]), worlds.scenario(shape, off_policy))


@pytest.mark.parametrize("off_policy", [False, True])
def test_moments_of_the_catalogue_against_the_oracle(off_policy):
    assert_moments(list(gl.ESTIMATORS.values()), worlds.scenario("eos first", off_policy))


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("shape", ["bandit", "eos first"])
def test_moments_of_groups_against_the_oracle(shape, off_policy):
    seed = 200 + 2 * (shape == "bandit") + off_policy
    estimators = grid(seed, 150, **GROUPED)
    estimators = [e for e in estimators if e.grouped][:40]
    assert len(estimators) == 40
    assert_moments(estimators, worlds.scenario(shape, off_policy))


@pytest.mark.parametrize("weight", ["none", "token", "prefix", "sequence"])
@pytest.mark.parametrize("kernel", ["k3", "full", "mse"])
def test_moments_of_groups_for_every_weight(kernel, weight):
    estimators = [
        gl.Estimator(kernel, "reward", "return", weight, baseline=baseline, group=3)
        for baseline in ("group_mean", "leave_one_out")
    ]
    assert_moments(estimators, worlds.scenario("eos first", off_policy=True))


def test_moments_of_a_list_are_those_of_its_members():
    world, some = worlds.scenario("eos", off_policy=True), grid(7, 8)
    for e, found in zip(some, gl.exact.moments(some, world), strict=True):
        alone = gl.exact.moments(e, world)
        torch.testing.assert_close(found.mean, alone.mean, rtol=1e-12, atol=1e-14)
        assert found.trace_cov == pytest.approx(alone.trace_cov, rel=1e-12, abs=1e-14)


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({"kernel": "k33"}, "unknown kernel 'k33'; did you mean 'k3'"),
        ({"kernel": "fulll"}, "did you mean 'full'"),
        ({"kernel": "k3-swapped"}, "did you mean 'k3_swapped'"),
        ({"kernel": "hellinger"}, "unknown kernel 'hellinger'; known: k1, k2, k3, abs"),
        ({"kernel": None}, "unknown kernel None"),
        ({"placement": "rewards"}, "unknown placement 'rewards'; did you mean 'reward'"),
        ({"placement": "straight-through"}, "did you mean 'straight_through'"),
        ({"credit": "togo"}, "unknown credit 'togo'; did you mean 'to_go'"),
        ({"credit": ["token"]}, "unknown credit"),
        ({"weight": "sequnce"}, "unknown weight 'sequnce'; did you mean 'sequence'"),
        ({"weight": True}, "unknown weight True"),
        ({"normalise": "token mean"}, "unknown normalise 'token mean'; did you mean 'token_mean'"),
        ({"placement": "reward", "credit": "return", "baseline": "leave_one", "group": 2}, "unknown baseline 'leave_one'; did"),
        ({"placement": "straight_through", "gradient_kernel": "k4"}, "unknown gradient_kernel 'k4'"),
        ({"placement": "straight_through", "gradient_kernel": "full"}, "unknown gradient_kernel 'full'"),
        ({"credit": "to_go"}, "credit='to_go' has no meaning with placement='loss'"),
        ({"credit": "return"}, "credit='return' has no meaning with placement='loss'"),
        ({"placement": "straight_through", "credit": "sequence"}, "credit must be 'token', got 'sequence'"),
        ({"kernel": "full", "credit": "sequence"}, "'full' sums over the vocabulary"),
        ({"kernel": "mse", "placement": "reward", "credit": "sequence"}, "'mse' sums over the vocabulary"),
        ({"kernel": "full", "placement": "straight_through"}, "'full' is not one of"),
        ({"credit": "sequence", "weight": "token"}, "weight must be 'none' or 'sequence', got 'token'"),
        ({"credit": "sequence", "weight": "prefix"}, "weight must be 'none' or 'sequence', got 'prefix'"),
        ({"differentiate_weight": True}, "weight is 'none'"),
        ({"truncate": 2.0}, "weight is 'none'"),
        ({"placement": "reward", "clip": 0.2}, "weight is 'none'"),
        ({"weight": "token", "clip": 0.2}, "placement is 'loss'"),
        ({"placement": "loss+reward", "weight": "token", "clip": 0.2}, "placement is 'loss+reward'"),
        ({"placement": "reward", "weight": "token", "clip": 0.2, "truncate": 2.0}, "neither with truncate"),
        ({"kernel": "full", "placement": "reward", "weight": "token", "clip": 0.2}, "a vocabulary kernel"),
        ({"kernel": "full", "placement": "loss+reward", "weight": "prefix", "differentiate_weight": True}, "count it twice"),
        ({"kernel": "full", "placement": "reward", "weight": "token", "differentiate_weight": True}, "count it twice"),
        ({"kernel": "full", "clamp_value": 10.0}, "'full' is not one"),
        ({"kernel": "mse_sampled", "clamp_log_ratio": 20.0}, "'mse_sampled' is not one"),
        ({"gradient_kernel": "k2"}, "gradient_kernel belongs to placement='straight_through'"),
        ({"baseline": "kl"}, "placement must be 'reward', got 'loss'"),
        ({"placement": "loss+reward", "credit": "return", "baseline": "group_mean", "group": 2}, "placement must be 'reward'"),
        ({"kernel": "full", "placement": "reward", "baseline": "kl"}, "sampled kernel"),
        ({"placement": "reward", "credit": "sequence", "baseline": "kl"}, "credit 'token', 'to_go' or 'return'"),
        ({"placement": "reward", "credit": "to_go", "baseline": "group_mean", "group": 4}, "compares whole responses"),
        (
            {"placement": "reward", "credit": "return", "baseline": "group_mean", "group": 4, "weight": "token", "clip": 0.2},
            "detached, unclipped",
        ),
        (
            {"placement": "reward", "credit": "return", "baseline": "leave_one_out", "group": 4, "weight": "token"}
            | {"differentiate_weight": True},
            "detached, unclipped",
        ),
        ({"placement": "reward", "group": 4}, "goes with a group baseline; got baseline=None, group=4"),
        ({"placement": "reward", "credit": "return", "baseline": "leave_one_out"}, "group=None"),
        ({"placement": "reward", "credit": "return", "baseline": "leave_one_out", "group": 1}, "at least 2"),
        ({"placement": "reward", "credit": "return", "baseline": "leave_one_out", "group": 2.5}, "whole number"),
    ],
    ids=str,
)
def test_refusals(arguments, cause):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below, literally
        gl.Estimator(**{"kernel": "k3", **arguments})
    assert cause in str(caught.value)


@pytest.mark.parametrize("bound", [0, -1.0, float("nan"), float("inf"), float("-inf"), "2"])
@pytest.mark.parametrize("what", ["truncate", "clip", "clamp_log_ratio", "clamp_value"])
def test_bounds_are_positive_numbers(what, bound):
    with pytest.raises(ValueError, match=f"^{what} must be a positive number or None, got {bound!r}$"):
        gl.Estimator("k3", "reward", weight="token", **{what: bound})


@pytest.mark.parametrize(("samples", "group"), [(7, 2), (8, 3)])
def test_a_group_needs_its_responses(samples, group):
    e = gl.Estimator("k1", "reward", "return", baseline="leave_one_out", group=group)
    with pytest.raises(ValueError, match=f"multiple of {group} responses, got a sampled one of {samples}"):
        e(gl.Rollout.from_sampler(worlds.scenario("eos"), samples, np.random.default_rng(0)))
    with pytest.raises(ValueError, match=r"got a weighted one.*gl.exact.moments"):
        e(gl.Rollout.enumerated(worlds.scenario("eos")))


# --------------------------------------------------------------------------------------- names, equality, pickling


def test_names_tell_estimators_apart():
    everything = {e for seed in range(6) for e in grid(seed, 300)} | set(gl.ESTIMATORS.values())
    assert len({e.name for e in everything}) == len(everything) > 1300


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("k1",), "k1-loss"),
        (("k1", "reward", "sequence"), "k1-reward-sequence"),
        (("k1", "reward", "token", "sequence"), "k1-reward-sequence-weight"),
        (("k3", "loss", "token", "prefix", True, 2.0), "k3-loss-differentiated-prefix-weight-truncate=2.0"),
    ],
)
def test_names(arguments, name):
    assert gl.Estimator(*arguments).name == name


def test_values_compare_hash_and_travel():
    e = gl.Estimator("k3", "reward", "return", "sequence", truncate=2.0, baseline="leave_one_out", group=4)
    for twin in (pickle.loads(pickle.dumps(e)), copy.deepcopy(e), dataclasses.replace(e), gl.Estimator(**vars(e))):
        assert twin == e
        assert hash(twin) == hash(e)
        assert twin is not e
    others = [dataclasses.replace(e, **{name: value}) for name, value in (("kernel", "k1"), ("truncate", 2.5), ("group", 3))]
    assert len({e, *others}) == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        e.kernel = "k1"
    with pytest.raises(ValueError, match="no meaning with placement='loss'"):
        dataclasses.replace(e, placement="loss", baseline=None, group=None)


@pytest.mark.parametrize("given", ["k3-loss", ["k3-loss"], [3.0]])
def test_moments_of_something_that_is_no_estimator_say_what_is(given):
    policy = gl.Bandit([0.0, 1.0])
    scenario = gl.Scenario(policy, policy.perturbed(0.3))
    for function in (gl.exact.moments, gl.montecarlo.moments):
        with pytest.raises(ValueError, match=r"an estimator is a gl\.Estimator or a function of a rollout"):
            function(given, scenario)
