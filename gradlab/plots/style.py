"""The look of every figure: the style sheet, one colour and marker per estimator, one line style per way of measuring."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradlab.estimators.catalogue import CATALOGUE, ESTIMATORS
from gradlab.estimators.estimator import Estimator
from gradlab.estimators.kernels import KERNELS
from gradlab.plots.canvas import STYLESHEET, arranged
from gradlab.plots.canvas import Figure as Figure
from gradlab.plots.canvas import stylesheet as stylesheet

#: Widths in inches of a column and of a page.
COLUMN, PAGE = 3.3, 6.9

#: Hue = kernel: the Okabe–Ito palette, safe for colour-blind readers; its yellow is darkened until it reads as brown.
HUES: dict[str, str] = {
    "k1": "#0072B2",
    "k2": "#009E73",
    "k3": "#D55E00",
    "full": "#CC79A7",
    "k3_swapped": "#E69F00",
    "mse": "#56B4E9",
    "mse_sampled": "#56B4E9",
    "abs": "#5A4A00",
}
#: Lightness = placement: 0 is the hue itself, negative is mixed with black, positive with white.
LIGHTNESS = {"loss": 0.0, "straight_through": 0.25, "reward": -0.45, "loss+reward": 0.5}
#: What is no estimator, or stands for none.
NEUTRAL = "#666666"
#: Estimators that are not of the package: Paul Tol's muted palette, safe for colour-blind readers.
OTHERS = ("#332288", "#CC6677", "#117733", "#88CCEE", "#882255", "#999933", "#AA4499", "#44AA99", "#DDCC77")
#: Truth is a reference line.
TRUTH: dict[str, Any] = {"color": "black", "linewidth": 0.9, "zorder": 1.5}
#: Line style = how a number was measured.
VIA = {"exact": "-", "sampled": "--", "closed form": ":"}

#: Names that are not of the package in the order in which the figure at hand met them.
_met: ContextVar[dict[str, int] | None] = ContextVar("met", default=None)

#: Colours of the kernels, where others than `HUES` are asked for.
_hues: ContextVar[dict[str, str] | None] = ContextVar("hues", default=None)

F = TypeVar("F", bound=Callable[..., Figure])


@dataclass(frozen=True)
class Style:
    """Colour and marker of an estimator; no two estimators of the catalogue share both.

    >>> gl.plots.Style("#d55e00", "o") == gl.plots.style_of("k3-loss")
    True
    """

    colour: str
    marker: str


def style_of(name: str) -> Style:
    """Colour and marker of a catalogue name, a kernel, or a composed name such as `k2-reward-to_go`.

    A registered estimator has the colour it was registered with, or one of `OTHERS` that it keeps. Other names, such as those of a
    user's functions, get the colours of `OTHERS` in the order in which a figure meets them, and another marker when those are used
    up; grey outside a figure.

    >>> gl.plots.style_of("k3-loss")
    Style(colour='#d55e00', marker='o')
    """
    if name in CATALOGUE:
        return _of_registered(name) if name in CATALOGUE.added else look_of(ESTIMATORS[name])
    kernel, _, placement = name.partition("-")
    if kernel not in HUES:
        met = _met.get()
        if met is None or name == "none":
            return Style(NEUTRAL, "o")
        marker, colour = divmod(met.setdefault(name, len(CATALOGUE.added) + len(met)), len(OTHERS))
        return Style(OTHERS[colour], "osD^vPX*"[marker % 8])
    placed = max((p for p in LIGHTNESS if placement.startswith(p)), key=len, default="loss")
    return Style(_shade(hue(kernel), LIGHTNESS[placed]), "o")


def look_of(estimator: Estimator) -> Style:
    """Colour and marker of a composition, whatever it is called."""
    return Style(_shade(hue(estimator.kernel), LIGHTNESS[estimator.placement]), _marker(estimator))


def hue(kernel: str) -> str:
    """The hue of a kernel; of a registered one, a colour of `OTHERS` that it keeps."""
    hues = _hues.get() or HUES
    return hues[kernel] if kernel in HUES else OTHERS[list(KERNELS).index(kernel) % len(OTHERS)]


def _of_registered(name: str) -> Style:
    place = list(CATALOGUE.added).index(name)
    colour = CATALOGUE[name].colour or OTHERS[place % len(OTHERS)]
    return Style(colour, "osD^vPX*"[place // len(OTHERS) % 8])


def _marker(e: Estimator) -> str:
    """Marker = what distinguishes estimators of one kernel and placement: baseline, clip, normaliser, weight, credit."""
    if e.baseline is not None:
        return {"kl": "*", "group_mean": "X", "leave_one_out": "P"}[e.baseline]
    if e.clip is not None:
        return "8"
    if e.normalise != "sum":
        return "p"
    if e.weight != "none":
        return {"token": "<>", "prefix": "dH", "sequence": "hh"}[e.weight][e.differentiate_weight]
    per_token = "P" if e.on_vocabulary else "s" if e.placement == "reward" else "o"
    return {"token": per_token, "to_go": "^", "return": "v", "sequence": "D"}[e.credit]


def _shade(colour: str, amount: float) -> str:
    """Mix with white (positive) or black (negative)."""
    end = 1.0 if amount > 0 else 0.0
    red, green, blue = ((1 - abs(amount)) * part + abs(amount) * end for part in colors.to_rgb(colour))
    return colors.to_hex((red, green, blue))


@contextmanager
def restyled(width: float | None, style: str | Path | None, palette: str | Sequence[str] | None) -> Iterator[None]:
    """Draw at this width, under this style sheet and in these colours, for as long as the block lasts; see `gl.figure`."""
    sheets = [] if style is None else [_sheet(style)]
    found = None if palette is None else _palette(palette)
    if width is not None and not 2 <= width < 100:
        raise ValueError(f"a width is in inches, at least 2, got {width:g}; a column is {COLUMN:g} and a page {PAGE:g}")
    if found is not None:
        sheets.append({"axes.prop_cycle": cycler(color=found)})
    token = _hues.set(None if found is None else dict(zip(HUES, cycle(found), strict=False)))
    try:
        with arranged(width, sheets):
            yield
    finally:
        _hues.reset(token)


def _sheet(style: str | Path) -> dict[str, Any]:
    """The settings of a style sheet: a file, one of gradlab's, or one that matplotlib knows."""
    from matplotlib import style as known

    own = {path.stem: path for path in STYLESHEET.parent.glob("*.mplstyle")}
    if str(style) in known.library:
        settings: Any = known.library[str(style)]
        return dict(settings)
    path = own.get(str(style), Path(style))
    if not path.is_file():
        raise ValueError(f"{style} is neither a file nor a known style; known: {', '.join([*own, *known.library])}")
    settings = mpl.rc_params_from_file(path, use_default_template=False)
    return dict(settings)


def _palette(palette: str | Sequence[str]) -> list[str]:
    """Colours of a palette: a name that seaborn knows, or a list."""
    listed = palette.split(",") if isinstance(palette, str) else list(palette)
    if isinstance(palette, str) and not colors.is_color_like(listed[0]):
        from seaborn import color_palette

        with suppress(ValueError):
            listed = [colors.to_hex(colour) for colour in color_palette(palette, len(set(HUES.values())))]
    wrong = [colour for colour in listed if not colors.is_color_like(colour)]
    if wrong or not listed:
        raise ValueError(
            f"a palette is colours such as #0072B2, or a name that seaborn knows; got {', '.join(map(str, wrong))}"
        )
    return [colors.to_hex(colour) for colour in listed]


def styled(function: F) -> F:
    """Make a function draw its figure under the style sheet, and say what is missing from a frame that it cannot draw.

    Raises `ValueError` for anything but frames, for one without rows, and for one without a column that is read.

    >>> from gradlab.plots import Figure
    >>> @gl.plots.styled
    ... def bars(frame):
    ...     figure = Figure(figsize=(3.3, 2))
    ...     figure.subplots().bar(frame["estimator"], frame["bias"])
    ...     return figure
    >>> frame = gl.measure(["k2-loss", "k3-loss"], gl.Scenario(gl.Bandit([0, 0]), gl.Bandit([0, 1])))
    >>> len(bars(frame).axes)
    1
    """

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Figure:
        given = [item for item in (*args, *kwargs.values()) if isinstance(item, pd.DataFrame)]
        reads = " ".join((function.__doc__ or "").split())
        told = f"plots.{function.__name__}: {reads}"
        if not given or not len(given[0]):
            raise ValueError(f"there is {'no frame' if not given else 'a frame without rows'} to draw; {told}")
        token = _met.set({})
        try:
            with stylesheet():
                figure = function(*args, **kwargs)
                if isinstance(figure, Figure):
                    figure.arrange()
                return figure
        except KeyError as error:
            asked = error.args[0] if error.args else ""
            raise ValueError(
                f"the frame has no {asked!r}; it has {', '.join(map(str, given[0].columns))}. What is drawn is told by {told}"
            ) from error
        finally:
            _met.reset(token)

    return wrapper  # type: ignore[return-value]


def small() -> Any:
    """Size of type in a figure: of what is written beside lines and in cells."""
    return mpl.rcParams["legend.fontsize"]


def panels(axes: Iterable[Axes]) -> None:
    """Letter the panels of a figure, in front of their titles."""
    for letter, ax in zip("abcdefghijkl", axes, strict=False):
        ax.set_title(f"{letter}  {ax.get_title(loc='left')}")


def handle(name: str, **kwargs: Any) -> Line2D:
    """Legend entry of an estimator."""
    look = style_of(name)
    return Line2D([], [], **{"color": look.colour, "marker": look.marker, "label": name, **kwargs})


def number(rows: pd.DataFrame, row: str, column: str) -> float:
    """One cell of a frame as a float."""
    return float(rows[column].to_dict()[row])


def dots(ax: Axes, x: Any, y: Any, name: str, via: str = "exact", error: Any = None, **kwargs: Any) -> None:
    """Points of an estimator: filled where exact, open with (horizontal) error bars `error` `[2, n]` where sampled.

    The end of an interval that is open is not drawn.
    """
    look = style_of(name)
    exact = via != "sampled"
    fill = look.colour if exact else "white"
    common = {"color": look.colour, "marker": look.marker, "markerfacecolor": fill, "markeredgewidth": 0.8, "linestyle": "none"}
    if exact:
        ax.plot(x, y, **{**common, **kwargs})
    else:
        known: dict[str, Any] = {
            key: np.where(np.isfinite(half_widths), half_widths, np.nan) for key, half_widths in (error or {}).items()
        }
        ax.errorbar(x, y, elinewidth=0.8, **{**common, **kwargs}, **known)
