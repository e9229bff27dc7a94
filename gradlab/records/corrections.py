"""Corrections for data of another policy: what each puts in the place of the importance weight, what it removes and what it costs.

The weight that makes a sum over whole responses unbiased is `w = Π_t ρ_t`, `ρ = π/μ`. A correction `f_t` in its place changes the
expectation of anything bounded by 1 by at most `E_μ |f_t − w|`, its bias, and has second moment `E_μ f_t²`, its noise; `√(bias² + noise/N)`
bounds the root mean squared error of a mean of N responses. Nothing else is assumed, so that gradients of a bounded advantage are covered.

Sources: truncation (TIS), Yao et al. 2025, and arXiv 1606.02647; masks (MIS, IcePop) as in verl 0.9.1 `rollout_corr` and in slime;
geometric means, GSPO, arXiv 2507.18071; PPO's clip, arXiv 1707.06347.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradlab.records.block import Block

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Correction:
    """`weight(ρ, w, g)` of a token, from its ratio, its response's product and its response's geometric mean, and what it bounds."""

    name: str
    weight: Callable[[Array, Array, Array], Array]
    statement: str
    raw: Callable[[Array, Array, Array], Array] | None = None


def _band(low: float, high: float) -> Callable[[Array], Array]:
    return lambda x: np.where((x >= low) & (x <= high), x, 0.0)


def _ratio(r: Array, _: Array, __: Array) -> Array:
    return r


def _product(_: Array, w: Array, __: Array) -> Array:
    return w


def _mean(_: Array, __: Array, g: Array) -> Array:
    return g


CORRECTIONS: dict[str, Correction] = {
    c.name: c
    for c in (
        Correction("none", lambda r, w, g: np.ones_like(r), "1"),
        Correction("token", _ratio, "ρ"),
        Correction("token-truncated", lambda r, w, g: np.minimum(r, 2.0), "min(ρ, 2)", _ratio),
        Correction("token-masked", lambda r, w, g: _band(0.5, 2.0)(r), "ρ where 0.5 ≤ ρ ≤ 2, else 0", _ratio),
        Correction("icepop", lambda r, w, g: _band(0.5, 5.0)(r), "ρ where 0.5 ≤ ρ ≤ 5, else 0", _ratio),
        Correction("geometric", _mean, "(Πρ)^(1/L)"),
        Correction("geometric-masked", lambda r, w, g: _band(0.99, 1.01)(g), "(Πρ)^(1/L) where within 1 % of 1, else 0", _mean),
        Correction("sequence-truncated", lambda r, w, g: np.minimum(w, 2.0), "min(Πρ, 2)", _product),
        Correction("sequence-masked", lambda r, w, g: _band(0.0, 2.0)(w), "Πρ where Πρ ≤ 2, else 0", _product),
        Correction("sequence", _product, "Πρ"),
    )
}
#: Bounds of PPO's clip that are looked at.
CLIP = 0.2


def sums(block: Block, log_weight: Array, sign: Array | None) -> dict[str, Array]:
    """For every correction, sums over each response: `f²`, `|f − w|`, bounded tokens; and tokens that PPO's clip silences."""
    mask, owner = block.mask, block.owner
    total = block.sums(log_weight)
    with np.errstate(over="ignore"):
        ratio, product = np.exp(log_weight), np.exp(total)[owner]
        mean = np.exp(total / np.maximum(block.live, 1))[owner]
    found = {}
    for name, correction in CORRECTIONS.items():
        f = np.where(mask, correction.weight(ratio, product, mean), 0.0)
        found[f"{name} square"] = block.sums(f * f)
        found[f"{name} bias"] = block.sums(np.where(mask, np.abs(f - product), 0.0))
        if correction.raw is not None:
            raw = correction.raw(ratio, product, mean)
            found[f"{name} above"] = block.sums(mask & (f != raw) & (raw > 1))
            found[f"{name} below"] = block.sums(mask & (f != raw) & (raw < 1))
    if sign is not None:
        found["clip above"] = block.sums(mask & (ratio > 1 + CLIP) & (sign > 0))
        found["clip below"] = block.sums(mask & (ratio < 1 - CLIP) & (sign < 0))
    return found
