"""A package beside gradlab that adds one of everything: what `gl.register` takes, in the least that each needs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import gradlab as gl
from gradlab_example import framework


def squared_kl(policy: gl.Policy, reference: gl.Policy, sampler: gl.Policy) -> Tensor:
    """`½ KL(π‖ref)²` of whole responses, a scalar that is differentiable in the policy."""
    return 0.5 * (policy.occupancy() @ policy.family.reverse_kl(policy.table, reference.table)).square()


class Positions(gl.policies.Tabular):
    """One row of logits for every position, whatever came before."""

    @classmethod
    def random(cls, vocab: int = 4, length: int = 3, seed: int = 0) -> Positions:
        """Standard normal logits."""
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.randn(length, vocab, generator=generator, dtype=torch.float64), length)

    def contexts(self, tokens: Tensor) -> Tensor:
        return torch.arange(tokens.shape[1]).expand_as(tokens)

    def occupancy(self) -> Tensor:
        return torch.ones(self.length, dtype=torch.float64)


def register() -> None:
    """What the entry point of this package calls."""
    half = "½-exponential"  # ¼ (e^{2ℓ} − 1 − 2ℓ), whose derivative is ½ (e^{2ℓ} − 1)
    gl.register(
        gl.Kernel(
            half,
            lambda x, _: 0.25 * (torch.expm1(2 * x) - 2 * x),
            lambda x, _: 0.5 * torch.expm1(2 * x),
            "gradlab_example",
            growth=lambda x: (2 * x).exp(),
        )
    )
    gl.register(
        gl.Kernel(
            "huber",
            lambda x, _: torch.where(x.abs() < 1, 0.5 * x.square(), x.abs() - 0.5),
            lambda x, _: x.clamp(-1, 1),
            "gradlab_example: k2 with bounded coefficients",
            kinks=(-1.0, 1.0),
        )
    )
    gl.register(gl.Estimator("huber"), "huber-loss", source="gradlab_example", colour="#332288")
    gl.register(gl.Target("squared_kl", "½ KL(π(y) ‖ ref(y))²", "gradlab_example", squared_kl))
    gl.register(Positions)
    gl.register(
        gl.claims.claim(
            "huber-biased", "bandit", "20_huber", "bias", ">", 0.01, statement="huber as loss is biased by more than 1 %",
            source="gradlab_example", estimator="huber-loss", where={"target": "reverse_kl"},
        )
    )  # fmt: skip
    gl.register(framework, "example")
    gl.register(Path(__file__).parent / "20_huber.py")
