"""JSON as everybody can read it: a number that is not finite is written as null, because JSON has no word for it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def finite_json(value: Any, *, indent: int | None = None) -> str:
    """A value as JSON, on one line or indented."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(element) for name, element in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(element) for element in value]
    return value
