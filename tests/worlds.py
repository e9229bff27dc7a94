"""Small random scenarios, and comparisons that several test files share."""

from typing import Any

import numpy as np
import torch

import gradlab as gl

#: (vocabulary, length, end token) of small policies; `bandit` has a single position.
SHAPES = {"bandit": (4, 1, None), "tree": (3, 2, None), "deep": (2, 4, None), "eos": (3, 3, 1), "eos first": (2, 3, 0)}
TREES = [shape for shape in SHAPES if shape != "bandit"]


def scenario(shape: str, off_policy: bool = False, seed: int = 0) -> gl.Scenario:
    """Random policy, reference and, off-policy, behaviour; or two or three Gaussians of unequal variance."""
    if shape == "gaussian":
        return gl.Scenario(gl.Gaussian(0.3, 0.9), gl.Gaussian(-0.2, 1.0), gl.Gaussian(0.5, 1.1) if off_policy else None)
    vocab, length, eos = SHAPES[shape]
    rng = np.random.default_rng([seed, list(SHAPES).index(shape)])
    logits, to_reference, to_behaviour = rng.normal(size=(3, sum(vocab**t for t in range(length)), vocab))

    def policy(table: Any) -> gl.Policy:
        return gl.Bandit(table[0]) if length == 1 else gl.Tree(table, eos=eos)

    behaviour = policy(logits + 0.5 * to_behaviour) if off_policy else None
    return gl.Scenario(policy(logits), policy(logits + to_reference), behaviour)


def arrays(world: gl.Scenario) -> tuple[Any, Any, Any, int | None]:
    """Policy, reference, behaviour and end token as the oracles take them."""
    behaviour = None if world.behaviour is None else world.behaviour.table.numpy()
    return world.policy.table.numpy(), world.reference.table.numpy(), behaviour, world.policy.eos


def combination(parts: dict[str, float], world: gl.Scenario) -> torch.Tensor:
    """Σ share · ∇target."""
    return sum(share * gl.exact.gradient(name, world) for name, share in parts.items())


def assert_same(actual: Any, expected: Any, scale: float | None = None, tolerance: float = 1e-10, what: str = "") -> None:
    """∥actual − expected∥ ≤ tolerance · scale, by default the size of what is expected (which then may not be 0)."""
    actual, expected = (np.asarray(x, dtype=np.float64).ravel() for x in (actual, expected))
    assert actual.shape == expected.shape
    scale = float(np.linalg.norm(expected)) if scale is None else float(scale)
    assert scale > 0, f"{what}: nothing to compare with"
    error = float(np.linalg.norm(actual - expected)) / scale
    assert error <= tolerance, f"{what}: relative error {error:.2e}; {actual} is not {expected}"


def assert_prints(value: float, printed: str) -> None:
    """`value`, rounded to as many places as are printed, is what is printed."""
    places = len(printed.split(".")[1]) if "." in printed else 0
    assert float(f"{value:.{places}f}") == float(printed), f"{value!r} is not {printed}"
