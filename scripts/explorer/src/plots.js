// What the gradient does: in its own plane, token by token, against the batch size, and down the descent.

import { scaleLinear, scaleLog } from "d3-scale";
import { line } from "d3-shape";
import { svg } from "lit-html";
import { arrow, axes, handle, mark, numberInDrawing, show } from "./draw.js";
import { dot, kernelSlope, kernelValue, minus, norm, tokenCoefficient, VOCABULARY } from "./math.js";
import { BATCHES, DESCENT, MOST, WORLDS } from "./state.js";

const FRAME = { left: 42, right: 388, top: 26, bottom: 236 };
const BOX = "0 0 400 272";

/**
 * The plane of the true and the expected gradient, in units of the true one, which points right. With two free parameters it is
 * all there is; with more, it is a projection.
 */
export function plane(state, d) {
  const size = d.target_norm;
  if (!(size > 1e-12)) return svg`<svg viewBox=${BOX} role="img" aria-label="The policy is the reference: the true gradient is 0"><text class="note" x="200" y="130" text-anchor="middle">π = ref: the true gradient is 0</text></svg>`;
  const along = d.truth.map((x) => x / size);
  const across = acrossOf(state, along, d.mean);
  const at = (g) => [dot(g, along) / size, dot(g, across) / size];
  const frozen = d.frozen && at(d.frozen);
  const same = frozen && d.bias_frozen < 1e-6;
  const [mx, my] = at(d.mean), spread = Math.sqrt(d.noise / state.batch);
  // The view holds both arrows, and the circle unless it is far larger.
  const room = Math.min(1.25 * spread, 1.6 * Math.max(1, Math.hypot(mx, my)));
  const [x1, x2] = [Math.min(-0.15, mx - room, (frozen?.[0] ?? 0) - 0.15), Math.max(1.15, mx + room, (frozen?.[0] ?? 0) + 0.15)];
  const [y1, y2] = [Math.min(-0.3, my - room, (frozen?.[1] ?? 0) - 0.2), Math.max(0.3, my + room, (frozen?.[1] ?? 0) + 0.2)];
  const { left, right, top, bottom } = FRAME;
  const unit = Math.min((right - left) / (x2 - x1), (bottom - top) / (y2 - y1));
  const X = (v) => (left + right) / 2 + unit * (v - (x1 + x2) / 2), Y = (v) => (top + bottom) / 2 - unit * (v - (y1 + y2) / 2);
  const points = d.cloud.map((g) => at(g)).map(([a, b]) => [X(a), Y(b)]);
  const dots = points.map(([a, b]) => `M${a.toFixed(1)},${b.toFixed(1)}h0`).join("");
  const outside = points.filter(([a, b]) => a < 6 || a > 394 || b < 12 || b > 244).length;
  return svg`<svg viewBox=${BOX} role="img" aria-label=${`True gradient and expected gradient: bias ${show(d.bias)}, cosine ${show(d.cosine)}; ${d.cloud.length} batches of ${state.batch} around it`}>
    <defs><clipPath id="plane"><rect x="6" y="12" width="388" height="232" /></clipPath></defs>
    <g clip-path="url(#plane)">
      <line class="zero" x1="6" x2="394" y1=${Y(0)} y2=${Y(0)} /><line class="zero" x1=${X(0)} x2=${X(0)} y1="12" y2="244" />
      <path class="cloud" d=${dots} />
      <circle class="spread" cx=${X(mx)} cy=${Y(my)} r=${unit * spread} />
      <line class="gap" x1=${X(1)} y1=${Y(0)} x2=${X(mx)} y2=${Y(my)} />
      ${arrow(X(0), Y(0), X(mx), Y(my), "estimate", 14)}${arrow(X(0), Y(0), X(1), Y(0), "truth", 10)}
      ${frozen ? svg`${arrow(X(0), Y(0), X(frozen[0]), Y(frozen[1]), "frozen", 10)}${same ? "" : svg`<text class="letter halo" x=${X(frozen[0])} y=${Y(frozen[1]) + (frozen[1] > my ? -9 : 18)} text-anchor="middle">∇ single steps</text>`}` : ""}
      <text class="label halo" x=${X(1)} y=${Y(0) + (my > 0 ? 19 : -10)} text-anchor="middle">∇KL</text>
      <text class="label halo estimate" x=${X(mx)} y=${Y(my) + (my > 0 ? -10 : 19)} text-anchor=${same && mx < 0.2 ? "start" : "middle"}>E g${same ? " = ∇ of single steps" : ""}</text>
    </g>
    <text class="note" x="8" y="262">${d.truth.length > 3 || state.world === "steps" ? "on the plane of both arrows" : "the whole gradient"}; circle: one standard deviation${outside ? `; ${outside} dots lie outside` : ""}</text>
  </svg>`;
}

/** A direction across the true one: fixed where there are two free parameters, else that of the rest of the expected gradient. */
function acrossOf(state, along, mean) {
  if (state.world === "gaussian") return [-along[1], along[0]];
  if (state.world === "three") {
    // A quarter turn in the plane of logits that sum to 0.
    const [a, b, c] = along, root = Math.sqrt(3);
    return [(c - b) / root, (a - c) / root, (b - a) / root];
  }
  const rest = (g) => g.map((x, i) => x - dot(g, along) * along[i]);
  let across = rest(mean);
  if (norm(across) < 1e-9 * norm(mean)) across = rest(along.map((_, i) => (i === 0 ? 1 : 0)));
  const size = norm(across);
  return across.map((x) => x / size);
}

/** Ticks at round distances. */
const ticks = (scale, count) => scale.ticks(count);

/** The coefficient that a token's score gets, against its log-ratio; the principled one is the log-ratio itself. */
export function coefficientCurve(state, d) {
  const { rollout: r, e, s } = d, { tokens } = WORLDS[state.world];
  const vocabulary = VOCABULARY.includes(e.kernel), gaussian = s.kind === "gaussian";
  const cells = gaussian ? [] : r.logPi.map((_, c) => ({ c, l: r.logPi[c] - r.logRef[c], k: vocabulary ? NaN : tokenCoefficient(e, r, c), p: Math.exp(r.logMu[c]) }));
  const far = Math.min(Math.max(2, ...cells.map(({ l }) => 1.1 * Math.abs(l))), 12);
  const placed = (l) => {
    const inLoss = e.placement !== "reward" ? kernelSlope(e, l, 1) : 0;
    const inReward = e.placement === "reward" || e.placement === "loss+reward" ? kernelValue(e, l, 1) : 0;
    const throughWeight = e.differentiate && e.placement !== "reward" ? kernelValue(e, l, 1) : 0;
    return inLoss + inReward + throughWeight;
  };
  const top = Math.min(Math.max(2.2, ...cells.map(({ k }) => (Number.isFinite(k) ? 1.15 * Math.abs(k) : 0))), 3 * far);
  const x = scaleLinear([-far, far], [FRAME.left, FRAME.right]), y = scaleLinear([-top, top], [FRAME.bottom, FRAME.top]);
  const steps = Array.from({ length: 241 }, (_, i) => -far + (2 * far * i) / 240);
  const trace = line().defined(([, v]) => Number.isFinite(v));
  const curve = vocabulary ? "" : trace(steps.map((l) => [x(l), y(placed(l))]));
  const placedCells = cells.filter(({ k }) => Number.isFinite(k)).map(({ c, l, k, p }) => ({
    name: tokens[c].replace(" after ", "|"), at: [x(l), y(Math.max(-top, Math.min(top, k)))], r: 4 + 9 * Math.sqrt(p), outside: Math.abs(k) > top,
  }));
  return svg`<svg viewBox=${BOX} role="img" aria-label="Coefficient on the score against the log-ratio, with every token on it">
    <defs><clipPath id="curve"><rect x=${FRAME.left} y=${FRAME.top - 4} width=${FRAME.right - FRAME.left} height=${FRAME.bottom - FRAME.top + 8} /></clipPath></defs>
    ${axes({ x, y, ticksX: ticks(x, 6), ticksY: ticks(y, 5), nameX: "log-ratio ℓ", nameY: "coefficient", frame: FRAME })}
    <g clip-path="url(#curve)">
      <path class="curve estimate" d=${curve ?? ""} /><path class="curve truth" d=${trace(steps.map((l) => [x(l), y(l)]))} />
    </g>
    ${placedCells.map(({ at: [cx, cy], r, outside }) => svg`<circle class=${`token ${outside ? "outside" : ""}`} cx=${cx} cy=${cy} r=${r} />`)}
    ${labelled(placedCells).map(({ name, x, y }) => svg`<text class="letter halo" x=${x} y=${y} text-anchor="middle">${name}</text>`)}
    ${vocabulary ? svg`<text class="note" x="215" y="60" text-anchor="middle">no single coefficient: it sums over all tokens</text>` : ""}
    <text class="note" x=${FRAME.left + 6} y=${FRAME.top + 12}>← under-sampled</text><text class="note" x=${FRAME.right - 8} y=${FRAME.bottom - 8} text-anchor="end">over-sampled →</text>
  </svg>`;
}

/** Names above the discs; discs in one place share theirs. */
function labelled(cells) {
  const groups = [];
  for (const { name, at, r } of cells) {
    const near = groups.find((group) => Math.hypot(group.at[0] - at[0], group.at[1] - at[1]) < 9);
    if (near) near.names.push(name), (near.r = Math.max(near.r, r));
    else groups.push({ names: [name], at, r });
  }
  return groups.map(({ names, at, r }) => ({ name: names.length > 3 ? `${names[0]}…${names.at(-1)}` : names.join(" "), x: Math.min(at[0], 380), y: at[1] - r - 4 }));
}

/** Error against the batch size: bias stays, noise falls, and they meet at the crossover. */
export function batchPlot(state, d, chooseBatch) {
  const { bias, noise, crossover } = d, known = Number.isFinite(noise);
  const x = scaleLog([1, 2 ** 20], [FRAME.left, FRAME.right]).base(2);
  const errors = known ? [Math.sqrt(noise), bias || Math.sqrt(noise / 2 ** 20)] : [1, 0.01];
  const low = 10 ** Math.floor(Math.log10(Math.max(Math.min(...errors) * 0.5, 1e-6))), high = 10 ** Math.ceil(Math.log10(Math.max(...errors) * 1.5));
  const y = scaleLog([low, high], [FRAME.bottom, FRAME.top]);
  const sizes = Array.from({ length: 81 }, (_, i) => 2 ** (i / 4));
  const trace = line();
  const meets = Number.isFinite(crossover) && crossover >= 1 && crossover <= 2 ** 20;
  const at = x(state.batch);
  // The name of the noise stands where neither the bias nor the crossover is.
  const named = [1.3, 4096, 256, 65536].find((n) => Math.abs(Math.log2(n / crossover)) > 5 && Math.sqrt(noise / n) > 1.5 * low && Math.abs(Math.log2(n / state.batch)) > 2.5);
  const decades = [];
  for (let t = low; t <= high * 1.01; t *= 10) decades.push(t);
  const most = state.world === "gaussian" ? 12 : MOST;
  return svg`<svg viewBox=${BOX} role="group" aria-label=${`Relative error against the batch size: bias ${show(bias)}, crossover at ${show(crossover)} responses`}>
    ${axes({ x, y, ticksX: [1, 16, 256, 4096, 65536, 2 ** 20], ticksY: decades, formatX: (t) => ({ 65536: "65k", 1048576: "1M" })[t] ?? t, formatY: (t) => (t > 0.009 && t < 2e3 ? String(Number(t.toPrecision(1))) : `10${exponent(Math.round(Math.log10(t)))}`), nameX: "batch size n", nameY: "relative error", frame: FRAME })}
    <defs><clipPath id="errors"><rect x=${FRAME.left} y=${FRAME.top - 4} width=${FRAME.right - FRAME.left} height=${FRAME.bottom - FRAME.top + 4} /></clipPath></defs>
    ${known ? svg`<g clip-path="url(#errors)">
      <path class="curve noise" d=${trace(sizes.map((n) => [x(n), y(Math.sqrt(noise / n))]))} />
      ${bias > 0 ? svg`<line class="curve bias" x1=${FRAME.left} x2=${FRAME.right} y1=${y(bias)} y2=${y(bias)} />` : ""}
      <path class="curve estimate" d=${trace(sizes.map((n) => [x(n), y(Math.sqrt(bias ** 2 + noise / n))]))} /></g>
      ${named ? svg`<text class="letter halo" x=${x(named) + 8} y=${y(Math.sqrt(noise / named)) - 4}>noise</text>` : ""}
      <text class="letter halo" x=${FRAME.right - 4} y=${bias > 0 ? y(bias) - 7 : FRAME.bottom - 8} text-anchor="end">${bias > 0 ? svg`bias ${numberInDrawing("bias", bias)}` : svg`no bias: ${numberInDrawing("bias", bias)}`}</text>
      ${meets ? svg`<circle class="meet" cx=${x(crossover)} cy=${y(bias)} r="5" /><text class="label halo" x=${Math.min(Math.max(x(crossover), 90), 330)} y=${y(bias) + 22} text-anchor="middle">n = ${numberInDrawing("crossover", crossover)}</text>` : ""}` : ""}
    <line class="now" x1=${at} x2=${at} y1=${FRAME.top} y2=${FRAME.bottom} aria-hidden="true" />
    ${handle({
      key: "batch", x: at, y: FRAME.top, now: state.batch, low: 1, high: 2 ** most, label: "batch size", text: `${state.batch} responses`, hit: 14,
      to: (px) => chooseBatch(Math.round(Math.min(Math.max(x.invert(px), 1), 2 ** most))),
      by: (dx, dy) => chooseBatch(Math.min(Math.max(2 ** (Math.round(Math.log2(state.batch)) + dx + dy), 1), 2 ** most)),
      shape: svg`<path class="grip" d=${`M${at - 7},${FRAME.top - 12}h14v8l-7,7l-7,-7z`} />`,
    })}
  </svg>`;
}

const exponent = (k) => String(k).replace("-", "⁻").replace(/\d/g, (digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]);

/** KL(π ‖ ref) down the exact descent of the expected gradient, and of the true one. */
export function descentPlot(state, d) {
  const kls = [...d.down.kls, ...d.true_down.kls].filter(Number.isFinite);
  const x = scaleLinear([0, DESCENT], [FRAME.left, FRAME.right]);
  const y = scaleLinear([0, Math.min(Math.max(...kls) * 1.08, 4 * d.kl + 0.01)], [FRAME.bottom, FRAME.top]);
  const trace = line().defined(([, v]) => v > -400);
  const path = (down) => trace(down.kls.map((v, i) => [x(i), y(v)]));
  const last = (down) => [x(down.kls.length - 1), y(down.kls.at(-1))];
  return svg`<svg viewBox=${BOX} role="img" aria-label=${`KL of policy and reference along ${DESCENT} exact steps of ${state.step}: ${show(d.kl)} before, ${show(d.down.kls.at(-1))} after, ${show(d.true_down.kls.at(-1))} with the true gradient`}>
    <defs><clipPath id="descent"><rect x=${FRAME.left} y=${FRAME.top - 6} width=${FRAME.right - FRAME.left + 8} height=${FRAME.bottom - FRAME.top + 8} /></clipPath></defs>
    ${axes({ x, y, ticksX: [0, 15, 30, 45, 60], ticksY: ticks(y, 4), nameX: "exact steps", nameY: "KL(π‖ref), nats", frame: FRAME })}
    <g clip-path="url(#descent)">
    <path class="curve estimate" d=${path(d.down)} /><path class="curve truth" d=${path(d.true_down)} />
    <circle class="tip estimate" cx=${last(d.down)[0]} cy=${last(d.down)[1]} r="4" />${mark("policy", x(0), y(d.kl), 5)}</g>
  </svg>`;
}
