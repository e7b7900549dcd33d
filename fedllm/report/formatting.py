"""Quantities as text, spelled the same on the page and in the terminal."""

from __future__ import annotations

import math
from typing import TypeGuard

NOTHING = "\N{EM DASH}"
_COUNTED = {"nll": "token", "perplexity": "token", "exact_match": "record", "rouge_l": "record", "accuracy": "record"}
_LOWER_IS_BETTER = {"loss", "nll", "perplexity", "error", "bits"}
_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def finite(value: float | None) -> TypeGuard[float]:
    """Whether there is a number to show."""
    return value is not None and math.isfinite(value)


def figure(value: float | None) -> str:
    """Four digits or four decimals, so that figures in a column line up; a dash for None and what is not finite."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    scale = math.floor(math.log10(abs(value)))
    return f"{value:.3g}" if scale < -3 else f"{value:,.{min(4, max(0, 3 - scale))}f}"


def size(value: float | None) -> str:
    """Bytes in binary units: 1536 is "1.5 KiB"."""
    if value is None or not math.isfinite(value):
        return NOTHING
    step = 0
    while abs(value) >= 1024 and step < len(_BYTE_UNITS) - 1:
        value, step = value / 1024, step + 1
    digits = f"{value:.0f}" if step == 0 or abs(value) >= 100 else f"{value:.3g}"
    return f"{digits} {_BYTE_UNITS[step]}"


def duration(seconds: float | None) -> str:
    """Seconds in the two largest units that matter: 3725 is "1 h 02 min"."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def remaining(seconds: float) -> str:
    """Time left, in whole seconds below a minute."""
    return f"{seconds:.0f} s" if seconds < 59.5 else duration(round(seconds))


def part_of_whole(value: float | None) -> str:
    """0.5 is "50.0 %"."""
    return share(value, 1.0) if finite(value) else NOTHING


def share(part: float, whole: float) -> str:
    """A percentage with one decimal."""
    return f"{100 * part / whole:.1f} %" if whole else NOTHING


def lower_is_better(metric: str) -> bool:
    """Whether a small value is good: losses, perplexities, error rates. `exact_match/private` is judged by its
    first half, `own/nll` as `nll`."""
    return not _LOWER_IS_BETTER.isdisjoint(metric.removeprefix("own/").split("/")[0].lower().split("_"))


def labelled(metric: str) -> str:
    """A metric's name with what its figure over several clients is a mean over: "nll, per token"."""
    counted = _COUNTED.get(metric.removeprefix("own/").split("/")[0])
    return f"{metric}, per {counted}" if counted else metric


def printable(text: str) -> str:
    """One line without control characters: a client's words cannot move a terminal's cursor."""
    return "".join(char if char.isprintable() else " " for char in text).strip()
