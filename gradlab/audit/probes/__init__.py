"""Probes: one question each about how a loss behaves, with a finding and a minimal example that shows it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gradlab.audit.probes import policy
from gradlab.audit.probes.coefficient import asymmetry, clamps, finite
from gradlab.audit.probes.direction import depends_on_sample, dtype, reaches_policy, reference, sign, stationary_at_reference
from gradlab.audit.probes.setting import Probe, Setting
from gradlab.audit.probes.shape import composition, length, mask, padding
from gradlab.audit.probes.weight import weight
from gradlab.audit.synthetic import Tokens

#: The gravest questions first.
QUESTIONS: dict[str, Callable[[Setting], Probe]] = {
    "gradient": reaches_policy,
    "reference": reference,
    "sign": sign,
    "stationary_at_reference": stationary_at_reference,
    "finite": finite,
    "mask": mask,
    "clamps": clamps,
    "depends_on_sample": depends_on_sample,
    "weight": weight,
    "padding": padding,
    "batch": composition,
    "length": length,
    "asymmetry": asymmetry,
    "float32": lambda s: dtype(s, torch.float32),
    "bfloat16": lambda s: dtype(s, torch.bfloat16),
}
#: The questions to the policy part, the gravest first.
POLICY_QUESTIONS: dict[str, Callable[[Setting], Probe]] = {
    "gradient": policy.reaches_policy,
    "sign": policy.sign,
    "mask": policy.mask,
    "reference": policy.reference,
    "weight": policy.weight,
    "padding": padding,
    "batch": policy.composition,
    "length": policy.length,
    "utility": policy.utility,
    "float32": QUESTIONS["float32"],
    "bfloat16": QUESTIONS["bfloat16"],
}
#: What probes are called, in that order.
NAMES = tuple(dict.fromkeys([*QUESTIONS, *POLICY_QUESTIONS]))


def probes(setting: Setting) -> tuple[Probe, ...]:
    """The answers to all questions; of a loss that is NaN at ordinary tokens only whether it is finite is asked."""
    # What is NaN in the padding alone is a leak, which the mask's probe tells.
    broken = not bool(setting.at(Tokens.at(0.5, 0.3, -0.2))[0, :3].isfinite().all())
    return tuple(question(setting) for name, question in QUESTIONS.items() if not broken or name == "finite")


def policy_probes(setting: Setting) -> tuple[Probe, ...]:
    """The answers to all questions to a policy part; only the first where no gradient reaches the policy."""
    first = policy.reaches_policy(setting)
    if first.passed is False:
        return (first,)
    return tuple(first if name == "gradient" else question(setting) for name, question in POLICY_QUESTIONS.items())
