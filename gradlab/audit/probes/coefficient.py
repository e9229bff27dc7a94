"""Probes of the coefficient as the log-ratio runs over ±40."""

from __future__ import annotations

import math

from gradlab.audit import curve
from gradlab.audit.probes.setting import Probe, Setting


def finite(s: Setting) -> Probe:
    """Is the coefficient a number for every log-ratio within ±40?"""
    broken = [e for e in _events(s) if e.kind == "not finite"]
    if not broken:
        worst = s.curve.iloc[int(s.curve["coefficient"].abs().to_numpy().argmax())]
        lost = " and ".join(f"ℓ {event.where}" for event in _events(s) if event.kind == "lost")
        finding = "finite over ±40" + (f", but lost to rounding for {lost}" if lost else "")
        return Probe("finite", True, finding, f"ℓ = {worst['log_ratio']:g}: coefficient {worst['coefficient']:.3g}")
    places = " and ".join(f"ℓ {event.where}" for event in broken)
    at = 1.01 * broken[0].at
    seen, loss = curve.of_token(s.subject, s.group - 1, s.vocab)(at)
    return Probe("finite", False, f"NaN or infinite for {places}", f"ℓ = {at:.4g}: coefficient {seen:.4g}, loss {loss:.4g}")


def clamps(s: Setting) -> Probe:
    """Are there log-ratios at which the gradient is exactly 0, or stops growing, because of a clamp?"""
    if not s.curve["coefficient"].abs().max() > 0:
        return Probe("clamps", None, "there is no gradient to clamp", "")
    found = [e for e in _events(s) if e.kind in ("dead", "flat")]
    if not found:
        settled = _saturation(s)
        return Probe("clamps", True, f"no clamp within ±40{settled}", "")
    parts = []
    for kind, what in (("dead", "the gradient is 0 for"), ("flat", "the coefficient is constant for")):
        some = [e for e in found if e.kind == kind]
        if some:
            parts.append(f"{what} {curve.binding(some)}")
    first = found[0]
    just = curve.of_token(s.subject, s.group - 1, s.vocab)(first.at * 1.001)[0]
    example = f"ℓ = {first.at * 1.001:.4g}: coefficient {just:.4g}, just inside {first.level:.4g}"
    return Probe("clamps", False, "; ".join(parts), example)


def _saturation(s: Setting) -> str:
    """Where the coefficient levels off without a clamp, to within a hundredth of its last value."""
    parts = []
    for sign, where in ((-1, "below"), (1, "above")):
        side = s.curve[sign * s.curve["log_ratio"] > 0].sort_values("log_ratio", ascending=sign > 0)
        last = float(side["coefficient"].iloc[-1])
        off = (side["coefficient"] - last).abs() > 0.01 * abs(last)
        if last and off.any() and not off[side["log_ratio"].abs() > curve.LIMIT / 2].any():
            parts.append(f"it saturates at {last:.4g} for ℓ {where} {float(side['log_ratio'][off].iloc[-1]):.3g}")
    return "".join(f"; {part}" for part in parts)


def _events(s: Setting) -> list[curve.Event]:
    return curve.events(curve.of_token(s.subject, s.group - 1, s.vocab), s.curve, s.precision)


def asymmetry(s: Setting) -> Probe:
    """Are under-sampled tokens pulled as hard as over-sampled ones at the same distance?"""
    at = {float(x): float(c) for x, c in zip(s.curve["log_ratio"], s.curve["coefficient"], strict=True)}
    pairs = {x: (at[-x], at[x]) for x in (1.0, 2.0, 4.0)}
    ratios = {x: abs(a / b) for x, (a, b) in pairs.items() if math.isfinite(a) and math.isfinite(b) and a and b}
    if not ratios:
        return Probe("asymmetry", None, "no coefficient on one of the sides", "")
    last = max(ratios)
    under, over = pairs[last]
    example = f"ℓ = ∓{last:g}: coefficients {under:.4g} and {over:.4g}"
    if all(abs(math.log(r)) < 0.05 for r in ratios.values()):
        return Probe("asymmetry", True, "both sides pull alike", example)
    rates = [math.log(r) / x for x, r in ratios.items()]
    side = ("under", "over") if ratios[last] > 1 else ("over", "under")
    growth = ", growing as e^|ℓ|" if all(abs(abs(rate) - 1) < 0.05 for rate in rates) else ""
    factor = max(ratios[last], 1 / ratios[last])
    finding = (
        f"at |ℓ| = {last:g} {side[0]}-sampled tokens are pulled {factor:.3g} times as hard as {side[1]}-sampled ones{growth}"
    )
    return Probe("asymmetry", False, finding, example)
