"""The analyses: numbered scripts that make figures, data and captions, those of gradlab and those that are registered."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gradlab._common.registry import Registry


@dataclass(frozen=True)
class Analysis:
    """A script that `gradlab reproduce` runs, of the form `NN_name.py`; its results are the files `NN_*` of the output folder.

    Its first heading, `# # …`, is the question it answers. Raises `ValueError` for a file that is not there or is named otherwise.
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path).resolve())
        if not re.fullmatch(r"[0-9]{2}_[a-z0-9_]+", self.path.stem) or self.path.suffix != ".py":
            raise ValueError(f"an analysis is a script NN_name.py, such as 20_mine.py, got {self.path.name}")
        if not self.path.is_file():
            raise ValueError(f"there is no analysis {self.path}")

    @property
    def name(self) -> str:
        """The name of the script, which `--only` takes."""
        return self.path.stem

    @property
    def number(self) -> str:
        """The two digits that its results start with."""
        return self.name[:2]

    @property
    def title(self) -> str:
        """First heading of the script."""
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return next((line[4:] for line in lines if line.startswith("# # ")), "")


#: Analyses of the user's, by name.
REGISTERED: Registry[Analysis] = Registry("analysis")


def analyses() -> dict[str, Path]:
    """All scripts by name: those of the source tree, or those packed with the installed package; then the registered ones.

    Raises `ValueError` when gradlab's own are not found.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "_analyses", package.parent / "analyses"):
        if own := sorted(folder.glob("[0-9]*.py")):
            return {path.stem: path for path in own} | {name: item.path for name, item in REGISTERED.items()}
    raise ValueError("no analysis scripts found beside the package; reinstall gradlab-kl")
