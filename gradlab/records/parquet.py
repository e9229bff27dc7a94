"""The canonical table as parquet files: written and read a row group at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gradlab._common.files import atomic_write
from gradlab.records.block import Block
from gradlab.records.schema import COLUMNS, FORMAT, LAYOUT, VERSION

if TYPE_CHECKING:
    import pyarrow as pa

#: How to get what this module needs; quoted by the error about it.
INSTALL = "pip install 'gradlab-kl[records]'"
#: Numbers of one column that are read together, and bytes of a file that are.
TOKENS, BUFFER = 2**18, 2**20


def arrow() -> Any:
    """The module pyarrow with its parquet. Raises `ValueError` that says how to install it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"parquet files need pyarrow: {INSTALL}") from None
    return pyarrow


def schema(columns: Sequence[str]) -> pa.Schema:
    """The arrow schema of some columns, one row per response."""
    pa = arrow()
    kinds = {"whole": pa.int64(), "real": pa.float64(), "truth": pa.bool_(), "text": pa.string()}
    wrap = {"response": lambda t: t, "token": pa.list_, "top": lambda t: pa.list_(pa.list_(t))}
    fields = [(name, wrap[column.per](kinds[column.kind])) for name, column in COLUMNS.items() if name in columns]
    return pa.schema(fields, metadata={FORMAT: VERSION, LAYOUT: "response"})


def table(block: Block, columns: Sequence[str]) -> pa.Table:
    """A block as an arrow table with these columns, null where it has none."""
    pa = arrow()
    form = schema(columns)
    return pa.table([_column(pa, block, field) for field in form], schema=form)


def _column(pa: Any, block: Block, field: Any) -> Any:
    name = field.name
    if name not in block:
        return pa.nulls(len(block), field.type)
    per, values = COLUMNS[name].per, block[name]
    if per == "response":
        return pa.array(
            values.tolist() if values.dtype == object else values, field.type, from_pandas=COLUMNS[name].kind == "real"
        )
    if per == "top":
        width = values.shape[1]
        values = pa.ListArray.from_arrays(np.arange(len(values) + 1, dtype=np.int32) * width, pa.array(values.ravel()))
    elif values.dtype == object:
        values = pa.array(values.tolist(), field.type.value_type)
    null = None if name not in block.absent else pa.array(block.absent[name])
    offsets = pa.array(block.offsets.astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(values, field.type.value_type), mask=null)


def write(blocks: Iterable[Block], columns: Sequence[str], path: Path, rows: int) -> Path:
    """Write blocks to one file, a row group for every `rows` responses at most; the file is whole or not there."""
    pa = arrow()
    with atomic_write(path) as part, pa.parquet.ParquetWriter(part, schema(columns), compression="zstd") as writer:
        for block in blocks:
            writer.write_table(table(block, columns), row_group_size=rows)
    return path


def columns_of(paths: Iterable[Path]) -> tuple[tuple[str, ...], list[str]]:
    """The canonical columns that some files have between them, and the names of the others."""
    names = {name for path in paths for name in _file(path).schema_arrow.names}
    return tuple(name for name in COLUMNS if name in names), sorted(names - set(COLUMNS))


def blocks(paths: Iterable[Path], columns: Sequence[str]) -> Iterator[Block]:
    """The responses of parquet files, of one row per response or one per token: some `TOKENS` at a time, of one row group."""
    for path in paths:
        yield from _blocks(path, columns)


def pieces(paths: Iterable[Path], columns: Sequence[str]) -> list[tuple[int, Callable[[], Iterator[Block]]]]:
    """The row groups of files of one row per response, with their numbers of responses; none where a row is a token."""
    found: list[tuple[int, Callable[[], Iterator[Block]]]] = []
    for path in paths:
        file = _file(path)
        if not _has_lists(file, columns):
            return []
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        found += [(count, partial(_blocks, path, columns, [group])) for group, count in enumerate(rows)]
    return found


def _file(path: Path) -> Any:
    pa = arrow()
    try:
        return pa.parquet.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
    except (pa.ArrowInvalid, pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is no whole parquet file: {str(error).strip().splitlines()[0]}; a file that a job was killed over has no end. "
            "Take it away, and read the others: give the folder"
        ) from None


def _has_lists(file: Any, columns: Sequence[str]) -> bool:
    """Whether a row is a response, whose tokens stand in lists."""
    pa, form = arrow(), file.schema_arrow
    there = [form.field(name).type for name in columns if name in form.names]
    return any(pa.types.is_list(kind) or pa.types.is_large_list(kind) for kind in there)


def _blocks(path: Path, columns: Sequence[str], groups: Sequence[int] | None = None) -> Iterator[Block]:
    pa, file = arrow(), _file(path)
    there = [name for name in columns if name in file.schema_arrow.names]
    try:
        if _has_lists(file, columns):
            for group in range(file.num_row_groups) if groups is None else groups:
                size = _rows_together(file.metadata.row_group(group))
                for batch in file.iter_batches(size, row_groups=[group], columns=there):
                    yield of_table(pa.Table.from_batches([batch]))
        else:
            yield from _joined(file.iter_batches(TOKENS, columns=there))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged: {str(error).strip().splitlines()[0]}") from None


def _rows_together(group: Any) -> int:
    """How many rows of a row group hold `TOKENS` numbers in their longest lists."""
    most = max(group.column(i).num_values for i in range(group.num_columns))
    return max(1, int(group.num_rows * TOKENS // max(most, 1)))


def of_table(read: pa.Table) -> Block:
    """A block from an arrow table of one row per response."""
    columns: dict[str, Any] = {}
    for name in (name for name in COLUMNS if name in read.column_names):
        values = read[name].combine_chunks()
        if COLUMNS[name].per == "token" and COLUMNS[name].kind != "text":
            columns[name] = _rows(values)
        elif COLUMNS[name].per != "response" or values.null_count < len(values):
            columns[name] = values.to_pylist()
    return Block.of(columns)


def _rows(values: Any) -> list[Any]:
    """The lists of a column as arrays, `None` where it is null; a null among numbers is NaN."""
    flat = values.values.to_numpy(zero_copy_only=False)  # noqa: PD011, arrow's own
    ends = values.offsets.to_numpy()
    valid = values.is_valid().to_numpy(zero_copy_only=False)
    return [flat[a:b] if ok else None for a, b, ok in zip(ends[:-1].tolist(), ends[1:].tolist(), valid.tolist(), strict=True)]


def _joined(batches: Iterator[Any]) -> Iterator[Block]:
    """Blocks from rows of tokens: the last response of a batch is kept for the next, which may go on with it."""
    rest: pd.DataFrame | None = None
    for batch in batches:
        frame = batch.to_pandas()
        frame = frame if rest is None else pd.concat([rest, frame], ignore_index=True)
        keys = [name for name in ("run", "step", "response_id") if name in frame]
        last = (frame[keys] == frame[keys].iloc[-1]).all(axis=1) if keys else pd.Series(True, index=frame.index)
        rest = frame[last]
        if not last.all():
            yield Block.of_tokens({str(name): frame.loc[~last, name] for name in frame.columns})
    if rest is not None and len(rest):
        yield Block.of_tokens({str(name): rest[name] for name in rest.columns})
