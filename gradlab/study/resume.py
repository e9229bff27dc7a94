"""Skipping what is unchanged, or cannot run here: an analysis that is as it was, or that needs packages that are not installed."""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gradlab._common.files import atomic_write, ensure_writable
from gradlab._common.provenance import versions

_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Requirements:
    """Packages that an analysis needs beyond gradlab's own: their versions here (`None`: not installed), and how to install them.

    A script declares them by two literals at its top level, read without running it: `REQUIRES`, the names of distributions,
    and `INSTALL`, a line that installs them.
    """

    versions: Mapping[str, str | None]
    install: str

    @classmethod
    def of(cls, script: Path) -> Requirements:
        """What a script declares; nothing, if it declares nothing."""
        declared: dict[str, Any] = {}
        for node in ast.parse(script.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name in ("REQUIRES", "INSTALL"):
                    declared[name] = ast.literal_eval(node.value)
        return cls({name: _version(name) for name in declared.get("REQUIRES", ())}, declared.get("INSTALL", ""))

    @property
    def missing(self) -> str:
        """What is not installed and the line that installs it, in words; empty when everything is there."""
        names = [name for name, number in self.versions.items() if number is None]
        return f"it needs {', '.join(names)}: {self.install}" if names else ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Record:
    """What one analysis was made from, and what it left in the output folder.

    The record lives in `<output>/.reproduced/`, apart from the results, so that results that were copied or checked out are
    made again once. Results are the files whose names start with the analysis's number.
    """

    script: Path
    output: Path
    options: Mapping[str, object]

    @property
    def path(self) -> Path:
        """File of the record."""
        return self.output / ".reproduced" / f"{self.script.stem}.json"

    def fingerprint(self, sources: Iterable[str]) -> dict[str, object]:
        """What a result depends on: the options, the versions of libraries, and the code of the script and of some files."""
        files = {"script": self.script, **{source: _PACKAGE / source for source in sorted(sources)}}
        return {
            "options": dict(self.options),
            "versions": versions(),
            "code": {name: code_hash(path) for name, path in files.items() if path.is_file()},
        }

    def results(self) -> dict[str, str]:
        """Hash of every result in the output folder."""
        number = self.script.stem.split("_")[0]
        files = sorted(p for p in self.output.glob(f"{number}_*") if p.is_file())
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    def unchanged(self) -> bool:
        """Whether the recorded run had the same fingerprint and its results are all still there as it left them."""
        try:
            recorded = json.loads(self.path.read_text(encoding="utf-8"))
            left, fingerprint = dict(recorded["results"]), dict(recorded["fingerprint"])
            sources = dict(fingerprint["code"]).keys() - {"script"}
        except (OSError, ValueError, TypeError, KeyError):  # none, or one of another form: the results are made again
            return False
        results = self.results()
        same = all(results.get(name) == digest for name, digest in left.items())
        return bool(left) and same and fingerprint == json.loads(json.dumps(self.fingerprint(sources)))

    def save(self, sources: Iterable[str]) -> None:
        """Record a finished run that used these files of gradlab, see `imported`."""
        ensure_writable(self.path.parent)
        with atomic_write(self.path) as part:
            content = {"fingerprint": self.fingerprint(sources), "results": self.results()}
            part.write_text(json.dumps(content, indent=1), encoding="utf-8")


def imported() -> list[str]:
    """Files of gradlab that this process has imported, relative to the package, and the style sheet of its figures."""
    files = (getattr(module, "__file__", None) for name, module in list(sys.modules.items()) if name.startswith("gradlab."))
    modules = {Path(file).resolve() for file in files if file}
    return sorted(
        str(path.relative_to(_PACKAGE)) for path in modules | set(_PACKAGE.glob("*.mplstyle")) if path.is_relative_to(_PACKAGE)
    )


def code_hash(path: Path) -> str:
    """Hash of what a file does: of Python its syntax tree without docstrings, so that comments and layout do not count."""
    if path.suffix != ".py":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()
