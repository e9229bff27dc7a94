"""Kernels `k(ℓ)` of the log-ratio `ℓ = log π(y|s) − log ref(y|s)`: value, and derivative with respect to `log π`.

The derivative is the coefficient a kernel puts on the score when it is used as a loss. Both are written out in closed form;
the tests differentiate the value by autograd and compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradlab.accurate import excess


@dataclass(frozen=True)
class Kernel:
    """One kernel: `value(ℓ, log ref)` and `derivative(ℓ, log ref) = ∂ value / ∂ log π`, elementwise.

    Only `mse_sampled` looks at `log ref`; every other kernel is a function of the log-ratio alone.
    """

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor], Tensor]
    source: str


def _from_reference(x: Tensor, log_ref: Tensor, near: Tensor, taken: Tensor | float) -> Tensor:
    """`ref · near` where the log-ratio `x` is below 1, else `π − ref · taken`: ref underflows where `e^x` overflows."""
    ref = log_ref.exp()
    return torch.where(x.abs() < 1, ref * near, (log_ref + x).exp() - ref * taken)


_SCHULMAN = "Schulman, 'Approximating KL divergence' (2020)"

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel("k1", lambda x, _: x, lambda x, _: torch.ones_like(x), _SCHULMAN),
        Kernel("k2", lambda x, _: 0.5 * x.square(), lambda x, _: x, _SCHULMAN),
        Kernel("k3", lambda x, _: excess(-x), lambda x, _: -torch.expm1(-x), _SCHULMAN),
        Kernel("abs", lambda x, _: x.abs(), lambda x, _: x.sign(), "verl.trainer.ppo.core_algos.kl_penalty, 'abs'"),
        Kernel(
            "k3_swapped",
            lambda x, _: excess(x),
            lambda x, _: torch.expm1(x),
            "k3 with the ratio upside down; descends ½χ²(π‖ref)",
        ),
        Kernel(
            "mse_sampled",
            # π − ref − ref·ℓ, the non-negative function of log π whose derivative is the bounded coefficient π − ref.
            lambda x, log_ref: _from_reference(x, log_ref, excess(x.clamp(-1, 1)), 1 + x),
            lambda x, log_ref: _from_reference(x, log_ref, torch.expm1(x.clamp(-1, 1)), 1.0),
            "one-sample form of ½Σ(π−ref)²; arXiv 2510.01555, on bounded alternatives",
        ),
    )
}

#: Kernels that sum over the whole vocabulary at a prefix, so that they depend on the prefix only, not on the token drawn.
VOCABULARY_KERNELS: dict[str, str] = {
    "full": "Σ_v π(v) (log π(v) − log ref(v)), Rao–Blackwell: Amini, Vieira & Cotterell, arXiv 2504.10637",
    "mse": "½ Σ_v (π(v) − ref(v))², the bounded alternative of arXiv 2510.01555",
}


def value(name: str, log_ratio: Tensor, log_ref: Tensor, log_ratio_bound: float | None, value_bound: float | None) -> Tensor:
    """Return `clamp(k(clamp(ℓ, ±log_ratio_bound)), ±value_bound)`, elementwise and differentiable."""
    x = log_ratio if log_ratio_bound is None else log_ratio.clamp(-log_ratio_bound, log_ratio_bound)
    k = KERNELS[name].value(x, log_ref)
    return k if value_bound is None else k.clamp(-value_bound, value_bound)


def derivative(
    name: str, log_ratio: Tensor, log_ref: Tensor, log_ratio_bound: float | None, value_bound: float | None
) -> Tensor:
    """Return `∂ value / ∂ log π`: the kernel's derivative where no clamp binds, 0 where one does."""
    slope = KERNELS[name].derivative(log_ratio, log_ref)
    if log_ratio_bound is not None:
        slope = torch.where(log_ratio.abs() <= log_ratio_bound, slope, 0.0)
    if value_bound is not None:
        inside = value(name, log_ratio, log_ref, log_ratio_bound, None).abs() <= value_bound
        slope = torch.where(inside, slope, 0.0)
    return slope
