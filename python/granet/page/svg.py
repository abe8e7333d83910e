"""The least that drawing needs: elements, and scales from values to pixels with their ticks."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup


def drawing(width: float, height: float, label: str) -> ET.Element:
    """An empty picture of this size, in pixels, with a name for those who cannot see it.

    It has no namespace: it stands in HTML, where `svg` has one by itself.
    """
    return ET.Element(
        "svg",
        {"viewBox": f"0 0 {number(width)} {number(height)}", "role": "img", "aria-label": label},
    )


def add(parent: ET.Element, tag: str, text: str = "", **attributes: object) -> ET.Element:
    """An element within another; `_` in an attribute's name is `-`, and a final one is dropped."""
    named = {
        name.rstrip("_").replace("_", "-"): number(value)
        if isinstance(value, float)
        else str(value)
        for name, value in attributes.items()
    }
    element = ET.SubElement(parent, tag, named)
    element.text = text or None
    return element


def markup(element: ET.Element) -> Markup:
    """As HTML, whatever was text escaped."""
    return Markup(ET.tostring(element, encoding="unicode"))  # ElementTree escapes


def number(value: float) -> str:
    """A coordinate to a tenth of a pixel."""
    return f"{round(value, 1) + 0.0:.1f}".removesuffix(".0")  # + 0.0: never -0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Where values lie, in pixels."""

    low: float
    """Smallest value shown."""
    high: float
    """Largest value shown, above `low`."""
    start: float
    """Pixel of `low`."""
    end: float
    """Pixel of `high`."""
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value, which lies outside the scale's range if the value does."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self, count: int, *, whole: bool = False) -> list[float]:
        """At most about `count` round values within the range."""
        from matplotlib import ticker

        locator: ticker.Locator
        if self.is_log and self.high / self.low >= 10:
            span = self.high / self.low
            within_decades = (1, 2, 5) if span < 30 else (1, 3) if span < 300 else (1,)
            locator = ticker.LogLocator(numticks=count, subs=within_decades)
        else:
            steps = [1, 2, 5, 10] if whole else [1, 2, 2.5, 5, 10]
            locator = ticker.MaxNLocator(nbins=count, integer=whole, steps=steps)
        found = [float(tick) for tick in locator.tick_values(self.low, self.high)]
        slack = 1e-9 * (self.high - self.low)
        return [tick for tick in found if self.low - slack <= tick <= self.high + slack]


def scale_of(
    values: Iterable[float],
    start: float,
    end: float,
    *,
    margin: float = 0.05,
    within: Sequence[float] = (-math.inf, math.inf),
    log_from: float = math.inf,
) -> Scale:
    """A scale that shows finite values, with a margin on either side that stays `within` limits.

    Args:
        values: any; where none is finite the range is 0 to 1.
        start: pixel of the low end.
        end: pixel of the high end.
        margin: share of the values' range.
        within: limits that values keep and the margin need not pass, as 0 and 100 of percentages.
        log_from: quotient of the largest and smallest value, all positive, that makes it logarithmic.
    """
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    is_log = low > 0 and high / low >= log_from
    if is_log:
        room = max(high / low, 10.0) ** margin
        low, high = low / room, high * room
    elif high - low <= 1e-9 * max(abs(high), abs(low)):
        low, high = low - max(abs(low), 1) * 0.1, high + max(abs(high), 1) * 0.1
    else:
        room = (high - low) * margin
        low, high = low - room, high + room
    low, high = max(low, within[0]), min(high, within[1])
    return Scale(low=low, high=high, start=start, end=end, is_log=is_log)


def tick_label(value: float) -> str:
    """Short: 0.25, 1500, 20k, 3M."""
    from matplotlib import ticker

    if abs(value) >= 10_000:
        return str(ticker.EngFormatter(sep="")(value)).replace("−", "-")
    return f"{value:.6g}"
