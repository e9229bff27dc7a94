"""Probes of the pull itself: is there one, on what does it depend, does it point the right way, does it survive low precision?"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from gradlab.audit.batch import Batch, Subject
from gradlab.audit.call import loss_gradient as gradient_of
from gradlab.audit.probes.setting import Probe, Setting, near, value_slopes
from gradlab.audit.synthetic import Tokens
from gradlab.audit.worlds import PADDING, batch
from gradlab.scenario import Scenario


def reaches_policy(s: Setting) -> Probe:
    """Does a gradient reach the policy, and is it the gradient of the value?"""
    row = Tokens.at(0.5, 0.3, -0.2)
    if all(f.size == 0 for f in [*s.on_policy, *s.off_policy]):
        _, low = s.coefficients(row)
        _, high = s.coefficients(Tokens.at(0.9, 0.3, -0.2))
        moved = low != high
        why = "the value depends on log π, so it is detached or computed under no_grad" if moved else "the value ignores log π"
        return Probe(
            "gradient", False, f"no gradient reaches log π: {why}", f"ℓ 0.5 → 0.9: loss {low:.4g} → {high:.4g}, gradient 0"
        )
    c, _ = s.coefficients(row)
    slopes = value_slopes(s, row)
    if near(s, c[0, :3], slopes[0]):
        finding = "the gradient is that of the value: nothing is detached"
    elif near(s, c[0, :3], slopes[1]):
        finding = "the gradient is that of the value at a fixed importance ratio: only the ratio is detached"
    else:
        finding = "the gradient is not that of the value: something is detached, as for a KL in the reward"
    example = f"ℓ = 0.5: gradient {float(c[0, 0]):.4g}, slope of the value {float(slopes[0][0]):.4g}"
    return Probe("gradient", True, finding, example)


def reference(s: Setting) -> Probe:
    """Does the gradient depend on the reference?"""
    before, after = Tokens.at(0.5, 0.3, -0.2), Tokens([-0.7, -0.7, -0.9], [0.9, 0.1, 0.3], [0.0] * 3)
    same = Tokens(after.log_prob, before.log_ratio, before.log_weight)
    x, y = s.at(same), s.at(after)
    moved = not s.same(x, y)
    finding = "the gradient depends on the reference" if moved else "the reference does not enter the gradient at all"
    return Probe(
        "reference", moved, finding, f"ℓ 0.5 → 0.9 by the reference: coefficient {float(x[0, 0]):.4g} → {float(y[0, 0]):.4g}"
    )


def sign(s: Setting) -> Probe:
    """Does a small step down the expected gradient lower the sequence reverse KL?"""
    parts, lower = [], []
    for f in s.on_policy:
        policy, size = f.case.scenario.policy, float(f.mean.norm())
        before = f.case.scenario.kl()
        if not f.finite:
            return Probe("sign", False, f"its expected gradient is not a number ({f.case.name})", f"KL {before:.4g}")
        if size <= s.precision.match * f.size or size == 0:
            return Probe(
                "sign", False, "minimising it does not move the policy in expectation", f"KL {before:.4g}, gradient {size:.1g}"
            )
        # A hundredth of the KL, if the step went straight down.
        step = policy.with_parameters(policy.parameters - 1e-2 * min(before, 1.0) * f.mean / size)
        after = Scenario(step, f.case.scenario.reference).kl()
        parts.append(f"{f.case.name}: KL {before:.6g} → {after:.6g}")
        lower.append(after < before)
    if all(lower):
        return Probe("sign", True, "minimising it lowers the KL", "; ".join(parts))
    return Probe(
        "sign", False, f"minimising it raises the KL{'' if not any(lower) else ' in some scenarios'}", "; ".join(parts)
    )


def depends_on_sample(s: Setting) -> Probe:
    """Does the pull on a token depend on which token was drawn?"""
    spread = scale = 0.0
    for f in (f for f in s.on_policy if f.finite):
        if f.cotangents.shape[1] != 1:
            return Probe("depends_on_sample", None, "only asked of losses that do not couple responses", "")
        rollout, p = f.case.rollout, f.case.rollout.table.softmax(-1)
        t = rollout.tokens.shape[1]
        # On log π the cotangent is c (onehot − p): at a drawn token c (1 − p).
        at_sampled = f.cotangents[:, 0, :t].gather(-1, rollout.tokens[..., None])[..., 0]
        c = torch.where(rollout.mask, at_sampled / (1 - p.flatten()[rollout.contexts * p.shape[1] + rollout.tokens]), 0.0)
        scale = max(scale, float(c.abs().max()))
        for row in set(rollout.contexts[rollout.mask].tolist()):
            coefficients_of_row = c[rollout.mask & (rollout.contexts == row)]
            spread = max(spread, float(coefficients_of_row.max() - coefficients_of_row.min()))
    if scale == 0:
        return Probe("depends_on_sample", None, "there is no gradient to compare", "")
    if spread <= s.precision.slack * scale:
        finding = "every token of a prefix is pulled alike, whatever was drawn: the pulls cancel"
        return Probe("depends_on_sample", False, finding, f"coefficient {scale:.4g}")
    return Probe(
        "depends_on_sample", True, "the pull depends on the token drawn", f"coefficients of one prefix differ by {spread:.4g}"
    )


def stationary_at_reference(s: Setting) -> Probe:
    """Is a policy that equals the reference left where it is?"""
    gradient_norm, scale = float(s.at_reference.mean.norm()), s.on_policy[1].size
    if not scale:
        return Probe("stationary_at_reference", None, "there is no gradient at all", "")
    example = f"π = ref: expected gradient of norm {gradient_norm:.2g}"
    if gradient_norm <= s.precision.slack * scale:
        return Probe("stationary_at_reference", True, "a policy that equals the reference stays there", example)
    return Probe(
        "stationary_at_reference",
        False,
        "even a policy that equals the reference is moved: no divergence from it does that",
        example,
    )


def dtype(s: Setting, kind: torch.dtype) -> Probe:
    """Does the loss keep its gradient in lower precision?"""
    name = str(kind).removeprefix("torch.")
    bound = 32 * torch.finfo(kind).eps
    case = s.on_policy[1].case
    columns, n = case.columns(PADDING), len(case.rollout.weight)
    batches = [[(i + 7 * k) % n for k in range(s.group)] for i in range(n)]
    try:
        low = torch.stack([gradient_of(s.subject, *batch(columns, rows, kind))[0] for rows in batches])
    except ValueError as problem:
        return Probe(name, False, f"fails in {name}", str(problem))
    # The inputs are rounded for both, so that only the loss's own arithmetic differs.
    rounded = _rounded(s.subject, kind)
    exact = torch.stack([gradient_of(rounded, *batch(columns, rows))[0] for rows in batches])
    size = float(exact.norm())
    error = float((low - exact).norm()) / size if size else float(low.norm())
    finding = f"relative error of the gradients {error:.1e}"
    good = math.isfinite(error) and error <= bound
    return Probe(
        name, good, finding if good else f"{finding}, more than rounding explains ({bound:.1e})", f"KL {case.scenario.kl():g}"
    )


def _rounded(subject: Subject, kind: torch.dtype) -> Subject:
    def loss(batch: Batch) -> Tensor:
        def rounded(x: Tensor) -> Tensor:
            return x + (x.to(kind).to(x.dtype) - x).detach()

        names = ("log_prob", "reference_log_prob", "behaviour_log_prob", "logits", "reference_logits", "behaviour_logits")
        return subject.loss(replace(batch, **{name: rounded(getattr(batch, name)) for name in names}))

    return replace(subject, loss=loss)
