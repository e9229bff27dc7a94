"""A recorded pass through a language model, played back once for every element of a basis of gradients.

A sample's gradient is a sum of shares of cotangents of the logits: the score of its tokens and, where a vocabulary kernel is in
use, that kernel's slope. What differs between estimators are the shares. They are applied where the fewest backward passes
follow: per estimator, or, where the tokens are fewer, to the gradients of single tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradlab import layers
from gradlab.moments import Gradients
from gradlab.policies import LanguageModel
from gradlab.policies.transformer import Apart


@dataclass(frozen=True)
class Pulled:
    """`total` `[e, p]`: weighted sum of the gradients. `square` `[units, e]`: squared norm of every unit's gradient.

    A unit is a response, or a group of them. `inner` `[units, e, e]`: all pairwise inner products, where asked for.
    """

    total: Tensor
    square: Tensor
    inner: Tensor | None = None


class Tape:
    """One recorded forward pass over ids `[n, s]`: the policy's logits `[n, t, v]`, and what every trainable layer saw.

    Where the network marks a place behind which positions no longer mix (`Apart`), the tape is cut there. In the tail behind it
    the gradients of all tokens go back in one pass, and what reaches the cut is carried on through the stem.
    """

    def __init__(self, policy: LanguageModel, ids: Tensor, length: int) -> None:
        self.policy, self.length = policy, length
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        self._cut: list[tuple[Tensor, Tensor]] = []
        self._tail: set[str] = set()
        self._layers = layers.owners(policy)
        marks = [module for module in policy.model.modules() if isinstance(module, Apart)]
        with ExitStack() as stack, torch.enable_grad():
            for name, (layer, _) in self._layers.items():
                stack.callback(layer.register_forward_hook(self._hook(name, len(ids))).remove)
            for mark in marks[-1:]:
                stack.callback(mark.register_forward_hook(self._cut_here).remove)
            # With the policy's own parameters, which need not be those of the module.
            self._shaped = policy.shaped(policy.network(policy.features(ids))[:, -length:])
        if missing := sorted(set(self._layers) - set(self._seen)):
            raise ValueError(f"trainable layers {missing} took no part in the network's forward pass")

    def _hook(self, name: str, n: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if name in self._seen or output.dim() != 3 or len(output) != n:
                raise ValueError(
                    f"layer {name} must see every sequence once, as a row of its own [n, s, d]: got {list(output.shape)}"
                )
            if not torch.is_grad_enabled():
                raise ValueError(
                    f"layer {name} was run without recording: `network` of the policy must not switch gradients off"
                )
            if not output.requires_grad:
                output.requires_grad_(True)
            self._seen[name] = layers.factor(self._layers[name][0], inputs[0].detach()), output
            if self._cut:
                self._tail.add(name)

        return hook

    def _cut_here(self, _: nn.Module, inputs: tuple[Tensor, ...], streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._cut = [(stream, stream.detach().requires_grad_(True)) for stream in streams]
        return tuple(leaf for _, leaf in self._cut)

    @property
    def logits(self) -> Tensor:
        """The policy's logits `[n, t, v]`, float64, detached."""
        return self._shaped.detach().double().cpu()

    def pull(self, batch: Gradients, rows: Tensor, weight: Tensor, unit: int = 1, pairs: bool = False) -> Pulled:
        """Pull back these rows of a batch, in the order of the tape's ids; arguments as in `pull`."""
        kinds, shares = kinds_of(batch, rows)
        alpha, shares = shares.to(self._shaped), shares.to(self._shaped.device)
        e, n, m = len(alpha), len(rows), alpha.shape[1] * self.length
        by_token = unit == 1 and m < e
        tail, ends = self._through_tail([kind.to(self._shaped) for kind in kinds])
        stem = self._through_stem(_single(ends, self.length) if by_token else _combined(ends, alpha))
        mass, offsets = weight[rows].to(self._shaped)[:, None, None], _offsets(self.policy)
        wide: Any = {"dtype": torch.float64, "device": self._shaped.device}
        total = torch.zeros(e, len(self.policy.parameters), **wide)
        # Over tokens and kinds where these are the basis, over estimators where those are.
        of_tokens = torch.zeros(n // unit, m * unit, m * unit, **wide)
        found = torch.zeros(n // unit, *(2 if pairs else 1) * [e], **wide)

        def add(name: str, a: Tensor, b: list[Tensor], scales: list[Tensor], part: slice = slice(None)) -> None:
            layer, owned = self._layers[name]
            for kind, piece in layers.totals(layer, owned, a, b, scales).items():
                start = offsets[owned[kind]]
                total[part, start : start + piece[0].numel()] += piece.flatten(1)

        with torch.no_grad():
            scaled = [mass * each[0, ..., None] for each in alpha] if len(kinds) == 1 else [mass] * e
            for name, b in tail.items():
                a = self._seen[name][0][:, -self.length :]
                each = b * e if len(kinds) == 1 else [weighted(own, b) for own in alpha]
                add(name, a, each, scaled)
                of_tokens += layers.apart(*self._layers[name], _united(a, unit), [_united(x, unit) for x in b])
            # Products between tokens serve all estimators, but there may be more of them than of estimators with themselves.
            few = by_token and (pairs or m * (m + 1) // 2 <= e)
            kernels: dict[tuple[str, int], Tensor] = {}
            for part, passed in _gathered(stem, e) if by_token or pairs else _one_by_one(stem):
                for name, b in passed.items():
                    a, b = self._heard(self._seen[name][0], b)
                    each = _mixed(b, alpha) if by_token else b
                    add(name, a, each, [mass] * len(each), part)
                    key, a = (name, a.shape[1]), _united(a, unit)
                    if key not in kernels:
                        kernels[key] = layers.kernel(*self._layers[name], a)
                    united = [_united(x, unit) for x in (b if few else each)]
                    gram = layers.gram(*self._layers[name], a, united, few or pairs, kernels[key])
                    if few:
                        of_tokens += gram
                    else:
                        found[:, part] += gram
            if few or tail:
                share = _united(shares.permute(2, 0, 1, 3), unit, 3)
                along = share @ of_tokens
                found += along @ share.mT if pairs else (along * share).sum(-1)
        total, found = total.cpu(), found.cpu()
        return Pulled(total, found.diagonal(dim1=-2, dim2=-1), found) if pairs else Pulled(total, found)

    def gram(self) -> Tensor:
        """Inner products of the gradients of all logits along a sequence, `[n, t·v, t·v]`, float64."""
        n, t, v = self._shaped.shape
        tail, ends = self._through_tail([each.expand(n, t, v) for each in torch.eye(v).to(self._shaped)])
        ((_, stem),) = _gathered(self._through_stem(_single(ends, t)), t * v)
        found = torch.zeros(n, t * v, t * v, dtype=torch.float64, device=self._shaped.device)
        with torch.no_grad():
            for name, b in tail.items():
                found += layers.apart(*self._layers[name], self._seen[name][0][:, -t:], b)
            for name, b in stem.items():
                a = self._seen[name][0]
                found += layers.gram(*self._layers[name], a, b, True, layers.kernel(*self._layers[name], a))
        return found.view(n, v, t, v, t).permute(0, 2, 1, 4, 3).reshape(n, t * v, t * v).cpu()

    def _through_tail(self, kinds: list[Tensor]) -> tuple[dict[str, list[Tensor]], list[list[tuple[Tensor, Tensor]]]]:
        """Carry cotangents of the logits `k` times `[n, t, v]` to the cut: what the layers behind it get, `k` times
        `[n, t, o]` each, and for every kind the tensors before the cut with their cotangents."""  # fmt: skip
        if not self._cut:
            return {}, [[(self._shaped, kind)] for kind in kinds]
        names = [name for name in self._seen if name in self._tail]
        leaves = [(stream, leaf) for stream, leaf in self._cut if stream.requires_grad]
        passes = [
            _backward([(self._shaped, k)], [self._seen[name][1] for name in names] + [leaf for _, leaf in leaves])
            for k in kinds
        ]
        tail = {name: [each[i][:, -self.length :] for each in passes] for i, name in enumerate(names)}
        ends = [list(zip([stream for stream, _ in leaves], each[len(names) :], strict=True)) for each in passes]
        return tail, ends

    def _through_stem(self, seeds: Iterable[list[tuple[Tensor, Tensor]]]) -> Iterator[dict[str, Tensor]]:
        """Carry cotangents at the cut to the layers before it, one seed after the other: what each layer gets, `[n, s, o]`."""
        names = [name for name in self._seen if name not in self._tail]
        outputs = [self._seen[name][1] for name in names]
        for seed in seeds:
            if names and seed:
                yield dict(zip(names, _backward(seed, outputs), strict=True))

    def _heard(self, a: Tensor, b: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Without the positions that no gradient reaches, as happens in last layers that are not behind a mark."""
        silent = a.shape[1] - self.length
        if self._cut or not silent or any(bool(each[:, :silent].any()) for each in b):
            return a, b
        return a[:, silent:], [each[:, silent:] for each in b]


# ---- the basis ----------------------------------------------------------------------------------------------------------


def basis_size(batch: Gradients) -> int:
    """Size of the basis: estimators, or kinds and tokens where these are fewer."""
    kinds = 1 + len(batch.direct) + len(batch.cotangents)
    return min(len(batch.score), kinds * batch.score.shape[2])


def kinds_of(batch: Gradients, rows: Tensor) -> tuple[list[Tensor], Tensor]:
    """Cotangents `[n, t, v]` of the logits that all estimators are made of, and each one's shares `[e, k, n, t]` of them.

    The score of the tokens; the slope of each vocabulary kernel in use; the cotangent of each callable.
    """
    rollout = batch.rollout
    contexts, tokens = rollout.contexts[rows], rollout.tokens[rows]
    score = -rollout.table[contexts].softmax(-1)
    score.scatter_add_(-1, tokens[..., None], torch.ones_like(score[..., :1]))
    kinds, shares = [score], [batch.score[:, rows]]
    for losses, direct, slope in batch.direct:
        kinds.append(slope[contexts])
        shares.append(torch.zeros_like(shares[0]))
        shares[-1][losses] = direct[:, rows]
    for e, cotangent in batch.cotangents.items():
        kinds.append(cotangent[rows])
        shares.append(torch.zeros_like(shares[0]))
        shares[-1][e] = 1.0
    return kinds, torch.stack(shares, 1)


def _single(ends: list[list[tuple[Tensor, Tensor]]], length: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Seeds of a basis of kinds and tokens: one kind's cotangents at one position of the response."""
    for kind in ends:
        for t in range(-length, 0):
            alone = [(end, torch.zeros_like(cotangent)) for end, cotangent in kind]
            for (_, into), (_, cotangent) in zip(alone, kind, strict=True):
                into[:, t] = cotangent[:, t]
            yield alone


def _combined(ends: list[list[tuple[Tensor, Tensor]]], alpha: Tensor) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Seeds of a basis of estimators: every kind by its shares `[e, k, n, t]`, added up."""
    t = alpha.shape[-1]
    for own in alpha:
        seed = []
        for each in zip(*ends, strict=True):
            end = each[0][0]
            summed = torch.zeros_like(each[0][1])
            summed[:, -t:] = weighted(own, [cotangent[:, -t:] for _, cotangent in each])
            seed.append((end, summed))
        yield seed


def weighted(own: Tensor, b: list[Tensor]) -> Tensor:
    """`Σ_k own_k b_k` for shares `[k, n, t]` and cotangents `k` times `[n, t, o]`."""
    found = own[0, ..., None] * b[0]
    for share, each in zip(own[1:], b[1:], strict=True):
        found.addcmul_(share[..., None], each)
    return found


def _backward(seed: list[tuple[Tensor, Tensor]], outputs: list[Tensor]) -> list[Tensor]:
    """Cotangents of every output from those of some ends, by one backward pass."""
    ends, cotangents = zip(*seed, strict=True)
    grads = torch.autograd.grad(ends, outputs, cotangents, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(o) if g is None else g.contiguous() for g, o in zip(grads, outputs, strict=True)]


def _gathered(passes: Iterable[dict[str, Tensor]], e: int) -> list[tuple[slice, dict[str, list[Tensor]]]]:
    """All passes together, for what compares them."""
    found: dict[str, list[Tensor]] = {}
    for passed in passes:
        for name, b in passed.items():
            found.setdefault(name, []).append(b)
    return [(slice(0, e), found)]


def _one_by_one(passes: Iterable[dict[str, Tensor]]) -> Iterator[tuple[slice, dict[str, list[Tensor]]]]:
    """One estimator at a time, so that no more than one pass is held."""
    for k, passed in enumerate(passes):
        yield slice(k, k + 1), {name: [b] for name, b in passed.items()}


def _mixed(b: list[Tensor], alpha: Tensor) -> list[Tensor]:
    """Cotangents of every estimator, `e` times `[n, s, o]`, from those of kinds and tokens and the shares `[e, k, n, t]`."""
    stacked = torch.stack([each.flatten(1) for each in b], 1)
    return [each.reshape(b[0].shape) for each in (alpha.permute(2, 0, 1, 3).flatten(2) @ stacked).unbind(1)]


def _united(x: Tensor, unit: int, dim: int = 1) -> Tensor:
    """Responses of a unit behind one another, as if they were one: `[n, s, …]` → `[n/unit, unit·s, …]`.

    With `dim=3`: `[n, e, k, t]` → `[n/unit, e, k·unit·t]`.
    """
    if dim == 1:
        return x.reshape(len(x) // unit, -1, *x.shape[2:])
    n, e, k, t = x.shape
    return x.view(n // unit, unit, e, k, t).permute(0, 2, 3, 1, 4).reshape(n // unit, e, k * unit * t)


def _offsets(policy: LanguageModel) -> dict[str, int]:
    """Where each parameter starts in the flat vector."""
    offsets, start = {}, 0
    for name, weight in policy.weights.items():
        offsets[name], start = start, start + weight.numel()
    return offsets
