"""The scenarios an audit runs in, and the batches made of their responses.

Small trees with an end token, so that responses differ in length and everything can be enumerated: near the reference, at a
moderate distance, and far from it. `EQUAL_LENGTHS` are the same without an end token, for losses that length confuses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
#: Tokens of a policy, unless a loss needs more.
VOCAB = 3
#: Columns of padding after the longest response.
PADDING = 1


@dataclass(frozen=True, eq=False)
class AuditScenario:
    """A scenario whose responses have been enumerated; `name` is its distance from the reference.

    base: who sampled, before a temperature; `None` for the policy itself. temperature: what the sampler divides its logits by.
    """

    name: str
    scenario: Scenario
    base: Tree | None = field(default=None, kw_only=True)
    temperature: float = field(default=1.0, kw_only=True)

    @property
    def off_policy(self) -> bool:
        """Whether another policy sampled the data."""
        return self.scenario.behaviour is not None if self.temperature == 1 else self.base is not None

    @property
    def vocab(self) -> int:
        """The number of tokens."""
        return int(self.rollout.table.shape[-1])

    @cached_property
    def rollout(self) -> Rollout:
        """Every response and its probability under the sampler."""
        return Rollout.enumerated(self.scenario)

    @cached_property
    def rewards(self) -> Tensor:
        """The task's reward of every response, `[n]`, 0 or 1: drawn once, each as often as the other."""
        n = len(self.rollout.weight)
        return torch.from_numpy(generator(0, "audit.rewards").permutation(n) % 2).double()

    @cached_property
    def advantages(self) -> Tensor:
        """`r − E_μ r` of every response, `[n]`: what a group's mean tends to, with both signs."""
        return self.rewards - self.rollout.weight @ self.rewards

    def columns(self, padding: int) -> dict[str, Tensor]:
        """Padded tokens, mask, rewards, advantages and the three policies' logits of every response.

        What is padded is ordinary and misleading.
        """
        rollout = self.rollout
        n, t = rollout.tokens.shape
        # Behind the end every column gets numbers of its own, so that no leak can cancel.
        noise = torch.from_numpy(generator(0, "audit.padding").normal(size=(3, n, t + padding, rollout.table.shape[1])))
        mask = torch.zeros(n, t + padding, dtype=torch.bool)
        mask[:, :t] = rollout.mask
        tokens = torch.zeros(n, t + padding, dtype=torch.long)
        tokens[:, :t] = rollout.tokens
        advantages = torch.where(mask, self.advantages[:, None], noise[0, ..., 0])
        temperature = torch.full((n, 1, 1), self.temperature, dtype=torch.float64)
        columns = {
            "tokens": tokens, "mask": mask, "rewards": self.rewards, "advantages": advantages, "temperature": temperature,
        }  # fmt: skip
        for name, logits, noise_columns in zip(
            ("logits", "reference_logits", "behaviour_logits"),
            (rollout.logits, rollout.reference_logits, rollout.behaviour_logits * self.temperature),
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
    sampled = behaviour / selected["temperature"] if "temperature" in selected else behaviour
    audit_batch = Batch(
        chosen(leaf), chosen(reference), chosen(sampled), selected["mask"].to(dtype), tokens,
        leaf.to(dtype) if dtype != leaf.dtype else leaf * 1.0, reference.to(dtype), behaviour.to(dtype),
        selected["advantages"].to(dtype), selected["rewards"].to(dtype),
    )  # fmt: skip
    return audit_batch, leaf


def standard(vocab: int = VOCAB, temperature: float = 1.0) -> tuple[AuditScenario, ...]:
    """The worlds of a default audit: near, moderate and far, each on-policy and off-policy."""
    return _audit_scenarios(0, 3 if vocab <= 4 else 2, vocab, float(temperature))


def equal_lengths(vocab: int = VOCAB, temperature: float = 1.0) -> tuple[AuditScenario, ...]:
    """The same distances with responses that are all of one length."""
    return _audit_scenarios(None, 2, vocab, float(temperature))


def at_reference(vocab: int = VOCAB) -> AuditScenario:
    """A policy that is its own reference, on-policy, with responses of two lengths."""
    return _at_reference(vocab)


@lru_cache(maxsize=8)
def _at_reference(vocab: int) -> AuditScenario:
    policy = Tree.random(vocab=vocab, length=2, seed=13, eos=0)
    return AuditScenario("at the reference", Scenario(policy, policy))


def tempered(policy: Tree, temperature: float) -> Tree:
    """The policy with its logits divided by a temperature."""
    return policy.with_parameters(policy.parameters / temperature)


@lru_cache(maxsize=16)
def _audit_scenarios(eos: int | None, length: int, vocab: int, temperature: float) -> tuple[AuditScenario, ...]:
    cases = []
    for name, (kl, lag, seed, to_reference) in DISTANCES.items():
        policy = Tree.random(vocab=vocab, length=length, seed=seed, eos=eos)
        reference, behaviour = policy.perturbed(kl=kl, seed=to_reference), policy.perturbed(kl=lag, seed=seed)
        if temperature == 1:
            cases += [
                AuditScenario(name, Scenario(policy, reference)), AuditScenario(name, Scenario(policy, reference, behaviour)),
            ]  # fmt: skip
            continue
        for base in (None, behaviour):
            scenario = Scenario(policy, reference, tempered(base or policy, temperature))
            cases.append(AuditScenario(name, scenario, base=base, temperature=temperature))
    return tuple(cases)
