"""The catalogue: what every entry is declared to descend, on-policy and off-policy, is what it descends."""

import numpy as np
import oracles
import pytest
import worlds

import gradlab as gl
from gradlab.estimators.catalogue import name_of

#: Seeds of the random policies of every shape.
SCENARIOS = [("bandit", 0), ("tree", 0), ("tree", 1), ("deep", 0), ("eos", 0), ("eos first", 0), ("eos first", 1)]
#: What every entry is declared to descend, by (name, off_policy).
DECLARED = {
    (name, off): entry.off_policy if off else entry.on_policy for name, entry in gl.CATALOGUE.items() for off in (False, True)
}


@pytest.fixture(scope="module")
def measured():
    """Exact mean gradient of every entry and the oracle's gradient of every target, by (shape, seed, off_policy)."""
    found = {}
    for shape, seed in SCENARIOS:
        for off_policy in (False, True):
            world = worlds.scenario(shape, off_policy, seed)
            means = gl.exact.moments(list(gl.ESTIMATORS.values()), world)
            targets = {name: oracles.target(name, *worlds.arrays(world)) for name in gl.TARGETS}
            by_name = {name: moments.mean.numpy() for name, moments in zip(gl.ESTIMATORS, means, strict=True)}
            found[shape, seed, off_policy] = by_name, targets
    return found


@pytest.mark.parametrize(("name", "off_policy"), [key for key, combination in DECLARED.items() if combination is not None])
def test_declared_combinations(name, off_policy, measured):
    expected = DECLARED[name, off_policy]
    for (shape, seed, sampler), (means, targets) in measured.items():
        if sampler == off_policy:
            truth = sum(share * targets[target] for target, share in expected.items())
            scale = np.linalg.norm(targets["reverse_kl"])
            assert scale > 0.1
            worlds.assert_same(means[name], truth, scale, what=f"{name} on {shape} {seed}")


@pytest.mark.parametrize(("name", "off_policy"), [key for key, combination in DECLARED.items() if combination is None])
def test_none_is_no_targets_gradient_at_any_scale(name, off_policy, measured):
    checked = 0
    for (shape, seed, sampler), (means, targets) in measured.items():
        if sampler != off_policy or shape == "bandit":  # at one position more estimators coincide
            continue
        mean = means[name]
        for target, gradient in targets.items():
            square = gradient @ gradient
            nearest = gradient * (mean @ gradient / square if square > 1e-20 else 0)
            distance = np.linalg.norm(mean - nearest)
            assert distance > 1e-3 * np.linalg.norm(mean) > 1e-5, f"{name} on {shape} {seed} is {target}"
        checked += 1
    assert checked == 6


def test_order_and_size():
    names = list(gl.ESTIMATORS)
    assert names == list(gl.CATALOGUE) == [entry.name for entry in gl.CATALOGUE.values()]
    assert len(names) >= 24
    assert names[:3] == ["k1-loss", "k2-loss", "k3-loss"]  # the order of tables and the key of the colours
    assert names[-1] == "full-both-prefix"
    for known in ("k1-reward", "k1-reward-to-go", "k2-loss-sequence", "full-both", "k3-loss-prefix", "k3-both", "k3-plus"):
        assert known in names


@pytest.mark.parametrize("name", gl.CATALOGUE)
def test_entries(name):
    entry = gl.CATALOGUE[name]
    assert entry.source.strip()
    assert gl.ESTIMATORS[name] == entry.estimator
    assert name_of(entry.estimator) == name_of(gl.Estimator(**vars(entry.estimator))) == name
    for combination in (entry.on_policy, entry.off_policy):
        assert combination is None or (combination.keys() <= gl.TARGETS.keys() and all(combination.values()))


def test_names_of_others():
    def penalty(rollout):
        return rollout.log_ratio.sum(-1)

    assert name_of(gl.Estimator("abs", "reward")) == "abs-reward"
    assert name_of(penalty) == "penalty"


def test_measure_takes_names():
    world = worlds.scenario("eos")
    names = list(gl.ESTIMATORS)
    by_name, by_value = gl.measure(names, world), gl.measure(list(gl.ESTIMATORS.values()), world)
    assert by_name["estimator"].tolist() == names
    assert by_name.equals(by_value)
    with pytest.raises(ValueError, match=r"unknown estimator 'k3_loss'; did you mean .*'k3-loss'"):
        gl.measure("k3_loss", world)


def test_measure_refuses_two_losses_of_one_name():
    def penalty(sign):
        def loss(rollout):
            return sign * rollout.log_ratio.sum(-1)

        return loss

    world = worlds.scenario("bandit")
    with pytest.raises(ValueError, match="two different losses are called 'loss'"):
        gl.measure([penalty(1), penalty(-1)], world)
    frame = gl.measure({"up": penalty(1), "down": penalty(-1)}, world)
    assert frame["estimator"].tolist() == ["up", "down"]
    assert len(gl.measure(["k3-loss", gl.Estimator("k3")], world)) == 1


def test_estimators_are_all_different():
    assert len(set(gl.ESTIMATORS.values())) == len(gl.ESTIMATORS)
