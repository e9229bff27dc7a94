"""Synthetic batches with chosen log-probabilities, and the coefficient a loss puts on each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradlab.audit.batch import Batch, Subject
from gradlab.audit.call import evaluate
from gradlab.audit.worlds import batch

#: log-probability of an ordinary token.
ORDINARY = -0.7


@dataclass(frozen=True)
class Tokens:
    """One synthetic response: `log π`, the log-ratio `ℓ = log π − log ref` and `log ρ = log π − log μ` of each of its tokens.

    advantage: of the task; its sign decides the reward, 1 or 0.
    """

    log_prob: Sequence[float]
    log_ratio: Sequence[float]
    log_weight: Sequence[float]
    advantage: float = 1.0

    @classmethod
    def at(cls, *log_ratios: float, log_weight: float | Sequence[float] = 0.0, advantage: float = 1.0) -> Tokens:
        """Tokens with these log-ratios; the likelier of policy and reference gives them an ordinary probability."""
        weights = [log_weight] * len(log_ratios) if isinstance(log_weight, float) else list(log_weight)
        return cls(
            [ORDINARY + min(x, 0.0) + min(w, 0.0) for x, w in zip(log_ratios, weights, strict=True)],
            log_ratios,
            weights,
            advantage,
        )


def responses(
    *given: Tokens, columns: int, padding_seed: int = 0, dtype: torch.dtype = torch.float64, vocab: int = 2
) -> tuple[Batch, Tensor]:
    """A batch of responses padded to `columns`; `padding_seed` picks what stands in the padding.

    What the drawn token, the first of `vocab`, leaves over is shared out among the others alike in all policies, unevenly.
    """
    generator = torch.Generator().manual_seed(padding_seed)
    shape = len(given), columns
    padding = torch.randn(3, *shape, generator=generator, dtype=torch.float64) - 2
    policy, reference, behaviour = -padding.abs() - 0.1
    mask = torch.zeros(shape, dtype=torch.bool)
    advantages = padding[0].clone()
    for b, row in enumerate(given):
        n = len(row.log_prob)
        advantages[b, :n] = row.advantage
        log_prob = torch.tensor(row.log_prob, dtype=torch.float64)
        mask[b, :n] = True
        policy[b, :n] = log_prob
        reference[b, :n] = log_prob - torch.tensor(row.log_ratio, dtype=torch.float64)
        behaviour[b, :n] = log_prob - torch.tensor(row.log_weight, dtype=torch.float64)
    shares = torch.arange(1, vocab, dtype=torch.float64).log_softmax(0)
    logits = [
        torch.cat([x[..., None], torch.log(-torch.expm1(x))[..., None] + shares], -1) for x in (policy, reference, behaviour)
    ]
    named = dict(zip(("logits", "reference_logits", "behaviour_logits"), logits, strict=True))
    rewards = torch.tensor([float(row.advantage > 0) for row in given], dtype=torch.float64)
    filled = {
        **named,
        "mask": mask,
        "tokens": torch.zeros(shape, dtype=torch.long),
        "advantages": advantages,
        "rewards": rewards,
    }
    return batch(filled, list(range(len(given))), dtype)


def coefficients(subject: Subject, probe_batch: Batch) -> tuple[Tensor, float]:
    """`∂ loss / ∂ log π` `[B, T]` of every token, 0 where no gradient reaches it, and the value of the loss.

    A loss over the vocabulary has its gradient on the logits; where the other tokens share what is left alike, that is a
    coefficient on `log π` all the same.
    """
    loss = evaluate(subject, probe_batch)
    total = torch.zeros_like(probe_batch.log_prob, dtype=torch.float64)
    if not loss.requires_grad:
        return total, float(loss.detach())
    direct, logits = torch.autograd.grad(loss, [probe_batch.log_prob, probe_batch.logits], allow_unused=True)
    if direct is not None:
        total = total + direct
    if logits is not None:
        total = total + logits[..., 0] / -torch.expm1(probe_batch.log_prob.detach())
    return total.double(), float(loss.detach())


def sums_over_tokens(subject: Subject, probe_batch: Batch) -> bool:
    """Whether a loss sums over the vocabulary: its gradient is that of the logits, and another drawn token changes nothing."""
    loss = evaluate(subject, probe_batch)
    if not loss.requires_grad:
        return False
    direct, logits = torch.autograd.grad(loss, [probe_batch.log_prob, probe_batch.logits], allow_unused=True)
    if direct is not None or logits is None:
        return False
    other = evaluate(subject, replace(probe_batch, tokens=torch.ones_like(probe_batch.tokens)))
    return bool((loss - other).detach().abs() <= torch.finfo(loss.dtype).eps * loss.detach().abs())
