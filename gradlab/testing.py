"""For other people's test suites: a loss descends what it is meant to, or the test fails and says what it descends instead.

>>> import torch
>>> from gradlab.testing import assert_descends
>>> def kl_loss(log_probs, ref_log_probs, mask):
...     log_ratio = log_probs - ref_log_probs
...     return (0.5 * log_ratio**2 * mask).sum(-1).mean()
>>> assert_descends(kl_loss, "reverse_kl_frozen_prefix")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradlab._common.names import check_name
from gradlab.audit import Subject, audit
from gradlab.audit.candidates import check
from gradlab.audit.probes import NAMES


def assert_descends(
    loss: Subject | Callable[..., Any], target: str, *, off_policy: bool = False, passes: tuple[str, ...] = (), **binding: Any
) -> None:
    """Assert that the expected gradient of a loss is that of `target`, up to a positive factor, on-policy or off-policy too.

    passes: names of probes that have to pass as well, such as `"clamps"` or `"padding"`. binding: `roles`, `settings`,
    `returns` and `group`, as in `gl.audit`. Raises `AssertionError` that says what the gradient is instead and which probe
    fails worst, and `ValueError` for an unknown target or probe or a loss that cannot be audited.

    >>> def k2(log_probs, ref_log_probs, mask):
    ...     return (mask * (log_probs - ref_log_probs) ** 2 / 2).sum() / len(mask)
    >>> gl.testing.assert_descends(k2, "reverse_kl_frozen_prefix")
    """
    check(target)
    for name in passes:
        check_name("probe", name, NAMES)
    audited = audit(loss, **binding)
    reason = audited.why_not(target, off_policy=off_policy)
    if reason is None:
        wrong = [probe for probe in audited.failures if probe.name in passes]
        reason = f"{audited.subject.name} fails the probe {wrong[0].name}: {wrong[0].finding}" if wrong else None
    if reason is None:
        return
    worst = "".join(f"\n  worst probe: {probe.name}: {probe.finding} ({probe.example})" for probe in audited.failures[:1])
    raise AssertionError(
        f"{reason}\n  on-policy it {audited.on_policy.text}\n  off-policy it {audited.off_policy.text}"
        f"{f'{chr(10)}  response by response it is {audited.form.name}' if audited.form else ''}{worst}"
    )
