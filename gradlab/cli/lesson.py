"""`gradlab lesson`: list the lessons, or open one as a notebook."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer


def lesson_command(
    number: Annotated[int | None, typer.Argument(help="The lesson, 1 to 6; without it they are listed.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File of the notebook; by default in the current folder.")
    ] = None,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open it in JupyterLab.")] = True,
) -> None:
    """Open a lesson as a Jupyter notebook, or list the lessons.

    The notebook is written into the current folder. One that is there already is opened as it is, with its answers.

    Example: `gradlab lesson 1`
    """
    from gradlab.lessons import lesson, lessons

    if number is None:
        for item in lessons().values():
            print(f"{item.number}  {item.title}")
        print("`gradlab lesson 1` opens the first as a notebook.")
        return
    chosen = lesson(number)
    path = output or Path(f"{chosen.name}.ipynb")
    missing = [name for name in ("jupytext", "jupyterlab")[: 1 + show] if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"a notebook needs {' and '.join(missing)}: pip install 'gradlab-kl[teach]'; the script is {chosen.path}"
        )
    if not path.exists():
        _write(chosen.path, path)
    print(f"lesson {number}, {chosen.title} is {path}")
    if show:
        subprocess.run([sys.executable, "-m", "jupyterlab", str(path)], check=False)


def _write(script: Path, path: Path) -> None:
    import jupytext

    from gradlab._common.files import atomic_write, ensure_writable_file

    with atomic_write(ensure_writable_file(path)) as part:
        part.write_text(jupytext.writes(jupytext.read(script), fmt="ipynb"), encoding="utf-8")
