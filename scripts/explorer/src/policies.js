// Where the policies are dragged: a simplex, bars, two densities, and a tree of two steps.

import { contours } from "d3-contour";
import { scaleLinear, scaleLog } from "d3-scale";
import { line } from "d3-shape";
import { svg } from "lit-html";
import { arrow, handle, mark, NAMES, show, SYMBOLS } from "./draw.js";
import { logSoftmax } from "./math.js";
import { WORLDS } from "./state.js";

const LEAST = 1e-5;
export const probabilities = (logits) => logSoftmax(logits).map(Math.exp);
const percent = (p) => show(p, 3);
const roles = (s) => (s.behaviour ? ["behaviour", "reference", "policy"] : ["reference", "policy"]);

/** Logits with one token's probability set, and the others' in their old proportions. */
export function withProbability(logits, token, p) {
  const old = logSoftmax(logits), kept = Math.min(Math.max(p, LEAST), 1 - LEAST);
  const rest = Math.log1p(-kept) - Math.log(Math.max(old.reduce((total, x, i) => (i === token ? total : total + Math.exp(x)), 0), 1e-300));
  return old.map((x, i) => (i === token ? Math.log(kept) : x + rest));
}

export function panel(state, d, move) {
  return { three: simplex, ten: bars, gaussian: densities, steps: tree }[state.world](state, d, move);
}

const SIDE = 344, LEFT = 28, BASE = 340;
const CORNERS = [[LEFT, BASE], [LEFT + SIDE, BASE], [LEFT + SIDE / 2, BASE - SIDE * Math.sqrt(0.75)]];
const place = (p) => [0, 1].map((i) => p.reduce((total, share, v) => total + share * CORNERS[v][i], 0));

function fromPlace(x, y) {
  const c = (BASE - y) / (SIDE * Math.sqrt(0.75)), b = (x - LEFT) / SIDE - c / 2;
  const p = [1 - b - c, b, c].map((share) => Math.max(share, 1e-4));
  const total = p.reduce((a, b) => a + b);
  return p.map((share) => share / total);
}

const GRID = 72;
let levels = { key: null, paths: [] };

/** Level sets of KL(· ‖ ref) on the simplex: paths in the drawing's units. */
function levelSets(reference) {
  const key = reference.map((p) => p.toFixed(4)).join();
  if (levels.key !== key) {
    const values = [];
    for (let j = 0; j < GRID; j++) {
      for (let i = 0; i < GRID; i++) {
        // Beyond the triangle the function goes on from its edge: contours meet the edge, and are cut there.
        const c = (j + 0.5) / GRID, b = (i + 0.5) / GRID - c / 2;
        const p = [1 - b - c, b, c].map((share) => Math.max(share, 1e-5));
        values.push(p.reduce((total, share, v) => total + share * Math.log(share / reference[v]), 0));
      }
    }
    const at = ([i, j]) => [LEFT + (i / GRID) * SIDE, BASE - (j / GRID) * SIDE * Math.sqrt(0.75)];
    const path = (ring) => `M${ring.map((point) => at(point).map((x) => x.toFixed(1)).join()).join("L")}Z`;
    const drawn = contours().size([GRID, GRID]).thresholds([0.02, 0.1, 0.3, 0.6, 1, 1.5, 2.2, 3])(values);
    // A contour holds what lies above its level: on the simplex the hole in it is what is nearer to the reference.
    levels = { key, paths: drawn.map((each) => each.coordinates.flat().map(path).join("")) };
  }
  return levels.paths;
}

function simplex(state, d, move) {
  const { s } = d;
  const [pi, ref] = [probabilities(s.policy), probabilities(s.reference)];
  const [x0, y0] = place(pi);
  // A step moves the logits by −g, so probabilities by −π (g − Σ π g).
  const velocity = (g) => {
    const along = pi.reduce((total, p, v) => total + p * g[v], 0);
    const to = place(pi.map((p, v) => p - p * (g[v] - along)));
    return [to[0] - x0, to[1] - y0];
  };
  const [wanted, expected] = [velocity(d.truth), velocity(d.mean)];
  const scale = 64 / Math.max(Math.hypot(...wanted), Math.hypot(...expected), 1e-12);
  // The name of π stands where no arrow goes.
  const lengths = [wanted, expected].map((v) => v.map((x) => x / Math.max(Math.hypot(...v), 1e-12)));
  const ahead = [lengths[0][0] + lengths[1][0], lengths[0][1] + lengths[1][1]], size = Math.hypot(...ahead);
  const away = size > 0.05 ? ahead.map((x) => (-19 * x) / size) : [lengths[0][1] * 19, -lengths[0][0] * 19];
  const trace = line();
  const path = (down) => trace(down.policies.map((logits) => place(probabilities(logits))));
  return svg`<svg viewBox="0 0 400 372" role="group" aria-label="Simplex of three outcomes: policy, reference and behaviour policy can be moved with the arrow keys">
    <defs><clipPath id="triangle"><path d=${`M${CORNERS.join("L")}Z`} /></clipPath></defs>
    <path class="ground" d=${`M${CORNERS.join("L")}Z`} />
    <g clip-path="url(#triangle)" aria-hidden="true">${levelSets(ref).map((path) => svg`<path class="level" d=${path} />`)}</g>
    <path class="edge" d=${`M${CORNERS.join("L")}Z`} />
    <g aria-hidden="true">
      ${["A", "B", "C"].map((name, v) => svg`<text class="corner" x=${CORNERS[v][0] + [-4, 4, 0][v]} y=${CORNERS[v][1] + [19, 19, -9][v]} text-anchor="middle">${name}</text>`)}
      <path class="path estimate" d=${path(d.down)} /><path class="path truth" d=${path(d.true_down)} />
      ${arrow(x0, y0, x0 + scale * expected[0], y0 + scale * expected[1], "estimate", 13)}
      ${arrow(x0, y0, x0 + scale * wanted[0], y0 + scale * wanted[1], "truth")}
    </g>
    ${roles(s).map((role) => {
      const p = probabilities(s[role]), [x, y] = place(p);
      return handle({
        key: role, x, y, two: true, now: p[0].toFixed(4), label: `${NAMES[role]}: left and right move between A and B, up and down towards and away from C`,
        text: `A ${percent(p[0])}, B ${percent(p[1])}, C ${percent(p[2])}`,
        to: (px, py) => move(role, fromPlace(px, py).map(Math.log)),
        by: (dx, dy, fine) => move(role, fromPlace(x + dx * (fine ? 0.5 : 4), y - dy * (fine ? 0.5 : 4)).map(Math.log)),
        shape: svg`${mark(role, x, y)}<text class="label" x=${role === "policy" ? x + away[0] : x + 12} y=${role === "policy" ? y + away[1] + 4 : y - 9} text-anchor=${role === "policy" ? "middle" : "start"} aria-hidden="true">${SYMBOLS[role]}</text>`,
      });
    })}
  </svg>`;
}

function bars(state, d, move) {
  const { s } = d, { tokens } = WORLDS.ten;
  const width = 37, left = 34, base = 322;
  const y = scaleLog([LEAST, 1], [base, 14]).clamp(true);
  const at = (v) => left + width * (v + 0.5);
  const all = Object.fromEntries(roles(s).map((role) => [role, probabilities(s[role])]));
  const side = { policy: 0, reference: 11, behaviour: -11 };
  const one = (role, v) => {
    const p = all[role][v], x = at(v) + side[role], top = y(p);
    return handle({
      key: `${role}-${v}`, x, y: top, now: p.toFixed(5), hit: 9, label: `${NAMES[role]} of token ${tokens[v]}`, text: percent(p),
      to: (_, py) => move(role, withProbability(s[role], v, y.invert(py))),
      by: (dx, dy, fine) => move(role, withProbability(s[role], v, p * 1.12 ** ((dx + dy) * (fine ? 0.1 : 1)))),
      shape: mark(role, x, top, 5),
    });
  };
  return svg`<svg viewBox="0 0 410 356" role="group" aria-label="Probabilities of ten tokens: each can be moved with the arrow keys">
    <g class="axes" aria-hidden="true">
      ${[1, 0.1, 0.01, 0.001, 1e-4].map((t) => svg`<line class="grid" x1=${left} x2="404" y1=${y(t)} y2=${y(t)} /><text x=${left - 5} y=${y(t) + 4} text-anchor="end">${t >= 0.001 ? t : "10⁻⁴"}</text>`)}
    </g>
    ${tokens.map((name, v) => svg`<g>
      <rect class=${`bar ${all.policy[v] > all.reference[v] ? "over" : "under"}`} x=${at(v) - 8} width="16" y=${y(all.policy[v])} height=${base - y(all.policy[v])} aria-hidden="true" />
      <line class="level-ref" x1=${at(v) - 15} x2=${at(v) + 15} y1=${y(all.reference[v])} y2=${y(all.reference[v])} aria-hidden="true" />
      <text class=${`corner ${d.flips[v] ? "flipped" : ""}`} x=${at(v)} y=${base + 20} text-anchor="middle" aria-hidden="true">${name}</text>
      ${roles(s).map((role) => one(role, v))}
    </g>`)}
  </svg>`;
}

function densities(state, d, move) {
  const { s } = d;
  const x = scaleLinear([-3.6, 3.6], [14, 396]), y = scaleLinear([0, 0.56], [318, 20]);
  const peak = (std) => 1 / (std * Math.sqrt(2 * Math.PI));
  const curve = ([m, sd]) => line()(Array.from({ length: 145 }, (_, i) => {
    const at = -3.6 + i / 20;
    return [x(at), y(peak(sd) * Math.exp(-0.5 * ((at - m) / sd) ** 2))];
  }));
  const one = (role) => {
    const [m, sd] = s[role];
    const set = (mean, std) => move(role, [Math.min(Math.max(mean, -1.2), 1.2), Math.min(Math.max(std, 0.75), 1.4)]);
    return handle({
      key: role, x: x(m), y: y(peak(sd)), two: true, now: m.toFixed(3), low: -1.2, high: 1.2,
      label: `${NAMES[role]}: left and right move its mean, up and down its width`, text: `mean ${show(m)}, standard deviation ${show(sd)}`,
      to: (px, py) => set(x.invert(px), peak(Math.max(y.invert(py), 0.01))),
      by: (dx, dy, fine) => set(m + dx * (fine ? 0.01 : 0.05), sd - dy * (fine ? 0.01 : 0.05)),
      shape: svg`${mark(role, x(m), y(peak(sd)))}<text class="label" x=${x(m) + 12} y=${y(peak(sd)) - 9} aria-hidden="true">${SYMBOLS[role]}</text>`,
    });
  };
  return svg`<svg viewBox="0 0 410 356" role="group" aria-label="Two Gaussian densities: the mean and width of each can be moved with the arrow keys">
    <g class="axes" aria-hidden="true">${[-3, -2, -1, 0, 1, 2, 3].map((t) => svg`<line class="grid" x1=${x(t)} x2=${x(t)} y1="14" y2="318" /><text x=${x(t)} y="335" text-anchor="middle">${t}</text>`)}
    <line class="zero" x1="14" x2="396" y1="318" y2="318" /></g>
    <path class="density policy" d=${`${curve(s.policy)}V318H14Z`} aria-hidden="true" /><path class="density reference" d=${curve(s.reference)} aria-hidden="true" />
    ${["reference", "policy"].map(one)}
  </svg>`;
}

function tree(state, d, move) {
  const { s } = d;
  const tracks = [
    { node: 0, label: "first token", x: [70, 340], y: 62 }, { node: 1, label: "after A", x: [22, 188], y: 168 },
    { node: 2, label: "after B", x: [222, 388], y: 168 },
  ];
  const of = (role, node) => probabilities(s[role].slice(2 * node, 2 * node + 2));
  const pi = [0, 1, 2].map((node) => of("policy", node)), ref = [0, 1, 2].map((node) => of("reference", node));
  const set = (role, node, p) => {
    const kept = Math.min(Math.max(p, 1e-4), 1 - 1e-4);
    move(role, s[role].map((x, i) => (i >> 1 === node ? Math.log(i & 1 ? 1 - kept : kept) : x)));
  };
  const track = ({ node, label, x: [from, to], y }) => {
    // A on the left: the handle stands where the share of A ends.
    const x = scaleLinear([0, 1], [from, to]).clamp(true), split = x(pi[node][0]);
    return svg`<g>
      <text class="name" x=${(from + to) / 2} y=${y - 26} text-anchor="middle" aria-hidden="true">${label}</text>
      <line class="share a" x1=${from} x2=${split} y1=${y} y2=${y} aria-hidden="true" /><line class="share b" x1=${split} x2=${to} y1=${y} y2=${y} aria-hidden="true" />
      <text class="corner" x=${from - 4} y=${y + 24} aria-hidden="true">A</text><text class="corner" x=${to + 4} y=${y + 24} text-anchor="end" aria-hidden="true">B</text>
      ${roles(s).map((role) => {
        const p = of(role, node)[0];
        return handle({
          key: `${role}-${node}`, x: x(p), y, now: p.toFixed(4), label: `${NAMES[role]}: probability of A ${label === "first token" ? "as first token" : label}`, text: percent(p), hit: 12,
          to: (px) => set(role, node, x.invert(px)), by: (dx, dy, fine) => set(role, node, p + (dx + dy) * (fine ? 0.001 : 0.02)), shape: mark(role, x(p), y, 6),
        });
      })}
    </g>`;
  };
  const responses = [["AA", 0, 0], ["AB", 0, 1], ["BA", 1, 0], ["BB", 1, 1]];
  const height = scaleLinear([0, 1], [0, 96]);
  return svg`<svg viewBox="0 0 410 356" role="group" aria-label="Two steps of two tokens: the probability of A at each step can be moved with the arrow keys">
    <g aria-hidden="true">${[1, 2].map((node) => {
      const share = pi[0][node - 1], x = node === 1 ? [105, 105] : [305, 305];
      return svg`<line class="branch" x1=${node === 1 ? 150 : 260} y1="78" x2=${x[0]} y2="128" stroke-width=${1 + 9 * share} />`;
    })}</g>
    ${tracks.map(track)}
    <g class="axes" aria-hidden="true"><line class="zero" x1="22" x2="388" y1="318" y2="318" />
    ${responses.map(([name, a, b], i) => {
      const x = 62 + 96 * i, p = pi[0][a] * pi[a + 1][b], q = ref[0][a] * ref[a + 1][b];
      return svg`<rect class="bar over" x=${x - 18} width="36" y=${318 - height(p)} height=${height(p)} /><line class="level-ref" x1=${x - 26} x2=${x + 26} y1=${318 - height(q)} y2=${318 - height(q)} />
        <text class="corner" x=${x} y="338" text-anchor="middle">${name}</text>`;
    })}</g>
  </svg>`;
}
