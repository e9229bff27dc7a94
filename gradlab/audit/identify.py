"""Identification: which objective's gradient, or which combination of two, an expected gradient is in every world at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy
import torch
from torch import Tensor

from gradlab.audit.candidates import WITHOUT_REFERENCE, candidate_gradients, words
from gradlab.audit.divergences import FAMILIES, Family, gradient, of_family, top
from gradlab.audit.engine import ExpectedGradient
from gradlab.audit.worlds import AuditScenario

#: Scopes in which a match can hold, from the widest; each says what it excludes.
SCOPES = {
    "everywhere": "",
    "not far": "near and at a moderate distance from the reference, but not far from it",
    "near": "close to the reference and the sampler only",
    "equal lengths": "as long as all responses have one length, here 2",
    "equal lengths, near": "near the reference, as long as all responses have one length, here 2",
}


#: The largest relative error that the randomness of a loss can excuse, and that its rounding can.
MAX_NOISE_ERROR, MAX_ROUNDING_ERROR = 0.1, 0.02
#: The least that either of two objectives has to contribute, where 1e3 tolerances are more.
MIN_SHARE = 0.3
#: Parameters of a family that are tried, and the sine of an angle from which on its gradient is looked at more closely.
GRID, PARALLEL = 25, 0.2
#: A mean is known to within this many standard errors or rounding errors.
STANDARD_ERRORS = 5
#: Where the worlds are.
PLACES = {"near": "near", "moderate": "at a moderate distance from", "far": "far from"}

_Fit = tuple[dict[str, float], float]
#: Name → gradient `[p]` of every objective that a mean is compared with in a world.
Candidates = Callable[[AuditScenario], dict[str, Tensor]]


@dataclass(frozen=True)
class Identification:
    """What an expected gradient is.

    combination: objective → coefficient; empty when nothing matches. error: largest relative error over the worlds. scope: a
    key of `SCOPES`, `everywhere` unless the match is limited. closest, cosine: the objective whose gradient points most nearly
    the same way and the mean cosine with it. text: all of it in words. resolved: false when rounding hides the answer.

    >>> found = gl.audit.Identification({"reverse_kl": 0.5}, 1e-12, "everywhere", "reverse_kl", 1.0, "half of the reverse KL")
    >>> found.combination
    {'reverse_kl': 0.5}
    """

    combination: dict[str, float]
    error: float
    scope: str
    closest: str
    cosine: float
    text: str
    resolved: bool = True

    @property
    def name(self) -> str:
        """The combination as a formula of names, `none`, or `unresolved`; a limited scope is in brackets."""
        if not self.combination:
            return "none" if self.resolved else "unresolved"
        return formula(self.combination) + ("" if self.scope == "everywhere" else f" [{self.scope}]")

    @property
    def scale(self) -> float:
        """The factor in front of a single objective; NaN for a combination, 0 for a gradient that is zero."""
        if self.combination == {"zero": 1.0}:
            return 0.0
        return next(iter(self.combination.values())) if len(self.combination) == 1 else float("nan")

    def descends(self, target: str) -> bool:
        """Whether it is a positive multiple of the gradient of `target`, everywhere."""
        names = [name.partition("@")[0] for name in self.combination]
        return self.scope == "everywhere" and names == [target] and next(iter(self.combination.values())) > 0


def formula(parts: dict[str, float]) -> str:
    """`reverse_kl − forward_kl`: names, with coefficients other than 1 where there are two."""
    if len(parts) == 1:
        name, c = next(iter(parts.items()))
        return name if c > 0 else f"−{name}"
    return " ".join(
        ("" if c > 0 and not i else "+ " if c > 0 else "−" if not i else "− ") + ("" if abs(abs(c) - 1) < 1e-5 else f"{abs(c):.4g}·") + name
        for i, (name, c) in enumerate(parts.items())
    )  # fmt: skip


def identify(
    groups: Iterable[tuple[str, Sequence[ExpectedGradient]]],
    tolerance: float,
    rounding: Callable[[ExpectedGradient], float] = lambda _: 0.0,
    candidates: Candidates = candidate_gradients,
) -> Identification:
    """Find the simplest explanation in the widest scope: zero, one objective, up to three of them; in words if there is none.

    groups: scope → fields of the worlds in which it has to hold, from the widest scope on. rounding: the norm of the rounding
    error in the mean of a field, asked for where nothing matches to `tolerance`: where terms that nearly cancel make it larger,
    a match is as good as that error allows, and where it exceeds the mean the verdict is `unresolved`.
    """
    closest, cosine, hidden = "", float("nan"), None
    for scope, expected_gradients in groups:
        if not all(expected.finite for expected in expected_gradients):
            continue
        if not closest:
            closest, cosine = _closest(expected_gradients, candidates)
        noise = max(
            STANDARD_ERRORS * expected.error / (float(expected.mean.norm()) or expected.size or 1.0)
            for expected in expected_gradients
        )
        bound = max(tolerance, min(noise, MAX_NOISE_ERROR))
        if all(
            float(expected.mean.norm())
            <= max(tolerance * expected.size, min(STANDARD_ERRORS * expected.error, MAX_NOISE_ERROR * expected.size))
            for expected in expected_gradients
        ):
            silent = all(expected.size == 0 for expected in expected_gradients)
            reason = (
                "no gradient reaches the policy at all"
                if silent
                else "gradients of single responses are not 0, but they cancel"
            )
            where = f" {SCOPES[scope]}" if SCOPES[scope] else ""
            return Identification({"zero": 1.0}, 0.0, scope, "zero", float("nan"), f"is zero{where}: {reason}")
        fit, within = (
            _fit(expected_gradients, [bound] * len(expected_gradients), candidates),
            "the noise of a random loss" if bound > tolerance else "",
        )
        if fit is None:
            fit, within, hidden_now = _within_rounding(expected_gradients, bound, rounding, candidates)
            hidden = hidden_now if hidden is None else hidden
        if fit is not None:
            combination, error = fit
            text = _words(combination, error, scope)
            if within:
                text = text.replace("equals", f"agrees, within {within}, with", 1)
            return Identification(combination, error, scope, closest, cosine, text)
    if hidden:
        return Identification({}, float("nan"), "everywhere", closest, cosine, hidden, resolved=False)
    if not closest:
        text = "is not a number: the loss has NaN or infinite gradients near and far from the reference"
    else:
        text = f"equals the gradient of no known objective; the closest is {words(closest)}, cosine {cosine:.4f}"
    return Identification({}, float("nan"), "everywhere", closest, cosine, text)


def _within_rounding(
    expected_gradients: Sequence[ExpectedGradient],
    bound: float,
    rounding: Callable[[ExpectedGradient], float],
    candidates: Candidates,
) -> tuple[_Fit | None, str, str]:
    """What fits to within rounding, and how far that reaches; or, when rounding hides what fits, that in words."""
    norms = [float(expected.mean.norm()) for expected in expected_gradients]
    relative = [
        error and error / (norm or 1e-300) for error, norm in zip(map(rounding, expected_gradients), norms, strict=True)
    ]
    bounds = [max(bound, STANDARD_ERRORS * r) for r in relative]
    fit = _fit(expected_gradients, bounds, candidates) if max(bounds) > bound else None
    if fit is None:
        return None, "", ""  # whatever the rounding may have been
    resolved = [
        (expected, b) for expected, b in zip(expected_gradients, bounds, strict=True) if b <= max(bound, MAX_ROUNDING_ERROR)
    ]
    if len(resolved) == len(expected_gradients):
        return fit, f"the rounding of the loss, {max(relative):.0e} of its expected gradient", ""
    resolved_fit = _fit([expected for expected, _ in resolved], [b for _, b in resolved], candidates) if resolved else None
    hidden = [
        f"{PLACES[expected.case.name]} the reference the rounding of the loss is {r:.2g} times its expected gradient, whose norm is "
        f"{norm:.1e}, and {r * norm / expected.size:.0e} of the gradient of single batches"
        for expected, r, norm in zip(expected_gradients, relative, norms, strict=True)
        if STANDARD_ERRORS * r > max(bound, MAX_ROUNDING_ERROR)
    ]
    elsewhere = f"; elsewhere it {_words(*resolved_fit, 'everywhere')}" if resolved_fit else ""
    return None, "", f"is not resolved: {'; '.join(hidden)}{elsewhere}"


def _fit(expected_gradients: Sequence[ExpectedGradient], bounds: Sequence[float], candidates: Candidates) -> _Fit | None:
    """Coefficients of the first single objective, or else pair, or else three, that fits all fields jointly, each to its relative bound."""
    tolerance = min(bounds)
    relative_weights, weights, goal = _joint(expected_gradients, bounds)
    lengths = [len(expected.mean) for expected in expected_gradients]
    columns: dict[str, Tensor] = {}
    known_gradients = [candidates(expected.case) for expected in expected_gradients]
    for name in known_gradients[0]:
        column = torch.cat([w * known[name] for w, known in zip(weights, known_gradients, strict=True)])
        # On-policy and for equal lengths some objectives coincide or vanish; the first one stands for all.
        duplicates = (float((column - known).norm()) <= 1e-12 * float(known.norm()) for known in columns.values())
        if float(column.norm()) > 1e-12 * float(goal.norm()) and not any(duplicates):
            columns[name] = column
    # In one world a pair can fit by accident: any function of the length is a sum of the length and its inverse there.
    for size in (1, 2, 3) if len(expected_gradients) > 1 else (1,):
        matches = []
        for names in itertools.combinations(columns, size):
            basis = torch.stack([columns[name] for name in names], -1)
            coefficients = torch.linalg.lstsq(basis, goal[:, None], driver="gelsd").solution[:, 0]
            errors = [float(part.norm()) for part in (goal - basis @ coefficients).split(lengths)]
            # All parts have to matter, or a pair would pass for an imprecise single.
            small = (coefficients.abs() * basis.norm(dim=0)).min() <= min(1e3 * tolerance, MIN_SHARE)
            if max(errors) <= tolerance and not (size > 1 and bool(small)):
                error = max(e / relative_weight for e, relative_weight in zip(errors, relative_weights, strict=True))
                matches.append((dict(zip(names, coefficients.tolist(), strict=True)), error))
        if matches:
            return min(matches, key=lambda match: match[1]) if size == 1 else matches[0]
        if size == 1 and len(expected_gradients) > 1 and candidates is candidate_gradients:
            divergence = _divergence(expected_gradients, bounds)
            if divergence is not None:
                return divergence
    return None


def _joint(expected_gradients: Sequence[ExpectedGradient], bounds: Sequence[float]) -> tuple[list[float], list[float], Tensor]:
    """Relative and absolute weights of the worlds, and what is to be explained in all of them, one after the other."""
    tolerance = min(bounds)
    # Every world counts alike, whatever the size of its gradient, unless it is less well known.
    relative_weights = [tolerance / bound for bound in bounds]
    weights = [
        s / max(float(f.mean.norm()), tolerance * f.size) for s, f in zip(relative_weights, expected_gradients, strict=True)
    ]
    return relative_weights, weights, torch.cat([w * f.mean for w, f in zip(weights, expected_gradients, strict=True)])


def _divergence(expected_gradients: Sequence[ExpectedGradient], bounds: Sequence[float]) -> _Fit | None:
    """A divergence with a parameter, or over the likeliest tokens, that fits all fields jointly."""
    _, weights, goal = _joint(expected_gradients, bounds)
    cases = [expected.case for expected in expected_gradients]

    def far(family: Family, parameter: float) -> float:
        """Sine of the angle between what is to be explained and a member's gradient."""
        column = torch.cat([w * of_family(family, parameter, case) for w, case in zip(weights, cases, strict=True)])
        norm = float(column @ column)
        return float((goal - (float(goal @ column) / norm) * column).norm() / goal.norm()) if norm > 0 else 1.0

    def fits(name: str) -> _Fit | None:
        # A name of its own: `_fit` looks for further divergences among the objectives of an audit only.
        return _fit(expected_gradients, bounds, lambda case: {name: gradient(name, case)})

    for name in top(cases[0].vocab):
        if (found := fits(name)) is not None:
            return found
    for family in FAMILIES.values():
        grid = np.linspace(family.low, family.high, GRID)
        values = [far(family, float(parameter)) for parameter in grid]
        best = int(np.argmin(values))
        if values[best] > PARALLEL:
            continue
        around = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, GRID - 1)])
        parameter = float(
            scipy.optimize.minimize_scalar(
                lambda p, f=family: far(f, p), bounds=around, method="bounded", options={"xatol": 1e-12}
            ).x
        )
        # People write few digits.
        for digits in (1, 2, 3, 4, 6, 9):
            if (found := fits(f"{family.name}({parameter:.{digits}g})")) is not None:
                return found
    return None


def _closest(expected_gradients: Sequence[ExpectedGradient], candidates: Candidates) -> tuple[str, float]:
    """The objective with the largest mean cosine, by size."""
    best, largest = "zero", 0.0
    for name in candidates(expected_gradients[0].case):
        value = cosine(expected_gradients, name, candidates)
        if abs(value) > abs(largest) + 1e-9:
            best, largest = name, value
    return best, largest if best != "zero" else float("nan")


def cosine(expected_gradients: Sequence[ExpectedGradient], name: str, candidates: Candidates = candidate_gradients) -> float:
    """Mean cosine with the gradient of an objective; NaN where either is zero."""
    cosines = []
    for expected in expected_gradients:
        target = candidates(expected.case)[name]
        norms = float(expected.mean.norm()), float(target.norm())
        if not expected.finite or norms[0] <= 1e-12 * expected.size or norms[0] == 0 or norms[1] <= 1e-12:
            return float("nan")
        cosines.append(float(expected.mean @ target) / (norms[0] * norms[1]))
    return sum(cosines) / len(cosines)


def _words(combination: dict[str, float], error: float, scope: str) -> str:
    where = f" {SCOPES[scope]}" if SCOPES[scope] else ""
    free = ", in which the reference does not enter at all" if set(combination) <= set(WITHOUT_REFERENCE) else ""
    told = "below 1e-12" if error < 1e-12 else f"{error:.0e}"  # digits of rounding would say something about the processor
    tail = f"{free}{where}, relative error {told}"
    if len(combination) == 1:
        name, scale = next(iter(combination.items()))
        sign = "" if scale > 0 else "minus "
        return f"equals {sign}the gradient of {words(name)}{tail}, scale {abs(scale):.4g}"
    parts = [f"{c:.4g} × that of {words(name)}" for name, c in combination.items()]
    return f"equals a combination of gradients, {' plus '.join(parts)}{tail}".replace("plus -", "minus ")
