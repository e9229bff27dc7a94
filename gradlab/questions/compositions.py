"""Which compositions of kernel, placement, credit and weight descend a given objective: all of them, tried exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from gradlab._common.arguments import check_columns, checked
from gradlab._common.names import check_name, several
from gradlab._common.streams import generator
from gradlab.estimators.catalogue import ESTIMATORS
from gradlab.estimators.estimator import Estimator
from gradlab.estimators.kernels import KERNELS, VOCABULARY_KERNELS
from gradlab.estimators.rules import BASELINES, CREDITS, PLACEMENTS, WEIGHTS
from gradlab.measure import by_name, one_thread
from gradlab.moments import Loss, gradients
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario, check_scenario
from gradlab.solvers import exact

#: A relative bias below this is none: rounding is about 1e-15, and a difference of objectives is not this small by chance.
UNBIASED = 1e-10

#: What an expected gradient is compared with. Off-policy, prefixes can be frozen at the behaviour's or at the policy's.
GOALS: dict[str, Callable[[Scenario], Tensor]] = {
    "reverse_kl": lambda scenario: exact.gradient("reverse_kl", scenario),
    "reverse_kl_frozen_prefix": lambda scenario: exact.gradient("reverse_kl_frozen_prefix", scenario),
    "reverse_kl_policy_prefix": lambda scenario: exact.gradient("reverse_kl_frozen_prefix", scenario.on_policy()),
    "forward_kl": lambda scenario: exact.gradient("forward_kl", scenario),
    "forward_kl_frozen_prefix": lambda scenario: exact.gradient("forward_kl_frozen_prefix", scenario),
    "forward_kl_policy_prefix": lambda scenario: exact.gradient("forward_kl_frozen_prefix", scenario.on_policy()),
}

COLUMNS: dict[str, str] = {
    "scenario": "label of the scenario",
    "family": "kind of policy",
    "vocab": "number of tokens v",
    "length": "largest number of tokens T",
    "off_policy": "whether the data come from another policy",
    "kl": "KL(policy ‖ reference) of whole responses, nats",
    "lag": "KL(behaviour ‖ policy) of whole responses, nats; 0 on-policy",
    "estimator": "name it was given",
    "target": "objective compared with, of GOALS",
    "via": "exact",
    "gradient_norm": "‖E g‖, nats per unit of parameter",
    "bias": "‖E g − ∇‖ / ‖∇‖",
    "noise": "tr Cov(g) / ‖∇‖² of a single response",
}


@checked
def compositions(
    kernels: Iterable[str] = (*KERNELS, *VOCABULARY_KERNELS),
    placements: Iterable[str] = PLACEMENTS,
    credits: Iterable[str] = CREDITS,
    weights: Iterable[str] = WEIGHTS,
    differentiated: Iterable[bool] = (False, True),
    baselines: Iterable[str | None] = (None,),
) -> Iterator[Estimator]:
    """Every valid composition kernel × placement × credit × weight × differentiated (× baseline), in a fixed order.

    `straight_through` runs over every pair of sampled kernels; a group baseline has four responses to a prompt. Normaliser,
    clamps, truncation and clip are left at their defaults.

    >>> len(list(compositions()))
    662
    >>> [e.name for e in compositions(["k2"], ["loss"], weights=["none"])]
    ['k2-loss', 'k2-loss-sequence']
    """
    named: list[tuple[str, Iterable[Any], tuple[Any, ...]]] = [
        ("kernel", kernels, (*KERNELS, *VOCABULARY_KERNELS)),
        ("placement", placements, PLACEMENTS),
        ("credit", credits, CREDITS),
        ("weight", weights, WEIGHTS),
        ("baseline", baselines := several(baselines), (None, *BASELINES)),
    ]
    for what, given, known in named:
        for name in given:
            check_name(what, name, known)
    axes = product(kernels, placements, credits, weights, differentiated, baselines)
    for kernel, placement, credit, weight, differentiate, baseline in axes:
        group = 4 if baseline in ("group_mean", "leave_one_out") else None
        for gradient_kernel in KERNELS if placement == "straight_through" else [None]:
            arguments: dict[str, Any] = {"baseline": baseline, "group": group, "gradient_kernel": gradient_kernel}
            try:
                yield Estimator(kernel, placement, credit, weight, differentiate, **arguments)  # type: ignore[arg-type]
            except ValueError:  # a combination that means nothing
                continue


@checked
def reweighted(
    name: str, weight: str = "none", differentiate: bool = False, truncate: float | None = None, clip: float | None = None
) -> dict[str, Estimator]:
    """A catalogue estimator with another importance weight, under a name that says so.

    Raises `ValueError` for an unknown name and for a combination that means nothing.

    >>> list(reweighted("k3-loss", "prefix", differentiate=True, truncate=2))
    ['k3-loss, differentiated prefix weight ≤ 2']
    """
    check_name("estimator", name, ESTIMATORS)
    options: dict[str, Any] = {"weight": weight, "differentiate_weight": differentiate, "truncate": truncate, "clip": clip}
    if weight == "none":
        return {name: replace(ESTIMATORS[name], **options)}
    bound = f" ≤ {truncate:g}" if truncate is not None else f", clip {clip:g}" if clip is not None else ""
    return {f"{name}, {'differentiated ' * differentiate}{weight} weight{bound}": replace(ESTIMATORS[name], **options)}


@checked
def described(estimators: Mapping[str, Estimator]) -> pd.DataFrame:
    """The fields of named estimators, one row each: what to group their frames by.

    >>> frame = gl.search.described(gl.search.reweighted("k3-loss", "prefix", differentiate=True))
    >>> frame[["kernel", "placement", "weight", "differentiate_weight"]].values.tolist()
    [['k3', 'loss', 'prefix', True]]
    """
    columns = [
        "kernel",
        "placement",
        "credit",
        "weight",
        "differentiate_weight",
        "truncate",
        "clip",
        "gradient_kernel",
        "baseline",
    ]
    rows = [[name, *(getattr(e, column) for column in columns)] for name, e in by_name(estimators).items()]
    return pd.DataFrame(rows, columns=["estimator", *columns]).astype({"truncate": float, "clip": float})


def against(
    estimators: Mapping[str, Loss] | Iterable[Loss | str] | Loss | str,
    scenarios: Scenario | Iterable[Scenario],
    goals: str | Iterable[str] = tuple(GOALS),
) -> pd.DataFrame:
    """Exact bias and noise of every estimator against every goal (`GOALS`) in every scenario, with the columns of `COLUMNS`.

    Raises `ValueError` for an unknown goal, and where the estimator has no exact moments.

    >>> policy = gl.Tree.random(vocab=2, length=2, seed=0)
    >>> behaviour = gl.off_policy.at_lag(policy, 0.2, seed=1)
    >>> scenario = gl.Scenario(policy, policy.perturbed(kl=0.3, seed=2), behaviour)
    >>> frame = gl.search.against(gl.search.reweighted("k3-loss", "prefix", differentiate=True), scenario, "reverse_kl")
    >>> bool(frame["bias"].max() < gl.search.UNBIASED)
    True
    """
    goals, scenarios, named = several(goals), several(scenarios), by_name(estimators)
    for goal in goals:
        check_name("goal", goal, GOALS)
    for scenario in scenarios:
        check_scenario(scenario)
    if not scenarios or not goals:
        raise ValueError(f"nothing to compare: {len(scenarios)} scenarios, {len(goals)} goals; each must hold at least one")
    parts = []
    for scenario in tqdm(scenarios, desc="search", unit="scenario", disable=None, delay=2):
        with one_thread():
            moments = exact.moments(list(named.values()), scenario)
            truths = [GOALS[goal](scenario) for goal in goals]
        means, traces = torch.stack([m.mean for m in moments]), np.array([m.trace_cov for m in moments])
        policy: Any = scenario.policy
        common = {
            "scenario": scenario.label, "family": scenario.family, "vocab": policy.vocab, "length": policy.length,
            "off_policy": scenario.behaviour is not None, "kl": scenario.kl(), "lag": scenario.lag(), "via": "exact",
        }  # fmt: skip
        for goal, truth in zip(goals, truths, strict=True):
            size = float(truth.norm())
            columns = {
                "estimator": list(named),
                "target": goal,
                "gradient_norm": means.norm(dim=-1).numpy(),
                "bias": ((means - truth).norm(dim=-1) / size).numpy(),
                "noise": traces / size**2,
            }
            parts.append(pd.DataFrame({**common, **columns}))
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]


@checked
def worst(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per estimator of a frame of `against`: its largest bias over the scenarios as `bias_<goal>`, for every goal.

    An estimator is unbiased for a goal if this is below `UNBIASED`: scenarios are random, so none is unbiased by accident.

    >>> policy = gl.Tree.random(vocab=2, length=2, seed=0)
    >>> scenarios = [gl.Scenario(policy, policy.perturbed(kl=0.3, seed=seed)) for seed in (1, 2)]
    >>> frame = gl.search.worst(gl.search.against(["k2-loss", "full-both"], scenarios, "reverse_kl"))
    >>> frame.set_index("estimator")["bias_reverse_kl"].lt(gl.search.UNBIASED).to_dict()
    {'k2-loss': False, 'full-both': True}
    """
    check_columns(frame, "estimator", "target", "bias")
    table = frame.pivot_table(index="estimator", columns="target", values="bias", aggfunc="max", sort=False)
    return table.add_prefix("bias_").rename_axis(columns=None).reset_index()


def equivalent_estimators(estimators: Mapping[str, Estimator], scenario: Scenario) -> dict[str, str]:
    """Estimator → the first one in the mapping that has the same gradient on every response of the scenario.

    Compared are two random projections of all gradients, to a relative 1e-9. An estimator that compares responses with each
    other has no gradient of its own and stays by itself. Raises `ValueError` when the responses cannot be enumerated.

    >>> policy = gl.Bandit.random(4, seed=0)
    >>> scenario = gl.Scenario(policy, policy.perturbed(kl=0.3, seed=1))
    >>> gl.search.equivalent_estimators({name: gl.ESTIMATORS[name] for name in ("k2-loss", "k3-loss", "k1-reward")}, scenario)
    {'k2-loss': 'k2-loss', 'k3-loss': 'k3-loss', 'k1-reward': 'k2-loss'}
    """
    check_scenario(scenario)
    named, ungrouped = by_name(estimators), {}
    for name, loss in named.items():
        if not isinstance(loss, Estimator):
            raise ValueError(f"{name} is a function: twins are sought among gl.Estimator")
        if not loss.grouped:
            ungrouped[name] = loss
    rollout = Rollout.enumerated(scenario)
    rng = generator(0, "compositions")
    directions = torch.from_numpy(rng.standard_normal((rollout.table.numel(), 2)))
    representative, fingerprints = {name: name for name in named}, dict[str, Tensor]()
    with torch.no_grad(), one_thread():
        batch = gradients(list(ungrouped.values()), rollout)
        for e, name in enumerate(ungrouped):
            mark = batch.tables(e).flatten(1) @ directions
            for first, other in fingerprints.items():
                if float((mark - other).abs().max()) <= 1e-9 * float(other.abs().max()):
                    representative[name] = first
                    break
            else:
                fingerprints[name] = mark
    return representative
