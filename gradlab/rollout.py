"""A rollout: weighted responses together with what three policies say about them — one type, however it came about.

Responses that are enumerated carry their probability under the sampler as weight, sampled ones `1/n`, counted ones the
share of a multinomial draw; the code that follows does not distinguish them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from gradlab._common.names import check_held
from gradlab._common.shapes import Bool, Float, Float64, Int64, Num
from gradlab.policies import Gaussian, LanguageModel, Tabular
from gradlab.policies.families import CATEGORICAL, Family
from gradlab.policies.gaussian import crossings, quadrature
from gradlab.policies.responses import Responses
from gradlab.rewards import Reward, given_reward, rewards_of
from gradlab.scenario import Scenario, is_of


class Readings(Protocol):
    """What an estimator reads of responses, as `Rollout` has it, `[n, t]`."""

    @property
    def log_prob(self) -> Tensor: ...
    @property
    def reference_log_prob(self) -> Tensor: ...
    @property
    def log_ratio(self) -> Tensor: ...
    @property
    def log_weight(self) -> Tensor: ...
    @property
    def earlier_log_weight(self) -> Float[Tensor, "n t"]: ...
    def divergence(self, kernel: str) -> Float[Tensor, "n t"]: ...
    @property
    def mask(self) -> Tensor: ...
    @property
    def mask_float(self) -> Tensor: ...
    @property
    def unpadded(self) -> bool: ...
    @property
    def lengths(self) -> Tensor: ...
    @property
    def length(self) -> int: ...
    @property
    def mean_length(self) -> float: ...
    @property
    def sampled(self) -> bool: ...
    def cached(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Rollout:
    """Weighted responses and the parameters of the three policies' step distributions along them.

    Shapes: tokens, mask and contexts `[n, t]`, weight `[n]` (sums to 1), tables `[r, v]`; `contexts` says which table row
    emitted a token, so `logits[i, u] = table[contexts[i, u]]` is `[n, t, v]`. `old_table` is that of the trainer's weights when the
    behaviour policy drew (`None`: the same), `reward` the scenario's function. `length` is the longest possible response,
    `sampled` says that the responses are independent draws, `revisits` that a response may emit from one row more than once,
    `expected_length` is `E_μ[L]` where it is known (otherwise the weighted mean of the responses at hand stands in). `prompts`
    `[n]` says which prompt of a language model a response answers.
    A token after the end of its response has mask False and enters nothing. Raises `ValueError` for inconsistent shapes, a
    response without a live token, or a table with NaN.

    >>> rollout = gl.Rollout.enumerated(gl.Scenario(gl.Bandit([0, 0]), gl.Bandit([0, 1])))
    >>> rollout.tokens.tolist(), rollout.weight.tolist()
    ([[0], [1]], [0.5, 0.5])
    >>> [round(ratio, 3) for ratio in rollout.log_ratio[:, 0].tolist()]
    [0.62, -0.38]
    """

    tokens: Num[Tensor, "n t"]
    mask: Bool[Tensor, "n t"]
    weight: Float64[Tensor, " n"]
    contexts: Int64[Tensor, "n t"]
    table: Float[Tensor, "r v"]
    reference_table: Float[Tensor, "r v"]
    behaviour_table: Float[Tensor, "r v"]
    length: int
    family: Family = CATEGORICAL
    sampled: bool = False
    revisits: bool = False
    expected_length: float | None = None
    prompts: Int64[Tensor, " n"] | None = None
    old_table: Tensor | None = None
    reward: Reward | None = None
    _cache: dict[Hashable, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.tokens.dim() != 2 or self.mask.shape != self.tokens.shape or self.weight.shape != self.tokens.shape[:1]:
            raise ValueError(
                "a rollout needs tokens [n, t], mask [n, t] and weight [n], got "
                f"{list(self.tokens.shape)}, {list(self.mask.shape)} and {list(self.weight.shape)}"
            )
        if len({getattr(self, name).shape for name in self._tables()}) > 1:
            raise ValueError(
                "policy, reference and behaviour need logits of one shape, and so does old, got "
                + " and ".join(str(list(getattr(self, name).shape)) for name in self._tables())
            )
        has_token = self.mask.any(-1)
        if not bool(has_token.all()):
            empty = int(torch.nonzero(~has_token)[0])
            raise ValueError(
                f"response {empty} has no live token in its mask; every response holds at least one (its end token "
                "counts): drop empty responses, and check that the mask covers the response rather than the prompt"
            )
        for name in self._tables():
            # A sum is finite only if every term is, and is much cheaper to look at.
            if not math.isfinite(float(getattr(self, name).detach().sum())):
                raise ValueError(f"the {name} of a rollout holds NaN or infinite logits; check the model's output upstream")

    def _tables(self) -> list[str]:
        """Names of the tables that there are."""
        return ["table", "reference_table", "behaviour_table", *(["old_table"] if self.old_table is not None else [])]

    # ---- constructors -------------------------------------------------------------------------------------------------

    @classmethod
    def from_logits(
        cls,
        tokens: Tensor,
        mask: Tensor,
        weight: Tensor,
        logits: Tensor,
        reference_logits: Tensor,
        behaviour_logits: Tensor | None = None,
        family: Family = CATEGORICAL,
        length: int | None = None,
        sampled: bool = True,
        expected_length: float | None = None,
        prompts: Tensor | None = None,
        old_logits: Tensor | None = None,
        reward: Reward | None = None,
    ) -> Rollout:
        """Build a rollout from logits `[n, t, v]`; `behaviour_logits=None` means on-policy.

        The mask may be 0/1 numbers, and padding any token id, such as −100. Raises `ValueError` for shapes that do not fit
        together, for weights that are not float64, not negative and 1 in all, and for a live token outside the vocabulary.
        """
        behaviour = logits.detach() if behaviour_logits is None else behaviour_logits
        given = {
            "logits": logits,
            "reference_logits": reference_logits,
            "behaviour_logits": behaviour,
            "old_logits": old_logits,
        }
        for name, item in given.items():
            if item is not None and (item.dim() != 3 or item.shape[:2] != tokens.shape):
                raise ValueError(f"{name} must be [n, t, v] with [n, t] = {list(tokens.shape)}, got {list(item.shape)}")
        mask = mask.bool()
        if family is CATEGORICAL and mask.shape == tokens.shape:
            outside = (tokens < 0) | (tokens >= logits.shape[-1])
            if bool((outside & mask).any()):
                raise ValueError(
                    f"a live token has id {int(tokens[outside & mask][0])}, outside the vocabulary of {logits.shape[-1]} "
                    "that the logits cover; mask out padding, and shift tokens and logits so that logits[:, t] emits tokens[:, t]"
                )
            tokens = torch.where(outside, 0, tokens)
        contexts = torch.arange(tokens.numel()).view(tokens.shape)
        table, reference_table, behaviour_table = (
            item.reshape(-1, item.shape[-1]) for item in (logits, reference_logits, behaviour)
        )
        rollout = cls(
            tokens, mask, weight, contexts, table, reference_table, behaviour_table, length or tokens.shape[1], family, sampled,
            expected_length=expected_length, prompts=prompts, reward=reward,
            old_table=None if old_logits is None else old_logits.reshape(-1, old_logits.shape[-1]),
        )  # fmt: skip
        _check_weight(weight)
        return rollout

    @classmethod
    def from_responses(
        cls, scenario: Scenario, responses: Responses, weight: Tensor, expected_length: float | None = None
    ) -> Rollout:
        """Given responses of a language model, with logits `[n, t, v]` of all three policies held at once: mind `n · t · v`.

        weight `[n]`. Raises `ValueError` when the scenario's policy is another kind, and for weights that are not float64, not
        negative and 1 in all.
        """
        if not is_of(scenario, LanguageModel):
            raise ValueError(f"answers need the prompts of a language model, the policy is a {type(scenario.policy).__name__}")
        prompts, tokens = responses.prompts, responses.tokens
        with torch.no_grad():
            logits, reference_logits = (p.logits(prompts, tokens) for p in (scenario.policy, scenario.reference))
            behaviour_logits, old_logits = (
                None if p is None else p.logits(prompts, tokens) for p in (scenario.behaviour, scenario.old)
            )
        return cls.from_logits(
            tokens, responses.mask, weight, logits, reference_logits, behaviour_logits, length=scenario.policy.length,
            expected_length=expected_length, prompts=prompts, old_logits=old_logits, reward=scenario.reward,
        )  # fmt: skip

    @classmethod
    def _from_tables(
        cls, scenario: Scenario, responses: Responses, weight: Tensor, expected_length: float | None = None
    ) -> Rollout:
        """Responses of policies that have tables; those with an expected length are samples."""
        policy = scenario.policy
        # Sampling is never differentiated, and neither is the reference: only the policy's own table may carry gradients.
        tables = policy.table, scenario.reference.table.detach(), scenario.sampler.table.detach()
        sampled = expected_length is not None
        return cls(
            responses.tokens, responses.mask, weight, policy.rows_of(responses), *tables, policy.length, policy.family, sampled,
            policy.revisits, expected_length, responses.prompts, _old(scenario), scenario.reward,
        )  # fmt: skip

    @classmethod
    def enumerated(cls, scenario: Scenario, log_ratios: Iterable[float] = (), log_weights: Iterable[float] = ()) -> Rollout:
        """Every response of the scenario, weighted by its probability under the sampler; prompts are equally likely.

        A Gaussian is enumerated by quadrature nodes; `log_ratios` and `log_weights` are levels of `ℓ` and of `log ρ` where
        the integrand has a kink. Raises `ValueError` when there are too many responses to enumerate.
        """
        if is_of(scenario, Gaussian):
            return cls._by_quadrature(scenario, log_ratios, log_weights)
        listed = cast("Scenario[Tabular | LanguageModel]", scenario)
        sampler, responses = listed.sampler, listed.policy.enumerate()
        log_prob = sampler.family.log_prob(sampler.table.detach(), sampler.rows_of(responses), responses.tokens)
        weight = torch.where(responses.mask, log_prob, 0.0).sum(-1).exp() / len(sampler.prompts)
        if is_of(scenario, LanguageModel):  # a nucleus leaves responses out altogether
            responses, weight = responses[weight > 0], weight[weight > 0]
        return cls._from_tables(scenario, responses, weight)

    @classmethod
    def parts(cls, scenario: Scenario[Tabular], size: int) -> Iterator[tuple[Rollout, Tensor, float]]:
        """`enumerated` for a table, at most `size` responses at a time.

        Each part comes with the rows `[q]` of the table that it visits, which are all that it holds, and its probability, by which
        its weights are divided. Raises `ValueError` as `Tabular.parts` does.
        """
        policy, reference, sampler = scenario.policy, scenario.reference, scenario.sampler
        tables = policy.table, reference.table.detach(), sampler.table.detach()
        expected_length, old = float(sampler.occupancy().detach().sum()), _old(scenario)
        for part in policy.parts(size):
            rows, contexts = policy.visited(part.tokens)
            table, reference_table, own = (table[rows] for table in tables)
            log_prob = policy.family.log_prob(own, contexts, part.tokens)
            weight = torch.where(part.mask, log_prob, 0.0).sum(-1).exp()
            share = float(weight.sum())
            rollout = cls(
                part.tokens, part.mask, weight / share, contexts, table, reference_table, own, policy.length, policy.family,
                revisits=policy.revisits, expected_length=expected_length, prompts=part.prompts,
                old_table=None if old is None else old[rows], reward=scenario.reward,
            )  # fmt: skip
            yield rollout, rows, share

    @classmethod
    def _by_quadrature(cls, scenario: Scenario[Gaussian], log_ratios: Iterable[float], log_weights: Iterable[float]) -> Rollout:
        policy, reference, sampler = scenario.policy, scenario.reference, scenario.sampler
        kinks = [x for level in log_ratios for x in crossings(policy, reference, level)]
        pairs = [(policy, sampler)]
        if scenario.old is not None:
            pairs += [(policy, scenario.old), (scenario.old, sampler)]
        kinks += [x for level in log_weights for pair in pairs for x in crossings(*pair, level)]
        kinks += [float(x) for x in getattr(scenario.reward, "kinks", ())]
        nodes, widths = quadrature([sampler, policy, reference], kinks)
        responses = Responses.without_prompt(nodes[:, None], torch.ones(len(nodes), 1, dtype=torch.bool))
        log_prob = sampler.family.log_prob(sampler.table.detach(), sampler.rows_of(responses), responses.tokens)
        return cls._from_tables(scenario, responses, widths * log_prob[:, 0].exp())

    @classmethod
    def from_sampler(cls, scenario: Scenario, samples: int, rng: np.random.Generator, group: int = 1) -> Rollout:
        """`samples` responses of the sampler, each of weight `1/samples`; every `group` successive ones share their prompt."""
        if samples < 1:
            raise ValueError(f"samples must be a positive number, got {samples}")
        if is_of(scenario, LanguageModel):
            check_held(samples, 3 * scenario.sampler.length * scenario.sampler.vocab)
            weight = torch.full((samples,), 1 / samples, dtype=torch.float64)
            return cls.from_responses(scenario, scenario.sampler.sample(samples, rng, group), weight)
        tables = cast("Scenario[Tabular | Gaussian]", scenario)
        return cls.made(tables, tables.sampler.variates(samples, rng))

    @classmethod
    def made(cls, scenario: Scenario[Tabular | Gaussian], variates: Tensor, expected_length: float | None = None) -> Rollout:
        """The responses that the sampler makes of `variates` `[n, T]`, each of weight `1/n`; a table's or a Gaussian's.

        `expected_length` saves its computation where several rollouts of one scenario are made.
        """
        sampler = scenario.sampler
        weight = torch.full((len(variates),), 1 / len(variates), dtype=torch.float64)
        length = float(sampler.occupancy().detach().sum()) if expected_length is None else expected_length
        return cls._from_tables(scenario, sampler.respond(variates), weight, length)

    def multinomial_weights(self, samples: int, replicates: int, rng: np.random.Generator) -> Tensor:
        """Weights `[replicates, n]` that `samples` draws from this enumerated rollout would get: multinomial counts / samples.

        The same distribution as drawing one by one, at a cost that does not depend on `samples`.
        """
        probabilities = self.weight.numpy()
        counts = rng.multinomial(samples, probabilities / math.fsum(probabilities), size=replicates)
        return torch.from_numpy(counts / samples)

    # ---- what estimators read -----------------------------------------------------------------------------------------

    @property
    def logits(self) -> Float[Tensor, "n t v"]:
        """The policy's logits along the responses, `[n, t, v]`."""
        return self.table[self.contexts]

    @property
    def reference_logits(self) -> Float[Tensor, "n t v"]:
        """The reference's logits along the responses, `[n, t, v]`."""
        return self.reference_table[self.contexts]

    @property
    def behaviour_logits(self) -> Float[Tensor, "n t v"]:
        """The sampler's logits along the responses, `[n, t, v]`."""
        return self.behaviour_table[self.contexts]

    @cached_property
    def log_prob(self) -> Float[Tensor, "n t"]:
        """`log π(y_t|s_t)`, `[n, t]`, 0 in the padding; differentiable when the table is."""
        return self._masked(self.family.log_prob(self.table, self.contexts, self.tokens))

    @cached_property
    def reference_log_prob(self) -> Float[Tensor, "n t"]:
        """`log ref(y_t|s_t)`, `[n, t]`, 0 in the padding."""
        return self._masked(self.family.log_prob(self.reference_table, self.contexts, self.tokens))

    @cached_property
    def behaviour_log_prob(self) -> Float[Tensor, "n t"]:
        """`log μ(y_t|s_t)`, `[n, t]`, 0 in the padding."""
        return self._masked(self.family.log_prob(self.behaviour_table, self.contexts, self.tokens))

    @cached_property
    def log_ratio(self) -> Float[Tensor, "n t"]:
        """`ℓ_t = log π − log ref`, `[n, t]`, to its own digits however close the two are."""
        return self._masked(self.family.log_ratio(self.table, self.reference_table, self.contexts, self.tokens))

    @cached_property
    def log_weight(self) -> Float[Tensor, "n t"]:
        """`log ρ_t = log π − log μ`, `[n, t]`."""
        return self._masked(self.family.log_ratio(self.table, self.behaviour_table, self.contexts, self.tokens))

    @cached_property
    def earlier_log_weight(self) -> Float[Tensor, "n t"]:
        """`log Π_{u<t} ρ_u`, `[n, t]`."""
        return self.log_weight.cumsum(-1) - self.log_weight

    @cached_property
    def old_log_weight(self) -> Float[Tensor, "n t"]:
        """`log π − log π_old`, `[n, t]`; `log_weight` where the trainer's weights were those of the behaviour policy."""
        if self.old_table is None:
            return self.log_weight
        return self._masked(self.family.log_ratio(self.table, self.old_table, self.contexts, self.tokens))

    @cached_property
    def log_correction(self) -> Float[Tensor, "n t"]:
        """`log π_old − log μ`, `[n, t]`, what the trainer and the engine that drew disagree by."""
        if self.old_table is None:
            return torch.zeros_like(self.log_weight)
        return self._masked(self.family.log_ratio(self.old_table, self.behaviour_table, self.contexts, self.tokens))

    @cached_property
    def rewards(self) -> Float[Tensor, " n"]:
        """The reward of every response, `[n]`. Raises `ValueError` where there is none, or not one finite number for each."""
        return self.token_rewards if self.token_rewards.dim() == 1 else self.token_rewards.sum(-1)

    @cached_property
    def token_rewards(self) -> Tensor:
        """What the reward gave: `[n]`, or `[n, t]` with 0 in the padding."""
        return rewards_of(given_reward(self.reward), self)

    def divergence(self, kernel: str) -> Float[Tensor, "n t"]:
        """A vocabulary kernel at every prefix: `full` is `KL_t(π‖ref)`, `mse` is `½Σ_v(π−ref)²`; `[n, t]`, 0 in the padding."""
        row_divergence = self.family.reverse_kl if kernel == "full" else self.family.mse
        return self.cached(kernel, lambda: self._masked(row_divergence(self.table, self.reference_table)[self.contexts]))

    @cached_property
    def mask_float(self) -> Float[Tensor, "n t"]:
        """The mask as numbers, `[n, t]`."""
        return self.mask.to(self.weight.dtype)

    @cached_property
    def unpadded(self) -> bool:
        """Whether no response ends early, so that the mask does nothing."""
        return bool(self.mask.all())

    @cached_property
    def lengths(self) -> Float[Tensor, " n"]:
        """Number of live tokens of every response, `[n]`."""
        return self.mask.sum(-1).to(self.weight.dtype)

    @cached_property
    def mean_length(self) -> float:
        """`E_μ[L]`, the constant by which one mean over all tokens of a large batch divides."""
        if self.expected_length is not None:
            return self.expected_length
        return float(self.weight @ self.lengths / self.weight.sum())

    def by_prompt(self) -> list[Rollout]:
        """The rollouts of every single prompt, each of total weight 1; the rollout itself where there is one prompt, or none."""
        if self.prompts is None or bool((self.prompts == self.prompts[0]).all()):
            return [self]
        rollouts = []
        for prompt in sorted(set(self.prompts.tolist())):
            rows = self.prompts == prompt
            weight = self.weight[rows] / self.weight[rows].sum()
            fields = {name: getattr(self, name)[rows] for name in ("tokens", "mask", "contexts", "prompts")}
            rollouts.append(replace(self, weight=weight, **fields))
        return rollouts

    @property
    def responses(self) -> Responses:
        """Tokens, mask and prompts. Raises `ValueError` for a rollout that does not say which prompts it answers."""
        if self.prompts is None:
            raise ValueError("this rollout does not say which prompts it answers: give prompts to Rollout.from_logits")
        return Responses(self.tokens, self.mask, self.prompts)

    def only(self, rows: Tensor) -> Rollout:
        """Some of the responses, with the weights they have: these need not sum to 1."""
        fields = {name: getattr(self, name)[rows] for name in ("tokens", "mask", "contexts", "weight")}
        prompts = None if self.prompts is None else self.prompts[rows]
        return replace(self, **fields, prompts=prompts, expected_length=self.mean_length)

    def narrowed(self) -> tuple[Rollout, Tensor]:
        """The same responses with only those rows of the tables that they visit, and the sorted numbers of these rows."""
        visited = torch.zeros(len(self.table), dtype=torch.bool)
        visited[self.contexts] = True
        rows = visited.nonzero()[:, 0]
        if len(rows) == len(visited):
            return self, rows
        tables = {name: getattr(self, name)[rows] for name in self._tables()}
        return replace(self, contexts=(visited.cumsum(0) - 1)[self.contexts], **tables), rows

    def cached(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """Return what `compute` gives, computed once for this rollout: estimators share kernels and weights."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def without_cache(self) -> Rollout:
        """The same rollout without anything computed yet, so that a backward pass does not free what another needs."""
        return replace(self)

    def _masked(self, values: Tensor) -> Tensor:
        return values if self.unpadded else torch.where(self.mask, values, 0.0)

    def differentiable(self) -> Rollout:
        """The same rollout with every step's logits a leaf of its own, so that samples do not mix.

        The table becomes `[n·t, v]`, so one `autograd.grad(loss.sum(), rollout.table)` returns every sample's cotangent.
        """
        leaves = self.logits.detach().clone().requires_grad_(True)
        return Rollout.from_logits(
            self.tokens, self.mask, self.weight, leaves, self.reference_logits, self.behaviour_logits.detach(),
            self.family, self.length, self.sampled, self.expected_length, self.prompts,
            None if self.old_table is None else self.old_table[self.contexts], self.reward,
        )  # fmt: skip


def _old(scenario: Scenario) -> Tensor | None:
    return None if scenario.old is None else scenario.old.table.detach()


def _check_weight(weight: Tensor) -> None:
    """Raise `ValueError` unless `weight` is a probability of every response, in double precision."""
    if weight.dtype != torch.float64:
        raise ValueError(f"the weight of a rollout must be float64, got {weight.dtype}; convert it with weight.double()")
    if bool((weight < 0).any()) or not abs(float(weight.sum()) - 1) < 1e-6:
        raise ValueError(
            f"the weight of a rollout holds one probability per response: none below 0, and 1 in all; got {float(weight.min()):g} "
            f"at the least and {float(weight.sum()):g} in all; n sampled responses have 1/n each"
        )
