"""Arguments are what their annotations say: one check for every public function, and one list for all that holds several things."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial, wraps
from inspect import Parameter, signature
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from gradlab._common.names import check_jobs, check_probability, check_seed, is_several, several

if TYPE_CHECKING:
    import pandas as pd

F = TypeVar("F", bound=Callable[..., Any])

_ARRAY, _FRAME = "npt.ArrayLike", "pd.DataFrame"
#: What annotations are called in messages.
_SAID = {"int": "a whole number", "float": "a number", "str": "a name", _FRAME: "a frame", _ARRAY: "an array of numbers"}
_TYPES: dict[str, type] = {"int": Integral, "float": Real, "str": str}
#: Classes of gradlab's that are told by their names: what they are made of is imported later than this module.
_CLASSES = (
    "Scenario",
    "Bandit",
    "Tree",
    "Markov",
    "Gaussian",
    "LanguageModel",
    "Estimator",
    "PolicyLoss",
    "World",
    "Claim",
    "Batches",
)
#: Parameters that mean the same everywhere, and what is asked of them.
_NAMED: dict[str, Callable[[object], None]] = {
    "seed": check_seed,
    "jobs": check_jobs,
    "level": partial(check_probability, "level"),
    "power": partial(check_probability, "power"),
}
_SEVERAL = re.compile(r"(Sequence|Iterable)\[([\w.]+)\]")


def checked(function: F) -> F:
    """Check a function's arguments against its annotations before it runs.

    Numbers, names, frames and gradlab's own classes are checked, whatever else there is is left to the function. A parameter
    annotated `Sequence[…]` or `Iterable[…]` takes one thing or several in any collection, and the function gets a list, which is
    empty only where the default is. `Iterable[int] | int` and so on say the same.
    Raises `ValueError` that names the parameter, what it takes and what was given.

    >>> @checked
    ... def halves(frame: "pd.DataFrame", sizes: "Sequence[int]", level: "float" = 0.5) -> "list[float]":
    ...     return [size * level for size in sizes]
    >>> import pandas as pd
    >>> halves(pd.DataFrame(), {4, 2})
    [1.0, 2.0]
    >>> halves(pd.DataFrame(), [1.5])
    Traceback (most recent call last):
    ValueError: each of sizes must be a whole number, got 1.5 among [1.5]
    """
    form = signature(function)
    rules = {name: rule for name, given in form.parameters.items() if (rule := _rule(given)) is not None}

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        bound = form.bind(*args, **kwargs)
        for name in bound.arguments:
            if name in rules:
                bound.arguments[name] = rules[name](bound.arguments[name])
        return function(*bound.args, **bound.kwargs)

    return wrapper  # type: ignore[return-value]


def check_columns(frame: pd.DataFrame, *columns: str) -> None:
    """Raise `ValueError` unless a frame has these columns."""
    if missing := [column for column in columns if column not in frame]:
        raise ValueError(
            f"the frame has no column {', '.join(map(repr, missing))}; it has {', '.join(map(str, frame.columns)) or 'none'}"
        )


def numbers(what: str, given: object, dims: int = 1) -> np.ndarray[Any, np.dtype[np.float64]]:
    """An array of finite numbers with `dims` axes and at least one entry. Raises `ValueError` for anything else."""
    array = _array(given)
    if array is None or array.ndim != dims or not array.size or not np.isfinite(array).all():
        shape = "[n]" if dims == 1 else "[m, n]"
        raise ValueError(f"{what} must be finite numbers {shape}, at least one, got {_short(given)}")
    return array


def _rule(parameter: Parameter) -> Callable[[Any], Any] | None:
    """What is asked of one parameter; `None` where nothing is."""
    name, options = parameter.name, str(parameter.annotation).strip("'").split(" | ")
    optional, options = "None" in options, [option for option in options if option != "None"]
    inner = [match[2] if (match := _SEVERAL.fullmatch(option)) else option for option in options]
    listed = inner != options
    if parameter.kind is Parameter.VAR_POSITIONAL or not all(kind in _SAID or kind in _CLASSES for kind in inner):
        return None
    kinds = list(dict.fromkeys(inner))
    said = " or ".join(_SAID.get(kind, f"a gl.{kind}") for kind in kinds)

    def one(given: Any) -> Any:
        if name in _NAMED:
            _NAMED[name](given)
        elif not (optional and given is None) and not any(_is(given, kind) for kind in kinds):
            raise ValueError(f"{name} must be {said}{' or None' * optional}, got {_short(given)}")
        return given

    def each(given: Any) -> Any:
        if optional and given is None:
            return given
        if isinstance(given, Mapping) or _is(given, _FRAME):
            raise ValueError(f"{name} must be a list, each of it {said}, got {_short(given)}")
        items = several(given)
        for item in items:
            if not any(_is(item, kind) for kind in kinds):
                among = f" among {_short(given)}" if is_several(given) else ""
                raise ValueError(f"each of {name} must be {said}, got {_short(item)}{among}")
        if not items and parameter.default != ():
            raise ValueError(f"{name} must hold at least one, got {_short(given)}")
        return items

    return each if listed else one


def _is(given: object, kind: str) -> bool:
    """Whether `given` is of a kind; truth values are no numbers, NaN is none either, and a class is known by its name."""
    if kind == _ARRAY:
        return _array(given) is not None
    if kind in _TYPES:
        return isinstance(given, _TYPES[kind]) and not isinstance(given, bool) and not (kind == "float" and given != given)
    return kind.removeprefix("pd.") in (base.__name__ for base in type(given).__mro__)


def _array(given: object) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    """What is given as an array, `None` where it is none."""
    if given is None or isinstance(given, str | Mapping | set | frozenset):
        return None
    try:
        return np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        return None


def _short(given: object) -> str:
    if _is(given, _FRAME):
        return f"a frame with the columns {', '.join(map(str, given.columns)) or '(none)'}"  # type: ignore[attr-defined]
    said = repr(given)
    return said if len(said) <= 60 else f"{said[:57]}… ({type(given).__name__})"
