"""The first analyses, run whole under --quick: their numbers against independent ones, their verdicts, captions and bytes."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from analysis_runs import ROOT, Run, run

import gradlab as gl

SCRIPTS = {
    "01_value_versus_gradient": ("01_schulman", "01_crossover", "01_gradients"),
    "02_coefficient_curves": ("02_coefficients",),
    "03_expected_gradients_on_bandits": ("03_tokens", "03_objectives", "03_field"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return {script[:2]: run(script, tmp_path_factory.mktemp(script)) for script in SCRIPTS}


@pytest.fixture(scope="module")
def verdicts(runs: dict[str, Run]) -> pd.DataFrame:
    frames = {name: runs[name[:2]].frame(name) for names in SCRIPTS.values() for name in names}
    settled = gl.claims.verify(frames)
    return settled[settled["frame"].isin(list(frames))].set_index(["id", "scope"])


# ---- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_figure_comes_with_its_data_and_a_caption(runs: dict[str, Run], script: str) -> None:
    found = runs[script[:2]]
    expected = {f"{name}.{suffix}" for name in SCRIPTS[script] for suffix in ("png", "pdf", "csv", "md")}
    assert {path.name for path in found.folder.iterdir()} == expected | {f"{script[:2]}_frames.json"}
    found.check_captions()
    for name in SCRIPTS[script]:
        text = found.text(name)
        assert re.search(r"KL|ℓ", text)
        assert re.search(r"(HOLDS|FAILS) \(", text)
        assert re.search(r"seed 0|[Ee]xact", text)
        assert f"Made by `gradlab reproduce --only {script} --quick`, seed 0, with gradlab" in text
        assert str(found.folder) not in text
        assert "nan" not in text


def test_another_process_writes_the_same_bytes(runs: dict[str, Run], tmp_path: Path) -> None:
    script = "02_coefficient_curves"
    command = [sys.executable, str(ROOT / "analyses" / f"{script}.py"), "--quick", "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "k3-asymmetry" in done.stdout
    for path in runs["02"].folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


# ---- 01 -----------------------------------------------------------------------------------------------------------------


def test_schulmans_table(runs: dict[str, Run]) -> None:
    frame = runs["01"].frame("01_schulman").set_index(["scenario", "kernel", "via"]).sort_index()
    published = {0.1: [(0, 20), (0.0025, 1.418), (0, 1.417)], 1: [(0, 2), (0.25, 1.732), (0, 1.695)]}
    for m, rows in published.items():
        for kernel, (bias, std) in zip(("k1", "k2", "k3"), rows, strict=True):
            for via in ("exact", "closed form"):
                row = frame.loc[(f"N(0, 1) ‖ N({m:g}, 1)", kernel, via)]
                assert row["bias"] == pytest.approx(bias, abs=1e-9)
                assert row["std"] == pytest.approx(std, abs=6e-4)
            sampled = frame.loc[(f"N(0, 1) ‖ N({m:g}, 1)", kernel, "sampled")]
            assert sampled["samples"] == 100_000
            # Ten standard errors: a wrong kernel is hundreds away for k2 and k3.
            assert abs(sampled["bias"] - bias) < 10 * std / math.sqrt(100_000)
            assert sampled["bias_low"] < sampled["bias"] < sampled["bias_high"]


def test_crossover_of_equal_variances(runs: dict[str, Run]) -> None:
    frame = runs["01"].frame("01_crossover")
    found = frame[frame["panel"] == "equal variances"]["crossover"].unique()
    # Var k1 = m², Var k3 = e^{m²} − 1 − m² at KL = m²/2: the root of e^x − 1 − 2x.
    low, high = 0.5, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if math.expm1(middle) < 2 * middle else (low, middle)
    assert list(found) == pytest.approx([low / 2], rel=1e-9)
    assert found[0] == pytest.approx(0.62822, abs=5e-6)
    shifted = frame[(frame["panel"] == "Gaussian policies") & (frame["group"] == "shifted")]["crossover"].unique()
    assert shifted == pytest.approx(found)


def test_crossovers_bracket_equality(runs: dict[str, Run]) -> None:
    frame = runs["01"].frame("01_crossover")
    frame = frame[(frame["kernel"] == "k3") & np.isfinite(frame["crossover"])]
    before, after = frame[frame["kl"] < frame["crossover"]], frame[frame["kl"] > frame["crossover"]]
    assert (before["versus_k1"] < 1).all()
    assert (after.groupby("scenario").first()["versus_k1"] > 1).all()
    assert frame["scenario"].nunique() > 40


def test_a_dropped_token_by_hand(runs: dict[str, Run]) -> None:
    frame = runs["01"].frame("01_crossover")
    row = frame[(frame["scenario"] == "bandit, token of probability 0.01") & (frame["kernel"] == "k3")].iloc[-1]
    q = np.array([0.01, *[0.11] * 9])
    p = q * np.array([math.exp(-8), *[1.0] * 9])
    p /= p.sum()
    log_ratio = np.log(p / q)
    k3 = np.exp(-log_ratio) - 1 + log_ratio
    deviation = [math.sqrt(p @ (k - p @ k) ** 2) for k in (log_ratio, k3)]
    assert row["kl"] == pytest.approx(p @ log_ratio, rel=1e-10)
    assert row["versus_k1"] == pytest.approx(deviation[1] / deviation[0], rel=1e-9)


def test_the_published_gradient_table(runs: dict[str, Run]) -> None:
    frame = runs["01"].frame("01_gradients")
    frame = frame[frame["scenario"] == "N(0, 1) ‖ N(1, std 1.1)"].set_index(["estimator", "parameter", "via"]).sort_index()
    for j, parameter in enumerate(("mean", "std")):
        for name in ("k1-reward", "k2-loss"):
            assert frame.loc[(name, parameter, "exact"), "expected"] == pytest.approx([-0.826446, -0.173554][j], abs=5e-7)
    assert frame.loc[("k3-loss", "mean", "exact"), "bias"] == pytest.approx(0.21, abs=1e-9)
    assert frame.loc[("k3-loss", "mean", "exact"), "std_of_mean"] == pytest.approx(0.0267, abs=5e-5)
    # The forward KL's gradient (m − m_ref)/σ², (σ² − σ_ref² − 1)/σ³ with σ = 1.
    assert frame.loc[("k3-loss", "std", "exact"), "expected"] == pytest.approx(1 - 1.21 - 1, abs=1e-9)
    sampled = frame.xs("sampled", level="via")
    assert (sampled["samples"] == 50_000).all()
    wrong = sampled.loc[("k3-loss", "mean")]
    assert wrong["bias_low"] > 0.1  # k3's bias stands clear of its own error bar


def test_the_equal_variance_toy_hides_the_bias_of_the_mean_only(runs: dict[str, Run]) -> None:
    frame = runs["01"].frame("01_gradients")
    rows = frame[(frame["scenario"] == "N(0, 1) ‖ N(1, 1)") & (frame["estimator"] == "k3-loss") & (frame["via"] == "exact")]
    expected = rows.set_index("parameter")["expected"]
    assert expected["mean"] == pytest.approx(-1, abs=1e-9)
    assert expected["std"] == pytest.approx(-1, abs=1e-9)  # the truth is 0


# ---- 02 -----------------------------------------------------------------------------------------------------------------


def test_coefficients_against_their_formulas(runs: dict[str, Run]) -> None:
    frame = runs["02"].frame("02_coefficients")
    plain, clamped = frame[frame["clamp"] == "plain"], frame[frame["clamp"] != "plain"]
    formulas = {
        "k1-loss": lambda x, r: x * 0 + 1,
        "k2-loss": lambda x, r: x,
        "k3-loss": lambda x, r: 1 - np.exp(-x),
        "k3-swapped-loss": lambda x, r: np.exp(x) - 1,
        "abs-loss": lambda x, r: np.sign(x),
        "mse-sampled-loss": lambda x, r: r * np.exp(x) - r,
    }
    for name, formula in formulas.items():
        rows = plain[plain["estimator"] == name]
        np.testing.assert_allclose(rows["coefficient"], formula(rows["log_ratio"], rows["reference"]), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(rows["principled"], rows["log_ratio"], rtol=1e-10)
        assert rows["log_ratio"].min() == -8
        assert rows["log_ratio"].max() == 8
    for name, value in {"k2-loss": lambda x: x * x / 2, "k3-loss": lambda x: np.exp(-x) - 1 + x}.items():
        rows = clamped[clamped["estimator"] == name]
        kept = value(rows["log_ratio"]) <= 10
        assert (rows["coefficient"][~kept] == 0).all()
        assert 0 < kept.sum() < len(rows)
        np.testing.assert_array_equal(rows["coefficient"][kept], rows["plain"][kept])


def test_asymmetry_of_k3_is_exponential(runs: dict[str, Run]) -> None:
    frame = runs["02"].frame("02_coefficients")
    rows = frame[frame["asymmetry"].notna() & (frame["clamp"] == "plain")].set_index("estimator")
    x = rows["log_ratio"].abs()
    np.testing.assert_allclose(rows.loc["k3-loss", "asymmetry"], np.exp(x["k3-loss"]), rtol=1e-9)
    np.testing.assert_allclose(rows.loc["k2-loss", "asymmetry"], 1, rtol=1e-12)
    np.testing.assert_allclose(rows.loc["mse-sampled-loss", "asymmetry"], np.exp(-x["mse-sampled-loss"]), rtol=1e-9)


# ---- 03 -----------------------------------------------------------------------------------------------------------------


def test_the_published_bandit(runs: dict[str, Run]) -> None:
    frame = runs["03"].frame("03_tokens")
    exact = frame[frame["via"] == "exact"].set_index("estimator")
    np.testing.assert_allclose(exact["kl"], 0.45643, atol=5e-6)
    for name, gradient in {
        "k1-reward": (0.3719, -0.0153, -0.1724, -0.1843),
        "k2-loss": (0.3719, -0.0153, -0.1724, -0.1843),
        "k3-loss": (0.3, 0.1, -0.1, -0.3),
        "k1-loss": (0, 0, 0, 0),
    }.items():
        np.testing.assert_allclose(exact.loc[name, "expected"], gradient, atol=5e-5)
    assert (exact.loc["k3-loss", "ratio"] < 0).sum() == 1
    objectives = runs["03"].frame("03_objectives").set_index(["scenario", "estimator", "target", "via"])
    cosine = objectives.loc[(frame["scenario"][0], "k3-loss", "reverse_kl", "exact"), "cosine"]
    assert cosine == pytest.approx(0.908, abs=5e-4)
    assert "cosine with the truth 0.908; sign flipped: token 1." in runs["03"].caption("03_tokens")


def test_what_each_loss_descends(runs: dict[str, Run]) -> None:
    frame = runs["03"].frame("03_objectives")
    worst = frame[frame["via"] == "exact"].groupby(["estimator", "target"])["bias"].max()
    descends = {key: bias < 1e-9 for key, bias in worst.items()}
    assert {key for key, zero in descends.items() if zero} == {
        *((name, "reverse_kl") for name in ("k1-reward", "k2-loss", "k3-plus", "full-loss", "k1-loss+reward", "k3-both")),
        ("k3-loss", "forward_kl"),
        ("k3-swapped-loss", "chi2_frozen_prefix"),
        ("mse-sampled-loss", "mse"),
        ("mse-loss", "mse"),
    }
    assert frame["scenario"].nunique() == 13


def test_where_a_step_raises_the_kl(runs: dict[str, Run]) -> None:
    frame = runs["03"].frame("03_field")
    at = frame[(frame["grid"] == "instance") & (frame["estimator"] == "k3-loss")].set_index("reference").loc["(0.70 0.01 0.29)"]
    assert at["kl"] == pytest.approx(1.3484, abs=5e-5)
    assert at["kl"] + at["rise"] == pytest.approx(1.3518, abs=5e-5)
    assert at["cosine"] == pytest.approx(-0.094, abs=5e-4)
    assert (frame["rise"][frame["estimator"] != "k3-loss"] < 0).all()
    # k1 in reward and k2 as loss are one gradient.
    one, two = (frame[frame["estimator"] == name]["rise"].to_numpy() for name in ("k1-reward", "k2-loss"))
    np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-14)
    # To first order a step raises the KL where the expected gradient points away from the true one.
    k3 = frame[frame["estimator"] == "k3-loss"]
    clear = k3[k3["cosine"].abs() > 0.05]
    assert ((clear["rise"] > 0) == (clear["cosine"] < 0)).all()


# ---- verdicts -----------------------------------------------------------------------------------------------------------

FAILS = {
    ("value-k2", "Gaussian, KL 0.005"),
    ("value-variance", "Gaussian, equal variances, KL ≥ 1"),
    ("value-variance", "Gaussian, policy narrower than the reference, KL ≤ 0.1"),
    ("value-variance", "random bandits and trees, KL ≤ 0.1"),
    ("value-variance", "random bandits and trees, KL ≥ 1"),
    ("value-variance", "bandits that drop one token, KL ≤ 0.01"),
    ("value-implies-gradient", "k3, Gaussian, unequal variances"),
    ("value-implies-gradient", "k1, Gaussian, unequal variances"),
    ("k3-biased", "Gaussian, equal variances, mean"),
    ("k3-asymmetry", "one token, clamped as shipped"),
    ("k3-weaker", "under-sampled token (δ > 1)"),
    ("clamp", "k2, a token dropped, ℓ ≤ −5"),
    ("clamp", "k3, a token dropped, ℓ ≤ −5"),
    ("same-sign.gradient", "bandit"),
    ("k3-both", "k2, bandit"),
}


def test_verdicts(verdicts: pd.DataFrame) -> None:
    assert set(verdicts.index[verdicts["verdict"] == "FAILS"]) == FAILS
    assert set(verdicts.index[verdicts["verdict"] != "FAILS"]) == set(verdicts.index[verdicts["verdict"] == "HOLDS"])
    assert len(verdicts) > 45


@pytest.mark.parametrize(
    ("claim", "frame", "where", "column", "planted", "verdict"),
    [
        # An estimator that is off by a hundredth, a bias that is gone, a curve that stays below, a clamp that lets go late …
        (("value-k3", "Gaussian"), "01_schulman", {"kernel": "k3"}, "bias", 0.01, "FAILS"),
        (("value-k2", "bandit"), "01_schulman", {"kernel": "k2"}, "bias", 0.0, "FAILS"),
        (("value-variance", "random bandits and trees, KL ≤ 0.1"), "01_crossover", {}, "versus_k1", 0.2, "HOLDS"),
        (("value-variance", "Gaussian, equal variances, KL ≥ 1"), "01_crossover", {"kernel": "k3"}, "versus_k1", 0.9, "HOLDS"),
        (("k2-unbiased", "Gaussian"), "01_gradients", {"estimator": "k2-loss"}, "bias", 1e-6, "FAILS"),
        (("value-implies-gradient", "k3, Gaussian, unequal variances"), "01_gradients", {}, "bias", 0.0, "HOLDS"),
        (("k3-asymmetry.saturates", "one token"), "02_coefficients", {}, "magnitude", 1.5, "FAILS"),
        (("clamp", "k3, a token dropped, ℓ ≤ −5"), "02_coefficients", {}, "lost", 0.0, "HOLDS"),
        (("same-sign", "one token"), "02_coefficients", {"estimator": "k3-loss"}, "versus_principled", -0.5, "FAILS"),
        (("same-sign.gradient", "bandit"), "03_tokens", {"estimator": "k3-loss"}, "ratio", 0.8, "HOLDS"),
        (("k3-biased", "bandit, 10,000 samples"), "03_objectives", {}, "bias_low", 0.01, "UNDECIDED"),
        (("k3-both", "k2, bandit"), "03_objectives", {"estimator": "k2-loss+reward"}, "bias", 0.0, "HOLDS"),
        (("k3-raises", "three tokens, reference (.70 .01 .29)"), "03_field", {}, "rise", -1e-3, "FAILS"),
    ],
)
def test_a_planted_change_of_a_frame_changes_verdict_and_sentence(
    runs: dict[str, Run], claim: tuple[str, str], frame: str, where: dict[str, str], column: str, planted: float, verdict: str
) -> None:
    original = runs[frame[:2]].frame(frame)
    rows = np.logical_and.reduce([original[key] == value for key, value in where.items()] or [np.ones(len(original), bool)])
    changed = original.assign(**{column: original[column].where(~rows, planted)})
    before, after = (gl.claims.verify({frame: data}) for data in (original, changed))
    found = [table.set_index(["id", "scope"])["verdict"][claim] for table in (before, after)]
    assert found[1] == verdict
    assert found[0] != verdict
    sentences = [gl.report.verdict_summary(table[table["frame"] == frame]) for table in (before, after)]
    assert sentences[0] != sentences[1]


@pytest.mark.parametrize(
    ("text", "frame", "change", "before", "after"),
    [
        ("schulman_text", "schulman", {"samples": 77}, "from 100,000 draws", "from 77 draws"),
        ("schulman_text", "schulman", {"std": 9.9}, "are 20.000, 1.418, 1.417", "are 9.900, 9.900, 9.900"),
        ("crossover_text", "crossover", {"crossover": 0.5}, "at 0.62822 nats", "at 0.50000 nats"),
        ("crossover_text", "crossover", {"crossover": np.inf}, "in 40 of 40 cases, at", "in 0 of 40 cases, (d)"),
        ("gradients_text", "gradients", {"bias": 0.0}, "gradient bias 0.21 (mean)", "gradient bias 0 (mean)"),
        ("text", "frame", {"asymmetry": 2.0}, "of up to 2,981", "of up to 2."),
        ("text", "frame", {"error": 0.1}, "k2 as loss is on the", "k2 as loss is off the"),
        ("objectives_text", "objectives", {"gradient_norm": 0.25}, "has norm 0.", "has norm 0.25."),
        ("objectives_text", "objectives", {"bias": 0.5}, "; forward_kl by k3-loss;", "objective: none. The"),
        ("field_text", "field", {"rise": 0.5}, "never raise it", "raise it somewhere too"),
    ],
)
def test_captions_are_filled_from_the_frame(
    runs: dict[str, Run], text: str, frame: str, change: dict[str, float], before: str, after: str
) -> None:
    names = next(found.names for found in runs.values() if text in found.names)
    more = (names["objectives"],) if text == "tokens_text" else ()
    assert before in "\n\n".join(names[text](names[frame], *more))
    changed = "\n\n".join(names[text](names[frame].assign(**change), *more))
    assert after in changed
    assert changed.count(before) - (before == "has norm 0.") == 0


def test_the_text_of_a_figure_carries_the_verdicts_it_is_given(runs: dict[str, Run], tmp_path: Path) -> None:
    assert "`same-sign` HOLDS (one token)" in runs["02"].text("02_coefficients")
    names = runs["02"].names
    settled = names["verdicts"].assign(verdict="UNDECIDED")
    figure = gl.plots.coefficients(names["frame"])
    gl.report.Study("02", tmp_path).save_figure("02_coefficients", figure, names["frame"], "**Caption.**", "* Note", settled)
    text = (tmp_path / "02_coefficients.md").read_text(encoding="utf-8")
    assert text.startswith("**Caption.**\n\n* Note\n\nVerdicts:\n\n* `")
    assert "HOLDS" not in text
    assert "`same-sign` UNDECIDED (one token)" in text
