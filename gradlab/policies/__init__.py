"""Policies: parameters, a map from prefixes to per-step distributions, sampling, and enumeration where it is finite."""

from gradlab.policies.gaussian import Gaussian
from gradlab.policies.tabular import Bandit, Markov, Tabular, Tree

Policy = Tabular | Gaussian

__all__ = ["Bandit", "Gaussian", "Markov", "Policy", "Tabular", "Tree"]
