// What a person chose, what follows from it, and the colours.

import { randomLcg } from "d3-random";
import { PRESETS } from "./presets.js";
import * as math from "./math.js";

export const WORLDS = {
  three: { label: "3 outcomes", kind: "tree", vocab: 3, length: 1, tokens: ["A", "B", "C"] },
  ten: { label: "10 tokens", kind: "tree", vocab: 10, length: 1, tokens: [..."ABCDEFGHIJ"] },
  steps: { label: "2 steps", kind: "tree", vocab: 2, length: 2, tokens: ["A", "B", "A after A", "B after A", "A after B", "B after B"] },
  gaussian: { label: "Gaussian", kind: "gaussian", vocab: 0, length: 1, tokens: ["mean", "std"] },
};
export const KERNELS = ["k1", "k2", "k3", "abs", "k3_swapped", "full", "mse"];
export const PLACEMENTS = ["loss", "reward", "loss+reward", "straight_through"];
export const CREDITS = ["token", "to_go", "return", "sequence"];
export const WEIGHTS = ["none", "token", "prefix", "sequence"];
export const CLAMPS = {
  none: [null, null, "none"], shipped: [20, 10, "as shipped: log-ratio ±20, value ±10"], value: [null, 1, "value ±1"],
  log: [1, null, "log-ratio ±1"],
};
export const STEPS = [0.01, 0.03, 0.1, 0.3, 1];
export const MOST = 16; // batches of at most 2^16 responses
export const BATCHES = 300, DESCENT = 60;
const PLAIN = { kernel: "k3", placement: "loss", credit: "token", weight: "none", differentiate: false, clamp: "none" };

// The colours of gradlab's figures: hue = kernel, lightness = placement.
const HUES = {
  k1: "#0072B2", k2: "#009E73", k3: "#D55E00", full: "#CC79A7", k3_swapped: "#E69F00", mse: "#56B4E9", mse_sampled: "#56B4E9",
  abs: "#5A4A00",
};
const LIGHTNESS = { loss: 0, straight_through: 0.25, reward: -0.45, "loss+reward": 0.5 };
// On dark paper the same hues, lighter.
const LIGHTNESS_IN_DARK = { loss: 0.2, straight_through: 0.4, reward: 0.55, "loss+reward": 0.65 };

export function colour(kernel, placement, dark) {
  const amount = (dark ? LIGHTNESS_IN_DARK : LIGHTNESS)[placement] + (dark && kernel === "abs" ? 0.2 : 0);
  const end = amount > 0 ? 255 : 0;
  const parts = [1, 3, 5].map((i) => (1 - Math.abs(amount)) * parseInt(HUES[kernel].slice(i, i + 2), 16) + Math.abs(amount) * end);
  return `#${parts.map((x) => Math.round(x).toString(16).padStart(2, "0")).join("")}`;
}

const logs = (world, numbers) => (numbers && world !== "gaussian" ? numbers.map(Math.log) : numbers && [...numbers]);

const start = (world) => PRESETS.find((preset) => preset.at.world === world);
const worldState = (at) => ({
  policy: logs(at.world, at.policy), reference: logs(at.world, at.reference),
  // Where data were on-policy so far, a sampler between the two is offered.
  behaviour: logs(at.world, at.behaviour ?? at.policy.map((p, i) => (at.world === "gaussian" ? p : 0.7 * p + 0.3 * at.reference[i]))),
  offPolicy: at.behaviour !== null,
});

export function initial() {
  const worlds = Object.fromEntries(Object.keys(WORLDS).map((world) => [world, worldState(start(world).at)]));
  return fromPreset({ worlds, seed: 1, theme: null }, "raises");
}

export function fromPreset(state, slug, variant = 0) {
  const preset = PRESETS.find((each) => each.slug === slug);
  const { world } = preset.at;
  return {
    ...state, world, preset: slug, variant, worlds: { ...state.worlds, [world]: worldState(preset.at) }, batch: preset.batch,
    step: preset.step, estimator: { ...PLAIN, ...preset.estimator, ...preset.variants?.[variant].estimator },
  };
}

/** The estimator as math.js reads it. */
export function composed({ estimator: { clamp, ...e } }) {
  return { ...e, clampLogRatio: CLAMPS[clamp][0], clampValue: CLAMPS[clamp][1] };
}

/** What a world lacks for a choice, or null. */
export function lacks(world, { kernel, credit, weight, clamp }) {
  if (WORLDS[world].length === 1 && ((credit ?? "token") !== "token" || ["prefix", "sequence"].includes(weight))) return "needs two steps";
  if (world !== "gaussian") return null;
  if (kernel === "mse" || kernel === "abs" || (clamp ?? "none") !== "none") return "not for Gaussians: its integrand is not smooth";
  if (kernel === "k3_swapped") return "not for Gaussians: its variance is infinite for most pairs";
  if ((weight ?? "none") !== "none") return "not for Gaussians: their data are on-policy";
  return null;
}

const allowed = (world, e) => !lacks(world, e) && !math.refusal(composed({ estimator: e }));
// What it costs to undo a choice; of two ways the cheaper is taken.
const COSTS = { kernel: 32, placement: 8, weight: 4, credit: 4, differentiate: 2, clamp: 1 };
const OPTIONS = { kernel: KERNELS, placement: PLACEMENTS, credit: CREDITS, weight: WEIGHTS, differentiate: [false, true], clamp: Object.keys(CLAMPS) };

/** Make a choice, and change as little as possible of the others where they cannot be combined. */
export function choose(state, change, world = state.world) {
  const wanted = { ...state.estimator, ...change };
  let best = null, least = Infinity;
  const search = (fields, e, cost) => {
    if (cost >= least) return;
    if (!fields.length) {
      if (allowed(world, e)) [best, least] = [e, cost];
      return;
    }
    const [field, ...rest] = fields;
    search(rest, e, cost);
    if (field in change) return;
    OPTIONS[field].forEach((value, i) => value !== e[field] && search(rest, { ...e, [field]: value }, cost + COSTS[field] + i / 10));
  };
  search(Object.keys(OPTIONS), wanted, 0);
  return { ...state, world, estimator: best ?? state.estimator, preset: null };
}

export function scenario(state) {
  const { kind, vocab, length } = WORLDS[state.world];
  const { policy, reference, behaviour, offPolicy } = state.worlds[state.world];
  return { kind, vocab, length, policy, reference, behaviour: offPolicy && kind === "tree" ? behaviour : null };
}

/** Everything the page shows. */
export function derive(state) {
  const s = scenario(state), e = composed(state);
  const found = math.measure(e, s);
  const down = math.descend(e, s, state.step, DESCENT), true_down = math.descend(null, s, state.step, DESCENT);
  const { each, rollout: r } = found;
  const cloud = math.batches(each, r.weight, state.batch, BATCHES, randomLcg(state.seed / 1000));
  const rmse = Math.sqrt(found.bias ** 2 + found.noise / state.batch);
  const sampled = Math.sqrt(cloud.reduce((total, g) => total + math.norm(math.minus(g, found.truth)) ** 2, 0) / cloud.length) / found.target_norm;
  // Of a single step, the prefixes' distribution held fixed: what a loss per token can see.
  const frozen = s.length > 1 ? math.TARGETS.reverse_kl_frozen_prefix(r) : null;
  const bias_frozen = frozen && math.relative(found.mean, frozen);
  return { ...found, frozen, bias_frozen, s, e, down, true_down, cloud, rmse, sampled, flips: flips(found, r) };
}

/** Parameters whose expected pull has the opposite sign of the true one. */
function flips({ mean, truth }) {
  const rounding = 1e-10 * Math.max(math.norm(mean), math.norm(truth));
  return mean.map((x, i) => x * truth[i] < 0 && Math.min(Math.abs(x), Math.abs(truth[i])) > rounding);
}

const SHORT = { "loss+reward": "in reward and loss", loss: "as loss", reward: "in reward", straight_through: "straight-through" };

export function nameOf({ estimator: e, world }) {
  const weight = e.weight === "none" ? "" : e.weight === "token" ? "ρ·" : e.weight === "prefix" ? "ρ≤t·" : "ρ(y)·";
  const parts = [];
  if (WORLDS[world].length > 1) parts.push(`credit ${e.credit.replace("_", " ")}`);
  if (e.weight !== "none") parts.push(e.differentiate ? "ρ differentiated" : "ρ detached");
  if (e.clamp !== "none") parts.push("clamped");
  return `${weight}${e.kernel.replace("_", " ")} ${SHORT[e.placement]}${parts.length ? ` (${parts.join(", ")})` : ""}`;
}

/** The same measurement in Python. */
export function python(state) {
  const { kind, vocab, length } = WORLDS[state.world];
  const s = scenario(state), e = composed(state);
  const row = (numbers) => `[${numbers.join(", ")}]`;
  const rows = (numbers) => `[${Array.from({ length: numbers.length / vocab }, (_, i) => row(numbers.slice(i * vocab, (i + 1) * vocab))).join(", ")}]`;
  const make = (numbers) => kind === "gaussian" ? `gl.Gaussian(${numbers.join(", ")})` : length > 1 ? `gl.Tree(${rows(numbers)})` : `gl.Bandit(${row(numbers)})`;
  const given = [`"${e.kernel}"`, `placement="${e.placement}"`];
  if (e.credit !== "token") given.push(`credit="${e.credit}"`);
  if (e.weight !== "none") given.push(`weight="${e.weight}"`);
  if (e.differentiate) given.push("differentiate_weight=True");
  if (e.clampLogRatio !== null) given.push(`clamp_log_ratio=${e.clampLogRatio}`);
  if (e.clampValue !== null) given.push(`clamp_value=${e.clampValue}`);
  return [
    "import gradlab as gl", "", `policy = ${make(s.policy)}`, `reference = ${make(s.reference)}`,
    ...(s.behaviour ? [`behaviour = ${make(s.behaviour)}`] : []),
    `scenario = gl.Scenario(policy, reference${s.behaviour ? ", behaviour" : ""})`, `estimator = gl.Estimator(${given.join(", ")})`,
    "print(gl.measure(estimator, scenario).T)",
  ].join("\n");
}
