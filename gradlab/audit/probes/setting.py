"""What the probes look at, and the shape of their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch
from torch import Tensor

from gradlab.audit import curve
from gradlab.audit.batch import Batch, Subject
from gradlab.audit.engine import ExpectedGradient
from gradlab.audit.precision import Precision
from gradlab.audit.synthetic import Tokens, coefficients, responses, sums_over_tokens


@dataclass(frozen=True)
class Probe:
    """The answer to one question: `passed` is `None` where it does not apply; `finding` says what was seen, `example` how.

    `part` is the part of a whole loss that was asked.

    >>> probe = gl.audit.Probe("padding", True, "the gradient of padding is 0", "")
    >>> probe.passed
    True
    """

    name: str
    passed: bool | None
    finding: str
    example: str
    part: str = ""


@dataclass(frozen=True, eq=False)
class Setting:
    """What the probes look at: the loss, its precision, how many responses a batch needs, and its fields by world."""

    subject: Subject
    group: int
    precision: Precision
    on_policy: Sequence[ExpectedGradient]
    off_policy: Sequence[ExpectedGradient]
    at_reference: ExpectedGradient
    needs_weight: bool

    @cached_property
    def curve(self) -> pd.DataFrame:
        """Coefficient and loss of one token against its log-ratio."""
        return curve.sweep(curve.of_token(self.subject, self.group - 1, self.vocab))

    @property
    def vocab(self) -> int:
        """Tokens of synthetic policies: two, or as many as the loss needs."""
        return self.subject.vocab or 2

    def at(self, *rows: Tokens, columns: int = 5, padding_seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        """Coefficients `[B, T]` of a batch; a lone response gets the companions that the loss needs."""
        return self.coefficients(*rows, columns=columns, padding_seed=padding_seed, dtype=dtype)[0]

    def coefficients(
        self, *rows: Tokens, columns: int = 5, padding_seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, float]:
        """Coefficients `[B, T]` of a batch, and the loss."""
        return coefficients(self.subject, self._batch(*rows, columns=columns, padding_seed=padding_seed, dtype=dtype))

    def sums_over_tokens(self, row: Tokens) -> bool:
        """Whether the loss sums over the vocabulary, whatever was drawn."""
        return sums_over_tokens(self.subject, self._batch(row, columns=5, padding_seed=0, dtype=torch.float64))

    def _batch(self, *rows: Tokens, columns: int, padding_seed: int, dtype: torch.dtype) -> Batch:
        # Companions differ: a group whose members are all alike is a special case for whatever divides by its spread.
        companions = [Tokens.at(0.1 + 0.05 * k, -0.2, advantage=-rows[0].advantage) for k in range(self.group - len(rows))]
        given = (*rows, *companions)
        return responses(*given, columns=columns, padding_seed=padding_seed, dtype=dtype, vocab=self.vocab)[0]

    def same(self, x: Tensor, y: Tensor) -> bool:
        """Whether two tensors agree to rounding."""
        return bool((x - y).abs().max() <= self.precision.slack * max(float(x.abs().max()), float(y.abs().max()), 1e-300))


def value_slopes(s: Setting, row: Tokens) -> tuple[Tensor, Tensor]:
    """Slopes of the value in each `log π`, with the behaviour held, and with it moved along so that ρ stays put."""
    h = s.precision.step
    slopes_by_case = []
    for with_weight in (True, False):
        slopes = []
        for t in range(len(row.log_prob)):

            def value(step: float, t: int = t, with_weight: bool = with_weight) -> float:
                def shifted(numbers: Sequence[float], by: float) -> list[float]:
                    return [x + by * (u == t) for u, x in enumerate(numbers)]

                weight = shifted(row.log_weight, step) if with_weight else row.log_weight
                return s.coefficients(Tokens(shifted(row.log_prob, step), shifted(row.log_ratio, step), weight, row.advantage))[
                    1
                ]

            slopes.append((value(h) - value(-h)) / (2 * h))
        slopes_by_case.append(torch.tensor(slopes, dtype=torch.float64))
    return slopes_by_case[0], slopes_by_case[1]


def near(s: Setting, x: Tensor, y: Tensor) -> bool:
    """Whether a gradient and finite differences agree as well as these can."""
    return float((x - y).abs().max()) <= s.precision.slope * max(float(x.abs().max()), float(y.abs().max()))
