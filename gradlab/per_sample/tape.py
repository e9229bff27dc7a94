"""A pass through a language model, played back for the gradients of many estimators at once.

A sample's gradient is a sum of shares of cotangents of the logits: the score of its tokens and, where a vocabulary kernel is in
use, that kernel's slope. What differs between estimators are the shares. They are applied where the fewest cotangents go back:
before the pass, one per estimator, or, where the tokens are fewer, after it, to the gradients of single tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradlab.moments import Gradients
from gradlab.per_sample import layers
from gradlab.per_sample.replay import LayerCallback, Replay
from gradlab.policies import LanguageModel
from gradlab.policies.transformer import Transformer


@dataclass(frozen=True)
class ChunkMoments:
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

    def __init__(
        self, policy: LanguageModel, layers_by_name: dict[str, layers.TrainableLayer], ids: Tensor, length: int
    ) -> None:
        self._inputs_and_outputs: dict[str, tuple[Tensor, Tensor]] = {}
        with ExitStack() as stack, torch.enable_grad():
            for name, trainable in layers_by_name.items():
                stack.callback(trainable.layer.register_forward_hook(self._hook(name, trainable, len(ids))).remove)
            # With the policy's own parameters, which need not be those of the module.
            self.logits = policy.network(policy.features(ids))[:, -length:]
        if missing := sorted(set(layers_by_name) - set(self._inputs_and_outputs)):
            raise ValueError(f"trainable layers {missing} took no part in the network's forward pass")

    def _hook(
        self, name: str, trainable: layers.TrainableLayer, n: int
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if name in self._inputs_and_outputs or output.dim() != 3 or len(output) != n:
                raise ValueError(
                    f"layer {name} must see every sequence once, as a row of its own [n, s, d]: got {list(output.shape)}"
                )
            if not torch.is_grad_enabled():
                raise ValueError(
                    f"layer {name} was run without recording: `network` of the policy must not switch gradients off"
                )
            if not output.requires_grad:
                output.requires_grad_(True)
            self._inputs_and_outputs[name] = layers.weight_inputs(trainable.layer, inputs[0].detach()), output

        return hook

    def backward_head(self, cotangent: Tensor, callback: LayerCallback) -> list[Tensor]:
        """The cotangents of the logits themselves."""
        return [cotangent]

    def backward_body(self, head_cotangents: list[Tensor], callback: LayerCallback) -> None:
        """Carry cotangents of the logits, `[n, t, m, v]`, to all layers, one after the other."""
        outputs = [output for _, output in self._inputs_and_outputs.values()]
        passes = [
            torch.autograd.grad(self.logits, outputs, seed, retain_graph=True, allow_unused=True)
            for seed in head_cotangents[0].unbind(2)
        ]
        prompt_positions = outputs[0].shape[1] - self.logits.shape[1]
        for (name, (a, output)), each in zip(self._inputs_and_outputs.items(), zip(*passes, strict=True), strict=True):
            b = torch.stack([torch.zeros_like(output) if x is None else x for x in each], 2)
            # Without the positions that no gradient reaches, as happens in last layers.
            first = prompt_positions if prompt_positions and not bool(b[:, :prompt_positions].any()) else 0
            callback({name: a[:, first:]}, b[:, first:])


class Tape:
    """One pass over ids `[n, s]`: the policy's logits `[n, t, v]`, and the backward pass from them to its parameters."""

    def __init__(self, policy: LanguageModel, ids: Tensor, length: int) -> None:
        self.policy, self.length = policy, length
        self._layers = layers.trainable_layers(policy)
        self._played = (
            Replay(policy.model, policy.current, ids.to(policy.device), length)
            if isinstance(policy.model, Transformer) and replayable(policy)
            else Recording(policy, self._layers, ids, length)
        )
        with torch.enable_grad():
            self._raw = self._played.logits.detach().requires_grad_(True)
            self._shaped = policy.shaped(self._raw)

    @property
    def logits(self) -> Tensor:
        """The policy's logits `[n, t, v]`, float64, detached."""
        return self._shaped.detach().double().cpu()

    def pullback(self, batch: Gradients, rows: Tensor, weight: Tensor, unit: int = 1, pairs: bool = False) -> ChunkMoments:
        """Pull back these rows of a batch, in the order of the tape's ids; arguments as in `pullback`."""
        basis, mixing_weights = basis_cotangents(batch, rows)
        mixing = mixing_weights.to(self._raw).permute(2, 3, 0, 1).contiguous()
        n, t, e, k = mixing.shape
        m, units = t * k, n // unit
        # Shares of tokens and kinds, those of a unit's responses concatenated.
        unit_mixing = mixing.view(units, unit * t, e, k).transpose(1, 2).flatten(2)
        sample_weight = weight[rows].to(self._raw)[:, None]
        token_basis, basis_gram = _basis(m, e) if unit == 1 else (False, False)
        basis_gram |= token_basis and pairs
        sums: dict[str, Tensor] = {}
        token_gram = self._zeros(units, m * unit, m * unit)
        unit_gram = self._zeros(units, *(2 if pairs else 1) * [e])

        def on_head(inputs_by_layer: dict[str, Tensor], b: Tensor) -> None:
            for trainable, a in self._trainable(inputs_by_layer):
                if trainable.is_norm:
                    at = layers.positionwise_norm_gradients(trainable, a, b).flatten(0, 2)
                    sums.update(trainable.split((sample_weight[..., None, None] * mixing).transpose(2, 3).flatten(0, 2).T @ at))
                else:
                    sums.update(layers.weighted_sums(trainable, a, mix(mixing, b), sample_weight))
                token_gram.add_(layers.positionwise_gram(trainable, _merge_group(unit, a), _merge_group(unit, b)))

        def on_body(inputs_by_layer: dict[str, Tensor], b: Tensor) -> None:
            trained = self._trainable(inputs_by_layer)
            if any(trainable.is_norm for trainable, _ in trained):
                ((trainable, a),) = trained
                gradients = layers.norm_gradients(trainable, a, b)
                mixed = unit_mixing @ gradients if token_basis else gradients
                sums.update(trainable.split((sample_weight[..., None] * mixed).sum(0)))
                gram = layers.products(
                    (gradients if basis_gram else mixed).view(units, unit, -1, gradients.shape[-1]).sum(1), basis_gram or pairs
                )
            elif trained:
                if token_basis and not basis_gram:
                    b = unit_mixing[:, None] @ b
                for trainable, a in trained:
                    sums.update(layers.weighted_sums(trainable, a, b, sample_weight, unit_mixing if basis_gram else None))
                gram = layers.gram(
                    [(trainable, _merge_group(unit, a)) for trainable, a in trained], _merge_group(unit, b), basis_gram or pairs
                )
            else:
                return
            (token_gram if basis_gram else unit_gram).add_(gram)

        with torch.no_grad():
            head_cotangents = self._played.backward_head(self._raw_cotangents(basis), on_head)
            body_mixing = self._token_mixing(m) if token_basis else mixing
            self._played.backward_body([mix(body_mixing, cotangent) for cotangent in head_cotangents], on_body)
            unit_mixing64 = unit_mixing.double()
            half_product = unit_mixing64 @ token_gram
            unit_gram += half_product @ unit_mixing64.mT if pairs else (half_product * unit_mixing64).sum(-1)
        unit_gram = unit_gram.cpu()
        return ChunkMoments(sums, unit_gram.diagonal(dim1=-2, dim2=-1), unit_gram) if pairs else ChunkMoments(sums, unit_gram)

    def gram(self) -> Tensor:
        """Inner products of the gradients of all logits along a sequence, `[n, t·v, t·v]`, float64."""
        n, t, v = self._shaped.shape
        gram = self._zeros(n, t * v, t * v)

        def on_head(inputs_by_layer: dict[str, Tensor], b: Tensor) -> None:
            for trainable, a in self._trainable(inputs_by_layer):
                gram.add_(layers.positionwise_gram(trainable, a, b))

        def on_body(inputs_by_layer: dict[str, Tensor], b: Tensor) -> None:
            trained = self._trainable(inputs_by_layer)
            if any(trainable.is_norm for trainable, _ in trained):
                ((trainable, a),) = trained
                gram.add_(layers.products(layers.norm_gradients(trainable, a, b), True))
            elif trained:
                gram.add_(layers.gram([(trainable, a) for trainable, a in trained], b, True))

        with torch.no_grad():
            head_cotangents = self._played.backward_head(
                self._raw_cotangents([each.expand(n, t, v) for each in torch.eye(v)]), on_head
            )
            self._played.backward_body([mix(self._token_mixing(t * v), cotangent) for cotangent in head_cotangents], on_body)
        return gram.cpu()

    def _trainable(self, inputs_by_layer: dict[str, Tensor]) -> list[tuple[layers.TrainableLayer, Tensor]]:
        return [(self._layers[name], a) for name, a in inputs_by_layer.items() if name in self._layers]

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self._raw.device)

    def _raw_cotangents(self, basis: list[Tensor]) -> Tensor:
        """From cotangents of the policy's logits, `k` times `[n, t, v]`, to those of the network's, `[n, t, k, ids]`."""
        return torch.stack(
            [
                torch.autograd.grad(self._shaped, self._raw, cotangent.to(self._shaped), retain_graph=True)[0]
                for cotangent in basis
            ],
            2,
        )

    def _token_mixing(self, m: int) -> Tensor:
        """Shares `[t, m, k]` of a basis of single tokens and kinds."""
        return torch.eye(m).to(self._raw).view(self.length, -1, m).mT.contiguous()


def replayable(policy: LanguageModel) -> bool:
    """Whether the network is our own and nothing was put around it, so that its backward pass is known."""
    return policy.own_network


# ---- the basis ----------------------------------------------------------------------------------------------------------


def _basis(m: int, e: int) -> tuple[bool, bool]:
    """Whether `m` tokens and kinds are the basis rather than `e` estimators, and whether products between them serve all estimators.

    There may be so many that those of estimators with themselves are less work.
    """
    return m < e, m < e and m * m <= 3 * e


def cotangents_per_pass(batch: Gradients) -> int:
    """Cotangents that lie side by side in a pass: of tokens and kinds, or of estimators."""
    e, m = len(batch.score), (1 + len(batch.direct) + len(batch.cotangents)) * batch.score.shape[2]
    return m if all(_basis(m, e)) else e


def basis_cotangents(batch: Gradients, rows: Tensor) -> tuple[list[Tensor], Tensor]:
    """Cotangents `[n, t, v]` of the logits that all estimators are made of, and each one's shares `[e, k, n, t]` of them.

    The score of the tokens; the slope of each vocabulary kernel in use; the cotangent of each callable.
    """
    rollout = batch.rollout
    contexts, tokens = rollout.contexts[rows], rollout.tokens[rows]
    score = -rollout.table[contexts].softmax(-1)
    score.scatter_add_(-1, tokens[..., None], torch.ones_like(score[..., :1]))
    basis, mixing_weights = [score], [batch.score[:, rows]]
    for losses, direct, slope in batch.direct:
        basis.append(slope[contexts])
        mixing_weights.append(torch.zeros_like(mixing_weights[0]))
        mixing_weights[-1][losses] = direct[:, rows]
    for e, cotangent in batch.cotangents.items():
        basis.append(cotangent[rows])
        mixing_weights.append(torch.zeros_like(mixing_weights[0]))
        mixing_weights[-1][e] = 1.0
    return basis, torch.stack(mixing_weights, 1)


def mix(mixing: Tensor, b: Tensor) -> Tensor:
    """`Σ_k mixing_mk b_k`: shares `[…, m, k]` of cotangents `[n, t, k, d]`, as `[n, t, m, d]`."""
    return mixing * b if b.shape[2] == 1 else mixing @ b


def _merge_group(unit: int, x: Tensor) -> Tensor:
    """Responses of a unit concatenated into one: `[n, s, …]` → `[n/unit, unit·s, …]`."""
    return x.reshape(len(x) // unit, -1, *x.shape[2:])
