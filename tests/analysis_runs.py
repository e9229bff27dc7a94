"""Running an analysis script whole, under --quick, in this process."""

import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

import gradlab as gl

ROOT = Path(gl.__file__).parent.parent


@dataclass
class Run:
    """What a script left in its namespace and in its folder."""

    names: dict[str, Any]
    folder: Path

    def frame(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / f"{name}.csv")

    def caption(self, name: str) -> str:
        return (self.folder / f"{name}.md").read_text(encoding="utf-8")


def run(script: str, folder: Path) -> Run:
    """Run `analyses/<script>.py --quick` with its output in `folder`."""
    arguments = sys.argv
    sys.argv = [script, "--quick", "--output", str(folder)]
    try:
        return Run(runpy.run_path(str(ROOT / "analyses" / f"{script}.py")), folder)
    finally:
        sys.argv = arguments
