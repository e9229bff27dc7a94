"""Analysis 10, run whole under --quick: its numbers once more by other routes, its verdicts and captions."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import torch
from analysis_runs import Run, run
from torch import Tensor

import gradlab as gl
from gradlab.policies import LanguageModel, small

FIGURES = ("10_catalogue", "10_ratios", "10_sides", "10_tokens", "10_engines", "10_growth")
DATA = ("10_precision", "10_extremes", "10_named", "10_log_weights")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run("10_language_models", tmp_path_factory.mktemp("analysis_10"))


def test_files_and_captions(ran: Run) -> None:
    expected = {f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "pdf", "csv", "md")}
    assert {path.name for path in ran.folder.iterdir()} == expected | {"10_frames.json"} | {f"{name}.csv" for name in DATA}
    ran.check_captions()
    for name in FIGURES:
        text = ran.text(name)
        assert "KL" in text
        assert re.search(r"[Ee]xact|draws", text)
        assert "Made by `gradlab reproduce --only 10_language_models --quick`, seed 0, with gradlab" in text
        assert str(ran.folder) not in text
        assert not re.search(r"\bnan\b", text)
        if name != "10_tokens":
            assert re.search(r"(HOLDS|FAILS) \(", text)


def responses(policy: LanguageModel, theta: Tensor, only: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All 1,728 answers to the only prompt (or some), `[n, 3]`, and their token log-probabilities `[n, 3]`, by the bare network."""
    tokens = torch.cartesian_prod(*[torch.arange(policy.vocab)] * 3)
    tokens = tokens if only is None else tokens[only]
    prompt = torch.tensor(policy.prompts[0]).expand(len(tokens), -1)
    moved = policy.with_parameters(theta)
    log_p = moved.network(torch.cat([prompt, tokens[:, :-1]], 1))[:, -3:].log_softmax(-1)
    return tokens, log_p.gather(-1, tokens[..., None])[..., 0]


@pytest.fixture(scope="module")
def world(ran: Run) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters of the last policy, its differentiable token log-probabilities, and those of the reference."""
    policy, reference = (
        small("addition", stage, ran.names["prompts"], precision=torch.float64) for stage in ("many", "reference")
    )
    theta = policy.parameters.clone().requires_grad_(True)
    return theta, responses(policy, theta)[1], responses(reference, reference.parameters)[1].detach()


def test_biases_from_one_surrogate_over_all_answers(ran: Run, world: tuple[Tensor, Tensor, Tensor]) -> None:
    theta, log_p, log_ref = world
    ratio = log_p - log_ref
    weight = log_p.sum(-1).exp()

    def descended(loss: Tensor) -> Tensor:
        return torch.autograd.grad(weight.detach() @ loss, theta, retain_graph=True)[0]

    (truth,) = torch.autograd.grad(weight @ ratio.sum(-1), theta, retain_graph=True)
    losses = {
        "k1-loss": ratio.sum(-1),
        "k2-loss": 0.5 * ratio.square().sum(-1),
        "k3-loss": (torch.exp(-ratio) - 1 + ratio).sum(-1),
        "k2-loss-sequence": 0.5 * ratio.sum(-1).square(),
        "k1-reward-to-go": (ratio.detach().flip(-1).cumsum(-1).flip(-1) * log_p).sum(-1),
    }
    frame = ran.frame("10_catalogue")
    rows = frame[(frame["via"] == "exact") & (frame["target"] == "reverse_kl")].set_index("estimator")
    assert rows["kl"].iloc[0] == pytest.approx(float(weight @ ratio.sum(-1)), rel=1e-10)
    assert rows["target_norm"].iloc[0] == pytest.approx(float(truth.norm()), rel=1e-8)
    for name, loss in losses.items():
        bias = float((descended(loss) - truth).norm() / truth.norm())
        assert rows.loc[name, "bias"] == pytest.approx(bias, rel=1e-8, abs=1e-10), name
    assert rows.loc["k1-loss", "bias"] == pytest.approx(1, abs=1e-10)
    assert rows.loc["k3-loss", "bias"] > 10 * rows.loc["k2-loss", "bias"] > 0.1


def test_noise_from_single_answers(ran: Run, world: tuple[Tensor, Tensor, Tensor]) -> None:
    """The covariance trace of k2 and k3 as loss, response by response, on the likely ones; the rest bounds the error."""
    theta, log_p, log_ref = world
    frame = ran.frame("10_catalogue")
    rows = frame[(frame["via"] == "exact") & (frame["target"] == "reverse_kl")].set_index("estimator")
    weight = log_p.sum(-1).exp().detach()
    likely = weight.argsort(descending=True)[:150]
    ratio = (log_p - log_ref).detach()
    coefficients = {"k2-loss": ratio, "k1-reward-to-go": ratio.flip(-1).cumsum(-1).flip(-1)}
    seconds = dict.fromkeys(coefficients, 0.0)
    policy = small("addition", "many", ran.names["prompts"], precision=torch.float64)
    for i in likely.tolist():
        alone = responses(policy, theta, torch.tensor([i]))[1][0]  # a graph of one response: its gradient takes no other
        torch.testing.assert_close(alone, log_p[i], rtol=1e-10, atol=0)
        for name, a in coefficients.items():
            (g,) = torch.autograd.grad(alone @ a[i], theta, retain_graph=True)
            seconds[name] += float(weight[i] * g.square().sum())
    for name, second in seconds.items():
        found = rows.loc[name, "trace_cov"] + rows.loc[name, "gradient_norm"] ** 2
        assert second <= found * (1 + 1e-9)
        assert second > 0.9 * found, name


def test_sampled_rows_have_intervals_about_the_exact_ones(ran: Run) -> None:
    frame = ran.frame("10_catalogue")
    rows = frame[(frame["world"] == "addition") & (frame["target"] == "reverse_kl")]
    exact, sampled = (rows[rows["via"] == via].set_index("estimator") for via in ("exact", "sampled"))
    held = [
        sampled.loc[n, "bias_low"] - 1e-9 <= exact.loc[n, "bias"] <= sampled.loc[n, "bias_high"] + 1e-9 for n in exact.index
    ]
    assert sum(held) >= len(held) - 1
    names = frame[frame["world"] == "names"]
    assert names["method"].eq("drawn, target estimated").all()
    assert names.loc[names["estimator"] == "full-both", "bias"].isna().sum() == 1  # the stand-in for the reverse KL
    assert ran.frame("10_precision")["bias_error"].max() < 1e-4


def test_mean_coefficients_of_k3_are_split_evenly_and_its_noise_is_not(ran: Run) -> None:
    sides = ran.frame("10_sides").set_index(["world", "estimator"])
    for name in ("addition", "names"):
        assert sides.loc[(name, "k3-loss"), "under_mass"] == pytest.approx(0.5, abs=1e-5)
        assert sides.loc[(name, "k3-loss"), "under_second"] > sides.loc[(name, "k2-loss"), "under_second"]


def test_extreme_ratios_counted_by_hand(ran: Run, world: tuple[Tensor, Tensor, Tensor]) -> None:
    _, log_p, log_ref = (part.detach() for part in world)
    weight, log_delta = log_p.sum(-1).exp(), log_ref - log_p
    frame = ran.frame("10_extremes")
    rows = frame[frame["world"] == "addition"].set_index("side")
    for side, sign in (("δ → 0", -1), ("δ → ∞", 1)):
        held = (sign * log_delta > np.log(10)).any(-1)
        assert rows.loc[side, "responses"] == pytest.approx(float(weight[held].sum()), rel=1e-9)
    names = frame[frame["world"] == "names"]
    assert (names["responses_low"] <= names["responses"]).all()
    spread = ran.frame("10_ratios")
    shares = spread.groupby("world")[["policy", "reference", "vocabulary"]].sum()
    assert np.allclose(shares, 1)


def test_engines_by_importance_weights_written_out(ran: Run) -> None:
    """Lag and unweighted bias of k2 as loss under the bfloat16 engine, from the bare networks."""
    frame, prompts = ran.frame("10_engines"), ran.names["prompts"][:1]
    policy, reference = (small("addition", stage, prompts, precision=torch.float64) for stage in ("some", "reference"))
    engine = small("addition", "some", prompts, precision=torch.bfloat16)
    theta = policy.parameters.clone().requires_grad_(True)
    tokens, log_p = responses(policy, theta)
    log_ref = responses(reference, reference.parameters)[1].detach()
    with torch.no_grad():
        ids = torch.cat([torch.tensor(prompts and policy.prompts[0]).expand(len(tokens), -1), tokens[:, :-1]], 1)
        log_mu = engine.model(ids)[:, -3:].double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    mu, ratio = log_mu.sum(-1).exp(), log_p - log_ref
    row = frame[(frame["behaviour"] == "bfloat16 engine") & (frame["target"] == "reverse_kl")].set_index("estimator")
    assert row["lag"].iloc[0] == pytest.approx(float(mu @ (log_mu - log_p.detach()).sum(-1)), rel=1e-6)
    (truth,) = torch.autograd.grad(log_p.sum(-1).exp() @ ratio.sum(-1), theta, retain_graph=True)
    (mean,) = torch.autograd.grad(mu @ (0.5 * ratio.square().sum(-1)), theta, retain_graph=True)
    assert row.loc["k2-loss", "bias"] == pytest.approx(float((mean - truth).norm() / truth.norm()), rel=1e-6)
    assert row.loc["full-both-prefix", "bias"] < 1e-12
    nucleus = frame[(frame["behaviour"] == "nucleus 0.95") & (frame["target"] == "reverse_kl")].set_index("estimator")
    assert nucleus.loc["full-both-prefix", "bias"] > 1e-3
    assert 0 < nucleus["lost_mass"].iloc[0] < 1 - 0.95**3


def test_every_unbiased_composition_is_there(ran: Run) -> None:
    """What a random tree says is unbiased is so on the language model, to rounding, and nothing else that is measured."""
    frame = ran.frame("10_engines")
    rows = frame[(frame["behaviour"] == "bfloat16 engine") & (frame["target"] == "reverse_kl")].set_index("estimator")
    assert set(rows.index[rows["unbiased"]]) == set(ran.names["unbiased"])
    assert rows.loc[rows["unbiased"], "bias"].max() < 1e-10 < 1e-4 < rows.loc[~rows["unbiased"], "bias"].min()
    assert {"k1-loss-prefix", "k3-loss-prefix", "k1-reward-sequence-weight", "full-both-prefix"} < set(ran.names["unbiased"])
    assert not rows.loc[rows["weight"].isin(["none", "token"]), "unbiased"].any()
    noise = rows.loc[rows["unbiased"], "noise"]
    assert np.allclose(rows.loc[rows["unbiased"], "noise_ratio"], noise / noise["full-both-prefix"])


@pytest.fixture(scope="module")
def spelled() -> dict[int, dict[str, float]]:
    """Noise of two compositions on names of up to one and two letters under the bfloat16 engine, one answer after the other."""
    found = {}
    for length in (1, 2):
        policy, reference = (small("names", stage, length=length, precision=torch.float64) for stage in ("some", "reference"))
        engine = small("names", "some", length=length, precision=torch.bfloat16)
        end = policy.eos
        answers = (
            [[end], *([a, b] for a in range(27) if a != end for b in range(27))] if length == 2 else [[a] for a in range(27)]
        )
        theta = policy.parameters.clone().requires_grad_(True)
        moved = policy.with_parameters(theta)
        second = {"full-both-prefix": 0.0, "k1-reward-sequence-weight": 0.0}
        mean = {name: torch.zeros_like(theta) for name in second}
        for answer in answers:
            ids = torch.tensor([[*policy.prompts[0], *answer[:-1]]])
            log_p = moved.network(ids)[0].log_softmax(-1)
            with torch.no_grad():
                log_ref, log_mu = (other.network(ids)[0].double().log_softmax(-1) for other in (reference, engine))
            at = (torch.arange(len(answer)), torch.tensor(answer))
            weight, ratio = (log_p - log_mu)[at], (log_p - log_ref)[at].detach()
            step_kl = (log_p.exp() * (log_p - log_ref)).sum(-1)
            to_go = ratio.flip(-1).cumsum(-1).flip(-1)
            losses = {  # the first with its weights differentiated: the same gradient as a detached weight with credit to-go
                "full-both-prefix": ((weight.cumsum(-1) - weight).exp() * step_kl).sum(),
                "k1-reward-sequence-weight": weight.sum().exp().detach() * (to_go * log_p[at]).sum(),
            }
            probability = float(log_mu[at].sum().exp())
            for name, loss in losses.items():
                (g,) = torch.autograd.grad(loss, theta, retain_graph=True)
                second[name] += probability * float(g.square().sum())
                mean[name] += probability * g
        size = {name: float(m.square().sum()) for name, m in mean.items()}
        assert torch.allclose(
            mean["full-both-prefix"], mean["k1-reward-sequence-weight"], atol=1e-9 * size["full-both-prefix"] ** 0.5
        )
        found[length] = {name: (second[name] - size[name]) / size[name] for name in second}
    return found


def test_noise_and_its_growth_one_answer_after_the_other(ran: Run, spelled: dict[int, dict[str, float]]) -> None:
    rows = ran.frame("10_growth").set_index(["behaviour", "length", "estimator"]).loc["bfloat16 engine"]
    for name in ("full-both-prefix", "k1-reward-sequence-weight"):
        assert [rows.loc[(n, name), "noise"] for n in (1, 2)] == pytest.approx([spelled[n][name] for n in (1, 2)], rel=1e-7)
    growth = spelled[2]["k1-reward-sequence-weight"] / spelled[1]["k1-reward-sequence-weight"]
    assert rows.loc[(2, "k1-reward-sequence-weight"), "growth"] == pytest.approx(growth, rel=1e-7)
    assert abs(spelled[1]["full-both-prefix"]) < 1e-12  # nothing is drawn that it does not sum over
    assert rows.loc[(2, "full-both-prefix"), "growth"] == np.inf
    ratio = spelled[2]["k1-reward-sequence-weight"] / spelled[2]["full-both-prefix"]
    assert rows.loc[(2, "k1-reward-sequence-weight"), "noise_ratio"] == pytest.approx(ratio, rel=1e-7)
    assert rows.loc[1, "growth"].isna().all()
    long = rows.loc[10]
    assert (long["via"] == "sampled").all()
    assert (long["growth_low"] <= long["growth"]).all()
    assert np.allclose(long["growth"] / long["noise"], 1 / rows.loc[2, "noise"].reindex(long.index))


def test_verdicts(ran: Run) -> None:
    settled = ran.names["verdicts"].set_index(["id", "scope"])["verdict"]
    assert not settled.eq("OPEN").any()
    names = "small language model of names"
    expected = {
        ("ratios-extreme.small", "responses of the small language model of names after 400 steps"): "HOLDS",
        ("k2-unbiased", "small language model, addition, per token"): "FAILS",
        ("k2-unbiased.frozen", "small language model, addition"): "HOLDS",
        ("rao-blackwell", "small language model, addition"): "HOLDS",
        ("k3-asymmetry.second", "small language model, addition"): "HOLDS",
        ("rao-blackwell.prefix", "small language model, a nucleus of 0.95"): "FAILS",
        ("off-policy-noise", "small language model, addition, engines of full support"): "HOLDS",
        ("off-policy-noise", f"{names} of two and three letters, three engines"): "FAILS",
        ("off-policy-growth", f"{names}, from one letter to two and to three, three engines"): "FAILS",
    }
    for key, verdict in expected.items():
        assert settled[key] == verdict, key


def test_a_planted_change_of_a_frame_changes_the_verdict(ran: Run) -> None:
    frame = ran.frame("10_catalogue")
    planted = frame.copy()
    planted.loc[(planted["estimator"] == "full-both") & (planted["via"] == "exact"), "bias"] = 1e-6
    scope = "small language model, addition"

    def verdict(frame: pd.DataFrame) -> str:
        settled = gl.claims.verify({"10_catalogue": frame}, only=["rao-blackwell"])
        return str(settled.loc[settled["id"].eq("rao-blackwell") & settled["scope"].eq(scope), "verdict"].iloc[0])

    assert verdict(frame) == "HOLDS"
    assert verdict(planted) == "FAILS"


@pytest.mark.parametrize(("frame", "column", "at", "worse"), [
    ("10_engines", "noise_ratio", {"estimator": "k3-loss-prefix", "behaviour": "bfloat16 engine", "target": "reverse_kl"}, 0.99),
    ("10_growth", "noise_ratio", {"estimator": "k3-loss-prefix", "length": 2}, 0.99),
    ("10_growth", "growth", {"estimator": "k3-loss-prefix", "length": 2}, 0.99),
    ("10_growth", "growth", {"estimator": "k3-loss-prefix", "length": 10}, 0.99),
])  # fmt: skip
def test_planted_noise_is_noticed(ran: Run, frame: str, column: str, at: dict[str, object], worse: float) -> None:
    """One row against the claim, and the claims that hold such rows to be on its side fail; all rows for it, and they hold."""
    data = ran.frame(frame)
    where = pd.concat([data[key].eq(value) for key, value in at.items()], axis=1).all(axis=1)
    assert where.sum() == 1
    ends = [f"{column}{end}" for end in ("", "_low", "_high")]
    kind = "off-policy-growth" if column == "growth" else "off-policy-noise"
    via = data.loc[where, "via"].iloc[0]
    claims = [c for c in gl.claims.CLAIMS if c.frame == frame and c.topic == kind and c.statistic == column]
    claims = [c for c in claims if not any(w.column == "via" and via not in (w.among or ()) for w in c.where)]
    claims = [c for c in claims if not any(w.column == "estimator" for w in c.where)]
    assert claims
    good, bad = data.copy(), data.copy()
    good[ends] = 1.5
    bad[ends] = 1.5
    bad.loc[where, ends] = worse
    assert {gl.claims.settle(c, good).verdict for c in claims} == {"HOLDS"}
    assert {gl.claims.settle(c, bad).verdict for c in claims} == {"FAILS"}
    assert {gl.claims.settle(c, bad).effect for c in claims} == {worse}
