"""Exact results: true gradients, and moments of every estimator, without sampling.

`Bandit` and `Tree` are enumerated, `Gaussian` is integrated by quadrature, `Markov` is solved by dynamic programming.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import log, log1p
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import scipy
import torch
from torch import Tensor

from gradlab import groups, targets
from gradlab._common.arguments import checked
from gradlab._common.names import is_several
from gradlab._common.shapes import Float64
from gradlab.estimators.closed_form import loss_coefficients
from gradlab.estimators.estimator import Estimator, kernel_values
from gradlab.estimators.kernels import KERNELS
from gradlab.estimators.policy_loss import PolicyLoss
from gradlab.moments import (
    CENTRED_DOUBLES,
    Gradients,
    Loss,
    Moments,
    as_losses,
    digits_lost,
    gathered,
    gradients,
    in_logits,
    is_grouped,
    moments_in_parts,
    moments_of,
    recentred,
)
from gradlab.objectives import OBJECTIVES
from gradlab.per_sample import backprop
from gradlab.policies import Bandit, Gaussian, LanguageModel, Markov, Tabular, Tree
from gradlab.policies.gaussian import ORDER, REACH
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario, check_scenario, is_of
from gradlab.solvers import markov, prefixes

#: A Gaussian integrand `exp(a z²)`, `z` in standard deviations of the sampler, is called divergent from this `a` on.
BORDER = 5e-4
#: Responses of a table that are worked on at once: what they need stays in the processor's caches.
WHOLE_RESPONSES = 2**13
#: Moments are refused where the mean gradients of all estimators would need more than this.
MOMENT_BYTES = 2**32
#: `covariance` is refused when it would hold more numbers than this (half a GiB).
COVARIANCE_DOUBLES = 2**26


def gradient(target: str, scenario: Scenario, **parameters: Any) -> Float64[Tensor, " p"]:
    """True gradient of a target (`gl.TARGETS`, `gl.OBJECTIVES`) with respect to the policy's parameters, `[p]`, row-major.

    Targets of the whole objective are to be descended, like all others: `reward` is `−E r`, `regularised` (with `beta=`)
    `−E r + β KL`, `pass_at_k` (with `k=`) and `utility` (with `utility=gl.utility(…)`) of success probabilities, `entropy` `−H`.
    By autograd through the definition on `Bandit`, `Tree` and `Gaussian`, and through the network of a `LanguageModel` whose
    responses can be listed (mean over prompts, in the network's precision); by dynamic programming on `Markov`.
    Raises `ValueError` for an unknown target, with the nearest names, for a parameter that is missing, and without a reward that is
    needed. On a `Markov` chain too long to enumerate a reward must be a `TableReward`.

    >>> scenario = gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(1, 2))
    >>> [round(part, 6) for part in gl.exact.gradient("reverse_kl", scenario).tolist()]
    [-0.25, -0.75]
    """
    targets.target(target)
    check_scenario(scenario)
    if is_of(scenario, Markov) and target not in OBJECTIVES and not parameters:
        return markov.target_gradient(target, scenario)
    return targets.gradient_by_autograd(target, scenario, **parameters).double()


def objective(target: str, scenario: Scenario, **parameters: Any) -> float:
    """Value of a target in nats (`inverse_length` in 1/tokens, a reward in its own units). Raises `ValueError` as `gradient` does.

    >>> scenario = gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(1, 1))
    >>> round(gl.exact.objective("reverse_kl", scenario), 6)
    0.5
    """
    targets.target(target)
    check_scenario(scenario)
    if is_of(scenario, Markov) and target not in OBJECTIVES and not parameters:
        return markov.objective(target, scenario)
    with torch.no_grad():
        return float(targets.value(target, scenario.policy, scenario, **parameters))


@overload
def moments(estimator: Loss, scenario: Scenario) -> Moments: ...
@overload
def moments(estimator: Iterable[Loss], scenario: Scenario) -> list[Moments]: ...
def moments(estimator: Loss | Iterable[Loss], scenario: Scenario) -> Moments | list[Moments]:
    """Exact mean gradient and covariance trace of one estimator, or of a list of them in one pass.

    `E_μ[g]` and `E_μ‖g‖² − ‖E_μ g‖²`, with `g` the gradient of the per-sample surrogate and `μ` the sampler. An estimator is
    an `Estimator` or any callable from a rollout to per-sample losses `[n]` (callables need a policy that can be enumerated).
    On a `Gaussian` a covariance trace that diverges is `inf`. On a tree estimators are summed over prefixes, in `8 p` bytes for each
    and 24 more; of callables the responses are visited some at a time, up to 8 million of them.
    Raises `ValueError` when there are too many responses to enumerate or, on `Markov`, when the estimator does not decompose
    over time.

    >>> scenario = gl.Scenario(gl.Bandit([0, 0]), gl.Bandit([0, 1]))
    >>> moments = gl.exact.moments(gl.ESTIMATORS["k2-loss"], scenario)
    >>> bool((moments.mean - gl.exact.gradient("reverse_kl", scenario)).abs().max() < 1e-12)
    True
    """
    losses = as_losses(estimator)
    check_scenario(scenario)
    whole = {e: loss for e, loss in enumerate(losses) if isinstance(loss, PolicyLoss)}
    plain = [e for e in range(len(losses)) if e not in whole]
    by_loss: dict[int, Moments] = {}
    with torch.no_grad():
        if whole:
            by_loss |= zip(whole, _of_whole_losses(list(whole.values()), scenario), strict=True)
        if plain:
            by_loss |= zip(plain, _of_estimators([losses[e] for e in plain], scenario), strict=True)
    results = [by_loss[e] for e in range(len(losses))]
    return results if is_several(estimator) else results[0]


def _of_estimators(losses: Sequence[Loss], scenario: Scenario) -> list[Moments]:
    if is_of(scenario, Markov):
        return _on_chain(losses, scenario)
    if is_of(scenario, Gaussian):
        return _by_quadrature(losses, scenario)
    if is_of(scenario, LanguageModel):
        return moments_of(losses, Rollout.enumerated(scenario), "enumeration", backprop.pullback_of(scenario.policy))
    assert is_of(scenario, Tabular)
    return _on_table(losses, scenario)


def _on_chain(losses: Sequence[Loss], scenario: Scenario[Markov]) -> list[Moments]:
    """Moments by dynamic programming; where a trace lost its digits, from the responses of a chain that is short enough."""
    solved, policy = [markov.moments(loss, scenario) for loss in losses], scenario.policy
    lost = [e for e, loss in enumerate(losses) if digits_lost(loss, solved[e])]
    if lost and policy.enumerable and policy.vocab**policy.length * policy.table.numel() <= CENTRED_DOUBLES:
        rollout = Rollout.enumerated(scenario)
        for e in lost:
            solved[e] = recentred(losses[e], solved[e], rollout)
    return solved


def _of_whole_losses(losses: Sequence[PolicyLoss], scenario: Scenario) -> list[Moments]:
    """Moments of losses of the whole objective, over all responses held at once."""
    policy = scenario.policy
    if isinstance(policy, Markov) and not policy.enumerable:
        raise ValueError(
            f"the responses of a chain of {policy.vocab} tokens and length {policy.length} are too many to list, and a whole loss is no "
            "recursion over time; estimate it from samples (samples=…), or take a shorter chain"
        )
    with torch.no_grad():
        rollout = enumerated(losses, scenario)
        pullback = backprop.pullback_of(scenario.policy) if is_of(scenario, LanguageModel) else in_logits
        method = "quadrature" if isinstance(policy, Gaussian) else "enumeration"
        moments_by_loss: dict[int, Moments] = {}
        single = [e for e, loss in enumerate(losses) if not loss.grouped]
        if single:
            moments_by_loss |= zip(single, moments_of([losses[e] for e in single], rollout, method, pullback), strict=True)
        for e, loss in enumerate(losses):
            if loss.grouped:
                moments_by_loss[e] = groups.exact_moments(loss, rollout, pullback)
            if isinstance(policy, Gaussian):
                parts = groups.basis_of(loss, rollout) if loss.grouped else [loss_coefficients(loss, rollout)]
                moments_by_loss[e] = _checked(moments_by_loss[e], gathered(rollout, parts), rollout, scenario)
    return [moments_by_loss[e] for e in range(len(losses))]


def _on_table(losses: Sequence[Loss], scenario: Scenario[Tabular]) -> list[Moments]:
    """Moments on a table: of estimators on a tree from its prefixes, otherwise from responses, some of them at a time."""
    policy = scenario.policy
    needed = 8 * (len(losses) + 24) * policy.table.numel()
    if needed > MOMENT_BYTES:
        raise ValueError(
            f"the moments of {len(losses)} estimators in {policy.table.numel():,} parameters take {needed / 2**30:.2g} GiB, "
            f"more than the {MOMENT_BYTES / 2**30:.2g} GiB allowed; give fewer estimators at a time, or samples=…"
        )
    n, moments_by_loss = policy.vocab**policy.length, dict[int, Moments]()
    if is_of(scenario, Bandit) or is_of(scenario, Tree):
        summed = {e: loss for e, loss in enumerate(losses) if isinstance(loss, Estimator)}
        made, lost = prefixes.moments(list(summed.values()), scenario, "enumeration")
        moments_by_loss |= zip(summed, made, strict=True)
        if lost and n * policy.table.numel() <= CENTRED_DOUBLES:
            rollout, chosen = Rollout.enumerated(scenario), [list(summed)[e] for e in lost]
            moments_by_loss |= {e: recentred(losses[e], moments_by_loss[e], rollout) for e in chosen}
    others = [loss for e, loss in enumerate(losses) if e not in moments_by_loss]
    if others:
        if n <= WHOLE_RESPONSES:
            rest = moments_of(others, Rollout.enumerated(scenario), "enumeration")
        else:
            parts = partial(Rollout.parts, scenario, WHOLE_RESPONSES)
            rest = moments_in_parts(others, parts, len(policy.table), "enumeration")
        moments_by_loss |= zip([e for e in range(len(losses)) if e not in moments_by_loss], rest, strict=True)
    return [moments_by_loss[e] for e in range(len(losses))]


@checked
def covariance(estimator: Loss, scenario: Scenario) -> Float64[Tensor, "p p"]:
    """Exact covariance matrix of one sample's gradient, `[p, p]`: the variance of every parameter, and what they share.

    `E_μ[g gᵀ] − E_μ[g] E_μ[g]ᵀ`; its trace is `moments(estimator, scenario).trace_cov`. It holds every response's gradient in
    full, which limits it to small policies. On a `Gaussian` a variance that diverges is `inf`, a covariance `nan`.
    Raises `ValueError` when there are too many responses or parameters, for language models, and for group baselines.

    >>> scenario = gl.Scenario(gl.Bandit([0, 0]), gl.Bandit([0, 1]))
    >>> gl.exact.covariance(gl.ESTIMATORS["k1-loss"], scenario).round(decimals=6).tolist()
    [[0.25, -0.25], [-0.25, 0.25]]
    """
    if is_several(estimator):
        raise ValueError(f"the covariance is of one estimator, got {estimator!r}")
    as_losses(estimator)
    if is_grouped(estimator):
        raise ValueError(
            f"{estimator.name} compares responses, so a single one has no gradient of its own; gl.exact.moments gives the "
            "trace of its covariance"
        )
    if is_of(scenario, LanguageModel):
        raise ValueError(
            f"a network's {len(scenario.policy.parameters):,} parameters have too large a covariance matrix; gl.exact.moments gives "
            "its trace, gl.backprop the inner products between responses"
        )
    with torch.no_grad():
        # Raises where there is no mean to centre at.
        mean = None if is_of(scenario, Markov) else moments(estimator, scenario).mean
        rollout = enumerated([estimator], scenario)
        p, n = rollout.table.numel(), len(rollout.weight)
        if p * max(p, n) > COVARIANCE_DOUBLES:
            raise ValueError(
                f"the covariance of {p} parameters over {n} responses needs {p * max(p, n):.2g} numbers, more than the "
                f"{COVARIANCE_DOUBLES:.2g} allowed; take a smaller policy, or gl.exact.moments for the trace alone"
            )
        table = gradients([estimator], rollout).tables(0).flatten(1)
        centred = table - (rollout.weight @ table if mean is None else mean)
        scaled = centred * rollout.weight.sqrt()[:, None]
        cov = scaled.T @ scaled
        if is_of(scenario, Gaussian):
            for j in range(p):
                for k in range(p):
                    if _tail(table[:, j] * table[:, k], rollout):
                        cov[j, k] = float("inf") if j == k else float("nan")
        return cov


@dataclass(frozen=True)
class ValueMoments:
    """Mean and variance of one sample's value of a kernel, in nats and nats².

    >>> moments = gl.exact.value_moments("k1", gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(1, 1)))
    >>> round(moments.mean, 6), round(moments.variance, 6)
    (0.5, 1.0)
    """

    mean: float
    variance: float


@checked
def value_moments(kernel: str, scenario: Scenario, credit: str = "token") -> ValueMoments:
    """Exact moments of the *value* `Σ_t k(ℓ_t)` (credit `token`) or `k(S)` (`sequence`) under the sampler.

    This is what KL estimators are usually compared by: Schulman, "Approximating KL divergence" (2020). On a `Gaussian` a
    variance that diverges is `inf`. Raises `ValueError` for an unknown kernel or credit.

    >>> scenario = gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(1, 1))
    >>> [round(gl.exact.value_moments(kernel, scenario).variance ** 0.5, 3) for kernel in ("k1", "k2", "k3")]
    [1.0, 0.866, 0.848]
    >>> gl.exact.value_moments("k3", gl.Scenario(gl.Gaussian(0, 0.5), gl.Gaussian(0, 1))).variance
    inf
    """
    estimator = Estimator(kernel, credit=credit)  # type: ignore[arg-type]  # checked at run time
    if is_of(scenario, Markov):
        return ValueMoments(*markov.value_moments(kernel, scenario, credit))
    rollout = enumerated([estimator], scenario)
    values = kernel_values(estimator, rollout).sum(-1)
    mean = rollout.weight @ values
    squares = (values - mean).square()
    diverges = is_of(scenario, Gaussian) and _tail(squares, rollout)
    return ValueMoments(float(mean), float("inf") if diverges else float(rollout.weight @ squares))


# ---- quadrature ---------------------------------------------------------------------------------------------------------


def _by_quadrature(losses: Sequence[Loss], scenario: Scenario) -> list[Moments]:
    rollout = enumerated(losses, scenario)
    integrated = moments_of(losses, rollout, "quadrature")
    for e, loss in enumerate(losses):
        if isinstance(loss, Estimator) and loss.grouped:
            continue
        integrated[e] = _checked(integrated[e], gradients([loss], rollout), rollout, scenario)
    return integrated


def _checked(moments: Moments, batch: Gradients, rollout: Rollout, scenario: Scenario) -> Moments:
    """Moments by quadrature, with the trace that diverges as `inf`. Raises `ValueError` for a mean that does."""
    for table in (batch.tables(e)[:, 0] for e in range(len(batch.score))):
        if any(_tail(column, rollout) for column in table.unbind(-1)):
            raise ValueError(
                f"the expected gradient on {scenario.label} does not fit the reach of quadrature, {REACH:g} standard "
                "deviations of the sampler: the reference is too much wider than the sampler, or the mean does not exist"
            )
        if _tail(table.square().sum(-1), rollout):
            moments = replace(moments, trace_cov=float("inf"))
    return moments


def _tail(values: Tensor, rollout: Rollout) -> bool:
    """Whether `E_μ[values]` diverges.

    Integrands are polynomials times the exponential of a quadratic, so where one has not settled at the end of the
    quadrature the sign of the quadratic decides. Raises `ValueError` when that is a fall, which ends beyond the reach, or
    when it is too close to 0 to call.
    """
    terms = (rollout.weight * values).abs()
    x, log_density = rollout.tokens[:, 0], values.abs().log() + rollout.behaviour_log_prob[:, 0]
    # What lies beyond the reach, if the fall over the outermost panel goes on at its rate.
    beyond = sum(_remainder(x[[end, inner]], log_density[[end, inner]]) for end, inner in ((0, ORDER), (-1, -1 - ORDER)))
    if beyond <= 1e-10 * float(terms.sum()) < float("inf"):
        return False
    std = float(rollout.behaviour_table[0, 1])
    z = (rollout.tokens[:, 0] - rollout.behaviour_table[0, 0]) / std
    if _rises_for_good([_quadratic(z[side], log_density[side]) for side in (z < 0, z > 0)]):
        return True
    raise ValueError(
        f"an integrand of this Gaussian scenario has not decayed within {REACH:g} standard deviations of the sampler: either "
        "the reference is too much wider than the sampler, or the variances are too close to where the moment stops existing"
    )


def _remainder(x: Tensor, log_density: Tensor) -> float:
    """Integral beyond `x[0]` of an exponential through two points; infinite when it rises outwards."""
    fall = float(log_density[1] - log_density[0]) / abs(float(x[1] - x[0]))
    end = float(log_density[0].exp())
    return 0.0 if end == 0 else end / fall if fall > 0 else float("inf")


def _quadratic(z: Tensor, log_density: Tensor) -> tuple[float, float]:
    """`a` of `log density = a z² + b z + c log|z| + d`, fitted to four points of one tail, and how much it may be wrong.

    The error is judged by a second fit further in, where the lower orders of the polynomial weigh more.
    """
    outer = torch.where(torch.isfinite(log_density), z.abs(), 0.0)
    coefficients = []
    for shares in ((1.0, 0.92, 0.84, 0.76), (0.88, 0.8, 0.72, 0.64)):
        at = torch.stack([(outer - share * outer.max()).abs().argmin() for share in shares])
        x, y = z[at], log_density[at]
        if len(set(at.tolist())) < 4 or not bool(torch.isfinite(y).all()):
            return float("-inf"), float("inf")
        coefficients.append(float(torch.linalg.solve(torch.stack([x * x, x, x.abs().log(), torch.ones_like(x)], -1), y)[0]))
    return coefficients[0], 2 * abs(coefficients[0] - coefficients[1])


def _rises_for_good(tails: list[tuple[float, float]]) -> bool:
    """Whether the quadratic, the same in both tails, is positive for certain in the tail where it is known better."""
    quadratic, error = min(tails, key=lambda tail: tail[1])
    return quadratic > BORDER + error


def enumerated(losses: Sequence[Loss], scenario: Scenario) -> Rollout:
    """All responses, with the quadrature of a Gaussian cut where any of the estimators has a kink.

    >>> scenario = gl.Scenario(gl.Bandit([0, 0]), gl.Bandit([0, 1]))
    >>> gl.exact.enumerated([gl.ESTIMATORS["k3-loss"]], scenario).tokens.tolist()
    [[0], [1]]
    """
    if not is_of(scenario, Gaussian):
        return Rollout.enumerated(scenario)
    levels = [kinks(e, scenario.kl()) for e in losses if isinstance(e, Estimator | PolicyLoss)]
    ratios, weights = ({x for level in levels for x in level[side]} for side in (0, 1))
    return Rollout.enumerated(scenario, sorted(ratios), sorted(weights))


@checked
def kinks(e: Estimator | PolicyLoss, kl: float) -> tuple[list[float], list[float]]:
    """Levels of the log-ratio `ℓ` and of `log ρ` at which a coefficient has a kink or a jump.

    `kl` is the step's KL, which a `kl` baseline compares the kernel with. Raises `ValueError` for a clip that acts on the sum of
    advantage and KL, whose sign changes elsewhere.

    >>> gl.exact.kinks(gl.Estimator("k3", clamp_log_ratio=20.0), kl=0.1)
    ([-20.0, 20.0], [])
    """
    if isinstance(e, PolicyLoss):
        return _kinks_of_loss(e, kl)
    ratios = [kink for kernel in {e.kernel, e.effective_gradient_kernel} & set(KERNELS) for kink in KERNELS[kernel].kinks]
    if e.clamp_log_ratio is not None:
        ratios += [-e.clamp_log_ratio, e.clamp_log_ratio]
    if e.clamp_value is not None:
        ratios += _level(e.kernel, e.clamp_value)
    log_weights = [] if e.truncate is None else [log(e.truncate)]
    if e.clip is not None:
        ratios += _level(e.kernel, kl if e.baseline == "kl" else 0.0)
        log_weights += [log1p(e.clip)] + ([log1p(-e.clip)] if e.clip < 1 else [])
    return ratios, log_weights


def _kinks_of_loss(loss: PolicyLoss, kl: float) -> tuple[list[float], list[float]]:
    if loss.combine == "after" and loss.clip is not None and loss.clip_form != "detached":
        raise ValueError(
            "a clip acts on the sign of advantage less βk, which changes where quadrature has no cut; estimate it from samples (samples=…)"
        )
    ratios, log_weights = ([], []) if loss.regulariser is None else kinks(loss.regulariser, kl)
    bounds = [*(loss.bounds or ()), loss.dual_clip, loss.truncate, *(loss.mask or ())]
    bounds += [loss.correction_truncate, *(loss.correction_mask or ())]
    log_weights = log_weights + [log(bound) for bound in bounds if bound is not None and 0 < bound < float("inf")]
    if loss.negative_mask is not None:
        log_weights.append(-loss.negative_mask)
    if loss.regulariser is not None and loss.combine == "head":
        ratios = ratios + _level(loss.regulariser.kernel, kl if loss.regulariser.baseline == "kl" else 0.0)
    return ratios, log_weights


def _level(name: str, level: float) -> list[float]:
    """Where `|k(ℓ)| = level`; nowhere for a kernel that is no function of `ℓ` alone."""
    if name not in KERNELS or KERNELS[name].times_reference:
        return []
    if level == 0:
        return [0.0]

    def excess(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        log_ratio = torch.from_numpy(x)
        distance: npt.NDArray[np.float64] = (KERNELS[name].value(log_ratio, torch.zeros_like(log_ratio)).abs() - level).numpy()
        return distance

    def at(x: float) -> float:
        return float(excess(np.array([x]))[0])

    # |k| passes a level once on each side of 0 for every kernel of gradlab, and where it does so more often every pass is found
    # that is wider than a step of 2 %.
    size = np.geomspace(1e-9, 1e4, 1500)
    grid = np.concatenate([-size[::-1], size])
    with np.errstate(over="ignore"):
        sign = np.sign(np.nan_to_num(excess(grid), nan=np.inf))
    ends = [(float(grid[i]), float(grid[i + 1])) for i in np.flatnonzero(sign[1:] != sign[:-1])]
    return [float(scipy.optimize.brentq(at, low, high, xtol=1e-14)) for low, high in ends]
