"""The probe of a pipeline that samples from a nucleus and reports log-probabilities of before the cut, as many engines do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from gradlab.audit.batch import Subject
from gradlab.audit.engine import ExpectedGradient, expected_gradient
from gradlab.audit.precision import Precision
from gradlab.audit.probes.setting import Probe
from gradlab.audit.worlds import AuditScenario
from gradlab.policies import actions
from gradlab.rollout import Rollout


@dataclass(frozen=True, eq=False)
class NucleusScenario(AuditScenario):
    """A world whose data come from the policy's own nucleus `top_p`.

    honest: the loss is told the log-probabilities of the nucleus, renormalised, from which the tokens were drawn; otherwise
    those of before the cut, which are the policy's, so that every importance ratio is 1.
    """

    top_p: float
    honest: bool

    @cached_property
    def rollout(self) -> Rollout:
        """Every response in the nucleus and its probability; what is outside is never drawn."""
        uncut = Rollout.enumerated(self.scenario.on_policy())
        cut_table = actions.cut_to_nucleus(uncut.table, self.top_p)
        log_prob = cut_table.log_softmax(-1)[uncut.contexts, uncut.tokens]
        weight = torch.where(uncut.mask, log_prob, 0.0).sum(-1).exp()
        inside = weight > 0
        return Rollout(
            uncut.tokens[inside], uncut.mask[inside], weight[inside], uncut.contexts[inside], uncut.table, uncut.reference_table,
            cut_table if self.honest else uncut.table, uncut.length,
        )  # fmt: skip


def nucleus_probe(
    subject: Subject, known: Sequence[ExpectedGradient], top_p: float, group: int, exchangeable: bool, precision: Precision
) -> Probe:
    """Does the expected gradient change when log-probabilities are reported from before the nucleus was cut?

    known: the on-policy fields of the loss, without a nucleus.
    """
    parts, moved, missed, lost = [], 0.0, 0.0, 0.0
    for uncut in known:
        cases = (NucleusScenario(uncut.case.name, uncut.case.scenario, top_p, honest) for honest in (True, False))
        honest, raw = (expected_gradient(subject, case, group, False, exchangeable) for case in cases)
        rollout = honest.case.rollout
        inside = actions.cut_to_nucleus(rollout.table, top_p).softmax(-1) > 0
        lost = max(lost, float(1 - (rollout.table.softmax(-1) * inside).sum(-1)[rollout.contexts[rollout.mask]].min()))
        size = max(float(honest.mean.norm()), precision.match * honest.size) or 1.0
        moved = max(moved, float((raw.mean - honest.mean).norm()) / size)
        missed = max(missed, float((honest.mean - uncut.mean).norm()) / (float(uncut.mean.norm()) or 1.0))
        parts.append(f"{uncut.case.name}: norm {float(honest.mean.norm()):.4g} → {float(raw.mean.norm()):.4g}")
    if lost <= precision.eps:
        return Probe("nucleus", None, f"a nucleus of {top_p:g} leaves nothing out of these policies", "")
    nucleus_effect = f"the nucleus of {top_p:g} itself changes it by up to {missed:.2g} of its size"
    if moved <= precision.slack:
        return Probe(
            "nucleus",
            True,
            f"which log-probabilities the sampler reports makes no difference; {nucleus_effect}",
            "; ".join(parts),
        )
    return Probe(
        "nucleus", False,
        f"log-probabilities of before the cut change the expected gradient by up to {moved:.2g} of its size, for the ratio does not "
        f"know of the probability left out, up to {lost:.2g} at a token; {nucleus_effect}",
        "; ".join(parts),
    )  # fmt: skip
