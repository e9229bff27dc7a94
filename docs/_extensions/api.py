"""The API reference: every public name of `gradlab` with its signature and its docstring, which is Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from results import _write
from sphinx.application import Sphinx
from sphinx.util.inspect import stringify_signature

import gradlab as gl

#: The pages of the reference, in the order of the way of the data.
PAGES = {
    "Policies": ("Bandit", "Tree", "Markov", "Gaussian", "LanguageModel", "Policy", "policies"),
    "Scenarios and rollouts": ("Scenario", "Rollout", "TableReward"),
    "Estimators": ("Estimator", "ESTIMATORS", "CATALOGUE", "Kernel"),
    "Whole losses": ("PolicyLoss", "LOSSES", "Utility", "utility"),
    "Targets": ("Target", "TARGETS", "OBJECTIVES"),
    "Moments and error bars": ("Moments", "exact", "montecarlo", "intervals", "backprop"),
    "Measuring": ("measure", "components", "values", "register"),
    "Training": ("train", "training", "runs"),
    "Questions": (
        *("asymmetry", "ascent", "fixedpoints", "optima", "restoring", "field", "simplex", "language", "lengths", "off_policy"),
        *("search", "sequences", "tails"),
    ),
    "Claims and reports": ("claims", "report", "figure", "plots"),
    "Audit": ("audit", "testing"),
    "Records": ("Records", "records", "read_rollouts", "Recorder", "inspect"),
    "Teaching": ("lesson",),
}


def docstring(text: str) -> str:
    """A docstring as a page shows it: examples as code, and lines of the form `name: …` as a list."""
    lines: list[str] = []
    code = False
    for line in text.splitlines():
        starts = line.lstrip().startswith(">>> ")
        if code and not line.strip():
            lines.append("```")
            code = False
        if starts and not code:
            lines.append("\n```pycon")
            code = True
        if not code and (found := re.match(r"((?:\w+, )*\w+): (?=\S)", line)) and not line.startswith(("Raises", "Source")):
            line = f"* **{found[1]}**: {line[found.end() :]}"
        lines.append(line)
    return "\n".join([*lines, *(["```"] if code else [])])


def _function(name: str, item: Any, kind: str = "py:function") -> str:
    """A function, method or property."""
    signature = ""
    if kind != "py:property":
        signature = inspect.signature(item)
        parameters = list(signature.parameters.values())
        if kind == "py:method" and parameters and parameters[0].name in ("self", "cls"):
            signature = signature.replace(parameters=parameters[1:])
        signature = stringify_signature(signature, unqualified_typehints=True)
    return _entry(kind, f"{name}{signature}", inspect.getdoc(item) or "")


def _entry(kind: str, signature: str, text: str, members: str = "") -> str:
    fence = ":" * (5 if members else 4)
    return f"{fence}{{{kind}}} {signature}\n\n{docstring(text)}\n\n{members}\n{fence}\n"


def _class(name: str, item: type) -> str:
    """A class with its documented members."""
    members = []
    for key, member in vars(item).items():
        if key.startswith("_"):
            continue
        if isinstance(member, property):
            if inspect.getdoc(member.fget):
                members.append(_function(key, member.fget, "py:property"))
        elif isinstance(member, classmethod | staticmethod):
            members.append(_function(key, member.__func__, "py:method"))
        elif inspect.isfunction(member) and inspect.getdoc(getattr(item, key)):
            members.append(_function(key, member, "py:method"))
    try:
        signature = stringify_signature(inspect.signature(item), unqualified_typehints=True, show_return_annotation=False)
    except ValueError:
        signature = ""
    return _entry("py:class", f"{name}{signature}", inspect.getdoc(item) or "", "\n".join(members))


def _module(name: str, module: ModuleType) -> str:
    """A module: what it is about, and what it defines."""
    public = getattr(module, "__all__", None)
    names = public if public is not None else [key for key, item in vars(module).items() if _defined(module, key, item)]
    parts = [docstring(inspect.getdoc(module) or "")]
    for key in names:
        item = getattr(module, key)
        if key in gl.__all__ and getattr(gl, key) is item:
            parts.append(f"`{name}.{key}` is {{py:obj}}`gradlab.{key}`.")
            continue
        if inspect.isclass(item):
            parts.append(_class(f"{name}.{key}", item))
        elif callable(item):
            parts.append(_function(f"{name}.{key}", item))
    return "\n\n".join(parts)


def _defined(module: ModuleType, key: str, item: Any) -> bool:
    own = inspect.isclass(item) or inspect.isfunction(item)
    return own and not key.startswith("_") and item.__module__ == module.__name__ and bool(inspect.getdoc(item))


def _public(name: str) -> str:
    item = getattr(gl, name)
    full = f"gradlab.{name}"
    if isinstance(item, ModuleType):
        return _module(full, item)
    if inspect.isclass(item):
        return _class(full, item)
    if inspect.isfunction(item):
        return _function(full, item)
    return _entry("py:data", full, (inspect.getdoc(item) or "") if type(item).__module__.startswith("gradlab") else "")


def pages() -> Iterator[tuple[str, str]]:
    """File name and text of each page; public names that `PAGES` does not place are on the last one."""
    listed = {name for names in PAGES.values() for name in names}
    for title, names in {**PAGES, "Further names": tuple(sorted(set(gl.__all__) - listed))}.items():
        there = [name for name in names if name in gl.__all__]
        if there:
            sections = "\n\n".join(f"## gl.{name}\n\n{_public(name)}" for name in there)
            yield title.lower().replace(" ", "-"), f"# {title}\n\n{sections}\n"


def write_pages(app: Sphinx) -> None:
    """Write the reference into the folder `api` of the sources."""
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    names = []
    for name, text in pages():
        _write(folder / f"{name}.md", text)
        names.append(name)
    head = "# Reference\n\nEvery public name, reached through `import gradlab as gl`, in the order of the way of the data.\n\n"
    _write(folder / "index.md", head + "```{toctree}\n:maxdepth: 2\n\n" + "\n".join(names) + "\n```\n")


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the pages before the sources are read."""
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
