"""Language models as policies: prompts, a causal network, and which of its tokens and parameters are in play.

The parameters of such a policy are those of its network, its logits a function of them. Everything else is as for a table:
where the responses can be listed, a language model is one `Tree` of logits per prompt, stacked, and `table`, `contexts` and
`occupancy` are those of the stack. The network computes in its own precision; its logits are float64 from there on.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradlab.policies import families
from gradlab.policies.tabular import ENUMERATION_BYTES, live, responses

#: Responses of all prompts together that are listed at most; each costs the network a pass over prompt and response.
ENUMERATED_RESPONSES = 2**16
#: Logits (doubles, before the action set is cut out) that one pass of the network may produce at a time.
CHUNK = 2**22
#: Logit of a token outside the nucleus: finite, and probability 0.
NOWHERE = -1e9

P = TypeVar("P", bound="LanguageModel")


def cut(logits: Tensor, top_p: float) -> Tensor:
    """Logits `[…, v]` of the nucleus: the smallest set of the likeliest tokens that has at least the probability `top_p`."""
    p, order = logits.detach().softmax(-1).sort(-1, descending=True)
    outside = (p.cumsum(-1) - p >= top_p).gather(-1, order.argsort(-1))
    return logits.masked_fill(outside, NOWHERE)


class Trunk:
    """The frozen lower part of a network, with the activations of the sequences it has seen kept in memory.

    `module` maps ids `[b, s]` to activations `[b, s, d]`. The cache holds up to `capacity` bytes, oldest out first; policies that
    share the trunk share it. What is cached never carries gradients.
    """

    def __init__(self, module: nn.Module, capacity: int = 2**28) -> None:
        self.module, self.capacity, self._bytes = module, capacity, 0
        self._kept: dict[bytes, Tensor] = {}

    def __call__(self, ids: Tensor) -> Tensor:
        keys = [row.tobytes() for row in ids.cpu().numpy()]
        missing = {key: i for i, key in enumerate(keys) if key not in self._kept}
        found = {}
        if missing:
            with torch.no_grad():
                fresh = self.module(ids[list(missing.values())])
            found = dict(zip(missing, fresh, strict=True))
        out = torch.stack([found[key] if key in found else self._kept[key] for key in keys])
        for key, row in found.items():
            self._kept[key] = row.clone()
            self._bytes += row.numel() * row.element_size()
        while self._bytes > self.capacity:
            row = self._kept.pop(next(iter(self._kept)))
            self._bytes -= row.numel() * row.element_size()
        return out


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model as a policy over responses to prompts drawn uniformly.

    model: maps ids `[b, s]` (or the activations of `trunk`) to logits `[b, s, ids]`, as a tensor or in a `.logits` attribute.
    prompts: token ids of each prompt, as sequences of any lengths. length: largest number of response tokens `T`.
    actions: ids the policy may emit, in the order of the vocabulary `0 … v−1` that rollouts speak; `None` is all of them. The
        policy is the network's distribution conditioned on them. eos: position in that vocabulary of the token that ends a
        response. trainable: names of the parameters of `model` that gradients are taken with respect to, in this order;
        `None` is all of them. context: longest sequence of ids the network takes.
    temperature, top_p: how logits become a distribution, after the action set: divided by the temperature, then cut to the
        smallest set of tokens with at least that mass. words: one string per token of the vocabulary, for reports.
    tolerance: share of probability that the action set may lose at the first step before a warning says so.

    Raises `ValueError` for prompts that are empty or, with a response, longer than the context, ids outside the network's
    vocabulary, unknown parameter names and NaN logits.
    """

    model: nn.Module
    prompts: Sequence[Sequence[int]]
    length: int
    _: KW_ONLY
    actions: Sequence[int] | None = None
    eos: int | None = None
    trainable: Sequence[str] | None = None
    context: int | None = None
    trunk: Trunk | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    words: Sequence[str] | None = None
    tolerance: float = 0.05
    family: ClassVar[families.Family] = families.CATEGORICAL
    revisits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.prompts or any(len(prompt) == 0 for prompt in self.prompts):
            raise ValueError("a language model answers prompts: give at least one, none of them empty (a start token will do)")
        if isinstance(self.length, bool) or not isinstance(self.length, int | np.integer) or self.length < 1:
            raise ValueError(f"length must be a positive whole number of response tokens, got {self.length!r}")
        longest = max(len(prompt) for prompt in self.prompts) + self.length - 1
        if self.context is not None and longest > self.context:
            raise ValueError(
                f"the longest prompt and a response of {self.length} tokens make {longest} ids (the last token is never read), "
                f"but the network takes {self.context}; shorten the prompts or the response"
            )
        if not (np.isfinite(self.temperature) and self.temperature > 0 and 0 < self.top_p <= 1):
            raise ValueError(f"temperature must be positive and top_p in (0, 1], got {self.temperature!r} and {self.top_p!r}")
        known = dict(self.model.named_parameters())
        unknown = [name for name in self.trainable or () if name not in known]
        if unknown or not (known if self.trainable is None else self.trainable):
            raise ValueError(
                f"trainable names parameters of the network; unknown {unknown or 'nothing given'}, known: {list(known)}"
            )
        self._check_first_step()

    def _check_first_step(self) -> None:
        """One pass over the prompts: the size of the vocabulary, NaN, and what the action set loses."""
        smallest, largest = min(min(p) for p in self.prompts), max(max(p) for p in self.prompts)
        try:
            first = self.first_step()
        except IndexError as error:
            raise ValueError(
                f"prompts hold ids from {smallest} to {largest}, which the network does not know: {error}"
            ) from None
        width = first.shape[-1]
        chosen = list(range(width)) if self.actions is None else [int(action) for action in self.actions]
        if len(chosen) < 2 or len(set(chosen)) < len(chosen) or min(chosen) < 0 or max(chosen) >= width:
            raise ValueError(
                f"actions must be at least two different ids below {width}, the network's vocabulary, got {chosen}"
            )
        if smallest < 0 or largest >= width:
            raise ValueError(f"prompts hold ids from {smallest} to {largest}, but the network knows 0 to {width - 1}")
        if self.eos is not None and not 0 <= self.eos < len(chosen):
            raise ValueError(f"eos is a position among the {len(chosen)} actions, or None, got {self.eos!r}")
        if self.words is not None and len(self.words) != len(chosen):
            raise ValueError(f"words must name each of the {len(chosen)} tokens, got {len(self.words)}")
        object.__setattr__(self, "_chosen", torch.tensor(chosen))
        if self.actions is not None:
            lost = 1 - first.softmax(-1)[:, chosen].sum(-1)
            if float(lost.max()) > self.tolerance:
                warnings.warn(
                    f"the action set leaves out up to {float(lost.max()):.1%} of the first step's probability "
                    f"({float(lost.mean()):.1%} on average over prompts), more than the tolerance of {self.tolerance:.1%}: "
                    "results are about the model conditioned on its actions",
                    stacklevel=3,
                )

    # ---- what a policy is ----------------------------------------------------------------------------------------------

    @property
    def vocab(self) -> int:
        """Number of tokens `v` the policy may emit."""
        return len(self._chosen)  # type: ignore[attr-defined]

    @property
    def chosen(self) -> Tensor:
        """The network's id of every token of the vocabulary, `[v]`."""
        found: Tensor = self._chosen  # type: ignore[attr-defined]
        return found

    @property
    def signature(self) -> tuple[Any, ...]:
        """What two policies must share to be compared: vocabulary, length, end token and prompts."""
        prompts = tuple(tuple(int(i) for i in prompt) for prompt in self.prompts)
        return ("LanguageModel", tuple(self._chosen.tolist()), self.length, self.eos, prompts)  # type: ignore[attr-defined]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The trainable parameters by name, in order."""
        known = dict(self.model.named_parameters())
        return {name: known[name] for name in (known if self.trainable is None else self.trainable)}

    @property
    def current(self) -> dict[str, Tensor]:
        """All parameters of the network by name, those of `with_parameters` in place of its own."""
        return {**dict(self.model.named_parameters()), **getattr(self, "_swapped", {})}

    @cached_property
    def parameters(self) -> Tensor:
        """The trainable parameters as one vector `[p]`, in the network's precision, on the CPU wherever the network is."""
        return torch.cat([weight.detach().flatten() for weight in self.weights.values()]).cpu()

    @property
    def device(self) -> torch.device:
        """Where the network is. Ids go there and logits come back: everything that is not the network is on the CPU."""
        return next(self.model.parameters()).device

    def with_parameters(self: P, parameters: Tensor) -> P:
        """The same policy with other trainable parameters `[p]`; a differentiable vector stays differentiable."""
        twin = copy.copy(self)
        for cached in ("table", "parameters"):
            twin.__dict__.pop(cached, None)
        parts = torch.split(parameters, [weight.numel() for weight in self.weights.values()])
        swapped = {name: part.view_as(w).to(w.device) for part, (name, w) in zip(parts, self.weights.items(), strict=True)}
        object.__setattr__(twin, "_swapped", swapped)
        twin.__dict__["parameters"] = parameters
        return twin

    def changed(self: P, **fields: Any) -> P:
        """The same policy with other fields, such as `temperature=0.7` or `model=other`: how behaviour policies are made.

        Parameters given by `with_parameters` stay.
        """
        twin = replace(self, **fields)
        return twin.with_parameters(self.parameters) if hasattr(self, "_swapped") else twin

    def first_step(self) -> Tensor:
        """Logits `[prompts, ids]` over the network's whole vocabulary after every prompt, float64."""
        x = len(self.prompts)
        with torch.no_grad():
            places, parts = zip(*self._passes(torch.arange(x), self._blank(x, 1)), strict=True)
        return torch.cat(parts)[torch.cat(places).argsort(), 0]

    # ---- logits --------------------------------------------------------------------------------------------------------

    def features(self, ids: Tensor) -> Tensor:
        """What `model` reads for ids `[b, s]`: the ids, or the activations of the trunk."""
        return ids.to(self.device) if self.trunk is None else self.trunk(ids.to(self.device))

    def network(self, features: Tensor) -> Tensor:
        """Raw logits `[b, s, ids]` of the network, with the parameters of `with_parameters` if they were given."""
        swapped = getattr(self, "_swapped", None)
        found = self.model(features) if swapped is None else functional_call(self.model, swapped, (features,))
        return found if isinstance(found, Tensor) else found.logits

    def sequences(self, prompts: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids `[b, s]` that the network reads to emit tokens `[n, t]` after prompts `[n]`, in groups of one prompt length.

        Yields the rows of a group and their ids: prompt and all tokens but the last, so that the last `t` logits emit tokens.
        """
        lengths = torch.tensor([len(prompt) for prompt in self.prompts])[prompts]
        for size in sorted(set(lengths.tolist())):
            rows = torch.nonzero(lengths == size)[:, 0]
            asked, which = torch.unique(prompts[rows], return_inverse=True)
            given = torch.tensor([[int(i) for i in self.prompts[p]] for p in asked.tolist()])[which]
            chosen = getattr(self, "_chosen", None)
            said = tokens[rows, :-1] if chosen is None else chosen[tokens[rows, :-1]]
            yield rows, torch.cat([given, said], -1)

    def _passes(self, prompts: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and raw logits `[b, t, ids]` in float64, a bounded number at a time."""
        t = tokens.shape[1]
        size = CHUNK // (t * getattr(self, "_width", 1024))
        for rows, ids in self.sequences(prompts, tokens):
            for part in torch.split(torch.arange(len(rows)), max(1, size)):
                # Only parameters from `with_parameters` carry gradients here; backprop records its own pass.
                with torch.set_grad_enabled(hasattr(self, "_swapped") and torch.is_grad_enabled()):
                    raw = self.network(self.features(ids[part]))[:, -t:]
                object.__setattr__(self, "_width", raw.shape[-1])
                logits = raw.double().cpu()
                if not bool(torch.isfinite(logits.detach().sum())):
                    raise ValueError("the network gives NaN or infinite logits; check its weights and its precision")
                yield rows[part], logits

    def logits(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        """Logits `[n, t, v]` over the action set that emit tokens `[n, t]` (positions in it) after prompts `[n]`, float64."""
        places, parts = zip(*((rows, self.shaped(raw)) for rows, raw in self._passes(prompts, tokens)), strict=True)
        return torch.cat(parts)[torch.cat(places).argsort()]

    def shaped(self, raw: Tensor) -> Tensor:
        """Raw logits `[…, ids]` → logits `[…, v]` of the policy: action set, temperature, nucleus."""
        logits = self.select(raw) / self.temperature
        return logits if self.top_p == 1 else cut(logits, self.top_p)

    def select(self, raw: Tensor) -> Tensor:
        """The logits `[…, v]` of the action set among raw ones `[…, ids]`."""
        return raw if self.actions is None else raw[..., self._chosen]  # type: ignore[attr-defined]

    # ---- one tree per prompt -------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> int:
        """Prefixes per prompt, `1 + v + … + v^(T−1)`."""
        return sum(self.vocab**t for t in range(self.length))

    @property
    def enumerable(self) -> bool:
        """Whether all responses to all prompts are few enough to list."""
        v, t = self.vocab, self.length
        count = v**t if self.eos is None else sum((v - 1) ** d for d in range(t)) + (v - 1) ** t
        listed = count * len(self.prompts)
        return bool(listed <= ENUMERATED_RESPONSES and v**t * t * 8 <= ENUMERATION_BYTES)

    @cached_property
    def table(self) -> Tensor:
        """Logits at every prefix of every prompt, `[prompts · nodes, v]`, each prompt's breadth-first as in `Tree`.

        Raises `ValueError` where there are too many responses to list.
        """
        self._check_enumerable()
        v, depth = self.vocab, self.length - 1
        grid = torch.arange(v**depth)
        prefixes = torch.stack([grid // v ** (depth - 1 - t) % v for t in range(depth)] + [torch.zeros_like(grid)], -1)
        x = len(self.prompts)
        logits = self.logits(torch.arange(x).repeat_interleave(len(grid)), prefixes.repeat(x, 1)).view(
            x, len(grid), depth + 1, v
        )
        # The prefixes of depth t are the first t tokens of every v^(depth − t)-th longest one.
        return torch.cat([logits[:, :: v ** (depth - t), t] for t in range(depth + 1)], 1).flatten(0, 1)

    def contexts(self, tokens: Tensor, prompts: Tensor) -> Tensor:
        """Row of `table` that emits each token of `tokens` `[n, t]` after prompts `[n]`, as `[n, t]`."""
        rows = [torch.zeros_like(tokens[:, 0])]
        for t in range(tokens.shape[1] - 1):
            rows.append(rows[-1] * self.vocab + 1 + tokens[:, t])
        return torch.stack(rows, -1) + self.nodes * prompts[:, None]

    def occupancy(self) -> Tensor:
        """Expected number of times a response emits from each row of `table`; differentiable in the table."""
        x, v = len(self.prompts), self.vocab
        p = self.table.softmax(-1).view(x, -1, v)
        if self.eos is not None:
            p = p * (torch.arange(v) != self.eos)
        depths, start = [torch.full((x, 1), 1 / x, dtype=p.dtype)], 0
        for t in range(self.length - 1):
            depths.append((depths[-1][..., None] * p[:, start : start + v**t]).flatten(1))
            start += v**t
        return torch.cat(depths, 1).flatten()

    def kl(self, reference: LanguageModel) -> Tensor:
        """`KL(self(y) ‖ reference(y))` of whole responses in nats, mean over prompts. Raises `ValueError` where they cannot be listed."""
        return self.occupancy() @ self.family.reverse_kl(self.table, reference.table)

    def enumerate(self) -> tuple[Tensor, Tensor, Tensor]:
        """All responses: prompts `[n]`, tokens `[n, T]` and mask `[n, T]`. Raises `ValueError` where there are too many."""
        self._check_enumerable()
        tokens, mask = responses(self.vocab, self.length, self.eos)
        x = len(self.prompts)
        return torch.arange(x).repeat_interleave(len(tokens)), tokens.repeat(x, 1), mask.repeat(x, 1)

    def _check_enumerable(self) -> None:
        if not self.enumerable:
            raise ValueError(
                f"a language model with {self.vocab} tokens, responses of up to {self.length} and {len(self.prompts)} prompts has "
                f"more than the {ENUMERATED_RESPONSES} responses that are listed; sample it (samples=…), or restrict actions, "
                "length or prompts"
            )

    # ---- sampling ------------------------------------------------------------------------------------------------------

    def sample(self, n: int, rng: np.random.Generator, group: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Draw `n` responses: prompts `[n]`, tokens `[n, T]`, mask `[n, T]`; every `group` successive ones share their prompt.

        Behind an end token the end token is repeated. Raises `ValueError` when `n` is not a multiple of `group`.
        """
        if n % group:
            raise ValueError(f"{n} responses cannot be split into groups of {group} that share a prompt")
        prompts = torch.from_numpy(rng.integers(len(self.prompts), size=n // group)).repeat_interleave(group)
        tokens = self._blank(n, self.length)
        with torch.no_grad():
            self.draw(prompts, tokens, torch.from_numpy(rng.random((n, self.length))))
        return prompts, tokens, live(tokens, self.eos)

    def draw(self, prompts: Tensor, tokens: Tensor, uniforms: Tensor) -> None:
        """Fill `tokens` `[n, T]` by inverting the distribution of each step at `uniforms` `[n, T]`.

        Reads every prefix anew; a network with a key-value cache overrides this and must give the same tokens.
        """
        alive = torch.arange(len(prompts))
        for t in range(self.length):
            for part in torch.split(alive, max(1, CHUNK // (getattr(self, "_width", 1024) * (t + 1)))):
                step = self.logits(prompts[part], tokens[part, : t + 1])[:, -1]
                tokens[part, t] = inverted(step, uniforms[part, t])
            if self.eos is not None:
                alive = alive[tokens[alive, t] != self.eos]
            if not len(alive):
                return

    def _blank(self, n: int, length: int) -> Tensor:
        return torch.full((n, length), 0 if self.eos is None else self.eos)


def inverted(logits: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the cumulative distribution of `logits` `[n, v]` passes `uniforms` `[n]`, `[n]`."""
    p = logits.softmax(-1)
    cdf = p.cumsum(-1)
    # Rounding must neither lead behind the last token nor to one of probability 0.
    last = (p > 0).to(torch.int64).cumsum(-1).argmax(-1)
    return torch.searchsorted(cdf, uniforms[:, None], right=True)[:, 0].minimum(last)
