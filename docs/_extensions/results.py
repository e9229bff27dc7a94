"""Pages and tables from gradlab's registries and a folder of results: the ledger, the catalogue, the gallery, shipped losses.

`gradlab_results` names the folder. A role, `claim`, links a sentence to a row of the ledger and warns where the verdict is another.
"""

from __future__ import annotations

import re
import shutil
from functools import cached_property, lru_cache
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from docutils import nodes
from docutils.parsers.rst import directives
from jinja2 import BaseLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util.docutils import SphinxDirective, SphinxRole
from sphinx.util.logging import getLogger

import gradlab as gl
from gradlab.cli.main import Listing, listed
from gradlab.study import analyses, gallery, pages

logger = getLogger(__name__)

#: What the site offers to download, beside the pictures.
FILES = ("*.csv", "*.pdf", "*.png", "audit.html", "audit.json", "explore*.html")
#: Where the catalogue's bias and noise are from: the policies and the distance to the reference, in nats.
FAMILY, DISTANCE = "tree", 0.1


class Results:
    """A folder of results, read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def settled(self) -> pd.DataFrame:
        return gl.claims.verify(self.folder if self.folder.is_dir() else {})

    @cached_property
    def rows(self) -> dict[tuple[str, str], dict[str, Any]]:
        return {(row["id"], row["scope"]): row for row in self.settled.to_dict("records")}

    @cached_property
    def chapters(self) -> list[gallery.Chapter]:
        titles = {name: analyses.Analysis(path).title for name, path in analyses.analyses().items()}
        return gallery.chapters(self.folder, titles)

    @cached_property
    def page_of(self) -> dict[str, str]:
        return {figure.name: f"{chapter.name}.html#{figure.name}" for chapter in self.chapters for figure in chapter.figures}

    def frame(self, name: str) -> pd.DataFrame | None:
        """A frame as it lies in the folder; `None` where it does not."""
        path = self.folder / f"{name}.csv"
        return pd.read_csv(path) if path.is_file() else None

    @cached_property
    def shipped(self) -> pd.DataFrame | None:
        """One row for each audited configuration, on-policy and off-policy beside each other."""
        frame = self.frame("audit")
        if frame is None:
            return None
        frame = frame.fillna(dict.fromkeys(["failures", "form", "configuration", "function", "package", "version"], ""))
        on, off = (frame[frame["policy"] == policy].set_index("subject") for policy in ("on", "off"))
        return on.assign(off=off["verdict"], off_cosine=off["cosine"], off_text=off["text"]).reset_index()


@lru_cache
def results(folder: Path) -> Results:
    """The results of a folder."""
    return Results(folder)


def _folder(sources: str | Path, config: Config) -> Path:
    return Path(sources, config.gradlab_results).resolve()


def link(page: str, here: str) -> str:
    """The address of a page of the site, or of a file in it, as seen from the document `here`."""
    return "../" * here.count("/") + page


class ClaimRole(SphinxRole):
    """``{claim}`FAILS k3-raises | scope` ``: the verdict and its scope, linked to the row of the ledger."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        said, _, scope = (part.strip() for part in self.text.partition("|"))
        verdict, _, identifier = said.partition(" ")
        rows = results(_folder(self.env.srcdir, self.config)).rows
        found = rows.get((identifier, scope))
        if found is None:
            known = [s for i, s in rows if i == identifier]
            logger.warning(
                "no claim %r with the scope %r; its scopes: %s", identifier, scope, known, location=self.get_location()
            )
        elif found["verdict"] not in (verdict, "OPEN"):
            text = "claim %s (%s) is said to be %s here and is %s in the ledger"
            logger.warning(text, identifier, scope, verdict, found["verdict"], location=self.get_location())
        target = f"{link('ledger.html', self.env.docname)}#{gallery.anchor(identifier, scope)}"
        markup = f'<a class="claim-link" href="{target}"><span class="verdict {verdict}">{verdict}</span> {escape(scope)}</a>'
        return [nodes.raw("", markup, format="html")], []


class _Table(SphinxDirective):
    """What all directives here share: text in Markdown is parsed where they stand."""

    def markdown(self, text: str) -> list[nodes.Node]:
        return self.parse_text_to_nodes(text, allow_section_headings=True)

    @property
    def results(self) -> Results:
        return results(_folder(self.env.srcdir, self.config))

    @staticmethod
    def raw(markup: str) -> nodes.raw:
        return nodes.raw("", markup, format="html")


class LedgerDirective(_Table):
    """Every claim with its rows, under a filter."""

    def run(self) -> list[nodes.Node]:
        parts: Any = _environment(PackageLoader("gradlab.study", ".")).get_template("ledger.html").module
        ledger = gallery.ledger(self.results.settled)
        text = f"```{{raw}} html\n{parts.controls(ledger, 'claims')}\n```\n\n"
        for topic in ledger["topics"]:
            text += f"(topic-{topic['name']})=\n## {_plain(topic['published'])}\n\n{_plain(topic['source'])}\n\n"
            for claim in topic["claims"]:
                rows = parts.topic_rows({"claims": [claim]}, "figures/", self._page)
                text += f"\n### `{claim['id']}` {_plain(claim['statement'])}\n\n```{{raw}} html\n{rows}\n```\n\n"
        return self.markdown(text)  # in one piece: sections are laid where they are parsed

    def _page(self, figure: str) -> str:
        page = self.results.page_of.get(figure)
        return f"gallery/{page}" if page else f"figures/{figure}.csv"


class EstimatorsDirective(_Table):
    """The catalogue: what each estimator descends, how far off and how noisy it is, and who ships it."""

    def run(self) -> list[nodes.Node]:
        measured = self._measured()
        lines = [
            "| estimator | on-policy | off-policy | bias | noise | shipped in | source |",
            "|---|---|---|--:|--:|---|---|",
        ]
        for entry in gl.CATALOGUE.values():
            cells = [
                f'<span id="{entry.name}"></span>`{entry.name}`',
                _combination(entry.on_policy),
                _combination(entry.off_policy),
                *measured.get(entry.name, ("–", "–")),
                self._shipped(entry.estimator.name),
                _plain(entry.source),
            ]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        return self.markdown("\n".join(lines))

    def _measured(self) -> dict[str, tuple[str, str]]:
        frame = self.results.frame("04_catalogue")
        if frame is None:
            return {}
        part = frame[(frame["family"] == FAMILY) & (frame["target"] == "reverse_kl")]
        part = part[part["kl"] == min(part["kl"].unique(), key=lambda kl: abs(kl - DISTANCE))]
        return {row["estimator"]: (_number(row["bias"]), _number(row["noise"])) for row in part.to_dict("records")}

    def _shipped(self, composed: str) -> str:
        shipped = self.results.shipped
        if shipped is None:
            return "–"
        forms = shipped["form"].str.replace("-detached", "").str.removesuffix("-by-length")
        counts = shipped[forms == composed].groupby("package").size()
        return ", ".join(f"{package} ({number})" for package, number in counts.items()) or "–"


class ShippedDirective(_Table):
    """Every audited configuration of the training frameworks, under a filter."""

    def run(self) -> list[nodes.Node]:
        shipped = self.results.shipped
        if shipped is None:
            return self.markdown(
                "No audit lies in the folder of results; `gradlab audit --installed --output figures` makes one."
            )
        choices = {
            "package": ("Framework", sorted(set(shipped["package"]))),
            "on": ("On-policy", sorted(set(shipped["verdict"]))),
            "off": ("Off-policy", sorted(set(shipped["off"]))),
            "failures": ("Failed probe", sorted({probe for text in shipped["failures"] for probe in text.split(";") if probe})),
        }
        template = _environment(FileSystemLoader(Path(__file__).parent)).get_template("shipped.html")
        return [self.raw(template.render(choices=choices, rows=shipped.to_dict("records"), number=_number))]


class SettingsDirective(_Table):
    """What to set in each framework to descend the reverse KL."""

    def run(self) -> list[nodes.Node]:
        frame = self.results.frame("12_settings")
        if frame is None:
            return self.markdown("No results of analysis 12 lie in the folder of results.")
        lines = ["| framework | descends | data | what to set | scope |", "|---|---|---|---|---|"]
        for row in frame.fillna(dict.fromkeys(["configuration", "scope"], "")).to_dict("records"):
            setting = f"`{row['configuration']}`" if row["configuration"] else f"none of {row['configurations']} does"
            cells = (
                f"{row['framework']} {row['version']}",
                f"`{row['target']}`",
                f"{row['policy']}-policy",
                setting,
                row["scope"],
            )
            lines.append("| " + " | ".join(cells) + " |")
        return self.markdown("\n".join(lines))


class ListingDirective(_Table):
    """A table that `gradlab list` prints."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        headings, rows = listed(Listing(self.arguments[0]))
        lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
        for name, *others in rows:
            cells = [f"`{name}`", *map(_plain, others)]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        return self.markdown("\n".join(lines))


class PlateDirective(_Table):
    """A figure of the gallery with its caption and a link to its page."""

    required_arguments = 1
    option_spec = {"caption": directives.flag}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        figures = {figure.name: figure for chapter in self.results.chapters for figure in chapter.figures}
        if name not in figures:
            if self.results.folder.is_dir():
                logger.warning("no figure %s among the results", name, location=self.get_location())
            return []
        page = link(f"gallery/{self.results.page_of[name]}", self.env.docname)
        own = f' id="{name}"' if self.env.docname.startswith("gallery/") else ""
        picture = _picture(figures[name], link("figures/", self.env.docname), page, own)
        return [self.raw(picture), *(self.markdown(figures[name].caption) if "caption" in self.options else [])]


def _picture(figure: gallery.FigureEntry, folder: str, target: str, own: str) -> str:
    width, height = figure.size
    return (
        f'<a class="plate"{own} href="{target}"><img src="{folder}{figure.name}.png" width="{width}" height="{height}" '
        f'alt="{escape(figure.alt)}" loading="lazy"></a>'
    )


def _environment(loader: BaseLoader) -> Environment:
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _combination(parts: dict[str, float] | None) -> str:
    if parts is None:
        return "none of the targets"
    return " + ".join(f"`{name}`" if c == 1 else f"{c:g} `{name}`" for name, c in parts.items()).replace("+ -1 ", "− ")


def _number(value: float) -> str:
    return "–" if pd.isna(value) else "0" if abs(value) < 1e-9 else f"{value:.3g}"


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is."""
    for sign in "\\*_<[]$`":
        text = text.replace(sign, "\\" + sign)
    return text


def write_pages(app: Sphinx) -> None:
    """Write the pages of the gallery: an overview, and one for each analysis."""
    folder = Path(app.srcdir) / "gallery"
    folder.mkdir(exist_ok=True)
    found = results(_folder(app.srcdir, app.config)).chapters
    cards = "\n".join(
        f":::{{grid-item-card}} {chapter.name[:2]} · {chapter.title}\n:link: {chapter.name}\n:link-type: doc\n\n"
        + "\n".join(f"* {figure.title}" for figure in chapter.figures)
        + "\n:::"
        for chapter in found
    )
    names = "\n".join(chapter.name for chapter in found)
    _write(
        folder / "index.md",
        "# Gallery\n\nOne page for each analysis: its figures with captions, data, verdicts and the command that makes them again.\n\n"
        + (
            f"::::{{grid}} 1 2 2 3\n:gutter: 2\n\n{cards}\n::::\n\n"
            if found
            else "No results lie in the folder of results.\n\n"
        )
        + f"```{{toctree}}\n:hidden:\n\n{names}\n```\n",
    )
    for chapter in found:
        plates = []
        for figure in chapter.figures:
            files = ", ".join(f'<a href="../figures/{name}">{name}</a>' for name in figure.files)
            head = f"## {figure.title}\n\n```{{plate}} {figure.name}\n:caption:\n```"
            plates.append(f"{head}\n\n{figure.notes}\n\nFiles: {files}")
        head = (
            f"# {chapter.title}\n\nAnalysis `{chapter.name}`. These results again: "
            f"`gradlab reproduce --only {chapter.name} --force`. What they decide: [claims](../ledger.md)."
        )
        _write(folder / f"{chapter.name}.md", "\n\n".join([head, *plates]) + "\n")


def _write(path: Path, text: str) -> None:
    """Write a page, unless it is there already: Sphinx reads again what is newer."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def link_files(app: Sphinx, name: str, source: list[str]) -> None:
    """Turn links of the sources to the folder of results into links to where its files lie in the site."""
    target = link("figures/", name)
    source[0] = re.sub(r"(?<!!)\[([^\]]+)\]\((?:\.\./)+figures/([^)\s]+)\)", rf'<a href="{target}\2">\1</a>', source[0])


def copy_files(app: Sphinx, error: Exception | None) -> None:
    """Lay data and pictures, and the script of the filters, beside the pages."""
    if error or app.builder.name != "html":
        return
    target = Path(app.outdir) / "figures"
    target.mkdir(exist_ok=True)
    for pattern in FILES:
        for path in _folder(app.srcdir, app.config).glob(pattern):
            shutil.copy2(path, target)
    (Path(app.outdir) / "_static" / "filter.js").write_text(pages.script(), encoding="utf-8")


#: What a page of the theme lacks for whoever reads with a keyboard or hears it, and what it gets.
ACCESSIBLE = {
    '<p class="caption" role="heading">': '<p class="caption" role="heading" aria-level="2">',
    '<aside class="sidebar-drawer">': '<aside class="sidebar-drawer" aria-label="Pages">',
    '<aside class="toc-drawer': '<aside aria-label="On this page" class="toc-drawer',
    '<div class="table-wrapper colwidths-auto docutils container">': (
        '<div class="table-wrapper colwidths-auto docutils container" tabindex="0">'
    ),
    "<pre>": '<pre tabindex="0">',
    '<th class="head"><p></p></th>': "<td></td>",
}


def finish_pages(app: Sphinx, error: Exception | None) -> None:
    """Complete the pages of the theme where they are not accessible."""
    if error or app.builder.name != "html":
        return
    for path in Path(app.outdir).rglob("*.html"):
        if "figures" not in path.parts:
            text = path.read_text(encoding="utf-8")
            for given, accessible in ACCESSIBLE.items():
                text = text.replace(given, accessible)
            path.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the role, the directives and the pages."""
    app.add_config_value("gradlab_results", "../figures", "env", types=frozenset({str}))
    app.add_role("claim", ClaimRole())
    app.add_directive("ledger", LedgerDirective)
    app.add_directive("estimators", EstimatorsDirective)
    app.add_directive("shipped", ShippedDirective)
    app.add_directive("settings", SettingsDirective)
    app.add_directive("listing", ListingDirective)
    app.add_directive("plate", PlateDirective)
    app.add_js_file("filter.js", loading_method="defer")
    app.connect("builder-inited", write_pages)
    app.connect("source-read", link_files)
    app.connect("build-finished", copy_files)
    app.connect("build-finished", finish_pages)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
