"""Adapters: the KL losses that training frameworks ship, each called as installed, one small file per framework.

An adapter imports its framework only when it is asked for its subjects, calls the package's own function on a `Batch`, and
records the version and the function. Nothing is copied, so two versions of a package can be compared by installing them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Protocol

from gradlab._common.names import check_name
from gradlab._common.registry import Registry
from gradlab.audit.adapters import liger, openrlhf, tinker, torchrl, trinity, trl, verl
from gradlab.audit.batch import Subject


class Adapter(Protocol):
    """What an adapter holds; a module does.

    `PACKAGE` is the module whose presence says that the framework is installed, `INSTALL` the line that installs it, and
    `subjects()` gives its losses, importing the framework only then.
    """

    PACKAGE: str
    INSTALL: str

    def subjects(self) -> Sequence[Subject]:
        """Every configuration of the framework's losses."""


#: Frameworks with an adapter, in the order of tables.
ADAPTERS: Registry[Adapter] = Registry(
    "framework",
    {
        "trl": trl,
        "verl": verl,
        "openrlhf": openrlhf,
        "torchrl": torchrl,
        "liger": liger,
        "trinity": trinity,
        "tinker": tinker,
    },
)


def missing() -> dict[str, str]:
    """Frameworks that are not installed, with the line that installs each. Imports none of them."""
    return {name: adapter.INSTALL for name, adapter in ADAPTERS.items() if not _importable(adapter)}


def installed() -> list[str]:
    """Frameworks that are installed. Imports none of them."""
    return [name for name, adapter in ADAPTERS.items() if _importable(adapter)]


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
    return [subject for name in chosen for subject in ADAPTERS[name].subjects()]


def _importable(adapter: Adapter) -> bool:
    return importlib.util.find_spec(adapter.PACKAGE) is not None
