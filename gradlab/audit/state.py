"""The state that a loss keeps between calls, such as a coefficient that adapts: put back before a call, it answers alike."""

from __future__ import annotations

import copy
import random
import types
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradlab.audit.batch import Batch, Subject
from gradlab.audit.call import loss_gradient
from gradlab.audit.worlds import PADDING, AuditScenario, batch

#: How far functions within functions are followed.
DEPTH = 8
_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)
_PLAIN = (int, float, complex, str, list, dict, set, np.ndarray, torch.Tensor)


def restored(subject: Subject, then: Callable[[], object] | None = None) -> Subject | None:
    """The loss with its state put back before every call; `None` where it keeps none that can be found, or draws random numbers.

    then: what is done after that, before the call.
    """
    undo: list[Callable[[], None]] = []
    try:
        _follow(subject.loss, undo, set(), DEPTH)
    except _RandomStateError:
        return None
    if not undo:
        return None

    def loss(batch: Batch) -> Any:
        for step in undo:
            step()
        if then is not None:
            then()
        return subject.loss(batch)

    return replace(subject, loss=loss)


def numbers(subject: Subject) -> list[tuple[Callable[[], float], Callable[[float], None]]]:
    """Getters and setters of the floating-point numbers among the attributes of what a loss is made of."""
    found: list[tuple[Callable[[], float], Callable[[float], None]]] = []
    seen: set[int] = set()

    def visit(item: Any, depth: int) -> None:
        if depth == 0 or id(item) in seen or isinstance(item, type | types.ModuleType | torch.Tensor):
            return
        seen.add(id(item))
        if isinstance(item, types.MethodType):
            visit(item.__self__, depth - 1)
            visit(item.__func__, depth - 1)
        elif isinstance(item, types.FunctionType):
            for cell in item.__closure__ or ():
                try:
                    visit(cell.cell_contents, depth - 1)
                except ValueError:
                    continue
        elif isinstance(item, dict):
            keys = [key for key, value in item.items() if isinstance(value, float)]
            found.extend((partial(item.__getitem__, key), partial(item.__setitem__, key)) for key in keys)
            for value in list(item.values()):
                visit(value, depth - 1)
        elif hasattr(item, "__dict__"):
            names = {k for k in (*vars(item), *vars(type(item))) if isinstance(getattr(item, k, None), float)}
            found.extend((partial(getattr, item, k), partial(setattr, item, k)) for k in sorted(names))
            for value in list(vars(item).values()):
                if not isinstance(value, _PLAIN):
                    visit(value, depth - 1)

    visit(subject.loss, DEPTH)
    return found


def without_factor(subject: Subject, case: AuditScenario) -> Subject | None:
    """The loss over a number of its state that multiplies it, as a call leaves it, times what it was before; `None` without one."""
    columns = case.columns(PADDING)

    def gradient(loss: Subject | None) -> Tensor:
        assert loss is not None
        return loss_gradient(loss, *batch(columns, [0, 1]))[0]

    steady = restored(subject)
    for read, write in numbers(subject):
        before = _at_the_start(subject, gradient, read)
        base, doubled = gradient(steady), gradient(restored(subject, partial(write, 2 * before)))
        if before and float((doubled - 2 * base).norm()) <= 1e-6 * float(base.norm()):
            assert steady is not None
            return replace(steady, loss=partial(_divided, steady.loss, read, before))
    return None


def _at_the_start(subject: Subject, gradient: Callable[[Subject | None], Tensor], read: Callable[[], float]) -> float:
    seen: list[float] = []
    gradient(restored(subject, lambda: seen.append(read())))
    return seen[0]


def _divided(loss: Callable[[Batch], Any], read: Callable[[], float], before: float, given: Batch) -> Any:
    value = loss(given)
    return value * (before / read())


class _RandomStateError(Exception):
    """The state is that of a generator of random numbers."""


def _follow(item: Any, undo: list[Callable[[], None]], seen: set[int], depth: int) -> None:
    if depth == 0 or id(item) in seen or isinstance(item, type | types.ModuleType):
        return
    seen.add(id(item))
    if isinstance(item, _GENERATORS):
        raise _RandomStateError
    if isinstance(item, types.MethodType):
        _follow(item.__self__, undo, seen, depth - 1)
        _follow(item.__func__, undo, seen, depth - 1)
    elif isinstance(item, types.FunctionType):
        if str(item.__module__ or "").startswith(("torch.", "numpy.")):
            return
        for cell in item.__closure__ or ():
            _follow_cell(cell, undo, seen, depth)
        for name in item.__code__.co_names:
            if name in item.__globals__:
                _follow_global(item.__globals__, name, undo, seen, depth)
    elif hasattr(item, "func") and hasattr(item, "keywords"):  # partial
        for part in (item.func, *item.args, *item.keywords.values()):
            _follow(part, undo, seen, depth - 1)
    elif isinstance(item, dict | list | set):
        _keep(item, undo)
    elif hasattr(item, "__dict__") and not isinstance(item, torch.Tensor):
        for value in vars(item).values():
            if isinstance(value, _GENERATORS):
                raise _RandomStateError
        _keep_attributes(item, undo)
        for value in vars(item).values():
            if not isinstance(value, _PLAIN):
                _follow(value, undo, seen, depth - 1)
        _follow(vars(type(item)).get("__call__"), undo, seen, depth - 1)


def _follow_cell(cell: types.CellType, undo: list[Callable[[], None]], seen: set[int], depth: int) -> None:
    try:
        found = cell.cell_contents
    except ValueError:
        return
    if isinstance(found, int | float | complex | torch.Tensor):
        saved = copy.deepcopy(found.detach() if isinstance(found, torch.Tensor) else found)
        if not (isinstance(found, torch.Tensor) and found.requires_grad):
            undo.append(lambda: setattr(cell, "cell_contents", copy.deepcopy(saved)))
    else:
        _follow(found, undo, seen, depth - 1)


def _follow_global(space: dict[str, Any], name: str, undo: list[Callable[[], None]], seen: set[int], depth: int) -> None:
    found = space[name]
    if isinstance(found, int | float | complex) and not isinstance(found, bool):
        undo.append(lambda: space.__setitem__(name, found))
    else:
        _follow(found, undo, seen, depth - 1)


def _keep(container: Any, undo: list[Callable[[], None]]) -> None:
    try:
        saved = copy.deepcopy(container)
    except Exception:  # whatever cannot be copied is left as it is
        return

    def back() -> None:
        fresh = copy.deepcopy(saved)
        container.clear()
        container.extend(fresh) if isinstance(container, list) else container.update(fresh)

    undo.append(back)


def _keep_attributes(item: Any, undo: list[Callable[[], None]]) -> None:
    kept = {key: value for key, value in vars(item).items() if isinstance(value, _PLAIN)}
    try:
        saved = copy.deepcopy(kept)
    except Exception:
        return

    def back() -> None:
        for key in [k for k, value in vars(item).items() if isinstance(value, _PLAIN) and k not in saved]:
            del vars(item)[key]
        vars(item).update(copy.deepcopy(saved))

    undo.append(back)
