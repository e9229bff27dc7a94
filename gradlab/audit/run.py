"""The audit of one loss: expected gradients in every world, what they are, and how the loss behaves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch

from gradlab._common.names import several
from gradlab.audit import checks, curve
from gradlab.audit.batch import Subject
from gradlab.audit.bind import bind
from gradlab.audit.call import LossError
from gradlab.audit.candidates import CANDIDATES, check
from gradlab.audit.engine import REPEATS, ExpectedGradient, check_affordable, expected_gradient, rounding_error
from gradlab.audit.forms import Form, form
from gradlab.audit.identify import Identification, cosine, identify
from gradlab.audit.precision import PRECISIONS, Precision
from gradlab.audit.probes import probes
from gradlab.audit.probes.nucleus import nucleus_probe
from gradlab.audit.probes.setting import Probe, Setting
from gradlab.audit.worlds import AuditScenario, at_reference, equal_lengths, standard
from gradlab.measure import one_thread


@dataclass(frozen=True, eq=False)
class Audit:
    """What a loss descends, on-policy and off-policy, and how it behaves.

    on_policy, off_policy: verdicts. form: the composition with the same gradient at every response, if there is one. cosine:
    of the expected gradient with that of the sequence reverse KL, mean over the on-policy worlds. probes: questions and
    answers. group: how many responses were enumerated together. precision: what the loss computes in. curve: coefficient and
    loss of one token against its log-ratio. cosines: of both expected gradients with every objective.

    >>> def k2(log_probs, ref_log_probs, mask):
    ...     return (mask * (log_probs - ref_log_probs) ** 2 / 2).sum() / len(mask)
    >>> found = gl.audit(k2)
    >>> found.on_policy.text
    'equals the gradient of the reverse KL with frozen prefixes, relative error below 1e-12, scale 1'
    >>> [probe.name for probe in found.probes if probe.passed is False]
    ['weight']
    """

    subject: Subject
    on_policy: Identification
    off_policy: Identification
    form: Form | None
    cosine: float
    probes: tuple[Probe, ...]
    group: int
    precision: Precision
    random: bool
    curve: pd.DataFrame
    cosines: pd.DataFrame

    @property
    def failures(self) -> tuple[Probe, ...]:
        """The probes that failed, the gravest first."""
        return tuple(probe for probe in self.probes if probe.passed is False)

    def probe(self, name: str) -> Probe:
        """A probe by its name. Raises `KeyError` for an unknown one."""
        return {probe.name: probe for probe in self.probes}[name]

    def why_not(self, target: str, off_policy: bool = False) -> str | None:
        """Why the loss does not descend `target`, in one line, or `None` when it does, up to a positive factor.

        With `off_policy` it has to do so on off-policy data as well. Raises `ValueError` for an unknown target.
        """
        check(target)
        for where, verdict in (("on-policy", self.on_policy), ("off-policy", self.off_policy))[: 1 + off_policy]:
            if not verdict.descends(target):
                worst = "".join(f"; {probe.name}: {probe.finding}" for probe in self.failures[:1])
                return f"{self.subject.name} does not descend {target} {where}: its expected gradient {verdict.text}{worst}"
        leaks = [probe.finding for probe in self.failures if probe.name == "mask"]
        return f"{self.subject.name} does not descend {target}: {leaks[0]}" if leaks else None

    def rows(self) -> list[dict[str, Any]]:
        """One row on-policy and one off-policy, see `frame`."""
        subject = self.subject
        return [
            {
                "subject": subject.name, "package": subject.package, "version": subject.version, "function": subject.function,
                "configuration": " ".join(f"{k}={v}" for k, v in subject.configuration.items()), "policy": policy,
                "verdict": verdict.name, "scale": verdict.scale, "error": verdict.error, "scope": verdict.scope,
                "cosine": cosine, "closest": verdict.closest, "cosine_closest": verdict.cosine,
                "form": self.form.name if self.form else "", "group": self.group,
                "precision": self.precision.name,
                "failures": ";".join(probe.name for probe in self.failures), "text": verdict.text,
            }
            for policy, verdict, cosine in (("on", self.on_policy, self.cosine), ("off", self.off_policy, self._off_cosine))
        ]  # fmt: skip

    @property
    def _off_cosine(self) -> float:
        rows = self.cosines[(self.cosines["target"] == "reverse_kl") & (self.cosines["policy"] == "off")]
        return float(rows["cosine"].iloc[0])


def audit(
    loss: Subject | Callable[..., Any],
    *,
    name: str | None = None,
    roles: Mapping[str, str] | None = None,
    settings: Mapping[str, object] | None = None,
    returns: str = "loss",
    group: int | None = None,
    top_p: float | None = None,
) -> Audit:
    """Find out which objective the expected gradient of a loss descends, exactly, and every way in which it misbehaves.

    loss: a `Subject`, or any function of `[B, T]` tensors whose arguments are bound by their names (`log_probs`,
    `ref_logprob`, `old_log_probs`, `response_mask`, …), by `roles` (argument → role) and `settings` (argument → value); one
    argument called `batch` or annotated `Batch` gets the whole `Batch`. returns: `loss`, or `rewards` or `advantages` when
    the KL is in the reward. group: how many responses to enumerate together; left out, 2 if the loss couples them. A loss that
    divides by the standard deviation of a group descends something else at every size, which `cosine` tells: give each size.
    top_p: ask also, as the probe `nucleus`, what becomes of it when tokens are drawn from that nucleus of the policy and their
    log-probabilities are reported from before the cut.

    Identity: `E_{y~μ}[∇ loss({y})]`, every response (or group) of small trees with an end token enumerated near and far from the
    reference, compared with the gradients of `gl.TARGETS` and pairs of them, jointly and up to one factor.
    Raises `ValueError` when arguments cannot be bound, or the loss raises, is not a scalar, not differentiable, or changes its
    inputs, or when groups of that size are too many. Warns when the loss is random, and averages it.

    >>> def k3(log_probs, ref_log_probs, mask):
    ...     log_delta = ref_log_probs - log_probs
    ...     return (mask * (log_delta.exp() - 1 - log_delta)).sum() / len(mask)
    >>> found = gl.audit(k3)
    >>> found.on_policy.text
    'equals the gradient of the forward KL with frozen prefixes, relative error below 1e-12, scale 1'
    """
    subject = loss if isinstance(loss, Subject) else bind(loss, name=name, roles=roles, settings=settings, returns=returns)
    if group is not None:
        if group < 1:
            raise ValueError(f"group is the number of responses enumerated together, at least 1; got {group}")
        subject = replace(subject, group=group)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is the probability of the nucleus, above 0 and up to 1; got {top_p:g}")
    # Whatever the caller has switched off, as validation code does.
    with one_thread(), torch.inference_mode(False), torch.enable_grad():
        return _audit(subject, top_p)


def _audit(subject: Subject, top_p: float | None) -> Audit:
    cases = standard()
    moderate = next(case for case in cases if case.name == "moderate" and case.off_policy)
    random = checks.is_random(subject, moderate)
    if random:
        warnings.warn(f"{subject.name} is random: two calls with one batch differ; its gradients are averaged", stacklevel=3)
    # Checks and probes compare calls with each other, which takes the same draws in both.
    seeded = checks.seeded(subject) if random else subject
    still_random = random and checks.is_random(seeded, moderate)
    precision = PRECISIONS[0] if still_random else checks.precision(seeded, moderate)
    coupled = not still_random and subject.group is None and checks.couples(seeded, moderate, precision.match)
    group = subject.group or (2 if coupled else 1)
    exchangeable = not still_random and group > 1 and checks.exchangeable(seeded, moderate, group, precision.match)
    check_affordable(subject, group, random, exchangeable)
    expected_gradients = _ExpectedGradients(subject, group, random, exchangeable, precision)
    on, off = ([expected_gradients.at(case) for case in cases if case.off_policy is is_off] for is_off in (False, True))
    on_policy, off_policy = (
        identify(expected_gradients.scopes(is_off), precision.match, expected_gradients.rounding) for is_off in (False, True)
    )
    # Weights are missing where off-policy data change what is descended.
    needs_weight = not on_policy.combination or list(on_policy.combination) != list(off_policy.combination)
    setting = Setting(
        seeded,
        group,
        precision,
        on,
        off,
        expected_gradients.at(at_reference()),
        needs_weight,
        curve.sweep(curve.of_token(seeded, group - 1)),
    )
    answers = () if still_random else probes(setting)
    if top_p is not None and not still_random:
        answers = (*answers, nucleus_probe(seeded, on, top_p, group, exchangeable, precision))
    if random:
        # In another dtype the draws are others: that comparison would tell nothing.
        answers = tuple(probe for probe in answers if probe.name not in ("float32", "bfloat16"))
        answers = (Probe("deterministic", False, "two calls with one batch differ", f"averaged over {REPEATS} calls"), *answers)
    return Audit(
        subject, on_policy, off_policy, _form(expected_gradients, precision.match), cosine(on, "reverse_kl"), answers, group, precision,
        random, setting.curve, _cosines(on, off),
    )  # fmt: skip


class _ExpectedGradients:
    """The fields of a loss, computed when first asked for."""

    def __init__(
        self, subject: Subject, group: int, random: bool, exchangeable: bool = False, precision: Precision = PRECISIONS[0]
    ) -> None:
        self.subject, self.group, self.random = subject, group, random
        self.exchangeable, self.precision = exchangeable, precision
        self.known: dict[AuditScenario, ExpectedGradient] = {}
        self.rounded: dict[AuditScenario, float] = {}

    def at(self, case: AuditScenario) -> ExpectedGradient:
        if case not in self.known:
            self.known[case] = expected_gradient(self.subject, case, self.group, self.random, self.exchangeable)
        return self.known[case]

    def rounding(self, known: ExpectedGradient) -> float:
        """The norm of the rounding error in the mean of a field.

        0 for a loss precise to float64, which is what its answers to small changes have shown, and for one whose randomness is
        larger.
        """
        if self.random or self.precision is PRECISIONS[0]:
            return 0.0
        if known.case not in self.rounded:
            self.rounded[known.case] = rounding_error(
                self.subject, known, self.group, self.exchangeable, self.precision.perturbation
            )
        return self.rounded[known.case]

    def scopes(self, off_policy: bool) -> Iterator[tuple[str, Sequence[ExpectedGradient]]]:
        """Fields by the scope in which a verdict has to hold, the widest first."""
        near, moderate, far = (case for case in standard() if case.off_policy is off_policy)
        equal_length = [case for case in equal_lengths() if case.off_policy is off_policy]
        for scope, cases in (
            ("everywhere", [near, moderate, far]), ("not far", [near, moderate]), ("near", [near]),
            ("equal lengths", equal_length), ("equal lengths, near", equal_length[:2]),
        ):  # fmt: skip
            yield scope, [self.at(case) for case in cases]


def _form(expected_gradients: _ExpectedGradients, tolerance: float) -> Form | None:
    """The form of single responses, whatever they are combined with; none for a loss that needs a group."""
    if expected_gradients.group != 1:
        expected_gradients = _ExpectedGradients(expected_gradients.subject, 1, expected_gradients.random)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a standard deviation of one response, for example
            return form([expected_gradients.at(case) for case in standard() if case.name != "far"], tolerance)
    except LossError:
        return None


def _cosines(on: Sequence[ExpectedGradient], off: Sequence[ExpectedGradient]) -> pd.DataFrame:
    rows = [
        (policy, target, cosine(expected_gradients, target))
        for policy, expected_gradients in (("on", on), ("off", off))
        for target in CANDIDATES
        if target != "zero"
    ]
    return pd.DataFrame(rows, columns=["policy", "target", "cosine"])


def frame(audits: Sequence[Audit]) -> pd.DataFrame:
    """One row per audited configuration, on-policy and off-policy: verdict, scale, cosine to the sequence reverse KL, failures.

    >>> def k1(log_probs, ref_log_probs, mask):
    ...     return (mask * (log_probs - ref_log_probs)).sum() / len(mask)
    >>> gl.audit.frame([gl.audit(k1)])[["policy", "verdict"]].values.tolist()
    [['on', 'zero'], ['off', '−behaviour_kl']]
    """
    listed = several(audits)
    for audited in listed:
        if not isinstance(audited, Audit):
            raise ValueError(f"audits must be what gl.audit(…) returns, got {audited!r}")
    return pd.DataFrame([row for audited in listed for row in audited.rows()])
