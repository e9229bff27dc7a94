"""Registries: named things in a fixed order, gradlab's own first, then what users and installed packages add.

A package adds to them by an entry point of the group `gradlab`, a function without arguments that calls `gl.register`. Entry
points are called once, when a registry is first read. Worker processes are sent what was registered by a call.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from gradlab._common.names import check_name

T = TypeVar("T")

#: Entry points that installed packages register by.
GROUP = "gradlab"
#: Every registry by what its names are names of.
_REGISTRIES: dict[str, Registry[Any]] = {}
_called: list[str] = []


class Registry(Mapping[str, T], Generic[T]):
    """Names → things, read like a dictionary. `what` a name names is said in messages: `"kernel"`, `"target"`."""

    def __init__(self, what: str, own: Mapping[str, T] | None = None) -> None:
        self.what = what
        self._own = dict(own or {})
        self._added: dict[str, T] = {}
        _REGISTRIES[what] = self

    @property
    def added(self) -> dict[str, T]:
        """What is not gradlab's own, in the order in which it was registered."""
        _call_entry_points()
        return dict(self._added)

    def add(self, name: str, item: T) -> None:
        """Register `item`. Raises `ValueError` for a name that is no word or is taken; the same thing may be registered twice."""
        if not isinstance(name, str) or not name.strip() or name != name.strip():
            raise ValueError(f"a name for a registered {self.what} is a word such as 'my-{self.what}', got {name!r}")
        known = self._own.get(name, self._added.get(name))
        if known is not None and known != item:
            owner = "gradlab's own" if name in self._own else "registered"
            raise ValueError(f"there is a {self.what} {name!r} already, {owner}; give yours another name")
        if name not in self._own:
            self._added[name] = item

    def named(self, name: str) -> T:
        """Look a name up. Raises `ValueError` for an unknown one, with the nearest ones."""
        check_name(self.what, name, self)
        return self[name]

    def __getitem__(self, name: str) -> T:
        if name in self._own:
            return self._own[name]
        _call_entry_points()
        return self._added[name]

    def __iter__(self) -> Iterator[str]:
        _call_entry_points()
        return iter([*self._own, *self._added])

    def __len__(self) -> int:
        _call_entry_points()
        return len(self._own) + len(self._added)

    def __repr__(self) -> str:
        return f"Registry({self.what!r}, {list(self)})"


def registered() -> dict[str, dict[str, Any]]:
    """What was added to each registry, to be sent to a worker process."""
    return {what: registry.added for what, registry in _REGISTRIES.items() if registry.added}


def restore(items: Mapping[str, Mapping[str, Any]]) -> None:
    """Register in this process what `registered` found in another; a name that is known here stays as it is."""
    for what, added in items.items():
        registry = _REGISTRIES.get(what)
        for name, item in added.items():
            if registry is not None and name not in registry:
                registry.add(name, item)


def _call_entry_points() -> None:
    """Let installed packages register, once, and not while a module of gradlab is still being imported."""
    if _called or any(
        getattr(module.__spec__, "_initializing", False)
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "gradlab" and getattr(module, "__spec__", None) is not None
    ):
        return
    _called.append(GROUP)  # first, so that a package which reads a registry before it registers is not called again
    for point in entry_points(group=GROUP):
        _called.append(point.value)
        try:
            point.load()()
        except Exception as error:  # another package's mistake must not take gradlab down with it
            warnings.warn(
                f"the package that offers {point.value} to gradlab could not register: {type(error).__name__}: {error}",
                stacklevel=2,
            )
