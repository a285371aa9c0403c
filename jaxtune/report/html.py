"""Markup in which escaping is the default, and numbers in the words of a page."""

import html
import math
from collections.abc import Iterable
from typing import Any


class Html(str):
    """Markup. Any other string is text and is escaped when it is put into an element."""

    __slots__ = ()


def text(value: Any) -> Html:
    """Escape a value for use as text or in an attribute. Lone surrogates, which UTF-8 cannot hold, become "?"."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(str(value).encode("utf-8", "replace").decode("utf-8")))


def join(parts: Iterable[Any], separator: str = "") -> Html:
    """Concatenate markup and text; None is left out."""
    return Html(text(separator).join(text(part) for part in parts if part is not None))


def h(tag: str, *children: Any, **attributes: Any) -> Html:
    """Return `<tag ...>children</tag>`.

    `class_` is written class and `data_v` data-v; an attribute that is None is left out, True stands alone.
    """
    pairs = []
    for name, value in attributes.items():
        name = name.rstrip("_").replace("_", "-")
        if value is True:
            pairs.append(f" {name}")
        elif value is not None and value is not False:
            pairs.append(f' {name}="{text(value)}"')
    head = f"<{tag}{''.join(pairs)}>"
    return Html(head) if tag in ("meta", "link") else Html(f"{head}{join(children)}</{tag}>")


def number(value: float) -> str:
    """Four significant digits: 3.412, 0.1187, 12,345, 2e-4."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1000 or value == 0:
        return f"{value:,.0f}"
    if size < 1e-3:
        return scientific(value)
    return f"{value:.4g}"


def compact(value: float, largest: float) -> str:
    """A label of an axis: 0.0005, 5,000, 20k, 1.5M; 5e-5 where the `largest` beside it is below 0.001 too."""
    for least, size, unit in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:.4g}{unit}"
    if value and largest < 1e-3:
        return scientific(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def scientific(value: float) -> str:
    """2e-4 and 1.25e-7, where Python writes 2.00e-04."""
    mantissa, _, power = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"


def percent(share: float) -> str:
    """0.915 -> 91.5%; a share too small for two decimals is not called zero."""
    value = 100 * share
    if 0 < abs(value) < 0.01:
        return "below 0.01%"
    return f"{value:.2f}".rstrip("0").rstrip(".") + "%"


def duration(seconds: float) -> str:
    """45.2 s, 1 min 32 s, 3 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 59.95 else "1 min 00 s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"
