"""One sentence for every setting that is out of its range, and the names and numbers that sentences use."""

from __future__ import annotations

import re

from fedllm.errors import ConfigError


def require(holds: bool, owner: object, *, field: str, value: object, allowed: str) -> None:
    """Pass if `holds`. A NaN fails every comparison, so it is refused as well.

    Raises:
        ConfigError: "top_k.fraction is 2.0; it must be above 0 and at most 1".
    """
    if not holds:
        raise ConfigError(f"{written(owner)}.{field} is {value!r}; it must be {allowed}")


def written(component: object) -> str:
    """As an experiment file writes it: TopK is top_k."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(component).__name__).lower()


def counted(number: int, noun: str) -> str:
    """ "1 round", "2 rounds"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
