"""What one layer adds to per-sample gradients: from its inputs `a` `[n, s, i]` (see `factor`) and output cotangents `b` `[n, s, m, o]`.

The gradient of a linear layer is `Σ_s b_s aᵀ_s`: inner products of two of them need only those of the `a` and of the `b`, the
mean over samples is one matrix product. Embeddings are linear layers whose `a` are one-hot; norms multiply elementwise. Of the
cotangents `m` lie abreast, one per estimator or element of a basis, so that one product serves them all.

Source: ghost norms, Goodfellow, arXiv 1510.01799; Li et al., arXiv 2110.05679.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradlab.policies import LanguageModel


@dataclass(frozen=True)
class Owner:
    """A layer that holds trainable parameters: `names` maps `weight` or `bias` to the parameter's full name."""

    layer: nn.Module
    names: dict[str, str]

    @property
    def norm(self) -> bool:
        """Whether it multiplies elementwise."""
        return _is_norm(self.layer)


def owners(policy: LanguageModel) -> dict[str, Owner]:
    """The layers that hold trainable parameters, by name.

    Raises `ValueError` for a layer that is not linear, an embedding or a norm, and for a parameter that two layers share.
    """
    wanted, identity = policy.weights, {id(weight): name for name, weight in policy.weights.items()}
    found: dict[str, Owner] = {}
    seen: dict[str, str] = {}
    for name, layer in policy.model.named_modules():
        for kind, parameter in layer.named_parameters(recurse=False):
            if id(parameter) not in identity:
                continue
            full = identity[id(parameter)]
            if full in seen:
                raise ValueError(
                    f"parameter {full} belongs to two layers, {seen[full]} and {name}; make only untied ones trainable"
                )
            seen[full] = name
            if kind not in ("weight", "bias") or not (isinstance(layer, nn.Linear | nn.Embedding) or _is_norm(layer)):
                raise ValueError(
                    f"parameter {full} belongs to a {type(layer).__name__}; per-sample gradients are known for nn.Linear, "
                    "nn.Embedding, nn.LayerNorm and RMSNorm: leave it out of `trainable`"
                )
            found.setdefault(name, Owner(layer, {})).names[kind] = full
    assert set(seen) == set(wanted)
    return found


def _is_norm(layer: nn.Module) -> bool:
    return isinstance(layer, nn.LayerNorm) or "RMSNorm" in type(layer).__name__


def factor(layer: nn.Module, inputs: Tensor) -> Tensor:
    """What a layer multiplies its weight with: for a norm its inputs normalised, otherwise the inputs themselves."""
    if not _is_norm(layer):
        return inputs
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(inputs, layer.normalized_shape, None, None, layer.eps)
    eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    wide = inputs if inputs.dtype == torch.float64 else inputs.float()
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(inputs.dtype)


def totals(owner: Owner, a: Tensor, b: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Sums over samples, weighted by `weight` `[n, 1]`, and over positions: `[m, …]` for each parameter of the layer."""
    layer, names = owner.layer, owner.names
    m, o = b.shape[2:]
    y, spread = b.flatten(2).flatten(0, 1), weight.expand(b.shape[:2]).reshape(-1, 1)
    if owner.norm:
        found = {"weight": ((y.view(-1, m, o) * (a.flatten(0, 1) * spread)[:, None]).sum(0))} if "weight" in names else {}
    elif "weight" not in names:
        found = {}
    elif isinstance(layer, nn.Embedding):
        rows = y.new_zeros(len(layer.weight), m * o).index_add_(0, a.flatten(), y * spread)
        found = {"weight": rows.view(-1, m, o).movedim(1, 0)}
    else:
        # The bias is the weight of an input that is always 1.
        inputs = torch.cat([a.flatten(0, 1) * spread, spread], -1)
        both = (inputs.T @ y).view(-1, m, o)
        found = {"weight": both[:-1].permute(1, 2, 0), "bias": both[-1]}
    if "bias" in names and "bias" not in found:
        found["bias"] = (spread.T @ y).view(m, o)
    return {kind: found[kind] for kind in names}


def apart(owner: Owner, a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the gradients of single positions, `[n, s·m, s·m]`: behind the last place where positions mix."""
    if owner.norm:
        z = torch.cat(_norm_parts(owner, a, b), -1).flatten(1, 2)
        return z @ z.mT
    y, m = b.flatten(1, 2), b.shape[2]
    return _spread(y @ y.mT, m).mul_(kernel(owner, a)[:, :, None, :, None]).view(len(y), y.shape[1], y.shape[1])


def kernel(owner: Owner, a: Tensor) -> Tensor:
    """What the inner product of two positions' cotangents counts in that of their gradients, `[n, s, s]`; not for norms."""
    layer, names = owner.layer, owner.names
    dtype = a.dtype if a.is_floating_point() else next(layer.parameters()).dtype
    if "weight" not in names:
        found = torch.zeros(len(a), a.shape[1], a.shape[1], dtype=dtype, device=a.device)
    elif isinstance(layer, nn.Embedding):
        found = (a[:, :, None] == a[:, None]).to(dtype)
    else:
        found = a @ a.mT
    return found + 1 if "bias" in names else found


def gram(heard: list[tuple[Owner, Tensor]], b: Tensor, full: bool) -> Tensor:
    """Inner products of per-sample gradients between basis elements, `[n, m, m]`, or their squares `[n, m]`.

    heard: layers that have these cotangents in common, each with its inputs.
    """
    n, s, m, o = b.shape
    found = b.new_zeros((n, m, m) if full else (n, m))
    between = None
    for owner, a in heard:
        linear = isinstance(owner.layer, nn.Linear) and "weight" in owner.names
        if owner.norm:
            found += _products(torch.cat([part.sum(1) for part in _norm_parts(owner, a, b)], -1), full)
        elif linear and s * (a.shape[-1] + o) > 4 * a.shape[-1] * o:
            # Long sequences through a narrow layer: the gradients themselves are smaller than what their products need.
            each = (b.flatten(2).mT @ a).view(n, m, -1)
            found += _products(torch.cat([each, b.sum(1)], -1) if "bias" in owner.names else each, full)
        else:
            between = kernel(owner, a) if between is None else between + kernel(owner, a)
    if between is None:
        return found
    if not full:
        for i in range(m):
            y = b[:, :, i]
            found[:, i] += ((y @ y.mT).mul_(between)).sum((1, 2))
    elif m <= s:
        y = b.flatten(1, 2)
        found += _spread(y @ y.mT, m).mul_(between[:, :, None, :, None]).sum((1, 3))
    else:
        # Many at once: kernel times vectors, then one product of all with all.
        y, z = (x.view(n, s, m, o).transpose(1, 2).flatten(2) for x in (b, between @ b.flatten(2)))
        found += y @ z.mT
    return found


def _norm_parts(owner: Owner, x: Tensor, b: Tensor) -> list[Tensor]:
    return [b * x[:, :, None] if kind == "weight" else b for kind in owner.names]


def _spread(products: Tensor, m: int) -> Tensor:
    """`[n, s·m, s·m]` → `[n, s, m, s, m]`."""
    n, size, _ = products.shape
    return products.view(n, size // m, m, size // m, m)


def _products(x: Tensor, full: bool) -> Tensor:
    return x @ x.mT if full else x.square().sum(-1)
