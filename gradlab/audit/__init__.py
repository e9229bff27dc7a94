"""Audit: which objective does the expected gradient of this loss function descend, and how does it misbehave?"""

from typing import TYPE_CHECKING

from gradlab._common.lazy import attach, callable_module

if TYPE_CHECKING:
    from gradlab.audit.batch import Batch, Bound, Subject
    from gradlab.audit.bind import called as bind
    from gradlab.audit.call import LossError
    from gradlab.audit.changes import called as changes
    from gradlab.audit.configured import Configured, Switch, Term
    from gradlab.audit.configured import called as configured
    from gradlab.audit.examine import Part
    from gradlab.audit.identify import Identification
    from gradlab.audit.jax_loss import JaxLoss
    from gradlab.audit.load import called as load
    from gradlab.audit.probes.setting import Probe
    from gradlab.audit.run import Audit, audit, frame

    called = callable_module(__name__, audit)

__all__ = [
    "Audit",
    "Batch",
    "Bound",
    "Configured",
    "Identification",
    "JaxLoss",
    "LossError",
    "Part",
    "Probe",
    "Subject",
    "Switch",
    "Term",
    "audit",
    "bind",
    "changes",
    "configured",
    "frame",
    "load",
]

_HOMES = {
    **dict.fromkeys(["Batch", "Bound", "Subject"], "batch"),
    "LossError": "call",
    **dict.fromkeys(["Configured", "Switch", "Term"], "configured"),
    "Part": "examine",
    "Identification": "identify",
    "JaxLoss": "jax_loss",
    **dict.fromkeys(["Audit", "audit", "frame"], "run"),
    "Probe": "probes.setting",
}

if not TYPE_CHECKING:  # where every name is known beforehand
    __getattr__, __dir__ = attach(__name__, __all__, _HOMES)
    callable_module(__name__, None)
