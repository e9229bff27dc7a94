"""Functions lifted out of files that cannot be run: with what they use, and with all that is missing told at once."""

from __future__ import annotations

import sys

import pytest
import torch

import gradlab as gl
from gradlab.audit import bind
from gradlab.audit.lift import lift
from gradlab.audit.load import load
from gradlab.cli import main

REDUCE = """
import absent_kernels as kernels

EPS = 1e-8

def masked_mean(x, mask):
    return (x * mask).sum() / (mask.sum() + EPS)

def masked_sum(x, mask):
    return (x * mask).sum(-1)

def fast(x):
    return kernels.fast(x)
"""
LOSSES = """
import logging
from dataclasses import dataclass

import torch
import absent_cluster
from absent_parallel.core import mpu, tensor_parallel
from absent_configuration import Config

import mine.ops.reduce as R
from .ops.reduce import fast
from .absent_registry import register

logger = logging.getLogger(__name__)
HALF: float = 0.5

@dataclass
class Out:
    loss: torch.Tensor
    extra: "Config | None" = None

class Trainer(absent_cluster.Base):
    weight = HALF

    @staticmethod
    def kl(log_probs, ref_log_probs, mask):
        return k2(log_probs - ref_log_probs, mask)

    def kl_of_self(self, log_probs, ref_log_probs, mask):
        return self.beta * k2(log_probs - ref_log_probs, mask)

@register("kl")
def kl_loss(log_probs: torch.Tensor, ref_log_probs: torch.Tensor, mask, config: Config | None = None) -> Out:
    logger.debug("called")
    return Out(k2(log_probs - ref_log_probs, mask))

def k2(log_ratio, mask):
    return R.masked_sum(HALF * log_ratio**2, mask).mean()

def configured(log_probs, ref_log_probs, mask, config: Config = None):
    if isinstance(config, Config):
        raise ValueError("not reached")
    return k2(log_probs - ref_log_probs, mask)

def needs(log_probs, mask):
    return fast(log_probs) + tensor_parallel.gather(log_probs) + mpu.group()

def even(log_probs, mask, n=4):
    return (log_probs * mask).sum() if n == 0 else odd(log_probs, mask, n - 1)

def odd(log_probs, mask, n):
    return even(log_probs, mask, n - 1)
"""


@pytest.fixture
def losses(tmp_path):
    folder = tmp_path / "mine"
    (folder / "ops").mkdir(parents=True)
    (folder / "__init__.py").write_text("import absent_cluster\n")
    (folder / "ops" / "__init__.py").write_text("raise RuntimeError('no GPU')\n")
    (folder / "ops" / "reduce.py").write_text(REDUCE)
    (folder / "losses.py").write_text(LOSSES)
    return folder / "losses.py"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gradlab", "audit", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main.main()
    return int(stop.value.code or 0)


def test_a_function_is_lifted_with_what_it_uses_and_nothing_else(losses):
    found = lift(losses, "kl_loss")
    assert sorted(found.names) == ["HALF", "Out", "k2", "kl_loss", "logger", "masked_sum (of reduce.py)"]
    assert found.names[0] == "kl_loss"
    assert found.dropped == ["register('kl')"]
    x, mask = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert float(found.function(x, 0 * x, mask).loss) == (0.5 + 12.5) / 2
    assert not [name for name in sys.modules if name.startswith(("mine", "absent"))]


def test_a_file_that_cannot_be_run_is_lifted_from_and_the_report_says_so(monkeypatch, capsys, losses):
    assert run(monkeypatch, f"{losses}:kl_loss", "--quick", "--expect", "reverse_kl_frozen_prefix") == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "k2, HALF, masked_sum (of reduce.py)" in out
    assert "the rest of losses.py is not run: No module named 'absent_cluster'" in out
    assert "not asked" in out


def test_a_module_that_cannot_be_imported_is_lifted_from(monkeypatch, losses):
    monkeypatch.syspath_prepend(losses.parent.parent)
    assert gl.audit(load("mine.losses:kl_loss"), quick=True).on_policy.descends("reverse_kl_frozen_prefix")


def test_methods_are_lifted_as_functions(losses):
    assert gl.audit(load(f"{losses}:Trainer.kl"), quick=True).on_policy.scale == pytest.approx(1)
    method = load(f"{losses}:Trainer.kl_of_self")
    assert gl.audit(method, settings={"self.beta": 0.3}, quick=True).on_policy.scale == pytest.approx(0.3)


def test_functions_that_call_each_other_are_lifted_together(losses):
    found = lift(losses, "even")
    assert sorted(found.names) == ["even", "odd"]
    assert float(found.function(torch.ones(1, 2), torch.ones(1, 2))) == 2


def test_what_is_missing_is_told_at_once_with_what_to_do(losses):
    with pytest.raises(ValueError, match=r"needs of losses.py uses ") as told:
        load(f"{losses}:needs")
    for part in ("absent_kernels", "absent_parallel.core.tensor_parallel", "absent_parallel.core.mpu", "--stub mpu"):
        assert part in str(told.value)
    assert "fast" not in str(told.value).replace("--stub", "")


def test_a_stub_is_no_instance_of_anything_and_is_never_called(losses):
    with pytest.raises(
        ValueError, match=r"uses absent_configuration.Config, .*: install absent_configuration, .*--stub Config"
    ):
        load(f"{losses}:configured")
    stubbed = load(f"{losses}:configured", stubs=["Config"])
    assert gl.audit(stubbed, quick=True).on_policy.descends("reverse_kl_frozen_prefix")
    assert "Config stubbed" in bind(stubbed).binding[-1].how
    called = load(f"{losses}:needs", stubs=["mpu", "tensor_parallel", "kernels"])
    with pytest.raises(gl.audit.LossError, match=r"kernels.fast is a stub, and the loss calls it"):
        gl.audit(called)


def test_a_stub_for_nothing_and_a_name_that_is_not_there_are_refused(monkeypatch, capsys, losses):
    assert run(monkeypatch, f"{losses}:kl_loss", "--stub", "Confg") == 2
    assert "kl_loss of losses.py imports no Confg; there is nothing to stub" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"No module named 'absent_cluster'.*; nor does it define 'kl_los', but .*kl_loss"):
        load(f"{losses}:kl_los")


def test_a_line_that_fails_is_told(tmp_path):
    (tmp_path / "losses.py").write_text("import absent_cluster\nX = 1 / 0\ndef kl_loss(logprob, ref_logprob):\n    return X\n")
    with pytest.raises(ValueError, match=r"running line 2 of losses.py, which defines X, failed: ZeroDivisionError"):
        load(f"{tmp_path / 'losses.py'}:kl_loss")


def test_names_of_classes_branches_and_star_imports_are_found(tmp_path):
    (tmp_path / "helper.py").write_text("import absent_cluster\ndef square(x):\n    return x * x\n")
    (tmp_path / "losses.py").write_text(
        """
import absent_cluster
from helper import *
try:
    import absent_fast
except ImportError:
    absent_fast = None
if absent_fast is None:
    def half(x):
        return x / 2
class Kernel:
    power = 2
    doubled = power * 1
    def __call__(self, x):
        return half(square(x)) * (self.doubled - 1)
def kl_loss(logprob, ref_logprob):
    return Kernel()(logprob - ref_logprob)
"""
    )
    audited = gl.audit(load(f"{tmp_path / 'losses.py'}:kl_loss"), quick=True)
    assert audited.on_policy.descends("reverse_kl_frozen_prefix")


def test_a_dataclass_that_an_argument_is_annotated_with_comes_along(tmp_path):
    (tmp_path / "losses.py").write_text(
        """
from dataclasses import dataclass
import torch
import absent_cluster
from absent_configuration import Config

@dataclass
class Inputs:
    trainer_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    loss_mask: torch.BoolTensor
    weights: torch.Tensor | None = None

@dataclass
class Other(Config):
    pass

def kl_loss(inputs: Inputs, other: Other | None = None):
    kept = inputs.loss_mask & (inputs.trainer_logprobs < 1)
    return (0.5 * (inputs.trainer_logprobs - inputs.ref_logprobs) ** 2 * kept).sum()
"""
    )
    audited = gl.audit(load(f"{tmp_path / 'losses.py'}:kl_loss"), quick=True)
    assert audited.on_policy.descends("reverse_kl_frozen_prefix")
    assert "Inputs, kl_loss" in audited.subject.binding[-1].how
