"""Dynamic programming on Markov chains, against the slow oracle, enumeration, closed forms, and itself at long lengths."""

import itertools
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch

import gradlab as gl
from gradlab.estimators.kernels import KERNELS, VOCABULARY_KERNELS
from gradlab.moments import moments_of
from gradlab.solvers import markov
from gradlab.targets import TARGETS

E = gl.Estimator
KERNEL_NAMES = [*KERNELS, *VOCABULARY_KERNELS]


def chains(vocab, length, eos=None, off_policy=False, seed=0, scale=0.7):
    policy = gl.Markov.random(vocab=vocab, length=length, seed=seed, eos=eos)
    behaviour = policy.perturbed(0.5, seed=seed + 2) if off_policy else None
    return gl.Scenario(policy, policy.perturbed(scale, seed=seed + 1), behaviour)


def trees(scenario):
    """The arguments of the oracle: logits, reference, behaviour, eos, and the fold back to the chain's parameters."""
    policy = scenario.policy
    sides = [policy, scenario.reference, scenario.behaviour]
    logits = [None if s is None else oracles.markov_as_tree(s.initial.numpy(), s.transition.numpy(), s.length) for s in sides]
    return *logits, policy.eos, lambda g: oracles.fold_markov(g, policy.vocab, policy.length)


def assert_moments(found, mean, trace, what, tolerance=1e-12):
    """Relative to the size of one sample's gradient, which is what rounding is relative to; at least to 0.01."""
    size = max(float(np.linalg.norm(mean)) + trace**0.5, 1e-2)
    assert np.linalg.norm(found.mean.numpy() - np.asarray(mean)) <= tolerance * size, what
    assert abs(found.trace_cov - trace) <= tolerance * size**2, what


def grid(**choices):
    """Every estimator that the product of the choices allows."""
    for values in itertools.product(*choices.values()):
        try:
            yield E(**dict(zip(choices, values, strict=True)))
        except ValueError:
            continue


CREDITS, WEIGHTS = ("token", "to_go", "return", "sequence"), ("none", "token", "prefix", "sequence")
EVERY = {
    "kernel": KERNEL_NAMES,
    "placement": ("loss", "reward", "loss+reward", "straight_through"),
    "credit": CREDITS,
    "weight": WEIGHTS,
    "differentiate_weight": (False, True),
}
VARIANTS = [
    *(E(k, p, n, normalise=m) for k, p, n in [("k1", "loss", "token"), ("k1", "reward", "to_go"), ("k3", "reward", "sequence")]
      for m in ("mean", "token_mean", "fixed")),
    E("full", "loss+reward", "to_go", "prefix", normalise="mean"),
    E("k1", "reward", "return", "sequence", normalise="token_mean"),
    *(E("k1", "reward", c, w, baseline="kl") for c in CREDITS[:3] for w in WEIGHTS),
    *(E("k3", p, c, clamp_log_ratio=0.6, clamp_value=0.3) for p, c in [("loss", "token"), ("reward", "to_go")]),
    E("k3", "straight_through", weight="prefix", differentiate_weight=True, clamp_value=0.2, gradient_kernel="k1"),
    E("k2", weight="token", truncate=1.1),
    E("k1", "reward", "to_go", "token", True, truncate=1.1),
    E("full", "reward", "return", "token", truncate=0.9),
    E("k1", "reward", "token", "token", clip=0.1),
    E("k3", "reward", "token", "token", clip=0.1, baseline="kl"),
]  # fmt: skip
GROUPED = [
    *(E(k, "reward", c, w, baseline=b, group=2) for k, c, w, b in itertools.product(
        ("k1", "k3"), ("return", "sequence"), ("none", "sequence"), ("group_mean", "leave_one_out"))),
    E("mse_sampled", "reward", "sequence", "sequence", baseline="leave_one_out", group=2),
    E("full", "reward", "return", "prefix", baseline="leave_one_out", group=2),
    E("k2", "reward", "return", "prefix", baseline="leave_one_out", group=2),
    E("k2", "reward", "return", "token", truncate=1.2, baseline="group_mean", group=2, normalise="mean"),
    E("full", "reward", "return", baseline="group_mean", group=3, normalise="token_mean"),
]  # fmt: skip
SOME = [
    E("k2"), E("k1", "reward", "to_go"), E("k1", "reward", "return"), E("k2", credit="sequence"), E("k3", credit="sequence"),
    E("k3", "reward", "sequence", "sequence"), E("mse_sampled", credit="sequence"), E("k3", "loss", "token", "prefix", True),
    E("full", "loss+reward", "to_go", "prefix"), E("mse", "reward", "return", "prefix"),
    E("k3_swapped", "reward", "return", "sequence", True),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------- moments


@pytest.mark.parametrize("world", [chains(2, 3, 1, True), chains(3, 2, None, False)], ids=["off-policy eos", "on-policy"])
def test_moments_agree_with_the_oracle(world):
    logits, reference, behaviour, eos, fold = trees(world)
    for e in (*SOME, *VARIANTS):
        assert_moments(markov.moments(e, world), *oracles.moments(e, logits, reference, behaviour, eos, fold), e)


@pytest.mark.parametrize("world", [chains(2, 2, 0, True), chains(2, 2)], ids=["off-policy eos", "on-policy"])
@pytest.mark.parametrize("e", GROUPED, ids=lambda e: e.name)
def test_group_baselines_agree_with_the_oracle(e, world):
    logits, reference, behaviour, eos, fold = trees(world)
    assert_moments(markov.moments(e, world), *oracles.moments(e, logits, reference, behaviour, eos, fold), e)


@pytest.mark.parametrize(
    "world", [chains(2, 4, 1, True), chains(3, 3, None, True), chains(3, 4, 0)], ids=["eos off-policy", "off-policy", "eos"]
)
def test_moments_agree_with_enumeration(world):
    estimators = [e for e in (*grid(**EVERY), *VARIANTS, *GROUPED) if markov.decomposes(e)]
    assert len(estimators) > 300
    enumerated = moments_of(estimators, gl.Rollout.enumerated(world), "enumeration")
    for e, expected in zip(estimators, enumerated, strict=True):
        found = markov.moments(e, world)
        assert_moments(found, expected.mean, expected.trace_cov, e)
        assert found.samples is None
        assert found.method == "dynamic programming"


@pytest.mark.parametrize("eos", [None, 1])
def test_moments_agree_with_enumeration_of_a_longer_chain(eos):
    world = chains(2, 10, eos, off_policy=True)
    for e, expected in zip(SOME, moments_of(SOME, gl.Rollout.enumerated(world), "enumeration"), strict=True):
        assert_moments(markov.moments(e, world), expected.mean, expected.trace_cov, e)


@pytest.mark.parametrize("off_policy", [False, True])
def test_one_token_is_a_bandit(off_policy):
    world = chains(5, 1, None, off_policy)
    sides = (world.policy, world.reference, world.behaviour)
    bandit = gl.Scenario(*(None if s is None else gl.Bandit(s.initial) for s in sides))
    for e in (*SOME, *VARIANTS, *GROUPED):
        found, expected = markov.moments(e, world), gl.exact.moments(e, bandit)
        assert_moments(found, np.concatenate([expected.mean, np.zeros(25)]), expected.trace_cov, e)


def test_independent_tokens_in_closed_form():
    """Rows all alike: `E‖G‖²` of `Σ_t a_t φ_t` counts pairs of steps in one row, adjacent ones sharing a token."""
    rng, length = np.random.default_rng(0), 300
    logits, reference = torch.from_numpy(rng.normal(size=(2, 4)))
    policy, other = (gl.Markov(row, row.repeat(4, 1), length=length) for row in (logits, reference))
    pi, ratio = logits.softmax(-1), logits.log_softmax(-1) - reference.log_softmax(-1)
    terms = ratio[:, None] * (torch.eye(4, dtype=torch.float64) - pi)
    mean = pi @ terms
    squares = pi @ terms.square().sum(-1)
    apart = pi.square().sum() * (mean @ mean)
    adjacent = pi.square() @ (terms @ mean)  # y_t = s_t sends the next step to the same row
    pairs = (length - 2) * adjacent + (length - 2) * (length - 3) / 2 * apart
    visits = torch.cat([torch.ones(1, dtype=torch.float64), (length - 1) * pi])
    expected = visits[:, None] * mean
    trace = length * squares + 2 * pairs - expected.square().sum()
    assert_moments(markov.moments(E("k2"), gl.Scenario(policy, other)), expected.flatten(), float(trace), "k2")


LONG = [
    (E("k2"), {"reverse_kl_frozen_prefix": 1}, {}),
    (E("k3"), {"forward_kl_frozen_prefix": 1}, {}),
    (E("k3_swapped"), {"chi2_frozen_prefix": 1}, {}),
    (E("mse"), {"mse_frozen_prefix": 1}, {}),
    (E("k1"), {"zero": 1}, {}),
    (E("k1", normalise="mean"), {"inverse_length": 1}, {}),
    (E("k1", "reward", "to_go"), {"reverse_kl": 1}, {}),
    (E("k3", "reward", "to_go"), {"reverse_kl": 1, "forward_kl_frozen_prefix": -1}, {}),
    (E("k2", credit="sequence"), {"reverse_kl": 1}, {}),
    (E("k3", credit="sequence"), {"forward_kl": 1}, {}),
    (E("mse_sampled", credit="sequence"), {"mse": 1}, {}),
    (E("k2", "loss+reward", "sequence"), {"k2_value": 1}, {}),
    (E("full", "loss+reward", "to_go"), {"reverse_kl": 1}, {}),
    (E("k1", "reward", "return", baseline="leave_one_out", group=4), {"reverse_kl": 1}, {}),
    (E("full", "loss+reward", "to_go", "prefix"), {"reverse_kl": 1}, {"off_policy": True}),
    (E("k1", "reward", "to_go", "sequence"), {"reverse_kl": 1}, {"off_policy": True}),
    (E("k3", "loss", "token", "prefix", True), {"reverse_kl": 1}, {"off_policy": True}),
    (E("k1", "loss", "sequence", "sequence", True), {"reverse_kl": 1}, {"off_policy": True}),
]


@pytest.mark.parametrize(("e", "parts", "world"), LONG, ids=[e.name + "-off" * bool(w) for e, _, w in LONG])
@pytest.mark.parametrize("eos", [None, 2])
def test_identities_on_long_chains(e, parts, world, eos):
    world = chains(4, 60, eos, scale=0.1, **world)
    found = markov.moments(e, world)
    expected = sum(share * markov.target_gradient(target, world) for target, share in parts.items())
    size = float(expected.norm()) + found.trace_cov**0.5 * (1e-3 if world.behaviour is None else 1e-6)
    assert float((found.mean - expected).norm()) <= 1e-10 * size


def test_rao_blackwell_and_baselines_reduce_variance_on_a_long_chain():
    world = chains(6, 200, scale=0.2)
    trace = {e: markov.moments(e, world).trace_cov for e in [
        E("full", "loss+reward", "to_go"), E("k1", "reward", "to_go"), E("k1", "reward", "return"), E("k2", credit="sequence"),
        E("k1", "reward", "return", baseline="leave_one_out", group=8),
    ]}  # fmt: skip
    rao_blackwell, to_go, whole, k2, leave_one_out = trace.values()
    assert rao_blackwell < to_go < leave_one_out < whole
    assert whole == pytest.approx(k2, rel=1e-12)  # equal sample by sample


@pytest.mark.parametrize(
    "e", [E("k2"), E("k1", "reward", "to_go"), E("k3", "reward", "sequence", "sequence")], ids=lambda e: e.name
)
def test_memory_is_bounded_before_the_work_starts(e, monkeypatch):
    world = chains(64, 8, off_policy=True)
    with monkeypatch.context() as patch:
        patch.setattr(markov, "MEMORY_BYTES", 2**17)
        with pytest.raises(ValueError, match=r"chain of 64 tokens hold at least .* more than the .* allowed; take a smaller"):
            markov.moments(e, world)
    assert markov.moments(e, world).trace_cov > 0


WORST = [
    E(k, p, "sequence", "sequence", True) for k in ("k3", "mse_sampled") for p in ("loss", "reward", "loss+reward")
] + [E("k3", "reward", "sequence", "sequence", baseline="leave_one_out", group=2)]  # fmt: skip


@pytest.mark.parametrize("e", WORST, ids=lambda e: e.name)
def test_estimators_of_many_states_reach_256_tokens(e):
    """The number of arrays does not depend on the vocabulary."""
    world = chains(3, 4, off_policy=True)
    at = markov._steps(world)
    program = markov.recursion(e, at)
    walk = markov._walk(e, world, at, program.rows, *markov._needed(program))
    assert 8 * (markov.STEP_ARRAYS + walk.arrays) * 256**2 <= markov.MEMORY_BYTES


@pytest.mark.parametrize("off_policy", [False, True])
def test_states_that_agree_are_carried_once(off_policy):
    """With a differentiated weight values and gradients move alike: products of the same two entries are one class."""
    world = chains(3, 6, off_policy=off_policy)
    at = markov._steps(world)
    program = markov.recursion(WORST[1], at)
    walk = markov._walk(WORST[1], world, at, program.rows, *markov._needed(program))
    pairs = walk.c.shape[-1] * walk.x.shape[-1]
    assert len(walk._plan.recursion) < 2 * pairs
    again = replace(walk, x=walk.x * (1 + 1e-15 * torch.arange(3.0, dtype=torch.float64)[:, None, None]))
    assert len(again._plan.recursion) > 2 * pairs  # merged are equal entries only
    ends = torch.eye(walk.x.shape[-1], dtype=torch.float64)[None]
    assert float(again.square(ends)) == pytest.approx(float(walk.square(ends)), rel=1e-12)


def test_the_reference_itself_pulls_nowhere():
    policy = gl.Markov.random(vocab=3, length=50, seed=3, eos=0)
    world = gl.Scenario(policy, policy)
    for e in (E("k2"), E("k3", "reward", "sequence"), E("full", "loss+reward", "to_go"), E("k2", credit="sequence")):
        found = markov.moments(e, world)
        assert float(found.mean.norm()) == 0
        assert found.trace_cov == 0
    for target in TARGETS:
        if target != "inverse_length":
            assert float(markov.target_gradient(target, world).norm()) <= 1e-14


# ------------------------------------------------------------------------------------------------------ refusals

REFUSED = [
    (E("k2", weight="prefix", truncate=2.0), "truncate"),
    (E("k1", "reward", "to_go", "sequence", truncate=2.0), "truncate"),
    (E("k1", "reward", "token", "prefix", clip=0.2), "clip"),
    (E("k1", "reward", "to_go", "token", clip=0.2), "clip"),
    (E("k1", "reward", "sequence", "sequence", clip=0.2), "clip"),
    (E("abs", credit="sequence"), "abs"),
    (E("k3", credit="sequence", clamp_value=1.0), "clamp"),
    (E("k2", "reward", "sequence", clamp_log_ratio=1.0), "clamp"),
]


@pytest.mark.parametrize(("e", "part"), REFUSED, ids=[e.name for e, _ in REFUSED])
def test_what_does_not_decompose_is_refused(e, part):
    assert not markov.decomposes(e)
    with pytest.raises(ValueError, match=rf"{part}.*decompose over time.*samples=.*gl\.Tree"):
        markov.moments(e, chains(2, 3, off_policy=True))


def test_a_function_is_refused():
    def my_loss(rollout):
        return rollout.log_ratio.sum(-1)

    assert not markov.decomposes(my_loss)
    with pytest.raises(ValueError, match=r"my_loss.*arbitrary function"):
        markov.moments(my_loss, chains(2, 3))


def test_other_policies_and_names_are_refused():
    tree = gl.Tree.random(2, 2)
    bandits = gl.Scenario(tree, tree.perturbed(0.1))
    for call in (lambda: markov.moments(E("k2"), bandits), lambda: markov.target_gradient("reverse_kl", bandits)):
        with pytest.raises(ValueError, match=r"gl\.Markov policies, got Tree"):
            call()
    with pytest.raises(ValueError, match="did you mean 'reverse_kl'"):
        markov.target_gradient("revers_kl", chains(2, 3))
    with pytest.raises(ValueError, match="unknown credit"):
        markov.value_moments("k1", chains(2, 3), "to_go")
    with pytest.raises(ValueError, match="decompose over time"):
        markov.value_moments("abs", chains(2, 3), "sequence")


def test_overflow_is_refused():
    flat, steep = torch.zeros(2, dtype=torch.float64), torch.tensor([30.0, 0.0], dtype=torch.float64)
    policy, reference = (gl.Markov(row, row.repeat(2, 1), length=64) for row in (flat, steep))
    with pytest.raises(ValueError, match="not finite"):
        markov.moments(E("k3_swapped", credit="sequence"), gl.Scenario(policy, reference))


# ------------------------------------------------------------------------------------------------ targets, values


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "world", [chains(2, 4, 1, True), chains(3, 3, None, True), chains(3, 3, 0), chains(3, 1)],
    ids=["eos off-policy", "off-policy", "eos", "bandit"],
)  # fmt: skip
def test_targets_agree_with_the_oracle(target, world):
    *args, fold = trees(world)
    expected = fold(oracles.target(target, *args))
    np.testing.assert_allclose(
        markov.target_gradient(target, world), expected, rtol=0, atol=1e-13 * (1 + np.linalg.norm(expected))
    )
    assert markov.objective(target, world) == pytest.approx(oracles.objective(target, *args), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("eos", [None, 1])
def test_gradients_are_slopes_of_objectives_on_a_long_chain(target, eos):
    world = chains(3, 100, eos, off_policy=True, scale=0.3)
    direction, step = torch.from_numpy(np.random.default_rng(1).normal(size=12)), 1e-3

    def moved(by):
        policy = world.policy.with_parameters(world.policy.parameters + by * step * direction)
        return markov.objective(target, gl.Scenario(policy, world.reference, world.behaviour))

    slope = (8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / (12 * step)
    assert float(markov.target_gradient(target, world) @ direction) == pytest.approx(slope, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("world", [chains(2, 4, 1, True), chains(3, 3)], ids=["eos off-policy", "on-policy"])
def test_value_moments_agree_with_the_oracle(world):
    *args, eos, _ = trees(world)
    for credit, kernels in (("token", KERNEL_NAMES), ("sequence", ["k1", "k2", "k3", "k3_swapped", "mse_sampled"])):
        for kernel in kernels:
            expected = oracles.value_moments(kernel, args[0], args[1], credit, args[2], eos)
            assert markov.value_moments(kernel, world, credit) == pytest.approx(expected, rel=1e-12, abs=1e-15), kernel


def test_values_of_long_chains():
    world = chains(5, 400, scale=0.05)
    kl = world.kl()
    for kernel, credit in (("k1", "token"), ("k1", "sequence"), ("k3", "token"), ("k3", "sequence"), ("full", "token")):
        assert markov.value_moments(kernel, world, credit)[0] == pytest.approx(kl, rel=1e-10), (kernel, credit)
    assert markov.value_moments("k2", world, "sequence")[0] == pytest.approx(markov.objective("k2_value", world), rel=1e-12)


def test_whole_response_kernels_keep_their_digits_near_the_reference():
    """To leading order k3(S) = k3(−S) = ½ S², far below the rounding of S itself."""
    world = chains(4, 50, scale=1e-7)
    k2 = markov.value_moments("k2", world, "sequence")
    assert k2[0] < 1e-11
    for kernel in ("k3", "k3_swapped"):
        assert markov.value_moments(kernel, world, "sequence") == pytest.approx(k2, rel=1e-4, abs=0)
    traces = [markov.moments(E(kernel, "reward", "sequence"), world).trace_cov for kernel in ("k2", "k3", "k3_swapped")]
    assert traces == pytest.approx([traces[0]] * 3, rel=1e-4, abs=0)


def test_hundreds_of_steps_stay_linear():
    """Far from both ends every further token adds the same to the mean gradient of a per-token loss."""
    means = [markov.moments(E("k2"), chains(3, length)).mean for length in (200, 201, 400, 401)]
    np.testing.assert_allclose(means[1] - means[0], means[3] - means[2], rtol=0, atol=1e-11)
    assert float((means[1] - means[0]).norm()) > 1e-3
