"""What has been claimed, and by whom: statement and source of every claim, whatever the scope."""

from __future__ import annotations

_P = "Liu et al., arXiv 2510.01555"
_SCHULMAN = "Schulman, 'Approximating KL divergence' (2020)"
_SHAH = "Shah et al., arXiv 2512.21852"
_TANG = "Tang & Munos, arXiv 2506.09477"
_AMINI = "Amini, Vieira & Cotterell, arXiv 2504.10637"
_COMMON = "implied by common defaults of training frameworks"

#: Claim id → (statement, source).
STATEMENTS: dict[str, tuple[str, str]] = {
    "value-k1": ("E[k1] = KL(π‖ref)", _SCHULMAN),
    "value-k2": ("E[k2] differs from KL(π‖ref)", _SCHULMAN),
    "value-k3": ("E[k3] = KL(π‖ref)", _SCHULMAN),
    "value-variance": ("k3 has lower variance than k1", f"{_SCHULMAN}; folklore"),
    "value-tails": (
        "the value of k3 can have infinite variance, its sample mean lies far from its expectation",
        f"{_P}, App. I",
    ),
    "value-std": ("one value of k1 and of k3 has a standard deviation of 0.691 and 8.82 on the Gaussian pair", f"{_P}, App. I"),
    "value-implies-gradient": (
        "an unbiased, low-variance estimate of the KL gives the gradient of the KL when it is used as a loss",
        "implied by the use of k3 as loss, e.g. GRPO, arXiv 2402.03300",
    ),
    "k1-loss-zero": ("k1 as loss has expected gradient 0, whatever the reference", f"{_P} §5; {_TANG}"),
    "k1-loss-repels": (
        "off-policy, k1 as loss descends −KL(μ‖π): it runs from the behaviour, whatever the reference",
        "derived",
    ),
    "k1-loss-noise": ("k1 as loss only adds noise to training", _P),
    "target": ("∇KL(π‖ref) = E[log(π/ref) ∇log π]", f"{_P}, Eq. 12"),
    "k1-reward": ("k1 in reward is the principled reverse-KL gradient", _P),
    "k2-loss": ("k2 as loss is equivalent to k1 in reward", f"{_P}, Theorem 5.1"),
    "k3-first-order": ("k3 as loss is the first-order approximation of the principled gradient, with error ½(δ−1)²", _P),
    "k3-biased": ("k3 as loss is biased for the reverse KL (it is unbiased for the forward KL)", f"{_P}; {_TANG}"),
    "k3-asymmetry": ("k3 as loss saturates for over-sampled tokens and explodes for under-sampled ones", _P),
    "k3-variance": ("Var[1−δ] = χ²(ref‖π), and the stochastic gradient of k3 as loss inherits it", _P),
    "k3-weaker": ("k3 as loss regularises more weakly than k2 as loss at equal coefficient", _P),
    "k3-raises": ("an exact gradient step on k3 as loss can raise the reverse KL", f"consequence of the bias claimed in {_P}"),
    "same-sign": ("1−δ and −log δ have the same sign, so k3 and k2 as loss push in the same direction", f"reviews of {_P}"),
    "k3-reward": ("k3 in reward is harmful", _SHAH),
    "k3-both": ("the same kernel in reward and in loss is unbiased", _SHAH),
    "off-policy-bias": ("k1, k2, k3 as loss without importance weights are biased off-policy", _P),
    "off-policy-fix": ("importance weighting the detached coefficient restores the principled gradient", f"{_P}, Eq. 69"),
    "rho-k3": (
        "k3 as loss with a differentiated ratio is an unbiased reverse-KL gradient",
        "DeepSeek-V3.2, arXiv 2512.02556; TRL",
    ),
    "rho-k2": ("weighting by the ratio fixes k2 as loss the same way", "NeMo-RL, slime"),
    "k3-plus": ("straight-through k3+ (value k3, gradient k2) fixes k3", "verl"),
    "open-off-policy": ("no shipped configuration is unbiased for the off-policy sequence reverse KL", _SHAH),
    "off-policy-noise": (
        "complete Rao–Blackwell with prefix weights is the least noisy unbiased off-policy composition",
        "derived",
    ),
    "off-policy-growth": ("the noise of an unbiased off-policy KL gradient grows with the length of the response", "folklore"),
    "rao-blackwell": ("the full-vocabulary KL per step is unbiased and never has more variance", _AMINI),
    "bounded": ("the MSE form is bounded and is the gradient of ½Σ(π−ref)²", f"{_P}, on MiniMax-01"),
    "length": ("a 1/L normaliser leaves the target of the regulariser unchanged", _COMMON),
    "inverse-length": ("k1 as loss with a 1/L normaliser descends E[1/L], so it lengthens responses", "derived"),
    "clamp": ("clamping the log-ratio or the kernel is harmless", _COMMON),
    "detached-baseline": ("group-mean centring shrinks the gradient by 1−1/n; leave-one-out is exact", "X. Wang (2025)"),
    "baseline-noise": (
        "subtracting the group's mean KL lowers the noise of the KL gradient",
        "folklore of RLOO, arXiv 2402.14740",
    ),
    "ratios-extreme": ("δ → 0 and δ → ∞ really occur", f"reviews of {_P}"),
    "train-k1-loss": ("training with k1 as loss resembles training without a KL term, and drifts", f"{_P}, Fig. 2"),
    "train-k2-k3": (
        "k2 as loss keeps the policy nearer the reference and training more stable than k3 as loss",
        f"{_P}, Fig. 3",
    ),
    "train-k1-reward": ("k1 in reward and k2 as loss train alike", _P),
}
