"""The command `gradlab docs`: build the documentation from its sources and a folder of results, and open it."""

from __future__ import annotations

import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

#: What the sources need to be built, by the names of the modules.
NEEDED = ("sphinx", "furo", "myst_parser", "sphinx_design", "sphinx_copybutton", "latex2mathml")


def sources() -> Path:
    """The folder of the documentation's sources: that of the source tree, or the one packed with the installed package.

    Raises `ValueError` when there is none.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "_docs", package.parent / "docs"):
        if (folder / "conf.py").is_file():
            return folder
    raise ValueError("no documentation was found beside the package; reinstall gradlab-kl")


def docs_command(
    results: Annotated[Path, typer.Option("--results", help="Folder of results that the pages show.")] = Path("figures"),
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pages.")] = Path("site"),
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open the first page in the browser.")] = True,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 on any warning, such as a broken link.")] = False,
) -> None:
    """Build the documentation and open it: static pages that need no network.

    Takes about half a minute. The pages hold the figures, data and verdicts of `--results`, as
    `gradlab reproduce` leaves them. Needs the extra `docs`: `pip install 'gradlab-kl[docs]'`.

    Example: `gradlab docs --no-open --output site`
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(
            f"the documentation is built with {', '.join(missing)}; install them by pip install 'gradlab-kl[docs]'"
        )
    from sphinx.cmd.build import build_main

    from gradlab._common.files import ensure_writable

    given = sources()
    ensure_writable(output)
    with tempfile.TemporaryDirectory() as scratch:  # where the pages made from results lie among the others
        laid = shutil.copytree(given, Path(scratch) / "docs", ignore=shutil.ignore_patterns("__pycache__", "api", "gallery"))
        for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
            text = next(path for path in (given / name, given.parent / name) if path.is_file()).read_text(encoding="utf-8")
            (laid / name.lower()).write_text(text.replace("](docs/", "]("), encoding="utf-8")
        options = ["--quiet", "--define", f"gradlab_results={results.resolve()}", *(["--fail-on-warning"] if strict else [])]
        code = build_main([*options, "--doctree-dir", str(Path(scratch) / "doctrees"), str(laid), str(output)])
    if code:
        raise typer.Exit(code)
    page = output.resolve() / "index.html"
    print(f"the documentation is {page}")
    if show:
        typer.launch(page.as_uri())
