"""What analysis 19 settles: what stands in the place of the product of ratios when an engine draws."""

from gradlab.ledger.form import EXACT, MATTERS, Claim, Condition, claim, within

REWARD, KL, K3 = "reward", "KL in the reward", "k3 beside"
ENGINES = ("noise", "stale", "temperature")
FRAME = "19_corrections"


def _at(kl: float) -> tuple[Condition, ...]:
    return within("token_kl", kl * 0.9, kl * 1.1)


def _long(kl: float) -> tuple[Condition, ...]:
    return (*_at(kl), *within("length", low=512))


_WHERE = "reward, 512 tokens, {:g} nats per token"


def _reward(identifier: str, estimator: str, statistic: str, relation: str, value: float, kl: float) -> Claim:
    ranges = _long(kl)
    return claim(
        identifier, f"{_WHERE.format(kl)}", FRAME, statistic, relation, value, 0, *ranges,  # type: ignore[arg-type]
        estimator=estimator, signal=REWARD, mismatch=ENGINES,
    )  # fmt: skip


CLAIMS: tuple[Claim, ...] = (
    *(
        claim("sum-weight", signal, FRAME, "bias", "=", 0, EXACT, signal=signal, estimator="sequence", mismatch=ENGINES)
        for signal in (REWARD, KL)
    ),
    claim("sum-weight", "k3 beside, differentiated", FRAME, "bias", "=", 0, EXACT, signal=K3, estimator="sequence, differentiated",
          mismatch=ENGINES),
    claim("sum-weight", "reward, nucleus, 512 tokens, 0.001 nats per token", FRAME, "bias", "=", 0, MATTERS, *_long(1e-3), signal=REWARD,
          estimator="sequence", mismatch="nucleus"),
    *(_reward("sum-weight.step", "sequence-truncated", "step", "≥", 0.9, kl) for kl in (1e-4, 1e-3)),
    *(_reward("sum-weight.samples", "sequence", "share", "≥", 0.5, kl) for kl in (1e-4, 1e-3)),
    *(_reward("geometric", "geometric", "bias", "<", 0.1, kl) for kl in (1e-3, 1e-2)),
    *(
        claim("geometric.nothing", f"{signal}, 512 tokens, at most 0.001 nats per token", FRAME, "from_none", "<", MATTERS, 0,
              *within("token_kl", high=1.1e-3), *within("length", low=512), signal=signal, estimator="geometric", mismatch=ENGINES)
        for signal in (REWARD, KL, K3)
    ),
    *(_reward("token-correction", "token", "bias", "<", 0.1, kl) for kl in (1e-4, 1e-2)),
    _reward("token-correction.less", "token", "relative", "<", 1, 1e-3),
    claim("token-correction", "KL in the reward, chains of 128 tokens and more", "19_chains", "bias", "<", 0.1, 0,
          *within("length", low=128), signal=KL, estimator="token"),
    *(_reward("token-correction.stable", "token", "share", "≥", 0.95, kl) for kl in (1e-3, 1e-2)),
    *(
        claim("token-correction.best", f"{_WHERE.format(kl)}, {batch:,} responses", "19_best", "regret", "≤", 1.1, 0, *_long(kl),
              *within("batch", batch, batch), signal=REWARD, estimator="token", mismatch=ENGINES)
        for kl, batch in ((1e-3, 4096), (1e-2, 1024))
    ),
    *(
        claim("trust-region-bound", name, "19_bounds", "slack", "≥", 1, 0, estimator=name)
        for name in ("classical", "Pinsker-marginal", "mixed")
    ),
    *(
        claim("trust-region-bound.near", f"{name}, 512 tokens, 0.001 nats per token", "19_bounds", "slack", "≤", 10, 0, *_long(1e-3),
              estimator=name)
        for name in ("Pinsker-marginal", "mixed")
    ),
    claim("trust-region-bound.growth", "at most 0.001 nats per token", "19_growth", "exponent", ">", 1.1, 0,
          *within("token_kl", high=1.1e-3)),
)  # fmt: skip
