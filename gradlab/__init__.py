"""gradlab: which objective does a KL regulariser's expected gradient descend, how far off, how noisily, and on which tokens?

The way of the data: policy → scenario → rollout → estimator → moments → frame → verdict → figure.
Examples in docstrings know `import gradlab as gl`; some read the frames that `gradlab reproduce` writes to `figures`.

>>> import gradlab as gl
>>> policy = gl.Tree.random(vocab=4, length=3, seed=0)
>>> scenario = gl.Scenario(policy, reference=policy.perturbed(kl=0.3, seed=1))
>>> frame = gl.measure(["k2-loss", "k3-loss", "k1-reward-to-go"], scenario)
>>> [round(bias, 3) for bias in frame.bias]
[0.042, 0.198, 0.0]
"""

from typing import TYPE_CHECKING

from gradlab._common.lazy import attach

if TYPE_CHECKING:
    from gradlab import intervals, plots, policies, records, testing, training
    from gradlab._common.provenance import __version__ as __version__
    from gradlab.audit import called as audit
    from gradlab.components import called as components
    from gradlab.components import values
    from gradlab.estimators import CATALOGUE, ESTIMATORS, LOSSES, Estimator, PolicyLoss, Utility, utility
    from gradlab.estimators.kernels import Kernel
    from gradlab.extensions import register
    from gradlab.ledger import verify as claims
    from gradlab.lessons import lesson
    from gradlab.measure import called as measure
    from gradlab.moments import Moments
    from gradlab.objectives import OBJECTIVES
    from gradlab.per_sample import backprop
    from gradlab.plots.figures import figure
    from gradlab.policies import Bandit, Gaussian, LanguageModel, Markov, Policy, Tree
    from gradlab.questions import (
        asymmetry,
        choice,
        clips,
        combined,
        corrections,
        language,
        lengths,
        off_policy,
        optima,
        restoring,
        sequences,
        tails,
    )
    from gradlab.questions import compositions as search
    from gradlab.questions import fixed_points as fixedpoints
    from gradlab.questions import gradient_flow as ascent
    from gradlab.questions import training as runs
    from gradlab.questions.bandits import field, simplex
    from gradlab.records import Recorder, Records, inspect, read_rollouts
    from gradlab.rewards import TableReward
    from gradlab.rollout import Rollout
    from gradlab.scenario import Scenario
    from gradlab.solvers import exact, montecarlo
    from gradlab.study import report
    from gradlab.targets import TARGETS, Target
    from gradlab.training import train

__all__ = [
    "CATALOGUE",
    "ESTIMATORS",
    "LOSSES",
    "OBJECTIVES",
    "TARGETS",
    "Bandit",
    "Estimator",
    "Gaussian",
    "Kernel",
    "LanguageModel",
    "Markov",
    "Moments",
    "Policy",
    "PolicyLoss",
    "Recorder",
    "Records",
    "Rollout",
    "Scenario",
    "TableReward",
    "Target",
    "Tree",
    "Utility",
    "ascent",
    "asymmetry",
    "audit",
    "backprop",
    "choice",
    "claims",
    "clips",
    "combined",
    "components",
    "corrections",
    "exact",
    "field",
    "figure",
    "fixedpoints",
    "inspect",
    "intervals",
    "language",
    "lengths",
    "lesson",
    "measure",
    "montecarlo",
    "off_policy",
    "optima",
    "plots",
    "policies",
    "read_rollouts",
    "records",
    "register",
    "report",
    "restoring",
    "runs",
    "search",
    "sequences",
    "simplex",
    "tails",
    "testing",
    "train",
    "training",
    "utility",
    "values",
]

# audit, components and measure are modules that are called like their function: gl.measure(…), gl.measure.COLUMNS.
_HOMES = {
    **dict.fromkeys(["CATALOGUE", "ESTIMATORS", "LOSSES", "Estimator", "PolicyLoss", "Utility", "utility"], "estimators"),
    **dict.fromkeys(["Bandit", "Gaussian", "LanguageModel", "Markov", "Policy", "Tree"], "policies"),
    **dict.fromkeys(["field", "simplex"], "questions.bandits"),
    "Kernel": "estimators.kernels",
    "Moments": "moments",
    "OBJECTIVES": "objectives",
    "TableReward": "rewards",
    **dict.fromkeys(["Recorder", "Records", "inspect", "read_rollouts"], "records"),
    "Rollout": "rollout",
    "Scenario": "scenario",
    "TARGETS": "targets",
    "Target": "targets",
    "__version__": "_common.provenance",
    "figure": "plots.figures",
    "lesson": "lessons",
    "register": "extensions",
    "train": "training",
    "values": "components",
}
#: Modules by the name they have in `gradlab`.
_MODULES = {
    "ascent": "questions.gradient_flow",
    "backprop": "per_sample.backprop",
    "claims": "ledger.verify",
    "fixedpoints": "questions.fixed_points",
    "report": "study.report",
    "runs": "questions.training",
    "search": "questions.compositions",
    **{
        name: f"questions.{name}"
        for name in (
            "asymmetry",
            "choice",
            "clips",
            "combined",
            "corrections",
            "language",
            "lengths",
            "off_policy",
            "optima",
            "restoring",
            "sequences",
            "tails",
        )
    },
    **{name: f"solvers.{name}" for name in ("exact", "montecarlo")},
}

if not TYPE_CHECKING:  # where every name is known beforehand
    __getattr__, __dir__ = attach(__name__, __all__, _HOMES, _MODULES)
