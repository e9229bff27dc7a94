"""gradlab: which objective does a KL regulariser's expected gradient descend, how far off, how noisily, and on which tokens?

The way of the data: policy → scenario → rollout → estimator → moments → frame → verdict → figure.

>>> import gradlab as gl
>>> policy = gl.Tree.random(vocab=4, length=3, seed=0)
>>> scenario = gl.Scenario(policy, reference=policy.perturbed(kl=0.3, seed=1))
>>> frame = gl.measure(["k2-loss", "k3-loss", "k1-reward-to-go"], scenario)
>>> [round(bias, 3) for bias in frame.bias]
[0.042, 0.198, 0.0]
"""

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
from gradlab.audit import audit
from gradlab.catalogue import CATALOGUE, ESTIMATORS
from gradlab.components import components, values
from gradlab.estimators import Estimator
from gradlab.field import field, simplex
from gradlab.measure import measure
from gradlab.moments import Moments
from gradlab.policies import Bandit, Gaussian, LanguageModel, Markov, Policy, Tree
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
