"""A slow, obvious reference implementation for one draw from a Gaussian: gradients by hand, moments by quadrature.

Shares no code with gradlab, nor with oracles.py, against which its gradients are tested. Parameters are (mean, std).
The estimator is any object with the fields listed in oracles.py; every credit means the same for a single draw, except
that nothing follows it, so that a vocabulary kernel's `to_go` is zero.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from mpmath import MPContext, mpf

Pair = Sequence[float]
Fold = Callable[[list[mpf]], list[mpf]]

mp = MPContext()  # its exponents never overflow: the tails of ref/π do, in float64
mp.dps = 20


def gaussian_gradient(e: Any, x: Any, policy: Pair, reference: Pair, sampler: Pair) -> list[mpf]:
    """(∂mean, ∂std) of the surrogate of one draw, derived by hand: c · ∇log π(x) + a · ∇D, with D the KL or the MSE."""
    assert e.baseline in (None, "kl"), "group baselines are for enumerable policies"
    (m, s), (m_ref, s_ref) = map(mp.mpf, policy), map(mp.mpf, reference)
    log_pi, log_ref, log_mu = (_log_density(x, *pair) for pair in (policy, reference, sampler))
    score = [(x - m) / s**2, ((x - m) ** 2 / s**2 - 1) / s]

    gap, v = m - m_ref, s**2 + s_ref**2
    overlap = mp.exp(-(gap**2) / (2 * v)) / mp.sqrt(2 * mp.pi * v)  # ∫ π ref
    kl = _kl(policy, reference)
    vocabulary = {  # D, ∇D
        "full": (kl, [gap / s_ref**2, s / s_ref**2 - 1 / s]),
        "mse": (
            (1 / s + 1 / s_ref) / (4 * mp.sqrt(mp.pi)) - overlap,
            [overlap * gap / v, overlap * s * (1 - gap**2 / v) / v - 1 / (4 * s**2 * mp.sqrt(mp.pi))],
        ),
    }

    def kernel_and_slope(name: str, clamped: bool = True) -> tuple[mpf, mpf]:
        """k(ℓ) and ∂k/∂log π with its clamps; for a vocabulary kernel D and 0."""
        if name in vocabulary:
            return vocabulary[name][0], mp.mpf(0)
        ell, slope_inside, ref = log_pi - log_ref, 1, mp.exp(log_ref)
        if clamped and e.clamp_log_ratio is not None and abs(ell) > e.clamp_log_ratio:
            ell, slope_inside = mp.sign(ell) * e.clamp_log_ratio, 0
        k, slope = {
            "k1": (ell, 1),
            "k2": (ell**2 / 2, ell),
            "k3": (mp.expm1(-ell) + ell, -mp.expm1(-ell)),
            "abs": (abs(ell), mp.sign(ell)),
            "k3_swapped": (mp.expm1(ell) - ell, mp.expm1(ell)),
            "mse_sampled": (ref * (mp.expm1(ell) - ell), ref * mp.expm1(ell)),
        }[name]
        if clamped and e.clamp_value is not None and abs(k) > e.clamp_value:
            return mp.sign(k) * e.clamp_value, mp.mpf(0)
        return k, slope * slope_inside

    w, slope_w = mp.mpf(1), 0  # W and ∂W/∂log π
    if e.weight in ("token", "sequence") or (e.weight == "prefix" and e.kernel not in vocabulary):
        w = mp.exp(log_pi - log_mu)
        slope_w = w if e.differentiate_weight else 0
        if e.truncate is not None and w > e.truncate:
            w, slope_w = mp.mpf(e.truncate), 0
    k, slope = kernel_and_slope(e.kernel)
    reward = 0 if e.kernel in vocabulary and e.credit == "to_go" else k  # nothing follows the only token
    reward -= kl if e.baseline == "kl" else 0

    if e.clip is not None:  # the gradient is cut where the clipped branch is the larger one
        cut = w * reward < min(max(w, 1 - e.clip), 1 + e.clip) * reward
        return [0 if cut else w * reward * part for part in score]
    c, a = mp.mpf(0), mp.mpf(0)
    if e.placement in ("reward", "loss+reward"):
        c += w * reward + slope_w * reward * log_pi
    if e.placement in ("loss", "loss+reward"):
        c += w * slope + slope_w * k
        a += w if e.kernel in vocabulary else 0
    if e.placement == "straight_through":
        c += w * kernel_and_slope(e.gradient_kernel or "k2", clamped=False)[1] + slope_w * k
    slope_d = vocabulary[e.kernel][1] if e.kernel in vocabulary else (0, 0)
    return [c * part + a * part_d for part, part_d in zip(score, slope_d, strict=True)]


def gaussian_moments(
    e: Any, policy: Pair, reference: Pair, behaviour: Pair | None = None, fold: Fold | None = None
) -> tuple[np.ndarray, float]:
    """Mean over (∂mean, ∂std) and trace of the covariance of one draw's gradient, by quadrature; inf if it diverges.

    `fold` maps each draw's gradient to other coordinates first: `lambda g: g[:1]` gives the variance of the first one.
    """
    sampler = policy if behaviour is None else behaviour

    @cache
    def gradient(x: mpf) -> list[mpf]:
        g = gaussian_gradient(e, x, policy, reference, sampler)
        return g if fold is None else fold(g)

    def kinks(x: Any) -> list[mpf]:
        """Functions that change sign wherever the surrogate has a kink."""
        log_pi, log_ref, log_mu = (_log_density(x, *pair) for pair in (policy, reference, sampler))
        found, rho = [log_pi - log_ref], mp.exp(log_pi - log_mu)
        if e.clamp_log_ratio is not None:
            found.append(abs(log_pi - log_ref) - e.clamp_log_ratio)
        if e.clamp_value is not None:
            found += [abs(k) - e.clamp_value for k in _smooth_kernels(log_pi, log_ref)]
        if e.baseline == "kl":
            found.append(log_pi - log_ref - _kl(policy, reference))
        edges = [e.truncate] if e.truncate is not None else [1 - e.clip, 1 + e.clip] if e.clip is not None else []
        return found + [rho - edge for edge in edges]

    centre, spread = mp.mpf(sampler[0]), max(std for _, std in (policy, reference, sampler))
    reach = 8 * spread + 2 * max(abs(mean - centre) for mean, _ in (policy, reference))
    grid = mp.linspace(centre - reach, centre + reach, 129)
    cuts = set(grid[::8])
    for a, b in itertools.pairwise(grid):
        for j, (at_a, at_b) in enumerate(zip(kinks(a), kinks(b), strict=True)):
            if at_a * at_b < 0:
                cuts.add(_bisect(lambda x, j=j: kinks(x)[j], a, b))

    def expectation(f: Callable[[mpf], mpf]) -> mpf:
        return _integral(lambda x: mp.exp(_log_density(x, *sampler)) * f(x), sorted(cuts))

    mean = [expectation(lambda x, j=j: gradient(x)[j]) for j in range(len(gradient(centre)))]
    if mp.inf in mean:
        return np.array(mean, dtype=float), math.inf
    trace = expectation(lambda x: sum((g - m) ** 2 for g, m in zip(gradient(x), mean, strict=True)))
    return np.array(mean, dtype=float), float(trace)


def _kl(policy: Pair, reference: Pair) -> mpf:
    (m, s), (m_ref, s_ref) = map(mp.mpf, policy), map(mp.mpf, reference)
    return mp.log(s_ref / s) + (s**2 + (m - m_ref) ** 2) / (2 * s_ref**2) - mp.mpf(1) / 2


def _log_density(x: Any, mean: float, std: float) -> mpf:
    return -(((x - mean) / mp.mpf(std)) ** 2) / 2 - mp.log(std) - mp.log(2 * mp.pi) / 2


def _smooth_kernels(log_pi: mpf, log_ref: mpf) -> list[mpf]:
    ell = log_pi - log_ref
    swapped = mp.expm1(ell) - ell
    return [ell, ell**2 / 2, mp.expm1(-ell) + ell, swapped, mp.exp(log_ref) * swapped]


def _bisect(f: Callable[[mpf], mpf], a: mpf, b: mpf) -> mpf:
    for _ in range(70):
        middle = (a + b) / 2
        a, b = (middle, b) if f(a) * f(middle) > 0 else (a, middle)
    return (a + b) / 2


def _integral(f: Callable[[mpf], mpf], cuts: list[mpf]) -> mpf:
    """∫ f over the line: panels between the cuts, then outwards until the tails are negligible; inf if they grow."""
    low, high = cuts[0], cuts[-1]
    width = high - low
    if any(abs(f(edge + 2 * far)) > abs(f(edge + far)) for edge, far in ((low, -999 * width), (high, 999 * width))):
        return mp.inf
    result = mp.quad(f, cuts, method="gauss-legendre")
    while max(abs(f(low)), abs(f(high))) * width > mp.mpf(10) ** -18 * max(abs(result), mp.mpf(10) ** -30):
        for panel in ([low - width / 8, low], [high, high + width / 8]):
            result += mp.quad(f, panel, method="gauss-legendre")
        low, high = low - width / 8, high + width / 8
    return result
