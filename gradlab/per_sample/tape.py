"""A pass through a language model, played back for the gradients of many estimators at once.

A sample's gradient is a sum of shares of cotangents of the logits: the score of its tokens and, where a vocabulary kernel is in
use, that kernel's slope. What differs between estimators are the shares. They are applied where the fewest cotangents go back:
before the pass, one per estimator, or, where the tokens are fewer, behind it, to the gradients of single tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradlab.moments import Gradients
from gradlab.per_sample import layers
from gradlab.per_sample.replay import Hear, Replay
from gradlab.policies import LanguageModel
from gradlab.policies.transformer import Transformer


@dataclass(frozen=True)
class Part:
    """What one chunk of sequences contributes: `sums` of weighted gradients `[e, …]` for every parameter, by its name.

    `square` `[units, e]`: squared norm of every unit's gradient, a response or a group of them. `inner` `[units, e, e]`: all
    pairwise inner products, where asked for.
    """

    sums: dict[str, Tensor]
    square: Tensor
    inner: Tensor | None = None


class Recording:
    """A forward pass of any network over ids `[n, s]`, recorded by autograd, and what every trainable layer saw in it.

    Played back once per cotangent, for positions may mix up to the last layer: there is no tail (compare `Replay`).
    """

    def __init__(self, policy: LanguageModel, owners: dict[str, layers.Owner], ids: Tensor, length: int) -> None:
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        with ExitStack() as stack, torch.enable_grad():
            for name, owner in owners.items():
                stack.callback(owner.layer.register_forward_hook(self._hook(name, owner, len(ids))).remove)
            # With the policy's own parameters, which need not be those of the module.
            self.logits = policy.network(policy.features(ids))[:, -length:]
        if missing := sorted(set(owners) - set(self._seen)):
            raise ValueError(f"trainable layers {missing} took no part in the network's forward pass")

    def _hook(self, name: str, owner: layers.Owner, n: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
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
            self._seen[name] = layers.factor(owner.layer, inputs[0].detach()), output

        return hook

    def tail(self, cotangent: Tensor, hear: Hear) -> list[Tensor]:
        """The cotangents of the logits themselves."""
        return [cotangent]

    def stem(self, ends: list[Tensor], hear: Hear) -> None:
        """Carry cotangents of the logits, `[n, t, m, v]`, to all layers, one after the other."""
        outputs = [output for _, output in self._seen.values()]
        passes = [
            torch.autograd.grad(self.logits, outputs, seed, retain_graph=True, allow_unused=True) for seed in ends[0].unbind(2)
        ]
        silent = outputs[0].shape[1] - self.logits.shape[1]
        for (name, (a, output)), each in zip(self._seen.items(), zip(*passes, strict=True), strict=True):
            b = torch.stack([torch.zeros_like(output) if x is None else x for x in each], 2)
            # Without the positions that no gradient reaches, as happens in last layers.
            first = silent if silent and not bool(b[:, :silent].any()) else 0
            hear({name: a[:, first:]}, b[:, first:])


class Tape:
    """One pass over ids `[n, s]`: the policy's logits `[n, t, v]`, and the way back from them to its parameters."""

    def __init__(self, policy: LanguageModel, ids: Tensor, length: int) -> None:
        self.policy, self.length = policy, length
        self._owners = layers.owners(policy)
        self._played = (
            Replay(policy.model, policy.current, ids.to(policy.device), length)
            if isinstance(policy.model, Transformer) and replayable(policy)
            else Recording(policy, self._owners, ids, length)
        )
        with torch.enable_grad():
            self._raw = self._played.logits.detach().requires_grad_(True)
            self._shaped = policy.shaped(self._raw)

    @property
    def logits(self) -> Tensor:
        """The policy's logits `[n, t, v]`, float64, detached."""
        return self._shaped.detach().double().cpu()

    def pull(self, batch: Gradients, rows: Tensor, weight: Tensor, unit: int = 1, pairs: bool = False) -> Part:
        """Pull back these rows of a batch, in the order of the tape's ids; arguments as in `pull`."""
        kinds, shares = kinds_of(batch, rows)
        alpha = shares.to(self._raw).permute(2, 3, 0, 1).contiguous()
        n, t, e, k = alpha.shape
        m, units = t * k, n // unit
        # Shares of tokens and kinds, those of a unit's responses behind one another.
        share = alpha.view(units, unit * t, e, k).transpose(1, 2).flatten(2)
        mass = weight[rows].to(self._raw)[:, None]
        by_token, few = _basis(m, e) if unit == 1 else (False, False)
        few |= by_token and pairs
        sums: dict[str, Tensor] = {}
        of_tokens = self._zeros(units, m * unit, m * unit)
        found = self._zeros(units, *(2 if pairs else 1) * [e])

        def hear_tail(heard: dict[str, Tensor], b: Tensor) -> None:
            for owner, a in self._trainable(heard):
                if owner.norm:
                    at = layers.at_positions(owner, a, b).flatten(0, 2)
                    sums.update(owner.split((mass[..., None, None] * alpha).transpose(2, 3).flatten(0, 2).T @ at))
                else:
                    sums.update(layers.sums(owner, a, applied(alpha, b), mass))
                of_tokens.add_(layers.apart(owner, _united(unit, a), _united(unit, b)))

        def hear_stem(heard: dict[str, Tensor], b: Tensor) -> None:
            mine = self._trainable(heard)
            if any(owner.norm for owner, _ in mine):
                ((owner, a),) = mine
                own = layers.summed(owner, a, b)
                each = share @ own if by_token else own
                sums.update(owner.split((mass[..., None] * each).sum(0)))
                gram = layers.products((own if few else each).view(units, unit, -1, own.shape[-1]).sum(1), few or pairs)
            elif mine:
                if by_token and not few:
                    b = share[:, None] @ b
                for owner, a in mine:
                    sums.update(layers.sums(owner, a, b, mass, share if few else None))
                gram = layers.gram([(owner, _united(unit, a)) for owner, a in mine], _united(unit, b), few or pairs)
            else:
                return
            (of_tokens if few else found).add_(gram)

        with torch.no_grad():
            ends = self._played.tail(self._of_raw(kinds), hear_tail)
            mixing = self._each_token(m) if by_token else alpha
            self._played.stem([applied(mixing, end) for end in ends], hear_stem)
            wide = share.double()
            along = wide @ of_tokens
            found += along @ wide.mT if pairs else (along * wide).sum(-1)
        found = found.cpu()
        return Part(sums, found.diagonal(dim1=-2, dim2=-1), found) if pairs else Part(sums, found)

    def gram(self) -> Tensor:
        """Inner products of the gradients of all logits along a sequence, `[n, t·v, t·v]`, float64."""
        n, t, v = self._shaped.shape
        found = self._zeros(n, t * v, t * v)

        def hear_tail(heard: dict[str, Tensor], b: Tensor) -> None:
            for owner, a in self._trainable(heard):
                found.add_(layers.apart(owner, a, b))

        def hear_stem(heard: dict[str, Tensor], b: Tensor) -> None:
            mine = self._trainable(heard)
            if any(owner.norm for owner, _ in mine):
                ((owner, a),) = mine
                found.add_(layers.products(layers.summed(owner, a, b), True))
            elif mine:
                found.add_(layers.gram([(owner, a) for owner, a in mine], b, True))

        with torch.no_grad():
            ends = self._played.tail(self._of_raw([each.expand(n, t, v) for each in torch.eye(v)]), hear_tail)
            self._played.stem([applied(self._each_token(t * v), end) for end in ends], hear_stem)
        return found.cpu()

    def _trainable(self, heard: dict[str, Tensor]) -> list[tuple[layers.Owner, Tensor]]:
        return [(self._owners[name], a) for name, a in heard.items() if name in self._owners]

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self._raw.device)

    def _of_raw(self, kinds: list[Tensor]) -> Tensor:
        """From cotangents of the policy's logits, `k` times `[n, t, v]`, to those of the network's, `[n, t, k, ids]`."""
        return torch.stack(
            [torch.autograd.grad(self._shaped, self._raw, kind.to(self._shaped), retain_graph=True)[0] for kind in kinds], 2
        )

    def _each_token(self, m: int) -> Tensor:
        """Shares `[t, m, k]` of a basis of single tokens and kinds."""
        return torch.eye(m).to(self._raw).view(self.length, -1, m).mT.contiguous()


def replayable(policy: LanguageModel) -> bool:
    """Whether the network is our own and nothing was put around it, so that its way back is known."""
    return type(policy.model) is Transformer and policy.trunk is None and type(policy).network is LanguageModel.network


# ---- the basis ----------------------------------------------------------------------------------------------------------


def _basis(m: int, e: int) -> tuple[bool, bool]:
    """Whether `m` tokens and kinds are the basis rather than `e` estimators, and whether products between them serve all
    estimators: there may be so many that those of estimators with themselves are less work."""  # fmt: skip
    return m < e, m < e and m * m <= 3 * e


def abreast(batch: Gradients) -> int:
    """Cotangents that lie side by side in a pass: of tokens and kinds, or of estimators."""
    e, m = len(batch.score), (1 + len(batch.direct) + len(batch.cotangents)) * batch.score.shape[2]
    return m if all(_basis(m, e)) else e


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


def applied(mixing: Tensor, b: Tensor) -> Tensor:
    """`Σ_k mixing_mk b_k`: shares `[…, m, k]` of cotangents `[n, t, k, d]`, as `[n, t, m, d]`."""
    return mixing * b if b.shape[2] == 1 else mixing @ b


def _united(unit: int, x: Tensor) -> Tensor:
    """Responses of a unit behind one another, as if they were one: `[n, s, …]` → `[n/unit, unit·s, …]`."""
    return x.reshape(len(x) // unit, -1, *x.shape[2:])
