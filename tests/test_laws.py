"""Laws that hold for any policy, on policies that hypothesis makes up: symmetries, special cases, orderings, equal routes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import assert_same

import gradlab as gl
from gradlab import Rollout, targets
from gradlab.moments import gradients, moments_of
from gradlab.solvers import markov, montecarlo

E = gl.Estimator
CATALOGUE = list(gl.ESTIMATORS.values())
TIGHT = 1e-10  # relative to the root of the second moment, which no estimator can cancel

laws = settings(max_examples=15, deadline=None, derandomize=True, database=None)


@dataclasses.dataclass(frozen=True)
class World:
    """Logits of policy, reference and behaviour, and how to make policies of them."""

    tables: tuple[np.ndarray, np.ndarray, np.ndarray | None]
    make: Callable[[np.ndarray], Any]
    eos: int | None

    @property
    def scenario(self) -> gl.Scenario:
        return gl.Scenario(*[None if table is None else self.make(table) for table in self.tables])

    def changed(
        self, change: Callable[[np.ndarray], np.ndarray], make: Callable[[np.ndarray], Any] | None = None
    ) -> gl.Scenario:
        """The scenario with every table changed."""
        tables = tuple(None if table is None else change(table) for table in self.tables)
        return dataclasses.replace(self, tables=tables, make=make or self.make).scenario


@st.composite
def worlds(draw: Any, kind: str = "tree", off_policy: bool | None = None, lengths: tuple[int, int] = (1, 3)) -> World:
    """Random trees or chains, with an end token or without, on-policy or not, of references near and far."""
    vocab, length = draw(st.integers(2, 4)), draw(st.integers(*lengths))
    eos = draw(st.none() | st.integers(0, vocab - 1))
    rows = vocab + 1 if kind == "markov" else sum(vocab**t for t in range(length))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits, to_reference, to_behaviour = rng.standard_normal((3, rows, vocab))
    reference = logits + draw(st.floats(0.05, 1.5)) * to_reference
    off = draw(st.booleans()) if off_policy is None else off_policy
    behaviour = logits + draw(st.floats(0.05, 0.8)) * to_behaviour if off else None

    def make(table: np.ndarray) -> Any:
        return gl.Tree(table, eos) if kind == "tree" else gl.Markov(table[0], table[1:], length, eos)

    return World((logits, reference, behaviour), make, eos)


def size(moments: Any) -> float:
    """Root of the second moment of one sample's gradient."""
    return float((moments.mean.square().sum() + moments.trace_cov) ** 0.5)


def assert_same_moments(found: list[Any], expected: list[Any], losses: list[Any], tolerance: float = TIGHT) -> None:
    for loss, a, b in zip(losses, found, expected, strict=True):
        if size(b) == 0:  # such as `to_go` of a vocabulary kernel with a single position
            assert size(a) == 0, loss
            continue
        assert_same(a.mean, b.mean, size(b), tolerance, str(loss))
        assert abs(a.trace_cov - b.trace_cov) <= tolerance * size(b) ** 2, loss


# ── Symmetries ───────────────────────────────────────────────────────────────────────────────────────────────────────


@laws
@given(worlds(), st.integers(0, 2**32 - 1))
def test_constants_in_a_row_of_logits_change_nothing(world, seed):
    shifts = np.random.default_rng(seed).uniform(-30, 30, size=(3, len(world.tables[0]), 1))
    each = iter(shifts)
    shifted = world.changed(lambda table: table + next(each))
    before = gl.exact.moments(CATALOGUE, world.scenario)
    assert_same_moments(gl.exact.moments(CATALOGUE, shifted), before, CATALOGUE)
    for moments in before:  # and no gradient points along one
        assert float(moments.mean.view(world.tables[0].shape).sum(-1).abs().max()) <= 1e-12 * size(moments)
    for name in gl.TARGETS:
        target = gl.exact.gradient(name, world.scenario)
        assert_same(gl.exact.gradient(name, shifted), target, max(float(target.norm()), 1e-3), TIGHT, name)


def renamed_rows(vocab: int, rows: int, names: np.ndarray) -> np.ndarray:
    """New row of every tree node when token v is renamed to names[v]: its children are those of the new row, renamed."""
    new = np.zeros(rows, dtype=int)
    for child in range(1, rows):
        parent, token = divmod(child - 1, vocab)
        new[child] = vocab * new[parent] + 1 + names[token]
    return new


@laws
@given(worlds(), st.data())
def test_renaming_tokens_renames_gradients(world, data):
    rows, vocab = world.tables[0].shape
    names = np.array(data.draw(st.permutations(range(vocab))))
    new = renamed_rows(vocab, rows, names)[:, None], names[None]

    def rename(table: np.ndarray) -> np.ndarray:
        renamed = np.empty_like(table)
        renamed[new] = table
        return renamed

    eos = None if world.eos is None else int(names[world.eos])
    renamed = world.changed(rename, lambda table: gl.Tree(table, eos))
    expected = [
        dataclasses.replace(m, mean=torch.from_numpy(rename(m.mean.view(rows, vocab).numpy())).flatten())
        for m in gl.exact.moments(CATALOGUE, world.scenario)
    ]
    assert_same_moments(gl.exact.moments(CATALOGUE, renamed), expected, CATALOGUE)


@laws
@given(worlds(), st.sampled_from(CATALOGUE), st.floats(-3, 3))
def test_scaling_a_loss_scales_its_moments(world, estimator, c):
    if estimator.grouped:
        estimator = E("k3", "reward", "to_go", weight="token")
    base = gl.exact.moments(estimator, world.scenario)
    scaled = gl.exact.moments(lambda rollout: c * estimator(rollout), world.scenario)
    expected = dataclasses.replace(base, mean=c * base.mean, trace_cov=c * c * base.trace_cov)
    if c and size(base) > 0:
        assert_same_moments([scaled], [expected], [estimator])
    else:
        assert size(scaled) == 0
    added = gl.exact.moments(lambda rollout: estimator(rollout) + c * gl.ESTIMATORS["k2-loss"](rollout), world.scenario).mean
    together = base.mean + c * gl.exact.moments(gl.ESTIMATORS["k2-loss"], world.scenario).mean
    assert_same(added, together, size(base) + 1e-3 + float(together.norm()), TIGHT)


# ── Special cases ────────────────────────────────────────────────────────────────────────────────────────────────────


@laws
@given(worlds(lengths=(1, 1)))
def test_a_tree_of_one_position_is_a_bandit(world):
    bandit = world.changed(lambda table: table, lambda table: gl.Bandit(table[0]))
    tree = gl.exact.moments(CATALOGUE, world.scenario)
    assert_same_moments(gl.exact.moments(CATALOGUE, bandit), tree, CATALOGUE, 1e-14)
    for name in gl.TARGETS:
        target = gl.exact.gradient(name, world.scenario)
        assert_same(gl.exact.gradient(name, bandit), target, max(float(target.norm()), 1e-3), 1e-14, name)
        if name.endswith("_frozen_prefix") and name.removesuffix("_frozen_prefix") in gl.TARGETS:
            free = gl.exact.gradient(name.removesuffix("_frozen_prefix"), world.scenario)  # one position: nothing to freeze
            assert_same(free, target, max(float(target.norm()), 1e-3), 1e-12, name)


@laws
@given(worlds(off_policy=False), st.integers(0, 100))
def test_a_behaviour_that_equals_the_policy_is_on_policy(world, seed):
    policy, reference, _ = world.tables
    twin = dataclasses.replace(world, tables=(policy, reference, policy.copy())).scenario
    assert twin.behaviour is not twin.policy
    assert_same_moments(gl.exact.moments(CATALOGUE, twin), gl.exact.moments(CATALOGUE, world.scenario), CATALOGUE, 1e-13)
    single = [e for e in CATALOGUE if not e.grouped]
    pairs = zip(*(montecarlo.moments(single, s, samples=32, seed=seed) for s in (twin, world.scenario)), strict=True)
    for loss, (a, b) in zip(single, pairs, strict=True):
        assert_same(a.mean, b.mean, max(size(b), 1e-12), 1e-13, str(loss))
    for name in gl.TARGETS:
        target = gl.exact.gradient(name, world.scenario)
        assert_same(gl.exact.gradient(name, twin), target, max(float(target.norm()), 1e-3), 1e-14, name)


@laws
@given(
    worlds(), st.sampled_from(["none", "token", "prefix", "sequence"]), st.sampled_from(["sum", "mean", "token_mean", "fixed"])
)
def test_k2_as_loss_is_k1_in_reward_sample_by_sample(world, weight, normalise):
    more = {"weight": weight, "normalise": normalise}
    pairs = [(E("k2", **more), E("k1", "reward", **more)), (E("k3", "straight_through", **more), E("k1", "reward", **more))]
    if weight in ("none", "sequence"):
        pairs.append((E("k2", credit="sequence", **more), E("k1", "reward", "sequence", **more)))
    with torch.no_grad():
        rollout = Rollout.enumerated(world.scenario)
        for pair in pairs:
            both = gradients(pair, rollout)
            loss, reward = both.tables(0), both.tables(1)
            for i in range(len(rollout.weight)):
                assert_same(reward[i], loss[i], tolerance=1e-12)
            assert float((loss - gradients([E("k3", **more)], rollout).tables(0)).norm()) > 1e-6 * float(loss.norm())


@laws
@given(worlds(lengths=(1, 2)), st.integers(2, 6), st.sampled_from(["k1", "k2", "k3"]), st.sampled_from(["return", "sequence"]))
def test_the_group_mean_is_a_shrunk_leave_one_out(world, group, kernel, credit):
    loo, mean = (
        gl.exact.moments(E(kernel, "reward", credit, baseline=baseline, group=group), world.scenario)
        for baseline in ("leave_one_out", "group_mean")
    )
    shrink = 1 - 1 / group
    expected = dataclasses.replace(loo, mean=shrink * loo.mean, trace_cov=shrink**2 * loo.trace_cov)
    assert_same_moments([mean], [expected], [kernel], 1e-12)
    # In the limit of a large group both are the estimator with the baseline that is known, E c: unbiased on-policy.
    many = [
        gl.exact.moments(E(kernel, "reward", credit, baseline=baseline, group=10**7), world.scenario)
        for baseline in ("leave_one_out", "group_mean")
    ]
    assert_same(many[1].mean, many[0].mean, size(many[0]), 1e-6)
    assert_same(many[0].mean, loo.mean, size(loo), 1e-12)  # at any size of the group


@laws
@given(worlds(off_policy=False, lengths=(1, 2)), st.integers(2, 5), st.sampled_from(["k1", "k2", "k3"]))
def test_leave_one_out_is_unbiased(world, group, kernel):
    plain = gl.exact.moments(E(kernel, "reward", "return"), world.scenario)
    loo = gl.exact.moments(E(kernel, "reward", "return", baseline="leave_one_out", group=group), world.scenario)
    assert_same(loo.mean, plain.mean, size(plain), TIGHT)


# ── Orderings ────────────────────────────────────────────────────────────────────────────────────────────────────────


@laws
@given(worlds())
def test_rao_blackwell_reduces_the_noise_of_frozen_prefix_gradients(world):
    """On trees, where the gradients of different steps are orthogonal, averaging over each token can only help.

    That is for the gradient with frozen prefixes; the complete form (`full-both`) is not always less noisy when T > 1.
    """
    # Off-policy the token weight makes each step's mean the same given its prefix.
    sampled, averaged = gl.exact.moments([gl.ESTIMATORS["k2-loss-token-detached"], gl.ESTIMATORS["full-loss"]], world.scenario)
    assert_same(averaged.mean, sampled.mean, size(sampled), TIGHT)
    assert averaged.trace_cov < sampled.trace_cov
    # The difference is the noise within steps: Σ occupancy · Var of the token's gradient given its prefix.
    scenario = world.scenario
    pi, ref, mu = (policy.table.softmax(-1) for policy in (scenario.policy, scenario.reference, scenario.sampler))
    coefficient = pi / mu * (pi / ref).log()
    score = torch.eye(pi.shape[1], dtype=torch.float64) - pi[:, None, :]
    step = coefficient[..., None] * score
    second = (mu[..., None] * step.square()).sum((1, 2))
    within = second - (mu[..., None] * step).sum(1).square().sum(-1)
    expected = float(scenario.sampler.occupancy() @ within)
    assert abs(sampled.trace_cov - averaged.trace_cov - expected) <= TIGHT * size(sampled) ** 2


@laws
@given(worlds(lengths=(1, 1), off_policy=False))
def test_rao_blackwell_at_one_position_has_no_noise(world):
    names = ["full-both", "full-both-prefix", "full-loss", "k2-loss", "k1-reward-to-go", "k3-both"]
    found = dict(zip(names, gl.exact.moments([gl.ESTIMATORS[name] for name in names], world.scenario), strict=True))
    for name in ("full-both", "full-both-prefix", "full-loss"):
        assert found[name].trace_cov <= 1e-14 * size(found[name]) ** 2
        for sampled in ("k2-loss", "k1-reward-to-go", "k3-both"):
            assert_same(found[sampled].mean, found[name].mean, size(found[sampled]), TIGHT)
            assert found[sampled].trace_cov > 1e-3 * float(found[sampled].mean.square().sum())


# ── Equal routes ─────────────────────────────────────────────────────────────────────────────────────────────────────


@laws
@given(worlds(kind="markov", lengths=(1, 4)))
def test_dynamic_programming_is_enumeration(world):
    losses = [e for e in CATALOGUE if markov.decomposes(e)]
    assert len(losses) > 0.9 * len(CATALOGUE)
    solved = gl.exact.moments(losses, world.scenario)
    with torch.no_grad():
        listed = moments_of(losses, Rollout.enumerated(world.scenario), "enumeration")
    assert {m.method for m in solved} == {"dynamic programming"}
    assert_same_moments(solved, listed, losses)
    for name in gl.TARGETS:
        target = targets.gradient_by_autograd(name, world.scenario)
        assert_same(gl.exact.gradient(name, world.scenario), target, max(float(target.norm()), 1e-3), TIGHT, name)


@laws
@given(worlds(off_policy=True), st.sampled_from([None, 0.9]))
def test_closed_forms_are_autograd(world, truncate):
    """The catalogue, and weights that are differentiated through every kind of product."""
    losses = [e for e in CATALOGUE if not e.grouped]
    for kernel in ("k3", "full"):
        for weight in ("token", "prefix", "sequence"):
            losses.append(E(kernel, weight=weight, differentiate_weight=True, truncate=truncate))
    closed = gl.exact.moments(losses, world.scenario)
    autograd = gl.exact.moments([lambda rollout, e=e: e(rollout) for e in losses], world.scenario)
    assert_same_moments(closed, autograd, losses)


@laws
@given(worlds(), st.lists(st.sampled_from(CATALOGUE), min_size=1, max_size=5))
def test_company_does_not_matter(world, losses):
    """Estimators measured together get what each gets alone."""
    together = gl.exact.moments(losses, world.scenario)
    assert_same_moments(together, [gl.exact.moments(loss, world.scenario) for loss in losses], losses, 1e-14)
