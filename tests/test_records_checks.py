"""Faults planted one at a time in runs of small language models: each is found, by its own name and columns, and nothing else is."""

from __future__ import annotations

import numpy as np
import pytest
from dumps import POLICIES, faults, run

import gradlab as gl
from gradlab.records import check
from gradlab.records.checks import spoiled
from gradlab.records.gaps import gap

CASES = [(task, *case) for task in ("names", "addition") for case in faults(task)]


@pytest.mark.parametrize(("task", "name", "columns", "expected"), CASES, ids=[f"{case[0]}: {case[1]}" for case in CASES])
def test_a_planted_fault_is_found_and_no_other(task, name, columns, expected):
    findings = check(gl.Records.from_arrays(**columns))
    assert [(f.fault, f.columns) for f in findings] == expected, [f.sentence for f in findings]
    for finding in findings:
        assert len(finding.rows)
        assert finding.rows["tokens"].min() > 0
        assert finding.serious == (finding.fault not in ("rounded", "template") and name != "first step")


def test_the_rows_of_a_fault_are_those_it_was_planted_in():
    c = run("names")
    for value in (np.nan, 0.7):
        x = c["ref_logprob"].copy()
        x[[7, 100], 0] = value
        (finding,) = check(gl.Records.from_arrays(**c | {"ref_logprob": x}))
        assert finding.rows.values.tolist() == [[7, 1], [100, 1]]
        assert "2 tokens of 2 of 512 responses, the first number 7" in finding.sentence
    index = np.r_[np.arange(512), 40]
    (twice,) = check(gl.Records.from_arrays(**{name: np.asarray(x)[index] for name, x in c.items()}))
    assert twice.rows["response"].tolist() == [40, 512]


def test_a_response_that_is_drawn_again_is_none_that_is_written_twice():
    c = {name: x for name, x in run("names", 2048).items() if name != "response_id"}
    digests = {tuple(row) for row in c["token_id"].tolist()}
    assert len(digests) < 2048  # a policy that is near to certain repeats itself
    assert check(gl.Records.from_arrays(**c)) == []
    index = np.r_[
        np.arange(2048), np.arange(64, 96)
    ]  # and a block that comes again, in its order, is one that is written twice
    (finding,) = check(gl.Records.from_arrays(**{name: np.asarray(x)[index] for name, x in c.items()}))
    assert finding.fault == "twice"
    assert set(range(64, 96)) <= set(finding.rows["response"])


@pytest.mark.parametrize("temperature", [0.8, 1.0, 1.25])
def test_temperature_is_measured_where_responses_part(temperature):
    c = run("names", temperature=temperature)
    from gradlab.records.survey import survey

    seen = survey(gl.Records.from_arrays(**c))
    key = ("logprob", "behaviour_logprob")
    known = gap(seen.gaps[key].rows, seen.siblings[key].rows)
    if temperature == 1:
        assert known.kind == "none"
    else:
        assert known.kind == "temperature"
        assert known.temperature == pytest.approx(temperature, rel=1e-3)
        assert known.pairs > 100


def test_other_weights_are_told_by_their_size_from_arithmetic():
    stale = gl.Records.from_arrays(**run("names") | {"behaviour_logprob": run("names")["ref_logprob"]})
    from gradlab.records.survey import survey

    seen = survey(stale)
    key = ("logprob", "behaviour_logprob")
    assert gap(seen.gaps[key].rows, seen.siblings[key].rows).kind == "weights"
    c, rng = run("names"), np.random.default_rng(0)
    noisy = c | {"behaviour_logprob": np.minimum(c["logprob"] * (1 + 0.02 * rng.standard_normal(c["logprob"].shape)), 0)}
    seen = survey(gl.Records.from_arrays(**noisy))
    assert gap(seen.gaps[key].rows, seen.siblings[key].rows).kind == "arithmetic"
    assert check(gl.Records.from_arrays(**noisy)) == []


def test_a_token_of_the_template_that_carries_the_kl_is_named():
    c = run("addition")
    k = len(c["mask"])
    added = {"logprob": -0.001, "behaviour_logprob": -0.001, "ref_logprob": -9.0, "token_id": 11, "mask": True}
    columns = c | {name: np.concatenate([np.full((k, 1), value), c[name]], 1) for name, value in added.items()}
    (finding,) = check(gl.Records.from_arrays(**columns))
    assert (finding.fault, finding.serious) == ("template", False)
    assert "id 11 modulo" in finding.sentence
    assert "100% of the responses" in finding.sentence


def test_lists_of_the_likeliest_tokens_say_which_token_a_number_is_of():
    c = run("addition")
    some = np.stack([c["token_id"], (c["token_id"] + 1) % 12], -1)
    top = np.stack([c["logprob"], np.full_like(c["logprob"], -8.0)], -1)
    tops = {"top_ids": some, "top_logprob": top}
    assert check(gl.Records.from_arrays(**c, **tops)) == []
    shifted = {name: np.roll(x, 1, 1) for name, x in c.items() if name in POLICIES}
    for lists in (tops, {name: np.roll(x, 1, 1) for name, x in tops.items()}):
        (finding,) = check(gl.Records.from_arrays(**c | shifted | lists))
        assert (finding.fault, finding.columns) == ("shifted", ("token_id",))


def test_what_a_serious_fault_spoils():
    c = run("names")
    findings = check(gl.Records.from_arrays(**c | {"ref_logprob": -c["ref_logprob"]}))
    assert spoiled(findings) == {"ref_logprob"}
    assert spoiled(check(gl.Records.from_arrays(**c | {"ref_logprob": c["logprob"]}))) == set()


def test_a_policy_that_some_responses_have_not_is_no_fault():
    c = run("names")
    rows = [None if i % 3 else row for i, row in enumerate(c["ref_logprob"])]
    assert check(gl.Records.from_arrays(**c | {"ref_logprob": rows})) == []


def test_without_responses_there_is_nothing_to_check():
    with pytest.raises(ValueError, match="no responses in these records"):
        check(gl.Records.of([]))
