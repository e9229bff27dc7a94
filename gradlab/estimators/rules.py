"""Which compositions mean something: the rules an `Estimator` is checked by, one function for each concern."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral, Real
from typing import TYPE_CHECKING

from gradlab._common.names import check_name
from gradlab.estimators.kernels import KERNELS, VOCABULARY_KERNELS

if TYPE_CHECKING:
    from gradlab.estimators.estimator import Estimator

PLACEMENTS = ("loss", "reward", "loss+reward", "straight_through")
CREDITS = ("token", "to_go", "return", "sequence")
WEIGHTS = ("none", "token", "prefix", "sequence")
NORMALISERS = ("sum", "mean", "token_mean", "fixed")
BASELINES = ("kl", "group_mean", "leave_one_out")

#: Whether a rule is broken, and what to say then.
Rule = tuple[bool, str]


def check(e: Estimator) -> None:
    """Refuse unknown names, bounds that are none, and combinations that mean nothing, saying why and what would."""
    _check_names(e)
    for what in ("truncate", "clip", "clamp_log_ratio", "clamp_value"):
        bound = getattr(e, what)
        if bound is not None and (
            isinstance(bound, bool) or not isinstance(bound, Real) or not 0 < float(bound) < float("inf")
        ):
            raise ValueError(f"{what} must be a positive number or None, got {bound!r}")
    for rules in (_of_credit, _of_kernel, _of_weight, _of_baseline):
        for broken, message in rules(e):
            if broken:
                raise ValueError(f"impossible estimator: {message}")
    if e.gradient_kernel is not None:
        check_name("gradient_kernel", e.gradient_kernel, list(KERNELS))


def _check_names(e: Estimator) -> None:
    check_name("kernel", e.kernel, [*KERNELS, *VOCABULARY_KERNELS])
    known = {"placement": PLACEMENTS, "credit": CREDITS, "weight": WEIGHTS, "normalise": NORMALISERS}
    for what, allowed in known.items():
        check_name(what, getattr(e, what), allowed)
    if e.baseline is not None:
        check_name("baseline", e.baseline, BASELINES)


def _of_credit(e: Estimator) -> Iterator[Rule]:
    """What a credit goes with: a loss differentiates each term where it stands, a whole response has one weight."""
    yield (
        e.placement == "loss" and e.credit not in ("token", "sequence"),
        f"a loss differentiates each term where it stands, so credit={e.credit!r} has no meaning with placement='loss'; "
        "use credit='token' or 'sequence', or placement='reward' for credit over later tokens",
    )
    yield (
        e.placement == "straight_through" and e.credit != "token",
        f"straight_through replaces a per-token gradient; credit must be 'token', got {e.credit!r}",
    )
    yield (
        e.credit == "sequence" and e.weight not in ("none", "sequence"),
        f"a whole-response kernel has one weight: weight must be 'none' or 'sequence', got {e.weight!r}",
    )


def _of_kernel(e: Estimator) -> Iterator[Rule]:
    """What a kernel goes with: one over the vocabulary has no sampled coefficient to exchange, clamp or sum over responses."""
    yield (
        e.on_vocabulary and e.credit == "sequence",
        f"{e.kernel!r} sums over the vocabulary of one step; over whole responses that sum is the KL itself, "
        "gl.exact.gradient('reverse_kl', scenario); use credit='token', 'to_go' or 'return'",
    )
    yield (
        e.on_vocabulary and e.placement == "straight_through",
        f"straight_through exchanges the gradient of a sampled kernel; {e.kernel!r} is not one of {list(KERNELS)}",
    )
    yield (
        (e.on_vocabulary or KERNELS[e.kernel].times_reference) and (e.clamp_log_ratio is not None or e.clamp_value is not None),
        f"clamps tame a kernel that is unbounded in the log-ratio of the sampled token; {e.kernel!r} is not one",
    )
    yield (
        e.gradient_kernel is not None and e.placement != "straight_through",
        f"gradient_kernel belongs to placement='straight_through', got placement={e.placement!r}",
    )


def _of_weight(e: Estimator) -> Iterator[Rule]:
    """What acts on an importance weight needs one; a clipped or differentiated one stands alone."""
    yield (
        e.weight == "none" and (e.differentiate_weight or e.truncate is not None or e.clip is not None),
        "differentiate_weight, truncate and clip act on an importance weight, and weight is 'none'; "
        "choose weight='token', 'prefix' or 'sequence'",
    )
    yield (
        e.clip is not None and e.placement != "reward",
        f"clip is PPO's clipped surrogate of a reward; placement is {e.placement!r}, use 'reward' or truncate the weight",
    )
    yield (
        e.clip is not None and (e.truncate is not None or e.on_vocabulary),
        "clip bounds the ratio on its own and multiplies a sampled coefficient: it goes neither with truncate nor with "
        f"a vocabulary kernel (kernel={e.kernel!r}, truncate={e.truncate!r})",
    )
    yield (
        e.on_vocabulary and e.differentiate_weight and e.placement in ("reward", "loss+reward"),
        "complete Rao–Blackwell writes the gradient of its prefix weight out as the reward term; differentiating the "
        "weight as well would count it twice: leave differentiate_weight off, or use placement='loss'",
    )


def _of_baseline(e: Estimator) -> Iterator[Rule]:
    """A baseline is subtracted from a reward; one of a group compares whole responses."""
    yield (
        e.baseline is not None and e.placement != "reward",
        f"a baseline is subtracted from a reward; placement must be 'reward', got {e.placement!r}",
    )
    yield (
        e.baseline == "kl" and (e.on_vocabulary or e.credit == "sequence"),
        "baseline='kl' subtracts the step's KL from a sampled kernel: use it with k1, k2, k3 … and credit 'token', "
        "'to_go' or 'return'",
    )
    yield (
        e.grouped and e.credit not in ("return", "sequence"),
        f"a group baseline compares whole responses: credit must be 'return' or 'sequence', got {e.credit!r}",
    )
    yield (
        e.grouped and (e.clip is not None or (e.differentiate_weight)),
        "a group baseline is offered for detached, unclipped weights only",
    )
    yield (
        e.grouped != (e.group is not None) or (e.group is not None and not (isinstance(e.group, Integral) and e.group >= 2)),
        "group is the number of responses to one prompt, a whole number of at least 2, and goes with a group baseline; got "
        f"baseline={e.baseline!r}, group={e.group!r}",
    )
