// Findings to begin with: a position, one sentence, and the row of gradlab's ledger that it belongs to.

const bandit = (world, policy, reference, behaviour = null) => ({ world, policy, reference, behaviour });
const DROPPED = (() => {
  // Reference: J has 0.2, the others equal shares. Policy: the reference's logits with J's set to −9.
  const reference = [...new Array(9).fill(0.8 / 9), 0.2];
  const weights = reference.map((p, i) => (i === 9 ? Math.exp(-9) : p));
  const total = weights.reduce((a, b) => a + b, 0);
  return bandit("ten", weights.map((w) => w / total), reference);
})();
const LAGGING = bandit("three", [0.25, 0.3, 0.45], [0.15, 0.6, 0.25], [0.5, 0.3, 0.2]);
const TREE = bandit("steps", [0.5, 0.5, 0.99, 0.01, 0.5, 0.5], [0.7, 0.3, 0.01, 0.99, 0.5, 0.5]);

const row = (id, scope, verdict, statement) => ({ id, scope, verdict, statement });
const REVERSE = "an unbiased gradient of the reverse KL";

export const PRESETS = [
  {
    slug: "toy", title: "The classic toy hides the bias", at: bandit("gaussian", [0, 1], [1, 1]),
    estimator: { kernel: "k3" }, batch: 256, step: 0.1,
    text: "Between two Gaussians of one width, k3 as loss pulls the mean exactly as the reverse KL does, and its whole error " +
      "hides in the width, where the true pull is 0.",
    claim: row("k3-biased", "Gaussian, equal variances, mean", "FAILS", "k3 as loss is biased for the reverse KL by more than 1 %"),
  },
  {
    slug: "sign", title: "A sign flips", at: bandit("three", [0.5, 0.3, 0.2], [0.2, 0.25, 0.55]),
    estimator: { kernel: "k3" }, batch: 64, step: 0.1,
    text: "The reverse KL wants more of token B, and k3 as loss wants less of it.",
    claim: row("same-sign.gradient", "bandit", "FAILS",
      "on every token, the expected gradient of k3 as loss has the sign of the gradient of the reverse KL"),
  },
  {
    slug: "raises", title: "An exact step raises the KL", at: bandit("three", [0.01, 0.2, 0.79], [0.7, 0.01, 0.29]),
    estimator: { kernel: "k3" }, batch: 256, step: 0.1,
    text: "One exact step down the expected gradient of k3 as loss, without any noise, takes the policy farther from its reference.",
    claim: row("k3-raises", "three tokens, reference (.70 .01 .29)", "HOLDS",
      "an exact step on k3 as loss raises the reverse KL from some policy"),
  },
  {
    slug: "dropped", title: "A dropped token", at: DROPPED, estimator: { kernel: "k3" }, batch: 64, step: 0.1,
    text: "The policy has all but dropped token J, and nearly the whole pull of k3 as loss hangs on drawing it, " +
      "about once in 6,500 responses.",
    claim: row("k3-asymmetry.one-token", "dropped mode, 10 tokens", "HOLDS",
      "one token that the policy dropped carries more than half of the expected gradient of k3 as loss"),
  },
  {
    slug: "clamp", title: "The shipped clamp", at: DROPPED, estimator: { kernel: "k3", clamp: "shipped" }, batch: 64, step: 0.1,
    text: "Clamped as it is shipped, k3 as loss puts a coefficient of exactly 0 on the dropped token, so nothing brings it back.",
    claim: row("clamp", "k3, a token dropped, ℓ ≤ −5", "FAILS", "the clamps that ship leave the coefficient as it is"),
    variants: [
      { label: "clamped", estimator: { clamp: "shipped" } },
      { label: "not clamped", estimator: { clamp: "none" } },
    ],
  },
  {
    slug: "repels", title: "k1 as loss flees the sampler", at: bandit("three", [0.35, 0.4, 0.25], [0.15, 0.2, 0.65], [0.2, 0.5, 0.3]),
    estimator: { kernel: "k1" }, batch: 64, step: 0.1,
    text: "On data of an older policy μ, k1 as loss pushes π away from μ, wherever the reference is: drag the reference, and " +
      "nothing moves.",
    claim: row("k1-loss-repels", "bandits and trees", "HOLDS", "off-policy, the expected gradient of k1 as loss is −∇KL(μ‖π)"),
  },
  {
    slug: "rho", title: "ρ·k3, differentiated or detached", at: LAGGING,
    estimator: { kernel: "k3", weight: "token", differentiate: true }, batch: 64, step: 0.1,
    text: "Weighted by the ratio ρ, k3 as loss is unbiased for the reverse KL where the gradient flows through ρ, and still " +
      "descends the forward KL where ρ is detached.",
    claim: row("rho-k3", "bandit", "HOLDS", `k3 as loss with a differentiated ratio is ${REVERSE}`),
    variants: [
      { label: "differentiated", estimator: { differentiate: true } },
      { label: "detached", estimator: { differentiate: false },
        claim: row("off-policy-fix.k3", "bandit", "FAILS", `k3 as loss, weighted by a detached ratio, is ${REVERSE}`) },
    ],
  },
  {
    slug: "steps", title: "A token is not a response", at: TREE,
    estimator: { kernel: "k1", placement: "reward", credit: "token" }, batch: 64, step: 0.1,
    text: "Token A leads to nearly all of the divergence, which credit per token does not see: its expected gradient points more " +
      "than 90° away from that of the KL of whole responses.",
    claim: row("k1-reward.direction", "a tree of 2 tokens and 2 steps", "FAILS",
      "on-policy, the expected gradient of k1 in reward with credit token is within 90° of the reverse KL's"),
    variants: [
      { label: "credit: token", estimator: { credit: "token" } },
      { label: "credit: to go", estimator: { credit: "to_go" },
        claim: row("k1-reward", "sequences, credit to_go", "HOLDS", `on-policy, k1 in reward is ${REVERSE}`) },
    ],
  },
];
