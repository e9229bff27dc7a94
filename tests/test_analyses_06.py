"""Analysis 06 end to end: published figures and exact values in its frames, and verdicts as expected."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import gradlab as gl

SCRIPT = Path(__file__).parents[1] / "analyses" / "06_heavy_tails.py"
#: Scope (its beginning) → verdict.
EXPECTED = {
    "Gaussian pair of App. I: infinite variance": "HOLDS",
    "Gaussians: finite iff": "HOLDS",
    "Gaussian pair of App. I: sample mean 10 % low, up to": "HOLDS",
    "bandits with a dropped token π: sample mean 10 % low, 0.1/π": "HOLDS",
    "bandits with a dropped token π: sample mean 10 % low, 1000/π": "FAILS",
    "k1: 0.691": "HOLDS",
    "k3: 8.82": "FAILS",
    "coefficient, random bandits and trees": "HOLDS",
    "full gradient, random bandits and trees: at most 2χ²": "HOLDS",
    "full gradient, Gaussians": "HOLDS",
    "full gradient, random bandits, ranks at equal KL ≤ 0.01": "FAILS",
    "full gradient, random bandits, ranks at a KL of 1": "HOLDS",
    "full gradient, two tokens of equal probability": "FAILS",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("analysis")
    subprocess.run([sys.executable, SCRIPT, "--quick", "--output", output], check=True, capture_output=True)
    return output


def test_verdicts(folder):
    settled = gl.claims.verify(folder)
    settled = settled[settled["frame"].str.startswith("06_")]
    assert len(settled)
    assert not (settled["verdict"] == "OPEN").any()
    for scope, verdict in EXPECTED.items():
        assert settled.loc[settled["scope"].str.startswith(scope), "verdict"].to_list() == [verdict], scope


def test_the_pair_of_the_paper(folder):
    frame = pd.read_csv(folder / "06_running.csv")
    assert frame["kl"].iloc[0] == pytest.approx(1.1344, abs=5e-5)
    k3, k1 = (frame[frame["kernel"] == kernel].set_index("samples") for kernel in ("k3", "k1"))
    assert k3.loc[100_000, "std"] > 2 * k3.loc[10_000, "std"] > 4 * k3.loc[1000, "std"]
    assert k3.loc[1_000_000, "mean_ratio"] < 0.9
    # log π/ref is quadratic in a standard normal z: −.48 z² + .02 z + …, of variance ½(.96)² + .02².
    assert k1.loc[1_000_000, "std"] == pytest.approx((0.96**2 / 2 + 0.02**2) ** 0.5, rel=0.005)


def test_the_sampled_mean_sees_what_is_not_rarer_than_the_sample(folder):
    shares = pd.read_csv(folder / "06_shares.csv")
    frame = pd.read_csv(folder / "06_running.csv").query("kernel == 'k3' and samples >= 1000").set_index("samples")
    seen = shares[shares["std"] == 0.2].set_index("samples")["seen"] / shares["kl"].iloc[0]
    for n, row in frame.iterrows():
        expected = np.interp(np.log(n), np.log(seen.index), seen)
        assert expected * 0.97 < row["mean_ratio"] < expected * 1.25


def test_variance_is_the_same_by_quadrature_and_in_closed_form(folder):
    frame = pd.read_csv(folder / "06_variance.csv")
    exact = frame[(frame["via"] == "exact") & np.isfinite(frame["std"])]
    assert len(exact) > 10
    for row in exact.to_dict("records"):
        # ∫ ref²/π of two normals, by completing the square.
        m, s = row["mean"], row["ratio"]
        spread = 2 * s**2 - 1
        chi2 = s**2 / spread**0.5 * np.exp(m**2 / spread) - 1
        variance_of_log_ratio = (1 - s**2) ** 2 / 2 + (m * s) ** 2
        forward, reverse = np.log(s) + (1 + m**2) / (2 * s**2) - 0.5, -np.log(s) + (s**2 + m**2) / 2 - 0.5
        assert row["std"] ** 2 == pytest.approx(chi2 + variance_of_log_ratio - 2 * (forward + reverse), rel=1e-8)


def test_chi2_of_random_scenarios(folder):
    chi2, ranks = pd.read_csv(folder / "06_chi2.csv"), pd.read_csv(folder / "06_ranks.csv")
    random = chi2[chi2["group"].isin(["random bandits", "random trees"])]
    np.testing.assert_allclose(random["coefficient_variance"], random["chi2"], rtol=1e-9)
    near, far = (ranks[ranks["distance"] == distance]["rank_trace_cov"].min() for distance in ("near", "far"))
    assert near < 0.8 < 0.9 < far


def test_every_figure_has_picture_data_and_caption(folder):
    for name in ("running", "variance", "dropped", "chi2"):
        for suffix in ("png", "pdf", "csv", "md"):
            assert (folder / f"06_{name}.{suffix}").stat().st_size > 200
        caption = (folder / f"06_{name}.md").read_text(encoding="utf-8")
        assert "nan" not in caption.split()
        assert "seed" in caption
