"""The per-step distributions a policy can emit: categorical over tokens, or a normal over the real line.

A policy's parameters form a table `[r, v]`: one row per context, holding the distribution's natural handle (logits for a
categorical, mean and standard deviation for a normal). A family knows log-probabilities, scores and divergences of rows;
everything else in gradlab is written once on top of it.
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from gradlab._common.accurate import excess, relative_to
from gradlab.policies.softmax import compared, rows


@runtime_checkable
class Family(Protocol):
    """What gradlab needs to know of a distribution family. Shapes: table `[r, v]`, contexts and tokens `[n, t]`."""

    name: str

    def log_prob(self, table: Tensor, contexts: Tensor, tokens: Tensor) -> Tensor:
        """Return `log p(token | context)`, `[n, t]`, differentiable with respect to the table."""

    def log_ratio(self, table: Tensor, reference: Tensor, contexts: Tensor, tokens: Tensor) -> Tensor:
        """Return `log p − log ref` of every token, `[n, t]`, to its own digits; differentiable with respect to the tables."""

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

    def balanced(self, gradient: Tensor, table: Tensor) -> Tensor:
        """Return a gradient `[…, r, v]` of something that depends on the distributions alone, rid of rounding where it can be."""

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
        return rows(table).log_p.flatten()[_flat(table, contexts, tokens)]

    def log_ratio(self, table: Tensor, reference: Tensor, contexts: Tensor, tokens: Tensor) -> Tensor:
        return self.log_ratios(table, reference).flatten()[_flat(table, contexts, tokens)]

    def log_ratios(self, table: Tensor, reference: Tensor) -> Tensor:
        """`ℓ = log p − log ref` of every token of every row, `[r, v]`, to its own digits."""
        return compared(table, reference, self._log_ratios)

    def _log_ratios(self, table: Tensor, reference: Tensor) -> Tensor:
        """The ratios of `log_ratios`, without digits lost.

        With `d` the difference of the logits less that of the likeliest token `*`, `ℓ = d + ℓ_*`, and near the reference
        `ℓ_* = −log Σ ref e^d = −log1p Σ ref (e^d − 1)`, in which a token that takes all but 1e-12 has no part.
        """
        (log_p, _, top), (log_ref, ref, _) = rows(table), rows(reference)
        d = relative_to(top, table, reference)
        plain = (log_p - log_ref).gather(-1, top)
        near = d.abs() < 1
        growth = torch.where(near, ref * torch.expm1(d.clamp(-1, 1)), (log_p - plain).exp() - ref)
        small = plain.abs() < 0.5
        total = torch.where(small, growth.sum(-1, keepdim=True), 0.0)
        return d + torch.where(small, -torch.log1p(total), plain)

    def gaps(self, table: Tensor, reference: Tensor) -> Tensor:
        """`p − ref` of every token of every row, `[r, v]`, to its own digits."""
        x, p, ref = self.log_ratios(table, reference), rows(table).p, rows(reference).p
        return torch.where(x.abs() < 1, ref * torch.expm1(x.clamp(-1, 1)), p - ref)

    def reverse_kl(self, table: Tensor, reference: Tensor) -> Tensor:
        # Σ p ℓ + ref − p, term by term p (e^{−ℓ} − 1 + ℓ): no term is negative, so none cancels another.
        x, p, ref = self.log_ratios(table, reference), rows(table).p, rows(reference).p
        return torch.where(x.abs() < 1, p * excess(-x.clamp(-1, 1)), p * x + (ref - p)).sum(-1)

    def forward_kl(self, table: Tensor, reference: Tensor) -> Tensor:
        return self.reverse_kl(reference, table)

    def chi2(self, table: Tensor, reference: Tensor) -> Tensor:
        x, p, ref = self.log_ratios(table, reference), rows(table).p, rows(reference).p
        far = (2 * rows(table).log_p - rows(reference).log_p).exp() - 2 * p + ref
        return 0.5 * torch.where(x.abs() < 1, ref * torch.expm1(x.clamp(-1, 1)).square(), far).sum(-1)

    def mse(self, table: Tensor, reference: Tensor) -> Tensor:
        return 0.5 * self.gaps(table, reference).square().sum(-1)

    def slope(self, kernel: str, table: Tensor, reference: Tensor) -> Tensor:
        # ∇ Σ_v f(p(v)) is p f' as a coefficient on the scores, with f' = ℓ + 1 for the KL and p − ref for mse; the 1 drops out.
        difference = self.log_ratios(table, reference) if kernel == "full" else self.gaps(table, reference)
        return self.along_scores(rows(table).p * difference, table)

    def along_scores(self, at_tokens: Tensor, table: Tensor) -> Tensor:
        """`Σ_y at_tokens(y) (onehot(y) − p)` of every row, for coefficients `at_tokens` `[…, r, v]`."""
        p = rows(table).p
        return self.balanced(torch.addcmul(at_tokens, p, at_tokens.sum(-1, keepdim=True), value=-1), table)

    def balanced(self, gradient: Tensor, table: Tensor) -> Tensor:
        # Logits are defined up to a shift, so a row sums to 0. The entry of a token that takes nearly all is a difference of
        # nearly equal numbers, those of the others are not: it is what they leave.
        top = rows(table).top.expand(*gradient.shape[:-1], 1)
        return gradient.scatter_add(-1, top, -gradient.sum(-1, keepdim=True))

    def score_sum(self, table: Tensor, contexts: Tensor, tokens: Tensor, coefficients: Tensor) -> Tensor:
        # Σ a (onehot − p) = (Σ a onehot) − p Σ a: one scatter for all estimators, then a rank-one correction per row.
        at_tokens = coefficients.new_zeros(coefficients.shape[0], table.numel())
        at_tokens.index_add_(1, _flat(table, contexts, tokens).flatten(), coefficients.flatten(1))
        return self.along_scores(at_tokens.view(-1, *table.shape), table)

    def score_tables(self, table: Tensor, contexts: Tensor, tokens: Tensor, coefficients: Tensor) -> Tensor:
        at_tokens = coefficients.new_zeros(len(tokens), table.numel())
        at_tokens.scatter_add_(1, _flat(table, contexts, tokens), coefficients)
        return self.along_scores(at_tokens.view(-1, *table.shape), table)

    def score_norm(self, table: Tensor, contexts: Tensor, tokens: Tensor) -> Tensor:
        return self.score_norms(table).flatten()[_flat(table, contexts, tokens)]

    def score_norms(self, table: Tensor) -> Tensor:
        """`‖∇ log p‖²` of every token of every row, `[r, v]`."""
        # (1 − p(y))² and the squares of the other tokens, of which only the likeliest can be left out of a sum beforehand.
        _, p, top = rows(table)
        square = p.square()
        others = square.scatter(-1, top, 0.0).sum(-1, keepdim=True)
        rest = (others + square.gather(-1, top) - square).scatter(-1, top, others)
        return self.missing(table).square() + rest

    def missing(self, table: Tensor) -> Tensor:
        """`1 − p` of every token of every row, `[r, v]`, to its own digits."""
        _, p, top = rows(table)
        return (1 - p).scatter(-1, top, p.scatter(-1, top, 0.0).sum(-1, keepdim=True))

    def split(self, table: Tensor, contexts: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # onehot(y) − p, and onehot(m) − p for the likeliest token m, whose entry 1 − p(m) is summed: nothing cancels near 1.
        _, p, top = rows(table)
        at_tokens = tokens != top[:, 0][contexts]
        rest = p.scatter(-1, top, 0.0)
        likeliest = (-rest).scatter(-1, top, rest.sum(-1, keepdim=True))
        return at_tokens, torch.stack([at_tokens, ~at_tokens]).to(table.dtype), torch.stack([-p, likeliest])

    def score_dot(self, table: Tensor, contexts: Tensor, tokens: Tensor, directions: Tensor) -> Tensor:
        return self.score_dots(table, directions).flatten()[_flat(table, contexts, tokens)]

    def score_dots(self, table: Tensor, directions: Tensor) -> Tensor:
        """`⟨∇ log p, direction⟩` of every token of every row, `[r, v]`, for row directions `[r, v]`."""
        _, p, top = rows(table)
        centred = directions - directions.gather(-1, top)
        return centred - (p * centred).sum(-1, keepdim=True)


class Normal:
    """Real-valued actions with rows `(mean, std)`; divergences in closed form."""

    name = "normal"

    def log_prob(self, table: Tensor, contexts: Tensor, tokens: Tensor) -> Tensor:
        mean, std = table[contexts].unbind(-1)
        return -0.5 * ((tokens - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)

    def log_ratio(self, table: Tensor, reference: Tensor, contexts: Tensor, tokens: Tensor) -> Tensor:
        # ½ (z_ref − z)(z_ref + z) − log(std / std_ref), with z = (y − mean) / std.
        (m, s), (mean, std) = table[contexts].unbind(-1), reference[contexts].unbind(-1)
        z = (tokens - m) / s
        apart = (z * (s - std) + (m - mean)) / std
        return 0.5 * apart * (apart + 2 * z) - torch.log1p((s - std) / std)

    def reverse_kl(self, table: Tensor, reference: Tensor) -> Tensor:
        (m, s), (mean, std) = table.unbind(-1), reference.unbind(-1)
        return 0.5 * (excess(2 * torch.log1p((s - std) / std)) + ((m - mean) / std).square())

    def forward_kl(self, table: Tensor, reference: Tensor) -> Tensor:
        return self.reverse_kl(reference, table)

    def chi2(self, table: Tensor, reference: Tensor) -> Tensor:
        # ∫ p²/q of two normals is finite iff p has less than twice the variance of q.
        (m, s), (mean, std) = table.unbind(-1), reference.unbind(-1)
        wider = (s - std) * (s + std) / std.square()
        variance_gap = 1 - wider
        log_integral = ((m - mean) / std).square() / variance_gap - 0.5 * torch.log1p(-wider.clamp(-1, 1).square())
        return torch.where(variance_gap > 0, 0.5 * torch.expm1(log_integral), torch.inf)

    def mse(self, table: Tensor, reference: Tensor) -> Tensor:
        # (1/s + 1/σ − 2√2/b e^{−w}) / 4√π with b² = s² + σ², w = d²/2b²; the first three terms as one fraction.
        (m, s), (mean, std) = table.unbind(-1), reference.unbind(-1)
        b, gap, product = (s.square() + std.square()).sqrt(), (s - std).square(), s * std
        widths = gap * (gap + 6 * product) / (product * b * ((s + std) * b + 8**0.5 * product))
        means = 8**0.5 / b * -torch.expm1(-0.5 * ((m - mean) / b).square())
        return (widths + means) / (4 * math.sqrt(math.pi))

    def slope(self, kernel: str, table: Tensor, reference: Tensor) -> Tensor:
        (m, s), (mean, std) = table.unbind(-1), reference.unbind(-1)
        wider = (s - std) * (s + std)
        if kernel == "full":
            return torch.stack([(m - mean) / std.square(), wider / (s * std.square())], -1)
        square = s.square() + std.square()
        b, w = square.sqrt(), 0.5 * (m - mean).square() / square
        by_mean = (-w).exp() * (m - mean) / (b * square * math.sqrt(2 * math.pi))
        # √8 s/b³ − 1/s² as one fraction, and what e^{−w} (1 − 2w) takes off the first of the two.
        widths = wider * (4 * s**4 + 2 * s.square() * square + square.square())
        widths = widths / (s.square() * b * square * (8**0.5 * s**3 + b * square))
        means = 8**0.5 * s / (b * square) * (torch.expm1(-w) - 2 * w * (-w).exp())
        return torch.stack([by_mean, (widths + means) / (4 * math.sqrt(math.pi))], -1)

    def balanced(self, gradient: Tensor, table: Tensor) -> Tensor:
        return gradient

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
