"""Questions about language models: how extreme ratios get along their responses, and which tokens carry the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy
import torch
from torch import Tensor
from torch.func import jvp

from gradlab._common.arguments import check_columns, checked
from gradlab._common.names import check_name, check_probability, check_whole
from gradlab._common.streams import generator
from gradlab.estimators.coefficients import coefficients
from gradlab.estimators.estimator import Estimator, log_ratio
from gradlab.measure import by_name, one_thread
from gradlab.moments import Gradients
from gradlab.per_sample import backprop
from gradlab.policies import LanguageModel
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario, is_of
from gradlab.solvers import exact

#: A ratio is called extreme from this factor on.
EXTREME = 10.0


@checked
def rollout_of(scenario: Scenario, samples: int | None, seed: int = 0) -> Rollout:
    """All responses of a language model (`samples=None`), or that many drawn ones.

    >>> policy = gl.policies.small("names", length=2)
    >>> gl.language.rollout_of(gl.Scenario(policy, policy), samples=16).tokens.shape
    torch.Size([16, 2])
    """
    if not isinstance(scenario.policy, LanguageModel):
        raise ValueError(f"the policy must be a language model, got a {type(scenario.policy).__name__}")
    if samples is None:
        return Rollout.enumerated(scenario)
    return Rollout.from_sampler(scenario, samples, generator(seed, "language"))


@checked
def extremes(
    scenario: Scenario, samples: int | None = None, seed: int = 0, factor: float = EXTREME, level: float = 0.95
) -> pd.DataFrame:
    """How often δ = ref/π gets extreme: one row per side, `δ → 0` (over-sampled) and `δ → ∞` (under-sampled).

    `responses`: share of responses that hold a token with δ below `1/factor` (above `factor`), with Clopper–Pearson ends when
    sampled; `tokens`: the share of tokens; `furthest`: the most extreme log δ met; and the token that has it, after its text.
    Raises `ValueError` for a level outside (0, 1).

    >>> policy, reference = (gl.policies.small("addition", stage, prompts=["64+80="]) for stage in ("many", "reference"))
    >>> frame = gl.language.extremes(gl.Scenario(policy, reference))
    >>> frame["side"].tolist(), frame["furthest"].gt(0).tolist()
    (['δ → 0', 'δ → ∞'], [False, True])
    """
    check_probability("level", level)
    if not 1 < factor < np.inf:
        raise ValueError(f"factor must be a finite number above 1, got {factor!r}")
    policy: Any = scenario.policy
    with one_thread(), torch.no_grad():
        rollout = rollout_of(scenario, samples, seed)
        rows = []
        for side, sign in (("δ → 0", -1.0), ("δ → ∞", 1.0)):
            log_delta = torch.where(rollout.mask, -sign * rollout.log_ratio, -torch.inf)
            beyond = log_delta > np.log(factor)
            share = float(rollout.weight @ beyond.any(-1).double())
            low, high = (share, share) if samples is None else clopper_pearson(round(share * samples), samples, level)
            i, t = divmod(int(log_delta.argmax()), log_delta.shape[1])
            rows.append({
                "scenario": scenario.label, "side": side, "via": _via(samples), "samples": samples, "kl": _kl(scenario, rollout),
                "responses": share, "responses_low": low, "responses_high": high,
                "tokens": float(rollout.weight @ beyond.sum(-1).double() / (rollout.weight @ rollout.lengths)),
                "furthest": sign * float(log_delta[i, t]), "after": text(scenario.policy, rollout, i, t),
                "token": words(policy)[int(rollout.tokens[i, t])],
            })  # fmt: skip
    return pd.DataFrame(rows).astype({"samples": "Int64"})


@checked
def clopper_pearson(count: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a probability from `count` successes in `n` independent trials.

    Raises `ValueError` for a level outside (0, 1). Source: Clopper & Pearson, Biometrika 26 (1934) 404.

    >>> [round(end, 4) for end in gl.language.clopper_pearson(0, 10)]
    [0.0, 0.3085]
    """
    check_probability("level", level)
    check_whole("n", n)
    check_whole("count", count, least=0)
    if count > n:
        raise ValueError(f"count must be at most n, got {count} of {n}")
    ends = scipy.stats.binomtest(count, n).proportion_ci(level, method="exact")
    return float(ends.low), float(ends.high)


def along(policy: LanguageModel, rollout: Rollout, direction: Tensor) -> Tensor:
    """`⟨∇log π(y_t|s_t), direction⟩` of every sampled token, `[n, t]`, for a direction `[p]` in the policy's parameters.

    One forward-mode pass: the directional derivative of the logits, less its mean under π.

    >>> policy = gl.policies.small("names", length=2)
    >>> rollout = gl.language.rollout_of(gl.Scenario(policy, policy), samples=4)
    >>> gl.language.along(policy, rollout, policy.parameters).shape
    torch.Size([4, 2])
    """
    t, v = rollout.tokens.shape[1], policy.vocab
    # Responses that differ in their last token only are read off the same logits.
    sequences = torch.cat([rollout.responses.prompts[:, None], rollout.tokens[:, :-1]], -1)
    unique_sequences, which = torch.unique(sequences, dim=0, return_inverse=True)
    theta = policy.parameters.detach()
    centred = torch.zeros(len(unique_sequences), t, v, dtype=torch.float64)
    for rows, ids in policy.sequences(
        unique_sequences[:, 0], torch.cat([unique_sequences[:, 1:], unique_sequences[:, :1]], -1)
    ):
        features = policy.features(ids)

        def logits(parameters: Tensor, features: Tensor = features) -> Tensor:
            moved = policy.with_parameters(parameters)
            return moved.shaped(moved.network(features)[:, -t:])

        z, slope = (part.double().cpu() for part in jvp(logits, (theta,), (direction.to(theta.dtype),)))
        centred[rows] = slope - (z.softmax(-1) * slope).sum(-1, keepdim=True)
    return torch.where(rollout.mask, centred[which].gather(-1, rollout.tokens[..., None])[..., 0], 0.0)


def score_norms(policy: LanguageModel, rollout: Rollout) -> Tensor:
    """`‖∇log π(y_t|s_t)‖²` of every sampled token in the policy's parameters, `[n, t]`.

    >>> policy = gl.policies.small("names", length=1)
    >>> rollout = gl.language.rollout_of(gl.Scenario(policy, policy), samples=None)
    >>> bool((gl.language.score_norms(policy, rollout) > 0).all())
    True
    """
    t = rollout.tokens.shape[1]
    single = Gradients(rollout, torch.eye(t, dtype=torch.float64)[:, None, :] * rollout.mask_float)
    if not rollout.sampled:
        return backprop.squared_norms(policy, single)
    return backprop.pullback(policy, single, rollout.weight).square


@checked
def parts(names: Sequence[str], scenario: Scenario, samples: int | None = None, seed: int = 0,
          direction: Tensor | None = None) -> pd.DataFrame:  # fmt: skip
    """What every sampled token contributes to each estimator's gradient: one row per estimator × response × token.

    With `a` the token's coefficient, `s` its score in the policy's parameters and `u` the true gradient over its norm:
    `mass` `|a|`, `expected` `a⟨s, u⟩`, `projection` its magnitude and `second` `a²‖s‖²` (the token's own part of `E‖g‖²`; products of two
    tokens belong to neither), all times the response's weight. direction: instead of the exact ∇ of the reverse KL, which needs
    responses that can be listed. Columns also `after` (prompt and prefix), `token`, `log_ratio`, `weight`.
    Raises `ValueError` for policies that are no language models.

    >>> policy, reference = (gl.policies.small("names", stage, length=1) for stage in ("few", "reference"))
    >>> frame = gl.language.parts(["k2-loss"], gl.Scenario(policy, reference))
    >>> len(frame), bool(abs(frame["weight"].sum() - 1) < 1e-6)
    (27, True)
    """
    if not is_of(scenario, LanguageModel):
        kind = type(scenario.policy).__name__
        raise ValueError(f"parts in the parameters of a language model were asked for, the policy is a {kind}")
    policy = scenario.policy
    with one_thread(), torch.no_grad():
        rollout = rollout_of(scenario, samples, seed)
        u = exact.gradient("reverse_kl", scenario) if direction is None else direction
        projection, norm = along(policy, rollout, u / u.norm()), score_norms(policy, rollout)
        rows = torch.nonzero(rollout.mask)
        i, t = rows.unbind(-1)
        common = {
            "after": [text(policy, rollout, *cell) for cell in rows.tolist()],
            "token": [words(policy)[k] for k in rollout.tokens[i, t].tolist()],
            "weight": rollout.weight[i].numpy(),
        }
        frames = []
        for name, estimator in by_name(list(names)).items():
            assert isinstance(estimator, Estimator)
            a = coefficients(estimator, rollout).score
            ratio = log_ratio(estimator, rollout).expand_as(a)
            share = {"mass": a.abs(), "expected": a * projection, "pull": (a * projection).abs(), "second": a.square() * norm}
            columns = {key: (value * rollout.weight[:, None])[i, t].numpy() for key, value in share.items()}
            frames.append(pd.DataFrame({"estimator": name, **common, "log_ratio": ratio[i, t].numpy(), **columns}))
    return pd.concat(frames, ignore_index=True).assign(scenario=scenario.label, via=_via(samples))


@checked
def sides(frame: pd.DataFrame) -> pd.DataFrame:
    """Shares of `parts` that under-sampled tokens have: `under_probability, under_mass, under_expected, under_pull, under_second`.

    >>> policy, reference = (gl.policies.small("names", stage, length=1) for stage in ("few", "reference"))
    >>> shares = gl.language.sides(gl.language.parts(["k3-loss"], gl.Scenario(policy, reference)))
    >>> round(float(shares["under_mass"].iloc[0]), 3)
    0.5
    """
    check_columns(frame, "via", "scenario", "estimator", "weight", "log_ratio", "mass", "expected", "pull", "second")
    rows = []
    for (scenario, estimator, via), group in frame.groupby(["scenario", "estimator", "via"], sort=False):
        under = group["log_ratio"] < 0
        shares = {
            f"under_{key}": group.loc[under, key].sum() / group[key].sum() for key in ("mass", "expected", "pull", "second")
        }
        held = group.loc[under, "weight"].sum() / group["weight"].sum()
        rows.append({"scenario": scenario, "estimator": estimator, "via": via, "under_probability": held, **shares})
    return pd.DataFrame(rows)


@checked
def tokens(frame: pd.DataFrame, count: int = 8, by: str = "second") -> pd.DataFrame:
    """The tokens, in their contexts, with the largest shares of a part: rows of `parts` summed over responses, `count` per estimator.

    >>> policy, reference = (gl.policies.small("names", stage, length=1) for stage in ("few", "reference"))
    >>> frame = gl.language.tokens(gl.language.parts(["k3-loss"], gl.Scenario(policy, reference)), count=3)
    >>> len(frame), bool(frame["second"].is_monotonic_decreasing)
    (3, True)
    """
    check_columns(frame, "after", "token", "scenario", "estimator", "weight", "log_ratio", "mass", "expected", "pull", "second")
    check_whole("count", count)
    check_name("part", by, ("mass", "expected", "pull", "second"))
    key = ["scenario", "estimator", "after", "token"]
    summed = frame.groupby(key, sort=False).agg(
        {"weight": "sum", "log_ratio": "mean", "mass": "sum", "expected": "sum", "pull": "sum", "second": "sum"}
    )
    summed = summed.reset_index().rename(columns={"weight": "probability"})
    for part in ("mass", "expected", "pull", "second"):
        summed[f"{part}_share"] = summed[part] / summed.groupby(["scenario", "estimator"])[part].transform("sum")
    ordered = summed.sort_values(f"{by}_share", ascending=False, kind="stable")
    return ordered.groupby(["scenario", "estimator"], sort=False).head(count).reset_index(drop=True)


def text(policy: Any, rollout: Rollout, i: int, t: int) -> str:
    """Prompt and prefix that token `t` of response `i` follows.

    >>> policy = gl.policies.small("addition", prompts=["64+80="])
    >>> rollout = gl.language.rollout_of(gl.Scenario(policy, policy), samples=None)
    >>> gl.language.text(policy, rollout, i=0, t=0)
    '64+80='
    """
    chosen, names = policy.chosen.tolist(), words(policy)
    prompt = [names[chosen.index(k)] if k in chosen else f"<{k}>" for k in policy.prompts[int(rollout.responses.prompts[i])]]
    return "".join(prompt + [names[k] for k in rollout.tokens[i, :t].tolist()])


@checked
def words(policy: LanguageModel) -> list[str]:
    """A string for every token of the policy's vocabulary.

    >>> gl.language.words(gl.policies.small("addition"))
    ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', '+', '=']
    """
    return list(policy.words) if policy.words is not None else [f"<{k}>" for k in policy.chosen.tolist()]


def _via(samples: int | None) -> str:
    return "exact" if samples is None else "sampled"


def _kl(scenario: Scenario, rollout: Rollout) -> float:
    """KL of whole responses: exact, or Rao–Blackwellised from on-policy draws."""
    return float(rollout.weight @ rollout.divergence("full").sum(-1)) if rollout.sampled else scenario.kl()
