# %% [markdown]
# # Does a bounded coefficient bias k2?

# %%
import gradlab as gl

study = gl.report.study("20_huber")
bandit = gl.Bandit.random(vocab=5, seed=study.seed, scale=2)
scenario = gl.Scenario(bandit, bandit.perturbed(kl=0.5, seed=1))
frame = gl.measure(["k2-loss", "huber-loss"], scenario, ["reverse_kl", "squared_kl"])
study.save_frame("20_huber", frame)
study.verdicts({"20_huber": frame})
