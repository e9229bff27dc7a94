"""The oracles against math.md: its published numbers (every printed digit), its identities, and finite differences."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
import torch
from oracles_gaussian import gaussian_gradient
from scipy.integrate import quad

torch.set_num_threads(1)

DEFAULTS = {
    "placement": "loss",
    "credit": "token",
    "weight": "none",
    "differentiate_weight": False,
    "truncate": None,
    "clip": None,
    "normalise": "sum",
    "clamp_log_ratio": None,
    "clamp_value": None,
    "gradient_kernel": None,
    "baseline": None,
    "group": None,
}


def estimator(kernel, placement="loss", credit="token", **more):
    assert set(more) <= set(DEFAULTS)
    return SimpleNamespace(kernel=kernel, **{**DEFAULTS, "placement": placement, "credit": credit, **more})


def describe(e):
    if not isinstance(e, SimpleNamespace):
        return None
    changed = {k: v for k, v in vars(e).items() if k not in ("placement", "credit") and v != DEFAULTS.get(k)}
    return f"{e.placement}-{e.credit}-" + "-".join(f"{k}={v}" for k, v in changed.items())


def assert_prints(value, printed):
    """`value`, rounded to as many places as are printed, is what is printed."""
    places = len(printed.split(".")[1]) if "." in printed else 0
    assert float(f"{value:.{places}f}") == float(printed), f"{value!r} is not {printed}"


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def log(*probabilities):
    return np.log(np.array(probabilities))


# ------------------------------------------------------------------------------------------ published numbers


def test_bandit():
    pi, ref = log(0.4, 0.3, 0.2, 0.1), log(0.1, 0.2, 0.3, 0.4)
    gradient, k3 = oracles.target("reverse_kl", pi, ref), oracles.moments(estimator("k3"), pi, ref)[0]
    assert_prints(oracles.objective("reverse_kl", pi, ref), "0.45643")
    for actual, printed in zip(gradient, ("0.3719", "-0.0153", "-0.1724", "-0.1843"), strict=True):
        assert_prints(actual, printed)
    np.testing.assert_allclose(k3, [0.3, 0.1, -0.1, -0.3], rtol=1e-12)
    assert (np.sign(k3) != np.sign(gradient)).sum() == 1
    assert_prints(cosine(k3, gradient), "0.908")


def test_k3_can_raise_the_reverse_kl():
    pi, ref = log(0.01, 0.20, 0.79), log(0.70, 0.01, 0.29)
    k3 = oracles.moments(estimator("k3"), pi, ref)[0]
    assert_prints(cosine(k3, oracles.target("reverse_kl", pi, ref)), "-0.094")
    assert_prints(oracles.objective("reverse_kl", pi, ref), "1.3484")
    assert_prints(oracles.objective("reverse_kl", pi - 0.1 * k3, ref), "1.3518")


@pytest.mark.parametrize(("kernel", "mean", "noise"), [("k3", "-0.19985", "10.06"), ("k2", "-0.00114", "9.76")])
def test_dropped_mode(kernel, mean, noise):
    ref = log(0.2, *[0.8 / 9] * 9)
    pi = np.array([-9.0, *ref[1:]])
    on_j, variance = oracles.moments(estimator(kernel), pi, ref, fold=lambda g: g[:1])
    assert_prints(1e4 * math.exp(oracles.log_probability(pi, (0,))), "1.542")
    assert_prints(on_j[0], mean)
    assert_prints(math.sqrt(variance / 64) / abs(on_j[0]), noise)
    if kernel == "k3":  # what the draws of J itself contribute
        p = math.exp(oracles.log_probability(pi, (0,)))
        assert_prints(100 * p * (1 - 0.2 / p) * (1 - p) / on_j[0], "99.98")


def sine(frequency, amplitude, phase):
    return amplitude * np.sin(frequency * np.arange(39) + phase).reshape(13, 3)


SINE_REF = sine(1.7, 1.0, 0.3)
SINE_PI = SINE_REF + sine(2.3, 0.8, 1.1)
SINE_MU = SINE_PI + sine(0.9, 0.4, 2.0)


def test_sine_tree_scale():
    assert_prints(oracles.objective("reverse_kl", SINE_PI, SINE_REF), "0.298515")
    assert_prints(np.linalg.norm(oracles.target("reverse_kl", SINE_PI, SINE_REF)), "0.365736")


@pytest.mark.parametrize(
    ("e", "bias", "cos", "noise"),
    [
        (estimator("k1"), "1", None, "11.4287"),
        (estimator("k2"), "0.066506", "0.999004", "2.4778"),
        (estimator("k1", "reward"), "0.066506", "0.999004", "2.4778"),
        (estimator("k1", "reward", "to_go"), "0", "1", "4.7048"),
        (estimator("k2", "loss", "sequence"), "0", "1", "8.5274"),
        (estimator("k1", "reward", "sequence"), "0", "1", "8.5274"),
        (estimator("k3"), "0.199659", "0.981624", "4.2733"),
        (estimator("k3", "reward", "to_go"), "0.922885", "0.471170", "1.6380"),
        (estimator("full"), "0.066506", "0.999004", "0.4383"),
        (estimator("full", "loss+reward", "to_go"), "0", "1", "0.6279"),
        (estimator("full", "loss+reward", "to_go", weight="prefix"), "0", "1", "0.6279"),
    ],
    ids=describe,
)
def test_sine_tree_on_policy(e, bias, cos, noise):
    assert_table_row(e, None, bias, cos, noise)


@pytest.mark.parametrize(
    ("e", "bias", "noise"),
    [
        (estimator("k2"), "0.102979", "2.2518"),
        (estimator("k3", weight="token", differentiate_weight=True), "0.099760", "2.9522"),
        (estimator("k3", weight="prefix", differentiate_weight=True), "0", "3.2451"),
        (estimator("k1", "reward", "to_go", weight="sequence"), "0", "5.0945"),
        (estimator("full", "loss+reward", "to_go", weight="prefix"), "0", "0.6331"),
    ],
    ids=describe,
)
def test_sine_tree_off_policy(e, bias, noise):
    assert_table_row(e, SINE_MU, bias, None, noise)


def assert_table_row(e, behaviour, bias, cos, noise):
    truth = oracles.target("reverse_kl", SINE_PI, SINE_REF)
    mean, trace = oracles.moments(e, SINE_PI, SINE_REF, behaviour)
    relative = np.linalg.norm(mean - truth) / np.linalg.norm(truth)
    if bias in ("0", "1"):  # exactly
        assert relative == pytest.approx(float(bias), abs=1e-12)
    else:
        assert_prints(relative, bias)
    if cos == "1":
        assert cosine(mean, truth) == pytest.approx(1, abs=1e-12)
    elif cos is not None:
        assert_prints(cosine(mean, truth), cos)
    assert_prints(trace / (truth @ truth), noise)


def test_gaussian_gradient_table():
    policy, reference = (0.0, 1.0), (1.0, 1.1)
    truth, no_noise = oracles.gaussian_moments(estimator("full"), policy, reference)
    assert_prints(truth[0], "-0.826446")
    assert_prints(truth[1], "-0.173554")
    assert no_noise == pytest.approx(0, abs=1e-25)
    mean, variance = oracles.gaussian_moments(estimator("k3"), policy, reference, fold=lambda g: g[:1])
    assert_prints(abs(mean[0] - truth[0]) / abs(truth[0]), "0.2100")
    assert_prints(math.sqrt(variance / 50_000) / abs(truth[0]), "0.0267")


@pytest.mark.parametrize(("m", "kernel", "bias", "std"), oracles.SCHULMAN)
def test_schulman(m, kernel, bias, std):
    def expectation(power, shift=0.0):
        def integrand(x):
            density = math.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
            at = torch.tensor([-0.5 * x**2, -0.5 * (x - m) ** 2], dtype=torch.float64)
            return density * (float(oracles.kernel(kernel, at[0], at[1])) - shift) ** power

        return quad(integrand, -15, 15, epsabs=1e-13, points=[m / 2])[0]

    truth, mean = m**2 / 2, expectation(1)
    assert_prints((mean - truth) / truth, bias)
    assert_prints(math.sqrt(expectation(2, mean)) / truth, std)


# ----------------------------------------------------------------------------- identities, on small random trees

SHAPES = {"bandit": (4, 1, None), "tree": (3, 2, None), "deep": (2, 4, None), "eos": (3, 3, 1), "eos first": (2, 3, 0)}


@pytest.fixture(params=SHAPES)
def trees(request):
    return random_trees(request.param)


def random_trees(shape):
    """Logits of policy, reference and behaviour, and the eos."""
    (vocab, length, eos), rng = SHAPES[shape], np.random.default_rng(list(SHAPES).index(shape))
    nodes = sum(vocab**t for t in range(length))
    policy = rng.normal(size=(nodes, vocab))
    return policy, policy + rng.normal(size=policy.shape), policy + 0.5 * rng.normal(size=policy.shape), eos


REVERSE, FROZEN = {"reverse_kl": 1.0}, {"reverse_kl_frozen_prefix": 1.0}
FORWARD_FROZEN = {"forward_kl_frozen_prefix": 1.0}


def assert_descends(e, trees, expected, prefixes="behaviour", off_policy=False):
    """E[gradient] = Σ coefficient · ∇target, with frozen prefixes of the behaviour or of the policy."""
    policy, reference, behaviour, eos = trees
    sampler = behaviour if off_policy else None
    mean, trace = oracles.moments(e, policy, reference, sampler, eos)
    of = sampler if prefixes == "behaviour" else None
    truth = sum(c * oracles.target(name, policy, reference, of, eos) for name, c in expected.items())
    scale = np.linalg.norm(oracles.target("reverse_kl", policy, reference, eos=eos))
    np.testing.assert_allclose(mean, truth, atol=1e-11 * scale, rtol=0)
    assert scale > 0.1
    assert trace >= 0


@pytest.mark.parametrize(
    ("e", "expected"),
    [
        (estimator("k1"), {"zero": 1.0}),
        (estimator("k1", credit="sequence"), {"zero": 1.0}),
        (estimator("k1", normalise="mean"), {"inverse_length": 1.0}),
        (estimator("k2"), FROZEN),
        (estimator("k1", "reward"), FROZEN),
        (estimator("full"), FROZEN),
        (estimator("k3", "straight_through"), FROZEN),
        (estimator("k1", "straight_through", gradient_kernel="k3"), FORWARD_FROZEN),
        (estimator("k1", "reward", weight="token", clip=0.2), FROZEN),
        (estimator("k3", weight="token", differentiate_weight=True), FROZEN),
        (estimator("k1", "reward", "to_go"), REVERSE),
        (estimator("k1", "reward", "return"), REVERSE),
        (estimator("k1", "reward", "sequence"), REVERSE),
        (estimator("k2", "loss", "sequence"), REVERSE),
        (estimator("full", "loss+reward", "to_go"), REVERSE),
        (estimator("full", "loss+reward", "to_go", weight="prefix"), REVERSE),
        (estimator("full", "loss+reward", "return"), REVERSE),
        (estimator("k1", "loss+reward", "to_go"), REVERSE),
        (estimator("k1", "loss+reward", "sequence"), REVERSE),
        (estimator("k3", "loss+reward", "to_go"), REVERSE),
        (estimator("k3", "loss+reward", "return"), REVERSE),
        (estimator("k3", "loss+reward", "sequence"), REVERSE),
        (estimator("k1", "reward", "to_go", baseline="kl"), REVERSE),
        (estimator("k1", "reward", "return", baseline="kl"), REVERSE),
        (estimator("k1", "reward", "token", baseline="kl"), FROZEN),
        (estimator("k3", "reward", "to_go"), {"reverse_kl": 1.0, "forward_kl_frozen_prefix": -1.0}),
        (estimator("k3", "reward", "token"), {"reverse_kl_frozen_prefix": 1.0, "forward_kl_frozen_prefix": -1.0}),
        (estimator("k3", "reward", "sequence"), {"reverse_kl": 1.0, "forward_kl": -1.0}),
        (estimator("k3"), FORWARD_FROZEN),
        (estimator("k3", credit="sequence"), {"forward_kl": 1.0}),
        (estimator("k3_swapped"), {"chi2_frozen_prefix": 1.0}),
        (estimator("mse"), {"mse_frozen_prefix": 1.0}),
        (estimator("mse_sampled"), {"mse_frozen_prefix": 1.0}),
        (estimator("mse_sampled", credit="sequence"), {"mse": 1.0}),
        (estimator("k2", credit="sequence", weight="sequence", differentiate_weight=True), {"k2_value": 1.0}),
    ],
    ids=describe,
)
def test_on_policy_identity(e, expected, trees):
    assert_descends(e, trees, expected)


@pytest.mark.parametrize(
    ("e", "expected", "prefixes"),
    [
        (estimator("k1", weight="sequence", differentiate_weight=True), REVERSE, "policy"),
        (estimator("k3", weight="sequence", differentiate_weight=True), REVERSE, "policy"),
        (estimator("k1", weight="prefix", differentiate_weight=True), REVERSE, "policy"),
        (estimator("k3", weight="prefix", differentiate_weight=True), REVERSE, "policy"),
        (estimator("full", weight="prefix", differentiate_weight=True), REVERSE, "policy"),
        (estimator("k3", "loss", "sequence", weight="sequence", differentiate_weight=True), REVERSE, "policy"),
        (estimator("k2", "loss", "sequence", weight="sequence"), REVERSE, "policy"),
        (estimator("k1", "reward", "to_go", weight="sequence"), REVERSE, "policy"),
        (estimator("k1", "reward", "return", weight="sequence"), REVERSE, "policy"),
        (estimator("k1", "reward", "sequence", weight="sequence", clip=1e9), REVERSE, "policy"),
        (estimator("full", "loss+reward", "to_go", weight="prefix"), REVERSE, "policy"),
        (estimator("full", "loss+reward", "to_go", weight="sequence"), REVERSE, "policy"),
        (estimator("k2", weight="prefix"), FROZEN, "policy"),
        (estimator("full", weight="prefix"), FROZEN, "policy"),
        (estimator("k2", weight="token"), FROZEN, "behaviour"),
        (estimator("k3", weight="token", differentiate_weight=True), FROZEN, "behaviour"),
        (estimator("k1", "reward", weight="token", clip=1e9), FROZEN, "behaviour"),
        (estimator("full"), FROZEN, "behaviour"),
        (estimator("k3", weight="token"), FORWARD_FROZEN, "behaviour"),
        (estimator("mse"), {"mse_frozen_prefix": 1.0}, "behaviour"),
        (estimator("k2", credit="sequence", weight="sequence", differentiate_weight=True), {"k2_value": 1.0}, "policy"),
    ],
    ids=describe,
)
def test_off_policy_identity(e, expected, prefixes, trees):
    assert_descends(e, trees, expected, prefixes, off_policy=True)


def test_k1_loss_is_fisher_noise_and_off_policy_pushes_away_from_the_sampler(trees):
    policy, reference, behaviour, eos = trees
    fisher = 0.0  # E Σ_t ∥onehot − π∥² = E Σ_t (1 − Σ_v π²)
    for y in oracles.responses(policy.shape[1], oracles.length_of(policy), eos):
        squares = sum(1 - float((row.exp() ** 2).sum()) for row in oracles.rows_along(policy, y))
        fisher += math.exp(oracles.log_probability(policy, y)) * squares
    assert oracles.moments(estimator("k1"), policy, reference, eos=eos)[1] == pytest.approx(fisher, rel=1e-12)
    mean = oracles.moments(estimator("k1"), policy, reference, behaviour, eos)[0]
    toward = oracles.target("forward_kl", policy, behaviour, eos=eos)  # ∇KL(μ‖π)
    np.testing.assert_allclose(mean, -toward, atol=1e-12)


@pytest.mark.parametrize("credits", [("token", "token"), ("sequence", "sequence"), ("return", "sequence")])
def test_k1_reward_is_k2_loss_sample_by_sample(credits, trees):
    policy, reference, _, eos = trees
    theta = torch.tensor(policy, requires_grad=True)
    for y in oracles.responses(policy.shape[1], oracles.length_of(policy), eos):
        at = oracles.steps(*(oracles.rows_along(p, y) for p in (theta, reference, policy)), y)
        pair = (estimator("k1", "reward", credits[0]), estimator("k2", "loss", credits[1]))
        one, other = (torch.autograd.grad(oracles.surrogate(e, at, 3, 1.0), theta, retain_graph=True)[0] for e in pair)
        torch.testing.assert_close(one, other, atol=1e-14, rtol=1e-12)


def test_coefficient_identities():
    ell = torch.linspace(-3, 3, 25, dtype=torch.float64)

    def slope(name, at):
        log_pi = at.clone().requires_grad_(True)
        return torch.autograd.grad(oracles.kernel(name, log_pi, torch.zeros_like(at)).sum(), log_pi)[0]

    one = torch.ones_like(ell)
    for name, expected in [
        ("k1", one),
        ("k2", ell),
        ("k3", 1 - torch.exp(-ell)),
        ("abs", ell.sign()),
        ("k3_swapped", torch.exp(ell) - 1),
        ("mse_sampled", torch.exp(ell) - 1),  # π − ref, with ref = 1
    ]:
        torch.testing.assert_close(slope(name, ell), expected, atol=1e-14, rtol=1e-13)
    gap = slope("k2", ell) - slope("k3", ell)  # (−log δ) − (1 − δ)
    assert (gap >= 0).all()
    small = torch.tensor([1e-2, -1e-2], dtype=torch.float64)
    u = torch.expm1(-small)  # δ − 1
    torch.testing.assert_close(slope("k2", small) - slope("k3", small), u**2 / 2 - u**3 / 3, atol=3e-9, rtol=0)
    positive = ell[ell > 0]
    torch.testing.assert_close(-slope("k3", -positive) / slope("k3", positive), positive.exp())


def test_coefficient_variance_is_chi2():
    (pi, ref, _, _), total = random_trees("bandit"), 0.0
    p, r = (torch.softmax(torch.tensor(x[0]), 0) for x in (pi, ref))
    coefficient = 1 - r / p
    variance = (p * coefficient**2).sum() - (p * coefficient).sum() ** 2
    total = 2 * oracles.divergence("chi2", r.log(), p.log())  # χ²(ref‖π)
    assert float(variance) == pytest.approx(float(total), rel=1e-12)


def test_values(trees):
    policy, reference, behaviour, eos = trees
    kl = oracles.objective("reverse_kl", policy, reference, eos=eos)
    for kernel, credit in [("k1", "token"), ("k3", "token"), ("full", "token"), ("k1", "sequence"), ("k3", "sequence")]:
        assert oracles.value_moments(kernel, policy, reference, credit, eos=eos)[0] == pytest.approx(kl, rel=1e-12)
    k2 = oracles.objective("k2_value", policy, reference, eos=eos)
    mean, _ = oracles.value_moments("k2", policy, reference, "sequence", eos=eos)
    assert mean == pytest.approx(k2, rel=1e-12)
    assert oracles.value_moments("k1", policy, reference, eos=eos)[1] == pytest.approx(2 * k2 - kl**2, rel=1e-10)
    frozen = oracles.objective("reverse_kl_frozen_prefix", policy, reference, behaviour, eos)
    assert oracles.value_moments("full", policy, reference, behaviour=behaviour, eos=eos)[0] == pytest.approx(frozen)


# ------------------------------------------------------------------- Rao–Blackwell: what is true, and what is not


def test_rao_blackwell_frozen_prefix_gradient_is_never_noisier_on_a_tree(trees):
    policy, reference, _, eos = trees
    full = oracles.moments(estimator("full"), policy, reference, eos=eos)[1]
    sampled = oracles.moments(estimator("k1", "reward"), policy, reference, eos=eos)[1]
    assert full < sampled


def compensating(free_layers):
    """ℓ_2 cancels what ℓ_1 did: log π(y)/ref(y) hardly varies, Σ_t KL_t does. Before them, layers with π = ref."""
    policy = [log(0.5, 0.5)] * (2**free_layers - 1)
    reference = list(policy)
    policy += [log(0.5, 0.5)] * 2**free_layers + [log(0.5, 0.5), log(0.999, 0.001)] * 2**free_layers
    reference += [log(0.25, 0.75)] * 2**free_layers + [log(0.5, 0.5), log(1 / 3, 2 / 3)] * 2**free_layers
    return np.array(policy), np.array(reference)


def test_rao_blackwell_value_can_be_ten_times_as_noisy_as_monte_carlo():
    """Identity 13 of math.md holds per position, not for Σ_t KL_t: the KL_t do not condition on one σ-algebra."""
    policy, reference = compensating(0)
    (sampled, variance), (full, variance_full) = (oracles.value_moments(kernel, policy, reference) for kernel in ("k1", "full"))
    assert sampled == pytest.approx(full, rel=1e-12)
    assert variance_full > 10 * variance > 0.2


def test_complete_rao_blackwell_gradient_can_be_noisier_than_k1_to_go():
    policy, reference = compensating(2)
    mean_full, full = oracles.moments(estimator("full", "loss+reward", "to_go"), policy, reference)
    mean, sampled = oracles.moments(estimator("k1", "reward", "to_go"), policy, reference)
    np.testing.assert_allclose(mean_full, mean, atol=1e-12)
    assert full > 1.15 * sampled


# -------------------------------------------------------------------------------- baselines, weights, normalisers


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("credit", ["return", "sequence"])
def test_group_baselines(n, credit):
    trees = random_trees("eos first")
    base = {"placement": "reward", "credit": credit, "group": n}
    assert_descends(estimator("k1", **base, baseline="leave_one_out"), trees, REVERSE)
    assert_descends(estimator("k1", **base, baseline="group_mean"), trees, {"reverse_kl": 1 - 1 / n})
    # centring on the group mean is leave-one-out, shrunk: sample by sample, so in the trace as well
    exact, shrunk = (
        oracles.moments(estimator("k1", **base, baseline=b), *trees[:2], eos=trees[3])[1]
        for b in ("leave_one_out", "group_mean")
    )
    assert shrunk == pytest.approx((1 - 1 / n) ** 2 * exact, rel=1e-12)


def test_leave_one_out_trace_of_pairs_by_hand():
    """For a bandit and n = 2 the group average is ½ (r_i − r_j)(score_i − score_j)."""
    pi, ref, _, _ = random_trees("bandit")
    p, r = (np.exp(x[0]) / np.exp(x[0]).sum() for x in (pi, ref))
    ell, second, mean = np.log(p / r), 0.0, np.zeros(4)
    for i, j in itertools.product(range(4), repeat=2):
        g = 0.5 * (ell[i] - ell[j]) * (np.eye(4)[i] - np.eye(4)[j])
        mean, second = mean + p[i] * p[j] * g, second + p[i] * p[j] * g @ g
    e = estimator("k1", "reward", "sequence", baseline="leave_one_out", group=2)
    actual, trace = oracles.moments(e, pi, ref)
    np.testing.assert_allclose(actual, mean, atol=1e-14)
    assert trace == pytest.approx(2 * (second - mean @ mean), rel=1e-12)


def inside(x, bound):
    return abs(x) <= bound


@pytest.mark.parametrize(
    ("e", "coefficient"),
    [
        (estimator("k2", clamp_value=0.3), lambda ell, rho, p, r: ell * inside(ell**2 / 2, 0.3)),
        (estimator("k3", clamp_log_ratio=0.5), lambda ell, rho, p, r: (1 - r / p) * inside(ell, 0.5)),
        (
            estimator("k1", "reward", clamp_log_ratio=0.5, weight="token"),
            lambda ell, rho, p, r: rho * np.clip(ell, -0.5, 0.5),
        ),
        (
            estimator("k3", clamp_value=0.2, weight="token", differentiate_weight=True),
            lambda ell, rho, p, r: rho * (min(k3(ell), 0.2) + (1 - r / p) * inside(k3(ell), 0.2)),
        ),
        (estimator("k2", weight="token", truncate=1.1), lambda ell, rho, p, r: min(rho, 1.1) * ell),
        (
            estimator("k2", weight="token", truncate=1.1, differentiate_weight=True),
            lambda ell, rho, p, r: min(rho, 1.1) * ell + rho * (rho <= 1.1) * ell**2 / 2,
        ),
        (
            estimator("k1", "reward", weight="token", differentiate_weight=True),
            lambda ell, rho, p, r: rho * ell * (1 + np.log(p)),
        ),
        (
            estimator("k1", "reward", weight="token", clip=0.1),
            lambda ell, rho, p, r: 0 if (rho < 0.9 and ell > 0) or (rho > 1.1 and ell < 0) else rho * ell,
        ),
        (
            estimator("k1", "reward", "sequence", weight="sequence", clip=0.1),
            lambda ell, rho, p, r: 0 if (rho < 0.9 and ell > 0) or (rho > 1.1 and ell < 0) else rho * ell,
        ),
        (
            estimator("k3", "straight_through", weight="token", differentiate_weight=True),
            lambda ell, rho, p, r: rho * (ell + k3(ell)),
        ),
        (estimator("abs", "loss+reward", "to_go"), lambda ell, rho, p, r: abs(ell) + np.sign(ell)),
    ],
    ids=describe,
)
def test_one_position_by_hand(e, coefficient):
    """E_μ[c · score] and its trace for a bandit on which every clamp, bound and clip binds on some tokens only."""
    pi, ref, mu = log(0.4, 0.3, 0.2, 0.1), log(0.1, 0.25, 0.25, 0.4), log(0.3, 0.31, 0.14, 0.25)
    p, r, m = np.exp(pi), np.exp(ref), np.exp(mu)
    gradients = [coefficient(np.log(p / r)[i], (p / m)[i], p[i], r[i]) * (np.eye(4)[i] - p) for i in range(4)]
    mean, trace = oracles.moments(e, pi, ref, mu)
    by_hand = sum(w * g for w, g in zip(m, gradients, strict=True))
    np.testing.assert_allclose(mean, by_hand, atol=1e-14)
    assert trace == pytest.approx(sum(w * g @ g for w, g in zip(m, gradients, strict=True)) - by_hand @ by_hand)


def k3(ell):
    return math.expm1(-ell) + ell


def test_clamp_thresholds():
    """Value clamp ±10: k2 is dead above ∣ℓ∣ = √20; k3 is dead where ref/π exceeds 13.61, the root of δ − log δ = 11."""

    def slope(name, ell):
        log_pi = torch.tensor(ell, dtype=torch.float64, requires_grad=True)
        value = oracles.kernel(name, log_pi, torch.tensor(0.0, dtype=torch.float64), 20.0, 10.0)
        return float(torch.autograd.grad(value, log_pi)[0])

    assert slope("k2", 4.472) != 0
    assert slope("k2", 4.473) == 0
    assert slope("k3", -math.log(13.60)) != 0
    assert slope("k3", -math.log(13.62)) == 0


@pytest.mark.parametrize("normalise", ["token_mean", "fixed", "mean"])
def test_normalisers(normalise, trees):
    policy, reference, behaviour, eos = trees
    mean, trace = oracles.moments(estimator("k2"), policy, reference, behaviour, eos)
    scaled, scaled_trace = oracles.moments(estimator("k2", normalise=normalise), policy, reference, behaviour, eos)
    everything = oracles.responses(policy.shape[1], oracles.length_of(policy), eos)
    lengths = {"token_mean": 0.0, "fixed": oracles.length_of(policy), "mean": max(map(len, everything))}
    for y in everything:
        lengths["token_mean"] += math.exp(oracles.log_probability(behaviour, y)) * len(y)
    if normalise == "mean" and eos is not None:
        assert abs(cosine(scaled, mean)) < 1 - 1e-6  # not a multiple: short responses count more
    else:
        np.testing.assert_allclose(scaled, mean / lengths[normalise], rtol=1e-12)
        assert scaled_trace == pytest.approx(trace / lengths[normalise] ** 2, rel=1e-12)


# ------------------------------------------------------------------------------ layout, targets, Markov, Gaussian


def test_responses_and_layout():
    assert oracles.responses(2, 3, eos=1) == [(0, 0, 0), (0, 0, 1), (0, 1), (1,)]
    assert len(oracles.responses(3, 4)) == 81
    logits = np.arange(13 * 3, dtype=float).reshape(13, 3) ** 1.5
    rows = oracles.rows_along(logits, (2, 1, 0))  # the root, then row 1 + 2, then row 4 + 3·2 + 1
    for row, node in zip(rows, (0, 3, 11), strict=True):
        np.testing.assert_allclose(row, torch.log_softmax(torch.tensor(logits[node]), 0))


def test_probabilities_sum_to_one_and_rows_behind_an_eos_are_unused(trees):
    policy, reference, _, eos = trees
    everything = oracles.responses(policy.shape[1], oracles.length_of(policy), eos)
    assert sum(math.exp(oracles.log_probability(policy, y)) for y in everything) == pytest.approx(1, rel=1e-14)
    used = np.zeros(len(policy), dtype=bool)
    for y in everything:
        node = 0
        for token in y:
            used[node], node = True, policy.shape[1] * node + 1 + token
    gradient = oracles.target("reverse_kl", policy, reference, eos=eos).reshape(policy.shape)
    assert (np.abs(gradient).sum(axis=1) > 0).tolist() == used.tolist()


def central_differences(f, x, step=1e-5):
    gradient = np.zeros(x.size)
    for i in range(x.size):
        shift = np.zeros(x.size)
        shift[i] = step
        shift = shift.reshape(x.shape)
        gradient[i] = (f(x + shift) - f(x - shift)) / (2 * step)
    return gradient


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("shape", ["tree", "eos first"])
@pytest.mark.parametrize(
    "name",
    oracles.TARGETS,
)
def test_target_gradients(name, shape, off_policy):
    policy, reference, behaviour, eos = random_trees(shape)
    sampler = behaviour if off_policy else policy
    gradient = oracles.target(name, policy, reference, sampler, eos)
    numeric = central_differences(lambda x: oracles.objective(name, x, reference, sampler, eos), policy)
    np.testing.assert_allclose(gradient, numeric, atol=1e-9)
    constant = name == "zero" or (name == "inverse_length" and eos is None)
    assert (np.linalg.norm(gradient) < 1e-15) if constant else (np.linalg.norm(gradient) > 1e-2)


def test_markov_gradient_and_fold():
    rng, vocab, length = np.random.default_rng(7), 3, 3
    policy, reference = rng.normal(size=(2, 1 + vocab, vocab))

    def tree(rows):
        return oracles.markov_as_tree(rows[0], rows[1:], length)

    folded = oracles.fold_markov(oracles.target("reverse_kl", tree(policy), tree(reference)), vocab, length)
    numeric = central_differences(lambda x: oracles.objective("reverse_kl", tree(x), tree(reference)), policy)
    np.testing.assert_allclose(folded, numeric, atol=1e-9)

    def fold(g):
        return oracles.fold_markov(g, vocab, length)

    e = estimator("k1", "reward", "to_go")
    mean, trace = oracles.moments(e, tree(policy), tree(reference), fold=fold)
    np.testing.assert_allclose(mean, folded, atol=1e-12)
    unfolded = oracles.moments(e, tree(policy), tree(reference))[1]
    assert abs(trace - unfolded) > 1e-2 * unfolded  # shared parameters: the norm must come after the fold


GAUSSIAN_ESTIMATORS = [
    estimator(kernel, placement, credit, weight=weight, differentiate_weight=differentiate, **more)
    for kernel in ("k1", "k2", "k3", "abs", "k3_swapped", "mse_sampled", "full", "mse")
    for placement, credit in [("loss", "token"), ("reward", "to_go"), ("loss+reward", "return"), ("reward", "sequence")]
    for weight, differentiate in [("none", False), ("sequence", False), ("prefix", True), ("sequence", True)]
    for more in [{}, {"clamp_log_ratio": 0.4}, {"clamp_value": 0.3, "truncate": 1.2}, {"baseline": "kl"}]
    if not (kernel in ("full", "mse") and (credit == "sequence" or (differentiate and placement != "loss")))
    if not (credit == "sequence" and weight == "prefix")
    if not ("baseline" in more and (placement != "reward" or credit == "sequence"))
] + [
    estimator("k1", "reward", weight="token", clip=0.2),
    estimator("k3", "reward", "to_go", weight="prefix", clip=0.2),
    estimator("k2", "reward", "sequence", weight="sequence", clip=0.2, clamp_value=0.3),
    estimator("k3", "straight_through", weight="token", differentiate_weight=True, clamp_value=0.3),
    estimator("k1", "straight_through", gradient_kernel="abs", weight="token", truncate=1.2),
]


@pytest.mark.parametrize("x", [-1.3, 0.2, 0.9, 2.4])
def test_gaussian_gradient_by_hand_is_the_surrogates(x):
    policy, reference, behaviour = (0.3, 0.9), (-0.2, 1.2), (0.5, 1.1)
    theta = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
    constants = torch.tensor([reference, behaviour], dtype=torch.float64)
    pi, ref, mu = (torch.distributions.Normal(mean, std) for mean, std in (theta, *constants))
    at = torch.tensor(x, dtype=torch.float64)
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    mse = 0.5 * torch.trapezoid((pi.log_prob(z).exp() - ref.log_prob(z).exp()) ** 2, z)
    vocabulary = {"full": [torch.distributions.kl_divergence(pi, ref)], "mse": [mse]}
    y = oracles.Steps([pi.log_prob(at)], [ref.log_prob(at)], [mu.log_prob(at)], vocabulary)
    nonzero = 0
    for e in GAUSSIAN_ESTIMATORS:
        loss = oracles.surrogate(e, y, 1, 1.0)
        by_hand = np.array(gaussian_gradient(e, x, policy, reference, behaviour), dtype=float)
        expected = torch.autograd.grad(loss, theta, retain_graph=True)[0] if loss.requires_grad else np.zeros(2)
        np.testing.assert_allclose(by_hand, expected, rtol=1e-10, atol=1e-13, err_msg=describe(e))
        nonzero += bool(np.abs(by_hand).sum())
    assert nonzero > 0.7 * len(GAUSSIAN_ESTIMATORS)


def gaussian_kl_gradient(direction, policy, reference):
    (m, s), (m_ref, s_ref) = policy, reference
    if direction == "reverse":
        return np.array([(m - m_ref) / s_ref**2, s / s_ref**2 - 1 / s])
    return np.array([(m - m_ref) / s**2, 1 / s - (s_ref**2 + (m - m_ref) ** 2) / s**3])


@pytest.mark.parametrize(
    ("e", "behaviour", "direction"),
    [
        (estimator("k2"), None, "reverse"),
        (estimator("k3"), None, "forward"),
        (estimator("k3", weight="token", differentiate_weight=True), (0.5, 1.1), "reverse"),
        (estimator("k1", "reward", weight="token"), (0.5, 1.1), "reverse"),
        (estimator("k3", weight="token"), (0.5, 1.1), "forward"),
    ],
    ids=describe,
)
def test_gaussian_means(e, behaviour, direction):
    policy, reference = (0.3, 0.9), (-0.2, 1.0)
    mean, trace = oracles.gaussian_moments(e, policy, reference, behaviour)
    np.testing.assert_allclose(mean, gaussian_kl_gradient(direction, policy, reference), rtol=1e-13)
    assert 0 < trace < math.inf


def test_gaussian_traces():
    policy, reference = (0.3, 0.9), (-0.2, 1.0)
    mean, trace = oracles.gaussian_moments(estimator("k1"), policy, reference)
    np.testing.assert_allclose(mean, 0, atol=1e-15)
    assert trace == pytest.approx(3 / 0.9**2, rel=1e-13)  # the Fisher matrix
    x = np.linspace(-9, 9, 1_000_001)  # a kinked one against a plain sum
    z, ell = (x - 0.3) / 0.9, -((x - 0.3) ** 2) / 1.62 - math.log(0.9) + (x + 0.2) ** 2 / 2
    c = ell * (ell**2 / 2 <= 0.1)
    mass = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) / 0.9 * (x[1] - x[0])
    g = c * np.array([z, z**2 - 1]) / 0.9
    mean, trace = oracles.gaussian_moments(estimator("k2", clamp_value=0.1), policy, reference)
    np.testing.assert_allclose(mean, g @ mass, atol=1e-5)
    assert trace == pytest.approx((g**2 @ mass).sum() - mean @ mean, abs=1e-5)


@pytest.mark.parametrize(("std", "finite"), [(0.2, False), (0.70, False), (0.72, True)])
def test_gaussian_k3_variance_is_finite_iff_the_policy_is_wide_enough(std, finite):
    """σ_q² > σ_p²/2; the mean is finite either way."""
    mean, trace = oracles.gaussian_moments(estimator("k3"), (0.1, std), (0.0, 1.0))
    np.testing.assert_allclose(mean, gaussian_kl_gradient("forward", (0.1, std), (0.0, 1.0)), rtol=1e-12)
    assert math.isfinite(trace) == finite


# -------------------------------------------------------------------------------------------------- fixed points


@pytest.mark.parametrize(
    ("e", "optimum"),
    [
        (estimator("k1", "reward", "sequence"), "reverse"),
        (estimator("k2", "loss", "sequence"), "reverse"),
        (estimator("k3", "loss", "sequence"), "forward"),
    ],
    ids=describe,
)
def test_fixed_points(e, optimum):
    """At the claimed optimum the gradient of E[r] is β times the expected gradient of the penalty."""
    reward, ref, beta = np.array([1.0, 0.2, -0.5, 0.1]), np.array([0.1, 0.2, 0.3, 0.4]), 0.7
    if optimum == "reverse":
        pi = ref * np.exp(reward / beta)
    else:  # β ref / (Λ − r), Λ by bisection
        low, high = reward.max() + 1e-9, reward.max() + 100.0
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if (beta * ref / (middle - reward)).sum() > 1 else (low, middle)
        pi = beta * ref / (low - reward)
    pi = pi / pi.sum()
    ascent = pi * (reward - pi @ reward)
    penalty = oracles.moments(e, np.log(pi), np.log(ref))[0]
    np.testing.assert_allclose(ascent, beta * penalty, atol=1e-12)
    assert np.linalg.norm(ascent) > 0.05
