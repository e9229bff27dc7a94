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

#: Sequences whose cotangents are mixed at a time.
MIXED = 32


@dataclass(frozen=True)
class Owner:
    """A layer that holds trainable parameters: `names` maps `weight` or `bias` to the parameter's full name."""

    layer: nn.Module
    names: dict[str, str]

    @property
    def norm(self) -> bool:
        """Whether it multiplies elementwise."""
        return _is_norm(self.layer)

    def split(self, together: Tensor) -> dict[str, Tensor]:
        """What lies behind one another for the parameters of a norm, `[…, p]`, by their full names."""
        return dict(zip(self.names.values(), together.chunk(len(self.names), -1), strict=True))


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


def sums(owner: Owner, a: Tensor, b: Tensor, weight: Tensor, share: Tensor | None = None) -> dict[str, Tensor]:
    """Sums over samples, weighted by `weight` `[n, 1]`, and over positions: `[m, …]` by each parameter's full name; not for norms.

    share: `[n, e, m]` of the cotangents that each of `e` gradients is made of, instead of being one of them.
    """
    n, s, m, o = b.shape
    e = m if share is None else share.shape[1]
    names, spread = owner.names, weight.expand(n, s).reshape(-1, 1)
    if "weight" in names and isinstance(owner.layer, nn.Embedding):
        places = torch.stack([a.flatten(), torch.arange(n * s, device=a.device)])
        hot = torch.sparse_coo_tensor(places, spread[:, 0], (len(owner.layer.weight), n * s), check_invariants=False)
        y = b if share is None else share[:, None] @ b
        return {names["weight"]: (hot @ y.flatten(2).flatten(0, 1)).view(-1, e, o).movedim(1, 0)}
    # The bias is the weight of an input that is always 1.
    inputs = torch.cat([a.flatten(0, 1) * spread, spread], -1) if "weight" in names else spread
    if share is None:
        both = inputs.T @ b.flatten(2).flatten(0, 1)
    else:
        both = b.new_zeros(inputs.shape[1], e * o)
        # What is mixed is used at once, while it is in the processor's cache.
        for x, y, own in zip(*(torch.split(each, MIXED) for each in (inputs.view(n, s, -1), b, share)), strict=True):
            both.addmm_(x.flatten(0, 1).T, (own[:, None] @ y).flatten(2).flatten(0, 1))
    each = both.view(-1, e, o)
    found = {"weight": each[:-1].permute(1, 2, 0), "bias": each[-1]}
    return {name: found[kind] for kind, name in names.items()}


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


def at_positions(owner: Owner, a: Tensor, b: Tensor) -> Tensor:
    """Gradients of a norm at single positions, its parameters behind one another: `[n, s, m, p]`."""
    return torch.cat([b * a[:, :, None] if kind == "weight" else b for kind in owner.names], -1)


def summed(owner: Owner, a: Tensor, b: Tensor) -> Tensor:
    """Gradients of a norm, its parameters behind one another: `[n, m, p]`."""
    found = {"bias": b.sum(1)} if "bias" in owner.names else {}
    if "weight" in owner.names:
        # Position by position, so that products of the size of `b` are not written.
        found["weight"] = b[:, 0] * a[:, 0, None]
        for s in range(1, b.shape[1]):
            found["weight"].addcmul_(b[:, s], a[:, s, None])
    return torch.cat([found[kind] for kind in owner.names], -1)


def apart(owner: Owner, a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the gradients of single positions, `[n, s·m, s·m]`: behind the last place where positions mix."""
    if owner.norm:
        return products(at_positions(owner, a, b).flatten(1, 2), True)
    y, m = b.flatten(1, 2), b.shape[2]
    return _spread(y @ y.mT, m).mul_(kernel(owner, a)[:, :, None, :, None]).view(len(y), y.shape[1], y.shape[1])


def gram(heard: list[tuple[Owner, Tensor]], b: Tensor, full: bool) -> Tensor:
    """Inner products of per-sample gradients between basis elements, `[n, m, m]`, or their squares `[n, m]`.

    heard: layers, none of them norms, that have these cotangents in common, each with its inputs.
    """
    n, s, m, o = b.shape
    found = b.new_zeros((n, m, m) if full else (n, m))
    between = None
    for owner, a in heard:
        linear = isinstance(owner.layer, nn.Linear) and "weight" in owner.names
        if linear and s * (a.shape[-1] + o) > 4 * a.shape[-1] * o:
            # Long sequences through a narrow layer: the gradients themselves are smaller than what their products need.
            each = (b.flatten(2).mT @ a).view(n, m, -1)
            found += products(torch.cat([each, b.sum(1)], -1) if "bias" in owner.names else each, full)
        else:
            between = kernel(owner, a) if between is None else between + kernel(owner, a)
    if between is None:
        return found
    if not full:
        for i in range(m):
            y = b[:, :, i]
            found[:, i] += (y @ y.mT).mul_(between).sum((1, 2))
    elif m <= s:
        y = b.flatten(1, 2)
        found += torch.einsum("nsmuk,nsu->nmk", _spread(y @ y.mT, m), between)
    else:
        # Many at once: kernel times vectors, then one product of all with all.
        y, z = (x.view(n, s, m, o).transpose(1, 2).flatten(2) for x in (b, between @ b.flatten(2)))
        found += y @ z.mT
    return found


def products(x: Tensor, full: bool) -> Tensor:
    """Inner products `[n, m, m]` of vectors `[n, m, p]`, or their squares `[n, m]`."""
    return x @ x.mT if full else x.square().sum(-1)


def _spread(products: Tensor, m: int) -> Tensor:
    """`[n, s·m, s·m]` → `[n, s, m, s, m]`."""
    n, size, _ = products.shape
    return products.view(n, size // m, m, size // m, m)
