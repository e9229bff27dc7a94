"""Gradients of language models, sample by sample, without ever holding one: means, norms and inner products by hooks.

A sample's gradient is `Σ_m α_m · basis_m`: the basis are the gradients of the estimators, or of the scores of single tokens (and
of the vocabulary kernels at single tokens) where these are fewer, for all estimators share them. One recorded forward pass and
one backward pass per basis element give, for every layer, its inputs `a` `[n, s, i]` and output cotangents `b` `[m, n, s, o]`.
The gradient of a linear layer is `Σ_s b_s aᵀ_s`: its inner products need only those of the `a` and of the `b`, its mean over
samples is one matrix product. Memory goes with a chunk of sequences, not with samples times parameters.

Source: ghost norms, Goodfellow, arXiv 1510.01799; Li et al., arXiv 2110.05679. Derived here: the shared basis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradlab.moments import Gradients, Pull
from gradlab.policies import LanguageModel

#: Bytes that activations and cotangents of one chunk of sequences may take, over all layers and basis elements.
PASS_BYTES = 2**28


_GRAMS: WeakKeyDictionary[LanguageModel, Tensor] = WeakKeyDictionary()


@dataclass(frozen=True)
class Pulled:
    """`total` `[e, p]`: weighted sum of the gradients. `square` `[units, e]`: squared norm of every unit's gradient.

    A unit is a response, or a group of them. `inner` `[units, e, e]`: all pairwise inner products, where asked for.
    """

    total: Tensor
    square: Tensor
    inner: Tensor | None = None


def pull(policy: LanguageModel, batch: Gradients, weight: Tensor, unit: int = 1, pairs: bool = False) -> Pulled:
    """Carry gradients with respect to logits back to the policy's parameters, a bounded chunk of sequences at a time.

    batch: gradients over a rollout of a language model, whose `prompts` say what was answered. weight `[n]`: of each response in
    `total`. unit: successive responses to one prompt whose gradients are summed before norms are taken. pairs: inner products
    between estimators, too. Raises `ValueError` for a rollout without prompts and for layers that are not known here.
    """
    rollout = batch.rollout
    if rollout.prompts is None:
        raise ValueError(
            "parameter-space gradients need a rollout of a language model: this one does not say which prompts it answers"
        )
    n, t = rollout.tokens.shape
    e = len(batch.score)
    size = unit * chunk(policy, len(_alphas(batch)) if unit == 1 else e, t, unit)
    total = torch.zeros(e, len(policy.parameters), dtype=torch.float64)
    square = torch.zeros(n // unit, e, dtype=torch.float64)
    inner = torch.zeros(n // unit, e, e, dtype=torch.float64) if pairs else None
    for start in range(0, n, size):
        part = slice(start, start + size)
        for rows, ids in policy.sequences(rollout.prompts[part], rollout.tokens[part]):
            found = Tape(policy, ids, t).pull(batch, rows + start, weight, unit, pairs)
            units = (rows[::unit] + start) // unit
            total += found.total
            square[units] = found.square
            if inner is not None and found.inner is not None:
                inner[units] = found.inner
    return Pulled(total, square, inner)


def sums(policy: LanguageModel) -> Pull:
    """Weighted sums of gradients and of their squares in the parameters of a language model whose responses are listed."""

    def both(batch: Gradients, weight: Tensor) -> tuple[Tensor, Tensor]:
        n, t = batch.rollout.tokens.shape
        sequences = len(policy.prompts) * policy.vocab ** (t - 1)
        if policy in _GRAMS or sequences * t * policy.vocab < n * min(len(batch.score), len(_alphas(batch)[0])):
            return means(policy, batch.mean(weight)), weight @ squares(policy, batch)
        found = pull(policy, batch, weight)
        return found.total, weight @ found.square

    return both


def means(policy: LanguageModel, tables: Tensor) -> Tensor:
    """Gradients with respect to the table of a listed language model, `[e, rows · v]`, pulled back to its parameters, `[e, p]`."""
    with torch.enable_grad():
        theta = policy.parameters.detach().clone().requires_grad_(True)
        table = policy.with_parameters(theta).table.flatten()
        found = [torch.autograd.grad(table, theta, row.to(table.dtype), retain_graph=True)[0] for row in tables]
    return torch.stack(found).double()


def squares(policy: LanguageModel, batch: Gradients) -> Tensor:
    """Squared norms `[n, e]` of gradients over a listed rollout: `cᵀ (J Jᵀ) c`, with `c` the cotangents of a response's logits.

    Responses that differ in their last token only are read off the same logits, so there are far fewer Jacobians than responses.
    """
    rollout = batch.rollout
    gram = logit_gram(policy)
    t = rollout.tokens.shape[1]
    prompt, node = rollout.contexts[:, -1] // policy.nodes, rollout.contexts[:, -1] % policy.nodes
    which = prompt * policy.vocab ** (t - 1) + node - (policy.nodes - policy.vocab ** (t - 1))
    found = torch.zeros(len(which), len(batch.score), dtype=torch.float64)
    for rows in torch.split(torch.arange(len(which)), max(1, PASS_BYTES // (32 * gram.shape[1] ** 2))):
        own = gram[which[rows]]
        for e, cotangent in enumerate(_cotangents(batch, rows, False)):
            c = cotangent.flatten(1)[:, None]
            found[rows, e] = (c @ own @ c.mT)[:, 0, 0]
    return found


def logit_gram(policy: LanguageModel) -> Tensor:
    """`J Jᵀ` of the logits `[t, v]` along every sequence of a listed language model, `[prompts · v^(T−1), t·v, t·v]`, float64.

    `J` is their Jacobian in the parameters; one backward pass per logit, for all sequences at once. Kept with the policy.
    """
    if policy not in _GRAMS:
        t, v = policy.length, policy.vocab
        grid = torch.arange(v ** (t - 1))
        prefixes = torch.stack([grid // v ** (t - 2 - k) % v for k in range(t - 1)] + [torch.zeros_like(grid)], -1)
        x = len(policy.prompts)
        prompts, tokens = torch.arange(x).repeat_interleave(len(grid)), prefixes.repeat(x, 1)
        found = torch.zeros(len(tokens), t * v, t * v, dtype=torch.float64)
        for part in torch.split(torch.arange(len(tokens)), chunk(policy, t * v, t)):
            for rows, ids in policy.sequences(prompts[part], tokens[part]):
                found[part[rows]] = Tape(policy, ids, t).gram()
        _GRAMS[policy] = found
    return _GRAMS[policy]


def chunk(policy: LanguageModel, passes: int, length: int, unit: int = 1) -> int:
    """How many units of responses of `length` tokens one recorded pass may hold within `PASS_BYTES`."""
    widths = sum(sum(layer.weight.shape) for layer, _ in owners(policy).values())  # type: ignore[misc, arg-type]
    positions = (max(len(prompt) for prompt in policy.prompts) + length - 1) * unit
    width = policy.vocab * length * unit
    return max(1, int(PASS_BYTES // (8 * (passes + 2) * (widths * positions + 4 * width))))


class Tape:
    """One recorded forward pass over ids `[n, s]`: the policy's logits `[n, t, v]`, and what every trainable layer saw."""

    def __init__(self, policy: LanguageModel, ids: Tensor, length: int) -> None:
        self.policy = policy
        #: Positions that emit no token of the response; in the last layers no gradient reaches them.
        self._silent = ids.shape[1] - length
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        self._layers = owners(policy)
        with ExitStack() as stack, torch.enable_grad():
            for name, (layer, _) in self._layers.items():
                stack.callback(layer.register_forward_hook(self._hook(name, len(ids))).remove)
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
            self._seen[name] = inputs[0].detach(), output

        return hook

    @property
    def logits(self) -> Tensor:
        """The policy's logits `[n, t, v]`, float64, detached."""
        return self._shaped.detach().double()

    def pull(self, batch: Gradients, rows: Tensor, weight: Tensor, unit: int = 1, pairs: bool = False) -> Pulled:
        """Pull back these rows of a batch, in the order of the tape's ids; arguments as in `pull`."""
        dtype = self._shaped.dtype
        alpha = _alphas(batch)[:, :, rows].to(dtype) if unit == 1 and _by_token(batch) else None
        seeds = [seed.to(dtype) for seed in _cotangents(batch, rows, alpha is not None)]
        passes = _backward(self._shaped, [output for _, output in self._seen.values()], seeds)
        mass = weight[rows].to(dtype)[:, None, None]
        total = torch.zeros(len(batch.score), len(self.policy.parameters), dtype=torch.float64)
        offsets = _offsets(self.policy)
        gram = torch.zeros(len(rows) // unit, *(2 if pairs or alpha is not None else 1) * [len(seeds)], dtype=torch.float64)
        with torch.no_grad():
            for (name, (a, _)), b in zip(self._seen.items(), passes, strict=True):
                layer, owned = self._layers[name]
                if not any(bool(each[:, : self._silent].any()) for each in b):
                    a, b = a[:, self._silent :], [each[:, self._silent :] for each in b]
                mixed = b if alpha is None else _mixed(b, alpha)
                for kind, piece in _totals(layer, owned, a, mixed, mass).items():
                    start = offsets[owned[kind]]
                    total[:, start : start + piece[0].numel()] += piece.flatten(1)
                gram += _gram(layer, owned, _united(a, unit), [_united(each, unit) for each in b], gram.dim() == 3)
        if alpha is not None:
            alpha = alpha.permute(2, 0, 1).double()
            gram = alpha @ gram @ alpha.mT if pairs else ((alpha @ gram) * alpha).sum(-1)
        return Pulled(total, gram.diagonal(dim1=-2, dim2=-1), gram) if pairs else Pulled(total, gram)

    def gram(self) -> Tensor:
        """Inner products of the gradients of all logits along a sequence, `[n, t·v, t·v]`, float64."""
        n, t, v = self._shaped.shape
        seeds = torch.eye(t * v, dtype=self._shaped.dtype).view(t * v, 1, t, v).expand(-1, n, -1, -1)
        passes = _backward(self._shaped, [output for _, output in self._seen.values()], list(seeds))
        found = torch.zeros(n, t * v, t * v, dtype=torch.float64)
        with torch.no_grad():
            for (name, (a, _)), b in zip(self._seen.items(), passes, strict=True):
                found += _gram(*self._layers[name], a, b, True)
        return found


# ---- the basis ----------------------------------------------------------------------------------------------------------


def _by_token(batch: Gradients) -> bool:
    """Whether the tokens of a response are a smaller basis than the estimators."""
    return not batch.cotangents and batch.score.shape[2] * (1 + len(batch.direct)) < len(batch.score)


def _alphas(batch: Gradients) -> Tensor:
    """Coefficients `[e, m, n]` of every estimator on the basis of tokens: scores first, then each vocabulary kernel."""
    parts = [batch.score]
    for losses, direct, _ in batch.direct:
        part = torch.zeros_like(batch.score)
        part[losses] = direct
        parts.append(part)
    return torch.cat(parts, -1).transpose(1, 2)


def _cotangents(batch: Gradients, rows: Tensor, by_token: bool) -> Iterator[Tensor]:
    """Cotangents `[n, t, v]` of the logits for every element of the basis."""
    rollout = batch.rollout
    contexts, tokens = rollout.contexts[rows], rollout.tokens[rows]
    score = -rollout.table[contexts].softmax(-1)
    score.scatter_add_(-1, tokens[..., None], torch.ones_like(score[..., :1]))
    slopes = [(losses, direct[:, rows], slope[contexts]) for losses, direct, slope in batch.direct]
    if by_token:
        for vectors in (score, *(slope for _, _, slope in slopes)):
            for t in range(tokens.shape[1]):
                alone = torch.zeros_like(vectors)
                alone[:, t] = vectors[:, t]
                yield alone
        return
    for e, coefficients in enumerate(batch.score[:, rows]):
        found = coefficients[..., None] * score
        for losses, direct, slope in slopes:
            if e in losses:
                found = found + direct[losses.index(e)][..., None] * slope
        yield found + batch.cotangents[e][rows] if e in batch.cotangents else found


def _backward(shaped: Tensor, outputs: list[Tensor], seeds: list[Tensor]) -> list[list[Tensor]]:
    """Cotangents of every output, `m` times `[n, s, o]`: one backward pass for each seed."""
    passes = []
    for m, seed in enumerate(seeds):
        last = m == len(seeds) - 1
        grads = torch.autograd.grad(shaped, outputs, seed, retain_graph=not last, allow_unused=True)
        passes.append([torch.zeros_like(o) if g is None else g for g, o in zip(grads, outputs, strict=True)])
    return [list(each) for each in zip(*passes, strict=True)]


def _mixed(b: list[Tensor], alpha: Tensor) -> list[Tensor]:
    """Cotangents of every estimator, `e` times `[n, s, o]`, from those of the basis and `alpha` `[e, m, n]`."""
    stacked = torch.stack([each.flatten(1) for each in b], 1)
    return [each.reshape(b[0].shape) for each in (alpha.permute(2, 0, 1) @ stacked).unbind(1)]


def _united(x: Tensor, unit: int) -> Tensor:
    """Responses of a unit behind one another, as if they were one: `[n, s, …]` → `[n/unit, unit·s, …]`."""
    return x.reshape(len(x) // unit, -1, *x.shape[2:])


# ---- layers -------------------------------------------------------------------------------------------------------------


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


def _normalised(layer: nn.Module, a: Tensor) -> Tensor:
    """What a norm multiplies its weight with."""
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(a, layer.normalized_shape, None, None, layer.eps)
    eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    wide = a if a.dtype == torch.float64 else a.float()
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(a.dtype)


def _totals(layer: nn.Module, owned: dict[str, str], a: Tensor, b: list[Tensor], mass: Tensor) -> dict[str, Tensor]:
    """Weighted sums over samples and positions for each parameter, `[e, …]`, of output cotangents `e` times `[n, s, o]`.

    mass: weight of every sample, `[n, 1, 1]`.
    """
    found, flat = {}, [each.reshape(-1, each.shape[-1]) for each in b]
    spread = mass.expand(*b[0].shape[:2], 1).reshape(-1, 1)
    if "bias" in owned:
        found["bias"] = torch.stack([each.T @ spread for each in flat])
    if "weight" in owned:
        if isinstance(layer, nn.Embedding):
            sums = [each.new_zeros(layer.weight.shape).index_add_(0, a.flatten(), each * spread) for each in flat]
        elif isinstance(layer, nn.Linear):
            weighted = a.reshape(-1, a.shape[-1]) * spread
            # The wider factor on the right: matrix products are faster so.
            wide = layer.weight.shape[0] > layer.weight.shape[1]
            sums = [(weighted.T @ each).T if wide else each.T @ weighted for each in flat]
        else:
            weighted = _normalised(layer, a).reshape(-1, a.shape[-1]) * spread
            sums = [(each * weighted).sum(0) for each in flat]
        found["weight"] = torch.stack(sums)
    return found


def _gram(layer: nn.Module, owned: dict[str, str], a: Tensor, b: list[Tensor], full: bool) -> Tensor:
    """Inner products of a layer's per-sample gradients between basis elements, `[n, m, m]`, or their squares `[n, m]`."""
    if _is_norm(layer):
        x = _normalised(layer, a) if "weight" in owned else a
        each = [torch.cat([part.sum(1) for part in _norm_parts(owned, x, y)], -1) for y in b]
        return _products(each, None, full)
    n, s, o = b[0].shape
    if isinstance(layer, nn.Embedding):
        kernel = (a[:, :, None] == a[:, None]).to(b[0].dtype)
    elif "weight" not in owned:
        kernel = b[0].new_zeros(n, s, s)
    elif s * (a.shape[-1] + o) > 4 * a.shape[-1] * o:
        # Long sequences through a narrow layer: the gradients themselves are smaller than what their products need.
        each = [(y.mT @ a).flatten(1) for y in b]
        return _products(
            [torch.cat([x, y.sum(1)], -1) for x, y in zip(each, b, strict=True)] if "bias" in owned else each, None, full
        )
    else:
        kernel = a @ a.mT
    return _products(b, kernel + 1 if "bias" in owned else kernel, full)


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


def _offsets(policy: LanguageModel) -> dict[str, int]:
    """Where each parameter starts in the flat vector."""
    offsets, start = {}, 0
    for name, weight in policy.weights.items():
        offsets[name], start = start, start + weight.numel()
    return offsets
