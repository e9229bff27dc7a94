"""`measure`: documented columns, values that follow from the moments, the same bytes on any number of workers."""

from __future__ import annotations

import importlib
import math
import pickle
import platform
import sys
from collections.abc import Iterator
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from worlds import scenario

import gradlab as gl
from gradlab import Rollout, intervals
from gradlab._common import parallel
from gradlab.solvers import montecarlo

module = importlib.import_module("gradlab.measure")

# math.md §6: probabilities (.4, .3, .2, .1) against (.1, .2, .3, .4).
PI, REF = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
BANDIT = gl.Scenario(gl.Bandit(np.log(PI)), gl.Bandit(np.log(REF)), name="bandit")
TREE = scenario("tree", off_policy=True)
CHAIN = gl.Markov.random(vocab=3, length=12, seed=0)
WORLDS = [BANDIT, TREE, scenario("eos"), gl.Scenario(CHAIN, CHAIN.perturbed(kl=0.2, seed=1)), scenario("gaussian")]


def half_k2(rollout: Rollout) -> torch.Tensor:
    """A user's function: half of k2 as a loss."""
    return 0.25 * rollout.log_ratio.square().sum(-1)


class Scaled:
    """A user's callable object."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        return self.factor * half_k2(rollout)


def csv(frame: pd.DataFrame) -> bytes:
    return frame.to_csv(index=False).encode()


# ── Columns ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("samples", [None, 1, 64], ids=["exact", "one sample", "sampled"])
@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.label.split()[0])
def test_columns(world, samples):
    frame = gl.measure(["k2-loss", "k1-loss"], world, target=["reverse_kl", "zero"], samples=samples)
    assert list(frame.columns) == list(module.COLUMNS)
    assert all(len(text) > 10 for text in module.COLUMNS.values())
    assert len(set(module.COLUMNS.values())) == len(module.COLUMNS)
    gaussian = isinstance(world.policy, gl.Gaussian)
    methods = {"bandit": "enumeration", "tree": "enumeration", "markov": "dynamic programming", "gaussian": "quadrature"}
    family = type(world.policy).__name__.lower()
    for index, row in frame.iterrows():
        assert row.scenario == world.label
        assert row.family == family
        assert pd.isna(row.vocab) if gaussian else row.vocab == world.policy.vocab
        assert row.length == world.policy.length
        assert row.off_policy == (world.behaviour is not None)
        assert (row.estimator, row.target) == (["k2-loss", "k1-loss"][index // 2], ["reverse_kl", "zero"][index % 2])
        assert row.via == ("exact" if samples is None else "sampled")
        drawn = gaussian or world.policy.vocab**world.policy.length > montecarlo.COUNTED_RESPONSES
        assert row.method == (methods[family] if samples is None else "drawn" if drawn else "counted")
        assert pd.isna(row.samples) if samples is None else row.samples == samples
        assert row.kl == world.kl() > 0
        assert row.lag == world.lag()
    if samples is None:
        assert frame.filter(regex="_(low|high)$").isna().all(axis=None)
    assert frame.attrs["seed"] == 0
    assert frame.attrs["level"] == 0.95
    assert {"gradlab", "torch", "numpy", "scipy"} <= set(frame.attrs)
    assert frame.samples.dtype == frame.vocab.dtype == "Int64"


# ── Values ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_exact_values_by_hand():
    """k3 and k2 as losses on the bandit: E g = π − ref and ∇KL, moments summed token by token."""
    ratio = np.log(PI / REF)
    kl = float(PI @ ratio)
    target = PI * (ratio - kl)
    score = np.eye(4) - PI
    for name, coefficient in (("k3-loss", 1 - REF / PI), ("k2-loss", ratio), ("k1-loss", np.ones(4))):
        gradients = coefficient[:, None] * score
        mean = PI @ gradients
        trace = float(PI @ np.square(gradients - mean).sum(-1))
        row = gl.measure(name, BANDIT).iloc[0]
        size, bias = np.linalg.norm(target), np.linalg.norm(mean - target) / np.linalg.norm(target)
        assert row.kl == pytest.approx(kl, rel=1e-13)
        assert row.target_norm == pytest.approx(size, rel=1e-13)
        assert row.gradient_norm == pytest.approx(np.linalg.norm(mean), rel=1e-12, abs=1e-15)
        assert row.bias == pytest.approx(bias, rel=1e-12, abs=1e-14)
        assert row.trace_cov == pytest.approx(trace, rel=1e-12)
        assert row.noise == pytest.approx(trace / size**2, rel=1e-12)
        for n in module.BATCH_SIZES:
            assert row[f"rmse_at_{n}"] == pytest.approx(math.sqrt(bias**2 + trace / size**2 / n), rel=1e-12)
        if name == "k3-loss":
            np.testing.assert_allclose(mean, PI - REF, rtol=1e-12)
            assert row.cosine == pytest.approx(mean @ target / np.linalg.norm(mean) / size, rel=1e-12)
            assert row.crossover == pytest.approx(trace / size**2 / bias**2, rel=1e-12)
            # At that batch size the squared error is bias and variance in equal parts.
            assert row.crossover * bias**2 == pytest.approx(row.noise, rel=1e-12)
        elif name == "k2-loss":
            assert row.cosine == pytest.approx(1, rel=1e-14)
            assert row.crossover == math.inf
        else:
            assert row.bias == pytest.approx(1, rel=1e-14)
            assert math.isnan(row.cosine)  # of a mean that is zero
            assert row.crossover == pytest.approx(row.noise, rel=1e-12)


def test_a_zero_target_has_no_relative_numbers():
    same = gl.Scenario(TREE.policy, TREE.policy)
    relative = ["bias", "cosine", "noise", "crossover", *(f"rmse_at_{n}" for n in module.BATCH_SIZES)]
    for samples in (None, 256):
        for world, target in ((same, "reverse_kl"), (TREE, "zero")):
            row = gl.measure("k3-reward-to-go", world, target=target, samples=samples).iloc[0]
            assert row[relative].isna().all(), row[relative]
            assert row.target_norm < 1e-14
            assert (row.trace_cov > 1e-4) == (world is TREE)  # absolute ones remain


def test_infinite_noise():
    row = gl.measure("k3-loss", gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(0.3, 1.8))).iloc[0]
    assert row.noise == row.trace_cov == row.rmse_at_64 == row.crossover == math.inf
    assert 0 < row.bias < 10


def test_several_targets_share_one_run():
    names = ["reverse_kl", "forward_kl", "reverse_kl_frozen_prefix"]
    together = gl.measure(["k2-loss", "k3-loss"], TREE, target=names, samples=512, seed=3)
    assert list(together.target) == names * 2
    for name in names:
        alone = gl.measure(["k2-loss", "k3-loss"], TREE, target=name, samples=512, seed=3)
        assert csv(together[together.target == name]) == csv(alone)
    frozen = gl.measure("k2-loss", TREE.on_policy(), target=names).set_index("target")
    assert frozen.bias["reverse_kl_frozen_prefix"] < 1e-12 < 1e-2 < frozen.bias["reverse_kl"] < frozen.bias["forward_kl"]


def test_sampled_values_follow_from_the_moments():
    found = montecarlo.moments(gl.ESTIMATORS["k3-loss"], TREE, 4096, seed=2, stream=(0,))
    row = gl.measure("k3-loss", TREE, samples=4096, seed=2, level=0.9).iloc[0]
    assert row.reliable
    target = gl.exact.gradient("reverse_kl", TREE)
    size = float(target.norm())
    u_statistic = float((found.mean - target).square().sum()) - found.trace_cov / 4096
    assert row.bias == pytest.approx(math.sqrt(u_statistic) / size, rel=1e-12)
    assert row.gradient_norm == pytest.approx(math.sqrt(float(found.mean.square().sum()) - found.trace_cov / 4096), rel=1e-12)
    assert row.noise == pytest.approx(found.trace_cov / size**2, rel=1e-12)
    assert row.rmse_at_64 == pytest.approx(math.sqrt(row.bias**2 + row.noise / 64), rel=1e-12)
    assert row.crossover == pytest.approx(row.noise / row.bias**2, rel=1e-12)
    means, truth = found.batch_means.numpy(), target.numpy()
    expected = {
        "bias": intervals.bias(means, truth, 0.9),
        "cosine": intervals.cosine(means, truth, 0.9),
        "noise": intervals.noise(means, found.batch_traces.numpy(), truth, 0.9),
    }
    for key, interval in expected.items():
        assert row[f"{key}_low"] == pytest.approx(float(interval.low), rel=1e-12)
        assert row[f"{key}_high"] == pytest.approx(float(interval.high), rel=1e-12)
    assert row.cosine == pytest.approx(float(expected["cosine"].estimate), rel=1e-12)
    wider = gl.measure("k3-loss", TREE, samples=512, seed=2, level=0.99).iloc[0]
    for key in expected:
        assert wider[f"{key}_low"] < row[f"{key}_low"]
        assert wider[f"{key}_high"] > row[f"{key}_high"]


# ── Names and functions ──────────────────────────────────────────────────────────────────────────────────────────────


def test_estimators_come_as_names_recipes_functions_or_a_mapping():
    composed = gl.Estimator("k1", "reward", "to_go", weight="prefix")
    frame = gl.measure(["k2-loss", composed, half_k2, Scaled(2.0)], TREE)
    assert list(frame.estimator) == ["k2-loss", "k1-reward-to_go-prefix-weight", "half_k2", "Scaled"]
    norm = frame.set_index("estimator").gradient_norm
    assert norm["half_k2"] == pytest.approx(0.5 * norm["k2-loss"], rel=1e-12)
    assert norm["Scaled"] == pytest.approx(norm["k2-loss"], rel=1e-12)
    mapped = gl.measure({"mine": half_k2, "twice": lambda r: 2 * half_k2(r), "theirs": "k2-loss", "it": composed}, TREE)
    assert list(mapped.estimator) == ["mine", "twice", "theirs", "it"]
    np.testing.assert_allclose(mapped.gradient_norm, norm[["half_k2", "k2-loss", "k2-loss", frame.estimator[1]]], rtol=1e-12)
    for single in ("k2-loss", gl.ESTIMATORS["k2-loss"]):
        assert csv(gl.measure(single, TREE)) == csv(frame[:1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gl.measure("k2-los", TREE), r"unknown estimator 'k2-los'; did you mean 'k2-loss'"),
        (lambda: gl.measure(["k2-loss", "full-bothh"], TREE), r"unknown estimator 'full-bothh'; did you mean 'full-both'"),
        (lambda: gl.measure({"mine": "k3-lost"}, TREE), r"unknown estimator 'k3-lost'; did you mean 'k3-loss'"),
        (lambda: gl.measure("k2-loss", TREE, target="reverse"), r"unknown target 'reverse'; did you mean 'reverse_kl'"),
        (lambda: gl.measure("k2-loss", TREE, target=["zero", "foward_kl"]), "did you mean 'forward_kl'"),
        (lambda: gl.measure([], TREE), "no estimators were given"),
        (lambda: gl.measure({}, TREE), "no estimators were given"),
        (lambda: gl.measure("k2-loss", []), "nothing to measure: 1 estimators, 0 scenarios"),
        (lambda: gl.measure("k2-loss", TREE, target=[]), "1 scenarios, 0 targets"),
        (lambda: gl.measure([3], TREE), "an estimator is a gl.Estimator, a catalogue name or a function of a rollout, got 3"),
        (lambda: gl.measure({"mine": None}, TREE), "an estimator is a gl.Estimator.*got None"),
        (lambda: gl.measure(lambda r: r.log_ratio, TREE), r"must return one value per response, \[9\], got \[9, 2\]"),
        (lambda: gl.measure(lambda r: r.weight, TREE), "does not depend on the policy's logits"),
        (lambda: gl.measure("k2-loss", TREE.policy), r"a scenario is gl.Scenario\(policy, .*got Tree"),
        (lambda: gl.measure("k2-loss", [TREE, TREE.policy]), r"a scenario is gl.Scenario\(policy, .*got Tree"),
        (lambda: gl.measure([lambda r: half_k2(r), lambda r: 2 * half_k2(r)], TREE), "two different losses are called"),
        (lambda: gl.measure("k2-loss", TREE, samples=64, level=1.0), "level must lie strictly between 0 and 1"),
        (lambda: gl.measure(half_k2, WORLDS[3]), "half_k2"),
    ],
)
def test_bad_input_is_refused_with_a_reason(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ── Intervals to look at any time ────────────────────────────────────────────────────────────────────────────────────


def test_intervals_hold_at_all_looks_at_once():
    """Runs that are doubled six times: the share in which any look misses, for bias, cosine and noise."""
    replicates, names, sizes = 60, ["k2-loss", "k3-loss"], [64 * 2**k for k in range(7)]
    policy = gl.Bandit.random(5, seed=3)
    world = gl.Scenario(policy, policy.perturbed(kl=0.1, seed=4))
    truth = gl.measure(names, world).set_index("estimator")
    looks = [gl.measure(names, [world] * replicates, samples=n, seed=n, level=0.8, anytime=True) for n in sizes]
    most = stats.binom.ppf(1 - 1e-4, replicates, 0.2)
    assert stats.binom.sf(most, replicates, 0.5) > 0.8  # seven looks at the plain level miss in half of the runs
    for name in names:
        for column in ("bias", "cosine", "noise"):
            exact = truth.loc[name, column]
            missed = np.zeros(replicates, dtype=bool)
            for look in looks:
                rows = look[look.estimator == name]
                missed |= ~((rows[f"{column}_low"] <= exact + 1e-9) & (exact - 1e-9 <= rows[f"{column}_high"])).to_numpy()
            assert missed.sum() <= most, (name, column, missed.mean())


def test_a_look_has_its_share_of_the_level_and_other_sizes_are_refused():
    assert [module.at_look(0.95, n) for n in (64, 128, 4096)] == pytest.approx([1 - 0.05 / 2, 1 - 0.05 / 6, 1 - 0.05 / 56])
    assert sum(1 - module.at_look(0.9, 64 * 2**k) for k in range(40)) == pytest.approx(0.1, rel=0.03)
    plain, wide = (gl.measure("k3-loss", TREE, samples=256, anytime=a) for a in (False, True))
    for column in ("bias", "cosine", "noise"):
        assert (wide[f"{column}_low"] <= plain[f"{column}_low"]).all()
        assert (wide[f"{column}_high"] >= plain[f"{column}_high"]).all()
        assert (wide[column] == plain[column]).all()
    for samples in (None, 32, 100, 192):
        with pytest.raises(ValueError, match="anytime intervals are for runs of 64, 128, 256"):
            gl.measure("k3-loss", TREE, samples=samples, anytime=True)


def test_what_is_looked_at_first_is_printed_on_a_narrow_screen():
    with pd.option_context("display.width", 80, "display.max_columns", 0):
        printed = str(gl.measure(["k1-reward-to-go", "k3-loss"], TREE, "forward_kl"))
    assert max(map(len, printed.splitlines())) <= 80
    assert printed.splitlines()[0].split() == ["estimator", "target", "bias", "...", "cosine", "noise", "crossover"]


# ── Workers ──────────────────────────────────────────────────────────────────────────────────────────────────────────

LOSSES: dict[str, Any] = {name: name for name in ("k3-loss", "k1-reward-to-go", "full-both")} | {"mine": Scaled(0.5)}


def frames(jobs: int) -> bytes:
    """An exact and a sampled frame over several scenarios, as bytes."""
    worlds = [world for world in WORLDS if not isinstance(world.policy, gl.Markov)]
    exact = gl.measure(LOSSES, worlds, jobs=jobs)
    sampled = gl.measure({**LOSSES, "loo": "k1-reward-loo"}, [*worlds[:3], *worlds[:3]], samples=400, seed=7, jobs=jobs)
    return csv(exact) + csv(sampled)


@pytest.fixture(scope="module")
def one_process() -> bytes:
    return frames(jobs=1)


@pytest.fixture(scope="module")
def dask_cluster() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(processes=True, n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def test_same_bytes_twice_and_whatever_the_threads(one_process):
    assert frames(jobs=1) == one_process
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert frames(jobs=1) == one_process
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    sampled = gl.measure("k3-loss", TREE, samples=400, seed=7)
    assert csv(sampled) == csv(gl.measure("k3-loss", TREE, samples=400, seed=7))
    assert csv(sampled) != csv(gl.measure("k3-loss", TREE, samples=400, seed=8))
    repeated = gl.measure("k3-loss", [TREE, TREE], samples=400, seed=7)
    assert repeated.bias[0] != repeated.bias[1]  # scenarios draw independently
    assert csv(repeated[:1]) == csv(sampled)


def test_same_bytes_on_two_processes(one_process):
    assert frames(jobs=2) == one_process


def page_faults() -> int:
    """Pages that the system maps into this process while 8 MiB are taken and given back fifty times."""
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        torch.ones(2**20, dtype=torch.float64)
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


def on_each_worker(client: Any) -> list[int]:
    workers = client.scheduler_info()["workers"]
    return [client.submit(page_faults, workers=[address], pure=False).result() for address in workers]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="thresholds are those of glibc")
def test_workers_of_dask_use_memory_again(dask_cluster):
    before = on_each_worker(dask_cluster)
    with joblib.parallel_config(backend="dask"):
        gl.measure("k2-loss", [BANDIT] * 8)
    assert dask_cluster.run(lambda: parallel.keep_memory.cache_info().currsize) == dict.fromkeys(
        dask_cluster.scheduler_info()["workers"], 1
    )
    after = on_each_worker(dask_cluster)
    assert max(after) < min(before) / 5, (before, after)


def test_only_the_setting_of_dask_is_replaced(monkeypatch):
    for value in (None, "-1", "1000000"):
        monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
        if value:
            monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", value)
        monkeypatch.setattr(parallel.ctypes, "CDLL", lambda name: pytest.fail("a setting of the user's was replaced"))
        assert not parallel.keep_memory.__wrapped__()


def test_same_bytes_on_a_dask_cluster(one_process, dask_cluster):
    with joblib.parallel_config(backend="dask"):
        assert frames(jobs=1) == one_process  # the surrounding backend is used
    ran = dask_cluster.run(lambda: "gradlab.measure" in sys.modules)
    assert all(ran.values()), "the work was not done on the cluster's workers"


def test_what_travels_to_workers_can_be_pickled():
    for item in (*WORLDS, *gl.ESTIMATORS.values(), module._rows):
        pickle.loads(pickle.dumps(item))


def test_quiet_in_a_pipe(capfd):
    gl.measure("k2-loss", [TREE] * 3)
    assert capfd.readouterr() == ("", "")
