"""Slow, obvious reference implementations of the whole objective: plain loops over responses and over groups of them.

They share no code with gradlab. Policies are arrays of logits as in `oracles`; a reward is a dictionary from responses to numbers.
"""

import itertools
import math
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracles
import torch
from torch import Tensor

Response = tuple[int, ...]


def probability(logits: Any, y: Response) -> Tensor:
    """π(y)."""
    return oracles.log_probability(logits, y).exp()


def differentiate(function: Callable[[Tensor], Tensor], logits: Any) -> Tensor:
    """Gradient, flat."""
    leaf = torch.as_tensor(logits, dtype=torch.float64).clone().requires_grad_(True)
    (found,) = torch.autograd.grad(function(leaf), leaf)
    return found.flatten()


def objective(name: str, logits: Any, reference: Any, reward: dict[Response, float], eos: int | None, **given: Any) -> Tensor:
    """A target of the whole objective, to be descended, as a sum over all responses."""
    vocab, length = oracles.table(logits).shape[1], oracles.length_of(logits)
    everything = oracles.responses(vocab, length, eos)
    p = {y: probability(logits, y) for y in everything}
    expected = sum((p[y] * reward[y] for y in everything), torch.zeros(()))
    if name == "reward":
        return -expected
    if name == "regularised":
        kl = sum(p[y] * (p[y].log() - oracles.log_probability(reference, y)) for y in everything)
        return -expected + given["beta"] * kl
    if name == "pass_at_k":  # one minus the probability that all of k draws fail
        return (1 - expected) ** given["k"] - 1
    if name == "entropy":
        return sum((p[y] * p[y].log() for y in everything), torch.zeros(()))
    raise AssertionError(name)


# ------------------------------------------------------------------------------------------------- whole losses
# A loss is any object with the fields of gl.PolicyLoss; `worlds` is (policy, reference, behaviour, old, eos) as logits.


def advantage(loss: Any, values: list[float], i: int, constants: tuple[float, float] | None) -> float:
    """The advantage of response i of a group, in plain arithmetic."""
    size = len(values)
    mean = sum(values) / size
    others = [x for j, x in enumerate(values) if j != i]
    if callable(loss.advantage):
        return float(loss.advantage(torch.tensor([values]))[0, i])
    if loss.advantage == "reward":
        return values[i]
    if loss.advantage == "leave_one_out":
        return values[i] - sum(others) / (size - 1)
    if loss.advantage == "mean":
        return values[i] - mean
    if loss.advantage == "group_std":
        if all(x == values[0] for x in values):
            return 0.0
        spread = sum((x - mean) ** 2 for x in values) / (size if loss.std == "population" else size - 1)
        return (values[i] - mean) / (spread**0.5 + loss.epsilon)
    if loss.advantage == "batch_std":
        return (values[i] - constants[0]) / (constants[1] + loss.epsilon)
    if loss.advantage == "mean_batch_std":
        return (values[i] - mean) / (constants[1] + loss.epsilon)
    if loss.advantage == "pass_at_k":
        if values[i] == 1:
            return float(loss.k)
        subsets = list(itertools.combinations(others, loss.k - 1))
        return loss.k * sum(any(x == 1 for x in subset) for subset in subsets) / len(subsets)
    raise AssertionError(loss.advantage)


KERNELS = {
    "k1": lambda x: x,
    "k2": lambda x: x**2 / 2,
    "k3": lambda x: (-x).exp() - 1 + x if isinstance(x, Tensor) else math.exp(-x) - 1 + x,
}


class Along:
    """What the policies say of one response, the trained one's part differentiable."""

    def __init__(self, world: tuple[Any, ...], logits: Tensor, y: Response):
        _, reference, behaviour, old, _ = world
        self.y, self.length = y, len(y)
        self.pi, self.ref, self.mu, self.old = (
            [row[token] for row, token in zip(oracles.rows_along(table, y), y, strict=True)]
            for table in (logits, reference, behaviour, old)
        )
        self.ell = [p - r for p, r in zip(self.pi, self.ref, strict=True)]


def level(name: str, steps: list[Tensor]) -> list[Tensor]:
    """A log-ratio for every token."""
    total, size = sum(steps), len(steps)
    return {
        "none": [0 * total] * size,
        "token": steps,
        "prefix": [sum(steps[: t + 1]) for t in range(size)],
        "sequence": [total] * size,
        "geometric": [total / size] * size,
    }[name]


def own_value(loss: Any, reward: float, along: Along) -> float:
    """r, or r − βk."""
    if loss.combine == "before":
        reward -= loss.beta * sum(float(KERNELS[loss.regulariser.kernel](x.detach())) for x in along.ell)
    return reward


def kl_advantage(loss: Any, along: Along, t: int) -> float:
    """The kernel that token t is charged with, by the regulariser's credit."""
    e, k = loss.regulariser, [float(KERNELS[loss.regulariser.kernel](x.detach())) for x in along.ell]
    if e.credit == "sequence":
        return float(KERNELS[e.kernel](sum(along.ell).detach()))
    return {"token": k[t], "to_go": sum(k[t:]), "return": sum(k)}[e.credit]


def policy_term(loss: Any, along: Along, a: list[float]) -> Tensor:
    """−Σ_t c min(W A, clip(W) A), trust regions written out case by case."""
    numerator = along.pi
    denominator = along.mu if loss.bypass else along.old
    steps = [p - q for p, q in zip(numerator, denominator, strict=True)]
    logs = level(loss.ratio, steps)
    corrections = level(loss.correction, [o - m for o, m in zip(along.old, along.mu, strict=True)])
    gap = float(sum(m - p for m, p in zip(along.mu, along.pi, strict=True)).detach()) / along.length
    total = 0 * along.pi[0]
    for t in range(along.length):
        c = float(corrections[t].exp().detach())
        if loss.correction_mask is not None and not loss.correction_mask[0] <= c <= loss.correction_mask[1]:
            c = 0.0
        if loss.correction_truncate is not None:
            c = min(c, loss.correction_truncate)
        w, gain = float(logs[t].exp().detach()), c * a[t]
        if loss.negative_mask is not None and a[t] < 0 and gap > loss.negative_mask:
            continue
        if loss.mask is not None and not loss.mask[0] <= w <= loss.mask[1]:
            continue
        if loss.truncate is not None:
            total = total - min(w, loss.truncate) * gain * along.pi[t]
            continue
        if loss.clip is None:
            total = total - w * gain * along.pi[t]
            continue
        low, high = 1 - loss.clip[0], 1 + loss.clip[1]
        if loss.clip_form == "detached":
            total = total - min(max(w, low), high) * gain * along.pi[t]
        elif loss.clip_form == "geometric":
            ratios = [float(s.exp().detach()) for s in steps]
            # min(ρ A, clip(ρ) A) = min(ρ, high) A for A > 0 and max(ρ, low) A for A < 0
            bounded = [min(x, high) if gain > 0 else max(x, low) for x in ratios]
            if bounded[t] == ratios[t]:
                total = total - math.prod(bounded) ** (1 / along.length) * gain * along.pi[t]
        else:
            # the smaller of two numbers, and the gradient of the one that it is
            smaller = min(w * gain, min(max(w, low), high) * gain)
            passes = smaller == w * gain
            if loss.dual_clip is not None and gain < 0 and loss.dual_clip * gain > smaller:
                passes = False
            if passes:
                total = total - w * gain * along.pi[t]
    return total


def response_loss(loss: Any, world: tuple[Any, ...], logits: Tensor, y: Response, a: float) -> Tensor:
    """The surrogate of one response with advantage a, up to normalisation."""
    along = Along(world, logits, y)
    gains = [a] * along.length
    if loss.combine == "after":
        gains = [a - loss.beta * kl_advantage(loss, along, t) for t in range(along.length)]
    total = policy_term(loss, along, gains)
    if loss.combine == "separate" and loss.regulariser is not None:
        e = loss.regulariser
        for t in range(along.length):
            weight = (along.pi[t] - along.mu[t]).exp() if e.weight == "token" else 1.0
            if e.placement == "loss":
                k = KERNELS[e.kernel](along.ell[t])
                total = total + loss.beta * (weight if e.differentiate_weight else getattr(weight, "detach", lambda: 1.0)()) * k
            else:
                total = total + loss.beta * kl_advantage(loss, along, t) * along.pi[t]
    if loss.combine == "head":
        own = SimpleNamespace(**{name: getattr(loss, name) for name in loss.__dataclass_fields__})
        if loss.regulariser.weight != "none":
            own.ratio, clip = loss.regulariser.weight, loss.regulariser.clip
            own.clip = None if clip is None else (clip, clip)
            own.clip_form, own.dual_clip, own.truncate, own.mask, own.negative_mask = "min", None, None, None, None
        total = total + policy_term(own, along, [-loss.beta * kl_advantage(loss, along, t) for t in range(along.length)])
    return total


def normaliser(loss: Any, y: Response, length: int, mean_length: float) -> float:
    """1, 1/L, 1/E L or 1/T."""
    return {"sum": 1.0, "mean": 1 / len(y), "token_mean": 1 / mean_length, "fixed": 1 / length}[loss.normalise]


def batch_constants(loss: Any, values: dict[Response, float], mu: dict[Response, float]) -> tuple[float, float]:
    """Mean and standard deviation that a large batch divides by."""
    mean = sum(mu[y] * values[y] for y in mu)
    variance = sum(mu[y] * (values[y] - mean) ** 2 for y in mu)
    return mean, (variance * (1 - 1 / loss.group if loss.advantage == "mean_batch_std" else 1)) ** 0.5


def group_moments(loss: Any, world: tuple[Any, ...], reward: dict[Response, float]) -> tuple[np.ndarray, float]:
    """Mean gradient and `G` times the covariance trace of a group's average, by a loop over all groups of G responses."""
    policy, _, behaviour, _, eos = world
    vocab, length = oracles.table(policy).shape[1], oracles.length_of(policy)
    everything = oracles.responses(vocab, length, eos)
    logits = torch.as_tensor(policy, dtype=torch.float64)
    mu = {y: float(probability(behaviour, y)) for y in everything}
    mean_length = sum(mu[y] * len(y) for y in everything)
    values = {y: own_value(loss, reward[y], Along(world, logits, y)) for y in everything}
    constants = batch_constants(loss, values, mu)

    @cache
    def gradient(y: Response, a: float) -> np.ndarray:
        found = differentiate(lambda leaf: response_loss(loss, world, leaf, y, a), logits)
        return found.numpy() * normaliser(loss, y, length, mean_length)

    size, mean, second = loss.group or 1, 0.0, 0.0
    for group in itertools.product(everything, repeat=size):
        share = math.prod(mu[y] for y in group)
        held = [values[y] for y in group]
        average = sum(gradient(y, advantage(loss, held, i, constants)) for i, y in enumerate(group)) / size
        mean, second = mean + share * average, second + share * float(average @ average)
    return mean, size * (second - float(mean @ mean))
