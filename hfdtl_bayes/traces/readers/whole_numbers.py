"""Whole numbers as the formats write them, and the name of a request that a number stands for."""

from __future__ import annotations

import re
from typing import Any

_WHOLE = re.compile(r"[+-]?\d{1,19}\Z", re.ASCII)

_LARGEST = 2**62


def request_name(number: int) -> str:
    """Return the name of a numbered request; BLIS itself writes request 7 of a trace as ``request_7`` in its results."""
    return f"request_{number}"


def whole(value: Any, name: str, least: int = 0) -> int:
    """Read a whole number, given as such or as text: OTLP writes integers as strings.

    Raises
    ------
    ValueError
        If it is none, too large for 64 bits, or below `least`; the message names the field.
    """
    if isinstance(value, str) and _WHOLE.match(value.strip()):
        found = int(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        found = value
    elif isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        found = int(value)
    else:
        raise ValueError(f"{name} is not a whole number")
    if abs(found) >= _LARGEST:
        raise ValueError(f"{name} is too large")
    if found < least:
        raise ValueError(f"{name} is negative" if least == 0 else f"{name} is below {least}")
    return found
