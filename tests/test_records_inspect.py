"""What an inspection says, against the same numbers computed otherwise, and against what was planted."""

from __future__ import annotations

import json
import sys

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from dumps import run
from hypothesis import given, settings
from hypothesis import strategies as st

import gradlab as gl
from gradlab._common.streams import generator
from gradlab.cli import main
from gradlab.estimators.coefficients import coefficients
from gradlab.records.block import Block
from gradlab.records.corrections import CORRECTIONS
from gradlab.records.means import mean
from gradlab.records.scored import estimators
from gradlab.records.steps import changes, trend


def of_steps(*batches: dict, **columns: list) -> gl.Records:
    return gl.Records.of(
        [
            Block.of(c | {"step": np.full(len(c["mask"]), step)} | {k: v[step] for k, v in columns.items()})
            for step, c in enumerate(batches)
        ]
    )


@pytest.fixture(scope="module")
def lagging() -> gl.Records:
    """Six steps of an engine that lags behind, in blocks."""
    batches = []
    for step in range(6):
        c = run("names", 192, stage="few", seed=step)
        noise = np.random.default_rng(step).standard_normal(c["mask"].shape) * 0.1
        batches.append(c | {"behaviour_logprob": np.minimum(c["logprob"] * (1 + noise), 0)})
    return of_steps(*batches)


def test_the_kl_is_what_arithmetic_says():
    c = run("names", 256)
    found = gl.inspect(gl.Records.from_arrays(**c))["kl"].set_index(["kernel", "per"])["value"]
    ratio = (c["logprob"] - c["ref_logprob"])[c["mask"]]
    values = {"k1": ratio, "k2": ratio**2 / 2, "k3": np.exp(-ratio) - 1 + ratio, "δ − 1": np.exp(-ratio) - 1}
    for name, x in values.items():
        assert found[name, "token"] == pytest.approx(x.mean(), rel=1e-12)
        assert found[name, "response"] == pytest.approx(x.sum() / 256, rel=1e-12)


def test_the_kl_lies_in_its_interval_where_that_is_said_to_hold():
    """The KL of the tree is enumerated; the intervals are those of 400 runs of 256 responses."""
    policy = gl.Tree.random(3, 3, seed=1)
    scenario = gl.Scenario(policy, policy.perturbed(kl=0.3, seed=2))
    truth, inside, held = float(gl.exact.objective("reverse_kl", scenario)), [], []
    for seed in range(400):
        rollout = gl.Rollout.from_sampler(scenario, 256, generator(seed, "montecarlo"))
        found = mean(rollout.log_ratio.sum(1).numpy(), np.ones(256), np.arange(256))
        held.append(found.reliable)
        inside.append(found.low <= truth <= found.high)
    row = gl.inspect(gl.Records.from_rollout(rollout))["kl"].query("kernel == 'k1' and per == 'response'").iloc[0]
    assert (row["value"], row["low"], row["high"]) == pytest.approx((found.value, found.low, found.high))
    assert np.mean(held) > 0.95
    assert 0.92 <= np.mean(np.array(inside)[held]) <= 0.98


@pytest.mark.parametrize("draw", ["exponential", "lognormal of 3", "one in a hundred"])
def test_intervals_hold_or_are_open(draw):
    """Where few values carry the mean, Student's interval misses it far more often than it says; there the ends are open."""
    rng = np.random.default_rng(0)
    law = {
        "exponential": (lambda n: rng.exponential(size=n), 1.0),
        "lognormal of 3": (lambda n: rng.lognormal(0, 3, n), np.exp(4.5)),
        "one in a hundred": (lambda n: 100.0 * (rng.random(n) < 1e-2), 1.0),
    }
    sample, truth = law[draw]
    covered = []
    for _ in range(400):
        x = sample(512)
        found = mean(x, np.ones(512), np.arange(512), positive=True)
        covered.append(found.low <= truth <= found.high)
        if draw == "lognormal of 3":
            assert not found.reliable
            assert found.high == np.inf
    assert np.mean(covered) >= 0.93


def test_estimators_put_on_recorded_tokens_what_they_put_on_the_rollout_itself():
    stages = [gl.policies.small("names", stage, precision=torch.float64) for stage in ("few", "reference", "many")]
    scenario = gl.Scenario(*stages)
    rollout = gl.Rollout.from_sampler(scenario, 64, generator(3, "montecarlo"))
    found = gl.inspect(gl.Records.from_rollout(rollout), force=True)["estimators"].set_index("estimator")
    mask = rollout.mask
    assert set(found.index) == set(estimators())
    for name, estimator in estimators().items():
        # A fixed normaliser divides by the longest response, which records know of those that were drawn.
        if estimator.normalise == "fixed":
            continue
        c = coefficients(estimator, rollout).score.abs()[mask].detach()
        assert found.loc[name, "pull"] == pytest.approx(float(c.mean()), rel=1e-9), name
        over = float(c[(rollout.log_ratio > 0)[mask]].sum() / c.sum())
        assert found.loc[name, "over"] == pytest.approx(over, rel=1e-9)
        largest = c.sort(descending=True)[0]
        assert found.loc[name, "ten"] == pytest.approx(float(largest[:10].sum() / c.sum()), rel=1e-9)
        half = int((largest.cumsum(0) < c.sum() / 2 * (1 - 1e-9)).sum()) + 1
        assert found.loc[name, "half"] == half


def test_the_share_of_effective_samples_and_the_corrections_are_what_arithmetic_says(lagging):
    found = gl.inspect(lagging)
    tokens = lagging.tokens()
    tokens["log_weight"] = tokens["logprob"] - tokens["behaviour_logprob"]
    by_response = tokens.groupby("response")["log_weight"].agg(["sum", "count"])
    shares = found["weights"].query("by == 'all'").set_index("kind")["share"]
    sums, counts = by_response["sum"], by_response["count"]
    weights = {"token": np.exp(tokens["log_weight"]), "sequence": np.exp(sums), "geometric": np.exp(sums / counts)}
    for kind, w in weights.items():
        assert shares[kind] == pytest.approx(w.sum() ** 2 / (len(w) * (w**2).sum()), rel=1e-10)
    third = tokens[tokens["position"] <= 2].groupby("response")["log_weight"].sum()
    w = np.exp(third)
    found_third = found["weights"].query("by == 'length' and at == '2'")["share"].iloc[0]
    assert found_third == pytest.approx(w.sum() ** 2 / (len(w) * (w**2).sum()), rel=1e-10)
    product = np.exp(tokens["response"].map(by_response["sum"])).to_numpy()
    geometric = np.exp(tokens["response"].map(by_response["sum"] / by_response["count"])).to_numpy()
    table = found["corrections"].set_index("correction")
    for name, correction in CORRECTIONS.items():
        f = correction.weight(np.exp(tokens["log_weight"].to_numpy()), product, geometric)
        assert table.loc[name, "bias"] == pytest.approx(np.abs(f - product).mean(), rel=1e-9, abs=1e-15)
        assert table.loc[name, "noise"] == pytest.approx((f**2).mean(), rel=1e-9)
    assert table.loc["sequence", "bias"] == 0
    assert table["wins"].sum() == pytest.approx(1)


def test_the_bias_of_a_correction_bounds_what_it_does_to_a_mean():
    """On an enumerated tree: the change of the expected score-function gradient of any reward within ±1 is below the bias."""
    policy = gl.Tree.random(2, 4, seed=0)
    scenario = gl.Scenario(policy, policy, policy.perturbed(scale=0.4, seed=1))
    rollout = gl.Rollout.enumerated(scenario)
    log_weight, p = rollout.log_weight.numpy(), rollout.weight.numpy()
    product, t = np.exp(log_weight.sum(1, keepdims=True)), log_weight.shape[1]
    for correction in CORRECTIONS.values():
        f = correction.weight(np.exp(log_weight), product + 0 * log_weight, product ** (1 / t) + 0 * log_weight)
        bias = (p[:, None] * np.abs(f - product)).sum() / t
        for seed in range(20):
            x = np.random.default_rng(seed).uniform(-1, 1, f.shape)
            assert abs((p[:, None] * (f - product) * x).sum() / t) <= bias + 1e-12


def test_whose_a_spike_is():
    """Step 6 has one token with an enormous δ; or the policy of another stage of training."""
    steps = [run("names", 128, stage="few", seed=seed) for seed in range(10)]
    for whose in ("the estimator's", "the policy's"):
        planted = [dict(c) for c in steps]
        if whose == "the estimator's":
            logprob = planted[6]["logprob"].copy()
            logprob[3, 1] = planted[6]["ref_logprob"][3, 1] - 12
            planted[6] |= {"logprob": logprob, "behaviour_logprob": logprob}
        else:
            planted[6] = run("names", 128, stage="many", seed=6)
        found = gl.inspect(of_steps(*planted))
        (told,) = [line for line in found.sentences["steps"] if "spikes" in line]
        assert "at step 6, " in told
        assert told.endswith(f"the spike is {whose}")
        if whose == "the estimator's":
            largest = found["largest"].iloc[0]
            assert (largest["response"], largest["place"]) == (6 * 128 + 3, 1)
            assert largest["share"] > 0.9
    quiet = gl.inspect(of_steps(*steps))
    assert not [line for line in quiet.sentences.get("steps", []) if "spike" in line]


def test_a_change_over_the_steps_is_found_where_it_is():
    batches = [run("names", 64, stage="few" if seed < 9 else "many", seed=seed) for seed in range(16)]
    found = gl.inspect(of_steps(*batches))
    rows = found["changes"].query("kind == 'change' and number == 'k1'")
    assert rows["step"].tolist() == [9]
    assert rows["after"].iloc[0] > 10 * rows["before"].iloc[0]


def test_no_change_is_found_where_there_is_none():
    rng = np.random.default_rng(0)
    found = [len(changes(rng.standard_normal(20), seed=i)) > 0 for i in range(200)]
    assert np.mean(found) <= 0.03
    assert trend(np.arange(20), np.arange(20.0))[1] == pytest.approx(1)
    assert changes(np.r_[rng.standard_normal(12), 3 + rng.standard_normal(9)])[0][0] in (11, 12, 13)


def test_engines_are_told_apart_by_their_signature():
    c = run("names")
    rounded = torch.from_numpy(c["logprob"]).bfloat16().double().numpy()
    engines = {
        "none": c, "rounding": c | {"behaviour_logprob": rounded}, "temperature": run("names", temperature=0.8),
        "nucleus": run("names", top_p=0.7), "weights": c | {"behaviour_logprob": c["ref_logprob"]},
    }  # fmt: skip
    for kind, columns in engines.items():
        assert gl.inspect(gl.Records.from_arrays(**columns), force=True)["engine"]["kind"].tolist() == [kind]


def test_nothing_is_computed_from_what_cannot_be_right_unless_forced():
    c = run("names")
    records = gl.Records.from_arrays(**c | {"ref_logprob": -c["ref_logprob"]})
    found = gl.inspect(records)
    assert "kl" not in found.frames
    assert "weights" in found.frames
    assert found.withheld == ["nothing is computed from ref_logprob, because of the fault “positive”"]
    with pytest.raises(ValueError, match="these records tell nothing of 'kl'; there is overview, "):
        found["kl"]
    assert "kl" in gl.inspect(records, force=True).frames


def same(one: gl.records.Inspection, other: gl.records.Inspection) -> None:
    assert set(one.frames) == set(other.frames)
    for name in set(one.frames) - {"overview"}:
        pd.testing.assert_frame_equal(one[name], other[name], check_exact=False, rtol=1e-9, atol=1e-12, obj=name)
    assert one.sentences == other.sentences


def test_parts_files_and_processes_give_what_memory_gives(lagging, tmp_path):
    pytest.importorskip("pyarrow")
    whole = gl.inspect(lagging)
    path = lagging.write(tmp_path / "run.parquet")
    stored = gl.read_rollouts(path)
    assert len(stored.parts(3)) > 3
    assert [b.first for b in stored.parts(3)[1]] == [stored.parts(3)[1].first]
    same(whole, gl.inspect(stored))
    same(whole, gl.inspect(stored, jobs=2))
    with joblib.parallel_config(backend="threading", n_jobs=3):
        same(whole, gl.inspect(lagging))


def test_a_row_group_of_any_size_is_read_some_tokens_at_a_time(lagging, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = lagging.write(tmp_path / "run.parquet")
    whole = parquet.read_table(path)
    parquet.write_table(whole, tmp_path / "one.parquet", row_group_size=len(whole))
    monkeypatch.setattr("gradlab.records.parquet.TOKENS", 512)
    blocks = list(gl.read_rollouts(tmp_path / "one.parquet"))
    assert 256 < max(len(block.mask) for block in blocks) <= 512
    assert sum(map(len, blocks)) == len(whole) == 1152
    pd.testing.assert_frame_equal(gl.read_rollouts(tmp_path / "one.parquet").tokens(), lagging.tokens())


def test_a_dask_cluster_gives_what_memory_gives(lagging, tmp_path):
    distributed = pytest.importorskip("distributed")
    pytest.importorskip("pyarrow")
    stored = gl.read_rollouts(lagging.write(tmp_path / "run.parquet"))
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster, cluster.get_client(), joblib.parallel_config(backend="dask"):
        found = gl.inspect(stored)
    same(gl.inspect(lagging), found)


def test_a_bounded_number_of_tokens_is_kept_and_the_same_ones_whatever_the_parts(monkeypatch, lagging):
    from gradlab.records import survey

    monkeypatch.setattr(survey, "KEPT", 500)
    whole = survey.survey(lagging)
    pieces = [survey._survey(gl.Records.of([b]), lagging.policies, ()) for b in lagging]
    pieces = [survey._survey([b], lagging.policies, ()) for b in lagging]
    merged = pieces[0]
    for piece in pieces[1:]:
        merged.merge(piece)
    for key, thinned in whole.gaps.items():
        assert 200 < len(thinned.rows) <= 500
        np.testing.assert_array_equal(merged.gaps[key].rows, thinned.rows)


POLICIES = ["logprob", "old_logprob", "ref_logprob", "behaviour_logprob"]
COLUMNS = st.sets(st.sampled_from([*POLICIES, "advantage", "reward", "token_id", "step", "group_id", "removed"]))


@settings(max_examples=60, deadline=None)
@given(
    names=COLUMNS, shape=st.tuples(st.integers(1, 6), st.integers(1, 5)), seed=st.integers(0, 99),
    dtype=st.sampled_from(["float16", "float32", "float64", "bfloat16"]), holes=st.booleans(),
)  # fmt: skip
def test_whatever_columns_there_are_it_is_inspected_or_refused(names, shape, seed, dtype, holes):
    rng = np.random.default_rng(seed)
    n, columns = shape[0], {}
    for name in names:
        if name.endswith("logprob"):
            columns[name] = torch.from_numpy(-rng.exponential(size=shape)).to(getattr(torch, dtype))
            if holes and rng.random() < 0.3:
                columns[name][0, 0] = float("nan")
        elif name in ("reward", "advantage"):
            columns[name] = rng.standard_normal(n)
        elif name in ("step", "group_id"):
            columns[name] = rng.integers(0, 3, n)
        else:
            columns[name] = rng.integers(0, 2, shape)
    columns["mask"] = rng.random(shape) < 0.8
    if not names & set(POLICIES):
        with pytest.raises(ValueError, match="records hold log-probabilities"):
            gl.Records.from_arrays(**columns)
        return
    found = gl.inspect(gl.Records.from_arrays(**columns), force=True)
    assert found["overview"]["responses"].tolist() == [n]
    assert found["overview"]["tokens"].tolist() == [int(columns["mask"].sum())]


# ---- the command ------------------------------------------------------------------------------------------------------------


def command(monkeypatch, capsys, *words: object) -> tuple[object, str, str]:
    monkeypatch.setattr(sys, "argv", ["gradlab", "inspect", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main.main()
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_the_command_prints_a_screen_and_writes_a_page(lagging, tmp_path, monkeypatch, capsys):
    pytest.importorskip("pyarrow")
    path = lagging.write(tmp_path / "run.parquet")
    code, out, err = command(monkeypatch, capsys, path, "--output", tmp_path / "page")
    assert not code
    assert "no fault was found" in out
    assert "KL of the policy from the reference, nats per response: k1" in out
    page = (tmp_path / "page" / "inspect.html").read_text(encoding="utf-8")
    assert page.count('<img src="data:image/png;base64,') == 4
    assert "the page is" in err
    frame = pd.read_csv(tmp_path / "page" / "kl.csv")
    assert frame["value"].to_numpy() == pytest.approx(gl.inspect(lagging)["kl"]["value"].to_numpy())
    code, out, _ = command(monkeypatch, capsys, path, "--json", "--step", 2)
    assert not code
    assert json.loads(out)["frames"]["overview"][0]["responses"] == 192


def test_the_command_exits_with_1_for_a_fault_and_2_for_what_it_cannot_read(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pyarrow")
    c = run("names")
    path = gl.Records.from_arrays(**c | {"logprob": -c["logprob"]}).write(tmp_path / "run.parquet")
    code, out, _ = command(monkeypatch, capsys, path)
    assert code == 1
    assert "FAULT positive: logprob is positive at" in out
    assert "nothing is computed from logprob" in out
    code, _, err = command(monkeypatch, capsys, tmp_path / "nothing")
    assert code == 2
    assert err == f"gradlab: there is no {tmp_path / 'nothing'}\n"


def test_what_is_no_records_is_refused():
    with pytest.raises(ValueError, match=r"inspect takes records, .* got str"):
        gl.inspect("rollouts")
