"""What one layer adds to per-sample gradients: from its inputs `a` `[n, s, i]` (see `factor`) and output cotangents `b` `[n, s, o]`.

The gradient of a linear layer is `Σ_s b_s aᵀ_s`: inner products of two of them need only those of the `a` and of the `b`, the
mean over samples is one matrix product. Embeddings are linear layers whose `a` are one-hot; norms multiply elementwise.

Source: ghost norms, Goodfellow, arXiv 1510.01799; Li et al., arXiv 2110.05679.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradlab.policies import LanguageModel


def owners(policy: LanguageModel) -> dict[str, tuple[nn.Module, dict[str, str]]]:
    """The layers that hold trainable parameters: name → (layer, {`weight` or `bias`: the parameter's full name}).

    Raises `ValueError` for a layer that is not linear, an embedding or a norm, and for a parameter that two layers share.
    """
    wanted, identity = policy.weights, {id(weight): name for name, weight in policy.weights.items()}
    found: dict[str, tuple[nn.Module, dict[str, str]]] = {}
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
            found.setdefault(name, (layer, {}))[1][kind] = full
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


def totals(layer: nn.Module, owned: dict[str, str], a: Tensor, b: list[Tensor], scales: list[Tensor]) -> dict[str, Tensor]:
    """Weighted sums over samples and positions for each parameter, `[e, …]`.

    b: output cotangents, `e` times `[n, s, o]`. scales: what each is weighted by, `[n, s, 1]` or `[n, 1, 1]`; estimators may
    share cotangents and differ in weights, or the other way round.
    """
    # Inputs are weighted rather than cotangents, for these are often the wider ones: once if all have the same weights.
    linear = isinstance(layer, nn.Linear) and "weight" in owned
    inward = linear and (a.shape[-1] <= b[0].shape[-1] or (len(b) > 1 and all(scale is scales[0] for scale in scales)))
    found: dict[str, list[Tensor]] = {kind: [] for kind in owned}
    last: tuple[Tensor, Tensor] | None = None
    for cotangent, scale in zip(b, scales, strict=True):
        y = cotangent.flatten(0, 1)
        spread = scale.expand(*cotangent.shape[:2], 1).reshape(-1, 1)
        if "bias" in owned:
            found["bias"].append((y.T @ spread)[:, 0])
        if "weight" not in owned:
            continue
        if isinstance(layer, nn.Embedding):
            found["weight"].append(y.new_zeros(layer.weight.shape).index_add_(0, a.flatten(), y * spread))
        elif not linear:
            found["weight"].append((y * a.flatten(0, 1) * spread).sum(0))
        else:
            if inward and (last is None or last[0] is not scale):
                last = scale, a.flatten(0, 1) * spread
            left, right = (y, last[1]) if inward and last is not None else (y * spread, a.flatten(0, 1))
            # The wider factor on the right: matrix products are faster so.
            wide = left.shape[1] > right.shape[1]
            found["weight"].append((right.T @ left).T if wide else left.T @ right)
    return {kind: torch.stack(each) for kind, each in found.items()}


def apart(layer: nn.Module, owned: dict[str, str], a: Tensor, b: list[Tensor]) -> Tensor:
    """Inner products of the gradients of single positions, `[n, k·s, k·s]`: behind the last place where positions mix.

    b: output cotangents of `k` kinds, `[n, s, o]` each; the gradient of a kind at a position is that position's alone.
    """
    if _is_norm(layer):
        z = torch.cat([torch.cat(_norm_parts(owned, a, y), -1) for y in b], 1)
        return z @ z.mT
    y = torch.cat(b, 1)
    return (y @ y.mT) * kernel(layer, owned, a).repeat(1, len(b), len(b))


def kernel(layer: nn.Module, owned: dict[str, str], a: Tensor) -> Tensor:
    """What the inner product of two positions' cotangents counts in that of their gradients, `[n, s, s]`; for a norm nothing."""
    if _is_norm(layer):
        return a.new_zeros(0)
    dtype = a.dtype if a.is_floating_point() else next(layer.parameters()).dtype
    if "weight" not in owned:
        found = torch.zeros(len(a), a.shape[1], a.shape[1], dtype=dtype, device=a.device)
    elif isinstance(layer, nn.Embedding):
        found = (a[:, :, None] == a[:, None]).to(dtype)
    else:
        found = a @ a.mT
    return found + 1 if "bias" in owned else found


def gram(layer: nn.Module, owned: dict[str, str], a: Tensor, b: list[Tensor], full: bool, between: Tensor) -> Tensor:
    """Inner products of a layer's per-sample gradients between basis elements, `[n, m, m]`, or their squares `[n, m]`.

    between: the layer's `kernel` of the same inputs.
    """
    if _is_norm(layer):
        each = [torch.cat([part.sum(1) for part in _norm_parts(owned, a, y)], -1) for y in b]
        return _products(each, None, full)
    s, o = b[0].shape[1:]
    if "weight" in owned and isinstance(layer, nn.Linear) and s * (a.shape[-1] + o) > 4 * a.shape[-1] * o:
        # Long sequences through a narrow layer: the gradients themselves are smaller than what their products need.
        each = [(y.mT @ a).flatten(1) for y in b]
        return _products(
            [torch.cat([x, y.sum(1)], -1) for x, y in zip(each, b, strict=True)] if "bias" in owned else each, None, full
        )
    return _products(b, between, full)


def _norm_parts(owned: dict[str, str], x: Tensor, b: Tensor) -> list[Tensor]:
    return [b * x if kind == "weight" else b for kind in owned]


def _products(x: list[Tensor], kernel: Tensor | None, full: bool) -> Tensor:
    """`⟨x_m, x_k⟩` per sample, `[n, m, m]`, or for `m = k` alone, `[n, m]`; of vectors `[n, d]`, or of `[n, s, o]` with
    `Σ_{s,u} kernel_su ⟨x_ms, x_ku⟩`."""  # fmt: skip

    def product(y: Tensor, z: Tensor) -> Tensor:
        return (y * z).sum(-1) if kernel is None else ((y @ z.mT) * kernel).sum((1, 2))

    if not full:
        return torch.stack([product(y, y) for y in x], -1)
    if kernel is None:
        stacked = torch.stack(x, 1)
        return stacked @ stacked.mT
    if len(x) > 8:
        # Many at once: kernel times vectors, then one product of all with all.
        stacked = torch.stack(x, 1)
        return stacked.flatten(2) @ (kernel[:, None] @ stacked).flatten(2).mT
    found = x[0].new_zeros(len(x[0]), len(x), len(x))
    for m, y in enumerate(x):
        for k in range(m + 1):
            found[:, m, k] = found[:, k, m] = product(y, x[k])
    return found
