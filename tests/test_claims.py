"""The judge, the quantifiers and the ledger: every verdict follows from a frame, and a changed frame changes it."""

import dataclasses
import itertools
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import gradlab as gl
from gradlab.ledger import CLAIMS, PUBLISHED, STATEMENTS, Claim, among, claim, within
from gradlab.ledger.form import MATTERS
from gradlab.ledger.verify import judge, samples_needed, settle, verify

FIGURES = Path(__file__).parents[1] / "figures"

#: What a sentence names → how the names of the estimators or kernels begin that may be tested for it.
NAMED = {
    "k1 as loss": ("k1-loss",),
    "k2 as loss is": ("k2-loss",),
    "k2 as loss has": ("k2-loss",),
    "k3 as loss is": ("k3-loss",),
    "of k3 as loss": ("k3-loss",),
    "k3 as loss,": ("k3-loss",),
    "k1 in reward is": ("k1-reward",),
    "k3 in reward": ("k3-reward", "k3-both"),
    "k3+ is": ("k3-plus",),
    "complete Rao–Blackwell is": ("full-both",),
    "E[k1]": ("k1",),
    "E[k2]": ("k2",),
    "E[k3]": ("k3",),
}


def made(relation: str = ">", value: float = 0.0, margin: float = 0.0, **fields: object) -> Claim:
    common = {"id": "target", "scope": "here", "statement": "", "source": "", "frame": "03_f", "where": (), "statistic": "bias"}
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
        # the ends of the tolerance belong to it
        ("=", 0, 0.1, 0.1, 0.2, "UNDECIDED"),
        ("=", 0, 0.1, -0.2, -0.1, "UNDECIDED"),
        ("=", 0, 1e-9, 3e-16, 3e-16, "HOLDS"),
        ("=", 0, 0.1, math.inf, math.inf, "FAILS"),
        ("≠", 0, 0.1, -0.1, 0.1, "FAILS"),
        ("≠", 0, 0.1, 0.11, 0.2, "HOLDS"),
        ("≠", 0, 0.1, 0.09, 0.2, "UNDECIDED"),
        (">", 0, 0, math.nan, math.nan, "UNDECIDED"),
        ("=", 0, 1, 0, math.nan, "UNDECIDED"),
        ("=", 0, 1, math.nan, 0, "UNDECIDED"),
        ("=", 0, 1, 2, math.nan, "UNDECIDED"),
        (">", 0, 0, 1, math.nan, "UNDECIDED"),
        (">", 0, 0, math.nan, -1, "UNDECIDED"),
        # equality within rounding is neither more nor less
        (">", 1, 0, 1 + 5e-10, 1 + 5e-10, "FAILS"),
        (">", 0, 0, 1e-9, 1e-9, "FAILS"),
        (">", 1, 0, 1 + 2e-9, 1 + 2e-9, "HOLDS"),
        ("<", 1, 0, 1 - 5e-10, 1 - 5e-10, "FAILS"),
        ("<", 1, 0, 1 - 2e-9, 1 - 2e-9, "HOLDS"),
        ("≤", 1, 0, 1, 1, "HOLDS"),
        ("≤", 1, 0, 1 + 5e-10, 1 + 5e-10, "HOLDS"),
        ("≤", 1, 0, 1 + 2e-9, 1 + 2e-9, "FAILS"),
        ("≥", 1, 0, 1 - 5e-10, 1 - 5e-10, "HOLDS"),
        ("≥", 1, 0, 1 - 2e-9, 1 - 2e-9, "FAILS"),
        ("≥", -3, 0, -3, -3, "HOLDS"),
        ("≤", 1000, 0, 1000 + 5e-7, 1000 + 5e-7, "HOLDS"),
        ("≤", 1000, 0, 1000 + 2e-6, 1000 + 2e-6, "FAILS"),
        # the zone of ≤ is (value, value + margin), of ≥ (value − margin, value)
        ("≤", 1, 0.5, 1.2, 1.2, "UNDECIDED"),
        ("≤", 1, 0.5, 1.5, 1.5, "FAILS"),
        ("≤", 1, 0.5, 0, 1, "HOLDS"),
        ("≤", 1, 0.5, 0, 1.1, "UNDECIDED"),
        ("≥", 1, 0.5, 0.8, 0.8, "UNDECIDED"),
        ("≥", 1, 0.5, 0.5, 0.5, "FAILS"),
        ("≥", 1, 0.5, 1, 7, "HOLDS"),
        # ends that are open where it matters
        (">", 1, 0, -math.inf, math.inf, "UNDECIDED"),
        (">", 1, 0, 2, math.inf, "HOLDS"),
        (">", 1, 0, -math.inf, 3, "UNDECIDED"),
        (">", 1, 0, -math.inf, 0.5, "FAILS"),
        ("<", 1, 0, 0, math.inf, "UNDECIDED"),
        ("≤", 1, 0, 0.5, math.inf, "UNDECIDED"),
        ("≥", 1, 0, -math.inf, 1.5, "UNDECIDED"),
        ("=", 0, 1, -math.inf, math.inf, "UNDECIDED"),
        ("=", 0, 1, 0, math.inf, "UNDECIDED"),
        ("=", 0, 1, 1.5, math.inf, "FAILS"),
        ("≠", 0, 1, -math.inf, 0, "UNDECIDED"),
        ("≠", 0, 1, 1.5, math.inf, "HOLDS"),
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
        ("some", [-0.5, math.nan, -0.9], "UNDECIDED", math.nan),
        ("every", [math.nan, -0.2], "FAILS", -0.2),
        # a number that is not known is never the row that speaks where another can, whatever the order
        ("every", [math.nan, 0.05, 0.5], "UNDECIDED", 0.05),
        ("some", [0.05, math.nan, -0.9], "UNDECIDED", 0.05),
        ("some", [math.nan, 0.05, -0.9], "UNDECIDED", 0.05),
    ],
)
def test_quantifiers_and_the_decisive_row(quantifier: str, biases: list[float], verdict: str, effect: float) -> None:
    frame = pd.DataFrame({"bias": biases, "scenario": [f"case {i}" for i in range(len(biases))]})
    found = settle(made(">", 0, 0.1, quantifier=quantifier), frame)
    assert (found.verdict, found.rows, found.distinct) == (verdict, len(biases), len(biases))
    np.testing.assert_equal(found.effect, effect)
    assert found.evidence == f"case {[repr(bias) for bias in biases].index(repr(effect))}"


@pytest.mark.parametrize(
    ("relation", "quantifier", "effects", "decisive"),
    [
        ("=", "every", [0.02, -0.05, 0.01], -0.05),  # farthest from the value
        ("=", "some", [0.02, -0.05, 0.01], 0.01),
        ("≠", "every", [2, -0.5, 3], -0.5),  # nearest to it
        ("≠", "some", [2, -0.5, 3], 3),
        ("<", "every", [-2, -0.5, -3], -0.5),
        ("<", "some", [-2, -0.5, -3], -3),
        ("≤", "every", [-2, -0.5, -3], -0.5),
        ("≤", "some", [-2, -0.5, -3], -3),
        (">", "every", [2, 0.5, 3], 0.5),
        ("≥", "every", [2, 0.5, 3], 0.5),
        ("≥", "some", [2, 0.5, 3], 3),
    ],
)
def test_the_row_nearest_to_the_other_side_speaks_for_every_and_the_farthest_for_some(
    relation: str, quantifier: str, effects: list[float], decisive: float
) -> None:
    found = settle(made(relation, 0, 0.1, quantifier=quantifier), pd.DataFrame({"bias": effects}))
    assert (found.verdict, found.effect) == ("HOLDS", decisive)


@pytest.mark.parametrize(("quantifier", "decisive"), [("every", 0.94), ("some", 1.01)])
def test_distance_is_measured_from_the_value(quantifier: str, decisive: float) -> None:
    found = settle(made("=", 1, 0.1, quantifier=quantifier), pd.DataFrame({"bias": [1.05, 0.94, 1.01]}))
    assert (found.verdict, found.effect) == ("HOLDS", decisive)


def test_an_exact_infinity_is_resolved() -> None:
    found = settle(made(">"), pd.DataFrame({"bias": [math.inf], "via": ["exact"]}))
    assert (found.verdict, found.effect, found.resolution) == ("HOLDS", math.inf, 0)


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
    # Both ends of a range belong to it.
    assert settle(made(where=within("kl", 0.5, 0.6)), frame).rows == 2
    assert settle(made(where=within("kl", 0.4, 0.5)), frame).rows == 2


def test_a_scope_without_rows_is_a_mistake_unless_it_may_be() -> None:
    frame = pd.DataFrame({"bias": [1.0], "kernel": ["k1"]})
    with pytest.raises(ValueError, match=r"claim target \(here\): no row of frame 03_f is in its scope"):
        settle(made(where=among(kernel="k2")), frame)
    assert settle(made(where=among(kernel="k2"), optional=True), frame).verdict == "OPEN"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"relation": "=="}, "unknown relation '=='"),
        ({"quantifier": "any"}, "unknown quantifier 'any'"),
        ({"frame": "objectives"}, "'objectives' is no frame of an analysis"),
        ({"margin": -0.1}, "the margin not negative, got 0.0 and -0.1"),
        ({"value": math.inf}, "must be finite"),
        ({"margin": math.nan}, "must be finite"),
    ],
)
def test_a_claim_that_nothing_could_settle_is_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        made(**fields)  # type: ignore[arg-type]


def test_a_condition_that_no_row_could_meet_is_refused() -> None:
    with pytest.raises(ValueError, match="names neither a value nor a range"):
        among(kernel=())
    with pytest.raises(ValueError, match="empty range"):
        within("kl", 1, 0.5)


def test_intervals_with_open_ends_are_undecided_with_no_number_that_would_decide() -> None:
    rows = {"bias": [0.4, 0.4], "bias_low": [0.2, -np.inf], "bias_high": [0.6, np.inf], "via": "sampled", "samples": 100}
    found = settle(made(">", 0.1), pd.DataFrame(rows))
    assert (found.verdict, found.low, found.high) == ("UNDECIDED", -np.inf, np.inf)
    assert found.resolution == np.inf
    assert found.samples_needed is None
    half = pd.DataFrame(rows).assign(bias_low=0.2)
    assert settle(made(">", 0.1), half).verdict == "HOLDS"
    assert settle(made("<", 0.5), half).verdict == "UNDECIDED"
    assert settle(made("=", 0, 1), half).verdict == "UNDECIDED"


def test_evidence_is_words_and_the_numbers_that_have_a_form() -> None:
    row = {"bias": 1.0, "world": "bandit", "scenario": "bandit 3", "policy": 0.0, "kernel": "k3", "kl": 0.25, "samples": 64}
    assert settle(made(), pd.DataFrame([row])).evidence == "bandit 3, k3, 64 samples, KL 0.25"
    assert (
        settle(made(), pd.DataFrame([{**row, "policy": "on", "kl": np.nan}])).evidence == "on-policy, bandit 3, k3, 64 samples"
    )


def test_equal_numbers_are_counted_once() -> None:
    frame = pd.DataFrame({"bias": [1.0, 1.0 + 1e-12, 2, 2, 1e-13, 0]})
    found = settle(made("≥", 0), frame)
    assert (found.rows, found.distinct) == (6, 3)


def test_what_a_frame_lacks_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match=r"needs columns \['bias', 'kernel'\] which frame 03_f lacks"):
        settle(made(where=among(kernel="k1")), pd.DataFrame({"cosine": [1.0]}))
    # A sampled number without an error bar settles nothing.
    with pytest.raises(ValueError, match="bias_high"):
        settle(made(), pd.DataFrame({"bias": [1.0], "via": ["sampled"], "bias_low": [0.9], "samples": [10]}))


def test_unknown_frames_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown frame '01_schulmann'; did you mean '01_schulman'"):
        verify({"01_schulmann": pd.DataFrame({"bias": [0.0]})})


def test_unknown_ids_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown claim 'k3-bias'; did you mean 'k3-biased'"):
        verify({}, only=["k3-bias"])
    with pytest.raises(ValueError, match="unknown claim 'value-k9'"):
        claim("value-k9", "", "03_f", "bias", "=", 0)
    with pytest.raises(ValueError, match=r"unknown claim 'k2-loss.biased'"):
        claim("k2-loss.biased", "", "03_f", "bias", "=", 0)


@pytest.mark.parametrize(
    ("relation", "value", "margin", "effect"),
    [(">", 0.0, 0.0, 0.08), (">", 0.0, 0.05, 0.13), (">", 0.0, 0.1, -0.06), ("<", 0.0, 0.0, -0.1), ("=", 0.0, 0.1, 0.0),
     ("=", 0.0, 0.1, 0.06), ("=", 0.0, 0.1, 0.2), ("≠", 0.0, 0.1, 0.2), ("≤", 0.0, 0.05, 0.13), ("≤", 0.0, 0.1, -0.06),
     ("≥", 0.0, 0.05, -0.13), ("≥", 0.0, 0.1, 0.06), ("<", 0.0, 0.05, -0.13)],
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
    assert samples_needed(made("≤", 0, 0.1), 0.05, -0.1, 0.2, 100) is None
    assert samples_needed(made("<", 0, 0.1), -0.05, -0.2, 0.1, 100) is None
    assert samples_needed(made("≥", 0, 0.1), -0.05, -0.2, 0.1, 100) is None
    assert samples_needed(made("<", 0, 0.0), 0.0, -0.1, 0.1, 100) is None
    assert samples_needed(made("=", 0, 0.1), 0.1, 0.0, 0.2, 100) is None  # on the edge of the tolerance
    # Lopsided intervals: only the reach towards the threshold counts.
    assert samples_needed(made(">", 0), 0.1, -0.1, 5, 100) == samples_needed(made(">", 0), 0.1, -0.1, 0.2, 100)
    assert samples_needed(made("<", 0), -0.1, -5, 0.1, 100) == samples_needed(made("<", 0), -0.1, -0.2, 0.1, 100)
    frame = pd.DataFrame({"bias": [0.05], "bias_low": [-0.05], "bias_high": [0.15], "via": ["sampled"], "samples": [100]})
    assert settle(made(">", 0, 0.0), frame).samples_needed == pytest.approx(100 * 4 * (1 + 0.841621 / 1.959964) ** 2, abs=1)
    assert settle(made("=", 0, 1e-9), frame.assign(via="exact")).samples_needed is None


def test_twice_the_interval_takes_four_times_the_samples() -> None:
    for reach in (0.1, 0.5, 2.0):
        narrow, wide = (samples_needed(made(">", 0), 1.0, 1 - r, 1 + r, samples=10**6) for r in (reach, 2 * reach))
        assert narrow is not None
        assert wide == pytest.approx(4 * narrow, abs=4)


def test_the_ledger_is_well_formed() -> None:
    ledger = gl.claims.ledger()
    assert list(ledger.columns) == ["id", "scope", "statement", "published", "source", "frame", "figure", "rule"]
    assert len(ledger) == len(CLAIMS) > 300
    assert not ledger.duplicated(["id", "scope"]).any()
    for row in CLAIMS:
        assert row.statement == STATEMENTS[row.id]
        assert (row.published, row.source) == PUBLISHED[row.topic]
        assert row.scope
        assert (FIGURES / f"{row.frame}.csv").is_file()
        assert (FIGURES / f"{row.figure}.png").is_file()
    assert {row.id for row in CLAIMS} == set(STATEMENTS)
    assert {row.topic for row in CLAIMS} == set(PUBLISHED)
    assert len(set(STATEMENTS.values())) == len(STATEMENTS)
    assert {row.id for row in CLAIMS if row.optional} == {"train-k2-k3.reward", "k3-biased.optimum"}


def test_no_rule_is_in_the_ledger_twice() -> None:
    rules = Counter((c.frame, frozenset(c.where), c.statistic, c.relation, c.value, c.margin, c.quantifier) for c in CLAIMS)
    assert not [rule for rule, times in rules.items() if times > 1]


def test_claims_of_one_id_are_one_thought() -> None:
    """Scopes of a claim say where; what is compared with what, and which gradient with which objective, is the claim's own.

    An angle or a quotient may stand for a bias, so statistics differ; a relation and a target may not. Of one position the frozen
    and the whole reverse KL are the same, and that the prefixes are those of the policy or the behaviour is told by the scope.
    """
    for name, part in itertools.groupby(sorted(CLAIMS, key=lambda c: c.id), key=lambda c: c.id):
        claims = list(part)
        assert len({c.relation for c in claims}) == 1, name
        targets = {value for c in claims for w in c.where if w.column == "target" for value in w.among or ()}
        targets = {target.replace("policy_prefix", "frozen_prefix") for target in targets}
        assert len(targets) <= 1 or name in ("k3-first-order", "length"), (name, targets)
        for c in claims:
            if c.statistic.startswith("bias") and c.relation == "≠":
                assert (c.value, c.margin) == (0, MATTERS), (name, c.scope)
            if "biased" in c.statement and "unbiased" not in c.statement:
                assert c.relation in ("≠", ">"), (name, c.scope)
            if "unbiased" in c.statement and "no " not in c.statement and c.statistic.startswith("bias"):
                assert c.relation in ("=", "≠"), (name, c.scope)
            for word, estimators in NAMED.items():
                if word in c.statement and not c.scope.startswith(("shipped", "as shipped")):
                    tested = {v for w in c.where if w.column in ("estimator", "kernel") for v in w.among or ()}
                    assert all(str(v).startswith(estimators) for v in tested), (name, c.scope, tested)


def test_evidence_is_not_one_number_many_times() -> None:
    """A scope's rows are different numbers, but for identities, and code and compositions that are the same."""
    frames = gl.claims.load(FIGURES, {c.frame for c in CLAIMS if c.frame not in ("12_directions", "08_compositions")})
    for c in (c for c in CLAIMS if c.frame in frames):
        numbers = frames[c.frame][c.statistic]
        rows = frames[c.frame][np.logical_and.reduce([(numbers - said).abs() > 1e-6 for said in (0, 1, c.value)])]
        found = settle(dataclasses.replace(c, optional=True), rows)
        assert found.distinct >= found.rows / 3, (c.id, c.scope, found)


def test_committed_evidence_reads_well() -> None:
    evidence = verify(FIGURES)["evidence"]
    assert not evidence.str.contains(r"\d-policy|nan|None").any()
    assert evidence.str.len().between(4, 160).all()


def test_without_frames_everything_is_open_and_only_restricts() -> None:
    everything = verify({})
    assert list(everything.columns) == [*gl.claims.ledger().columns, *(f.name for f in dataclasses.fields(gl.claims.Verdict))]
    assert set(everything["verdict"]) == {"OPEN"}
    assert len(everything) == len(CLAIMS)
    some = verify({}, only=["value-k1", "clamp"])
    assert set(some["id"]) == {"value-k1", "clamp", "clamp.direction"}
    assert len(some) == sum(row.topic in ("value-k1", "clamp") for row in CLAIMS)
    # A topic stands for its parts, a part for itself.
    assert set(verify({}, only=["clamp"])["id"]) == {"clamp", "clamp.direction"}
    assert set(verify({}, only=["clamp.direction"])["id"]) == {"clamp.direction"}
    assert list(verify({}, only=["clamp", "value-k1"])["id"]) == list(some["id"])


def test_a_summary_counts_scopes_by_topic() -> None:
    table = gl.claims.summary(verify(FIGURES))
    assert list(table.columns) == ["id", "published", "HOLDS", "FAILS", "UNDECIDED", "OPEN"]
    assert list(table["id"]) == list(dict.fromkeys(row.topic for row in CLAIMS))
    assert table.set_index("id").loc["value-k2", ["HOLDS", "FAILS", "UNDECIDED", "OPEN"]].to_list() == [3, 1, 0, 0]
    assert table[["HOLDS", "FAILS", "UNDECIDED", "OPEN"]].to_numpy().sum() == len(CLAIMS)


def test_a_folder_that_cannot_settle_anything_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        verify(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds none of the frames that settle claims"):
        verify(str(tmp_path))


def test_a_folder_of_csv_files_gives_the_same_verdicts(tmp_path: Path) -> None:
    frame = pd.read_csv(FIGURES / "01_schulman.csv")
    frame.to_csv(tmp_path / "01_schulman.csv", index=False)
    from_folder, from_memory = verify(tmp_path), verify({"01_schulman": frame})
    pd.testing.assert_frame_equal(from_folder, from_memory)
    settled = from_memory[from_memory["frame"] == "01_schulman"].set_index(["id", "scope"])["verdict"]
    assert set(settled) == {"HOLDS", "FAILS"}
    assert settled["value-k2", "Gaussian, KL 0.005"] == "FAILS"
    assert set(from_memory.loc[from_memory["frame"] != "01_schulman", "verdict"]) == {"OPEN"}


@pytest.mark.parametrize("identifier", ["value-k1", "value-k2", "value-k3"])
def test_a_planted_change_flips_the_verdict(identifier: str) -> None:
    frame = pd.read_csv(FIGURES / "01_schulman.csv")
    planted = frame.assign(
        bias=frame["bias"].where(frame["kernel"] != identifier[-2:], 0.01 if identifier != "value-k2" else 0.0)
    )
    before, after = (
        verify({"01_schulman": data}, only=[identifier]).set_index("scope")["verdict"] for data in (frame, planted)
    )
    assert before["bandit"] == "HOLDS"
    assert set(after) == {"FAILS"}


def test_no_claim_hangs_on_the_label_of_a_scenario():
    """Labels are for people and may be reworded; scopes are told by columns of their own."""
    keyed = {rule.id for rule in CLAIMS for condition in rule.where if condition.column == "scenario"}
    assert not keyed
