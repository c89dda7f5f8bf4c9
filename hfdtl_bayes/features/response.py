"""The quantity a model explains, taken from trace rows."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features.feature import Quantity

# later and earlier column
_DIFFERENCES: dict[str, tuple[str, str]] = {
    "queue_delay": ("scheduled_s", "queued_s"),
    "api_delay": ("queued_s", "arrival_s"),
}


def response(frame: pd.DataFrame, quantity: Quantity) -> NDArray[np.float64]:
    """Return the response of each row in seconds, shape (n,).

    step_time: step_time_s. queue_delay: scheduled_s - queued_s. api_delay: queued_s - arrival_s, which contains the wait
    for the running step. A delay below zero is one of clocks (validation lets up to a millisecond pass) and counts as zero.

    Raises
    ------
    InputError
        If a needed column is missing.
    """
    needed = ("step_time_s",) if quantity == "step_time" else _DIFFERENCES[quantity]
    missing = [c for c in needed if c not in frame.columns]
    if missing:
        raise InputError(f"{quantity} needs the column(s) {', '.join(missing)}; found {', '.join(map(str, frame.columns))}")
    values = [frame[c].to_numpy(dtype=float) for c in needed]
    return np.asarray(values[0] if len(values) == 1 else np.maximum(values[0] - values[1], 0.0), dtype=float)
