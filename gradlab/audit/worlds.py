"""The scenarios an audit runs in, and the batches made of their responses.

Small trees with an end token, so that responses differ in length and everything can be enumerated: near the reference, at a
moderate distance, and far from it. `EQUAL_LENGTHS` are the same without an end token, for losses that length confuses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from gradlab._common.streams import generator
from gradlab.audit.batch import Batch
from gradlab.policies import Tree
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario

#: Name → KL(policy ‖ reference) and KL(policy ‖ behaviour) in nats, and the seeds of policy and reference. Seeds of `far` are
#: such that log-ratios reach from −4 to 10, where shipped clamps bind.
DISTANCES = {"near": (0.02, 0.003, 11, 1), "moderate": (0.4, 0.1, 12, 2), "far": (3.0, 0.5, 20, 4)}
#: Columns of padding after the longest response.
PADDING = 1


@dataclass(frozen=True, eq=False)
class AuditScenario:
    """A scenario whose responses have been enumerated; `name` is its distance from the reference."""

    name: str
    scenario: Scenario

    @property
    def off_policy(self) -> bool:
        """Whether another policy sampled the data."""
        return self.scenario.behaviour is not None

    @cached_property
    def rollout(self) -> Rollout:
        """Every response and its probability under the sampler."""
        return Rollout.enumerated(self.scenario)

    def columns(self, padding: int) -> dict[str, Tensor]:
        """Padded tokens, mask and the three policies' logits of every response; what is padded is ordinary and misleading."""
        rollout = self.rollout
        n, t = rollout.tokens.shape
        # Behind the end every column gets numbers of its own, so that no leak can cancel.
        noise = torch.from_numpy(generator(0, "audit.padding").normal(size=(3, n, t + padding, rollout.table.shape[1])))
        mask = torch.zeros(n, t + padding, dtype=torch.bool)
        mask[:, :t] = rollout.mask
        tokens = torch.zeros(n, t + padding, dtype=torch.long)
        tokens[:, :t] = rollout.tokens
        columns = {"tokens": tokens, "mask": mask}
        for name, logits, noise_columns in zip(
            ("logits", "reference_logits", "behaviour_logits"),
            (rollout.logits, rollout.reference_logits, rollout.behaviour_logits),
            noise,
            strict=True,
        ):
            padded = noise_columns.clone()
            padded[:, :t] = torch.where(rollout.mask[..., None], logits, noise_columns[:, :t])
            columns[name] = padded
        return columns


def perturbed_logits(columns: dict[str, Tensor], step: float) -> dict[str, Tensor]:
    """The same columns with logits moved by about `step`, those of policy and sampler alike, so that ratios of 1 stay 1."""
    along = step * torch.linspace(1, 2, columns["logits"].shape[-1], dtype=torch.float64)
    perturbed = {name: columns[name] * (1 - along) for name in ("logits", "behaviour_logits")}
    return columns | perturbed | {"reference_logits": columns["reference_logits"] * (1 + along)}


def batch(columns: dict[str, Tensor], rows: list[int] | Tensor, dtype: torch.dtype = torch.float64) -> tuple[Batch, Tensor]:
    """A batch of the responses `rows`, and its logits `[B, T, V]` as a leaf in float64; the batch itself is in `dtype`."""
    selected = {name: item[rows] for name, item in columns.items()}
    leaf = selected["logits"].clone().requires_grad_(True)
    tokens = selected["tokens"].clone()

    def chosen(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].to(dtype)

    reference, behaviour = selected["reference_logits"], selected["behaviour_logits"]
    audit_batch = Batch(
        chosen(leaf), chosen(reference), chosen(behaviour), selected["mask"].to(dtype), tokens,
        leaf.to(dtype) if dtype != leaf.dtype else leaf * 1.0, reference.to(dtype), behaviour.to(dtype),
    )  # fmt: skip
    return audit_batch, leaf


@lru_cache(maxsize=1)
def standard() -> tuple[AuditScenario, ...]:
    """The worlds of a default audit: near, moderate and far, each on-policy and off-policy."""
    return _audit_scenarios(eos=0, length=3)


@lru_cache(maxsize=1)
def equal_lengths() -> tuple[AuditScenario, ...]:
    """The same distances with responses that are all of one length."""
    return _audit_scenarios(eos=None, length=2)


@lru_cache(maxsize=1)
def at_reference() -> AuditScenario:
    """A policy that is its own reference, on-policy, with responses of two lengths."""
    policy = Tree.random(vocab=3, length=2, seed=13, eos=0)
    return AuditScenario("at the reference", Scenario(policy, policy))


def _audit_scenarios(eos: int | None, length: int) -> tuple[AuditScenario, ...]:
    cases = []
    for name, (kl, lag, seed, to_reference) in DISTANCES.items():
        policy = Tree.random(vocab=3, length=length, seed=seed, eos=eos)
        reference, behaviour = policy.perturbed(kl=kl, seed=to_reference), policy.perturbed(kl=lag, seed=seed)
        cases += [AuditScenario(name, Scenario(policy, reference)), AuditScenario(name, Scenario(policy, reference, behaviour))]
    return tuple(cases)
