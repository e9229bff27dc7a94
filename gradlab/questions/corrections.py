"""Rollout correction: what stands in the place of `Πρ` when an engine draws, its bias, its noise and its step, up to 512 tokens.

Responses of `T` tokens that are drawn independently from one distribution are told apart by how often each token occurs. With three
tokens that is 131,841 counts at 512 tokens, so that everything that depends on the tokens' ratios, on their product or on its geometric
mean is a sum over counts, exactly. The parameters are the logits, shared by all places: the score of a response is `counts − T π`. A
weight of prefixes depends on the order, and is for chains (`gl.measure`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import optimize, special

from gradlab._common.arguments import check_columns, checked
from gradlab._common.names import check_name, check_positive, check_whole, several
from gradlab._common.statistics import power_law
from gradlab._common.streams import generator
from gradlab.estimators.corrections import CORRECTIONS, Correction
from gradlab.estimators.policy_loss import PolicyLoss

Array = npt.NDArray[np.float64]

COLUMNS: dict[str, str] = {
    "scenario": "label of the setting",
    "mismatch": "how the engine differs",
    "token_kl": "KL(μ ‖ π) of a token, nats",
    "length": "tokens T of a response",
    "signal": "`reward` r − E_μ r, `KL in the reward` (k1 of the response, likewise), or `k3 beside` (as loss, per token)",
    "estimator": "name of the correction, and whether it is differentiated",
    "level": "what the weight is of",
    "bound": "none, truncate or mask",
    "differentiated": "whether the weight is differentiated",
    "via": "exact",
    "bias": "‖E g − ∇‖ / ‖∇‖",
    "step": "⟨E g, ∇⟩ / ‖∇‖²: the step along the gradient, 1 where it is unbiased",
    "cosine": "cosine between E g and ∇",
    "noise": "tr Cov(g) / ‖∇‖² of a response",
    "weight": "mean weight of a token",
    "share": "share of effective samples, (E f)² / E f², of tokens or of responses as the weight is of",
    "from_none": "‖E g − E g of no correction‖ / ‖∇‖",
    "relative": "bias over that of no correction; missing where that is rounding",
}

SIGNALS: tuple[str, ...] = ("reward", "KL in the reward", "k3 beside")
MISMATCHES = ("noise", "stale", "temperature", "nucleus")
#: Counts that are listed at most.
COUNTS = 2**20
#: Logarithm of a probability that is left out.
LOG_NEGLIGIBLE = math.log(1e-20)
#: Errors below this share of a gradient are rounding, and have no ratio.
ROUNDING = 1e-9
#: Nats per token between policy and reference.
REFERENCE_KL = 0.01


@dataclass(frozen=True, eq=False)
class Setting:
    """Probabilities `[v]` of a token under the policy, the reference and the engine that draws, and what the engine is.

    >>> engine = gl.corrections.setting("temperature", 0.01)
    >>> engine.name
    'temperature 0, 0.01 nats per token'
    """

    policy: Array
    reference: Array
    behaviour: Array
    mismatch: str
    token_kl: float
    name: str


@checked
def setting(mismatch: str, kl: float, seed: int = 0) -> Setting:
    """Three tokens under a random policy, a reference 0.01 nats away, and an engine with `KL(μ ‖ π) = kl` nats per token.

    mismatch: `noise` on the logits, as rounding to bfloat16 makes it · `stale`, the policy before a step up the reward's gradient ·
    `temperature`, a sharper one · `nucleus`, without the least likely token. A reward is 1 for a response with at least as many of the
    first token as the policy expects. Raises `ValueError` for an unknown mismatch and a KL that is not positive or cannot be reached.

    >>> engine = gl.corrections.setting("nucleus", 0.01)
    >>> bool(engine.behaviour[2] == 0), round(float(engine.policy[2]), 6)
    (True, 0.00995)
    """
    check_name("mismatch", mismatch, dict.fromkeys(MISMATCHES))
    check_positive("kl", kl)
    rng = generator(seed, "corrections")
    logits, noise, away = rng.standard_normal((3, 3))
    policy = _softmax(logits)
    if mismatch == "nucleus":
        rest = -math.expm1(-kl)  # the mass that is dropped: the engine's KL is −log of what is kept
        policy = np.array([*(policy[:2] / policy[:2].sum() * (1 - rest)), rest])
        behaviour = np.array([*(policy[:2] / policy[:2].sum()), 0.0])
    else:
        tilt = {"noise": noise, "stale": np.array([-1.0, 0.0, 0.0]), "temperature": np.log(policy)}[mismatch]
        behaviour = _tilted(policy, tilt, kl, behind=True)
    reference = _tilted(policy, away, REFERENCE_KL, behind=False)
    return Setting(policy, reference, behaviour, mismatch, kl, f"{mismatch} {seed}, {kl:g} nats per token")


def _softmax(logits: Array) -> Array:
    found: Array = special.softmax(logits)
    return found


def _tilted(policy: Array, direction: Array, kl: float, *, behind: bool) -> Array:
    """`∝ policy e^{s·direction}` with `KL(result ‖ policy) = kl` (`behind`), or `KL(policy ‖ result)`."""

    def at(size: float) -> Array:
        return _softmax(np.log(policy) + size * direction)

    def excess(size: float) -> float:
        other = at(size)
        return float(special.rel_entr(*((other, policy) if behind else (policy, other))).sum()) - kl

    high = 0.1
    while excess(high) < 0:
        high *= 2
        if high > 1e3:
            raise ValueError(f"no such engine is {kl:g} nats per token away; take a smaller KL")
    return at(float(optimize.brentq(excess, 0.0, high, xtol=1e-15)))


@checked
def counts(length: int, vocab: int = 3) -> Array:
    """How often each of `vocab` tokens can occur among `length`, `[m, v]`. Raises `ValueError` where there are too many ways.

    >>> gl.corrections.counts(2, 2).tolist()
    [[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]]
    """
    check_whole("length", length, least=1)
    check_whole("vocab", vocab, least=2)
    if math.comb(length + vocab - 1, vocab - 1) > COUNTS:
        raise ValueError(
            f"{length} tokens out of {vocab} can be counted in too many ways; take a shorter response, or two tokens"
        )
    found = np.zeros((1, 0), dtype=np.int64)
    for _ in range(vocab - 1):
        left = length - found.sum(1)
        index = np.repeat(np.arange(len(found)), left + 1)
        own = np.arange(len(index)) - np.repeat(np.cumsum(left + 1) - (left + 1), left + 1)
        found = np.column_stack([found[index], own])
    return np.column_stack([found, length - found.sum(1)]).astype(np.float64)


def _log_probability(occurring: Array, distribution: Array) -> Array:
    """`log` of the multinomial probability of counts `[m, v]`, `[m]`."""
    total = occurring.sum(1)
    ways = special.gammaln(total + 1) - special.gammaln(occurring + 1).sum(1)
    return np.asarray(ways + special.xlogy(occurring, distribution).sum(1), dtype=np.float64)


@checked
def as_loss(name: str) -> PolicyLoss:
    """REINFORCE with a correction by its name, for `gl.measure` on a scenario with `old=`, which may be the policy itself.

    >>> gl.corrections.as_loss("sequence-truncated").correction_truncate
    2.0
    """
    check_name("correction", name, CORRECTIONS)
    each: Any = CORRECTIONS[name]
    return PolicyLoss("reward", correction=each.level, correction_truncate=each.truncate, correction_mask=each.mask)


@checked
def moments(
    names: Sequence[str],
    settings: Sequence[Setting],
    lengths: Sequence[int],
    signals: Sequence[str] = SIGNALS,
) -> pd.DataFrame:
    """Bias, noise and step of corrections, exactly: one row per setting × length × signal × correction × differentiation, see `COLUMNS`.

    A differentiated weight has the gradient `∇f(W)`, through the tokens that the weight is of. On a reward that is the detached
    `f ∇log π` but where it is truncated: only those rows are there twice. On k3 as loss it differs everywhere.
    Raises `ValueError` for an unknown name or signal, for a weight of prefixes, and for counts that are too many.

    >>> frame = gl.corrections.moments(["none", "sequence"], [gl.corrections.setting("stale", 0.01)], [8], ["reward"])
    >>> frame.set_index("estimator")["bias"].lt(1e-9).to_dict()
    {'none': False, 'sequence': True}
    """
    for name in names:
        check_name("correction", name, CORRECTIONS)
        if CORRECTIONS[name].level == "prefix":
            raise ValueError(
                f"{name} depends on the order of tokens, which counts do not have; measure it on a chain: as_loss({name!r})"
            )
    rows = []
    for each in _settings(settings):
        for length in several(lengths):
            check_whole("a length", length, least=1)
            known = [each.name, each.mismatch, each.token_kl, length]
            for signal in signals:
                check_name("signal", signal, dict.fromkeys(SIGNALS))
                rows += [[*known, signal, *row] for row in _Responses(each, length).rows(names, signal)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _settings(given: Sequence[Setting]) -> list[Setting]:
    found: list[Setting] = several(given)
    for each in found:
        if not isinstance(each, Setting):
            raise ValueError(f"a setting is made by gl.corrections.setting(mismatch, kl), got {each!r:.60}")
    return found


class _Responses:
    """All counts of a setting and a length that matter, and their probabilities."""

    def __init__(self, of: Setting, length: int):
        self.of, self.length = of, length
        every = counts(length, len(of.policy))
        drawn, truth = _log_probability(every, of.behaviour), _log_probability(every, of.policy)
        # What neither policy says, nor the square of a weight, is left out: in all it is less than NEGLIGIBLE times the counts.
        with np.errstate(invalid="ignore"):
            square = np.where(drawn > -np.inf, 2 * truth - drawn, -np.inf)
        self.every = every[truth > LOG_NEGLIGIBLE]
        self.truth = np.exp(truth[truth > LOG_NEGLIGIBLE])
        keep = (drawn > -np.inf) & (np.maximum(np.maximum(drawn, truth), square - square.max()) > LOG_NEGLIGIBLE)
        self.counts, self.probability = every[keep], np.exp(drawn[keep])
        live = of.behaviour > 0
        self.ratio = np.where(live, of.policy / np.where(live, of.behaviour, 1.0), 1.0)
        self.total = self.counts @ np.log(self.ratio)

    def rewards(self, occurring: Array) -> Array:
        return np.asarray(occurring[:, 0] >= np.ceil(self.length * self.of.policy[0]), dtype=np.float64)

    def scores(self, occurring: Array) -> Array:
        """`Σ_t x_t ∇log π_t` of counts that are weighted by token, `[m, v]`."""
        return np.asarray(occurring - occurring.sum(1, keepdims=True) * self.of.policy)

    def target(self, signal: str) -> Array:
        """The true gradient `[v]`, to be descended."""
        if signal == "reward":
            return -np.asarray(self.truth * self.rewards(self.every) @ self.scores(self.every))
        ell = np.log(self.of.policy / self.of.reference)
        return np.asarray(self.length * self.of.policy * (ell - self.of.policy @ ell))

    def weights(self, correction: Correction) -> tuple[Array, Array]:
        """`f` of every token `[m or 1, v]`, and of its logarithm's derivative where it is differentiated."""
        with np.errstate(over="ignore"):
            raw = {
                "none": np.ones((1, 1)), "token": self.ratio[None], "sequence": np.exp(self.total)[:, None],
                "geometric": np.exp(self.total / self.length)[:, None],
            }[correction.level]  # fmt: skip
        f = correction.bounded(raw)
        slope = np.where(f == raw, raw, 0.0) if correction.level != "none" else np.zeros_like(raw)
        return f, slope

    def gradients(self, correction: Correction, signal: str, differentiated: bool) -> Array:
        """The gradient of every response, `[m, v]`."""
        f, slope = self.weights(correction)
        if signal != "k3 beside":
            own = -self.rewards(self.counts) if signal == "reward" else self.counts @ np.log(self.of.policy / self.of.reference)
            gain = own - self.probability @ own
            return np.asarray(gain[:, None] * self.scores(self.counts * (slope if differentiated and correction.bounds else f)))
        ell = np.log(self.of.policy / self.of.reference)
        values, through = np.expm1(-ell) + ell, -np.expm1(-ell)
        found = self.scores(self.counts * f * through)
        if not differentiated:
            return found
        if correction.level == "token":
            return np.asarray(found + self.scores(self.counts * slope * values))
        share = 1 / self.length if correction.level == "geometric" else 1.0
        return np.asarray(found + share * slope * (self.counts @ values)[:, None] * self.scores(self.counts))

    def effective(self, correction: Correction) -> tuple[float, float]:
        """Mean weight and share of effective samples, of tokens or of responses."""
        f = self.weights(correction)[0]
        own, values = (self.of.behaviour, f[0]) if correction.level == "token" else (self.probability, f[:, 0])
        mean, square = (float((own * values**power).sum()) for power in (1, 2))
        return mean, mean**2 / square if square > 0 else float("nan")

    def rows(self, names: Sequence[str], signal: str) -> list[list[Any]]:
        """What `moments` says of every correction."""
        target, p = self.target(signal), self.probability
        size = float(np.linalg.norm(target))
        none = p @ self.gradients(CORRECTIONS["none"], signal, False)
        least = float(np.linalg.norm(none - target)) / size
        found = []
        for name in names:
            correction = CORRECTIONS[name]
            bound = "truncate" if correction.truncate is not None else "mask" if correction.mask is not None else "none"
            # A differentiated weight on a reward is the detached one but where it is truncated.
            twice = correction.level != "none" if signal == "k3 beside" else bound == "truncate"
            for differentiated in (False, True) if twice else (False,):
                g = self.gradients(correction, signal, differentiated)
                mean = p @ g
                norm, along = float(np.linalg.norm(mean)), float(mean @ target)
                bias = float(np.linalg.norm(mean - target)) / size
                found.append([
                    f"{name}, differentiated" if differentiated else name, correction.level, bound, differentiated, "exact", bias,
                    along / size**2, along / size / norm if norm > ROUNDING * size else float("nan"),
                    float(p @ np.square(g - mean).sum(1)) / size**2, *self.effective(correction),
                    float(np.linalg.norm(mean - none)) / size, bias / least if least > ROUNDING else float("nan"),
                ])  # fmt: skip
        return found


BOUND_COLUMNS: dict[str, str] = {
    "scenario": "label of the setting",
    "mismatch": "how the engine differs",
    "token_kl": "KL(μ ‖ π) of a token, nats",
    "length": "tokens T of a response",
    "estimator": "`classical` T(T−1) D, `Pinsker-marginal` 4/3 T^{3/2} D, `mixed` 2T √(D D_seq)",
    "via": "exact",
    "gap": "largest |J(π) − J(μ) − surrogate| of any reward from 0 to 1",
    "limit": "the bound",
    "slack": "bound / gap",
}


@checked
def growth(frame: pd.DataFrame) -> pd.DataFrame:
    """How the largest error of the surrogate grows with the length: the exponent of `gap ∝ T^exponent` in every setting.

    Reads a frame of `bounds` with two or more lengths; columns `scenario, mismatch, token_kl, exponent, via`.

    >>> frame = gl.corrections.bounds([gl.corrections.setting("stale", 0.0001)], [16, 64])
    >>> gl.corrections.growth(frame)["exponent"].between(0.9, 1.1).tolist()
    [True]
    """
    check_columns(frame, "scenario", "mismatch", "token_kl", "length", "estimator", "gap")
    rows = []
    for scenario, part in frame.groupby("scenario", sort=False):
        one = part[part["estimator"] == part["estimator"].iloc[0]]
        slope, *_ = power_law(one["length"].to_numpy(dtype=np.float64), one["gap"].to_numpy())
        rows.append([scenario, part["mismatch"].iloc[0], part["token_kl"].iloc[0], float(slope), "exact"])
    return pd.DataFrame(rows, columns=["scenario", "mismatch", "token_kl", "exponent", "via"])


@checked
def bounds(settings: Sequence[Setting], lengths: Sequence[int]) -> pd.DataFrame:
    """Bounds of arXiv 2512.23075 on the error of the token-level surrogate, against the largest error that any reward has, exactly.

    The surrogate `E_μ[R Σ_t (ρ_t − 1)]` errs by `E_μ[R z]`, `z = Πρ − 1 − Σ_t (ρ_t − 1)`, which is linear in `R`; `E_μ z = 0`, so that
    over rewards from 0 to 1 it is at most `½ E_μ|z|`, and reaches it. One row per setting × length × bound, see `BOUND_COLUMNS`.
    Raises `ValueError` for an engine without the policy's support.

    >>> frame = gl.corrections.bounds([gl.corrections.setting("stale", 0.001)], [64])
    >>> bool((frame["slack"] > 1).all())
    True
    """
    rows = []
    for each in _settings(settings):
        if (each.behaviour == 0).any():
            raise ValueError(
                f"{each.name} lacks a token that the policy has, so that no surrogate holds; leave the nucleus out"
            )
        for length in several(lengths):
            check_whole("a length", length, least=2)
            responses = _Responses(each, length)
            z = np.expm1(responses.total) - responses.counts @ (responses.ratio - 1)
            gap = 0.5 * float(responses.probability @ np.abs(z))
            d = each.token_kl
            limits = {
                "classical": length * (length - 1) * d,
                "Pinsker-marginal": 4 / 3 * length**1.5 * d,
                "mixed": 2 * length * (d * length * d) ** 0.5,
            }
            known = [each.name, each.mismatch, d, length]
            rows += [[*known, name, "exact", gap, limit, limit / gap] for name, limit in limits.items()]
    return pd.DataFrame(rows, columns=list(BOUND_COLUMNS))
