"""Tabular policies: one row of logits per context, so that everything about them can be computed exactly.

`Bandit` has one context, `Tree` one per prefix, `Markov` one per previous token. They differ only in how a prefix picks its
row; sampling, enumeration and perturbation are shared.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from gradlab._common.names import check_held, check_real, check_whole
from gradlab._common.shapes import Float64, Int64
from gradlab._common.streams import generator
from gradlab.policies import families, trees
from gradlab.policies.perturb import UnreachableKL, perturbation
from gradlab.policies.responses import Responses

#: Enumeration is refused when the logits of all responses, `n · t · v` doubles, would need more than this.
ENUMERATION_BYTES = 2**30
#: Responses that are visited one part after the other at most, see `Tabular.parts`.
VISITED_RESPONSES = 2**23

P = TypeVar("P", bound="Tabular")


@dataclass(frozen=True, eq=False)
class Tabular:
    """Common ground of `Bandit`, `Tree` and `Markov`; build one of those.

    `table` is `[rows, v]` float64; the policy's parameters are its entries, flattened row-major. `length` is the largest
    number of tokens `T`; with `eos` a response ends early at that token.

    >>> isinstance(gl.Bandit([0.0, 1.0]), gl.policies.Tabular)
    True
    >>> gl.Markov.random(vocab=3, length=8, seed=0).table.shape
    torch.Size([4, 3])
    """

    table: Float64[Tensor, "r v"]
    length: int
    eos: int | None = None
    family: ClassVar[families.Family] = families.CATEGORICAL
    #: Whether a response may emit from the same row more than once.
    revisits: ClassVar[bool] = False
    #: Whether its logits at every prefix can be held as `table`.
    tabulated: ClassVar[bool] = True
    #: Whether many draws cost no more than multinomial counts of the listed responses.
    countable: ClassVar[bool] = True
    #: A table answers one empty prompt.
    prompts: ClassVar[Sequence[Sequence[int]]] = ((),)

    @property
    def vocab(self) -> int:
        """Number of tokens `v`."""
        return int(self.table.shape[-1])

    @property
    def parameters(self) -> Float64[Tensor, " p"]:
        """The logits as one vector `[p]`, row-major."""
        return self.table.flatten()

    @property
    def signature(self) -> tuple[Any, ...]:
        """What two policies must share to be compared: kind, table shape, length and end token."""
        return (type(self).__name__, tuple(self.table.shape), self.length, self.eos)

    @property
    def parameter_names(self) -> list[str]:
        """A name for every parameter, `[p]`: the token, and the row where there are several."""
        rows, v = self.table.shape
        return [(f"node {i} " if rows > 1 else "") + f"token {j}" for i in range(rows) for j in range(v)]

    def contexts(self, tokens: Int64[Tensor, "n t"]) -> Int64[Tensor, "n t"]:
        """Row of the table that emits each token of `tokens` `[n, t]`, as `[n, t]`."""
        raise NotImplementedError

    def rows_of(self, responses: Responses) -> Int64[Tensor, "n t"]:
        """Row of the table that emits each token of some responses, `[n, t]`."""
        return self.contexts(responses.tokens)

    def balanced(self, gradient: Float64[Tensor, " p"]) -> Float64[Tensor, " p"]:
        """A target's gradient `[p]` without what rounding leaves at the likeliest token of a row, see `Family.balanced`."""
        return self.family.balanced(gradient.view_as(self.table), self.table).flatten()

    def with_parameters(self: P, parameters: Float64[Tensor, " p"]) -> P:
        """The same policy with other parameters `[p]` (row-major logits); a differentiable vector stays differentiable."""
        clone = copy.copy(self)
        object.__setattr__(clone, "table", parameters.reshape(self.table.shape))
        return clone

    def occupancy(self) -> Float64[Tensor, " r"]:
        """Expected number of times a response emits a token from each row, `[rows]`; differentiable in the table."""
        raise NotImplementedError

    def kl(self: P, reference: P) -> Float64[Tensor, ""]:
        """`KL(self(y) ‖ reference(y))` of whole responses in nats, by the chain rule `Σ_rows occupancy · KL(row)`."""
        return self.occupancy() @ self.family.reverse_kl(self.table, reference.table)

    @property
    def enumerable(self) -> bool:
        """Whether all responses fit the memory bound of `enumerate`."""
        return bool(self.vocab**self.length * self.length * self.vocab * 8 <= ENUMERATION_BYTES)

    def enumerate(self) -> Responses:
        """All responses in lexicographic order, `[n, T]`.

        Raises `ValueError` above `ENUMERATION_BYTES`.
        """
        v, length = self.vocab, self.length
        if not self.enumerable:
            raise ValueError(
                f"{type(self).__name__} with {v} tokens and length {length} has up to {v}^{length} responses, whose logits "
                f"exceed the {ENUMERATION_BYTES / 2**30:g} GiB allowed for enumeration; sample it (samples=…) or, if each "
                "token depends only on the one before, build it as gl.Markov, which is solved by dynamic programming"
            )
        tokens, mask = trees.responses(v, length, self.eos)
        return Responses.without_prompt(tokens.clone(), mask.clone())

    def parts(self, size: int) -> Iterator[Responses]:
        """All responses as `enumerate` has them, at most `size` at a time, so that only a part is ever held.

        Raises `ValueError` above `VISITED_RESPONSES`.
        """
        v, length = self.vocab, self.length
        if v**length > VISITED_RESPONSES:
            raise ValueError(
                f"{type(self).__name__} with {v} tokens and length {length} has up to {v}^{length} responses, more than the "
                f"{VISITED_RESPONSES:,} that are visited one by one; sample it (samples=…) or, if each token depends only on the one "
                "before, build it as gl.Markov, which is solved by dynamic programming"
            )
        return itertools.starmap(Responses.without_prompt, trees.parts(v, length, self.eos, size))

    def visited(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Rows `[q]` that emit `tokens` `[n, t]` of a part of the responses, and which of these emits each token, `[n, t]`."""
        rows, contexts = torch.unique(self.contexts(tokens), return_inverse=True)
        return rows, contexts

    def sample(self, n: int, rng: np.random.Generator, group: int = 1) -> Responses:
        """Draw `n` responses, `[n, T]`; after an end token the end token is repeated. All groups share the one prompt."""
        return self.respond(self.variates(n, rng))

    def variates(self, n: int, rng: np.random.Generator) -> Float64[Tensor, "n t"]:
        """What `n` responses are made of, `[n, T]`: a uniform variate a token, drawn step by step."""
        check_held(n, 4 * self.length)
        return torch.from_numpy(rng.random((self.length, n))).T

    def respond(self, variates: Float64[Tensor, "n t"]) -> Responses:
        """The responses made of `variates` `[n, T]`, by inverting the distribution of each step."""
        cdf = self.table.softmax(-1).cumsum(-1)
        cdf[:, -1] = 1.0  # so that no variate falls past the last token by rounding
        n = len(variates)
        tokens = torch.full((n, self.length), 0 if self.eos is None else self.eos)
        alive = torch.arange(n)
        for t in range(self.length):
            rows = self.contexts(tokens[alive, : t + 1])[:, t]
            u = variates[alive, t]
            drawn = torch.searchsorted(cdf[0], u, right=True) if len(cdf) == 1 else (u[:, None] >= cdf[rows]).sum(-1)
            tokens[alive, t] = drawn
            if self.eos is not None:
                alive = alive[drawn != self.eos]
        return Responses.without_prompt(tokens, trees.response_mask(tokens, self.eos))

    def moved(self: P, noise: Float64[Tensor, " p"]) -> P:
        """The policy with noise `[p]` added to its logits."""
        return self.with_parameters(self.parameters + noise)

    def perturbed(self: P, scale: float | None = None, seed: int = 0, *, kl: float | None = None) -> P:
        """Add Gaussian noise of standard deviation `scale` to the logits, or scale it until `KL(self ‖ result) = kl` nats.

        Exactly one of `scale` and `kl` is given. Raises `ValueError` otherwise, or when `kl` cannot be reached with probabilities
        in float64's range.
        """
        neighbour = perturbation(self, scale, kl, seed)
        if kl is not None and neighbour.missing_support():
            raise UnreachableKL(seed, kl)
        return neighbour

    def missing_support(self) -> tuple[int, int] | None:
        """A context and a token whose probability there is below the smallest float64; `None` where there is none."""
        # Rows that a uniform policy never visits follow an end token and may hold anything.
        used = self.with_parameters(torch.zeros_like(self.parameters)).occupancy() > 0
        missing = torch.nonzero((self.table.detach().softmax(-1) == 0) & used[:, None])
        return (int(missing[0, 0]), int(missing[0, 1])) if len(missing) else None


def _table(logits: Any, dims: int, what: str) -> Tensor:
    """Check logits: the right number of axes, at least two tokens, finite; return them as float64."""
    if logits is None:
        raise ValueError(f"{what} must be an array of numbers, got None")
    try:
        given = logits.detach().cpu() if isinstance(logits, Tensor) else torch.from_numpy(np.array(logits, dtype=np.float64))
        table = given.to(torch.float64, copy=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be an array of numbers, got {type(logits).__name__}: {error}") from None
    if table.dim() != dims or table.shape[-1] < 2:
        allowed = "[v]" if dims == 1 else "[rows, v]"
        raise ValueError(f"{what} must have shape {allowed} with at least two tokens, got {list(table.shape)}")
    if not bool(torch.isfinite(table).all()):
        bad = torch.nonzero(~torch.isfinite(table))[0].tolist()
        raise ValueError(
            f"{what} must be finite, found {table[tuple(bad)].item()} at {bad}; a forbidden token has probability 0 and makes "
            "log-ratios undefined: leave it out of the vocabulary, or give it a low finite logit"
        )
    return table


def _check_shape(length: int, eos: int | None, vocab: int) -> None:
    check_whole("length", length)
    if eos is not None and (isinstance(eos, bool) or not isinstance(eos, int | np.integer) or not 0 <= eos < vocab):
        raise ValueError(f"eos must be a token id between 0 and {vocab - 1}, or None, got {eos!r}")


def _random(shape: tuple[int, ...], scale: float, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    check_real("scale", scale)
    if 8 * math.prod(shape) > ENUMERATION_BYTES:
        raise ValueError(
            f"a table of {' × '.join(map(str, shape))} logits takes more than the {ENUMERATION_BYTES / 2**30:g} GiB allowed; "
            "give fewer tokens"
        )
    return scale * generator(seed).standard_normal(shape)


@dataclass(frozen=True, eq=False, init=False)
class Bandit(Tabular):
    """One draw from `softmax(logits)`, `logits` `[v]`. Parameters: the logits.

    Raises `ValueError` for anything but a finite vector of at least two logits.

    >>> policy = gl.Bandit([0.0, 1.0])
    >>> policy.vocab, policy.parameters.tolist(), policy.enumerate().tokens.tolist()
    (2, [0.0, 1.0], [[0], [1]])
    """

    def __init__(self, logits: Any) -> None:
        _freeze(self, _table(logits, 1, "Bandit logits")[None], 1, None)

    @classmethod
    def random(cls, vocab: int = 4, seed: int = 0, scale: float = 1.0) -> Bandit:
        """Gaussian logits of standard deviation `scale`."""
        check_whole("vocab", vocab, least=2)
        return cls(_random((vocab,), scale, seed))

    def contexts(self, tokens: Int64[Tensor, "n t"]) -> Int64[Tensor, "n t"]:
        return torch.zeros_like(tokens)

    def occupancy(self) -> Float64[Tensor, " r"]:
        return torch.ones(1, dtype=torch.float64)


@dataclass(frozen=True, eq=False, init=False)
class Tree(Tabular):
    """A prefix-tabular policy: its own logits for every prefix of length `0 … T−1`.

    `logits` is `[nodes, v]`, breadth-first with `v^t` rows at depth `t`, so the children of node `i` start at `i·v + 1`;
    `T` follows from the number of rows. With `eos` set, rows after an end token exist and are unused.
    Raises `ValueError` when the number of rows is not `1 + v + … + v^(T−1)`.

    >>> policy = gl.Tree([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    >>> policy.length, policy.enumerate().tokens.tolist()
    (2, [[0, 0], [0, 1], [1, 0], [1, 1]])
    >>> gl.Tree.random(vocab=3, length=3, seed=0, eos=0).parameters.shape
    torch.Size([39])
    """

    def __init__(self, logits: Any, eos: int | None = None) -> None:
        rows = _table(logits, 2, "Tree logits")
        nodes, v = rows.shape
        depth, total = 0, 0
        while total < nodes:
            total, depth = total + v**depth, depth + 1
        if total != nodes:
            raise ValueError(
                f"Tree logits need 1 + v + … + v^(T−1) rows, one per prefix; with v = {v} that is "
                f"{', '.join(str((v**t - 1) // (v - 1)) for t in range(1, depth + 1))}, …, got {nodes}"
            )
        _check_shape(depth, eos, v)
        _freeze(self, rows, depth, eos)

    @classmethod
    def random(cls, vocab: int = 4, length: int = 4, seed: int = 0, eos: int | None = None, scale: float = 1.0) -> Tree:
        """Gaussian logits of standard deviation `scale` at every prefix."""
        check_whole("vocab", vocab, least=2)
        _check_shape(length, eos, vocab)
        if vocab**length * 8 > ENUMERATION_BYTES:
            raise ValueError(
                f"a Tree of {vocab} tokens and length {length} has {vocab}^{length} logits, more than the "
                f"{ENUMERATION_BYTES / 2**30:g} GiB allowed; "
                "for long responses use gl.Markov, which is solved by dynamic programming"
            )
        return cls(_random(((vocab**length - 1) // (vocab - 1), vocab), scale, seed), eos=eos)

    def contexts(self, tokens: Int64[Tensor, "n t"]) -> Int64[Tensor, "n t"]:
        return trees.rows(tokens, self.vocab)

    def visited(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        # In lexicographic order the nodes of every depth come one after the other.
        nodes = self.contexts(tokens)
        first, last = nodes[0].tolist(), nodes[-1].tolist()
        rows = torch.cat([torch.arange(low, high + 1) for low, high in zip(first, last, strict=True)])
        sizes = torch.tensor([high + 1 - low for low, high in zip(first, last, strict=True)])
        return rows, nodes - nodes[0] + (sizes.cumsum(0) - sizes)

    def occupancy(self) -> Float64[Tensor, " r"]:
        return trees.occupancy(self.table.softmax(-1)[None], self.length, self.eos)[0]


@dataclass(frozen=True, eq=False, init=False)
class Markov(Tabular):
    """A first-order chain: `initial` logits `[v]` for the first token, `transition` logits `[v, v]` from each token.

    Parameters: `initial`, then `transition` row-major. Exact results come from dynamic programming, linear in `length`.
    Raises `ValueError` for mismatched shapes, non-finite logits or a length below one.

    >>> policy = gl.Markov([0.0, 0.0], [[0.0, 1.0], [1.0, 0.0]], length=256)
    >>> reference = policy.perturbed(kl=0.5, seed=0)
    >>> round(gl.Scenario(policy, reference).kl(), 6)
    0.5
    """

    revisits: ClassVar[bool] = True

    def __init__(self, initial: Any, transition: Any, length: int = 64, eos: int | None = None) -> None:
        first, steps = _table(initial, 1, "Markov initial logits"), _table(transition, 2, "Markov transition logits")
        v = len(first)
        if steps.shape != (v, v):
            raise ValueError(f"Markov transition logits must be [{v}, {v}] to match the initial ones, got {list(steps.shape)}")
        _check_shape(length, eos, v)
        _freeze(self, torch.cat([first[None], steps]), int(length), eos)

    @classmethod
    def random(cls, vocab: int = 4, length: int = 64, seed: int = 0, eos: int | None = None, scale: float = 1.0) -> Markov:
        """Gaussian initial and transition logits of standard deviation `scale`."""
        check_whole("vocab", vocab, least=2)
        logits = _random((vocab + 1, vocab), scale, seed)
        return cls(logits[0], logits[1:], length=length, eos=eos)

    @property
    def initial(self) -> Tensor:
        """Logits of the first token, `[v]`."""
        return self.table[0]

    @property
    def transition(self) -> Tensor:
        """Logits of the next token, `[v, v]`, one row per previous token."""
        return self.table[1:]

    def contexts(self, tokens: Int64[Tensor, "n t"]) -> Int64[Tensor, "n t"]:
        return torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1] + 1], -1)

    def occupancy(self) -> Float64[Tensor, " r"]:
        p = self.table.softmax(-1)
        if self.eos is not None:
            p = p * (torch.arange(self.vocab) != self.eos)
        state, visits = p[0], torch.zeros(self.vocab, dtype=torch.float64)
        for _ in range(self.length - 1):
            visits = visits + state
            state = state @ p[1:]
        return torch.cat([torch.ones(1, dtype=torch.float64), visits])


def _freeze(policy: Tabular, table: Tensor, length: int, eos: int | None) -> None:
    """Set the fields of a frozen policy once its input has been checked."""
    for name, item in (("table", table), ("length", int(length)), ("eos", eos)):
        object.__setattr__(policy, name, item)
