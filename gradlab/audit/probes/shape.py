"""Probes of what surrounds a token: masks, padding, the rest of the batch, the length of its response."""

from __future__ import annotations

import math

import torch

from gradlab.audit.probes.setting import Probe, Setting
from gradlab.audit.synthetic import Tokens


def mask(s: Setting) -> Probe:
    """Do padded positions get a gradient, or change that of live ones?"""
    expected_gradients = [f for f in [*s.on_policy, *s.off_policy] if f.finite]
    leak = max((f.leak / f.size if f.size else math.inf if f.leak else 0.0) for f in expected_gradients)
    row = Tokens.at(0.5, 0.3)
    x, y = s.at(row, padding_seed=0), s.at(row, padding_seed=1)
    moved = not s.same(x[0, :2], y[0, :2])
    example = f"padding {'changes' if moved else 'leaves'} the coefficient {float(x[0, 0]):.4g}" + (
        f" → {float(y[0, 0]):.4g}" if moved else ""
    )
    if leak > s.precision.slack:
        padded_coefficient = float(x[0, 2:].abs().max())
        return Probe(
            "mask", False, f"padded positions get a gradient, {leak:.3g} of what live ones get: the mask is not applied",
            f"two live tokens, three padded: coefficient {padded_coefficient:.4g} on a padded one",
        )  # fmt: skip
    if moved:
        return Probe("mask", False, "what stands in the padding changes the gradient of live tokens", example)
    return Probe("mask", True, "padded positions neither get a gradient nor change one", example)


def padding(s: Setting) -> Probe:
    """Does the same batch with more padding have the same gradient?"""
    row = Tokens.at(0.5, 0.3)
    c = {t: float(s.at(row, columns=t)[0, 0]) for t in (3, 6, 12)}
    example = "T = " + ", ".join(f"{t}: {x:.4g}" for t, x in c.items())
    if s.same(torch.tensor([c[3], c[3]]), torch.tensor([c[6], c[12]])):
        return Probe("padding", True, "more padding changes nothing", example)
    inverse = s.same(torch.tensor([c[3] * 3, c[3] * 3]), torch.tensor([c[6] * 6, c[12] * 12]))
    how = "the loss is divided by the padded length T" if inverse else "the gradient depends on how far the batch is padded"
    return Probe("padding", False, how, example)


def composition(s: Setting) -> Probe:
    """Does what else is in the batch change the gradient of a response?"""
    row = Tokens.at(0.5, 0.3)
    others = {
        "plain": Tokens.at(0.2, -0.1), "longer": Tokens.at(0.2, -0.1, 0.0, 0.0), "other numbers": Tokens.at(0.9, 0.6),
    }  # fmt: skip
    c = {name: s.at(row, other)[0, :2] for name, other in others.items()}
    example = "companion " + ", ".join(f"{name}: {float(x[0]):.4g}" for name, x in c.items())
    by_length, by_value = (not s.same(c["plain"], c[name]) for name in ("longer", "other numbers"))
    if by_value:
        return Probe(
            "batch", False, "the gradient depends on the log-probabilities of the other responses: a group baseline", example
        )
    if by_length:
        companion_tokens = 2 * max(s.group - 2, 0)  # tokens of the companions that fill a larger group
        inverse = s.same(c["plain"] * (4 + companion_tokens), c["longer"] * (6 + companion_tokens))
        how = "one mean over all tokens of the batch" if inverse else "a normaliser over the batch"
        return Probe("batch", False, f"the gradient depends on how long the other responses are: {how}", example)
    return Probe("batch", True, "the other responses change nothing", example)


def length(s: Setting) -> Probe:
    """Does a token's pull depend on the length of its response, other things equal?"""
    sizes = (1, 2, 4)
    # Every later token agrees with the reference: nothing but the length changes.
    c = {n: float(s.at(Tokens.at(0.5, *[0.0] * (n - 1)))[0, 0]) for n in sizes}
    example = ", ".join(f"L = {n}: {x:.4g}" for n, x in c.items())
    if not any(c.values()):
        return Probe("length", None, "there is no gradient to compare", example)
    base = torch.tensor([c[1]] * 3)
    for power, what in ((0, ""), (1, "1/L"), (0.5, "1/√L"), (-1, "L")):
        if s.same(base, torch.tensor([c[n] * n**power for n in sizes])):
            if not power:
                return Probe("length", True, "no length normaliser", example)
            return Probe(
                "length", False, f"every response is weighted by {what}, and length depends on the tokens drawn", example
            )
    n = (s.group - 1) * 2
    if n and s.same(base * (1 + n), torch.tensor([c[size] * (size + n) for size in sizes])):
        return Probe(
            "length", False, "divided by the number of tokens in the batch, which depends on the tokens drawn", example
        )
    return Probe("length", False, "the pull of a token depends on the length of its response", example)
