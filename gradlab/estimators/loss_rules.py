"""Which compositions of a whole loss mean something: the rules a `PolicyLoss` is checked by."""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Real
from typing import TYPE_CHECKING

from gradlab._common.names import check_name, check_real
from gradlab.estimators import advantages
from gradlab.estimators.estimator import Estimator
from gradlab.estimators.rules import NORMALISERS, Rule

if TYPE_CHECKING:
    from gradlab.estimators.policy_loss import PolicyLoss

RATIOS = ("none", "token", "prefix", "sequence", "geometric")
COMBINATIONS = ("separate", "before", "after", "head")
CREDITS = ("return", "to_go")
CLIP_FORMS = ("min", "detached", "geometric")


def check(loss: PolicyLoss) -> None:
    """Refuse unknown names, bounds that are none, and combinations that mean nothing, saying why and what would."""
    advantages.check(loss.advantage, loss.group, loss.std, loss.epsilon, loss.k)
    known = {
        "ratio": RATIOS, "correction": RATIOS, "combine": COMBINATIONS, "credit": CREDITS, "normalise": NORMALISERS,
        "clip_form": CLIP_FORMS,
    }  # fmt: skip
    for what, allowed in known.items():
        check_name(what, getattr(loss, what), allowed)
    _check_numbers(loss)
    for rules in (_of_ratio, _of_regulariser, _of_credit):
        for broken, message in rules(loss):
            if broken:
                raise ValueError(f"impossible loss: {message}")


def _check_numbers(loss: PolicyLoss) -> None:
    for what in ("dual_clip", "truncate", "correction_truncate"):
        bound = getattr(loss, what)
        if bound is not None and not (isinstance(bound, Real) and 0 < float(bound) < math.inf):
            raise ValueError(f"{what} must be a positive number or None, got {bound!r}")
    for what in ("mask", "correction_mask"):
        band = getattr(loss, what)
        if band is not None and not (_pair(band) and 0 <= band[0] < band[1]):
            raise ValueError(f"{what} is the band (a, b) of ratios that count, 0 ≤ a < b, got {band!r}")
    if loss.clip is not None and not (_pair(loss.clip) and 0 < loss.clip[0] <= 1 and loss.clip[1] > 0):  # type: ignore[index]
        raise ValueError(
            f"clip is ε, or (ε_l, ε_h) of the range 1 − ε_l … 1 + ε_h, with 0 < ε_l ≤ 1 and ε_h > 0, got {loss.clip!r}"
        )
    for what in ("discount", "gae"):
        check_real(what, getattr(loss, what))
        if not 0 <= getattr(loss, what) <= 1:
            raise ValueError(f"{what} lies between 0 and 1, got {getattr(loss, what)!r}")
    check_real("beta", loss.beta)
    if not math.isfinite(loss.beta) or loss.beta < 0:
        raise ValueError(f"beta is the coefficient of the regulariser, a number from 0 on, got {loss.beta!r}")
    if loss.negative_mask is not None:
        check_real("negative_mask", loss.negative_mask)


def _pair(given: object) -> bool:
    return (
        isinstance(given, tuple | list)
        and len(given) == 2
        and all(isinstance(x, Real) and not math.isnan(float(x)) for x in given)
    )


def _of_ratio(loss: PolicyLoss) -> Iterator[Rule]:
    """What acts on a ratio needs one, and a trust region is of one kind."""
    yield (
        loss.ratio == "none" and (loss.clip is not None or loss.mask is not None or loss.truncate is not None or loss.bypass),
        "clip, mask, truncate and bypass act on the ratio, and ratio is 'none'; choose ratio='token', 'prefix', 'sequence' or 'geometric'",
    )
    yield (
        loss.truncate is not None and loss.clip is not None,
        f"truncate is a trust region of its own: give truncate or clip, got truncate={loss.truncate!r} and clip={loss.clip!r}",
    )
    yield (
        loss.clip is None and (loss.clip_form != "min" or loss.dual_clip is not None),
        f"clip_form and dual_clip say how a clip is made: give clip, got clip_form={loss.clip_form!r}, dual_clip={loss.dual_clip!r}",
    )
    yield (
        loss.dual_clip is not None and (loss.clip_form != "min" or loss.dual_clip <= 1 + loss.clip[1]),  # type: ignore[index]
        f"dual_clip bounds PPO's clip where the advantage is negative, above 1 + ε_h: got dual_clip={loss.dual_clip!r}, clip={loss.clip!r}",
    )
    yield (
        loss.clip_form == "geometric" and loss.ratio != "geometric",
        f"clip_form='geometric' is the geometric mean of clipped ratios: ratio must be 'geometric', got {loss.ratio!r}",
    )
    yield (
        loss.correction == "none" and (loss.correction_truncate is not None or loss.correction_mask is not None),
        "correction_truncate and correction_mask act on π_old/μ, and correction is 'none'; choose correction='token', 'sequence', …",
    )
    yield (
        loss.bypass and loss.correction != "none",
        "bypass takes the ratio to the behaviour policy itself, so that nothing is left to correct: leave correction at 'none'",
    )


def _of_regulariser(loss: PolicyLoss) -> Iterator[Rule]:
    """What a regulariser goes with."""
    own = loss.regulariser
    if own is not None and not isinstance(own, Estimator):
        raise ValueError(f"regulariser is a gl.Estimator, e.g. gl.Estimator('k3') or gl.ESTIMATORS['k3-loss'], got {own!r}")
    yield (
        own is None and (loss.beta != 0 or loss.combine != "separate"),
        f"beta and combine are of a regulariser, and there is none: give regulariser=gl.Estimator('k3'), got beta={loss.beta!r}, "
        f"combine={loss.combine!r}",
    )
    if own is None:
        return
    yield (
        own.normalise != "sum",
        f"the loss normalises its regulariser with the rest: leave the regulariser's normalise at 'sum', got {own.normalise!r}",
    )
    yield (own.grouped, "the loss has its own groups; a regulariser with a group baseline cannot be part of it")
    yield (
        loss.combine != "separate" and own.placement not in ("loss", "reward"),
        f"combine={loss.combine!r} takes the kernel into the advantage: placement must be 'loss' or 'reward', got {own.placement!r}",
    )
    yield (
        loss.combine in ("before", "after") and own.weight != "none",
        f"combine={loss.combine!r} takes the kernel into the advantage, whose ratio is the loss's: the regulariser's weight must be 'none' "
        f"(got {own.weight!r}); a weight of its own goes with combine='head' or 'separate'",
    )
    yield (
        loss.combine == "before" and own.baseline is not None,
        "combine='before' compares r − βk as a whole: leave the regulariser's baseline out",
    )
    yield (
        loss.combine == "head" and own.differentiate_weight and own.clip is None,
        "the ratio of a KL head is always differentiated, as PPO's is: leave differentiate_weight off",
    )
    yield (
        loss.combine == "before" and loss.credit == "to_go" and (own.credit == "sequence" or own.on_vocabulary),
        f"a reward to go sums the kernel of sampled tokens: credit 'sequence' and vocabulary kernels have none, got {own.name}",
    )


def _of_credit(loss: PolicyLoss) -> Iterator[Rule]:
    """A credit over later tokens has no group to compare with."""
    yield (
        loss.credit == "to_go" and loss.advantage not in ("reward", "batch_std"),
        f"a group compares whole responses: credit='to_go' goes with advantage='reward' or 'batch_std', got {loss.advantage!r}",
    )
    yield (
        loss.credit == "return" and (loss.values is not None or loss.discount != 1 or loss.gae != 1),
        "values, discount and gae are of rewards to go: give credit='to_go'",
    )
    yield (
        loss.gae != 1 and loss.values is None,
        "gae weighs the errors of a value function: give values=, a function of a rollout that gives V(s_t) [n, t]",
    )
    yield (
        loss.constants is not None and not loss.batch,
        f"constants are those of a batch: advantage must be 'batch_std' or 'mean_batch_std', got {loss.advantage!r}",
    )
