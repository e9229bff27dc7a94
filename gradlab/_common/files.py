"""Files that are written whole or not at all, and a folder that one command writes at a time."""

from __future__ import annotations

import os
import platform
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path` and rename it when the block ends well, so that no file is ever half-written.

    The name is unique: two processes that write one file leave what one of them wrote, whole.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def ensure_writable(folder: Path) -> Path:
    """Create an output folder if need be. Raises `ValueError` when it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ValueError(
            f"cannot write to the output folder {folder}: {error.strerror or error}; choose another with --output"
        ) from None


def ensure_writable_file(path: Path) -> Path:
    """A file to be written into a folder that is there. Raises `ValueError` when it cannot be; a folder misspelt is not made."""
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}; make it, or choose another with --output")
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; give --output the name of a file")
    ensure_writable(path.parent)
    return path


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder of results; the system lets go when the process ends, however it ends.

    Raises `ValueError` that names the holder while another process has it.
    """
    inside = ensure_writable(folder / ".reproduced")
    lock, holder = FileLock(inside / "lock"), inside / "holder"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        said = holder.read_text(encoding="utf-8").strip() if holder.is_file() else "another process"
        raise ValueError(
            f"{folder} is being written by {said}; wait until it ends, or choose another folder with --output"
        ) from None
    try:
        command, since = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), time.strftime("%Y-%m-%d %H:%M:%S")
        with atomic_write(holder) as part:
            part.write_text(f"process {os.getpid()} on {platform.node()} (`{command}`, since {since})\n", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
