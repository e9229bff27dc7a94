"""`gradlab utility`: which utility of the success probability a loss ascends, from the command line."""

from __future__ import annotations

from typing import Annotated

import typer


def utility_command(
    name: Annotated[str, typer.Argument(help="A loss (`gradlab list losses`) or an advantage, such as group_std.")],
    group: Annotated[
        int | None, typer.Option("--group", min=1, help="Responses to a prompt; the loss's own if not given.")
    ] = None,
    k: Annotated[int | None, typer.Option("--k", min=1, help="Of pass@k.")] = None,
) -> None:
    """Print what an advantage maximises: U(p) and U'(p) of the success probability p, and when there is no such function.

    Example: `gradlab utility grpo --group 8`
    """
    from rich.table import Table

    from gradlab._common.console import wide_console
    from gradlab._common.names import check_name
    from gradlab.estimators import LOSSES, utility
    from gradlab.estimators.advantages import ADVANTAGES

    check_name("loss or advantage", name, [*LOSSES, *ADVANTAGES])
    found = utility(LOSSES.get(name, name), group=group, k=k)
    if found is None:
        print(
            f"{name} ascends no utility of the success probability: it divides by the spread of the batch, so that a prompt's"
        )
        print("gradient depends on the other prompts, or it compares a signal with the KL in it, which is not 0 or 1 any more.")
        return
    print(found)
    table = Table("p", "U(p)", "U'(p)", header_style="bold")
    for p in (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99):
        table.add_row(f"{p:g}", f"{found.value(p):.4f}", f"{found.slope(p):.4f}")
    wide_console().print(table)
    print("For rewards of 0 and 1, on-policy, with one weight for all tokens.")
    for reason in found.conditions:
        print(f"But {reason}.")
