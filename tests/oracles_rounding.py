"""Objectives, gradients and estimators of small categorical policies in 60 digits, by listing responses; nothing from gradlab."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import mpmath as mp

#: Digits of the arithmetic.
DIGITS = 60

Vector = list[mp.mpf]


def softmax(row: Sequence[float]) -> Vector:
    top = max(row)
    grown = [mp.exp(mp.mpf(z) - mp.mpf(top)) for z in row]
    return [x / mp.fsum(grown) for x in grown]


class World:
    """Policy, reference and sampler as tables of float64 logits, taken as they are; `row(prefix)` says which row emits next."""

    def __init__(
        self,
        policy: Sequence[Sequence[float]],
        reference: Sequence[Sequence[float]],
        sampler: Sequence[Sequence[float]] | None,
        row: Callable[[tuple[int, ...]], int],
        length: int,
        eos: int | None = None,
    ) -> None:
        self.p, self.q = ([softmax(x) for x in table] for table in (policy, reference))
        self.m = self.p if sampler is None else [softmax(x) for x in sampler]
        self.row, self.length, self.v = row, length, len(policy[0])
        ended = [y for t in range(1, length + 1) for y in product(range(self.v), repeat=t) if self._complete(y, length, eos)]
        #: Every response as its (row, token) pairs.
        self.responses = [[(row(y[:t]), y[t]) for t in range(len(y))] for y in ended]

    @staticmethod
    def _complete(y: tuple[int, ...], length: int, eos: int | None) -> bool:
        return eos not in y[:-1] and (len(y) == length or y[-1] == eos)

    def probability(self, table: Sequence[Vector], response: list[tuple[int, int]]) -> mp.mpf:
        return mp.fprod(table[r][y] for r, y in response)

    def zero(self) -> Vector:
        return [mp.mpf(0)] * (len(self.p) * self.v)

    def add_score(self, into: Vector, r: int, y: int, a: mp.mpf) -> None:
        for u in range(self.v):
            into[r * self.v + u] += a * ((u == y) - self.p[r][u])

    def add_slope(self, into: Vector, r: int, pull: Callable[[mp.mpf, mp.mpf], mp.mpf], a: mp.mpf) -> None:
        """`a` times the gradient of `Σ_v f(p)`, `pull(p, q) = f'(p)`."""
        p, pulls = self.p[r], [pull(p, q) for p, q in zip(self.p[r], self.q[r], strict=True)]
        mean = mp.fsum(x * y for x, y in zip(p, pulls, strict=True))
        for u in range(self.v):
            into[r * self.v + u] += a * p[u] * (pulls[u] - mean)

    def steps(self, response: list[tuple[int, int]]) -> Vector:
        return [mp.log(self.p[r][y]) - mp.log(self.q[r][y]) for r, y in response]


def kernel(name: str, x: mp.mpf, q: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    """Value and derivative along `log π` of a kernel at the log-ratio `x` of a token of reference probability `q`."""
    return {
        "k1": (x, mp.mpf(1)),
        "k2": (x * x / 2, x),
        "k3": (mp.exp(-x) - 1 + x, 1 - mp.exp(-x)),
        "abs": (abs(x), mp.sign(x)),
        "k3_swapped": (mp.exp(x) - 1 - x, mp.exp(x) - 1),
        "mse_sampled": (q * (mp.exp(x) - 1 - x), q * (mp.exp(x) - 1)),
    }[name]


#: `f'(p)` of the row divergences `Σ_v f(p(v))`, and `f` itself.
DIVERGENCES: dict[str, tuple[Callable[..., mp.mpf], Callable[..., mp.mpf]]] = {
    "reverse_kl": (lambda p, q: mp.log(p / q), lambda p, q: p * mp.log(p / q)),
    "forward_kl": (lambda p, q: -q / p, lambda p, q: q * mp.log(q / p)),
    "chi2": (lambda p, q: p / q, lambda p, q: (p - q) ** 2 / q / 2),
    "mse": (lambda p, q: p - q, lambda p, q: (p - q) ** 2 / 2),
}


def objective(world: World, name: str) -> tuple[mp.mpf, Vector]:
    """Value and gradient of a target."""
    gradient, value = world.zero(), mp.mpf(0)
    if name.endswith("_frozen_prefix"):
        pull, f = DIVERGENCES[name.removesuffix("_frozen_prefix")]
        for response in world.responses:
            w = world.probability(world.m, response)
            for r, _ in response:
                value += w * mp.fsum(f(p, q) for p, q in zip(world.p[r], world.q[r], strict=True))
                world.add_slope(gradient, r, pull, w)
        return value, gradient
    for response in world.responses:
        p, q = world.probability(world.p, response), world.probability(world.q, response)
        x = mp.log(p) - mp.log(q)
        along, f = {  # what multiplies ∇log π(y), and the response's share of the value
            "reverse_kl": (p * x, p * x),
            "forward_kl": (-q, -q * x),
            "mse": ((p - q) * p, (p - q) ** 2 / 2),
            "k2_value": (p * (x * x / 2 + x), p * x * x / 2),
            "inverse_length": (p / len(response), p / len(response)),
        }[name]
        value += f
        for r, y in response:
            world.add_score(gradient, r, y, along)
    return value, gradient


def moments(world: World, sample: Callable[[World, list[tuple[int, int]]], Vector]) -> tuple[Vector, mp.mpf]:
    """Mean and covariance trace of the gradient `sample(world, response)`."""
    weights = [world.probability(world.m, response) for response in world.responses]
    gradients = [sample(world, response) for response in world.responses]
    mean = [mp.fsum(w * g[j] for w, g in zip(weights, gradients, strict=True)) for j in range(len(world.zero()))]
    apart = [mp.fsum((a - b) ** 2 for a, b in zip(g, mean, strict=True)) for g in gradients]
    return mean, mp.fsum(w * d for w, d in zip(weights, apart, strict=True))


def as_loss(name: str, weight: str = "none") -> Callable[[World, list[tuple[int, int]]], Vector]:
    """`Σ_t W_t k(ℓ_t)`, the weight differentiated: `none`, `token` or `prefix`."""

    def sample(world: World, response: list[tuple[int, int]]) -> Vector:
        found, x, running = world.zero(), world.steps(response), mp.mpf(1)
        for t, (r, y) in enumerate(response):
            k, slope = kernel(name, x[t], world.q[r][y])
            ratio = world.p[r][y] / world.m[r][y]
            running *= ratio
            w = {"none": mp.mpf(1), "token": ratio, "prefix": running}[weight]
            world.add_score(found, r, y, w * slope)
            through = {"none": [], "token": [(r, y)], "prefix": response[: t + 1]}[weight]
            for row, token in through:
                world.add_score(found, row, token, w * k)
        return found

    return sample


def in_reward(name: str, credit: str = "to_go") -> Callable[[World, list[tuple[int, int]]], Vector]:
    """`Σ_t sg(k) log π_t` with the kernel of the token, or of all from it on."""

    def sample(world: World, response: list[tuple[int, int]]) -> Vector:
        found = world.zero()
        k = [kernel(name, x, world.q[r][y])[0] for x, (r, y) in zip(world.steps(response), response, strict=True)]
        for t, (r, y) in enumerate(response):
            world.add_score(found, r, y, k[t] if credit == "token" else mp.fsum(k[t:]))
        return found

    return sample


def of_sequence(name: str) -> Callable[[World, list[tuple[int, int]]], Vector]:
    """`k(S)` of the whole response's log-ratio as a loss."""

    def sample(world: World, response: list[tuple[int, int]]) -> Vector:
        found = world.zero()
        slope = kernel(name, mp.fsum(world.steps(response)), world.probability(world.q, response))[1]
        for r, y in response:
            world.add_score(found, r, y, slope)
        return found

    return sample


def on_vocabulary(name: str, complete: bool = False) -> Callable[[World, list[tuple[int, int]]], Vector]:
    """`Σ_t D(s_t)` of a row divergence as a loss; `complete`: with its score-function term over earlier tokens."""

    def sample(world: World, response: list[tuple[int, int]]) -> Vector:
        pull, f = DIVERGENCES[name]
        found = world.zero()
        for t, (r, _) in enumerate(response):
            world.add_slope(found, r, pull, mp.mpf(1))
            if complete:
                d = mp.fsum(f(p, q) for p, q in zip(world.p[r], world.q[r], strict=True))
                for row, token in response[:t]:
                    world.add_score(found, row, token, d)
        return found

    return sample
