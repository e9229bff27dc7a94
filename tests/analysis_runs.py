"""Running an analysis script whole, under --quick, in this process."""

import os
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

import gradlab as gl
from gradlab.study.resume import Record, Requirements, imported

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
    """Run `analyses/<script>.py --quick` with its output in `folder`.

    The results are copied to the folder that the environment variable `GRADLAB_TEST_FIGURES` names, with a record, so that
    `gradlab reproduce --quick` into that folder need not make them a second time.
    """
    arguments, path = sys.argv, ROOT / "analyses" / f"{script}.py"
    sys.argv = [str(path), "--quick", "--output", str(folder)]
    try:
        ran = Run(runpy.run_path(str(path)), folder)
    finally:
        sys.argv = arguments
    if kept := os.environ.get("GRADLAB_TEST_FIGURES"):
        output = Path(kept)
        shutil.copytree(folder, output, dirs_exist_ok=True)
        Record(path, output, {"quick": True, "seed": 0, **Requirements.of(path).versions}).save(imported())
    return ran
