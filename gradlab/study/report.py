"""The output of an analysis: pictures, the data plotted, captions; each file is written whole or not at all."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
import torch
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from gradlab._common import frames
from gradlab._common.arguments import check_columns, checked
from gradlab._common.console import wide_console
from gradlab._common.files import atomic_write as atomic_write
from gradlab._common.files import ensure_writable as ensure_writable
from gradlab._common.files import ensure_writable_file as ensure_writable_file
from gradlab._common.provenance import versions
from gradlab._common.streams import child, generator
from gradlab.ledger import verify

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Columns of a settled ledger that are read here.
SETTLED = ("id", "scope", "frame", "statement", "published", "source", "verdict")

T = TypeVar("T")

#: A caption is read under its picture; what is longer stands in the notes beside it.
CAPTION_WORDS = 80

#: Nothing that differs between two runs of one command may enter a file.
METADATA: dict[str, dict[str, str | None]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "ModDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None},
}


@dataclass(frozen=True)
class Study:
    """One run of one analysis: where it writes, how large it is, how many processes it may use, and its entropy.

    >>> study = gl.report.Study("20_mine", quick=True)
    >>> study.pick(full=100, quick=10), study.command
    (10, 'gradlab reproduce --only 20_mine --quick')
    """

    name: str
    output: Path = Path("figures")
    quick: bool = False
    jobs: int = 1
    seed: int = 0

    def pick(self, full: T, quick: T) -> T:
        """Return the size for this run: `quick` under `--quick`, else `full`."""
        return quick if self.quick else full

    def rng(self, name: str = "", *key: int) -> np.random.Generator:
        """The stream of this analysis, or its stream of that name, see `gradlab._common.streams.STREAMS`."""
        return generator(self.seed, ".".join(["analysis", self.name.split("_")[0], *([name] if name else [])]), *key)

    def child(self, number: int) -> int:
        """The seed of a numbered scenario, where a function takes a whole number, see `gradlab._common.streams.child`."""
        return child(self.seed, number)

    @property
    def command(self) -> str:
        """The command that makes these results again."""
        seed = f" --seed {self.seed}" if self.seed else ""
        return f"gradlab reproduce --only {self.name}{' --quick' if self.quick else ''}{seed}"

    def save_frame(self, name: str, frame: pd.DataFrame) -> Path:
        """Write a frame as CSV, see `gradlab._common.frames`."""
        return frames.save(ensure_writable(self.output), name, frame, {"quick": self.quick, "seed": self.seed})

    def save_figure(
        self,
        name: str,
        figure: Figure,
        frame: pd.DataFrame,
        caption: str,
        notes: str = "",
        verdicts: pd.DataFrame | None = None,
    ) -> Path:
        """Write a picture (PNG and PDF), the frame it shows (CSV) and its text (Markdown).

        The text is the `caption`, one paragraph of at most `CAPTION_WORDS` words that is read under the picture, and what the page
        shows beside it: `notes` in Markdown, the figure's verdicts among the settled `verdicts`, and the provenance.
        """
        from gradlab.plots import stylesheet  # who saves a figure has drawn one; nobody else waits for the library

        folder = ensure_writable(self.output)
        for suffix in ("png", "pdf"):
            with atomic_write(folder / f"{name}.{suffix}") as part, stylesheet():
                figure.savefig(part, format=suffix, metadata=METADATA[suffix])
            figure.set_layout_engine("none")  # laid out once: the same picture in every format
        self.save_frame(name, frame)
        stamp = ", ".join(f"{package} {number}" for package, number in versions().items())
        told = "" if verdicts is None else verdict_summary(verdicts[verdicts["figure"] == name])
        told = told and f"Verdicts:\n\n{told}"
        made = f"Made by `{self.command}`, seed {self.seed}, with {stamp}."
        with atomic_write(folder / f"{name}.md") as part:
            part.write_text("\n\n".join(filter(None, (caption, notes, told, made))) + "\n", encoding="utf-8")
        return folder / f"{name}.png"

    def verdicts(self, found: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
        """Settle the claims that these frames decide, print how many of each came out how and return them.

        Raises `ValueError` for a frame that decides no claim.
        """
        settled = verify.verify(found)
        settled = settled[settled["frame"].isin(list(found))].reset_index(drop=True)
        show_verdicts(settled)
        return settled


@checked
def verdict_summary(settled: pd.DataFrame) -> str:
    """A settled ledger as a Markdown list, one item per claim: `* value-k2 HOLDS (Gaussian; bandit), FAILS (…)`.

    >>> settled = gl.claims.verify("figures", only="k3-weaker")
    >>> print(gl.report.verdict_summary(settled[settled["frame"] == "02_coefficients"]))
    * `k3-weaker` HOLDS (over-sampled token (δ < 1)), FAILS (under-sampled token (δ > 1))
    """
    check_columns(settled, *SETTLED)
    items = []
    for name, rows in settled.groupby("id", sort=False):
        in_scope = [f"{verdict} ({'; '.join(part['scope'])})" for verdict, part in rows.groupby("verdict", sort=False)]
        items.append(f"* `{name}` {', '.join(in_scope)}")
    return "\n".join(items)


@checked
def cell(frame: pd.DataFrame, column: str, **where: object) -> Any:
    """The one value of a column in rows with these values, for a caption. Raises `ValueError` unless there is exactly one.

    >>> frame = gl.measure(["k2-loss", "k3-loss"], gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(1, 1)))
    >>> float(round(gl.report.cell(frame, "kl", estimator="k2-loss"), 6))
    0.5
    """
    check_columns(frame, column, *where)
    rows = frame
    for key, value in where.items():
        rows = rows[rows[key] == value]
    values = rows[column].drop_duplicates()
    if len(values) != 1:
        raise ValueError(f"{column} has {len(values)} values where {where}, expected one")
    return values.iloc[0]


@checked
def unbiased(frame: pd.DataFrame) -> dict[str, list[str]]:
    """The estimators whose `bias` is 0 to rounding in every row of a target, for each target that has some.

    >>> scenario = gl.Scenario(gl.Bandit([0, 0, 0]), gl.Bandit([0, 1, 2]))
    >>> gl.report.unbiased(gl.measure(["k2-loss", "k3-loss", "k1-reward"], scenario))
    {'reverse_kl': ['k2-loss', 'k1-reward']}
    """
    check_columns(frame, "target", "estimator", "bias")
    worst = frame.groupby(["target", "estimator"], sort=False)["bias"].max()
    zero = worst[worst < verify.EQUALITY_TOLERANCE].reset_index()
    return {str(target): list(names) for target, names in zero.groupby("target", sort=False)["estimator"]}


def study(script: str) -> Study:
    """The `Study` of an analysis script, from its name or file and the command line (`--quick --jobs --seed --output`).

    A notebook knows no file of its own, so that a script which is opened as one gives its name.

    >>> gl.report.study("20_mine").name
    '20_mine'
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, description=f"Run the analysis {Path(script).stem}.")
    parser.add_argument("--quick", action="store_true", help="a smaller version that finishes in seconds")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes")
    parser.add_argument("--seed", type=int, default=0, help="entropy of every draw")
    parser.add_argument("--output", type=Path, default=Path("figures"), help="folder for pictures and data")
    given, _ = parser.parse_known_args(sys.argv[1:])  # a notebook's own arguments are not ours
    torch.set_num_threads(1)  # small tensors run faster so, and sums come out the same on every machine
    return Study(Path(script).stem, given.output, given.quick, given.jobs, given.seed)


_COLOURS = {"HOLDS": "green", "FAILS": "red", "UNDECIDED": "yellow", "OPEN": "dim"}


@checked
def show_verdicts(settled: pd.DataFrame) -> None:
    """Print a settled ledger on one screen: a line for every topic, with how many of its scopes came out how, and the sum.

    >>> gl.report.show_verdicts(gl.claims.verify("figures", only="clamp"))  # doctest: +NORMALIZE_WHITESPACE
    claim  published                                         HOLDS  FAILS  UNDECIDED  OPEN
    clamp  clamping the log-ratio or the kernel is harmless      2      3
    5 verdicts: 2 HOLDS, 3 FAILS. `gradlab claims ID` tells the scopes and the evidence.
    """
    check_columns(settled, *SETTLED)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("claim", no_wrap=True)
    table.add_column("published", no_wrap=True, overflow="ellipsis", ratio=1)
    for verdict, colour in _COLOURS.items():
        table.add_column(verdict, justify="right", style=colour)
    for row in verify.summary(settled).to_dict("records"):
        table.add_row(row["id"], escape(row["published"]), *(str(row[verdict] or "") for verdict in _COLOURS))
    console = wide_console()
    console.print(table)
    counts = settled["verdict"].value_counts()
    counts_text = ", ".join(f"{counts[verdict]} {verdict}" for verdict in _COLOURS if verdict in counts)
    console.print(
        f"{len(settled)} verdicts: {counts_text}. `gradlab claims ID` tells the scopes and the evidence.", highlight=False
    )


@checked
def show_claims(settled: pd.DataFrame) -> None:
    """Print a settled ledger in full: every claim's sentence, and for each scope its verdict, what decides, and the row that did.

    >>> gl.report.show_claims(gl.claims.verify("figures", only="clamp"))  # doctest: +ELLIPSIS
    clamp: clamping the log-ratio or the kernel is harmless (implied by common defaults of training frameworks)
    ...
    """
    check_columns(settled, *SETTLED)
    console = wide_console()
    for topic, rows in settled.groupby(settled["id"].str.split(".").str[0], sort=False):
        first = rows.iloc[0]
        console.print(f"[bold]{topic}[/]: {escape(first['published'])} [dim]({escape(first['source'])})[/]", highlight=False)
        for name, part in rows.groupby("id", sort=False):
            table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, title_justify="left", title_style="")
            table.title = f"[bold]{name}[/]: {escape(part['statement'].iloc[0])}"
            for heading in ("verdict", "scope", "rule", "effect", "decided by", "figure"):
                table.add_column(heading, overflow="fold")
            for row in part.to_dict("records"):
                verdict = f"[{_COLOURS[row['verdict']]}]{row['verdict']}[/]"
                rule = row["rule"].replace(f" row of {row['frame']} has", "")
                table.add_row(verdict, *map(escape, (row["scope"], rule, _effect(row), _evidence(row), row["figure"])))
            console.print(table)


def _effect(row: Mapping[Any, Any]) -> str:
    """The decisive number, its interval where it has one, and the number of samples that could decide where this did not."""
    if pd.isna(row["effect"]):
        return ""
    interval = "" if row["low"] == row["high"] or pd.isna(row["low"]) else f" [{row['low']:.3g}, {row['high']:.3g}]"
    needed = "" if pd.isna(row["samples_needed"]) else f"; {row['samples_needed']:,} samples could decide"
    return f"{row['effect']:.4g}{interval}{needed}"


def _evidence(row: Mapping[Any, Any]) -> str:
    """The row that decided, and how many there are."""
    if not row["rows"]:
        return ""
    several = f", {row['distinct']} distinct numbers" if 1 < row["distinct"] < row["rows"] else ""
    return f"{row['evidence']} ({row['rows']} row{'s' * (row['rows'] > 1)}{several})"
