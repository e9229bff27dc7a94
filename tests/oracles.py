"""Slow, obvious reference implementations that share no code with gradlab: plain loops over whole responses.

A tree policy is an array of logits [nodes, V], breadth-first, V^t rows at depth t = 0 … T−1: row V·n + 1 + v follows
token v at row n. `eos` is the token that ends a response (rows behind it exist and are unused), None if there is none.
An estimator is any object with the fields kernel, placement, credit, weight, differentiate_weight, truncate, clip,
normalise, clamp_log_ratio, clamp_value, gradient_kernel, baseline and group.
Everything is float64; gradients are flat, parameters row-major.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from oracles_gaussian import gaussian_moments as gaussian_moments
from torch import Tensor

Fold = Callable[[np.ndarray], np.ndarray]

#: Targets of the regulariser, in the order of gradlab's registry.
TARGETS = [
    "reverse_kl",
    "reverse_kl_frozen_prefix",
    "forward_kl",
    "forward_kl_frozen_prefix",
    "chi2_frozen_prefix",
    "mse",
    "mse_frozen_prefix",
    "k2_value",
    "inverse_length",
    "zero",
]
#: Schulman's table of estimators of KL(N(0, 1) ‖ N(m, 1)): m, kernel, relative bias, relative standard deviation.
SCHULMAN = [
    (0.1, "k1", "0", "20"),
    (0.1, "k2", "0.0025", "1.418"),
    (0.1, "k3", "0", "1.417"),
    (1.0, "k1", "0", "2"),
    (1.0, "k2", "0.25", "1.732"),
    (1.0, "k3", "0", "1.695"),
]


# ---------------------------------------------------------------------------------------------------- trees


def responses(vocab: int, length: int, eos: int | None = None) -> list[tuple[int, ...]]:
    """Every response: `length` tokens, or fewer when the last of them is the first `eos`."""
    found = []
    for size in range(1, length + 1):
        for y in itertools.product(range(vocab), repeat=size):
            if eos not in y[:-1] and (size == length or y[-1] == eos):
                found.append(y)
    return sorted(found)


def table(logits: Any) -> Tensor:
    """Logits as a [nodes, V] tensor; a bandit's [V] becomes one row."""
    rows = torch.as_tensor(logits, dtype=torch.float64)
    return rows.reshape(1, -1) if rows.ndim == 1 else rows


def length_of(logits: Any) -> int:
    """The maximal length T, from nodes = 1 + V + … + V^(T−1)."""
    nodes, vocab = table(logits).shape
    return next(t for t in range(1, nodes + 1) if sum(vocab**u for u in range(t)) == nodes)


def rows_along(logits: Any, tokens: Sequence[int]) -> list[Tensor]:
    """The log-softmax rows [V] at the prefixes of a response before each of its tokens."""
    node, rows = 0, []
    for token in tokens:
        rows.append(torch.log_softmax(table(logits)[node], dim=0))
        node = table(logits).shape[1] * node + 1 + token
    return rows


def log_probability(logits: Any, tokens: Sequence[int]) -> Tensor:
    """log π(y) of a response, or of a prefix."""
    return total([row[y] for row, y in zip(rows_along(logits, tokens), tokens, strict=True)])


def total(terms: Sequence[Tensor]) -> Tensor:
    """Σ, also of nothing."""
    return sum(terms, torch.tensor(0.0, dtype=torch.float64))


# ------------------------------------------------------------------------------- the per-response surrogate


def divergence(name: str, log_pi: Tensor, log_ref: Tensor) -> Tensor:
    """A divergence between two distributions over the vocabulary, from their log-probabilities [V]."""
    pi, ref = log_pi.exp(), log_ref.exp()
    if name in ("full", "reverse_kl"):
        return (pi * (log_pi - log_ref)).sum()
    if name == "forward_kl":
        return (ref * (log_ref - log_pi)).sum()
    if name == "chi2":
        return 0.5 * ((pi**2 / ref).sum() - 1)
    if name == "mse":
        return 0.5 * ((pi - ref) ** 2).sum()
    raise ValueError(name)


def kernel(name: str, log_pi: Tensor, log_ref: Tensor, clamp_log_ratio: Any = None, clamp_value: Any = None) -> Tensor:
    """k(ℓ), ℓ = log π(y) − log ref(y), of one token (or of a response, both summed), clamped before and after."""
    ell = log_pi - log_ref
    if clamp_log_ratio is not None:
        ell = ell.clamp(-clamp_log_ratio, clamp_log_ratio)
    if name == "k1":
        value = ell
    elif name == "k2":
        value = 0.5 * ell**2
    elif name == "k3":
        value = torch.expm1(-ell) + ell
    elif name == "abs":
        value = ell.abs()
    elif name == "k3_swapped":
        value = torch.expm1(ell) - ell
    elif name == "mse_sampled":  # π(y) − ref(y) − ref(y) ℓ, with π(y) = ref(y) e^ℓ
        value = log_ref.exp() * (torch.expm1(ell) - ell)
    else:
        raise ValueError(name)
    return value if clamp_value is None else value.clamp(-clamp_value, clamp_value)


@dataclass
class Steps:
    """One response: log-probabilities of its tokens, and the vocabulary kernels D_t; each a list over t of scalars."""

    log_pi: list[Tensor]
    log_ref: list[Tensor]
    log_mu: list[Tensor]
    vocabulary: dict[str, list[Tensor]]  # "full", "mse"


def steps(log_pi: list[Tensor], log_ref: list[Tensor], log_mu: list[Tensor], tokens: Sequence[int]) -> Steps:
    """From the log-softmax rows along a response (lists over t of [V])."""
    chosen = [[row[y] for row, y in zip(rows, tokens, strict=True)] for rows in (log_pi, log_ref, log_mu)]
    pairs = list(zip(log_pi, log_ref, strict=True))
    return Steps(*chosen, {name: [divergence(name, p, r) for p, r in pairs] for name in ("full", "mse")})


def values(e: Any, name: str, y: Steps) -> list[Tensor]:
    """k(ℓ_t) or D_t for every t; with credit `sequence` the one term k(S)."""
    if name in y.vocabulary:
        assert e.credit != "sequence"
        return y.vocabulary[name]
    clamps = e.clamp_log_ratio, e.clamp_value
    if e.credit == "sequence":
        return [kernel(name, total(y.log_pi), total(y.log_ref), *clamps)]
    return [kernel(name, p, r, *clamps) for p, r in zip(y.log_pi, y.log_ref, strict=True)]


def weights(e: Any, y: Steps) -> list[Tensor]:
    """W_t for every t (one W with credit `sequence`); for a vocabulary kernel `prefix` stops before t."""
    assert e.credit != "sequence" or e.weight in ("none", "sequence")
    ratios = [torch.exp(p - m) for p, m in zip(y.log_pi, y.log_mu, strict=True)]
    found = []
    for t in range(1 if e.credit == "sequence" else len(ratios)):
        past = ratios[:t] if e.kernel in y.vocabulary else ratios[: t + 1]
        factors = {"none": [], "token": [ratios[t]], "prefix": past, "sequence": ratios}[e.weight]
        w = math.prod(factors, start=torch.tensor(1.0, dtype=torch.float64))
        if e.truncate is not None and w > e.truncate:
            w = torch.full_like(w, e.truncate)
        found.append(w if e.differentiate_weight or e.clip is not None else w.detach())
    return found


def coefficients(e: Any, y: Steps) -> list[Tensor]:
    """What multiplies log π(y_t∣s_t) in the reward placements, before any baseline."""
    k, vocabulary = values(e, e.kernel, y), e.kernel in y.vocabulary
    if vocabulary and e.weight == "prefix":
        k = [w * d for w, d in zip(weights(e, y), k, strict=True)]
    if e.credit in ("token", "sequence"):
        return k
    if e.credit == "return":
        return [total(k) for _ in k]
    return [total(k[t + 1 :] if vocabulary else k[t:]) for t in range(len(k))]  # to_go; y_t cannot change D_t


def surrogate(e: Any, y: Steps, max_length: int, mean_length: float, group_baseline: float = 0.0) -> Tensor:
    """The surrogate loss of one response, a scalar."""
    scale = {"sum": 1.0, "mean": 1 / len(y.log_pi), "token_mean": 1 / mean_length, "fixed": 1 / max_length}
    log_probs = [total(y.log_pi)] if e.credit == "sequence" else y.log_pi
    loss, w = total([]), weights(e, y)

    if e.placement in ("reward", "loss+reward"):
        c = [(c_t - group_baseline).detach() for c_t in coefficients(e, y)]
        if e.baseline == "kl":
            c = [c_t - kl_t.detach() for c_t, kl_t in zip(c, y.vocabulary["full"], strict=True)]
        for t in range(len(c)):
            if e.clip is not None:
                advantage, clipped = -c[t], w[t].clamp(1 - e.clip, 1 + e.clip)
                loss = loss + torch.maximum(-w[t] * advantage, -clipped * advantage)
            elif e.kernel in y.vocabulary and e.weight == "prefix":
                loss = loss + c[t] * log_probs[t]  # the weight is in the coefficient, next to D_u
            else:
                loss = loss + w[t] * c[t] * log_probs[t]

    if e.placement in ("loss", "loss+reward"):
        for w_t, k_t in zip(w, values(e, e.kernel, y), strict=True):
            loss = loss + w_t * k_t

    if e.placement == "straight_through":
        unclamped = SimpleNamespace(**{**vars(e), "clamp_log_ratio": None, "clamp_value": None})  # clamps bound the value only
        shown, pulling = values(e, e.kernel, y), values(unclamped, e.gradient_kernel or "k2", y)
        for w_t, k_value, k_grad in zip(w, shown, pulling, strict=True):
            loss = loss + w_t * (k_grad + (k_value - k_grad).detach())

    return scale[e.normalise] * loss


# -------------------------------------------------------------------------------------------- exact moments


def moments(
    estimator: Any, logits: Any, reference: Any, behaviour: Any = None, eos: int | None = None, fold: Fold | None = None
) -> tuple[np.ndarray, float]:
    """Mean [p] and trace of the covariance of the per-response gradient, sampled from `behaviour` (None: the policy).

    `fold` maps each per-response gradient to other coordinates first. With a group baseline: of the average over a
    group of n independent responses, every group enumerated, and the trace multiplied by n.
    """
    theta = table(logits).detach().clone().requires_grad_(True)
    sampler = table(logits if behaviour is None else behaviour).detach()
    everything = responses(theta.shape[1], length_of(theta), eos)
    probability = [math.exp(log_probability(sampler, y)) for y in everything]
    mean_length = sum(p * len(y) for p, y in zip(probability, everything, strict=True))

    def at(i: int) -> Steps:
        y = everything[i]
        return steps(rows_along(theta, y), rows_along(reference, y), rows_along(sampler, y), y)

    def gradient(i: int, group_baseline: float = 0.0) -> np.ndarray:
        g = _gradient(surrogate(estimator, at(i), length_of(theta), mean_length, group_baseline), theta)
        return g if fold is None else fold(g)

    if estimator.baseline in (None, "kl"):
        return _mean_and_trace(probability, [gradient(i) for i in range(len(everything))])

    assert estimator.placement == "reward"
    assert estimator.credit in ("return", "sequence")
    rewards = [coefficients(estimator, at(i))[0].item() for i in range(len(everything))]

    @cache
    def centred_gradient(i: int, others: tuple[int, ...]) -> np.ndarray:
        compared = {"leave_one_out": others, "group_mean": (i, *others)}[estimator.baseline]
        return gradient(i, sum(rewards[j] for j in compared) / len(compared))

    joint, averages = [], []
    for group in itertools.product(range(len(everything)), repeat=estimator.group):
        members = [centred_gradient(i, tuple(sorted(group[:m] + group[m + 1 :]))) for m, i in enumerate(group)]
        joint.append(math.prod(probability[i] for i in group))
        averages.append(sum(members) / estimator.group)
    mean, trace = _mean_and_trace(joint, averages)
    return mean, estimator.group * trace


def value_moments(
    name: str, logits: Any, reference: Any, credit: str = "token", behaviour: Any = None, eos: int | None = None
) -> tuple[float, float]:
    """Mean and variance of Σ_t k(ℓ_t) (credit `token`) or k(S) (`sequence`) under the sampling policy."""
    sampler = table(logits if behaviour is None else behaviour)
    probability, found = [], []
    for y in responses(sampler.shape[1], length_of(sampler), eos):
        at = steps(rows_along(logits, y), rows_along(reference, y), rows_along(sampler, y), y)
        if credit == "sequence":
            found.append(kernel(name, total(at.log_pi), total(at.log_ref)))
        elif name in at.vocabulary:
            found.append(total(at.vocabulary[name]))
        else:
            found.append(total([kernel(name, p, r) for p, r in zip(at.log_pi, at.log_ref, strict=True)]))
        probability.append(math.exp(total(at.log_mu)))
    mean, variance = _mean_and_trace(probability, [np.array(float(v)) for v in found])
    return float(mean), variance


def _gradient(loss: Tensor, theta: Tensor) -> np.ndarray:
    if not loss.requires_grad:
        return np.zeros(theta.numel())
    return torch.autograd.grad(loss, theta)[0].numpy().ravel()


def _mean_and_trace(probability: list[float], samples: list[np.ndarray]) -> tuple[np.ndarray, float]:
    mean = sum(p * x for p, x in zip(probability, samples, strict=True))
    return mean, float(sum(p * np.sum((x - mean) ** 2) for p, x in zip(probability, samples, strict=True)))


# -------------------------------------------------------------------------------------------------- targets


def _objective(name: str, theta: Tensor, reference: Any, sampler: Tensor, eos: int | None) -> Tensor:
    terms, everything = [0.0 * theta.sum()], responses(theta.shape[1], length_of(theta), eos)
    if name.endswith("_frozen_prefix"):
        for prefix in sorted({y[:t] for y in everything for t in range(len(y))}):
            tokens = (*prefix, 0)  # any next token: only the row in front of it is used
            log_pi, log_ref = rows_along(theta, tokens)[-1], rows_along(reference, tokens)[-1]
            at_prefix = divergence(name.removesuffix("_frozen_prefix"), log_pi, log_ref)
            terms.append(log_probability(sampler, prefix).exp() * at_prefix)
        return total(terms)
    for y in everything:
        log_pi, log_ref = log_probability(theta, y), log_probability(reference, y)
        pi, ref, log_ratio = log_pi.exp(), log_ref.exp(), log_pi - log_ref
        of_response = {
            "reverse_kl": pi * log_ratio,
            "forward_kl": -ref * log_ratio,
            "mse": 0.5 * (pi - ref) ** 2,
            "k2_value": pi * 0.5 * log_ratio**2,
            "inverse_length": pi / len(y),
            "zero": 0 * pi,
        }
        terms.append(of_response[name])
    return total(terms)


def objective(name: str, logits: Any, reference: Any, behaviour: Any = None, eos: int | None = None) -> float:
    """The value of a target. To difference a frozen-prefix one, hold `behaviour` at the unperturbed logits."""
    sampler = table(logits if behaviour is None else behaviour)
    return float(_objective(name, table(logits), reference, sampler, eos))


def target(name: str, logits: Any, reference: Any, behaviour: Any = None, eos: int | None = None) -> np.ndarray:
    """The gradient [p] of a target by autograd; frozen prefixes come from `behaviour` (None: the policy)."""
    theta = table(logits).detach().clone().requires_grad_(True)
    sampler = table(logits if behaviour is None else behaviour).detach()
    return _gradient(_objective(name, theta, reference, sampler, eos), theta)


# --------------------------------------------------------------------------------------------------- Markov


def markov_as_tree(initial: Any, transition: Any, length: int) -> np.ndarray:
    """Tree logits of a Markov chain: `initial` [V] at the root, `transition[v]` in every row that follows token v."""
    vocab = len(initial)
    behind = [transition[(node - 1) % vocab] for node in range(1, sum(vocab**t for t in range(length)))]
    return np.array([initial, *behind], dtype=float)


def fold_markov(tree_gradient: np.ndarray, vocab: int, length: int) -> np.ndarray:
    """Gradient in (initial, transition), flattened [V + V·V], from the one in the logits of the tree."""
    folded = np.zeros((1 + vocab, vocab))
    for node, row in enumerate(np.reshape(tree_gradient, (sum(vocab**t for t in range(length)), vocab))):
        folded[0 if node == 0 else 1 + (node - 1) % vocab] += row
    return folded.ravel()
