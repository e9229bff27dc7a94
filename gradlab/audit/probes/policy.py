"""Probes of the policy part alone: does it raise the reward, where is it clipped, what does it do with the advantages?"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from gradlab.audit import curve
from gradlab.audit.call import LossError
from gradlab.audit.parts import success
from gradlab.audit.probes import shape
from gradlab.audit.probes import weight as weights
from gradlab.audit.probes.setting import Probe, Setting
from gradlab.audit.synthetic import Tokens, coefficients, responses
from gradlab.audit.utility import GROUP, ascended, rewards_matter
from gradlab.audit.worlds import AuditScenario
from gradlab.scenario import Scenario

#: How far log-ratios to the sampler are moved, and by how much at once.
REACH, STEP = 6.0, 0.125


def reaches_policy(s: Setting) -> Probe:
    """Does a gradient of the advantages reach the policy?"""
    if all(f.size == 0 for f in [*s.on_policy, *s.off_policy]):
        return Probe("gradient", False, "no gradient of the advantages reaches log π", "")
    right, wrong = (float(s.at(Tokens.at(0.5, 0.3, advantage=a))[0, 0]) for a in (1.0, -1.0))
    example = f"advantage +1: coefficient {right:.4g}, −1: {wrong:.4g}"
    return Probe("gradient", True, "advantages of both signs reach log π", example)


def sign(s: Setting) -> Probe:
    """Does a small step down the expected gradient raise the expected reward?"""
    parts, higher = [], []
    for f in s.on_policy:
        policy, size = f.case.scenario.policy, float(f.mean.norm())
        if not f.finite:
            return Probe("sign", False, f"its expected gradient is not a number ({f.case.name})", "")
        if size <= s.precision.match * f.size or size == 0:
            return Probe("sign", False, "minimising it does not move the policy in expectation", f"gradient {size:.1g}")
        moved = policy.with_parameters(policy.parameters - 1e-3 * f.mean / size)
        before, after = success(f.case), success(AuditScenario(f.case.name, Scenario(moved, f.case.scenario.reference)))
        parts.append(f"{f.case.name}: E r {before:.6g} → {after:.6g}")
        higher.append(after > before)
    if all(higher):
        return Probe("sign", True, "minimising it raises the expected reward", "; ".join(parts))
    where = "" if not any(higher) else " in some scenarios"
    return Probe("sign", False, f"minimising it lowers the expected reward{where}: the sign is wrong", "; ".join(parts))


def reference(s: Setting) -> Probe:
    """Is the policy part free of the reference?"""
    before = Tokens([-0.7, -0.7, -0.9], [0.5, 0.3, -0.2], [0.0] * 3)
    after = Tokens([-0.7, -0.7, -0.9], [0.9, 0.1, 0.3], [0.0] * 3)
    x, y = s.at(before), s.at(after)
    if s.same(x, y):
        return Probe("reference", True, "the reference does not enter the policy part", "")
    return Probe(
        "reference", False,
        "the reference enters it: the KL and the reward are compared or normalised together, so that the two do not just add up",
        f"another reference: coefficient {float(x[0, 0]):.4g} → {float(y[0, 0]):.4g}",
    )  # fmt: skip


def weight(s: Setting) -> Probe:
    """At which level is the importance ratio, is it differentiated, and on which side is it clipped for which advantage?"""
    base = s.at(Tokens.at(*weights.RATIOS))[0, :3]
    if not bool((base != 0).any()):
        return Probe("weight", None, "there is no gradient to weight", "")
    moved = torch.stack([s.at(weights.moved(u))[0, :3] for u in range(3)], -1)
    reached = (moved - base[:, None]).abs() > s.precision.slack * base.abs()[:, None]
    example = f"ρ = e^{weights.MOVE:g} at the last token: coefficients {weights.row(base)} → {weights.row(moved[:, 2])}"
    if not bool(reached.any()):
        if not s.needs_weight:
            return Probe("weight", True, "no importance ratio, and none is needed: off-policy it descends the same", example)
        return Probe("weight", False, "no importance ratio: off-policy data are used as if they were on-policy", example)
    level = weights.level(reached)
    growth = (moved / base[:, None]).log() / weights.MOVE
    if level.startswith("sequence") and bool(((growth - 1 / 3).abs() < 0.01).any()):
        level = "sequence level, as the geometric mean of the ratios"
    bounds, wrong = _bounds(s)
    finding = "; ".join([*wrong, level, weights.detached(s), *bounds])
    return Probe("weight", not wrong, finding, example)


def _bounds(s: Setting) -> tuple[list[str], list[str]]:
    """Where the ratio is truncated or its gradient dies, by sign of the advantage; and what of that drops tokens it should not."""
    seen: dict[str, dict[str, None]] = {}
    for advantage, name in ((1.0, "A > 0"), (-1.0, "A < 0")):
        response = curve.of_weight(s.subject, 0.3, s.group - 1, advantage, s.vocab)
        frame = curve.sweep(response, limit=REACH, step=STEP)
        for event in curve.events(response, frame, s.precision):
            effect = {"dead": "no gradient", "flat": "truncated", "not finite": "not finite"}.get(event.kind)
            if effect is not None:
                where = f"{effect} {'below' if event.at < 0 else 'above'} ρ = {math.exp(event.at):.4g}"
                seen.setdefault(where, {})[name] = None
    bounds, wrong = [], []
    for where, names in seen.items():
        if len(names) == 2 and where.startswith("no gradient"):
            wrong.append(
                f"{where} whatever the sign of the advantage: those tokens are dropped, as if a clipped ratio were not detached and "
                "multiplied by log π"
            )
        elif where.startswith("not finite"):
            wrong.append(f"{where} for {' and '.join(names)}")
        elif where.startswith("no gradient") and ("above" in where) != ("A > 0" in names):
            wrong.append(f"{where} for {next(iter(names))}: the clip is on the wrong side")
        else:
            bounds.append(f"{where}" + (f" for {next(iter(names))}" if len(names) == 1 else ""))
    return bounds, wrong


def length(s: Setting) -> Probe:
    """Does a response's share depend on its length?"""
    sizes, other = (1, 2, 4), (s.group - 1) * 2
    c, v = {}, {}
    for n in sizes:
        found, value = s.coefficients(Tokens.at(*[0.3] * n))
        c[n], v[n] = float(found[0, 0]), value
    example = ", ".join(f"L = {n}: {x:.4g}" for n, x in c.items())
    if not any(c.values()):
        return Probe("length", None, "there is no gradient to compare", example)
    base = torch.tensor([c[1]] * 3)

    def scales(power: float, normaliser: int) -> bool:
        values = [c[n] * n**power * ((n + normaliser) / (1 + normaliser) if normaliser else 1) for n in sizes]
        return s.same(base, torch.tensor(values))

    what = {0: "", 1: "1/L", 0.5: "1/√L", -1: "L"}
    for power, words in what.items():
        if scales(power, 0):
            if not power:
                return Probe("length", True, "no length normaliser: every response counts alike", example)
            return Probe(
                "length", False, f"a token's pull is weighted by {words}, and length depends on the tokens drawn", example
            )
    if other and scales(0, other):
        finding = (
            "one mean over all tokens of the batch: divided by their number, which depends on the tokens drawn; a ratio of whole "
            "sequences is summed over its tokens, so that each response counts L times"
            if _sequence_ratio(s) else
            "divided by the number of tokens in the batch, which depends on the tokens drawn"
        )  # fmt: skip
        return Probe("length", False, finding, example)
    return Probe("length", False, "the pull of a token depends on the length of its response", example)


def mask(s: Setting) -> Probe:
    """Do padded positions get a gradient, or change that of live ones; and would advantages of 0 there hide it?"""
    found = shape.mask(s)
    if found.passed is not False:
        return found
    row = Tokens.at(0.5, 0.3)
    companions = [Tokens.at(0.1 + 0.05 * k, -0.2, advantage=-1.0) for k in range(s.group - 1)]
    batch, _ = responses(row, *companions, columns=5, vocab=s.vocab)
    zeroed = replace(batch, advantages=torch.where(batch.mask.bool(), batch.advantages, 0.0))
    left = coefficients(s.subject, zeroed)[0][~zeroed.mask.bool()]
    hidden = "" if bool(left.abs().max() > 0) else "; nothing flows there as long as the advantages are 0 in the padding"
    return replace(found, finding=found.finding + hidden)


def composition(s: Setting) -> Probe:
    """Does what else is in the batch change the gradient of a response?"""
    row = Tokens.at(0.5, 0.3)
    plain = Tokens.at(0.2, -0.1, advantage=-1.0)
    others = {
        "longer": (Tokens.at(0.2, -0.1, 0.0, 0.0, advantage=-1.0), "how long the other responses are"),
        "another ratio": (
            Tokens.at(0.2, -0.1, log_weight=[0.04, -0.03], advantage=-1.0),
            "the importance ratios of the others",
        ),
        "another advantage": (Tokens.at(0.2, -0.1, advantage=-1.6), "the advantages of the others"),
    }
    base = s.at(row, plain)[0, :2]
    seen = {name: s.at(row, other)[0, :2] for name, (other, _) in others.items()}
    example = f"companion plain: {float(base[0]):.4g}, " + ", ".join(f"{name}: {float(x[0]):.4g}" for name, x in seen.items())
    moved = [name for name, x in seen.items() if not s.same(base, x)]
    if not moved:
        return Probe("batch", True, "the other responses change nothing", example)
    by = " and on ".join(others[name][1] for name in moved)
    tokens = 2 * max(s.group - 2, 0)
    mean = moved == ["longer"] and s.same(base * (4 + tokens), seen["longer"] * (6 + tokens))
    how = (
        ": one mean over all tokens of the batch"
        if mean
        else ""
        if moved == ["longer"]
        else ": responses are mixed with each other"
    )
    return Probe("batch", False, f"the gradient of a response depends on {by}{how}", example)


def _sequence_ratio(s: Setting) -> bool:
    base, moved = s.at(Tokens.at(*weights.RATIOS))[0, :3], s.at(weights.moved(2))[0, :3]
    return not s.same(base[:1], moved[:1])


def utility(s: Setting) -> Probe:
    """Which utility of the success probability do its advantages ascend?"""
    try:
        if not rewards_matter(s.subject):
            finding = "advantages are taken as they are passed: of r − E r it ascends p, of others their own utility"
            return Probe("utility", None, finding, "gl.utility tells which")
        found = ascended(s.subject)
    except (LossError, ValueError) as error:
        return Probe("utility", None, f"groups of {GROUP} could not be looked at: {error}", "")
    if found is None:
        return Probe("utility", None, "equal responses with different rewards are not told apart", "")
    known, words = found
    example = ", ".join(f"U'({p:g}) ∝ {known.slope(p) / known.slope(0.5):.4g}" for p in (0.05, 0.25, 0.5))
    return Probe(
        "utility", True, f"it ascends U(p) = {words}" if words else "it ascends a utility U(p) without a name", example
    )
