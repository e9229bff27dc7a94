"""One part of a loss, examined: what its expected gradient is in every world, and the answers of the probes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pandas as pd

from gradlab.audit import checks
from gradlab.audit.batch import Subject
from gradlab.audit.candidates import CANDIDATES, candidate_gradients
from gradlab.audit.engine import ExpectedGradient, check_affordable
from gradlab.audit.fields import ExpectedGradients, form_of
from gradlab.audit.forms import Form
from gradlab.audit.identify import Identification, cosine, identify
from gradlab.audit.parts import reward_gradients
from gradlab.audit.precision import PRECISIONS, Precision
from gradlab.audit.probes import policy_probes, probes
from gradlab.audit.probes.nucleus import nucleus_probe
from gradlab.audit.probes.setting import Probe, Setting
from gradlab.audit.utility import parallel
from gradlab.audit.worlds import VOCAB, at_reference, standard

KL, POLICY = "KL part", "policy part"


@dataclass(frozen=True, eq=False)
class Part:
    """What one part of a loss descends, on-policy and off-policy, and how it behaves.

    name: `KL part`, what is left at advantages of 0, or `policy part`, what the advantages add. absent: why the loss has no such
    part; the rest is empty then. silent: no gradient at any response of any world.

    >>> def k2(log_probs, ref_log_probs, mask):
    ...     return (mask * (log_probs - ref_log_probs) ** 2 / 2).sum() / len(mask)
    >>> gl.audit(k2).policy.absent
    'no argument is an advantage or a reward'
    """

    name: str
    absent: str = ""
    on_policy: Identification | None = None
    off_policy: Identification | None = None
    form: Form | None = None
    cosine: float = math.nan
    probes: tuple[Probe, ...] = ()
    group: int = 1
    precision: Precision = PRECISIONS[0]
    curve: pd.DataFrame = field(default_factory=pd.DataFrame)
    cosines: pd.DataFrame = field(default_factory=pd.DataFrame)
    silent: bool = False

    @property
    def text(self) -> str:
        """Both verdicts in words, or why there is none."""
        if self.on_policy is None or self.off_policy is None:
            return f"absent: {self.absent}"
        if self.on_policy.text == self.off_policy.text:
            return f"on-policy and off-policy it {self.on_policy.text}"
        return f"on-policy it {self.on_policy.text}; off-policy it {self.off_policy.text}"


def examine(
    name: str, subject: Subject, seeded: Subject, random: bool, top_p: float | None = None, quick: bool = False
) -> Part:
    """Examine the part `name` of a loss. seeded: the same with draws alike; random: it draws. quick: verdicts only."""
    cases = standard(subject.vocab or VOCAB, subject.temperature)
    moderate = next(case for case in cases if case.name == "moderate" and case.off_policy)
    still_random = random and checks.is_random(seeded, moderate)
    precision = PRECISIONS[0] if still_random else checks.precision(seeded, moderate)
    coupled = not still_random and subject.group is None and checks.couples(seeded, moderate, precision.match)
    group = subject.group or (2 if coupled else 1)
    exchangeable = not still_random and group > 1 and checks.exchangeable(seeded, moderate, group, precision.match)
    check_affordable(subject, group, random, exchangeable, cases)
    expected = ExpectedGradients(subject, group, random, exchangeable, precision)
    on, off = ([expected.at(case) for case in cases if case.off_policy is is_off] for is_off in (False, True))
    candidates = candidate_gradients if name == KL else reward_gradients
    on_policy, off_policy = (
        identify(expected.scopes(is_off), precision.match, expected.rounding, candidates) for is_off in (False, True)
    )
    if name == POLICY:
        on_policy = parallel(on_policy, on, precision.match)
    # Weights are missing where off-policy data change what is descended.
    needs_weight = not on_policy.combination or list(on_policy.combination) != list(off_policy.combination)
    setting = Setting(seeded, group, precision, on, off, expected.at(at_reference(subject.vocab or VOCAB)), needs_weight)
    answers: tuple[Probe, ...] = ()
    if not still_random and not quick:
        answers = probes(setting) if name == KL else policy_probes(setting)
        if top_p is not None:
            answers = (*answers, nucleus_probe(seeded, on, top_p, group, exchangeable, precision))
    if random:
        # In another dtype the draws are others: that comparison would tell nothing.
        answers = tuple(probe for probe in answers if probe.name not in ("float32", "bfloat16"))
    return Part(
        name,
        "",
        on_policy,
        off_policy,
        form_of(expected, precision.match) if name == KL else None,
        cosine(on, "reverse_kl") if name == KL else math.nan,
        tuple(replace(probe, part=name) for probe in answers),
        group,
        precision,
        setting.curve,
        _cosines(on, off),
        all(f.size == 0 for f in [*on, *off]),
    )


def _cosines(on: Sequence[ExpectedGradient], off: Sequence[ExpectedGradient]) -> pd.DataFrame:
    rows = [
        (policy, target, cosine(expected_gradients, target))
        for policy, expected_gradients in (("on", on), ("off", off))
        for target in CANDIDATES
        if target != "zero"
    ]
    return pd.DataFrame(rows, columns=["policy", "target", "cosine"])
