"""Change one expression at a time in modules of gradlab, and ask whether a test notices.

The changes are mutmut's. Functions with a decorator, which it leaves out, are decorated after their definition here, so that they are
changed, too. One process imports everything and collects the tests; every mutant runs in a fork of it, in the tests that
reach the changed function, the quickest first, up to the first failure. Not counted are changes to the words of an error.

    python scripts/mutations.py gradlab/intervals.py gradlab/targets.py --sample 150

The record is kept in `mutants/`: what is in it is not run again.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
#: Decorators of functions that are changed nevertheless.
DECORATORS = ("checked", "property", "cached_property")
#: What mutmut adds to the name of a function, before the number of the mutant.
MARK = "__mutmut_"
NOT_REACHED = 3
#: Files of tests that are quick and reach the modules with the mathematics.
TESTS = [
    f"tests/test_{name}.py"
    for name in [
        *("audit", "catalogue", "components", "estimators", "exact", "exact_covariance", "identities", "intervals", "kernels"),
        *("markov", "parts", "policy_loss", "rounding", "targets"),
    ]
]


def decorated_after(source: str) -> str:
    """The source of a module with decorators applied after the definition: `f = checked(f)`."""
    lines = source.splitlines()
    found = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and len(node.decorator_list) == 1
    ]
    for node in sorted(found, key=lambda node: -node.lineno):
        (decorator,) = node.decorator_list
        if isinstance(decorator, ast.Name) and decorator.id in DECORATORS:
            assert node.end_lineno is not None
            lines.insert(node.end_lineno, f"{' ' * node.col_offset}{node.name} = {decorator.id}({node.name})")
            del lines[decorator.lineno - 1]
    return "\n".join(lines) + "\n"


class Wordless(ast.NodeTransformer):
    """A function without its name, and without what an error says."""

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        return ast.Raise(exc=node.exc.func if isinstance(node.exc, ast.Call) else node.exc, cause=node.cause)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if MARK in node.name:
            node.name = "f"
        return self.generic_visit(node)


def mutants_of(module: str, folder: Path) -> dict[str, str]:
    """Write the mutants of a module into a copy of the repository; what each of them changes, by its name."""
    from mutmut.mutation.file_mutation import mutate_file_contents

    path = folder / module
    path.write_text(mutate_file_contents(module, decorated_after(path.read_text())).code)
    source = path.read_text()
    nodes = {node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and MARK in node.name}
    lines = source.splitlines()
    text = {
        name: [line.replace(name, "f") for line in lines[node.lineno - 1 : node.end_lineno]] for name, node in nodes.items()
    }
    shape = {name: ast.dump(Wordless().visit(node)) for name, node in nodes.items()}
    changes = {}
    for name in nodes:
        original = name.partition(MARK)[0] + MARK + "orig"
        if name != original and shape[name] != shape[original]:
            lines_changed = difflib.unified_diff(text[original], text[name], n=0, lineterm="")
            said = [line for line in lines_changed if line[0] in "+-" and line[:3] not in ("+++", "---")]
            changes[f"{module.removesuffix('.py').replace('/', '.')}.{name}"] = "\n".join(said)
    return changes


class Mutations:
    """A plugin of pytest that runs mutants in forks, in place of its loop over the tests."""

    def __init__(self, names: list[str], record: Path, budget: float) -> None:
        self.names, self.record, self.budget = names, record, budget

    def pytest_runtestloop(self, session: Any) -> bool:
        times = self.record.with_suffix(".tests.json")
        self.forked(lambda: self.measure(session.items, times), 7200)
        reached = read(times)
        items = {item.nodeid: item for item in session.items}
        done = {line["name"] for line in read(self.record)}
        for name in self.names:
            if name not in done:
                self.run(name, reached, items)
        return True

    def run(self, name: str, reached: list[dict[str, Any]], items: dict[str, Any]) -> None:
        function, spent, chosen = name.partition(MARK)[0], 0.0, []
        for test in sorted(reached, key=lambda test: test["seconds"]):
            if test["name"] in items and function in test["reaches"] and (spent := spent + test["seconds"]) < self.budget:
                chosen.append(items[test["name"]])
        start = time.perf_counter()
        code = self.forked(lambda: self.survives(chosen, name), 20 + 10 * min(spent, self.budget)) if chosen else NOT_REACHED
        outcome = {0: "survived", NOT_REACHED: "not reached"}.get(code, "caught")
        append(
            self.record, name=name, outcome=outcome, code=code, tests=len(chosen), seconds=round(time.perf_counter() - start, 2)
        )

    def forked(self, work: Callable[[], int | None], seconds: float) -> int:
        """The exit code of `work` in a fork, which has so much processor time."""
        pid = os.fork()
        if pid == 0:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
            os._exit(int(work() or 0))
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    @staticmethod
    def measure(items: list[Any], times: Path) -> None:
        """Write how long tests take and which functions they reach; those that fail without a change reach none."""
        import mutmut.mutation.trampoline as trampoline

        hits: set[str] = set()
        trampoline.record_trampoline_hit = lambda name, caller=None: hits.add(name)
        trampoline.set_mutant_under_test("stats")
        done = {line["name"] for line in read(times)}
        for item in items:
            if item.nodeid not in done:
                hits.clear()
                start = time.process_time()
                passed = passes(item, None)
                reaches = sorted(hits) if passed else []
                append(times, name=item.nodeid, seconds=round(time.process_time() - start, 4), reaches=reaches)

    @staticmethod
    def survives(items: list[Any], name: str) -> int:
        import mutmut.mutation.trampoline as trampoline

        trampoline.set_mutant_under_test(name)
        return int(not all(passes(item, after) for item, after in zip(items, [*items[1:], None], strict=True)))


def passes(item: Any, after: Any) -> bool:
    from _pytest.runner import runtestprotocol

    return not any(report.failed for report in runtestprotocol(item, log=False, nextitem=after))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, **entry: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("modules", nargs="+")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files of tests")
    parser.add_argument("-k", default="", help="which tests, as pytest has it")
    parser.add_argument("--sample", type=int, help="mutants of each module, drawn at random; all if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of tests for one mutant")
    parser.add_argument("--record", type=Path, default=ROOT / "mutants" / "record.jsonl", help="what is in it is not run again")
    parser.add_argument("--only", nargs="*", help="names of mutants")
    given = parser.parse_args()
    record = given.record.resolve()
    record.parent.mkdir(exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for name in subprocess.check_output(["git", "ls-files"], text=True, cwd=ROOT).splitlines():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        changes, drawn = dict[str, str](), dict[str, list[str]]()
        for module in given.modules:
            found = mutants_of(module, folder)
            few = given.sample is not None and given.sample < len(found)
            drawn[module] = random.Random(given.seed).sample(sorted(found), given.sample) if few else sorted(found)
            changes |= found
        names = given.only or [name for module in given.modules for name in drawn[module]]
        os.chdir(folder)
        sys.path.insert(0, made)
        import pytest

        import gradlab

        assert Path(gradlab.__file__).parent == folder / "gradlab", gradlab.__file__
        sys.dont_write_bytecode = True
        os.environ.pop("MUTANT_UNDER_TEST", None)
        pytest.main(
            ["-s", "-p", "no:cacheprovider", "-k", given.k, *given.tests], plugins=[Mutations(names, record, given.budget)]
        )
    outcomes = {line["name"]: line["outcome"] for line in read(record)}
    for name in names:
        if outcomes[name] != "caught":
            print(f"## {name} {outcomes[name]}\n{changes[name]}")
    for module, chosen in drawn.items():
        caught = sum(outcomes.get(name) == "caught" for name in chosen)
        print(f"{module}: {caught} of {len(chosen)} caught")


if __name__ == "__main__":
    main()
