"""The shape of the package: imports follow the way of the data, and what is public is documented and runs."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gradlab as gl
from gradlab._common.streams import STREAMS

ROOT = Path(__file__).parents[1]
MODULES = ["gradlab", *(module.name for module in pkgutil.walk_packages(gl.__path__, "gradlab."))]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the import contracts of pyproject.toml on the package in a folder."""
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_imports_point_backwards():
    pytest.importorskip("importlinter")
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


#: What the name of an analysis is short for: one word of the script's own name, or its beginning.
SCRIPTS = sorted((ROOT / "analyses").glob("[0-9]*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_question_has_one_name_everywhere(script):
    drawn = {path.stem for path in (ROOT / "gradlab" / "plots").glob("[a-z]*.py")}
    settled = {path.stem for path in (ROOT / "gradlab" / "ledger").glob("[a-z]*.py")}
    words = script.stem[3:]
    (name,) = [name for name in drawn & settled if name in words or name.rstrip("s") in words.split("_")]
    asked = ROOT / "gradlab" / "questions" / f"{name}.py"
    test = ROOT / "tests" / f"test_{name}.py"
    assert not asked.is_file() or test.is_file(), f"{asked} has no test of its name"
    claims = importlib.import_module(f"gradlab.ledger.{name}").CLAIMS
    assert {claim.frame[:2] for claim in claims} == {script.stem[:2]}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_analysis_begins_in_a_notebook_as_it_does_on_the_command_line(script, monkeypatch):
    """A notebook has no `__file__`, and its command line is the kernel's."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "/run/kernel-1.json"])
    cells = re.split(r"^# %%.*\n", script.read_text(encoding="utf-8"), flags=re.MULTILINE)
    first = next(cell for cell in cells if "import gradlab" in cell)
    names: dict[str, object] = {}
    exec(compile(first.split("study = ")[0], script.name, "exec"), names)
    (call,) = re.findall(r"^study = gl\.report\.study\(.*\)$", script.read_text(encoding="utf-8"), re.MULTILINE)
    exec(call, names)
    assert names["study"].name == script.stem
    assert not names["study"].quick


def test_a_forward_import_is_caught(tmp_path):
    pytest.importorskip("importlinter")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "gradlab", tmp_path / "gradlab", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "gradlab" / "estimators" / "kernels.py").open("a", encoding="utf-8") as kernels:
        kernels.write("\nfrom gradlab import measure\n")
    with (tmp_path / "gradlab" / "plots" / "__init__.py").open("a", encoding="utf-8") as plots:
        plots.write("\nfrom gradlab.solvers.exact import moments\n")
    result = lint(tmp_path)
    assert result.returncode == 1
    assert "gradlab.estimators.kernels -> gradlab.measure" in result.stdout
    assert "gradlab.plots -> gradlab.solvers.exact" in result.stdout


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_documented(name):
    assert importlib.import_module(name).__doc__, "no docstring"


@pytest.mark.parametrize("name", gl.__all__)
def test_what_is_public_exists_and_is_documented(name):
    item = getattr(gl, name)
    if inspect.isclass(item) or inspect.isfunction(item) or inspect.ismodule(item):
        assert len(inspect.getdoc(item) or "") > 20, "no docstring"
    if inspect.isclass(item):
        for key, member in vars(item).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if inspect.isfunction(function) and not key.startswith("_"):
                assert inspect.getdoc(getattr(item, key)), f"{name}.{key} has no docstring"  # its own, or that of a base


def test_importing_gradlab_loads_what_is_used_and_a_measurement_draws_nothing():
    """In a process of their own: what another test has imported says nothing."""
    code = f"""
import sys, gradlab as gl
assert gl.__version__
seen = [name for name in {SLOW} if name in sys.modules]
gl.measure("k2-loss", gl.Scenario(gl.Bandit([0, 1]), gl.Bandit([0, 0])))
print(seen, [name for name in {SLOW[1:]} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split("\n")[0] == "[] []"


#: What takes long to import; torch is used by every measurement.
SLOW = ["torch", "matplotlib", "seaborn", "scipy.stats", "scipy.integrate", "typer", "rich"]


@pytest.mark.parametrize(
    ("arguments", "loaded"),
    [
        (["--help"], []),
        (["audit", "--help"], []),
        (["list"], ["torch", "rich", "scipy"]),
        (["audit", f"{ROOT / 'gradlab' / 'testing.py'}:nothing"], ["torch", "rich", "scipy", "pandas", "joblib"]),
    ],
)
def test_a_command_waits_for_nothing_that_it_does_not_use(arguments, loaded):
    code = f"""
import sys
from gradlab.cli.main import main
sys.argv[1:] = {arguments}
try:
    main()
except SystemExit:
    print("loaded", *[name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert set(done.stdout.splitlines()[-1].split()[1:]) <= {*loaded, "rich"}, "typer prints help with rich"


HEAVY = [
    "torch",
    "scipy",
    "pandas",
    "joblib",
    "rich",
    "jinja2",
    "matplotlib",
    "scipy.stats",
    "scipy.optimize",
    "scipy.integrate",
]


@pytest.mark.parametrize("name", ["audit", "components", "measure"])
def test_no_function_hides_a_module_of_its_name(name):
    module = importlib.import_module(f"gradlab.{name}")
    assert getattr(gl, name) is module
    assert inspect.signature(module) == inspect.signature(getattr(module, name))
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        module(nothing_like_it=1)


def test_what_the_modules_hold_is_reached_through_the_package():
    assert "bias" in gl.measure.COLUMNS
    assert {"log_prob", "mask"} <= set(gl.audit.Batch.__annotations__)
    with pytest.raises(AttributeError, match="module 'gradlab' has no attribute 'mesure'"):
        gl.mesure  # noqa: B018
    assert set(gl.__all__) <= set(dir(gl))


def test_public_names_are_sorted_and_complete():
    assert list(gl.__all__) == sorted(set(gl.__all__), key=lambda name: (not name.isupper(), name[0].islower(), name))


def test_a_stream_of_random_numbers_has_one_user():
    """Keys differ, every registered stream is drawn from in one place, and nothing else makes generators or adds to seeds."""
    sources = {
        path: re.sub(r"^ *(>>>|\.\.\.) .*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)  # but for the examples
        for folder in ("gradlab", "analyses")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert len(set(STREAMS.values())) == len(STREAMS)
    registry = ROOT / "gradlab" / "_common" / "streams.py"
    for name in STREAMS:
        if name.startswith("analysis."):
            _, number, *part = name.split(".")
            (script,) = (ROOT / "analyses").glob(f"{number}_*.py")
            assert f"study.rng({json.dumps(part[0]) if part else ''}" in script.read_text(encoding="utf-8")
            continue
        users = [
            path
            for path, text in sources.items()
            if path != registry and re.search(rf'(generator|sequence)\([^()]*"{name}"', text)
        ]
        assert len(users) == (name != "child"), (name, users)
    others = {
        path.name
        for path, text in sources.items()
        if re.search(r"spawn_key|SeedSequence\(|default_rng\(|\bseed \+|\+ seed\b", text)
    }
    assert others <= {"streams.py", "tails.py"}  # workers of `running` are sent the sequence of their stream
