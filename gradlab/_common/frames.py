"""Frames as files: CSV of a stated number of digits, and beside them what tells a damaged one.

Every number has `DIGITS` significant digits. Two processors agree on about twelve digits of a well-conditioned number, and the
ledger's finest margin, 1e-9, is twenty times what rounding to eleven changes. What is zero up to the rounding of the arithmetic is
written as 0: whatever is below `NOISE` of its column's scale, see `scale`.

Each analysis leaves `NN_frames.json`: the options it ran with and, for each frame, its rows and the hash of its file. A folder
without one is taken as it is: frames that a user made need none.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gradlab._common.files import atomic_write

DIGITS = 11

#: Smaller than this share of a column's scale is rounding: some thousand units in the last place of float64.
NOISE = 1e-12

#: Numbers that are small in their own right: probabilities and the coefficients and ratios made of them.
_SMALL = re.compile(
    r"(^|_)(probability|policy|reference|vocabulary|after|mass|unseen|p_never_sampled|rarest|log_ratio|coefficient|plain|principled|magnitude)(_|$)"
)


def scale(column: str) -> float:
    """The size next to which numbers of a column are rounding when they are below `NOISE` of it; 0 where none is.

    Biases, cosines, noise, divergences and shares are relative or of order one. An error at some batch size is the square root
    of a noise, so its rounding is the square root of `NOISE`. Probabilities have no scale: the smallest are numbers.
    """
    if column.startswith("rmse"):
        return float(NOISE**-0.5)
    return 0.0 if _SMALL.search(column) and not column.startswith("bias") else 1.0


def rounded(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with the digits that are written: floats to `DIGITS` significant ones, rounding noise as 0."""
    floats = {name: _rounded(column, scale(str(name))) for name, column in frame.items() if column.dtype.kind == "f"}
    return frame.assign(**{str(name): values for name, values in floats.items()})


def _rounded(column: pd.Series[Any], size: float) -> np.ndarray[Any, Any]:
    values = column.to_numpy(dtype=np.float64)
    short = np.array([float(f"{value:.{DIGITS}g}") for value in values.tolist()], dtype=np.float64)
    return np.where(np.abs(values) < NOISE * size, 0.0, short) + 0.0  # adding 0 takes the sign of −0


def save(folder: Path, name: str, frame: pd.DataFrame, made: Mapping[str, object]) -> Path:
    """Write a frame and enter it in its analysis's sidecar, with the options it was `made` with."""
    path, beside = folder / f"{name}.csv", sidecar(folder, name)
    with atomic_write(path) as part:
        rounded(frame).to_csv(part, index=False, lineterminator="\n")
    try:
        known = _read(beside)
    except ValueError:  # a damaged sidecar is made anew like everything else
        known = {}
    frames = known["frames"] if known.get("made") == dict(made) else {}
    frames[name] = {"rows": len(frame), "sha256": _digest(path.read_bytes())}
    with atomic_write(beside) as part:
        content = {"made": dict(made), "frames": dict(sorted(frames.items()))}
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def load(folder: Path, name: str) -> pd.DataFrame:
    """Read a frame. Raises `ValueError` when its file is not the one that the analysis's sidecar tells of."""
    path, beside = folder / f"{name}.csv", sidecar(folder, name)
    again = f"make it again with `gradlab reproduce --only {name.split('_')[0]} --force --output {folder}`"
    content = path.read_bytes()
    entry = _read(beside).get("frames", {}).get(name)
    if entry is not None and entry["sha256"] != _digest(content):
        raise ValueError(
            f"{path} is damaged or was edited: its content is not what {beside.name} was written for ({entry['rows']} rows); "
            f"{again}, or remove {beside} if the change is meant"
        )
    try:
        return pd.read_csv(io.BytesIO(content))
    except (ValueError, UnicodeDecodeError) as error:  # pandas' own errors are ValueErrors
        raise ValueError(f"{path} is not a table: {str(error).strip()}; {again}") from None


def made(folder: Path, name: str) -> dict[str, object] | None:
    """The options that the frames of an analysis (or the analysis of a frame) were made with; `None` without a sidecar."""
    return _read(sidecar(folder, name)).get("made")


def names(folder: Path, analysis: str) -> list[str]:
    """Names of the frames that an analysis left in a folder, by its sidecar."""
    return list(_read(sidecar(folder, analysis)).get("frames", {}))


def sidecar(folder: Path, name: str) -> Path:
    """The file that tells of the frames of an analysis, or of the analysis that a frame belongs to."""
    return folder / f"{name.split('_')[0]}_frames.json"


def _digest(content: bytes) -> str:
    """Hash of a text, the same whichever way a checkout ends its lines."""
    return hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """A sidecar; empty where there is none. Raises `ValueError` for a damaged one."""
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        entries = manifest["frames"].values()
        if isinstance(manifest["made"], dict) and all(
            isinstance(e["rows"], int) and isinstance(e["sha256"], str) for e in entries
        ):
            return dict(manifest)
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    again = f"gradlab reproduce --only {path.name.split('_')[0]} --force --output {path.parent}"
    raise ValueError(f"{path} is damaged; make the analysis again with `{again}`, or remove the file") from None
