"""The command `gradlab reproduce`: run the analyses, several at a time, or measure anew and compare."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradlab._common.names import check_jobs, check_name

if TYPE_CHECKING:
    import pandas as pd

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for pictures, data and captions.")]
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=-1, help="Worker processes; -1 uses every core. Same bytes for any.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Entropy of every random draw.")]

#: Seconds between two lines about long work, where no bar can be drawn.
PULSE = 60.0
#: The analyses that take longest, to be started first: the last one to end should be a short one.
LONGEST = ("13", "15", "04", "14", "11", "10", "12", "07")


def analyses() -> dict[str, Path]:
    """The analysis scripts by name, gradlab's own and the registered ones."""
    from gradlab.study import analyses

    return analyses.analyses()


def title(script: Path) -> str:
    """First heading of a percent script."""
    for line in script.read_text(encoding="utf-8").splitlines():
        if line.startswith("# # "):
            return line[4:]
    return ""


def reproduce(
    quick: Annotated[bool, typer.Option("--quick", help="Smaller grids: all in about 2 minutes on two cores, not 12.")] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Run one analysis, by name or number; may be repeated.")
    ] = None,
    jobs: Jobs = 1,
    output: Output = Path("figures"),
    seed: Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Run analyses even if nothing they depend on has changed.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing: measure anew, compare with --output, exit 1 if anything moved.")
    ] = False,
) -> None:
    """Regenerate figures, data, captions and verdicts.

    Runs the numbered analyses, `--jobs` of them at a time. Each writes its results when it has them, so an interrupted run keeps
    what is finished, and the next run skips what is unchanged; an analysis that needs packages which are not installed is skipped,
    too. Writes the claims ledger as these results settle it, `claims.csv`, and `index.html`, which leads to a page for each
    analysis and to the claims with a filter.

    With `--check` the data in the output folder are measured again elsewhere and compared column by column. Between processors an
    exact number may differ by 1e-6 of itself, one of a network in single precision by 1e-3, a sampled one by a tenth of its
    interval's half-width; verdicts may not differ.

    Example: `gradlab reproduce --quick --only 03 --output /tmp/figures`
    """
    import joblib

    from gradlab._common.files import locked
    from gradlab.study import report
    from gradlab.study.resume import Record, Requirements

    check_jobs(jobs)
    if check and force:
        raise ValueError("--check measures every analysis anew and writes nothing; --force is for a run without it")
    started = time.perf_counter()
    scripts, jobs = analyses(), joblib.effective_n_jobs(jobs)
    chosen = _choose(scripts, only)
    needs = {name: Requirements.of(scripts[name]) for name in chosen}
    for name in [name for name in chosen if needs[name].missing]:
        if only:
            raise ValueError(f"{name} cannot run: {needs[name].missing}")
        print(f"{name} is skipped, and what is in {output} is left as it is: {needs[name].missing}")
        chosen.remove(name)
    options = ["--seed", str(seed), *(["--quick"] if quick else [])]
    if check:
        _check({name: scripts[name] for name in chosen}, output, options, jobs, {"quick": quick, "seed": seed}, started)
        return
    report.ensure_writable(output)
    with locked(output):
        records = {
            name: Record(scripts[name], output, {"quick": quick, "seed": seed, **needs[name].versions}) for name in chosen
        }
        unchanged = [] if force else [name for name in chosen if records[name].unchanged()]
        todo = {name: scripts[name] for name in chosen if name not in unchanged}
        if unchanged:
            print(f"unchanged, made again by --force: {', '.join(unchanged)}")
        before = _ledger(output)
        finished: list[str] = []
        try:
            for name, seconds, sources in _runs(todo, [*options, "--output", str(output)], jobs):
                records[name].save(sources)
                finished.append(name)
                print(f"{name} took {seconds:.1f} s ({len(finished)} of {len(todo)} done)")
        except KeyboardInterrupt:
            kept = ", ".join([*unchanged, *finished]) or "nothing"
            print(f"interrupted; finished and kept: {kept}", file=sys.stderr)
            raise
        settled = _settle(output, {name: title(path) for name, path in scripts.items()})
    changed = _changed(before, settled)
    for line in changed:
        print(line)
    print(
        f"pictures, data and captions are in {output}; {output / 'index.html'} leads to them all, `gradlab claims` is the ledger"
    )
    said = f"{len(settled)} verdicts, {len(changed)} changed" if before is not None else f"{len(settled)} verdicts"
    print(f"{said}; {_counted(len(todo), 'measured')}, {len(unchanged)} unchanged; {_duration(time.perf_counter() - started)}")


def _settle(output: Path, titles: dict[str, str]) -> pd.DataFrame:
    """Settle the ledger with what is in a folder; write it there, and the page that shows everything."""
    from gradlab._common.files import atomic_write
    from gradlab.ledger import claims, verify
    from gradlab.study import gallery

    settled = verify.verify(verify.load(output, {claim.frame for claim in claims()}))
    with atomic_write(output / "claims.csv") as part:
        settled.to_csv(part, index=False, lineterminator="\n")
    gallery.write(output, settled, titles)
    return settled


def _ledger(folder: Path) -> pd.DataFrame | None:
    """The ledger that an earlier run left in a folder; `None` where there is none, or none that can be read."""
    import pandas as pd

    try:
        committed = pd.read_csv(folder / "claims.csv")
        return committed if {"id", "scope", "frame", "verdict"} <= set(committed) else None
    except (OSError, ValueError):
        return None


def _changed(before: pd.DataFrame | None, after: pd.DataFrame) -> list[str]:
    """A line for every verdict that is not what it was."""
    if before is None:
        return []
    key = ["id", "scope", "frame"]
    both = before[[*key, "verdict"]].merge(after[[*key, "verdict"]], on=key, suffixes=("_before", "_after"))
    both = both[both["verdict_before"] != both["verdict_after"]]
    return [f"{r.id} ({r.scope}, {r.frame}): {r.verdict_before} → {r.verdict_after}" for r in both.itertuples()]


def _check(
    scripts: dict[str, Path], folder: Path, options: list[str], jobs: int, made: dict[str, object], started: float
) -> None:
    """Measure anew in a folder of its own, print what moved, and exit 1 if anything did."""
    from gradlab._common import frames
    from gradlab._common.console import wide_console
    from gradlab.study import check

    for name in scripts:
        known = frames.made(folder, name)
        if known != made:
            had = "there are none" if known is None else f"those there were made with {_spelled(known)}"
            raise ValueError(
                f"--check compares with the frames of {name} in {folder} made with {_spelled(made)}, and {had}; "
                "give the same --quick and --seed, or make them first without --check"
            )
    with tempfile.TemporaryDirectory(prefix="gradlab-check-") as place:
        anew, moved = Path(place), 0
        for name, seconds, _ in _runs(scripts, [*options, "--output", place], jobs, shown=False):
            differences = check.compare(folder, anew, name)
            moved += not differences.empty
            print(f"{name} {'moved' if len(differences) else 'is the same within rounding'} ({seconds:.1f} s)")
            if len(differences):
                wide_console().print(
                    differences.to_string(index=False, float_format="{:.6g}".format), highlight=False, markup=False
                )
        changed, compared = check.verdicts(folder, anew)
    for row in changed.itertuples():
        print(f"{row.id} ({row.scope}, {row.frame}): {row.before} → {row.after}")
    print(
        f"{compared} verdicts, {len(changed)} changed; {_counted(len(scripts), 'measured')}, {moved} moved; "
        f"{_duration(time.perf_counter() - started)}"
    )
    if moved or len(changed):
        raise typer.Exit(1)


def _spelled(made: dict[str, object]) -> str:
    return f"{'--quick ' if made.get('quick') else ''}--seed {made.get('seed', 0)}"


def _counted(number: int, done: str) -> str:
    return f"{number} {'analysis' if number == 1 else 'analyses'} {done}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


@contextlib.contextmanager
def _pulse(said: Callable[[], str]) -> Iterator[None]:
    """Print a line a minute while the block runs, where no progress bar is drawn: in a pipe or a file."""
    if sys.stderr.isatty():
        yield
        return
    over, started, out = threading.Event(), time.perf_counter(), sys.stdout

    def beat() -> None:
        while not over.wait(PULSE):
            print(f"after {_duration(time.perf_counter() - started)}: {said()}", flush=True, file=out)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _runs(
    scripts: dict[str, Path], options: list[str], jobs: int, shown: bool = True
) -> Iterator[tuple[str, float, list[str]]]:
    """Run analyses, several at a time if there are `jobs` for it; yield each one's name, seconds and imports when it is done.

    Alone they run in this process, where their progress is seen; together each is a process whose output is shown at its end,
    the longest first. Without `shown` what they print is left out.
    """
    from rich.console import Console
    from tqdm import tqdm

    from gradlab.study.resume import imported

    running: list[str] = []
    finished: list[str] = []

    def said() -> str:
        return f"{len(finished)} of {len(scripts)} done, at work on {', '.join(running) or 'none'}"

    def order(name: str) -> int:
        return LONGEST.index(name[:2]) if name[:2] in LONGEST else len(LONGEST)

    with _pulse(said):
        if jobs == 1:
            arguments = sys.argv
            for name, script in scripts.items():
                Console().rule(name, align="left")
                begun = time.perf_counter()
                running[:] = [name]
                try:
                    sys.argv = [str(script), *options]
                    with contextlib.nullcontext() if shown else contextlib.redirect_stdout(io.StringIO()):
                        runpy.run_path(str(script), run_name="__main__")
                finally:
                    sys.argv = arguments
                finished.append(name)
                yield name, time.perf_counter() - begun, imported()
            return

        def run(name: str) -> tuple[str, float, list[str], str]:
            begun = time.perf_counter()
            running.append(name)
            # The worker ends when this end of its standard input closes, however this process ends.
            with tempfile.TemporaryDirectory() as folder:
                listed = Path(folder) / "imported.json"
                command = [sys.executable, "-m", "gradlab.study.worker", str(listed), str(scripts[name]), *options]
                with subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                ) as worker:
                    printed, told = _read(worker)
                running.remove(name)
                if worker.returncode:
                    raise ValueError(f"{name} failed; run it alone with --jobs 1. It said: {told.strip() or printed.strip()}")
                sources = json.loads(listed.read_text(encoding="utf-8"))
            finished.append(name)
            return name, time.perf_counter() - begun, sources, printed

        with ThreadPoolExecutor(jobs) as pool:
            waiting = [pool.submit(run, name) for name in sorted(scripts, key=order)]
            try:
                for future in tqdm(as_completed(waiting), total=len(waiting), unit="analysis", disable=None):
                    name, seconds, sources, printed = future.result()
                    print(printed if shown else "", end="")
                    yield name, seconds, sources
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # what has not begun need not begin
                raise


def _read(worker: subprocess.Popen[str]) -> tuple[str, str]:
    """What a worker prints, read until it ends, with its standard input held open for so long."""
    assert worker.stdout is not None
    assert worker.stderr is not None
    told: list[str] = []
    reader = threading.Thread(target=lambda: told.append(worker.stderr.read() if worker.stderr else ""))
    reader.start()
    printed = worker.stdout.read()
    reader.join()
    worker.wait()
    return printed, "".join(told)


def _choose(scripts: dict[str, Path], only: list[str] | None) -> list[str]:
    if not only:
        return list(scripts)
    chosen = []
    for wanted in only:
        matches = [name for name in scripts if name == wanted or name.split("_")[0] == wanted.zfill(2)]
        if not matches:
            check_name("analysis", wanted, scripts)
        chosen += matches
    return [name for name in scripts if name in chosen]
