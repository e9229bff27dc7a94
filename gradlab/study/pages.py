"""Pages that need nothing but themselves, made from a template and the frame that all pages share, `base.html`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gradlab._common.files import atomic_write

#: The explorer, one file that needs nothing else; made from scripts/explorer.
EXPLORER = Path(__file__).parent / "explorer.html"


def write(
    path: Path, package: str, template: str, values: Mapping[str, Any], filters: Mapping[str, Callable[..., Any]] | None = None
) -> Path:
    """Fill the `template` that lies in a `package` with `values` and write it to `path`; returns the path."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("gradlab.study", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters or {})
    page = environment.get_template(template).render(**values)
    with atomic_write(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def script() -> str:
    """The script that filters long tables, `filter.js`."""
    return (Path(__file__).parent / "filter.js").read_text(encoding="utf-8")


def copy_explorer(path: Path) -> None:
    """Write the explorer to `path`."""
    with atomic_write(path) as part:
        part.write_bytes(EXPLORER.read_bytes())
