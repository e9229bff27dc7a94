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

    def text(self, name: str) -> str:
        """What stands under and beside a figure: caption, notes, verdicts and provenance."""
        return (self.folder / f"{name}.md").read_text(encoding="utf-8")

    def caption(self, name: str) -> str:
        return self.text(name).partition("\n\n")[0]

    def check_captions(self) -> None:
        """Every picture has a caption that starts with what it shows and is short enough to be read under it."""
        for path in self.folder.glob("*.png"):
            caption = self.caption(path.stem)
            assert caption.startswith("**"), path.stem
            assert len(caption.split()) <= gl.report.CAPTION_WORDS, path.stem
            assert "HOLDS" not in caption, path.stem


def run(script: str, folder: Path) -> Run:
    """Run `analyses/<script>.py --quick` with its output in `folder`."""
    arguments = sys.argv
    sys.argv = [script, "--quick", "--output", str(folder)]
    try:
        return Run(runpy.run_path(str(ROOT / "analyses" / f"{script}.py")), folder)
    finally:
        sys.argv = arguments
