"""Figures by name: drawn from the committed frames at any width, in any style and colours, with nothing cut off or overprinted."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from typer.testing import CliRunner

import gradlab as gl
from gradlab.cli.main import app
from gradlab.plots import COLUMN, FIGURES, Figure

ROOT = Path(gl.__file__).parents[1]
FOLDER = ROOT / "figures"


def test_every_committed_picture_has_a_drawing_and_its_frames_are_there():
    pictures = {path.stem for path in FOLDER.glob("[0-9]*.png")}
    assert pictures == set(FIGURES)
    for drawing in FIGURES.values():
        assert all((FOLDER / f"{frame}.csv").is_file() for frame in drawing.frames)


def test_analyses_draw_by_name():
    told = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "analyses").glob("[0-9]*.py")))
    assert set(re.findall(r'gl\.figure\("(\w+)"', told)) == set(FIGURES)
    assert set(re.findall(r'study\.save_figure\(\s*"(\w+)",', told)) == set(FIGURES)
    for saved, drawn in re.findall(r'save_figure\("(\w+)", gl\.figure\("(\w+)"', told):
        assert saved == drawn


def overprinted(figure: Figure) -> list[str]:
    """Texts outside the figure, and pairs of titles, labels and ticks' labels that stand on each other."""
    figure.draw_without_rendering()
    found, texts = [], []
    for text in figure.findobj(Text):
        hidden = text.axes is not None and not text.axes.axison and text in _ticks(text.axes)
        if hidden or not text.get_visible() or not text.get_text().strip():
            continue
        box = text.get_window_extent()
        if box.width and box.height:
            texts.append((text, box))
    ticks = {label for ax in figure.axes for axis in (ax.xaxis, ax.yaxis) for label in _shown(axis)}
    outside = {label for ax in figure.axes for label in _ticks(ax)}
    texts = [(text, box) for text, box in texts if text in ticks or text not in outside]
    edge = figure.bbox
    for text, box in texts:
        if box.x0 < edge.x0 - 2 or box.x1 > edge.x1 + 2 or box.y0 < edge.y0 - 2 or box.y1 > edge.y1 + 2:
            found.append(f"{text.get_text()!r} is cut off")
    for (a, one), (b, two) in combinations(texts, 2):
        across = min(one.x1, two.x1) - max(one.x0, two.x0)
        along = min(one.y1, two.y1) - max(one.y0, two.y0)
        if across > 1.5 and along > 2.5:
            found.append(f"{a.get_text()!r} is on {b.get_text()!r}")
    return found


def _ticks(ax) -> set[Text]:
    """Labels of all ticks, those beyond the ends and those switched off among them."""
    ticks = [tick for axis in (ax.xaxis, ax.yaxis) for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]]
    return {label for tick in ticks for label in (tick.label1, tick.label2)}


def _shown(axis) -> list[Text]:
    """Labels of the ticks that are within the axis and switched on."""
    low, high = sorted(axis.get_view_interval())
    span = 1e-9 * (high - low)
    return [
        label
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        if low - span <= tick.get_loc() <= high + span
        for label in (tick.label1, tick.label2)
        if label.get_visible()
    ]


def test_what_is_overprinted_is_found():
    figure = Figure(figsize=(3, 2))
    ax = figure.subplots()
    ax.text(0.5, 0.5, "one")
    ax.text(0.5, 0.5, "two")
    ax.text(3, 0.5, "far away")
    assert overprinted(figure) == ["'far away' is cut off", "'one' is on 'two'"]


def test_columns_of_panels_are_stacked_by_rows_and_labelled():
    figure = gl.figure("07_gap", folder=FOLDER, width=COLUMN)
    titles = [ax.get_title(loc="left")[:1] for ax in figure.axes]
    assert titles == list("abcdefgh")
    places = [ax.get_subplotspec().get_geometry()[2] for ax in figure.axes]
    assert places == list(range(8)), "two beside each other, in the order of the letters"
    assert {ax.get_ylabel().replace("\n", " ") for ax in figure.axes[::2]} == {"relative bias", "cosine with the truth"}
    assert all(ax.get_xlabel() for ax in figure.axes)


def test_style_and_colours_are_those_asked_for(tmp_path):
    sheet = tmp_path / "my.mplstyle"
    sheet.write_text("font.size: 11\nxtick.labelsize: 11\naxes.facecolor: ffffee\n")
    figure = gl.figure("03_tokens", folder=FOLDER, style=sheet, palette=["#111111", "#222222", "#333333"])
    assert to_hex(figure.axes[0].get_facecolor()) == "#ffffee"
    assert {label.get_fontsize() for label in figure.axes[0].get_xticklabels()} == {11}
    drawn = {line.get_color() for line in figure.axes[0].lines}
    assert {"#111111", "#222222", "#333333"} <= drawn
    assert gl.plots.style_of("k3-loss").colour == "#d55e00", "nothing is left behind"
    named = gl.figure("03_tokens", folder=FOLDER, palette="viridis")
    assert {line.get_color() for line in named.axes[0].lines}.isdisjoint({"#d55e00", "#009e73"})


def test_a_figure_is_drawn_from_frames_that_are_given():
    frame = pd.read_csv(FOLDER / "03_tokens.csv")
    assert len(gl.figure("03_tokens", frame, folder="nowhere").axes) == 1
    with pytest.raises(ValueError, match="05_tails is drawn from 05_tails, 05_hill, in this order; 1 given"):
        gl.figure("05_tails", frame)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "03_token"}, "unknown figure '03_token'; did you mean '03_tokens'"),
        ({"width": 1}, "a width is in inches, at least 2, got 1; a column is 3.3 and a page 6.9"),
        ({"style": "nothing"}, "nothing is neither a file nor a known style; known: "),
        ({"palette": "#12,red"}, "a palette is colours such as #0072B2, or a name that seaborn knows; got #12"),
        ({"palette": "nothing"}, "a palette is colours such as"),
        ({"folder": "nowhere"}, "there is no 03_tokens.csv in nowhere; make it: gradlab reproduce --only 03 --output nowhere"),
    ],
)
def test_what_cannot_be_drawn_is_said(given, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        gl.figure(**{"name": "03_tokens", "folder": FOLDER, **given})


def test_the_command_writes_a_pdf_with_its_fonts(tmp_path):
    def run(*options: str) -> str:
        told = CliRunner().invoke(app, ["figure", *options, "--data", str(FOLDER)], catch_exceptions=False)
        assert told.exit_code == 0
        return told.output

    first, second = tmp_path / "one.pdf", tmp_path / "two.pdf"
    for path in (first, second):
        run("03_tokens", "--width", "6.9", "--palette", "colorblind", "--output", str(path))
    content = first.read_bytes()
    assert content == second.read_bytes(), "the same bytes every time"
    assert b"/Type3" not in content
    assert b"/FontFile2" in content, "fonts are embedded"
    assert re.search(rb"/MediaBox \[ 0 0 496\.8 ", content), "6.9 inches"
    assert "01_schulman       Value of three KL estimators" in run()
    with pytest.raises(ValueError, match=r"--output ends in \.png, \.pdf, \.svg, got "):
        run("03_tokens", "--output", str(tmp_path / "one.jpg"))


def test_a_registered_figure_is_drawn_like_gradlabs_own(tmp_path):
    gl.register(gl.plots.Drawing(gl.plots.objectives, ("20_mine",)), "20_mine")
    bandit = gl.Bandit([0, 1, 2])
    frame = gl.measure(["k2-loss", "k3-loss"], gl.Scenario(bandit, bandit.perturbed(kl=0.3)))
    gl.report.Study("20_mine", tmp_path).save_frame("20_mine", frame)
    texts = [text.get_text() for text in gl.figure("20_mine", folder=tmp_path).axes[0].texts]
    assert texts[0] == "0"
    assert float(texts[1]) == pytest.approx(frame["bias"][1], rel=0.05)


def test_the_style_of_slides_has_larger_type() -> None:
    plain, slides = (gl.figure("03_tokens", folder=FOLDER, style=style) for style in (None, "slides"))
    assert slides.axes[0].xaxis.label.get_size() > 1.2 * plain.axes[0].xaxis.label.get_size()
