"""The gallery: one self-contained page of every figure with its caption, data and command, and the ledger above them."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from markdown_it import MarkdownIt

from gradlab.study import pages

_VERDICT = re.compile(r"\b(HOLDS|FAILS|UNDECIDED|OPEN)\b")


@dataclass(frozen=True)
class FigureEntry:
    """One figure of the gallery: its name, caption and notes as HTML, picture as a data URI, and the files beside it."""

    name: str
    caption: str
    notes: str
    picture: str
    files: tuple[str, ...]


def figure_entries(folder: Path) -> list[FigureEntry]:
    """Every figure of a folder that has a picture and a text, in the order of their names."""
    markdown = MarkdownIt("commonmark", {"html": False})
    entries = []
    for picture in sorted(folder.glob("[0-9]*.png")):
        text = picture.with_suffix(".md")
        if not text.is_file():
            continue
        files = tuple(f"{picture.stem}.{kind}" for kind in ("csv", "pdf") if (folder / f"{picture.stem}.{kind}").is_file())
        encoded = base64.b64encode(picture.read_bytes()).decode("ascii")
        caption, _, notes = text.read_text(encoding="utf-8").partition("\n\n")
        shown = _VERDICT.sub(r'<span class="verdict \1">\1</span>', markdown.render(notes))
        entries.append(FigureEntry(picture.stem, markdown.render(caption), shown, f"data:image/png;base64,{encoded}", files))
    return entries


def write(folder: Path, settled: pd.DataFrame, titles: Mapping[str, str]) -> Path:
    """Write `index.html` for a folder of results: the settled ledger, then the figures of each analysis under its title.

    `titles` maps an analysis's name, which starts with its number, to its question. The page needs nothing but itself; links
    to data are relative. Returns the path of the page.
    """
    entries_by_figure = figure_entries(folder)
    chapters = []
    for name, title in titles.items():
        number = name.split("_")[0]
        chapter = [entry for entry in entries_by_figure if entry.name.startswith(f"{number}_")]
        if chapter:
            chapters.append({"name": name, "title": title, "figures": chapter})
    rows = settled.astype(object).where(settled.notna(), None)
    ledger = [part.to_dict("records") for _, part in rows.groupby("id", sort=False)]
    values = {
        "chapters": chapters,
        "ledger": ledger,
        "audit": (folder / "audit.html").is_file(),
        "counts": settled["verdict"].value_counts().to_dict(),
    }
    return pages.write(folder / "index.html", "gradlab.study", "gallery.html", values)
