"""gradlab: which objective does a KL regulariser's expected gradient descend, how far off, how noisily, and on which tokens?

The way of the data: policy → scenario → rollout → estimator → moments → frame → verdict → figure.

>>> import gradlab as gl
>>> policy = gl.Tree.random(vocab=4, length=3, seed=0)
>>> scenario = gl.Scenario(policy, reference=policy.perturbed(kl=0.3, seed=1))
>>> frame = gl.measure(["k2-loss", "k3-loss", "k1-reward-to-go"], scenario)
>>> [round(bias, 3) for bias in frame.bias]
[0.042, 0.198, 0.0]
"""

from typing import TYPE_CHECKING

from gradlab.lazy import attach

if TYPE_CHECKING:
    from gradlab import (
        ascent,
        asymmetry,
        backprop,
        claims,
        exact,
        fixedpoints,
        intervals,
        language,
        lengths,
        montecarlo,
        off_policy,
        optima,
        plots,
        policies,
        report,
        restoring,
        runs,
        search,
        sequences,
        testing,
        training,
    )
    from gradlab.audit import called as audit
    from gradlab.catalogue import CATALOGUE, ESTIMATORS
    from gradlab.components import called as components
    from gradlab.components import values
    from gradlab.estimators import Estimator
    from gradlab.field import called as field
    from gradlab.field import simplex
    from gradlab.measure import called as measure
    from gradlab.moments import Moments
    from gradlab.policies import Bandit, Gaussian, LanguageModel, Markov, Policy, Tree
    from gradlab.provenance import __version__ as __version__
    from gradlab.rollout import Rollout
    from gradlab.scenario import Scenario
    from gradlab.targets import TARGETS
    from gradlab.training import train

__all__ = [
    "CATALOGUE",
    "ESTIMATORS",
    "TARGETS",
    "Bandit",
    "Estimator",
    "Gaussian",
    "LanguageModel",
    "Markov",
    "Moments",
    "Policy",
    "Rollout",
    "Scenario",
    "Tree",
    "ascent",
    "asymmetry",
    "audit",
    "backprop",
    "claims",
    "components",
    "exact",
    "field",
    "fixedpoints",
    "intervals",
    "language",
    "lengths",
    "measure",
    "montecarlo",
    "off_policy",
    "optima",
    "plots",
    "policies",
    "report",
    "restoring",
    "runs",
    "search",
    "sequences",
    "simplex",
    "testing",
    "train",
    "training",
    "values",
]

# audit, components, field and measure are modules that are called like their function: gl.measure(…), gl.measure.COLUMNS.
_HOMES = {
    **dict.fromkeys(["CATALOGUE", "ESTIMATORS"], "catalogue"),
    **dict.fromkeys(["Bandit", "Gaussian", "LanguageModel", "Markov", "Policy", "Tree"], "policies"),
    "Estimator": "estimators",
    "Moments": "moments",
    "Rollout": "rollout",
    "Scenario": "scenario",
    "TARGETS": "targets",
    "__version__": "provenance",
    "simplex": "field",
    "train": "training",
    "values": "components",
}

if not TYPE_CHECKING:  # where every name is known beforehand
    __getattr__, __dir__ = attach(__name__, __all__, _HOMES)
