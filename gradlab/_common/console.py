"""Where tables are printed."""

from __future__ import annotations

import sys

from rich.console import Console


def wide_console() -> Console:
    """A console as wide as the terminal; in a pipe or a file wide enough for tables to stay readable."""
    return Console() if sys.stdout.isatty() else Console(width=160)
