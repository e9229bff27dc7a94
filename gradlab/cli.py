"""The command line: reproduce figures and verdicts, read the ledger, measure a question of one's own, list what there is.

Each command imports what it uses, so that help is there at once and no command waits for what another needs.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gradlab.audit.command import audit_command
from gradlab.measure_command import measure_command
from gradlab.names import check_name
from gradlab.provenance import __version__
from gradlab.train_command import train_command

app = typer.Typer(
    name="gradlab",
    help="Which objective does a KL regulariser's gradient descend, how far off, how noisily, and on which tokens?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for pictures, data and captions.")]
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=-1, help="Worker processes; -1 uses every core. Same bytes for any.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Entropy of every random draw.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"gradlab {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of every command."""


def analyses() -> dict[str, Path]:
    """The analysis scripts by name: those of the source tree, or those packed with the installed package."""
    here = Path(__file__).parent
    for folder in (here / "_analyses", here.parent / "analyses"):
        if found := {path.stem: path for path in sorted(folder.glob("[0-9]*.py"))}:
            return found
    raise ValueError("no analysis scripts found beside the package; reinstall gradlab-kl")


@app.command()
def reproduce(
    quick: Annotated[bool, typer.Option("--quick", help="Smaller grids: everything in under a minute.")] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Run one analysis, by name or number; may be repeated.")
    ] = None,
    jobs: Jobs = 1,
    output: Output = Path("figures"),
    seed: Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Run analyses even if nothing they depend on has changed.")] = False,
) -> None:
    """Regenerate figures, data, captions and verdicts.

    Runs the numbered analyses, `--jobs` of them at a time. Each writes its results when it has them, so an interrupted run keeps
    what is finished, and the next run skips what is unchanged; an analysis that needs packages which are not installed is skipped,
    too. Ends with the claims ledger as these results settle it, also
    written to `claims.csv`, and with `index.html`, one page that shows everything.

    Example: `gradlab reproduce --quick --only 03 --output /tmp/figures`
    """
    import joblib

    from gradlab import claims, gallery, report
    from gradlab.ledger import CLAIMS
    from gradlab.resume import Record, Requirements

    scripts = analyses()
    chosen = _choose(scripts, only)
    report.writable(output)
    options = ["--seed", str(seed), "--output", str(output), *(["--quick"] if quick else [])]
    needs = {name: Requirements.of(scripts[name]) for name in chosen}
    for name in [name for name in chosen if needs[name].missing]:
        if only:
            raise ValueError(f"{name} cannot run: {needs[name].missing}")
        print(f"{name} is skipped, and what is in {output} is left as it is: {needs[name].missing}")
        chosen.remove(name)
    records = {name: Record(scripts[name], output, {"quick": quick, "seed": seed, **needs[name].versions}) for name in chosen}
    finished = [] if force else [name for name in chosen if records[name].unchanged()]
    for name in finished:
        print(f"{name} is unchanged; --force makes it again")
    todo = [name for name in chosen if name not in finished]
    try:
        for name, seconds in _runs({name: scripts[name] for name in todo}, options, joblib.effective_n_jobs(jobs)):
            records[name].save()
            finished.append(name)
            print(f"{name} took {seconds:.1f} s ({len(finished)} of {len(chosen)} done)")
    except KeyboardInterrupt:
        kept = ", ".join(finished) or "nothing"
        print(f"interrupted; finished and kept: {kept}", file=sys.stderr)
        raise
    settled = claims.verify(claims.load(output, {claim.frame for claim in CLAIMS}))
    with report.written(output / "claims.csv") as part:
        settled.to_csv(part, index=False, lineterminator="\n")
    page = gallery.write(output, settled, {name: _title(path) for name, path in scripts.items()})
    report.show_verdicts(settled)
    print(f"pictures, data and captions are in {output}; {page} shows them all")


def _runs(scripts: dict[str, Path], options: list[str], jobs: int) -> Iterator[tuple[str, float]]:
    """Run analyses, several at a time if there are `jobs` for it; yield each one's name and seconds when it is done.

    Alone they run in this process, where their progress is seen; together each is a process whose output is shown at its end.
    """
    from rich.console import Console
    from tqdm import tqdm

    if jobs == 1:
        arguments = sys.argv
        for name, script in scripts.items():
            Console().rule(name, align="left")
            started = time.perf_counter()
            try:
                sys.argv = [str(script), *options]
                runpy.run_path(str(script), run_name="__main__")
            finally:
                sys.argv = arguments
            yield name, time.perf_counter() - started
        return

    def run(name: str) -> tuple[str, float, str]:
        started = time.perf_counter()
        done = subprocess.run([sys.executable, str(scripts[name]), *options], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(
                f"{name} failed; run it alone with --jobs 1. It said: {done.stderr.strip() or done.stdout.strip()}"
            )
        return name, time.perf_counter() - started, done.stdout

    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(run, name) for name in scripts]
        for future in tqdm(as_completed(waiting), total=len(waiting), unit="analysis", disable=None):
            name, seconds, printed = future.result()
            print(printed, end="")
            yield name, seconds


@app.command(name="claims")
def claims_command(
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Claims to tell in full: topics, or parts of them.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="The same as ID; may be repeated.")] = None,
    output: Output = Path("figures"),
    csv: Annotated[bool, typer.Option("--csv", help="Print the ledger as CSV, with everything there is to it.")] = False,
) -> None:
    """Print the claims ledger, each claim settled anew from the data in the output folder.

    HOLDS, FAILS or UNDECIDED within a scope; OPEN where `gradlab reproduce` has not yet made the data. Without an ID a line for
    each published claim and how many scopes came out how; with an ID the sentences tested, their scopes, rules and evidence.

    Example: `gradlab claims k2-loss rho-k3.frozen`
    """
    from gradlab import claims, report

    chosen = [*(ids or ()), *(only or ())] or None
    settled = claims.verify(output, chosen)
    if csv:
        print(settled.to_csv(index=False), end="")
    elif chosen:
        report.show_claims(settled)
    else:
        report.show_verdicts(settled)


app.command(name="measure")(measure_command)
app.command(name="train")(train_command)
app.command(name="audit")(audit_command)


class Listing(StrEnum):
    """What `gradlab list` can list."""

    estimators = "estimators"
    targets = "targets"
    kernels = "kernels"
    claims = "claims"
    analyses = "analyses"
    models = "models"


@app.command(name="list")
def list_command(
    what: Annotated[Listing, typer.Argument(help="Which names to list.")] = Listing.estimators,
) -> None:
    """List estimators, targets, kernels, claims, analyses or shipped models, with what they are and where they come from."""
    from rich.markup import escape
    from rich.table import Table

    from gradlab.console import wide_console

    table = Table(header_style="bold")
    headings, rows = _listed(what)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))  # E[k1] is no markup
    wide_console().print(table)


def _listed(what: Listing) -> tuple[tuple[str, ...], Sequence[tuple[str, ...]]]:
    """Headings and rows of a list."""
    if what is Listing.estimators:
        from gradlab.catalogue import CATALOGUE

        return ("name", "composition", "descends on-policy", "descends off-policy", "source"), [
            (e.name, e.estimator.name, _combination(e.on_policy), _combination(e.off_policy), e.source)
            for e in CATALOGUE.values()
        ]
    if what is Listing.targets:
        from gradlab.targets import TARGETS

        return ("name", "objective", "source"), [(t.name, t.statement, t.source) for t in TARGETS.values()]
    if what is Listing.kernels:
        from gradlab.kernels import KERNELS, VOCABULARY_KERNELS

        return ("name", "source"), [*((k.name, k.source) for k in KERNELS.values()), *VOCABULARY_KERNELS.items()]
    if what is Listing.claims:
        from gradlab.ledger import PUBLISHED, STATEMENTS

        claims = [(name, said, PUBLISHED[name.split(".")[0]][1]) for name, said in STATEMENTS.items()]
        return ("id", "statement", "source"), claims
    if what is Listing.models:
        from gradlab.policies.small import STAGES, TASKS

        return ("task", "stages", "what it does"), [(t.name, ", ".join(STAGES), t.statement) for t in TASKS.values()]
    return ("name", "question"), [(name, _title(path)) for name, path in analyses().items()]


def _choose(scripts: dict[str, Path], only: list[str] | None) -> list[str]:
    if not only:
        return list(scripts)
    chosen = []
    for wanted in only:
        matches = [name for name in scripts if name == wanted or name.split("_")[0] == wanted]
        if not matches:
            check_name("analysis", wanted, scripts)
        chosen += matches
    return [name for name in scripts if name in chosen]


def _combination(parts: dict[str, float] | None) -> str:
    if parts is None:
        return "none of the targets"
    return " + ".join(name if c == 1 else f"{c:g}·{name}" for name, c in parts.items()).replace("+ -1·", "− ")


def _title(script: Path) -> str:
    """First heading of a percent script."""
    for line in script.read_text(encoding="utf-8").splitlines():
        if line.startswith("# # "):
            return line[4:]
    return ""


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2, an interruption exit code 130."""
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        from gradlab.audit import LossError

        if isinstance(error, LossError):
            print(error.trace, end="", file=sys.stderr)
        print(f"gradlab: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        # typer raises its own usage errors; anything else is ours and keeps its traceback.
        if not hasattr(error, "exit_code"):
            raise
        if hasattr(error, "show"):
            error.show()
        sys.exit(int(error.exit_code))
    sys.exit(code or 0)
