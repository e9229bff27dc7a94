# %% [markdown]
# # Do the results hold on language models?
#
# Two small transformers that ship with the package, of about 105,000 parameters each, all of them trained: one adds two-digit
# numbers, one spells US names. The reference has learned its task from examples; the policies are 5, 30 and 400 steps of
# REINFORCE away from it, on a verifiable reward and without any KL term. Gradients are taken in the space of all parameters.
#
# An answer to a sum has three characters, so all 1,728 are listed and everything about it is exact, in float64. Names of up to
# ten letters are sampled, and the target's gradient is estimated with them.

# %%
from math import log

import numpy as np
import pandas as pd
import torch

import gradlab as gl
from gradlab.estimators.catalogue import name_of
from gradlab.plots.figures import BEST, OFF, ON
from gradlab.policies import behaviour, small
from gradlab.policies.small import pairs
from gradlab.questions import language, log_ratios

study = gl.report.study("10_language_models")
seed = study.seed
STEPS = {"few": 5, "some": 30, "many": 400}
STAGES = study.pick(full=list(STEPS), quick=["many"])
TARGETS = ["reverse_kl", "reverse_kl_frozen_prefix"]

# Sums that none of the checkpoints has been shown.
held_out = study.rng("sums").permutation(pairs(held_out=True))
prompts = [f"{a:02d}+{b:02d}=" for a, b in held_out[: study.pick(full=3, quick=1)]]


def adder(stage: str, precision: torch.dtype = torch.float64) -> gl.LanguageModel:
    return small("addition", stage, prompts, precision=precision)


def scenario(task: str, stage: str) -> gl.Scenario:
    name = f"{task}, {STEPS[stage]} steps"
    if task == "addition":
        return gl.Scenario(adder(stage), adder("reference"), name=name)
    return gl.Scenario(small("names", stage), small("names", "reference"), name=name)


sums, names = ({stage: scenario(task, stage) for stage in STAGES} for task in ("addition", "names"))

# %% [markdown]
# ## The catalogue, exact and sampled

# %%
draws = study.pick(full=2048, quick=256)
parts = [
    gl.measure(ON, list(sums.values()), TARGETS),
    gl.measure(ON, sums[STAGES[-1]], TARGETS, samples=draws, seed=seed),
    gl.measure(ON, list(names.values()), TARGETS, samples=draws, seed=seed),
]
catalogue = pd.concat(parts, ignore_index=True)
stage_of = {s.label: (task, stage) for task, group in (("addition", sums), ("names", names)) for stage, s in group.items()}
catalogue.insert(0, "world", [stage_of[name][0] for name in catalogue["scenario"]])
catalogue.insert(1, "steps", [STEPS[stage_of[name][1]] for name in catalogue["scenario"]])
# Noise over that of k1 in the reward with credit to-go, the ordinary unbiased estimator; ends of the quotient from the ends.
plain = catalogue[catalogue["estimator"] == "k1-reward-to-go"].set_index(["scenario", "via", "target"])
key = pd.MultiIndex.from_frame(catalogue[["scenario", "via", "target"]])
for end, other in (("", ""), ("_low", "_high"), ("_high", "_low")):
    with np.errstate(divide="ignore"):  # an open interval begins at 0
        catalogue[f"noise_ratio{end}"] = catalogue[f"noise{end}"].to_numpy() / plain[f"noise{other}"].reindex(key).to_numpy()

# %% [markdown]
# What float32 costs: the same exact moments with the network in single precision.

# %%
last = sums[STAGES[-1]]
single = gl.Scenario(adder(STAGES[-1], torch.float32), adder("reference", torch.float32), name=last.label)
rough = gl.measure(["k2-loss", "k3-loss", "full-both"], single).set_index("estimator")
fine = catalogue[(catalogue["scenario"] == last.label) & (catalogue["via"] == "exact") & (catalogue["target"] == TARGETS[0])]
fine = fine.set_index("estimator").loc[list(rough.index)]
precision = pd.DataFrame({
    "scenario": last.label, "estimator": rough.index, "bias": fine["bias"].to_numpy(), "noise": fine["noise"].to_numpy(),
    "bias_error": (rough["bias"] - fine["bias"]).abs().to_numpy(), "noise_error": (rough["noise"] / fine["noise"] - 1).abs().to_numpy(),
})  # fmt: skip
study.save_frame("10_precision", precision)

# %% [markdown]
# ## How far do single tokens move?

# %%
EDGES = [k * log(10) / 4 for k in range(-12, 13)]
many = study.pick(full=2000, quick=500)
found, ends = [], []
for task, stage in stage_of.values():
    case, number = (sums, None) if task == "addition" else (names, many)
    counted = log_ratios.histogram(case[stage], EDGES, samples=number, seed=seed)
    found.append(counted.assign(world=task, steps=STEPS[stage]))
    ends.append(language.extremes(case[stage], number, seed).assign(world=task, steps=STEPS[stage]))
spread, extremes = pd.concat(found, ignore_index=True), pd.concat(ends, ignore_index=True)
study.save_frame("10_extremes", extremes)

# %% [markdown]
# ## Which tokens carry the gradient?
#
# Along the exact gradient: of sums, and of the first letters of names, few enough to be listed.

# %%
PULLING = ["k2-loss", "k3-loss"]
LETTERS = study.pick(full=3, quick=2)
short = {stage: small("names", stage, length=LETTERS) for stage in ("reference", *STAGES)}
pulled, shares = [], []
for name, (task, stage) in stage_of.items():
    case = sums[stage] if task == "addition" else gl.Scenario(short[stage], short["reference"], name=name)
    cells = language.parts(PULLING, case)
    pulled.append(cells)
    shares.append(language.sides(cells).assign(world=task, steps=STEPS[stage], kl=case.kl()))
sides = pd.concat(shares, ignore_index=True)
k2 = sides[sides["estimator"] == "k2-loss"].set_index("scenario")["under_second"]
sides["second_over_k2"] = sides["under_second"] - sides["scenario"].map(k2)
named = language.tokens(pd.concat(pulled, ignore_index=True), count=40)
study.save_frame("10_named", named)
columns = {"after": "prefix", "expected_share": "expected", "second_share": "second"}
largest = named[named["scenario"] == last.label].drop(columns=["expected", "second"]).rename(columns=columns)

# %% [markdown]
# ## What draws the data is never quite the policy
#
# A bfloat16 engine, another temperature, a nucleus, weights from 25 steps ago. Exact, on one sum. Which compositions of kernel,
# placement, credit and weight are unbiased from another policy's data, and different from each other, a small random tree says;
# whether they are so here, and at what noise, is measured.

# %%
tree = gl.Tree.random(2, 3, seed)
tree_case = gl.Scenario(tree, tree.perturbed(kl=0.5, seed=study.child(1)), tree.perturbed(scale=0.5, seed=study.child(2)))
tried = {name_of(e): e for e in gl.search.compositions(baselines=(None, "kl"))}
searched = gl.search.against(tried, [tree_case], [TARGETS[0]])
known = sorted(searched.loc[searched["bias"] < gl.search.UNBIASED, "estimator"], key=lambda name: name not in gl.ESTIMATORS)
unbiased = list(dict.fromkeys(gl.search.equivalent_estimators({name: tried[name] for name in known}, tree_case).values()))


def over(noise: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Quotient of noises. A sum over all that can follow has none on a single token, but for rounding: any noise is ∞ times that."""
    some, none = other > 1e-12, other <= 1e-12
    return np.where(some, noise / np.where(some, other, 1), np.where(none & (noise > 1e-12), np.inf, np.nan))


def against_best(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Noise over that of complete Rao–Blackwell with prefix weights, from the same data; ends of the quotient from the ends."""
    best, key = frame[frame["estimator"] == BEST].set_index(by), pd.MultiIndex.from_frame(frame[by])
    for end, other in (("", ""), ("_low", "_high"), ("_high", "_low")):
        frame[f"noise_ratio{end}"] = over(frame[f"noise{end}"].to_numpy(), best[f"noise{other}"].reindex(key).to_numpy())
    return frame


# %%
stage = "some"
one = {s: small("addition", s, prompts[:1], precision=torch.float64) for s in ("reference", "few", "some")}
policy = one[stage]
ENGINES = {
    "on-policy": None,
    "bfloat16 engine": behaviour.low_precision(policy),
    "temperature 0.8": behaviour.tempered(policy, 0.8),
    "temperature 1.2": behaviour.tempered(policy, 1.2),
    "nucleus 0.95": behaviour.nucleus(policy, 0.95),
    "stale weights": one["few"],
}
if study.quick:
    ENGINES = {kind: ENGINES[kind] for kind in ("on-policy", "bfloat16 engine", "nucleus 0.95")}
ALL = {name: tried[name] for name in dict.fromkeys([*OFF, *unbiased])}
frames, steps_of_engine = [], []
for kind, engine in ENGINES.items():
    case = gl.Scenario(policy, one["reference"], engine, name=f"addition, {STEPS[stage]} steps, {kind}")
    lost = 0.0 if engine is None else behaviour.missing_support_probability(policy, engine).value
    frames.append(gl.measure(ALL, case, TARGETS).assign(behaviour=kind, lost_mass=lost))
    if kind in ("bfloat16 engine", "stale weights"):
        rng = study.rng("engines")
        drawn_responses = gl.Rollout.from_sampler(case, many, rng)
        steps_of_engine.append(
            pd.DataFrame({"engine": kind, "log_ratio": drawn_responses.log_weight[drawn_responses.mask].numpy()})
        )
engines = pd.concat(frames, ignore_index=True)
on = engines[engines["behaviour"] == "on-policy"].set_index(["estimator", "target"])["bias"]
engines["excess"] = (
    engines["bias"].to_numpy() - on.reindex(pd.MultiIndex.from_frame(engines[["estimator", "target"]])).to_numpy()
)
engines["full_support"] = engines["lost_mass"] < 1e-12
weighable = engines[engines["off_policy"] & engines["full_support"] & (engines["target"] == TARGETS[0])]
worst = weighable.groupby("estimator")["bias"].max()
engines["unbiased"] = engines["estimator"].map(worst) < gl.search.UNBIASED
engines = against_best(engines, ["behaviour", "target"]).merge(gl.search.described(ALL), on="estimator")
engines["sampled"] = engines["kernel"] != "full"

# %% [markdown]
# ## Does the noise grow with the length?
#
# Names cut off after so many letters: few enough to be listed up to three, sampled beyond, with the target's gradient from the
# same draws. Each length is compared with the listed one before it.

# %%
GROWING = [BEST, "full-loss+reward-to_go-sequence-weight", "k3-loss+reward-to_go-sequence-weight", "k3-loss-prefix",
           "k1-reward-sequence-weight", "k1-loss-prefix"]  # fmt: skip
growing = {name: ALL[name] for name in GROWING}
LISTED, BEYOND = study.pick(full=[1, 2, 3], quick=[1, 2]), [10]
KINDS = study.pick(full=["bfloat16 engine", "temperature 0.8", "stale weights"], quick=["bfloat16 engine"])
spelled = study.pick(full=1152, quick=256)


def speller(kind: str, length: int) -> gl.Scenario:
    digits = torch.float64 if length in LISTED else torch.float32  # what is exact, in double precision
    now, before, reference = (small("names", s, length=length, precision=digits) for s in (stage, "few", "reference"))
    engine = {
        "bfloat16 engine": lambda: behaviour.low_precision(now),
        "temperature 0.8": lambda: behaviour.tempered(now, 0.8),
        "stale weights": lambda: before,
    }[kind]()
    return gl.Scenario(now, reference, engine, name=f"names, {STEPS[stage]} steps, {kind}, {length} letters")


places = [(kind, length) for kind in KINDS for length in (*LISTED, *BEYOND)]
spellers = {place: speller(*place) for place in places}
exactly = gl.measure(growing, [spellers[place] for place in places if place[1] in LISTED], jobs=study.jobs)
drawn = gl.measure(
    growing, [spellers[place] for place in places if place[1] in BEYOND], samples=spelled, seed=seed, jobs=study.jobs
)
growth = pd.concat([exactly, drawn], ignore_index=True)
of = {case.label: kind for (kind, _), case in spellers.items()}
growth.insert(0, "behaviour", growth["scenario"].map(of))
shorter = growth[growth["via"] == "exact"].set_index(["behaviour", "estimator", "length"])["noise"]
growth["since"] = [max([n for n in LISTED if n < length], default=0) for length in growth["length"]]
before = shorter.reindex(pd.MultiIndex.from_frame(growth[["behaviour", "estimator", "since"]])).to_numpy()
for end in ("", "_low", "_high"):
    growth[f"growth{end}"] = over(growth[f"noise{end}"].to_numpy(), before)
growth = against_best(growth, ["behaviour", "length"]).merge(gl.search.described(growing), on="estimator")

# %% [markdown]
# ## Verdicts

# %%
verdicts = study.verdicts(
    {"10_catalogue": catalogue, "10_extremes": extremes, "10_sides": sides, "10_engines": engines, "10_growth": growth}
)

# %% [markdown]
# ## Figures

# %%
cell = gl.report.cell


def catalogue_text(frame: pd.DataFrame) -> tuple[str, str]:
    def at(column: str, estimator: str, via: str = "exact", target: str = TARGETS[0]) -> float:
        return float(cell(frame, column, scenario=last.label, estimator=estimator, via=via, target=target))

    rows = "\n".join(
        f"* {name}: KL {part['kl'].iloc[0]:.3g} nats ({part['via'].iloc[0]})"
        for name, part in frame.groupby("scenario", sort=False)
    )
    bounds = f"{at('bias_low', 'k3-loss', 'sampled'):.2f}–{at('bias_high', 'k3-loss', 'sampled'):.2f}"
    return (
        "**The catalogue on language models**, against the gradient of KL(π‖ref) of whole responses in all parameters. With "
        f"the last policy of addition k2 as loss has bias {at('bias', 'k2-loss'):.3f}, k3 as loss {at('bias', 'k3-loss'):.2f} "
        f"and {at('noise', 'k3-loss') / at('noise', 'k2-loss'):.0f} times the noise of k2; complete Rao–Blackwell has "
        f"{at('noise_ratio', 'full-both'):.3f} of the noise of k1 in the reward. Addition ({len(prompts)} prompts) is exact, "
        f"names from {draws:,} draws (95 % intervals).",
        f"From top to bottom within a line, then {last.label} once more from {draws:,} draws:\n\n{rows}\n\n"
        f"Against the frozen-prefix form k2 as loss has bias {round(at('bias', 'k2-loss', target=TARGETS[1]), 12):g}. "
        f"Sampled, the bias of k3 as loss is in {bounds}. In single precision biases differ by at most "
        f"{precision['bias_error'].max():.1e}. The target's gradient on names is estimated from the same draws by complete "
        "Rao–Blackwell, which therefore has no bias of its own to show.",
    )


study.save_figure("10_catalogue", gl.figure("10_catalogue", catalogue), catalogue, *catalogue_text(catalogue), verdicts)


# %%
def ratios_text(extremes: pd.DataFrame) -> tuple[str, str]:
    told, notes = {}, []
    for name, part in extremes.groupby("scenario", sort=False):
        over, under = part.iloc[0], part.iloc[1]
        told[name.split(",")[0]] = f"{over['responses']:.1%} and {under['responses']:.1%}"  # the last of each task
        notes.append(
            f"* {name} (KL {over['kl']:.3g} nats): δ < 1/10 in {over['responses']:.1%} of responses, δ > 10 in "
            f"{under['responses']:.1%}; furthest log δ {over['furthest']:.1f} ('{over['token']}' after '{over['after']}') and "
            f"{under['furthest']:.1f} ('{under['token']}' after '{under['after']}')"
        )
    return (
        "**How far single tokens move.** Share of tokens in each range of the log-ratio, at the prefixes that the policy "
        "reaches: counted by the policy's probability, the reference's, and one each. Responses that hold a token with δ < "
        f"1/10, and one with δ > 10: {'; '.join(f'{task} {shares}' for task, shares in told.items())} after the most steps. "
        f"Addition exact, names from {many:,} responses (95 % bands).",
        "Ranges are a quarter of a decade wide.\n\n" + "\n".join(notes),
    )


study.save_figure("10_ratios", gl.figure("10_ratios", spread), spread, *ratios_text(extremes), verdicts)


# %%
def sides_text(frame: pd.DataFrame) -> tuple[str, str]:
    def shares(part: pd.DataFrame, column: str) -> str:
        return " and ".join(f"{row[column]:.2f} ({row['estimator']})" for row in part.to_dict("records"))

    stages = dict(iter(frame.groupby("scenario", sort=False)))
    final = {name.split(",")[0]: shares(part, "under_second") for name, part in stages.items()}  # the last of each task
    return (
        "**What under-sampled tokens carry in language models.** Share of tokens with π < ref in the mean |coefficient|, in "
        "the expected gradient along the true one (parts counted positive) and in the second moment. After the most steps "
        f"their share of the second moment is {'; '.join(f'{told} on {task}' for task, told in final.items())}. Exact; of "
        f"names the first {LETTERS} letters.",
        "Second moment Σ E a²‖∇log π‖² in the network's parameters. Shares of the mean |coefficient|, and of the second "
        "moment:\n\n"
        + "\n".join(
            f"* {name} (KL {part['kl'].iloc[0]:.3g} nats, {part['via'].iloc[0]}): {shares(part, 'under_mass')}; "
            f"{shares(part, 'under_second')}"
            for name, part in stages.items()
        ),
    )


study.save_figure("10_sides", gl.figure("10_sides", sides), sides, *sides_text(sides), verdicts)


# %%
def named_text(frame: pd.DataFrame) -> tuple[str, str]:
    def best(estimator: str) -> str:
        rows = frame[frame["estimator"] == estimator].head(3)
        return "; ".join(
            f"'{row['token']}' after '{row['prefix']}' {row['second']:.0%} (ℓ = {row['log_ratio']:.2f}, "
            f"drawn with probability {row['probability']:.2g})"
            for row in rows.to_dict("records")
        )

    top = frame[frame["estimator"] == "k3-loss"].iloc[0]
    return (
        f"**The tokens that carry the gradient**, {last.label} (KL {last.kl():.3g} nats): shares of the expected gradient "
        "along the true one (a) and of the second moment (b), for the tokens with the largest; (c) share of all "
        f"under-sampled tokens by stage. '{top['token']}' after '{top['prefix']}', drawn with probability "
        f"{top['probability']:.2g}, has {top['second']:.0%} of the second moment of k3 as loss. Exact; {len(prompts)} prompts.",
        f"Largest shares of the second moment:\n\n* k3 as loss: {best('k3-loss')}\n* k2 as loss: {best('k2-loss')}\n\n"
        "Shares of the expected gradient are signed.",
    )


study.save_figure("10_tokens", gl.figure("10_tokens", largest, sides), largest, *named_text(largest), verdicts)


# %%
def engines_text(frame: pd.DataFrame) -> tuple[str, str]:
    rows = frame[frame["target"] == TARGETS[0]]

    def bias(part: pd.DataFrame, name: str) -> str:
        return f"{name} {float(part.loc[part['estimator'] == name, 'bias'].iloc[0]):.2g}"

    kinds = dict(iter(rows.groupby("behaviour", sort=False)))
    weighted = "; ".join(f"{bias(part, 'full-both-prefix').split()[1]} ({kind})" for kind, part in kinds.items())
    told = "\n".join(
        f"* {kind} (lag {part['lag'].iloc[0]:.2g} nats"
        + (f", leaves out {part['lost_mass'].iloc[0]:.1%} of the responses' mass" if part["lost_mass"].iloc[0] > 1e-12 else "")
        + f"): {', '.join(bias(part, name) for name in ('k2-loss', 'full-both', 'full-both-prefix'))}"
        for kind, part in kinds.items()
    )
    return (
        "**Data from an engine that is not quite the policy.** (a) Relative bias against the gradient of the reverse KL, "
        f"exact, on {prompts[0]} after {STEPS[stage]} steps (KL {rows['kl'].iloc[0]:.3g} nats). Complete Rao–Blackwell with "
        f"prefix weights has {weighted}. (b) |log ρ| of the tokens of {many:,} responses.",
        f"Biases:\n\n{told}",
    )


per_token = pd.concat(steps_of_engine, ignore_index=True)
study.save_frame("10_log_weights", per_token)
study.save_figure("10_engines", gl.figure("10_engines", engines, per_token), engines, *engines_text(engines), verdicts)

# %%
rivals = engines[
    engines["unbiased"]
    & engines["off_policy"]
    & engines["full_support"]
    & (engines["target"] == TARGETS[0])
    & (engines["estimator"] != BEST)
]


def growth_text(frame: pd.DataFrame, rivals: pd.DataFrame) -> tuple[str, str]:
    def path(part: pd.DataFrame, name: str) -> str:
        rows = part[part["estimator"] == name].sort_values("length")
        spans = [
            f"{row['noise'] if row['noise'] > 1e-12 else 0:.3g}"
            + ("" if row["via"] == "exact" else f" ({row['noise_low']:.3g}–{row['noise_high']:.3g})")
            for row in rows.to_dict("records")
        ]
        return f"{name} {', '.join(spans)}"

    least = rivals.loc[rivals["noise_ratio"].idxmin()]
    sampled = rivals[rivals["sampled"]]
    closest = sampled.loc[sampled["noise_ratio"].idxmin()]
    told = "\n".join(
        f"* {kind} (lag {part['lag'].min():.2g} to {part['lag'].max():.2g} nats, KL {part['kl'].min():.2g} to "
        f"{part['kl'].max():.2g}): "
        + "; ".join(path(part, name) for name in (BEST, "k3-loss-prefix", "k1-reward-sequence-weight"))
        for kind, part in frame.groupby("behaviour", sort=False)
    )
    listed = frame[frame["via"] == "exact"].dropna(subset=["growth"])
    slowest = listed.loc[listed["growth"].idxmin()]
    letters, panels = sorted(set(frame["length"])), frame["behaviour"].nunique()
    return (
        f"**Noise of the {len(unbiased)} unbiased compositions on data from another engine.** (a) Over that of complete "
        f"Rao–Blackwell with prefix weights, exact, on {prompts[0]}: at least {least['noise_ratio']:.6g}, and "
        f"{closest['noise_ratio']:.3g} for those that read sampled tokens only. "
        f"({'b' if panels == 1 else 'b–' + 'abcde'[panels]}) Relative to the gradient, for names cut off after "
        f"{', '.join(map(str, letters))} letters, exact up to {max(LISTED)} and from {spelled:,} responses beyond (95 % "
        "intervals).",
        f"(a) {len(known)} of {len(tried)} compositions are unbiased off-policy; different ones are shown, after "
        f"{STEPS[stage]} steps (KL {rivals['kl'].iloc[0]:.3g} nats), with data of engines that leave nothing out. The least is "
        f"{least['estimator']} ({least['behaviour']}), of sampled tokens {closest['estimator']} ({closest['behaviour']}).\n\n"
        "Noise of names over the letters (less than 0.1 at the lower edge), relative to the gradient of KL(π‖ref) of names "
        f"that long:\n\n{told}\n\n"
        f"Among the listed lengths it grows least from {slowest['since']} to {slowest['length']}, to {slowest['growth']:.3g} "
        f"times ({slowest['estimator']}, {slowest['behaviour']}).",
    )


study.save_figure("10_growth", gl.figure("10_growth", engines, growth), growth, *growth_text(growth, rivals), verdicts)
