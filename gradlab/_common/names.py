"""What users give: names checked against what exists, whole numbers, one thing or several."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

#: Bytes that the responses of one call may take.
HELD = 2**34


def check_name(what: str, given: object, allowed: Iterable[str]) -> None:
    """Raise `ValueError` when `given` is not among `allowed`, naming the nearest."""
    options = list(allowed)
    if given in options:
        return
    near = get_close_matches(str(given), list(map(str, options)), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"unknown {what} {given!r}; {hint}known: {', '.join(map(str, options))}")


def check_whole(what: str, given: object, least: int = 1) -> None:
    """Raise `ValueError` unless `given` is a whole number from `least` on (Python's or numpy's, not a truth value)."""
    if isinstance(given, bool) or not isinstance(given, Integral) or int(given) < least:
        kind = {0: "a whole number from 0 on", 1: "a positive whole number"}.get(least, f"a whole number of at least {least}")
        raise ValueError(f"{what} must be {kind}, got {given!r}")


def check_held(samples: int, numbers: int) -> None:
    """Raise `ValueError` when `samples` responses of so many doubles each are more than is held at once."""
    if samples * numbers * 8 > HELD:
        raise ValueError(
            f"{samples} responses are more than the {HELD // (8 * numbers)} that are held at once, in {HELD / 2**30:g} GiB; "
            "draw fewer, or several times with other seeds"
        )


def check_seed(given: object) -> None:
    """Raise `ValueError` unless `given` is a whole number from 0 on: without one a result could not be had again."""
    check_whole("seed", given, least=0)


def check_jobs(given: object) -> None:
    """Raise `ValueError` unless `given` is a number of processes, or a negative one that counts from all cores."""
    if isinstance(given, bool) or not isinstance(given, Integral) or given == 0:
        raise ValueError(f"jobs must be a number of worker processes, or -1 for one per core, got {given!r}")


def check_real(what: str, given: object) -> None:
    """Raise `ValueError` unless `given` is a number."""
    if isinstance(given, bool) or not isinstance(given, Real):
        raise ValueError(f"{what} must be a number, got {given!r}")


def check_positive(what: str, given: object) -> None:
    """Raise `ValueError` unless `given` is a finite number above 0."""
    check_real(what, given)
    if not 0 < float(given) < float("inf"):  # type: ignore[arg-type]
        raise ValueError(f"{what} must be a finite number above 0, got {given!r}")


def check_probability(what: str, given: object) -> None:
    """Raise `ValueError` unless `given` is a number strictly between 0 and 1, as the level of an interval is."""
    if not isinstance(given, Real) or not 0 < float(given) < 1:
        raise ValueError(f"{what} must lie strictly between 0 and 1, got {given!r}")


def is_several(given: object) -> bool:
    """Whether `given` holds several things: a list, an array, a set, a view of a dictionary; not a name, not a function."""
    return isinstance(given, Iterable) and not isinstance(given, str) and not callable(given) and getattr(given, "ndim", 1) > 0


def several(given: Any) -> list[Any]:
    """One thing or several as a list; a set is sorted by name, since its own order changes from run to run."""
    if not is_several(given):
        return [given]
    items = list(given)
    return sorted(items, key=lambda item: getattr(item, "__name__", str(item))) if isinstance(given, set | frozenset) else items
