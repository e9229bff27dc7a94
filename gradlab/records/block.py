"""A block of responses in memory: ragged columns, flat along the tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from gradlab._common.names import check_name
from gradlab.records.schema import COLUMNS, POLICIES

Array = npt.NDArray[Any]

_TYPES = {"whole": np.int64, "real": np.float64, "truth": np.bool_, "text": np.object_}


@dataclass(frozen=True, eq=False)
class Block:
    """Some responses and what was written of them.

    lengths `[n]`: positions of each row, masked ones included. columns: `[n]` of a response, `[N]` of the tokens of all rows, one
    row behind the other (`N = Σ lengths`), `[N, k]` of the likeliest tokens; a log-probability that is not a number is NaN or
    infinite. absent: for a column, the responses `[n]` that it is null for. first: number of the first response in all records.

    >>> block = gl.records.Block.of({"logprob": [[-1.0, -0.5], [-2.0]]})
    >>> block.lengths.tolist(), block.owner.tolist(), block.sums(block["logprob"]).tolist()
    ([2, 1], [0, 0, 1], [-1.5, -2.0])
    """

    lengths: npt.NDArray[np.int64]
    columns: Mapping[str, Array]
    absent: Mapping[str, npt.NDArray[np.bool_]] = field(default_factory=dict)
    first: int = 0

    @classmethod
    def of(cls, columns: Mapping[str, Any], first: int = 0) -> Block:
        """Build a block from columns as people have them: `[n, t]` arrays or tensors, or one sequence per response; `None` is null.

        Without a mask every position counts; an advantage may be one per response. Raises `ValueError` for an unknown column,
        for columns that do not fit together, and where there is no log-probability.
        """
        given = {name: values for name, values in columns.items() if values is not None}
        for name in given:
            check_name("column", name, COLUMNS)
        if not any(name in POLICIES for name in given):
            raise ValueError(f"records hold log-probabilities: give at least one of {', '.join(POLICIES)}; got {list(given)}")
        ragged = {name: _rows(name, values) for name, values in given.items() if COLUMNS[name].per != "response"}
        if "advantage" in ragged and _is_scalar(given["advantage"]):
            ragged.pop("advantage")
        lengths = _lengths(ragged)
        null = {name for name, rows in ragged.items() if all(row is None for row in rows)}
        if not null >= set(POLICIES) & set(given):  # a column that is null throughout is not there
            given = {name: values for name, values in given.items() if name not in null}
        found: dict[str, Array] = {}
        absent: dict[str, npt.NDArray[np.bool_]] = {}
        for name, values in given.items():
            column = COLUMNS[name]
            if column.per == "response":
                found[name] = _of_response(name, values, len(lengths))
            elif name not in ragged:
                found[name] = np.repeat(_of_response(name, values, len(lengths)), lengths)
            elif column.per == "token":
                missing = np.array([row is None for row in ragged[name]], dtype=bool)
                if missing.any():
                    absent[name] = missing
                found[name] = _flat(name, ragged[name], lengths)
            else:
                found[name] = _tops(name, ragged[name], lengths)
        found.setdefault("mask", np.ones(int(lengths.sum()), dtype=bool))
        return cls(lengths, found, absent, first)

    @classmethod
    def of_tokens(cls, columns: Mapping[str, Any]) -> Block:
        """Build a block from columns of one entry per token, as in a data frame; a response's are told by `response_id`.

        Raises `ValueError` where there is no `response_id`.
        """
        if "response_id" not in columns:
            raise ValueError("a table of tokens says which response a row belongs to: give a column response_id")
        keys = [pd.Series(columns[name]).astype(str) for name in ("run", "step", "response_id") if name in columns]
        owner, _ = pd.factorize(pd.MultiIndex.from_arrays(keys))
        order = np.argsort(owner, kind="stable")
        cuts = np.flatnonzero(np.diff(owner[order])) + 1
        firsts = np.concatenate([[0], cuts])
        found: dict[str, Any] = {}
        for name, column in columns.items():
            values = pd.Series(column).to_numpy()[order]
            found[name] = values[firsts] if COLUMNS[name].per == "response" else np.split(values, cuts)
        return cls.of(found)

    def __len__(self) -> int:
        return len(self.lengths)

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def __getitem__(self, name: str) -> Array:
        return self.columns[name]

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where each response begins in a flat column, and where the last ends, `[n + 1]`."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    @cached_property
    def owner(self) -> npt.NDArray[np.int64]:
        """Number of the response that each token belongs to, in this block, `[N]`."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @cached_property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Tokens that count, `[N]`."""
        found: npt.NDArray[np.bool_] = self.columns["mask"]
        return found

    @cached_property
    def live(self) -> npt.NDArray[np.int64]:
        """Number of tokens that count of each response, `[n]`."""
        return self.sums(self.mask).astype(np.int64)

    @cached_property
    def place(self) -> npt.NDArray[np.int64]:
        """How many tokens that count stand before each token in its response, `[N]`."""
        before: Array = np.cumsum(self.mask) - self.mask
        return np.asarray(before - np.repeat(np.concatenate([before, [0]])[self.offsets[:-1]], self.lengths))

    def sums(self, values: Array) -> npt.NDArray[np.float64]:
        """Sum of a flat column over every response, `[n]`."""
        found = np.zeros(len(self))
        some = self.lengths > 0  # an empty part is none to reduceat
        if some.any():
            found[some] = np.add.reduceat(values, self.offsets[:-1][some], dtype=np.float64)
        return found

    def known(self, *names: str) -> npt.NDArray[np.bool_]:
        """Responses that have all these columns, with a finite number at every token that counts, `[n]`."""
        found = self.live > 0
        for name in names:
            if name not in self:
                return np.zeros(len(self), dtype=bool)
            found &= self.sums(self.mask & ~np.isfinite(self[name])) == 0
        return found

    def take(self, kept: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> Block:
        """Some of the responses, by a mask or by numbers; their numbers in all records are lost."""
        index = np.flatnonzero(kept) if kept.dtype == bool else kept
        if len(index) == len(self) and bool((index == np.arange(len(self))).all()):
            return self
        lengths = self.lengths[index]
        ends = np.cumsum(lengths)
        tokens = np.arange(int(lengths.sum())) - np.repeat(ends - lengths - self.offsets[:-1][index], lengths)
        columns = {k: v[index if COLUMNS[k].per == "response" else tokens] for k, v in self.columns.items()}
        return replace(self, lengths=lengths, columns=columns, absent={k: v[index] for k, v in self.absent.items()})

    def padded(self, name: str, fill: Any = 0) -> Array:
        """A column of tokens as `[n, t]`, with `fill` behind the end of each row."""
        values = self[name]
        found = np.full((len(self), int(self.lengths.max(initial=0))), fill, dtype=values.dtype)
        found[self.owner, np.arange(len(values)) - self.offsets[self.owner]] = values
        return found

    def rows(self, name: str) -> list[Array]:
        """A column of tokens as one array per response."""
        return np.split(self[name], self.offsets[1:-1])


def _is_tensor(values: Any) -> bool:
    return hasattr(values, "detach") and hasattr(values, "cpu")


def plain(values: Any) -> Any:
    """A tensor as an array, bfloat16 as float32, which holds it exactly."""
    if not _is_tensor(values):
        return values
    values = values.detach().cpu()
    return (values.float() if "bfloat16" in str(values.dtype) else values).numpy()


def _is_scalar(values: Any) -> bool:
    """Whether a column has one number for each response."""
    array = plain(values)
    if isinstance(array, np.ndarray) and array.dtype != object:
        return array.ndim == 1
    return all(item is None or np.ndim(plain(item)) == 0 for item in array)


def _rows(name: str, values: Any) -> list[Any]:
    """One sequence per response, or `None`."""
    array = plain(values)
    if isinstance(array, np.ndarray) and array.dtype != object:
        if array.ndim == (3 if COLUMNS[name].per == "top" else 2) or (name == "advantage" and array.ndim == 1):
            return list(array)
        raise ValueError(f"{name} is [n, t], or one sequence per response; got an array of shape {list(array.shape)}")
    if isinstance(array, str | bytes) or not isinstance(array, Iterable):
        raise ValueError(f"{name} is [n, t], or one sequence per response; got {type(values).__name__}")
    rows = [None if item is None or (isinstance(item, float) and np.isnan(item)) else plain(item) for item in array]
    if name != "advantage" and any(row is not None and np.ndim(row) == 0 for row in rows):
        raise ValueError(f"{name} has one number for each token of a response, got one number for a whole response")
    return rows


def _lengths(ragged: Mapping[str, Sequence[Any]]) -> npt.NDArray[np.int64]:
    """Number of positions of each response, on which all columns have to agree."""
    counts = {name: len(rows) for name, rows in ragged.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"columns of one block have one entry for each response; got {counts}")
    (n,) = set(counts.values())
    lengths = np.full(n, -1, dtype=np.int64)
    whose = [""] * n
    for name, rows in ragged.items():
        for i, row in enumerate(rows):
            if row is None:
                continue
            if lengths[i] >= 0 and lengths[i] != len(row):
                raise ValueError(
                    f"{name} has {len(row)} positions in response {i}, where {whose[i]} has {lengths[i]}; columns of tokens are "
                    "aligned: check whether one of them lacks the end token, or covers the prompt as well"
                )
            lengths[i], whose[i] = len(row), whose[i] or name
    return np.maximum(lengths, 0)


def _of_response(name: str, values: Any, n: int) -> Array:
    array = plain(values)
    array = np.full(n, array) if np.ndim(array) == 0 else np.asarray(array)
    if array.shape != (n,):
        raise ValueError(f"{name} has one entry for each of the {n} responses, got shape {list(array.shape)}")
    kind = COLUMNS[name].kind
    try:
        if kind == "text":
            return np.array([None if item is None or item != item else str(item) for item in array.tolist()], dtype=object)
        if kind == "real":
            return np.array([np.nan if item is None else item for item in array.tolist()], dtype=np.float64)
        return array.astype(_TYPES[kind])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} holds {COLUMNS[name].kind} numbers, one for each response; {error}") from None


def _flat(name: str, rows: Sequence[Any], lengths: npt.NDArray[np.int64]) -> Array:
    kind = COLUMNS[name].kind
    empty: Any = {"whole": -1, "real": np.nan, "truth": False, "text": None}[kind]
    parts = []
    for i, (row, length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
        try:
            parts.append(np.full(length, empty, dtype=_TYPES[kind]) if row is None else _typed(row, kind, empty))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} of response {i} is no sequence of {kind} values: {error}") from None
    return np.concatenate(parts) if parts else np.zeros(0, dtype=_TYPES[kind])


def _typed(row: Any, kind: str, empty: Any) -> Array:
    array = np.asarray(row)
    if array.ndim != 1:
        raise ValueError(f"it has shape {list(array.shape)}")
    if array.dtype == object and kind != "text":
        array = np.array([empty if item is None else item for item in array.tolist()])
    if kind == "truth":
        return np.asarray(array != 0)
    if (
        kind == "whole"
        and array.dtype.kind == "f"
        and len(array)
        and not (np.isfinite(array) & (array == np.rint(array))).all()
    ):
        raise ValueError(f"it holds {array[np.flatnonzero(array != np.rint(array))[0]]}")
    return array.astype(_TYPES[kind])


def _tops(name: str, rows: Sequence[Any], lengths: npt.NDArray[np.int64]) -> Array:
    """Lists of the likeliest tokens as one `[N, k]` array; shorter lists end in NaN, or in the id −1."""
    empty: Any = -1 if COLUMNS[name].kind == "whole" else np.nan
    lists = [
        item for row, length in zip(rows, lengths.tolist(), strict=True) for item in ([()] * length if row is None else row)
    ]
    width = max((len(item) for item in lists if item is not None), default=0)
    found: Array = np.full((len(lists), width), empty, dtype=_TYPES[COLUMNS[name].kind])
    for i, item in enumerate(lists):
        if item is not None and len(item):
            found[i, : len(item)] = [empty if x is None else x for x in np.asarray(item).tolist()]
    return found
