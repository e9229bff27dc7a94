"""Checks of lesson 2: where a kernel stands decides what it descends."""

from __future__ import annotations

from collections.abc import Iterable

from gradlab._common.names import check_name, several
from gradlab.estimators import Estimator
from gradlab.lessons.lesson import Reply
from gradlab.measure import measure
from gradlab.policies import Bandit
from gradlab.scenario import Scenario
from gradlab.study.report import cell
from gradlab.targets import TARGETS

EXERCISES = ("guess", "descends", "compose")

CHOICES = {
    "k1-loss": Estimator("k1"),
    "k1-reward": Estimator("k1", "reward"),
    "k2-loss": Estimator("k2"),
    "k2-reward": Estimator("k2", "reward"),
    "k3-loss": Estimator("k3"),
    "k3-reward": Estimator("k3", "reward"),
}
#: A relative bias below this is rounding.
ZERO = 1e-9


def bandits() -> list[Scenario[Bandit]]:
    """Random bandits at several distances: what holds on all of them holds."""
    found = []
    for draw, kl in enumerate((0.1, 0.5, 1.0)):
        policy = Bandit.random(6, seed=draw)
        found.append(Scenario(policy, policy.perturbed(kl=kl, seed=10 + draw)))
    return found


def guess(answer: Iterable[str]) -> Reply:
    """Which of "k1-loss", "k1-reward", "k2-loss", "k2-reward", "k3-loss", "k3-reward" have the gradient of KL(π‖ref)? Give a list."""
    given = set(several(answer))
    for name in given:
        check_name("choice", name, CHOICES)
    worst = measure(CHOICES, bandits()).groupby("estimator", sort=False)["bias"].max()
    right = {name for name in CHOICES if worst[name] < ZERO}
    if given == right:
        return Reply(True, f"{' and '.join(sorted(right))} have a bias of 0, and they are the same, sample by sample.")
    wrong = sorted(given - right)
    if wrong:
        return Reply(False, f"{wrong[0]} has a relative bias of up to {worst[wrong[0]]:.2g}.")
    return Reply(
        False, f"So far that is right, and there {'is' if len(right - given) == 1 else 'are'} {len(right - given)} more."
    )


def descends(answer: str) -> Reply:
    """Which objective of gl.TARGETS does "k3-swapped-loss" descend, k3 with the ratio upside down? Give its name."""
    check_name("target", answer, TARGETS)
    worst = measure("k3-swapped-loss", bandits(), target=answer)["bias"].max()
    if worst < ZERO:
        return Reply(True, f"Its bias against {answer} is 0: {TARGETS[answer].statement}.")
    hint = (
        "That is what k3 descends with the ratio the right way up."
        if answer.startswith("forward")
        else "Measure it against every target: target=list(gl.TARGETS)."
    )
    return Reply(False, f"Its relative bias against {answer} is up to {worst:.2g}. {hint}")


def compose(answer: Estimator) -> Reply:
    """Compose an estimator of kernel "k3" that has no bias for KL(π‖ref): gl.Estimator("k3", placement=…)."""
    if not isinstance(answer, Estimator) or answer.kernel != "k3":
        raise ValueError('it has to be gl.Estimator("k3", …)')
    bias = measure({"yours": answer}, bandits())["bias"].max()
    if bias < ZERO:
        return Reply(True, "In the reward it has ∇reverse − ∇forward, in the loss ∇forward; the sum is the gradient of the KL.")
    both = measure({"yours": answer}, bandits()[0], target=["reverse_kl", "forward_kl"])
    told = "; ".join(f"{target} {cell(both, 'bias', target=target):.2g}" for target in ("reverse_kl", "forward_kl"))
    return Reply(
        False,
        f"Its relative biases are {told}. ∇E[k] = E[k ∇log π] + E[∇k]: the reward has the first part, the loss the second.",
    )
