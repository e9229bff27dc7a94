"""Identification: which objective's gradient, or which combination of two, an expected gradient is in every world at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradlab.audit.candidates import CANDIDATES, WITHOUT_REFERENCE, WORDS, gradients
from gradlab.audit.engine import Field

#: Scopes in which a match can hold, from the widest; each says what it excludes.
SCOPES = {
    "everywhere": "",
    "not far": "near and at a moderate distance from the reference, but not far from it",
    "near": "close to the reference and the sampler only",
    "equal lengths": "as long as all responses have one length, here 2",
    "equal lengths, near": "near the reference, as long as all responses have one length, here 2",
}


#: The largest relative error that the randomness of a loss can excuse.
NOISE = 0.1


@dataclass(frozen=True)
class Verdict:
    """What an expected gradient is.

    combination: objective → coefficient; empty when nothing matches. error: largest relative error over the worlds. scope: a
    key of `SCOPES`, `everywhere` unless the match is limited. closest, cosine: the objective whose gradient points most nearly
    the same way and the mean cosine with it. text: all of it in words.
    """

    combination: dict[str, float]
    error: float
    scope: str
    closest: str
    cosine: float
    text: str

    @property
    def name(self) -> str:
        """The combination as a formula of names, or `none`; a limited scope is in brackets."""
        if not self.combination:
            return "none"
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


def identify(groups: Iterable[tuple[str, Sequence[Field]]], tolerance: float) -> Verdict:
    """Find the simplest explanation in the widest scope: zero, one objective, two of them; in words if there is none.

    groups: scope → fields of the worlds in which it has to hold, from the widest scope on.
    """
    closest, cosine = "", float("nan")
    for scope, fields in groups:
        if not all(field.finite for field in fields):
            continue
        if not closest:
            closest, cosine = _closest(fields)
        noise = max(5 * field.error / (float(field.mean.norm()) or field.size or 1.0) for field in fields)
        bound = max(tolerance, min(noise, NOISE))
        if all(
            float(field.mean.norm()) <= max(tolerance * field.size, min(5 * field.error, NOISE * field.size))
            for field in fields
        ):
            silent = all(field.size == 0 for field in fields)
            reason = "no gradient reaches the policy at all" if silent else "single responses pull, but the pulls cancel"
            return Verdict({"zero": 1.0}, 0.0, scope, "zero", float("nan"), f"is zero: {reason}")
        found = _fit(fields, bound)
        if found is not None:
            combination, error = found
            text = _words(combination, error, scope)
            if bound > tolerance:
                text = text.replace("equals", "agrees, within the noise of a random loss, with", 1)
            return Verdict(combination, error, scope, closest, cosine, text)
    if not closest:
        text = "is not a number: the loss has NaN or infinite gradients near and far from the reference"
    else:
        text = f"equals the gradient of no known objective; the closest is {WORDS[closest]}, cosine {cosine:.4f}"
    return Verdict({}, float("nan"), "everywhere", closest, cosine, text)


def _fit(fields: Sequence[Field], tolerance: float) -> tuple[dict[str, float], float] | None:
    """Coefficients of the first single objective, or else pair, that fits all fields jointly."""
    # Every world counts alike, whatever the size of its gradient.
    weights = [1 / max(float(field.mean.norm()), tolerance * field.size) for field in fields]
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
            error = max(float(part.norm()) for part in (goal - basis @ shares).split(lengths))
            # Both parts have to matter, or a pair would pass for an imprecise single.
            small = (shares.abs() * basis.norm(dim=0)).min() <= 1e3 * tolerance
            if error <= tolerance and not (size == 2 and bool(small)):
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
    tail = f"{free}{where}, relative error {error:.0e}"
    if len(combination) == 1:
        name, scale = next(iter(combination.items()))
        turned = "" if scale > 0 else "minus "
        return f"equals {turned}the gradient of {WORDS[name]}{tail}, scale {abs(scale):.4g}"
    parts = [f"{c:.4g} × that of {WORDS[name]}" for name, c in combination.items()]
    return f"equals a combination of gradients, {' plus '.join(parts)}{tail}".replace("plus -", "minus ")
