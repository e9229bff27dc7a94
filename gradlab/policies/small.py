"""Small language models that ship with the package: a transformer of 105k parameters on two tasks, at several stages.

| task | prompt | response | reward of the reinforced policies |
|---|---|---|---|
| `addition` | `12+34=` | three digits, `046` | the sum is right |
| `names` | `.` (start) | letters of a US name and `.` (end), at most 10 | the last letter is an `a` |

Stages: `reference` learned from examples and stopped early; `few`, `some` and `many` are 5, 30 and 400 steps of REINFORCE away
from it. `python scripts/make_checkpoints.py` makes them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradlab._common.names import check_name, check_whole, several
from gradlab._common.streams import generator
from gradlab.policies.language import LanguageModel
from gradlab.policies.responses import Responses
from gradlab.policies.transformer import Transformer

CHECKPOINTS = Path(__file__).parent / "checkpoints"
#: Entropy of the checkpoints: of initial weights, examples and responses.
SEED = 20261125
STAGES = ("reference", "few", "some", "many")


@dataclass(frozen=True)
class Task:
    """Characters, prompts and the shape of responses; `eos` is the character that ends one, if any."""

    name: str
    characters: str
    prompts: tuple[str, ...]
    length: int
    eos: str | None
    context: int
    statement: str

    def ids(self, text: str) -> list[int]:
        """Token ids of a text. Raises `ValueError` for a character the network does not know."""
        unknown = sorted(set(text) - set(self.characters))
        if unknown:
            raise ValueError(f"the {self.name} model does not know {unknown}; its characters are {self.characters!r}")
        return [self.characters.index(character) for character in text]

    def examples(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids `[n, s]` of whole examples and the mask `[n, s − 1]` of the ids to be predicted."""
        if self.eos is None:
            ids = torch.tensor([self.ids(text) for text in texts])
            return ids, (torch.arange(1, ids.shape[1]) >= len(self.prompts[0])).expand(len(ids), -1)
        sequences = [self.ids(self.eos + text + self.eos) for text in texts]
        width, end = self.length + 1, self.characters.index(self.eos)
        ids = torch.tensor([row + [end] * (width - len(row)) for row in sequences])
        return ids, torch.tensor([[t < len(row) for t in range(1, width)] for row in sequences])

    def policy(self, model: Transformer, prompts: Sequence[str] | None = None, length: int | None = None) -> LanguageModel:
        """The network as a policy over responses to these prompts (all of the task's by default)."""
        prompts_of_policy = self.prompts if prompts is None else prompts
        eos = None if self.eos is None else self.characters.index(self.eos)
        return LanguageModel(
            model, tuple(tuple(self.ids(prompt)) for prompt in prompts_of_policy), length or self.length, eos=eos, context=self.context,
            words=tuple(self.characters),
        )  # fmt: skip

    def reward(self, policy: LanguageModel, responses: Responses) -> Tensor:
        """1 for a response that solves the task, else 0, `[n]`."""
        text = [
            "".join(self.characters[i] for i, m in zip(row, row_mask, strict=True) if m)
            for row, row_mask in zip(responses.tokens.tolist(), responses.mask.tolist(), strict=True)
        ]
        if self.name == "names":
            return torch.tensor([float(answer.endswith("a.")) for answer in text])
        questions = ["".join(self.characters[i] for i in policy.prompts[p]) for p in responses.prompts.tolist()]
        return torch.tensor(
            [float(int(q[:2]) + int(q[3:5]) == int(a) if a.isdigit() else 0) for q, a in zip(questions, text, strict=True)]
        )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("addition", "0123456789+=", tuple(f"{a:02d}+{b:02d}=" for a in range(100) for b in range(100)), 3, None, 8,
             "two-digit addition, 12+34=046"),
        Task("names", ".abcdefghijklmnopqrstuvwxyz", (".",), 10, ".", 10, "US names, one character at a time"),
    )
}  # fmt: skip


@lru_cache
def pairs(held_out: bool) -> list[tuple[int, int]]:
    """The 2,000 pairs of numbers whose sums are kept for tests, or the 8,000 that are shown."""
    kept = set(generator(SEED, "small.held_out").choice(10_000, 2_000, replace=False).tolist())
    return [divmod(i, 100) for i in range(10_000) if (i in kept) == held_out]


def network(task: Task) -> Transformer:
    """The architecture all checkpoints of a task share, with weights yet to be set."""
    return Transformer(len(task.characters), task.context)


def small(
    task: str, stage: str = "reference", prompts: Sequence[str] | None = None, length: int | None = None,
    precision: torch.dtype = torch.float32,
) -> LanguageModel:  # fmt: skip
    """A language model that ships with the package, e.g. `gl.policies.small("addition", "many")`.

    prompts: some of the task's instead of all. length: longest response, in tokens. precision: in which the network computes.
    Raises `ValueError` for an unknown task or stage, for characters the model does not know, and for a missing checkpoint.

    >>> policy = gl.policies.small("addition", "many", prompts=["64+80="])
    >>> policy.vocab, policy.length
    (12, 3)
    """
    check_name("task", task, TASKS)
    check_name("stage", stage, STAGES)
    if prompts is not None and not all(isinstance(prompt, str) for prompt in several(prompts)):
        raise ValueError(f"prompts must be texts, got {prompts!r}")
    if length is not None:
        check_whole("length", length)
    path = CHECKPOINTS / task / f"{stage}.npz"
    if not path.is_file():
        raise ValueError(
            f"checkpoint {task}/{stage} is missing from the installation; `python scripts/make_checkpoints.py` makes it"
        )
    model = network(TASKS[task])
    with np.load(path) as arrays:
        model.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays.files})
    return TASKS[task].policy(model.to(precision), None if prompts is None else several(prompts), length)
