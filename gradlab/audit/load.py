"""Finding a function by `package.module:function` or `path/to/file.py:function`, without running more of a package than needed."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from gradlab._common.lazy import callable_module


def load(spec: str, stubs: Collection[str] = ()) -> Any:
    """The object named by `package.module:function` or `path/to/file.py:function`; attributes of classes with dots.

    A file is run alone: packages around it are stood in for by empty ones, so that its relative imports work and no
    `__init__` is run. Where it cannot be run, or with `stubs`, the function is lifted out of it with only the definitions that it
    uses, and its attribute `__lifted__` says which; methods are then functions of `self`. stubs: imported names that the loss never
    calls.
    Raises `ValueError` when there is no such module, file or function, with the nearest names, and where the function uses what is
    not installed, with all of it.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise ValueError(f"cannot audit {spec!r}: give package.module:function or path/to/file.py:function")
    path = Path(place) if place.endswith(".py") or os.sep in place else None
    if stubs:
        return _lifted(path or _source(place) or Path(place), name, stubs, "stubs are given")
    try:
        module = _module(place) if path is None else _file(path)
    except _NotRunError as error:
        home = path or _source(place)
        if home is None:
            raise
        return _lifted(home, name, stubs, error.reason, error)
    function: Any = module
    for part in name.split("."):
        if not hasattr(function, part):
            offered = [key for key, item in vars(function).items() if callable(item) and not key.startswith("__")]
            near = get_close_matches(part, offered, n=3, cutoff=0.4) or offered[:8]
            hint = f"did you mean {' or '.join(near)}?" if near else "it defines no function"
            raise ValueError(f"no function {part!r} in {place}; {hint}")
        function = getattr(function, part)
    if not callable(function) and not hasattr(function, "loss"):
        raise ValueError(f"{spec} is {type(function).__name__}, not a function")
    return function


class _NotRunError(ValueError):
    """A file or a module cannot be run, for a reason."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def _lifted(path: Path, name: str, stubs: Collection[str], reason: str, instead: Exception | None = None) -> Any:
    """The function without the rest of the file that cannot be run; `instead` is raised where the file does not define it."""
    from gradlab.audit.lift import defined, lift

    _check_there(path)
    if instead is not None and not defined(path, name):
        raise ValueError(
            f"{instead}; nor does it define {name!r}{offered(str(path)).replace(' with one of', ', but')}"
        ) from None
    found = lift(path, name, stubs)
    found.function.__lifted__ = f"{found.text}; the rest of {path.name} is not run: {reason}"
    return found.function


def _source(module: str) -> Path | None:
    """The file of a module, found without importing its package; `None` where there is none."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder).joinpath(*rest)
        for candidate in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def offered(address: str) -> str:
    """Which functions a file defines, read without running it, as the end of a sentence; empty where there is no such file."""
    path = Path(address)
    if not path.is_file():
        return f" (there is no file {path})" if address.endswith(".py") else ""
    try:
        defined = [item.name for item in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(item, ast.FunctionDef)]
    except (SyntaxError, ValueError) as error:
        return f" (it cannot be read: {error})"
    public = [name for name in defined if not name.startswith("_")] or defined
    return f" with one of {', '.join(public)}" if public else " (it defines no function)"


def version(module: str) -> tuple[str, str]:
    """Name and version of the installed distribution that a module belongs to; empty when it belongs to none."""
    top = module.partition(".")[0]
    for name in importlib.metadata.packages_distributions().get(top, [])[:1]:
        return name, importlib.metadata.version(name)
    return "", ""


def _module(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = getattr(error, "name", None)
        if missing and not (name == missing or name.startswith(f"{missing}.")):
            raise _NotRunError(
                f"importing {name} failed: {error}; install what it needs, or give the file instead, path/to/file.py:function, "
                "which runs no other part of its package",
                str(error),
            ) from None
        raise ValueError(
            f"cannot import {name}: {error}; is its package installed, and spelled package.module:function?"
        ) from None


def _file(path: Path) -> types.ModuleType:
    _check_there(path)
    path = path.resolve()
    parents: list[Path] = []
    while (path.parents[len(parents)] / "__init__.py").is_file():
        parents.insert(0, path.parents[len(parents)])
    name = ".".join([*(folder.name for folder in parents), path.stem])
    with _stand_ins(parents, name):
        loaded = importlib.util.spec_from_file_location(name, path)
        assert loaded is not None
        assert loaded.loader is not None
        module = importlib.util.module_from_spec(loaded)
        sys.modules[name] = module
        try:
            loaded.loader.exec_module(module)
        except ImportError as error:
            raise _NotRunError(
                f"running {path.name} failed: {error}; install what it imports, or move the function to a file of its own",
                str(error),
            ) from None
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise _NotRunError(f"running {path.name} failed: {said}", said) from None
    return module


def _check_there(path: Path) -> None:
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        near = get_close_matches(path.name, [item.name for item in folder.glob("*.py")], n=3, cutoff=0.4)
        raise ValueError(f"no file {path}" + (f"; did you mean {' or '.join(near)}?" if near else ""))


@contextmanager
def _stand_ins(folders: list[Path], name: str) -> Iterator[None]:
    """Empty packages in place of those around the module `name`, so that only what it imports itself is run.

    Afterwards no module of that name stays loaded: the user's `utils.py` is to stand in nobody's way, and what is not
    imported is taken along whole when it goes to a worker process.
    """
    top = name.partition(".")[0]

    def taken() -> dict[str, types.ModuleType]:
        return {key: item for key, item in sys.modules.items() if key == top or key.startswith(f"{top}.")}

    replaced = taken()
    sys.path.insert(0, str(folders[0].parent) if folders else "")
    try:
        for key in replaced:
            del sys.modules[key]
        for depth, folder in enumerate(folders):
            stub = types.ModuleType(".".join(part.name for part in folders[: depth + 1]))
            stub.__path__ = [str(folder)]
            sys.modules[stub.__name__] = stub
        yield
    finally:
        del sys.path[0]
        for key in taken():
            del sys.modules[key]
        sys.modules.update(replaced)


called = callable_module(__name__, load)
