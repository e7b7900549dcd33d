"""One sentence for every setting that is out of its range."""

from __future__ import annotations

import re

from fedllm.errors import ConfigError


def require(holds: bool, owner: object, *, field: str, value: object, allowed: str) -> None:
    """Pass if `holds`. A NaN fails every comparison, so it is refused as well.

    Raises:
        ConfigError: "top_k.fraction is 2.0; it must be above 0 and at most 1".
    """
    if not holds:
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(owner).__name__).lower()
        raise ConfigError(f"{name}.{field} is {value!r}; it must be {allowed}")
