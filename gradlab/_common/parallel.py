"""Work spread over processes, or over whatever backend surrounds it, and what a worker's memory needs first."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from functools import cache
from typing import Any

import joblib

from gradlab._common.registry import registered, restore

#: Value of `MALLOC_TRIM_THRESHOLD_` that dask starts its workers with (distributed 2026.8, `distributed.nanny.pre-spawn-environ`).
DASK_TRIM = "65536"
#: Parameters of `mallopt(3)`, and the sizes in bytes up to which glibc's own thresholds grow on 64 bits.
TRIM_THRESHOLD, MMAP_THRESHOLD = (-1, 2**26), (-3, 2**25)


def spread(tasks: Iterable[Any], jobs: int) -> list[Any]:
    """Results of `joblib.delayed` tasks in their order, on `jobs` worker processes, which know what is registered in this one.

    One job leaves the choice to a surrounding `joblib.parallel_config`, whose default is this process.
    """
    items = registered()
    ready = ((_ready, (items, function, *args), kwargs) for function, args, kwargs in tasks)
    return list(joblib.Parallel(n_jobs=None if jobs == 1 else jobs)(ready))


def _ready(items: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    restore(items)
    keep_memory()
    return function(*args, **kwargs)


@cache
def keep_memory() -> bool:
    """Let a worker of dask re-use the memory it frees; returns whether it does. Runs once in a process.

    A fixed `MALLOC_TRIM_THRESHOLD_` also keeps glibc's threshold for blocks of their own at 128 KiB, where it would follow
    the blocks that are freed: each larger tensor is taken from the system, faulted in, and given back. Both thresholds are set to
    what they would have grown to. Only dask's own setting is replaced: any other value in the configuration
    `distributed.nanny.pre-spawn-environ` stands, as does everything where the C library is not glibc.
    """
    if os.environ.get("MALLOC_TRIM_THRESHOLD_") != DASK_TRIM:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; Windows
        return False
    return all([mallopt(*TRIM_THRESHOLD), mallopt(*MMAP_THRESHOLD)])
