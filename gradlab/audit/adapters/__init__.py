"""Adapters: the KL losses that training frameworks ship, each called as installed, one small file per framework.

An adapter imports its framework only when it is asked for its subjects, calls the package's own function on a `Batch`, and
records the version and the function. Nothing is copied, so two versions of a package can be compared by installing them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

from gradlab.audit.batch import Subject
from gradlab.names import check_name

#: Frameworks with an adapter, in the order of tables. Each is a module here with `PACKAGE`, `INSTALL` and `subjects()`.
ADAPTERS = ("trl", "verl", "openrlhf", "torchrl", "liger", "trinity", "tinker")


def missing() -> dict[str, str]:
    """Frameworks that are not installed, with the line that installs each. Imports none of them."""
    return {name: _adapter(name).INSTALL for name in ADAPTERS if not _importable(name)}


def installed() -> list[str]:
    """Frameworks that are installed. Imports none of them."""
    return [name for name in ADAPTERS if _importable(name)]


def subjects(only: Sequence[str] | None = None) -> list[Subject]:
    """Every configuration of the installed frameworks, or of those named.

    Raises `ValueError` for an unknown name (with the nearest one) and for a framework that is named but not installed (with
    the line that installs it).
    """
    absent = missing()
    for name in only or ():
        check_name("framework", name, ADAPTERS)
        if name in absent:
            raise ValueError(f"{name} is not installed; to audit it: {absent[name]}")
    chosen = [name for name in ADAPTERS if (name not in absent if only is None else name in only)]
    return [subject for name in chosen for subject in _adapter(name).subjects()]


def _adapter(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")


def _importable(name: str) -> bool:
    return importlib.util.find_spec(_adapter(name).PACKAGE) is not None
