"""Corrections for data of another policy: what each puts in the place of the importance weight, what it removes and what it costs.

The weight that makes a sum over whole responses unbiased is `w = Π_t ρ_t`, `ρ = π/μ`. A correction `f_t` in its place changes the
expectation of anything bounded by 1 by at most `E_μ |f_t − w|`, its bias, and has second moment `E_μ f_t²`, its noise; `√(bias² + noise/N)`
bounds the root mean squared error of a mean of N responses. Nothing else is assumed, so that gradients of a bounded advantage are covered.

The corrections are those of `gradlab.estimators.corrections` but the prefixes'; PPO's clip, arXiv 1707.06347.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gradlab.estimators.corrections import CORRECTIONS as EVERY
from gradlab.estimators.corrections import Correction
from gradlab.records.block import Block

Array = npt.NDArray[Any]

#: Corrections that a response's tokens share but for their own ratio.
CORRECTIONS: dict[str, Correction] = {name: each for name, each in EVERY.items() if each.level != "prefix"}
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
        if correction.bounds:
            raw = correction.raw(ratio, product, mean)
            found[f"{name} above"] = block.sums(mask & (f != raw) & (raw > 1))
            found[f"{name} below"] = block.sums(mask & (f != raw) & (raw < 1))
    if sign is not None:
        found["clip above"] = block.sums(mask & (ratio > 1 + CLIP) & (sign > 0))
        found["clip below"] = block.sums(mask & (ratio < 1 - CLIP) & (sign < 0))
    return found
