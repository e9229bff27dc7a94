"""The judge, the quantifiers and the ledger: every verdict follows from a frame, and a changed frame changes it."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import gradlab as gl
from gradlab.claims import judge, samples_needed, settle, verify
from gradlab.ledger import CLAIMS, STATEMENTS, Claim, among, claim, within


def made(relation: str = ">", value: float = 0.0, margin: float = 0.0, **fields: object) -> Claim:
    common = {"id": "target", "scope": "here", "statement": "", "source": "", "frame": "f", "where": (), "statistic": "bias"}
    return Claim(**{**common, "relation": relation, "value": value, "margin": margin, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("relation", "value", "margin", "low", "high", "verdict"),
    [
        # exact results are points; the indifference zone of > is (value, value + margin)
        (">", 1, 0, 1.001, 1.001, "HOLDS"),
        (">", 1, 0, 1, 1, "FAILS"),
        (">", 1, 0.5, 1.2, 1.2, "UNDECIDED"),
        (">", 1, 0.5, 1.5, 1.5, "HOLDS"),
        (">", 1, 0.5, 1.6, 9, "HOLDS"),
        (">", 1, 0.5, 1.4, 9, "UNDECIDED"),
        (">", 1, 0.5, -3, 1, "FAILS"),
        (">", 1, 0.5, -3, 1.01, "UNDECIDED"),
        ("<", 1, 0.5, 0.5, 0.5, "HOLDS"),
        ("<", 1, 0.5, 0.1, 0.51, "UNDECIDED"),
        ("<", 1, 0, 1, 4, "FAILS"),
        ("<", 1, 0, -math.inf, 0.9, "HOLDS"),
        ("=", 0, 0.1, -0.1, 0.1, "HOLDS"),
        ("=", 0, 0.1, -0.1, 0.11, "UNDECIDED"),
        ("=", 0, 0.1, 0.11, 0.2, "FAILS"),
        ("=", 0, 0.1, -0.2, -0.11, "FAILS"),
        ("=", 0, 1e-9, 3e-16, 3e-16, "HOLDS"),
        ("=", 0, 0.1, math.inf, math.inf, "FAILS"),
        ("≠", 0, 0.1, -0.1, 0.1, "FAILS"),
        ("≠", 0, 0.1, 0.11, 0.2, "HOLDS"),
        ("≠", 0, 0.1, 0.09, 0.2, "UNDECIDED"),
        (">", 0, 0, math.nan, math.nan, "UNDECIDED"),
        ("=", 0, 1, 0, math.nan, "UNDECIDED"),
    ],
)
def test_three_way_judge(relation: str, value: float, margin: float, low: float, high: float, verdict: str) -> None:
    assert judge(made(relation, value, margin), low, high) == verdict


@pytest.mark.parametrize(
    ("quantifier", "biases", "verdict", "effect"),
    [
        ("every", [0.5, 0.3, 0.9], "HOLDS", 0.3),  # the row with the most doubt decides
        ("every", [0.5, -0.2, -0.1], "FAILS", -0.2),
        ("every", [0.5, 0.05, math.nan], "UNDECIDED", 0.05),
        ("some", [-0.5, 0.3, 0.9], "HOLDS", 0.9),
        ("some", [-0.5, -0.3, -0.9], "FAILS", -0.3),
        ("some", [-0.5, 0.05, -0.9], "UNDECIDED", 0.05),
        ("some", [math.nan, 0.2], "HOLDS", 0.2),
    ],
)
def test_quantifiers_and_the_decisive_row(quantifier: str, biases: list[float], verdict: str, effect: float) -> None:
    frame = pd.DataFrame({"bias": biases, "scenario": [f"case {i}" for i in range(len(biases))]})
    found = settle(made(">", 0, 0.1, quantifier=quantifier), frame)
    assert (found.verdict, found.effect, found.rows) == (verdict, effect, len(biases))
    assert found.evidence == f"case {biases.index(effect)}"


def test_sampled_rows_are_judged_by_their_interval_and_exact_rows_by_the_point() -> None:
    rows = {"bias": [0.2, 0.2], "bias_low": [0.05, np.nan], "bias_high": [0.3, np.nan], "samples": [100, pd.NA]}
    frame = pd.DataFrame({**rows, "via": ["sampled", "exact"]}).astype({"samples": "Int64"})
    exact, sampled = made(">", 0.1, where=among(via="exact")), made(">", 0.1, where=among(via="sampled"))
    assert settle(exact, frame).verdict == "HOLDS"
    assert settle(exact, frame).resolution == 0
    found = settle(sampled, frame)
    assert (found.verdict, found.low, found.high, found.resolution) == ("UNDECIDED", 0.05, 0.3, 0.125)
    assert settle(made(">", 0.1), frame).verdict == "UNDECIDED"


def test_scope_selects_by_value_and_by_range() -> None:
    frame = pd.DataFrame({"bias": [1.0, -1, -1, 1], "kernel": ["k1", "k1", "k3", "k3"], "kl": [0.1, 0.5, 0.1, 0.5]})
    assert settle(made(where=(*among(kernel="k1"), *within("kl", high=0.1))), frame).verdict == "HOLDS"
    assert settle(made(where=(*among(kernel=("k1", "k3")), *within("kl", 0.1, 0.2))), frame).verdict == "FAILS"
    assert settle(made(where=among(kernel="k2")), frame).verdict == "OPEN"


def test_what_a_frame_lacks_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match=r"needs columns \['bias', 'kernel'\] which frame f lacks"):
        settle(made(where=among(kernel="k1")), pd.DataFrame({"cosine": [1.0]}))
    # A sampled number without an error bar settles nothing.
    with pytest.raises(ValueError, match="bias_high"):
        settle(made(), pd.DataFrame({"bias": [1.0], "via": ["sampled"], "bias_low": [0.9], "samples": [10]}))


def test_unknown_ids_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown claim 'k3-bias'; did you mean 'k3-biased'"):
        verify({}, only=["k3-bias"])
    with pytest.raises(ValueError, match="unknown claim 'value-k9'"):
        claim("value-k9", "", "f", "bias", "=", 0)


@pytest.mark.parametrize(
    ("relation", "value", "margin", "effect"),
    [(">", 0.0, 0.0, 0.08), (">", 0.0, 0.05, 0.13), (">", 0.0, 0.1, -0.06), ("<", 0.0, 0.0, -0.1), ("=", 0.0, 0.1, 0.0),
     ("=", 0.0, 0.1, 0.06), ("=", 0.0, 0.1, 0.2), ("≠", 0.0, 0.1, 0.2)],
)  # fmt: skip
def test_samples_needed_has_the_promised_power(relation: str, value: float, margin: float, effect: float) -> None:
    """Simulate the mean of unit normals: with the announced number 4 in 5 runs decide, with a third of it far fewer do."""
    rule, reach = made(relation, value, margin), 1.959964 / np.sqrt(100)
    needed = samples_needed(rule, effect, effect - reach, effect + reach, samples=100)
    assert needed is not None

    def power(samples: int) -> float:
        means = np.random.default_rng(0).normal(effect, samples**-0.5, 4000)
        half = 1.959964 * samples**-0.5
        return float(np.mean([judge(rule, mean - half, mean + half) != "UNDECIDED" for mean in means]))

    # Binomial error at 4000 runs: 0.006; for = the second end is rarely the one that fails.
    assert 0.78 < power(needed) < (0.92 if relation == "=" else 0.82)
    assert power(needed // 3) < 0.5


def test_no_number_of_samples_leaves_the_indifference_zone() -> None:
    assert samples_needed(made(">", 0, 0.1), 0.05, -0.1, 0.2, 100) is None
    assert samples_needed(made("<", 0, 0.0), 0.0, -0.1, 0.1, 100) is None
    frame = pd.DataFrame({"bias": [0.05], "bias_low": [-0.05], "bias_high": [0.15], "via": ["sampled"], "samples": [100]})
    assert settle(made(">", 0, 0.0), frame).samples_needed == pytest.approx(100 * 4 * (1 + 0.841621 / 1.959964) ** 2, abs=1)
    assert settle(made("=", 0, 1e-9), frame.assign(via="exact")).samples_needed is None


def test_the_ledger_is_well_formed() -> None:
    ledger = gl.claims.ledger()
    assert list(ledger.columns) == ["id", "scope", "statement", "source", "frame", "figure", "rule"]
    assert len(ledger) == len(CLAIMS) > 40
    assert not ledger.duplicated(["id", "scope"]).any()
    for row in CLAIMS:
        assert (row.statement, row.source) == STATEMENTS[row.id]
        assert row.scope
        assert row.frame[:2].isdigit()
        assert row.margin >= 0


def test_without_frames_everything_is_open_and_only_restricts() -> None:
    everything = verify({})
    assert set(everything["verdict"]) == {"OPEN"}
    assert len(everything) == len(CLAIMS)
    some = verify({}, only=["value-k1", "clamp"])
    assert set(some["id"]) == {"value-k1", "clamp"}
    assert len(some) == sum(row.id in ("value-k1", "clamp") for row in CLAIMS)


def test_a_folder_of_csv_files_gives_the_same_verdicts(tmp_path: Path) -> None:
    bandit = gl.Bandit.random(5, seed=2)
    scenario = gl.Scenario(bandit, bandit.perturbed(kl=0.4, seed=3))
    frame = pd.concat([gl.values(["k1", "k2", "k3"], scenario), gl.values(["k1", "k2", "k3"], scenario, samples=1000)])
    frame.to_csv(tmp_path / "01_schulman.csv", index=False)
    from_folder, from_memory = verify(tmp_path), verify({"01_schulman": frame})
    pd.testing.assert_frame_equal(from_folder, from_memory)
    settled = from_memory[from_memory["frame"] == "01_schulman"].set_index(["id", "scope"])["verdict"]
    assert settled["value-k1", "bandit"] == settled["value-k2", "bandit"] == settled["value-k3", "bandit"] == "HOLDS"
    assert settled["value-k1", "tree"] == "OPEN"  # no row in scope


@pytest.mark.parametrize("identifier", ["value-k1", "value-k2", "value-k3"])
def test_a_planted_change_flips_the_verdict(identifier: str) -> None:
    bandit = gl.Bandit.random(5, seed=2)
    frame = gl.values(["k1", "k2", "k3"], gl.Scenario(bandit, bandit.perturbed(kl=0.4, seed=3)))
    kernel = identifier[-2:]
    planted = frame.assign(bias=frame["bias"].where(frame["kernel"] != kernel, 0.01 if kernel != "k2" else 0.0))
    verdict = verify({"01_schulman": planted}, only=[identifier]).set_index("scope")["verdict"]
    assert verdict["bandit"] == "FAILS"
