"""The search over compositions: how many there are, what it finds, and which are the same estimator."""

from __future__ import annotations

import itertools

import pytest
import torch

import gradlab as gl
from gradlab.questions import compositions

E = gl.Estimator


@pytest.fixture(scope="module")
def world() -> gl.Scenario:
    policy = gl.Tree.random(3, 3, 4, eos=1)
    return gl.Scenario(policy, policy.perturbed(kl=0.4, seed=1), gl.off_policy.at_lag(policy, 0.3, 2))


def expected_gradient(estimator, scenario: gl.Scenario) -> torch.Tensor:
    """By autograd through the surrogate, every response weighted with the behaviour's probability."""
    rollout = gl.Rollout.enumerated(scenario)
    leaf = scenario.policy.parameters.clone().requires_grad_(True)
    again = gl.Scenario(scenario.policy.with_parameters(leaf), scenario.reference, scenario.behaviour)
    loss = estimator(gl.Rollout.enumerated(again))
    return torch.autograd.grad(rollout.weight @ loss, leaf)[0]


def test_the_number_of_compositions_by_hand():
    weights, whole = 1 + 3 * 2, 1 + 2  # none once, the others detached and differentiated; a whole response has two weights
    sampled = 6 * ((weights + whole) + 2 * (3 * weights + whole)) + 6 * 6 * weights
    vocabulary = 2 * (weights + 2 * 3 * 4)  # a differentiated weight would count the reward term twice
    found = list(compositions.compositions())
    assert len(found) == sampled + vocabulary == 662
    assert len(set(found)) == len(found) == len({e.name for e in found})
    with_baselines = list(compositions.compositions(baselines=(None, "kl", "leave_one_out")))
    assert set(found) < set(with_baselines)
    assert all(e.placement == "reward" for e in set(with_baselines) - set(found))


def test_axes_restrict_the_compositions():
    found = list(compositions.compositions(["k3", "full"], ["loss"], weights=["prefix"], differentiated=[True]))
    assert found == [E("k3", weight="prefix", differentiate_weight=True), E("full", weight="prefix", differentiate_weight=True)]


@pytest.mark.parametrize(
    ("estimator", "goal"),
    [
        (E("k3", weight="prefix", differentiate_weight=True), "reverse_kl"),
        (E("k2", "loss", "sequence", "sequence"), "reverse_kl"),
        (E("full", weight="prefix", differentiate_weight=True), "reverse_kl"),
        (E("k3", weight="token", differentiate_weight=True), "reverse_kl_frozen_prefix"),
        (E("k2", weight="prefix"), "reverse_kl_policy_prefix"),
        (E("k3", "loss", "sequence", "sequence"), "forward_kl"),
        (E("k3", weight="token"), "forward_kl_frozen_prefix"),
        (E("k3", weight="prefix"), "forward_kl_policy_prefix"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_each_descends_one_goal_and_no_other(world, estimator, goal):
    frame = compositions.against({"it": estimator}, [world]).set_index("target")
    mean = expected_gradient(estimator, world)
    for name, gradient in compositions.GOALS.items():
        truth = gradient(world)
        assert frame.loc[name, "bias"] == pytest.approx(float((mean - truth).norm() / truth.norm()), rel=1e-9, abs=1e-12)
        assert (frame.loc[name, "bias"] < compositions.UNBIASED) == (name == goal)
        assert name == goal or frame.loc[name, "bias"] > 0.02
    assert frame.loc[goal, "gradient_norm"] == pytest.approx(float(mean.norm()), rel=1e-12)


def test_noise_is_that_of_measure(world):
    names = ["k3-loss-prefix", "full-both-prefix", "k1-reward-sequence-weight"]
    frame = compositions.against([gl.ESTIMATORS[name] for name in names], [world], ["reverse_kl"])
    again = gl.measure(names, world)
    assert list(frame["estimator"]) == names
    assert frame["noise"].tolist() == pytest.approx(again["noise"].tolist(), rel=1e-12)
    assert frame["lag"].iloc[0] == pytest.approx(0.3, rel=1e-9)


def flipped(rollout):
    return -gl.ESTIMATORS["k3-loss-prefix"](rollout)


def test_planted_mistakes_are_not_unbiased(world):
    right = E("full", "loss+reward", "to_go", "prefix")
    wrong = {
        "sign": flipped,
        "token weight": E("full", "loss+reward", "to_go", "token"),
        "no score term": E("full", weight="prefix"),
        "own step counted": E("full", "loss+reward", "return", "prefix"),
        "bound": E("full", "loss+reward", "to_go", "prefix", truncate=1.2),
        "no weight": E("full", "loss+reward", "to_go"),
        "detached": E("k3", weight="prefix"),
    }
    frame = compositions.against({"right": right, **wrong}, [world], ["reverse_kl"]).set_index("estimator")
    assert frame.loc["right", "bias"] < 1e-12
    assert frame.loc["sign", "bias"] == pytest.approx(2, rel=1e-9)
    assert (frame.drop(index="right")["bias"] > 1e-3).all()


def test_worst_takes_the_largest_bias_over_the_scenarios(world):
    other = gl.Scenario(world.policy, world.reference, name="on-policy")
    frame = compositions.against({"k2": E("k2"), "k3": E("k3")}, [world, other], ["reverse_kl", "forward_kl"])
    table = compositions.worst(frame).set_index("estimator")
    for name, goal in itertools.product(("k2", "k3"), ("reverse_kl", "forward_kl")):
        rows = frame[(frame["estimator"] == name) & (frame["target"] == goal)]
        assert len(rows) == 2
        assert table.loc[name, f"bias_{goal}"] == max(rows["bias"])


def test_twins_have_the_same_gradient_on_every_response(world):
    named = {
        "k2 in loss": E("k2"),
        "k1 in reward": E("k1", "reward"),
        "k1 to go": E("k1", "reward", "to_go"),
        "full, differentiated": E("full", weight="prefix", differentiate_weight=True),
        "complete": E("full", "loss+reward", "to_go", "prefix"),
        "k3 whole": E("k3", "loss", "sequence", "sequence", differentiate_weight=True),
        "k1 return": E("k1", "reward", "return", "sequence"),
        "grouped": E("k1", "reward", "return", baseline="leave_one_out", group=4),
    }
    found = compositions.equivalent_estimators(named, world)
    assert {name: first for name, first in found.items() if name != first} == {
        "k1 in reward": "k2 in loss",
        "complete": "full, differentiated",
        "k1 return": "k3 whole",
    }


def test_names_say_the_weight():
    (name, estimator), = compositions.reweighted("k1-reward-to-go", "token", clip=0.2).items()  # fmt: skip
    assert name == "k1-reward-to-go, token weight, clip 0.2"
    assert estimator == gl.ESTIMATORS["k1-reward-clipped"]
    with pytest.raises(ValueError, match="k3-loss"):
        compositions.reweighted("k3-los", "token")


def test_fields_describe_their_estimator():
    table = compositions.described({"a": E("k3", weight="prefix", truncate=2), "b": E("full")}).set_index("estimator")
    assert table.loc["a", ["kernel", "weight", "truncate"]].tolist() == ["k3", "prefix", 2.0]
    assert table["truncate"].isna().tolist() == [False, True]


def test_an_unknown_goal_is_refused(world):
    with pytest.raises(ValueError, match="reverse_kl_policy_prefix"):
        compositions.against({"k2": E("k2")}, [world], ["reverse"])
