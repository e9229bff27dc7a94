"""Divergences over the vocabulary that have a parameter, and those over the likeliest tokens alone, which distillation descends.

All are summed over the prefixes that the sampler visits. A parameter is found from the expected gradient itself: it is the one at
which the gradient of the divergence is parallel to it in every world.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gradlab.audit.worlds import AuditScenario

#: Function of the rows of log π and log ref, `[r, v]`, with a value for each row.
Rows = Callable[[Tensor, Tensor], Tensor]


def _kl(x: Tensor, y: Tensor) -> Tensor:
    return (x.exp() * (x - y)).sum(-1)


def _mixed(x: Tensor, y: Tensor, share: float) -> Tensor:
    """Log of `(1 − share) e^x + share e^y`."""
    weights = torch.tensor([1 - share, share], dtype=x.dtype).log()
    return torch.stack([x + weights[0], y + weights[1]]).logsumexp(0)


def _jensen_shannon(x: Tensor, y: Tensor, beta: float) -> Tensor:
    middle = _mixed(x, y, beta)
    return beta * _kl(y, middle) + (1 - beta) * _kl(x, middle)


def _swapped(x: Tensor, y: Tensor, beta: float) -> Tensor:
    middle = _mixed(x, y, 1 - beta)
    return beta * _kl(y, middle) + (1 - beta) * _kl(x, middle)


def _alpha(x: Tensor, y: Tensor, alpha: float) -> Tensor:
    return (1 - (alpha * x + (1 - alpha) * y).exp().sum(-1)) / (alpha * (1 - alpha))


@dataclass(frozen=True)
class Family:
    """A divergence with a parameter: its name, how a verdict says it, where the parameter may lie, and its value at every row.

    >>> from gradlab.audit.divergences import FAMILIES
    >>> FAMILIES["skew_reverse_kl"].words("0.1")
    'the skew reverse KL(π ‖ 0.1 π + 0.9 ref) with frozen prefixes'
    """

    name: str
    said: str
    low: float
    high: float
    rows: Callable[[Tensor, Tensor, float], Tensor]

    def words(self, parameter: str) -> str:
        """How a verdict names it."""
        return f"{self.said.format(p=parameter, q=f'{1 - float(parameter):.4g}')} with frozen prefixes"


#: Parameters at the ends of a range are plain KLs and left to these.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("generalised_jsd", "the generalised Jensen–Shannon divergence, β = {p} (GKD)", 0.02, 0.98, _jensen_shannon),
        Family(
            "skew_reverse_kl", "the skew reverse KL(π ‖ {p} π + {q} ref)", 0.02, 0.98,
            lambda x, y, a: _kl(x, _mixed(y, x, a)),
        ),
        Family(
            "skew_forward_kl", "the skew forward KL(ref ‖ {p} ref + {q} π)", 0.02, 0.98,
            lambda x, y, a: _kl(y, _mixed(x, y, a)),
        ),
        Family("alpha", "the α divergence (1 − Σ π^α ref^(1−α)) / (α(1−α)), α = {p}", -1.0, 3.0, _alpha),
        Family(
            "tempered_reverse_kl", "the reverse KL of the distributions at temperature {p}", 0.2, 5.0,
            lambda x, y, t: _kl((x / t).log_softmax(-1), (y / t).log_softmax(-1)),
        ),
        Family(
            "tempered_forward_kl", "the forward KL of the distributions at temperature {p}", 0.2, 5.0,
            lambda x, y, t: _kl((y / t).log_softmax(-1), (x / t).log_softmax(-1)),
        ),
        Family(
            "swapped_jsd", "a Jensen–Shannon divergence whose mixture has its weights swapped, β = {p}: β and 1 − β stand on the "
            "wrong policies", 0.02, 0.98, _swapped,
        ),
    )
}  # fmt: skip


def _raw(x: Tensor, y: Tensor) -> Tensor:
    return _kl(x, y)


def _generalised(x: Tensor, y: Tensor) -> Tensor:
    return (x.exp() * (x - y) - x.exp() + y.exp()).sum(-1)


def _renormalised(x: Tensor, y: Tensor) -> Tensor:
    return _kl(x.log_softmax(-1), y.log_softmax(-1))


def _tail(x: Tensor, y: Tensor) -> Tensor:
    def whole(z: Tensor) -> Tensor:
        return torch.cat([z, torch.log1p(-z.exp().sum(-1, keepdim=True))], -1)

    return _kl(whole(x), whole(y))


_FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "raw": (_raw, "summed as it stands, which does not rest at the reference"),
    "generalised": (_generalised, "with − π + ref, which rests at the reference"),
    "renormalised": (_renormalised, "renormalised, which does not see the mass of these tokens"),
    "tail": (_tail, "with one bucket for the rest"),
}
_TOP = re.compile(r"top(\d+)_(policy|reference)_(reverse|forward)_kl_(\w+)")


def _top_rows(k: int, whose: str, direction: str, form: str) -> Rows:
    kernel = _FORMS[form][0]

    def rows(x: Tensor, y: Tensor) -> Tensor:
        chosen = (x if whose == "policy" else y).detach().topk(k, -1).indices
        one, other = x.gather(-1, chosen), y.gather(-1, chosen)
        return kernel(one, other) if direction == "reverse" else kernel(other, one)

    return rows


def top(vocab: int) -> Iterator[str]:
    """Names of divergences over the likeliest tokens, of the policy or of the reference, in their four forms (all but one token at most).

    >>> from gradlab.audit.divergences import top
    >>> len(list(top(3)))
    24
    """
    for k in range(1, vocab):
        for whose in ("policy", "reference"):
            for direction in ("reverse", "forward"):
                for form in _FORMS:
                    # The renormalised one of a single token is 0; with all but one, a bucket for the rest is the whole.
                    if not (form == "renormalised" and k == 1) and not (form == "tail" and k == vocab - 1):
                        yield f"top{k}_{whose}_{direction}_kl_{form}"


def is_divergence(name: str) -> bool:
    """Whether a name is of a family with its parameter in brackets, `generalised_jsd(0.3)`, or of a sum over likely tokens."""
    family, _, rest = name.partition("(")
    try:
        return (
            family in FAMILIES and rest.endswith(")") and float(rest[:-1]) == float(rest[:-1])
            if rest
            else bool(_TOP.fullmatch(name))
        )
    except ValueError:
        return False


def words(name: str) -> str:
    """How a verdict names a divergence, see `is_divergence`."""
    if match := _TOP.fullmatch(name):
        k, whose, direction, form = match.groups()
        tokens = "likeliest token" if k == "1" else f"{k} likeliest tokens"
        return f"the {direction} KL over the {whose}'s {tokens} with frozen prefixes, {_FORMS[form][1]}"
    family, _, rest = name.partition("(")
    return FAMILIES[family].words(rest.removesuffix(")"))


def gradient(name: str, case: AuditScenario) -> Tensor:
    """Gradient `[p]` of a divergence in a world, by autograd through its definition."""
    if match := _TOP.fullmatch(name):
        k, whose, direction, form = match.groups()
        return _gradient(_top_rows(int(k), whose, direction, form), case)
    family, _, rest = name.partition("(")
    return of_family(FAMILIES[family], float(rest.removesuffix(")")), case)


@lru_cache(maxsize=8192)
def of_family(family: Family, parameter: float, case: AuditScenario) -> Tensor:
    """Gradient `[p]` of a family's member in a world."""
    return _gradient(lambda x, y: family.rows(x, y, parameter), case)


def _gradient(rows: Rows, case: AuditScenario) -> Tensor:
    scenario = case.scenario
    with torch.enable_grad():
        parameters = scenario.policy.parameters.detach().clone().requires_grad_(True)
        policy = scenario.policy.with_parameters(parameters)
        values = rows(policy.table.log_softmax(-1), scenario.reference.table.log_softmax(-1).detach())
        (derivative,) = torch.autograd.grad(scenario.sampler.occupancy().detach() @ values, parameters)
    return derivative
