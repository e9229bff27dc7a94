"""Recorded log-probabilities as a `Rollout`, so that estimators are asked about a run's own tokens by their own code.

A recorded token has one log-probability under each policy and no distribution: its row of the tables is that number. Kernels over
the vocabulary, and gradients, need more, and are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradlab.estimators.catalogue import ESTIMATORS
from gradlab.estimators.estimator import Estimator
from gradlab.policies.families import Categorical
from gradlab.records.block import Block
from gradlab.rollout import Rollout

Array = npt.NDArray[Any]

#: Numbers of one rollout, padding included.
PADDED = 2**18


def _refused(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        "of a recorded token the drawn one's log-probabilities are known, and not the distribution that this needs"
    )


class Recorded(Categorical):
    """Tables `[r, 1]` of log-probabilities of the tokens that were drawn."""

    name = "recorded"

    def log_prob(self, table: Tensor, contexts: Tensor, tokens: Tensor) -> Tensor:
        return table[:, 0][contexts]

    def log_ratio(self, table: Tensor, reference: Tensor, contexts: Tensor, tokens: Tensor) -> Tensor:
        return (table - reference)[:, 0][contexts]


for _name in (
    "log_ratios", "gaps", "reverse_kl", "mse", "chi2", "slope", "along_scores", "balanced", "score_sum", "score_tables", "score_norm",
    "missing", "split", "score_dot",
):  # fmt: skip
    setattr(Recorded, _name, _refused)

RECORDED = Recorded()


def estimators() -> dict[str, Estimator]:
    """The estimators of the catalogue that read log-probabilities of the drawn tokens only, and no others of a group."""
    return {name: e for name, e in ESTIMATORS.items() if not (e.on_vocabulary or e.grouped or e.baseline is not None)}


def rollouts(
    block: Block, policy: str, reference: str, behaviour: str | None, length: int, mean_length: float
) -> Iterator[tuple[Array, Rollout]]:
    """Rollouts of the tokens that count, and the numbers of their responses in the block; responses of like lengths together.

    Without a behaviour the data are taken to be the policy's own. The block's columns have to be finite at these tokens.
    """
    live = block.live
    order = np.argsort(live, kind="stable")
    order = order[live[order] > 0]
    names = [policy, reference, policy if behaviour is None else behaviour]
    flat = {name: block[name][block.mask] for name in set(names)}
    starts = np.cumsum(live) - live
    begin = 0
    while begin < len(order):
        end = begin + 1
        while end < len(order) and (end + 1 - begin) * live[order[end]] <= PADDED:
            end += 1
        rows = order[begin:end]
        width = int(live[rows[-1]])
        inside = np.arange(width) < live[rows][:, None]
        index = np.where(inside, starts[rows][:, None] + np.arange(width), 0)
        tables = [torch.from_numpy(np.where(inside, flat[name][index], 0.0).reshape(-1, 1)) for name in names]
        contexts = torch.arange(inside.size).view(inside.shape)
        weight = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
        yield rows, Rollout(
            torch.zeros_like(contexts), torch.from_numpy(inside), weight, contexts, tables[0], tables[1], tables[2], length, RECORDED,
            sampled=True, expected_length=mean_length,
        )  # fmt: skip
        begin = end
