"""Responses of many tokens: chains of a chosen memory, what credit does to bias, and how noise grows with the length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from gradlab._common.arguments import check_columns, checked
from gradlab._common.names import check_name, check_whole, is_several
from gradlab._common.statistics import power_law
from gradlab._common.streams import generator
from gradlab.estimators.catalogue import CATALOGUE
from gradlab.measure import by_name
from gradlab.moments import Loss, gradients, moments_of
from gradlab.policies import Markov
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario
from gradlab.solvers import exact

GAP_COLUMNS: dict[str, str] = {
    "scenario": "label of the scenario",
    "vocab": "number of tokens v",
    "length": "largest number of tokens T",
    "kl": "KL(policy ‖ reference) of whole responses, nats",
    "memory": "relaxation time of the policy's chain, tokens",
    "estimator": "catalogue name",
    "target": "objective the expected gradient is compared with",
    "via": "exact",
    "bias": "‖E g − ∇‖ / ‖∇‖",
    "cosine": "cosine between E g and ∇",
}


@checked
def lazy_chain(vocab: int, length: int, memory: float = 1.0, seed: int = 0, scale: float = 1.0) -> Markov:
    """A chain whose relaxation time is `memory` tokens: at every step it repeats the last token or draws a fresh one.

    `P = (1 − 1/memory) I + (1/memory) 1 pᵀ` with `p` a softmax of Gaussian logits of standard deviation `scale`; every
    eigenvalue but the first is `1 − 1/memory`, the first token is drawn from `p`, and `memory = 1` draws every token afresh.
    Raises `ValueError` for a memory below 1.

    >>> policy = gl.sequences.lazy_chain(vocab=4, length=16, memory=10)
    >>> round(gl.sequences.relaxation_time(policy), 6)
    10.0
    """
    check_whole("vocab", vocab, least=2)
    if not (np.isfinite(memory) and memory >= 1):
        raise ValueError(f"memory is a relaxation time in tokens: a finite number of at least 1, got {memory!r}")
    rng = generator(seed, "sequences.lazy_chain")
    p = np.exp(scale * rng.standard_normal(vocab))
    p /= p.sum()
    return Markov(np.log(p), np.log((1 - 1 / memory) * np.eye(vocab) + p / memory), length=length)


@checked
def relaxation_time(policy: Markov) -> float:
    """How many tokens a chain remembers: `1 / (1 − |λ₂|)`, with `λ₂` the second largest eigenvalue of the transition matrix.

    >>> round(gl.sequences.relaxation_time(gl.Markov([0.0, 0.0], [[0.0, 0.0], [0.0, 0.0]])), 6)  # no memory beyond one token
    1.0
    """
    eigenvalues = np.sort(np.abs(np.linalg.eigvals(policy.transition.softmax(-1).numpy())))
    return float(1 / (1 - min(eigenvalues[-2], 1 - 1e-12)))


@checked
def shortened(scenario: Scenario, length: int, name: str | None = None) -> Scenario:
    """The same chains with another number of tokens. Raises `ValueError` for policies that are not `Markov`.

    >>> policy = gl.Markov.random(vocab=3, length=16, seed=0)
    >>> gl.sequences.shortened(gl.Scenario(policy, policy.perturbed(kl=0.3, seed=1)), 4).policy.length
    4
    """

    def cut(policy: Any) -> Any:
        if not isinstance(policy, Markov):
            raise ValueError(f"only a gl.Markov can be given another length, got {type(policy).__name__}")
        return Markov(policy.initial, policy.transition, length=length, eos=policy.eos)

    behaviour = None if scenario.behaviour is None else cut(scenario.behaviour)
    return Scenario(cut(scenario.policy), cut(scenario.reference), behaviour, name)


@checked
def expected_gradient(name: str, scenario: Scenario) -> Tensor:
    """Expected on-policy gradient `[p]` of a catalogue estimator, from the objectives it is known to descend.

    `Σ share · ∇target` over `CATALOGUE[name].on_policy`: cheaper than `exact.moments`, so it reaches large vocabularies.
    Raises `ValueError` off-policy and for an estimator that descends no combination of targets.

    >>> policy = gl.Markov.random(vocab=3, length=8, seed=0)
    >>> scenario = gl.Scenario(policy, policy.perturbed(kl=0.3, seed=1))
    >>> gradient = gl.sequences.expected_gradient("k2-loss", scenario)
    >>> bool((gradient - gl.exact.gradient("reverse_kl_frozen_prefix", scenario)).norm() < 1e-9)
    True
    """
    check_name("estimator", name, CATALOGUE)
    parts = CATALOGUE[name].on_policy
    if scenario.behaviour is not None or parts is None:
        raise ValueError(f"{name} descends no combination of targets here; use gl.exact.moments")
    terms = [share * exact.gradient(target, scenario) for target, share in parts.items()]
    return torch.stack(terms).sum(0)


@checked
def gap(names: Sequence[str], scenarios: Sequence[Scenario], target: str = "reverse_kl") -> pd.DataFrame:
    """How far the expected gradients of catalogue estimators are from a target's, on chains.

    Exact, by `expected_gradient`. One row per scenario × estimator with the columns of `GAP_COLUMNS`.

    >>> policy = gl.Markov.random(vocab=3, length=8, seed=0)
    >>> scenario = gl.Scenario(policy, policy.perturbed(kl=0.3, seed=1))
    >>> frame = gl.sequences.gap(["k2-loss", "k1-reward-to-go"], [scenario])
    >>> frame.set_index("estimator")["bias"].lt(1e-9).to_dict()
    {'k2-loss': False, 'k1-reward-to-go': True}
    """
    rows = []
    for scenario in scenarios:
        truth = exact.gradient(target, scenario)
        size = float(truth.norm())
        policy: Any = scenario.policy
        common = [scenario.label, policy.vocab, policy.length, scenario.kl(), relaxation_time(policy)]
        for name in names:
            gradient = expected_gradient(name, scenario)
            bias, cosine = float((gradient - truth).norm()) / size, float(gradient @ truth) / size / float(gradient.norm())
            rows.append([*common, name, target, "exact", bias, cosine])
    return pd.DataFrame(rows, columns=list(GAP_COLUMNS))


@checked
def exponents(
    frame: pd.DataFrame, by: Sequence[str], x: str, y: str, low: float = -np.inf, high: float = np.inf
) -> pd.DataFrame:
    """Exponent `b` of `y ∝ x^b` in every group: the least-squares slope of `log y` on `log x` over `low ≤ x ≤ high`.

    Columns `by`, `exponent`, `exponent_error` (of the fit; `nan` for two points), `last` (slope between the two largest `x`:
    where it differs from `exponent` there is no power law yet), `curvature` (coefficient of `log² x`: 0 for a power law),
    `points`, `from`, `to`. Groups with fewer than two points are left out.

    >>> import pandas as pd
    >>> frame = pd.DataFrame({"x": [1.0, 2.0, 4.0], "y": [3.0, 12.0, 48.0]}).assign(kind="square")
    >>> gl.sequences.exponents(frame, ["kind"], "x", "y")["exponent"].round(6).tolist()
    [2.0]
    """
    check_columns(frame, *by, x, y)
    rows = []
    for key, part in frame[frame[x].between(low, high)].groupby(list(by), sort=False):
        part = part[(part[y] > 0) & np.isfinite(part[y])].sort_values(x)
        u, v = np.log(part[x].to_numpy(dtype=float)), np.log(part[y].to_numpy(dtype=float))
        n = len(u)
        if n < 2:
            continue
        slope, error, _ = power_law(np.exp(u), np.exp(v))
        curvature = float(np.polyfit(u - u.mean(), v, 2)[0]) if n > 2 else float("nan")
        last = (v[-1] - v[-2]) / (u[-1] - u[-2])
        rows.append([*key, float(slope), float(error), float(last), curvature, n, float(np.exp(u[0])), float(np.exp(u[-1]))])
    return pd.DataFrame(rows, columns=[*by, "exponent", "exponent_error", "last", "curvature", "points", "from", "to"])


@checked
def compared(
    pairs: Sequence[tuple[Loss | str, Loss | str]], scenario: Scenario, samples: int | None = None, seed: int = 0
) -> pd.DataFrame:
    """Whether two estimators are the same sample by sample: the largest difference between their gradients of one response.

    `difference` is `max_i ‖g_i − g'_i‖ / max_i ‖g_i‖` over all responses, or over `samples` drawn ones (chains). Columns
    `scenario, estimator, other, via, samples, kl, difference`. Raises `ValueError` when there are too many responses to list.

    >>> policy = gl.Tree.random(vocab=3, length=2, seed=0)
    >>> scenario = gl.Scenario(policy, policy.perturbed(kl=0.3, seed=1))
    >>> frame = gl.sequences.compared([("k2-loss", "k1-reward"), ("k2-loss", "k3-loss")], scenario)
    >>> frame["difference"].lt(1e-9).tolist()
    [True, False]
    """
    if not is_several(pairs) or not pairs or any(not is_several(pair) or len(pair) != 2 for pair in pairs):
        raise ValueError(f"pairs must be pairs of estimators, at least one, got {pairs!r}")
    if samples is None:
        rollout = Rollout.enumerated(scenario)
    else:
        rng = generator(seed, "sequences.differences")
        rollout = Rollout.from_sampler(scenario, samples, rng)
    rows = []
    for pair in pairs:
        (name, one), (other, two) = by_name(list(pair)).items()
        with torch.no_grad():
            batch = gradients([one, two], rollout)
            a, b = batch.tables(0).flatten(1), batch.tables(1).flatten(1)
        difference = float((a - b).norm(dim=-1).max() / a.norm(dim=-1).max())
        rows.append([scenario.label, name, other, "exact", samples, scenario.kl(), difference])
    columns = ["scenario", "estimator", "other", "via", "samples", "kl", "difference"]
    return pd.DataFrame(rows, columns=columns).astype({"samples": "Int64"})


@checked
def with_reward(rewards: Mapping[str, Tensor], scenario: Scenario, coefficients: Sequence[float]) -> pd.DataFrame:
    """What adding `β·k1` as loss does to the policy gradient of a reward, on responses that can be enumerated.

    The surrogate is `−r(y) log π(y) + β Σ_t k1_t`. k1 as loss has the score as its gradient, so `β` is a constant subtracted
    from the reward: the mean stays, the trace moves by `β² tr F − 2β E[r ‖score‖²]`, and may fall. `rewards`: name → `[n]`
    over the enumerated responses. Columns `scenario, reward, mean_reward, coefficient, via, shift` (distance of the mean
    gradients over their norm) and `noise_ratio` (trace with over trace without).
    Raises `ValueError` for a reward of another shape. Source: derived.

    >>> import torch
    >>> policy = gl.Bandit([0, 0])
    >>> scenario = gl.Scenario(policy, gl.Bandit([0, 1]))
    >>> frame = gl.sequences.with_reward({"mine": torch.tensor([0.0, 1.0])}, scenario, [0.5])
    >>> frame[["shift", "noise_ratio"]].round(6).values.tolist()
    [[0.0, 0.0]]
    """
    if not isinstance(rewards, Mapping):
        raise ValueError(f"rewards must be a mapping from names to rewards [n], got {rewards!r}")
    rollout = Rollout.enumerated(scenario)
    rows = []
    for name, reward in rewards.items():
        reward = torch.as_tensor(reward, dtype=torch.float64)
        if reward.shape != rollout.weight.shape:
            raise ValueError(f"a reward is one number per response, [{len(rollout.weight)}], got {list(reward.shape)}")

        def surrogate(coefficient: float, reward: Tensor = reward) -> Loss:
            return lambda at: -reward * at.log_prob.sum(-1) + coefficient * at.log_ratio.sum(-1)

        plain, *added = moments_of([surrogate(0.0), *(surrogate(c) for c in coefficients)], rollout, "enumeration")
        average = float(rollout.weight @ reward)
        for coefficient, moments in zip(coefficients, added, strict=True):
            shift = float((moments.mean - plain.mean).norm() / plain.mean.norm())
            rows.append([scenario.label, name, average, coefficient, "exact", shift, moments.trace_cov / plain.trace_cov])
    return pd.DataFrame(rows, columns=["scenario", "reward", "mean_reward", "coefficient", "via", "shift", "noise_ratio"])
