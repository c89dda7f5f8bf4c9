"""`replay`: requests and a step-time function in, steps and request times out."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.replay.batch import StepTime
from hfdtl_bayes.replay.requests import Requests
from hfdtl_bayes.replay.scheduler import Scheduler
from hfdtl_bayes.replay.settings import ReplaySettings
from hfdtl_bayes.replay.step_time import StepTimeFunction
from hfdtl_bayes.replay.traffic import Traffic, generate_requests
from hfdtl_bayes.traces import write_store

_FIRST_GUESS = 64
_MOST_REQUESTS = 4_000_000


@dataclass(frozen=True)
class ReplayedRun:
    """What an engine did with requests.

    Attributes
    ----------
    steps : DataFrame
        A step trace, and the column `prompt_attention_tokens` of BLIS's basis. Times count from the clock of the arrivals. A
        step's regime is that of the request which came last before it; kv_usage, waiting_requests and running_requests are the
        state while it ran.
    requests : DataFrame
        A request trace, of those that were sent. `queued_s` is when the engine saw the request: it looks between two steps.
    configuration : ServingConfiguration
    settings : ReplaySettings
    """

    steps: pd.DataFrame
    requests: pd.DataFrame
    configuration: ServingConfiguration
    settings: ReplaySettings

    @property
    def busy_s(self) -> float:
        """Seconds that the engine was busy."""
        return float(self.steps["step_time_s"].sum())

    @property
    def ttft_s(self) -> pd.Series:
        """Time to first token of each request, from its arrival, seconds."""
        return (self.requests["first_token_s"] - self.requests["arrival_s"]).rename("ttft_s")

    @property
    def e2e_s(self) -> pd.Series:
        """Time from arrival to last token of each request, seconds."""
        return (self.requests["finished_s"] - self.requests["arrival_s"]).rename("e2e_s")

    @property
    def itl_s(self) -> pd.Series:
        """Mean time between output tokens of each request, seconds; nan for a single token."""
        tokens = self.requests["output_tokens"].to_numpy(float) - 1
        between = self.requests["finished_s"] - self.requests["first_token_s"]
        itl: pd.Series = (between / np.maximum(tokens, 1.0)).where(tokens > 0)
        return itl.rename("itl_s")

    def write(self, store: str | os.PathLike[str]) -> Path:
        """Write the run into a trace store, whole or not at all; returns its folder.

        Raises
        ------
        InputError
            If the store holds the configuration already.
        """
        return write_store(store, self.configuration, self.steps, self.requests)


def replay(
    requests: Requests | Traffic,
    configuration: ServingConfiguration,
    step_time: StepTime,
    *,
    seed: int = 0,
    settings: ReplaySettings | None = None,
) -> ReplayedRun:
    """Serve requests with vLLM's continuous batching until all are answered.

    Deterministic: the seed only draws the requests of a traffic. The engine is one of `data_parallel`.

    Parameters
    ----------
    requests : Requests or Traffic
    configuration : ServingConfiguration
        max_num_seqs, max_num_batched_tokens, kv_capacity_tokens, chunked_prefill and prefix_caching rule the scheduling.
    step_time : callable
        Seconds that a step takes, given its `Batch`; see `step_time_function`.
    seed : int
    settings : ReplaySettings, optional

    Returns
    -------
    ReplayedRun

    Raises
    ------
    InputError
        If a request can never be served, the engine would refuse its knobs, or a step time is not finite and above 0.
    """
    settings = settings or ReplaySettings()
    if isinstance(requests, Requests):
        return _served(Scheduler(requests, configuration, step_time, settings), configuration)
    if not (requests.closed_loop and requests.duration_s is not None):
        until = float("inf") if requests.duration_s is None else requests.duration_s
        drawn = generate_requests(requests, seed=seed)
        return _served(Scheduler(drawn, configuration, step_time, settings, until), configuration)
    # How many requests a closed loop sends is the engine's doing. The first ones are the same however many are drawn.
    count = _FIRST_GUESS * (requests.concurrency or 1)
    while count <= _MOST_REQUESTS:
        drawn = generate_requests(requests, seed=seed, num_requests=count)
        scheduler = Scheduler(drawn, configuration, step_time, settings, requests.duration_s)
        run = _served(scheduler, configuration)
        if scheduler.sent < count:
            return run
        lasted = max(float(run.requests["arrival_s"].max()), 1e-9)
        count = int(count * min(max(1.2 * requests.duration_s / lasted, 2.0), 64.0))
    raise InputError(
        f"traffic {requests.name!r} sends more than {_MOST_REQUESTS:g} requests in {requests.duration_s:g} s; check the unit of duration_s"
    )


def _served(scheduler: Scheduler, configuration: ServingConfiguration) -> ReplayedRun:
    scheduler.run()
    steps = scheduler.steps()
    if isinstance(scheduler.step_time, StepTimeFunction):
        scheduler.step_time.check(steps, scheduler.times_s)
    return ReplayedRun(steps, scheduler.journeys(), configuration, scheduler.settings)
