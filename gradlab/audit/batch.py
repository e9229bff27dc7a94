"""What an audited loss receives, and what is audited: a batch of `[B, T]` tensors, and a function of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """`B` responses padded to `T` positions, as a training loop hands them to its loss.

    `log_prob`, `reference_log_prob`, `behaviour_log_prob` and `mask` are `[B, T]`, `mask` holding 1 and 0 in the dtype of the
    log-probabilities; `tokens` `[B, T]` are integers; `logits` and `reference_logits` `[B, T, V]` are there for losses over
    the vocabulary. `log_prob` is computed from `logits`, and both carry gradients; nothing else does. After the end of a
    response all of them hold ordinary, misleading numbers, as they do in practice. `rewards` `[B]` are the task's, 0 or 1, and
    `advantages` `[B, T]` are `r − E_μ r` on every live token; left out, both are 0. Every call gets tensors of its own.

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
    advantages: Tensor = field(default=None)  # type: ignore[assignment]  # filled below
    rewards: Tensor = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.advantages is None:
            object.__setattr__(self, "advantages", torch.zeros_like(self.reference_log_prob))
        if self.rewards is None:
            object.__setattr__(self, "rewards", torch.zeros_like(self.reference_log_prob[:, 0]))

    @property
    def response_advantages(self) -> Tensor:
        """The task's advantages by response, `[B]`."""
        return self.advantages[:, 0]

    @property
    def token_rewards(self) -> Tensor:
        """The task's rewards `[B, T]`, earned at the last live token of a response, 0 elsewhere."""
        live = self.mask.bool()
        last = live & (torch.cumsum(live, -1) == live.sum(-1, keepdim=True))
        return torch.where(last, self.rewards[:, None], 0.0)

    def rows(self, rows: list[int]) -> Batch:
        """The responses `rows`."""
        return replace(self, **{item.name: getattr(self, item.name)[rows] for item in fields(Batch)})

    def without_reward(self) -> Batch:
        """The same batch with advantages and rewards of 0: what is left of a whole loss is its regulariser."""
        return replace(self, advantages=torch.zeros_like(self.advantages), rewards=torch.zeros_like(self.rewards))

    @property
    def lengths(self) -> Tensor:
        """Number of live tokens of every response, `[B]`, as integers."""
        return self.mask.bool().sum(-1)


@dataclass(frozen=True)
class Bound:
    """What an argument was given and why: a role, a setting or its default; guessed where its name alone decided nothing.

    >>> gl.audit.Bound("old_log_probs", "behaviour_log_prob", "by its name").text
    'old_log_probs = behaviour_log_prob (by its name)'
    """

    argument: str
    role: str
    how: str
    guessed: bool = False

    @property
    def text(self) -> str:
        """The binding in words."""
        return f"{self.argument} = {self.role} ({'guessed: ' if self.guessed else ''}{self.how})"


@dataclass(frozen=True)
class Subject:
    """A loss to be audited: `loss(batch)` is what the optimiser would minimise, reduced over the batch to a scalar.

    A KL in the reward is audited as the whole chain, rewards → advantages → policy loss. `group` is the number of responses
    that have to be enumerated together because the loss couples them; `None` finds out whether it is 1 or 2. Adapters take a
    batch as one group, whatever its size.
    `package`, `version`, `function` and `configuration` say what was called, for the report, and `binding` what each argument of
    the user's function was given. `vocab` is the number of tokens of every policy (left out, 3, and 2 in probes), `temperature`
    what the sampler divides its logits by.

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
    binding: tuple[Bound, ...] = ()
    vocab: int | None = None
    temperature: float = 1.0
