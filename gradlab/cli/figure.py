"""`gradlab figure`: draw a figure again for a paper, at another width, in another style, from the data that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def figure_command(
    name: Annotated[str | None, typer.Argument(help="The figure, such as 08_one; without it they are listed.")] = None,
    width: Annotated[
        float | None, typer.Option("--width", help="Inches: 3.3 for a column, 6.9 for a page; the figure's own if not given.")
    ] = None,
    style: Annotated[
        str | None, typer.Option("--style", help="A style sheet of matplotlib: a file, or a name such as slides or ggplot.")
    ] = None,
    palette: Annotated[
        str | None,
        typer.Option("--palette", help="Colours of k1, k2, k3, full, …: a palette of seaborn's, or a list with commas."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write, .pdf, .svg or .png; NAME.pdf if not given.")
    ] = None,
    data: Annotated[Path, typer.Option("--data", help="Folder with the frames that `gradlab reproduce` left.")] = Path(
        "figures"
    ),
) -> None:
    """Draw a figure from its frames, without measuring again.

    Type keeps its size: at the width of a column panels are stacked. Fonts are embedded in a PDF, as text.

    Example: `gradlab figure 08_one --width 3.3 --output one.pdf`
    """
    from gradlab._common.files import atomic_write, ensure_writable_file
    from gradlab.plots.figures import FIGURES, figure
    from gradlab.study.report import METADATA

    if name is None:
        for known in FIGURES:
            text = data / f"{known}.md"
            title = text.read_text(encoding="utf-8").split("**")[1] if text.is_file() else ""
            print(f"{known:18}{title.rstrip('.')}")
        return
    path = output or Path(f"{name}.pdf")
    kind = path.suffix.removeprefix(".")
    if kind not in METADATA:
        raise ValueError(f"--output ends in {', '.join(f'.{k}' for k in METADATA)}, got {path}")
    drawn = figure(name, folder=data, width=width, style=style, palette=palette)
    with atomic_write(ensure_writable_file(path)) as part:
        drawn.savefig(part, format=kind, metadata=METADATA[kind])
    print(path)
