"""Analysis 09 end to end: its end points against closed forms, and its verdicts."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import gradlab as gl

SCRIPT = Path(__file__).parents[1] / "analyses" / "09_fixed_points.py"
#: (claim, beginning of the scope after `fixed point: `) → verdict.
EXPECTED = {
    ("train-k1-loss", "k1 as loss ends where ascent without"): "HOLDS",
    ("train-k1-loss", "k1 as loss gives all"): "HOLDS",
    ("train-k1-loss", "k1 as loss ends farther"): "HOLDS",
    ("k1-reward", "π*, bandits"): "HOLDS",
    ("k1-reward", "π*, trees, credit to_go"): "HOLDS",
    ("k1-reward", "π*, trees, credit token"): "FAILS",
    ("k2-loss", "π*, a response as one action"): "HOLDS",
    ("k2-loss", "π*, per token"): "FAILS",
    ("k2-loss", "per token, trees, the optimum"): "HOLDS",
    ("k2-loss", "per token, trees, a gradient"): "FAILS",
    ("k3-biased", "not π*, bandits"): "HOLDS",
    ("k3-biased", "the forward-KL optimum, a response"): "HOLDS",
    ("k3-biased", "the forward-KL optimum, per token"): "FAILS",
    ("k3-reward", "k3 in reward gives up"): "HOLDS",
    ("k3-both", "π*"): "HOLDS",
    ("rao-blackwell", "per token reaches"): "FAILS",
    ("rao-blackwell", "complete"): "HOLDS",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("analysis")
    subprocess.run([sys.executable, SCRIPT, "--quick", "--output", output], check=True, capture_output=True)
    return output


def test_three_tokens_by_hand(folder):
    """KL from the reference at both optima, from their formulas with the multiplier found by halving."""
    frame = pd.read_csv(folder / "09_fixed_points.csv")
    ref, reward = np.array([0.5, 0.3, 0.2]), np.array([0.0, 0.5, 1.0])
    for beta, rows in frame[(frame["world"] == "3 tokens") & (frame["coefficient"] > 0)].groupby("coefficient"):
        reverse = ref * np.exp(reward / beta)
        low, high = 1.0, 1.0 + beta
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if (beta * ref / (middle - reward)).sum() > 1 else (low, middle)
        for name, p in (("k2-loss", reverse / reverse.sum()), ("k3-loss", beta * ref / (high - reward))):
            kl = rows.set_index("estimator").loc[name, "kl"]
            assert kl == pytest.approx(p @ np.log(p / ref), abs=1e-9)


def test_verdicts(folder):
    settled = gl.claims.verify(folder)
    for (claim, scope), verdict in EXPECTED.items():
        rows = settled[(settled["id"] == claim) & settled["scope"].str.startswith(f"fixed point: {scope}")]
        assert len(rows) == 1, (claim, scope)
        assert rows["verdict"].iloc[0] == verdict, (claim, scope)
    weaker = settled[settled["frame"] == "09_weaker"]
    assert len(weaker) == 8
    assert set(weaker["verdict"]) == {"HOLDS", "FAILS"}  # neither way in general


def test_figures_have_captions_that_stand_alone(folder):
    for name in ("09_paths", "09_trees", "09_weaker"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
        caption = (folder / f"{name}.md").read_text(encoding="utf-8")
        assert "nan" not in caption
        assert "gradlab reproduce --only 09_fixed_points --quick" in caption
