"""The output of an inspection: a screen in the terminal, JSON, and a page with figures."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.markup import escape
from rich.table import Table

from gradlab._common.console import wide_console
from gradlab._common.files import atomic_write, ensure_writable
from gradlab._common.provenance import versions
from gradlab.records.inspection import Inspection
from gradlab.records.sentences import interval
from gradlab.study import pages

if TYPE_CHECKING:
    from gradlab.plots import Figure

#: Estimators that the screen shows; the page shows all.
SHOWN = ("k1-loss", "k2-loss", "k3-loss", "k1-reward-to-go", "k3-both")
#: Rows of a table of the screen.
ROWS = 8


def show(found: Inspection) -> None:
    """Print what a person reads in a minute: faults, the KL, the tokens that make it up, estimators, weights, engine and steps."""
    console = wide_console()
    row = found["overview"].to_dict("records")[0]
    console.print(f"[bold]{escape(found.source or 'records')}[/] ({row['format']}): {overview(row)}", highlight=False)
    for finding in found.findings:
        mark = "[red]FAULT[/]" if finding.serious else "[yellow]note[/]"
        console.print(f"{mark} {escape(finding.fault)}: {escape(finding.sentence)}", highlight=False)
    if not found.findings:
        console.print("[green]no fault was found[/]")
    for line in found.withheld:
        console.print(f"[red]{escape(line)}[/]", highlight=False)
    for subject, sentences in found.sentences.items():
        console.print(f"\n[bold]{subject}[/]")
        for sentence in sentences:
            console.print(f"• {escape(sentence)}", highlight=False)
        for title, frame in tables(found, subject, ROWS).items():
            _print(console, title, frame)


def overview(row: Any) -> str:
    """`1,024 responses of up to 9 tokens, 5,605 in all, 3 steps; logprob ref_logprob`."""
    steps = f", {row['steps']:,} steps" if row["steps"] > 1 else ""
    return (
        f"{row['responses']:,} responses of up to {row['longest']:,} tokens, {row['tokens']:,} in all{steps}; {row['policies']}"
    )


def tables(found: Inspection, subject: str, rows: int | None = None) -> dict[str, pd.DataFrame]:
    """What is shown of a subject, as text, by title."""
    frames, shown = found.frames, {}
    if subject == "KL":
        kl = frames["kl"]
        per = {name: part.set_index("kernel") for name, part in kl.groupby("per", sort=False)}
        shown["KL by kernel, nats"] = pd.DataFrame(
            {
                "kernel": list(per["token"].index),
                "per token": [interval(row) for row in per["token"].to_dict("records")],
                "per response": [interval(row) for row in per["response"].to_dict("records")],
                "interval holds": ["yes" if ok else "no, open" for ok in per["response"]["reliable"]],
            }
        )
        if "vocabulary" in frames:
            shown["KL over the listed tokens, nats per token"] = frames["vocabulary"]
            shown["gradients at the recorded prefixes, exact"] = frames["prefixes"]
        if "tokens" in frames:
            columns = ["token_id", "token", "tokens", "k1", "k3", "share"]
            shown["tokens by their k3"] = frames["tokens"][columns].rename(columns={"tokens": "times"})
        columns = ["response", "place", "token_id", "log_ratio", "k3", "share", "log_prob"]
        shown["single tokens with the largest k3"] = frames["largest"][columns]
        estimators = frames["estimators"]
        shown["what estimators put on these tokens"] = (
            estimators if rows is None else estimators[estimators["estimator"].isin(SHOWN)]
        )
    if subject == "weights":
        columns = ["correction", "statement", "removed_above", "removed_below", "bias", "noise", "error", "wins"]
        shown["corrections"] = frames["corrections"][columns].sort_values("error", kind="stable")
        if rows is None:
            shown["effective sample sizes"] = frames["weights"]
    if subject == "steps" and rows is None:
        shown["steps"] = frames["steps"]
    return {title: _text(frame if rows is None else frame.head(rows)) for title, frame in shown.items()}


def _text(frame: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({str(name): [number(value) for value in frame[name]] for name in frame})


def number(value: Any) -> str:
    """A cell of a table."""
    if isinstance(value, str):
        return value
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "–"
    text = f"{value:,}" if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e9) else f"{value:.3g}"
    return text.removesuffix(".0").replace("-", "−").replace("inf", "∞")


def _print(console: Any, title: str, frame: pd.DataFrame) -> None:
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in frame:
        text = name in ("kernel", "token", "estimator", "correction", "statement", "form", "per token", "per response")
        table.add_column(str(name), justify="left" if text else "right")
    for row in frame.itertuples(index=False):
        table.add_row(*map(escape, row))
    console.print(table)


def to_json(found: Inspection) -> str:
    """Everything as JSON; numbers that are not finite are null."""
    plain = {
        "source": found.source,
        "findings": [
            {
                "fault": f.fault,
                "columns": f.columns,
                "serious": f.serious,
                "sentence": f.sentence,
                "rows": f.rows.to_numpy().tolist(),
            }
            for f in found.findings
        ],
        "withheld": found.withheld,
        "sentences": dict(found.sentences),
        "frames": {name: json.loads(frame.to_json(orient="records")) for name, frame in found.frames.items()},
    }
    return json.dumps(plain, ensure_ascii=False, indent=1)


def figures(found: Inspection) -> dict[str, Figure]:
    """The figures that the frames allow, by what they show."""
    from gradlab import plots

    frames, drawn = found.frames, {}
    if "kl" in frames:
        drawn["KL"] = plots.run_kl(frames["ratios"], frames["places"], frames["largest"])
        drawn["estimators"] = plots.run_estimators(frames["estimators"])
    if "weights" in frames:
        drawn["weights"] = plots.run_weights(frames["weights"], frames["corrections"])
    if "changes" in frames:
        drawn["steps"] = plots.run_steps(frames["steps"], frames["changes"])
    return drawn


def write(found: Inspection, folder: Path) -> Path:
    """Write `inspect.html`, a page that needs nothing but itself, `inspect.json` and a CSV of every frame; return the page.

    Raises `ValueError` when the folder cannot be written to.
    """
    ensure_writable(folder)
    for name, frame in found.frames.items():
        with atomic_write(folder / f"{name}.csv") as part:
            frame.to_csv(part, index=False, lineterminator="\n")
    with atomic_write(folder / "inspect.json") as part:
        part.write_text(to_json(found) + "\n", encoding="utf-8")
    values = {
        "found": found,
        "overview": overview(found["overview"].to_dict("records")[0]),
        "pictures": {name: _picture(figure) for name, figure in figures(found).items()},
        "tables": {subject: tables(found, subject) for subject in found.sentences},
        "versions": versions(),
    }
    return pages.write(folder / "inspect.html", "gradlab.records", "page.html", values)


def _picture(figure: Figure) -> str:
    from gradlab.plots import stylesheet

    stream = io.BytesIO()
    with stylesheet():
        figure.savefig(stream, format="png", metadata={"Software": None})
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
