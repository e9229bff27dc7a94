"""Audits of another version of a package than the one that is here, each in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradlab.audit import adapters, changes

#: Starts `gradlab` with the interpreter that runs here.
_GRADLAB = (sys.executable, "-c", "from gradlab.cli.main import main; main()")


def audits(place: str, arguments: Sequence[str] = (), requirements: bool = False) -> list[dict[str, Any]]:
    """The audits of `place`, as they are read from a file.

    place: an `audit.json`; a folder, in which `gradlab audit ARGUMENTS` is run, its modules found before any that are installed; or
    what pip installs, such as `trl==1.16.0`, into a folder of its own that is removed afterwards. requirements: with the packages
    that it asks for; left out, those that are here are used. Without `arguments` a framework is audited as a whole.
    Raises `ValueError` when there is nothing to audit, when it cannot be installed, and when nothing of it could be audited.
    """
    if place.endswith(".json"):
        kept: list[dict[str, Any]] = changes.read(Path(place))
        return kept
    if Path(place).is_dir():
        if not arguments:
            raise ValueError(f"say what to audit in {place}: gradlab drift BEFORE AFTER path/to/file.py:function")
        return _run(place, arguments, Path(place))
    named = arguments and (not arguments[0].startswith("-") or "--config" in arguments)
    chosen = list(arguments) if named else [*framework(place), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        _install(place, Path(folder), requirements)
        return _run(place, chosen, Path(folder), installed=True)


def framework(requirement: str) -> list[str]:
    """The framework that a requirement such as `liger-kernel==0.8.5` is of.

    Raises `ValueError` when there is no adapter for it, with what can be given instead.
    """
    name = _plain(re.split(r"[^\w.-]", requirement)[0])
    for key, adapter in adapters.ADAPTERS.items():
        if name in {_plain(key), _plain(adapter.PACKAGE), *map(_plain, re.findall(r"([\w-]+)==", adapter.INSTALL))}:
            return [key]
    raise ValueError(
        f"there is no adapter for {requirement!r}; say what to audit, gradlab drift BEFORE AFTER package.module:function, or give "
        f"two folders, two files audit.json, or versions of {', '.join(adapters.ADAPTERS)}, such as trl==1.16.0"
    )


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _install(requirement: str, folder: Path, requirements: bool) -> None:
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    elif uv := shutil.which("uv"):
        command = [uv, "pip", "install", "--quiet", "--python", sys.executable]
    else:
        raise ValueError(
            f"{requirement} is installed by pip or uv, and neither is here; install one, or give a folder that holds it"
        )
    options = [] if requirements else ["--no-deps"]
    done = subprocess.run(
        [*command, *options, "--target", str(folder), requirement], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines() or [""]
        raise ValueError(
            f"cannot install {requirement!r}, nor is it a folder or a file audit.json: {said[-1].removeprefix('ERROR: ')}"
        )


def _run(place: str, arguments: Sequence[str], folder: Path, installed: bool = False) -> list[dict[str, Any]]:
    source = folder / "src"
    paths = [str(folder.resolve()), *([str(source.resolve())] if source.is_dir() and not installed else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run(
        [*_GRADLAB, "audit", *arguments, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=environment,
        cwd=None if installed else folder,
    )
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)
    except ValueError:
        raise ValueError(f"nothing could be audited in {place}; the reason is above") from None
    return found
