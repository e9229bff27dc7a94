"""The explorer in a real browser: every number that it shows is gradlab's exact one, and it serves keyboard, finger and reader."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradlab as gl
from gradlab.cli.main import app
from gradlab.estimators.coefficients import coefficients
from gradlab.plots.style import look_of
from gradlab.study.pages import EXPLORER

sync_api = pytest.importorskip("playwright.sync_api", reason="the explorer is tested with playwright: pip install playwright")
ROOT = Path(gl.__file__).parents[1]
SOURCES = ROOT / "scripts" / "explorer"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here: apt-get install chromium")

KERNELS = ("k1", "k2", "k3", "abs", "k3_swapped", "full", "mse")
PLACEMENTS, CREDITS = ("loss", "reward", "loss+reward", "straight_through"), ("token", "to_go", "return", "sequence")
WEIGHTS = ("none", "token", "prefix", "sequence")
CLAMPS = {"none": (None, None), "shipped": (20.0, 10.0), "value": (None, 1.0), "log": (1.0, None)}
SHAPES = {"three": (3, 1), "ten": (10, 1), "steps": (2, 2)}
#: Exact numbers of both, and what is left of it after 60 steps.
CLOSE, AFTER_STEPS = 1e-8, 1e-6


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    yield from opened(browser)


def opened(browser: Any, width: int = 1280, scheme: str = "light") -> Iterator[Any]:
    """The page; whatever it complains of, or asks the network for, fails the test."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab, complaints = context.new_page(), []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: request.url.startswith("file:") or complaints.append(request.url))
    tab.goto(EXPLORER.as_uri())
    yield tab
    context.close()
    assert not complaints


def composition(chosen: dict[str, Any]) -> gl.Estimator:
    names = {"clampLogRatio": "clamp_log_ratio", "clampValue": "clamp_value", "differentiate": "differentiate_weight"}
    return gl.Estimator(**{names.get(key, key): value for key, value in chosen.items()})


def scenario_of(given: dict[str, Any]) -> gl.Scenario:
    def policy(numbers: list[float]) -> Any:
        if given["kind"] == "gaussian":
            return gl.Gaussian(*numbers)
        rows = torch.tensor(numbers, dtype=torch.float64).view(-1, given["vocab"])
        return gl.Bandit(rows[0]) if given["length"] == 1 else gl.Tree(rows)

    behaviour = given["behaviour"]
    return gl.Scenario(policy(given["policy"]), policy(given["reference"]), None if behaviour is None else policy(behaviour))


def descent(estimator: gl.Estimator | None, scenario: gl.Scenario, step: float, steps: int) -> list[float]:
    """KL(π ‖ ref) before and after exact steps against an expected gradient, or the true one."""
    kls = [scenario.kl()]
    for _ in range(steps):
        g = gl.exact.gradient("reverse_kl", scenario) if estimator is None else gl.exact.moments(estimator, scenario).mean
        policy = scenario.policy
        gaussian = isinstance(policy, gl.Gaussian)
        policy = gl.Gaussian(*(policy.parameters - step * g).tolist()) if gaussian else policy.moved(-step * g)
        scenario = gl.Scenario(policy, scenario.reference, scenario.behaviour)
        kls.append(scenario.kl())
    return kls


def cell_coefficients(estimator: gl.Estimator, scenario: gl.Scenario) -> list[float]:
    """The coefficient of every prefix with every token, breadth-first; credit token, and no weight but the token's."""
    rollout = gl.Rollout.enumerated(scenario)
    found = coefficients(estimator, rollout).score
    vocab, steps = scenario.policy.vocab, found.shape[1]
    by_prefix: dict[tuple[int, ...], float] = {}
    for tokens, row in zip(rollout.tokens.tolist(), found.tolist(), strict=True):
        by_prefix |= {tuple(tokens[: t + 1]): row[t] for t in range(steps)}
    return [by_prefix[cell] for t in range(steps) for cell in product(range(vocab), repeat=t + 1)]


def exact_numbers(shown: dict[str, Any]) -> dict[str, float]:
    """What the page shows, by gradlab: its keys are those of the page's `data-n`."""
    scenario, estimator = scenario_of(shown["scenario"]), composition(shown["estimator"])
    frame = gl.measure(estimator, scenario).iloc[0]
    mean, truth = gl.exact.moments(estimator, scenario).mean, gl.exact.gradient("reverse_kl", scenario)
    steps = len(shown["numbers"]["kls"]) - 1
    kls, true_kls = (descent(e, scenario, shown["step"], steps) for e in (estimator, None))
    found = {
        name: float(frame[name])
        for name in ("bias", "cosine", "noise", "crossover", "kl", "lag", "gradient_norm", "target_norm")
    }
    found |= {
        "forward": gl.Scenario(scenario.reference, scenario.policy).kl(),
        "rmse": math.sqrt(found["bias"] ** 2 + found["noise"] / shown["batch"]), "batch": shown["batch"],
        "kl_after": kls[1], "true_after": true_kls[1], "kl_end": kls[-1], "true_end": true_kls[-1],
    }  # fmt: skip
    columns: dict[str, Any] = {"mean": mean, "truth": truth}
    if scenario.policy.length > 1:
        found["bias_frozen"] = float(gl.measure(estimator, scenario, target="reverse_kl_frozen_prefix")["bias"].iloc[0])
        columns["frozen"] = gl.exact.gradient("reverse_kl_frozen_prefix", scenario)
    given = {"policy": scenario.policy, "reference": scenario.reference, "behaviour": scenario.behaviour}
    for role, policy in given.items():
        if policy is not None:
            gaussian = isinstance(policy, gl.Gaussian)
            columns[role] = policy.parameters if gaussian else policy.parameters.view(-1, policy.vocab).softmax(-1).flatten()
    if not isinstance(scenario.policy, gl.Gaussian):
        columns["log_ratio"] = columns["policy"].log() - columns["reference"].log()
        if estimator.credit == "token" and estimator.weight in ("none", "token") and not estimator.on_vocabulary:
            columns["coefficient"] = cell_coefficients(estimator, scenario)
    return found | {f"{name}.{i}": float(x) for name, column in columns.items() for i, x in enumerate(column)}


def read(text: str) -> tuple[float, float]:
    """A number as it is displayed, and half a unit of its last digit."""
    text = text.replace("−", "-").replace(",", "")
    if text in ("–", "∞"):
        return (math.nan if text == "–" else math.inf), 0.0
    digits, _, power = text.partition("e")
    decimals = len(digits.partition(".")[2])
    return float(text), 0.5 * 10.0 ** (int(power or 0) - decimals)


def check_numbers(page: Any) -> None:
    shown = page.evaluate("explorer.state()")
    numbers, expected = shown["numbers"], exact_numbers(shown)
    scale = max(expected["gradient_norm"], expected["target_norm"])
    for name in ("bias", "cosine", "noise", "crossover", "kl", "forward", "lag", "rmse", "gradient_norm", "target_norm"):
        ours = math.nan if numbers[name] is None else numbers[name]
        assert ours == pytest.approx(expected[name], rel=CLOSE, abs=CLOSE, nan_ok=True), name
    for name in ("mean", "truth"):
        assert numbers[name] == pytest.approx(
            [expected[f"{name}.{i}"] for i in range(len(numbers[name]))], abs=CLOSE * scale
        ), name
    ends = [numbers["kls"][1], numbers["true_kls"][1], numbers["kls"][-1], numbers["true_kls"][-1]]
    wanted = [expected[name] for name in ("kl_after", "true_after", "kl_end", "true_end")]
    assert ends == pytest.approx(wanted, rel=AFTER_STEPS, abs=AFTER_STEPS)
    displayed = page.evaluate("""[...document.querySelectorAll('[data-n]')].map(
        (e) => [e.dataset.n, e.tagName === 'INPUT' ? e.value : e.textContent])""")
    assert {"bias", "noise", "mean.0", "policy.0", "kl_end", "batch"} <= {key for key, _ in displayed}
    for key, text in displayed:
        value, half = read(text)
        wanted_value = numbers["sampled"] if key == "sampled" else expected[key]
        rounding = 1e-12 if wanted_value == 0 or text == "0" else AFTER_STEPS * abs(wanted_value)
        assert value == pytest.approx(wanted_value, abs=half * 1.0001 + rounding, rel=0, nan_ok=True), (key, text)
    check_objective(shown, expected)
    check_cloud(shown)


#: Objectives that the page knows by names that are not gradlab's.
OWN = {"twice_total_variation", "minus_kl_from_sampler", "reverse_minus_forward"}


def check_objective(shown: dict[str, Any], expected: dict[str, float]) -> None:
    """The objective that is named is descended, to rounding; where none is, none of gradlab's is."""
    scenario, descends = scenario_of(shown["scenario"]), shown["numbers"]["descends"]
    mean = gl.exact.moments(composition(shown["estimator"]), scenario).mean

    def distance(truth: torch.Tensor) -> float:
        return float((mean - truth).norm() / max(mean.norm(), truth.norm()))

    if descends == "zero":
        assert expected["gradient_norm"] < 1e-9
    elif descends == "minus_kl_from_sampler":
        swapped = gl.Scenario(scenario.policy, scenario.behaviour)
        assert distance(-gl.exact.gradient("forward_kl", swapped)) < 1e-9
    elif descends == "reverse_minus_forward":
        parts = [gl.exact.gradient(name, scenario) for name in ("reverse_kl", "forward_kl_frozen_prefix")]
        assert distance(parts[0] - parts[1]) < 1e-9
    elif descends == "twice_total_variation":
        pi, ref = (p.parameters.view(-1, p.vocab) for p in (scenario.policy, scenario.reference))
        leaf = pi.clone().requires_grad_(True)
        reach = torch.ones(len(pi), 1, dtype=torch.float64)
        if len(pi) > 1:
            reach[1:, 0] = scenario.sampler.parameters.view(-1, 2)[0].softmax(-1)
        (reach * (leaf.softmax(-1) - ref.softmax(-1)).abs()).sum().backward()
        assert distance(leaf.grad.flatten()) < 1e-9
    else:
        names = ["reverse_kl", "forward_kl"] + (
            [] if scenario.policy.length == 1 else ["reverse_kl_frozen_prefix", "forward_kl_frozen_prefix"]
        )
        if shown["world"] != "gaussian":
            names += ["chi2_frozen_prefix", "mse_frozen_prefix"]
        found = [name for name in names if distance(gl.exact.gradient(name, scenario)) < 1e-9]
        assert (found[0] if found else None) == descends


def check_cloud(shown: dict[str, Any]) -> None:
    """Means of drawn batches scatter about the exact mean as the exact covariance says."""
    numbers = shown["numbers"]
    cloud, mean, truth = (np.array(numbers[key]) for key in ("cloud", "mean", "truth"))
    spread = numbers["trace_cov"] / shown["batch"]
    assert ((cloud.mean(0) - mean) ** 2).sum() <= 30 * spread / len(cloud) + 1e-24
    again = math.sqrt(((cloud - truth) ** 2).sum(1).mean()) / numbers["target_norm"]
    assert numbers["sampled"] == pytest.approx(again, rel=1e-9)


@needs_browser
@pytest.mark.parametrize("slug", ["toy", "sign", "raises", "dropped", "clamp", "repels", "rho", "steps"])
def test_every_number_of_a_finding_is_exact_and_its_row_is_in_the_ledger(page, slug):
    (preset,) = [each for each in page.evaluate("explorer.presets") if each["slug"] == slug]
    ledger = gl.claims.verify(ROOT / "figures").set_index(["id", "scope"])
    for variant in range(len(preset.get("variants", [None]))):
        page.evaluate("([preset, variant]) => explorer.set({preset, variant})", [slug, variant])
        check_numbers(page)
        claim = preset.get("variants", [preset] * (variant + 1))[variant].get("claim", preset["claim"])
        row = ledger.loc[(claim["id"], claim["scope"])]
        assert (row["statement"], row["verdict"]) == (claim["statement"], claim["verdict"])
        told = page.inner_text(".finding")
        assert preset["text"] in told
        assert claim["verdict"] in told


@needs_browser
def test_the_findings_show_what_their_sentences_say(page):
    """The sentence of each finding, as an inequality of exact numbers."""

    def at(slug: str, variant: int = 0) -> dict[str, Any]:
        page.evaluate("([preset, variant]) => explorer.set({preset, variant})", [slug, variant])
        return exact_numbers(page.evaluate("explorer.state()")) | page.evaluate("explorer.state().numbers")

    toy = at("toy")
    assert toy["mean.0"] == pytest.approx(toy["truth.0"], rel=1e-9)
    assert abs(toy["mean.1"]) > 0.5 > 1e-9 > abs(toy["truth.1"])
    sign = at("sign")
    assert sign["truth.1"] < 0 < sign["mean.1"]
    assert at("raises")["kl_after"] > at("raises")["kl"]
    dropped = at("dropped")
    assert 1 / dropped["policy.9"] == pytest.approx(6500, rel=0.01)
    assert at("clamp")["coefficient.9"] == 0
    repels = at("repels")
    assert repels["descends"] == "minus_kl_from_sampler"
    assert [at("rho", variant)["descends"] for variant in (0, 1)] == ["reverse_kl", "forward_kl"]
    assert at("steps")["cosine"] < 0
    assert at("steps", 1)["bias"] == 0


def random_settings(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    found = []
    while len(found) < count:
        world = [*SHAPES, "gaussian"][len(found) % 4]
        chosen = {
            "kernel": rng.choice(KERNELS), "placement": rng.choice(PLACEMENTS), "credit": rng.choice(CREDITS),
            "weight": rng.choice(WEIGHTS), "differentiate": bool(rng.random() < 0.5), "clamp": rng.choice([*CLAMPS]),
        }  # fmt: skip
        chosen = {key: value if isinstance(value, bool) else str(value) for key, value in chosen.items()}
        setting: dict[str, Any] = {
            "world": world,
            "estimator": chosen,
            "batch": int(2 ** rng.integers(0, 12)),
            "step": 0.1,
            "seed": 3,
        }
        if world == "gaussian":
            std = rng.uniform(0.8, 1.3)
            setting |= {"policy": [rng.uniform(-1, 1), std], "reference": [rng.uniform(-1, 1), std * rng.uniform(0.86, 1.19)]}
        else:
            vocab, steps = SHAPES[world]
            size = sum(vocab ** (t + 1) for t in range(steps))
            roles = {role: rng.normal(size=size).tolist() for role in ("policy", "reference", "behaviour")}
            setting |= roles | ({"behaviour": None} if rng.random() < 0.3 else {})
        found.append(setting)
    return found


@needs_browser
@pytest.mark.parametrize("setting", random_settings(40), ids=lambda s: s["world"])
def test_every_number_of_a_random_position_is_exact(page, setting):
    page.evaluate("(s) => explorer.set(s)", setting)
    check_numbers(page)


@needs_browser
def test_the_page_composes_what_gradlab_does_and_nothing_else(page):
    combined = list(product(KERNELS, PLACEMENTS, CREDITS, WEIGHTS, (False, True), CLAMPS))
    given = [
        {"kernel": k, "placement": p, "credit": c, "weight": w, "differentiate": d, "clampLogRatio": CLAMPS[b][0],
         "clampValue": CLAMPS[b][1]}
        for k, p, c, w, d, b in combined
    ]  # fmt: skip
    refused = page.evaluate("(all) => all.map((e) => explorer.refusal(e))", given)

    def possible(chosen: dict[str, Any]) -> bool:
        try:
            composition(chosen)
        except ValueError:
            return False
        return True

    assert [reason is None for reason in refused] == [possible(chosen) for chosen in given]


@needs_browser
@pytest.mark.parametrize(("vocab", "length"), [(2, 2), (3, 1), (3, 3)])
@pytest.mark.parametrize("off_policy", [False, True])
def test_every_composition_has_the_exact_moments(page, vocab, length, off_policy):
    """All that gradlab composes of the page's parts, on a random tree, deeper than the page shows, too."""
    rng = np.random.default_rng(vocab + length)
    size = sum(vocab ** (t + 1) for t in range(length))
    given = {role: rng.normal(size=size).tolist() for role in ("policy", "reference", "behaviour")}
    given |= {"kind": "tree", "vocab": vocab, "length": length} | ({} if off_policy else {"behaviour": None})
    parts = (KERNELS, PLACEMENTS, CREDITS, WEIGHTS, (False, True), CLAMPS.values())
    names = ("kernel", "placement", "credit", "weight", "differentiate", "clampLogRatio", "clampValue")
    every = [dict(zip(names, (*most, *bounds), strict=True)) for *most, bounds in product(*parts)]
    chosen = [
        e for e, reason in zip(every, page.evaluate("(all) => all.map(explorer.refusal)", every), strict=True) if reason is None
    ]
    found = page.evaluate("([all, scenario]) => all.map((e) => explorer.measure(e, scenario))", [chosen, given])
    scenario = scenario_of(given)
    assert len(chosen) > 200
    for each, ours in zip(chosen, found, strict=True):
        theirs = gl.exact.moments(composition(each), scenario)
        scale = max(float(theirs.mean.norm()), ours["target_norm"])
        assert ours["mean"] == pytest.approx(theirs.mean.tolist(), abs=CLOSE * scale), each
        assert ours["traceCov"] == pytest.approx(theirs.trace_cov, rel=CLOSE, abs=CLOSE), each


@needs_browser
def test_the_python_that_is_shown_measures_what_is_shown(page, capsys):
    for slug in ("toy", "rho", "steps", "clamp"):
        page.evaluate("(preset) => explorer.set({preset})", slug)
        code = page.text_content("#python")
        names: dict[str, Any] = {}
        exec(code, names)
        frame = gl.measure(names["estimator"], names["scenario"]).iloc[0]
        shown = page.evaluate("explorer.state().numbers")
        assert [shown["bias"], shown["noise"]] == pytest.approx([frame["bias"], frame["noise"]], rel=CLOSE, abs=CLOSE)
    assert "crossover" in capsys.readouterr().out


@needs_browser
def test_colours_are_those_of_the_figures(page):
    for kernel, placement in product(KERNELS, PLACEMENTS):
        if kernel in ("full", "mse") and placement == "straight_through":
            continue
        page.evaluate("(e) => explorer.set({world: 'ten', estimator: e})", {"kernel": kernel, "placement": placement})
        ours, theirs = page.evaluate("explorer.state().colour"), look_of(gl.Estimator(kernel, placement)).colour
        apart = [abs(int(ours[i : i + 2], 16) - int(theirs[i : i + 2], 16)) for i in (1, 3, 5)]
        assert max(apart) <= 1, (kernel, placement)


@needs_browser
def test_policies_are_dragged_and_moved_by_keys_and_typed(page):
    page.evaluate("explorer.set({preset: 'sign'})")
    box = page.locator("#handle-policy circle.mark").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    target = page.locator("#handle-reference rect.mark").bounding_box()
    page.mouse.move(target["x"] + target["width"] / 2, target["y"] + target["height"] / 2, steps=5)
    page.mouse.up()
    page.wait_for_timeout(100)
    assert [read(page.input_value(f"[data-n='policy.{i}']"))[0] for i in range(3)] == pytest.approx([0.2, 0.25, 0.55], abs=0.01)
    before = page.evaluate("explorer.state().scenario.policy")
    page.focus("#handle-policy")
    page.keyboard.press("ArrowUp")
    page.wait_for_timeout(100)
    after = page.evaluate("explorer.state().scenario.policy")
    assert math.exp(after[2]) > math.exp(before[2]) + 0.005
    assert page.evaluate("document.activeElement.id") == "handle-policy"
    field = page.locator("[data-n='reference.0']")
    field.fill("0.4")
    field.press("Enter")
    page.wait_for_timeout(100)
    assert math.exp(page.evaluate("explorer.state().scenario.reference")[0]) == pytest.approx(0.4, rel=1e-9)
    page.evaluate("explorer.set({preset: 'dropped'})")
    page.focus("#handle-policy-9")
    page.keyboard.press("ArrowUp")
    page.wait_for_timeout(100)
    assert math.exp(page.evaluate("explorer.state().scenario.policy")[9]) > 1.6e-4


@needs_browser
def test_choices_are_made_by_keyboard_and_undo_what_they_contradict(page):
    page.evaluate("explorer.set({preset: 'steps'})")
    page.focus("input[name=credit]:checked")
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(100)
    assert page.evaluate("explorer.state().estimator.credit") == "to_go"
    page.locator("input[name=placement]").first.check(force=True)
    page.wait_for_timeout(100)
    chosen = page.evaluate("explorer.state().estimator")
    assert (chosen["placement"], chosen["credit"]) == ("loss", "token")
    page.locator("input[name=world]").last.check(force=True)
    page.wait_for_timeout(100)
    assert page.evaluate("explorer.state().world") == "gaussian"


@needs_browser
def test_a_frame_takes_less_than_a_twentieth_of_a_second(page):
    """The fastest of many: what a page needs, and not what else the machine does."""
    page.evaluate("(all) => all.forEach((s) => explorer.set(s))", random_settings(8))
    for world in (*SHAPES, "gaussian"):
        settings = [setting for setting in random_settings(40) if setting["world"] == world]
        took = page.evaluate("(all) => all.map((s) => explorer.set(s))", settings)
        assert min(took) < 50, world


@needs_browser
@pytest.mark.parametrize("width", [320, 390, 768])
def test_nothing_sticks_out_of_a_narrow_page(browser, width):
    for page in opened(browser, width):
        for preset in page.evaluate("explorer.presets.map((each) => each.slug)"):
            page.evaluate("(preset) => explorer.set({preset})", preset)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, preset


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_screen_reader_finds_no_fault(browser, scheme):
    axe = SOURCES / "node_modules" / "axe-core" / "axe.min.js"
    if not axe.is_file():
        pytest.skip("axe-core is not here: npm ci --prefix scripts/explorer")
    for page in opened(browser, scheme=scheme):
        page.add_script_tag(content=axe.read_text(encoding="utf-8"))
        for preset in page.evaluate("explorer.presets.map((each) => each.slug)"):
            page.evaluate("(preset) => explorer.set({preset})", preset)
            faults = page.evaluate(
                "axe.run().then(({violations}) => violations.map((v) => [v.id, v.help, v.nodes.map((n) => n.html.slice(0, 160))]))"
            )
            assert not faults, preset


def test_the_committed_page_is_what_its_sources_give():
    if shutil.which("node") is None:
        pytest.skip("node is not here, so the explorer cannot be built from its sources")
    if not (SOURCES / "node_modules").is_dir():
        pytest.skip("the explorer's build tools are not here: npm ci --prefix scripts/explorer")
    built = subprocess.run(
        ["node", "build.mjs", "--check"], cwd=SOURCES, capture_output=True, text=True, timeout=120, check=False
    )
    assert built.returncode == 0, built.stderr


def test_the_command_opens_the_page_or_copies_it(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    asked: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: asked.append(address) or True)
    assert CliRunner().invoke(app, ["explore"]).exit_code == 0
    assert asked == [EXPLORER.as_uri()]
    copy = tmp_path / "page.html"
    assert CliRunner().invoke(app, ["explore", "--output", str(copy)]).exit_code == 0
    assert copy.read_bytes() == EXPLORER.read_bytes()


def test_the_copy_in_the_figures_is_the_page():
    assert (ROOT / "figures" / "explorer.html").read_bytes() == EXPLORER.read_bytes()
