"""What changed between two audits: of a loss today and in a file that was kept, or of two versions of a package."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pandas as pd

from gradlab._common.lazy import callable_module

if TYPE_CHECKING:
    from gradlab.audit.run import Audit

#: Factors and coefficients that differ by less, relatively, are the same: rounding of a loss in float32 is smaller.
FACTOR = 1e-4
#: Cosines of gradients that are no known objective's differ by less where the loss is the same.
COSINE = 1e-3
#: Beyond this log-ratio the coefficient of a token may be rounding.
REACH = 20.0

Record = dict[str, Any]
#: Audits, audits as they are read from a file, or that file.
Audits: TypeAlias = "Audit | Sequence[Audit] | Sequence[Record] | Path | str"


def read(path: Path) -> list[Record]:
    """The audits in a file that `gradlab audit --json` or `--output` wrote.

    Raises `ValueError` when there is no such file, or something else is in it.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}; write one with gradlab audit … --json > {path}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); write it with gradlab audit … --json > {path}") from None
    needed = {"subject", "parts", "probes", "curve"}
    if not isinstance(found, list) or not all(isinstance(item, dict) and needed <= set(item) for item in found):
        raise ValueError(f"{path} holds no audits; write it with gradlab audit … --json > {path}")
    return found


def changes(before: Audits, after: Audits) -> pd.DataFrame:
    """What is different `after`: `subject, what, before, after`, one row for each thing that changed, none where nothing did.

    before, after: audits, or what was read from a file, or the path of the `audit.json` of some. Compared are the verdicts of both
    parts with their scopes and factors (to 1e-4), the cosine with the closest objective where there is no verdict (to 1e-3), form,
    group and precision, which probes pass, what every argument is given, and the coefficient of a token at log-ratios up to 20 (to
    1e-4). A subject that only one of them holds is a change; versions of packages are not.
    Raises `ValueError` when a file is not there or holds something else.

    >>> def k1(log_probs, ref_log_probs, mask):
    ...     return (mask * (log_probs - ref_log_probs)).sum() / len(mask)
    >>> def k2(log_probs, ref_log_probs, mask):
    ...     return (mask * (log_probs - ref_log_probs) ** 2 / 2).sum() / len(mask)
    >>> found = gl.audit.changes(gl.audit(k1, name="kl"), gl.audit(k2, name="kl"))
    >>> found[found["what"] == "KL part on-policy"][["before", "after"]].values.tolist()
    [['zero', 'reverse_kl_frozen_prefix']]
    """
    old, new = _by_name(_records(before)), _by_name(_records(after))
    rows = [(name, *row) for name in old if name in new for row in _differences(old[name], new[name])]
    rows += [(name, "subject", "audited", "not audited") for name in old if name not in new]
    rows += [(name, "subject", "not audited", "audited") for name in new if name not in old]
    return pd.DataFrame(rows, columns=["subject", "what", "before", "after"])


def sentences(found: pd.DataFrame) -> list[str]:
    """Every change as one line."""
    return [f"{row.subject}: {row.what} was {row.before}, is {row.after}" for row in found.itertuples()]


def _records(given: Audits) -> list[Record]:
    from gradlab.audit import report
    from gradlab.audit.run import Audit

    if isinstance(given, str | Path):
        return read(Path(given))
    items: list[Any] = [given] if isinstance(given, Audit) else list(given)
    if all(isinstance(item, dict) for item in items):
        return items
    records: list[Record] = json.loads(report.to_json(items))
    return records


def _by_name(records: Sequence[Record]) -> dict[str, Record]:
    """Audits by the name of their subject; those that share it by the function as well."""
    counts = Counter(record["subject"] for record in records)
    return {
        record["subject"] if counts[record["subject"]] == 1 else f"{record['subject']} ({record.get('function', '')})": record
        for record in records
    }


def _differences(old: Record, new: Record) -> list[tuple[str, str, str]]:
    rows = []
    for part in dict.fromkeys([*old["parts"], *new["parts"]]):
        for where in ("on_policy", "off_policy"):
            pair = [_verdict(record["parts"].get(part, {}), where) for record in (old, new)]
            if not _same_verdict(*pair):
                rows.append((f"{part} {where.replace('_', '-')}", _verdict_text(pair[0]), _verdict_text(pair[1])))
    rows += [
        (key, str(old.get(key) or "none"), str(new.get(key) or "none"))
        for key in ("form", "group", "precision")
        if old.get(key) != new.get(key)
    ]
    before, after = _probes(old), _probes(new)
    for key in dict.fromkeys([*before, *after]):
        x, y = before.get(key, {}), after.get(key, {})
        if x.get("passed", "") != y.get("passed", ""):
            rows.append((f"probe {key}", _probe_text(x), _probe_text(y)))
    rows += _bindings(old, new)
    return [*rows, *_curve(old, new)]


def _verdict(part: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = part.get(where) or {"absent": part.get("absent") or "not looked at"}
    return found


def _same_verdict(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    if "absent" in old or "absent" in new:
        return old.get("absent") == new.get("absent")
    x, y = old["combination"], new["combination"]
    if sorted(x) != sorted(y) or old["scope"] != new["scope"]:
        return False
    if x:
        return all(math.isclose(x[key], y[key], rel_tol=FACTOR) for key in x)
    cosines = old["cosine"], new["cosine"]
    if old["verdict"] != new["verdict"] or None in cosines:
        return bool(old["verdict"] == new["verdict"]) and cosines == (None, None)
    return bool(abs(cosines[0] - cosines[1]) <= COSINE)


def _verdict_text(verdict: Mapping[str, Any]) -> str:
    if "absent" in verdict:
        return f"absent ({verdict['absent']})"
    if not verdict["combination"]:
        cosine = "no cosine" if verdict["cosine"] is None else f"cosine {verdict['cosine']:.3g}"
        return f"{verdict['verdict']}, closest {verdict['closest']} ({cosine})"
    scale = verdict["scale"]
    return str(verdict["verdict"]) + ("" if scale in (None, 0, 1) or abs(scale - 1) < FACTOR else f", scale {scale:.4g}")


def _probes(record: Record) -> dict[str, Mapping[str, Any]]:
    return {f"{probe['name']} ({probe['part']})" if probe.get("part") else probe["name"]: probe for probe in record["probes"]}


def _probe_text(probe: Mapping[str, Any]) -> str:
    if not probe:
        return "not asked"
    mark = {True: "pass", False: "FAIL"}.get(probe["passed"], "n/a")
    finding = str(probe["finding"]).removeprefix(str(probe.get("part")) + ": ")
    return f"{mark}: {finding}"


def _bindings(old: Record, new: Record) -> list[tuple[str, str, str]]:
    before, after = ({bound["argument"]: bound["role"] for bound in record.get("binding", [])} for record in (old, new))
    return [
        (f"argument {key}", before.get(key, "not there"), after.get(key, "not there"))
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]


def _curve(old: Record, new: Record) -> list[tuple[str, str, str]]:
    """The coefficients of a token at the least log-ratio at which they differ."""
    before, after = (dict(zip(r["curve"]["log_ratio"], r["curve"]["coefficient"], strict=True)) for r in (old, new))
    usual = [abs(y) for x, y in before.items() if abs(x) <= 4 and y is not None]
    least = FACTOR * (sorted(usual)[len(usual) // 2] if usual else 1.0)
    for x in sorted(set(before) & set(after), key=abs):
        y, z = before[x], after[x]
        same = y == z if y is None or z is None else math.isclose(y, z, rel_tol=FACTOR, abs_tol=least)
        if abs(x) <= REACH and not same:
            return [(f"coefficient of a token at ℓ = {x + 0.0:g}", _number(y), _number(z))]
    return []


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


called = callable_module(__name__, changes)
