"""Closed forms: the policy that maximises expected reward minus a divergence from the reference.

Over whole responses that is one distribution; token by token, with frozen prefixes, every context has its own, and the rewards
a context sees are those that the policy collects after it, without the divergences to come.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy

from gradlab._common.arguments import checked, numbers
from gradlab._common.names import check_name
from gradlab.policies import Bandit, Tree
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario

Array = np.ndarray[Any, np.dtype[np.float64]]

#: Name → what is subtracted, and the maximiser of `Σ p r − β D(p, ref)`.
DIVERGENCES: dict[str, str] = {
    "reverse_kl": "KL(p‖ref): p ∝ ref · exp(r/β)",
    "forward_kl": "KL(ref‖p): p = β ref / (Λ − r), arXiv 2510.20817",
    "chi2": "½ χ²(p‖ref): p = ref · max(0, 1 + (r − Λ)/β)",
    "mse": "½ Σ (p − ref)²: p = max(0, ref + (r − Λ)/β), a projection onto the simplex",
}


@checked
def tilted(reward: npt.ArrayLike, reference: npt.ArrayLike, coefficient: float, divergence: str = "reverse_kl") -> Array:
    """Distribution `[n]` that maximises `Σ p r − β D(p, ref)`; see `DIVERGENCES`. `Λ` is found by bracketing.

    Raises `ValueError` for an unknown divergence, a coefficient that is not positive, or shapes that differ.

    >>> gl.optima.tilted([0.0, 1.0], [0.5, 0.5], coefficient=1.0).round(4).tolist()  # ∝ (1, e)
    [0.2689, 0.7311]
    """
    check_name("divergence", divergence, DIVERGENCES)
    r, ref = numbers("reward", reward), numbers("reference", reference)
    if r.shape != ref.shape:
        raise ValueError(f"reward and reference must be vectors [n] of one length, got {list(r.shape)} and {list(ref.shape)}")
    if not 0 < coefficient < np.inf:
        raise ValueError(
            f"coefficient must be positive and finite, got {coefficient}; without a divergence the best response takes all"
        )
    if (ref < 0).any() or abs(ref.sum() - 1) > 1e-6:
        raise ValueError(f"reference must be probabilities that sum to 1, got {ref.tolist()!r:.80}")
    r = r - r.max()
    if divergence == "reverse_kl":
        p = ref * np.exp(r / coefficient)
        return np.asarray(p / p.sum())
    if divergence == "forward_kl":
        # Λ − max r lies between where the best entry alone has mass 1 and where every entry has at most its reference's.
        low, high = float((r + coefficient * ref).max()), coefficient
        root = scipy.optimize.brentq(
            lambda top: float((coefficient * ref / (top - r)).sum()) - 1, low, high, xtol=1e-300, rtol=1e-15
        )
        p = coefficient * ref / (root - r)
        return np.asarray(p / p.sum())
    weight = ref if divergence == "chi2" else np.ones_like(ref)
    base = ref / weight + r / coefficient
    # max(0, base − Λ) with mass 1: the support is a set of largest values of `base`, found by sorting.
    order = np.argsort(-base)
    mass, total = np.cumsum(weight[order]), np.cumsum((weight * base)[order])
    levels = (total - 1) / mass
    support = int(np.flatnonzero(base[order] > levels)[-1])
    return np.asarray(weight * np.maximum(0, base - levels[support]))


@checked
def optimum(
    reference: Bandit | Tree,
    reward: npt.ArrayLike,
    coefficient: float,
    divergence: str = "reverse_kl",
    credit: str = "sequence",
) -> Array:
    """Probabilities `[n]` of all responses (in the order of `reference.enumerate()`) at the regularised optimum.

    credit `sequence`: the divergence is between whole responses. credit `token`: every context solves its own problem with
    the rewards `Q(s, v)` that the same policy collects afterwards; the divergences of later contexts are not charged, which
    is the stationary point of an exact per-token loss. Raises `ValueError` as `tilted` does, and for an unknown credit.

    >>> reference = gl.Tree([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    >>> gl.optima.optimum(reference, [0.0, 0.0, 0.0, 1.0], coefficient=1.0).round(4).tolist()
    [0.1749, 0.1749, 0.1749, 0.4754]
    """
    check_name("credit", credit, ("sequence", "token"))
    rollout = Rollout.enumerated(Scenario(reference, reference))
    r, ref = numbers("reward", reward), rollout.weight.numpy()
    if r.shape != ref.shape:
        raise ValueError(f"reward must be one number per response, [{len(ref)}], got [{len(r)}]: {reward!r:.80}")
    if credit == "sequence":
        return tilted(r, ref, coefficient, divergence)
    rows, tokens, mask = rollout.contexts.numpy(), rollout.tokens.numpy(), rollout.mask.numpy()
    table = reference.table.softmax(-1).numpy()
    value, probability = r.copy(), np.ones_like(r)
    for t in reversed(range(rows.shape[1])):
        at = mask[:, t]
        ahead = np.zeros_like(table)  # all responses through one token of a context agree on what follows
        ahead[rows[at, t], tokens[at, t]] = value[at]
        chosen = np.zeros_like(table)
        for row in np.unique(rows[at, t]):
            chosen[row] = tilted(ahead[row], table[row], coefficient, divergence)
        value[at] = (chosen * ahead).sum(-1)[rows[at, t]]
        probability[at] *= chosen[rows[at, t], tokens[at, t]]
    return probability
