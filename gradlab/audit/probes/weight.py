"""The probe of importance weights: is there one, at which level, detached or differentiated, and where is it truncated?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradlab.audit import curve
from gradlab.audit.probes.setting import Probe, Setting, near, value_slopes
from gradlab.audit.synthetic import Tokens

#: Where `log ρ` of one token is moved to, and the ordinary log-ratios of three tokens.
MOVE, RATIOS = 0.05, (0.5, 0.3, -0.2)


def weight(s: Setting) -> Probe:
    """Is the gradient weighted by an importance ratio, and how?"""
    base = s.at(Tokens.at(*RATIOS))[0, :3]
    if not bool((base != 0).any()):
        return Probe("weight", None, "there is no gradient to weight", "")
    shifted = torch.stack([s.at(moved(u))[0, :3] for u in range(3)], -1)  # [t, u]: token t when ρ_u moves
    growth = (shifted / base[:, None]).log() / MOVE
    reached = (shifted - base[:, None]).abs() > s.precision.slack * base.abs()[:, None]
    example = f"ρ = e^{MOVE:g} at the last token: coefficients {row(base)} → {row(shifted[:, 2])}"
    if not bool(reached.any()):
        if not s.needs_weight:
            return Probe("weight", True, "no importance weight, and none is needed: off-policy it descends the same", example)
        if s.sums_over_tokens(Tokens.at(*RATIOS)):
            finding = "no importance weight; none is needed for tokens, which are summed over, but prefixes are the sampler's"
            return Probe("weight", True, finding, example)
        return Probe("weight", False, "no importance weight: off-policy data are used as if they were on-policy", example)
    reach = level(reached)
    parts = [reach, detached(s), *_bounds(s)]
    mean = 1 / 3
    if reach.startswith("sequence") and bool(((growth - mean).abs() < 0.01).any()):
        parts[0] = "sequence level, as the geometric mean of the ratios"
    finding = "; ".join(part for part in parts if part)
    return Probe("weight", len(parts) == 2, finding, example)


def moved(u: int) -> Tokens:
    """Three tokens of which one is a little likelier than the sampler had it."""
    return Tokens.at(*RATIOS, log_weight=[MOVE * (t == u) for t in range(3)])


def level(reached: Tensor) -> str:
    """The level of a ratio, by which tokens `[t, u]` the ratio of each reaches."""
    diagonal, lower = torch.eye(3, dtype=torch.bool), torch.ones(3, 3, dtype=torch.bool).tril()
    if not bool((reached & ~diagonal).any()):
        return "token level"
    if not bool((reached & ~lower).any()):
        return "prefix level"
    return "sequence level"


def detached(s: Setting) -> str:
    """Whether the ratio carries gradient, from the slope of the value with the behaviour held or moved along."""
    tokens = Tokens.at(*RATIOS, log_weight=[MOVE, -MOVE, 2 * MOVE])
    c = s.at(tokens)[0, :3]
    with_ratio, without = value_slopes(s, tokens)
    if near(s, c, with_ratio):
        return "differentiated"
    if near(s, c, without):
        return "detached"
    return "on a detached coefficient, as a policy loss has it"


def _bounds(s: Setting) -> list[str]:
    """Where the weight stops growing or its gradient dies, for pulls of either sign."""
    descriptions: dict[str, None] = {}
    for log_ratio in (0.5, -0.5):
        response = curve.of_weight(s.subject, log_ratio, s.group - 1, vocab=s.vocab)
        frame = curve.sweep(response, limit=6.0, step=0.25)
        for event in curve.events(response, frame, s.precision):
            effect = {"dead": "no gradient", "flat": "truncated", "not finite": "not finite"}.get(event.kind)
            if effect is None:
                continue
            descriptions[f"{effect} {'below' if event.at < 0 else 'above'} ρ = {math.exp(event.at):.4g}"] = None
    return list(descriptions)


def row(x: Tensor) -> str:
    """Coefficients of one response, for an example."""
    return "(" + ", ".join(f"{float(c):.4g}" for c in x) + ")"
