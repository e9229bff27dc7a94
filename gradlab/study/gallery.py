"""The pages of a folder of results: an overview, the ledger, and every analysis with its figures, captions, data and commands."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from markdown_it import MarkdownIt

from gradlab.study import pages

_VERDICT = re.compile(r"\b(HOLDS|FAILS|UNDECIDED|OPEN)\b")
#: Signs that tell scopes apart, as they stand in an address.
_SIGNS = {"≤": "at-most", "≥": "at-least", "<": "below", ">": "above", "…": "to", "/": "over", ".": "p"}


@dataclass(frozen=True)
class FigureEntry:
    """One figure: its name, caption and notes in Markdown, the size of its picture in pixels, and the files beside it."""

    name: str
    caption: str
    notes: str
    size: tuple[int, int]
    files: tuple[str, ...]

    @property
    def title(self) -> str:
        """The bold words that the caption begins with."""
        bold = re.match(r"\*\*(.+?)\.?\*\*", self.caption, re.DOTALL)
        return " ".join(bold[1].split()) if bold else self.name

    @property
    def alt(self) -> str:
        """The caption without its marks, for whoever cannot see the picture."""
        return " ".join(re.sub(r"[*`]", "", self.caption).split())


@dataclass(frozen=True)
class Chapter:
    """An analysis with its question and its figures."""

    name: str
    title: str
    figures: tuple[FigureEntry, ...]


def figure_entries(folder: Path) -> list[FigureEntry]:
    """Every figure of a folder that has a picture and a text, in the order of their names."""
    entries = []
    for picture in sorted(folder.glob("[0-9]*.png")):
        text = picture.with_suffix(".md")
        if not text.is_file():
            continue
        caption, _, notes = text.read_text(encoding="utf-8").strip().partition("\n\n")
        files = tuple(
            f"{picture.stem}.{kind}" for kind in ("csv", "pdf", "png") if (folder / f"{picture.stem}.{kind}").is_file()
        )
        entries.append(FigureEntry(picture.stem, caption, notes, _pixels(picture), files))
    return entries


def _pixels(picture: Path) -> tuple[int, int]:
    """Width and height as the header of a PNG says them."""
    with picture.open("rb") as stream:
        width, height = struct.unpack(">II", stream.read(24)[16:])
    return width, height


def chapters(folder: Path, titles: Mapping[str, str]) -> list[Chapter]:
    """The analyses that have figures in a folder; `titles` maps a name, which starts with its number, to its question."""
    entries = figure_entries(folder)
    of = {name: tuple(entry for entry in entries if entry.name.startswith(f"{name[:2]}_")) for name in titles}
    return [Chapter(name, title, of[name]) for name, title in titles.items() if of[name]]


def anchor(identifier: str, scope: str) -> str:
    """Where a row of the ledger stands in its page.

    >>> from gradlab.study.gallery import anchor
    >>> anchor("k3-first-order.near", "bandits, KL ≤ 0.1")
    'k3-first-order.near--bandits-kl-at-most-0p1'
    """
    words = "".join(f" {_SIGNS[sign]} " if sign in "≤≥<>" else _SIGNS.get(sign, sign) for sign in scope.lower())
    slug = re.sub(r"\W+", "-", words).strip("-")
    return f"{identifier}--{slug}"


def ledger(settled: pd.DataFrame) -> dict[str, Any]:
    """A settled ledger for a page: `topics` with the published sentence and their claims, `sources`, and `counts` of verdicts.

    Raises `ValueError` for two rows that would have one address.
    """
    rows = settled.astype(object).where(settled.notna(), None)
    rows["anchor"] = [anchor(*pair) for pair in zip(rows["id"], rows["scope"], strict=True)]
    if twice := sorted(rows["anchor"][rows["anchor"].duplicated()]):
        raise ValueError(f"two rows of the ledger have one address: {', '.join(twice)}; change the words of a scope")
    topics = []
    for topic, part in rows.groupby(rows["id"].str.split(".").str[0], sort=False):
        claims = [
            {"id": identifier, "statement": each["statement"].iloc[0], "rows": each.to_dict("records")}
            for identifier, each in part.groupby("id", sort=False)
        ]
        first = part.iloc[0]
        topics.append({"name": topic, "published": first["published"], "source": first["source"], "claims": claims})
    counts = settled["verdict"].value_counts()
    order = [verdict for verdict in ("HOLDS", "FAILS", "UNDECIDED", "OPEN") if verdict in counts]
    sources = list(dict.fromkeys(settled["source"]))
    return {"topics": topics, "sources": sources, "counts": {verdict: int(counts[verdict]) for verdict in order}}


def write(folder: Path, settled: pd.DataFrame, titles: Mapping[str, str]) -> Path:
    """Write the pages of a folder: `index.html`, `claims.html`, `NN_name.html` for each analysis, and the explorer.

    `titles` maps an analysis's name, which starts with its number, to its question. All links are relative; pictures and data
    are those of the folder. Returns the path of `index.html`.
    """
    listed = chapters(folder, titles)
    shared = {"chapters": listed, "ledger": ledger(settled), "audit": (folder / "audit.html").is_file()}
    page_of = {entry.name: f"{chapter.name}.html#{entry.name}" for chapter in listed for entry in chapter.figures}
    common = {**shared, "page": lambda figure: page_of.get(figure, f"{figure}.csv")}
    filters = {"markdown": _html}
    for chapter in listed:
        pages.write(folder / f"{chapter.name}.html", "gradlab.study", "chapter.html", {**common, "chapter": chapter}, filters)
    pages.write(folder / "claims.html", "gradlab.study", "claims.html", {**common, "script": pages.script()}, filters)
    pages.copy_explorer(folder / "explorer.html")
    return pages.write(folder / "index.html", "gradlab.study", "gallery.html", common, filters)


def _html(text: str) -> str:
    rendered = MarkdownIt("commonmark", {"html": False}).render(text)
    return _VERDICT.sub(r'<span class="verdict \1">\1</span>', rendered)
