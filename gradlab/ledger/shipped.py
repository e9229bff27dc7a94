"""What analysis 12 settles: claims about what training frameworks ship, by auditing their own code."""

from gradlab.ledger.form import Claim, claim

REVERSE, FROZEN = "reverse_kl", "reverse_kl_frozen_prefix"
FORWARD_FROZEN = "forward_kl_frozen_prefix"
#: Angles are 0 to this, in degrees: what is left of the rounding of code in float32.
ZERO = 1e-3

PLAIN = ("trl grpo dr_grpo plain", "liger grpo dr_grpo plain", "trinity k3 seq-mean-token-sum", "torchrl GRPOLoss kl_to_ref")
CORRECTED = ("trl grpo dr_grpo corrected", "trl grpo dapo corrected large-batch", "liger grpo dr_grpo corrected")
BY_RESPONSE = ("trl grpo dr_grpo corrected-sequence", "liger grpo dr_grpo corrected-sequence")
BY_LENGTH = (
    "trl grpo grpo plain", "trl grpo sapo plain", "liger grpo grpo plain", "torchrl distillation reverse mean",
    "trinity k3 seq-mean-token-mean",
)  # fmt: skip
LEAVE_ONE_OUT = ("trl rloo", "verl reward kl rloo seq-mean-token-sum", "trinity reward k1 rloo seq-mean-token-sum")
K3_CLAMPED = (
    "verl loss k3 seq-mean-token-sum",
    "openrlhf loss k3 plain token-mean large-batch",
    "trinity low_var_kl seq-mean-token-sum",
)
_FACTOR = "shipped code, up to a factor"


def _along(identifier: str, scope: str, subject: str | tuple[str, ...], target: str, policy: str = "on") -> Claim:
    """The expected gradient of shipped code points along the gradient of an objective, in every world audited."""
    where = {"subject": subject, "target": target, "policy": policy}
    return claim(identifier, f"{_FACTOR}: {scope}", "12_directions", "degrees", "=", 0, ZERO, **where)  # type: ignore[arg-type]


CLAIMS: tuple[Claim, ...] = (
    claim("open-off-policy", "shipped code, every configuration audited: off by more than 0.1°", "12_directions", "degrees", "≠", 0, 0.1,
          target=REVERSE, policy="off", moving=True),
    _along("k3-forward.frozen", "TRL, liger-kernel, torchrl, Trinity", PLAIN, FORWARD_FROZEN),
    _along("k2-unbiased", "verl, Trinity, per token", ("verl loss k2 seq-mean-token-sum", "trinity k2 seq-mean-token-sum"), REVERSE),
    _along("k1-reward", "leave-one-out of TRL, verl, Trinity", LEAVE_ONE_OUT, REVERSE),
    _along("k1-reward.off-policy", "leave-one-out of TRL, verl, Trinity", LEAVE_ONE_OUT, REVERSE, "off"),
    claim("detached-baseline", "shipped code: verl's GRPO mean without its deviation, n = 2", "12_configurations", "scale", "=",
          0.5, 1e-9, subject="verl reward kl grpo seq-mean-token-sum", policy="on"),
    _along("rho-k3", "TRL, liger-kernel, per token, ratio of the token", CORRECTED, REVERSE),
    *(
        _along("rho-k3.frozen", f"TRL, liger-kernel, ratio of the token, {policy}-policy", CORRECTED, FROZEN, policy)
        for policy in ("on", "off")
    ),
    _along("rho-k3.frozen", "TRL, liger-kernel, ratio of the response, on-policy", BY_RESPONSE, FROZEN),
    _along("rho-k3.frozen", "Trinity, ratio of the token truncated at 2, off-policy", "trinity corrected_k3 seq-mean-token-sum",
           FROZEN, "off"),
    _along("off-policy-fix.frozen", "OpenRLHF, ratio of the token truncated at 10", "openrlhf loss k2 unbiased token-mean large-batch",
           FROZEN, "off"),
    *(
        _along("k3-plus.frozen", f"verl, {policy}-policy", "verl loss k3+ seq-mean-token-sum", FROZEN, policy)
        for policy in ("on", "off")
    ),
    _along("k3-plus", "verl, on-policy", "verl loss k3+ seq-mean-token-sum", REVERSE),
    claim("length", "shipped code, k3 by 1/L in TRL, liger-kernel, torchrl, Trinity", "12_directions", "degrees", "=", 0, ZERO,
          subject=BY_LENGTH, target=FORWARD_FROZEN, policy="on"),
    claim("clamp.direction", "shipped code, verl, OpenRLHF, Trinity", "12_directions", "degrees", "=", 0, ZERO,
          subject=K3_CLAMPED, target=FORWARD_FROZEN, policy="on"),
)  # fmt: skip
