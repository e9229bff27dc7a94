"""What clips remove: shares against loops over tokens and groups, planted frames, and the analysis."""

from math import comb

import numpy as np
import pandas as pd
import pytest
from analysis_runs import ROOT, Run, run

import gradlab as gl

POLICY = gl.Bandit([0.3, -0.6, 0.5, 0.1])
REWARDS = np.array([1.0, 0.0, 1.0, 0.0])
SCENARIO = gl.Scenario(
    POLICY, POLICY.perturbed(kl=0.2, seed=1), gl.off_policy.at_lag(POLICY, 0.1, 2), reward=gl.TableReward(POLICY, REWARDS)
)
GROUP, BETA = 4, 0.3
KL = {"regulariser": gl.Estimator("k1", "reward", "return"), "beta": BETA}
REGIONS = {
    "PPO": {"clip": 0.2},
    "DAPO": {"clip": (0.1, 0.3)},
    "CISPO": {"clip": (1.0, 0.2), "clip_form": "detached"},
    "mask": {"mask": (0.8, 1.1)},
    "dual": {"clip": 0.05, "dual_clip": 1.1},
}


def passes(region: str, ratio: float, gain: float) -> float:
    """What multiplies the gain of a token: its ratio where the region lets it through, written out case by case."""
    if region == "CISPO":
        return min(ratio, 1.2)
    if region == "mask":
        return ratio if 0.8 <= ratio <= 1.1 else 0.0
    low, high = {"PPO": (0.8, 1.2), "DAPO": (0.9, 1.3), "dual": (0.95, 1.05)}[region]
    if (gain > 0 and ratio > high) or (gain < 0 and ratio < low):
        return 0.0
    return 0.0 if region == "dual" and gain < 0 and ratio > 1.1 else ratio


def by_hand(region: str, combine: str, part: str) -> dict[str, float]:
    """Shares of pulls and change of the gradient, by loops over tokens and over the numbers of right others."""
    pi, ref, mu = (
        np.exp(x.table[0].numpy()) / np.exp(x.table[0].numpy()).sum() for x in (POLICY, SCENARIO.reference, SCENARIO.sampler)
    )
    p = mu @ REWARDS
    total, gone, over, above, rare, means = 0.0, 0.0, 0.0, 0.0, 0.0, np.zeros((2, 4))
    for y in range(4):
        ratio, log_ratio = pi[y] / mu[y], np.log(pi[y] / ref[y])
        for right in range(GROUP):
            chance = comb(GROUP - 1, right) * p**right * (1 - p) ** (GROUP - 1 - right)
            rewards = np.array([REWARDS[y]] + [1.0] * right + [0.0] * (GROUP - 1 - right))
            gain = 0.0 if rewards.std() == 0 else (rewards[0] - rewards.mean()) / rewards.std()
            penalty = -BETA * log_ratio
            if part == "reward":
                kept, whole = passes(region, ratio, gain) * gain, ratio * gain
            elif combine == "head":
                kept, whole = passes(region, ratio, penalty) * penalty, ratio * penalty
            else:
                kept = passes(region, ratio, gain + penalty) * (gain + penalty) - passes(region, ratio, gain) * gain
                whole = ratio * penalty
            share = mu[y] * chance
            total, gone = total + share * abs(whole), gone + share * abs(whole - kept)
            over += share * abs(whole - kept) * (log_ratio > 0)
            above += share * abs(whole - kept) * (ratio > 1)
            rare += share * abs(whole - kept) * (ratio > 1) * (mu[y] < 0.2)
            means += share * -np.outer([kept, whole], np.eye(4)[y] - pi)
    kept, whole = means
    found = {"removed": gone / total, "over": over / total, "above": above / total, "rare": rare / above if above else np.nan}
    return found | {
        "bias": np.linalg.norm(kept - whole) / np.linalg.norm(whole),
        "lost": 1 - kept @ whole / (whole @ whole),
    }


@pytest.mark.parametrize("combine", ["head", "after"])
@pytest.mark.parametrize("region", REGIONS)
def test_shares_are_those_of_loops(region: str, combine: str) -> None:
    loss = gl.PolicyLoss("group_std", GROUP, ratio="token", combine=combine, **KL, **REGIONS[region])
    frame = gl.clips.removed({region: loss}, SCENARIO).set_index("part")
    for part in ("reward", "KL"):
        for column, value in by_hand(region, combine, part).items():
            assert frame.loc[part, column] == pytest.approx(value, abs=1e-12, nan_ok=True), (part, column)
        row = frame.loc[part]
        assert row["over"] + row["under"] == pytest.approx(row["removed"], abs=1e-12)
        assert row["above"] + row["below"] == pytest.approx(row["removed"], abs=1e-12)
    assert (frame["removed"] > 0.05).any()


def test_what_is_left_is_the_gradient_of_the_loss() -> None:
    """On a tree the change of the reward's gradient is that of exact moments with and without the clip."""
    tree = gl.Tree.random(3, 2, seed=0)
    world = gl.Scenario(
        tree,
        tree.perturbed(kl=0.1),
        gl.off_policy.at_lag(tree, 0.2),
        reward=lambda rollout: (rollout.tokens[:, 0] < 2).double(),
    )
    loss = gl.PolicyLoss("group_std", GROUP, ratio="token", clip=0.2)
    kept, whole = (gl.exact.moments(each, world).mean for each in (loss, gl.clips.free(loss)))
    row = gl.clips.removed({"PPO": loss}, world).iloc[0]
    assert row["bias"] == pytest.approx(float((kept - whole).norm() / whole.norm()), rel=1e-9)
    assert row["bias"] > 0.05


def test_a_loss_without_groups_and_an_on_policy_one() -> None:
    on = SCENARIO.on_policy()
    frame = gl.clips.removed({"PPO": gl.PolicyLoss("reward", ratio="token", clip=0.01)}, on)
    assert frame[["removed", "bias"]].to_numpy().tolist() == [[0.0, 0.0]]
    updated = gl.clips.after_steps(POLICY, gl.exact.gradient("reward", on), 0.3)
    world = gl.Scenario(updated, SCENARIO.reference, POLICY, reward=SCENARIO.reward)
    row = gl.clips.removed({"PPO": gl.PolicyLoss("reward", ratio="token", clip=0.01)}, world).iloc[0]
    assert row["removed"] == row["above"] > 0.5


def test_steps_end_at_the_lag_and_raise_the_reward() -> None:
    direction = gl.exact.gradient("reward", SCENARIO)
    moved = gl.clips.after_steps(POLICY, direction, 0.2)
    assert float(POLICY.kl(moved)) == pytest.approx(0.2, rel=1e-9)
    before, after = (gl.exact.objective("reward", gl.Scenario(x, x, reward=SCENARIO.reward)) for x in (POLICY, moved))
    assert after < before
    with pytest.raises(ValueError, match="no step in this direction"):
        gl.clips.after_steps(POLICY, direction, 1e4)
    with pytest.raises(ValueError, match="4 parameters, not all 0"):
        gl.clips.after_steps(POLICY, 0 * direction, 0.1)


def test_a_loss_without_a_trust_region_is_told() -> None:
    with pytest.raises(ValueError, match=r"free must be a gl\.PolicyLoss with a trust region"):
        gl.clips.removed({"free": gl.PolicyLoss("mean", 4, ratio="token")}, SCENARIO)
    chain = gl.Markov.random(2, 3)
    world = gl.Scenario(chain, chain, reward=lambda rollout: rollout.tokens[:, 0].double())
    with pytest.raises(ValueError, match=r"gl\.Bandit or a gl\.Tree, got Markov"):
        gl.clips.removed({"PPO": gl.PolicyLoss("mean", 4, ratio="token", clip=0.2)}, world)


# ---- the analysis -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run("18_clips", tmp_path_factory.mktemp("analysis_18"))


def test_the_analysis_leaves_its_figure_and_agrees_with_the_full_run(ran: Run) -> None:
    assert all((ran.folder / f"18_clips.{suffix}").is_file() for suffix in ("png", "pdf", "csv", "md"))
    ran.check_captions()
    quick = gl.claims.verify({"18_sides": ran.frame("18_sides")})
    quick = quick[quick["frame"] == "18_sides"].set_index(["id", "scope"])["verdict"]
    full = gl.claims.verify({"18_sides": pd.read_csv(ROOT / "figures" / "18_sides.csv")}).set_index(["id", "scope"])["verdict"]
    assert len(quick) == 20
    assert dict(quick) == {key: full[key] for key in quick.index}


@pytest.mark.parametrize(
    ("claim", "column", "planted", "verdict"),
    [
        ("clip.kl", "bias", 0.01, "HOLDS"),
        ("clip.kl-side", "over_share", 0.4, "FAILS"),
        ("clip-higher", "relative", 0.2, "HOLDS"),
        ("clip-higher.rare", "rare_share", 0.9, "HOLDS"),
        ("clip-weight", "removed", 0.02, "FAILS"),
    ],
)
def test_a_planted_change_of_the_frame_changes_its_verdict(
    ran: Run, claim: str, column: str, planted: float, verdict: str
) -> None:
    settled = gl.claims.verify({"18_sides": ran.frame("18_sides").assign(**{column: planted})})
    assert set(settled[settled["id"] == claim]["verdict"]) == {verdict}
