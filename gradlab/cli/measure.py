"""`gradlab measure`: bias, direction and noise of estimators on random policies, from the command line."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradlab._common.streams import child

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from gradlab.estimators.policy_loss import PolicyLoss
    from gradlab.rollout import Rollout
    from gradlab.scenario import Scenario


#: What `--vocab`, `--length` and `--eos` are where they are not given; a family has those that its `random` takes.
SIZES: dict[str, int | None] = {"vocab": 4, "length": 3, "eos": None}


def _sizes(family: str, given: dict[str, int | None]) -> dict[str, int | None]:
    """The sizes of a family's policies. Raises `ValueError` for an unknown family, and for a size that it does not have."""
    from gradlab.policies import POLICIES

    own = {name: size for name, size in SIZES.items() if name in signature(POLICIES.named(family).random).parameters}
    given = {name: value for name, value in given.items() if value is not None}
    if foreign := [f"--{name}" for name in given if name not in own]:
        takes = ", ".join(f"--{name}" for name in own) or "none of --vocab, --length and --eos"
        raise ValueError(f"a {family} has no {' and no '.join(foreign)}; --family {family} takes {takes}")
    return own | given


def measure_command(
    estimator: Annotated[
        list[str] | None, typer.Option("--estimator", "-e", help="Catalogue name; may be repeated. Default: all of them.")
    ] = None,
    loss: Annotated[
        list[str] | None,
        typer.Option("--loss", "-l", help="Loss of the whole objective, see `gradlab list losses`; may be repeated."),
    ] = None,
    group: Annotated[
        int | None, typer.Option("--group", min=2, help="Responses to a prompt, of losses that compare them.")
    ] = None,
    beta: Annotated[float | None, typer.Option("--beta", min=0, help="Coefficient of the KL, of losses that have one.")] = None,
    target: Annotated[list[str] | None, typer.Option("--target", "-t", help="Objective to compare with.")] = None,
    family: Annotated[
        str, typer.Option("--family", help="Kind of policy: bandit, tree, markov, gaussian, or one that is registered.")
    ] = "tree",
    vocab: Annotated[
        int | None, typer.Option("--vocab", min=2, help="Number of tokens; 4 if not given. Not for a gaussian.")
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", min=1, help="Largest number of tokens, 3 if not given. For tree and markov.")
    ] = None,
    eos: Annotated[int | None, typer.Option("--eos", help="Token that ends a response. For tree and markov.")] = None,
    kl: Annotated[float, typer.Option("--kl", min=0, help="KL(policy ‖ reference) in nats.")] = 0.3,
    lag: Annotated[float, typer.Option("--lag", min=0, help="KL(policy ‖ behaviour) in nats; 0 is on-policy.")] = 0.0,
    scenarios: Annotated[int, typer.Option("--scenarios", min=1, help="How many random scenarios.")] = 1,
    samples: Annotated[int | None, typer.Option("--samples", "-n", help="Responses to draw; leave out for exact.")] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=-1, help="Worker processes; -1 uses every core. Same bytes for any.")
    ] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Entropy of every random draw.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the frame to this CSV file.")] = None,
) -> None:
    """Measure bias, direction and noise of estimators on random policies.

    Losses of the whole objective have a reward: 1 for responses whose tokens sum to an even number (a positive number of a Gaussian).
    They are compared with the reward less β KL.

    Example: `gradlab measure -e k2-loss -e k3-loss --family bandit --vocab 50 --kl 1 -n 10000`, or
    `gradlab measure --loss grpo --loss rloo --beta .04 --group 8`
    """
    from gradlab.estimators.catalogue import ESTIMATORS
    from gradlab.measure import measure
    from gradlab.study import report

    if not loss and (group is not None or beta is not None):
        raise ValueError("--group and --beta are of whole losses: name one with --loss, see `gradlab list losses`")
    names = {name: _named(name, ESTIMATORS) for name in estimator or ([] if loss else ESTIMATORS)}
    names |= {name: _composed(name, group, beta) for name in loss or []}
    sizes = _sizes(family, {"vocab": vocab, "length": length, "eos": eos})
    if output is not None:
        report.ensure_writable_file(output)
    cases = [_scenario(family, sizes, kl, lag, child(seed, i)) for i in range(scenarios)]
    chosen = target or ("regularised" if loss else "reverse_kl")
    own = beta if "regularised" in chosen else None
    frame = measure(names, cases, target=chosen, samples=samples, seed=seed, jobs=jobs, beta=own)
    if output is not None:
        with report.atomic_write(output) as part:
            frame.to_csv(part, index=False, lineterminator="\n")
    show(frame)


def show(frame: pd.DataFrame) -> None:
    """Print the columns of a measured frame that a person looks at first."""
    import pandas as pd
    from rich.table import Table

    from gradlab import reliability
    from gradlab._common.console import wide_console

    columns = ["scenario", "estimator", "target", "bias", "cosine", "noise", "crossover"]
    table = Table(header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", justify="left" if column in columns[:3] else "right")
    for row in frame.to_dict("records"):
        cells = [row["scenario"], row["estimator"], row["target"]]
        for column in columns[3:]:
            low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
            ends = "" if low is None or pd.isna(low) else f" [{low:.3g}, {high:.3g}]"
            cells.append(("–" if pd.isna(row[column]) else f"{row[column]:.4g}") + ends)
        table.add_row(*cells)
    wide_console().print(table)
    for told in (reliability.unreliable_rows_message(frame), *dashes(frame)):
        if told:
            print(told)


def dashes(frame: pd.DataFrame) -> list[str]:
    """Why numbers of a measured frame are missing, a sentence for each reason."""
    from gradlab.measure import ZERO_TOLERANCE

    zero = frame["bias"].isna() & (frame["target_norm"] <= ZERO_TOLERANCE)
    single = frame["bias"].isna() & ~zero
    level = frame["bias"].notna() & frame["cosine"].isna()
    floored = (frame["bias"] == 0) & frame["crossover"].isna()
    told = {
        "the target's gradient is 0, as where policy and reference agree, and nothing is relative to it; see gradient_norm and "
        "trace_cov in --output": zero,
        "so few responses show no spread, and without one neither distance nor noise is known; draw more with --samples": single,
        "no cosine: the mean gradient is 0, or the sample does not tell it from 0": level,
        "no crossover: the bias is not significantly different from 0": floored,
    }
    return [f"– in {int(rows.sum())} of {len(frame)} rows: {reason}" for reason, rows in told.items() if rows.any()]


def _scenario(family: str, sizes: dict[str, int | None], kl: float, lag: float, seed: int) -> Scenario:
    from gradlab.policies import POLICIES
    from gradlab.scenario import Scenario

    policy = POLICIES[family].random(**sizes, seed=seed)
    behaviour = policy.perturbed(kl=lag, seed=child(seed, 2)) if lag else None
    # The engine and the trainer's weights when it drew disagree by a tenth of the lag.
    old = behaviour.perturbed(kl=lag / 10, seed=child(seed, 3)) if behaviour is not None else None
    return Scenario(policy, policy.perturbed(kl=kl, seed=child(seed, 1)), behaviour, reward=Even(), old=old)


class Even:
    """The reward of the command line: 1 for responses whose tokens sum to an even number, and for positive numbers."""

    kinks = (0.0,)

    def __call__(self, rollout: Rollout) -> Tensor:
        """One reward per response, `[n]`."""
        if rollout.tokens.is_floating_point():
            return (rollout.tokens[:, 0] > 0).double()
        return ((rollout.tokens * rollout.mask).sum(-1) % 2 == 0).double()


def _named(name: str, known: Mapping[str, Any]) -> Any:
    from gradlab._common.names import check_name

    check_name("estimator", name, known)
    return known[name]


def _composed(name: str, group: int | None, beta: float | None) -> PolicyLoss:
    """A named loss with another group size and coefficient, where it has them."""
    from dataclasses import replace

    from gradlab.estimators.losses import LOSSES

    found = LOSSES.named(name)
    if group is not None and found.grouped:
        found = replace(found, group=group)
    return replace(found, beta=beta) if beta is not None and found.regulariser is not None else found
