"""Gradients of language models, sample by sample, without ever holding one: means, norms and inner products.

A sample's gradient is `Σ_m α_m · basis_m`: the basis are the gradients of the estimators, or of the scores of single tokens (and
of the vocabulary kernels at single tokens) where these are fewer, for all estimators share them. One forward pass and the way
back from it give, for every layer, its inputs `a` `[n, s, i]` and output cotangents `b` `[n, s, m, o]` of all of the basis. The
gradient of a linear layer is `Σ_s b_s aᵀ_s`: its inner products need only those of the `a` and of the `b`, its mean over
samples is one matrix product. Memory goes with a chunk of sequences, not with samples times parameters.

Source: ghost norms, Goodfellow, arXiv 1510.01799; Li et al., arXiv 2110.05679. Derived here: the shared basis.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gradlab.moments import Gradients, Pullback
from gradlab.per_sample.layers import trainable_layers
from gradlab.per_sample.tape import Tape, basis_cotangents, cotangents_per_pass, mix, replayable
from gradlab.policies import LanguageModel

#: Bytes that activations and cotangents of one chunk of sequences may take.
PASS_BYTES = 2**28
#: The largest block that glibc learns to keep, in bytes.
LARGEST_KEPT = 2**25 - 2**16


@dataclass(frozen=True)
class ParameterMoments:
    """`total` `[e, p]`: weighted sum of the gradients. `square` `[units, e]`: squared norm of every unit's gradient.

    A unit is a response, or a group of them. `inner` `[units, e, e]`: all pairwise inner products, where asked for.

    >>> policy = gl.policies.small("names", length=1)
    >>> from gradlab.moments import gradients
    >>> rollout = gl.Rollout.enumerated(gl.Scenario(policy, gl.policies.small("names", "few", length=1)))
    >>> moments = gl.backprop.pullback(policy, gradients([gl.ESTIMATORS["k2-loss"]], rollout), rollout.weight)
    >>> moments.total.shape == (1, len(policy.parameters)), moments.square.shape == (len(rollout.tokens), 1)
    (True, True)
    """

    total: Tensor
    square: Tensor
    inner: Tensor | None = None


_GRAMS: WeakKeyDictionary[LanguageModel, Tensor] = WeakKeyDictionary()


def pullback(policy: LanguageModel, batch: Gradients, weight: Tensor, unit: int = 1, pairs: bool = False) -> ParameterMoments:
    """Carry gradients with respect to logits back to the policy's parameters, a bounded chunk of sequences at a time.

    batch: gradients over a rollout of a language model, whose `prompts` say what was answered. weight `[n]`: of each response in
    `total`. unit: successive responses to one prompt whose gradients are summed before norms are taken. pairs: inner products
    between estimators, too. Raises `ValueError` for a rollout without prompts and for layers that are not known here.

    >>> policy = gl.policies.small("names", length=1)
    >>> rollout = gl.Rollout.enumerated(gl.Scenario(policy, gl.policies.small("names", "few", length=1)))
    >>> from gradlab.moments import gradients
    >>> moments = gl.backprop.pullback(policy, gradients([gl.ESTIMATORS["k1-loss"]], rollout), rollout.weight)
    >>> bool(moments.total.norm() < 1e-4 * (rollout.weight @ moments.square[:, 0]) ** 0.5)
    True
    """
    rollout = batch.rollout
    if rollout.prompts is None:
        raise ValueError(
            "parameter-space gradients need a rollout of a language model: this one does not say which prompts it answers"
        )
    # Blocks as large as those of a pass come and go all the time. What the C library of Linux keeps instead of handing it back to
    # the system, to be cleared page by page at the next use, grows with the largest block it has seen go: let it see one.
    torch.empty(LARGEST_KEPT, dtype=torch.uint8)
    n, t = rollout.tokens.shape
    e = len(batch.score)
    rows_per_chunk = unit * balanced_chunk_size(
        n // unit, units_per_pass(policy, cotangents_per_pass(batch) if unit == 1 else e, t, unit)
    )
    total = torch.zeros(e, len(policy.parameters), dtype=torch.float64)
    parameter_views = dict(
        zip(policy.weights, torch.split(total, [weight.numel() for weight in policy.weights.values()], 1), strict=True)
    )
    square = torch.zeros(n // unit, e, dtype=torch.float64)
    inner = torch.zeros(n // unit, e, e, dtype=torch.float64) if pairs else None
    for start in range(0, n, rows_per_chunk):
        part = slice(start, start + rows_per_chunk)
        for rows, ids in policy.sequences(rollout.prompts[part], rollout.tokens[part]):
            part_moments = Tape(policy, ids, t).pullback(batch, rows + start, weight, unit, pairs)
            units = (rows[::unit] + start) // unit
            for name, gradient in part_moments.sums.items():
                parameter_views[name].view(gradient.shape).add_(gradient.cpu())
            square[units] = part_moments.square
            if inner is not None and part_moments.inner is not None:
                inner[units] = part_moments.inner
    return ParameterMoments(total, square, inner)


def pullback_of(policy: LanguageModel) -> Pullback:
    """Weighted sums of gradients and of their squares in the parameters of a language model whose responses are listed.

    >>> gl.backprop.pullback_of(gl.policies.small("names", length=1)) is not None
    True
    """

    def sums_and_squares(batch: Gradients, weight: Tensor) -> tuple[Tensor, Tensor]:
        n, t = batch.rollout.tokens.shape
        sequences = len(policy.prompts) * policy.vocab ** (t - 1)
        if policy in _GRAMS or sequences * t * policy.vocab < n * cotangents_per_pass(batch):
            return mean_gradients(policy, batch.mean(weight)), weight @ squared_norms(policy, batch)
        moments = pullback(policy, batch, weight)
        return moments.total, weight @ moments.square

    return sums_and_squares


def mean_gradients(policy: LanguageModel, tables: Tensor) -> Tensor:
    """Gradients with respect to the table of a listed language model, `[e, rows · v]`, pulled back to its parameters, `[e, p]`.

    >>> policy = gl.policies.small("names", length=1)
    >>> gl.backprop.mean_gradients(policy, policy.table.new_zeros(3, policy.table.numel())).shape == (3, len(policy.parameters))
    True
    """
    with torch.enable_grad():
        theta = policy.parameters.detach().clone().requires_grad_(True)
        table = policy.with_parameters(theta).table.flatten()
        pulled_back = [torch.autograd.grad(table, theta, row.to(table.dtype), retain_graph=True)[0] for row in tables]
    return torch.stack(pulled_back).double()


def squared_norms(policy: LanguageModel, batch: Gradients) -> Tensor:
    """Squared norms `[n, e]` of gradients over a listed rollout: `cᵀ (J Jᵀ) c`, with `c` the cotangents of a response's logits.

    Responses that differ in their last token only are read off the same logits, so there are far fewer Jacobians than responses.

    >>> policy = gl.policies.small("names", length=1)
    >>> rollout = gl.Rollout.enumerated(gl.Scenario(policy, policy))
    >>> from gradlab.moments import gradients
    >>> norms = gl.backprop.squared_norms(policy, gradients([gl.ESTIMATORS["k1-loss"]], rollout))
    >>> norms.shape, bool((norms > 0).all())
    (torch.Size([27, 1]), True)
    """
    rollout = batch.rollout
    gram = logit_gram(policy)
    t = rollout.tokens.shape[1]
    prompt, node = rollout.contexts[:, -1] // policy.nodes, rollout.contexts[:, -1] % policy.nodes
    sequence = prompt * policy.vocab ** (t - 1) + node - (policy.nodes - policy.vocab ** (t - 1))
    squared = torch.zeros(len(sequence), len(batch.score), dtype=torch.float64)
    for rows in torch.split(torch.arange(len(sequence)), max(1, PASS_BYTES // (32 * gram.shape[1] ** 2))):
        grams = gram[sequence[rows]]
        basis, mixing_weights = basis_cotangents(batch, rows)
        cotangents = torch.stack(basis, 2)
        for e, mixing in enumerate(mixing_weights.permute(0, 2, 3, 1)[:, :, :, None]):
            c = mix(mixing, cotangents).flatten(1)[:, None]
            squared[rows, e] = (c @ grams @ c.mT)[:, 0, 0]
    return squared


def logit_gram(policy: LanguageModel) -> Tensor:
    """`J Jᵀ` of the logits `[t, v]` along every sequence of a listed language model, `[prompts · v^(T−1), t·v, t·v]`, float64.

    `J` is their Jacobian in the parameters; one backward pass per logit, for all sequences at once. Kept with the policy.

    >>> policy = gl.policies.small("names", length=1)
    >>> gl.backprop.logit_gram(policy).shape
    torch.Size([1, 27, 27])
    """
    if policy not in _GRAMS:
        t, v = policy.length, policy.vocab
        grid = torch.arange(v ** (t - 1))
        prefixes = torch.stack([grid // v ** (t - 2 - k) % v for k in range(t - 1)] + [torch.zeros_like(grid)], -1)
        x = len(policy.prompts)
        prompts, tokens = torch.arange(x).repeat_interleave(len(grid)), prefixes.repeat(x, 1)
        gram = torch.zeros(len(tokens), t * v, t * v, dtype=torch.float64)
        for part in torch.split(torch.arange(len(tokens)), units_per_pass(policy, t * v, t)):
            for rows, ids in policy.sequences(prompts[part], tokens[part]):
                gram[part[rows]] = Tape(policy, ids, t).gram()
        _GRAMS[policy] = gram
    return _GRAMS[policy]


def units_per_pass(policy: LanguageModel, passes: int, length: int, unit: int = 1) -> int:
    """How many units of responses of `length` tokens one pass may hold within `PASS_BYTES`.

    >>> policy = gl.policies.small("names")
    >>> gl.backprop.units_per_pass(policy, passes=1, length=10) > gl.backprop.units_per_pass(policy, passes=8, length=10)
    True
    """
    widths = [sum(trainable.layer.weight.shape) for trainable in trainable_layers(policy).values()]  # type: ignore[arg-type]
    positions = (max(len(prompt) for prompt in policy.prompts) + length - 1) * unit
    # A replay holds the cotangents of one layer at a time, and what becomes of them; a recording those of all layers.
    cotangents = 3 * max(widths) if replayable(policy) else sum(widths)
    return max(
        1,
        int(
            PASS_BYTES
            // (8 * (positions * (2 * sum(widths) + passes * cotangents) + 4 * passes * policy.vocab * length * unit))
        ),
    )


def balanced_chunk_size(n: int, most: int) -> int:
    """Size of the fewest parts of at most `most` of `n` things, all as large as one another, or nearly.

    >>> gl.backprop.balanced_chunk_size(100, 30)
    25
    """
    return -(-n // -(-n // most))
