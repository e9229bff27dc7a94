"""Bringing one token back: exact gradient descent on a regulariser alone, from a policy that dropped or inflated the token.

The policy is the reference with one logit shifted, so the log-odds of the token are off by the shift and every other token
keeps its share. Each step subtracts `step` times the full expected gradient of the estimator from the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from gradlab._common.arguments import check_columns, checked, numbers
from gradlab._common.names import check_name, check_positive, check_whole
from gradlab.measure import by_name, one_thread
from gradlab.moments import Loss
from gradlab.questions.bandits import expected_gradients

#: A token counts as restored when its odds are within this factor of the reference's.
FACTOR = 2.0

COLUMNS: dict[str, str] = {
    "estimator": "name of the gradient estimator",
    "reference": "probability the reference gives the token",
    "shift": "log-odds of the token at the start minus those of the reference, nats; negative: dropped",
    "probability": "probability the policy gives the token at the start",
    "via": "exact",
    "kl": "KL(policy ‖ reference) at the start, nats",
    "step": "step size, logits per unit of gradient",
    "restored": "whether the token's odds came within a factor of `FACTOR` of the reference's",
    "steps": "steps until then (the limit when that did not happen: at least so many)",
    "time": "steps × step size, logits per unit of gradient",
}


def _probabilities(reference: npt.ArrayLike, token: int) -> npt.NDArray[np.float64]:
    """The reference as an array; `ValueError` where it is no distribution with that token."""
    q = numbers("reference", reference)
    if len(q) < 2 or (q <= 0).any() or abs(q.sum() - 1) > 1e-6:
        raise ValueError(
            f"reference must be positive probabilities of at least two tokens that sum to 1, got {reference!r:.80}"
        )
    if not 0 <= token < len(q):
        raise ValueError(f"token must be between 0 and {len(q) - 1}, got {token}")
    return q


@checked
def shifted(reference: npt.ArrayLike, token: int, shifts: npt.ArrayLike) -> Tensor:
    """Logits `[m, v]` of the reference's probabilities `[v]` with the logit of one token shifted by each of `shifts` `[m]`.

    >>> gl.restoring.odds(gl.restoring.shifted([0.5, 0.5], 0, [-2.0, 3.0]), 0).round(decimals=6).tolist()
    [-2.0, 3.0]
    """
    logits = torch.from_numpy(np.log(_probabilities(reference, token)))
    d = torch.from_numpy(numbers("shifts", np.atleast_1d(np.asarray(shifts, dtype=np.float64))))
    return (logits + d[:, None] * (torch.arange(len(logits)) == token)).log_softmax(-1)


def descent(losses: Mapping[str, Loss], table: Tensor, reference: Tensor, step: float) -> Iterator[Tensor]:
    """Logits `[e, m, v]` after 0, 1, 2, … exact gradient steps of every loss from the policies `table` `[m, v]`.

    >>> table = gl.restoring.shifted([0.2, 0.8], 0, [-3.0])
    >>> reference = gl.restoring.shifted([0.2, 0.8], 0, [0.0])
    >>> steps = gl.restoring.descent({"k2-loss": gl.ESTIMATORS["k2-loss"]}, table, reference, step=1.0)
    >>> start, after = next(steps), next(steps)
    >>> bool(gl.restoring.odds(after, 0) > gl.restoring.odds(start, 0))
    True
    """
    e, (m, v) = len(losses), table.shape
    at, ref = table.expand(e, m, v).reshape(-1, v), reference.expand(e * m, v)
    while True:
        yield at.view(e, m, v)
        # Every loss is evaluated on every policy, and its own are kept: scores cost more than losses.
        expected = expected_gradients(list(losses.values()), at, ref).view(e, e, m, v)
        at = at - step * expected[range(e), range(e)].reshape(-1, v)


@checked
def times(
    estimators: Loss | str | Sequence[Loss | str] | Mapping[str, Loss],
    reference: npt.ArrayLike,
    token: int,
    shifts: npt.ArrayLike,
    step: float = 1.0,
    limit: int = 10_000,
) -> pd.DataFrame:
    """Steps of exact gradient descent until a dropped or an inflated token is back within a factor of two in odds.

    reference: probabilities `[v]`; shifts: log-odds off at the start, `[m]`, negative for a dropped token. Returns one row per
    estimator × shift with the columns of `COLUMNS`. Raises `ValueError` for shifts that already count as restored, for a
    token outside the vocabulary, and for a step or limit that is not positive.

    >>> frame = gl.restoring.times(["k2-loss", "k3-loss"], [0.2, 0.8], token=0, shifts=[-5.0])
    >>> frame.set_index("estimator")["steps"].to_dict()
    {'k2-loss': 82, 'k3-loss': 13}
    """
    losses, q = by_name(estimators), _probabilities(reference, token)
    d = numbers("shifts", np.atleast_1d(np.asarray(shifts, dtype=np.float64)))
    if (np.abs(d) <= np.log(FACTOR)).any():
        raise ValueError(f"a shift of log-odds within ±{np.log(FACTOR):.3g} nats counts as restored; got {d.tolist()}")
    if not 0 < step < np.inf or limit < 1:
        raise ValueError(f"step and limit must be positive, got {step} and {limit}")
    start, ref, steps = shifted(q, token, d), torch.from_numpy(np.log(q)), np.full((len(losses), len(d)), -1)
    with one_thread(), torch.no_grad():
        kl = (start.exp() * (start - ref)).sum(-1).numpy()
        walk = enumerate(descent(losses, start, ref, step))
        for n, table in tqdm(walk, total=limit + 1, desc="restoring", disable=None, delay=2):
            done = (odds(table, token) - odds(ref, token)).abs().numpy() <= np.log(FACTOR)
            steps[done & (steps < 0)] = n
            if (steps >= 0).all() or n == limit:
                break
    rows = []
    for e, name in enumerate(losses):
        restored = steps[e] >= 0
        took = np.where(restored, steps[e], limit)
        columns: dict[str, Any] = {"estimator": name, "reference": q[token], "shift": d, "via": "exact", "step": step, "kl": kl}
        columns |= {"probability": start[:, token].exp().numpy(), "restored": restored, "steps": took, "time": took * step}
        rows.append(pd.DataFrame(columns)[list(COLUMNS)])
    return pd.concat(rows, ignore_index=True)


@checked
def compared(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Add ratios of times to a frame of `times`: against another estimator, and of a dropped token against an inflated one.

    `versus_<name>` (`<name>` the kernel of `baseline`) is the time over that of `baseline` at the same start;
    `dropped_versus_inflated`, in rows of a dropped token, the time over that of the opposite shift. A time at the limit is at
    least so long: where only one of two is, the ratio is a bound, and missing where both are.

    >>> frame = gl.restoring.times(["k2-loss", "k3-loss"], [0.2, 0.8], token=0, shifts=[-5.0, 5.0])
    >>> gl.restoring.compared(frame, "k2-loss").groupby("estimator")["versus_k2"].first().round(2).to_dict()
    {'k2-loss': 1.0, 'k3-loss': 0.16}
    """
    check_columns(frame, "estimator", "reference", "shift", "time", "restored")
    check_name("estimator of the frame", baseline, frame["estimator"].unique())
    keys = ["estimator", "reference", "shift"]
    took = frame.set_index(keys)[["time", "restored"]]
    versus = frame.copy()
    base = took.loc[list(zip([baseline] * len(frame), frame["reference"], frame["shift"], strict=True))].reset_index(drop=True)
    mirror = took.reindex(pd.MultiIndex.from_arrays([frame["estimator"], frame["reference"], -frame["shift"]], names=keys))
    mirror = mirror.reset_index(drop=True)
    known = frame["restored"] | base["restored"]
    versus[f"versus_{baseline.partition('-')[0]}"] = (frame["time"] / base["time"]).where(known)
    known = (frame["restored"] | mirror["restored"].eq(True)) & (frame["shift"] < 0)
    versus["dropped_versus_inflated"] = (frame["time"] / mirror["time"]).where(known)
    return versus


@checked
def paths(
    estimators: Loss | str | Sequence[Loss | str] | Mapping[str, Loss],
    reference: npt.ArrayLike,
    token: int,
    shift: float,
    steps: int,
    step: float = 1.0,
    points: int = 200,
) -> pd.DataFrame:
    """The token's probability and the KL along the same descent, at about `points` steps spread evenly in the logarithm.

    Columns `estimator, reference, shift, via, steps, time, probability, kl`.

    >>> frame = gl.restoring.paths("k3-loss", [0.2, 0.8], token=0, shift=-5.0, steps=100)
    >>> bool(frame["kl"].iloc[-1] < 0.1 * frame["kl"].iloc[0])
    True
    """
    losses, q = by_name(estimators), _probabilities(reference, token)
    check_positive("step", step)
    check_whole("steps", steps)
    check_whole("points", points)
    kept = np.unique(np.concatenate([[0], np.geomspace(1, steps, points).round()]).astype(int))
    start, ref, rows = shifted(q, token, [shift]), torch.from_numpy(np.log(q)), []
    with one_thread(), torch.no_grad():
        for n, table in enumerate(descent(losses, start, ref, step)):
            if n in kept:
                log_p = table[:, 0].log_softmax(-1)
                kl = (log_p.exp() * (log_p - ref)).sum(-1).tolist()
                for name, p, distance in zip(losses, log_p[:, token].exp().tolist(), kl, strict=True):
                    rows.append([name, q[token], shift, "exact", n, n * step, p, distance])
            if n == steps:
                break
    return pd.DataFrame(rows, columns=["estimator", "reference", "shift", "via", "steps", "time", "probability", "kl"])


def odds(table: Tensor, token: int) -> Tensor:
    """Log-odds of one token under logits `[…, v]`.

    >>> import torch
    >>> gl.restoring.odds(torch.tensor([2.0, 0.0]), 0).item()
    2.0
    """
    others = torch.arange(table.shape[-1]) != token
    return table[..., token] - table[..., others].logsumexp(-1)
