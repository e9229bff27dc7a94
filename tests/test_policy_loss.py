"""Losses of the whole objective: against loops over all groups, closed form against autograd, and what is refused."""

import dataclasses
import itertools
import math

import numpy as np
import oracles
import oracles_objective
import pytest
import torch
import worlds
from test_objectives import rewarded

import gradlab as gl

E = gl.Estimator
K1, K3 = E("k1"), E("k3")

#: One of every kind: advantages, ratios, trust regions, corrections, combinations, normalisers.
LOSSES = {
    **gl.LOSSES,
    "sample std": gl.PolicyLoss("group_std", 4, std="sample", epsilon=0.1),
    "mean": gl.PolicyLoss("mean", 4, regulariser=K3, beta=0.3),
    "sequence": gl.PolicyLoss("leave_one_out", 4, "sequence", normalise="fixed"),
    "prefix": gl.PolicyLoss("leave_one_out", 4, "prefix", clip=(0.1, 0.3)),
    "truncated": gl.PolicyLoss("group_std", 4, "token", truncate=1.1),
    "masked": gl.PolicyLoss("group_std", 4, "token", mask=(0.8, 1.3)),
    "masked and clipped": gl.PolicyLoss("group_std", 4, "token", 0.2, mask=(0.5, 1.5)),
    "dual": gl.PolicyLoss("group_std", 4, "token", 0.1, dual_clip=1.2),
    "prefix correction": gl.PolicyLoss("group_std", 4, "token", correction="prefix", correction_truncate=1.2),
    "geometric mask": gl.PolicyLoss("group_std", 4, "token", correction="geometric", correction_mask=(0.9, 1.1)),
    "after, clipped": gl.PolicyLoss("group_std", 4, "token", 0.1, E("k3", "reward", "to_go"), 0.3, "after"),
    "after, token": gl.PolicyLoss("group_std", 4, "token", None, K3, 0.3, "after"),
    "head of the loss": gl.PolicyLoss("group_std", 4, "token", 0.1, E("k1", "reward", "return"), 0.3, "head", correction="token"),
    "head of its own": gl.PolicyLoss(
        "group_std", 4, "sequence", None, E("k1", "reward", "to_go", "token", clip=0.1), 0.3, "head"
    ),
    "sequence kernel": gl.PolicyLoss("mean", 4, "token", None, E("k3", "reward", "sequence"), 0.3, "after"),
    "in the reward": gl.PolicyLoss("mean", 4, "token", 0.1, E("k1", "reward", "to_go"), 0.3),
    "function": gl.PolicyLoss(lambda rewards: rewards - rewards.amax(-1, keepdim=True), 4, "token", 0.2),
}  # fmt: skip
#: Combined before, so that each response has a value of its own.
MANY = {
    "rloo": gl.PolicyLoss("leave_one_out", 3, regulariser=K1, beta=0.3, combine="before"),
    "mean": gl.PolicyLoss("mean", 3, "token", None, K3, 0.3, "before"),
    "group_std": gl.PolicyLoss("group_std", 3, regulariser=K1, beta=0.3, combine="before"),
    "clipped": gl.PolicyLoss("group_std", 3, "token", 0.1, K1, 0.3, "before", "mean"),
    "batch": gl.PolicyLoss("mean_batch_std", 3, "token", 0.1, K1, 0.3, "before"),
    "batch, no clip": gl.PolicyLoss("mean_batch_std", 3, regulariser=K1, beta=0.3, combine="before"),
}


def world_of(shape: str, off_policy: bool, binary: bool = True, seed: int = 0):
    """A scenario with old weights between behaviour and policy; as the oracles take it; its reward as a dictionary."""
    world, table = rewarded(shape, binary, off_policy, seed)
    tables = [world.policy.table, world.reference.table, world.sampler.table]
    old = world.sampler.table
    if off_policy:
        old = 0.5 * (world.policy.table + world.behaviour.table) + 0.2 * torch.sin(torch.arange(old.numel()).view_as(old))
        world = dataclasses.replace(world, old=world.policy.with_parameters(old.flatten()))
    return world, (*[t.numpy() for t in tables], old.numpy(), world.policy.eos), table


def small(loss: gl.PolicyLoss, group: int) -> gl.PolicyLoss:
    """With a group that can be looped over."""
    k = None if loss.k is None else min(loss.k, group)
    return dataclasses.replace(loss, group=group if loss.grouped else None, k=k)


def needs_old(loss: gl.PolicyLoss) -> bool:
    return loss.correction != "none"


def offered(loss: gl.PolicyLoss) -> list[bool]:
    """On- and off-policy where the loss is tried with binary rewards: later credit and a KL in the reward have tests of their own."""
    if loss.credit == "to_go" or loss.combine == "before":
        return []
    return [True] if needs_old(loss) else [False, True]


@pytest.mark.parametrize(("shape", "group"), [("bandit", 4), ("eos first", 3), ("tree", 2)])
@pytest.mark.parametrize(("name", "off_policy"), [(n, o) for n, loss in LOSSES.items() for o in offered(loss)])
def test_binary_rewards_against_a_loop_over_all_groups(name, off_policy, shape, group):
    loss = small(LOSSES[name], group)
    world, given, table = world_of(shape, off_policy)
    mean, trace = oracles_objective.group_moments(loss, given, table)
    found = gl.exact.moments(loss, world)
    worlds.assert_same(found.mean, mean, scale=np.linalg.norm(mean) + trace**0.5, tolerance=1e-12)
    assert found.trace_cov == pytest.approx(trace, rel=1e-11)


@pytest.mark.parametrize(("shape", "group"), [("bandit", 4), ("bandit", 2), ("eos first", 3), ("tree", 2)])
@pytest.mark.parametrize("off_policy", [False, True], ids=["on", "off"])
@pytest.mark.parametrize("name", MANY)
def test_many_valued_rewards_against_a_loop_over_all_groups(name, off_policy, shape, group):
    loss = small(MANY[name], group)
    world, given, table = world_of(shape, off_policy, binary=False)
    mean, trace = oracles_objective.group_moments(loss, given, table)
    found = gl.exact.moments(loss, world)
    worlds.assert_same(found.mean, mean, scale=np.linalg.norm(mean) + trace**0.5, tolerance=1e-12)
    assert found.trace_cov == pytest.approx(trace, rel=1e-11)


# ------------------------------------------------------------------------------------------------- credit to later tokens


def test_a_credit_to_go_against_autograd_of_the_expected_return():
    """Off-policy with prefix ratios, discount and values: Σ_y μ(y) ∇[−Σ_t sg(Π_{u≤t} ρ) A_t log π_t], written out."""
    world, (policy, _, behaviour, _, eos), _ = world_of("eos", True)
    table = gl.TableReward(world.policy, np.random.default_rng(3).normal(size=policy.shape))
    value = torch.from_numpy(np.random.default_rng(4).normal(size=(3,)))
    gamma, lam = 0.9, 0.7

    def values(rollout):
        return value[: rollout.tokens.shape[1]].expand(rollout.tokens.shape)

    world = dataclasses.replace(world, old=None, reward=table)
    loss = gl.PolicyLoss("reward", None, "prefix", credit="to_go", discount=gamma, gae=lam, values=values)
    total, second = np.zeros(policy.size), 0.0
    for y in oracles.responses(3, 3, eos):
        node, rewards = 0, []
        for token in y:
            rewards.append(float(table.table[node, token]))
            node = 3 * node + 1 + token
        length = len(y)
        deltas = [rewards[t] + gamma * (float(value[t + 1]) if t + 1 < length else 0) - float(value[t]) for t in range(length)]
        gains = [sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, length)) for t in range(length)]

        def surrogate(leaf, y=y, gains=gains):
            pi = [row[token] for row, token in zip(oracles.rows_along(leaf, y), y, strict=True)]
            mu = [row[token] for row, token in zip(oracles.rows_along(behaviour, y), y, strict=True)]
            ratios = [math.exp(sum(float(pi[u].detach() - mu[u]) for u in range(t + 1))) for t in range(len(y))]
            return -sum(w * a * lp for w, a, lp in zip(ratios, gains, pi, strict=True))

        g = oracles_objective.differentiate(surrogate, policy).numpy()
        share = float(oracles_objective.probability(behaviour, y))
        total, second = total + share * g, second + share * float(g @ g)
    found = gl.exact.moments(loss, world)
    worlds.assert_same(found.mean, total, tolerance=1e-12)
    assert found.trace_cov == pytest.approx(second - float(total @ total), rel=1e-11)
    plain = dataclasses.replace(loss, ratio="sequence", discount=1.0, gae=1.0)
    worlds.assert_same(  # with any values, λ = γ = 1 and whole weights have the gradient of the reward in expectation
        gl.exact.moments(plain, world).mean, gl.exact.gradient("reward", world), tolerance=1e-12
    )


def test_reinforce_plus_plus_standardises_tokens():
    """Mean and standard deviation of the rewards to go over all tokens of a large batch, counted one by one."""
    world, (policy, reference, _, _, eos), table = world_of("eos", False)
    loss = dataclasses.replace(gl.LOSSES["reinforce++"], beta=0.3)
    entries, mu = [], {y: float(oracles_objective.probability(policy, y)) for y in oracles.responses(3, 3, eos)}
    for y, share in mu.items():
        gaps = [
            float(p[token] - r[token])
            for p, r, token in zip(oracles.rows_along(policy, y), oracles.rows_along(reference, y), y, strict=True)
        ]
        entries += [(share, table[y] - 0.3 * sum(gaps[t:])) for t in range(len(y))]
    tokens = sum(share for share, _ in entries)
    mean = sum(share * a for share, a in entries) / tokens
    std = (sum(share * (a - mean) ** 2 for share, a in entries) / tokens) ** 0.5
    constants = gl.estimators.policy_loss.batch_constants(loss, gl.Rollout.enumerated(world))
    assert constants == pytest.approx((mean, std), rel=1e-12)
    truth = gl.exact.gradient("regularised", world, beta=0.3) / (std * tokens)
    worlds.assert_same(gl.exact.moments(loss, world).mean, truth, tolerance=1e-11)


# ------------------------------------------------------------------------------------------------- autograd, and samples


def rollout_of(world: gl.Scenario, n: int = 24, seed: int = 0) -> gl.Rollout:
    return gl.Rollout.from_sampler(world, n, np.random.default_rng(seed))


@pytest.mark.parametrize("shape", ["bandit", "eos"])
@pytest.mark.parametrize("name", {**LOSSES, **MANY})
def test_the_closed_form_is_the_surrogate_differentiated(name, shape):
    loss = {**LOSSES, **MANY}[name]
    world, _, _ = world_of(shape, True)
    rollout = rollout_of(world)
    from gradlab.moments import cotangent, gradients

    closed, by_autograd = gradients([loss], rollout), cotangent(loss, rollout)
    leaf = torch.zeros_like(rollout.table)
    leaf.index_add_(0, rollout.contexts.flatten(), by_autograd.flatten(0, 1) / len(rollout.weight))
    worlds.assert_same(closed.mean(rollout.weight)[0], leaf.flatten(), tolerance=1e-12)


@pytest.mark.parametrize(
    "name", ["grpo", "rloo", "grpo-decoupled", "reinforce++", "reinforce++-baseline", "pkpo", "icepop", "ppo"]
)
def test_samples_agree_with_the_exact_moments(name):
    loss = gl.LOSSES[name]
    world, _, _ = world_of("eos", True)
    exact, sampled = gl.exact.moments(loss, world), gl.montecarlo.moments(loss, world, samples=48_000, seed=1)
    assert sampled.samples == 48_000
    spread = float((sampled.mean - exact.mean).norm()) / (exact.trace_cov / 48_000) ** 0.5
    assert spread < 1.6  # a mean of squares over 27 parameters; 1 is expected
    assert sampled.trace_cov == pytest.approx(exact.trace_cov, rel=0.05)


def test_a_language_model_has_moments_in_its_parameters_and_a_variance_between_prompts():
    policy = gl.policies.small("addition", "few", prompts=["12+34=", "50+07="], length=2)
    reference = gl.policies.small("addition", "reference", prompts=["12+34=", "50+07="], length=2)
    world = gl.Scenario(policy, reference, reward=lambda rollout: (rollout.tokens.sum(-1) < 9).double())
    loss = gl.LOSSES["grpo"]
    alone = []
    for prompt in ("12+34=", "50+07="):
        one, ref = (gl.policies.small("addition", stage, prompts=[prompt], length=2) for stage in ("few", "reference"))
        alone.append(gl.exact.moments(loss, gl.Scenario(one, ref, reward=world.reward)))
    found = gl.exact.moments(loss, world)
    worlds.assert_same(found.mean, sum(each.mean for each in alone) / 2, tolerance=1e-5)  # float32
    between = float((alone[0].mean - alone[1].mean).square().sum()) / 4
    assert found.trace_cov == pytest.approx(sum(each.trace_cov for each in alone) / 2 + 8 * between, rel=1e-4)
    sampled = gl.montecarlo.moments(loss, world, samples=4096)
    assert float((sampled.mean - found.mean).norm()) < 2 * (found.trace_cov / 4096) ** 0.5


def test_a_gaussian_policy_has_a_binary_reward_too():
    class Positive:
        kinks = (0.0,)

        def __call__(self, rollout):
            return (rollout.tokens[:, 0] > 0).double()

    world = gl.Scenario(gl.Gaussian(0.3, 0.9), gl.Gaussian(0, 1), reward=Positive())
    found = gl.exact.moments(gl.PolicyLoss("group_std", 4), world)
    p = -gl.exact.objective("reward", world)
    truth = gl.utility("group_std", group=4).slope(p) * gl.exact.gradient("reward", world)
    worlds.assert_same(found.mean, truth, tolerance=1e-8)


# ------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("group", [2, 3, 8, 64])
@pytest.mark.parametrize("name", ["leave_one_out", "mean", "group_std", "pass_at_k", "function"])
def test_identity_14_what_an_advantage_ascends(name, group):
    """Exact moments of the loss, and U′(p) times the gradient of p, for 20 random scenarios."""
    advantage = (lambda rewards: torch.exp(rewards - rewards.mean(-1, keepdim=True))) if name == "function" else name
    k = 2 if name == "pass_at_k" else None
    utility = gl.utility(advantage, group=group, k=k)
    loss = gl.PolicyLoss(advantage, group, k=k)
    found = (rewarded("bandit" if seed % 2 else "eos", True, seed=seed)[0] for seed in itertools.count())
    mixed = (world for world in found if 0 < gl.Rollout.enumerated(world).rewards.mean() < 1)
    for world in itertools.islice(mixed, 20):
        p = -gl.exact.objective("reward", world)
        mean, gradient = gl.exact.moments(loss, world).mean, gl.exact.gradient("reward", world)
        worlds.assert_same(mean, utility.slope(p) * gradient, scale=gradient.norm(), tolerance=1e-12)
        worlds.assert_same(mean, gl.exact.gradient("utility", world, utility=utility), scale=gradient.norm(), tolerance=1e-12)


#: A reward of (1, 0, 0, 1, 0) on five arms.
def identity_15(beta: float, epsilon: float) -> float:
    rng = np.random.default_rng(0)
    policy, reference = gl.Bandit(rng.standard_normal(5)), gl.Bandit(rng.standard_normal(5))
    world = gl.Scenario(policy, reference, reward=gl.TableReward(policy, [1.0, 0, 0, 1, 0]))

    def mean(coefficient: float) -> torch.Tensor:
        loss = gl.PolicyLoss("group_std", 4, regulariser=K1, beta=coefficient, combine="before", epsilon=epsilon)
        return -gl.exact.moments(loss, world).mean

    gradient = gl.exact.gradient("reverse_kl", world)
    return -float((mean(beta) - mean(0.0)) @ gradient) / float(gradient @ gradient)


PRINTED = {
    0.0: {0.1: ".2093", 0.01: ".1415", 0.001: ".1355", 1e-4: ".1349"},
    1e-4: {0.1: ".2091", 0.01: ".1393", 0.001: ".1163", 1e-4: ".0519"},
}


@pytest.mark.parametrize(("epsilon", "printed"), PRINTED.items())
def test_identity_15_standardising_the_combined_signal_hides_beta(epsilon, printed):
    for beta, text in printed.items():
        worlds.assert_prints(identity_15(beta, epsilon), text)


def test_identity_16_combined_is_decoupled_with_leave_one_out_and_not_with_a_standard_deviation():
    for seed in range(20):
        world, _ = rewarded("bandit", True, seed=seed)
        means = {}
        for advantage in ("leave_one_out", "group_std"):
            for combine in ("before", "separate", "head"):
                loss = gl.PolicyLoss(advantage, 4, regulariser=E("k1", "reward", "return"), beta=0.2, combine=combine)
                means[advantage, combine] = gl.exact.moments(loss, world).mean
        size = float(means["leave_one_out", "before"].norm())
        for combine in ("separate", "head"):
            worlds.assert_same(means["leave_one_out", combine], means["leave_one_out", "before"], tolerance=1e-12)
            assert float((means["group_std", combine] - means["group_std", "before"]).norm()) > 1e-3 * size


# ------------------------------------------------------------------------------------------------- the catalogue


@pytest.mark.parametrize("name", [name for name, loss in gl.LOSSES.items() if loss.target])
def test_a_named_loss_descends_what_it_declares(name):
    """On-policy, binary rewards, one length: the mean is parallel to the declared combination."""
    loss = gl.LOSSES[name]
    for shape, seed in (("bandit", 1), ("tree", 2), ("tree", 5)):
        world, _ = rewarded(shape, True, seed=seed)
        if needs_old(loss):
            world = dataclasses.replace(world, old=world.policy, behaviour=world.policy)
        given = {"pass_at_k": {"k": loss.k}}
        if "utility" in loss.target:
            given["utility"] = {"utility": gl.utility(loss.advantage, group=loss.group, std=loss.std, epsilon=loss.epsilon)}
        parts = [share * gl.exact.gradient(target, world, **given.get(target, {})) for target, share in loss.target.items()]
        mean, truth = gl.exact.moments(loss, world).mean, sum(parts)
        worlds.assert_same(mean / mean.norm(), truth / truth.norm(), tolerance=1e-10, what=name)
        # and each part is needed
        for part in parts if len(parts) > 1 else []:
            rest = truth - part
            assert float((mean / mean.norm() - rest / rest.norm()).norm()) > 1e-4


def test_every_named_loss_has_a_source_and_a_name_of_its_own():
    assert len(gl.LOSSES) >= 20
    assert all(loss.source for loss in gl.LOSSES.values())
    assert len(set(gl.LOSSES.values())) == len(gl.LOSSES)
    for name, loss in gl.LOSSES.items():
        assert gl.estimators.catalogue.name_of(dataclasses.replace(loss, source="elsewhere")) == name


# ------------------------------------------------------------------------------------------------- what is refused

BANDIT = gl.Bandit([0.0, 1.0, 2.0])
BINARY = gl.Scenario(BANDIT, BANDIT, reward=gl.TableReward(BANDIT, [1.0, 0.0, 1.0]))
MANY_ARMS = gl.Bandit.random(50, seed=0)
CHAIN = gl.Markov.random(4, 64, seed=0)


def with_ids(policy):
    """The token's id as reward."""
    return gl.Scenario(policy, policy, reward=lambda rollout: rollout.tokens[:, 0].double())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gl.PolicyLoss("group_sd", 4), "unknown advantage 'group_sd'; did you mean 'group_std'"),
        (lambda: gl.PolicyLoss("group_std"), "'group_std' compares the responses to one prompt: give group=.*got None"),
        (lambda: gl.PolicyLoss("mean", 1), "at least 2, got 1"),
        (lambda: gl.PolicyLoss("mean", 4.0), "group must be a positive whole number, got 4.0"),
        (lambda: gl.PolicyLoss("pass_at_k", 4), "k belongs to advantage='pass_at_k', which needs it"),
        (lambda: gl.PolicyLoss("pass_at_k", 4, k=5), "from at least k responses: got k=5, group=4"),
        (lambda: gl.PolicyLoss("mean", 4, std="biased"), "unknown std 'biased'"),
        (lambda: gl.PolicyLoss("mean", 4, epsilon=-1.0), "from 0 on, got -1.0"),
        (lambda: gl.PolicyLoss("mean", 4, "tokens"), "unknown ratio 'tokens'; did you mean 'token'"),
        (lambda: gl.PolicyLoss("mean", 4, clip=0.2), "act on the ratio, and ratio is 'none'"),
        (lambda: gl.PolicyLoss("mean", 4, "token", clip=(0.2, -0.1)), "0 < ε_l ≤ 1 and ε_h > 0"),
        (lambda: gl.PolicyLoss("mean", 4, "token", truncate=2.0, clip=0.2), "give truncate or clip"),
        (lambda: gl.PolicyLoss("mean", 4, "token", dual_clip=3.0), "clip_form and dual_clip say how a clip is made: give clip"),
        (lambda: gl.PolicyLoss("mean", 4, "token", clip=0.2, dual_clip=1.1), "above 1 [+] ε_h"),
        (lambda: gl.PolicyLoss("mean", 4, "token", clip=0.2, clip_form="geometric"), "ratio must be 'geometric'"),
        (lambda: gl.PolicyLoss("mean", 4, "token", mask=(1.5, 0.5)), r"the band \(a, b\).*got \(1.5, 0.5\)"),
        (lambda: gl.PolicyLoss("mean", 4, "token", correction_truncate=2.0), "act on π_old/μ, and correction is 'none'"),
        (lambda: gl.PolicyLoss("mean", 4, "token", bypass=True, correction="token"), "nothing is left to correct"),
        (lambda: gl.PolicyLoss("mean", 4, beta=0.1), "there is none: give regulariser"),
        (lambda: gl.PolicyLoss("mean", 4, regulariser="k3"), "regulariser is a gl.Estimator"),
        (lambda: gl.PolicyLoss("mean", 4, regulariser=K3, beta=-1.0), "beta is the coefficient of the regulariser"),
        (lambda: gl.PolicyLoss("mean", 4, regulariser=E("k3", normalise="mean"), beta=0.1), "leave the regulariser's normalise at 'sum'"),
        (lambda: gl.PolicyLoss("mean", 4, regulariser=gl.ESTIMATORS["k1-reward-loo"], beta=0.1), "the loss has its own groups"),
        (lambda: gl.PolicyLoss("mean", 4, regulariser=gl.ESTIMATORS["k3-both"], beta=0.1, combine="after"), "placement must be 'loss' or"),
        (lambda: gl.PolicyLoss("mean", 4, "token", regulariser=E("k3", weight="token"), beta=0.1, combine="after"), "must be 'none'"),
        (lambda: gl.PolicyLoss("mean", 4, credit="to_go"), "credit='to_go' goes with advantage='reward' or 'batch_std'"),
        (lambda: gl.PolicyLoss(discount=0.9), "are of rewards to go: give credit='to_go'"),
        (lambda: gl.PolicyLoss(credit="to_go", gae=0.9), "gae weighs the errors of a value function: give values="),
        (lambda: gl.PolicyLoss(constants=(0.0, 1.0)), "constants are those of a batch"),
        (lambda: gl.exact.moments(gl.LOSSES["grpo"], gl.Scenario(BANDIT, BANDIT)), "the scenario has no reward; give one"),
        (lambda: gl.exact.moments(gl.LOSSES["tis"], BINARY), r"weights π_old.*give gl.Scenario\(…, behaviour=mu, old=pi_old\)"),
        (lambda: gl.montecarlo.moments(gl.LOSSES["grpo"], BINARY, samples=12), "samples must be a multiple of the group size 8"),
        (lambda: gl.LOSSES["grpo"](rollout_of(BINARY, 12)), "a sampled rollout of a multiple of 8 responses, got a sampled one of 12"),
        (lambda: gl.LOSSES["grpo"](gl.Rollout.enumerated(BINARY)), "got a weighted one of 3; for exact moments use"),
        (lambda: gl.exact.covariance(gl.LOSSES["grpo"], BINARY), "compares responses, so a single one has no gradient"),
        (lambda: gl.exact.moments(gl.LOSSES["pkpo"], with_ids(BANDIT)), "pass@k needs rewards of 0 and 1, got 2"),
        (lambda: gl.exact.moments(gl.PolicyLoss("group_std", 8), with_ids(MANY_ARMS)), "8 out of 50 different values"),
        (lambda: gl.exact.moments(gl.LOSSES["grpo"], with_ids(CHAIN)), "a whole loss is no recursion over time; estimate it from samples"),
        (lambda: gl.exact.moments(gl.PolicyLoss(lambda rewards: rewards.sum(-1), 4), BINARY), "as many finite numbers, got"),
        (lambda: gl.exact.moments(gl.PolicyLoss(credit="to_go", values=lambda r: torch.ones(3)), BINARY), r"token, \[3, 1\], got \[3\]"),
    ],
)  # fmt: skip
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------- measured


def test_measure_compares_each_loss_at_its_own_coefficient():
    world, _ = rewarded("tree", True)
    losses = {beta: dataclasses.replace(gl.LOSSES["rloo"], beta=beta) for beta in (0.05, 0.4)}
    frame = gl.measure({str(beta): loss for beta, loss in losses.items()}, world, target=["regularised", "reward"])
    assert (frame[frame["target"] == "regularised"].bias == 0).all()
    for beta, row in zip(losses, frame[frame["target"] == "reward"].itertuples(), strict=True):
        reward, regularised = gl.exact.gradient("reward", world), gl.exact.gradient("regularised", world, beta=beta)
        assert row.bias == pytest.approx(float((regularised - reward).norm() / reward.norm()), rel=1e-9)
    given = gl.measure([gl.LOSSES["rloo"], "k1-reward-return"], world, target="regularised", beta=0.05)
    assert list(given.estimator) == ["rloo", "k1-reward-return"]
    assert given.bias[0] == 0 < given.bias[1]
    assert list(gl.measure("grpo", world, target="reward").estimator) == ["grpo"]
    with pytest.raises(ValueError, match="needs beta"):
        gl.measure(["rloo", "k2-loss"], world, target="regularised")


def test_measure_estimates_the_regularised_objective_where_responses_are_too_many_to_list():
    policy, reference = (gl.policies.small("names", stage, length=6) for stage in ("few", "reference"))
    world = gl.Scenario(policy, reference, reward=gl.training.task_reward("names", policy))
    loss = gl.PolicyLoss("leave_one_out", 4, regulariser=E("k1"), beta=0.1, combine="before")
    wrong = dataclasses.replace(loss, beta=0.0, regulariser=None, combine="separate", advantage=lambda rewards: 1 - rewards)
    frame = gl.measure({"rloo": loss, "reversed": wrong}, world, target="regularised", samples=512, beta=0.1)
    rloo, reversed_ = frame.itertuples()
    assert rloo.bias_low == 0
    assert rloo.cosine_high > 0.5
    assert reversed_.cosine < -0.3


# ------------------------------------------------------------------------------------------------- routes agree, errors are found


@pytest.mark.parametrize("group", [2, 8, 64])
@pytest.mark.parametrize("advantage", ["leave_one_out", "mean", "mean_batch_std"])
def test_the_binomial_law_and_the_closed_form_agree(advantage, group):
    from gradlab import groups
    from gradlab.estimators.policy_loss import fixed, own_values
    from gradlab.moments import in_logits

    for seed in (1, 5):
        world, _, _ = world_of("eos", True, seed=seed)
        rollout = gl.Rollout.enumerated(world)
        loss = gl.PolicyLoss(advantage, group, "sequence", regulariser=E("full", "loss+reward", "to_go"), beta=0.2)
        loss = fixed(loss, rollout)
        basis = groups.basis_of(loss, rollout)
        closed = groups._hoeffding(loss, rollout, own_values(loss, rollout), basis, in_logits)
        found = gl.exact.moments(loss, world)
        assert (found.method, closed.method) == ("binomial", "closed form")
        worlds.assert_same(found.mean, closed.mean, tolerance=1e-12)
        assert found.trace_cov == pytest.approx(closed.trace_cov, rel=1e-10)


def test_the_multinomial_law_and_the_closed_form_agree():
    from gradlab import groups
    from gradlab.estimators.policy_loss import own_values
    from gradlab.moments import in_logits

    policy = gl.Tree.random(3, 3, seed=0)
    world = gl.Scenario(policy, policy.perturbed(kl=0.2), reward=lambda rollout: (rollout.tokens.sum(-1) % 4).double())
    rollout, loss = gl.Rollout.enumerated(world), gl.PolicyLoss("leave_one_out", 6)
    levels, classes = torch.unique(own_values(loss, rollout), return_inverse=True)
    basis = groups.basis_of(loss, rollout)
    weight = torch.zeros(4, dtype=torch.float64).index_add(0, classes, rollout.weight)
    listed = groups._of_classes(loss, rollout, classes, groups._law(loss, rollout, levels, weight), basis, in_logits, 4)
    found = gl.exact.moments(loss, world)
    assert (listed.method, found.method) == ("multinomial", "closed form")
    worlds.assert_same(listed.mean, found.mean, tolerance=1e-12)
    assert listed.trace_cov == pytest.approx(found.trace_cov, rel=1e-11)


def test_planted_errors_get_the_verdict_that_is_theirs():
    """On-policy, one position, binary rewards: each mistake descends exactly what its algebra says."""
    world, _ = rewarded("bandit", True, seed=1)
    p, reward, kl = (
        -gl.exact.objective("reward", world),
        gl.exact.gradient("reward", world),
        gl.exact.gradient("reverse_kl", world),
    )
    assert 0.05 < p < 0.95

    def mean(advantage="leave_one_out", group=4, **fields):
        return gl.exact.moments(gl.PolicyLoss(advantage, group, **fields), world).mean

    right = gl.exact.gradient("regularised", world, beta=0.2)
    k1 = E("k1", "reward", "return")
    worlds.assert_same(mean(regulariser=k1, beta=0.2, combine="before"), right, tolerance=1e-12)
    # self-inclusive leave-one-out: three quarters of the whole signal
    worlds.assert_same(mean("mean", regulariser=k1, beta=0.2, combine="before"), 0.75 * right, tolerance=1e-12)
    # … and of the reward alone where the KL has a term of its own
    worlds.assert_same(mean("mean", regulariser=k1, beta=0.2), 0.75 * reward + 0.2 * kl, tolerance=1e-12)
    # the standard deviation over the wrong axis is a constant: no utility but p
    spread = (p * (1 - p)) ** 0.5
    worlds.assert_same(
        mean(lambda rewards: (rewards - rewards.mean(-1, keepdim=True)) / spread), 0.75 / spread * reward, tolerance=1e-12
    )
    slope = gl.utility("group_std", group=4).slope(p)
    worlds.assert_same(mean("group_std"), slope * reward, tolerance=1e-12)
    assert abs(slope - 0.75 / spread) > 0.01
    # combined before instead of after: not the utility's gradient plus that of the KL
    after = mean("group_std", regulariser=k1, beta=0.2, combine="after")
    worlds.assert_same(after, slope * reward + 0.2 * kl, tolerance=1e-12)
    before = mean("group_std", regulariser=k1, beta=0.2, combine="before")
    assert float((before - after).norm()) > 0.01 * float(after.norm())


def arms() -> gl.Scenario:
    """Six arms, half of them right, drawn from another policy."""
    policy = gl.Bandit.random(6, seed=0)
    reward = gl.TableReward(policy, [1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    return gl.Scenario(policy, policy.perturbed(scale=0.7, seed=1), policy.perturbed(scale=0.7, seed=2), reward=reward)


def test_planted_errors_of_ratios_are_found_off_policy():
    world = arms()
    head = gl.PolicyLoss("leave_one_out", 3, "token", regulariser=E("k1", "reward", "return"), beta=0.3, combine="head")
    worlds.assert_same(gl.exact.moments(head, world).mean, gl.exact.gradient("regularised", world, beta=0.3), tolerance=1e-12)
    # the ratio missing on the KL head: the KL's part is E_μ[k1 score]
    missing = gl.exact.moments(dataclasses.replace(head, combine="separate"), world).mean - gl.exact.moments(head, world).mean
    plain = gl.exact.moments(E("k1", "reward", "return"), world).mean - gl.exact.gradient("reverse_kl", world)
    worlds.assert_same(missing, 0.3 * plain, tolerance=1e-12)
    assert float(plain.norm()) > 0.05
    # a mask where truncation is meant loses exactly the tokens above the bound
    bound = 1.1
    truncated = gl.exact.moments(gl.PolicyLoss("leave_one_out", 3, "token", truncate=bound), world).mean
    masked = gl.exact.moments(gl.PolicyLoss("leave_one_out", 3, "token", mask=(0.0, bound)), world).mean
    rollout = gl.Rollout.enumerated(world)
    above = rollout.log_weight[:, 0].exp() > bound
    assert 0 < above.sum() < len(above)
    p = float(rollout.weight @ rollout.rewards)
    scores = torch.eye(len(above), dtype=torch.float64) - rollout.table.softmax(-1)
    lost = -(bound * rollout.weight * (rollout.rewards - p) * above) @ scores
    worlds.assert_same(truncated - masked, lost, tolerance=1e-12)


def test_a_clip_on_the_wrong_side_keeps_what_it_should_stop():
    world = arms()
    rollout = gl.Rollout.enumerated(world)
    ratio, p = rollout.log_weight[:, 0].exp(), float(rollout.weight @ rollout.rewards)
    gain, scores = rollout.rewards - p, torch.eye(len(ratio), dtype=torch.float64) - rollout.table.softmax(-1)
    stopped = ((gain > 0) & (ratio > 1.1)) | ((gain < 0) & (ratio < 0.9))
    opposite = ((gain < 0) & (ratio > 1.1)) | ((gain > 0) & (ratio < 0.9))
    free, clipped = (gl.exact.moments(gl.PolicyLoss("leave_one_out", 3, "token", clip), world).mean for clip in (None, 0.1))
    worlds.assert_same(clipped - free, (rollout.weight * ratio * gain * stopped) @ scores, tolerance=1e-12)
    assert stopped.any()
    assert float(((rollout.weight * ratio * gain * (stopped.double() - opposite.double())) @ scores).norm()) > 1e-3


def test_a_registered_loss_is_measured_by_its_name():
    mine = gl.PolicyLoss("mean", 4, regulariser=K1, beta=0.3, combine="before", source="mine")
    gl.register(mine, "my-loss")
    world, _ = rewarded("tree", True)
    frame = gl.measure("my-loss", world, target="regularised")
    assert frame.bias[0] == pytest.approx(0.25, rel=1e-10)
    with pytest.raises(ValueError, match="there is a loss 'grpo' already"):
        gl.register(mine, "grpo")


def test_extreme_groups():
    """Everything right or wrong: no signal; a pair out of many values: enumerated."""
    for value in (0.0, 1.0):
        world = gl.Scenario(BANDIT, BANDIT, reward=lambda rollout, value=value: torch.full((len(rollout.tokens),), value))
        found = gl.exact.moments(gl.PolicyLoss("group_std", 8, "token", 0.2), world)
        assert float(found.mean.norm()) == found.trace_cov == 0
    policy = gl.Bandit.random(120, seed=0)
    world = gl.Scenario(policy, policy, reward=lambda rollout: rollout.tokens[:, 0].double())
    loss = gl.PolicyLoss("group_std", 2)  # of two: the sign of the difference
    p = policy.table.softmax(-1)[0]
    rank = p.cumsum(0) - p - (1 - p.cumsum(0))
    truth = -(p * (rank - p @ rank))
    worlds.assert_same(gl.exact.moments(loss, world).mean, truth, tolerance=1e-10)


def test_a_clip_on_the_sum_of_advantage_and_kl_has_limits():
    policy = gl.Tree.random(4, 6, seed=0)
    behaviour = policy.perturbed(kl=0.2, seed=2)
    loss = dataclasses.replace(gl.LOSSES["grpo-combined"], group=8)
    many = gl.Scenario(policy, policy.perturbed(kl=0.3), behaviour, reward=lambda r: (r.tokens.sum(-1) % 5).double())
    with pytest.raises(ValueError, match="advantages occur: too many for 4096 responses"):
        gl.exact.moments(loss, many)


def test_rounding_is_no_signal():
    """Rewards that are the same sum in another order."""
    world = gl.Scenario(
        BANDIT, BANDIT, reward=lambda rollout: torch.tensor([0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1, 0.6], dtype=torch.float64)
    )
    assert len(set(gl.Rollout.enumerated(world).rewards.tolist())) > 1
    found = gl.exact.moments(gl.PolicyLoss("group_std", 4), world)
    assert float(found.mean.norm()) == found.trace_cov == 0
