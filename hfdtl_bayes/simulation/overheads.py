"""Request overheads (BLIS's alpha) from journeys: what a request spends outside the steps, several configurations pooled.

Three delays, each a time per request:

- *before the queue* (alpha0): queued - arrival of requests that found the engine idle. Of the others the rest of the running step, which
  a simulator waits for by itself, has to be subtracted; but a request that arrives during a step is read when that ends, whatever its
  own lag, so what is left is zero unless the lag was longer than the step (median 0.0 ms on all eleven recorded engines, 1 to 4 ms for
  idle ones). And between recorded steps lie steps that compute nothing, so "no step was running" is not idleness.
- *per output token* (alpha2) and *after the last token* (alpha1 of trained-physics): what the client saw after the engine, from
  `client_first_token_s` and `client_finished_s`. The front end is late by a + b * n after n tokens, so the lag of the first and of the last
  token give both. Without these columns both are zero, not guessed.

Median delays of configurations are pooled on the log scale: log m_c ~ Normal(mu, tau), with the standard error of each from its requests
(1.57 * interquartile range / sqrt(n), McGill, Tukey & Larsen 1978); mu and tau are integrated over a grid, mu flat, tau half-normal. A
configuration without requests is drawn from the population. The alphas of a request are means in BLIS; the median is taken because
the mean is that of the few requests which met a pause of the machine, which the drift of its speed holds already.

TRAP: alpha1 is per request *after decoding* in trained-physics, per *input token* in every older backend (`RequestOverheads` tells them
apart by name); alpha0 is not the mean of queued - arrival.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.export.alpha import idle_requests
from hfdtl_bayes.replay import RequestOverheads
from hfdtl_bayes.traces import drop_warmup

FloatArray = NDArray[np.float64]

SMALLEST_S = 1e-6
"""Delays below a microsecond are counted as one: simulators count in microseconds."""


@dataclass(frozen=True)
class OverheadSettings:
    """Choices of the pooling, each with its reason."""

    fewest: int = 5
    """Requests below which a median says little."""
    tau_scale: float = 1.0
    """Half-normal scale of the sd of log medians between configurations: a factor of e is a lot for the same front end."""
    smallest_relative_error: float = 0.05
    """No median of one recording speaks of another day more exactly."""


@dataclass(frozen=True)
class ObservedDelay:
    """A delay of one configuration: median and its standard error, seconds, and how many requests say it."""

    median_s: float
    error_s: float
    requests: int


@dataclass(frozen=True)
class OverheadDraws:
    """Draws of the overheads of one configuration, each of shape (S,), seconds; with what they were drawn from."""

    before_queue_s: FloatArray
    after_finish_s: FloatArray
    per_output_token_s: FloatArray
    said_by: Mapping[str, int]

    def __len__(self) -> int:
        """Return the number of draws."""
        return len(self.before_queue_s)

    @classmethod
    def fixed(cls, overheads: RequestOverheads) -> OverheadDraws:
        """Return overheads that are known."""
        one = [np.array([x]) for x in (overheads.before_queue_s, overheads.after_finish_s, overheads.per_output_token_s)]
        return cls(one[0], one[1], one[2], {})

    def draw(self, number: int) -> RequestOverheads:
        """Return a draw, modulo their number."""
        k = number % len(self)
        return RequestOverheads(
            before_queue_s=float(self.before_queue_s[k]),
            after_finish_s=float(self.after_finish_s[k]),
            per_output_token_s=float(self.per_output_token_s[k]),
        )

    def mean(self) -> RequestOverheads:
        """Return their means."""
        return RequestOverheads(
            before_queue_s=float(self.before_queue_s.mean()),
            after_finish_s=float(self.after_finish_s.mean()),
            per_output_token_s=float(self.per_output_token_s.mean()),
        )


def delays_before_queue(requests: pd.DataFrame) -> pd.Series:
    """Return queued - arrival of the requests that found the engine idle, seconds; empty where that cannot be told."""
    idle = idle_requests(requests)
    if idle is None:
        return pd.Series(dtype=float)
    return (idle["queued_s"] - idle["arrival_s"]).clip(lower=0.0)


def delays_after_engine(requests: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Return, per request of two tokens and more, the delay per output token and the fixed one after the last, seconds.

    With lags l1 of the first and ln of the last of n tokens behind the engine: per token (ln - l1) / (n - 1), fixed l1 less one token's.
    Empty without `client_first_token_s` and `client_finished_s`.
    """
    needed = {"client_first_token_s", "client_finished_s", "first_token_s", "finished_s", "output_tokens"}
    if not needed <= set(requests.columns):
        return pd.Series(dtype=float), pd.Series(dtype=float)
    some = requests[(requests["output_tokens"] > 1) & requests[sorted(needed)].notna().all(axis=1)]
    first = some["client_first_token_s"] - some["first_token_s"]
    last = some["client_finished_s"] - some["finished_s"]
    per_token = (last - first) / (some["output_tokens"] - 1)
    # BLIS adds a2 per output token to the end, and a1 once; to the first token it adds one a2.
    return per_token, last - some["output_tokens"] * per_token


def observed_delay(values: pd.Series, settings: OverheadSettings | None = None) -> ObservedDelay | None:
    """Return the median of delays and its standard error; None of too few."""
    settings = settings or OverheadSettings()
    values = values.dropna()
    if len(values) < settings.fewest:
        return None
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    error = 1.57 * (high - low) / 1.96 / math.sqrt(len(values))
    return ObservedDelay(float(median), float(error), len(values))


def pooled_draws(
    observed: Mapping[str, ObservedDelay | None],
    config_id: str,
    *,
    draws: int = 1000,
    seed: int = 0,
    settings: OverheadSettings | None = None,
) -> FloatArray:
    """Return draws of one configuration's delay, pooled with the others', shape (S,), seconds; zeros where no configuration says it.

    Parameters
    ----------
    observed : mapping of str to ObservedDelay or None
        By config_id.
    config_id : str
        May be none of them, or one without requests: then a new one of the population is drawn.
    draws, seed : int
    settings : OverheadSettings, optional
    """
    settings = settings or OverheadSettings()
    rng = np.random.default_rng([seed, 7])
    known = {c: o for c, o in observed.items() if o is not None}
    if not known or max(o.median_s for o in known.values()) <= SMALLEST_S:
        return np.zeros(draws)
    y = np.log(np.array([max(o.median_s, SMALLEST_S) for o in known.values()]))
    error = np.array([max(o.error_s / max(o.median_s, SMALLEST_S), settings.smallest_relative_error) for o in known.values()])
    tau = settings.tau_scale * np.linspace(0.01, 3.0, 150)
    variance = error**2 + tau[:, None] ** 2
    precision = (1.0 / variance).sum(axis=1)
    centre = (y / variance).sum(axis=1) / precision
    log_weight = -0.5 * (np.log(variance).sum(axis=1) + np.log(precision) + ((y - centre[:, None]) ** 2 / variance).sum(axis=1))
    log_weight -= 0.5 * (tau / settings.tau_scale) ** 2
    weight = np.exp(log_weight - log_weight.max())
    g = rng.choice(len(tau), size=draws, p=weight / weight.sum())
    mu = centre[g] + rng.standard_normal(draws) / np.sqrt(precision[g])
    if config_id not in known:
        return np.asarray(np.exp(mu + tau[g] * rng.standard_normal(draws)))
    own = list(known).index(config_id)
    within = 1.0 / (1.0 / error[own] ** 2 + 1.0 / tau[g] ** 2)
    mean = within * (y[own] / error[own] ** 2 + mu / tau[g] ** 2)
    return np.asarray(np.exp(mean + np.sqrt(within) * rng.standard_normal(draws)))


def overhead_draws(
    journeys: Mapping[str, pd.DataFrame],
    config_id: str,
    *,
    client_side: bool = False,
    draws: int = 1000,
    seed: int = 0,
    settings: OverheadSettings | None = None,
) -> OverheadDraws:
    """Return draws of a configuration's overheads from the journeys of several.

    Parameters
    ----------
    journeys : mapping of str to DataFrame
        Requests by config_id. Warm-up is left out.
    config_id : str
    client_side : bool
        True for latencies as the client sees them; False, as the engine does, leaves the delays after it at zero.
    draws, seed : int
    settings : OverheadSettings, optional
    """
    before: dict[str, ObservedDelay | None] = {}
    after: dict[str, ObservedDelay | None] = {}
    token: dict[str, ObservedDelay | None] = {}
    for name, requests in journeys.items():
        kept = drop_warmup(requests)
        before[name] = observed_delay(delays_before_queue(kept), settings)
        if client_side:
            per_token, fixed = delays_after_engine(kept)
            token[name], after[name] = observed_delay(per_token, settings), observed_delay(fixed, settings)
    found = [
        pooled_draws(o, config_id, draws=draws, seed=seed + k, settings=settings) for k, o in enumerate((before, after, token))
    ]
    said = {n: o.requests for n, o in before.items() if o is not None}
    return OverheadDraws(found[0], found[1], found[2], said)
