"""Audits as a JUnit report, which the CI services show beside the tests: one case for each loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from gradlab._common.files import atomic_write
from gradlab.audit.run import Audit


def write(path: Path, audits: Sequence[Audit], failed: Mapping[str, Sequence[str]], errors: Mapping[str, str]) -> None:
    """Write a report of `audits` to `path`.

    failed: name of a loss → what was asked of it and is not so. errors: name → why it could not be audited. Verdicts are
    properties of a case, and every probe is a line of its output.
    """
    names = [audited.subject.name for audited in audits]
    missing = [name for name in failed if name not in names]
    suites = ET.Element("testsuites")
    suite = ET.SubElement(
        suites,
        "testsuite",
        name="gradlab audit",
        tests=str(len(audits) + len(missing) + len(errors)),
        failures=str(sum(bool(reasons) for reasons in failed.values())),
        errors=str(len(errors)),
    )
    for audited in audits:
        case = ET.SubElement(suite, "testcase", name=audited.subject.name, classname=audited.subject.function or "gradlab")
        properties = ET.SubElement(case, "properties")
        for key, value in (("on-policy", audited.on_policy), ("off-policy", audited.off_policy)):
            ET.SubElement(properties, "property", name=key, value=_xml(value.name))
        _failure(case, failed.get(audited.subject.name, ()))
        ET.SubElement(case, "system-out").text = _xml("\n".join(_lines(audited)))
    for name in missing:
        _failure(ET.SubElement(suite, "testcase", name=name, classname="gradlab"), failed[name])
    for name, problem in errors.items():
        case = ET.SubElement(suite, "testcase", name=name, classname="gradlab")
        ET.SubElement(case, "error", message=_xml(problem)).text = _xml(problem)
    ET.indent(suites)
    with atomic_write(path) as part:
        ET.ElementTree(suites).write(part, encoding="utf-8", xml_declaration=True)


def _failure(case: ET.Element, reasons: Sequence[str]) -> None:
    if reasons:
        ET.SubElement(case, "failure", message=_xml(reasons[0])).text = _xml("\n".join(reasons))


def _lines(audited: Audit) -> list[str]:
    marks = {True: "pass", False: "FAIL", None: "n/a"}
    return [
        f"on-policy, the expected gradient {audited.on_policy.text}",
        f"off-policy, it {audited.off_policy.text}",
        *(bound.text for bound in audited.subject.binding),
        *(f"{marks[probe.passed]} {probe.name}: {probe.finding} ({probe.example})" for probe in audited.probes),
    ]


def _xml(text: str) -> str:
    """Text without the control characters that XML does not allow."""
    return "".join(c for c in text if c in "\t\n" or c >= " ")
