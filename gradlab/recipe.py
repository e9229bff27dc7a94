"""Recipe: what all training runs of a comparison have in common."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isfinite

from gradlab._common.names import check_real, check_whole


@dataclass(frozen=True)
class Recipe:
    """What all runs of a comparison have in common.

    steps: batches. batch: responses in each; group: successive ones that answer one prompt. epochs: optimiser steps per batch.
    rate: learning rate of Adam. clip: PPO's range `1 ± clip`, of use only with several epochs. eval_every, eval_responses: every
    `eval_every` batches, and at the end, reward and KL are measured on `eval_responses` fresh responses.
    Raises `ValueError` for numbers that are not positive and for batches that do not divide into groups of at least two.

    >>> recipe = gl.training.Recipe(steps=48, epochs=4)
    >>> recipe.batch // recipe.group
    8
    """

    steps: int = 200
    batch: int = 64
    group: int = 8
    epochs: int = 1
    rate: float = 1e-3
    clip: float = 0.2
    eval_every: int = 20
    eval_responses: int = 256

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_whole = field.type == "int"
            (check_whole if is_whole else check_real)(field.name, value)
            if not (value > 0 and isfinite(value)):
                raise ValueError(f"{field.name} must be a positive number, got {value!r}")
        if self.group < 2 or self.batch % self.group or self.eval_responses % self.group:
            raise ValueError(
                f"batch and eval_responses are made of groups of at least 2 responses, each compared with the others of its group: "
                f"got batch={self.batch}, eval_responses={self.eval_responses}, group={self.group}"
            )
