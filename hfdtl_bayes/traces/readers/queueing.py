"""The state of the engine when each request was queued, which delays depend on."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.traces.readers.recording import UNKNOWN

FloatArray = NDArray[np.float64]


def state_at_queueing(steps: pd.DataFrame, requests: pd.DataFrame, *, complete: bool) -> dict[str, FloatArray]:
    """Return `waiting_requests`, `running_requests` and `kv_usage` at the queueing of each request, those that can be told.

    With the journeys of all requests, queue and batch are counted: request i finds those before it that are not scheduled yet, and
    those that are and have not finished. With a sample of journeys, the batch is that of the step then running and the queue cannot be
    told, since a step's own depth is older than the request.

    Parameters
    ----------
    steps : DataFrame
        In order, with `start_ns`, `time_ns`, `running_requests`, `kv_usage`.
    requests : DataFrame
        In the order in which they were queued.
    complete : bool
        Whether these are all requests that were served.
    """
    queued, scheduled, finished = (requests[c].to_numpy() for c in ("queued_ns", "scheduled_ns", "finished_ns"))
    if requests.empty or (queued == UNKNOWN).any():
        return {}
    start, time = steps["start_ns"].to_numpy(), steps["time_ns"].to_numpy()
    row = np.searchsorted(start, queued, "left") - 1
    at = np.maximum(row, 0)
    known = time[at] != UNKNOWN
    during = (row >= 0) & known & (queued <= start[at] + np.where(known, time[at], 0))

    def of_step(name: str) -> FloatArray:
        values = steps[name].to_numpy(dtype=float)[at]
        # Before the first step and after one that is over the engine is idle; after a step of unknown length nothing is known.
        return np.where(during, values, np.where((row < 0) | known, 0.0, np.nan))

    found = {"kv_usage": of_step("kv_usage")} if steps["kv_usage"].notna().any() else {}
    if complete and (scheduled != UNKNOWN).all():
        begun = np.searchsorted(np.sort(scheduled), queued, "left")
        ended = np.searchsorted(np.sort(finished[finished != UNKNOWN]), queued, "right")
        found["waiting_requests"] = np.maximum(np.arange(len(queued)) - begun, 0).astype(float)
        found["running_requests"] = (begun - ended).astype(float)
    elif steps["running_requests"].notna().any():
        found["running_requests"] = of_step("running_requests")
    return found
