"""The documentation: it is built without a warning, its links lead somewhere, its code runs, and its pages work in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import gradlab as gl
from gradlab.cli import docs, main
from gradlab.study import gallery

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("**/*.md"))
#: Pages whose code other tests run.
OTHERS = {"records.md", "objective.md", "my_kl_spiked.md", *(page.name for page in (ROOT / "docs" / "lessons").glob("*.md"))}


def run(monkeypatch, *arguments: object) -> int:
    """Run the command line as a user does; its exit code."""
    monkeypatch.setattr(sys, "argv", ["gradlab", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The pages, built once, with warnings as errors."""
    for name in docs.NEEDED:
        pytest.importorskip(name, reason=f"{name} is not installed; install the extra docs")
    output = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert run(patch, "docs", "--no-open", "--strict", "--output", output) == 0
    return output


class Links(HTMLParser):
    """What a page refers to, and what can be referred to in it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.references: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.anchors |= {value for key in ("id", "name") if (value := given.get(key))}
        self.references |= {value for key in ("href", "src") if (value := given.get(key))}


def broken(folder: Path) -> list[str]:
    """Relative references between the pages of a folder that lead nowhere, and absolute ones to this machine."""
    pages = {page.resolve(): Links(page) for page in folder.rglob("*.html")}
    assert len(pages) > 10
    found = []
    for page, links in pages.items():
        for reference in links.references:
            parts = urllib.parse.urlsplit(reference)
            if parts.scheme in ("http", "https", "mailto", "data") or parts.netloc:
                continue
            target = (page.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else page
            fragment = urllib.parse.unquote(parts.fragment)
            there = target.exists() and not parts.path.startswith("/") and not parts.scheme
            if not there or (fragment and target in pages and fragment not in pages[target].anchors):
                found.append(f"{page.relative_to(folder.resolve())}: {reference}")
    return sorted(found)


def test_every_link_of_the_documentation_leads_somewhere(site):
    assert broken(site) == []


def test_every_link_of_the_pages_of_figures_leads_somewhere():
    assert broken(ROOT / "figures") == []


def test_a_broken_link_is_found(tmp_path):
    for k in range(11):
        (tmp_path / f"{k}.html").write_text('<a id="a" href="1.html#a">', encoding="utf-8")
    (tmp_path / "0.html").write_text('<a href="1.html#b"><img src="x.png"><a href="/2.html">', encoding="utf-8")
    assert broken(tmp_path) == ["0.html: /2.html", "0.html: 1.html#b", "0.html: x.png"]


def test_the_ledger_shows_every_row_and_the_gallery_every_figure(site):
    settled = gl.claims.verify(ROOT / "figures")
    ledger = (site / "ledger.html").read_text(encoding="utf-8")
    for row in settled.to_dict("records"):
        assert f'id="{gallery.anchor(row["id"], row["scope"])}" data-verdict="{row["verdict"]}"' in ledger
    for picture in (ROOT / "figures").glob("*.png"):
        (page,) = (site / "gallery").glob(f"{picture.stem[:2]}_*.html")
        assert f'src="../figures/{picture.name}"' in page.read_text(encoding="utf-8")
        assert (site / "figures" / picture.name).is_file()


def test_the_catalogue_shows_what_is_declared_and_what_the_frame_says(site):
    text = (site / "estimators.html").read_text(encoding="utf-8")
    frame = pd.read_csv(ROOT / "figures" / "04_catalogue.csv")
    part = frame[(frame["family"] == "tree") & (frame["estimator"] == "k3-loss") & frame["kl"].between(0.05, 0.15)]
    (row,) = re.findall(r'<tr[^>]*><td><p><span id="k3-loss".*?</tr>', text, re.S)
    cells = [" ".join(re.sub(r"<[^>]+>", "", cell).split()) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.S)]
    assert cells[1:5] == [
        "forward_kl_frozen_prefix",
        "none of the targets",
        *(f"{part[k].item():.3g}" for k in ("bias", "noise")),
    ]
    audited = pd.read_csv(ROOT / "figures" / "audit.csv")
    k3 = audited[(audited["policy"] == "on") & audited["form"].isin(["k3-loss", "k3-loss-by-length"])]
    for package, number in k3.groupby("package").size().items():
        assert f"{package} ({number})" in cells[5]
    for name in gl.CATALOGUE:
        assert f'<span id="{name}"></span>' in text


def test_every_public_name_is_in_the_reference(site):
    text = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    assert [name for name in gl.__all__ if f'id="gl-{name.lower().replace("_", "-")}"' not in text] == []
    assert 'id="gradlab.exact.gradient"' in text
    assert 'id="gradlab.Scenario"' in text


def test_a_sentence_that_the_ledger_does_not_bear_out_is_a_warning(site, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "docs"
    folder.mkdir()
    for name in ("conf.py", "_extensions", "_static"):
        (folder / name).symlink_to(ROOT / "docs" / name)
    said = "{claim}`HOLDS k3-raises | some other scope` {claim}`FAILS k2-loss | one token`"
    (folder / "index.md").write_text(f"# Page\n\n{said}\n\n```{{toctree}}\n:glob:\n\n**/*\n```\n", encoding="utf-8")
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        (folder / name).write_text(f"# {name}\n", encoding="utf-8")
    monkeypatch.setattr(docs, "sources", lambda: folder)
    monkeypatch.chdir(ROOT)
    assert run(monkeypatch, "docs", "--no-open", "--strict", "--output", tmp_path / "site") == 1
    warned = capsys.readouterr().err
    assert "no claim 'k3-raises' with the scope 'some other scope'" in warned
    assert "claim k2-loss (one token) is said to be FAILS here and is HOLDS in the ledger" in warned


def test_without_its_tools_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(docs, "NEEDED", ("surely_not_installed",))
    assert run(monkeypatch, "docs") == 2
    assert "pip install 'gradlab-kl[docs]'" in capsys.readouterr().err


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page) and page.name not in OTHERS], ids=lambda page: page.stem
)
def test_the_code_of_the_pages_runs(page, tmp_path):
    """In a process of its own: what a page registers is not for other tests."""
    if page.stem == "dask":
        pytest.importorskip("distributed")
    (tmp_path / "figures").symlink_to(ROOT / "figures")
    tests = "\nfor name in [name for name in globals() if name.startswith('test_')]: globals()[name]()\n"
    (tmp_path / "page.py").write_text("\n".join(blocks(page)) + tests, encoding="utf-8")
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


# ---- in a browser -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    """A browser; the one of the system, since the library's own is a download."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; install the extra test")
    pytest.importorskip("axe_playwright_python", reason="axe is not installed; install the extra test")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("chromium is not installed; install it from the system's packages")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=quiet)
        yield browser
        browser.close()


@contextmanager
def opened(chromium: Any, page: Path, width: int, scheme: str, query: str = "") -> Iterator[tuple[Any, list[str]]]:
    """A page opened from disk, and what it complains of."""
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab, complaints = context.new_page(), []
    tab.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else complaints.append(request.url))
    tab.goto(page.as_uri() + query)
    yield tab, complaints
    context.close()


def faults(chromium: Any, page: Path) -> list[str]:
    """Complaints of the console, requests to a network, text wider than a phone, and what axe-core finds."""
    from axe_playwright_python.sync_playwright import Axe

    found = []
    for width, scheme in ((1280, "light"), (380, "dark")):
        with opened(chromium, page, width, scheme) as (tab, complaints):
            tab.wait_for_timeout(100)
            wider = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            found += [f"{width} px, {scheme}: {complaint}" for complaint in complaints]
            found += [f"{width} px: {wider} px wider than the window"] if wider > 0 else []
            for violation in Axe().run(tab, options={"preload": False}).response["violations"]:
                if (violation["id"], page.stem) != (
                    "page-has-heading-one",
                    "search",
                ):  # its heading is written by the theme's script
                    found.append(f"{width} px, {scheme}: {violation['id']}: {violation['nodes'][0]['html'][:200]}")
    return found


SHOWN = (
    *(
        "index",
        "start",
        "which-kl",
        "teaching",
        "ledger",
        "estimators",
        "shipped",
        "audit",
        "mathematics",
        "objective",
        "search",
    ),
    *(
        "howto/estimator",
        "gallery/index",
        "gallery/08_off_policy",
        "api/estimators",
        "api/questions",
        "architecture",
        "records",
    ),
)


@pytest.mark.parametrize("name", SHOWN)
def test_the_documentation_works_in_a_browser(name, site, chromium):
    assert faults(chromium, site / f"{name}.html") == []


@pytest.mark.parametrize("name", ["index", "claims", "03_expected_gradients_on_bandits"])
def test_the_pages_of_figures_work_in_a_browser(name, chromium):
    assert faults(chromium, ROOT / "figures" / f"{name}.html") == []


def test_faults_of_a_page_are_found(tmp_path, chromium):
    page = tmp_path / "page.html"
    page.write_text('<body><div style="width: 500px">wide</div><img src="http://127.0.0.1:9/x.png"><script>missing()</script>')
    found = "\n".join(faults(chromium, page))
    for expected in ("missing is not defined", "http://127.0.0.1:9/x.png", "380 px: ", "image-alt"):
        assert expected in found


@pytest.mark.parametrize("where", ["ledger", "claims"])
def test_the_ledger_is_filtered_by_claim_source_scope_and_verdict(where, site, chromium):
    page = site / "ledger.html" if where == "ledger" else ROOT / "figures" / "claims.html"
    settled = gl.claims.verify(ROOT / "figures")
    with opened(chromium, page, 1280, "light") as (tab, complaints):

        def shown() -> list[str]:
            return sorted(tab.eval_on_selector_all("[data-row]:not([hidden])", "rows => rows.map(row => row.id)"))

        def expected(rows: pd.DataFrame) -> list[str]:
            return sorted(gallery.anchor(*pair) for pair in zip(rows["id"], rows["scope"], strict=True))

        assert shown() == expected(settled)
        tab.uncheck('[value="HOLDS"]')
        part = settled[settled["verdict"] != "HOLDS"]
        assert shown() == expected(part)
        tab.fill('[name="scope"]', "tree")
        part = part[part["scope"].str.contains("tree")]
        assert shown() == expected(part)
        source = part["source"].value_counts().idxmax()
        tab.select_option('[name="source"]', source)
        part = part[part["source"] == source]
        assert 0 < len(part) < len(settled)
        assert shown() == expected(part)
        assert tab.inner_text("output") == f"{len(part)} of {len(settled)} rows"
        address = tab.url
        tab.goto("about:blank")
        tab.goto(address)
        assert shown() == expected(part)
        tab.click('button[type="reset"]')
        tab.wait_for_function("document.querySelectorAll('[data-row][hidden]').length === 0")
        tab.fill('[name="claim"]', "k3-raises")
        assert shown() == expected(settled[settled["id"] == "k3-raises"])
        assert tab.locator("table.claim:visible").count() == 1
        assert complaints == []


def test_a_link_to_a_row_shows_it_whatever_the_filter(site, chromium):
    row = gallery.anchor("k3-raises", "three tokens, reference (.70 .01 .29)")
    with opened(chromium, site / "ledger.html", 1280, "light", f"?claim=value-k1#{row}") as (tab, _):
        tab.wait_for_function("document.querySelectorAll('[data-row][hidden]').length === 0")
        assert tab.locator(f"[id='{row}']").is_visible()


def test_the_search_finds_without_a_network(site, chromium):
    with opened(chromium, site / "search.html", 1280, "light", "?q=crossover") as (tab, complaints):
        tab.wait_for_selector("#search-results li a")
        found = tab.eval_on_selector_all("#search-results li a", "links => links.map(link => link.textContent)")
        assert "Glossary" in found
        assert complaints == []
