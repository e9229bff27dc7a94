"""Language models as policies: prompts, a causal network, and which of its tokens and parameters are in play.

The parameters of such a policy are those of its network, its logits a function of them. Everything else is as for a table:
where the responses can be listed, a language model is one `Tree` of logits per prompt, stacked, and `table`, `contexts` and
`occupancy` are those of the stack. The network computes in its own precision; its logits are float64 from there on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from gradlab._common.names import check_held
from gradlab.policies import families, trees
from gradlab.policies.actions import check_actions, cut_to_nucleus, inverse_cdf_sample
from gradlab.policies.decoding import draw_cached
from gradlab.policies.parameterised import Parameterised
from gradlab.policies.responses import Responses
from gradlab.policies.tabular import ENUMERATION_BYTES
from gradlab.policies.transformer import Transformer

#: Responses of all prompts together that are listed at most; each costs the network a pass over prompt and response.
ENUMERATED_RESPONSES = 2**16
#: Logits (doubles, before the action set is cut out) that one pass of the network may produce at a time.
CHUNK = 2**22


@dataclass(frozen=True, eq=False)
class LanguageModel(Parameterised):
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

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5))  # ids [b, s] to logits [b, s, 5]
    >>> policy = gl.LanguageModel(model.double(), prompts=[(1, 2), (3,)], length=2)
    >>> len(policy.enumerate()), len(policy.parameters)
    (50, 45)
    """

    prompts: Sequence[Sequence[int]]
    length: int
    _: KW_ONLY
    actions: Sequence[int] | None = None
    eos: int | None = None
    context: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    words: Sequence[str] | None = None
    tolerance: float = 0.05
    derived: ClassVar[tuple[str, ...]] = ("parameters", "table")
    family: ClassVar[families.Family] = families.CATEGORICAL
    revisits: ClassVar[bool] = False
    countable: ClassVar[bool] = False  # each count would cost a pass over its response

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
        super().__post_init__()
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
        chosen = check_actions(first, self.prompts, self.actions, self.eos, self.words, self.tolerance)
        object.__setattr__(self, "_chosen", chosen)

    # ---- what a policy is ----------------------------------------------------------------------------------------------

    @property
    def vocab(self) -> int:
        """Number of tokens `v` the policy may emit."""
        return len(self._chosen)  # type: ignore[attr-defined]

    @property
    def own_network(self) -> bool:
        """Whether the network is the small transformer of gradlab, run as it stands."""
        return type(self.model) is Transformer and self.trunk is None and type(self).network is LanguageModel.network

    @property
    def chosen(self) -> Tensor:
        """The network's id of every token of the vocabulary, `[v]`."""
        ids: Tensor = self._chosen  # type: ignore[attr-defined]
        return ids

    @property
    def signature(self) -> tuple[Any, ...]:
        """What two policies must share to be compared: vocabulary, length, end token and prompts."""
        prompts = tuple(tuple(int(i) for i in prompt) for prompt in self.prompts)
        return ("LanguageModel", tuple(self._chosen.tolist()), self.length, self.eos, prompts)  # type: ignore[attr-defined]

    def first_step(self) -> Tensor:
        """Logits `[prompts, ids]` over the network's whole vocabulary after every prompt, float64."""
        x = len(self.prompts)
        with torch.no_grad():
            rows, parts = zip(*self._passes(torch.arange(x), self._blank(x, 1)), strict=True)
        return torch.cat(parts)[torch.cat(rows).argsort(), 0]

    # ---- logits --------------------------------------------------------------------------------------------------------

    def sequences(self, prompts: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids `[b, s]` that the network reads to emit tokens `[n, t]` after prompts `[n]`, in groups of one prompt length.

        Yields the rows of a group and their ids: prompt and all tokens but the last, so that the last `t` logits emit tokens.
        """
        lengths = torch.tensor([len(prompt) for prompt in self.prompts])[prompts]
        for size in sorted(set(lengths.tolist())):
            rows = torch.nonzero(lengths == size)[:, 0]
            unique_prompts, which = torch.unique(prompts[rows], return_inverse=True)
            prompt_ids = torch.tensor([[int(i) for i in self.prompts[p]] for p in unique_prompts.tolist()])[which]
            chosen = getattr(self, "_chosen", None)
            response_ids = tokens[rows, :-1] if chosen is None else chosen[tokens[rows, :-1]]
            yield rows, torch.cat([prompt_ids, response_ids], -1)

    def _passes(self, prompts: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and raw logits `[b, t, ids]` in float64, a bounded number at a time."""
        t = tokens.shape[1]
        size = CHUNK // (t * getattr(self, "_width", 1024))
        for rows, ids in self.sequences(prompts, tokens):
            for part in torch.split(torch.arange(len(rows)), max(1, size)):
                # Only parameters from `with_parameters` carry gradients here; backprop records its own pass.
                with torch.set_grad_enabled(hasattr(self, "_swapped") and torch.is_grad_enabled()):
                    raw = self.network(self.features(ids[part]))[:, -t:]
                if not hasattr(self, "_width"):
                    object.__setattr__(self, "_width", raw.shape[-1])
                logits = raw.double().cpu()
                if not bool(torch.isfinite(logits.detach().sum())):
                    raise ValueError("the network gives NaN or infinite logits; check its weights and its precision")
                yield rows[part], logits

    def logits(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        """Logits `[n, t, v]` over the action set that emit tokens `[n, t]` (positions in it) after prompts `[n]`, float64."""
        rows_of_parts, parts = zip(*((rows, self.shaped(raw)) for rows, raw in self._passes(prompts, tokens)), strict=True)
        return torch.cat(parts)[torch.cat(rows_of_parts).argsort()]

    def shaped(self, raw: Tensor) -> Tensor:
        """Raw logits `[…, ids]` → logits `[…, v]` of the policy: action set, temperature, nucleus."""
        return cut_to_nucleus(self.select(raw) / self.temperature, self.top_p)

    def select(self, raw: Tensor) -> Tensor:
        """The logits `[…, v]` of the action set among raw ones `[…, ids]`."""
        return raw if self.actions is None else raw[..., self._chosen]  # type: ignore[attr-defined]

    # ---- one tree per prompt -------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> int:
        """Prefixes per prompt, `1 + v + … + v^(T−1)`."""
        return trees.nodes(self.vocab, self.length)

    @property
    def enumerable(self) -> bool:
        """Whether all responses to all prompts are few enough to list."""
        v, t = self.vocab, self.length
        listed = trees.count(v, t, self.eos) * len(self.prompts)
        return bool(listed <= ENUMERATED_RESPONSES and v**t * t * 8 <= ENUMERATION_BYTES)

    @property
    def tabulated(self) -> bool:
        """Whether its logits at every prefix can be held as `table`."""
        return self.enumerable

    @property
    def parameter_names(self) -> list[str]:
        """Raises `ValueError`: a network has too many parameters to read one by one."""
        raise ValueError(
            "a network's parameters have no names worth reading one by one; use gl.measure, or gl.language for tokens"
        )

    def balanced(self, gradient: Tensor) -> Tensor:
        """A target's gradient `[p]` as it is: its entries do not belong to tokens."""
        return gradient

    @cached_property
    def table(self) -> Tensor:
        """Logits at every prefix of every prompt, `[prompts · nodes, v]`, each prompt's breadth-first as in `Tree`.

        Raises `ValueError` where there are too many responses to list.
        """
        self._check_enumerable()
        prefixes, x = trees.prefixes(self.vocab, self.length), len(self.prompts)
        logits = self.logits(torch.arange(x).repeat_interleave(len(prefixes)), prefixes.repeat(x, 1))
        return trees.breadth_first(logits.view(x, *prefixes.shape, self.vocab)).flatten(0, 1)

    def contexts(self, tokens: Tensor, prompts: Tensor) -> Tensor:
        """Row of `table` that emits each token of `tokens` `[n, t]` after prompts `[n]`, as `[n, t]`."""
        return trees.rows(tokens, self.vocab) + self.nodes * prompts[:, None]

    def rows_of(self, responses: Responses) -> Tensor:
        """Row of `table` that emits each token of some responses, `[n, t]`."""
        return self.contexts(responses.tokens, responses.prompts)

    def occupancy(self) -> Tensor:
        """Expected number of times a response emits from each row of `table`; differentiable in the table."""
        p = self.table.softmax(-1).view(len(self.prompts), -1, self.vocab)
        return trees.occupancy(p, self.length, self.eos).flatten()

    def kl(self, reference: LanguageModel) -> Tensor:
        """`KL(self(y) ‖ reference(y))` of whole responses in nats, mean over prompts. Raises `ValueError` where they cannot be listed."""
        return self.occupancy() @ self.family.reverse_kl(self.table, reference.table)

    def enumerate(self) -> Responses:
        """All responses to every prompt in turn, `[n, T]`. Raises `ValueError` where there are too many."""
        self._check_enumerable()
        tokens, mask = trees.responses(self.vocab, self.length, self.eos)
        x = len(self.prompts)
        return Responses(tokens.repeat(x, 1), mask.repeat(x, 1), torch.arange(x).repeat_interleave(len(tokens)))

    def _check_enumerable(self) -> None:
        if not self.enumerable:
            raise ValueError(
                f"a language model with {self.vocab} tokens, responses of up to {self.length} and {len(self.prompts)} prompts has "
                f"more than the {ENUMERATED_RESPONSES} responses that are listed; sample it (samples=…), or restrict actions, "
                "length or prompts"
            )

    # ---- sampling ------------------------------------------------------------------------------------------------------

    def sample(self, n: int, rng: np.random.Generator, group: int = 1) -> Responses:
        """Draw `n` responses, `[n, T]`; every `group` successive ones share their prompt.

        After an end token the end token is repeated. Raises `ValueError` when `n` is not a multiple of `group`.
        """
        if n % group:
            raise ValueError(f"{n} responses cannot be split into groups of {group} that share a prompt")
        check_held(n, 3 * self.length)
        prompts = torch.from_numpy(rng.integers(len(self.prompts), size=n // group)).repeat_interleave(group)
        tokens = self._blank(n, self.length)
        with torch.no_grad():
            self.draw(prompts, tokens, torch.from_numpy(rng.random((n, self.length))))
        return Responses(tokens, trees.response_mask(tokens, self.eos), prompts)

    def draw(self, prompts: Tensor, tokens: Tensor, uniforms: Tensor) -> None:
        """Fill `tokens` `[n, T]` by inverting the distribution of each step at `uniforms` `[n, T]`.

        Keys and values of a `Transformer` are kept from step to step; of any other network every prefix is read anew, unless its
        policy overrides this.
        """
        if self.own_network:
            draw_cached(self, prompts, tokens, uniforms)
            return
        unfinished = torch.arange(len(prompts))
        for t in range(self.length):
            for part in torch.split(unfinished, max(1, CHUNK // (getattr(self, "_width", 1024) * (t + 1)))):
                step = self.logits(prompts[part], tokens[part, : t + 1])[:, -1]
                tokens[part, t] = inverse_cdf_sample(step, uniforms[part, t])
            if self.eos is not None:
                unfinished = unfinished[tokens[unfinished, t] != self.eos]
            if not len(unfinished):
                return

    def _blank(self, n: int, length: int) -> Tensor:
        return torch.full((n, length), 0 if self.eos is None else self.eos)
