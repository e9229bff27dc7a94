"""Figures from frames: what is drawn, in which colour, how large, and that the same frame gives the same bytes."""

import inspect
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import colors
from matplotlib.figure import Figure
from matplotlib.text import Text

import gradlab as gl
from gradlab.plots import COLUMN, HUES, PAGE, style_of, styled, stylesheet
from gradlab.plots.style import OTHERS


def signature_of(name: str) -> inspect.Signature:
    item = getattr(gl.plots, name)
    return inspect.signature(item) if inspect.isfunction(item) else inspect.Signature()


NAMES = ["k1-reward", "k2-loss", "k3-loss", "k1-loss"]


def bandit() -> gl.Scenario:
    return gl.Scenario(gl.Bandit(np.log([0.4, 0.3, 0.2, 0.1])), gl.Bandit(np.log([0.1, 0.2, 0.3, 0.4])), name="bandit")


def schulman_frame() -> pd.DataFrame:
    scenarios = [gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(1, 1), name="toy"), bandit()]
    exact = gl.values(["k1", "k2", "k3"], scenarios)
    closed = exact[exact["scenario"] == "toy"].assign(via="closed form")
    return pd.concat([exact, closed, gl.values(["k1", "k2", "k3"], scenarios, samples=500)], ignore_index=True)


def crossover_frame() -> pd.DataFrame:
    kl = np.geomspace(0.01, 3, 6)
    parts = []
    for panel, group, scenario, crossover in (
        ("first", "a", "one", 0.6),
        ("second", "a", "two", 0.5),
        ("second", "b", "three", np.inf),
        *(("third", group, f"{group} {i}", 0.2) for group in "ab" for i in range(3)),
    ):
        for kernel, slope in (("k1", 0.0), ("k2", 0.3), ("k3", 1.0)):
            part = {
                "panel": panel,
                "group": group,
                "scenario": scenario,
                "kernel": kernel,
                "kl": kl,
                "std": kl**-0.5 * (1 + slope),
            }
            parts.append(pd.DataFrame({**part, "versus_k1": kl**slope, "crossover": crossover}))
    return pd.concat(parts, ignore_index=True)


def components_frame() -> pd.DataFrame:
    return pd.concat([gl.components(NAMES, bandit()), gl.components(NAMES, bandit(), samples=500)], ignore_index=True)


def coefficients_frame() -> pd.DataFrame:
    x = np.array([-3.0, -2, -1, -0.5, 0.5, 1, 2])
    parts = []
    for reference in (0.1, 0.01):
        for clamp in ("plain", "clamped"):
            for name, slope in (("k2-loss", x), ("k3-loss", -np.expm1(-x))):
                kept = np.where((clamp == "clamped") & (x < -2.5), 0.0, slope)
                asymmetry = np.exp(x) if reference == 0.01 else np.nan
                columns = {"estimator": name, "clamp": clamp, "reference": reference, "log_ratio": x, "coefficient": kept}
                columns |= {"principled": x, "probability": reference * np.exp(x), "asymmetry": asymmetry}
                parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def objectives_frame() -> pd.DataFrame:
    return gl.measure(NAMES, bandit(), target=["reverse_kl", "forward_kl"])


def field_frame() -> pd.DataFrame:
    columns, names = [f"policy_{v}" for v in range(3)], ["k1-reward", "k3-loss"]
    crowded = gl.simplex(16)[columns] ** 2  # towards the edges, where a step can raise the KL
    grid = crowded.div(crowded.sum(axis=1), axis=0)
    parts = []
    for reference in ((0.70, 0.01, 0.29), (0.3, 0.3, 0.4)):
        for kind, policies in (("simplex", grid), ("arrows", grid), ("logits", grid), ("instance", [[0.01, 0.2, 0.79]])):
            label = f"({' '.join(f'{p:.2f}' for p in reference)})"
            parts.append(gl.field(names, policies, reference).assign(grid=kind, reference=label))
    return pd.concat(parts, ignore_index=True)


FIGURES: dict[str, tuple[Callable[[pd.DataFrame], Figure], Callable[[], pd.DataFrame], float]] = {
    "schulman": (gl.plots.schulman, schulman_frame, PAGE),
    "crossover": (gl.plots.crossover, crossover_frame, PAGE),
    "gradients": (gl.plots.gradients, components_frame, PAGE),
    "coefficients": (gl.plots.coefficients, coefficients_frame, PAGE),
    "tokens": (gl.plots.tokens, components_frame, COLUMN),
    "objectives": (gl.plots.objectives, objectives_frame, COLUMN),
    "field": (gl.plots.field, field_frame, PAGE),
}


# ---- colours ------------------------------------------------------------------------------------------------------------


def test_every_estimator_has_a_look_of_its_own() -> None:
    looks = {name: style_of(name) for name in gl.ESTIMATORS}
    same = [pair for pair in combinations(looks, 2) if looks[pair[0]] == looks[pair[1]]]
    assert same == []


def test_colours_are_pinned() -> None:
    """A colour is part of a figure's meaning: changing one is a decision, not a side effect."""
    found = {name: style_of(name).colour for name in ("k1-loss", "k1-reward", "k2-loss", "k3-loss", "k3-both", "k2", "k3")}
    assert found == {
        "k1-loss": "#0072b2",
        "k1-reward": "#003f62",
        "k2-loss": "#009e73",
        "k3-loss": "#d55e00",
        "k3-both": "#eaae80",
        "k2": "#009e73",
        "k3": "#d55e00",
    }


def test_hue_follows_the_kernel_and_lightness_the_placement() -> None:
    for name, estimator in gl.ESTIMATORS.items():
        hue = colors.rgb_to_hsv(colors.to_rgb(HUES[estimator.kernel]))[0]
        assert colors.rgb_to_hsv(colors.to_rgb(style_of(name).colour))[0] == pytest.approx(hue, abs=0.01), name
    k1 = {
        placement: np.mean(colors.to_rgb(style_of(f"k1-{placement}").colour)) for placement in ("reward", "loss", "loss+reward")
    }
    assert k1["reward"] < k1["loss"] < k1["loss+reward"]


def test_composed_names_and_functions_have_a_colour() -> None:
    assert style_of("k2-reward-to_go").colour == style_of("k2-reward").colour != style_of("k2-loss").colour
    assert style_of("k1-loss+reward").colour not in (style_of("k1-loss").colour, style_of("k1-reward").colour)
    assert style_of("my_loss") == style_of("another_loss"), "outside a figure"


def test_estimators_of_the_user_have_colours_of_their_own_within_a_figure() -> None:
    names = [f"loss {i}" for i in range(20)]
    frame = objectives_frame()
    frame = pd.concat([frame[frame["estimator"] == "k3-loss"].assign(estimator=name) for name in names], ignore_index=True)
    looks = []

    @styled
    def figure(frame: pd.DataFrame) -> Figure:
        looks.append([style_of(name) for name in frame["estimator"].unique()])
        return Figure()

    figure(frame)
    figure(frame)
    assert looks[0] == looks[1], "a figure does not depend on the one before"
    assert len(set(looks[0])) == len(names)
    assert len({look.colour for look in looks[0]}) == len(OTHERS)
    assert style_of("loss 0") == style_of("loss 1"), "nothing is left behind"


#: Every public function that draws a frame.
DRAWING = [name for name in gl.plots.__all__ if signature_of(name).return_annotation == "Figure"]


@pytest.mark.parametrize("name", DRAWING)
def test_a_frame_that_cannot_be_drawn_is_told_what_it_lacks(name: str) -> None:
    kinds = {"pd.DataFrame": pd.DataFrame({"nothing": [1.0]}), "Sequence[str]": ["k2-loss"], "str": "bias", "float": 1.0}
    kinds["Sequence[tuple[str, Sequence[str]]]"] = [("group", ["k2-loss"])]
    required = [p for p in signature_of(name).parameters.values() if p.default is p.empty]
    given = [kinds.get(p.annotation, {"k2-loss": 1.0}) for p in required]
    draw = getattr(gl.plots, name)
    with pytest.raises(ValueError, match=rf"the frame has no .*; it has nothing\. What is drawn is told by plots\.{name}: "):
        draw(*given)
    with pytest.raises(ValueError, match=f"there is no frame to draw; plots.{name}: "):
        draw(*[None] * len(given))
    with pytest.raises(ValueError, match="a frame without rows"):
        draw(*[item.head(0) if isinstance(item, pd.DataFrame) else item for item in given])


def test_frames_of_the_package_are_drawn_as_they_come() -> None:
    tree = gl.Tree.random(3, 2)
    scenarios = [gl.Scenario(tree, tree.perturbed(kl=kl)) for kl in (0.1, 0.5)]
    frame = gl.measure(["k2-loss", "k3-loss"], scenarios)
    assert len(gl.plots.crossovers(frame).axes) == 1
    assert len(gl.plots.crossovers(gl.measure(["k2-loss", "k3-loss"], scenarios, samples=2000)).axes) == 1
    assert gl.plots.objectives(frame).axes
    drawn = gl.plots.field(gl.field(["k2-loss", "k3-loss"], gl.simplex(8)[[f"policy_{v}" for v in range(3)]], [0.2, 0.3, 0.5]))
    assert [ax.get_title(loc="left") for ax in drawn.axes] == ["a  k2-loss", "b  k3-loss", "c  k3-loss, logits"]


#: Colour-vision deficiencies at full severity, in linear RGB: Machado, Oliveira & Fernandes (2009).
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]),
}


def lab(colour: str, deficiency: np.ndarray) -> np.ndarray:
    rgb = np.array(colors.to_rgb(colour))
    linear = np.clip(deficiency @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4), 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = np.cbrt(xyz / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_hues_stay_apart_for_colour_blind_readers(deficiency: str) -> None:
    hues = sorted(set(HUES.values()))
    apart = min(
        np.linalg.norm(lab(a, DEFICIENCIES[deficiency]) - lab(b, DEFICIENCIES[deficiency])) for a, b in combinations(hues, 2)
    )
    assert apart > 10  # ΔE of 2.3 is just noticeable


# ---- what is drawn ------------------------------------------------------------------------------------------------------


def open_and_filled(figure: Figure, name: str) -> tuple[int, int]:
    """Number of open and of filled points in an estimator's colour and marker, over all panels."""
    look, counts = style_of(name), [0, 0]
    for ax in figure.axes:
        for line in ax.lines:
            if line.get_color() == look.colour and line.get_marker() == look.marker:
                counts[line.get_markerfacecolor() == look.colour] += len(line.get_xdata())
    return counts[0], counts[1]


def test_schulman_draws_every_row_once() -> None:
    figure = gl.plots.schulman(schulman_frame())
    for kernel in ("k1", "k2", "k3"):
        assert open_and_filled(figure, kernel) == (4, 4)  # 2 scenarios × 2 panels, sampled and exact
    assert [len(ax.containers) for ax in figure.axes] == [6, 6]  # error bars
    ticks = [line for ax in figure.axes for line in ax.lines if line.get_marker() == "|" and len(line.get_xdata()) == 1]
    assert len([line for line in ticks if line.get_color() == "black"]) == 6  # closed forms of one scenario


def test_schulman_puts_points_where_the_frame_says() -> None:
    frame = schulman_frame()
    figure = gl.plots.schulman(frame)
    points = [line for line in figure.axes[1].lines if line.get_marker() == "o" and line.get_color() == style_of("k3").colour]
    drawn = sorted(float(line.get_xdata()[0]) for line in points if line.get_markerfacecolor() != "white")
    exact = frame[(frame["kernel"] == "k3") & (frame["via"] == "exact")]["std"]
    assert drawn == pytest.approx(sorted(exact))


def test_crossover_draws_one_line_per_scenario_and_a_dot_where_they_cross() -> None:
    first, second, third = gl.plots.crossover(crossover_frame()).axes
    assert [line.get_color() for line in first.lines[:3]] == [style_of(kernel).colour for kernel in ("k1", "k2", "k3")]
    for ax, lines, dots in ((second, 2, 1), (third, 6, 6)):
        curves = [line for line in ax.lines if line.get_color() == HUES["k3"] and len(line.get_xdata()) > 1]
        points = [line for line in ax.lines if line.get_marker() == "o"]
        assert (len(curves), len(points)) == (lines, dots)
    assert "0.600 nats" in "".join(text.get_text() for text in first.texts)


def test_gradients_and_tokens_show_truth_exact_and_sampled() -> None:
    frame = components_frame()
    for figure in (gl.plots.gradients(frame), gl.plots.tokens(frame)):
        for name in NAMES:
            assert open_and_filled(figure, name) == (4, 4)
    truths = [ax.lines[0] for ax in gl.plots.gradients(frame).axes]
    assert [float(line.get_xdata()[0]) for line in truths] == pytest.approx(list(frame["truth"][:4]))
    assert {line.get_color() for line in truths} == {"black"}


def test_tokens_shades_flipped_signs_only() -> None:
    frame = components_frame()
    assert len(gl.plots.tokens(frame).axes[0].patches) == 1
    assert len(gl.plots.tokens(frame.assign(ratio=frame["ratio"].abs())).axes[0].patches) == 0


def test_coefficients_draws_a_curve_per_estimator_and_leaves_a_gap_at_a_clamp() -> None:
    plain, clamped, asymmetry = gl.plots.coefficients(coefficients_frame()).axes
    for ax in (plain, clamped, asymmetry):
        assert {style_of(name).colour for name in ("k2-loss", "k3-loss")} <= {line.get_color() for line in ax.lines}
    gaps = [sum(int(np.isnan(np.asarray(line.get_ydata(), dtype=float)).sum()) for line in ax.lines) for ax in (plain, clamped)]
    assert gaps == [0, 2]


def test_objectives_fills_what_is_descended() -> None:
    ax = gl.plots.objectives(objectives_frame()).axes[0]
    assert [text.get_text() for text in ax.texts].count("0") == len(ax.patches) == 3  # k1-reward, k2-loss; k3-loss forward
    assert {patch.get_facecolor() for patch in ax.patches} == {
        colors.to_rgba(style_of(name).colour) for name in ("k1-reward", "k2-loss", "k3-loss")
    }


def test_field_shades_only_where_a_step_raises_the_kl() -> None:
    frame = field_frame()
    shaded = [bool(ax.collections and type(ax.collections[0]).__name__ == "TriContourSet") for ax in gl.plots.field(frame).axes]
    assert shaded == [False, True, True, False, False, False]
    falls = frame.assign(rise=-frame["rise"].abs())
    assert not any(type(c).__name__ == "TriContourSet" for ax in gl.plots.field(falls).axes for c in ax.collections)


# ---- all figures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_print_sized_and_legible(name: str) -> None:
    draw, make, width = FIGURES[name]
    with stylesheet():
        figure = draw(make())
        figure.draw_without_rendering()
    assert figure.get_figwidth() == width
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    assert len(texts) > 5
    assert min(text.get_fontsize() for text in texts) >= 7


@pytest.mark.parametrize("name", FIGURES)
def test_figures_leave_their_frame_and_the_users_settings_alone(name: str) -> None:
    draw, make, _ = FIGURES[name]
    frame = make()
    before, settings = frame.copy(deep=True), dict(mpl.rcParams)
    draw(frame)
    pd.testing.assert_frame_equal(frame, before)
    assert dict(mpl.rcParams) == settings


@pytest.mark.parametrize("name", FIGURES)
def test_the_same_frame_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    draw, make, _ = FIGURES[name]
    for folder in ("a", "b"):
        study = gl.report.Study("00_test", output=tmp_path / folder)
        figure, frame = draw(make()), make()
        study.save_figure("00_figure", figure, frame, "A caption.")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["00_figure.csv", "00_figure.md", "00_figure.pdf", "00_figure.png", "00_frames.json"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    pdf = (tmp_path / "a" / "00_figure.pdf").read_bytes()
    assert b"/Type3" not in pdf
    assert b"/CIDFontType2" in pdf
    assert b"CreationDate" not in pdf


def test_saving_changes_nothing_in_a_figure(tmp_path: Path) -> None:
    figure, frame = gl.plots.tokens(components_frame()), components_frame()
    study = gl.report.Study("00_test", output=tmp_path)
    first = study.save_figure("00_figure", figure, frame, "A caption.").read_bytes()
    assert study.save_figure("00_figure", figure, frame, "A caption.").read_bytes() == first
