"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path` and rename it when the block ends well, so that no file is ever half-written.

    The name is unique: two processes that write one file leave what one of them wrote, whole.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def writable(folder: Path) -> Path:
    """Create an output folder if need be. Raises `ValueError` when it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ValueError(
            f"cannot write to the output folder {folder}: {error.strerror or error}; choose another with --output"
        ) from None


def writable_file(path: Path) -> Path:
    """A file to be written into a folder that is there. Raises `ValueError` when it cannot be; a folder misspelt is not made."""
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}; make it, or choose another with --output")
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; give --output the name of a file")
    writable(path.parent)
    return path
