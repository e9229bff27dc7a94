"""The command `gradlab drift`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def drift_command(
    before: Annotated[str, typer.Argument(help="A version, such as trl==1.9.2; a folder; or an audit.json.")],
    after: Annotated[str, typer.Argument(help="What it is compared with: another version, folder or audit.json.")],
    audit: Annotated[
        list[str] | None,
        typer.Argument(metavar="[AUDIT]...", help="What to audit, as for gradlab audit; with its options after --."),
    ] = None,
    requirements: Annotated[
        bool, typer.Option("--requirements", help="Install what each version requires, too; else what is here is used.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Audit two versions of a package, or two folders, and print what changed; two files audit.json are compared as they are.

    Exits 1 where something changed, as diff does. A version is installed into a folder of its own, which is removed afterwards.

    Example: `gradlab drift trl==1.9.2 trl==1.16.0`, `gradlab drift ../main . losses.py:kl_loss -- --set beta=1`
    """
    from gradlab.audit import changes, versions

    found = []
    for place in (before, after):
        if not place.endswith(".json"):
            print(f"auditing {place}", file=sys.stderr)
        found.append(versions.audits(place, audit or (), requirements))
    rows = changes.changes(*found)
    if json:
        print(rows.to_json(orient="records", force_ascii=False, indent=2))
    else:
        from gradlab.audit import report

        report.show_changes(rows, before, after, len(found[1]))
    if len(rows):
        raise typer.Exit(1)
