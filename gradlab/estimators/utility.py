"""What an advantage ascends: the utility of the success probability that it is the gradient of, where there is one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from gradlab._common.names import check_name
from gradlab.estimators import advantages
from gradlab.estimators.advantages import ADVANTAGES, Function
from gradlab.estimators.policy_loss import PolicyLoss, why_no_utility

Array = npt.NDArray[np.float64]

#: What the utility of a normalised advantage tends to as groups grow.
LIMITS = {"group_std": "2 arcsin √p"}


@dataclass(frozen=True, eq=False)
class Utility:
    """A utility `U(p)` of the success probability, with `U(0) = 0`.

    name: where it is known, such as `p` or `pass@4`. jumps: `A(1, c+1) − A(0, c)` for `c` right others, `[G]`: the coefficients of
    `U'` in Bernstein polynomials of degree `G − 1`; `None` for the limit of large groups. conditions: of a loss, what keeps it from
    ascending its advantage's utility where it binds.

    >>> print(gl.utility("group_std", group=3), "with slope", round(gl.utility("group_std", group=3).slope(0.2), 6))
    U(p) = 1.41421 p (group_std, G = 3) with slope 1.414214
    """

    name: str | None
    advantage: str
    group: int | None
    jumps: tuple[float, ...] | None
    conditions: tuple[str, ...] = ()

    def slope(self, p: float | Array) -> Any:
        """`U'(p) = Σ_c P(c) [A(1, c+1) − A(0, c)]`, `c ~ Bin(G−1, p)`, for one probability or an array of them."""
        if self.jumps is None:
            with np.errstate(divide="ignore"):
                return _shaped(1 / np.sqrt(_probabilities(p) * (1 - _probabilities(p))), p)
        return _shaped(_bernstein(np.array(self.jumps), _probabilities(p)), p)

    def value(self, p: float | Array) -> Any:
        """`U(p)`, the integral of the slope from 0, for one probability or an array of them."""
        if self.jumps is None:
            return _shaped(2 * np.arcsin(np.sqrt(_probabilities(p))), p)
        # The integral of a Bernstein polynomial is one of a degree more, of running sums of its coefficients.
        return _shaped(_bernstein(np.concatenate([[0.0], np.cumsum(self.jumps)]) / len(self.jumps), _probabilities(p)), p)

    def __str__(self) -> str:
        size = "G → ∞" if self.group is None else f"G = {self.group}"
        return f"U(p) = {self.name or 'a polynomial without a name'} ({self.advantage}, {size})"


def utility(
    advantage: str | Function | PolicyLoss,
    *,
    group: int | None = None,
    k: int | None = None,
    std: Literal["population", "sample"] = "population",
    epsilon: float = 0.0,
) -> Utility | None:
    """The utility `U(p)` of the success probability `p` whose gradient an advantage is, on binary rewards; `None` without one.

    `E[(1/G) Σ_i A_i ∇log π(y_i)] = U'(p) ∇p` with `U'(p) = E A(1, c+1) − E A(0, c)`, `c ~ Bin(G−1, p)` the right ones among the
    others: any advantage of the own reward and those of the group ascends one. It holds on-policy, with one weight for all tokens: a
    normaliser by length, a clip that binds or an importance ratio destroys the form; of a loss, `conditions` says which of them it has.
    An advantage that divides by the spread of the whole batch has none, since a prompt's gradient then depends on the other prompts, and
    neither has a KL in the signal that is compared.

    advantage: a name of `gl.PolicyLoss`, a function of rewards `[…, G]`, or a whole loss, with its own fields. group: responses to a
    prompt; for `group_std` `None` is the limit of large groups. k, std, epsilon: as in `gl.PolicyLoss`.
    Raises `ValueError` for an unknown name, with the nearest, and for a group that is missing or too small.
    Source: derived (identity of the group gradient); 2 arcsin √p: Yao et al., arXiv 2601.10201; pass@k: arXiv 2505.15201.

    >>> import gradlab as gl
    >>> gl.utility("leave_one_out", group=8).name
    'p'
    >>> round(gl.utility("group_std", group=8).slope(0.5), 4)
    1.8557
    >>> len(gl.utility(gl.LOSSES["grpo"]).conditions)
    3
    """
    if isinstance(advantage, PolicyLoss):
        loss = advantage
        if loss.combine == "before" and loss.beta:
            return None
        options = {"k": loss.k if k is None else k, "std": loss.std, "epsilon": loss.epsilon}
        found = utility(loss.advantage, group=loss.group if group is None else group, **options)  # type: ignore[arg-type]
        return None if found is None else replace(found, conditions=why_no_utility(loss))
    if not callable(advantage):
        check_name("advantage", advantage, ADVANTAGES)
        if ADVANTAGES[advantage].batch:
            return None
        if advantage == "group_std" and group is None:
            return Utility(LIMITS[advantage], advantage, None, None)
        if advantage == "reward":
            group = group or 1
    advantages.check(advantage, group, std, epsilon, k)
    assert group is not None
    of = advantages.within_group(advantage, std=std, epsilon=epsilon, k=k)
    # Row c: one right response first, c right others, wrong ones behind; and the same with a wrong response first.
    others = (torch.arange(group - 1) < torch.arange(group)[:, None]).double()
    right, wrong = (of(torch.cat([torch.full((group, 1), own, dtype=torch.float64), others], -1))[:, 0] for own in (1.0, 0.0))
    jumps = (right - wrong).numpy()
    name = advantage if not callable(advantage) else getattr(advantage, "__name__", "function")
    return Utility(_named(name, jumps, group, k), name, group, tuple(jumps.tolist()))


def _named(advantage: str, jumps: Array, group: int, k: int | None) -> str | None:
    scale = float(jumps[0])
    if np.allclose(jumps, scale, rtol=1e-12, atol=1e-12):
        if abs(scale - 1) < 1e-12:
            return "p"
        return "0" if scale == 0 else f"(1 − 1/{group}) p" if advantage == "mean" else f"{scale:.6g} p"
    if advantage == "pass_at_k":
        return f"pass@{k}"
    return f"{LIMITS[advantage]} as G → ∞" if advantage in LIMITS else None


def _probabilities(p: float | Array) -> Array:
    found = np.asarray(p, dtype=np.float64)
    if not bool(((found >= 0) & (found <= 1)).all()):
        raise ValueError(f"a success probability lies between 0 and 1, got {p!r}")
    return found


def _bernstein(coefficients: Array, p: Array) -> Array:
    """`Σ_c coefficient_c P(c)`, `c ~ Bin(n, p)`, by repeated averaging (de Casteljau), in which nothing cancels."""
    found = np.broadcast_to(coefficients, (*p.shape, len(coefficients))).copy()
    while found.shape[-1] > 1:
        found = found[..., :-1] * (1 - p[..., None]) + found[..., 1:] * p[..., None]
    return found[..., 0]


def _shaped(found: Array, p: float | Array) -> Any:
    return float(found) if np.ndim(p) == 0 else found
