"""Many one-step policies at once: the expected gradient at every point of a simplex, and what one exact step does there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from gradlab._common.arguments import checked
from gradlab._common.names import check_positive, check_whole
from gradlab.measure import by_name, one_thread
from gradlab.moments import Loss, gradients
from gradlab.policies.families import CATEGORICAL
from gradlab.rollout import Rollout

COLUMNS: dict[str, str] = {
    "estimator": "name of the gradient estimator",
    "point": "number of the policy in the order given",
    "policy_v": "probability of token v before the step (one column per token)",
    "after_v": "probability of token v after an exact step of size `step` on the logits (one column per token)",
    "kl": "KL(policy ‖ reference) before the step, nats",
    "rise": "KL after the step minus KL before, nats",
    "cosine": "cosine between the expected gradient and ∇KL(policy ‖ reference); missing when either is zero",
    "reference": "probabilities of the reference, `(0.7 0.01 0.29)`",
}


@checked
def simplex(resolution: int, edge: float = 0.25) -> pd.DataFrame:
    """A triangular grid of three-token policies: grid indices `i`, `j` and probabilities `policy_0 … policy_2`.

    `resolution + 1` points a side; `edge`, in grid steps, is the distance of the outermost points from the border.
    Raises `ValueError` for a resolution that is not a positive whole number.

    >>> grid = gl.simplex(4)
    >>> len(grid), bool((grid[["policy_0", "policy_1", "policy_2"]].sum(axis=1) - 1).abs().max() < 1e-12)
    (15, True)
    """
    check_positive("edge", edge)
    check_whole("resolution", resolution)
    i, j = (index.ravel() for index in np.meshgrid(range(resolution + 1), range(resolution + 1), indexing="ij"))
    inside = i + j <= resolution
    i, j = i[inside], j[inside]
    counts = np.stack([i, j, resolution - i - j], -1) + edge
    p = counts / counts.sum(-1, keepdims=True)
    return pd.DataFrame({"i": i, "j": j, **{f"policy_{v}": p[:, v] for v in range(3)}})


@checked
def field(
    estimators: Loss | str | Iterable[Loss | str] | Mapping[str, Loss],
    policies: npt.ArrayLike,
    reference: npt.ArrayLike,
    step: float = 0.1,
) -> pd.DataFrame:
    """Take one exact gradient-descent step of every estimator from every policy, on the logits, and see where it leads.

    policies: probabilities `[m, v]`, all positive; reference `[v]`. Exact: no sampling. All policies are the contexts of one
    enumerated rollout, so a thousand of them cost little more than one. Returns one row per estimator × policy with the
    columns of `COLUMNS`. Raises `ValueError` for probabilities that are not positive or do not sum to 1.

    >>> frame = gl.field(["k2-loss", "k3-loss"], [[0.01, 0.20, 0.79]], reference=[0.70, 0.01, 0.29])
    >>> frame.set_index("estimator")["rise"].gt(0).to_dict()
    {'k2-loss': False, 'k3-loss': True}
    """
    check_positive("step", step)
    p, q = _probabilities("policies", policies, 2), _probabilities("reference", reference, 1)
    m, v = p.shape
    if len(q) != v:
        raise ValueError(f"reference must have one probability per token of the policies, {v}, got {len(q)}")
    losses, frames = by_name(estimators), []
    with one_thread(), torch.no_grad():
        table, ref = p.log(), q.log().expand(m, v)
        expected = expected_gradients(list(losses.values()), table, ref)
        with torch.enable_grad():
            leaf = table.clone().requires_grad_(True)
            before = CATEGORICAL.reverse_kl(leaf, ref)
            (truth,) = torch.autograd.grad(before.sum(), leaf)
        for name, gradient in zip(losses, expected, strict=True):
            moved = (table - step * gradient).log_softmax(-1)
            size = gradient.norm(dim=-1) * truth.norm(dim=-1)
            columns: dict[str, Any] = {"estimator": name, "point": np.arange(m)}
            columns |= {f"policy_{k}": p[:, k].numpy() for k in range(v)}
            columns |= {f"after_{k}": moved.exp()[:, k].numpy() for k in range(v)}
            columns |= {"kl": before.detach().numpy(), "rise": (CATEGORICAL.reverse_kl(moved, ref) - before).detach().numpy()}
            columns["cosine"] = torch.where(size > 1e-14, (gradient * truth).sum(-1) / size, torch.nan).numpy()
            columns["reference"] = f"({' '.join(f'{probability:.6g}' for probability in q.tolist())})"
            frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def expected_gradients(losses: Sequence[Loss], table: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Exact on-policy expected gradient of every loss at many one-step policies, `[e, m, v]`.

    table and reference: logits `[m, v]`, one policy and its reference per row. The policies are the contexts of one
    enumerated rollout, in which each has weight `1/m`; its own expectation is `m` times its share.
    """
    m, v = table.shape
    contexts, tokens = torch.arange(m).repeat_interleave(v)[:, None], torch.arange(v).repeat(m)[:, None]
    mask, p = torch.ones_like(tokens, dtype=torch.bool), table.softmax(-1)
    rollout = Rollout(tokens, mask, p.flatten() / m, contexts, table, reference, table, length=1, expected_length=1.0)
    return gradients(losses, rollout).mean(rollout.weight * m).view(-1, m, v)


def _probabilities(what: str, given: npt.ArrayLike, dims: int) -> torch.Tensor:
    array = np.array(given, dtype=np.float64)
    if array.ndim != dims or array.shape[-1] < 2 or not (array > 0).all() or not np.allclose(array.sum(-1), 1, atol=1e-9):
        shape = "[m, v]" if dims == 2 else "[v]"
        raise ValueError(
            f"{what} must be positive probabilities {shape} that sum to 1, got shape {list(array.shape)}: {given!r:.80}"
        )
    return torch.from_numpy(array)
