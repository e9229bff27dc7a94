"""Kernels `k(ℓ)` of the log-ratio `ℓ = log π(y|s) − log ref(y|s)`: value, and derivative with respect to `log π`.

The derivative is the coefficient a kernel puts on the score when it is used as a loss. Both are written out in closed form;
the tests differentiate the value by autograd and compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradlab._common.accurate import excess
from gradlab._common.registry import Registry


@dataclass(frozen=True)
class Kernel:
    """One kernel: `value(ℓ, log ref)` and `derivative(ℓ, log ref) = ∂ value / ∂ log π`, elementwise, both float64; `k(0) = 0`.

    kinks: log-ratios at which the derivative jumps, where quadrature cuts its panels. `times_reference`: the kernel is a
    function of `ℓ` times `ref(y)`, as `mse_sampled` is; every other kernel is a function of the log-ratio alone.
    For whole responses on `Markov` chains a kernel of a sum has to be a running sum. It is if it is `additive`, or if it has a
    `growth` `g` with

        k'(S + ℓ) = g(ℓ) k'(S) + k'(ℓ),    k(S + ℓ) = k(S) + k'(S) k'(ℓ) / k''(0) + k(ℓ),

    as every kernel `a (e^{bℓ} − 1 − bℓ)` has, `g(ℓ) = e^{bℓ}`, and k2 as their limit, `g = 1`. A kernel with neither is not
    decomposable: credit `sequence` is refused on `Markov`, and exact wherever responses can be listed.

    >>> import torch
    >>> k2 = gl.Kernel("half_square", lambda x, log_ref: x**2 / 2, lambda x, log_ref: x, source="mine", growth=torch.ones_like)
    >>> k2.derivative(torch.tensor([-1.0, 2.0]), None).tolist()
    [-1.0, 2.0]
    """

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor], Tensor]
    source: str
    kinks: tuple[float, ...] = ()
    additive: bool = False
    growth: Callable[[Tensor], Tensor] | None = None
    times_reference: bool = False

    @property
    def decomposable(self) -> bool:
        """Whether the kernel of a sum is a running sum."""
        return self.additive or self.growth is not None


def _from_reference(x: Tensor, log_ref: Tensor, near: Tensor, taken: Tensor | float) -> Tensor:
    """`ref · near` where the log-ratio `x` is below 1, else `π − ref · taken`: ref underflows where `e^x` overflows."""
    ref = log_ref.exp()
    return torch.where(x.abs() < 1, ref * near, (log_ref + x).exp() - ref * taken)


_SCHULMAN = "Schulman, 'Approximating KL divergence' (2020)"

_OWN = {
    kernel.name: kernel
    for kernel in (
        Kernel("k1", lambda x, _: x, lambda x, _: torch.ones_like(x), _SCHULMAN, additive=True),
        Kernel("k2", lambda x, _: 0.5 * x.square(), lambda x, _: x, _SCHULMAN, growth=torch.ones_like),
        Kernel("k3", lambda x, _: excess(-x), lambda x, _: -torch.expm1(-x), _SCHULMAN, growth=lambda x: (-x).exp()),
        Kernel(
            "abs", lambda x, _: x.abs(), lambda x, _: x.sign(), "verl.trainer.ppo.core_algos.kl_penalty, 'abs'", kinks=(0.0,)
        ),
        Kernel(
            "k3_swapped",
            lambda x, _: excess(x),
            lambda x, _: torch.expm1(x),
            "k3 with the ratio upside down; descends ½χ²(π‖ref)",
            growth=torch.exp,
        ),
        Kernel(
            "mse_sampled",
            # π − ref − ref·ℓ, the non-negative function of log π whose derivative is the bounded coefficient π − ref.
            lambda x, log_ref: _from_reference(x, log_ref, excess(x.clamp(-1, 1)), 1 + x),
            lambda x, log_ref: _from_reference(x, log_ref, torch.expm1(x.clamp(-1, 1)), 1.0),
            "one-sample form of ½Σ(π−ref)²; arXiv 2510.01555, on bounded alternatives",
            growth=torch.exp,
            times_reference=True,
        ),
    )
}

#: Names → kernels, in the order of lists; a registered one comes last.
KERNELS: Registry[Kernel] = Registry("kernel", _OWN)

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


def check_kernel(kernel: Kernel) -> None:
    """Raise `ValueError` unless a kernel is what it says: its derivative that of its value, 0 at 0, and its growth that of a sum."""
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    away = [x != kink for kink in kernel.kinks]
    x = x[torch.stack(away).all(0)] if away else x
    log_ref = torch.linspace(-4, -0.1, len(x), dtype=torch.float64)
    leaf, leaf_ref = x.clone().requires_grad_(True), log_ref.clone()
    try:
        with torch.enable_grad():
            values = kernel.value(leaf, leaf_ref)
            (slope,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True)
        derivative, zero = kernel.derivative(x, log_ref), kernel.value(0 * x, log_ref)
    except Exception as error:
        raise ValueError(
            f"kernel {kernel.name} does not take ℓ and log ref as float64 tensors of one shape: {type(error).__name__}: {error}"
        ) from error
    slope = torch.zeros_like(x) if slope is None else slope
    for what, found in (("value", values), ("derivative", derivative)):
        if not (isinstance(found, Tensor) and found.shape == x.shape and bool(torch.isfinite(found.detach()).all())):
            raise ValueError(f"the {what} of kernel {kernel.name} is not one finite number for each log-ratio between −3 and 3")
    if not _close(derivative, slope):
        worst = int((derivative - slope).abs().argmax())
        raise ValueError(
            f"the derivative of kernel {kernel.name} is not that of its value: at ℓ = {float(x[worst]):.2g} it is "
            f"{float(derivative[worst]):.6g}, autograd gives {float(slope[worst]):.6g}; a place where it jumps belongs in kinks"
        )
    if float(zero.abs().max()) > 1e-12:
        raise ValueError(f"kernel {kernel.name} must be 0 at ℓ = 0, where padding is, got {float(zero.abs().max()):g}")
    _check_growth(kernel, x, log_ref)


def _check_growth(kernel: Kernel, x: Tensor, log_ref: Tensor) -> None:
    s, other, ref = x.flip(0) / 2, log_ref.flip(0), (log_ref.exp() if kernel.times_reference else torch.ones_like(x))
    both = torch.zeros_like(x)

    def of(function: Callable[[Tensor, Tensor], Tensor], at: Tensor) -> Tensor:
        return function(at, both) if kernel.times_reference else function(at, log_ref)

    if kernel.times_reference and not _close(kernel.value(x, log_ref), ref * of(kernel.value, x)):
        raise ValueError(f"kernel {kernel.name} says that it is a function of ℓ times ref(y), and is not")
    if not kernel.times_reference and not _close(kernel.value(x, other), kernel.value(x, log_ref)):
        raise ValueError(f"kernel {kernel.name} depends on log ref, which only one that says times_reference may")
    k, d = of(kernel.value, s + x), of(kernel.derivative, s + x)
    if kernel.additive and not _close(k, of(kernel.value, s) + of(kernel.value, x)):
        raise ValueError(f"kernel {kernel.name} says that it is additive, but k(S + ℓ) is not k(S) + k(ℓ)")
    if kernel.growth is not None:
        slope = of(kernel.derivative, x)
        grown = kernel.growth(x) * of(kernel.derivative, s) + slope
        summed = of(kernel.value, s) + of(kernel.derivative, s) * slope / curvature(kernel) + of(kernel.value, x)
        if not (_close(d, grown) and _close(k, summed)):
            raise ValueError(
                f"kernel {kernel.name} does not grow as it says: k'(S + ℓ) = g(ℓ) k'(S) + k'(ℓ) and k(S + ℓ) = k(S) + "
                "k'(S) k'(ℓ) / k''(0) + k(ℓ) must hold; leave growth out, and the kernel is not decomposable"
            )


def curvature(kernel: Kernel) -> float:
    """`k''(0)` of a kernel with a growth, from its theorem at `S = ℓ = 1`: `(k(2) − 2 k(1)) k''(0) = k'(1)²`."""
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    slope = kernel.derivative(one, zero)
    return float(slope.square() / (kernel.value(2 * one, zero) - 2 * kernel.value(one, zero)))


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b, rtol=1e-9, atol=1e-9))
