"""BLIS's alphas from requests: what a request costs between its arrival and the queue.

The trap: queued - arrival contains the wait for the running step, which BLIS simulates itself and would count twice. So it is read off
requests that found the engine idle.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import linprog

FloatArray = NDArray[np.float64]

_FEWEST_IDLE = 5
"""Requests that found the engine idle below which their median says little."""
_FEWEST_FOR_SLOPE = 20
"""Requests below which a slope over prompt lengths says little."""
_MOST_FOR_SLOPE = 2000
"""Requests, evenly spread, that a line is drawn through: it is known to a per cent long before."""
_ENVELOPE = 0.05
"""Share of requests below the line where too few found the engine idle: a wait for the running step only ever adds to a delay."""


def idle_requests(requests: pd.DataFrame) -> pd.DataFrame | None:
    """Return the requests that found the engine idle; None if arrivals are not recorded or idleness cannot be told.

    A request found the engine idle if nothing ran or waited when it was queued; where the trace does not say, if every
    earlier request had finished when it arrived.
    """
    if not {"arrival_s", "queued_s"} <= set(requests.columns):
        return None
    if {"running_requests", "waiting_requests"} <= set(requests.columns):
        idle = (requests["running_requests"] == 0) & (requests["waiting_requests"] == 0)
    elif "finished_s" in requests.columns:
        requests = requests.sort_values("arrival_s")
        # A request that never finished keeps the engine busy for all we know.
        busy_until = requests["finished_s"].fillna(np.inf).cummax().shift(fill_value=-np.inf)
        idle = requests["arrival_s"] > busy_until
    else:
        return None
    return requests[idle & (requests["queued_s"] - requests["arrival_s"]).notna()]


def idle_api_delay_s(requests: pd.DataFrame) -> float | None:
    """Return the median of queued - arrival over requests that found the engine idle, in seconds.

    This is BLIS's alpha0. The plain mean of queued - arrival contains the wait for the running step, which BLIS simulates
    itself, and would count it twice. So would an `api_delay` posterior asked about an empty queue: no trace column says how
    much of the running step was left, and its constant takes the mean of that up (10 to 40 ms on recorded engines whose idle
    delay is 1 to 4 ms). That is why alpha0 is taken from the requests themselves.

    Parameters
    ----------
    requests : DataFrame
        Rows of a request trace.

    Returns
    -------
    float or None
        None if arrivals are not recorded, idleness cannot be told, or fewer than five requests found the engine idle.
    """
    idle = idle_requests(requests)
    if idle is None or len(idle) < _FEWEST_IDLE:
        return None
    return float(max((idle["queued_s"] - idle["arrival_s"]).median(), 0.0))


def queueing_alpha_s(requests: pd.DataFrame) -> tuple[float, float] | None:
    """Return a0 (s) and a1 (s per input token) of BLIS's older backends: queued - arrival = a0 + a1 * prompt_tokens, both >= 0.

    The median line through requests that found the engine idle; where fewer than twenty did, the line that 5 % of all requests lie
    below, because the wait for the running step, which is not BLIS's alpha, can only add. Quantile regression: Koenker & Bassett
    (1978), doi:10.2307/1913643.

    Returns
    -------
    tuple of float, or None
        None if arrivals are not recorded or there are fewer than twenty requests.
    """
    if not {"arrival_s", "queued_s"} <= set(requests.columns):
        return None
    idle = idle_requests(requests)
    chosen, share = (idle, 0.5) if idle is not None and len(idle) >= _FEWEST_FOR_SLOPE else (requests, _ENVELOPE)
    chosen = chosen[(chosen["queued_s"] - chosen["arrival_s"]).notna()]
    if len(chosen) < _FEWEST_FOR_SLOPE:
        return None
    chosen = chosen.iloc[np.unique(np.linspace(0, len(chosen) - 1, _MOST_FOR_SLOPE).astype(int))]
    return _quantile_line(
        chosen["prompt_tokens"].to_numpy(float), (chosen["queued_s"] - chosen["arrival_s"]).to_numpy(float), share
    )


def _quantile_line(x: FloatArray, y: FloatArray, share: float) -> tuple[float, float]:
    """Return the line (intercept, slope), both >= 0, that minimises the check loss: share above, 1 - share below."""
    size_x, size_y = max(float(x.max()), 1.0), max(float(np.abs(y).max()), 1e-12)
    n = len(x)
    # y = a + b x + up - down; columns a, b, up, down, all >= 0.
    equal = np.column_stack([np.ones(n), x / size_x, np.eye(n), -np.eye(n)])
    cost = np.concatenate([[0.0, 0.0], np.full(n, share), np.full(n, 1.0 - share)])
    found = linprog(cost, A_eq=equal, b_eq=y / size_y, bounds=(0.0, None), method="highs")
    assert found.x is not None, found.message  # a = b = 0 is feasible, so there is an optimum
    return float(found.x[0] * size_y), float(found.x[1] * size_y / size_x)
