"""Surrogates as linear recursions over the tokens of a response: the form in which they decompose over time.

Scalar states of the response so far (1, the weight `w = Π ρ`, sums of kernels …) are mapped linearly by every token. Each
entry of that map is a `Step`: its value over (row, token), and its derivatives along the score and along the gradient of a
vocabulary kernel; what a surrogate detaches has derivative 0. `gradlab.solvers.markov` turns such a recursion into moments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from gradlab.estimators.coefficients import coefficients
from gradlab.estimators.estimator import Estimator, kernel_values
from gradlab.estimators.kernels import KERNELS, curvature
from gradlab.moments import Loss
from gradlab.rollout import Rollout

ZERO = torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True)
class Step:
    """A function of one step, `[r, v]` over (row, token), with its derivatives along the score `φ` and along `δ`."""

    value: Tensor
    score: Tensor = ZERO
    direct: Tensor = ZERO

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The entries it gives `C`, `C'` and `C°`."""
        return self.value, self.score, self.direct

    @property
    def has_gradient(self) -> bool:
        """Whether a gradient enters here."""
        return bool(self.score.any() or self.direct.any())

    def __add__(self, other: Step) -> Step:
        return Step(*(a + b for a, b in zip(self.parts, other.parts, strict=True)))

    def __mul__(self, other: Step) -> Step:
        (a, *da), (b, *db) = self.parts, other.parts
        return Step(a * b, *(a * y + x * b for x, y in zip(da, db, strict=True)))

    def equals(self, other: Step) -> bool:
        """Whether value and derivatives are the same numbers everywhere, as copies are; only time hangs on it, never a result."""
        return all(bool((a == b).all()) for a, b in zip(self.parts, other.parts, strict=True))


ONE, NOTHING = Step(ZERO + 1), Step(ZERO)

#: Each state's new value from the old ones: `rows[new][old]` is an entry of `C`, `C'` and `C°`.
Rows = dict[str, dict[str, Step]]

#: States that start at 1; all others start at 0.
INITIALLY_ONE = ("1", "w", "u", "u of c")


@dataclass(frozen=True)
class Recursion:
    """A surrogate: the sum of the states `surrogate`.

    With a group baseline, before which it is a product, also the states of its factors: the response's `coefficient`, and
    `score_sum` for `Σ_t W_t log π_t`.
    """

    rows: Rows
    surrogate: tuple[str, ...]
    coefficient: str = "1"
    score_sum: str | None = None


def why_not_decomposable(loss: Loss) -> str | None:
    """Which part of a loss does not decompose over time, or `None`."""
    if not isinstance(loss, Estimator):
        name = getattr(loss, "__name__", type(loss).__name__)
        return f"only a gl.Estimator says how it decomposes over time; {name} is an arbitrary function of a rollout"
    if loss.truncate is not None and loss.weight in ("prefix", "sequence"):
        return f"truncate={loss.truncate:g} bounds a {loss.weight!r} weight, which does not decompose over time"
    if loss.clip is not None and (loss.weight, loss.credit) != ("token", "token"):
        return (
            f"clip with weight={loss.weight!r} and credit={loss.credit!r} decides on several tokens at once: it does not "
            "decompose over time (weight='token' with credit='token' does)"
        )
    if loss.credit == "sequence" and not KERNELS[loss.kernel].decomposable:
        others = ", ".join(name for name, kernel in KERNELS.items() if kernel.decomposable)
        return f"{loss.kernel!r} of a whole response's log-ratio does not decompose over time ({others} do)"
    if loss.credit == "sequence" and not (loss.clamp_log_ratio is None and loss.clamp_value is None):
        return "a clamp with credit='sequence' bounds the finished sum: it does not decompose over time (on tokens it does)"
    return None


def recursion(e: Estimator, at: Rollout) -> Recursion:
    """The estimator's surrogate, from all single steps `at`."""
    raw, bound = _grid(at.log_weight.exp(), at), torch.inf if e.truncate is None else e.truncate
    slope = torch.where(raw <= bound, raw, 0.0) if e.differentiate_weight else ZERO
    ratio = Step(raw.clamp(max=bound), slope)
    return _merged((_of_response if e.credit == "sequence" else _of_tokens)(e, at, ratio))


def _of_tokens(e: Estimator, at: Rollout, ratio: Step) -> Recursion:
    """Credits `token`, `to_go`, `return`: `G` accumulates the surrogate, `P` the weighted `log π`, `K` the kernel.

    `Σ_t Σ_u W_t log π_t k_u` splits into each step with itself, its `k` with the past `P` (`to_go`) and its `log π` with the
    past `K` (`return`). A `prefix` weight is carried along by `K`, or by `P` where it stays with a vocabulary kernel.
    """
    stays = e.on_vocabulary and e.weight == "prefix"
    w, carry = ("w" if e.weight in ("prefix", "sequence") else "1"), (ratio if e.weight == "prefix" else ONE)
    weighs = e.weight in ("token", "prefix") and not stays  # the step's own ratio is part of its weight
    local = replace(e, credit="token", normalise="sum", baseline=None if e.grouped else e.baseline, group=None)
    weighting: dict[str, Any] = {"weight": "none", "differentiate_weight": False, "truncate": None}
    local = replace(local, **({"weight": "token"} if weighs else weighting))
    rows: Rows = {w: {w: carry}, "G": {"G": ONE, w: _term(local, at)}}
    if e.credit != "token":
        k, log_prob = kernel_step(e, at), (ratio if weighs else ONE) * _log_prob(at)
        of_score, of_kernel = (carry, ONE) if stays else (ONE, carry)
        rows["P"] = {"P": of_score, w: of_score * log_prob}
        rows["K"] = {"K": of_kernel, w: of_kernel * k}
        rows["G"]["P"] = k
        if e.credit == "return":
            rows["G"]["K"] = log_prob
        elif e.on_vocabulary:  # y_t cannot change D_t, so only the loss has a term of the step with itself
            rows["G"][w] = _term(replace(local, placement="loss"), at) if e.placement == "loss+reward" else NOTHING
    if e.weight == "sequence":
        rows = _weighted(rows, ratio)
    if not e.grouped:
        return Recursion(rows, ("G",))
    rows |= {"c": {"c": ONE, w if stays else "1": kernel_step(e, at)}, "Λ": {"Λ": ONE, "1": _log_prob(at)}}
    return Recursion(rows, ("G",), "c", "Λ" if stays else "P")


def _of_response(e: Estimator, at: Rollout, ratio: Step) -> Recursion:
    """The recursion of credit `sequence`.

    With `Λ = log π(y)`, a loss `W k(S)` has the gradient of `sg(W k'(S)) Λ`, or of `W sg(k(S) + k'(S))` when `W` is
    differentiated; a reward is `W sg(k(S)) Λ`. So the kernel's states stay detached, with and without a factor `Λ`.
    """
    kernel, log_prob = whole_kernel(e.kernel, at, "u"), _log_prob(at)
    rows: Rows = {**kernel, "w": {"w": ONE}, "P": {"P": ONE, "w": log_prob}}
    for name, row in kernel.items():
        rows[f"{name}Λ"] = {f"{old}Λ": step for old, step in row.items()} | {old: step * log_prob for old, step in row.items()}
    if e.weight == "sequence":
        rows = _weighted(rows, ratio)
    slope = "u" if KERNELS[e.kernel].additive else "d"
    of_loss = ("k", slope) if e.differentiate_weight else (f"{slope}Λ",)
    surrogate = (*(of_loss if e.placement != "reward" else ()), *(("kΛ",) if e.placement != "loss" else ()))
    if not e.grouped:
        return Recursion(rows, surrogate)
    return Recursion(rows | whole_kernel(e.kernel, at, "u of c", " of c"), surrogate, "k of c", "P")


def whole_kernel(name: str, at: Rollout, unit: str, tag: str = "") -> Rows:
    """`k(S)` as state `k` and `k'(S)` as state `d`, detached.

    A kernel is additive, or it has an addition theorem

        k(S + ℓ) = k(S) + k'(S) k'(ℓ) / k''(0) + k(ℓ),    k'(S + ℓ) = g(ℓ) k'(S) + k'(ℓ)

    with its `growth` `g`, in which nothing is lost to rounding near `S = 0`.
    """
    kernel, k, d = KERNELS[name], f"k{tag}", f"d{tag}"
    x, log_ref = _grid(at.log_ratio, at), _grid(at.reference_log_prob, at)
    # A function of ℓ times ref(y) is one of ℓ alone where ref is 1; the product over tokens brings ref back.
    log_ref_factor = torch.zeros_like(log_ref) if kernel.times_reference else log_ref
    rows: Rows = {k: {k: ONE, unit: Step(kernel.value(x, log_ref_factor))}, unit: {unit: ONE}}
    if kernel.growth is not None:
        slope = kernel.derivative(x, log_ref_factor)
        rows[k][d], rows[d] = Step(slope / curvature(kernel)), {d: Step(kernel.growth(x)), unit: Step(slope)}
    return _weighted(rows, Step(log_ref.exp())) if kernel.times_reference else rows


def _weighted(rows: Rows, factor: Step) -> Rows:
    """All states times a running product."""
    return {name: {old: step * factor for old, step in row.items()} for name, row in rows.items()}


def _term(local: Estimator, at: Rollout) -> Step:
    """A per-token surrogate at every single step."""
    term = coefficients(local, at)
    direct = ZERO if term.direct is None else _grid(term.direct, at)
    return Step(_grid(local(at), at), _grid(term.score, at), direct)


def kernel_step(e: Estimator, at: Rollout) -> Step:
    """The kernel of every single step, detached."""
    return Step(_grid(kernel_values(e, at), at))


def _log_prob(at: Rollout) -> Step:
    """`log π`, whose derivative is the score itself."""
    return Step(_grid(at.log_prob, at), ONE.value)


def _grid(values: Tensor, at: Rollout) -> Tensor:
    return values.reshape(at.table.shape)


def _merged(given: Recursion) -> Recursion:
    """Identify states that start and continue alike, such as 1 and a detached weight on-policy."""
    rows = {"1": {"1": ONE}} | given.rows
    merged_into = {name: name for name in rows}

    def renamed(row: dict[str, Step], old: str, new: str) -> dict[str, Step]:
        others = {name: step for name, step in row.items() if name != old}
        return others | {new: row[old] + others.get(new, NOTHING)} if old in row else others

    def alike(a: str, b: str) -> bool:
        one, two = renamed(rows[a], b, a), renamed(rows[b], b, a)
        return (
            (a in INITIALLY_ONE) == (b in INITIALLY_ONE)
            and one.keys() == two.keys()
            and all(one[old].equals(two[old]) for old in one)
        )

    while pair := next((pair for pair in combinations(rows, 2) if alike(*pair)), None):
        a, b = pair
        rows = {name: renamed(row, b, a) for name, row in rows.items() if name != b}
        merged_into = {name: a if state == b else state for name, state in merged_into.items()}
    score_sum = None if given.score_sum is None else merged_into[given.score_sum]
    return Recursion(rows, tuple(merged_into[state] for state in given.surrogate), merged_into[given.coefficient], score_sum)
