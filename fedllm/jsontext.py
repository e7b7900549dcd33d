"""JSON as its standard has it: what is no finite number is `null`, never the `NaN` that other readers refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from io import StringIO
from typing import Any


def to_json_text(value: Any, indent: int | None = None) -> str:
    """The text of plain values. Numbers that are not finite are null."""
    try:
        return _written(value, indent)
    except ValueError:  # rare, so that others do not pay for a look at every number
        return _written(finite_only(value), indent)


def finite_only(value: Any) -> Any:
    """Plain values with None in place of numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_only(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_only(item) for item in value]
    return value


def _written(value: Any, indent: int | None) -> str:
    if indent is None:
        return json.dumps(value, allow_nan=False)
    text = StringIO()  # json.dumps would hold every word of many clients as an object of its own
    json.dump(value, text, indent=indent, allow_nan=False)
    return text.getvalue()
