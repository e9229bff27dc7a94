// What all drawings share: numbers as text, axes, and handles that mouse, finger and keyboard move.

import { html, nothing, svg } from "lit-html";

export function show(x, digits = 3) {
  if (Number.isNaN(x)) return "–";
  if (!Number.isFinite(x)) return x > 0 ? "∞" : "−∞";
  if (Math.abs(x) < 1e-12) return "0";
  const size = Math.abs(x);
  const text = size >= 1e6 || size < 1e-3 ? x.toExponential(digits - 1).replace("e+", "e") : size >= 1000 ? Math.round(x).toLocaleString("en-US") : x.toPrecision(digits);
  return text.replaceAll("-", "−");
}

/** A number on the page; `key` says which one it is, for tests and scripts. */
export const number = (key, x, digits) => html`<span class="n" data-n=${key}>${show(x, digits)}</span>`;
export const numberInDrawing = (key, x, digits) => svg`<tspan data-n=${key}>${show(x, digits)}</tspan>`;

export const SYMBOLS = { policy: "π", reference: "ref", behaviour: "μ" };
export const NAMES = { policy: "policy π", reference: "reference", behaviour: "behaviour policy μ" };

/** The mark of a policy: π a disc, the reference a square, μ a triangle. */
export function mark(role, x, y, r = 7) {
  if (role === "policy") return svg`<circle class="mark policy" cx=${x} cy=${y} r=${r} />`;
  if (role === "reference") return svg`<rect class="mark reference" x=${x - r} y=${y - r} width=${2 * r} height=${2 * r} />`;
  return svg`<path class="mark behaviour" d=${`M${x},${y - 1.2 * r}L${x + 1.1 * r},${y + 0.8 * r}L${x - 1.1 * r},${y + 0.8 * r}Z`} />`;
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };

/**
 * A mark that is dragged. `to(x, y)` gets positions in the drawing's units, `by(dx, dy, fine)` arrow keys (up is positive).
 */
export function handle({ key, x, y, label, text, now, low = 0, high = 1, to, by, shape, two = false, hit = 17 }) {
  const drag = (event) => {
    const drawing = event.currentTarget.ownerSVGElement;
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(drawing.getScreenCTM().inverse());
    to(point.x, point.y);
  };
  return svg`<g class="handle" id=${`handle-${key}`} tabindex="0" role="slider" aria-label=${label} aria-valuenow=${now} aria-valuemin=${low}
      aria-valuemax=${high} aria-valuetext=${text} aria-roledescription=${two ? "two-dimensional slider" : nothing}
      @pointerdown=${(event) => { event.preventDefault(); event.currentTarget.focus({ preventScroll: true }); event.currentTarget.setPointerCapture(event.pointerId); }}
      @pointermove=${(event) => { if (event.currentTarget.hasPointerCapture(event.pointerId)) drag(event); }}
      @keydown=${(event) => {
        const arrow = ARROWS[event.key];
        if (!arrow || event.altKey || event.ctrlKey || event.metaKey) return;
        event.preventDefault();
        by(...arrow, event.shiftKey);
      }}>
    <circle class="hit" cx=${x} cy=${y} r=${hit} />
    ${shape}
  </g>`;
}

/** Axes of a chart: lines and numbers at ticks, and names. */
export function axes({ x, y, ticksX, ticksY, formatX = String, formatY = String, nameX, nameY, frame: { left, right, top, bottom } }) {
  return svg`<g class="axes" aria-hidden="true">
    ${ticksY.map((t) => svg`<line x1=${left} x2=${right} y1=${y(t)} y2=${y(t)} class=${t === 0 ? "zero" : "grid"} /><text x=${left - 6} y=${y(t) + 4} text-anchor="end">${formatY(t)}</text>`)}
    ${ticksX.map((t) => svg`<line x1=${x(t)} x2=${x(t)} y1=${top} y2=${bottom} class=${t === 0 ? "zero" : "grid"} /><text x=${x(t)} y=${bottom + 15} text-anchor="middle">${formatX(t)}</text>`)}
    <text class="name" x=${right} y=${bottom + 31} text-anchor="end">${nameX}</text>
    <text class="name" x=${left - 30} y=${top - 10}>${nameY}</text>
  </g>`;
}

/** A line with a head; nothing where it has no length. */
export function arrow(x1, y1, x2, y2, name, head = 9) {
  const length = Math.hypot(x2 - x1, y2 - y1);
  if (!(length > 0.5)) return svg`<circle class=${`tip ${name}`} cx=${x1} cy=${y1} r="4" />`;
  const [ux, uy] = [(x2 - x1) / length, (y2 - y1) / length];
  const h = Math.min(head, length);
  const [bx, by] = [x2 - h * ux, y2 - h * uy];
  return svg`<line class=${`shaft ${name}`} x1=${x1} y1=${y1} x2=${bx} y2=${by} />
    <path class=${`tip ${name}`} d=${`M${x2},${y2}L${bx - 0.45 * h * uy},${by + 0.45 * h * ux}L${bx + 0.45 * h * uy},${by - 0.45 * h * ux}Z`} />`;
}
