"""Rollout corrections: counts against loops over all responses with surrogates differentiated, bounds, chains, and the analysis."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from analysis_runs import ROOT, Run, run

import gradlab as gl
from gradlab.estimators.corrections import CORRECTIONS
from gradlab.questions.corrections import _log_probability

NAMES = [name for name in CORRECTIONS if not name.startswith("prefix")]
LENGTH = 3
#: An engine so far away that every bound binds somewhere.
FAR = {kind: gl.corrections.setting(kind, 0.3, seed=2) for kind in ("noise", "temperature", "nucleus")}


def bounded(name: str, w: torch.Tensor) -> torch.Tensor:
    """The weights as their statements say, by hand."""
    if name in ("token-truncated", "sequence-truncated", "geometric-truncated"):
        return torch.minimum(w, torch.tensor(2.0).double())
    low, high = {
        "token-masked": (0.5, 2.0), "icepop": (0.5, 5.0), "geometric-masked": (0.99, 1.01), "sequence-masked": (0.0, 2.0),
    }.get(name, (0.0, np.inf))  # fmt: skip
    return w if low <= float(w.detach()) <= high else 0 * w


def by_loops(engine: gl.corrections.Setting, name: str, signal: str, differentiated: bool) -> tuple[np.ndarray, float]:
    """Mean and covariance trace of a surrogate's gradient, differentiated response by response."""
    logits = torch.from_numpy(np.log(engine.policy)).requires_grad_(True)
    log_ref, mu = torch.from_numpy(np.log(engine.reference)), engine.behaviour
    responses = [y for y in product(range(3), repeat=LENGTH) if mu[list(y)].prod() > 0]
    weight = np.array([mu[list(y)].prod() for y in responses])
    need = np.ceil(LENGTH * engine.policy[0])
    reward = np.array([float(y.count(0) >= need) for y in responses])
    kl = np.array([np.log(engine.policy / engine.reference)[list(y)].sum() for y in responses])
    gain = {"reward": -(reward - weight @ reward), "KL in the reward": kl - weight @ kl}.get(signal)
    found = []
    for i, y in enumerate(responses):
        log_p = logits.log_softmax(-1)[list(y)]
        ratio = (log_p - torch.from_numpy(np.log(mu[list(y)]))).exp()
        level = name.partition("-")[0].replace("icepop", "token")
        whole = {"sequence": ratio.prod(), "geometric": ratio.prod() ** (1 / LENGTH)}.get(level)
        f = [torch.tensor(1.0).double() if level == "none" else bounded(name, r if whole is None else whole) for r in ratio]
        if signal == "k3 beside":
            ell = log_p - log_ref[list(y)]
            loss = sum((f[t] if differentiated else f[t].detach()) * ((-ell[t]).exp() - 1 + ell[t]) for t in range(LENGTH))
        elif not differentiated:
            loss = sum(f[t].detach() * gain[i] * log_p[t] for t in range(LENGTH))
        elif level == "token":
            loss = sum(f[t] * gain[i] for t in range(LENGTH))
        else:  # one weight of the response, whose gradient is f Σ ∇log π; of a geometric mean a share 1/T of that
            loss = f[0] * gain[i] * (LENGTH if level == "geometric" else 1)
        (g,) = torch.autograd.grad(loss + 0 * logits.sum(), logits)
        found.append(g.numpy())
    mean = weight @ np.array(found)
    return mean, float(weight @ np.square(np.array(found) - mean).sum(1))


def truth(engine: gl.corrections.Setting, signal: str) -> np.ndarray:
    """The gradient of the objective itself, by autograd through its sum over responses."""
    logits = torch.from_numpy(np.log(engine.policy)).requires_grad_(True)
    total, need = 0 * logits.sum(), np.ceil(LENGTH * engine.policy[0])
    for y in product(range(3), repeat=LENGTH):
        log_p = logits.log_softmax(-1)[list(y)].sum()
        kl = log_p - float(np.log(engine.reference)[list(y)].sum())
        total = total + log_p.exp() * (-float(y.count(0) >= need) if signal == "reward" else kl)
    return torch.autograd.grad(total, logits)[0].numpy()


@pytest.mark.parametrize("signal", gl.corrections.SIGNALS)
@pytest.mark.parametrize("kind", FAR)
def test_counts_are_loops_over_responses(kind: str, signal: str) -> None:
    engine, target = FAR[kind], truth(FAR[kind], signal)
    size = np.linalg.norm(target)
    none = by_loops(engine, "none", signal, False)[0]
    frame = gl.corrections.moments(NAMES, [engine], [LENGTH], [signal])
    for row in frame.itertuples():
        mean, trace = by_loops(engine, row.estimator.partition(",")[0], signal, row.differentiated)
        assert row.bias == pytest.approx(np.linalg.norm(mean - target) / size, abs=1e-12)
        assert row.step == pytest.approx(mean @ target / size**2, abs=1e-12)
        assert row.noise == pytest.approx(trace / size**2, rel=1e-10, abs=1e-12)
        assert row.from_none == pytest.approx(np.linalg.norm(mean - none) / size, abs=1e-12)
    assert (frame["from_none"] > 0.01).any()
    bound = frame[frame["estimator"].str.contains("truncated") & ~frame["differentiated"]]
    assert not np.allclose(bound["bias"].to_numpy(), frame.set_index("estimator").loc["token", "bias"])


def test_weights_and_shares_of_samples() -> None:
    engine = FAR["noise"]
    frame = gl.corrections.moments(["token-truncated", "sequence", "sequence-masked"], [engine], [LENGTH], ["reward"])
    frame = frame[~frame["differentiated"]].set_index("estimator")
    rho, mu = engine.policy / engine.behaviour, engine.behaviour
    f = np.minimum(rho, 2)
    assert frame.loc["token-truncated", "weight"] == pytest.approx(mu @ f, rel=1e-12)
    assert frame.loc["token-truncated", "share"] == pytest.approx((mu @ f) ** 2 / (mu @ f**2), rel=1e-12)
    assert frame.loc["sequence", "share"] == pytest.approx((mu @ rho**2) ** -LENGTH, rel=1e-12)
    w = np.array([rho[list(y)].prod() for y in product(range(3), repeat=LENGTH)])
    p = np.array([mu[list(y)].prod() for y in product(range(3), repeat=LENGTH)])
    assert frame.loc["sequence-masked", "weight"] == pytest.approx(p @ (w * (w <= 2)), rel=1e-12)


def test_a_differentiated_truncation_is_a_mask_and_a_share_of_the_counts_is_enough() -> None:
    """At 512 tokens counts are left out: what they sum to is seen in the product, which is unbiased and whose noise is known."""
    engine = gl.corrections.setting("stale", 1e-2)
    frame = gl.corrections.moments(
        ["sequence", "sequence-truncated", "sequence-masked"], [engine], [512], ["reward"]
    ).set_index("estimator")
    assert frame.loc["sequence", "bias"] < 1e-10
    second = float(engine.behaviour @ (engine.policy / engine.behaviour) ** 2) ** 512
    assert frame.loc["sequence", "share"] == pytest.approx(1 / second, rel=1e-9)
    numbers = ["bias", "step", "noise"]
    one, two = (frame.loc[name, numbers].astype(float) for name in ("sequence-truncated, differentiated", "sequence-masked"))
    assert one.to_numpy() == pytest.approx(two.to_numpy(), rel=1e-12)


@pytest.mark.parametrize("kind", ["noise", "temperature"])
def test_no_reward_has_a_larger_error_than_the_gap_and_one_has_it(kind: str) -> None:
    engine = FAR[kind]
    everything = [list(y) for y in product(range(3), repeat=LENGTH)]
    pi, mu = (np.array([p[y].prod() for y in everything]) for p in (engine.policy, engine.behaviour))
    tokens = np.array([(engine.policy / engine.behaviour - 1)[y].sum() for y in everything])

    def error(reward: np.ndarray) -> float:
        return float(pi @ reward - mu @ reward - (mu * tokens) @ reward)

    gap = gl.corrections.bounds([engine], [LENGTH])["gap"].iloc[0]
    drawn = np.random.default_rng(0).uniform(0, 1, (200, len(everything)))
    assert max(abs(error(reward)) for reward in drawn) < gap
    assert error((pi > mu * (1 + tokens)).astype(float)) == pytest.approx(gap, rel=1e-10)
    assert (gl.corrections.bounds([engine], [LENGTH])["slack"] > 1).all()


def test_engines_are_as_far_as_asked() -> None:
    for kind in gl.corrections.MISMATCHES:
        engine = gl.corrections.setting(kind, 0.01, seed=3)
        seen = engine.behaviour > 0
        kl = (engine.behaviour[seen] * np.log(engine.behaviour[seen] / engine.policy[seen])).sum()
        assert kl == pytest.approx(0.01, rel=1e-9)
        assert engine.policy @ np.log(engine.policy / engine.reference) == pytest.approx(0.01, rel=1e-9)
    sharper, policy = gl.corrections.setting("temperature", 0.01, 3), gl.corrections.setting("noise", 0.01, 3).policy
    order = np.argsort(policy)
    assert np.all(np.diff((sharper.behaviour / policy)[order]) > 0)


def test_counts_of_tokens() -> None:
    found = gl.corrections.counts(5, 3)
    assert len(found) == len(set(map(tuple, found))) == 21
    assert (found.sum(1) == 5).all()
    p = np.array([0.5, 0.3, 0.2])
    assert np.exp(_log_probability(found, p)).sum() == pytest.approx(1, abs=1e-13)
    with pytest.raises(ValueError, match="counted in too many ways"):
        gl.corrections.counts(512, 4)


def test_a_loss_of_a_correction_has_its_weights() -> None:
    """On a tree, the exact moments of the loss are those of `f`, prefixes included."""
    tree = gl.Tree.random(2, 3, seed=0)
    world = gl.Scenario(
        tree, tree, gl.off_policy.at_lag(tree, 0.5), old=tree, reward=lambda rollout: rollout.tokens.sum(-1).double()
    )
    rollout = gl.Rollout.enumerated(world)
    log_w = rollout.log_weight
    for name, f in {
        "prefix-truncated": log_w.cumsum(-1).exp().clamp(max=2),
        "prefix-masked": torch.where(log_w.cumsum(-1).exp() <= 2, log_w.cumsum(-1).exp(), 0.0),
        "geometric": log_w.mean(-1, keepdim=True).exp() + 0 * log_w,
        "icepop": torch.where((log_w.exp() >= 0.5) & (log_w.exp() <= 5), log_w.exp(), 0.0),
    }.items():
        found = gl.exact.moments(gl.corrections.as_loss(name), world).mean
        expected = gl.exact.moments(
            lambda r, f=f: -(f * r.log_prob).sum(-1) * world.reward(r), gl.Scenario(tree, tree, world.behaviour)
        ).mean
        assert float((found - expected).norm()) < 1e-12, name


@pytest.mark.parametrize(
    ("names", "message"), [(["prefix"], "depends on the order of tokens"), (["sequenze"], "did you mean 'sequence'")]
)
def test_bad_input_is_told(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gl.corrections.moments(names, [FAR["noise"]], [2])
    with pytest.raises(ValueError, match="lacks a token that the policy has"):
        gl.corrections.bounds([FAR["nucleus"]], [4])


# ---- the analysis -------------------------------------------------------------------------------------------------------

FRAMES = [f"19_{name}" for name in ("corrections", "best", "bounds", "growth", "chains")]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run("19_corrections", tmp_path_factory.mktemp("analysis_19"))


def test_the_analysis_leaves_its_figures_and_agrees_with_the_full_run(ran: Run) -> None:
    for name in ("19_corrections", "19_chains"):
        assert all((ran.folder / f"{name}.{suffix}").is_file() for suffix in ("png", "pdf", "csv", "md"))
    ran.check_captions()
    quick = gl.claims.verify({name: ran.frame(name) for name in FRAMES})
    quick = quick[quick["frame"].isin(FRAMES)].set_index(["id", "scope"])["verdict"]
    full = gl.claims.verify({name: pd.read_csv(ROOT / "figures" / f"{name}.csv") for name in FRAMES})
    full = full.set_index(["id", "scope"])["verdict"]
    assert len(quick) == 27
    assert dict(quick) == {key: full[key] for key in quick.index}


@pytest.mark.parametrize(
    ("claim", "frame", "column", "planted", "verdict"),
    [
        ("sum-weight", "19_corrections", "bias", 0.02, "FAILS"),
        ("sum-weight.step", "19_corrections", "step", 0.95, "HOLDS"),
        ("geometric.nothing", "19_corrections", "from_none", 0.02, "FAILS"),
        ("token-correction.best", "19_best", "regret", 1.0, "HOLDS"),
        ("trust-region-bound", "19_bounds", "slack", 0.9, "FAILS"),
        ("trust-region-bound.growth", "19_growth", "exponent", 1.5, "HOLDS"),
    ],
)
def test_a_planted_change_of_a_frame_changes_its_verdict(
    ran: Run, claim: str, frame: str, column: str, planted: float, verdict: str
) -> None:
    settled = gl.claims.verify({frame: ran.frame(frame).assign(**{column: planted})})
    settled = settled[(settled["id"] == claim) & (settled["frame"] == frame)]
    assert set(settled["verdict"]) == {verdict}
