"""The expected gradients of one part of a loss, world by world, computed when first asked for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

from gradlab.audit.batch import Subject
from gradlab.audit.call import LossError
from gradlab.audit.engine import ExpectedGradient, expected_gradient, rounding_error
from gradlab.audit.forms import Form, form
from gradlab.audit.precision import PRECISIONS, Precision
from gradlab.audit.worlds import VOCAB, AuditScenario, equal_lengths, standard


class ExpectedGradients:
    """The expected gradients of a loss over `vocab` tokens, sampled at a temperature."""

    def __init__(
        self, subject: Subject, group: int, random: bool, exchangeable: bool = False, precision: Precision = PRECISIONS[0]
    ) -> None:
        self.world = subject.vocab or VOCAB, subject.temperature
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
        near, moderate, far = (case for case in standard(*self.world) if case.off_policy is off_policy)
        equal_length = [case for case in equal_lengths(*self.world) if case.off_policy is off_policy]
        for scope, cases in (
            ("everywhere", [near, moderate, far]), ("not far", [near, moderate]), ("near", [near]),
            ("equal lengths", equal_length), ("equal lengths, near", equal_length[:2]),
        ):  # fmt: skip
            yield scope, [self.at(case) for case in cases]


def form_of(expected_gradients: ExpectedGradients, tolerance: float) -> Form | None:
    """The form of single responses, whatever they are combined with; none for a loss that needs a group."""
    if expected_gradients.group != 1:
        expected_gradients = ExpectedGradients(expected_gradients.subject, 1, expected_gradients.random)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a standard deviation of one response, for example
            return form(
                [expected_gradients.at(case) for case in standard(*expected_gradients.world) if case.name != "far"], tolerance
            )
    except LossError:
        return None
