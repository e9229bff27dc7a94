// The explorer. For scripts and tests: explorer.set({...}) changes choices and draws at once, explorer.state() says what is shown.

import { render } from "lit-html";
import { measure, refusal } from "./math.js";
import { page } from "./page.js";
import { withProbability } from "./policies.js";
import { PRESETS } from "./presets.js";
import { choose, colour, composed, derive, fromPreset, initial, nameOf, WORLDS } from "./state.js";

const root = document.getElementById("app");
const status = Object.assign(document.createElement("p"), { className: "hidden" });
status.setAttribute("role", "status");
document.body.append(status);

let state = initial(), shown = null, waiting = false, saying = 0, scrolled = null;
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const dark = () => (state.theme ? state.theme === "dark" : prefersDark.matches);

function draw() {
  waiting = false;
  shown = derive(state);
  const html = document.documentElement;
  html.dataset.theme = dark() ? "dark" : "light";
  html.style.setProperty("--estimate", colour(state.estimator.kernel, state.estimator.placement, dark()));
  render(page(state, shown, actions), root);
  const chosen = document.querySelector(".findings [aria-pressed=true]"), list = chosen?.closest("ol");
  if (list && state.preset !== scrolled) list.scrollLeft = chosen.offsetLeft - list.offsetLeft - (list.clientWidth - chosen.offsetWidth) / 2;
  scrolled = state.preset;
  clearTimeout(saying);
  saying = setTimeout(() => {
    status.textContent = `${nameOf(state)}: bias ${shown.bias.toPrecision(3)}, cosine ${shown.cosine.toPrecision(3)}, noise ${shown.noise.toPrecision(3)}`;
  }, 700);
}

/** Draw once in a frame, however many changes it brings. */
function change(next) {
  state = next;
  if (!waiting) requestAnimationFrame(draw);
  waiting = true;
}

/** A Gaussian reference keeps a width for which variances are finite and the quadrature is exact. */
function kept(world, role, numbers, at) {
  if (world !== "gaussian") return numbers.some((x) => !Number.isFinite(x)) ? at[role] : numbers;
  const [mean, std] = numbers, other = role === "policy" ? at.reference[1] : at.policy[1];
  const [low, high] = role === "policy" ? [other / 1.2, other / 0.85] : [0.85 * other, 1.2 * other];
  return [Math.min(Math.max(mean, -1.2), 1.2), Math.min(Math.max(std, low), high)];
}

function moved(role, numbers) {
  const { world } = state, at = state.worlds[world];
  return { ...state, preset: null, worlds: { ...state.worlds, [world]: { ...at, [role]: kept(world, role, numbers, at) } } };
}

const actions = {
  preset(slug, variant = 0) {
    history.replaceState(null, "", `#${slug}`);
    change(fromPreset(state, slug, variant));
  },
  world: (world) => change({ ...choose(state, {}, world), batch: world === "gaussian" ? Math.min(state.batch, 4096) : state.batch }),
  choose: (part) => change(choose(state, part.weight === "none" ? { ...part, differentiate: false } : part)),
  offPolicy: (offPolicy) => change({ ...state, preset: null, worlds: { ...state.worlds, [state.world]: { ...state.worlds[state.world], offPolicy } } }),
  batch: (batch) => change({ ...state, batch }),
  step: (step) => change({ ...state, step }),
  draw: () => change({ ...state, seed: (state.seed + 1) % 1000 }),
  theme: () => change({ ...state, theme: dark() ? "light" : "dark" }),
  move: (role, numbers) => change(moved(role, numbers)),
  type(role, i, text) {
    const value = Number(text.replaceAll(",", "").replaceAll("−", "-")), { vocab } = WORLDS[state.world], now = state.worlds[state.world][role];
    if (!text.trim() || !Number.isFinite(value)) return change({ ...state });
    if (!vocab) return change(moved(role, now.map((x, j) => (j === i ? value : x))));
    const from = i - (i % vocab), row = withProbability(now.slice(from, from + vocab), i - from, value);
    change(moved(role, [...now.slice(0, from), ...row, ...now.slice(from + vocab)]));
  },
};

window.explorer = {
  /**
   * Change choices: {preset, variant}, or any of {world, policy, reference, behaviour (null: on-policy), estimator, batch, step, seed,
   * theme}, with logits, or [mean, std] of Gaussians. Draws at once, and returns the milliseconds it took.
   */
  set({ preset, variant = 0, world = state.world, policy, reference, behaviour, estimator = {}, ...rest }) {
    const from = performance.now();
    if (preset) state = fromPreset(state, preset, variant);
    else {
      state = { ...choose(state, estimator, world), ...rest };
      const given = { policy, reference, behaviour };
      for (const [role, numbers] of Object.entries(given)) if (numbers) state = moved(role, numbers);
      if (behaviour !== undefined) state.worlds[world] = { ...state.worlds[world], offPolicy: behaviour !== null };
    }
    draw();
    return performance.now() - from;
  },
  /** What is chosen and shown: settings, every number in full precision, and the name and colour of the estimator. */
  state() {
    const { s, mean, truth, traceCov, bias, cosine, noise, crossover, rmse, sampled, kl, forward, lag, descends, gradient_norm, target_norm, down, true_down, cloud } = shown;
    return {
      world: state.world, preset: state.preset, batch: state.batch, step: state.step, scenario: s, estimator: composed(state),
      name: nameOf(state), colour: colour(state.estimator.kernel, state.estimator.placement, dark()),
      numbers: {
        frozen: shown.frozen, bias_frozen: shown.bias_frozen, mean, truth, trace_cov: traceCov, bias, cosine, noise, crossover, rmse, sampled, kl, forward, lag, gradient_norm, target_norm, descends,
        kls: down.kls, true_kls: true_down.kls, policies: down.policies, cloud,
      },
    };
  },
  presets: PRESETS,
  /** Mean gradient, trace of the covariance, bias, … of an estimator in a scenario, both as `state()` has them; draws nothing. */
  measure(estimator, scenario) {
    const { rollout, each, ...found } = measure(estimator, scenario);
    return found;
  },
  /** Why gradlab refuses a composition, or null. */
  refusal,
};

const asked = location.hash.slice(1);
if (PRESETS.some(({ slug }) => slug === asked)) state = fromPreset(state, asked);
prefersDark.addEventListener("change", () => change({ ...state }));
addEventListener("hashchange", () => PRESETS.some(({ slug }) => slug === location.hash.slice(1)) && change(fromPreset(state, location.hash.slice(1))));
draw();
