"""The command line: reproduce figures and verdicts, read the ledger, measure a question of one's own, list what there is.

Each command imports what it uses, so that help is there at once and no command waits for what another needs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gradlab._common.provenance import __version__
from gradlab.cli.audit import audit_command
from gradlab.cli.docs import docs_command
from gradlab.cli.drift import drift_command
from gradlab.cli.explore import explore_command
from gradlab.cli.figure import figure_command
from gradlab.cli.inspect import inspect_command
from gradlab.cli.lesson import lesson_command
from gradlab.cli.measure import measure_command
from gradlab.cli.reproduce import Output, analyses, reproduce, title
from gradlab.cli.train import train_command
from gradlab.cli.utility import utility_command

app = typer.Typer(
    name="gradlab",
    help="Which objective does a KL regulariser's gradient descend, how far off, how noisily, and on which tokens?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"gradlab {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of every command."""


app.command()(reproduce)


@app.command(name="claims")
def claims_command(
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Claims to tell in full: topics, or parts of them.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="The same as ID; may be repeated.")] = None,
    output: Output = Path("figures"),
    csv: Annotated[bool, typer.Option("--csv", help="Print the ledger as CSV, with everything there is to it.")] = False,
) -> None:
    """Print the claims ledger, each claim settled anew from the data in the output folder.

    HOLDS, FAILS or UNDECIDED within a scope; OPEN where `gradlab reproduce` has not yet made the data. Without an ID a line for
    each published claim and how many scopes came out how; with an ID the sentences tested, their scopes, rules and evidence.

    Example: `gradlab claims k2-loss rho-k3.frozen`
    """
    from gradlab.ledger import verify
    from gradlab.study import report

    chosen = [*(ids or ()), *(only or ())] or None
    settled = verify.verify(output, chosen)
    if csv:
        print(settled.to_csv(index=False), end="")
    elif chosen:
        report.show_claims(settled)
    else:
        report.show_verdicts(settled)


app.command(name="measure")(measure_command)
app.command(name="train")(train_command)
app.command(name="audit")(audit_command)
app.command(name="drift")(drift_command)
app.command(name="utility")(utility_command)
app.command(name="figure")(figure_command)
app.command(name="docs")(docs_command)
app.command(name="lesson")(lesson_command)
app.command(name="explore")(explore_command)
app.command(name="inspect")(inspect_command)


class Listing(StrEnum):
    """What `gradlab list` can list."""

    estimators = "estimators"
    losses = "losses"
    targets = "targets"
    kernels = "kernels"
    claims = "claims"
    analyses = "analyses"
    models = "models"


@app.command(name="list")
def list_command(
    what: Annotated[Listing, typer.Argument(help="Which names to list.")] = Listing.estimators,
) -> None:
    """List estimators, losses, targets, kernels, claims, analyses or shipped models, with what they are and where they come from."""
    from rich.markup import escape
    from rich.table import Table

    from gradlab._common.console import wide_console

    table = Table(header_style="bold")
    headings, rows = listed(what)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))  # E[k1] is no markup
    wide_console().print(table)


def listed(what: Listing) -> tuple[tuple[str, ...], Sequence[tuple[str, ...]]]:
    """Headings and rows of a list."""
    if what is Listing.estimators:
        from gradlab.estimators.catalogue import CATALOGUE

        return ("name", "composition", "descends on-policy", "descends off-policy", "source"), [
            (e.name, e.estimator.name, _combination(e.on_policy), _combination(e.off_policy), e.source)
            for e in CATALOGUE.values()
        ]
    if what is Listing.losses:
        from gradlab.estimators.losses import LOSSES
        from gradlab.estimators.policy_loss import describe

        return ("name", "composition", "descends on-policy, at one length", "source"), [
            (name, _fields(describe(loss)), _combination(dict(loss.target) if loss.target else None), loss.source)
            for name, loss in LOSSES.items()
        ]
    if what is Listing.targets:
        from gradlab.objectives import OBJECTIVES
        from gradlab.targets import TARGETS

        listed: list[Any] = [*TARGETS.values(), *OBJECTIVES.values()]
        return ("name", "objective", "source"), [(t.name, t.statement, t.source) for t in listed]
    if what is Listing.kernels:
        from gradlab.estimators.kernels import KERNELS, VOCABULARY_KERNELS

        return ("name", "source"), [*((k.name, k.source) for k in KERNELS.values()), *VOCABULARY_KERNELS.items()]
    if what is Listing.claims:
        from gradlab.ledger import claims

        return ("id", "statement", "source"), list(dict.fromkeys((c.id, c.statement, c.source) for c in claims()))
    if what is Listing.models:
        from gradlab.policies.small import STAGES, TASKS

        return ("task", "stages", "what it does"), [(t.name, ", ".join(STAGES), t.statement) for t in TASKS.values()]
    return ("name", "question"), [(name, title(path)) for name, path in analyses().items()]


def _fields(given: dict[str, Any]) -> str:
    """Fields of a loss on one line."""
    shown = {key: getattr(value, "name", None) or getattr(value, "__name__", None) or value for key, value in given.items()}
    return ", ".join(
        f"{key}={'(' + ', '.join(f'{x:.4g}' for x in value) + ')' if isinstance(value, tuple) else value}"
        for key, value in shown.items()
    )


def _combination(parts: dict[str, float] | None) -> str:
    if parts is None:
        return "none of the targets"
    return " + ".join(name if c == 1 else f"{c:g}·{name}" for name, c in parts.items()).replace("+ -1·", "− ")


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2, an interruption exit code 130."""
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        from gradlab.audit import LossError

        if isinstance(error, LossError):
            print(error.trace, end="", file=sys.stderr)
        print(f"gradlab: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        # typer raises its own usage errors; anything else is ours and keeps its traceback.
        if not hasattr(error, "exit_code"):
            raise
        if hasattr(error, "show"):
            error.show()
        sys.exit(int(error.exit_code))
    sys.exit(code or 0)
