"""The command `gradlab audit`."""

from __future__ import annotations

import sys
from ast import literal_eval
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    from gradlab.audit.batch import Subject
    from gradlab.audit.run import Audit


class Returns(StrEnum):
    """What an audited function returns."""

    loss = "loss"
    penalty = "penalty"
    rewards = "rewards"
    advantages = "advantages"


def audit_command(
    target: Annotated[
        list[str] | None,
        typer.Argument(help="package.module:function, path/to/file.py:function, or a framework such as trl; several at will."),
    ] = None,
    installed: Annotated[bool, typer.Option("--installed", help="Audit every framework that is installed.")] = False,
    config: Annotated[
        list[Path] | None, typer.Option("--config", help="A YAML or JSON configuration of verl, TRL or OpenRLHF.")
    ] = None,
    framework: Annotated[
        str | None,
        typer.Option(
            "--framework", help="Whose configuration it is, where that cannot be told: verl, trl, trl-rloo, openrlhf."
        ),
    ] = None,
    binds: Annotated[list[str] | None, typer.Option("--bind", help="NAME=ROLE: which tensor an argument is.")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE: a literal for an argument.")] = None,
    stub: Annotated[
        list[str] | None, typer.Option("--stub", help="An imported name that the loss never calls: it is not needed then.")
    ] = None,
    returns: Annotated[Returns, typer.Option("--returns", help="What the function returns.")] = Returns.loss,
    result: Annotated[str | None, typer.Option("--result", help="KEY or INDEX: which of several results is the loss.")] = None,
    vocab: Annotated[int | None, typer.Option("--vocab", min=2, max=8, help="Tokens of the policies; 3 if left out.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="What the sampler divides its logits by.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Verdicts only, without probes.")] = False,
    group: Annotated[int | None, typer.Option("--group", min=1, help="Responses enumerated together.")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Ask what log-probabilities of before a cut to this nucleus do.")
    ] = None,
    only: Annotated[str | None, typer.Option("--only", help="Configurations whose name contains this.")] = None,
    expect: Annotated[str | None, typer.Option("--expect", help="Exit 1 unless the gradient is that of this target.")] = None,
    off_policy: Annotated[bool, typer.Option("--off-policy", help="Expect it off-policy, too.")] = False,
    passes: Annotated[list[str] | None, typer.Option("--passes", help="Exit 1 if this probe fails; may be repeated.")] = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", help="An audit.json of before: exit 1 if anything in it changed.")
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write a JUnit report to this file.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=-1, help="Worker processes; -1 uses every core.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write audit.html, .csv and .json to this folder.")
    ] = None,
) -> None:
    """Find out which objective a loss function really descends, and every way in which it misbehaves.

    Exact expected gradients of the function itself over all responses of small policies, compared with every known objective.
    Arguments are bound by the names in common use. A failed probe is a property to know, not always a defect.

    Example: `gradlab audit path/to/losses.py:kl_loss --expect reverse_kl_frozen_prefix`
    """
    import joblib
    from tqdm import tqdm

    from gradlab._common.files import ensure_writable, ensure_writable_file
    from gradlab._common.names import check_jobs, check_name
    from gradlab._common.parallel import spread
    from gradlab.audit import candidates, changes, report
    from gradlab.audit.probes import NAMES
    from gradlab.audit.run import Audit

    check_jobs(jobs)
    if expect is not None:
        candidates.check(expect)
    elif off_policy:
        raise ValueError(
            "--off-policy says where the gradient is expected to be that of a target; give the target with --expect"
        )
    for name in passes or ():
        check_name("probe", name, NAMES)
    if output is not None:
        ensure_writable(output)
    if junit is not None:
        ensure_writable_file(junit)
    kept = None if baseline is None else changes.read(baseline)
    described = _configured(config or [], framework, sys.stderr if json else sys.stdout)
    chosen = described if config and not target and not installed else described + _subjects(
        target or [], installed, binds or [], setting or [], returns.value,
        {"result": result, "vocab": vocab, "temperature": temperature}, stub or [],
    )  # fmt: skip
    chosen = [subject for subject in chosen if only is None or only in subject.name]
    chosen = chosen if group is None else [replace(subject, group=group) for subject in chosen]
    if not chosen and config:
        return
    if not chosen:
        raise ValueError(f"nothing to audit: no configuration {'is named like ' + repr(only) if only else 'was given'}")
    progress = tqdm(chosen, desc="audit", unit="loss", disable=None if len(chosen) > 1 else True)
    results = spread((joblib.delayed(_attempt)(subject, top_p, quick, jobs == 1) for subject in progress), jobs)
    audits = [result for result in results if isinstance(result, Audit)]
    problems = {subject.name: result for subject, result in zip(chosen, results, strict=True) if isinstance(result, ValueError)}
    unmet: dict[str, list[str]] = {}
    for audited in audits:
        reasons = [audited.why_not(expect, off_policy)] if expect is not None else []
        reasons += [_failed(audited, name) for name in passes or ()]
        unmet.setdefault(audited.subject.name, []).extend(filter(None, reasons))
    if kept is not None:
        kept = [record for record in kept if record["subject"] not in problems and (only is None or only in record["subject"])]
        rows = changes.changes(kept, audits)
        for name, sentence in zip(rows["subject"], changes.sentences(rows), strict=True):
            unmet.setdefault(name, []).append(sentence)
    if junit is not None:
        from gradlab.audit import junit as report_of_tests

        report_of_tests.write(junit, audits, unmet, {name: str(problem) for name, problem in problems.items()})
    if not audits:
        raise next(iter(problems.values()))
    if json:
        print(report.to_json(audits))
    else:
        report.show(audits)
    if output is not None:
        print(f"the page is {report.write(audits, output)}", file=sys.stderr)
    reasons = [reason for named in unmet.values() for reason in named]
    for reason in reasons:
        print(f"gradlab: {reason}", file=sys.stderr)
    if problems:  # the others are shown all the same: one version of one framework may well have changed
        told = "; ".join(map(str, problems.values()))
        raise ValueError(f"{len(problems)} of {len(results)} could not be audited: {told}")
    if reasons:
        raise typer.Exit(1)


def _failed(audited: Audit, name: str) -> str | None:
    """Why the probe `name` does not pass, in one line, or `None` when it does or does not apply."""
    failed = [probe for probe in audited.failures if probe.name == name]
    return f"{audited.subject.name} fails the probe {name}: {failed[0].finding}" if failed else None


def _configured(paths: list[Path], framework: str | None, stream: TextIO) -> list[Subject]:
    """The live terms of configurations, which are told of at once."""
    from gradlab.audit.configured import configured

    found = [configured(path, framework) for path in paths]
    for item in found:
        print("\n".join(item.lines), file=stream)
    return [subject for item in found for subject in item.subjects]


def _attempt(subject: Subject, top_p: float | None, quick: bool, watch: bool) -> Audit | ValueError:
    from tqdm import tqdm

    from gradlab.audit import call
    from gradlab.audit.run import audit

    # Unknown how many there will be; what takes less than three seconds needs no bar.
    with tqdm(desc=subject.name, unit=" calls", delay=3, leave=False, disable=None if watch else True) as bar:
        call.watched.append(bar.update)
        try:
            return audit(subject, top_p=top_p, quick=quick)
        except ValueError as error:
            return error
        finally:
            call.watched.remove(bar.update)


def _subjects(
    given: list[str],
    installed: bool,
    binds: list[str],
    setting: list[str],
    returns: str,
    options: dict[str, Any],
    stubs: list[str],
) -> list[Subject]:
    """What to audit: functions by their address, frameworks by name."""
    from gradlab.audit import adapters
    from gradlab.audit.batch import Subject
    from gradlab.audit.bind import bind
    from gradlab.audit.load import load, offered

    if installed == bool(given):
        raise ValueError(
            "say what to audit: package.module:function, path/to/file.py:function, frameworks "
            f"({', '.join(adapters.ADAPTERS)}), or --installed for all that are here"
        )
    named = [address for address in given if ":" not in address and not address.endswith(".py") and "." not in address]
    if (installed or len(named) == len(given)) and (
        unused := _unused(binds, setting, returns, {**options, "stub": stubs or None})
    ):
        raise ValueError(
            f"{unused}: this is about the arguments of a function of yours; the losses of a framework are bound already"
        )
    if installed:
        for name, line in adapters.missing().items():
            print(f"{name} is not installed; to audit it: {line}", file=sys.stderr)
        return adapters.subjects()
    roles, settings = _pairs("--bind", binds), {key: _literal(value) for key, value in _pairs("--set", setting).items()}
    subjects: list[Subject] = []
    sys.path.insert(0, "")  # as `python -m` has it: modules beside the user are found
    for address in given:
        if ":" not in address and (address.endswith(".py") or "." in address):
            raise ValueError(f"say which function of {address} to audit: {address}:FUNCTION{offered(address)}")
        if ":" not in address:
            subjects += adapters.subjects([address])
            continue
        loaded = load(address, stubs)
        name = address.rpartition(":")[2]
        subjects.append(
            loaded
            if isinstance(loaded, Subject)
            else bind(loaded, name=name, roles=roles, settings=settings, returns=returns, **options)
        )
    return subjects


def _unused(binds: list[str], setting: list[str], returns: str, options: dict[str, Any]) -> str:
    """The options that say what a function's arguments are, of those that were given."""
    given = {"--bind": binds, "--set": setting, "--returns": returns != Returns.loss.value}
    given |= {f"--{key}": value is not None for key, value in options.items()}
    return ", ".join(option for option, value in given.items() if value)


def _pairs(option: str, given: list[str]) -> dict[str, str]:
    pairs = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not key or not value:
            raise ValueError(f"{option} takes NAME=VALUE, got {item!r}")
        pairs[key] = value
    return pairs


def _literal(text: str) -> object:
    """A Python literal, or the text itself."""
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text
