"""The figure that every drawing is made on: it takes the width, style and colours that are asked for, and arranges its panels.

A drawing is written for one width. Narrower, its columns of panels are stacked, a legend takes more lines and titles are broken, so
that type keeps its size; `arrange` does this when the drawing is done.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import figure
from matplotlib.axes import Axes
from matplotlib.legend import Legend
from matplotlib.text import Text

PACKAGE = Path(__file__).parent.parent
STYLESHEET = PACKAGE / "gradlab.mplstyle"
#: Panels are not made narrower than this, inches.
NARROWEST = 1.45
#: Figures that are stacked are made no taller than this, inches: a page of a journal.
TALLEST = 9.0

#: Width that is asked for, inches, and style sheets that are read after gradlab's own.
_width: ContextVar[float | None] = ContextVar("width", default=None)
_sheets: ContextVar[tuple[Any, ...]] = ContextVar("sheets", default=())


@contextmanager
def stylesheet() -> Iterator[None]:
    """The style sheet, for as long as the block lasts; a figure is made and saved under it.

    >>> import matplotlib
    >>> before = matplotlib.rcParams["axes.spines.top"]
    >>> with gl.plots.stylesheet():
    ...     inside = matplotlib.rcParams["axes.spines.top"]
    >>> before, inside
    (True, False)
    """
    with mpl.rc_context(fname=STYLESHEET):
        for sheet in _sheets.get():
            mpl.rcParams.update(sheet)
        yield


@contextmanager
def arranged(width: float | None, sheets: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Draw at this width and with these settings beside the style sheet's, for as long as the block lasts."""
    tokens = _width.set(width), _sheets.set((*_sheets.get(), *sheets))
    try:
        yield
    finally:
        _width.reset(tokens[0])
        _sheets.reset(tokens[1])


class Figure(figure.Figure):
    """A matplotlib figure of the width that is asked for; a notebook shows it as a picture.

    >>> figure = gl.plots.tokens(gl.claims.load("figures", ["03_tokens"])["03_tokens"])
    >>> figure._repr_png_()[1:4]
    b'PNG'
    """

    def __init__(self, figsize: tuple[float, float], **kwargs: Any) -> None:
        self.designed = figsize[0]
        self._sheets = _sheets.get()
        self._height = figsize[1]
        #: Panels whose columns are stacked: how many stand beside each other, and whether columns have an axis x and rows an axis y.
        self._stacked: list[tuple[Any, int, bool, bool]] = []
        super().__init__(figsize=(_width.get() or figsize[0], figsize[1]), **kwargs)

    def subplots(  # type: ignore[override]
        self,
        nrows: int = 1,
        ncols: int = 1,
        *,
        sharex: bool | str = False,
        sharey: bool | str = False,
        squeeze: bool = True,
        width_ratios: Sequence[float] | None = None,
        columns: int | None = None,
    ) -> Any:
        """Panels as matplotlib's, by their rows and columns as drawn; where they do not fit, columns are stacked.

        columns: how many of them stand beside each other; found from the width if not given.
        """
        narrow = self.get_figwidth() / self.designed
        beside = columns or max(1, min(ncols, round(ncols * narrow), int(self.get_figwidth() / NARROWEST)))
        beside, lines = (ncols, 1) if narrow >= 1 else (beside, -(-ncols // beside))
        grid = self.add_gridspec(lines * nrows, beside, width_ratios=width_ratios if lines == 1 else None)
        axes = np.empty((nrows, ncols), dtype=object)
        for i in range(nrows):
            for j in range(ncols):
                line, column = divmod(j, beside)
                shared = {key: _first(axes, i, j, how) for key, how in (("sharex", sharex), ("sharey", sharey)) if how}
                axes[i, j] = self.add_subplot(grid[i * lines + line, column], **shared)
                if sharey in (True, "row", "all") and column:
                    axes[i, j].tick_params(labelleft=False)
                above = i < nrows - 1 or j + beside < ncols
                if (above and sharex in (True, "all")) or (i < nrows - 1 and sharex == "col" and lines == 1):
                    axes[i, j].tick_params(labelbottom=False)
        if lines > 1:
            self._stacked.append((axes, beside, sharex == "col", sharey in (True, "row", "all")))
            self.set_figheight(self.get_figheight() + (lines - 1) * max(self.get_figheight() - 0.35, 0.6))
        if not squeeze:
            return axes
        return axes.item() if axes.size == 1 else axes.squeeze()

    def legend(self, *args: Any, **kwargs: Any) -> Legend:
        """A legend as matplotlib's, of as many columns as fit; what is stacked below each other makes the figure taller."""
        made = super().legend(*args, **kwargs)
        columns, height = min(kwargs.get("ncols", 1), len(made.get_texts())), made.get_window_extent().height
        while columns > 1 and made.get_window_extent().width > self.bbox.width:
            columns -= 1
            made.remove()
            made = super().legend(*args, **{**kwargs, "ncols": columns})
        self.set_figheight(self.get_figheight() + (made.get_window_extent().height - height) / self.dpi)
        return made

    def arrange(self) -> None:
        """Label the lines that were made by stacking, and break titles and labels that are longer than their panels."""
        for axes, beside, own_x, shared_y in self._stacked:
            for (i, j), ax in np.ndenumerate(axes):
                if own_x and not ax.get_xlabel():
                    ax.set_xlabel(axes[-1, j].get_xlabel())
                if j and j % beside == 0:
                    ax.tick_params(labelleft=True)
                    if shared_y and not ax.get_ylabel():
                        ax.set_ylabel(axes[i, 0].get_ylabel(), fontweight=axes[i, 0].yaxis.label.get_fontweight())
        self.set_figheight(min(self.get_figheight(), max(TALLEST, self._height)))
        engine = self.get_layout_engine()
        if engine is not None:
            engine.execute(self)
        for ax in self.axes:
            for title in (ax._left_title, ax.title):  # type: ignore[attr-defined]
                _break(title, self._room(ax))
            _break(ax.xaxis.label, ax.get_window_extent().width * 1.1)
            _break(ax.yaxis.label, ax.get_window_extent().height * 1.05, upright=True)
            _thin(ax)

    def _room(self, ax: Axes) -> float:
        """Width for a title, pixels: up to the next panel on the right, or the edge."""
        box = ax.get_window_extent()
        right = [other.get_window_extent().x0 for other in self.axes if _beside(box, other.get_window_extent())]
        return float(min([*right, self.bbox.width]) - box.x0 - 0.03 * self.dpi)

    def savefig(self, fname: Any, **kwargs: Any) -> None:
        """Save as matplotlib does, under the style sheet that the figure was drawn under."""
        token = _sheets.set(self._sheets)
        try:
            with stylesheet():
                super().savefig(fname, **kwargs)
        finally:
            _sheets.reset(token)

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        with io.BytesIO() as picture:
            self.savefig(picture, format="png", dpi=150)
            return picture.getvalue()


def _first(axes: np.ndarray[Any, Any], i: int, j: int, how: bool | str) -> Axes | None:
    """The panel whose axis is shared: the first of all, of the row, or of the column."""
    first: Axes | None = {"row": axes[i, 0], "col": axes[0, j]}.get(str(how), axes[0, 0])
    return first


def _beside(box: Any, other: Any) -> bool:
    """Whether another panel stands to the right, at the same height."""
    return bool(other.x0 > box.x1 - 1 and other.y0 < box.y1 and other.y1 > box.y0)


def _break(text: Text, room: float, upright: bool = False) -> None:
    """Break a text into lines that are no longer than the room, at spaces."""
    said = text.get_text()
    if not said or text.get_window_extent().width * (not upright) + text.get_window_extent().height * upright <= room:
        return
    words, lines = said.replace("\n", " ").split(" "), [""]
    for word in words:
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        text.set_text(longer)
        box = text.get_window_extent()
        if lines[-1].strip() and (box.height if upright else box.width) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    text.set_text("\n".join(line.strip() if k else line for k, line in enumerate(lines)))


def _thin(ax: Axes) -> None:
    """Leave out every other label of a horizontal axis of numbers while they overlap."""
    labels = [label for label in ax.get_xticklabels() if label.get_text() and label.get_visible()]
    ticks = ax.get_xticks()
    for step in (2, 3):
        boxes = [label.get_window_extent() for label in labels]
        crowded = any(b.x0 < a.x1 + 1 for a, b in pairwise(boxes) if a.y0 < b.y1 and b.y0 < a.y1)
        if not crowded or len(labels) != len(ticks) or any(label.get_rotation() for label in labels):
            return
        ax.set_xticks(ticks, [label.get_text() if k % step == 0 else "" for k, label in enumerate(labels)])
        labels = [label for label in ax.get_xticklabels() if label.get_text()]
        ticks = ticks[::step]
