"""The output of an audit: a table in the terminal, JSON, and a page with the curves and the heat map."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.markup import escape
from rich.table import Table

from gradlab._common.console import wide_console
from gradlab._common.provenance import versions
from gradlab.audit.run import Audit, frame
from gradlab.study import pages
from gradlab.study.report import atomic_write, ensure_writable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def number(value: float, digits: int = 4) -> str:
    """A number for a table; a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:.{digits}g}"


def show(audits: Sequence[Audit]) -> None:
    """Print one line per configuration, and for a single one the verdicts in words and every probe."""
    table = Table(header_style="bold")
    for heading in ("configuration", "descends on-policy", "scale", "cosine", "descends off-policy", "cosine", "failed probes"):
        table.add_column(heading, overflow="fold", justify="right" if heading in ("scale", "cosine") else "left")
    for audited in audits:
        on, off = audited.rows()
        cells = (
            on["subject"], on["verdict"], number(on["scale"]), number(on["cosine"]), off["verdict"], number(off["cosine"]),
            on["failures"].replace(";", ", ") or ("none" if audited.probes else "not asked"),
        )  # fmt: skip
        table.add_row(*map(escape, cells))
    console = wide_console()
    console.print(table)
    console.print("cosine: of the expected gradient with that of the sequence reverse KL", style="dim")
    if len(audits) == 1:
        _show_one(audits[0])


def _show_one(audited: Audit) -> None:
    console = wide_console()
    console.print(f"on-policy, the expected gradient {audited.on_policy.text}", markup=False, highlight=False)
    console.print(f"off-policy, it {audited.off_policy.text}", markup=False, highlight=False)
    for part in (audited.kl, audited.policy):
        if part.absent and part.absent != "not looked at":
            console.print(f"{part.name}: {part.text}", markup=False, highlight=False)
    if audited.whole:
        on, off = (verdict.name for verdict in audited.total)
        console.print(f"together: {on} on-policy, {off} off-policy", markup=False, highlight=False)
    _show_binding(audited)
    if audited.form:
        console.print(f"response by response it is {audited.form.name}", markup=False, highlight=False)
    if reduced := audited.subject.configuration.get("reduced"):
        console.print(f"the values it returns are reduced here: {reduced}", markup=False, highlight=False)
    table = Table(header_style="bold")
    for heading in ("probe", "", "finding", "example"):
        table.add_column(heading, overflow="fold")
    if not audited.probes:
        return
    marks = {True: "[green]pass[/]", False: "[red]FAIL[/]", None: "[dim]n/a[/]"}
    for probe in audited.probes:
        table.add_row(probe.name, marks[probe.passed], escape(probe.finding), escape(probe.example))
    console.print(table)


def _show_binding(audited: Audit) -> None:
    if not audited.subject.binding:
        return
    table = Table(header_style="bold")
    for heading in ("argument", "is", "how that was decided"):
        table.add_column(heading, overflow="fold")
    for bound in audited.subject.binding:
        table.add_row(escape(bound.argument), escape(bound.role), escape(("guessed: " if bound.guessed else "") + bound.how))
    wide_console().print(table)


def show_changes(rows: pd.DataFrame, before: str, after: str, audits: int) -> None:
    """Print what `gl.audit.changes` found, or that nothing changed in so many audits."""
    if not len(rows):
        wide_console().print(f"nothing changed in {audits} audit{'s' if audits != 1 else ''}", highlight=False)
        return
    table = Table(header_style="bold")
    for heading in ("loss", "what", before, after):
        table.add_column(escape(heading), overflow="fold")
    for row in rows.itertuples(index=False):
        table.add_row(*map(escape, row))
    wide_console().print(table)


def to_json(audits: Sequence[Audit]) -> str:
    """Every audit as JSON: an array with subject, verdicts, form, probes; NaN and infinities are null."""
    return json.dumps([_plain(audited) for audited in audits], ensure_ascii=False, indent=2, allow_nan=False)


def _plain(audited: Audit) -> dict[str, Any]:
    on, off = audited.rows()
    keys = ("verdict", "scale", "error", "scope", "cosine", "closest", "cosine_closest", "text")
    shared = ("subject", "package", "version", "function", "form", "group", "precision")
    verdicts = (("on_policy", on, audited.on_policy), ("off_policy", off, audited.off_policy))
    found: dict[str, Any] = {key: on[key] for key in shared}
    found["configuration"] = {key: str(value) for key, value in audited.subject.configuration.items()}
    for name, row, verdict in verdicts:
        found[name] = {key: row[key] for key in keys} | {"combination": verdict.combination}
    found["binding"] = [vars(bound) for bound in audited.subject.binding]
    asked = ("scale", "scope", "combination", "closest", "cosine", "text")
    found["parts"] = {
        part.name: {"absent": part.absent}
        | {
            where: {"verdict": verdict.name} | {key: getattr(verdict, key) for key in asked}
            for where, verdict in (("on_policy", part.on_policy), ("off_policy", part.off_policy))
            if verdict is not None
        }
        for part in (audited.kl, audited.policy)
    }
    found["probes"] = [vars(probe) for probe in audited.probes]
    found["curve"] = audited.curve[["log_ratio", "coefficient"]].to_dict("list")
    return dict(_finite(found))


def _finite(item: Any) -> Any:
    if isinstance(item, dict):
        return {key: _finite(value) for key, value in item.items()}
    if isinstance(item, list):
        return [_finite(value) for value in item]
    return None if isinstance(item, float) and not math.isfinite(item) else item


def curves(audits: Sequence[Audit]) -> pd.DataFrame:
    """`subject, log_ratio, coefficient, value` of every audit, one below the other."""
    return pd.concat([audited.curve.assign(subject=audited.subject.name) for audited in audits], ignore_index=True)


def heat(audits: Sequence[Audit]) -> pd.DataFrame:
    """`subject, policy, target, cosine, equal` of every audit; `equal` where the verdict is that single objective."""
    parts = []
    for audited in audits:
        single = {
            policy: next(iter(verdict.combination)) if len(verdict.combination) == 1 and verdict.scope == "everywhere" else ""
            for policy, verdict in (("on", audited.on_policy), ("off", audited.off_policy))
        }
        part = audited.cosines.assign(subject=audited.subject.name)
        part["equal"] = [single[policy] == target for policy, target in zip(part["policy"], part["target"], strict=True)]
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def write(audits: Sequence[Audit], folder: Path) -> Path:
    """Write `audit.html`, one page that needs nothing but itself, with `audit.csv` and `audit.json` beside it; return the page.

    Raises `ValueError` when the folder cannot be written to.
    """
    from gradlab.plots import audited_curves, matches  # what prints a table waits for no drawing

    ensure_writable(folder)
    table = frame(audits)
    with atomic_write(folder / "audit.csv") as part:
        table.to_csv(part, index=False, lineterminator="\n")
    with atomic_write(folder / "audit.json") as part:
        part.write_text(to_json(audits) + "\n", encoding="utf-8")
    values = {
        "audits": [(audited, *audited.rows()) for audited in audits],
        "choices": {
            "package": _distinct(audited.subject.package for audited in audits),
            "on": _distinct(audited.on_policy.name for audited in audits),
            "off": _distinct(audited.off_policy.name for audited in audits),
            "failures": _distinct(probe.name for audited in audits for probe in audited.failures),
        },
        "script": pages.script(),
        "curves": _picture(audited_curves(curves(audits))),
        "heat": _picture(matches(heat(audits))),
        "versions": versions(),
    }
    return pages.write(folder / "audit.html", "gradlab.audit", "page.html", values, {"number": number})


def _distinct(values: Iterable[str]) -> list[str]:
    return sorted(filter(None, set(values)))


def _picture(figure: Figure) -> str:
    from gradlab.plots import stylesheet

    stream = io.BytesIO()
    with stylesheet():
        figure.savefig(stream, format="png", metadata={"Software": None})
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
