"""Fits of power laws."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


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
