"""Losses written with JAX, as functions of tensors whose gradient JAX computes; and what is said of those written with numpy."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import re
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradlab.audit.call import IN_NUMPY
from gradlab.audit.user_batch import UserBatch

#: Packages of which a function that uses one computes with JAX.
_JAX = ("jax", "jaxlib", "flax", "optax", "chex", "equinox", "haiku", "distrax", "rlax")
INSTALL = "pip install 'gradlab-kl[jax]'"
_HOLE = type("Array", (), {"__repr__": lambda self: "·"})()


class JaxLoss:
    """A function of JAX arrays as a function of tensors: values by `jax.jit`, gradients by `jax.vjp`, in the dtype of the tensors.

    What cannot be traced, such as a branch that depends on a value, is run without `jax.jit`. A batch is a mapping of those fields
    that the function reads. Of two results the second carries no gradient, as with `has_aux`, unless `every` result does.

    >>> def k2(logps, ref_logps):
    ...     return ((logps - ref_logps) ** 2 / 2).sum()
    >>> gl.audit.JaxLoss(k2).function is k2
    True
    """

    def __init__(self, function: Callable[..., Any], every: bool = False) -> None:
        functools.update_wrapper(self, function)
        self.function, self.every = function, every
        self._fields: list[str] | None = None
        self._jitted = True
        self._compiled: dict[str, _Compiled] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_compiled": {}}  # what is compiled stays in its process

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import jax

        with _double():
            if self._fields is None:
                read: dict[str, None] = {}
                given = _mapped([args, kwargs], _array, lambda user: _Recorded(user, read))
                self.function(*given[0], **given[1])
                self._fields = list(read)
            tensors: list[Tensor] = []

            def hole(tensor: Tensor) -> Any:
                tensors.append(tensor)
                return _HOLE

            given = _mapped([args, kwargs], hole, self._batch(hole))
            try:
                return self._value(given, tensors)
            except jax.errors.JAXTypeError:
                if not self._jitted:
                    raise
                self._jitted, self._compiled = False, {}
                return self._value(given, tensors)

    def _batch(self, hole: Callable[[Tensor], Any]) -> Callable[[UserBatch], Any]:
        def fields(user: UserBatch) -> _Fields:
            found = {name: user[name] for name in self._fields or ()}
            return _Fields({name: hole(x) if isinstance(x, Tensor) else x for name, x in found.items()})

        return fields

    def _value(self, given: Any, tensors: Sequence[Tensor]) -> Any:
        compiled = self._compiled.setdefault(repr(given), _Compiled(self.function, given, self._jitted, self.every))
        return compiled.result(_Bridge.apply(compiled, *tensors))  # type: ignore[no-untyped-call]


class _Compiled:
    """A function with arguments of one structure as one of its arrays alone; and the pull-back of what it returns."""

    def __init__(self, function: Callable[..., Any], given: Any, jitted: bool, every: bool) -> None:
        import jax

        self.function, self.given, self.every = function, given, every
        self.value: Callable[..., Any] = jax.jit(self._value) if jitted else self._value
        self.pullback: Callable[..., Any] = jax.jit(self._pullback) if jitted else self._pullback
        self.leaves: list[Any] = []
        self.real: list[bool] = []
        self.structure: Any = None

    def _value(self, arrays: Sequence[Any]) -> list[Any]:
        import jax
        import jax.numpy as jnp

        args, kwargs = _filled(self.given, iter(arrays))
        result = self.function(*args, **kwargs)
        leaves, self.structure = jax.tree_util.tree_flatten(result)
        with_aux = isinstance(result, tuple) and len(result) == 2 and not self.every
        n = len(jax.tree_util.tree_leaves(result[0])) if with_aux else len(leaves)
        is_array = [isinstance(leaf, jax.Array) for leaf in leaves]
        self.leaves = [_HOLE if x else leaf for x, leaf in zip(is_array, leaves, strict=True)]
        self.real = [i < n and jnp.issubdtype(x.dtype, jnp.floating) for i, x in enumerate(leaves) if is_array[i]]
        return [leaf for x, leaf in zip(is_array, leaves, strict=True) if x]

    def _pullback(self, arrays: Sequence[Any], cotangents: Sequence[Any]) -> dict[int, Any]:
        import jax
        import jax.numpy as jnp

        places = [i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating)]

        def value(of_real: Sequence[Any]) -> list[Any]:
            replaced = dict(zip(places, of_real, strict=True))
            found = self._value([replaced.get(i, x) for i, x in enumerate(arrays)])
            return [x for x, real in zip(found, self.real, strict=True) if real]

        pulled = jax.vjp(value, [arrays[i] for i in places])[1](list(cotangents))[0]
        return dict(zip(places, pulled, strict=True))

    def result(self, found: tuple[Tensor, ...]) -> Any:
        rest = iter(found)
        return self.structure.unflatten([next(rest) if leaf is _HOLE else leaf for leaf in self.leaves])


class _Bridge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compiled: _Compiled, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.compiled, ctx.arrays = compiled, [_array(x) for x in tensors]
        results = tuple(_tensor(x) for x in compiled.value(ctx.arrays))
        ctx.real = compiled.real
        ctx.mark_non_differentiable(*(x for x, real in zip(results, ctx.real, strict=True) if not real))
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        with _double():
            given = [_array(x) for x, real in zip(cotangents, ctx.real, strict=True) if real]
            pulled = ctx.compiled.pullback(ctx.arrays, given)
            return None, *(_tensor(pulled[i]) if i in pulled else None for i in range(len(ctx.arrays)))


class _Fields(dict[str, Any]):
    """The fields of a batch, as items and as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class _Recorded:
    """A batch of arrays that notes which of its fields are read."""

    def __init__(self, user: UserBatch, read: dict[str, None]) -> None:
        self._user, self._read = user, read

    def __getitem__(self, name: str) -> Any:
        found = self._user[name]
        self._read[name] = None
        return _array(found) if isinstance(found, Tensor) else found

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(error.args[0]) from None

    def __contains__(self, name: object) -> bool:
        return name in self._user

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default


def _mapped(item: Any, of_tensor: Callable[[Tensor], Any], of_batch: Callable[[UserBatch], Any]) -> Any:
    """The same structure with every tensor and every batch in it replaced; what holds none stays what it is."""
    if isinstance(item, Tensor):
        return of_tensor(item)
    if isinstance(item, UserBatch):
        return of_batch(item)
    return _rebuilt(item, lambda x: _mapped(x, of_tensor, of_batch))


def _filled(item: Any, arrays: Iterator[Any]) -> Any:
    return next(arrays) if item is _HOLE else _rebuilt(item, lambda x: _filled(x, arrays))


def _rebuilt(item: Any, of_part: Callable[[Any], Any]) -> Any:
    if type(item) in (list, tuple):
        return type(item)(of_part(x) for x in item)
    if type(item) in (dict, _Fields):
        return type(item)({key: of_part(x) for key, x in item.items()})
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        names = [field.name for field in dataclasses.fields(item) if field.init]
        parts = {name: of_part(getattr(item, name)) for name in names}
        return dataclasses.replace(item, **parts) if any(parts[name] is not getattr(item, name) for name in names) else item
    return item


def _array(tensor: Tensor) -> Any:
    import jax

    return jax.dlpack.from_dlpack(tensor.detach().contiguous())


def _tensor(array: Any) -> Tensor:
    return torch.utils.dlpack.from_dlpack(array).clone()  # arrays do not change


def _double() -> Any:
    """While the block lasts JAX computes in double precision what it is given in it."""
    import jax

    home = jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")  # the latter up to jax 0.7
    return home.enable_x64(True)


def is_jax(function: Callable[..., Any]) -> bool:
    """Whether a function computes with JAX, and not with torch: told from the names that it and its helpers use."""
    used = _packages(function)
    return bool(used & set(_JAX)) and "torch" not in used


def _packages(function: Any) -> set[str]:
    """The packages that a function uses, itself or by functions of its module."""
    found, waiting, seen = {type(function).__module__.partition(".")[0]}, [inspect.unwrap(function)], set()
    while waiting:
        item = waiting.pop()
        item = getattr(item, "__func__", item)
        if not isinstance(item, types.FunctionType) or item in seen:
            continue
        seen.add(item)
        cells = [cell.cell_contents for cell in item.__closure__ or () if _is_filled(cell)]
        for value in (*cells, *(item.__globals__[name] for name in _names(item.__code__) if name in item.__globals__)):
            home = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None) or ""
            if home == item.__module__ and callable(value):
                waiting.append(inspect.unwrap(value))
            found.add(str(home).partition(".")[0])
    return found


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _names(code: types.CodeType) -> set[str]:
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def instead(function: Callable[..., Any], label: str, error: Exception, every: bool) -> JaxLoss:
    """The function as one of JAX arrays, where it failed for want of them.

    Raises `ValueError` for a function that computes in numpy, with what to do, and for one of arrays where JAX is not installed; and
    `error` where it is about something else.
    """
    said = str(error)
    if "Can't call numpy() on Tensor" in said or "raised TracerArrayConversionError" in said:
        raise ValueError(f"{label} {IN_NUMPY}") from None
    missing = re.search(r"'Tensor' object has no attribute '(astype|at)'", said)
    if missing is None or isinstance(function, JaxLoss):
        raise error
    if importlib.util.find_spec("jax") is None:
        raise ValueError(
            f"{label} uses .{missing[1]}, which arrays of JAX and numpy have; a loss of JAX arrays is audited with JAX: {INSTALL}"
        ) from None
    return JaxLoss(function, every)
