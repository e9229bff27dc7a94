"""Names that users type: checked against what exists, with the nearest ones offered."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def check_name(what: str, given: object, allowed: Iterable[str]) -> None:
    """Raise `ValueError` when `given` is not among `allowed`, naming the nearest."""
    options = list(allowed)
    if given in options:
        return
    near = get_close_matches(str(given), options, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"unknown {what} {given!r}; {hint}known: {', '.join(options)}")
