"""A one-dimensional Gaussian policy with mean and standard deviation as parameters, and quadrature accurate to 1e-10."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from gradlab._common.names import check_held, check_real
from gradlab._common.shapes import Float64
from gradlab.policies import families
from gradlab.policies.perturb import perturbation
from gradlab.policies.responses import Responses

#: Beyond this many standard deviations a normal density underflows in float64.
REACH = 37.0
#: Nodes in a panel of the quadrature.
ORDER = 16
_PANELS = 192


@dataclass(frozen=True, eq=False, init=False)
class Gaussian:
    """A single real action `y ~ N(mean, std²)`; parameters `(mean, std)`, `T = 1`.

    Raises `ValueError` for a non-finite mean or a std that is not positive and finite.

    >>> gl.Gaussian(0.0, 1.0).parameter_names
    ['mean', 'std']
    >>> gl.Scenario(gl.Gaussian(0.0, 1.0), gl.Gaussian(1.0, 1.0)).kl()
    0.5
    """

    table: Float64[Tensor, "1 2"]
    length: ClassVar[int] = 1
    eos: ClassVar[None] = None
    enumerable: ClassVar[bool] = True
    revisits: ClassVar[bool] = False
    tabulated: ClassVar[bool] = True
    countable: ClassVar[bool] = False
    #: It has no tokens.
    vocab: ClassVar[int] = 0
    prompts: ClassVar[Sequence[Sequence[int]]] = ((),)
    parameter_names: ClassVar[list[str]] = ["mean", "std"]
    family: ClassVar[families.Family] = families.NORMAL
    signature: ClassVar[tuple[Any, ...]] = ("Gaussian",)

    def __init__(self, mean: float, std: float) -> None:
        check_real("Gaussian mean", mean)
        check_real("Gaussian std", std)
        if not math.isfinite(mean):
            raise ValueError(f"Gaussian mean must be finite, got {mean!r}")
        if not (math.isfinite(std) and std > 0):
            raise ValueError(f"Gaussian std must be positive and finite (a standard deviation, not its log), got {std!r}")
        object.__setattr__(self, "table", torch.tensor([[mean, std]], dtype=torch.float64))

    @classmethod
    def random(cls, seed: int = 0) -> Gaussian:
        """The standard normal distribution, whatever the seed: every Gaussian is one in other units."""
        return cls(0.0, 1.0)

    @property
    def mean(self) -> float:
        """Mean of the action."""
        return float(self.table[0, 0].detach())

    @property
    def std(self) -> float:
        """Standard deviation of the action."""
        return float(self.table[0, 1].detach())

    @property
    def parameters(self) -> Float64[Tensor, 2]:
        """`(mean, std)` as a vector `[2]`."""
        return self.table.flatten()

    def with_parameters(self, parameters: Tensor) -> Gaussian:
        """The same policy with other parameters `(mean, std)`; a differentiable vector stays differentiable."""
        clone = copy.copy(self)
        object.__setattr__(clone, "table", parameters.reshape(1, 2))
        return clone

    def contexts(self, tokens: Tensor) -> Tensor:
        """Row of every action: there is one."""
        return torch.zeros_like(tokens, dtype=torch.long)

    def rows_of(self, responses: Responses) -> Tensor:
        """Row of every action: there is one."""
        return self.contexts(responses.tokens)

    def balanced(self, gradient: Tensor) -> Tensor:
        """A target's gradient `[2]` as it is, see `Family.balanced`."""
        return self.family.balanced(gradient.view_as(self.table), self.table).flatten()

    def occupancy(self) -> Tensor:
        """Expected number of actions drawn from the single row, `[1]`."""
        return torch.ones(1, dtype=torch.float64)

    def kl(self, reference: Gaussian) -> Tensor:
        """`KL(self ‖ reference)` in nats, in closed form."""
        return self.family.reverse_kl(self.table, reference.table)[0]

    def sample(self, n: int, rng: np.random.Generator, group: int = 1) -> Responses:
        """Draw `n` actions `[n, 1]`. All groups share the one prompt."""
        return self.respond(self.variates(n, rng))

    def variates(self, n: int, rng: np.random.Generator) -> Tensor:
        """What `n` actions are made of: standard normal variates, `[n, 1]`."""
        check_held(n, 4)
        return torch.from_numpy(rng.standard_normal((n, 1)))

    def respond(self, variates: Tensor) -> Responses:
        """The actions made of `variates` `[n, 1]`."""
        mean, std = self.table[0]
        return Responses.without_prompt(mean + std * variates, torch.ones_like(variates, dtype=torch.bool))

    def moved(self, noise: Tensor) -> Gaussian:
        """Add noise `[2]` to the mean, in units of std, and to log std."""
        return Gaussian(self.mean + self.std * float(noise[0]), self.std * math.exp(float(noise[1])))

    def perturbed(self, scale: float | None = None, seed: int = 0, *, kl: float | None = None) -> Gaussian:
        """Gaussian noise of size `scale` on mean (in units of std) and log std, or as much as `KL(self ‖ result) = kl` takes."""
        return perturbation(self, scale, kl, seed)


def quadrature(gaussians: Sequence[Gaussian], breakpoints: Sequence[float] = ()) -> tuple[Tensor, Tensor]:
    """Gauss–Legendre nodes and weights `[n]` for integrals over the line, accurate to 1e-10.

    Panels are cut at `breakpoints`, the places where an integrand has a kink or a jump, so that every panel sees a smooth
    function. They end `REACH` standard deviations from the first Gaussian, the one sampled from, where its density leaves
    the range of float64; the others only add resolution where they are narrow. Source: composite Gauss–Legendre rule.
    """
    sampler = gaussians[0]
    low, high = sampler.mean - REACH * sampler.std, sampler.mean + REACH * sampler.std
    grids = [np.linspace(low, high, _PANELS + 1)]
    grids += [np.linspace(g.mean - 12 * g.std, g.mean + 12 * g.std, _PANELS // 4) for g in gaussians]
    edges = np.unique(np.concatenate([*grids, np.asarray(breakpoints, dtype=np.float64)]))
    edges = edges[(edges >= low) & (edges <= high)]
    x, w = leggauss(ORDER)
    centre, half = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    nodes, weights = centre[:, None] + half[:, None] * x, half[:, None] * w
    return torch.from_numpy(nodes.ravel()), torch.from_numpy(weights.ravel())


def crossings(numerator: Gaussian, denominator: Gaussian, level: float) -> list[float]:
    """Where `log numerator(x) − log denominator(x) = level`: up to two real points, the roots of a quadratic."""
    a = -0.5 / numerator.std**2 + 0.5 / denominator.std**2
    b = numerator.mean / numerator.std**2 - denominator.mean / denominator.std**2
    c = 0.5 * ((denominator.mean / denominator.std) ** 2 - (numerator.mean / numerator.std) ** 2)
    c += math.log(denominator.std / numerator.std) - level
    if abs(a) < 1e-15 * max(1.0, abs(b)):
        return [] if b == 0 else [-c / b]
    root = b * b - 4 * a * c
    if root < 0:
        return []
    # The numerically stable pair: no cancellation between b and the square root.
    q = -0.5 * (b + math.copysign(math.sqrt(root), b))
    return [q / a] + ([c / q] if q != 0 else [])
