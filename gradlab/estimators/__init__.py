"""Estimators: the kernels, what is made of them, the coefficient each puts on a score, and the catalogue of names."""

from gradlab.estimators.catalogue import CATALOGUE, ESTIMATORS
from gradlab.estimators.estimator import Estimator

__all__ = ["CATALOGUE", "ESTIMATORS", "Estimator"]
