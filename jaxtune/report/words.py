"""Numbers and settings as text on a page."""

import math
from collections.abc import Sequence
from typing import Any


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
    """0.915 -> 91.5%; a share too small for two decimals is not shown as zero."""
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


def amount(value: float, unit: str) -> str:
    """Three digits with the prefix of a power of thousand: 4.31 TFLOP, 620 GB."""
    for least, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= least:
            return f"{value / least:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def memory(size: float) -> str:
    """1.2 GiB, 620 MiB."""
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def setting(value: Any) -> str:
    """A setting's value as the command line writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return number(value)
    if isinstance(value, dict):
        return ", ".join(f"{k}={v}" for k, v in value.items())
    return ", ".join(map(setting, value)) if isinstance(value, list | tuple) else str(value)


def listed(parts: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
