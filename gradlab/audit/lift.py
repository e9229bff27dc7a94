"""A function of a file that cannot be run, lifted out of it: itself and the definitions that it uses, and nothing else of the file."""

from __future__ import annotations
import __future__

import ast
import builtins
import dis
import importlib
import sys
import types
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BUILTINS = frozenset(dir(builtins)) | {"__class__", "__qualname__", "__module__", "__annotations__"}


@dataclass
class Lifted:
    """A function and where it and what it uses came from.

    names: of the definitions that were run, those of other files with the file. dropped: decorators that could not be had. stubs:
    names that stand for nothing.
    """

    function: Any
    names: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    stubs: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What was lifted, in words."""
        said = [", ".join(self.names)]
        said += [f"without the decorator {', '.join(self.dropped)}"] if self.dropped else []
        said += [f"{', '.join(self.stubs)} stubbed"] if self.stubs else []
        return "; ".join(said)


def lift(path: Path, name: str, stubs: Collection[str] = ()) -> Lifted:
    """The function `name` of a file, with only the definitions that it uses; `Class.method` gives the method as a function of `self`.

    Definitions of the same package are lifted out of their files in turn; everything else that is used is imported. stubs: names
    that stand for something that is not here and is never called. Annotations are not evaluated.
    Raises `ValueError` when the file defines no such function, cannot be parsed, or uses what is not here: all of it at once, with
    what to install or stub.
    """
    lifting = _Lifting(set(stubs))
    file = lifting.of(path.resolve())
    if not file.defines(name):
        raise ValueError(f"no function {name!r} in {path.name}")
    found = file.lifted([name])[name]
    if not lifting.missing:
        file.annotate(name)
    if lifting.missing:
        tops = [module.partition(".")[0] for module in lifting.missing.values()]
        install = ", ".join(dict.fromkeys(top for top in tops if top not in file.package)) or "what it needs"
        options = " ".join(f"--stub {key}" for key in lifting.missing)
        raise ValueError(
            f"{name} of {path.name} uses {', '.join(lifting.missing.values())}, which cannot be imported: install {install}, or, for names "
            f"that the loss never calls, {options}"
        )
    unknown = set(stubs) - set(lifting.stubbed)
    if unknown:
        raise ValueError(f"{name} of {path.name} imports no {', '.join(sorted(unknown))}; there is nothing to stub")
    return Lifted(found, lifting.names[::-1], lifting.dropped, lifting.stubbed)


def defined(path: Path, name: str) -> bool:
    """Whether a file defines a function, read without running it."""
    try:
        return _Lifting(()).of(path.resolve()).defines(name)
    except ValueError:
        return False


class _Lifting:
    """The files that definitions were lifted out of so far."""

    def __init__(self, stubs: Collection[str]) -> None:
        self.stubs = stubs
        self.files: dict[Path, _File] = {}
        self.missing: dict[str, str] = {}
        self.names: list[str] = []
        self.dropped: list[str] = []
        self.stubbed: list[str] = []

    def of(self, path: Path) -> _File:
        if path not in self.files:
            self.files[path] = _File(path, self, first=not self.files)
        return self.files[path]

    def absent(self, name: str, module: str) -> Any:
        """What stands for a name that cannot be imported; noted as missing unless it is to be stubbed."""
        if name in self.stubs:
            self.stubbed = [*dict.fromkeys([*self.stubbed, name])]
        else:
            self.missing[name] = module
        return _Stub(name, (), {})


class _Stub(type):
    """A class that stands for something that is not here: nothing is an instance of it, and it cannot be called."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Stub(f"{cls.__name__}.{name}", (), {})

    def __call__(cls, *_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{cls.__name__} is a stub, and the loss calls it: install what it is of")


class _File:
    """The definitions of one file by name, run when they are asked for."""

    def __init__(self, path: Path, lifting: _Lifting, first: bool) -> None:
        self.path, self.lifting, self.first = path, lifting, first
        try:
            self.tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{path.name} cannot be read: {error}") from None
        self.folders: list[Path] = []
        while (path.parents[len(self.folders)] / "__init__.py").is_file():
            self.folders.append(path.parents[len(self.folders)])
        packages = [folder.name for folder in reversed(self.folders)]
        self.package = packages
        self.name = ".".join([*packages, path.stem])
        self.module = types.ModuleType(self.name)
        self.module.__file__ = str(path)
        self.done: set[int] = set()

    def lifted(self, names: Iterable[str]) -> dict[str, Any]:
        """The definitions `names`, run with what they use."""
        found = {}
        before = sys.modules.get(self.name)
        sys.modules[self.name] = self.module  # where a dataclass looks for its annotations
        try:
            for name in names:
                owner, dot, method = name.partition(".")
                self._run(owner if not dot else f"{owner}.{method}")
                found[name] = self.module.__dict__[method if dot else owner]
        finally:
            if before is None:
                del sys.modules[self.name]
            else:
                sys.modules[self.name] = before
        return found

    def defines(self, name: str) -> bool:
        return any(True for _ in self._binding(name))

    def annotate(self, name: str) -> None:
        """Define the classes of the file that the arguments of a function are annotated with, where that can be done."""
        for statement in self._binding(name):
            arguments = ast.walk(statement.args) if isinstance(statement, ast.FunctionDef) else ()
            for node in arguments:
                if isinstance(node, ast.Name) and any(isinstance(s, ast.ClassDef) for s in self._binding(node.id)):
                    self.lifted([node.id])
                    if self.lifting.missing:
                        self.lifting.missing.clear()
                        del self.module.__dict__[node.id]

    def _run(self, name: str) -> None:
        if name in self.module.__dict__ or name in _BUILTINS:
            return
        statements = list(self._binding(name))
        if not statements:
            star = [s for s in self.tree.body if isinstance(s, ast.ImportFrom) and s.names[0].name == "*"]
            if star and not any(self._imported(s, ast.alias(name), name) for s in star):
                self.module.__dict__[name] = self.lifting.absent(name, f"{star[-1].module}.*")
            return
        for statement in statements:
            if id(statement) in self.done:
                continue
            self.done.add(id(statement))
            if isinstance(statement, ast.Import | ast.ImportFrom):
                for alias in statement.names:
                    if name == (alias.asname or alias.name.partition(".")[0]):
                        self._imported(statement, alias, name)
                self.done.discard(id(statement))  # it may bind more
                continue
            self._execute(statement, name)

    def _binding(self, name: str) -> Iterator[ast.stmt]:
        """The statements of the file that bind a name; the definition of a method for `Class.method`."""
        owner, dot, method = name.partition(".")
        for statement in self.tree.body:
            if dot:
                if isinstance(statement, ast.ClassDef) and statement.name == owner:
                    yield from (s for s in statement.body if isinstance(s, ast.FunctionDef) and s.name == method)
            elif name in _bound(statement):
                yield statement

    def _execute(self, statement: ast.stmt, name: str) -> None:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            statement.decorator_list = [d for d in statement.decorator_list if self._can_decorate(d)]
        code = compile(
            ast.Module([statement], []), str(self.path), "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True
        )
        for used in _loaded(code):
            if used not in _bound(statement):
                self._run(used)
        if isinstance(statement, ast.Assign | ast.AnnAssign | ast.FunctionDef | ast.ClassDef) and not self.first:
            self.lifting.names.append(f"{name} (of {self.path.name})")
        elif not isinstance(statement, ast.Import | ast.ImportFrom):
            self.lifting.names.append(name)
        if self.lifting.missing:
            self.module.__dict__.setdefault(name.rpartition(".")[2], None)  # what is missing is told all at once
            return
        try:
            exec(code, self.module.__dict__)
        except Exception as error:
            raise ValueError(
                f"running line {statement.lineno} of {self.path.name}, which defines {name}, failed: {type(error).__name__}: {error}"
            ) from None

    def _can_decorate(self, decorator: ast.expr) -> bool:
        if isinstance(decorator, ast.Name) and decorator.id in ("staticmethod", "classmethod", "property"):
            return False  # the method is lifted as a function
        missing, stubs = dict(self.lifting.missing), list(self.lifting.stubbed)
        code = compile(ast.Expression(decorator), str(self.path), "eval", dont_inherit=True)
        for used in _loaded(code):
            self._run(used)
        if self.lifting.missing == missing and self.lifting.stubbed == stubs:
            return True
        for file in self.lifting.files.values():  # what is left for the function itself to ask for
            for key in [k for k, item in file.module.__dict__.items() if isinstance(item, _Stub) and k not in missing]:
                del file.module.__dict__[key]
        self.lifting.missing, self.lifting.stubbed = missing, stubs
        self.lifting.dropped.append(ast.unparse(decorator))
        return False

    def _imported(self, statement: ast.Import | ast.ImportFrom, alias: ast.alias, name: str) -> bool:
        """Bind an imported name: lifted out of another file of the package, imported, or noted as missing."""
        star = isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*"
        if isinstance(statement, ast.Import):
            module, attribute = alias.name, ""
        else:
            level = self.package[: len(self.package) - statement.level + 1] if statement.level else []
            module, attribute = ".".join([*level, *filter(None, [statement.module])]), alias.name
        scope = self.module.__dict__
        try:
            own = self._own(module, attribute, name)
            scope[name] = own[0] if own else _import(module, attribute, bool(alias.asname))
        except ValueError:
            raise
        except Exception:
            if not star:
                scope[name] = self.lifting.absent(name, f"{module}.{attribute}".strip("."))
            return False
        return True

    def _own(self, module: str, attribute: str, name: str) -> list[Any]:
        """A definition, or a module with those that are used of it, of the package that the file belongs to; empty if it is none."""
        if not self.folders or module.partition(".")[0] != self.package[0]:
            beside = self.path.parent / f"{module}.py"
            if self.folders or "." in module or not beside.is_file():
                return []
            home = self.path.parent
            parts = [module]
        else:
            home, parts = self.folders[-1].parent, module.split(".")
        base = home.joinpath(*parts)
        if attribute and (base / f"{attribute}.py").is_file():
            return [self._part(base / f"{attribute}.py", name)]
        path = base.with_name(f"{base.name}.py") if base.with_name(f"{base.name}.py").is_file() else base / "__init__.py"
        if not path.is_file():
            return []
        if not attribute and name == module.partition(".")[0] != module:
            return []  # import package.module, read as package.module.name
        if attribute:
            return [self.lifting.of(path.resolve()).lifted([attribute])[attribute]]
        return [self._part(path, name)]

    def _part(self, path: Path, name: str) -> Any:
        used = {
            node.attr
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name
        }
        file = self.lifting.of(path.resolve())
        return types.SimpleNamespace(**file.lifted(key for key in sorted(used) if file.defines(key)))


def _import(module: str, attribute: str, renamed: bool) -> Any:
    found = importlib.import_module(module)
    if attribute:
        return getattr(found, attribute) if hasattr(found, attribute) else importlib.import_module(f"{module}.{attribute}")
    return found if renamed else sys.modules[module.partition(".")[0]]


def _bound(statement: ast.stmt) -> set[str]:
    """The names of the module that a statement binds."""
    found: set[str] = set()
    waiting: list[ast.AST] = [statement]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        if not isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            waiting += ast.iter_child_nodes(node)
    return found


def _loaded(code: types.CodeType) -> list[str]:
    """The names of the module that a piece of code reads, itself or in what it defines."""
    instructions = list(dis.get_instructions(code))
    own = {i.argval for i in instructions if i.opname == "STORE_NAME"}  # of a class
    found = [i.argval for i in instructions if i.opname in ("LOAD_GLOBAL", "LOAD_NAME") and i.argval not in own]
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            found += _loaded(const)
    return list(dict.fromkeys(found))
