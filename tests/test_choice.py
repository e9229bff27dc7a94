"""The choice of an estimator in a whole loss: differences against loops, the batch that shows one, and the analysis."""

import numpy as np
import pandas as pd
import pytest
import torch
from analysis_runs import ROOT, Run, run

import gradlab as gl

POLICY = gl.Bandit([0.3, -0.2, 0.5])
SCENARIO = gl.Scenario(POLICY, POLICY.perturbed(kl=0.2, seed=1), reward=gl.TableReward(POLICY, [1.0, 0.0, 0.0]))
LOSSES = {
    "none": gl.PolicyLoss("reward"),
    **{k: gl.PolicyLoss("reward", regulariser=gl.Estimator(k), beta=0.5) for k in ("k2", "k3", "full")},
}


def by_hand(kernel: str | None) -> tuple[np.ndarray, float]:
    """Mean and covariance trace of `−r ∇log π + β c(ℓ) ∇log π`, by a loop over tokens."""
    p, ref = (np.exp(x.table[0].numpy()) / np.exp(x.table[0].numpy()).sum() for x in (POLICY, SCENARIO.reference))
    ratio = np.log(p / ref)
    coefficient = {"k2": ratio, "k3": 1 - np.exp(-ratio), None: np.zeros(3)}[kernel]
    samples = [(0.5 * coefficient[y] - (y == 0)) * (np.eye(3)[y] - p) for y in range(3)]
    mean = sum(p[y] * samples[y] for y in range(3))
    return mean, float(sum(p[y] * samples[y] @ samples[y] for y in range(3)) - mean @ mean)


def test_differences_are_those_of_a_loop_over_tokens() -> None:
    frame = gl.choice.differences(LOSSES, "k2", SCENARIO).set_index("estimator")
    base, trace = by_hand("k2")
    for name, kernel in (("none", None), ("k3", "k3")):
        difference = np.linalg.norm(by_hand(kernel)[0] - base) / np.linalg.norm(base)
        assert frame.loc[name, "difference"] == pytest.approx(difference, rel=1e-9)
        assert frame.loc[name, "visible_at"] == pytest.approx(trace / (difference**2 * (base @ base)), rel=1e-9)
    assert frame.loc["full", "difference"] == 0
    assert frame.loc["full", "visible_at"] == np.inf
    assert set(frame["coefficient"]) == {0.5}


def test_a_batch_of_that_size_has_an_error_as_large_as_the_difference() -> None:
    row = gl.choice.differences(LOSSES, "k2", SCENARIO).set_index("estimator").loc["none"]
    size = round(row["visible_at"])
    rollout = gl.Rollout.enumerated(SCENARIO)
    batches = rollout.multinomial_weights(size, 4000, np.random.default_rng(0))
    gradients = torch.stack([torch.as_tensor(by_token) for by_token in _samples()])
    mean = gl.exact.moments(LOSSES["k2"], SCENARIO).mean
    error = float((batches @ gradients - mean).square().sum(-1).mean().sqrt() / mean.norm())
    assert error == pytest.approx(row["difference"] * (row["visible_at"] / size) ** 0.5, rel=0.05)


def _samples() -> list[np.ndarray]:
    """The gradient of k2's loss for each token."""
    p, ref = (np.exp(x.table[0].numpy()) / np.exp(x.table[0].numpy()).sum() for x in (POLICY, SCENARIO.reference))
    return [(0.5 * np.log(p / ref)[y] - (y == 0)) * (np.eye(3)[y] - p) for y in range(3)]


def test_bad_input_is_told() -> None:
    with pytest.raises(ValueError, match="unknown loss 'k4'"):
        gl.choice.differences(LOSSES, "k4", SCENARIO)
    with pytest.raises(ValueError, match="losses must be a mapping of names"):
        gl.choice.differences({"k2": gl.Estimator("k2")}, "k2", SCENARIO)
    with pytest.raises(ValueError, match="reward"):
        gl.choice.differences(LOSSES, "k2", gl.Scenario(POLICY, SCENARIO.reference))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run("15_choice", tmp_path_factory.mktemp("analysis_15"))


def test_the_analysis_leaves_its_figure_and_agrees_with_the_full_run(ran: Run) -> None:
    assert all((ran.folder / f"15_choice.{suffix}").is_file() for suffix in ("png", "pdf", "csv", "md"))
    ran.check_captions()
    quick = gl.claims.verify({"15_choice": ran.frame("15_choice")})
    quick = quick[quick["frame"] == "15_choice"].set_index(["id", "scope"])["verdict"]
    full = pd.read_csv(ROOT / "figures" / "claims.csv").set_index(["id", "scope"])["verdict"]
    assert len(quick) == 10
    assert dict(quick) == {key: full[key] for key in quick.index}


@pytest.mark.parametrize(
    ("claim", "column", "planted", "verdict"),
    [("kl-choice", "difference", 0.02, "FAILS"), ("kl-choice.visible", "visible_at", 1e7, "HOLDS")],
)
def test_a_planted_change_of_the_frame_changes_its_verdict(
    ran: Run, claim: str, column: str, planted: float, verdict: str
) -> None:
    settled = gl.claims.verify({"15_choice": ran.frame("15_choice").assign(**{column: planted})})
    assert set(settled[settled["id"] == claim]["verdict"]) == {verdict}
