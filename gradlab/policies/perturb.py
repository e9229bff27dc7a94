"""Neighbours of a policy: Gaussian noise on its natural parameters, by size or by distance in KL."""

from __future__ import annotations

from typing import Protocol, TypeVar

import numpy as np
import scipy
import torch
from torch import Tensor

from gradlab._common.names import check_real
from gradlab._common.streams import generator


class Perturbable(Protocol):
    """A policy that can be moved by noise."""

    @property
    def parameters(self) -> Tensor: ...

    def moved(self: P, noise: Tensor) -> P:
        """The policy with noise `[p]` added to its natural parameters."""

    def kl(self: P, reference: P) -> Tensor:
        """`KL(self ‖ reference)` in nats."""


P = TypeVar("P", bound=Perturbable)


class UnreachableKL(ValueError):
    """No perturbation along a direction has the KL asked for."""

    def __init__(self, seed: int, kl: float) -> None:
        super().__init__(
            f"no perturbation in the direction of seed {seed} reaches a KL of {kl} nats with probabilities in float64's range; "
            "try another seed"
        )


def perturbation(policy: P, scale: float | None, kl: float | None, seed: int) -> P:
    """Add Gaussian noise of standard deviation `scale`, or of the scale that makes `KL(policy ‖ result)` equal `kl`.

    The same seed gives the same direction at every scale. Raises `ValueError` when not exactly one of `scale` and `kl` is
    given, when it is negative or not finite, and `UnreachableKL` when no scale up to 10⁴ reaches the KL.
    """
    given = [(name, size) for name, size in (("scale", scale), ("kl", kl)) if size is not None]
    if len(given) != 1:
        raise ValueError(f"perturbed() takes exactly one of scale and kl, got scale={scale!r}, kl={kl!r}")
    [(name, size)] = given
    check_real(name, size)
    if not (np.isfinite(size) and size >= 0):
        raise ValueError(f"perturbed() needs a finite {name} of at least 0, got {size!r}")
    rng = generator(seed, "policies.perturbed")
    noise = torch.from_numpy(rng.standard_normal(len(policy.parameters)))
    if scale is not None or size == 0:
        return policy.moved(size * noise)

    def excess(log_scale: float) -> float:
        return float(policy.kl(policy.moved(float(np.exp(log_scale)) * noise))) - size

    # KL ≈ ½ scale² · curvature near zero, so the root of log KL in log scale is well conditioned.
    high = float(np.log(np.sqrt(size)))
    while excess(high) < 0:
        high += np.log(2)
        if high > np.log(1e4):
            raise UnreachableKL(seed, size)
    low = high
    while excess(low) > 0:
        low -= np.log(2)
    # Written with its ends first, so that a bracket end which is already the root is returned as it is.
    root = low if low == high else scipy.optimize.brentq(excess, low, high, xtol=1e-15, rtol=1e-14)
    return policy.moved(float(np.exp(root)) * noise)
