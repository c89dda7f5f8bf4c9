"""Columns that several formulas of one design need, computed once.

Formulas stay pure functions of rows and configuration. While a design is built, those marked with `once` are remembered for its
rows; everywhere else they are computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

_shared: ContextVar[tuple[pd.DataFrame, dict[Any, FloatArray]] | None] = ContextVar("shared", default=None)


@contextmanager
def shared_columns(frame: pd.DataFrame) -> Iterator[None]:
    """Remember within the block what `once` computes from `frame`, which is not to be changed meanwhile."""
    token = _shared.set((frame, {}))
    try:
        yield
    finally:
        _shared.reset(token)


def constant(value: float, rows: int) -> FloatArray:
    """Return an array of one value, shape (rows,), that holds it once: known to be constant without looking at each row."""
    found = np.ndarray((rows,), buffer=np.array([value], dtype=float), strides=(0,))
    found.flags.writeable = False
    return found


def column(frame: pd.DataFrame, name: str) -> FloatArray:
    """Return a column as an array, shape (n,); it may be a view."""
    return frame[name].to_numpy(dtype=float)


def once[**P](formula: Callable[P, FloatArray]) -> Callable[P, FloatArray]:
    """Return the formula of rows, remembered within `shared_columns` of its frame, its first argument.

    Further arguments are told apart by identity. What is remembered cannot be written to.
    """

    @wraps(formula)
    def remembered(*args: P.args, **kwargs: P.kwargs) -> FloatArray:
        shared = _shared.get()
        if shared is None or shared[0] is not args[0] or kwargs:
            return formula(*args, **kwargs)
        key = (formula, *map(id, args[1:]))
        found = shared[1].get(key)
        if found is None:
            found = shared[1][key] = formula(*args, **kwargs)
            found.flags.writeable = False
        return found

    return remembered
