"""Estimators: the kernels, what is made of them, the coefficient each puts on a score, and the catalogue of names."""

from gradlab.estimators.catalogue import CATALOGUE, ESTIMATORS
from gradlab.estimators.estimator import Estimator
from gradlab.estimators.losses import LOSSES
from gradlab.estimators.policy_loss import PolicyLoss
from gradlab.estimators.utility import Utility, utility

__all__ = ["CATALOGUE", "ESTIMATORS", "LOSSES", "Estimator", "PolicyLoss", "Utility", "utility"]
