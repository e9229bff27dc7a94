"""Where a result came from: versions that travel with frames and captions."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Versions of gradlab and of the libraries its numbers depend on."""
    return {"gradlab": _version("gradlab-kl"), **{name: _version(name) for name in ("torch", "numpy", "scipy")}}


@cache  # a distribution's metadata are a file to be parsed
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


__version__ = _version("gradlab-kl")
