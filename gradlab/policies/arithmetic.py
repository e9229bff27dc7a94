"""The precision that a network computes in, the same on every processor where it is a low one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


def portable(precision: torch.dtype) -> AbstractContextManager[Any]:
    """In a precision of 16 bits, compute the same numbers on every processor, see `_Rounded`; otherwise as the processor does."""
    return _Rounded() if precision in (torch.bfloat16, torch.float16) else nullcontext()  # type: ignore[no-untyped-call]


def faithful(precision: torch.dtype) -> AbstractContextManager[Any]:
    """As `portable`, and in float64 nothing is rounded to float32 on the way, as the transformers library does."""
    return _Double() if precision == torch.float64 else portable(precision)


class _Double(TorchFunctionMode):
    """Keeps float64 where the library's code asks for float32, as its norms and attention do whatever they are given."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.to and (args[1:] == (torch.float32,) or kwargs == {"dtype": torch.float32}):
                return args[0]
            if func in (F.softmax, torch.softmax) and kwargs.get("dtype") == torch.float32:
                kwargs = {**kwargs, "dtype": None}
        return func(*args, **kwargs)


class _Rounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes every operation in float64 and rounds its result to the precision it has: the nearest number, on every processor.

    In 16 bits the order in which a processor adds decides between two numbers that are 0.4 % apart; whatever comes after inherits
    that. Sums of float64 decide alike, unless they lie within 1e-13 of the middle. Operations that change a tensor in place, give a
    view of one or convert it round once anyway.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()]
        once = func._schema.is_mutable or func.is_view or func in _CONVERSIONS or "dtype" in kwargs
        if once or not any(map(_low, given)):
            return func(*args, **kwargs)
        precision = reduce(torch.promote_types, (x.dtype for x in [x for x in given if x.dim()] or given))
        wide = func(*tree_map(_widened, args), **tree_map(_widened, kwargs))
        return tree_map(lambda x: x.to(precision) if isinstance(x, Tensor) and x.dtype == torch.float64 else x, wide)


#: Operations that only convert or copy.
_CONVERSIONS = {torch.ops.aten._to_copy.default, torch.ops.aten.clone.default, torch.ops.aten.index.Tensor}


def _low(item: object) -> bool:
    return isinstance(item, Tensor) and item.dtype in (torch.bfloat16, torch.float16, torch.float32)


def _widened(item: Any) -> Any:
    return item.double() if _low(item) else item
