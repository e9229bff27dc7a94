"""Checks of lesson 3: which later tokens a token's coefficient counts."""

from __future__ import annotations

from collections.abc import Iterable

from gradlab._common.names import check_name, several
from gradlab.estimators import ESTIMATORS, Estimator
from gradlab.lessons.lesson import Reply
from gradlab.measure import measure
from gradlab.policies import Tree
from gradlab.scenario import Scenario
from gradlab.study.report import cell

EXERCISES = ("guess", "breaks_even", "quieter")

CHOICES = ("k2-loss", "k2-loss-sequence", "k1-reward", "k1-reward-to-go", "full-loss", "full-both")
ZERO = 1e-9


def scenario() -> Scenario:
    """The tree of the lesson."""
    policy = Tree.random(vocab=4, length=4, seed=0)
    return Scenario(policy, policy.perturbed(kl=0.5, seed=1))


def guess(answer: Iterable[str]) -> Reply:
    """Which of the six have the gradient of the KL of whole responses? Give a list of names."""
    given = set(several(answer))
    for name in given:
        check_name("choice", name, CHOICES)
    found = measure(CHOICES, scenario()).set_index("estimator")["bias"]
    right = {name for name in CHOICES if found[name] < ZERO}
    if given == right:
        return Reply(
            True, f"{', '.join(name for name in CHOICES if name in right)}: each counts what a token does to later ones."
        )
    wrong = sorted(given - right)
    if wrong:
        return Reply(False, f"{wrong[0]} has a relative bias of {found[wrong[0]]:.3f}: it takes the prefixes as given.")
    return Reply(
        False, f"So far that is right, and there {'is' if len(right - given) == 1 else 'are'} {len(right - given)} more."
    )


def breaks_even(answer: float) -> Reply:
    """At which batch size have k1-reward and k1-reward-to-go the same mean squared error? To 5 %."""
    given = float(answer)
    found = measure(["k1-reward", "k1-reward-to-go"], scenario())
    bias = cell(found, "bias", estimator="k1-reward")
    token, to_go = (cell(found, "noise", estimator=name) for name in ("k1-reward", "k1-reward-to-go"))
    truth = (to_go - token) / bias**2
    if abs(given / truth - 1) <= 0.05:
        return Reply(True, f"At {truth:.0f} responses; below, the biased one is the better, and above, the unbiased one.")
    if abs(given * bias / (to_go - token) - 1) <= 0.05:
        return Reply(False, "The bias is squared in a mean squared error: bias² + noise/B.")
    if abs(given * bias**2 / token - 1) <= 0.05:
        return Reply(False, "That is where the bias of k1-reward is as large as its own noise. The other one has noise, too.")
    if given <= 0:
        return Reply(False, "A batch has at least one response.")
    errors = (bias**2 + token / given) ** 0.5, (to_go / given) ** 0.5
    return Reply(
        False, f"There the root mean squared errors are {errors[0]:.3f} (k1-reward) and {errors[1]:.3f} (k1-reward-to-go)."
    )


def quieter(answer: str | Estimator) -> Reply:
    """Name or compose an estimator without bias for whole responses that has less than half the noise of k1-reward-to-go."""
    if not isinstance(answer, Estimator):
        check_name("estimator", answer, ESTIMATORS)
    found = measure({"yours": ESTIMATORS[answer] if isinstance(answer, str) else answer}, scenario())
    to_go = cell(measure("k1-reward-to-go", scenario()), "noise")
    bias, noise = cell(found, "bias"), cell(found, "noise")
    if bias > ZERO:
        return Reply(False, f"It has a relative bias of {bias:.3f} for whole responses.")
    if noise >= to_go / 2:
        return Reply(
            False,
            f"Its noise is {noise:.2f}, and that of to-go {to_go:.2f}. What of it could be summed over the vocabulary, not drawn?",
        )
    return Reply(True, f"Its noise is {noise:.2f}, {noise / to_go:.0%} of that of to-go.")
