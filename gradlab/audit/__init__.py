"""Audit: which objective does the expected gradient of this loss function descend, and how does it misbehave?"""

from gradlab.audit.batch import Batch, Subject

__all__ = ["Batch", "Subject"]
