"""Analysis 05 end to end: published digits in its frames, and verdicts as expected."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from worlds import assert_prints

import gradlab as gl

SCRIPT = Path(__file__).parents[1] / "analyses" / "05_asymmetry.py"
#: Scope (its beginning) → verdict.
EXPECTED = {
    "mean |coefficient|": "FAILS",
    "expected gradient, parts counted positive": "HOLDS",
    "second moment: a larger under-sampled share": "HOLDS",
    "second moment: mostly under-sampled tokens, median bandit, KL ≥ 1": "HOLDS",
    "dropped mode: the rare token carries the expected": "HOLDS",
    "dropped mode: the rare token carries the second": "HOLDS",
    "dropped mode: pulls the rare token harder": "HOLDS",
    "dropped mode: noise over its own signal": "FAILS",
    "restoring: a dropped token sooner than an inflated one, reference .2": "FAILS",
    "slower to restore a dropped token, reference .2": "FAILS",
    "slower to restore a dropped token, reference .01": "FAILS",
    "slower to restore an inflated token, reference .2": "FAILS",
    "slower to restore an inflated token, reference .01": "HOLDS",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("analysis")
    subprocess.run([sys.executable, SCRIPT, "--quick", "--output", output], check=True, capture_output=True)
    return output


def test_published_digits(folder):
    frame = pd.read_csv(folder / "05_dropped.csv")
    exact = frame[frame["via"] == "exact"].set_index("estimator")
    for name, pull, noise in (("k3-loss", "0.19985", "10.06"), ("k2-loss", "0.00114", "9.76")):
        assert_prints(exact.loc[name, "pull"], pull)
        assert_prints(exact.loc[name, "noise_at_64"], noise)
    assert_prints(100 * exact.loc["k3-loss", "expected_share"], "99.98")
    sampled = frame[frame["via"] == "sampled"].set_index("estimator")
    for name in ("k2-loss", "k3-loss"):
        assert sampled.loc[name, "pull_low"] < exact.loc[name, "pull"] < sampled.loc[name, "pull_high"]


def test_verdicts(folder):
    settled = gl.claims.verify(folder)
    settled = settled[settled["frame"].isin(["05_sides", "05_bands", "05_dropped", "05_restoring"])]
    assert not (settled["verdict"] == "OPEN").any()
    for scope, verdict in EXPECTED.items():
        rows = settled[settled["scope"].str.startswith(scope)]
        assert len(rows) == 1, scope
        assert rows["verdict"].iloc[0] == verdict, scope


def test_figures_have_captions_that_stand_alone(folder):
    for name in ("05_dropped", "05_bands", "05_tails", "05_restoring"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
        caption = (folder / f"{name}.md").read_text(encoding="utf-8")
        assert "nan" not in caption
        assert "gradlab reproduce --only 05_asymmetry --quick" in caption
