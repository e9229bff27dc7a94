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

study = gl.report.study(__file__)

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


def kinds_caption(frame: pd.DataFrame, kinds: pd.DataFrame, verdicts: pd.DataFrame) -> str:
    on, off = (frame[frame["policy"] == policy] for policy in ("on", "off"))
    lost = on[on["failures"].str.contains("reference") & (on["verdict"] != "none")]
    leaks = ", ".join(on.loc[on["failures"].str.contains("mask"), "subject"]) or "none"
    return (
        f"**What {len(on)} shipped configurations descend.** One row for each of {kinds['kind'].nunique()} kinds with the same "
        f"verdicts, under the name of the first; (a) how many configurations each framework has of it ({packages(frame)}); (b, c) "
        "cosine of the expected gradient with that of each objective, framed where it is a multiple of it in every world, dashed "
        "where only near the reference or for responses of one length, blank where no gradient is left. On-policy "
        f"{counted(on, 'reverse_kl')} descend the reverse KL of whole responses, {counted(on, 'reverse_kl_frozen_prefix')} that "
        f"with frozen prefixes, {counted(on, 'forward_kl_frozen_prefix')} the forward KL with frozen prefixes; in {len(lost)} the "
        f"reference does not enter. Off-policy {counted(off, 'reverse_kl')} descend the reverse KL of whole responses and "
        f"{counted(off, 'reverse_kl_frozen_prefix')} that with frozen prefixes. Gradients leak into padding in: {leaks}. {WORLDS}. "
        f"All configurations are in 12_configurations.csv. Verdicts: {gl.report.verdict_summary(verdicts)}"
    )


study.save_figure("12_kinds", gl.plots.shipped_kinds(kinds), kinds, kinds_caption(frame, kinds, verdicts))


# %%
def settings_caption(settings: pd.DataFrame, frame: pd.DataFrame) -> str:
    def found(policy: str, target: str) -> str:
        rows = settings[(settings["policy"] == policy) & (settings["target"] == target) & (settings["subject"] != "")]
        parts = [f"`{row['subject']}` ({row['configuration']})" for _, row in rows.iterrows()]
        return "; ".join(parts) or "no configuration of any framework"

    missing = settings[(settings["policy"] == "on") & (settings["target"] == "reverse_kl") & (settings["subject"] == "")]
    return (
        "**What to set to get the reverse KL.** For each framework the configuration that descends it with the fewest failed probes: "
        "dark, everywhere; pale, within a limit; grey, none of those audited. The reverse KL of whole responses, on-policy: "
        f"{found('on', 'reverse_kl')}; nothing audited of {', '.join(missing['framework']) or 'none'} descends it. Off-policy: "
        f"{found('off', 'reverse_kl')}. With frozen prefixes, which is what a loss per token can have, off-policy: "
        f"{found('off', 'reverse_kl_frozen_prefix')}. A large batch (large_batch=True) is not a setting but the limit in which a "
        f"mean over all its tokens is a sum. {WORLDS}; {packages(frame)}."
    )


study.save_figure("12_settings", gl.plots.shipped_settings(settings), settings, settings_caption(settings, frame))


# %%
def curves_caption(curves: pd.DataFrame, shown: pd.DataFrame, frame: pd.DataFrame) -> str:
    dead = []
    for name, part in shown.groupby("subject", sort=False):
        zero = part[(part["coefficient"] == 0) & part["coefficient"].any()]["log_ratio"]
        below, above = zero[zero < 0], zero[zero > 0]
        sides = ([f"ℓ ≤ {below.max():g}"] if len(below) else []) + ([f"ℓ ≥ {above.min():g}"] if len(above) else [])
        dead += [f"{name}, {' and '.join(sides)}"] if sides else []
    return (
        "**What pulls one token, as shipped.** Coefficient on the score of the only token of a response against its log-ratio, "
        f"on-policy, of the {curves['subject'].nunique()} configurations of single responses that divide neither by the length nor "
        f"by the padded length: {shown['subject'].nunique()} different curves. Where a clamp leaves exactly 0 the token is let go, on "
        f"the grid of the picture: {'; '.join(dead) or 'nowhere'}. Exact, no sampling; {packages(frame)}."
    )


on = frame[(frame["policy"] == "on") & ~frame["failures"].str.contains("length|padding|batch")]
summed = curves[curves["subject"].isin(on["subject"])]
shown = shipped.distinct(summed)
study.save_figure("12_pulls", gl.plots.audited_curves(shown), shown, curves_caption(summed, shown, frame))

# %% [markdown]
# ## The page
#
# All of it, with the probes, as `gradlab audit --installed --output figures` writes it: audit.html, .csv and .json.

# %%
if not study.quick:
    report.write(audited, study.output)
