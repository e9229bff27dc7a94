"""Fields over a simplex: every point is what exact moments say of that bandit alone."""

import numpy as np
import pytest

import gradlab as gl

NAMES = ["k1-reward", "k2-loss", "k3-loss", "full-loss", "mse-sampled-loss"]
REFERENCE = (0.70, 0.01, 0.29)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(p @ np.log(p / q))


@pytest.mark.parametrize("name", NAMES)
def test_each_point_is_a_step_of_its_own_bandit(name: str) -> None:
    points = gl.simplex(5)[["policy_0", "policy_1", "policy_2"]].to_numpy()
    frame = gl.field([name], points, REFERENCE, step=0.3)
    ref = np.array(REFERENCE)
    for (_, row), p in zip(frame.iterrows(), points, strict=True):
        scenario = gl.Scenario(gl.Bandit(np.log(p)), gl.Bandit(np.log(ref)))
        gradient = gl.exact.moments(gl.ESTIMATORS[name], scenario).mean.numpy()
        truth = gl.exact.gradient("reverse_kl", scenario).numpy()
        after = np.exp(np.log(p) - 0.3 * gradient)
        after /= after.sum()
        np.testing.assert_allclose(row[["after_0", "after_1", "after_2"]].to_numpy(dtype=float), after, rtol=1e-12)
        assert row["kl"] == pytest.approx(kl(p, ref), rel=1e-12)
        assert row["rise"] == pytest.approx(kl(after, ref) - kl(p, ref), rel=1e-9, abs=1e-13)
        cosine = gradient @ truth / np.linalg.norm(gradient) / np.linalg.norm(truth)
        assert row["cosine"] == pytest.approx(cosine, abs=1e-12)


def test_a_step_with_k3_as_loss_can_raise_the_kl() -> None:
    row = gl.field(["k3-loss"], [(0.01, 0.20, 0.79)], REFERENCE, step=0.1).iloc[0]
    assert row["cosine"] == pytest.approx(-0.094, abs=5e-4)
    assert row["kl"] == pytest.approx(1.3484, abs=5e-5)
    assert row["kl"] + row["rise"] == pytest.approx(1.3518, abs=5e-5)


def test_own_functions_take_the_same_seat() -> None:
    points = gl.simplex(4)[["policy_0", "policy_1", "policy_2"]]
    mine = gl.field({"mine": lambda rollout: gl.ESTIMATORS["k3-loss"](rollout)}, points, REFERENCE)
    theirs = gl.field(["k3-loss"], points, REFERENCE)
    np.testing.assert_allclose(mine["rise"], theirs["rise"], rtol=1e-10, atol=1e-14)


def test_the_grid_covers_the_simplex() -> None:
    grid = gl.simplex(10, edge=0.5)
    p = grid[["policy_0", "policy_1", "policy_2"]].to_numpy()
    assert len(grid) == 66
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-14)
    assert p.min() == pytest.approx(0.5 / 11.5)


@pytest.mark.parametrize(
    ("policies", "reference", "words"),
    [
        ([[0.5, 0.5, 0.0]], REFERENCE, "policies must be positive probabilities"),
        ([[0.5, 0.5, 0.5]], REFERENCE, "that sum to 1"),
        ([0.2, 0.3, 0.5], REFERENCE, "got shape"),
        ([[0.2, 0.3, 0.5]], (0.5, 0.5), "reference must have one probability per token of the policies, 3, got 2"),
    ],
)
def test_bad_input_is_refused(policies: object, reference: tuple[float, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gl.field(["k3-loss"], policies, reference)
