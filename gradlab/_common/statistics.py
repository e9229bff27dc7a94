"""Statistics that several modules need: the jackknife, and the fit of a power law."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import special

Array = npt.NDArray[np.float64]


def jackknife(left_out: Array, level: float) -> Array:
    """Half-width `[...]` of a Student interval, from a statistic with each of `B` batches left out, `[..., B]`.

    `(B − 1)/B · Σ_b (s₋ᵦ − mean)²` is the squared standard error; for a mean that is the usual one. Source: Efron and Stein (1981),
    The Annals of Statistics 9.
    """
    B = left_out.shape[-1]
    half_width: Array = special.stdtrit(B - 1, (1 + level) / 2) * np.sqrt((B - 1) * left_out.var(-1))
    return half_width


def power_law(x: Array, y: Array) -> tuple[Array, Array, Array]:
    """Slope, its standard error and factor of `y ≈ factor · x^slope`, by least squares of logarithms along the last axis.

    The error is `nan` for two points, through which every power law passes.
    """
    u, v = np.log(x), np.log(y)
    du, dv = u - u.mean(-1, keepdims=True), v - v.mean(-1, keepdims=True)
    spread = np.square(du).sum(-1)
    slope = (du * dv).sum(-1) / spread
    residual = np.square(dv - slope[..., None] * du).sum(-1)
    degrees = x.shape[-1] - 2
    error = np.sqrt(residual / degrees / spread) if degrees else np.full_like(slope, np.nan)
    return slope, error, np.exp(v.mean(-1) - slope * u.mean(-1))
