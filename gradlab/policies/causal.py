"""A network of the transformers library as a policy: key-value caches, padding on the left, trees in one pass, other precisions."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from gradlab.policies.actions import inverse_cdf_sample
from gradlab.policies.arithmetic import faithful
from gradlab.policies.language import LanguageModel
from gradlab.policies.split import Packed, lower, split, upper
from gradlab.policies.trunk import Trunk

#: Tokens that the key-value cache of one batch of responses may hold.
CACHED_TOKENS = 2**13
#: Tokens that one pass reads at most: what the blocks hold of them, not the logits, is what takes memory.
READ_TOKENS = 2**12


@dataclass(frozen=True, eq=False)
class Pretrained(LanguageModel):
    """A `LanguageModel` made by `Network.policy`: sampling with a key-value cache, and whole trees in one pass.

    full_model: the network from ids to logits, whose weights `model` (its upper blocks) shares. packed: the trees of its prompts, or
    `None` where they are too large. vocabulary: digest of what the ids mean.
    """

    _: KW_ONLY
    full_model: Any = None
    packed: Packed | None = None
    vocabulary: str = ""

    @property
    def signature(self) -> tuple[Any, ...]:
        """As `LanguageModel`, and the vocabulary itself: equal ids of two tokenisers are not the same tokens."""
        return (*super().signature, self.vocabulary)

    # ---- the network: only the last positions, only the rows of the action set -------------------------------------------

    @cached_property
    def _rows(self) -> dict[str, Tensor]:
        """Parameters of the output layer cut to the action set; none where the whole vocabulary is in play or it is trained."""
        if self.actions is None or output_names(self.full_model) & set(self.trainable or ()):
            return {}
        known = dict(self.full_model.named_parameters(remove_duplicate=False))
        return {name: known[name].detach()[list(self.actions)] for name in output_names(self.full_model)}

    def _call(self, module: Any, kwargs: dict[str, Any]) -> Any:
        """Call a network with this policy's weights, in its own precision."""
        precision = next(module.parameters()).dtype
        swapped = {**self._rows, **(getattr(self, "_swapped", None) or {})}
        swapped = {name: weight.to(precision) for name, weight in swapped.items()}
        kwargs = {name: item.to(self.device) if isinstance(item, Tensor) else item for name, item in kwargs.items()}
        with faithful(precision):
            return functional_call(module, swapped, (), kwargs, tie_weights=False)

    def network(self, features: Tensor) -> Tensor:
        """Logits `[b, ≤ T, v]` of the last `T` positions over the action set, differentiable in the parameters."""
        kwargs: dict[str, Any] = {"use_cache": False, "logits_to_keep": self.length}
        if self.trunk is None:
            logits: Tensor = self._call(self.model, {"input_ids": features, **kwargs}).logits
        else:
            features = features.to(next(self.model.parameters()).dtype)
            logits = self._call(self.model, {"inputs_embeds": features, **kwargs}).logits
        return logits

    def logits(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        """As `LanguageModel.logits`, `READ_TOKENS` at a time."""
        size = max(1, READ_TOKENS // (max(len(prompt) for prompt in self.prompts) + tokens.shape[1]))
        rows = torch.split(torch.arange(len(prompts)), size)
        return torch.cat([super(Pretrained, self).logits(prompts[part], tokens[part]) for part in rows])

    def select(self, raw: Tensor) -> Tensor:
        """The logits of the action set: what `network` gives already, unless the output layer is itself trained."""
        return raw if self._rows or self.actions is None else raw[..., list(self.actions)]

    def first_step(self) -> Tensor:
        """Logits `[prompts, ids]` over the network's whole vocabulary after every prompt, float64."""
        with torch.no_grad():
            ids, attention, positions = padded(self.prompts)
            kwargs = {
                "input_ids": ids,
                "attention_mask": attention,
                "position_ids": positions,
                "logits_to_keep": 1,
                "use_cache": False,
            }
            logits: Tensor = self.full_model(**kwargs).logits[:, -1]
        return _checked(logits)

    @cached_property
    def table(self) -> Tensor:
        """Logits at every prefix of every prompt, `[prompts · nodes, v]`: one pass per prompt over all its prefixes together."""
        if self.packed is None or not self.enumerable:
            return super().table
        parts = []
        for prompt in self.prompts:
            kwargs = self.packed.inputs(prompt, next(self.model.parameters()).dtype)
            logits = self._call(self.model, {**kwargs, "use_cache": False}).logits[0]
            parts.append(self.shaped(_checked(logits)))
        return torch.cat(parts)

    # ---- sampling --------------------------------------------------------------------------------------------------------

    def draw(self, prompts: Tensor, tokens: Tensor, uniforms: Tensor) -> None:
        """As `LanguageModel.draw`, with a key-value cache and prompts of different lengths in one batch, padded on the left."""
        size = max(1, CACHED_TOKENS // (max(len(prompt) for prompt in self.prompts) + self.length))
        for rows in torch.split(torch.arange(len(prompts)), size):
            tokens[rows], _ = self.decode(prompts[rows], uniforms[rows])

    def decode(self, prompts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """One batch of responses to prompts `[n]` from uniforms `[n, T]`: tokens `[n, T]` and their log-probabilities `[n, T]`.

        Each distinct prompt is read once. Log-probabilities are those this pass drew from, as an inference engine reports them;
        after an end token they are 0.
        """
        unique_prompts, which = torch.unique(prompts, return_inverse=True)
        ids, attention, positions = padded([self.prompts[p] for p in unique_prompts.tolist()])
        tokens, log_probs = self._blank(*uniforms.shape), torch.zeros(uniforms.shape, dtype=torch.float64)
        chosen = None if self.actions is None else torch.tensor(list(self.actions))
        unfinished = torch.ones(len(prompts), dtype=torch.bool)
        cache = importlib.import_module("transformers").DynamicCache(config=self.full_model.config)
        known = inspect.signature(type(self.full_model).forward).parameters
        kwargs = {"cache" if "cache" in known else "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        with torch.no_grad():
            input_ids = ids
            for t in range(uniforms.shape[1]):
                step_kwargs = {"input_ids": input_ids, "attention_mask": attention, "position_ids": positions}
                step = self._call(self.full_model, {**kwargs, **step_kwargs}).logits[:, -1]
                if t == 0:  # from here on a row per response, not per prompt
                    step, attention, positions = step[which], attention[which], positions[which, -1:]
                    cache.batch_select_indices(which)
                logits = self.shaped(_checked(step))
                sampled = inverse_cdf_sample(logits, uniforms[:, t].contiguous())
                chosen_log_prob = logits.log_softmax(-1).gather(-1, sampled[:, None])[:, 0]
                tokens[:, t] = torch.where(unfinished, sampled, tokens[:, t])
                log_probs[:, t] = torch.where(unfinished, chosen_log_prob, 0.0)
                if self.eos is not None:
                    unfinished = unfinished & (sampled != self.eos)
                    if not bool(unfinished.any()):
                        break
                input_ids = tokens[:, t : t + 1] if chosen is None else chosen[tokens[:, t : t + 1]]
                attention, positions = torch.cat([attention, torch.ones_like(input_ids)], -1), positions + 1
        return tokens, log_probs

    def in_precision(self, dtype: torch.dtype) -> Pretrained:
        """The same policy computed throughout in another precision, as a separate inference engine would; weights are rounded."""
        full_model = copy.deepcopy(self.full_model).to(dtype)
        block = 0 if self.trunk is None else split(full_model, self.trainable)[1]
        packed = None if self.packed is None else self.packed.of(full_model)
        trunk = None if block == 0 else packed or Trunk(lower(full_model, block))
        return self.changed(model=upper(full_model, block, dtype), full_model=full_model, trunk=trunk, packed=packed)


def _checked(logits: Tensor) -> Tensor:
    """Logits in float64. Raises `ValueError` for NaN or infinite ones."""
    if not bool(torch.isfinite(logits.detach().sum())):
        raise ValueError("the network gives NaN or infinite logits; check its weights and its precision")
    return logits.double()


def output_names(model: Any) -> set[str]:
    """Names of the parameters of the output layer."""
    output = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is output)
    return {f"{name}.{part}" for part, _ in output.named_parameters()}


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and positions `[n, s]` of prompts padded on the left to one length, so that all end together."""
    size = max(len(prompt) for prompt in prompts)
    ids, attention = torch.zeros(len(prompts), size, dtype=torch.long), torch.zeros(len(prompts), size, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, size - len(prompt) :] = torch.tensor([int(i) for i in prompt])
        attention[row, size - len(prompt) :] = 1
    return ids, attention, (attention.cumsum(-1) - 1).clamp(min=0)
