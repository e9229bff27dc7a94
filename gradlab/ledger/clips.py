"""What analysis 18 settles: what PPO's, DAPO's and CISPO's trust regions remove of the KL's and of the reward's gradient."""

from gradlab.ledger.form import Claim, Condition, Value, claim, within

REWARD, HEAD, ADVANTAGE = "reward", "KL in a head", "KL in the advantage"
UPDATES, RANDOM = "updates", "random"
WORLDS = {UPDATES: "after updates on the same data", RANDOM: "from data of a policy in a random direction"}
PPO, DAPO, CISPO = "PPO", "DAPO", "CISPO"


def _lag(lag: float) -> tuple[Condition, ...]:
    return within("nominal", lag * 0.9, lag * 1.1)


def _kl(part: str, world: str, lag: float) -> Claim:
    where: dict[str, Value | tuple[Value, ...]] = {"part": part, "world": world, "estimator": (PPO, DAPO)}
    return claim("clip.kl", f"{part}, {WORLDS[world]}, lag {lag:g}", "18_sides", "bias", "<", 0.1, 0, *_lag(lag), where=where)


def _side(identifier: str, part: str, world: str) -> Claim:
    scope, where = f"{part}, {WORLDS[world]}, lag 0.1", {"part": part, "world": world, "estimator": PPO}
    return claim(identifier, scope, "18_sides", "over_share", ">", 0.5, 0.02, *_lag(0.1), where=where)


def _reward(identifier: str, estimator: str, statistic: str, relation: str, value: float, world: str, lag: float) -> Claim:
    where = {"part": REWARD, "world": world, "estimator": estimator}
    scope = f"{WORLDS[world]}, lag {lag:g}"
    return claim(identifier, scope, "18_sides", statistic, relation, value, 0, *_lag(lag), where=where)  # type: ignore[arg-type]


CLAIMS: tuple[Claim, ...] = (
    _kl(HEAD, UPDATES, 0.01),
    _kl(HEAD, UPDATES, 0.1),
    _kl(HEAD, RANDOM, 0.1),
    *(_kl(ADVANTAGE, world, lag) for world in (UPDATES, RANDOM) for lag in (0.01, 0.1)),
    *(_side("clip.kl-side", part, UPDATES) for part in (HEAD, ADVANTAGE)),
    *(_reward("clip.reward", PPO, "bias", "<", 0.1, world, lag) for world in (UPDATES, RANDOM) for lag in (0.003, 0.1)),
    _side("clip.reward-side", REWARD, UPDATES),
    *(_reward("clip-higher", DAPO, "relative", "<", 0.5, world, 0.1) for world in (UPDATES, RANDOM)),
    *(_reward("clip-higher.rare", PPO, "rare_share", ">", 0.5, world, 0.1) for world in (UPDATES, RANDOM)),
    *(_reward("clip-weight", CISPO, "removed", "<", 0.01, world, 0.1) for world in (UPDATES, RANDOM)),
)
