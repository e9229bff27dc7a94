"""Records: what a training run wrote of its rollouts, read, checked and looked into.

The way of the data: reader → `Records` (goes through in `Block`s) → checks → statistics → page.
"""

from typing import TYPE_CHECKING

from gradlab._common.lazy import attach

if TYPE_CHECKING:
    from gradlab.records import report, vocabulary
    from gradlab.records.block import Block
    from gradlab.records.checks import Finding, check
    from gradlab.records.choosing import budget, equivalents, frontier
    from gradlab.records.inspection import Inspection, inspect
    from gradlab.records.readers import read_rollouts
    from gradlab.records.recorder import Recorder
    from gradlab.records.schema import COLUMNS
    from gradlab.records.table import Records

__all__ = [
    "COLUMNS",
    "Block",
    "Finding",
    "Inspection",
    "Recorder",
    "Records",
    "budget",
    "check",
    "equivalents",
    "frontier",
    "inspect",
    "read_rollouts",
    "report",
    "vocabulary",
]

_HOMES = {
    **dict.fromkeys(["Finding", "check"], "checks"),
    **dict.fromkeys(["Inspection", "inspect"], "inspection"),
    **dict.fromkeys(["budget", "equivalents", "frontier"], "choosing"),
    "COLUMNS": "schema",
    "Recorder": "recorder",
    "Records": "table",
    "Block": "block",
    "read_rollouts": "readers",
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = attach(__name__, __all__, _HOMES)
