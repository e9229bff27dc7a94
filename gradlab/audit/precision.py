"""How exact a loss can be expected to be, by the precision it computes in."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """Bounds that follow from a dtype.

    match: relative error up to which an expected gradient equals another. slack: relative change that means something in a
    probe. level: change along a curve. step, slope: of finite differences, and how well they can be trusted. perturbation: a change of
    log-probabilities that changes how every number is rounded and, to second order, nothing else.
    """

    dtype: torch.dtype
    match: float
    slack: float
    level: float
    step: float
    slope: float
    perturbation: float

    @property
    def name(self) -> str:
        """`float64`, `float32` or `half`."""
        return "half" if self.dtype is torch.bfloat16 else str(self.dtype).removeprefix("torch.")

    @property
    def eps(self) -> float:
        """Rounding of one operation."""
        return float(torch.finfo(self.dtype).eps)


#: From the finest on; `half` stands for both sixteen-bit formats.
PRECISIONS = (
    # Divisions by L + 1e-8, which are common, are to be recognised: the error that a verdict reports tells them from exact ones.
    Precision(torch.float64, match=1e-7, slack=1e-6, level=1e-9, step=1e-5, slope=2e-3, perturbation=1e-8),
    Precision(torch.float32, match=1e-6, slack=1e-4, level=1e-5, step=1e-2, slope=2e-3, perturbation=1e-5),
    Precision(torch.bfloat16, match=5e-3, slack=3e-2, level=2e-2, step=0.2, slope=0.1, perturbation=4e-3),
)
