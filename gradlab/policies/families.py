"""The per-step distributions a policy can emit: categorical over tokens, or a normal over the real line.

A policy's parameters form a table `[r, v]`: one row per context, holding the distribution's natural handle (logits for a
categorical, mean and standard deviation for a normal). A family knows log-probabilities, scores and divergences of rows;
everything else in gradlab is written once on top of it.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor


class Family(Protocol):
    """What gradlab needs to know of a distribution family. Shapes: table `[r, v]`, contexts and tokens `[n, t]`."""

    name: str

    def log_prob(self, table: Tensor, contexts: Tensor, tokens: Tensor) -> Tensor:
        """Return `log p(token | context)`, `[n, t]`, differentiable with respect to the table."""

    def reverse_kl(self, table: Tensor, reference: Tensor) -> Tensor:
        """Return `KL(p ‖ ref)` of every row, `[r]`."""

    def forward_kl(self, table: Tensor, reference: Tensor) -> Tensor:
        """Return `KL(ref ‖ p)` of every row, `[r]`."""

    def chi2(self, table: Tensor, reference: Tensor) -> Tensor:
        """Return `½ χ²(p ‖ ref)` of every row, `[r]`."""

    def mse(self, table: Tensor, reference: Tensor) -> Tensor:
        """Return `½ Σ (p − ref)²` of every row, `[r]`."""

    def slope(self, kernel: str, table: Tensor, reference: Tensor) -> Tensor:
        """Return the gradient of a vocabulary kernel (`full`: reverse KL, `mse`) with respect to every row, `[r, v]`."""

    def score_sum(self, table: Tensor, contexts: Tensor, tokens: Tensor, coefficients: Tensor) -> Tensor:
        """Return `Σ_{n,t} a[e,n,t] ∇ log p(token | context)` as tables `[e, r, v]`, for coefficients `[e, n, t]`."""

    def score_tables(self, table: Tensor, contexts: Tensor, tokens: Tensor, coefficients: Tensor) -> Tensor:
        """Return `Σ_t a[n,t] ∇ log p(token | context)` of every response as tables `[n, r, v]`."""

    def score_norm(self, table: Tensor, contexts: Tensor, tokens: Tensor) -> Tensor:
        """Return `‖∇ log p(token | context)‖²`, `[n, t]`."""

    def split(self, table: Tensor, contexts: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split scores into `onehot(token)`, where `taken` `[n, t]`, and `multiples` `[d, n, t]` of `directions` `[d, r, v]`."""

    def score_dot(self, table: Tensor, contexts: Tensor, tokens: Tensor, directions: Tensor) -> Tensor:
        """Return `⟨∇ log p(token | context), direction(context)⟩`, `[n, t]`, for row directions `[r, v]`."""


class Categorical:
    """Tokens `0 … v−1` with logits as parameters; score `onehot(y) − p`."""

    name = "categorical"

    def log_prob(self, table: Tensor, contexts: Tensor, tokens: Tensor) -> Tensor:
        return table.log_softmax(-1).flatten()[_flat(table, contexts, tokens)]

    def reverse_kl(self, table: Tensor, reference: Tensor) -> Tensor:
        log_p = table.log_softmax(-1)
        return (log_p.exp() * (log_p - reference.log_softmax(-1))).sum(-1)

    def forward_kl(self, table: Tensor, reference: Tensor) -> Tensor:
        return self.reverse_kl(reference, table)

    def chi2(self, table: Tensor, reference: Tensor) -> Tensor:
        return 0.5 * torch.expm1((2 * table.log_softmax(-1) - reference.log_softmax(-1)).logsumexp(-1))

    def mse(self, table: Tensor, reference: Tensor) -> Tensor:
        return 0.5 * (table.softmax(-1) - reference.softmax(-1)).square().sum(-1)

    def slope(self, kernel: str, table: Tensor, reference: Tensor) -> Tensor:
        # ∇ Σ_v f(p(v)) = p ∘ (f' − Σ p f'), with f' = ℓ + 1 for the KL and p − ref for mse; the 1 drops out.
        p = table.softmax(-1)
        pull = table.log_softmax(-1) - reference.log_softmax(-1) if kernel == "full" else p - reference.softmax(-1)
        return p * (pull - (p * pull).sum(-1, keepdim=True))

    def score_sum(self, table: Tensor, contexts: Tensor, tokens: Tensor, coefficients: Tensor) -> Tensor:
        # Σ a (onehot − p) = (Σ a onehot) − p Σ a: one scatter for all estimators, then a rank-one correction per row.
        taken = coefficients.new_zeros(coefficients.shape[0], table.numel())
        taken.index_add_(1, _flat(table, contexts, tokens).flatten(), coefficients.flatten(1))
        taken = taken.view(-1, *table.shape)
        return torch.addcmul(taken, table.softmax(-1), taken.sum(-1, keepdim=True), value=-1)

    def score_tables(self, table: Tensor, contexts: Tensor, tokens: Tensor, coefficients: Tensor) -> Tensor:
        taken = coefficients.new_zeros(len(tokens), table.numel())
        taken.scatter_add_(1, _flat(table, contexts, tokens), coefficients)
        taken = taken.view(-1, *table.shape)
        return torch.addcmul(taken, table.softmax(-1), taken.sum(-1, keepdim=True), value=-1)

    def score_norm(self, table: Tensor, contexts: Tensor, tokens: Tensor) -> Tensor:
        p = table.softmax(-1)
        return (1 - 2 * p + p.square().sum(-1, keepdim=True)).flatten()[_flat(table, contexts, tokens)]

    def split(self, table: Tensor, contexts: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # onehot(y) − p, and onehot(m) − p for the likeliest token m, whose entry 1 − p(m) is summed: nothing cancels near 1.
        mode, p = table.argmax(-1), table.softmax(-1)
        taken = tokens != mode[contexts]
        rest = p.scatter(-1, mode[:, None], 0.0)
        likeliest = (-rest).scatter(-1, mode[:, None], rest.sum(-1, keepdim=True))
        return taken, torch.stack([taken, ~taken]).to(table.dtype), torch.stack([-p, likeliest])

    def score_dot(self, table: Tensor, contexts: Tensor, tokens: Tensor, directions: Tensor) -> Tensor:
        centred = directions - (table.softmax(-1) * directions).sum(-1, keepdim=True)
        return centred.flatten()[_flat(table, contexts, tokens)]


class Normal:
    """Real-valued actions with rows `(mean, std)`; divergences in closed form."""

    name = "normal"

    def log_prob(self, table: Tensor, contexts: Tensor, tokens: Tensor) -> Tensor:
        mean, std = table[contexts].unbind(-1)
        return -0.5 * ((tokens - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)

    def reverse_kl(self, table: Tensor, reference: Tensor) -> Tensor:
        (m, s), (mean, std) = table.unbind(-1), reference.unbind(-1)
        log_variances = 2 * (s / std).log()
        return 0.5 * (torch.expm1(log_variances) - log_variances + ((m - mean) / std).square())

    def forward_kl(self, table: Tensor, reference: Tensor) -> Tensor:
        return self.reverse_kl(reference, table)

    def chi2(self, table: Tensor, reference: Tensor) -> Tensor:
        # ∫ p²/q of two normals is finite iff p has less than twice the variance of q.
        (m, s), (mean, std) = table.unbind(-1), reference.unbind(-1)
        spread = 2 * std.square() - s.square()
        log_integral = (std.square() / s).log() - 0.5 * spread.clamp(min=0).log() + (m - mean).square() / spread
        return torch.where(spread > 0, 0.5 * torch.expm1(log_integral), torch.inf)

    def mse(self, table: Tensor, reference: Tensor) -> Tensor:
        (m, s), (mean, std) = table.unbind(-1), reference.unbind(-1)
        both = (s.square() + std.square()).sqrt()
        cross = (-0.5 * ((m - mean) / both).square()).exp() / (both * math.sqrt(2 * math.pi))
        return 0.5 * ((1 / s + 1 / std) / (2 * math.sqrt(math.pi)) - 2 * cross)

    def slope(self, kernel: str, table: Tensor, reference: Tensor) -> Tensor:
        (m, s), (mean, std) = table.unbind(-1), reference.unbind(-1)
        if kernel == "full":
            return torch.stack([(m - mean) / std.square(), s / std.square() - 1 / s], -1)
        both = s.square() + std.square()
        cross = (-0.5 * (m - mean).square() / both).exp() / (2 * math.pi * both).sqrt()
        by_std = cross * s * (1 - (m - mean).square() / both) / both - 1 / (4 * math.sqrt(math.pi) * s.square())
        return torch.stack([cross * (m - mean) / both, by_std], -1)

    def score_sum(self, table: Tensor, contexts: Tensor, tokens: Tensor, coefficients: Tensor) -> Tensor:
        sums = coefficients.new_zeros(coefficients.shape[0], *table.shape)
        terms = coefficients[..., None] * self._score(table, contexts, tokens)
        return sums.index_add_(1, contexts.flatten(), terms.flatten(1, 2))

    def score_tables(self, table: Tensor, contexts: Tensor, tokens: Tensor, coefficients: Tensor) -> Tensor:
        terms = coefficients[..., None] * self._score(table, contexts, tokens)
        tables = coefficients.new_zeros(len(tokens), *table.shape)
        return tables.scatter_add_(1, contexts[..., None].expand_as(terms), terms)

    def score_norm(self, table: Tensor, contexts: Tensor, tokens: Tensor) -> Tensor:
        return self._score(table, contexts, tokens).square().sum(-1)

    def split(self, table: Tensor, contexts: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        multiples = self._score(table, contexts, tokens).movedim(-1, 0)
        return (
            torch.zeros_like(tokens, dtype=torch.bool),
            multiples,
            torch.eye(2, dtype=table.dtype)[:, None].repeat(1, len(table), 1),
        )

    def score_dot(self, table: Tensor, contexts: Tensor, tokens: Tensor, directions: Tensor) -> Tensor:
        return (self._score(table, contexts, tokens) * directions[contexts]).sum(-1)

    @staticmethod
    def _score(table: Tensor, contexts: Tensor, tokens: Tensor) -> Tensor:
        mean, std = table[contexts].unbind(-1)
        z = (tokens - mean) / std
        return torch.stack([z / std, (z.square() - 1) / std], -1)


def _flat(table: Tensor, contexts: Tensor, tokens: Tensor) -> Tensor:
    """Position of (context, token) in the flattened table."""
    return contexts * table.shape[-1] + tokens


CATEGORICAL = Categorical()
NORMAL = Normal()
