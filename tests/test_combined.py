"""A regulariser in a whole loss: contributions against loops over groups, the utility of the advantage, and planted frames."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from analysis_runs import ROOT, Run, run

import gradlab as gl

POLICY = gl.Bandit([0.3, -0.2, 0.5])
SCENARIO = gl.Scenario(POLICY, POLICY.perturbed(kl=0.2, seed=1), reward=gl.TableReward(POLICY, [1.0, 0.0, 1.0]))
K1, K1_RETURN = gl.Estimator("k1"), gl.Estimator("k1", "reward", "return")
LOSSES = {
    "before": gl.PolicyLoss("group_std", 3, regulariser=K1, combine="before"),
    "after": gl.PolicyLoss("group_std", 3, regulariser=K1_RETURN, combine="after"),
    "head": gl.PolicyLoss("group_std", 3, regulariser=K1_RETURN, combine="head"),
}


def by_hand(beta: float, combine: str, group: int = 3) -> np.ndarray:
    """Mean gradient of a group, by a loop over all groups: `−Σ_i A_i ∇log π(y_i) / G`."""
    p, ref = (np.exp(x.table[0].numpy()) / np.exp(x.table[0].numpy()).sum() for x in (POLICY, SCENARIO.reference))
    kl, reward, total = np.log(p / ref), np.array([1.0, 0.0, 1.0]), np.zeros(3)
    for y in product(range(3), repeat=group):
        y = np.array(y)
        signal = reward[y] - (beta * kl[y] if combine == "before" else 0)
        spread = signal.std()
        advantage = (signal - signal.mean()) / spread if spread > 1e-13 else np.zeros(group)
        advantage = advantage - (beta * kl[y] if combine != "before" else 0)
        score = np.eye(3)[y] - p
        total += p[y].prod() * -(advantage[:, None] * score).mean(0)
    return total


@pytest.mark.parametrize("combine", LOSSES)
@pytest.mark.parametrize("beta", [0.01, 0.5])
def test_contributions_are_those_of_a_loop_over_groups(combine: str, beta: float) -> None:
    row = gl.combined.contributions({combine: LOSSES[combine]}, SCENARIO, beta).iloc[0]
    delta, alone = by_hand(beta, combine) - by_hand(0, combine), by_hand(0, combine)
    kl = gl.exact.gradient("reverse_kl", SCENARIO).numpy()
    reward = gl.exact.gradient("reward", SCENARIO).numpy()
    assert row["effective"] == pytest.approx(delta @ kl / (kl @ kl), rel=1e-9)
    assert row["share"] == pytest.approx(row["effective"] / beta, rel=1e-12)
    assert row["bias"] == pytest.approx(np.linalg.norm(delta - beta * kl) / np.linalg.norm(beta * kl), abs=1e-9)
    assert row["size"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(alone), rel=1e-9)
    assert row["reward_weight"] == pytest.approx(alone @ reward / (reward @ reward), rel=1e-9)


def test_the_weight_of_the_reward_is_the_slope_of_its_utility() -> None:
    row = gl.combined.contributions({"after": LOSSES["after"]}, SCENARIO, 0.1).iloc[0]
    utility = gl.utility("group_std", group=3)
    assert utility is not None
    assert row["reward_weight"] == pytest.approx(float(utility.slope(row["success"])), rel=1e-9)
    assert row["per_reward"] == pytest.approx(0.1 / row["reward_weight"], rel=1e-9)


def test_a_kl_alone_in_a_standardised_group_weighs_the_same_at_every_coefficient() -> None:
    """Identity 15; after the standard deviation it does not."""
    alike = gl.Scenario(POLICY, SCENARIO.reference, reward=gl.TableReward(POLICY, [1.0, 1.0, 1.0]))
    frame = gl.combined.flatness(gl.combined.contributions(LOSSES, alike, [1e-6, 1e-3, 1.0]))
    assert frame.loc[frame["estimator"] == "before", "relative"].to_numpy() == pytest.approx(1, rel=1e-9)
    assert frame.loc[frame["estimator"] == "after", "relative"].to_numpy() == pytest.approx([1e-6, 1e-3, 1], rel=1e-9)


def test_exponents_and_ratios_of_planted_frames() -> None:
    frame = pd.DataFrame(
        {
            "scenario": "s",
            "success": 0.1,
            "estimator": "a",
            "coefficient": [0.1, 0.2, 0.4],
            "per_reward": [1.0, 8.0, 64.0],
            "via": "x",
        }
    )
    assert gl.combined.exponents(frame)["exponent"].tolist() == pytest.approx([3.0])
    rows = [("bandit", "s", 0.1, 0.3, "x", name, bias) for name, bias in (("a", 0.2), ("b", 0.4))]
    rows += [("bandit", "t", 0.1, 0.3, "x", name, 1e-14) for name in ("a", "b")]
    frame = pd.DataFrame(rows, columns=["family", "scenario", "coefficient", "lag", "via", "estimator", "bias"])
    assert gl.combined.against(frame, "a", "b")[["scenario", "bias_ratio"]].to_numpy().tolist() == [["s", 0.5]]


@pytest.mark.parametrize(
    ("losses", "coefficients", "message"),
    [
        ({}, 0.1, "losses must be a mapping of names to gl.PolicyLoss"),
        ({"k2": gl.Estimator("k2")}, 0.1, "k2 must be a gl.PolicyLoss with a regulariser"),
        ({"bare": gl.PolicyLoss("mean", 3)}, 0.1, "bare must be a gl.PolicyLoss with a regulariser"),
        (LOSSES, [0.1, 0.0], "a coefficient must be above 0, got 0"),
        (LOSSES, "much", "coefficient"),
    ],
)
def test_bad_input_is_told(losses, coefficients, message) -> None:
    with pytest.raises(ValueError, match=message):
        gl.combined.contributions(losses, SCENARIO, coefficients)


def test_no_reward_is_told() -> None:
    with pytest.raises(ValueError, match="reward"):
        gl.combined.contributions(LOSSES, gl.Scenario(POLICY, SCENARIO.reference), 0.1)


# ---- the analysis -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run("14_combined", tmp_path_factory.mktemp("analysis_14"))


def test_the_analysis_leaves_its_figures_and_agrees_with_the_full_run(ran: Run) -> None:
    for name in ("14_weight", "14_lag"):
        assert all((ran.folder / f"{name}.{suffix}").is_file() for suffix in ("png", "pdf", "csv", "md"))
    ran.check_captions()
    names = [f"14_{name}" for name in ("weight", "exponents", "equal", "lag", "heads")]
    quick = gl.claims.verify({name: ran.frame(name) for name in names})
    quick = quick[quick["frame"].isin(names)].set_index(["id", "scope"])["verdict"]
    full = pd.read_csv(ROOT / "figures" / "claims.csv").set_index(["id", "scope"])["verdict"]
    assert len(quick) == 21
    assert dict(quick) == {key: full[key] for key in quick.index}


def test_the_caption_tells_the_frame(ran: Run) -> None:
    frame = ran.frame("14_weight")
    rows = frame[
        (frame["estimator"] == "k1 before the std") & np.isclose(frame["success"], 0.1) & (frame["coefficient"] == 1e-4)
    ]
    assert f"counts {rows['share'].median():,.0f}-fold" in ran.caption("14_weight")


@pytest.mark.parametrize(
    ("claim", "frame", "column", "planted", "verdict"),
    [
        ("combined", "14_weight", "bias", 0.02, "FAILS"),
        ("combined.nearer", "14_heads", "bias_ratio", 0.5, "HOLDS"),
        ("standardised-kl", "14_exponents", "exponent", 0.5, "FAILS"),
        ("standardised-kl.flat", "14_equal", "relative", 1.01, "FAILS"),
        ("kl-choice.size", "14_weight", "size", 0.01, "HOLDS"),
    ],
)
def test_a_planted_change_of_a_frame_changes_its_verdict(
    ran: Run, claim: str, frame: str, column: str, planted: float, verdict: str
) -> None:
    settled = gl.claims.verify({frame: ran.frame(frame).assign(**{column: planted})})
    settled = settled[(settled["id"] == claim) & (settled["frame"] == frame)]
    assert set(settled["verdict"]) == {verdict}
