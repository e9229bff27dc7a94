"""Skipping what is unchanged, or cannot run here: an analysis that is as it was, or that needs packages that are not installed."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gradlab._common.files import atomic_write, ensure_writable
from gradlab._common.provenance import versions


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
        found: dict[str, Any] = {}
        for node in ast.parse(script.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name in ("REQUIRES", "INSTALL"):
                    found[name] = ast.literal_eval(node.value)
        return cls({name: _version(name) for name in found.get("REQUIRES", ())}, found.get("INSTALL", ""))

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

    def fingerprint(self) -> str:
        """Hash of everything a result depends on: the script, gradlab's own source, the options, the library versions."""
        digest = hashlib.sha256(json.dumps([dict(self.options), versions()], sort_keys=True).encode())
        package = Path(__file__).parents[1]
        for source in [self.script, *sorted(p for p in package.rglob("*") if p.suffix in (".py", ".mplstyle"))]:
            digest.update(source.name.encode())
            digest.update(source.read_bytes())
        return digest.hexdigest()

    def results(self) -> dict[str, str]:
        """Hash of every result in the output folder."""
        number = self.script.stem.split("_")[0]
        files = sorted(p for p in self.output.glob(f"{number}_*") if p.is_file())
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    def unchanged(self) -> bool:
        """Whether the recorded run had the same fingerprint and its results are all still there as it left them."""
        try:
            recorded = json.loads(self.path.read_text(encoding="utf-8"))
            left, fingerprint = dict(recorded["results"]), recorded["fingerprint"]
        except (OSError, ValueError, TypeError, KeyError):  # none, or one of another form: the results are made again
            return False
        results = self.results()
        same = all(results.get(name) == digest for name, digest in left.items())
        return bool(left) and same and fingerprint == self.fingerprint()

    def save(self) -> None:
        """Record a finished run."""
        ensure_writable(self.path.parent)
        with atomic_write(self.path) as part:
            content = {"fingerprint": self.fingerprint(), "results": self.results()}
            part.write_text(json.dumps(content, indent=1), encoding="utf-8")
