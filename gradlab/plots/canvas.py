"""The figure that every drawing is made on: a picture in a notebook."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib as mpl
from matplotlib import figure

STYLESHEET = Path(__file__).parent.parent / "gradlab.mplstyle"


class Figure(figure.Figure):
    """A matplotlib figure that a notebook shows as a picture.

    >>> figure = gl.plots.tokens(gl.claims.load("figures", ["03_tokens"])["03_tokens"])
    >>> figure._repr_png_()[1:4]
    b'PNG'
    """

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        with mpl.rc_context(fname=STYLESHEET), io.BytesIO() as picture:
            self.savefig(picture, format="png", dpi=150)
            return picture.getvalue()
