"""Audit: which objective does the expected gradient of this loss function descend, and how does it misbehave?"""

from gradlab.audit.batch import Batch, Subject
from gradlab.audit.bind import bind
from gradlab.audit.call import LossError
from gradlab.audit.identify import Verdict
from gradlab.audit.load import load
from gradlab.audit.run import Audit, audit, frame
from gradlab.audit.setting import Probe

__all__ = ["Audit", "Batch", "LossError", "Probe", "Subject", "Verdict", "audit", "bind", "frame", "load"]
