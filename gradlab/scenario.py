"""A scenario: the policy being trained, the reference it is kept near, the policy that sampled the data, and the reward."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Generic

from typing_extensions import TypeIs, TypeVar

from gradlab.policies import Policy, Tabular
from gradlab.rewards import Reward

P = TypeVar("P", bound=Policy, default=Policy, covariant=True)
Q = TypeVar("Q", bound=Policy)


def check_scenario(given: object) -> None:
    """Raise `ValueError` unless `given` is a `Scenario`."""
    if not isinstance(given, Scenario):
        raise ValueError(f"a scenario is gl.Scenario(policy, reference, behaviour), got {type(given).__name__}")


@dataclass(frozen=True, eq=False)
class Scenario(Generic[P]):
    """Frozen triple of policies of one kind `P`. `behaviour=None` means on-policy: the data come from `policy` itself.

    `name` labels the scenario in frames; without one a label is made from the family, its size and the KL.
    reward: a function from a rollout to one number per response, `[n]`, or per token, `[n, t]` (for credits to later tokens), for
    targets and losses of the whole objective. On a `Gaussian` the places where it has a kink or a jump are an attribute of it,
    `kinks`. old: the trainer's weights when `behaviour`, the engine, drew; `None`: the same as `behaviour`.
    Raises `ValueError` when the policies differ in kind, vocabulary, length or end token, when the reference or
    the behaviour policy gives probability 0 (in float64) to a token of a context, and for a reward that is no function.

    >>> policy = gl.Tree.random(vocab=3, length=2, seed=0)
    >>> scenario = gl.Scenario(policy, reference=policy.perturbed(kl=0.3, seed=1))
    >>> round(scenario.kl(), 6), scenario.lag()
    (0.3, 0.0)
    """

    policy: P
    reference: P
    behaviour: P | None = None
    name: str | None = None
    _: KW_ONLY
    reward: Reward | None = None
    old: P | None = None

    def __post_init__(self) -> None:
        if self.reward is not None and not callable(self.reward):
            raise ValueError(
                f"reward must be a function of a rollout that gives one number per response, got {type(self.reward).__name__}; "
                "numbers for each token of a table are gl.TableReward(policy, table)"
            )
        for role in ("policy", "reference", "behaviour", "old"):
            other = getattr(self, role)
            if role in ("behaviour", "old") and other is None:
                continue
            if not isinstance(other, Policy):
                raise ValueError(
                    f"{role} must be a gradlab policy such as gl.Tree(logits), got {type(other).__name__}; "
                    "plain logits have to be wrapped first"
                )
            if other.signature != self.policy.signature:
                raise ValueError(
                    f"{role} does not share the policy's support: policy is {self.policy.signature}, {role} is "
                    f"{other.signature} (kind, table shape, length, eos must agree)"
                )
            _check_support(role, other)

    @property
    def sampler(self) -> P:
        """The policy the data come from: `behaviour`, or `policy` itself."""
        return self.policy if self.behaviour is None else self.behaviour

    @property
    def label(self) -> str:
        """`name`, or a description such as `tree v=4 T=3 kl=0.25`."""
        if self.name is not None:
            return self.name
        sizes = f" v={self.policy.vocab} T={self.policy.length}" if self.policy.vocab else ""
        eos = "" if self.policy.eos is None else f" eos={self.policy.eos}"
        # Where responses are too many to list the KL can only be sampled.
        distance = f" kl={self.kl():.4g}" if self.policy.tabulated else ""
        return f"{self.family}{sizes}{eos}{distance}" + ("" if self.behaviour is None else " off-policy")

    @property
    def family(self) -> str:
        """The kind of its policies as frames have it, such as `tree`."""
        return type(self.policy).__name__.lower()

    def kl(self) -> float:
        """`KL(policy ‖ reference)` of whole responses in nats."""
        return float(self.policy.kl(self.reference))  # type: ignore[arg-type]

    def lag(self) -> float:
        """`KL(behaviour ‖ policy)` of whole responses in nats; 0 on-policy."""
        return 0.0 if self.behaviour is None else float(self.behaviour.kl(self.policy))  # type: ignore[arg-type]

    def on_policy(self) -> Scenario[P]:
        """The same policy, reference and reward, with data from the policy itself."""
        return replace(self, behaviour=None, old=None)


def is_of(scenario: Scenario[Any], kind: type[Q]) -> TypeIs[Scenario[Q]]:
    """Whether the policies of a scenario are of this kind."""
    return isinstance(scenario.policy, kind)


def _check_support(role: str, policy: Any) -> None:
    # Any other policy is positive everywhere, but for a language model outside its nucleus, which is there to be measured.
    if isinstance(policy, Tabular) and (missing := policy.missing_support()):
        context, token = missing
        raise ValueError(
            f"{role} is missing support: it gives token {token} in context {context} a probability below the smallest "
            "float64, so log-ratios and importance weights there are undefined; raise that logit (a gap of 700 nats is "
            "already beyond any data) or leave the token out of the vocabulary"
        )
