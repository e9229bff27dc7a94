"""What is added from outside: a package installed beside gradlab, and what `register` refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gradlab as gl
from gradlab.estimators.kernels import KERNELS

EXTENSION = Path(__file__).parent / "extension"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The example package as an installer leaves it: the modules, and their metadata with the entry point."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(EXTENSION / "gradlab_example", folder / "gradlab_example")
    metadata = folder / "gradlab_example-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: gradlab-example\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[gradlab]\nexample = gradlab_example:register\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


def python(environment, code):
    """Run code in a process of its own, beside the example package; what it prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def gradlab(environment, *commands):
    """Run commands one after the other in a process beside the example package; what each prints, in one line."""
    code = f"""
import sys
from gradlab.cli.main import app
for command in {commands}:
    print("\\f", end="")
    app([str(word) for word in command], standalone_mode=False)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [" ".join(printed.split()) for printed in done.stdout.split("\f")[1:]]


def test_an_installed_package_is_measured_drawn_and_told_to_workers(installed):
    found = python(
        installed,
        """
import json, torch
import gradlab as gl
policy = gl.policies.POLICIES["positions"].random(vocab=3, length=2, seed=0)
scenarios = [gl.Scenario(policy, policy.perturbed(kl=0.2, seed=s)) for s in (1, 2)]
exact = gl.measure(["k2-loss", "huber-loss", gl.Estimator("½-exponential")], scenarios, ["reverse_kl", "squared_kl"])
two = gl.measure([gl.Estimator("½-exponential"), "huber-loss"], scenarios, samples=400, jobs=2)
one = gl.measure([gl.Estimator("½-exponential"), "huber-loss"], scenarios, samples=400)
chain = gl.Markov.random(vocab=3, length=3, seed=0)
near = gl.Scenario(chain, chain.perturbed(kl=0.2, seed=1))
listed = gl.Scenario(*(gl.Tree(torch.cat([p.table[:1], *[p.table[1:]] * 4])) for p in (near.policy, near.reference)))
whole = gl.Estimator("½-exponential", credit="sequence")
try:
    gl.exact.moments(gl.Estimator("huber", credit="sequence"), near)
except ValueError as error:
    refused = str(error)
gaussian = gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(0.5, 1.1))
print(json.dumps({
    "bias": exact.bias.tolist(), "family": exact.family[0], "same": one.equals(two), "refused": refused,
    "colour": gl.plots.style_of("huber-loss").colour, "other": gl.plots.style.look_of(whole).colour,
    "quadrature": [gl.exact.moments(e, gaussian).trace_cov for e in (gl.Estimator("huber"), whole)],
    "value": [gl.exact.value_moments("½-exponential", s, "sequence").mean for s in (near, listed)],
}))
""",
    )
    assert found["family"] == "positions"
    assert found["bias"][0] < 1e-12  # k2 as loss per token is the reverse KL where no prefix matters
    assert found["bias"][2] > 0.001
    assert found["same"]
    assert "'huber' of a whole response's log-ratio does not decompose over time" in found["refused"]
    assert found["colour"] == "#332288"
    assert found["other"].upper() in gl.plots.style.OTHERS
    assert all(value > 0 for value in found["quadrature"])
    assert found["value"][0] == pytest.approx(found["value"][1], rel=1e-12)  # dynamic programming and enumeration


def test_an_installed_package_is_on_the_command_line(installed, tmp_path):
    output = ("--output", str(tmp_path))
    kernels, estimators, targets, analyses, claims, measured, audited, _, told = gradlab(
        installed,
        ("list", "kernels"),
        ("list",),
        ("list", "targets"),
        ("list", "analyses"),
        ("list", "claims"),
        ("measure", "-e", "huber-loss", "-t", "squared_kl", "--family", "positions", "--vocab", 3),
        ("audit", "example"),
        ("reproduce", "--quick", "--only", "20_huber", *output),
        ("claims", "huber-biased", *output),
    )
    assert "huber" in kernels
    assert "huber-loss" in estimators
    assert "squared_kl" in targets
    assert "Does a bounded coefficient bias k2?" in analyses
    assert "huber-biased" in claims
    assert "positions v=3 T=3" in measured
    assert "the reverse KL with frozen prefixes" in audited
    assert "HOLDS" in told
    assert "huber as loss is biased by more than 1 %" in told


def test_a_package_that_cannot_register_is_named_and_the_rest_goes_on(installed, tmp_path):
    broken = tmp_path / "broken-1.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (broken / "entry_points.txt").write_text("[gradlab]\nbroken = not_there:register\n")
    code = """
import json, warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import gradlab as gl
    names = list(gl.ESTIMATORS)
print(json.dumps([str(w.message) for w in said if "gradlab" in str(w.message)] + names[:1]))
"""
    environment = {**installed, "PYTHONPATH": os.pathsep.join([str(tmp_path), installed["PYTHONPATH"]])}
    said, first = python(environment, code)
    assert "not_there:register to gradlab could not register: ModuleNotFoundError" in said
    assert first == "k1-loss"


# ---- by hand -------------------------------------------------------------------------------------------------------------


def double(x, log_ref):
    return 2 * x


def test_a_scaled_kernel_runs_on_chains_and_a_name_is_registered_once():
    scaled = gl.Kernel(
        "2k3", lambda x, _: 2 * (torch.expm1(-x) + x), lambda x, _: -2 * torch.expm1(-x), "", growth=lambda x: (-x).exp()
    )
    gl.register(scaled)
    gl.register(scaled)
    assert list(KERNELS)[-1] == "2k3"
    chain = gl.Markov.random(vocab=3, length=5, seed=0)
    scenario = gl.Scenario(chain, chain.perturbed(kl=0.3, seed=1))
    for placement in ("loss", "reward"):
        one, two = (gl.exact.moments(gl.Estimator(k, placement, "sequence"), scenario) for k in ("k3", "2k3"))
        torch.testing.assert_close(two.mean, 2 * one.mean, rtol=1e-10, atol=1e-13)
        assert two.trace_cov == pytest.approx(4 * one.trace_cov, rel=1e-10)
    with pytest.raises(ValueError, match="there is a kernel '2k3' already, registered"):
        gl.register(gl.Kernel("2k3", double, lambda x, _: torch.full_like(x, 2.0), "", additive=True))
    with pytest.raises(ValueError, match="there is a kernel 'k1' already, gradlab's own"):
        gl.register(gl.Kernel("k1", double, lambda x, _: torch.full_like(x, 2.0), "", additive=True))


@pytest.mark.parametrize(
    ("item", "name", "said"),
    [
        (
            gl.Kernel("bad", double, lambda x, _: torch.ones_like(x), ""),
            None,
            "derivative of kernel bad is not that of its value",
        ),
        (gl.Kernel("bad", lambda x, _: x + 1, lambda x, _: torch.ones_like(x), ""), None, "must be 0 at ℓ = 0"),
        (gl.Kernel("bad", lambda x, _: x.abs(), lambda x, _: x.sign(), "", additive=True), None, "says that it is additive"),
        (
            gl.Kernel("bad", lambda x, _: x**3, lambda x, _: 3 * x**2, "", growth=torch.exp),
            None,
            "does not grow as it says",
        ),
        (gl.Kernel("bad", lambda x, ref: x * ref, lambda x, ref: ref, ""), None, "depends on log ref"),
        (gl.Kernel("bad", lambda x: x, lambda x: x, ""), None, "does not take ℓ and log ref"),
        (gl.Kernel("bad", lambda x, _: x, lambda x, _: torch.ones_like(x), ""), "other", "it has a name of its own, 'bad'"),
        (gl.Estimator("k2"), None, "an estimator is registered by a name"),
        (gl.Estimator("k2", clip=None), " ", "a name for a registered estimator is a word"),
        (gl.Target("t", "", "", lambda policy, *_: 1.0), None, "the objective of target t must be a function"),
        (gl.Target("t", "", "", lambda policy, *_: policy.table), None, "the objective of target t must be a function"),
        (type("Mine", (), {}), None, "a class of policies is a gl.policies.Tabular"),
        (type("Mine", (gl.policies.Tabular,), {}), None, "needs a classmethod random"),
        (SimpleNamespace(PACKAGE="x"), "x", "cannot register a SimpleNamespace; what can be is a Kernel"),
        ("analyses/mine.py", None, "an analysis is a script NN_name.py"),
        ("20_nowhere.py", None, "there is no analysis"),
    ],
)
def test_what_does_not_do_what_it_promises_is_refused(item, name, said):
    with pytest.raises(ValueError, match=said):
        gl.register(item, name)


class Wrong(gl.policies.Tabular):
    """A policy whose occupancy is not that of its contexts."""

    @classmethod
    def random(cls, seed=0):
        return cls(torch.zeros(2, 3, dtype=torch.float64), 2)

    def contexts(self, tokens):
        return torch.zeros_like(tokens)

    def occupancy(self):
        return torch.ones(2, dtype=torch.float64)


def test_a_policy_class_is_tried():
    with pytest.raises(ValueError, match=r"Wrong.occupancy\(\) is not how often the rows of its table are visited"):
        gl.register(Wrong)
    right = type("Right", (Wrong,), {"occupancy": lambda self: torch.tensor([2.0, 0.0], dtype=torch.float64)})
    with pytest.raises(ValueError, match="emits from one row more than once"):
        gl.register(right)
    right.revisits = True
    gl.register(right)
    assert gl.policies.POLICIES["right"] is right


def test_what_is_declared_of_an_estimator_is_checked():
    with pytest.raises(ValueError, match="unknown target 'reverse'"):
        gl.register(gl.Estimator("k2"), "mine", on_policy={"reverse": 1.0})
    with pytest.raises(ValueError, match="of an estimator source, on_policy, off_policy, colour can be declared, got color"):
        gl.register(gl.Estimator("k2"), "mine", color="red")
    with pytest.raises(ValueError, match="only of an estimator something is declared"):
        gl.register(gl.TARGETS["zero"], source="me")
    gl.register(gl.Estimator("k2"), "mine", on_policy={"reverse_kl_frozen_prefix": 1.0})
    assert gl.CATALOGUE["mine"].on_policy == {"reverse_kl_frozen_prefix": 1.0}
    assert gl.plots.style_of("mine").colour in gl.plots.style.OTHERS


def test_claims_of_the_users_own_are_settled_without_being_registered():
    frame = gl.measure(["k2-loss", "k3-loss"], gl.Scenario(gl.Bandit([0, 1, 2]), gl.Bandit([2, 0, 0])))
    mine = gl.claims.claim(
        "mine", "bandit", "mine", "bias", ">", 0.01, statement="k3 is biased", where={"estimator": "k3-loss"}
    )
    settled = gl.claims.verify({"mine": frame}, claims=[mine])
    assert settled[["id", "published", "verdict"]].values.tolist() == [["mine", "k3 is biased", "HOLDS"]]
    assert "mine" not in set(gl.claims.ledger()["id"])
    with pytest.raises(ValueError, match="claims must be made by"):
        gl.claims.verify({"mine": frame}, claims=["mine"])
    with pytest.raises(ValueError, match="unknown claim 'mind'; did you mean 'mine'"):
        gl.claims.verify({"mine": frame}, ["mind"], claims=[mine])
    with pytest.raises(ValueError, match="estimator is given twice"):
        gl.claims.claim("mine", "x", "mine", "bias", ">", 0, statement="", where={"estimator": "a"}, estimator="b")
    with pytest.raises(ValueError, match=r"says .* already; give another sentence another id"):
        gl.claims.claim("k2-loss", "x", "mine", "bias", ">", 0, statement="something else")
