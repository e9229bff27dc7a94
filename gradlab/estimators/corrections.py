"""Corrections for data of another policy: what stands in the place of the importance weight, by its level and by what bounds it.

Sources: truncation (TIS), Yao et al. 2025, and arXiv 1606.02647; masks (MIS, IcePop) as in verl 0.9.1 `rollout_corr` and in slime;
geometric means, GSPO, arXiv 2507.18071, TRL #4891 and NeMo-RL #2269.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]


def bounded(weights: Tensor, truncate: float | None, mask: tuple[float, float] | None) -> Tensor:
    """Weights that are 0 outside the band `mask`, and at most `truncate`."""
    if mask is not None:
        weights = torch.where((weights >= mask[0]) & (weights <= mask[1]), weights, 0.0)
    return weights if truncate is None else weights.clamp(max=truncate)


@dataclass(frozen=True)
class Correction:
    """A weight at the level of tokens `ρ_t`, prefixes `Π_{u≤t} ρ_u`, sequences `Πρ` or their geometric mean, and what bounds it."""

    name: str
    level: str
    statement: str
    truncate: float | None = None
    mask: tuple[float, float] | None = None

    @property
    def bounds(self) -> bool:
        """Whether anything is bounded."""
        return self.truncate is not None or self.mask is not None

    def raw(self, token: Array, sequence: Array, geometric: Array) -> Array:
        """The weight before it is bounded, from the ratio of a token, the product of its response and its geometric mean."""
        return {"none": np.ones_like(token), "token": token, "sequence": sequence, "geometric": geometric}[self.level]

    def bounded(self, weights: Array) -> Array:
        """Weights as they are used."""
        found: Array = bounded(torch.from_numpy(np.require(weights, requirements="W")), self.truncate, self.mask).numpy()
        return found

    def weight(self, token: Array, sequence: Array, geometric: Array) -> Array:
        """What multiplies a token's term."""
        return self.bounded(self.raw(token, sequence, geometric))


#: Corrections by name, from none to the exact weight of a sum over whole responses.
CORRECTIONS: dict[str, Correction] = {
    c.name: c
    for c in (
        Correction("none", "none", "1"),
        Correction("token", "token", "ρ"),
        Correction("token-truncated", "token", "min(ρ, 2)", truncate=2.0),
        Correction("token-masked", "token", "ρ where 0.5 ≤ ρ ≤ 2, else 0", mask=(0.5, 2.0)),
        Correction("icepop", "token", "ρ where 0.5 ≤ ρ ≤ 5, else 0", mask=(0.5, 5.0)),
        Correction("geometric", "geometric", "(Πρ)^(1/L)"),
        Correction("geometric-truncated", "geometric", "min((Πρ)^(1/L), 2)", truncate=2.0),
        Correction("geometric-masked", "geometric", "(Πρ)^(1/L) where within 1 % of 1, else 0", mask=(0.99, 1.01)),
        Correction("prefix", "prefix", "Π_{u≤t} ρ_u"),
        Correction("prefix-truncated", "prefix", "min(Π_{u≤t} ρ_u, 2)", truncate=2.0),
        Correction("prefix-masked", "prefix", "Π_{u≤t} ρ_u where it is ≤ 2, else 0", mask=(0.0, 2.0)),
        Correction("sequence-truncated", "sequence", "min(Πρ, 2)", truncate=2.0),
        Correction("sequence-masked", "sequence", "Πρ where Πρ ≤ 2, else 0", mask=(0.0, 2.0)),
        Correction("sequence", "sequence", "Πρ"),
    )
}
