"""Policies: parameters, a map from prefixes to per-step distributions, sampling, and enumeration where it is finite."""

from gradlab.policies.gaussian import Gaussian
from gradlab.policies.language import LanguageModel
from gradlab.policies.small import small
from gradlab.policies.tabular import Bandit, Markov, Tabular, Tree

Policy = Tabular | Gaussian | LanguageModel

__all__ = ["Bandit", "Gaussian", "LanguageModel", "Markov", "Policy", "Tabular", "Tree", "small"]
