"""The time of a step: the engine's cycle, start to start of consecutive busy steps, and when a recorded duration may stand for it.

`step.duration_us` of vLLM's step tracing times the scheduler's own work, 0.3 to 1.1 ms where the engine's cycle was 15 to 19 ms: it
lies below the time to read the weights in nearly every row. BLIS's own duration is the step's time. So a duration is held against
the physical floor and against the cycles before it is used at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration, weight_loading_floor_s
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.traces.plausibility import SETTINGS, ValidationSettings
from hfdtl_bayes.traces.readers.recording import UNKNOWN

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class StepTimeSettings:
    """Limits of the derivation, each with its reason."""

    least_agreement: float = 0.8
    most_agreement: float = 1.05
    """A duration is the step's time if its median share of the cycle lies between these. The host's part of a cycle that a
    device-side duration leaves out is 1 to 2 ms of 10 to 20; the scheduler's own work is a few per cent of a cycle."""
    longest_cycle_s: float = 60.0
    """A longer cycle is a clock jump or a pause of the machine, not a step: the first steps of an engine take up to 11 s."""


@dataclass(frozen=True)
class StepTimes:
    """Times of steps and where they come from.

    Attributes
    ----------
    time_ns : ndarray of int, shape (n,)
        `UNKNOWN` where neither a cycle nor a duration gives it.
    cycles, durations : int
        Steps timed by each.
    problems : list of (str, ndarray of bool)
        Steps without a time, and why.
    notes : tuple of str
    """

    time_ns: IntArray
    cycles: int
    durations: int
    problems: list[tuple[str, BoolArray]]
    notes: tuple[str, ...]


def busy_after(steps: pd.DataFrame) -> BoolArray:
    """Return whether the engine went from each step straight on to the next, as far as the steps themselves tell.

    It did if the numbers are consecutive and the next step decodes: a request that decodes was in the batch the step before. Or if
    requests were left waiting.
    """
    n = len(steps)
    found = np.zeros(n, dtype=bool)
    if n < 2:
        return found
    ids = steps["step_id"].to_numpy()
    decodes = np.nan_to_num(steps["decode_requests"].fillna(steps["decode_tokens"]).to_numpy(dtype=float)) > 0
    waits = np.nan_to_num(steps["waiting_requests"].to_numpy(dtype=float)) > 0
    found[:-1] = (np.diff(ids) == 1) & (decodes[1:] | waits[:-1])
    return found


def step_times(
    steps: pd.DataFrame,
    busy: BoolArray,
    configuration: ServingConfiguration,
    source: Path,
    settings: StepTimeSettings | None = None,
    plausibility: ValidationSettings = SETTINGS,
) -> StepTimes:
    """Derive the time of each step.

    Parameters
    ----------
    steps : DataFrame
        `step_id`, increasing; `start_ns`, increasing; `duration_ns`.
    busy : ndarray of bool, shape (n,)
        Whether the next row is the next step and the engine was busy in between.
    configuration, source, settings, plausibility

    Returns
    -------
    StepTimes

    Raises
    ------
    InputError
        If no step has a cycle and durations lie below the time to read the weights: they are not step times.
    """
    settings = settings or StepTimeSettings()
    n = len(steps)
    start, duration = steps["start_ns"].to_numpy(), steps["duration_ns"].to_numpy()
    cycle = np.full(n, UNKNOWN)
    cycle[:-1] = np.where(busy[:-1], start[1:] - start[:-1], UNKNOWN)
    jumped = cycle > settings.longest_cycle_s * 1e9
    cycle[jumped] = UNKNOWN
    has_cycle, has_duration = cycle != UNKNOWN, duration != UNKNOWN
    floor_s = weight_loading_floor_s(configuration)
    hardware = f"{configuration.hardware.name}, tp {configuration.engine.tensor_parallel}"
    notes: list[str] = []
    trusted = False
    gap = 0
    if has_duration.any():
        known = duration[has_duration] / 1e9
        below = float(np.mean(known < plausibility.slack * floor_s))
        both = has_cycle & has_duration
        share = float(np.median(duration[both] / cycle[both])) if both.any() else float("nan")
        if below > plausibility.impossible_share:
            message = (
                f"step.duration_us is not the step's time: it lies below the time to read the weights once ({floor_s * 1e3:.3g} ms on "
                f"{hardware}) in {below:.0%} of the steps (median {np.median(known) * 1e3:.3g} ms); it times only the scheduler's work"
            )
            if not has_cycle.any():
                raise InputError(
                    f"{source}: {message}. No two consecutive steps were recorded, so the engine's cycle is not known either; record with "
                    "--step-tracing-sample-rate 1"
                )
            notes.append(f"{message}. The start-to-start time of {has_cycle.sum()} consecutive busy steps is used instead")
        elif both.any() and not settings.least_agreement <= share <= settings.most_agreement:
            notes.append(
                f"the recorded duration is not the engine's cycle: median {share:.2f} of the start-to-start time over {both.sum()} "
                "consecutive busy steps. Only steps with a cycle are used"
            )
        else:
            trusted = True
            gap = round(float(np.median(cycle[both] - duration[both]))) if both.any() else 0
            if not both.any():
                notes.append(
                    "no two consecutive busy steps: the recorded durations are taken as they are, with nothing to hold them against"
                )
    use = ~has_cycle & has_duration & trusted & ~jumped
    time = np.where(has_cycle, cycle, np.where(use, duration + gap, UNKNOWN))
    if gap and use.any():
        notes.append(f"{use.sum()} steps without a cycle have their duration plus {gap / 1e6:.3g} ms, the median rest of a cycle")
    missing = time == UNKNOWN
    alone = missing & ~jumped
    problems = [
        (f"the next step begins more than {settings.longest_cycle_s:g} s later: a clock jump or a pause", jumped),
        ("its time is not known: the next step was not recorded, or the engine may have been idle before it", alone),
    ]
    return StepTimes(time, int(has_cycle.sum()), int(use.sum()), problems, tuple(notes))
