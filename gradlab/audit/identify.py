"""Identification: which objective's gradient, or which combination of two, an expected gradient is in every world at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradlab.audit.candidates import CANDIDATES, WITHOUT_REFERENCE, gradients, words
from gradlab.audit.engine import Field

#: Scopes in which a match can hold, from the widest; each says what it excludes.
SCOPES = {
    "everywhere": "",
    "not far": "near and at a moderate distance from the reference, but not far from it",
    "near": "close to the reference and the sampler only",
    "equal lengths": "as long as all responses have one length, here 2",
    "equal lengths, near": "near the reference, as long as all responses have one length, here 2",
}


#: The largest relative error that the randomness of a loss can excuse, and that its rounding can.
NOISE, ROUNDING = 0.1, 0.02
#: The least that either of two objectives has to contribute, where 1e3 tolerances are more.
MATTERS = 0.3
#: A mean is known to within this many standard errors or rounding errors.
ERRORS = 5
#: Where the worlds are.
PLACES = {"near": "near", "moderate": "at a moderate distance from", "far": "far from"}

_Fit = tuple[dict[str, float], float]


@dataclass(frozen=True)
class Verdict:
    """What an expected gradient is.

    combination: objective → coefficient; empty when nothing matches. error: largest relative error over the worlds. scope: a
    key of `SCOPES`, `everywhere` unless the match is limited. closest, cosine: the objective whose gradient points most nearly
    the same way and the mean cosine with it. text: all of it in words. resolved: false when rounding hides the answer.
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
        return self.scope == "everywhere" and list(self.combination) == [target] and self.combination[target] > 0


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
    groups: Iterable[tuple[str, Sequence[Field]]], tolerance: float, rounding: Callable[[Field], float] = lambda _: 0.0
) -> Verdict:
    """Find the simplest explanation in the widest scope: zero, one objective, two of them; in words if there is none.

    groups: scope → fields of the worlds in which it has to hold, from the widest scope on. rounding: the norm of the rounding
    error in the mean of a field, asked for where nothing matches to `tolerance`: where terms that nearly cancel make it larger,
    a match is as good as that error allows, and where it drowns the mean the verdict is that nothing can be told.
    """
    closest, cosine, hidden = "", float("nan"), None
    for scope, fields in groups:
        if not all(field.finite for field in fields):
            continue
        if not closest:
            closest, cosine = _closest(fields)
        noise = max(ERRORS * field.error / (float(field.mean.norm()) or field.size or 1.0) for field in fields)
        bound = max(tolerance, min(noise, NOISE))
        if all(
            float(field.mean.norm()) <= max(tolerance * field.size, min(ERRORS * field.error, NOISE * field.size))
            for field in fields
        ):
            silent = all(field.size == 0 for field in fields)
            reason = "no gradient reaches the policy at all" if silent else "single responses pull, but the pulls cancel"
            return Verdict({"zero": 1.0}, 0.0, scope, "zero", float("nan"), f"is zero: {reason}")
        found, how = _fit(fields, [bound] * len(fields)), "the noise of a random loss" if bound > tolerance else ""
        if found is None:
            found, how, lost = _within_rounding(fields, bound, rounding)
            hidden = lost if hidden is None else hidden
        if found is not None:
            combination, error = found
            text = _words(combination, error, scope)
            if how:
                text = text.replace("equals", f"agrees, within {how}, with", 1)
            return Verdict(combination, error, scope, closest, cosine, text)
    if hidden:
        return Verdict({}, float("nan"), "everywhere", closest, cosine, hidden, resolved=False)
    if not closest:
        text = "is not a number: the loss has NaN or infinite gradients near and far from the reference"
    else:
        text = f"equals the gradient of no known objective; the closest is {words(closest)}, cosine {cosine:.4f}"
    return Verdict({}, float("nan"), "everywhere", closest, cosine, text)


def _within_rounding(fields: Sequence[Field], bound: float, rounding: Callable[[Field], float]) -> tuple[_Fit | None, str, str]:
    """What fits to within rounding, and how far that reaches; or, when rounding hides what fits, that in words."""
    norms = [float(field.mean.norm()) for field in fields]
    relative = [error and error / (norm or 1e-300) for error, norm in zip(map(rounding, fields), norms, strict=True)]
    bounds = [max(bound, ERRORS * r) for r in relative]
    found = _fit(fields, bounds) if max(bounds) > bound else None
    if found is None:
        return None, "", ""  # whatever the rounding may have been
    clear = [(field, b) for field, b in zip(fields, bounds, strict=True) if b <= max(bound, ROUNDING)]
    if len(clear) == len(fields):
        return found, f"the rounding of the loss, {max(relative):.0e} of its expected gradient", ""
    seen = _fit([field for field, _ in clear], [b for _, b in clear]) if clear else None
    drowned = [
        f"{PLACES[field.world.name]} the reference the rounding of the loss is {r:.2g} times its expected gradient, whose norm is "
        f"{norm:.1e}, and {r * norm / field.size:.0e} of the gradient of single batches"
        for field, r, norm in zip(fields, relative, norms, strict=True)
        if ERRORS * r > max(bound, ROUNDING)
    ]
    elsewhere = f"; elsewhere it {_words(*seen, 'everywhere')}" if seen else ""
    return None, "", f"is not resolved: {'; '.join(drowned)}{elsewhere}"


def _fit(fields: Sequence[Field], bounds: Sequence[float]) -> _Fit | None:
    """Coefficients of the first single objective, or else pair, that fits all fields jointly, each to its relative bound."""
    tolerance = min(bounds)
    # Every world counts alike, whatever the size of its gradient, unless it is less well known.
    trusts = [tolerance / bound for bound in bounds]
    weights = [s / max(float(f.mean.norm()), tolerance * f.size) for s, f in zip(trusts, fields, strict=True)]
    lengths = [len(field.mean) for field in fields]
    goal = torch.cat([w * field.mean for w, field in zip(weights, fields, strict=True)])
    columns: dict[str, Tensor] = {}
    for name in CANDIDATES:
        column = torch.cat([w * gradients(field.world)[name] for w, field in zip(weights, fields, strict=True)])
        # On-policy and for equal lengths some objectives coincide or vanish; the first one stands for all.
        twins = (float((column - known).norm()) <= 1e-12 * float(known.norm()) for known in columns.values())
        if float(column.norm()) > 1e-12 * float(goal.norm()) and not any(twins):
            columns[name] = column
    # In one world a pair can fit by accident: any function of the length is a sum of the length and its inverse there.
    for size in (1, 2) if len(fields) > 1 else (1,):
        matches = []
        for names in itertools.combinations(columns, size):
            basis = torch.stack([columns[name] for name in names], -1)
            shares = torch.linalg.lstsq(basis, goal[:, None], driver="gelsd").solution[:, 0]
            errors = [float(part.norm()) for part in (goal - basis @ shares).split(lengths)]
            # Both parts have to matter, or a pair would pass for an imprecise single.
            small = (shares.abs() * basis.norm(dim=0)).min() <= min(1e3 * tolerance, MATTERS)
            if max(errors) <= tolerance and not (size == 2 and bool(small)):
                error = max(e / trust for e, trust in zip(errors, trusts, strict=True))
                matches.append((dict(zip(names, shares.tolist(), strict=True)), error))
        if matches:
            return min(matches, key=lambda match: match[1]) if size == 1 else matches[0]
    return None


def _closest(fields: Sequence[Field]) -> tuple[str, float]:
    """The objective with the largest mean cosine, by size."""
    best, largest = "zero", 0.0
    for name in CANDIDATES:
        value = cosine(fields, name)
        if abs(value) > abs(largest) + 1e-9:
            best, largest = name, value
    return best, largest if best != "zero" else float("nan")


def cosine(fields: Sequence[Field], name: str) -> float:
    """Mean cosine with the gradient of an objective; NaN where either is zero."""
    found = []
    for field in fields:
        target = gradients(field.world)[name]
        norms = float(field.mean.norm()), float(target.norm())
        if not field.finite or norms[0] <= 1e-12 * field.size or norms[0] == 0 or norms[1] <= 1e-12:
            return float("nan")
        found.append(float(field.mean @ target) / (norms[0] * norms[1]))
    return sum(found) / len(found)


def _words(combination: dict[str, float], error: float, scope: str) -> str:
    where = f" {SCOPES[scope]}" if SCOPES[scope] else ""
    free = ", in which the reference does not enter at all" if set(combination) <= set(WITHOUT_REFERENCE) else ""
    told = "below 1e-12" if error < 1e-12 else f"{error:.0e}"  # digits of rounding would say something about the processor
    tail = f"{free}{where}, relative error {told}"
    if len(combination) == 1:
        name, scale = next(iter(combination.items()))
        turned = "" if scale > 0 else "minus "
        return f"equals {turned}the gradient of {words(name)}{tail}, scale {abs(scale):.4g}"
    parts = [f"{c:.4g} × that of {words(name)}" for name, c in combination.items()]
    return f"equals a combination of gradients, {' plus '.join(parts)}{tail}".replace("plus -", "minus ")
