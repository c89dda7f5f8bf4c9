"""Which rows to set aside where a clock jumped: as few as make the rest increase."""

from __future__ import annotations

import bisect

import numpy as np
from numpy.typing import NDArray


def increasing(values: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return the rows of a longest strictly increasing subsequence, so that one wild stamp costs one row.

    Patience sorting: `tails[k]` is the smallest end of an increasing run of k + 1 rows, `before` the row it came after.
    """
    n = len(values)
    if n < 2 or (np.diff(values) > 0).all():
        return np.ones(n, dtype=bool)
    tails: list[int] = []
    rows: list[int] = []
    before = np.full(n, -1, dtype=np.int64)
    for i, value in enumerate(values.tolist()):
        k = bisect.bisect_left(tails, value)
        before[i] = rows[k - 1] if k else -1
        if k == len(tails):
            tails.append(value)
            rows.append(i)
        else:
            tails[k], rows[k] = value, i
    keep = np.zeros(n, dtype=bool)
    i = rows[-1]
    while i >= 0:
        keep[i] = True
        i = int(before[i])
    return keep
