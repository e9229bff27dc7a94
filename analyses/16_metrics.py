# %% [markdown]
# # Does a logged k3 show how far the policy went?
#
# Dashboards show the mean of k1, k2 or k3 over a batch. Which of them is the KL, how noisy is each, and do the usual error bars hold?
# The small language models that ship with gradlab answer, after few and after many steps of training. All of their responses are
# listed, so that expectations are exact, and batches are drawn from the listed responses.

# %%
import pandas as pd
import torch

import gradlab as gl
from gradlab.questions import metrics

study = gl.report.study("16_metrics")
STEPS = {"few": 5, "some": 30, "many": 400}
WORLDS = {
    "addition": {"task": "addition", "prompts": ["27+48=", "64+80="]},
    "names, three letters": {"task": "names", "prompts": ["."], "length": 3},
}
stages = study.pick(full=["few", "some", "many"], quick=["few", "many"])
sizes = study.pick(full=[64, 256, 1024, 4096], quick=[256])
runs = study.pick(full=5000, quick=400)


def network(world: str, stage: str) -> gl.LanguageModel:
    options = dict(WORLDS[world])
    return gl.policies.small(options.pop("task"), stage, precision=torch.float64, **options)


scenarios = {}
for world in WORLDS:
    reference = network(world, "reference")
    for stage in stages:
        policy = network(world, stage)
        scenarios[world, stage, "the policy"] = gl.Scenario(policy, reference)
        scenarios[world, stage, "stale weights"] = gl.Scenario(policy, reference, reference)

# %% [markdown]
# ## What is logged in expectation

# %%
exact = metrics.exact(scenarios)
places = pd.DataFrame(exact["scenario"].tolist(), columns=["world", "stage", "behaviour"])
exact = pd.concat([places, exact.drop(columns="scenario")], axis=1).assign(steps=places["stage"].map(STEPS))

# %% [markdown]
# ## What batches show

# %%
parts = []
for number, (key, scenario) in enumerate(scenarios.items()):
    world, stage, behaviour = key
    if behaviour == "the policy":
        frame = metrics.batches(scenario, sizes, runs, study.child(number))
        parts.append(frame.assign(world=world, stage=stage, behaviour=behaviour, steps=STEPS[stage]))
shown = pd.concat(parts, ignore_index=True)
verdicts = study.verdicts({"16_exact": exact, "16_metrics": shown})
study.save_frame("16_exact", exact)

# %% [markdown]
# ## Figure


# %%
def text(frame: pd.DataFrame, exact: pd.DataFrame) -> tuple[str, str]:
    def row(kernel: str, stage: str, frame: pd.DataFrame = exact, **where: object) -> pd.Series:
        rows = frame[(frame["world"] == "addition") & (frame["kernel"] == kernel) & (frame["stage"] == stage)]
        for column, value in ({"behaviour": "the policy"} | where).items():
            rows = rows[rows[column] == value]
        return rows.iloc[0]

    near, far, stale = row("k3", "few"), row("k3", "many"), row("k3", "many", behaviour="stale weights")
    batch = row("k3", "many", frame, samples=256)
    return (
        "**Logged KLs.** Above: means of batches over the KL, median and 5–95 % range; below: how often 95 % intervals hold the KL. k3's "
        f"noise is {near['noise_ratio']:.2g} of k1's after few steps of addition and {far['noise_ratio']:.2g} of it after many, where 256 "
        f"responses show less than the KL in {batch['below']:.0%} of batches and Student's interval holds it in {batch['student']:.0%}. "
        f"With responses of stale weights k3's expectation is {1 + stale['bias']:.2g} times the KL.",
        f"* {runs:,} batches of each size, drawn from listed responses. KL: of whole responses, exact.\n"
        "* Open ends: an interval is open where the skewness of the batch says that few responses carry its mean.\n"
        f"* The largest response shows {far['most']:,.0f} times the KL after many steps of addition, with k1 "
        f"{row('k1', 'many')['most']:,.0f} times.",
    )


study.save_figure("16_metrics", gl.figure("16_metrics", shown), shown, *text(shown, exact), verdicts)
