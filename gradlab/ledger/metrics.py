"""What analysis 16 settles: k1, k2 and k3 as logged numbers."""

from gradlab.ledger.form import EXACT, Claim, Condition, Relation, claim, within

#: Batches of a size that is logged.
LOGGED = within("samples", 250, 1100)
ADDITION, NAMES, OWN = "addition", "names, three letters", "the policy"


def _mean(scope: str, behaviour: str, world: str, kernel: str = "k3") -> Claim:
    told = f"small language model, {scope}"
    return claim("k3-metric", told, "16_exact", "bias", "=", 0, EXACT, kernel=kernel, behaviour=behaviour, world=world)


def _noise(scope: str, world: str, *ranges: Condition) -> Claim:
    told = f"small language model, {scope}"
    return claim(
        "k3-metric.noise", told, "16_exact", "noise_ratio", "<", 1, 0, *ranges, kernel="k3", behaviour=OWN, world=world
    )


def _batches(part: str, statistic: str, relation: Relation, value: float, world: str, *ranges: Condition) -> Claim:
    scope = f"small language model of {world}, batches of 256 and 1,024" + (", after 400 steps" if ranges else "")
    ranges = (*LOGGED, *ranges)
    return claim(
        f"k3-metric.{part}",
        scope,
        "16_metrics",
        statistic,
        relation,
        value,
        0,
        *ranges,
        kernel="k3",
        behaviour=OWN,
        world=world,
    )


CLAIMS: tuple[Claim, ...] = (
    *(_mean(f"{world}, the policy's own responses", "the policy", world) for world in (ADDITION, NAMES)),
    *(_mean(f"{world}, responses of stale weights", "stale weights", world) for world in (ADDITION, NAMES)),
    *(
        _noise(f"{world}, after {steps} steps", world, *within("steps", steps, steps))
        for world in (ADDITION, NAMES)
        for steps in (5, 400)
    ),
    *(_batches("low", "below", ">", 0.5, world, *within("steps", 400, 400)) for world in (ADDITION, NAMES)),
    *(_batches("student", "student", "≥", 0.9, world) for world in (ADDITION, NAMES)),
    *(_batches("open", "open", "≥", 0.9, world) for world in (ADDITION, NAMES)),
)
