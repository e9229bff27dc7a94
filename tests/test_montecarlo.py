"""Sampled moments: unbiased, covered by their intervals, reproducible, streamed in bounded memory.

Statistical tests fail at a significance of about 1e-4 each (z above 4, or p below `SURE`) and say what they can see.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from test_backprop import network
from worlds import assert_same, scenario

import gradlab as gl
from gradlab import Rollout, intervals
from gradlab.moments import gradients
from gradlab.questions import log_ratios
from gradlab.solvers import markov, montecarlo

SURE = 1e-4
E = gl.Estimator
CHAIN = gl.Markov.random(vocab=3, length=3, seed=0, eos=0)
CHAIN_WORLD = gl.Scenario(CHAIN, CHAIN.perturbed(kl=0.3, seed=1), CHAIN.perturbed(kl=0.1, seed=2), name="chain")
WORLDS = {
    "bandit": scenario("bandit"),
    "tree": scenario("tree", off_policy=True),
    "eos": scenario("eos"),
    "gaussian": scenario("gaussian", off_policy=True),
    "chain": CHAIN_WORLD,
}
GROUPED = {
    "loo": gl.ESTIMATORS["k1-reward-loo"],
    "group": gl.ESTIMATORS["k1-reward-group"],
    "loo of 2": E("k2", "reward", "sequence", baseline="leave_one_out", group=2, normalise="mean"),
}
SINGLE = {name: e for name, e in gl.ESTIMATORS.items() if not e.grouped}


@pytest.fixture
def drawn(monkeypatch):
    """Draw responses one by one even where they could be counted."""
    monkeypatch.setattr(montecarlo, "COUNTED_RESPONSES", 0)


def half_k2(rollout: Rollout) -> torch.Tensor:
    """A user's function: a quarter of the squared log-ratio."""
    return 0.25 * rollout.log_ratio.square().sum(-1)


# ── Agreement with exact moments ─────────────────────────────────────────────────────────────────────────────────────


def z_scores(found: Any, exact: Any) -> tuple[np.ndarray, float]:
    """Deviation of the mean (in every coordinate) and of the trace from exact ones, in standard errors over batches."""
    batches = len(found.batch_means)
    error = found.batch_means.std(0).numpy() / math.sqrt(batches)
    off = (found.mean - exact.mean).numpy()
    assert np.abs(off[error == 0]).max(initial=0) < 1e-12  # coordinates that nothing pulls
    trace_error = float(found.batch_traces.std()) / math.sqrt(batches)
    off_trace = found.trace_cov - exact.trace_cov
    constant = max(found.trace_cov, exact.trace_cov) < 1e-12 * float(exact.mean.square().sum())  # no noise at all
    return off[error > 0] / error[error > 0], 0.0 if constant else off_trace / trace_error


@pytest.mark.parametrize("path", ["counted", "drawn"])
@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_sampled_moments_agree_with_exact_ones(world, path, request):
    """z-tests at 4.5 of every coordinate and trace of the catalogue; they see 4 % of a gradient as noisy as itself."""
    if path == "drawn":
        request.getfixturevalue("drawn")
    losses = [*SINGLE.values(), E("k1", "reward", "to_go", normalise="token_mean")]
    if world is CHAIN_WORLD:
        losses = [loss for loss in losses if markov.decomposes(loss)]
    sampled = montecarlo.moments(losses, world, samples=12_800, seed=1)
    for loss, found, exact in zip(losses, sampled, gl.exact.moments(losses, world), strict=True):
        assert found.samples == 12_800
        assert found.method == ("drawn" if path == "drawn" or world is WORLDS["gaussian"] else "counted")
        assert found.batch_means.shape == (64, len(exact.mean))
        assert_same(found.batch_means.mean(0), found.mean, float(found.batch_means.norm()), 1e-12)
        of_mean, of_trace = z_scores(found, exact)
        assert np.abs(of_mean).max(initial=0) < 4.5, loss.name
        assert abs(of_trace) < 4.5, loss.name


@pytest.mark.parametrize("world", [WORLDS["bandit"], WORLDS["eos"], CHAIN_WORLD], ids=["bandit", "eos", "chain"])
def test_grouped_estimators_are_drawn_in_groups(world):
    """Mean and trace against the closed form, z below 4.5; they see 15 % of the mean and 10 % of the trace."""
    losses = list(GROUPED.values())
    sampled = montecarlo.moments(losses, world, samples=25_600, seed=2)
    for loss, found, exact in zip(losses, sampled, gl.exact.moments(losses, world), strict=True):
        assert found.method == "drawn"
        of_mean, of_trace = z_scores(found, exact)
        assert np.abs(of_mean).max() < 4.5, loss.name
        assert abs(of_trace) < 4.5, loss.name
        resolution = 4.5 * math.sqrt(exact.trace_cov / 25_600)
        assert resolution < 0.15 * float(exact.mean.norm()), "not enough samples to say anything"
        assert 4.5 * float(found.batch_traces.std()) / 8 < 0.1 * exact.trace_cov
    loo, group = sampled[:2]
    assert_same(group.mean, 0.75 * loo.mean, tolerance=1e-12)  # the same draws, shrunk by 1 − 1/4
    assert group.trace_cov == pytest.approx(0.75**2 * loo.trace_cov, rel=1e-12)


# ── Error bars through the whole pipeline ────────────────────────────────────────────────────────────────────────────

REPLICATES = 200


def lowest_hits(level: float = 0.95) -> int:
    return int(stats.binom.ppf(SURE, REPLICATES, level))


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, str], tuple[list[Any], Any, torch.Tensor]]:
    """Per world and estimator: moments of one sampled run after the other, exact moments, and the target's gradient."""
    names = ["k3-loss", "k1-reward-to-go"]  # biased, unbiased
    losses, found = [gl.ESTIMATORS[name] for name in names], {}
    with pytest.MonkeyPatch.context() as patch:
        for world, batches, label in ((scenario("tree", seed=3), 16, "tree"), (CHAIN_WORLD.on_policy(), 16, "chain")):
            patch.setattr(montecarlo, "BATCHES", batches)
            patch.setattr(montecarlo, "COUNTED_RESPONSES", 0 if label == "chain" else 2**15)
            sampled = [montecarlo.moments(losses, world, 32 * batches, seed=5, stream=(run,)) for run in range(REPLICATES)]
            exact = gl.exact.moments(losses, world)
            for e, name in enumerate(names):
                found[label, name] = [run[e] for run in sampled], exact[e], gl.exact.gradient("reverse_kl", world)
            assert {run[0].method for run in sampled} == {"drawn" if label == "chain" else "counted"}
    return found


@pytest.mark.parametrize("statistic", ["bias", "cosine", "noise"])
@pytest.mark.parametrize("estimator", ["k3-loss", "k1-reward-to-go"])
@pytest.mark.parametrize("world", ["tree", "chain"])
def test_intervals_cover(runs, world, estimator, statistic):
    """Binomial test of 95 % coverage at 1e-4; it sees a coverage of 0.83 with power 0.95."""
    assert stats.binom.cdf(lowest_hits() - 1, REPLICATES, 0.83) > 0.95
    sampled, exact, target = runs[world, estimator]
    mean, size = exact.mean, float(target.norm())
    truth = {
        "bias": float((mean - target).norm()) / size,
        "cosine": float(mean @ target) / float(mean.norm()) / size,
        "noise": exact.trace_cov / size**2,
    }[statistic]
    means = torch.stack([run.batch_means for run in sampled]).numpy()
    traces = torch.stack([run.batch_traces for run in sampled]).numpy()
    found = {
        "bias": lambda: intervals.bias(means, target.numpy()),
        "cosine": lambda: intervals.cosine(means, target.numpy()),
        "noise": lambda: intervals.noise(means, traces, target.numpy()),
    }[statistic]()

    def hits(value: float) -> int:
        slack = 1e-12 * max(value, 1)  # a bias of exactly 0 is computed to rounding
        return np.count_nonzero((found.low <= value + slack) & (value - slack <= found.high))

    assert hits(truth) >= lowest_hits()
    # They are short enough to be wrong about something.
    assert hits({"bias": truth + 0.5, "cosine": truth - 0.4, "noise": 1.5 * truth}[statistic]) < REPLICATES / 2


@pytest.mark.parametrize("path", ["counted", "drawn", "grouped"])
def test_squared_bias_and_trace_are_unbiased(path, request):
    """Mean over 200 runs within 4 standard errors of the truth; the plug-in ‖mean − ∇‖² misses by more than twice that."""
    world, runs, samples = scenario("tree", off_policy=True), 200, 64
    if path == "drawn":
        request.getfixturevalue("drawn")
    loss = GROUPED["loo"] if path == "grouped" else gl.ESTIMATORS["k2-loss"]
    exact, target = gl.exact.moments(loss, world), gl.exact.gradient("reverse_kl", world)
    truth = float((exact.mean - target).square().sum())
    found = [montecarlo.moments(loss, world, samples, seed=7, stream=(run,)) for run in range(runs)]
    plug_in = np.array([float((m.mean - target).square().sum()) for m in found])
    traces = np.array([m.trace_cov for m in found])
    squared = plug_in - traces / samples

    def off(values: np.ndarray, truth: float) -> float:
        return (values.mean() - truth) / (values.std(ddof=1) / math.sqrt(runs))

    assert abs(off(squared, truth)) < 4
    assert abs(off(traces, exact.trace_cov)) < 4
    assert off(plug_in, truth) > 8
    assert off(traces * (samples - 1) / samples, exact.trace_cov) < off(traces, exact.trace_cov)
    # and `bias` in the frame is the root of just that, floored at 0
    row = gl.measure(loss, world, samples=samples, seed=7).iloc[0]
    assert row.bias == pytest.approx(math.sqrt(max(squared[0], 0)) / float(target.norm()), rel=1e-10)


def test_counted_and_drawn_runs_have_one_distribution(monkeypatch):
    """Two-sample Kolmogorov–Smirnov over 100 runs each: p above 1e-4; twice the samples are told apart."""
    world, loss, runs = scenario("eos", off_policy=True), gl.ESTIMATORS["k3-loss"], 100
    target = gl.exact.gradient("reverse_kl", world)

    def statistics(samples: int, counted: bool) -> np.ndarray:
        monkeypatch.setattr(montecarlo, "COUNTED_RESPONSES", 2**15 if counted else 0)
        found = [montecarlo.moments(loss, world, samples, seed=8 + counted, stream=(samples, run)) for run in range(runs)]
        assert {m.method for m in found} == {"counted" if counted else "drawn"}
        exact = gl.exact.moments(loss, world).mean
        return np.array([[float((m.mean - exact).norm()), float(m.mean @ target), m.trace_cov] for m in found]).T

    one_by_one, by_counts, more = statistics(32, False), statistics(32, True), statistics(64, True)
    for a, b in zip(one_by_one, by_counts, strict=True):
        assert stats.ks_2samp(a, b).pvalue > SURE
    assert stats.ks_2samp(one_by_one[0], more[0]).pvalue < SURE


# ── Common random numbers and reproducibility ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["counted", "drawn"])
def test_common_random_numbers(path, request):
    if path == "drawn":
        request.getfixturevalue("drawn")
    for world in (WORLDS["eos"], CHAIN_WORLD.on_policy()):
        k2, k1, user, other = montecarlo.moments(
            [gl.ESTIMATORS["k2-loss"], gl.ESTIMATORS["k1-reward"], half_k2, gl.ESTIMATORS["k3-loss"]], world, 1024, seed=3
        )
        for same, share in ((k1, 1.0), (user, 0.5)):  # k2-loss is k1-reward sample by sample
            assert_same(same.batch_means, share * k2.batch_means, tolerance=1e-12)
            assert_same(same.batch_traces, share**2 * k2.batch_traces, tolerance=1e-12)
        assert float((other.mean - k2.mean).norm()) > 0.05 * float(k2.mean.norm())
        alone = montecarlo.moments(gl.ESTIMATORS["k2-loss"], world, 1024, seed=3)  # the company changes nothing
        assert_same(alone.batch_means, k2.batch_means, tolerance=1e-14)


@pytest.mark.parametrize("loss", [gl.ESTIMATORS["k2-loss"], GROUPED["loo"], half_k2], ids=["single", "grouped", "function"])
@pytest.mark.parametrize("world", [WORLDS["tree"], WORLDS["gaussian"], CHAIN_WORLD], ids=["tree", "gaussian", "chain"])
def test_same_seed_same_bytes(world, loss):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002

    def run(**key: Any) -> bytes:
        found = montecarlo.moments(loss, world, 256, **key)
        tensors = (found.mean, torch.tensor(found.trace_cov), found.batch_means, found.batch_traces)
        return b"".join(tensor.numpy().tobytes() for tensor in tensors)

    assert run(seed=1) == run(seed=1)
    assert len({run(seed=1), run(seed=2), run(seed=1, stream=(0,)), run(seed=1, stream=(1,))}) == 4
    assert torch.equal(torch_state, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002


# ── Memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("loss", "unit"), [(gl.ESTIMATORS["k2-loss"], 1), (GROUPED["loo"], 4)], ids=["single", "grouped"])
@pytest.mark.parametrize(("vocab", "length"), [(3, 16), (6, 3)], ids=["long", "wide"])
def test_memory_does_not_grow_with_samples(monkeypatch, vocab, length, loss, unit):
    """However many are drawn, no block has more responses than `CHUNK` doubles hold, and groups stay whole."""
    chain = gl.Markov.random(vocab=vocab, length=length, seed=0)
    monkeypatch.setattr(montecarlo, "DRAWN", 2**11)
    monkeypatch.setattr(montecarlo, "CHUNK", 2**15)
    monkeypatch.setattr(montecarlo, "BATCHES", 8)
    monkeypatch.setattr(montecarlo, "COUNTED_RESPONSES", 0)
    sizes: list[int] = []
    original = Rollout.made

    def recorded(world: gl.Scenario, variates: torch.Tensor, expected_length: float) -> Rollout:
        sizes.append(len(variates))
        return original(world, variates, expected_length)

    monkeypatch.setattr(Rollout, "made", recorded)
    for samples in (128, 1600, 3200):
        sizes.clear()
        montecarlo.moments(loss, gl.Scenario(chain, chain.perturbed(kl=0.1)), samples)
        assert sum(sizes) == samples
        assert all(size % unit == 0 for size in sizes)
        assert max(sizes) * 28 * length <= 2**15


CATALOGUE = [*gl.ESTIMATORS.values(), half_k2, E("k1", "reward", "to_go", normalise="token_mean")]
WIDE = gl.Tree.random(vocab=7, length=3, seed=4)


def dense(loss: Any, world: gl.Scenario, samples: int, batches: int) -> list[torch.Tensor]:
    """Average gradients of the units of every batch as whole tables, `[units, p]`: the run's own draws, the slow way."""
    group = getattr(loss, "group", None) or 1
    parts = []
    for b, share in enumerate(len(part) for part in np.array_split(np.empty(samples // group), batches)):
        found = gradients([loss], Rollout.from_sampler(world, group * share, montecarlo._rng(6, (b,))))
        parts.append(found.tables(0).flatten(1).view(-1, group, world.policy.table.numel()).mean(1))
    return parts


@pytest.mark.parametrize(
    "world",
    [
        WORLDS["gaussian"],
        CHAIN_WORLD,
        gl.Scenario(WIDE, WIDE.perturbed(kl=0.3, seed=1), WIDE.perturbed(kl=0.1, seed=2)),
    ],
    ids=["gaussian", "chain", "wide"],
)
def test_sums_are_those_of_whole_tables(monkeypatch, drawn, world):
    """The whole catalogue and a user's function: means and traces, of the run and of its batches, from dense gradients."""
    samples, batches = 648, 10  # batches of 64 or 65 responses, 16 or 17 groups
    monkeypatch.setattr(montecarlo, "BATCHES", batches)
    monkeypatch.setattr(montecarlo, "CHUNK", 2**16)  # several blocks
    with torch.no_grad():
        for loss, found in zip(CATALOGUE, montecarlo.moments(CATALOGUE, world, samples, seed=6), strict=True):
            parts, group = dense(loss, world, samples, batches), getattr(loss, "group", None) or 1
            units = torch.cat(parts)
            scale = float(units.square().sum(-1).mean()) ** 0.5
            assert_same(found.mean, units.mean(0), scale, 1e-12)
            noise = group * float(units.var(0).sum())
            assert found.trace_cov == pytest.approx(noise, rel=1e-11, abs=1e-13 * scale**2), loss
            for b, part in enumerate(parts):
                assert_same(found.batch_means[b], part.mean(0), scale, 1e-12)
                noise = group * float(part.var(0).sum())
                assert float(found.batch_traces[b]) == pytest.approx(noise, rel=1e-11, abs=1e-13 * scale**2), loss


def test_sums_keep_their_digits_in_a_corner(drawn):
    """Within 1e-9 of a corner the likeliest token pulls its own logit by 1e-9 of the others: rows still add up to 0."""
    corner, other = (gl.Markov([size, 0, 0], size * np.eye(3), length=4) for size in (21.0, 20.0))
    for name in ("k1-loss", "k2-loss", "k3-loss", "k1-reward-to-go", "full-loss"):
        found = montecarlo.moments(gl.ESTIMATORS[name], gl.Scenario(corner, other), 256)
        rows = found.batch_means.view(-1, 4, 3)
        assert float(rows.norm()) > 0
        assert float(rows.sum(-1).abs().max()) < 1e-14 * float(rows.abs().max())


def test_counted_draws_have_no_limit():
    """A trillion draws are counted at once, and the mean is as close to the exact one as they say."""
    world, loss = scenario("tree"), gl.ESTIMATORS["k2-loss"]
    found, exact = montecarlo.moments(loss, world, 10**12), gl.exact.moments(loss, world)
    off = float((found.mean - exact.mean).norm())
    assert 0 < off < 4.5 * math.sqrt(exact.trace_cov / 10**12)
    assert gl.components(loss, world, samples=10**12)["samples"].eq(10**12).all()
    with pytest.raises(ValueError, match="counts exactly"):
        montecarlo.moments(loss, world, 2**53 + 1)


LANGUAGE = gl.LanguageModel(network(0, vocab=3), [(0,)], 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n: montecarlo.moments(GROUPED["loo"], scenario("tree"), n), "one by one"),
        (lambda n: gl.measure("k2-loss", gl.Scenario(gl.Gaussian(0.0, 1.0), gl.Gaussian(0.1, 1.0)), samples=n), "one by one"),
        (lambda n: gl.measure(["k2-loss", GROUPED["loo"]], [scenario("bandit"), scenario("tree")], samples=n), "one by one"),
        (lambda n: gl.measure("k2-loss", gl.Scenario(LANGUAGE, LANGUAGE), samples=n), "one by one"),
        (lambda n: Rollout.from_sampler(scenario("tree"), n, np.random.default_rng()), "held at once"),
        (lambda n: Rollout.from_sampler(gl.Scenario(LANGUAGE, LANGUAGE), n, np.random.default_rng()), "held at once"),
        (lambda n: log_ratios.masses(gl.Scenario(LANGUAGE, LANGUAGE), [(-1.0, 1.0)], n), "held at once"),
        (lambda n: gl.components.values("k2", scenario("tree"), samples=n), "held at once"),
        (lambda n: gl.Gaussian(0.0, 1.0).sample(n, np.random.default_rng()), "held at once"),
    ],
)
def test_more_draws_than_can_be_made_are_refused_at_once(call, message):
    started = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        call(10**12)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("losses", [[gl.ESTIMATORS["k2-loss"], half_k2], [GROUPED["loo"]]], ids=["single", "grouped"])
def test_blocks_add_up(monkeypatch, drawn, losses):
    """Served the same responses in larger or smaller blocks, the run gives the same result: their sample moments."""
    pool = CHAIN.variates(2048, np.random.default_rng(0))
    monkeypatch.setattr(montecarlo, "BATCHES", 8)
    found = []
    for drawn_at_once, block in ((2**30, 2**30), (2**9, 2**15), (2**7, 2**11)):
        served = 0

        def serve(policy: Any, n: int, rng: np.random.Generator) -> torch.Tensor:
            nonlocal served
            served += n
            return pool[served - n : served]

        monkeypatch.setattr(gl.Markov, "variates", serve)
        monkeypatch.setattr(montecarlo, "DRAWN", drawn_at_once)
        monkeypatch.setattr(montecarlo, "CHUNK", block)
        found.append(montecarlo.moments(losses, CHAIN_WORLD.on_policy(), 2048))
    with torch.no_grad():
        served = 0
        everything = gradients(losses, Rollout.from_sampler(CHAIN_WORLD.on_policy(), 2048, np.random.default_rng()))
    for e, (loss, moments) in enumerate(zip(losses, found[0], strict=True)):
        group = getattr(loss, "group", None) or 1
        units = everything.tables(e).flatten(1).view(-1, group, CHAIN.table.numel()).mean(1)
        assert_same(moments.mean, units.mean(0), tolerance=1e-12)
        assert moments.trace_cov == pytest.approx(group * float(units.var(0, correction=1).sum()), rel=1e-12)
        for batch, part in enumerate(units.tensor_split(8)):
            assert_same(moments.batch_means[batch], part.mean(0), tolerance=1e-12)
            assert float(moments.batch_traces[batch]) == pytest.approx(group * float(part.var(0).sum()), rel=1e-12)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_same(b.batch_means, a.batch_means, tolerance=1e-13)
            assert_same(b.batch_traces, a.batch_traces, tolerance=1e-13)
            assert b.trace_cov == pytest.approx(a.trace_cov, rel=1e-13)


# ── Replicates ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_replicates_have_the_mean_and_covariance_of_a_batch():
    """6000 runs of 30 samples; z below 4.5 in every entry: a covariance a tenth too large is seen."""
    world, loss, runs = scenario("tree", off_policy=True), gl.ESTIMATORS["k2-loss"], 6000
    found = montecarlo.replicates(loss, world, samples=30, replicates=runs, seed=4).numpy()
    mean, covariance = gl.exact.moments(loss, world).mean.numpy(), gl.exact.covariance(loss, world).numpy() / 30
    assert found.shape == (runs, len(mean))
    assert np.abs((found.mean(0) - mean) / np.sqrt(np.diag(covariance) / runs)).max() < 4.5
    products = np.einsum("ri,rj->rij", found - mean, found - mean)
    error = products.std(0) / math.sqrt(runs)
    assert np.abs((products.mean(0) - covariance) / error).max() < 4.5
    assert np.abs((products.mean(0) - 1.1 * covariance) / error).max() > 4.5
    again = montecarlo.replicates(loss, world, samples=30, replicates=3, seed=4).numpy()
    other = montecarlo.replicates(loss, world, samples=30, replicates=3, seed=5).numpy()
    assert again.tobytes() == found[:3].tobytes() != other.tobytes()


@pytest.mark.parametrize(
    ("loss", "world", "given", "message"),
    [
        (GROUPED["loo"], WORLDS["tree"], {}, "must treat responses one by one"),
        (gl.ESTIMATORS["k2-loss"], WORLDS["gaussian"], {}, "would need a list of at most 32768 responses"),
        (gl.ESTIMATORS["k2-loss"], gl.Scenario(*[gl.Markov.random(length=64)] * 2), {}, "would need a list"),
        (gl.ESTIMATORS["k2-loss"], WORLDS["tree"], {"samples": 0}, "samples must be a positive whole number, got 0"),
        (gl.ESTIMATORS["k2-loss"], WORLDS["tree"], {"replicates": 0}, "replicates must be a positive whole number, got 0"),
        (gl.ESTIMATORS["k2-loss"], WORLDS["tree"], {"replicates": 2.0}, r"replicates must .* got 2\.0"),
    ],
)
def test_replicates_refuses(loss, world, given, message):
    with pytest.raises(ValueError, match=message):
        montecarlo.replicates(loss, world, **{"samples": 10, "replicates": 10} | given)


# ── How many samples ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("samples", [0, -1, 1.5, 100.0, True, "100", math.nan])
@pytest.mark.parametrize("run", [montecarlo.moments, lambda *a, **k: gl.measure(*a, **k)], ids=["moments", "measure"])
def test_bad_samples_are_refused(run, samples):
    with pytest.raises(ValueError, match="samples must be a positive whole number, got "):
        run(gl.ESTIMATORS["k2-loss"], WORLDS["tree"], samples=samples)


def test_samples_come_in_whole_groups():
    for losses, unit in (([GROUPED["loo"]], 4), ([GROUPED["loo of 2"]], 2), (list(GROUPED.values()), 4)):
        montecarlo.moments(losses, WORLDS["tree"], samples=8 * unit)
        with pytest.raises(ValueError, match=f"multiple of the group size {unit} of the estimators, got {8 * unit + 1}"):
            montecarlo.moments(losses, WORLDS["tree"], samples=8 * unit + 1)
    assert montecarlo.moments(gl.ESTIMATORS["k2-loss"], WORLDS["tree"], samples=np.int64(33)).samples == 33


@pytest.mark.parametrize("path", ["counted", "drawn"])
def test_few_samples_give_open_intervals(path, request):
    """Intervals are in order around their estimate for any number of samples, and open where there is nothing to go by."""
    if path == "drawn":
        request.getfixturevalue("drawn")
    worlds = [WORLDS["bandit"], gl.Scenario(gl.Bandit([0, -4]), gl.Bandit([0, -3]))]
    for samples in [*range(1, 21), 130]:
        frame = gl.measure(["k1-loss", "k3-loss", "full-both"], worlds, samples=samples, seed=samples)
        for statistic, widest in (("bias", (0, math.inf)), ("cosine", (-1, 1)), ("noise", (0, math.inf))):
            low, estimate, high = (frame[f"{statistic}{end}"].to_numpy() for end in ("_low", "", "_high"))
            assert (widest[0] <= low).all(), statistic
            assert (low <= high).all(), statistic
            assert (high <= widest[1]).all(), statistic
            if samples < intervals.MINIMUM_BATCHES:
                assert (low == widest[0]).all(), statistic
                assert (high == widest[1]).all(), statistic
            known = ~np.isnan(estimate)
            assert ((low <= estimate + 1e-9) & (estimate <= high + 1e-9))[known].all(), (statistic, samples)
            assert known.all() or samples == 1 or statistic == "cosine"
        if samples == 1:
            assert frame[["bias", "noise", "trace_cov"]].isna().all(axis=None)  # one sample says nothing about its spread
    grouped = gl.measure(GROUPED, WORLDS["eos"], samples=4)
    assert (grouped.bias_high == math.inf).all()


@pytest.mark.parametrize(
    "policy",
    [
        gl.Tree.random(vocab=6, length=6, seed=0),
        gl.Tree.random(vocab=6, length=6, seed=0, eos=3),
        gl.Tree.random(vocab=6, length=6, seed=0, scale=8.0),
        gl.Bandit.random(vocab=40_000, seed=0),
        gl.Bandit.random(vocab=40_000, seed=0, scale=8.0),
    ],
    ids=["tree", "eos", "sharp tree", "bandit", "sharp bandit"],
)
def test_on_wide_tables_intervals_are_those_of_the_whole_batch_means(policy):
    scenario = gl.Scenario(policy, policy.perturbed(scale=0.3, seed=1), policy.perturbed(scale=0.1, seed=2))
    names = ["k2-loss", "k1-reward-to-go", "k3-loss-sequence", "full-both-prefix", "mse-loss"]
    losses = [gl.ESTIMATORS[name] for name in names]
    if policy.length == 1:  # where a step's whole distribution says all, a weight is what varies
        losses[3:] = [E("full", weight="sequence"), E("full", "loss+reward", "return", weight="sequence")]
    runs = gl.montecarlo.moments(losses, scenario, samples=2_000)
    assert all(run.batches.scattered for run in runs)
    truth = gl.exact.gradient("reverse_kl", scenario).numpy()
    wide = intervals.Scattered.sums([run.batches for run in runs])
    whole = intervals.Batches.of(torch.stack([run.batch_means for run in runs]).numpy()[:, None])
    size = np.trace(whole.gram, axis1=-2, axis2=-1)[..., None, None]
    assert np.abs(wide.mean - whole.mean).max() <= 1e-12 * np.abs(whole.mean).max()
    assert (np.abs(wide.gram - whole.gram) <= 1e-12 * size).all()
    targets = truth[None]
    for given, dense in (
        (intervals.bias(wide, targets), intervals.bias(whole, targets)),
        (intervals.cosine(wide, targets), intervals.cosine(whole, targets)),
        (intervals.noise(wide, None, targets), intervals.noise(whole, None, targets)),
    ):
        for end in ("estimate", "low", "high"):
            np.testing.assert_allclose(getattr(given, end), getattr(dense, end), rtol=1e-10, atol=1e-12)
