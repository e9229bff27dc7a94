"""A lesson: a script of the form `N_name.py` in percent form, the checks of its exercises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradlab._common.arguments import check_columns, checked
from gradlab._common.names import check_name

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Reply:
    """What an answer is told: whether it is right, and why it is, or a hint that fits it.

    >>> from gradlab.lessons import Reply
    >>> print(Reply(False, "Look at the sign."))
    Not yet. Look at the sign.
    """

    right: bool
    text: str

    def __str__(self) -> str:
        return f"{'Right.' if self.right else 'Not yet.'} {self.text}"


#: The check of an answer. Its docstring is the question; it measures what is right, and knows no answer by heart.
Exercise = Callable[[Any], Reply]


@dataclass(frozen=True)
class Lesson:
    """A lesson: `check` tells whether an answer to one of its exercises is right, or gives a hint.

    >>> one = gl.lesson(1)
    >>> one.name, list(one.exercises)
    ('1_value_or_gradient', ['guess', 'overtakes', 'raises'])
    """

    path: Path

    @property
    def name(self) -> str:
        """Name of the script without its suffix."""
        return self.path.stem

    @property
    def number(self) -> int:
        """Place in the order in which the lessons build on each other."""
        return int(self.name.partition("_")[0])

    @property
    def title(self) -> str:
        """First heading of the script."""
        return next(line[4:] for line in self.path.read_text(encoding="utf-8").splitlines() if line.startswith("# # "))

    @property
    def exercises(self) -> dict[str, Exercise]:
        """Checks by name, in the order of the lesson."""
        module = import_module(f"gradlab.lessons.{self.name.partition('_')[2]}")
        found: dict[str, Exercise] = {name: getattr(module, name) for name in module.EXERCISES}
        return found

    def show(self, frame: pd.DataFrame, *columns: str, digits: int = 4) -> None:
        """Print columns of a frame, all if none are named, with so many digits behind the point.

        Raises `ValueError` for a column that the frame does not have.

        >>> gl.lesson(1).show(gl.values("k2", gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(1, 1))), "kernel", "kl", "bias")
        kernel  kl  bias
            k2 0.5  0.25
        """
        check_columns(frame, *columns)
        shown = frame[list(columns)] if columns else frame
        floats = {name: column.round(digits) + 0.0 for name, column in shown.items() if column.dtype.kind == "f"}
        print(shown.assign(**{str(name): column for name, column in floats.items()}).to_string(index=False))

    def check(self, exercise: str, answer: object) -> Reply:
        """Check an answer, print what is said to it, and return that.

        Nothing is settled beforehand: what is right is measured when it is asked. `None` is no answer yet. Raises `ValueError` for an
        exercise that the lesson does not have.

        >>> told = gl.lesson(1).check("guess", "k1")
        Not yet. As a loss k1 has a relative bias of 1.00: its expected gradient is 0.
        """
        checks = self.exercises
        check_name("exercise", exercise, checks)
        if answer is None:
            question = " ".join((checks[exercise].__doc__ or "").split())
            reply = Reply(False, f"There is no answer yet. {question}")
        else:
            try:
                reply = checks[exercise](answer)
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                reply = Reply(False, f"{answer!r} cannot be an answer: {error}")
        print(reply)
        return reply


def lessons() -> dict[int, Lesson]:
    """All lessons by number: those of the source tree, or those packed with the installed package.

    Raises `ValueError` when they are not found.

    >>> from gradlab.lessons import lessons
    >>> min(lessons())
    1
    """
    package = Path(__file__).parents[1]
    for folder in (package / "_analyses" / "lessons", package.parent / "analyses" / "lessons"):
        found = sorted(folder.glob("[0-9]_*.py"))
        if found:
            return {item.number: item for item in map(Lesson, found)}
    raise ValueError("no lessons found beside the package; reinstall gradlab-kl")


@checked
def lesson(number: int) -> Lesson:
    """One lesson. Raises `ValueError` for a number that there is not.

    >>> gl.lesson(1).name
    '1_value_or_gradient'
    """
    known = lessons()
    if number not in known:
        raise ValueError(f"there is no lesson {number!r}; there are {', '.join(map(str, known))}")
    return known[number]
