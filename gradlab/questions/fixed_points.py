"""Stationary points of exact ascent on reward minus a regulariser: problems × regularisers × coefficients → one tidy frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import joblib
import numpy as np
import pandas as pd
from tqdm import tqdm

from gradlab._common.arguments import checked
from gradlab._common.names import check_jobs, check_real, several
from gradlab._common.parallel import spread
from gradlab.estimators.estimator import Estimator
from gradlab.measure import by_name
from gradlab.questions.gradient_flow import Array, FixedPoint, World, ascend
from gradlab.questions.optima import optimum
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario

#: Name of the ascent without a regulariser.
UNREGULARISED = "no penalty"

COLUMNS: dict[str, str] = {
    "world": "name of the reward and reference",
    "family": "kind of policy",
    "vocab": "number of tokens v",
    "length": "largest number of tokens T",
    "estimator": "regulariser",
    "coefficient": "β",
    "via": "exact",
    "status": "interior: at rest; boundary: some response is being given up; moving: neither by the horizon",
    "residual": "largest scaled velocity |F_v − F_u| of two tokens of a context, nats",
    "reward": "E[r] there",
    "regret": "max r − E[r]",
    "kl": "KL(end ‖ reference), nats",
    "kl_reverse": "KL(end ‖ π*), π* ∝ ref·exp(r/β), nats",
    "kl_forward": "KL(end ‖ β·ref/(Λ − r)), nats",
    "to_reverse": "largest difference of a response's probability from π*",
    "to_forward": "largest difference of a response's probability from β·ref/(Λ − r)",
    "to_token_reverse": "the same from the optimum of every context by itself, reverse KL",
    "to_token_forward": "the same from the optimum of every context by itself, forward KL",
    "to_unregularised": "the same from where the ascent without a regulariser ends",
    "rarest": "smallest probability of a response",
    "rate": "largest real part of the eigenvalues of the linearised flow (moving directions); negative: attracting",
    "curl": "‖J − Jᵀ‖ / ‖J + Jᵀ‖ of the Jacobian J of the regulariser's expected gradient; 0 for a gradient",
}


@checked
def measure(
    estimators: Sequence[str] | Mapping[str, Estimator],
    worlds: World | Sequence[World],
    coefficients: Sequence[float],
    jobs: int = 1,
) -> pd.DataFrame:
    """Where exact ascent on `E[r] − β·penalty` ends, for every world × estimator × β: the columns of `COLUMNS`.

    The ascent without a regulariser is added for each world (coefficient 0). jobs: worker processes, with the same result.
    Raises `ValueError` for unknown names.

    >>> import torch
    >>> world = gl.ascent.World("two tokens", gl.Bandit([0, 0]), torch.tensor([0.0, 1.0]))
    >>> frame = gl.fixedpoints.measure(["k2-loss"], world, [1.0])
    >>> bool(frame.loc[frame["estimator"] == "k2-loss", "to_reverse"].item() < 1e-9)
    True
    """
    losses, listed, coefficients = by_name(estimators), several(worlds), several(coefficients)
    check_jobs(jobs)
    for world in listed:
        if not isinstance(world, World):
            raise ValueError(f"a world is a {World.__name__}, got {world!r}")
    for coefficient in coefficients:
        check_real("a coefficient", coefficient)
    tasks = [(w, name, loss, c) for w in listed for name, loss in losses.items() for c in coefficients]
    for name, loss in losses.items():
        if not isinstance(loss, Estimator):
            raise ValueError(f"{name} is a function: exact ascent differentiates its expectation, which needs a gl.Estimator")
    ascents = [*((world, None, 0.0) for world in listed), *((world, loss, c) for world, _, loss, c in tasks)]
    calls = (joblib.delayed(_ended)(*item) for item in tqdm(ascents, desc="fixed points", disable=None, delay=2))
    ends: list[FixedPoint] = spread(calls, jobs)
    unregularised = dict(zip((world.name for world in listed), ends, strict=False))
    rows = [_row(world, UNREGULARISED, 0.0, unregularised[world.name], unregularised[world.name]) for world in listed]
    rows += [
        _row(w, name, c, end, unregularised[w.name]) for (w, name, _, c), end in zip(tasks, ends[len(listed) :], strict=True)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _ended(world: World, estimator: Any, coefficient: float) -> FixedPoint:
    return ascend(world, estimator, coefficient, points=2, tolerance=1e-3)


def _row(world: World, name: str, coefficient: float, fixed_point: FixedPoint, unregularised: FixedPoint) -> dict[str, Any]:
    p, reference, r = fixed_point.probabilities, world.reference, world.reward.numpy()
    ref = Rollout.enumerated(Scenario(reference, reference)).weight.numpy()
    row: dict[str, Any] = {
        "world": world.name,
        "family": type(reference).__name__.lower(),
        "vocab": reference.vocab,
        "length": reference.length,
        "estimator": name,
        "coefficient": coefficient,
        "via": "exact",
        "status": fixed_point.status,
        "residual": fixed_point.residual,
        "reward": float(p @ r),
        "regret": float(r.max() - p @ r),
        "kl": _kl(p, ref),
        "to_unregularised": float(np.abs(p - unregularised.probabilities).max()),
        "rarest": float(p.min()),
        "rate": fixed_point.rate,
        "curl": fixed_point.curl,
    }
    if coefficient > 0:
        for which in ("reverse", "forward"):
            best = optimum(reference, r, coefficient, f"{which}_kl")
            alone = optimum(reference, r, coefficient, f"{which}_kl", credit="token")
            row |= {f"kl_{which}": _kl(p, best), f"to_{which}": float(np.abs(p - best).max())}
            row[f"to_token_{which}"] = float(np.abs(p - alone).max())
    return row


def _kl(p: Array, q: Array) -> float:
    ratio = np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300))
    return max(float((p * ratio + q - p).sum()), 0.0)
