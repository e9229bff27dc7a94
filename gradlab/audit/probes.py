"""Probes: one question each about how a loss behaves, with a finding and a minimal example that shows it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gradlab.audit.hand import Tokens
from gradlab.audit.pulls import action, dtype, gradient, reference, sign
from gradlab.audit.ratios import asymmetry, clamps, finite
from gradlab.audit.setting import Probe, Setting
from gradlab.audit.shapes import composition, length, mask, padding
from gradlab.audit.weights import weight

#: The gravest questions first.
QUESTIONS: tuple[Callable[[Setting], Probe], ...] = (
    gradient, reference, sign, finite, mask, clamps, action, weight, padding, composition, length, asymmetry,
    lambda s: dtype(s, torch.float32), lambda s: dtype(s, torch.bfloat16),
)  # fmt: skip


def probes(setting: Setting) -> tuple[Probe, ...]:
    """The answers to all questions; of a loss that is NaN at ordinary tokens only whether it is finite is asked."""
    broken = not bool(setting.at(Tokens.at(0.5, 0.3, -0.2)).isfinite().all())
    asked = [question for question in QUESTIONS if not broken or question is finite]
    return tuple(question(setting) for question in asked)
