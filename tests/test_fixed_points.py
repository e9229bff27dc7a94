"""Where exact ascent rests, against maximisers found by another optimiser and against velocities written out by hand."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from worlds import SHAPES

import gradlab as gl
from gradlab.questions import fixed_points, gradient_flow, optima

#: Divergence → its value for distributions p, q.
VALUES = {
    "reverse_kl": lambda p, q: p @ np.log(p / q),
    "forward_kl": lambda p, q: q @ np.log(q / p),
    "chi2": lambda p, q: 0.5 * ((p - q) ** 2 / q).sum(),
    "mse": lambda p, q: 0.5 * ((p - q) ** 2).sum(),
}


def world(shape: str, seed: int = 0) -> gradient_flow.World:
    vocab, length, eos = SHAPES[shape]
    reference = gl.Bandit.random(vocab, seed) if length == 1 else gl.Tree.random(vocab, length, seed, eos=eos)
    n = len(reference.enumerate())
    return gradient_flow.World(shape, reference, torch.from_numpy(np.random.default_rng([seed, 5]).random(n)))


@pytest.mark.parametrize("coefficient", [0.3, 2.0])
@pytest.mark.parametrize("divergence", VALUES)
def test_closed_forms_are_maximisers(divergence, coefficient):
    rng = np.random.default_rng(3)
    reward, ref = rng.random(6), rng.dirichlet(np.ones(6))

    def loss(p):
        return -(p @ reward - coefficient * VALUES[divergence](np.maximum(p, 1e-12), ref))

    found = optima.tilted(reward, ref, coefficient, divergence)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    constraint = {"type": "eq", "fun": lambda p: p.sum() - 1}
    other = minimize(
        loss, ref, bounds=[(0, 1)] * 6, constraints=constraint, method="SLSQP", options={"ftol": 1e-14, "maxiter": 500}
    )
    assert found == pytest.approx(other.x, abs=2e-5)
    assert loss(found) <= other.fun + 1e-9


@pytest.mark.parametrize("credit", ["sequence", "token"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("shape", ["tree", "eos", "eos first"])
def test_tree_optima_by_definition(shape, divergence, credit):
    """Every context's conditional distribution is the tilt of what lies ahead of it, recomputed by a loop over prefixes."""
    w, beta = world(shape), 0.2
    p = optima.optimum(w.reference, w.reward, beta, divergence, credit)
    assert p.sum() == pytest.approx(1, abs=1e-12)
    rollout = gl.Rollout.enumerated(gl.Scenario(w.reference, w.reference))
    if credit == "sequence":
        assert p == pytest.approx(optima.tilted(w.reward, rollout.weight, beta, divergence), abs=1e-15)
        return
    tokens, mask, ref = rollout.tokens.numpy(), rollout.mask.numpy(), w.reference.table.softmax(-1).numpy()
    for row in np.unique(rollout.contexts[rollout.mask].numpy()):
        i, t = (int(k[0]) for k in np.nonzero((rollout.contexts.numpy() == row) & mask))
        inside = np.array([mask[j, t] and (tokens[j, :t] == tokens[i, :t]).all() for j in range(len(p))])
        ahead, chosen = np.zeros(ref.shape[1]), np.zeros(ref.shape[1])
        for v in range(ref.shape[1]):
            through = inside & (tokens[:, t] == v)
            chosen[v] = p[through].sum()
            ahead[v] = p[through] @ w.reward.numpy()[through] / p[through].sum()
        assert chosen / chosen.sum() == pytest.approx(optima.tilted(ahead, ref[row], beta, divergence), abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["k1-loss", "k2-loss", "k3-loss-sequence", "k1-reward-to-go", "k3-reward-to-go", "full-both"])
def test_velocity_is_reward_gradient_minus_expected_estimator(name, shape):
    w, beta = world(shape), 0.7
    moved = w.reference.perturbed(0.8, 3)
    found = gradient_flow.Ascent(w, gl.ESTIMATORS[name], beta).velocity(moved.table).flatten()
    penalty = gl.exact.moments(gl.ESTIMATORS[name], gl.Scenario(moved, w.reference)).mean
    parameters = moved.parameters.clone().requires_grad_(True)
    policy = w.reference.with_parameters(parameters)
    listed = policy.enumerate()
    tokens, mask = listed.tokens, listed.mask
    steps = policy.family.log_prob(policy.table, policy.contexts(tokens), tokens)
    earned = torch.where(mask, steps, 0.0).sum(-1).exp() @ w.reward
    (gradient,) = torch.autograd.grad(earned, parameters)
    assert float((found - (gradient - beta * penalty)).norm()) < 1e-12 * (1 + float(gradient.norm()))


def test_jacobian_by_differences():
    w = world("tree")
    flow = gradient_flow.Ascent(w, gl.ESTIMATORS["k2-loss"], 0.5)
    at, h = w.reference.perturbed(0.5, 1).table, 1e-5
    found = flow.jacobian(flow.velocity, at.flatten().numpy())
    for j in range(at.numel()):
        step = torch.zeros(at.numel(), dtype=torch.float64)
        step[j] = h
        ahead, behind = (flow.velocity(at + s * step.view_as(at)).flatten().numpy() for s in (1, -1))
        assert found[:, j] == pytest.approx((ahead - behind) / (2 * h), abs=1e-9)


#: Regulariser → (column that must vanish, on shapes).
ENDS = {
    "k1-reward-to-go": "to_reverse",
    "k1-reward-return": "to_reverse",
    "k2-loss-sequence": "to_reverse",
    "k3-both": "to_reverse",
    "full-both": "to_reverse",
    "k3-loss-sequence": "to_forward",
    "k1-reward": "to_token_reverse",
    "k2-loss": "to_token_reverse",
    "full-loss": "to_token_reverse",
    "k3-loss": "to_token_forward",
}


@pytest.mark.parametrize("shape", ["bandit", "tree", "eos"])
def test_ends(shape):
    found = fixed_points.measure(list(ENDS), world(shape), [0.25]).set_index("estimator")
    for name, column in ENDS.items():
        assert found.loc[name, "status"] == "interior"
        assert found.loc[name, column] < 1e-10, name
        assert found.loc[name, "rate"] < 0
    if shape != "bandit":
        for name in ("k2-loss", "k1-reward", "full-loss"):
            assert found.loc[name, "to_reverse"] > 1e-3
            assert found.loc[name, "curl"] > 1e-3
        assert found.loc["k3-loss", "to_forward"] > 1e-3
        assert found.loc["k2-loss-sequence", "curl"] < 1e-9


def test_k1_as_loss_is_no_penalty_and_planted_mistakes_end_elsewhere():
    w = world("bandit")
    wrong = {"k2 halved": gl.Estimator("k2", "loss+reward"), "k1": gl.Estimator("k1")}
    found = fixed_points.measure(wrong, w, [0.5]).set_index("estimator")
    assert found.loc["k1", "to_unregularised"] < 1e-6
    assert found.loc["k1", "regret"] < 1e-6
    assert found.loc["k1", "status"] == "boundary"
    assert found.loc["k2 halved", "to_reverse"] > 1e-3
    free = found.loc[fixed_points.UNREGULARISED]
    assert free["coefficient"] == 0
    assert np.isnan(free["to_reverse"])


def test_the_same_rest_from_elsewhere():
    w = world("tree")
    ends = [
        gradient_flow.ascend(w, "k3-loss", 0.3, start, points=20).probabilities
        for start in (None, w.reference.perturbed(2.0, 1), w.reference.perturbed(2.0, 2))
    ]
    assert ends[1] == pytest.approx(ends[0], abs=1e-10)
    assert ends[2] == pytest.approx(ends[0], abs=1e-10)
    found = gradient_flow.ascend(w, "k3-loss", 0.3, points=20)
    assert found.path[0] == pytest.approx(gl.Rollout.enumerated(gl.Scenario(w.reference, w.reference)).weight.numpy())
    assert found.path[-1] == pytest.approx(found.probabilities, abs=1e-3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gradient_flow.World("x", gl.Bandit([0.0, 1.0]), torch.zeros(3)), "one finite number per response"),
        (lambda: gradient_flow.World("x", gl.Markov.random(3, 4), torch.zeros(3)), "Bandit or a gl.Tree"),
        (lambda: gradient_flow.ascend(world("bandit"), "k1-reward-loo", 1.0), "single responses"),
        (lambda: gradient_flow.ascend(world("bandit"), "k2-los", 1.0), "k2-loss"),
        (lambda: fixed_points.measure({"f": lambda r: r.log_prob.sum(-1)}, world("bandit"), [1.0]), "function"),
        (lambda: optima.tilted([1.0], [0.5, 0.5], 1.0), "one length"),
        (lambda: optima.tilted([1.0, 0.0], [0.5, 0.5], 0.0), "positive"),
        (lambda: optima.tilted([1.0, 0.0], [0.5, 0.5], 1.0, "reverse"), "reverse_kl"),
        (lambda: optima.optimum(gl.Bandit([0.0, 1.0]), [1.0, 0.0], 1.0, credit="to_go"), "token"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_distances_of_an_end_are_from_it_to_the_reference_and_the_optima():
    place = world("bandit")
    row = fixed_points.measure(["k2-loss"], place, [0.5]).set_index("estimator").loc["k2-loss"]
    end = gradient_flow.ascend(place, gl.ESTIMATORS["k2-loss"], 0.5, points=2, tolerance=1e-3).probabilities
    reference = place.reference.table.softmax(-1)[0].numpy()
    best = optima.optimum(place.reference, place.reward.numpy(), 0.5, "forward_kl")
    assert row["kl"] == pytest.approx(VALUES["reverse_kl"](end, reference), rel=1e-6)
    assert row["kl_forward"] == pytest.approx(VALUES["reverse_kl"](end, best), rel=1e-6)
