"""What one layer adds to per-sample gradients: inputs `a` `[n, s, i]` (see `weight_inputs`), output cotangents `b` `[n, s, m, o]`.

The gradient of a linear layer is `Σ_s b_s aᵀ_s`. Inner products of two of them need only those of the `a` and of the `b`, as
`⟨b aᵀ, b' a'ᵀ⟩ = tr(a bᵀ b' a'ᵀ) = ⟨a, a'⟩⟨b, b'⟩`, so that `‖Σ_s b_s aᵀ_s‖² = Σ_{s,u} ⟨a_s, a_u⟩⟨b_s, b_u⟩`; the mean over samples is
one matrix product. Embeddings are linear layers whose `a` are one-hot; norms multiply elementwise. The `m`
cotangents, one per estimator or element of a basis, are batched: one product serves them all.

Source: ghost norms, Goodfellow, arXiv 1510.01799; Li et al., arXiv 2110.05679.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradlab.policies import LanguageModel

#: Sequences whose cotangents are mixed at a time.
MIXED_SEQUENCES = 32


@dataclass(frozen=True)
class TrainableLayer:
    """A layer that holds trainable parameters: `names` maps `weight` or `bias` to the parameter's full name."""

    layer: nn.Module
    names: dict[str, str]

    @property
    def is_norm(self) -> bool:
        """Whether it multiplies elementwise."""
        return _is_norm(self.layer)

    def split(self, stacked: Tensor) -> dict[str, Tensor]:
        """Gradients of the parameters of a norm, concatenated, `[…, p]`, by their full names."""
        return dict(zip(self.names.values(), stacked.chunk(len(self.names), -1), strict=True))


def trainable_layers(policy: LanguageModel) -> dict[str, TrainableLayer]:
    """The layers that hold trainable parameters, by name.

    Raises `ValueError` for a layer that is not linear, an embedding or a norm, and for a parameter that two layers share.
    """
    weights, identity = policy.weights, {id(weight): name for name, weight in policy.weights.items()}
    layers: dict[str, TrainableLayer] = {}
    layer_of: dict[str, str] = {}
    for name, layer in policy.model.named_modules():
        for kind, parameter in layer.named_parameters(recurse=False):
            if id(parameter) not in identity:
                continue
            full = identity[id(parameter)]
            if full in layer_of:
                raise ValueError(
                    f"parameter {full} belongs to two layers, {layer_of[full]} and {name}; make only untied ones trainable"
                )
            layer_of[full] = name
            if kind not in ("weight", "bias") or not (isinstance(layer, nn.Linear | nn.Embedding) or _is_norm(layer)):
                raise ValueError(
                    f"parameter {full} belongs to a {type(layer).__name__}; per-sample gradients are known for nn.Linear, "
                    "nn.Embedding, nn.LayerNorm and RMSNorm: leave it out of `trainable`"
                )
            layers.setdefault(name, TrainableLayer(layer, {})).names[kind] = full
    assert set(layer_of) == set(weights)
    return layers


def _is_norm(layer: nn.Module) -> bool:
    return isinstance(layer, nn.LayerNorm) or "RMSNorm" in type(layer).__name__


def weight_inputs(layer: nn.Module, inputs: Tensor) -> Tensor:
    """What a layer multiplies its weight with: for a norm its inputs normalised, otherwise the inputs themselves."""
    if not _is_norm(layer):
        return inputs
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(inputs, layer.normalized_shape, None, None, layer.eps)
    eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    wide = inputs if inputs.dtype == torch.float64 else inputs.float()
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(inputs.dtype)


def weighted_sums(
    trainable: TrainableLayer, a: Tensor, b: Tensor, weight: Tensor, mixing: Tensor | None = None
) -> dict[str, Tensor]:
    """Sums over samples, weighted by `weight` `[n, 1]`, and over positions: `[m, …]` by each parameter's full name; not for norms.

    mixing: `[n, e, m]` of the cotangents that each of `e` gradients is made of, instead of being one of them.
    """
    n, s, m, o = b.shape
    e = m if mixing is None else mixing.shape[1]
    names, position_weight = trainable.names, weight.expand(n, s).reshape(-1, 1)
    if "weight" in names and isinstance(trainable.layer, nn.Embedding):
        places = torch.stack([a.flatten(), torch.arange(n * s, device=a.device)])
        hot = torch.sparse_coo_tensor(
            places, position_weight[:, 0], (len(trainable.layer.weight), n * s), check_invariants=False
        )
        y = b if mixing is None else mixing[:, None] @ b
        return {names["weight"]: (hot @ y.flatten(2).flatten(0, 1)).view(-1, e, o).movedim(1, 0)}
    # The bias is the weight of an input that is always 1.
    inputs = torch.cat([a.flatten(0, 1) * position_weight, position_weight], -1) if "weight" in names else position_weight
    if mixing is None:
        stacked = inputs.T @ b.flatten(2).flatten(0, 1)
    else:
        stacked = b.new_zeros(inputs.shape[1], e * o)
        # What is mixed is used at once, while it is in the processor's cache.
        for x, y, part in zip(
            *(torch.split(gradients, MIXED_SEQUENCES) for gradients in (inputs.view(n, s, -1), b, mixing)), strict=True
        ):
            stacked.addmm_(x.flatten(0, 1).T, (part[:, None] @ y).flatten(2).flatten(0, 1))
    gradients = stacked.view(-1, e, o)
    by_kind = {"weight": gradients[:-1].permute(1, 2, 0), "bias": gradients[-1]}
    return {name: by_kind[kind] for kind, name in names.items()}


def input_gram(trainable: TrainableLayer, a: Tensor) -> Tensor:
    """What the inner product of two positions' cotangents counts in that of their gradients, `[n, s, s]`; not for norms."""
    layer, names = trainable.layer, trainable.names
    dtype = a.dtype if a.is_floating_point() else next(layer.parameters()).dtype
    if "weight" not in names:
        products_of_inputs = torch.zeros(len(a), a.shape[1], a.shape[1], dtype=dtype, device=a.device)
    elif isinstance(layer, nn.Embedding):
        products_of_inputs = (a[:, :, None] == a[:, None]).to(dtype)
    else:
        products_of_inputs = a @ a.mT
    return products_of_inputs + 1 if "bias" in names else products_of_inputs


def positionwise_norm_gradients(trainable: TrainableLayer, a: Tensor, b: Tensor) -> Tensor:
    """Gradients of a norm at single positions, its parameters concatenated: `[n, s, m, p]`."""
    return torch.cat([b * a[:, :, None] if kind == "weight" else b for kind in trainable.names], -1)


def norm_gradients(trainable: TrainableLayer, a: Tensor, b: Tensor) -> Tensor:
    """Gradients of a norm, its parameters concatenated: `[n, m, p]`."""
    gradients = {"bias": b.sum(1)} if "bias" in trainable.names else {}
    if "weight" in trainable.names:
        # Position by position, so that products of the size of `b` are not written.
        gradients["weight"] = b[:, 0] * a[:, 0, None]
        for s in range(1, b.shape[1]):
            gradients["weight"].addcmul_(b[:, s], a[:, s, None])
    return torch.cat([gradients[kind] for kind in trainable.names], -1)


def positionwise_gram(trainable: TrainableLayer, a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the gradients of single positions, `[n, s·m, s·m]`: after the last layer that mixes positions."""
    if trainable.is_norm:
        return products(positionwise_norm_gradients(trainable, a, b).flatten(1, 2), True)
    y, m = b.flatten(1, 2), b.shape[2]
    return _spread(y @ y.mT, m).mul_(input_gram(trainable, a)[:, :, None, :, None]).view(len(y), y.shape[1], y.shape[1])


def gram(layer_inputs: list[tuple[TrainableLayer, Tensor]], b: Tensor, full: bool) -> Tensor:
    """Inner products of per-sample gradients between basis elements, `[n, m, m]`, or their squares `[n, m]`.

    layer_inputs: layers, none of them norms, that have these cotangents in common, each with its inputs.
    """
    n, s, m, o = b.shape
    inner_products = b.new_zeros((n, m, m) if full else (n, m))
    position_gram = None
    for trainable, a in layer_inputs:
        linear = isinstance(trainable.layer, nn.Linear) and "weight" in trainable.names
        if linear and s * (a.shape[-1] + o) > 4 * a.shape[-1] * o:
            # Long sequences through a narrow layer: the gradients themselves are smaller than what their products need.
            gradients = (b.flatten(2).mT @ a).view(n, m, -1)
            inner_products += products(torch.cat([gradients, b.sum(1)], -1) if "bias" in trainable.names else gradients, full)
        else:
            position_gram = input_gram(trainable, a) if position_gram is None else position_gram + input_gram(trainable, a)
    if position_gram is None:
        return inner_products
    if not full:
        for i in range(m):
            y = b[:, :, i]
            inner_products[:, i] += (y @ y.mT).mul_(position_gram).sum((1, 2))
    elif m <= s:
        y = b.flatten(1, 2)
        inner_products += torch.einsum("nsmuk,nsu->nmk", _spread(y @ y.mT, m), position_gram)
    else:
        # Many at once: kernel times vectors, then one product of all with all.
        y, z = (x.view(n, s, m, o).transpose(1, 2).flatten(2) for x in (b, position_gram @ b.flatten(2)))
        inner_products += y @ z.mT
    return inner_products


def products(x: Tensor, full: bool) -> Tensor:
    """Inner products `[n, m, m]` of vectors `[n, m, p]`, or their squares `[n, m]`."""
    return x @ x.mT if full else x.square().sum(-1)


def _spread(products: Tensor, m: int) -> Tensor:
    """`[n, s·m, s·m]` → `[n, s, m, s, m]`."""
    n, size, _ = products.shape
    return products.view(n, size // m, m, size // m, m)
