"""Exact ascent on a reward minus a regulariser: the flow in a policy's logits, and where it rests.

The regulariser enters through its exact expected gradient, which need not be the gradient of anything:
`dθ/dτ = ∇E_π[r] − β E_π[g]`, on-policy, in the policy's logits. The flow is followed with a stiff solver and, where it comes to
rest inside the simplex, finished by root finding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from gradlab._common.arguments import checked
from gradlab._common.names import check_positive, check_whole
from gradlab.estimators.estimator import Estimator
from gradlab.measure import by_name, one_thread
from gradlab.moments import Gradients, gradients
from gradlab.policies import Bandit, Tree
from gradlab.rollout import Rollout

Array = np.ndarray[Any, np.dtype[np.float64]]

#: The flow is followed until this time, in logits per nat, or until a response's log-probability is below this.
T_MAX, MIN_LOG_PROB = 1e8, -200.0
#: A flow whose scaled velocity has fallen to this is handed over to root finding.
SWITCH_TOL = 1e-4
#: Steps of the solver between two checks of the residual.
CHECK_EVERY = 4
#: Largest scaled velocity that counts as none.
ROOT_TOL = 1e-9


@dataclass(frozen=True, eq=False)
class World:
    """A reward for every response of a reference policy: `reward` `[n]`, in the order of `reference.enumerate()`.

    Raises `ValueError` for other policies than `Bandit` and `Tree` and for a reward of another shape or not finite.

    >>> import torch
    >>> world = gl.ascent.World("two tokens", gl.Bandit([0, 0]), torch.tensor([0.0, 1.0]))
    >>> len(world.reward) == len(world.reference.enumerate())
    True
    """

    name: str
    reference: Bandit | Tree
    reward: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.reference, Bandit | Tree):
            raise ValueError(f"exact ascent needs a gl.Bandit or a gl.Tree, got {type(self.reference).__name__}")
        object.__setattr__(self, "reward", torch.as_tensor(self.reward, dtype=torch.float64))
        n = len(self.reference.enumerate())
        if self.reward.shape != (n,) or not bool(torch.isfinite(self.reward).all()):
            raise ValueError(f"reward must be one finite number per response, [{n}], got {list(self.reward.shape)}")


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """Where an ascent ended: the policy's table, response probabilities `[n]`, and the way there (`times`, `path` `[k, n]`).

    >>> import torch
    >>> world = gl.ascent.World("two tokens", gl.Bandit([0, 0]), torch.tensor([0.0, 1.0]))
    >>> found = gl.ascent.ascend(world, "k1-reward", coefficient=1.0)
    >>> found.status, found.residual < 1e-9
    ('interior', True)
    """

    table: Tensor
    probabilities: Array
    status: str
    residual: float
    rate: float
    curl: float
    times: Array = field(repr=False)
    path: Array = field(repr=False)


class Ascent:
    """The velocity `F(θ) = ∇E_π[r] − β E_π[g]` of exact ascent and its Jacobian, at any table `[r, v]` of logits.

    Raises `ValueError` for group baselines and for one mean over the tokens of a batch, whose expectations are not sums over
    single responses.

    >>> import torch
    >>> world = gl.ascent.World("two tokens", gl.Bandit([0, 0]), torch.tensor([0.0, 1.0]))
    >>> ascent = gl.ascent.Ascent(world, None, coefficient=0.0)
    >>> ascent.velocity(world.reference.table).round(decimals=6).tolist()
    [[-0.25, 0.25]]
    """

    @checked
    def __init__(self, world: World, estimator: Estimator | None, coefficient: float) -> None:
        if not 0 <= coefficient < float("inf"):
            raise ValueError(f"coefficient must be a finite number from 0 on, got {coefficient!r}")
        if estimator is not None and (estimator.grouped or estimator.normalise == "token_mean"):
            raise ValueError(
                f"{estimator.name} is no sum over single responses; take the estimator without its baseline or mean"
            )
        self.world, self.estimator, self.coefficient = world, estimator, coefficient
        listed = world.reference.enumerate()
        self.tokens, self.mask = listed.tokens, listed.mask
        self.contexts = world.reference.contexts(self.tokens)
        visited = torch.zeros(len(world.reference.table), dtype=torch.bool)
        visited[self.contexts[self.mask]] = True
        self.rows = torch.nonzero(visited)[:, 0]
        self.shape = world.reference.table.shape

    def log_probabilities(self, table: Tensor) -> Tensor:
        """Log-probability of every response, `[n]`."""
        steps = self.world.reference.family.log_prob(table, self.contexts, self.tokens)
        return torch.where(self.mask, steps, 0.0).sum(-1)

    def velocity(self, table: Tensor, parts: bool = False) -> Tensor:
        """`F` `[r, v]`; with `parts` the regulariser's expected gradient alone. Differentiable in the table."""
        weight = self.log_probabilities(table).exp()
        reference = self.world.reference.table
        rollout = Rollout(self.tokens, self.mask, weight, self.contexts, table, reference, table, self.world.reference.length)
        regulariser = Gradients(rollout, torch.zeros_like(rollout.log_prob)[None])
        if self.estimator is not None:
            regulariser = gradients([self.estimator], rollout)
        if parts:
            return regulariser.mean(weight).view(self.shape)
        # One contraction for both: the reward is a coefficient on the scores, too.
        score = self.world.reward[:, None] * rollout.mask_float - self.coefficient * regulariser.score
        direct = tuple((which, -self.coefficient * share, slope) for which, share, slope in regulariser.direct)
        return Gradients(rollout, score, direct).mean(weight).view(self.shape)

    def scaled(self, table: Tensor) -> Tensor:
        """Velocity of each logit over how often its token is drawn, less that of the last token: `[rows, v − 1]`, nats.

        It vanishes only inside the simplex: a token being given up keeps a velocity per draw while `F` itself goes to 0.
        """
        token_probability = self.world.reference.with_parameters(table.flatten()).occupancy()[:, None] * table.softmax(-1)
        natural = (self.velocity(table) / token_probability.clamp(min=1e-300))[self.rows]
        return natural[:, :-1] - natural[:, -1:]

    def jacobian(self, function: Callable[[Tensor], Tensor], flat: Array) -> Array:
        """Jacobian of a function of the table at flat logits `[p]`, by automatic differentiation."""
        with torch.enable_grad():
            at = torch.from_numpy(flat).view(self.shape)
            jacobian: Tensor = torch.autograd.functional.jacobian(function, at, vectorize=True)  # type: ignore[no-untyped-call]
        return jacobian.reshape(-1, flat.size).numpy()


@checked
def ascend(
    world: World,
    estimator: Estimator | str | None,
    coefficient: float,
    start: Bandit | Tree | None = None,
    points: int = 200,
    tolerance: float = 1e-6,
) -> FixedPoint:
    """Follow exact ascent from `start` (the reference) until it rests, or to the horizon.

    estimator: catalogue name or `Estimator`; `None` for no regulariser. The flow `dθ/dτ = F(θ)` is integrated by `BDF` with the
    exact Jacobian, to a relative `tolerance` per step; a rest inside the simplex is then solved for, with the last logit of
    every context held, by scipy's hybrid Powell method. `points` is the length of the path.

    Raises `ValueError` for an unknown name and as `World` and `Ascent` do.

    >>> import torch
    >>> world = gl.ascent.World("two tokens", gl.Bandit([0, 0]), torch.tensor([0.0, 1.0]))
    >>> found = gl.ascent.ascend(world, "k2-loss", coefficient=1.0)
    >>> found.probabilities.round(4).tolist(), gl.optima.tilted([0.0, 1.0], [0.5, 0.5], 1.0).round(4).tolist()
    ([0.2689, 0.7311], [0.2689, 0.7311])
    """
    chosen = by_name(estimator).popitem()[1] if isinstance(estimator, str) else estimator
    if not (chosen is None or isinstance(chosen, Estimator)):
        raise ValueError(f"exact ascent differentiates an expectation, which needs a gl.Estimator, got {chosen!r}")
    check_positive("tolerance", tolerance)
    check_whole("points", points, least=2)
    if start is not None and start.signature != world.reference.signature:
        raise ValueError(f"start must be a policy like the reference, {world.reference.signature}, got {start.signature}")
    ascent = Ascent(world, chosen, coefficient)
    with one_thread(), torch.no_grad():
        begin = (world.reference if start is None else start).table.flatten().numpy().copy()
        end, flow = _flow(ascent, begin, tolerance)
        residual = _residual(ascent, end)
        status = "moving"
        if residual <= SWITCH_TOL:
            solved = _solve(ascent, end)
            moved = np.abs(_responses(ascent, solved) - _responses(ascent, end)).max()
            if (solved_residual := _residual(ascent, solved)) <= ROOT_TOL and moved <= 1e-2:
                end, residual, status = solved, solved_residual, "interior"
        probabilities = _responses(ascent, end)
        if status != "interior" and probabilities.min() < 1e-6:
            status = "boundary"
        last = float(flow.t_max)
        times = np.concatenate([[0.0], np.geomspace(min(1e-2, last / 2), last, points - 1)])
        path = np.stack([_responses(ascent, flow(t)) for t in times])
        rate, curl = _linearised(ascent, end)
    return FixedPoint(torch.from_numpy(end).view(ascent.shape), probabilities, status, residual, rate, curl, times, path)


def _flow(ascent: Ascent, begin: Array, tolerance: float) -> tuple[Array, scipy.integrate.OdeSolution]:
    """Step until the flow has arrived, a response is given up, or the horizon: the last logits, and the way there."""

    def velocity(_: float, flat: Array) -> Array:
        return ascent.velocity(torch.from_numpy(flat).view(ascent.shape)).flatten().numpy()

    def jacobian(_: float, flat: Array) -> Array:
        # Past the end of the simplex a trial step may overflow: it then fails to converge and is taken again, shorter.
        return np.nan_to_num(ascent.jacobian(ascent.velocity, flat), nan=0.0, posinf=0.0, neginf=0.0)

    solver = scipy.integrate.BDF(velocity, 0.0, begin, T_MAX, rtol=tolerance, atol=tolerance / 10, jac=jacobian)
    times, pieces = [0.0], []
    while solver.status == "running":
        if solver.step() is not None:  # says why it failed
            break
        times.append(float(solver.t))
        pieces.append(solver.dense_output())
        if len(pieces) % CHECK_EVERY == 0 and _residual(ascent, solver.y) <= SWITCH_TOL:
            break
        if float(ascent.log_probabilities(torch.from_numpy(solver.y).view(ascent.shape)).min()) < MIN_LOG_PROB:
            break
    return solver.y, scipy.integrate.OdeSolution(times, pieces)


def _residual(ascent: Ascent, flat: Array) -> float:
    return float(ascent.scaled(torch.from_numpy(flat).view(ascent.shape)).abs().max())


def _responses(ascent: Ascent, flat: Array) -> Array:
    return ascent.log_probabilities(torch.from_numpy(np.ascontiguousarray(flat)).view(ascent.shape)).exp().numpy()


def _free(ascent: Ascent) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Positions of the logits that matter: visited contexts, all tokens but the last."""
    v = ascent.shape[1]
    return (ascent.rows.numpy()[:, None] * v + np.arange(v - 1)).ravel()


def _solve(ascent: Ascent, flat: Array) -> Array:
    table = torch.from_numpy(flat).view(ascent.shape)
    held, free = (table - table[:, -1:]).flatten().numpy(), _free(ascent)

    def all_logits(part: Array) -> Array:
        full = held.copy()
        full[free] = part
        return full

    def scaled(part: Array) -> Array:
        return ascent.scaled(torch.from_numpy(all_logits(part)).view(ascent.shape)).flatten().numpy()

    def slope(part: Array) -> Array:
        return ascent.jacobian(ascent.scaled, all_logits(part))[:, free]

    return all_logits(scipy.optimize.root(scaled, held[free], jac=slope, method="hybr", tol=1e-14).x)


def _linearised(ascent: Ascent, flat: Array) -> tuple[float, float]:
    """Largest real part of the eigenvalues of `∂F/∂θ` without the shifts of whole rows, and the curl of the regulariser."""
    v, free = ascent.shape[1], _free(ascent)
    jacobian = ascent.jacobian(ascent.velocity, flat)
    # In differences to the last token: d(θ_v − θ_last)/dτ = F_v − F_last.
    reduced = (jacobian - jacobian[(np.arange(flat.size) // v) * v + v - 1])[np.ix_(free, free)]
    rate = float(np.linalg.eigvals(reduced).real.max()) if np.isfinite(reduced).all() else float("nan")
    regulariser_jacobian = ascent.jacobian(lambda table: ascent.velocity(table, parts=True), flat)
    symmetric = float(np.linalg.norm(regulariser_jacobian + regulariser_jacobian.T))
    curl = (
        float(np.linalg.norm(regulariser_jacobian - regulariser_jacobian.T)) / symmetric if symmetric > 1e-12 else float("nan")
    )
    return rate, curl
