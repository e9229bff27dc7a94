"""`Records`: a table of responses, in memory or in files, that is gone through block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np
import pandas as pd

from gradlab._common.names import check_name
from gradlab.records import formats
from gradlab.records.block import Block
from gradlab.records.schema import COLUMNS, POLICIES

if TYPE_CHECKING:
    from gradlab.rollout import Rollout


#: A number of responses, and how to get them.
Piece = tuple[int, Callable[[], Iterator[Block]]]


@dataclass(frozen=True)
class Part:
    """Consecutive responses of records, from number `first` on."""

    first: int
    pieces: tuple[Callable[[], Iterator[Block]], ...]

    def __iter__(self) -> Iterator[Block]:
        first = self.first
        for blocks in self.pieces:
            for block in blocks():
                if len(block):
                    yield replace(block, first=first)
                    first += len(block)


@dataclass(frozen=True, eq=False)
class Records:
    """What a run wrote of its rollouts: log-probabilities of the drawn tokens under the policies, rewards, masks.

    `for block in records` gives `Block`, each time from the beginning; files are read a part at a time, so records may be
    larger than memory. `columns` are those of `gradlab.records.COLUMNS` that are there. Made by `gl.read_rollouts`,
    `Records.from_arrays`, `Records.from_frame` and `Records.from_rollout`.

    >>> import numpy as np
    >>> import gradlab as gl
    >>> policy, reference = np.log([[0.5, 0.2], [0.9, 1.0]]), np.log([[0.4, 0.4], [0.8, 1.0]])
    >>> records = gl.Records.from_arrays(logprob=policy, ref_logprob=reference, mask=[[1, 1], [1, 0]], reward=[1.0, 0.0])
    >>> records.tokens()[["response", "position", "logprob"]].round(3).values.tolist()
    [[0.0, 0.0, -0.693], [0.0, 1.0, -1.609], [1.0, 0.0, -0.105]]
    """

    blocks: Callable[[], Iterator[Block]]
    columns: tuple[str, ...]
    format: str = "arrays"
    source: str = ""
    pieces: Callable[[], Sequence[Piece]] | None = None

    def __iter__(self) -> Iterator[Block]:
        return iter(Part(0, (self.blocks,)))

    def parts(self, jobs: int = 1) -> list[Part]:
        """The records in parts of like size, in order: a few for each process that there is, or one where they cannot be parted."""
        pieces = [] if self.pieces is None else self.pieces()
        workers = joblib.effective_n_jobs(None if jobs == 1 else jobs)
        if workers == 1 or len(pieces) < 2:
            return [Part(0, (self.blocks,))]
        ends = np.cumsum([rows for rows, _ in pieces])
        cuts = np.searchsorted(ends, np.linspace(0, ends[-1], min(len(pieces), 4 * workers) + 1)[1:-1]) + 1
        bounds = np.unique([0, *cuts.tolist(), len(pieces)]).tolist()
        return [Part(int(ends[a - 1]) if a else 0, tuple(blocks for _, blocks in pieces[a:b])) for a, b in pairwise(bounds)]

    @property
    def policies(self) -> tuple[str, ...]:
        """The log-probabilities that are there."""
        return tuple(name for name in POLICIES if name in self.columns)

    # ---- constructors ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_arrays(cls, **columns: Any) -> Records:
        """Records from arrays, tensors or lists, by the names of `gradlab.records.COLUMNS`.

        What is said of tokens is `[n, t]`, or one sequence per response; what is said of responses `[n]`, or one value for all.
        Give `mask` where rows are padded, and leave the padding as it is: the checks look at it.
        Raises `ValueError` for an unknown column, columns that do not fit together, and no log-probability at all.
        """
        return cls.of([Block.of(columns)])

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> Records:
        """Records from a data frame: one row per response with lists in its cells, or one row per token with a `response_id`.

        Other columns than those of `gradlab.records.COLUMNS` are left out. Raises `ValueError` as `from_arrays` does, for a
        frame without rows, and for tokens without a `response_id`.
        """
        if not len(frame):
            raise ValueError("there are no rows in the frame")
        known = {str(name): frame[name] for name in frame.columns if name in COLUMNS}
        policies = [name for name in known if name in POLICIES]
        if not policies:
            raise ValueError(
                f"records hold log-probabilities: the frame has none of {', '.join(POLICIES)}; it has {list(frame.columns)}"
            )
        if any(np.ndim(item) > 0 for name in policies for item in known[name].to_list()):
            return cls.from_arrays(**{name: column.to_list() for name, column in known.items()})
        return cls.of([Block.of_tokens(known)])

    @classmethod
    def from_rollout(cls, rollout: Rollout, **columns: Any) -> Records:
        """Records of a sampled rollout of gradlab's own, with its prompts as groups; `columns` adds others, such as `step`."""
        own: dict[str, Any] = {
            "token_id": rollout.tokens,
            "mask": rollout.mask,
            "logprob": rollout.log_prob,
            "ref_logprob": rollout.reference_log_prob,
            "behaviour_logprob": rollout.behaviour_log_prob,
        }
        if rollout.prompts is not None:
            own |= {"prompt_id": rollout.prompts.tolist(), "group_id": rollout.prompts.tolist()}
        return cls.from_arrays(**own | columns)

    @classmethod
    def from_dump(cls, payload: Any, format: str, step: int | None = None) -> Records:
        """Records of what a framework's file holds, loaded by you: `slime`, `skyrl`, `nemo-rl`, `prime-rl` or `verl`.

        For the converter of a pickle, run where it was written, and for hooks: `Records.from_dump(batch, "verl", step=step)`.
        Raises `ValueError` for an unknown format, and for what is not of that format.
        """
        check_name("format", format, [*formats.ROWS, *formats.BATCHES])
        return cls.of([formats.of_dump(payload, format, step)], format)

    @classmethod
    def of(cls, blocks: Sequence[Block], format: str = "arrays", source: str = "") -> Records:
        """Records of blocks that are held in memory."""
        columns = tuple(name for name in COLUMNS if any(name in block for block in blocks))
        return cls(lambda: iter(blocks), columns, format, source, lambda: [(len(b), partial(_one, b)) for b in blocks])

    # ---- parts and views ------------------------------------------------------------------------------------------------

    def where(self, **values: Any) -> Records:
        """The responses for which columns of responses have these values, e.g. `records.where(step=3)`; a list allows several."""
        for name in values:
            check_name("column", name, [c.name for c in COLUMNS.values() if c.per == "response" and c.name in self.columns])
        allowed: Mapping[str, set[Any]] = {
            name: {str(v) if COLUMNS[name].kind == "text" else v for v in (value if isinstance(value, list) else [value])}
            for name, value in values.items()
        }

        def blocks() -> Iterator[Block]:
            for block in self.blocks():
                kept = np.ones(len(block), dtype=bool)
                for name, some in allowed.items():
                    kept &= np.array([item in some for item in block[name].tolist()], dtype=bool)
                yield block.take(kept)

        return replace(self, blocks=blocks, pieces=None)

    def held(self) -> Records:
        """The same records in memory."""
        return Records.of(list(self), self.format, self.source)

    def frame(self) -> pd.DataFrame:
        """All of the records as a data frame of one row per response, what is said of tokens as arrays in its cells."""
        parts = []
        for block in self:
            columns: dict[str, Any] = {}
            for name in (name for name in COLUMNS if name in self.columns):
                if name not in block:
                    columns[name] = pd.Series([None] * len(block), dtype=object)
                elif COLUMNS[name].per == "response":
                    columns[name] = block[name]
                else:
                    columns[name] = pd.Series(block.rows(name), dtype=object)
                    if name in block.absent:
                        columns[name] = columns[name].where(~pd.Series(block.absent[name]), None)
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(self.columns))

    def tokens(self) -> pd.DataFrame:
        """All tokens that count, one row each: `response` (its number), `position` (among those that count), and every column."""
        parts = []
        for block in self:
            live = block.mask
            columns: dict[str, Any] = {"response": (block.first + block.owner)[live], "position": block.place[live]}
            for name, column in COLUMNS.items():
                if name in block and column.per != "top" and name != "mask":
                    columns[name] = (block[name][block.owner] if column.per == "response" else block[name])[live]
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["response", "position"])

    def write(self, path: str | Path, rows: int = 512) -> Path:
        """Write the canonical parquet file, a row group for every `rows` responses; returns the path. Needs pyarrow."""
        from gradlab.records import parquet

        return parquet.write(self, self.columns, Path(path), rows)


def _one(block: Block) -> Iterator[Block]:
    yield block
