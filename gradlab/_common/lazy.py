"""Names of a package that are imported when they are first asked for, and modules that are called like their function.

Source: lazy loading of submodules and functions, Scientific Python's SPEC 1.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def attach(
    package: str, public: Collection[str], homes: Mapping[str, str], modules: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose `public` names are imported when asked for.

    homes: name → the submodule that defines it. modules: name → the submodule that it stands for, where that is called
    otherwise. A public name that is in neither is itself a submodule.
    """
    paths = {**homes, **(modules or {})}

    def getattribute(name: str) -> Any:
        if name not in homes and name not in public:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = import_module(f"{package}.{paths.get(name, name)}")
        if name in homes:
            value = getattr(value, name)
        setattr(sys.modules[package], name, value)
        return value

    return getattribute, lambda: sorted({*vars(sys.modules[package]), *public})


class CallableModule(ModuleType, Generic[P, R]):
    """A module that is called as its function of the same name, so that neither hides the other."""

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)

    @property
    def _function(self) -> Callable[P, R]:
        function: Callable[P, R] = getattr(self, self.__name__.rpartition(".")[2])
        return function

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._function(*args, **kwargs)


def callable_module(name: str, function: Callable[P, R]) -> CallableModule[P, R]:
    """Make the module `name` callable as its `function` of the same name, and return it."""
    module: Any = sys.modules[name]
    module.__class__ = CallableModule
    typed: CallableModule[P, R] = module
    return typed
