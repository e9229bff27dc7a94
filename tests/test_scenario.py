"""Scenarios: three policies on one support, refused otherwise; their labels and distances."""

from __future__ import annotations

import dataclasses

import numpy as np
import oracles
import pytest
import torch
from worlds import SHAPES, arrays, scenario

import gradlab as gl

POLICY = gl.Tree.random(vocab=3, length=2, seed=0, eos=1)
OTHERS = {
    "bandit": gl.Bandit.random(vocab=3),
    "gaussian": gl.Gaussian(0, 1),
    "markov": gl.Markov.random(vocab=3, length=2, eos=1),
    "vocabulary": gl.Tree.random(vocab=4, length=2, eos=1),
    "length": gl.Tree.random(vocab=3, length=3, eos=1),
    "other eos": gl.Tree(POLICY.table, eos=2),
    "no eos": gl.Tree(POLICY.table),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("role", ["reference", "behaviour"])
def test_policies_of_different_support_are_refused(other, role):
    given = {"reference": POLICY, role: other}
    with pytest.raises(
        ValueError, match=rf"{role} does not share the policy's support: .*Tree.*\(kind, table shape, length, eos"
    ):
        gl.Scenario(POLICY, **given)


def test_chains_of_different_length_are_refused():
    chain = gl.Markov.random(vocab=3, length=8)
    with pytest.raises(ValueError, match="reference does not share the policy's support"):
        gl.Scenario(chain, gl.Markov(chain.initial, chain.transition, length=9))


@pytest.mark.parametrize("role", ["policy", "reference", "behaviour"])
@pytest.mark.parametrize("plain", [[0.0, 1.0], np.zeros(2), torch.zeros(2), "uniform"], ids=["list", "numpy", "torch", "name"])
def test_plain_arrays_are_refused(role, plain):
    given = {"policy": gl.Bandit([0, 1]), "reference": gl.Bandit([0, 1]), role: plain}
    with pytest.raises(
        ValueError, match=rf"{role} must be a gradlab policy such as gl\.Tree\(logits\), got {type(plain).__name__}"
    ):
        gl.Scenario(**given)


def test_a_reference_is_needed():
    with pytest.raises(ValueError, match=r"reference must be a gradlab policy.*got NoneType"):
        gl.Scenario(POLICY, None)


@pytest.mark.parametrize("role", ["policy", "reference", "behaviour"])
def test_missing_support_is_refused(role):
    logits = POLICY.table.numpy().copy()
    logits[2] = [0, 3, -1000]  # follows the end token: never used
    logits[3] = [0, 3, -760]  # e^−763 is 0 in float64
    given = {"policy": POLICY, "reference": POLICY, "behaviour": POLICY, role: gl.Tree(logits, eos=1)}
    with pytest.raises(ValueError, match=f"{role} is missing support: it gives token 2 in context 3"):
        gl.Scenario(**given)
    logits[3] = [0, 3, -690]  # rare, but there
    assert np.isfinite(gl.Scenario(**given | {role: gl.Tree(logits, eos=1)}).kl())


@pytest.mark.parametrize("shape", [*SHAPES, "gaussian"])
@pytest.mark.parametrize("off_policy", [False, True], ids=["on", "off"])
def test_distances(shape, off_policy):
    world = scenario(shape, off_policy)
    if shape == "gaussian":
        kl, lag = (np.log(a.std / b.std) + (b.std**2 + (a.mean - b.mean) ** 2) / (2 * a.std**2) - 0.5
                   for a, b in ((world.reference, world.policy), (world.policy, world.sampler)))  # fmt: skip
    else:
        policy, reference, behaviour, eos = arrays(world)
        kl = oracles.objective("reverse_kl", policy, reference, eos=eos)
        lag = oracles.objective("reverse_kl", behaviour, policy, eos=eos) if off_policy else 0.0
    assert world.kl() == pytest.approx(kl, rel=1e-12)
    assert world.lag() == pytest.approx(lag, rel=1e-12)
    assert (world.lag() > 1e-3) == off_policy
    assert isinstance(world.kl(), float)
    assert isinstance(world.lag(), float)


def test_on_policy_and_sampler():
    world = dataclasses.replace(scenario("tree", off_policy=True), name="mine")
    same = world.on_policy()
    assert world.sampler is world.behaviour
    assert same.sampler is same.policy is world.policy
    assert same.reference is world.reference
    assert same.behaviour is None
    assert same.lag() == 0
    assert same.name == "mine"
    with pytest.raises(dataclasses.FrozenInstanceError):
        world.behaviour = None  # type: ignore[misc]


def test_a_behaviour_equal_to_the_policy_has_no_lag():
    world = gl.Scenario(POLICY, POLICY.perturbed(kl=0.2), gl.Tree(POLICY.table, eos=1))
    assert world.lag() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(
    ("policy", "label"),
    [
        (gl.Bandit.random(vocab=5), "bandit v=5 T=1 kl=0.25"),
        (gl.Tree.random(vocab=3, length=4), "tree v=3 T=4 kl=0.25"),
        (POLICY, "tree v=3 T=2 eos=1 kl=0.25"),
        (gl.Tree(POLICY.table, eos=0), "tree v=3 T=2 eos=0 kl=0.25"),
        (gl.Markov.random(vocab=3, length=16), "markov v=3 T=16 kl=0.25"),
        (gl.Gaussian(0, 2), "gaussian kl=0.25"),
    ],
)
def test_labels(policy, label):
    reference = policy.perturbed(kl=0.25, seed=1)
    assert gl.Scenario(policy, reference).label == label
    assert gl.Scenario(policy, reference, reference).label == f"{label} off-policy"
    assert gl.Scenario(policy, reference, name="dropped mode").label == "dropped mode"
