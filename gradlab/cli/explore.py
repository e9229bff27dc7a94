"""`gradlab explore`: the page on which policies are dragged and their gradients answer."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer


def explore_command(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write a copy of the page to this file instead.")
    ] = None,
) -> None:
    """Open the explorer: drag the policies, choose an estimator, and see its gradient against the true one.

    It is one HTML file that needs no server and no network; every number in it is gradlab's exact one.

    Example: `gradlab explore`
    """
    from gradlab._common.files import ensure_writable_file
    from gradlab.study.pages import EXPLORER, copy_explorer

    if output is not None:
        copy_explorer(ensure_writable_file(output))
        print(f"the explorer is {output}")
        return
    opened = webbrowser.open(EXPLORER.as_uri())
    print(f"the explorer is {EXPLORER}" + ("" if opened else "; no browser was found here: open it in one"))
