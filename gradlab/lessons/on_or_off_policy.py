"""Checks of lesson 4: data from another policy."""

from __future__ import annotations

from gradlab._common.names import check_name
from gradlab.estimators import Estimator
from gradlab.lessons.lesson import Reply
from gradlab.measure import measure
from gradlab.policies import Tree
from gradlab.scenario import Scenario
from gradlab.study.report import cell

EXERCISES = ("guess", "unbiased", "bound")

WEIGHTS = ("none", "token", "prefix", "sequence")
ZERO = 1e-9


def scenario() -> Scenario:
    """The tree of the lesson, with data of a policy that lags behind."""
    policy = Tree.random(vocab=4, length=4, seed=0)
    return Scenario(policy, policy.perturbed(kl=0.5, seed=1), policy.perturbed(kl=0.2, seed=2))


def guess(answer: str) -> Reply:
    """Which weight makes k1 in the reward, with credit to_go, unbiased: "none", "token", "prefix" or "sequence"?"""
    check_name("weight", answer, WEIGHTS)
    bias = cell(measure({"k1": Estimator("k1", "reward", "to_go", answer)}, scenario()), "bias")  # type: ignore[arg-type]
    if bias < ZERO:
        return Reply(
            True, "What a token is credited with is drawn up to the end of the response, and so must its weight reach."
        )
    reach = {"none": "no token is", "token": "only the token itself is", "prefix": "the tokens up to it are"}[answer]
    return Reply(
        False, f"With weight {answer} the relative bias is {bias:.3f}: {reach} reweighted, and later ones are credited."
    )


def unbiased(answer: Estimator) -> Reply:
    """Compose an estimator that is unbiased here, reads sampled tokens only (no kernel "full" or "mse"), and is quieter than k1's 12.3."""
    if not isinstance(answer, Estimator):
        raise ValueError("it has to be a gl.Estimator(…)")
    if answer.on_vocabulary or answer.baseline == "kl":
        return Reply(False, "It reads the probability of every token. Compose one from the sampled tokens' probabilities.")
    found = measure({"yours": answer}, scenario())
    bias, noise = cell(found, "bias"), cell(found, "noise")
    k1 = cell(measure({"k1": Estimator("k1", "reward", "to_go", "sequence")}, scenario()), "noise")
    if bias < ZERO and noise < k1:
        return Reply(True, f"Its bias is 0 and its noise {noise:.2f}, against {k1:.2f}.")
    if bias < ZERO:
        return Reply(False, f"It is unbiased, and its noise is {noise:.2f}, not below {k1:.2f}. Can a shorter weight do?")
    hints = {
        "none": "Without a weight it averages over the wrong policy.",
        "token": "A token's weight corrects the token, and not the prefix it stands behind.",
        "prefix": "A detached weight has no gradient; differentiated, it brings the part of ∇E[k] that a loss lacks.",
        "sequence": "A detached weight has no gradient; differentiated, it brings the part of ∇E[k] that a loss lacks.",
    }
    return Reply(False, f"Its relative bias is {bias:.3f}. {hints[answer.weight]}")


def bound(answer: int) -> Reply:
    """Which is the smallest whole number C for which k1's sequence weight, min(W, C), leaves a relative bias below 3 %?"""
    given = int(answer)
    if given != answer or given < 1:
        raise ValueError("a whole number, at least 1, is asked for")

    def at(c: int) -> tuple[float, float]:
        found = measure({"k1": Estimator("k1", "reward", "to_go", "sequence", truncate=float(c))}, scenario())
        return cell(found, "bias"), cell(found, "noise")

    bias, noise = at(given)
    if bias >= 0.03:
        return Reply(False, f"With C = {given} the relative bias is {bias:.1%}.")
    below = at(given - 1)[0] if given > 1 else 1.0
    if below < 0.03:
        return Reply(False, f"With C = {given} it is {bias:.1%}, and with {given - 1} still {below:.1%}.")
    return Reply(True, f"It leaves {bias:.1%}, at a noise of {noise:.2f}; with {given - 1} it is {below:.1%}.")
