"""Choosing β from one dump with rewards: the frontier of reward against KL, the β of a budget, and equivalent coefficients.

The optimum of `E r − β KL(π‖ref)` is `π_β ∝ ref exp(r/β)`, prompt by prompt. Responses drawn by `μ` are turned into its own by the weights
`w ∝ (ref/μ) exp(r/β)`, normalised within each prompt. Then `E_β r = Σ w r / Σ w` and `KL(π_β‖ref) = E_β r / β − log mean w`. The guard is
the effective sample size `(Σw)²/Σw²`: beyond what the responses hold no β can be judged from them.

Source: exponential tilting and self-normalised importance sampling, Owen, Monte Carlo theory, methods and examples (2013), ch. 9;
the optimum as in arXiv 2510.20817.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import optimize

from gradlab._common.names import check_name, check_positive, check_probability
from gradlab.estimators.coefficients import coefficients
from gradlab.records.means import mean
from gradlab.records.scored import estimators, rollouts
from gradlab.records.table import Records
from gradlab.records.totals import clusters

Array = npt.NDArray[Any]

#: Least share of effective samples, and the largest share of the KL that may be bias, with which a row is reliable.
WORTH, BIASED = 0.5, 0.1
#: Values of β that are looked at if none are given, in units of the rewards' standard deviation.
GRID = 2.0 ** np.arange(-6, 7, 0.25)
#: What multiplies the coefficients of a response: sum, 1/L, one mean over tokens, 1/T.
NORMALISERS: tuple[Literal["sum", "mean", "token_mean", "fixed"], ...] = ("sum", "mean", "token_mean", "fixed")

COLUMNS: dict[str, str] = {
    "beta": "coefficient of the KL of whole responses",
    "reward": "expected reward of the optimum at this β", "reward_low": "lower end", "reward_high": "upper end",
    "kl": "its KL from the reference, nats per response", "kl_low": "lower end", "kl_high": "upper end",
    "worth": "effective share of the responses of a prompt, mean over prompts",
    "bias": "of the KL, by leaving out each response",
    "reliable": "whether the responses hold enough of the optimum: worth ≥ 0.5, bias ≤ 0.1 KL, and intervals that hold",
}  # fmt: skip


def frontier(records: Records, betas: Iterable[float] | None = None, level: float = 0.95) -> pd.DataFrame:
    """Reward and KL of the optimum at every β, one row each; columns in `gradlab.records.choosing.COLUMNS`.

    Responses of one group (`group_id`, or `prompt_id`) answer one prompt; without groups all do. Raises `ValueError` without rewards,
    a reference or the sampler's log-probabilities, for rewards that are all equal, and for β that are not positive.

    >>> records = gl.Records.from_arrays(  # four answers, drawn alike by policy and reference
    ...     logprob=[[-1.386]] * 4, ref_logprob=[[-1.386]] * 4, reward=[0.0, 0.0, 1.0, 1.0])
    >>> gl.records.frontier(records, [1.0])[["reward", "kl"]].round(3).values.tolist()  # e/(1 + e)
    [[0.731, 0.111]]
    """
    check_probability("level", level)
    data = _Tilted.of(records)
    chosen = GRID * data.reward.std() if betas is None else np.array([float(b) for b in betas])
    for beta in chosen.tolist():
        check_positive("beta", beta)
    return pd.DataFrame([data.row(float(beta), level) for beta in chosen], columns=list(COLUMNS))


def budget(records: Records, kl: float, level: float = 0.95) -> dict[str, Any]:
    """The row of `frontier` whose KL is `kl`, nats per response.

    Raises `ValueError` as `frontier` does, and where no β has that KL by these responses.

    >>> records = gl.Records.from_arrays(logprob=[[-1.386]] * 4, ref_logprob=[[-1.386]] * 4, reward=[0.0, 0.0, 1.0, 1.0])
    >>> round(gl.records.budget(records, 0.111)["beta"], 2)
    1.0
    """
    check_positive("kl", kl)
    data = _Tilted.of(records)
    ends = np.array([1e-4, 1e4]) * data.reward.std()
    most, least = (data.kl(beta) for beta in ends.tolist())
    if not least < kl < most:
        raise ValueError(
            f"by these responses the KL of an optimum lies between {least:.3g} and {most:.3g} nats per response; got a budget of {kl:g}"
        )
    low, high = np.log(ends).tolist()
    beta = float(np.exp(optimize.brentq(lambda x: data.kl(float(np.exp(x))) - kl, low, high, xtol=1e-10)))
    return data.row(beta, level)


def equivalents(records: Records, beta: float, base: str = "k2-loss", normalise: str = "sum") -> pd.DataFrame:
    """Coefficients at which estimators pull on these responses as hard as `base` at `beta`: `estimator, normalise, coefficient`.

    Equally hard means the same mean of `Σ_t |c_t|`, what the estimator multiplies the scores of a response by. Raises `ValueError` for
    an estimator that needs more than log-probabilities of the drawn tokens, and without a reference.

    >>> records = gl.Records.from_arrays(logprob=[[-1.0, -2.0]], ref_logprob=[[-1.5, -1.5]])
    >>> frame = gl.records.equivalents(records, beta=0.1)
    >>> frame.query("estimator == 'k2-loss'")["coefficient"].round(3).tolist()  # sum, mean, token_mean, fixed: two tokens each
    [0.1, 0.2, 0.2, 0.2]
    """
    check_positive("beta", beta)
    known = {name: e for name, e in estimators().items() if e.normalise == "sum"}
    check_name("estimator", base, known)
    check_name("normaliser", normalise, NORMALISERS)
    policy, behaviour = _policies(records)
    forms = {(name, n): replace(e, normalise=n) for name, e in known.items() for n in NORMALISERS}
    lengths = np.concatenate([block.live for block in records])
    longest, mean_length = int(lengths.max()), float(lengths[lengths > 0].mean())
    pulls: dict[tuple[str, str], float] = dict.fromkeys(forms, 0.0)
    for block in records:
        kept = block.take(block.known(*{policy, "ref_logprob", behaviour}))
        for _, rollout in rollouts(
            kept, policy, "ref_logprob", None if behaviour == policy else behaviour, longest, mean_length
        ):
            for key, form in forms.items():
                pulls[key] += float((coefficients(form, rollout).score.abs() * rollout.mask_float).sum())
    whole = beta * pulls[base, normalise]
    rows = [(name, n, whole / pull if pull else np.nan) for (name, n), pull in pulls.items()]
    return pd.DataFrame(rows, columns=["estimator", "normalise", "coefficient"])


def _policies(records: Records) -> tuple[str, str]:
    """The policy, and that of the engine (or of the trainer when the batch was made)."""
    own = next((name for name in ("logprob", "old_logprob", "behaviour_logprob") if name in records.columns), None)
    if own is None or "ref_logprob" not in records.columns:
        raise ValueError(
            f"this needs log-probabilities of the policy and of the reference; the records hold {', '.join(records.columns)}"
        )
    return own, next((name for name in ("behaviour_logprob", "old_logprob") if name in records.columns), own)


class _Tilted:
    """Rewards `[n]`, `log ref − log μ` of responses, and the number of their prompt."""

    def __init__(self, reward: Array, log_ratio: Array, prompt: Array) -> None:
        order = np.argsort(prompt, kind="stable")
        self.reward, self.log_ratio = reward[order], log_ratio[order]
        _, self.prompt, self.count = np.unique(prompt[order], return_inverse=True, return_counts=True)
        self.start = np.concatenate([[0], np.cumsum(self.count)[:-1]])

    @classmethod
    def of(cls, records: Records) -> _Tilted:
        _, sampler = _policies(records)
        if "reward" not in records.columns:
            raise ValueError(f"a frontier of reward against KL needs rewards; the records hold {', '.join(records.columns)}")
        parts = []
        for block in records:
            known = block.known("ref_logprob", sampler) & np.isfinite(
                block["reward"] if "reward" in block else np.full(len(block), np.nan)
            )
            first, kept = block.first + np.flatnonzero(known), block.take(known)
            if len(kept):
                gap = np.where(kept.mask, kept["ref_logprob"] - kept[sampler], 0.0)
                grouped = "group_id" in kept or "prompt_id" in kept
                parts.append(
                    (kept["reward"], kept.sums(gap), clusters(kept, first) if grouped else np.zeros(len(kept), dtype=np.uint64))
                )
        if not parts:
            raise ValueError("no response has a reward and finite log-probabilities of sampler and reference")
        found = cls(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        if not np.ptp(found.reward):
            raise ValueError("all rewards are equal: no β changes the optimum")
        return found

    def _parts(self, beta: float) -> tuple[Array, Array, Array]:
        """Weights relative to their mean `[n]`, and expected reward and `log mean w` of every prompt `[k]`."""
        log_w = self.reward / beta + self.log_ratio
        top = np.maximum.reduceat(log_w, self.start)
        w = np.exp(log_w - top[self.prompt])
        level = np.add.reduceat(w, self.start) / self.count
        w = w / level[self.prompt]
        return w, np.add.reduceat(w * self.reward, self.start) / self.count, top + np.log(level)

    def kl(self, beta: float) -> float:
        """Mean KL over the prompts' responses."""
        _, reward, log_z = self._parts(beta)
        return float(np.average(reward / beta - log_z, weights=self.count))

    def row(self, beta: float, level: float) -> dict[str, Any]:
        w, reward, log_z = self._parts(beta)
        squares = np.add.reduceat(w**2, self.start)
        worth = float(np.average(self.count / squares, weights=self.count))
        # Residuals of the two ratios, response by response, beside the prompts' own values.
        along = w * (self.reward - reward[self.prompt])
        prompt_kl = reward / beta - log_z
        values = {
            "reward": reward[self.prompt] + along,
            "kl": prompt_kl[self.prompt] + along / beta - (w - 1),
        }
        found = {name: mean(x, np.ones(len(x)), self.prompt, level) for name, x in values.items()}
        bias = self._bias(beta, w, reward)
        held = all(m.reliable for m in found.values())
        row: dict[str, Any] = {"beta": beta}
        for name, m in found.items():
            row |= {name: m.value, f"{name}_low": m.low, f"{name}_high": m.high}
        return row | {
            "worth": worth,
            "bias": bias,
            "reliable": held and worth >= WORTH and abs(bias) <= BIASED * abs(row["kl"]),
        }

    def _bias(self, beta: float, w: Array, reward: Array) -> float:
        """Bias of the mean KL by the jackknife, prompt by prompt; a prompt with one response tells nothing and has none."""
        n = self.count[self.prompt]
        several = n > 1
        rest = np.where(several, (n - w) / np.maximum(n - 1, 1), 1.0)
        total = reward[self.prompt] * n - w * self.reward
        with np.errstate(divide="ignore", invalid="ignore"):
            left_out = total / (np.maximum(n - 1, 1) * rest) / beta - np.log(rest)
        # Against the prompt's own normaliser, which both have.
        change = np.where(several & (rest > 0), left_out - reward[self.prompt] / beta, 0.0)
        each = (self.count - 1) * np.add.reduceat(change, self.start) / self.count
        return float(np.average(each, weights=self.count))
