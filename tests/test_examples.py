"""Every public function and class has an example in its docstring, and the examples of all docstrings run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import gradlab as gl

ROOT = Path(__file__).parents[1]
MODULES = ["gradlab", *(module.name for module in pkgutil.walk_packages(gl.__path__, "gradlab."))]


def examples(name: str) -> list[doctest.DocTest]:
    """The docstrings of a module that have examples; they know `gl`, as a reader does."""
    module = importlib.import_module(name)
    found = doctest.DocTestFinder().find(module, name, extraglobs={"gl": gl})
    return [test for test in found if test.examples]


def public(module: ModuleType, prefix: str) -> Iterator[tuple[str, object]]:
    """Functions and classes of gradlab that a module offers: what it exports, or what it defines; with those of `gl`'s modules."""
    names = getattr(module, "__all__", None)
    for name in names or [name for name in vars(module) if not name.startswith("_")]:
        item = getattr(module, name)
        if inspect.ismodule(item) and module is gl:
            yield from public(item, f"{prefix}.{name}")
        elif inspect.isfunction(item) or inspect.isclass(item):
            home = item.__module__
            if home.startswith("gradlab") and (names or home == module.__name__):
                yield f"{prefix}.{name}", item


PUBLIC = dict(public(gl, "gl"))


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_public_has_an_example(name):
    assert ">>> " in (inspect.getdoc(PUBLIC[name]) or "")


@pytest.mark.parametrize("name", [name for name in MODULES if examples(name)])
def test_examples_run(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)  # some read the committed figures
    runner = doctest.DocTestRunner()
    for test in examples(name):
        runner.run(test)
    assert runner.failures == 0, capsys.readouterr().out
    assert runner.tries > 0
