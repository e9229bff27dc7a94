// The mathematics of the explorer, all of it: policies, estimators, exact moments, targets, steps and draws.
// It follows gradlab's specification; tests/test_explorer.py compares what the page shows with gradlab's own numbers.
//
// A scenario is {kind: "tree", vocab, length, policy, reference, behaviour} with logits [nodes · vocab], one row per prefix,
// breadth-first (length 1 is a bandit), or {kind: "gaussian", policy, reference, behaviour} with [mean, std].
// behaviour is null on-policy. An estimator is {kernel, placement, credit, weight, differentiate, clampLogRatio, clampValue}.

import { randomBinomial } from "d3-random";

const sum = (values) => values.reduce((a, b) => a + b, 0);
export const dot = (a, b) => a.reduce((total, x, i) => total + x * b[i], 0);
export const norm = (a) => Math.sqrt(dot(a, a));
export const minus = (a, b) => a.map((x, i) => x - b[i]);

export const KERNELS = {
  k1: { value: (l) => l, slope: () => 1 },
  k2: { value: (l) => (l * l) / 2, slope: (l) => l },
  k3: { value: (l) => excess(-l), slope: (l) => -Math.expm1(-l) },
  abs: { value: Math.abs, slope: Math.sign },
  k3_swapped: { value: (l) => excess(l), slope: (l) => Math.expm1(l) },
  // π − ref − ref·ℓ, whose derivative is π − ref.
  mse_sampled: { value: (l, ref) => ref * excess(l), slope: (l, ref) => ref * Math.expm1(l) },
};
// Kernels over the whole vocabulary of a step: functions of the prefix alone.
export const VOCABULARY = ["full", "mse"];

/** e^x − 1 − x, by its series where the difference would cancel. */
function excess(x) {
  if (Math.abs(x) > 0.05) return Math.expm1(x) - x;
  let term = 1, total = 0;
  for (let k = 1; k <= 12; k++) {
    term *= x / k;
    if (k > 1) total += term;
  }
  return total;
}

const bounded = (x, bound) => (bound === null ? x : Math.min(Math.max(x, -bound), bound));

export const kernelValue = (e, l, ref, kernel = e.kernel) =>
  bounded(KERNELS[kernel].value(bounded(l, e.clampLogRatio), ref), e.clampValue);

/** ∂k / ∂ log π: 0 where a clamp binds; straight_through takes the gradient of k2, which no clamp bounds. */
export function kernelSlope(e, l, ref) {
  if (e.placement === "straight_through") return KERNELS.k2.slope(l, ref);
  if (e.clampLogRatio !== null && Math.abs(l) > e.clampLogRatio) return 0;
  if (e.clampValue !== null && Math.abs(KERNELS[e.kernel].value(l, ref)) > e.clampValue) return 0;
  return KERNELS[e.kernel].slope(l, ref);
}

export function logSoftmax(row) {
  const top = Math.max(...row);
  const total = Math.log(sum(row.map((x) => Math.exp(x - top))));
  return row.map((x) => x - top - total);
}

/**
 * A rollout: every response with its probability under the sampler, `weight`. A response is a list of cells, each a prefix with a
 * token: arrays over cells hold the logs of the three policies, the score (on the parameters from `offset` on), and the vocabulary
 * kernels of the prefix with their gradients.
 */
export const rollout = (s) => (s.kind === "gaussian" ? gaussianRollout(s) : treeRollout(s));

// Nodes in standard deviations of the sampler. The trapezoidal rule is exact to rounding for smooth integrands with Gaussian tails.
const SPACING = 1 / 6;
const GRID = Array.from({ length: 289 }, (_, i) => (i - 144) * SPACING);
const GRID_RESPONSES = GRID.map((_, i) => [i]);

/** KL(π ‖ ref) of two Gaussians and its gradient, in closed form. */
function gaussianKl({ policy: [mean, std], reference: [a, b] }) {
  return {
    full: Math.log(b / std) + (std ** 2 + (mean - a) ** 2) / (2 * b ** 2) - 0.5,
    fullGradient: [(mean - a) / b ** 2, std / b ** 2 - 1 / std],
  };
}

function gaussianRollout(s) {
  const [mean, std] = s.policy, [a, b] = s.reference, [m, sd] = s.behaviour ?? s.policy;
  const logDensity = (centre, spread) => {
    const constant = Math.log(spread) + 0.5 * Math.log(2 * Math.PI);
    return (z) => -0.5 * ((m + sd * z - centre) / spread) ** 2 - constant;
  };
  const logMu = GRID.map(logDensity(m, sd));
  const { full, fullGradient } = gaussianKl(s);
  return {
    logPi: GRID.map(logDensity(mean, std)), logRef: GRID.map(logDensity(a, b)), logMu,
    score: GRID.map((z) => [(m + sd * z - mean) / std ** 2, ((m + sd * z - mean) ** 2 / std ** 2 - 1) / std]),
    offset: GRID.map(() => 0), value: { full: GRID.map(() => full) }, gradient: { full: GRID.map(() => fullGradient) },
    responses: GRID_RESPONSES, weight: logMu.map((x) => SPACING * sd * Math.exp(x)), size: 2, length: 1,
  };
}

function treeRollout({ vocab, length, policy, reference, behaviour }) {
  const r = { logPi: [], logRef: [], logMu: [], score: [], offset: [], value: { full: [], mse: [] },
              gradient: { full: [], mse: [] }, size: policy.length, length };
  for (let offset = 0; offset < policy.length; offset += vocab) {
    const row = (logits) => logSoftmax(logits.slice(offset, offset + vocab));
    const logPi = row(policy), logRef = row(reference), logMu = behaviour ? row(behaviour) : logPi;
    const pi = logPi.map(Math.exp), apart = logRef.map((x, v) => pi[v] - Math.exp(x));
    const ratio = minus(logPi, logRef), full = dot(pi, ratio), along = dot(pi, apart), mse = dot(apart, apart) / 2;
    const fullGradient = pi.map((p, v) => p * (ratio[v] - full)), mseGradient = pi.map((p, v) => p * (apart[v] - along));
    for (let v = 0; v < vocab; v++) {
      r.logPi.push(logPi[v]), r.logRef.push(logRef[v]), r.logMu.push(logMu[v]), r.offset.push(offset);
      r.score.push(pi.map((p, w) => (w === v ? 1 : 0) - p));
      r.value.full.push(full), r.gradient.full.push(fullGradient), r.value.mse.push(mse), r.gradient.mse.push(mseGradient);
    }
  }
  r.responses = listed(vocab, length);
  r.weight = r.responses.map((cells) => Math.exp(cells.reduce((total, c) => total + r.logMu[c], 0)));
  return r;
}

const lists = new Map();

/** Every response as a list of cells. The prefixes of one length stand in the order of the shorter responses. */
function listed(vocab, length) {
  const key = `${vocab} ${length}`;
  if (!lists.has(key)) {
    let responses = [[]];
    for (let t = 0, first = 0; t < length; first += vocab ** t, t++) {
      responses = responses.flatMap((cells, prefix) =>
        Array.from({ length: vocab }, (_, v) => [...cells, (first + prefix) * vocab + v]));
    }
    lists.set(key, responses);
  }
  return lists.get(key);
}

/** Σ_{u≥t}, in place. */
function toGo(values) {
  for (let t = values.length - 2; t >= 0; t--) values[t] += values[t + 1];
  return values;
}

/** Σ_{u>t}: what a term known before its own token adds to earlier ones. */
const later = (values) => minus(toGo([...values]), values);

const ofWeight = (e, vocabulary, terms) => {
  // The gradient of each term's weight reaches the tokens whose ratios stand in it.
  if (e.weight === "token") return terms;
  if (e.weight === "sequence") return terms.map(() => sum(terms));
  return vocabulary ? later(terms) : toGo([...terms]);
};

/** Coefficients of a response's steps: `score` on the score, `direct` on the gradient of the vocabulary kernel. */
function coefficients(e, r, cells) {
  const steps = cells.length, whole = e.credit === "sequence", vocabulary = VOCABULARY.includes(e.kernel);
  const values = [], slopes = [], weights = [], score = [], direct = [];
  let log = 0, logRef = 0, before = 0, all = 0;
  for (const c of cells) {
    log += r.logPi[c] - r.logRef[c];
    logRef += r.logRef[c];
    all += r.logPi[c] - r.logMu[c];
  }
  for (const c of cells) {
    const l = whole ? log : r.logPi[c] - r.logRef[c], ref = Math.exp(whole ? logRef : r.logRef[c]);
    const ratio = r.logPi[c] - r.logMu[c], upTo = vocabulary ? before : before + ratio;
    before += ratio;
    values.push(vocabulary ? r.value[e.kernel][c] : kernelValue(e, l, ref));
    slopes.push(vocabulary ? 0 : kernelSlope(e, l, ref));
    weights.push(e.weight === "none" ? 1 : Math.exp(e.weight === "token" ? ratio : e.weight === "sequence" ? all : upTo));
  }
  const inLoss = e.placement !== "reward", inReward = e.placement === "reward" || e.placement === "loss+reward";
  for (let t = 0; t < steps; t++) {
    direct.push(inLoss && vocabulary ? weights[t] : 0);
    score.push(inLoss ? weights[t] * slopes[t] : 0);
  }
  const add = (terms) => terms.forEach((x, t) => (score[t] += x));
  if (inLoss && e.differentiate) {
    // A whole-response kernel is one term, and its weight runs over all tokens.
    add(whole ? values.map((k, t) => weights[t] * k) : ofWeight(e, vocabulary, values.map((k, t) => weights[t] * k)));
  }
  if (inReward) {
    const inside = vocabulary && e.weight === "prefix"; // the weight stays with its own term
    const own = inside ? values.map((k, t) => weights[t] * k) : values;
    const credit = e.credit === "to_go" ? (vocabulary ? later(own) : toGo([...own]))
      : e.credit === "return" ? own.map(() => sum(own)) : own;
    const terms = inside ? credit : credit.map((k, t) => weights[t] * k);
    add(terms);
    if (e.differentiate) add(ofWeight(e, vocabulary, terms.map((k, t) => k * r.logPi[cells[t]])));
  }
  return { score, direct };
}

/** Add a response's gradient, times a factor, to `into` [p]. */
function addGradient(e, r, cells, factor, into) {
  const { score, direct } = coefficients(e, r, cells);
  for (let t = 0; t < cells.length; t++) {
    const c = cells[t], offset = r.offset[c], vector = r.score[c];
    for (let j = 0; j < vector.length; j++) into[offset + j] += factor * score[t] * vector[j];
    if (direct[t]) r.gradient[e.kernel][c].forEach((x, j) => (into[offset + j] += factor * direct[t] * x));
  }
  return into;
}

/** Exact mean gradient, [p]. */
export function meanGradient(e, r) {
  const mean = new Array(r.size).fill(0);
  r.responses.forEach((cells, i) => addGradient(e, r, cells, r.weight[i], mean));
  return mean;
}

/** Exact mean gradient, trace of the covariance of one response's, and every response's own. */
export function moments(e, r) {
  const each = r.responses.map((cells) => addGradient(e, r, cells, 1, new Array(r.size).fill(0)));
  const mean = meanGradient(e, r);
  const traceCov = sum(each.map((g, i) => r.weight[i] * g.reduce((total, x, j) => total + (x - mean[j]) ** 2, 0)));
  return { mean, traceCov, each };
}

/** The coefficient on the score of a single token, with its weight: k' in the loss, k in the reward. */
export const tokenCoefficient = (e, r, cell) => coefficients(e, r, [cell]).score[0];

/** Σ over responses of weight(cells, i) · Σ_t score_t. */
function scoreMean(r, weight) {
  const found = new Array(r.size).fill(0);
  r.responses.forEach((cells, i) => {
    const w = weight(cells, i);
    for (const c of cells) r.score[c].forEach((x, j) => (found[r.offset[c] + j] += w * x));
  });
  return found;
}

/** E over prefixes as the sampler visits them of Σ_v π(v|s) f(cell) score. */
function prefixMean(r, f) {
  const visits = new Array(r.logPi.length).fill(0), found = new Array(r.size).fill(0);
  r.responses.forEach((cells, i) => cells.forEach((c) => (visits[c] += r.weight[i])));
  visits.forEach((visited, c) => {
    const w = visited * Math.exp(r.logPi[c] - r.logMu[c]) * f(c);
    r.score[c].forEach((x, j) => (found[r.offset[c] + j] += w * x));
  });
  return found;
}

const over = (cells, f) => cells.reduce((total, c) => total + f(c), 0);
const logRatio = (r) => (c) => r.logPi[c] - r.logRef[c];
/** Probability of response i under π. */
const underPolicy = (r, cells, i) => r.weight[i] * Math.exp(over(cells, (c) => r.logPi[c] - r.logMu[c]));

/** Gradients of objectives, by name. */
export const TARGETS = {
  reverse_kl: (r) => r.length === 1 ? r.gradient.full[0] : scoreMean(r, (cells, i) => underPolicy(r, cells, i) * over(cells, logRatio(r))),
  reverse_kl_frozen_prefix: (r) => prefixMean(r, logRatio(r)),
  forward_kl: (r) => scoreMean(r, (cells, i) => -underPolicy(r, cells, i) * Math.exp(-over(cells, logRatio(r)))),
  forward_kl_frozen_prefix: (r) => prefixMean(r, (c) => -Math.exp(r.logRef[c] - r.logPi[c])),
  chi2_frozen_prefix: (r) => prefixMean(r, (c) => Math.exp(r.logPi[c] - r.logRef[c])),
  mse_frozen_prefix: (r) => prefixMean(r, (c) => Math.exp(r.logPi[c]) - Math.exp(r.logRef[c])),
  twice_total_variation: (r) => prefixMean(r, (c) => Math.sign(r.logPi[c] - r.logRef[c])),
  minus_kl_from_sampler: (r) => scoreMean(r, (_, i) => r.weight[i]),
  reverse_minus_forward: (r) => minus(TARGETS.reverse_kl(r), TARGETS.forward_kl_frozen_prefix(r)),
};

/** Which objective an expected gradient is the gradient of, to rounding: a name of TARGETS, "zero", or null. */
export function identify(mean, scale, r) {
  if (norm(mean) <= 1e-10 * scale) return "zero";
  const names = Object.keys(TARGETS).filter((name) => r.length > 1 || !/kl_frozen/.test(name));
  return names.find((name) => {
    const target = TARGETS[name](r);
    return norm(minus(mean, target)) <= 1e-10 * Math.max(norm(mean), norm(target));
  }) ?? null;
}

/** KL(π ‖ ref) of whole responses. */
const klOf = (r) => (r.length === 1 ? r.value.full[0] : sum(r.responses.map((cells, i) => underPolicy(r, cells, i) * over(cells, logRatio(r)))));

/** KL(p ‖ q) of whole responses, for logits or [mean, std]. */
export const kl = (s, p, q) => klOf(rollout({ ...s, policy: p, reference: q, behaviour: null }));

// A gradient smaller than this share of its terms is rounding, and a relative bias below the other counts as 0.
const ZERO = 1e-12, NO_BIAS = 1e-10;

/** ‖g − target‖ / ‖target‖, 0 where it is rounding and NaN for a target of 0. */
export function relative(g, target) {
  const bias = norm(target) > ZERO ? norm(minus(g, target)) / norm(target) : NaN;
  return bias < NO_BIAS ? 0 : bias;
}

/** Bias, cosine, noise and crossover of an estimator as a gradient of the reverse KL. */
export function measure(e, s) {
  const r = rollout(s);
  const { mean, traceCov, each } = moments(e, r);
  const truth = TARGETS.reverse_kl(r);
  const scale = Math.sqrt(sum(r.weight.map((w, i) => w * dot(each[i], each[i]))));
  const size = norm(truth);
  const defined = size > ZERO;
  const bias = relative(mean, truth);
  const noise = defined ? traceCov / size ** 2 : NaN;
  const still = norm(mean) <= ZERO * Math.max(scale, 1e-300) || !defined;
  return {
    rollout: r, mean, truth, each, traceCov, bias, noise,
    gradient_norm: norm(mean), target_norm: size,
    cosine: still || norm(mean) < ZERO ? NaN : Math.min(1, dot(mean, truth) / (norm(mean) * size)),
    crossover: bias === 0 ? Infinity : noise / bias ** 2,
    descends: identify(mean, Math.max(scale, size), r),
    kl: kl(s, s.policy, s.reference), forward: kl(s, s.reference, s.policy),
    lag: s.behaviour ? kl(s, s.behaviour, s.policy) : 0,
  };
}

const moved = (s, gradient, step) => s.policy.map((x, i) => x - step * gradient[i]);
const held = (s) => (s.kind === "gaussian" ? s.policy[1] > 0.05 : s.policy.every((x) => Number.isFinite(x) && Math.abs(x) < 60));

/** Exact descent: policies and KLs after 0, 1, … steps against the expected gradient, or the true one where e is null. */
export function descend(e, s, step, count) {
  const policies = [], kls = [];
  for (let now = s; policies.length <= count && held(now); ) {
    const closed = !e && s.kind === "gaussian" ? gaussianKl(now) : null;
    const r = closed ? null : rollout(now);
    policies.push(now.policy);
    kls.push(closed ? closed.full : klOf(r));
    const gradient = closed ? closed.fullGradient : e ? meanGradient(e, r) : TARGETS.reverse_kl(r);
    now = { ...now, policy: moved(now, gradient, step) };
  }
  return { policies, kls };
}

/** Mean gradients of `count` batches of `size` responses each, drawn from the sampler; `random` is uniform on [0, 1). */
export function batches(each, weight, size, count, random) {
  const many = each.length > 32;
  // Long lists are drawn one by one, so their batches are fewer when they are large.
  const number = many ? Math.max(24, Math.min(count, Math.floor(1e5 / size))) : count;
  return Array.from({ length: number }, () => {
    const mean = new Array(each[0].length).fill(0);
    const add = (i, share) => each[i].forEach((x, j) => (mean[j] += share * x));
    (many ? drawn : counted)(weight, size, random, add);
    return mean;
  });
}

function counted(weight, size, random, add) {
  let left = size, mass = 1;
  const binomial = randomBinomial.source(random);
  for (let i = 0; i < weight.length && left > 0; i++) {
    const p = Math.min(1, weight[i] / mass);
    const hits = i === weight.length - 1 || p >= 1 ? left : p > 0 ? binomial(left, p)() : 0;
    if (hits) add(i, hits / size);
    left -= hits;
    mass -= weight[i];
  }
}

function drawn(weight, size, random, add) {
  const ends = [];
  weight.reduce((total, w) => (ends.push(total + w), total + w), 0);
  for (let k = 0; k < size; k++) {
    const u = random() * ends[ends.length - 1];
    let low = 0, high = ends.length - 1;
    while (low < high) {
      const mid = (low + high) >> 1;
      if (ends[mid] < u) low = mid + 1;
      else high = mid;
    }
    add(low, 1 / size);
  }
}

/** Why gradlab refuses a composition, or null. */
export function refusal(e) {
  const vocabulary = VOCABULARY.includes(e.kernel);
  const clamped = e.clampLogRatio !== null || e.clampValue !== null;
  if (e.placement === "loss" && !["token", "sequence"].includes(e.credit)) return "a loss differentiates each term where it stands";
  if (e.placement === "straight_through" && e.credit !== "token") return "straight-through replaces a gradient per token";
  if (e.credit === "sequence" && !["none", "sequence"].includes(e.weight)) return "a whole-response kernel has one weight";
  if (vocabulary && e.credit === "sequence") return "over whole responses, a sum over the vocabulary is the KL itself";
  if (vocabulary && e.placement === "straight_through") return "straight-through exchanges the gradient of a sampled kernel";
  if ((vocabulary || e.kernel === "mse_sampled") && clamped) return "this kernel is bounded already";
  if (e.weight === "none" && e.differentiate) return "without a weight there is none to differentiate";
  if (vocabulary && e.differentiate && e.placement.includes("reward")) return "the reward term is the weight's gradient already";
  return null;
}
