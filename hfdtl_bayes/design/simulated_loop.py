"""A closed loop against a recording that stands in for the engine: what a plan costs in GPU seconds until a verdict accepts.

The traffic that may be sent is what the recording holds: cells of a regime and a number of requests in flight, cut into segments of
consecutive rows. Choosing a segment yields its real rows in order, and costs the sum of their step times; each can be had once. The
planner sees of a segment not sent yet the composition of its steps, as a replay would tell it, and what its posterior expects it to cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.design.closed_loop import ClosedLoop
from hfdtl_bayes.design.segments import Segment, SegmentSettings
from hfdtl_bayes.errors import InputError, UnknownNameError
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.transfer import VerdictSettings

Rule = Literal["planned", "random"]


@dataclass(frozen=True, eq=False)
class SimulatedLoop:
    """How a loop ended.

    Attributes
    ----------
    config_id : str
    rule : str
    accepted : bool
    gpu_s : float
        Step times of all rows measured.
    rows : int
    segments : tuple of str
        Names of those sent, in order.
    posterior : LatencyPosterior
        The last one.
    """

    config_id: str
    rule: str
    accepted: bool
    gpu_s: float
    rows: int
    segments: tuple[str, ...]
    posterior: LatencyPosterior


def recorded_segments(
    steps: pd.DataFrame, *, rows: int = 40, smallest: int = 20, by: Sequence[str] = ("regime", "target_concurrency")
) -> list[Segment]:
    """Cut a recording into segments of one kind of traffic.

    Parameters
    ----------
    steps : DataFrame
        Usable rows with measured times.
    rows, smallest : int
        Rows of a segment at most and at least; what is left of a cell is dropped.
    by : sequence of str
        Columns whose values make a cell; those that the recording lacks are passed over.

    Raises
    ------
    InputError
        If no cell has rows enough.
    """
    columns = [c for c in by if c in steps.columns]
    cells = [("all", steps)] if not columns else list(steps.groupby(columns, sort=False))
    made = []
    for key, cell in cells:
        name = " ".join(str(k) for k in (key if isinstance(key, tuple) else (key,)))
        for i, start in enumerate(range(0, len(cell), rows)):
            part = cell.iloc[start : start + rows]
            if len(part) >= smallest:
                made.append(Segment(f"{name} #{i}", part, float(part["step_time_s"].sum())))
    if not made:
        raise InputError(f"no cell of {', '.join(columns) or 'the recording'} has {smallest} rows; give fewer rows per segment")
    return made


def simulate_loop(
    donors: LatencyPosterior,
    configuration: ServingConfiguration,
    segments: Sequence[Segment],
    deployment: pd.DataFrame,
    *,
    rule: Rule = "planned",
    budget_s: float = float("inf"),
    settings: SegmentSettings | None = None,
    thresholds: VerdictSettings | None = None,
    seed: int = 0,
) -> SimulatedLoop:
    """Run a loop until its verdict accepts, the budget is spent, or the recording is.

    Parameters
    ----------
    donors : LatencyPosterior
    configuration : ServingConfiguration
    segments : sequence of Segment
        With measured times; see `recorded_segments`.
    deployment : DataFrame
        Steps of the traffic that is to be predicted.
    rule : {"planned", "random"}
        How the next segment is chosen.
    budget_s : float
        GPU seconds after which no further segment is sent.
    settings, thresholds
        As of `ClosedLoop`.
    seed : int

    Raises
    ------
    InputError
        If there are no segments, or the budget is not positive.
    UnknownNameError
        If there is no such rule.
    """
    if rule not in ("planned", "random"):
        raise UnknownNameError(f"unknown rule {rule!r}; known are planned and random")
    if not segments:
        raise InputError(f"no segments of {configuration.config_id!r} to send; give a recording")
    if not budget_s > 0:
        raise InputError(f"a budget of {budget_s} s sends nothing; give a positive number of seconds")
    one = replace(settings or SegmentSettings(), most_segments=1)
    loop = ClosedLoop(donors, configuration, deployment, settings=one, thresholds=thresholds or VerdictSettings(), seed=seed)
    order = np.random.default_rng([seed, 31]).permutation(len(segments)).tolist()
    left = list(range(len(segments)))
    sent: list[str] = []
    spent = 0.0
    while left and not loop.accepted and spent < budget_s:
        if rule == "planned":
            candidates = _as_foreseen([segments[i] for i in left], loop.posterior, configuration)
            chosen = left[loop.plan(candidates, stop=False).chosen[0]]
        else:
            chosen = order[len(sent)]
        left.remove(chosen)
        spent += segments[chosen].cost_s
        sent.append(segments[chosen].name)
        loop.take(segments[chosen].steps, segments[chosen].name)
    return SimulatedLoop(configuration.config_id, rule, loop.accepted, spent, loop.rows, tuple(sent), loop.posterior)


def _as_foreseen(segments: Sequence[Segment], posterior: LatencyPosterior, configuration: ServingConfiguration) -> list[Segment]:
    """Return segments at the cost that the posterior expects, their times hidden."""
    steps = [s.steps.drop(columns="step_time_s") for s in segments]
    joined = pd.concat(steps, ignore_index=True)
    expected = posterior.scale_s(posterior.expected_s(joined, configuration), configuration)
    starts = np.r_[0, np.cumsum([len(f) for f in steps])[:-1]]
    return [Segment(s.name, f, float(c)) for s, f, c in zip(segments, steps, np.add.reduceat(expected, starts), strict=True)]
