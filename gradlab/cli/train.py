"""`gradlab train`: runs of a shipped language model under each regulariser, from the command line."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradlab.recipe import Recipe

if TYPE_CHECKING:
    import pandas as pd


class TaskName(StrEnum):
    """Tasks with a verifiable reward that a model ships for."""

    names = "names"
    addition = "addition"


_DEFAULT = Recipe(steps=48, rate=5e-4, eval_every=8)


def train_command(
    estimator: Annotated[
        list[str] | None, typer.Option("--estimator", "-e", help="Regulariser by catalogue name; may be repeated.")
    ] = None,
    coefficient: Annotated[list[float] | None, typer.Option("--coefficient", "-b", help="β; may be repeated.")] = None,
    task: Annotated[TaskName, typer.Option("--task", help="What the shipped model is rewarded for.")] = TaskName.names,
    steps: Annotated[int, typer.Option("--steps", help="Batches.")] = _DEFAULT.steps,
    batch: Annotated[int, typer.Option("--batch", help="Responses in a batch.")] = _DEFAULT.batch,
    group: Annotated[int, typer.Option("--group", help="Responses that are compared with one another.")] = _DEFAULT.group,
    epochs: Annotated[int, typer.Option("--epochs", help="Optimiser steps per batch.")] = _DEFAULT.epochs,
    rate: Annotated[float, typer.Option("--rate", help="Learning rate of Adam.")] = _DEFAULT.rate,
    clip: Annotated[
        float | None, typer.Option("--clip", help=f"PPO's clipping range, with several epochs; {_DEFAULT.clip:g} if not given.")
    ] = None,
    eval_every: Annotated[
        int, typer.Option("--look", help="Batches between two looks at reward and KL.")
    ] = _DEFAULT.eval_every,
    eval_responses: Annotated[int, typer.Option("--watch", help="Fresh responses at every look.")] = _DEFAULT.eval_responses,
    seeds: Annotated[int, typer.Option("--seeds", help="Runs of each regulariser, with draws in common.")] = 3,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=-1, help="Worker processes; -1 uses every core.")] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Entropy of every random draw.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write all looks at all runs to this CSV file.")] = None,
) -> None:
    """Train a small language model under each regulariser, and once without: reward, KL and noise at the end.

    Example: `gradlab train -e k1-loss -e k2-loss -e k3-loss -b 0.1 --seeds 4 --jobs 2`
    """
    import torch

    from gradlab.policies.small import small
    from gradlab.study import report
    from gradlab.training import task_reward, train

    if clip is not None and epochs == 1:
        raise ValueError(
            "--clip bounds the ratio of later optimiser steps to the policy that drew; with --epochs 1 there are none"
        )
    recipe = Recipe(
        steps=steps,
        batch=batch,
        group=group,
        epochs=epochs,
        rate=rate,
        clip=_DEFAULT.clip if clip is None else clip,
        eval_every=eval_every,
        eval_responses=eval_responses,
    )
    policy = small(task.value, precision=torch.float64)  # runs in single precision drift apart between processors
    names = estimator or ["k1-loss", "k2-loss", "k3-loss"]
    if output is not None:
        report.ensure_writable_file(output)
    frame = train(
        policy, task_reward(task.value, policy), names, coefficient or [0.1], recipe=recipe, seeds=seeds, seed=seed, jobs=jobs
    )  # fmt: skip
    if output is not None:
        with report.atomic_write(output) as part:
            frame.to_csv(part, index=False, lineterminator="\n")
    show(frame)


def show(frame: pd.DataFrame) -> None:
    """Print where the runs of every regulariser ended."""
    from rich.table import Table

    from gradlab._common.console import wide_console
    from gradlab.questions import training
    from gradlab.training import NONE

    table = Table(
        header_style="bold", caption=f"means over {frame['seed'].nunique()} seeds, second half of the runs; 95 % intervals"
    )
    for heading in ("regulariser", "β", "reward", "KL, nats", "KL over none", "KL over k2-loss", "noise over none"):
        table.add_column(heading, justify="left" if heading == "regulariser" else "right")
    without = training.ends(frame).query("estimator == @NONE", local_dict={"NONE": NONE})
    table.add_row(NONE, "–", f"{without['reward'].mean():.3f}", f"{without['kl'].mean():.3g}", "", "", "")
    compared = training.compare(frame)
    for row in compared[compared["budget"] == training.COEFFICIENT].to_dict("records"):
        quotients = [_quotient(row, column) for column in ("kl_over_none", "kl_over_k2", "noise_over_none")]
        table.add_row(row["estimator"], f"{row['coefficient']:g}", f"{row['reward']:.3f}", f"{row['kl']:.3g}", *quotients)
    wide_console().print(table)
    if diverged := int(frame[frame["step"] == frame["step"].max()]["diverged"].sum()):
        print(
            f"{diverged} of the runs diverged and are left out of what compares them; a smaller --rate or --coefficient keeps them"
        )


def _quotient(row: Mapping[Any, Any], column: str) -> str:
    if isnan(row[column]):
        return "–"
    ends = "" if isnan(row[f"{column}_low"]) else f" [{row[f'{column}_low']:.3g}, {row[f'{column}_high']:.3g}]"
    return f"{row[column]:.3g}{ends}"
