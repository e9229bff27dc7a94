"""Policies: what they accept and refuse, neighbours at a given KL, enumeration, sampling, and Gaussian quadrature."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from oracles_gaussian import mp
from scipy import special, stats

import gradlab as gl
from gradlab.policies import tabular
from gradlab.policies.gaussian import REACH, crossings, quadrature

SURE = 1e-4  # a test of frequencies that fails, fails at this significance

FAMILIES = {
    "bandit": gl.Bandit.random(vocab=5, seed=1),
    "tree": gl.Tree.random(vocab=4, length=3, seed=2),
    "tree-eos": gl.Tree.random(vocab=3, length=4, seed=3, eos=1),
    "markov": gl.Markov.random(vocab=4, length=64, seed=4),
    "markov-eos": gl.Markov.random(vocab=3, length=20, seed=5, eos=0),
    "gaussian": gl.Gaussian(0.3, 0.7),
}
SMALL = {
    "bandit": FAMILIES["bandit"],
    "tree": FAMILIES["tree"],
    "tree-eos": FAMILIES["tree-eos"],
    "markov": gl.Markov.random(vocab=3, length=4, seed=4),
    "markov-eos": gl.Markov.random(vocab=3, length=4, seed=5, eos=2),
}


def generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(20251002, spawn_key=key))


def as_tree(policy: Any) -> np.ndarray:
    """The logits of the tree that gives every response the same probability."""
    if isinstance(policy, gl.Markov):
        return oracles.markov_as_tree(policy.initial.numpy(), policy.transition.numpy(), policy.length)
    return policy.table.numpy()


def probabilities(policy: Any) -> dict[tuple[int, ...], float]:
    """Every response and its probability, by the oracle's loops."""
    logits = as_tree(policy)
    everything = oracles.responses(policy.vocab, policy.length, policy.eos)
    return {y: math.exp(oracles.log_probability(logits, y)) for y in everything}


# ── Constructors ─────────────────────────────────────────────────────────────────────────────────────────────────────

LOGITS = np.array([[0.5, -1.0, 2.0], [0.0, 1.0, -0.25], [3.0, 0.125, 1.0], [-2.0, 0.75, 0.0]])


@pytest.mark.parametrize(
    "convert",
    [
        np.array,
        np.float32,
        lambda a: a.tolist(),
        torch.tensor,
        lambda a: torch.tensor(a, dtype=torch.bfloat16),
        lambda a: torch.tensor(a, requires_grad=True),
    ],
    ids=["numpy", "float32", "list", "torch", "bfloat16", "requires_grad"],
)
def test_logits_come_as_anything_and_are_copied(convert):
    given = [convert(LOGITS), convert(LOGITS[0]), convert(LOGITS[1:])]
    tree, bandit, markov = gl.Tree(given[0]), gl.Bandit(given[1]), gl.Markov(given[1], given[2], length=7)
    for policy, expected in ((tree, LOGITS), (bandit, LOGITS[:1]), (markov, LOGITS)):
        assert policy.table.dtype == torch.float64
        assert not policy.table.requires_grad
        np.testing.assert_array_equal(policy.table.numpy(), expected)  # the numbers above are exact in every format
        np.testing.assert_array_equal(policy.parameters.numpy(), expected.ravel())
    assert (tree.length, bandit.length, markov.length) == (2, 1, 7)
    np.testing.assert_array_equal(markov.initial, LOGITS[0])
    np.testing.assert_array_equal(markov.transition, LOGITS[1:])
    if not isinstance(given[0], list):
        with torch.no_grad():
            given[0][0, 0] = 99
        assert tree.table[0, 0] == LOGITS[0, 0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: gl.Bandit(LOGITS), r"Bandit logits must have shape \[v\].*got \[4, 3\]"),
        (lambda: gl.Bandit([1.0]), "at least two tokens"),
        (lambda: gl.Bandit("abc"), "must be an array of numbers, got str"),
        (lambda: gl.Bandit([0.0, math.nan]), r"must be finite, found nan at \[1\]"),
        (lambda: gl.Bandit([-math.inf, 0.0]), r"found -inf at \[0\].*leave it out of the vocabulary"),
        (lambda: gl.Tree(LOGITS[0]), r"Tree logits must have shape \[rows, v\].*got \[3\]"),
        (lambda: gl.Tree(LOGITS[:3]), r"one per prefix; with v = 3 that is 1, 4, …, got 3"),
        (lambda: gl.Tree(np.zeros((0, 3))), "length must be a positive whole number"),
        (lambda: gl.Tree([[1.0, 2.0], [3.0]]), "must be an array of numbers"),
        (lambda: gl.Tree(np.where(LOGITS == 3, np.nan, LOGITS)), r"found nan at \[2, 0\]"),
        (lambda: gl.Tree(LOGITS, eos=3), "eos must be a token id between 0 and 2, or None, got 3"),
        (lambda: gl.Tree(LOGITS, eos=-1), "got -1"),
        (lambda: gl.Tree(LOGITS, eos=1.0), r"got 1\.0"),
        (lambda: gl.Tree(LOGITS, eos=True), "got True"),
        (lambda: gl.Tree.random(vocab=1, length=3), "vocab must be a whole number of at least 2, got 1"),
        (lambda: gl.Tree.random(vocab=3, length=0), "length must be a positive whole number, got 0"),
        (lambda: gl.Markov(LOGITS[0], LOGITS), r"transition logits must be \[3, 3\].*got \[4, 3\]"),
        (lambda: gl.Markov(LOGITS[0, :2], LOGITS[1:]), r"transition logits must be \[2, 2\].*got \[3, 3\]"),
        (lambda: gl.Markov(LOGITS, LOGITS[1:]), r"initial logits must have shape \[v\]"),
        (lambda: gl.Markov(LOGITS[0], LOGITS[1:] + math.inf), "transition logits must be finite"),
        (lambda: gl.Markov(LOGITS[0], LOGITS[1:], length=0), "length must be a positive whole number, got 0"),
        (lambda: gl.Markov(LOGITS[0], LOGITS[1:], length=2.5), r"got 2\.5"),
        (lambda: gl.Markov(LOGITS[0], LOGITS[1:], length=True), "got True"),
        (lambda: gl.Markov(LOGITS[0], LOGITS[1:], eos=3), "eos must be a token id"),
        (lambda: gl.Gaussian(math.nan, 1), "mean must be finite"),
        (lambda: gl.Gaussian(0, 0), "std must be positive and finite.*not its log.*got 0"),
        (lambda: gl.Gaussian(0, -1.5), r"got -1\.5"),
        (lambda: gl.Gaussian(0, math.inf), "got inf"),
    ],
)
def test_bad_input_is_refused_with_a_reason(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("kind", [gl.Bandit, gl.Tree, gl.Markov])
def test_random_policies_are_reproducible(kind):
    first, again, other = kind.random(seed=3), kind.random(seed=3), kind.random(seed=4)
    assert first.table.numpy().tobytes() == again.table.numpy().tobytes()
    assert (first.table - other.table).abs().min() > 0
    torch.testing.assert_close(kind.random(seed=3, scale=2.5).table, 2.5 * first.table, rtol=1e-15, atol=0)


def test_random_logits_are_standard_normal():
    # 21 844 logits: the test sees a mean off by 0.03 or a standard deviation off by 3 % (power above 0.99).
    logits = gl.Tree.random(vocab=4, length=7, seed=0).parameters.numpy()
    assert stats.kstest(logits, "norm").pvalue > SURE
    assert stats.kstest(1.06 * logits, "norm").pvalue < SURE > stats.kstest(logits + 0.03, "norm").pvalue


# ── Neighbours ───────────────────────────────────────────────────────────────────────────────────────────────────────


def kl_in_many_digits(policy: Any, reference: Any) -> float:
    """`KL(policy ‖ reference)`: every row's in 20 digits, weighted by how often a response visits it."""
    p, q = (mp.matrix(x.table.tolist()) for x in (policy, reference))
    if isinstance(policy, gl.Gaussian):
        (m, s), (m_ref, s_ref) = (p[0], p[1]), (q[0], q[1])
        return float(mp.log(s_ref / s) + (s**2 + (m - m_ref) ** 2) / (2 * s_ref**2) - mp.mpf(1) / 2)
    total = mp.mpf(0)
    for row, visits in enumerate(policy.occupancy().tolist()):
        p_row, q_row = ([x / mp.fsum(map(mp.exp, table[row, :])) for x in map(mp.exp, table[row, :])] for table in (p, q))
        total += visits * mp.fsum(a * mp.log(a / b) for a, b in zip(p_row, q_row, strict=True))
    return float(total)


@pytest.mark.parametrize("kl", [1e-6, 1e-4, 0.03, 1.0, 5.0])
@pytest.mark.parametrize("policy", FAMILIES.values(), ids=FAMILIES)
def test_perturbed_hits_the_kl(policy, kl):
    for seed in (0, 1):
        reference = policy.perturbed(kl=kl, seed=seed)
        assert kl_in_many_digits(policy, reference) == pytest.approx(kl, rel=1e-10, abs=0)
        assert float(policy.kl(reference)) == pytest.approx(kl, rel=1e-10, abs=0)


def noise_of(policy: Any, neighbour: Any) -> np.ndarray:
    """What was added to the natural parameters: logits, or the mean in units of std and log std."""
    if isinstance(policy, gl.Gaussian):
        return np.array([(neighbour.mean - policy.mean) / policy.std, math.log(neighbour.std / policy.std)])
    return (neighbour.parameters - policy.parameters).numpy()


@pytest.mark.parametrize("policy", FAMILIES.values(), ids=FAMILIES)
def test_perturbed_by_scale_is_one_direction_per_seed(policy):
    unit = noise_of(policy, policy.perturbed(scale=1.0, seed=7))
    np.testing.assert_allclose(noise_of(policy, policy.perturbed(scale=0.25, seed=7)), 0.25 * unit, rtol=1e-13, atol=1e-15)
    by_kl = noise_of(policy, policy.perturbed(kl=0.1, seed=7))
    assert by_kl @ unit == pytest.approx(np.linalg.norm(by_kl) * np.linalg.norm(unit), rel=1e-13)
    other = noise_of(policy, policy.perturbed(scale=1.0, seed=8))
    assert abs(other @ unit) < 0.95 * np.linalg.norm(other) * np.linalg.norm(unit)
    for same in (policy.perturbed(scale=0.0), policy.perturbed(kl=0.0)):
        np.testing.assert_array_equal(same.parameters, policy.parameters)


def test_perturbation_is_standard_normal():
    policy = gl.Tree.random(vocab=4, length=7, seed=0)
    assert stats.kstest(noise_of(policy, policy.perturbed(scale=0.5, seed=1)) / 0.5, "norm").pvalue > SURE


@pytest.mark.parametrize("policy", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of scale and kl"),
        ({"scale": 0.1, "kl": 0.1}, "exactly one of scale and kl"),
        ({"scale": -1.0}, "finite scale of at least 0"),
        ({"kl": -1.0}, "finite kl of at least 0"),
        ({"kl": math.nan}, "finite kl"),
        ({"scale": math.inf}, "finite scale"),
    ],
)
def test_perturbed_refuses(policy, given, message):
    with pytest.raises(ValueError, match=message):
        policy.perturbed(**given)


def test_a_kl_out_of_reach_is_refused():
    with pytest.raises(ValueError, match=r"no perturbation in the direction of seed 0 reaches a KL of 1000000.* nats"):
        FAMILIES["bandit"].perturbed(kl=1e6)


# ── Whole responses ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("policy", SMALL.values(), ids=SMALL)
def test_enumerate_lists_every_response_once(policy):
    listed = policy.enumerate()
    tokens, mask = listed.tokens, listed.mask
    listed = [tuple(row[live].tolist()) for row, live in zip(tokens, mask, strict=True)]
    expected = probabilities(policy)
    assert listed == list(expected)  # unique, complete, and in lexicographic order
    rows = policy.contexts(tokens)
    log_prob = torch.where(mask, policy.table.log_softmax(-1)[rows, tokens], 0.0).sum(-1)
    np.testing.assert_allclose(log_prob.exp(), list(expected.values()), rtol=1e-13)
    assert math.fsum(log_prob.exp().tolist()) == pytest.approx(1, abs=1e-14)
    for row, live in zip(tokens.tolist(), mask.tolist(), strict=True):
        size = sum(live)
        assert live == [t < size for t in range(policy.length)]  # live tokens come first
        assert policy.eos not in row[: size - 1]  # the end token is the last live one,
        assert size == policy.length or set(row[size - 1 :]) == {policy.eos}  # and is repeated behind it


@pytest.mark.parametrize("policy", SMALL.values(), ids=SMALL)
def test_occupancy_and_kl_against_enumeration(policy):
    weight, expected = probabilities(policy), np.zeros(len(policy.table))
    for y, p in weight.items():
        for row in policy.contexts(torch.tensor([y]))[0].tolist():
            expected[row] += p
    np.testing.assert_allclose(policy.occupancy(), expected, rtol=1e-12, atol=1e-15)
    assert float(policy.occupancy().sum()) == pytest.approx(sum(p * len(y) for y, p in weight.items()), rel=1e-12)
    reference = policy.perturbed(scale=0.8, seed=1)
    kl = oracles.objective("reverse_kl", as_tree(policy), as_tree(reference), eos=policy.eos)
    assert float(policy.kl(reference)) == pytest.approx(kl, rel=1e-12)
    assert float(policy.kl(policy)) == pytest.approx(0, abs=1e-15)


def test_kl_survives_a_reference_that_all_but_forbids_a_token():
    # Neither probability underflows, but their ratio would overflow.
    p, q = gl.Bandit([0.0, -720.0]), gl.Bandit([-720.0, 0.0])
    assert float(p.kl(q)) == pytest.approx(720, rel=1e-12)
    assert float(gl.Bandit([0.0, -5.0]).kl(q)) == pytest.approx(kl_in_many_digits(gl.Bandit([0.0, -5.0]), q), rel=1e-12)


def test_enumeration_is_refused_above_the_memory_bound(monkeypatch):
    policy = gl.Tree.random(vocab=3, length=3)
    monkeypatch.setattr(tabular, "ENUMERATION_BYTES", 27 * 3 * 3 * 8)  # n·t·v doubles
    assert policy.enumerable
    assert len(policy.enumerate()) == 27
    monkeypatch.setattr(tabular, "ENUMERATION_BYTES", 27 * 3 * 3 * 8 - 1)
    assert not policy.enumerable
    with pytest.raises(ValueError, match=r"Tree with 3 tokens and length 3 has up to 3\^3 responses.*samples=….*gl\.Markov"):
        policy.enumerate()
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"10\^64 responses.*1 GiB"):
        gl.Markov.random(vocab=10, length=64).enumerate()


# ── Sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────────

DRAWS = 200_000
DISCREPANCY = 0.03  # root of the χ²-distance Σ (q − p)²/p between the frequencies and the probabilities


def p_value(sampler: Any, policy: Any, key: int) -> float:
    """Significance of the frequencies of the sampler's responses against the policy's probabilities."""
    drawn = sampler.sample(DRAWS, generator(key))
    tokens, mask = drawn.tokens, drawn.mask
    assert set(tokens[~mask].tolist()) <= {policy.eos}  # the end token is repeated after it
    place = (policy.vocab + 1) ** np.arange(policy.length)  # one number per response, digit 0 behind its end
    counts = np.bincount(torch.where(mask, tokens + 1, 0).numpy() @ place, minlength=(policy.vocab + 1) ** policy.length)
    expected = probabilities(policy)
    found = np.array([counts[sum((1 + token) * place[t] for t, token in enumerate(y))] for y in expected])
    assert found.sum() == DRAWS  # nothing but responses
    p = np.array(list(expected.values()))
    rare = DRAWS * p < 10  # pooled, so that the statistic is χ²
    cells = [*zip(found[~rare], p[~rare], strict=True), (found[rare].sum(), p[rare].sum())]
    observed, p = np.array([cell for cell in cells if cell[1] > 0]).T
    assert special.chndtr(special.chdtri(len(p) - 1, SURE), len(p) - 1, DRAWS * DISCREPANCY**2) < 0.01  # power above 0.99
    return float(stats.chisquare(observed, DRAWS * p).pvalue)


@pytest.mark.parametrize("policy", SMALL.values(), ids=SMALL)
def test_sampled_frequencies(policy):
    """χ² test at 1e-4, with power 0.99 against frequencies that are off by 3 % (root mean squared, relative)."""
    assert p_value(policy, policy, 0) > SURE
    # A sampler that far away is caught: χ²-distance ≈ 2 KL.
    wrong = policy.perturbed(kl=DISCREPANCY**2 / 2, seed=3)
    assert p_value(wrong, policy, 0) < SURE


@pytest.mark.parametrize("policy", [FAMILIES["markov"], FAMILIES["markov-eos"]], ids=["markov", "markov-eos"])
def test_transition_frequencies_of_long_chains(policy):
    """χ² of every visited row's tokens, conditionally multinomial; sees 2 % as above (half a million tokens)."""
    drawn = policy.sample(200_000 if policy.eos is not None else 10_000, generator(1))
    tokens, mask = drawn.tokens, drawn.mask
    flat = (policy.contexts(tokens) * policy.vocab + tokens)[mask]
    counts = np.bincount(flat.numpy(), minlength=policy.table.numel()).reshape(policy.table.shape)
    used = counts.sum(-1) > 0
    expected = policy.table.softmax(-1).numpy() * counts.sum(-1, keepdims=True)
    statistic = (np.square(counts - expected)[used] / expected[used]).sum()
    assert stats.chi2.sf(statistic, used.sum() * (policy.vocab - 1)) > SURE
    assert used.sum() == len(used) - (policy.eos is not None)  # nothing is emitted after the end token
    # How often each row is visited, to five standard errors (of a visit count, at most the length apart).
    visits, n = counts.sum(-1) / len(tokens), len(tokens)
    np.testing.assert_allclose(visits, policy.occupancy(), atol=5 * policy.length / math.sqrt(n) / 4)


def test_gaussian_draws():
    # 100 000 draws: Kolmogorov–Smirnov sees a mean off by 0.02 standard deviations or a std off by 3 %.
    policy = FAMILIES["gaussian"]
    drawn = policy.sample(100_000, generator(2))
    draws, mask = drawn.tokens, drawn.mask
    assert mask.all()
    assert draws.shape == mask.shape == (100_000, 1)
    y = draws[:, 0].numpy()
    assert stats.kstest(y, "norm", (policy.mean, policy.std)).pvalue > SURE
    assert stats.kstest(y, "norm", (policy.mean + 0.02 * policy.std, policy.std)).pvalue < SURE
    assert stats.kstest(y, "norm", (policy.mean, 1.03 * policy.std)).pvalue < SURE


@pytest.mark.parametrize("policy", FAMILIES.values(), ids=FAMILIES)
def test_same_seed_same_bytes_and_global_generators_untouched(policy):
    before = np.random.get_state()[1].tobytes(), torch.get_rng_state()  # noqa: NPY002
    first, again, other = (policy.sample(500, generator(key)).tokens.numpy() for key in (3, 3, 4))
    policy.perturbed(scale=0.1)
    type(policy).random() if hasattr(policy, "random") else None
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert before[0] == np.random.get_state()[1].tobytes()  # noqa: NPY002
    assert torch.equal(before[1], torch.get_rng_state())


# ── Quadrature ───────────────────────────────────────────────────────────────────────────────────────────────────────

NORMALS = [gl.Gaussian(0.0, 1.0), gl.Gaussian(-2.5, 0.3), gl.Gaussian(40.0, 6.0)]


def expectation(function: Any, policy: gl.Gaussian, cuts: Any = (), others: Any = ()) -> float:
    nodes, widths = quadrature([policy, *others], cuts)
    z = (nodes.numpy() - policy.mean) / policy.std
    density = np.exp(-0.5 * z * z) / (policy.std * math.sqrt(2 * math.pi))
    return float(widths.numpy() @ (density * function(z)))


@pytest.mark.parametrize("policy", NORMALS)
@pytest.mark.parametrize("others", [(), (gl.Gaussian(1.0, 0.01), gl.Gaussian(0.0, 50.0))], ids=["alone", "with others"])
def test_quadrature_of_polynomials(policy, others):
    for k in range(0, 21, 2):
        moment = math.prod(range(1, k, 2))  # E z^k = (k − 1)!!
        assert expectation(lambda z, k=k: z**k, policy, others=others) == pytest.approx(moment, rel=1e-12)
        assert expectation(lambda z, k=k: z ** (k + 1), policy, others=others) == pytest.approx(0, abs=1e-11 * moment * (k + 2))


@pytest.mark.parametrize("policy", NORMALS)
@pytest.mark.parametrize("at", [-1.7, 0.0, 0.9137])
def test_quadrature_of_kinks_and_jumps(policy, at):
    kink = 2 * stats.norm.pdf(at) + at * (2 * stats.norm.cdf(at) - 1)  # E|z − at|
    jump = stats.norm.sf(at)  # P(z > at)
    cut = [policy.mean + at * policy.std]
    assert expectation(lambda z: abs(z - at), policy, cut) == pytest.approx(kink, rel=1e-12)
    assert expectation(lambda z: z > at, policy, cut) == pytest.approx(jump, rel=1e-12)
    # Panels that do not know of the jump miss it by far more than 1e-10 (unless one happens to end there).
    if at not in (0.0,):
        assert abs(expectation(lambda z: z > at, policy) / jump - 1) > 1e-5


def test_crossings_are_where_the_log_ratio_takes_a_level():
    def log_ratio(x: float, p: gl.Gaussian, q: gl.Gaussian) -> float:
        return float(stats.norm.logpdf(x, p.mean, p.std) - stats.norm.logpdf(x, q.mean, q.std))

    grid = np.linspace(-60, 60, 120_001)
    for p, q in itertools.permutations([*NORMALS[:2], gl.Gaussian(0.5, 1.0), gl.Gaussian(0.0, 1.2)], 2):
        for level in (-3.0, -0.2, 0.0, 0.4, 2.0):
            roots = crossings(p, q, level)
            for x in roots:
                assert log_ratio(x, p, q) == pytest.approx(level, abs=1e-10)
            curve = stats.norm.logpdf(grid, p.mean, p.std) - stats.norm.logpdf(grid, q.mean, q.std) - level
            assert len(set(roots)) == np.count_nonzero(np.diff(curve > 0))
    assert crossings(NORMALS[0], NORMALS[0], 0.5) == []


E = gl.Estimator
ESTIMATORS = {
    "k2": E("k2"),
    "abs": E("abs"),
    "k3 clamped": E("k3", clamp_log_ratio=0.7, clamp_value=1.0),
    "k3 reward": E("k3", "reward"),
    "k1 reward clipped": E("k1", "reward", "to_go", weight="token", clip=0.2, baseline="kl"),
    "k3 truncated": E("k3", weight="token", differentiate_weight=True, truncate=1.5),
    "k3 both truncated": E("k3", "loss+reward", weight="sequence", truncate=0.8),
    "k3-plus": E("k3", "straight_through", weight="token"),
    "mse sampled": E("mse_sampled"),
    "full": E("full", "loss+reward", weight="prefix"),
}
ON, OFF = ((0.0, 1.0), (0.5, 0.9), None), ((0.2, 0.8), (-0.4, 1.0), (0.5, 1.1))


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_gaussian_moments(estimator):
    where = ON if estimator.weight == "none" else OFF
    policy, reference, behaviour = where
    scenario = gl.Scenario(gl.Gaussian(*policy), gl.Gaussian(*reference), gl.Gaussian(*behaviour) if behaviour else None)
    found, (mean, trace) = gl.exact.moments(estimator, scenario), oracles.gaussian_moments(estimator, *where)
    np.testing.assert_allclose(found.mean, mean, rtol=0, atol=1e-10 * np.linalg.norm(mean))
    assert found.trace_cov == pytest.approx(trace, rel=1e-10, abs=1e-14 * float(mean @ mean))
    assert found.method == "quadrature"


def variance(estimator: gl.Estimator, reference: float, behaviour: float | None = None, shift: float = 0.3) -> float:
    """Trace of the covariance for π = N(0, 1), with the variances of the other two."""
    mu = None if behaviour is None else gl.Gaussian(-shift / 2, math.sqrt(behaviour))
    return gl.exact.moments(estimator, gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(shift, math.sqrt(reference)), mu)).trace_cov


@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("estimator", "edge", "diverges_above", "at"),
    [
        # E_π[(ref/π)² …] exists iff σ_ref² < 2 σ_π²;  E_π[(π/ref)² …] iff σ_ref² > ⅔ σ_π²;  E_μ[(π/μ)² …] iff σ_μ² > ½ σ_π².
        (E("k3"), 2.0, True, lambda e, x, d: variance(e, x, shift=d)),
        (E("k3", "reward"), 2.0, True, lambda e, x, d: variance(e, x, shift=d)),
        (E("k3_swapped"), 2 / 3, False, lambda e, x, d: variance(e, x, shift=d)),
        (E("k2", weight="token"), 0.5, False, lambda e, x, d: variance(e, 0.9, x, shift=d)),
        (E("k1", "reward", weight="sequence"), 0.5, False, lambda e, x, d: variance(e, 1.3, x, shift=d)),
    ],
    ids=["k3", "k3 reward", "k3 swapped", "ρ k2", "ρ k1 reward"],
)
def test_variance_is_infinite_where_analysis_says_so(estimator, edge, diverges_above, at, shift):
    for ratio in (0.8, 0.9, 0.98, 0.99, 0.995, 0.999, 1.001, 1.005, 1.01, 1.02, 1.1, 1.15):
        factor = ratio if diverges_above else 1 / ratio
        try:
            found = at(estimator, factor * edge, shift)
        except ValueError as error:  # where the integrand does not fit the reach it declines, but it is never wrong
            declined = "too close to where the moment stops existing" in str(error)
            assert declined and (0.8 if shift < 1 else 0.7) < ratio < 1.002, f"{error} at {factor} of the edge"  # noqa: PT017, PT018
        else:
            assert math.isinf(found) == (ratio > 1), f"{found} at {factor} of the edge"


def test_bounded_weights_keep_the_variance_finite():
    for behaviour in (0.6, 0.4, 0.1):
        assert variance(E("k2", weight="token", truncate=2.0), 0.9, behaviour) < 10
    assert math.isinf(variance(E("k2", weight="token"), 0.9, 0.4))


@pytest.mark.parametrize("width", [6.0, 10.0, 50.0, 1e4])
def test_a_reference_too_wide_for_the_quadrature_is_refused(width):
    scenario = gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(0, width))
    with pytest.raises(ValueError, match=f"{REACH:g} standard deviations of the sampler"):
        gl.exact.moments(E("k3"), scenario)  # E[1 − ref/π] is a moment of ref, of which only ±37 σ_π are seen
    mean = gl.exact.moments(E("k2"), scenario).mean  # E[ℓ · score] is that of a polynomial, and fits
    np.testing.assert_allclose(mean, [0, 1 / width**2 - 1], rtol=1e-10, atol=1e-12)
