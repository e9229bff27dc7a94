// The page: findings, controls, what is found, drawings, and the numbers as a table.

import { html, nothing } from "lit-html";
import { live } from "lit-html/directives/live.js";
import { unsafeHTML } from "lit-html/directives/unsafe-html.js";
import { NAMES, number, show } from "./draw.js";
import FORMULAS from "./formulas.tex.json";
import { tokenCoefficient, VOCABULARY } from "./math.js";
import { batchPlot, coefficientCurve, descentPlot, plane } from "./plots.js";
import { panel, probabilities } from "./policies.js";
import { PRESETS } from "./presets.js";
import { CLAMPS, CREDITS, KERNELS, lacks, MOST, nameOf, PLACEMENTS, python, STEPS, WEIGHTS, WORLDS } from "./state.js";

const KERNEL_NAMES = { k3_swapped: "k3 swapped", full: "full KL", mse: "½(π−ref)²", abs: "|ℓ|" };
const PLACEMENT_NAMES = { loss: "loss", reward: "reward", "loss+reward": "both", straight_through: "straight-through" };
const CREDIT_NAMES = { to_go: "to go", return: "return", token: "token", sequence: "whole response" };
const WEIGHT_NAMES = { none: "none", token: "ρ", prefix: "ρ of the prefix", sequence: "ρ of the response" };
const CLAMP_NAMES = { none: "none", shipped: "as shipped", value: "value ±1", log: "ℓ ±1" };
const OBJECTIVES = {
  zero: ["nothing", "its expected gradient is 0"],
  reverse_kl: ["the reverse KL", "KL(π‖ref), as it should"],
  reverse_kl_frozen_prefix: ["the reverse KL of single steps", "with prefixes held fixed: not that of responses"],
  forward_kl: ["the forward KL", "KL(ref‖π), another divergence"],
  forward_kl_frozen_prefix: ["the forward KL of single steps", "with prefixes held fixed"],
  chi2_frozen_prefix: ["half the χ² divergence", "½χ²(π‖ref)"],
  mse_frozen_prefix: ["the squared difference", "½Σ(π−ref)²"],
  twice_total_variation: ["twice the total variation", "Σ|π−ref|"],
  minus_kl_from_sampler: ["−KL(μ‖π)", "it runs from the behaviour policy; the reference plays no part"],
  reverse_minus_forward: ["reverse minus forward KL", "which all but cancel near the reference"],
};

const formula = (...names) => names.map((name) => FORMULAS[name] ? unsafeHTML(FORMULAS[name]) : nothing);

function radios(name, title, options, chosen, pick, label = (x) => x, disabled = () => null) {
  return html`<fieldset class="choice"><legend>${title}</legend><div>${options.map((option) => {
    const reason = disabled(option);
    return html`<label class=${reason ? "off" : nothing} title=${reason ?? nothing}><input type="radio" name=${name} .checked=${live(option === chosen)} ?disabled=${reason !== null} @change=${() => pick(option)}><span>${label(option)}</span></label>`;
  })}</div></fieldset>`;
}

function surrogate({ estimator: e, world }) {
  const two = WORLDS[world].length > 1, whole = e.credit === "sequence";
  const weight = `${two ? "two" : "one"}_${e.weight}${e.weight === "none" || e.differentiate ? "" : "_detached"}`;
  const credit = two && !whole && e.placement.includes("reward") ? `_${e.credit}` : "";
  return html`<p class="formula"><span class="soft">The loss per response</span>
    <span class="math">${formula(...(two && !whole ? ["sum"] : []), weight, `${whole ? "whole" : two ? "two" : "one"}_${e.placement}${credit}`)}</span>
    <span class="soft">with</span> <span class="math">${formula(e.kernel)}</span>
    ${VOCABULARY.includes(e.kernel) ? nothing : html`<span class="soft">,</span> <span class="math">${formula(whole ? "whole_ratio" : "ratio")}</span>`}</p>`;
}

function controls(state, actions) {
  const { estimator: e, world } = state, at = state.worlds[world];
  const pick = (field) => (value) => actions.choose({ [field]: value });
  const off = (field) => (value) => lacks(world, { [field]: value });
  const most = world === "gaussian" ? 12 : MOST;
  return html`<section class="controls" aria-label="Estimator">
    ${radios("kernel", "Kernel", KERNELS, e.kernel, pick("kernel"), (k) => KERNEL_NAMES[k] ?? k, off("kernel"))}
    ${radios("placement", "Placed in the", PLACEMENTS, e.placement, pick("placement"), (p) => PLACEMENT_NAMES[p])}
    ${WORLDS[world].length > 1 ? radios("credit", "Credit", CREDITS, e.credit, pick("credit"), (c) => CREDIT_NAMES[c]) : nothing}
    ${world === "gaussian" ? nothing : html`
    <fieldset class="choice"><legend>Data from</legend><div>
      <label><input type="radio" name="sampler" .checked=${live(!at.offPolicy)} @change=${() => actions.offPolicy(false)}><span>π itself</span></label>
      <label><input type="radio" name="sampler" .checked=${live(at.offPolicy)} @change=${() => actions.offPolicy(true)}><span>an older policy μ</span></label>
    </div></fieldset>
    ${radios("weight", html`Weight <span class="math">${formula("rho")}</span>`, WEIGHTS.filter((w) => !lacks(world, { weight: w })), e.weight, pick("weight"), (w) => WEIGHT_NAMES[w])}
    ${e.weight === "none" ? nothing : radios("differentiate", "Through the weight", [true, false], e.differentiate, pick("differentiate"), (d) => (d ? "differentiated" : "detached"))}
    ${radios("clamp", "Clamp", Object.keys(CLAMPS), e.clamp, pick("clamp"), (c) => CLAMP_NAMES[c])}`}
    <label class="range"><span>Batch size <output data-n="batch">${state.batch}</output></span>
      <input type="range" min="0" max=${most} step="1" .value=${live(String(Math.round(Math.log2(state.batch))))} @input=${(event) => actions.batch(2 ** event.target.value)} aria-label="Batch size" aria-valuetext=${`${state.batch} responses`}></label>
    ${radios("step", "Step size", STEPS, state.step, actions.step)}
  </section>`;
}

function findings(state, actions) {
  const preset = PRESETS.find((each) => each.slug === state.preset);
  const variant = preset?.variants?.[state.variant];
  const claim = variant?.claim ?? preset?.claim;
  return html`<nav class="findings" aria-label="Findings"><ol>${PRESETS.map((each, i) => html`<li><button type="button" aria-pressed=${each.slug === state.preset} @click=${() => actions.preset(each.slug)}><b aria-hidden="true">${i + 1}</b>${each.title}</button></li>`)}</ol></nav>
  ${preset ? html`<section class="finding" aria-label="Finding">
    <p class="sentence">${preset.text}</p>
    ${preset.variants ? html`<p class="variants" role="group" aria-label="Compare">${preset.variants.map((each, i) => html`<button type="button" aria-pressed=${i === state.variant} @click=${() => actions.preset(preset.slug, i)}>${each.label}</button>`)}</p>` : nothing}
    <p class="row">Ledger: <span class=${`verdict ${claim.verdict}`}>${claim.verdict}</span> “${claim.statement}”, <span class="soft">for: ${claim.scope}.</span> <code>gradlab claims ${claim.id}</code></p>
  </section>` : html`<section class="finding free" aria-label="Finding"><p class="sentence">Your own position. Every number on this page is exact, but for the cloud of sampled batches.</p></section>`}`;
}

function verdict(state, d) {
  const objective = OBJECTIVES[d.descends];
  return html`<section class="found" aria-label="What it descends">
    <h2><span class="name">${nameOf(state)}</span> descends ${objective ? html`<em>${objective[0]}</em>` : html`<em>none of the usual objectives</em>`}</h2>
    <p class="soft">${objective ? `On average and exactly: ${objective[1]}.` : "Its expected gradient equals that of no divergence known to this page."}</p>
    <dl>
      <div><dt>Bias</dt><dd>${number("bias", d.bias)}</dd><dd class="note">‖E g − ∇KL‖ / ‖∇KL‖${d.frozen ? html`; ${number("bias_frozen", d.bias_frozen)} as the gradient of single steps` : nothing}</dd></div>
      <div><dt>Cosine</dt><dd>${number("cosine", d.cosine)}</dd><dd class="note">of E g and ∇KL${d.cosine < 0 ? ": more than 90° apart" : ""}</dd></div>
      <div><dt>Noise</dt><dd>${number("noise", d.noise)}</dd><dd class="note">of one response, tr Cov / ‖∇KL‖²</dd></div>
      <div><dt>Crossover</dt><dd>${number("crossover", d.crossover)}</dd><dd class="note">${d.crossover === Infinity ? "no bias, so no batch is too large" : d.crossover < 1 ? "bias is the larger part in every batch" : "batch size at which bias overtakes noise"}</dd></div>
      <div class=${d.down.kls[1] > d.kl ? "up" : ""}><dt>KL(π‖ref)</dt><dd>${number("kl", d.kl, 5)} → ${number("kl_after", d.down.kls[1] ?? NaN, 5)}</dd><dd class="note">by one exact step of ${state.step}${d.down.kls[1] > d.kl ? ": it rises" : ""}; the true gradient: ${number("true_after", d.true_down.kls[1] ?? NaN, 5)}</dd></div>
      <div><dt>Error of a batch</dt><dd>${number("rmse", d.rmse)}</dd><dd class="note">exactly; ${number("sampled", d.sampled)} in ${d.cloud.length} drawn batches of ${state.batch}</dd></div>
    </dl>
    ${surrogate(state)}
  </section>`;
}

const figure = (title, text, drawing) => html`<figure><figcaption><h3>${title}</h3><p>${text}</p></figcaption>${drawing}</figure>`;

function table(state, d, actions) {
  const { tokens, vocab } = WORLDS[state.world], { s, rollout: r } = d;
  const gaussian = s.kind === "gaussian";
  const roles = ["policy", "reference", ...(s.behaviour ? ["behaviour"] : [])];
  const shown = Object.fromEntries(roles.map((role) => [role, gaussian ? s[role] : Array.from({ length: s[role].length / vocab }, (_, i) => probabilities(s[role].slice(i * vocab, (i + 1) * vocab))).flat()]));
  const most = Math.max(...d.truth.map(Math.abs), ...d.mean.map(Math.abs), 1e-300);
  const bar = (g, name) => html`<span class=${`pull ${name}`} style=${`left:${50 + Math.min(0, (50 * g) / most)}%;width:${(50 * Math.abs(g)) / most}%`}></span>`;
  return html`<section class="numbers"><h2>Every number</h2>
    <p class="soft">${gaussian ? "Mean and standard deviation are the parameters." : "The logits are the parameters."} A positive gradient means that descent lowers the ${gaussian ? "parameter" : "logit"}. The policies can be typed in here.</p>
    <div class="scroll" tabindex="0" role="region" aria-label="Table of numbers"><table>
    <thead><tr><th scope="col">${gaussian ? "parameter" : "token"}</th>${roles.map((role) => html`<th scope="col">${role === "policy" ? "π" : role === "reference" ? "ref" : "μ"}</th>`)}
      ${gaussian ? nothing : html`<th scope="col">log-ratio ℓ</th><th scope="col">coefficient</th>`}<th scope="col">∇KL</th>${d.frozen ? html`<th scope="col">∇ single steps</th>` : nothing}<th scope="col">E g</th><th scope="col"><span class="hidden">drawn</span></th></tr></thead>
    <tbody>${tokens.map((name, i) => html`<tr class=${d.flips[i] ? "flipped" : ""}>
      <th scope="row">${name}</th>
      ${roles.map((role) => html`<td><input inputmode="decimal" data-n=${`${role}.${i}`} aria-label=${`${NAMES[role]}, ${gaussian ? name : `token ${name}`}`} .value=${live(show(shown[role][i], 4))} @change=${(event) => actions.type(role, i, event.target.value)}></td>`)}
      ${gaussian ? nothing : html`<td>${number(`log_ratio.${i}`, r.logPi[i] - r.logRef[i])}</td><td>${single(d.e) ? number(`coefficient.${i}`, tokenCoefficient(d.e, r, i)) : "–"}</td>`}
      <td>${number(`truth.${i}`, d.truth[i])}</td>${d.frozen ? html`<td>${number(`frozen.${i}`, d.frozen[i])}</td>` : nothing}<td>${number(`mean.${i}`, d.mean[i])}${d.flips[i] ? html` <b class="flip">flipped</b>` : nothing}</td>
      <td class="drawn" aria-hidden="true"><div>${bar(d.truth[i], "truth")}${bar(d.mean[i], "estimate")}</div></td>
    </tr>`)}</tbody></table></div>
    <p class="soft">KL(π‖ref) ${number("kl", d.kl, 5)} nats · KL(ref‖π) ${number("forward", d.forward, 5)} · ${s.behaviour ? html`KL(μ‖π) ${number("lag", d.lag, 5)} · ` : nothing}‖∇KL‖ ${number("target_norm", d.target_norm)} · ‖E g‖ ${number("gradient_norm", d.gradient_norm)}</p>
    <details><summary>The same in Python</summary><pre tabindex="0"><code id="python">${python(state)}</code></pre></details>
  </section>`;
}

const single = (e) => !VOCABULARY.includes(e.kernel) && e.credit === "token" && ["none", "token"].includes(e.weight);

const POLICY_TEXT = {
  three: "Drag π, the reference or μ. Thin lines: equal KL(·‖ref). Lines from π: where exact descent goes.",
  ten: "Drag a disc (π), a square (reference) or a triangle (μ). The other tokens share the rest.",
  gaussian: "Drag a peak: sideways its mean, up and down its width.",
  steps: "Drag the probability of A at each step: disc π, square reference. Below, the four responses: bars π, lines reference.",
};

export function page(state, d, actions) {
  return html`
  <header><div><h1>What does your KL term descend?</h1><p class="soft">Drag the policies, choose the estimator, and see its gradient against the true one.</p></div>
    <button type="button" class="theme" @click=${actions.theme} aria-label="Light or dark">◐</button></header>
  ${findings(state, actions)}
  <main>
    <div class="left">
      <div class="stage">
      ${radios("world", html`<span class="hidden">Policies</span>`, Object.keys(WORLDS), state.world, actions.world, (w) => WORLDS[w].label)}
      ${html`<figure class="policies"><figcaption><h2 class="hidden">Policies</h2><p>${POLICY_TEXT[state.world]}</p></figcaption>${panel(state, d, actions.move)}</figure>`}
      <p class="legend" aria-hidden="true"><span><i class="key truth"></i>true gradient</span><span><i class="key estimate"></i>${nameOf(state)}</span></p>
      </div>
      ${controls(state, actions)}
    </div>
    <div class="right">
      ${verdict(state, d)}
      <div class="plots">
        ${figure("Bias and noise of the gradient", html`The dotted gap between the arrows is the bias. Dots: ${d.cloud.length} batches of ${state.batch}. <button type="button" class="link" @click=${actions.draw}>Draw again</button>`, plane(state, d))}
        ${figure("When bias overtakes noise", "A larger batch averages noise away and leaves the bias. Drag the batch size.", batchPlot(state, d, actions.batch))}
        ${figure("What multiplies each token’s score", `The thin line is the reverse KL’s: the log-ratio. ${state.world === "gaussian" ? "" : d.e.weight !== "none" && d.s.behaviour ? "A disc is a token; its weight ρ takes it off the curve." : "A disc is a token; large ones are drawn often."}`, coefficientCurve(state, d))}
        ${figure("Where descent takes the KL", html`Exact steps of ${state.step}, without noise: to ${number("kl_end", d.down.kls.at(-1), 4)} nats; the true gradient to ${number("true_end", d.true_down.kls.at(-1), 4)}.`, descentPlot(state, d))}
      </div>
    </div>
    ${table(state, d, actions)}
  </main>
  <footer class="soft"><p>k1, k2, k3: Schulman, “Approximating KL divergence” (2020). g: the gradient of one response’s loss. δ = e<sup>−ℓ</sup>; sg: no gradient flows. The page is made by <b>gradlab</b>, whose tests compare every number here with its exact one.</p></footer>`;
}
