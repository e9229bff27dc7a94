"""The audit of one loss: expected gradients in every world, what they are, and how the loss behaves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch

from gradlab._common.names import several
from gradlab.audit import checks
from gradlab.audit.batch import Subject
from gradlab.audit.bind import bind
from gradlab.audit.call import loss_gradient
from gradlab.audit.candidates import check
from gradlab.audit.engine import REPEATS
from gradlab.audit.examine import KL, POLICY, Part, examine
from gradlab.audit.forms import Form
from gradlab.audit.identify import SCOPES, Identification
from gradlab.audit.parts import REWARDS, kl_part, policy_part, rewarded
from gradlab.audit.precision import Precision
from gradlab.audit.probes import NAMES
from gradlab.audit.probes.setting import Probe
from gradlab.audit.roles import OF_THE_TASK, role_of
from gradlab.audit.state import restored, without_factor
from gradlab.audit.worlds import PADDING, VOCAB, AuditScenario, batch, standard
from gradlab.measure import one_thread

#: Place of a probe among those that failed, the gravest first.
_RANK = {name: rank for rank, name in enumerate(NAMES, 1)}


@dataclass(frozen=True, eq=False)
class Audit:
    """What a loss descends, on-policy and off-policy, and how it behaves.

    kl: the KL part, what is left at advantages of 0. policy: the policy part, what the task's advantages add. first: probes of the
    loss as a whole. random: it draws.

    on_policy, off_policy: verdicts of the KL part, or of the policy part where there is no other; their text tells both. total: of
    both together. form: the composition with the same gradient at every response, if there is one. cosine: of the expected
    gradient with that of the sequence reverse KL, mean over the on-policy worlds. probes: questions and answers. group: how many
    responses were enumerated together. precision: what the loss computes in. curve: coefficient and loss of one token against its
    log-ratio. cosines: of both expected gradients with every objective.

    >>> def k2(log_probs, ref_log_probs, mask):
    ...     return (mask * (log_probs - ref_log_probs) ** 2 / 2).sum() / len(mask)
    >>> found = gl.audit(k2)
    >>> found.on_policy.text
    'equals the gradient of the reverse KL with frozen prefixes, relative error below 1e-12, scale 1'
    >>> [probe.name for probe in found.probes if probe.passed is False]
    ['weight']
    """

    subject: Subject
    kl: Part
    policy: Part
    first: tuple[Probe, ...]
    random: bool

    @property
    def main(self) -> Part:
        """The part that verdicts are about: that of the KL, or of the policy where there is no KL."""
        return self.policy if self.kl.absent else self.kl

    @property
    def whole(self) -> bool:
        """Whether there are both parts."""
        return not self.kl.absent and not self.policy.absent

    @property
    def on_policy(self) -> Identification:
        """The verdict on-policy."""
        return self._verdict("on_policy")

    @property
    def off_policy(self) -> Identification:
        """The verdict off-policy."""
        return self._verdict("off_policy")

    def _verdict(self, where: str) -> Identification:
        found: Identification = getattr(self.main, where)
        if self.whole:
            policy: Identification = getattr(self.policy, where)
            return replace(found, text=f"{found.text} (its KL part); the policy part {policy.text}")
        if self.kl.absent:
            return replace(found, text=f"{found.text} (a policy part only; no KL part: {self.kl.absent})")
        return found

    @property
    def total(self) -> tuple[Identification, Identification]:
        """The verdict of both parts together, on-policy and off-policy; nothing where either part has none."""
        found = []
        for where in ("on_policy", "off_policy"):
            parts = [getattr(part, where) for part in (self.policy, self.kl) if not part.absent]
            if len(parts) == 1:
                found.append(parts[0])
                continue
            policy, kl = parts
            known = policy.combination and kl.combination
            combination = {k: c for k, c in {**policy.combination, **kl.combination}.items() if k != "zero"} if known else {}
            scope = max((policy.scope, kl.scope), key=list(SCOPES).index)
            text = f"is that of the two parts together: {policy.text}; {kl.text}"
            found.append(replace(kl, combination=combination, error=max(policy.error, kl.error), scope=scope, text=text))
        return found[0], found[1]

    @property
    def form(self) -> Form | None:
        """The composition with the gradient of the KL part at every response."""
        return self.kl.form

    @property
    def cosine(self) -> float:
        """Cosine of the KL part with the sequence reverse KL, on-policy."""
        return self.kl.cosine

    @property
    def probes(self) -> tuple[Probe, ...]:
        """Questions and answers, those about the KL part first; with both parts a finding says which it is about."""
        if not self.whole:
            return (*self.first, *self.main.probes)
        return (*self.first, *(replace(p, finding=f"{p.part}: {p.finding}") for p in (*self.kl.probes, *self.policy.probes)))

    @property
    def group(self) -> int:
        """How many responses were enumerated together."""
        return max(part.group for part in (self.kl, self.policy))

    @property
    def precision(self) -> Precision:
        """What the loss computes in."""
        return self.main.precision

    @property
    def curve(self) -> pd.DataFrame:
        """Coefficient and loss of one token of the KL part against its log-ratio."""
        return self.kl.curve

    @property
    def cosines(self) -> pd.DataFrame:
        """Cosines of the KL part's expected gradients with every objective."""
        return self.kl.cosines

    @property
    def failures(self) -> tuple[Probe, ...]:
        """The probes that failed, the gravest first."""
        failed = [probe for probe in self.probes if probe.passed is False]
        return tuple(sorted(failed, key=lambda probe: _RANK.get(probe.name, 0)))

    def probe(self, name: str, part: str = "") -> Probe:
        """A probe by its name, of a part if given, else the one that failed. Raises `KeyError` for an unknown one."""
        named = [probe for probe in self.probes if probe.name == name and part in ("", probe.part)]
        if not named:
            raise KeyError(name)
        return next((probe for probe in named if probe.passed is False), named[0])

    def why_not(self, target: str, off_policy: bool = False) -> str | None:
        """Why the loss does not descend `target`, in one line, or `None` when it does, up to a positive factor.

        With `off_policy` it has to do so on off-policy data as well. Raises `ValueError` for an unknown target.
        """
        check(target)
        parts = (self.policy.on_policy, self.policy.off_policy) if target in REWARDS and not self.policy.absent else None
        verdicts = parts or (self.on_policy, self.off_policy)
        for where, verdict in zip(("on-policy", "off-policy")[: 1 + off_policy], verdicts, strict=False):
            assert verdict is not None
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
                "failures": ";".join(dict.fromkeys(probe.name for probe in self.failures)), "text": verdict.text,
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
    policy: bool = True,
    quick: bool = False,
    result: str | int | None = None,
    vocab: int | None = None,
    temperature: float | None = None,
) -> Audit:
    """Find out which objective the expected gradient of a loss descends, exactly, and every way in which it misbehaves.

    loss: a `Subject`, or any function of `[B, T]` tensors whose arguments are bound by their names (`log_probs`,
    `ref_logprob`, `old_log_probs`, `response_mask`, …), by `roles` (argument → role) and `settings` (argument → value); one
    argument called `batch` or annotated `Batch` gets the whole `Batch`. returns: `loss`, or `rewards` or `advantages` when
    the KL is in the reward. group: how many responses to enumerate together; left out, 2 if the loss couples them. A loss that
    divides by the standard deviation of a group descends something else at every size, which `cosine` tells: give each size.
    result, vocab, temperature: which of several results is the loss, tokens of the policies, and what the sampler divides logits by.
    policy: look at what the task's advantages do as well; without it the KL part alone. quick: verdicts only, without probes.
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
    if isinstance(loss, Subject):
        subject = loss
    else:
        binding = {"result": result, "vocab": vocab, "temperature": temperature}
        subject = bind(loss, name=name, roles=roles, settings=settings, returns=returns, **binding)  # type: ignore[arg-type]
    if group is not None:
        if group < 1:
            raise ValueError(f"group is the number of responses enumerated together, at least 1; got {group}")
        subject = replace(subject, group=group)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is the probability of the nucleus, above 0 and up to 1; got {top_p:g}")
    # Whatever the caller has switched off, as validation code does.
    with one_thread(), torch.inference_mode(False), torch.enable_grad():
        return _audit(subject, top_p, policy, quick)


def _audit(subject: Subject, top_p: float | None, policy: bool, quick: bool) -> Audit:
    cases = standard(subject.vocab or VOCAB, subject.temperature)
    moderate = next(case for case in cases if case.name == "moderate" and case.off_policy)
    random = checks.is_random(subject, moderate)
    first: tuple[Probe, ...] = ()
    whole, steady = subject, restored(subject) if random else None
    if steady is not None and not checks.is_random(steady, moderate):
        subject, random, first = steady, False, (_state(subject, moderate),)
    if random:
        warnings.warn(f"{subject.name} is random: two calls with one batch differ; its gradients are averaged", stacklevel=3)
    # Checks and probes compare calls with each other, which takes the same draws in both.
    seeded = checks.seeded(subject) if random else subject
    kl, task = Part(KL, "not looked at"), Part(POLICY, "not looked at")
    is_rewarded = (
        _can_be_rewarded(subject) and not (random and checks.is_random(seeded, moderate)) and rewarded(seeded, moderate)
    )
    kl = examine(KL, kl_part(subject), kl_part(seeded), random, top_p, quick)
    unknown = kl.on_policy is not None and not kl.on_policy.combination
    over = without_factor(whole, moderate) if steady is not None and first and unknown else None
    if over is not None:  # what multiplies it changes within the call
        kl = examine(KL, kl_part(over), kl_part(over), False, top_p, quick)
    if not is_rewarded:
        task = Part(POLICY, _no_policy(subject))
    elif policy:
        task = examine(POLICY, policy_part(subject), policy_part(seeded), random, None, quick)
        if kl.silent and not task.silent:
            kl = replace(Part(KL, _no_kl(subject)), curve=kl.curve, cosines=kl.cosines)
    if random:
        first = (Probe("deterministic", False, "two calls with one batch differ", f"averaged over {REPEATS} calls"),)
    return Audit(subject, kl, task, first, random)


def _can_be_rewarded(subject: Subject) -> bool:
    return not subject.binding or any(bound.role in OF_THE_TASK for bound in subject.binding)


def _state(subject: Subject, case: AuditScenario) -> Probe:
    """The finding that a loss depends on earlier calls, with what two calls with one batch say."""
    columns = case.columns(PADDING)
    x, y = (loss_gradient(subject, *batch(columns, [0, 1])) for _ in range(2))
    size = float(x[0].norm())
    factor = float((x[0] * y[0]).sum()) / size**2 if size else math.nan
    parallel = size > 0 and float((y[0] - factor * x[0]).norm()) <= 1e-6 * float(y[0].norm())
    how = (
        f"a factor that changes from call to call, here by {factor:.4g}, as an adaptive coefficient does"
        if parallel
        else "its state"
    )
    return Probe(
        "state", False,
        f"it depends on earlier calls: {how}; every call is given the state it begins with, so that verdicts hold up to that factor"
        if parallel
        else f"it depends on earlier calls: {how}; every call is given the state it begins with",
        f"two calls with one batch: loss {float(x[1]):.6g} → {float(y[1]):.6g}",
    )  # fmt: skip


def _no_policy(subject: Subject) -> str:
    given = [bound.argument for bound in subject.binding if bound.role in ("advantages", "rewards", "token_rewards", "returns")]
    if given:
        return f"{' and '.join(given)} {'does' if len(given) == 1 else 'do'} not change the gradient"
    return "no argument is an advantage or a reward" if subject.binding else "advantages and rewards do not change the gradient"


def _no_kl(subject: Subject) -> str:
    zero = [bound for bound in subject.binding if bound.role in ("0", "0.0") and role_of(bound.argument) == "coefficient"]
    if zero:
        name = zero[0].argument
        return f"the coefficient {name} is 0 by default; --set {name}=0.04 turns it on"
    if subject.binding and not any(
        bound.role.startswith("reference") or bound.role == "log_ratio" for bound in subject.binding
    ):
        return "no argument is the reference's"
    return "no gradient reaches the policy where advantages are 0"


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
