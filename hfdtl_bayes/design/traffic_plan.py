"""`plan_traffic`: which traffic to send next to a live target, and how long until a verdict is expected to accept it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.design.closed_loop import expectations_of
from hfdtl_bayes.design.segments import SegmentEffect, SegmentSettings, Standing, choose_segments, segment_effects
from hfdtl_bayes.design.stopping import AcceptanceSettings
from hfdtl_bayes.design.traffic_grid import ReplayedPoint, TrafficGrid, TrafficPoint, replayed_points
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.files import atomic
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.replay import Traffic, replay, step_time_function
from hfdtl_bayes.transfer import attainable_mape
from hfdtl_bayes.transfer.evaluation import error_sd

FloatArray = NDArray[np.float64]

_FORESEEN = 60
"""Segments looked ahead to say how many minutes are still needed."""


@dataclass(frozen=True)
class PlannedSegment:
    """One segment of a plan.

    Attributes
    ----------
    traffic : TrafficPoint
    num_prompts : int
        Requests to send.
    steps : int
        Engine steps expected while they are sent.
    cost_s : float
        Seconds expected until the last is answered.
    gain : float
        What it is expected to take off the deployment mix's error and unjudged share, together.
    after : Standing
        Where things are expected to be after it.
    seed : int
        Of its random data: no two segments send the same prompts, which a prefix cache would find again.
    """

    traffic: TrafficPoint
    num_prompts: int
    steps: int
    cost_s: float
    gain: float
    after: Standing
    seed: int


@dataclass(frozen=True, eq=False)
class TrafficPlan:
    """What to send next, in order.

    Attributes
    ----------
    config_id : str
    model : str
        Name of the LLM.
    segments : tuple of PlannedSegment
    before : Standing
        Where things are.
    limits : Standing
        Where all traffic of the grid without end would lead.
    limit : float
        MAPE that a verdict is going to ask to stay below; the median, where it depends on how noisy the target will turn out.
    attainable : float
        MAPE that noise and drift leave.
    acceptance : AcceptanceSettings
    minutes_needed : float or None
        Minutes of traffic until a verdict is expected to accept; 0 if it is already, None if no traffic of the grid is expected to get there.
    reason : str
        Why not, where it is None.
    left_out : tuple of str
        Points of the grid that the engine cannot serve, and why.
    """

    config_id: str
    model: str
    segments: tuple[PlannedSegment, ...]
    before: Standing
    limits: Standing
    limit: float
    attainable: float
    acceptance: AcceptanceSettings
    minutes_needed: float | None
    reason: str
    left_out: tuple[str, ...]

    @property
    def minutes(self) -> float:
        """Minutes that the plan takes."""
        return sum(s.cost_s for s in self.segments) / 60.0

    @property
    def expected_to_accept(self) -> bool:
        """Whether a verdict is expected to accept after the plan."""
        return (self.segments[-1].after if self.segments else self.before).accepted(self.acceptance)

    def to_frame(self) -> pd.DataFrame:
        """Return a row per segment: its traffic, what it is expected to bring, and the running sum of minutes."""
        rows = [
            {
                "segment": i,
                "request_rate_per_s": np.nan if s.traffic.request_rate_per_s is None else s.traffic.request_rate_per_s,
                "concurrency": pd.NA if s.traffic.concurrency is None else s.traffic.concurrency,
                "prompt_tokens": s.traffic.prompt_tokens,
                "output_tokens": s.traffic.output_tokens,
                "shared_prefix_tokens": s.traffic.shared_prefix_tokens,
                "duration_s": s.traffic.duration_s,
                "num_prompts": s.num_prompts,
                "steps": s.steps,
                "cost_s": s.cost_s,
                "expected_gain": s.gain,
                "expected_error_after": s.after.error,
                "unjudged_after": s.after.unjudged,
                "probability_after": s.after.probability,
                "chance_after": s.after.chance,
                "total_minutes": sum(t.cost_s for t in self.segments[:i]) / 60.0,
            }
            for i, s in enumerate(self.segments, 1)
        ]
        return pd.DataFrame(rows).astype({"concurrency": "Int64"}) if rows else pd.DataFrame(rows)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain data for JSON."""
        return {
            "config_id": self.config_id,
            "model": self.model,
            "limit": self.limit,
            "attainable_mape": self.attainable,
            "mape_limit": self.acceptance.mape_limit,
            "min_probability": self.acceptance.min_probability,
            "before": asdict(self.before),
            "segments": [{**asdict(s), "name": s.traffic.name} for s in self.segments],
            "minutes": self.minutes,
            "expected_to_accept": self.expected_to_accept,
            "minutes_needed": self.minutes_needed,
            "reason": self.reason,
            "limits_of_the_grid": asdict(self.limits),
            "left_out": list(self.left_out),
        }

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as JSON, whole or not at all; returns its path."""
        path = Path(path)
        with atomic(path) as part:
            part.write_text(json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return path

    def __str__(self) -> str:
        """Return the plan as lines for a person."""
        lines = [
            f"{self.config_id}: the deployment mix is expected to be off by {self.before.error:.1%} now, noise not counted; "
            f"{self.before.unjudged:.0%} of its time is beyond anything measured"
        ]
        for i, s in enumerate(self.segments, 1):
            p = s.traffic
            pace = f"{p.concurrency} in flight" if p.request_rate_per_s is None else f"{p.request_rate_per_s:g} requests/s"
            prefix = f", {p.shared_prefix_tokens} shared" if p.shared_prefix_tokens else ""
            lines.append(
                f"  {i}. {pace}, prompts {p.prompt_tokens}{prefix}, outputs {p.output_tokens}, {p.duration_s:g} s ({s.num_prompts} requests, "
                f"{s.cost_s:.0f} s until answered): error {s.after.error:.1%}, unjudged {s.after.unjudged:.0%}, "
                f"expected P(MAPE < {self.limit:.1%}) {s.after.probability:.2f}, chance of an accept {s.after.chance:.0%}"
            )
        if self.minutes_needed is None:
            lines.append(f"No traffic of the grid is expected to lead to an accept: {self.reason}.")
        elif self.minutes_needed == 0:
            lines.append("A verdict is expected to accept with what is at hand.")
        else:
            lines.append(
                f"A verdict is expected to accept after {self.minutes_needed:.1f} minutes of traffic; this plan takes {self.minutes:.1f}."
            )
        return "\n".join(lines)


Deployment = pd.DataFrame | Traffic | Sequence[tuple[Traffic, float]]
"""Steps of the traffic that matters; or the traffic itself, or several with the share of steps that each makes up."""


def deployment_steps(
    posterior: LatencyPosterior, configuration: ServingConfiguration, deployment: Deployment, *, seed: int = 0
) -> tuple[pd.DataFrame, FloatArray]:
    """Return the steps of a deployment mix, and the weight of each, shape (J,).

    Raises
    ------
    InputError
        If there is nothing, a weight is not a positive number, or the engine cannot serve the traffic.
    """
    if isinstance(deployment, pd.DataFrame):
        return deployment, np.ones(len(deployment))
    parts = [(deployment, 1.0)] if isinstance(deployment, Traffic) else list(deployment)
    if not parts:
        raise InputError(f"the deployment mix of {configuration.config_id!r} is empty; give at least one traffic")
    step_time = step_time_function(posterior, configuration)
    frames, weights = [], []
    for traffic, weight in parts:
        if not 0 < weight < float("inf"):
            raise InputError(
                f"traffic {traffic.name!r} of the deployment mix has weight {weight}; accepted are finite numbers above 0"
            )
        steps = replay(traffic, configuration, step_time, seed=seed).steps
        frames.append(steps)
        weights.append(np.full(len(steps), weight / len(steps)))
    return pd.concat(frames, ignore_index=True), np.concatenate(weights)


def plan_traffic(
    posterior: LatencyPosterior,
    configuration: ServingConfiguration,
    deployment: Deployment,
    *,
    weights: Sequence[float] | FloatArray | None = None,
    grid: TrafficGrid | None = None,
    budget_minutes: float | None = None,
    measured: pd.DataFrame | None = None,
    held_out: pd.DataFrame | None = None,
    replays: int = 1,
    settings: SegmentSettings | None = None,
    acceptance: AcceptanceSettings | None = None,
    seed: int = 0,
) -> TrafficPlan:
    """Choose what traffic to send next, by what it tells of the deployment mix per second.

    Parameters
    ----------
    posterior : LatencyPosterior
        Of donors, or with the target calibrated.
    configuration : ServingConfiguration
        The target's.
    deployment : DataFrame, Traffic, or sequence of (Traffic, weight)
        What is to be predicted: steps (times not needed), or traffic that is replayed.
    weights : array, shape (J,), optional
        Of each step where `deployment` is steps; equal by default.
    grid : TrafficGrid, optional
        `TrafficGrid.for_engine` by default.
    budget_minutes : float, optional
        Most minutes of traffic; by default as many as a verdict is expected to need.
    measured : DataFrame, optional
        All usable rows of the target at hand. Without them the deployment mix counts as never measured.
    held_out : DataFrame, optional
        Those that judge it.
    replays : int
        1 replays every point with the mean step time. With more, those beyond are at draws of the coefficients, and what a point tells and
        takes is the mean over them: for open loops near an uncertain saturation.
    settings : SegmentSettings, optional
    acceptance : AcceptanceSettings, optional
    seed : int

    Returns
    -------
    TrafficPlan

    Raises
    ------
    InputError
        If the grid is empty or asks for what the engine cannot serve, the budget is smaller than one segment, or the deployment mix is
        outside anything that the grid measures.
    """
    if budget_minutes is not None and not 0 < budget_minutes < float("inf"):
        raise InputError(f"a budget of {budget_minutes} minutes sends nothing; give a positive number of minutes")
    if replays < 1:
        raise InputError(f"replays must be at least 1, found {replays}")
    settings, acceptance = settings or SegmentSettings(), acceptance or AcceptanceSettings()
    points, left_out = (grid or TrafficGrid.for_engine(configuration)).points(configuration)
    steps, shares = deployment_steps(posterior, configuration, deployment, seed=seed)
    if weights is not None and not isinstance(deployment, pd.DataFrame):
        raise InputError("weights are of the steps of a deployment mix; of traffic they stand beside each, as (traffic, weight)")
    expectations = expectations_of(
        posterior,
        configuration,
        steps,
        weights=shares if weights is None else weights,
        measured=measured,
        held_out=held_out,
        settings=settings,
        acceptance=acceptance,
        seed=seed,
    )
    replayed = replayed_points(points, configuration, step_time_function(posterior, configuration), seed=seed)
    effects = segment_effects(posterior, [r.segment for r in replayed], configuration, expectations.belief, settings)
    for draw in range(1, replays):
        faster = step_time_function(posterior, configuration, draw=_spread(draw, replays, posterior), seed=seed)
        again = {r.point: r for r in replayed_points(points, configuration, faster, seed=seed)}
        # A draw may send nothing of a point within its duration; then the mean's replay stands for it.
        segments = [again.get(r.point, r).segment for r in replayed]
        more = segment_effects(posterior, segments, configuration, expectations.belief, settings)
        effects = [_running_mean(e, m, draw) for e, m in zip(effects, more, strict=True)]
    budget_s = float("inf") if budget_minutes is None else 60.0 * budget_minutes
    path = choose_segments(expectations, effects, settings, budget_s=budget_s)
    chosen = [
        _planned(replayed[i], effects[i], gain, after, seed + n)
        for n, (i, gain, after) in enumerate(zip(path.chosen, path.gains, path.standings[1:], strict=True))
    ]
    limit = float(np.median(expectations.limits))
    needed_s, reason = None, _why_never(path.limits, limit, acceptance)
    if not reason:
        ahead = path
        if not path.standings[-1].accepted(acceptance):
            ahead = choose_segments(expectations, effects, replace(settings, most_segments=_FORESEEN))
        if ahead.standings[-1].accepted(acceptance):
            needed_s = sum(effects[i].cost_s for i in ahead.chosen)
        else:
            reason = (
                f"not within {sum(effects[i].cost_s for i in ahead.chosen) / 60:.0f} minutes: the error would still be "
                f"{ahead.standings[-1].error:.1%} and the chance of an accept {ahead.standings[-1].chance:.0%}"
            )
    return TrafficPlan(
        configuration.config_id,
        configuration.llm.name,
        tuple(chosen),
        path.standings[0],
        path.limits,
        limit,
        attainable_mape(error_sd(posterior, configuration)),
        acceptance,
        None if needed_s is None else needed_s / 60.0,
        reason,
        tuple(left_out),
    )


def _spread(draw: int, replays: int, posterior: LatencyPosterior) -> int:
    """Return which posterior draw to replay: evenly spaced ones."""
    return draw * len(posterior.draws_of("tau")) // replays


def _running_mean(so_far: SegmentEffect, more: SegmentEffect, count: int) -> SegmentEffect:
    """Return the mean of `count` effects and one more; its judging rows are those of the first."""
    share = 1.0 / (count + 1)
    return replace(
        so_far,
        information=so_far.information + share * (more.information - so_far.information),
        known_s=so_far.known_s + share * (more.known_s - so_far.known_s),
        cost_s=so_far.cost_s + share * (more.cost_s - so_far.cost_s),
    )


def _planned(replayed: ReplayedPoint, effect: SegmentEffect, gain: float, after: Standing, seed: int) -> PlannedSegment:
    return PlannedSegment(replayed.point, replayed.num_prompts, len(replayed.segment.steps), effect.cost_s, gain, after, seed)


def _why_never(limits: Standing, limit: float, acceptance: AcceptanceSettings) -> str:
    """Return why no traffic of the grid will lead to an accept; empty if some may."""
    if limits.unjudged > acceptance.max_unjudged_share:
        return (
            f"{limits.unjudged:.0%} of the deployment's time comes from larger amounts of a feature than any traffic of the grid has, "
            f"{acceptance.max_unjudged_share:.0%} are tolerated; give a grid with traffic more like it"
        )
    if limits.median_sd > acceptance.max_mean_uncertainty:
        return (
            f"all of it without end would leave the expected times open by {limits.median_sd:.1%} (sd), "
            f"{acceptance.max_mean_uncertainty:.0%} are tolerated; give a grid with traffic more like the deployment's"
        )
    if limits.chance < acceptance.min_chance:
        return (
            f"after all of it without end the chance of P(MAPE < {limit:.1%}) above {acceptance.min_probability:g} would be "
            f"{limits.chance:.0%}: noise and drift alone are too large. Raise mape_limit, or quieten the machine"
        )
    return ""
