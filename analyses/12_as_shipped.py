# %% [markdown]
# # What do training frameworks descend, as shipped?
#
# Every KL loss of seven training frameworks is called as installed, in every configuration, on enumerated responses: which
# objective does its expected gradient descend, on-policy and off-policy, and what has to be set to get the reverse KL of whole
# responses? `gradlab audit --installed` prints the same for what is installed where it runs.

# %%
import pandas as pd

import gradlab as gl
from gradlab.audit import adapters, report, shipped
from gradlab.ledger.shipped import CLAIMS

#: Without these `gradlab reproduce` leaves the results as they are.
REQUIRES = ["trl", "verl", "openrlhf", "torchrl", "liger-kernel", "trinity-rft", "tinker-cookbook"]
INSTALL = "pip install 'gradlab-kl[audit]' && pip install --no-deps verl openrlhf trinity-rft tinker-cookbook"

study = gl.report.study("12_as_shipped")

# %% [markdown]
# ## Measure
#
# A regulariser's coefficient is 1 and the task's advantages are 0: what is left of a whole loss is its KL. Losses that couple
# responses are averaged over all pairs of them; `large-batch` is the same loss where the number of tokens it divides by is that of
# a large batch, a constant.

# %%
claimed = {
    name for claim in CLAIMS for condition in claim.where if condition.column == "subject" for name in condition.among or ()
}
subjects = [subject for subject in adapters.subjects() if study.pick(full=True, quick=subject.name in claimed)]
audited = shipped.audits(subjects, study.jobs)
frame, directions, curves = shipped.configurations(audited), shipped.directions(audited), shipped.curves(audited)
directions = directions[directions["target"].isin(gl.plots.shipped.TARGETS)].reset_index(drop=True)
settings, kinds = shipped.settings(frame), shipped.by_kind(frame, directions)
study.save_frame("12_configurations", frame)
study.save_frame("12_directions", directions)

# %% [markdown]
# ## Verdicts

# %%
verdicts = study.verdicts({"12_configurations": frame, "12_directions": directions})

# %% [markdown]
# ## Figures


# %%
def packages(frame: pd.DataFrame) -> str:
    """The frameworks with their versions."""
    return ", ".join(f"{row['framework']} {row['version']}" for _, row in frame.drop_duplicates("framework").iterrows())


def counted(rows: pd.DataFrame, verdict: str) -> int:
    """How many configurations have a verdict."""
    return int((rows["verdict"] == verdict).sum())


WORLDS = "Exact: all responses, or all pairs of them (a group is a pair), of small trees at three distances from the reference"


def kinds_text(frame: pd.DataFrame, kinds: pd.DataFrame) -> tuple[str, str]:
    on, off = (frame[frame["policy"] == policy] for policy in ("on", "off"))
    lost = on[on["failures"].str.contains("reference") & (on["verdict"] != "none")]
    leaks = ", ".join(on.loc[on["failures"].str.contains("mask"), "subject"]) or "none"
    return (
        f"**What {len(on)} shipped configurations descend**, in {kinds['kind'].nunique()} kinds. (a) How many each framework "
        "has of it. (b, c) Cosine of the expected gradient with that of each objective; framed: a multiple of it. On-policy "
        f"{counted(on, 'reverse_kl')} descend the reverse KL of whole responses, {counted(on, 'reverse_kl_frozen_prefix')} "
        f"that with frozen prefixes, {counted(on, 'forward_kl_frozen_prefix')} the forward KL with frozen prefixes; "
        f"off-policy {counted(off, 'reverse_kl')} and {counted(off, 'reverse_kl_frozen_prefix')} descend the first two. Exact.",
        "* A kind has the same verdicts and stands under the name of its first configuration. Framed in every world; dashed "
        "only near the reference or for responses of one length; blank where no gradient is left.\n"
        f"* In {len(lost)} the reference does not enter. Gradients leak into padding in: {leaks}.\n"
        f"* {WORLDS}. All configurations are in 12_configurations.csv.\n"
        f"* {packages(frame)}",
    )


study.save_figure("12_kinds", gl.figure("12_kinds", kinds), kinds, *kinds_text(frame, kinds), verdicts)


# %%
def settings_text(settings: pd.DataFrame, frame: pd.DataFrame) -> tuple[str, str]:
    def rows(policy: str, target: str) -> pd.DataFrame:
        return settings[(settings["policy"] == policy) & (settings["target"] == target)]

    def found(policy: str, target: str) -> str:
        listed = rows(policy, target)[rows(policy, target)["subject"] != ""]
        parts = [f"* `{row['subject']}` ({row['configuration']})" for _, row in listed.iterrows()]
        return "\n".join(parts) or "* no configuration of any framework"

    def having(policy: str, target: str) -> str:
        return ", ".join(rows(policy, target).query("subject != ''")["framework"]) or "none"

    whole, frozen = "reverse_kl", "reverse_kl_frozen_prefix"
    return (
        "**What to set to get the reverse KL.** For each framework the configuration that descends it with the fewest failed "
        "probes: dark, everywhere; pale, within a limit; grey, none of those audited. The reverse KL of whole responses can "
        f"be had on-policy in {having('on', whole)}, off-policy in {having('off', whole)}; with frozen prefixes on-policy in "
        f"{having('on', frozen)}, off-policy in {having('off', frozen)}. Exact.",
        f"The reverse KL of whole responses, on-policy:\n\n{found('on', whole)}\n\nOff-policy:\n\n{found('off', whole)}\n\n"
        f"With frozen prefixes, which is what a loss per token can have, off-policy:\n\n{found('off', frozen)}\n\n"
        "A large batch (large_batch=True) is not a setting but the limit in which a mean over all its tokens is a sum. "
        f"{WORLDS}. {packages(frame)}.",
    )


study.save_figure("12_settings", gl.figure("12_settings", settings), settings, *settings_text(settings, frame), verdicts)


# %%
def curves_text(curves: pd.DataFrame, shown: pd.DataFrame, frame: pd.DataFrame) -> tuple[str, str]:
    dead = []
    for name, part in shown.groupby("subject", sort=False):
        zero = part[(part["coefficient"] == 0) & part["coefficient"].any()]["log_ratio"]
        below, above = zero[zero < 0], zero[zero > 0]
        sides = ([f"ℓ ≤ {below.max():g}"] if len(below) else []) + ([f"ℓ ≥ {above.min():g}"] if len(above) else [])
        dead += [f"* {name}: {' and '.join(sides)}"] if sides else []
    return (
        "**The coefficient of one token, as shipped.** Coefficient on the score of the only token of a response against its "
        f"log-ratio, on-policy: {curves['subject'].nunique()} configurations, {shown['subject'].nunique()} different curves. "
        f"In {len(dead)} of them a clamp sets it to exactly 0 far from the reference. Exact.",
        "Configurations of single responses that divide neither by the length nor by the padded length. Where the coefficient "
        "is exactly 0, "
        "on the grid of the picture:\n\n" + ("\n".join(dead) or "* nowhere") + f"\n\n{packages(frame)}.",
    )


on = frame[(frame["policy"] == "on") & ~frame["failures"].str.contains("length|padding|batch")]
summed = curves[curves["subject"].isin(on["subject"])]
shown = shipped.distinct(summed)
study.save_figure("12_pulls", gl.figure("12_pulls", shown), shown, *curves_text(summed, shown, frame), verdicts)

# %% [markdown]
# ## The page
#
# All of it, with the probes, as `gradlab audit --installed --output figures` writes it: audit.html, .csv and .json.

# %%
if not study.quick:
    report.write(audited, study.output)
