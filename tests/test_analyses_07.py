"""Analysis 07, run as a stranger runs it: frames against independent exact values, verdicts against what must come out."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import gradlab as gl

SCRIPT = Path(__file__).parent.parent / "analyses" / "07_sequences.py"
FAILS = {
    ("k1-loss-zero", "sequences of unequal length, 1/L normaliser"),
    ("k1-loss-noise", "on-policy moments: only more noise, rewards in [0, 1]"),
    ("k1-loss-noise", "on-policy moments: only more noise, centred rewards"),
    ("k1-reward", "sequences, credit token"),
    ("k1-reward", "credit token, direction, a tree of 2 tokens and 2 steps"),
    ("k2-loss", "sample by sample, per token against credit to_go"),
    ("k2-loss", "in expectation, per token, T > 1"),
    ("k2-loss", "in expectation, per token, sampled chain"),
    ("length", "k1-reward-to-go, 1/L, variable length"),
    ("length", "k2-loss, 1/L, variable length"),
    ("length", "k3-loss, 1/L, variable length"),
    ("length", "k2-loss, 1/ΣL of 8 responses, variable length"),
    ("length", "k1 as loss, 1/L, variable length: still nothing"),
    ("baseline-noise", "leave-one-out, KL of 0.1 nats, n = 2 … 8"),
}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("07")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--output", folder],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def read(output, name):
    return pd.read_csv(output / f"{name}.csv")


def test_every_verdict_is_the_expected_one(output):
    settled = gl.claims.verify(output)
    settled = settled[settled["frame"].str.startswith("07_")]
    assert len(settled) >= 40
    found = {(row["id"], row["scope"]) for row in settled.to_dict("records") if row["verdict"] == "FAILS"}
    assert found == FAILS
    assert (settled.loc[~settled["verdict"].eq("FAILS"), "verdict"] == "HOLDS").all()


@pytest.mark.parametrize("name", ["objectives", "credit", "gap", "growth", "baselines", "normalisers", "noise"])
def test_every_figure_has_its_files_and_no_gaps_in_its_caption(output, name):
    for suffix in ("png", "pdf", "csv", "md"):
        assert (output / f"07_{name}.{suffix}").stat().st_size > 100
    assert "nan" not in (output / f"07_{name}.md").read_text(encoding="utf-8").split("\n\n")[0]


def test_samples_agree_with_the_exact_values(output):
    frame = read(output, "07_credit")
    sides = {via: rows.set_index(["estimator", "target"]) for via, rows in frame.groupby("via")}
    for column in ("bias", "noise"):
        truth, found = sides["exact"][column], sides["sampled"]
        # Estimators share their draws, so one unlucky run misses together: none may miss by more than twice its interval.
        below, above = found[column] - found[f"{column}_low"], found[f"{column}_high"] - found[column]
        assert (found[column] - 2 * below - 1e-12 <= truth).all()
        assert (truth <= found[column] + 2 * above).all()
        assert (found[f"{column}_high"] - found[f"{column}_low"]).max() < 0.8 * truth.max()


def test_the_smallest_tree_by_hand(output):
    rows = read(output, "07_step").set_index("estimator")
    # π(a) = .5, ref(a) = .7; behind a .99 against .01, behind b nothing.
    behind = 0.98 * np.log(99)
    kl = 0.5 * np.log(0.5 / 0.7) + 0.5 * np.log(0.5 / 0.3) + 0.5 * behind
    own, later = 0.25 * (np.log(0.5 / 0.7) - np.log(0.5 / 0.3)), 0.25 * behind
    row = 0.5 * 0.99 * 0.01 * 2 * np.log(99)
    assert rows["kl"].iloc[0] == pytest.approx(kl)
    cosine = ((own + later) * own + row**2) / np.hypot(own + later, row) / np.hypot(own, row)
    assert rows.loc["k2-loss", "cosine"] == pytest.approx(cosine)
    assert rows.loc["k2-loss", "rise"] > 0.01 > 0 > rows.loc["k1-reward-to-go", "rise"]


def test_noise_grows_as_the_scaling_argument_says(output):
    """Signal² ∝ T². Token credit sums T nearly independent terms, a centred return has T², one with its mean up to T³."""
    fits = read(output, "07_exponents").set_index(["sweep", "estimator"])["exponent"]
    assert not read(output, "07_growth")["noise"].isna().any()
    assert fits["KL"]["k1-loss"] == pytest.approx(-1, abs=0.1)
    policy = gl.Markov.random(3, 256, seed=4)
    long = gl.Scenario(policy, policy.perturbed(kl=50, seed=5))
    names = ["k1-reward", "k1-reward-loo", "full-both"]
    noise = [gl.measure(names, gl.sequences.shortened(long, length))["noise"] for length in (128, 256)]
    assert np.log2(noise[1] / noise[0]).tolist() == pytest.approx([-1, 0, 1], abs=0.05)


def test_group_baselines(output):
    frame = read(output, "07_baselines")
    exact = frame[(frame["via"] == "exact") & (frame["baseline"] == "group_mean")]
    assert set(frame["group"].dropna()) == set(range(2, 9))
    assert np.allclose(exact["shrink"], 1 - 1 / exact["group"], atol=1e-12)
    assert np.allclose(exact["bias"], 1 / exact["group"], atol=1e-12)
    pair = frame[(frame["via"] == "exact") & frame["group"].notna()].pivot_table(
        index=["scenario", "group"], columns="baseline", values="noise_ratio"
    )
    assert np.allclose(pair["group_mean"], pair["leave_one_out"], rtol=1e-10)


def test_the_gap_grows_with_the_root_of_the_kl(output):
    k2 = read(output, "07_gap").query("estimator == 'k2-loss'")
    by_kl = k2[k2["sweep"] == "kl"].groupby("x")["bias"].median()
    assert by_kl[0.1] / by_kl[0.01] == pytest.approx(10**0.5, rel=0.1)
    by_length = k2[k2["sweep"] == "length"].groupby("x")["bias"].max()
    assert by_length[1] < 1e-12 < 1e-2 < by_length[16]
