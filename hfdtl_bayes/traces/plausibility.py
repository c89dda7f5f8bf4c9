"""Whether times can be seconds on this hardware: a wrong unit is refused for the whole file, a single impossible row rejected."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration, prefill_floor_s_per_token, weight_loading_floor_s
from hfdtl_bayes.errors import InputError

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class ValidationSettings:
    """Limits of the validation, each with its reason."""

    impossible_share: float = 0.5
    """A file is refused as having a wrong unit when more than this share of its rows beats the hardware: noise and
    clock jitter explain a few such rows, never half of them. The others are rejected row by row."""
    slack: float = 0.5
    """A row counts as impossible below this fraction of the physical floor: peak figures of CPUs and caches are
    only known to about a factor of two. The fastest of 235,000 recorded steps takes 1.06 times the floor."""
    heavy_prefill_tokens: float = 128.0
    """Prefill is compared with the peak from here on: below, reading the weights bounds the step."""
    longest_median_step_s: float = 20.0
    """A median step above this is taken for milliseconds given as seconds: a 15 ms step becomes 15 s, and no
    serving engine has a median cycle of 20 s."""
    slowest_floor_ratio: float = 300.0
    """The same for small models: a median this many times the weight-loading floor is a wrong unit, unless it is
    below `shortest_suspect_s`."""
    shortest_suspect_s: float = 1.0
    """A median step of less than a second is never called too long, because host overheads dominate small models."""
    most_tokens_per_step: float = 20.0
    """Output tokens one request can gain in one step, by speculative decoding: bounds the time per output token."""
    clock_tolerance_s: float = 1e-3
    """Two events of a request may seem to be in the wrong order by this much: they are stamped by several processes."""


SETTINGS = ValidationSettings()


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _refuse_long(median: float, floor: float, what: str, source: Path, settings: ValidationSettings) -> None:
    ratio = median / floor
    suspect = median > settings.shortest_suspect_s and ratio > settings.slowest_floor_ratio
    if median > settings.longest_median_step_s or suspect:
        raise InputError(
            f"{source}: the median {what} is {median:.3g} s, {ratio:.3g} times the time to read the weights. These "
            "look like milliseconds or microseconds given as seconds; divide by 1e3 or 1e6"
        )


def impossible_steps(
    frame: pd.DataFrame,
    usable: BoolArray,
    configuration: ServingConfiguration,
    source: Path,
    settings: ValidationSettings = SETTINGS,
) -> list[tuple[str, BoolArray]]:
    """Find steps faster than the hardware allows, and refuse a file whose step times cannot be seconds.

    A step is impossible below `slack` times the time to read the always-active weights once, or, with many prefill
    tokens, below `slack` times their FLOPs at peak.

    Parameters
    ----------
    frame : DataFrame
        With numeric `step_time_s` and `prefill_tokens`.
    usable : ndarray of bool
        Rows to judge; the others hold nothing that could be judged.
    configuration, source, settings

    Returns
    -------
    list of (message, mask)
        Rows to reject.

    Raises
    ------
    InputError
        If most rows are impossible, or the typical step is far too long: the unit is wrong.
    """
    if not usable.any():
        return []
    time = frame["step_time_s"].to_numpy(dtype=float)
    prefill = frame["prefill_tokens"].to_numpy(dtype=float)
    floor = weight_loading_floor_s(configuration)
    hardware = f"{configuration.hardware.name}, tp {configuration.engine.tensor_parallel}"
    with np.errstate(invalid="ignore"):
        below = usable & (time < settings.slack * floor)
        heavy = usable & (prefill >= settings.heavy_prefill_tokens)
        faster = heavy & (time < settings.slack * prefill_floor_s_per_token(configuration) * prefill)
    share = below.sum() / usable.sum()
    if share > settings.impossible_share:
        raise InputError(
            f"{source}: step_time_s lies below the time to read the weights once ({_ms(floor)} on {hardware}) in {share:.0%} of "
            f"rows (median {_ms(float(np.median(time[usable])))}). Either the unit is not seconds, or this is vLLM's "
            "step.duration_us, which times only the scheduler. Give the engine's cycle: the start-to-start time of consecutive "
            "busy steps"
        )
    share = faster.sum() / max(int(heavy.sum()), 1)
    if share > settings.impossible_share:
        raise InputError(
            f"{source}: prefill is faster than the peak of {hardware} in {share:.0%} of the steps with "
            f"{settings.heavy_prefill_tokens:g} or more prefill tokens (median {np.median(prefill[faster] / time[faster]):.3g} "
            "token/s). Check that step_time_s is in seconds and prefill_tokens counts computed, not cached, tokens"
        )
    possible = usable & ~below & ~faster
    if possible.any():
        _refuse_long(float(np.median(time[possible])), floor, "step_time_s", source, settings)
    return [
        (f"step_time_s is below {settings.slack:g} of the time to read the weights once, {_ms(floor)}", below),
        (f"prefill is faster than the peak of {configuration.hardware.name} by more than {1 / settings.slack:g} times", faster),
    ]


def check_request_times(
    frame: pd.DataFrame,
    usable: BoolArray,
    configuration: ServingConfiguration,
    source: Path,
    settings: ValidationSettings = SETTINGS,
) -> None:
    """Refuse a file of requests whose times cannot be seconds, judged by the time per output token where it is known.

    (finished_s - first_token_s) / (output_tokens - 1) is one step per token, or per `most_tokens_per_step` tokens.

    Raises
    ------
    InputError
        If most requests are faster than the weights can be read, or the typical one is far too slow.
    """
    if not {"first_token_s", "finished_s", "output_tokens"} <= set(frame.columns):
        return
    tokens = frame["output_tokens"].to_numpy(dtype=float)
    with np.errstate(invalid="ignore"):
        known = usable & (tokens > 1)
        span = (frame["finished_s"] - frame["first_token_s"]).to_numpy(dtype=float)
        per_token = (span[known] / (tokens[known] - 1))[np.isfinite(span[known])]
    if not len(per_token):
        return
    floor = weight_loading_floor_s(configuration)
    share = float(np.mean(per_token < settings.slack * floor / settings.most_tokens_per_step))
    if share > settings.impossible_share:
        raise InputError(
            f"{source}: the time per output token, (finished_s - first_token_s) / (output_tokens - 1), lies far below the time "
            f"to read the weights once ({_ms(floor)} on {configuration.hardware.name}) in {share:.0%} of requests (median "
            f"{_ms(float(np.median(per_token)))}). Times must be in seconds"
        )
    _refuse_long(float(np.median(per_token)), floor, "time per output token", source, settings)


def check_share_of_one(frame: pd.DataFrame, column: str, source: Path, settings: ValidationSettings = SETTINGS) -> None:
    """Refuse a share given in per cent.

    Raises
    ------
    InputError
        If most known values of the column lie between 1 and 100.
    """
    if column not in frame.columns:
        return
    values = frame[column].to_numpy(dtype=float)
    values = values[np.isfinite(values)]
    if len(values) and np.mean((values > 1) & (values <= 100)) > settings.impossible_share:
        raise InputError(
            f"{source}: {column} lies above 1 in {np.mean(values > 1):.0%} of rows (median {np.median(values):.3g}): it looks "
            "like per cent. Accepted is a share from 0 to 1; divide by 100"
        )
