"""Charts of the report as plain numbers; its template draws them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 360, 226
LEFT, RIGHT, TOP, BOTTOM = 46, 346, 26, 186  # of the axes
MOST_TICKS = 5
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Chart:
    """One curve over axes, in a box of WIDTH x HEIGHT with y downwards.

    Attributes:
        title: the picture in words, for who cannot see it.
        x_label, y_label: of the axes.
        path: of the curve, as SVG writes it.
        dots: places on the curve that are marked.
        promise: place of the promise.
        x_ticks, y_ticks: (place, label).
    """

    title: str
    x_label: str
    y_label: str
    path: str
    dots: tuple[tuple[float, float], ...]
    promise: tuple[float, float]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def spending_chart(spent: Sequence[tuple[int, float]], epsilon: float) -> Chart:
    """Epsilon against the step, as stairs: between two prices the later one stands, which is never too small.

    spent: (step, epsilon) in order. epsilon: promised.
    """
    steps, top = spent[-1][0], max(epsilon, *(price for _, price in spent))
    stairs, start = [], 0.0
    for (step, price), (_, following) in zip(spent, [*spent[1:], (0, math.nan)], strict=True):
        if price != following:  # the end of a stair; thousands of steps have a few dozen
            stairs.append(f"H{_across(start, steps):.1f}V{_up(price, top):.1f}H{_across(step, steps):.1f}")
            start = step
    return Chart(
        title=f"Epsilon grows with every step, to {spent[-1][1]:.4g} after step {steps:,}; promised are {epsilon:g}.",
        x_label="step",
        y_label="epsilon",
        path=f"M{LEFT} {BOTTOM}{''.join(stairs)}",
        dots=(),
        promise=(RIGHT, round(_up(epsilon, top), 1)),
        x_ticks=tuple((round(_across(tick, steps), 1), f"{tick:,.0f}") for tick in ticks(steps, smallest=1)),
        y_ticks=_heights(top),
    )


def profile_chart(profile: Sequence[dict[str, float]], epsilon: float, delta: float) -> Chart:
    """Epsilon against delta, largest delta first.

    profile: points {"epsilon", "delta"}. epsilon, delta: promised.
    """
    top = max(epsilon, *(point["epsilon"] for point in profile))
    exponents = [math.log10(point["delta"]) for point in profile]
    first, last = max(exponents), min(*exponents, math.log10(delta))

    def place(epsilon: float, delta: float) -> tuple[float, float]:
        return round(_across(first - math.log10(delta), first - last), 1), round(_up(epsilon, top), 1)

    dots = tuple(place(**point) for point in profile)
    decades = range(round(first), math.ceil(last) - 1, -1)
    return Chart(
        title="The smaller delta, the larger epsilon: from "
        + " to ".join(f"{point['epsilon']:g} at delta {point['delta']:g}" for point in (profile[0], profile[-1])),
        x_label="delta",
        y_label="epsilon",
        path="M" + "L".join(f"{x} {y}" for x, y in dots),
        dots=dots,
        promise=place(epsilon, delta),
        x_ticks=tuple((place(0, 10.0**k)[0], f"10{str(k).translate(SUPERSCRIPTS)}") for k in decades),
        y_ticks=_heights(top),
    )


def ticks(top: float, smallest: float = 0.0) -> list[float]:
    """Round numbers from 0 to at most `top`, at least `smallest` apart."""
    power = 10.0 ** math.floor(math.log10(top / MOST_TICKS))
    apart = next(size for size in (power, 2 * power, 5 * power, 10 * power) if top / size <= MOST_TICKS)
    apart = max(apart, smallest)
    return [apart * k for k in range(math.floor(top / apart + 1e-9) + 1)]


def _heights(top: float) -> tuple[tuple[float, str], ...]:
    return tuple((round(_up(tick, top), 1), f"{tick:g}") for tick in ticks(top))


def _across(value: float, last: float) -> float:
    return LEFT + (RIGHT - LEFT) * value / last


def _up(value: float, top: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * value / top
