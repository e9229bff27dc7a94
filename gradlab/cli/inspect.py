"""The command `gradlab inspect`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def inspect_command(
    path: Annotated[Path, typer.Argument(help="A file that a training run wrote of its rollouts, or the folder of a run.")],
    format: Annotated[
        str | None,
        typer.Option("--format", help="parquet, nemo-rl, prime-rl, slime or skyrl; told from the files if not given."),
    ] = None,
    steps: Annotated[list[int] | None, typer.Option("--step", help="Steps to look at; all if not given.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Compute from columns that cannot be right, too.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickles, which may run any program. For files of your own.")
    ] = False,
    level: Annotated[float, typer.Option("--level", help="Probability of the intervals.")] = 0.95,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=-1, help="Worker processes, for parquet; -1 uses every core.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a screen.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write inspect.html, .json and .csv to this folder.")
    ] = None,
) -> None:
    """Look into a run: check what it wrote of its rollouts, then say what its KL, estimators, weights and engine are.

    Exits 1 where a fault was found for which columns cannot be right; nothing is computed from them without --force.

    Example: `gradlab inspect rollouts/ --output report`
    """
    from gradlab._common.files import ensure_writable
    from gradlab.records import inspect, read_rollouts, report

    if output is not None:
        ensure_writable(output)
    records = read_rollouts(path, format, allow_pickle)
    found = inspect(records.where(step=steps) if steps else records, force=force, level=level, jobs=jobs)
    if json:
        print(report.to_json(found))
    else:
        report.show(found)
    if output is not None:
        print(f"the page is {report.write(found, output)}", file=sys.stderr)
    if any(finding.serious for finding in found.findings):
        raise typer.Exit(1)
