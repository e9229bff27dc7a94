"""Finding a function by `package.module:function` or `path/to/file.py:function`, without running more of a package than needed."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from gradlab._common.lazy import callable_module


def load(spec: str) -> Any:
    """The object named by `package.module:function` or `path/to/file.py:function`; attributes of classes with dots.

    A file is run alone: packages around it are stood in for by empty ones, so that its relative imports work and no
    `__init__` is run. Raises `ValueError` when there is no such module, file or function, with the nearest names.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise ValueError(f"cannot audit {spec!r}: give package.module:function or path/to/file.py:function")
    module = _file(Path(place)) if place.endswith(".py") or os.sep in place else _module(place)
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
            raise ValueError(
                f"importing {name} failed: {error}; install what it needs, or give the file instead, path/to/file.py:function, "
                "which runs no other part of its package"
            ) from None
        raise ValueError(
            f"cannot import {name}: {error}; is its package installed, and spelled package.module:function?"
        ) from None


def _file(path: Path) -> types.ModuleType:
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        near = get_close_matches(path.name, [item.name for item in folder.glob("*.py")], n=3, cutoff=0.4)
        raise ValueError(f"no file {path}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
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
            raise ValueError(
                f"running {path.name} failed: {error}; install what it imports, or move the function to a file of its own"
            ) from None
        except Exception as error:
            raise ValueError(f"running {path.name} failed: {type(error).__name__}: {error}") from None
    return module


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
