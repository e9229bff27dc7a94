"""Analysis 04 end to end: its frames against exact values made anew, and verdicts as expected."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import gradlab as gl
from gradlab import distance

SCRIPT = Path(__file__).parents[1] / "analyses" / "04_bias_and_noise_against_distance.py"
FRAMES = ("04_bands", "04_slopes", "04_remainders", "04_versus")
#: Claim and scope (its beginning) → verdict.
EXPECTED = {
    ("k3-first-order", "bandits: relative bias"): "HOLDS",
    ("k3-first-order", "sequences, per token, against the frozen-prefix form"): "HOLDS",
    ("k3-first-order", "sequences, per token, against the reverse KL"): "HOLDS",
    ("k3-first-order", "sequences, response as one action"): "HOLDS",
    ("k3-first-order", "error is ½(δ−1)², per token, KL ≤ 0.001"): "HOLDS",
    ("k3-first-order", "error is ½(δ−1)², response as one action, KL ≤ 0.001"): "HOLDS",
    ("k3-first-order", "error is ½(δ−1)², per token, KL ≥ 1"): "FAILS",
    ("k3-first-order", "relative bias below 10 %, KL ≤ 0.001"): "HOLDS",
    ("k3-first-order", "relative bias below 10 %, KL ≥ 0.1"): "FAILS",
    ("k3-biased", "random sequences at every KL, per token"): "HOLDS",
    ("k3-biased", "random sequences at every KL, response as one action"): "HOLDS",
    ("k3-weaker", "expected gradient norm, random bandits, every scenario"): "FAILS",
    ("k3-weaker", "expected gradient norm, random trees, every scenario"): "FAILS",
    ("k3-weaker", "expected gradient norm, random bandits, median, KL ≥ 1"): "HOLDS",
    ("k3-weaker", "expected gradient norm, random trees, median, KL ≥ 1"): "HOLDS",
    ("k3-reward", "near the reference"): "HOLDS",
    ("k3-reward", "random trees: in some scenario"): "HOLDS",
    ("k3-reward", "random trees: it points away from the gradient, median"): "FAILS",
    ("k3-both", "k1, random sequences"): "HOLDS",
    ("k3-both", "k2, random sequences"): "FAILS",
    ("k3-both", "k3, random sequences"): "HOLDS",
    ("rao-blackwell", "per token, unbiased for the reverse KL"): "FAILS",
    ("rao-blackwell", "per token, unbiased for the frozen-prefix form"): "HOLDS",
    ("rao-blackwell", "complete, unbiased"): "HOLDS",
    ("rao-blackwell", "per token, noise at most that of k2 as loss, a chain"): "FAILS",
    ("rao-blackwell", "complete, noise at most that of k1 in reward, random"): "HOLDS",
    ("rao-blackwell", "complete, noise at most that of k1 in reward, compensating tree"): "FAILS",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("analysis")
    subprocess.run([sys.executable, SCRIPT, "--quick", "--output", output], check=True, capture_output=True)
    return output


def test_verdicts(folder):
    settled = gl.claims.verify(folder)
    settled = settled[settled["frame"].isin(FRAMES)]
    assert len(settled)
    assert not (settled["verdict"] == "OPEN").any()
    for (name, scope), verdict in EXPECTED.items():
        rows = settled[(settled["id"] == name) & settled["scope"].str.startswith(scope)]
        assert rows["verdict"].to_list() == [verdict], (name, scope, rows["verdict"].to_list())


def test_bands_against_scenarios_made_anew(folder):
    bands = pd.read_csv(folder / "04_bands.csv")
    count = int(bands.loc[bands["family"] == "bandit", "scenarios"].iloc[0])
    kl = bands["kl"].iloc[np.abs(np.log(bands["kl"] / 0.1)).argmin()]
    bias, noise = [], []
    for scenario in distance.sweep(distance.random_policies("bandit", count, 0), [kl], 0):
        # k3 as loss by hand: mean π − ref, coefficient 1 − δ.
        p, q = (np.exp(x.table.log_softmax(-1)[0].numpy()) for x in (scenario.policy, scenario.reference))
        log_ratio = np.log(p / q)
        truth, mean = p * (log_ratio - p @ log_ratio), p - q
        square = (p * (1 - q / p) ** 2) @ np.square(np.eye(len(p)) - p).sum(-1)
        bias.append(np.linalg.norm(mean - truth) / np.linalg.norm(truth))
        noise.append((square - mean @ mean) / (truth @ truth))
    row = bands[(bands["family"] == "bandit") & (bands["estimator"] == "k3-loss") & (bands["target"] == "reverse_kl")]
    row = row[row["kl"] == kl].iloc[0]
    for column, values in (("bias", bias), ("noise", noise)):
        assert row[f"{column}_min"] == pytest.approx(min(values), rel=1e-4)  # the KL is kept to six digits
        assert row[f"{column}_max"] == pytest.approx(max(values), rel=1e-4)
        assert np.abs(np.array(values) / row[column] - 1).min() < 1e-4


def test_whole_catalogue_is_there(folder):
    bands = pd.read_csv(folder / "04_bands.csv")
    for family in ("bandit", "tree"):
        assert set(bands.loc[bands["family"] == family, "estimator"]) >= set(gl.ESTIMATORS)
    assert bands["kl"].min() == pytest.approx(1e-4)
    assert bands["kl"].max() == pytest.approx(5)


def test_drawn_batches_agree_with_the_formula(folder):
    frame = pd.read_csv(folder / "04_batches.csv").set_index(["family", "kl", "estimator", "batch"])
    exact, drawn = (frame[frame["via"] == via] for via in ("exact", "sampled"))
    both = drawn.join(exact[["rmse"]].rename(columns={"rmse": "truth"})).query("truth > 1e-6")
    ratio = both["rmse"] / both["truth"]
    assert len(both) > 20
    assert np.exp(np.log(ratio).mean()) == pytest.approx(1, abs=0.05)
    assert ratio.between(0.5, 2).all()


def test_every_figure_has_picture_data_and_caption(folder):
    for name in ("bands", "catalogue", "slopes", "batches", "crossover", "weaker", "rao_blackwell"):
        for suffix in ("png", "pdf", "csv", "md"):
            assert (folder / f"04_{name}.{suffix}").stat().st_size > 200
        caption = (folder / f"04_{name}.md").read_text(encoding="utf-8")
        assert "nan" not in caption.split()
        assert "seed 0" in caption
