"""How much the choice of a regulariser's estimator changes the expected gradient of a whole loss, and how many responses show it.

Two losses that differ in their regulariser alone differ by `d = ‖E g − E g'‖ / ‖E g'‖`. A batch of `B` responses has an error of
`√(noise/B)` in the same units, so that the difference stands out of a batch from `B = noise / d²` responses on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from gradlab._common.arguments import checked
from gradlab._common.names import check_name
from gradlab.estimators.policy_loss import PolicyLoss
from gradlab.measure import one_thread
from gradlab.scenario import Scenario, check_scenario
from gradlab.solvers import exact

COLUMNS: dict[str, str] = {
    "scenario": "label of the scenario",
    "family": "kind of its policies",
    "kl": "KL(policy ‖ reference) of whole responses, nats",
    "success": "expected reward of the policy",
    "estimator": "name of the loss",
    "other": "name of the loss that it is compared with",
    "coefficient": "β of both",
    "group": "responses to one prompt",
    "via": "how the moments were computed",
    "difference": "‖E g − E g'‖ / ‖E g'‖",
    "noise": "tr Cov / ‖E g'‖² of a response with the other loss",
    "visible_at": "responses in a batch whose error is as large as the difference; inf where there is none",
}

#: A relative difference below this is rounding.
ROUNDING = 1e-11


@checked
def differences(losses: Mapping[str, PolicyLoss], other: str, scenarios: Sequence[Scenario]) -> pd.DataFrame:
    """Each loss against one of them, exactly: one row per scenario × loss but that one, see `COLUMNS`.

    Raises `ValueError` for a name that `losses` lack, what is no `gl.PolicyLoss`, and where exact moments refuse.

    >>> policy = gl.Bandit([0.0, 0.5, 1.0])
    >>> scenario = gl.Scenario(policy, policy.perturbed(kl=0.1), reward=gl.TableReward(policy, [1.0, 0.0, 0.0]))
    >>> losses = {k: gl.PolicyLoss("group_std", 4, regulariser=gl.Estimator(k), beta=0.01) for k in ("k2", "k3", "full")}
    >>> frame = gl.choice.differences(losses, "k2", scenario).set_index("estimator")
    >>> frame["difference"].gt(1e-9).to_dict()
    {'k3': True, 'full': False}
    """
    if not isinstance(losses, Mapping) or not losses or not all(isinstance(loss, PolicyLoss) for loss in losses.values()):
        raise ValueError(f"losses must be a mapping of names to gl.PolicyLoss, got {losses!r}")
    check_name("loss", other, dict.fromkeys(losses))
    rows = []
    for scenario in scenarios:
        check_scenario(scenario)
        with one_thread():
            found = dict(zip(losses, exact.moments(list(losses.values()), scenario), strict=True))
            common = [scenario.label, scenario.family, scenario.kl(), -exact.objective("reward", scenario)]
        base = found[other]
        size = float(base.mean.norm())
        noise = base.trace_cov / size**2 if size else float("inf")
        for name, moments in found.items():
            if name == other:
                continue
            difference = float((moments.mean - base.mean).norm()) / size if size else float("nan")
            difference = 0.0 if difference < ROUNDING else difference
            visible = noise / difference**2 if difference else float("inf")
            setting = [losses[name].beta or losses[other].beta, losses[name].group]
            rows.append([*common, name, other, *setting, moments.method, difference, noise, visible])
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"group": "Int64"})
