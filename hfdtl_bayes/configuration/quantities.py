"""Number fields of a configuration: finite, bounded, and never a yes or no taken for 1 or 0."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

LARGEST_COUNT = 10**9
"""No count of layers, heads, widths, sequences or tokens per step comes near it; a larger one is a corrupt file."""


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


PositiveCount = Annotated[int, BeforeValidator(_number), Field(gt=0, le=LARGEST_COUNT)]
Count = Annotated[int, BeforeValidator(_number), Field(ge=0, le=LARGEST_COUNT)]
CountOrDerived = Annotated[int, BeforeValidator(_number), Field(ge=-1, le=LARGEST_COUNT)]
PositiveQuantity = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
Quantity = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
BytesEach = Annotated[float, BeforeValidator(_number), Field(gt=0, le=8)]
