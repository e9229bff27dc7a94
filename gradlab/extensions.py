"""What is added to gradlab from outside: kernels, estimators, targets, policy classes, claims, audit adapters and analyses.

A package registers by an entry point of the group `gradlab`, a function without arguments; a script by calling `register`.
"""

from __future__ import annotations

from typing import Any


def register(item: Any, name: str | None = None, **declared: Any) -> None:
    """Add something of your own to gradlab: it is then listed, measured, drawn, audited and settled like gradlab's own.

    | item | name | declared |
    |---|---|---|
    | a `Kernel` | its own | |
    | an `Estimator` | needed | `source`, `on_policy`, `off_policy` (what it descends, as `{"reverse_kl": 1.0}`), `colour` |
    | a `PolicyLoss`, with its `source` and `target` | needed | |
    | a `Target` | its own | |
    | a policy class | its own, in lower case | |
    | a claim, made by `gl.claims.claim` | its id and scope | |
    | an audit adapter: a module, or an object, with `PACKAGE`, `INSTALL` and `subjects()` | needed | |
    | an analysis: `Path` of a script `NN_name.py` | its own | |
    | a `gl.plots.Drawing` of a figure of an analysis | needed | |

    What is declared of an estimator is not believed but measured: `gl.testing.assert_descends` checks it. The same thing may be
    registered again; worker processes are told.
    Raises `ValueError` for a thing of another kind, a name that is taken, and whatever does not do what it promises: a kernel whose
    derivative is not that of its value, a target that is no scalar, a policy class without a method that is needed.

    >>> import gradlab as gl
    >>> gl.register(gl.Estimator("k3", clamp_value=5.0), "k3-bounded", source="mine")
    >>> gl.ESTIMATORS["k3-bounded"].clamp_value
    5.0
    """
    from pathlib import Path

    from gradlab.estimators import LOSSES, Estimator, PolicyLoss
    from gradlab.estimators.kernels import Kernel
    from gradlab.ledger import Claim
    from gradlab.targets import Target

    if declared and not isinstance(item, Estimator):
        raise ValueError(f"only of an estimator something is declared, got {', '.join(declared)} for a {type(item).__name__}")
    if isinstance(item, Kernel):
        from gradlab.estimators.kernels import KERNELS, check_kernel

        check_kernel(item)
        KERNELS.add(_own(item.name, name), item)
    elif isinstance(item, Estimator):
        _estimator(item, name, declared)
    elif isinstance(item, PolicyLoss):
        LOSSES.add(_needed(name, "a loss"), item)
    elif isinstance(item, Target):
        from gradlab.targets import TARGETS, check_target

        check_target(item)
        TARGETS.add(_own(item.name, name), item)
    elif isinstance(item, Claim):
        from gradlab.ledger import REGISTERED

        REGISTERED.add(_own(f"{item.id} ({item.scope})", name), item)
    elif isinstance(item, type):
        from gradlab.policies import POLICIES, check_policy_class

        check_policy_class(item)
        POLICIES.add(name or item.__name__.lower(), item)
    elif isinstance(item, str | Path):
        from gradlab.study.analyses import REGISTERED as ANALYSES
        from gradlab.study.analyses import Analysis

        analysis = Analysis(Path(item))
        ANALYSES.add(_own(analysis.name, name), analysis)
    elif type(item).__name__ == "Drawing":  # nobody else waits for matplotlib
        from gradlab.plots import FIGURES

        FIGURES.add(_needed(name, "a figure"), item)
    elif all(hasattr(item, part) for part in ("PACKAGE", "INSTALL", "subjects")):
        from gradlab.audit.adapters import ADAPTERS

        ADAPTERS.add(_needed(name, "an audit adapter"), item)
    else:
        raise ValueError(
            f"cannot register a {type(item).__name__}; what can be is a Kernel, an Estimator, a PolicyLoss, a Target, a policy class, a "
            "claim, an audit adapter (with PACKAGE, INSTALL and subjects) and the path of an analysis NN_name.py"
        )


def _estimator(item: Any, name: str | None, declared: dict[str, Any]) -> None:
    from gradlab.estimators.catalogue import CATALOGUE, Entry
    from gradlab.targets import TARGETS

    allowed = ("source", "on_policy", "off_policy", "colour")
    if unknown := sorted(set(declared) - set(allowed)):
        raise ValueError(f"of an estimator {', '.join(allowed)} can be declared, got {', '.join(unknown)}")
    for when in ("on_policy", "off_policy"):
        for target in declared.get(when) or {}:
            TARGETS.named(target)
    entry = Entry(
        _needed(name, "an estimator"), item, declared.get("on_policy"), declared.get("off_policy"),
        declared.get("source", "registered"), declared.get("colour"),
    )  # fmt: skip
    CATALOGUE.add(entry.name, entry)


def _own(own: str, given: str | None) -> str:
    if given not in (None, own):
        raise ValueError(f"it has a name of its own, {own!r}, got another: {given!r}")
    return own


def _needed(given: str | None, what: str) -> str:
    if given is None:
        raise ValueError(f"{what} is registered by a name: gl.register(…, 'my-name')")
    return given
