"""What an audited loss receives, and what is audited: a batch of `[B, T]` tensors, and a function of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """`B` responses padded to `T` positions, as a training loop hands them to its loss.

    `log_prob`, `reference_log_prob`, `behaviour_log_prob` and `mask` are `[B, T]`, `mask` holding 1 and 0 in the dtype of the
    log-probabilities; `tokens` `[B, T]` are integers; `logits` and `reference_logits` `[B, T, V]` are there for losses over
    the vocabulary. `log_prob` is computed from `logits`, and both carry gradients; nothing else does. After the end of a
    response all of them hold ordinary, misleading numbers, as they do in practice. `advantages` `[B, T]` and `rewards` `[B]`
    are the task's and 0: what is left of a whole loss is its regulariser. Every call gets tensors of its own.

    >>> def loss(batch: gl.audit.Batch):
    ...     return (batch.mask * (batch.log_prob - batch.reference_log_prob) ** 2 / 2).sum() / len(batch.mask)
    >>> gl.audit.Subject("mine", loss).loss is loss
    True
    """

    log_prob: Tensor
    reference_log_prob: Tensor
    behaviour_log_prob: Tensor
    mask: Tensor
    tokens: Tensor
    logits: Tensor
    reference_logits: Tensor
    behaviour_logits: Tensor

    @property
    def advantages(self) -> Tensor:
        """The task's advantages, `[B, T]`, all 0."""
        return torch.zeros_like(self.reference_log_prob)

    @property
    def rewards(self) -> Tensor:
        """The task's rewards, `[B]`, all 0."""
        return self.advantages[:, 0]

    @property
    def lengths(self) -> Tensor:
        """Number of live tokens of every response, `[B]`, as integers."""
        return self.mask.bool().sum(-1)


@dataclass(frozen=True)
class Subject:
    """A loss to be audited: `loss(batch)` is what the optimiser would minimise, reduced over the batch to a scalar.

    A KL in the reward is audited as the whole chain, rewards → advantages → policy loss. `group` is the number of responses
    that have to be enumerated together because the loss couples them; `None` finds out whether it is 1 or 2. Adapters take a
    batch as one group, whatever its size.
    `package`, `version`, `function` and `configuration` say what was called, for the report.

    >>> def loss(batch):
    ...     return (batch.mask * (batch.log_prob - batch.reference_log_prob)).sum() / len(batch.mask)
    >>> gl.audit.Subject("k1 in the loss", loss, package="mine", version="1.0", configuration={"beta": 1.0}).name
    'k1 in the loss'
    """

    name: str
    loss: Callable[[Batch], Tensor]
    package: str = ""
    version: str = ""
    function: str = ""
    configuration: Mapping[str, object] = field(default_factory=dict)
    group: int | None = None
