"""Responses of unequal length: what a length normaliser makes a loss descend, and whether responses get shorter or longer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from gradlab._common.arguments import checked
from gradlab._common.names import check_positive
from gradlab.estimators.estimator import Estimator
from gradlab.measure import ZERO_TOLERANCE, by_name, one_thread
from gradlab.moments import Moments
from gradlab.policies import Bandit, Markov, Tree
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario
from gradlab.solvers import exact

#: Size of the exact step, in units of the parameters, after which the expected length is measured.
STEP = 0.1

COLUMNS: dict[str, str] = {
    "scenario": "label of the scenario",
    "estimator": "name of the estimator before its normaliser",
    "normaliser": "sum, mean, token_mean, fixed, or `token_mean of n` responses",
    "via": "exact",
    "kl": "KL(policy ‖ reference) of whole responses, nats",
    "variable": "whether responses differ in length",
    "mean_length": "E[L], tokens",
    "length_spread": "standard deviation of L over E[L]",
    "gradient_norm": "‖E g‖, nats per unit of parameter",
    "sin_angle": "sine of the angle to the expected gradient under `sum`: relative bias left after the best rescaling; "
    "missing where that gradient is zero",
    "scale": "projection on the expected gradient under `sum` over its norm, times E[L]: 1 for a division by E[L]",
    "inverse_length": "‖E g − ∇E[1/L]‖ / ‖∇E[1/L]‖",
    "length_cosine": "cosine between −E g and ∇E[L]: above 0 a small step lengthens responses",
    "length_change": f"E[L] after a step of size {STEP} along −E g, minus before, tokens; missing for a zero gradient",
}


@checked
def expected_length(policy: Bandit | Markov | Tree) -> Tensor:
    """`E[L]` in tokens, a scalar that is differentiable in the policy's table.

    >>> policy = gl.Markov([0.0, 0.0], [[0.0, 0.0], [0.0, 0.0]], length=3, eos=1)  # ends with probability ½ at every step
    >>> gl.lengths.expected_length(policy).item()
    1.75
    """
    return policy.occupancy().sum()


@checked
def length_gradient(policy: Bandit | Markov | Tree) -> Tensor:
    """`∇E[L]` with respect to the policy's parameters, `[p]`.

    >>> policy = gl.Tree.random(vocab=2, length=2, seed=0, eos=1)
    >>> gl.lengths.length_gradient(policy).shape
    torch.Size([6])
    """
    with torch.enable_grad():
        leaf = policy.parameters.detach().clone().requires_grad_(True)
        # A bandit's length is a constant; adding nothing keeps it differentiable.
        (derivative,) = torch.autograd.grad(expected_length(policy.with_parameters(leaf)) + 0 * leaf.sum(), leaf)
    return derivative


@checked
def length_distribution(policy: Bandit | Markov | Tree) -> Tensor:
    """Probability of every length `0 … T`, `[T + 1]`.

    >>> policy = gl.Markov([0.0, 0.0], [[0.0, 0.0], [0.0, 0.0]], length=3, eos=1)  # ends with probability ½ at every step
    >>> gl.lengths.length_distribution(policy).tolist()
    [0.0, 0.5, 0.25, 0.25]
    """
    if policy.eos is None:
        probabilities = torch.zeros(policy.length + 1, dtype=torch.float64)
        probabilities[-1] = 1
        return probabilities
    p, eos = policy.table.softmax(-1), policy.eos
    ended, rows, state = [torch.zeros((), dtype=torch.float64)], torch.zeros(1, dtype=torch.long), torch.ones(1).double()
    for _ in range(policy.length - 1):
        emitted = state[:, None] * p[rows]
        ended.append(emitted[:, eos].sum())
        emitted[:, eos] = 0
        if isinstance(policy, Markov):
            state, rows = emitted.sum(0), 1 + torch.arange(policy.vocab)
        else:
            state, rows = emitted.flatten(), (rows[:, None] * policy.vocab + 1 + torch.arange(policy.vocab)).flatten()
    return torch.stack([*ended, state.sum()])


@checked
def batch_factor(distribution: Tensor, batch: int) -> Tensor:
    """Expected factor on a response of length `L` when a batch of `batch` responses is divided by all of its tokens, `[T + 1]`.

    `f(L) = batch · E[1 / (L + M)]`, `M` the tokens of the other `batch − 1` responses: 1/L for a batch of one, 1/E[L] for an
    infinite one. Entry 0 is 0. Raises `ValueError` for a batch below one. Source: derived.

    >>> import torch
    >>> distribution = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64)  # one token or two
    >>> gl.lengths.batch_factor(distribution, 1).tolist()
    [0.0, 1.0, 0.5]
    >>> [round(factor, 3) for factor in gl.lengths.batch_factor(distribution, 1000).tolist()]
    [0.0, 0.667, 0.667]
    """
    if batch < 1:
        raise ValueError(f"a batch has at least one response, got {batch!r}")
    others, one = np.ones(1), distribution.detach().numpy()
    for _ in range(batch - 1):
        others = np.convolve(others, one)
    lengths = np.arange(1, len(one))
    factors = batch * (others / (lengths[:, None] + np.arange(len(others)))).sum(-1)
    return torch.from_numpy(np.concatenate([[0.0], factors]))


@checked
def token_mean_of(estimator: Estimator, scenario: Scenario, batch: int) -> Callable[[Rollout], Tensor]:
    """The estimator under one mean over all tokens of a batch of `batch` responses, exactly in expectation.

    A per-response loss whose *mean* gradient is that of the batch's loss (its covariance is not the batch's). `exact.moments`
    takes it on policies that can be enumerated. Raises `ValueError` when the estimator has a normaliser already.

    >>> policy = gl.Tree.random(vocab=2, length=3, seed=0, eos=1)
    >>> scenario = gl.Scenario(policy, policy.perturbed(kl=0.1, seed=1))
    >>> loss = gl.lengths.token_mean_of(gl.ESTIMATORS["k2-loss"], scenario, batch=8)
    >>> gl.exact.moments(loss, scenario).mean.shape
    torch.Size([14])
    """
    if estimator.normalise != "sum":
        raise ValueError(f"the estimator already has the normaliser {estimator.normalise!r}; give one with 'sum'")
    sampler: Any = scenario.sampler
    factor = batch_factor(length_distribution(sampler), batch)

    def loss(rollout: Rollout) -> Tensor:
        return estimator(rollout) * factor[rollout.mask.sum(-1)]

    return loss


@checked
def normalisers(
    estimators: Mapping[str, Estimator], scenarios: Sequence[Scenario], batches: Sequence[int] = (), step: float = STEP
) -> pd.DataFrame:
    """What each length normaliser does to the expected gradient of each estimator, and to the length of responses.

    estimators: named, each with normaliser `sum`. batches: finite batches for `token_mean`, on policies that can be enumerated.
    Returns one row per scenario × estimator × normaliser with the columns of `COLUMNS`. All exact.

    >>> policy = gl.Tree.random(vocab=2, length=3, seed=0, eos=1)
    >>> scenario = gl.Scenario(policy, policy.perturbed(kl=0.1, seed=1))
    >>> frame = gl.lengths.normalisers({"k2-loss": gl.ESTIMATORS["k2-loss"]}, [scenario])
    >>> frame["normaliser"].tolist()
    ['sum', 'mean', 'token_mean', 'fixed']
    """
    check_positive("step", step)
    named = _estimators(estimators)
    rows: list[dict[str, Any]] = []
    for scenario in scenarios:
        with one_thread():
            policy: Any = scenario.policy
            distribution = length_distribution(policy).numpy()
            lengths = np.arange(len(distribution))
            mean = float(distribution @ lengths)
            relative_std = max(float(distribution @ lengths**2) - mean**2, 0.0) ** 0.5 / mean
            common = {"scenario": scenario.label, "via": "exact", "kl": scenario.kl(), "mean_length": mean}
            common |= {"length_spread": relative_std, "variable": relative_std > 1e-9}
            slope, inverse = length_gradient(policy), exact.gradient("inverse_length", scenario)
            for name, estimator in named.items():
                moments_by_normaliser = _under_each(estimator, scenario, batches)
                for normaliser, moments in moments_by_normaliser.items():
                    errors = _effect(moments, moments_by_normaliser["sum"], slope, inverse, policy, mean, step)
                    rows.append({**common, "estimator": name, "normaliser": normaliser, **errors})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _estimators(given: Mapping[str, Estimator]) -> dict[str, Estimator]:
    named = {name: loss for name, loss in by_name(given).items() if isinstance(loss, Estimator)}
    if len(named) < len(given):
        raise ValueError(f"a normaliser belongs to a gl.Estimator, got {given!r:.200}")
    return named


def _under_each(estimator: Estimator, scenario: Scenario, batches: Sequence[int]) -> dict[str, Moments]:
    names = ("sum", "mean", "token_mean", "fixed")
    losses: list[Any] = [replace(estimator, normalise=name) for name in names]  # type: ignore[arg-type]
    losses += [token_mean_of(estimator, scenario, batch) for batch in batches]
    moments = exact.moments(losses, scenario)
    return dict(zip([*names, *(f"token_mean of {batch}" for batch in batches)], moments, strict=True))


def _effect(
    moments: Moments, plain: Moments, slope: Tensor, inverse: Tensor, policy: Any, mean: float, step: float
) -> dict[str, float]:
    g, size, nan = moments.mean, float(moments.mean.norm()), float("nan")
    zero = size <= ZERO_TOLERANCE * (moments.trace_cov**0.5 + size)
    plain_norm = float(plain.mean.norm())
    no_gradient = plain_norm <= ZERO_TOLERANCE * (plain.trace_cov**0.5 + plain_norm)
    columns = {"gradient_norm": size, "sin_angle": nan, "scale": nan, "inverse_length": nan}
    columns |= {"length_cosine": nan, "length_change": nan}
    if not no_gradient:
        along = float(g @ plain.mean) / plain_norm
        columns["sin_angle"] = float((g - along * plain.mean / plain_norm).norm()) / size
        columns["scale"] = along / plain_norm * mean
    if float(inverse.norm()) > ZERO_TOLERANCE:
        columns["inverse_length"] = float((g - inverse).norm() / inverse.norm())
    if not zero:
        if float(slope.norm()) > ZERO_TOLERANCE:
            columns["length_cosine"] = -float(g @ slope) / size / float(slope.norm())
        columns["length_change"] = float(expected_length(policy.moved(-step * g / size))) - mean
    return columns
