"""Whether times can be seconds on this hardware: a wrong unit is refused for the whole file, a single impossible row rejected."""

from __future__ import annotations

from dataclasses import dataclass, replace
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

ROW_BY_ROW = replace(SETTINGS, impossible_share=1.0, longest_median_step_s=float("inf"), slowest_floor_ratio=float("inf"))
"""The same limits for a batch of a larger table, which is never refused as a whole."""


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


@dataclass(frozen=True)
class _Span:
    """A time of every request that the hardware bounds, NaN where it is not known.

    `least_s` is the shortest the hardware allows; `steps` the work done, in steps that read the weights once, and `per_step` what
    to call their quotient.
    """

    name: str
    per_step: str
    time_s: FloatArray
    least_s: FloatArray
    steps: FloatArray


def _request_spans(frame: pd.DataFrame, configuration: ServingConfiguration, settings: ValidationSettings) -> list[_Span]:
    unknown = np.full(len(frame), np.nan)

    def column(name: str) -> FloatArray:
        return frame[name].to_numpy(dtype=float) if name in frame.columns else unknown

    floor, per_token = weight_loading_floor_s(configuration), prefill_floor_s_per_token(configuration)
    scheduled, first, finished = column("scheduled_s"), column("first_token_s"), column("finished_s")
    prompt, output = column("prompt_tokens"), column("output_tokens")
    # An aborted request gained nothing, so nothing bounds it; the tokens of one that says nothing are not known.
    finished = np.where(output < 1, np.nan, finished)
    between = np.where(output > 1, output - 1, np.nan)
    # Without knowing what the prefix cache spared, a prompt may have cost nothing.
    spared = column("cached_tokens") if configuration.engine.prefix_caching else np.zeros(len(frame))
    prefill_s = per_token * np.nan_to_num(prompt - spared)
    prefill_steps = per_token * prompt / floor
    return [
        _Span(
            "time per output token, (finished_s - first_token_s) / (output_tokens - 1),",
            "time per output token",
            (finished - first) / between,
            np.where(between > 0, floor / settings.most_tokens_per_step, np.nan),
            np.ones(len(frame)),
        ),
        _Span(
            "time of service, finished_s - scheduled_s,",
            "time of service, finished_s - scheduled_s, per output token and the prompt's equivalent of one,",
            finished - scheduled,
            np.maximum(floor * np.fmax(output / settings.most_tokens_per_step, 1), prefill_s),
            output + prefill_steps,
        ),
        _Span(
            "time to the first token, first_token_s - scheduled_s,",
            "time to the first token, first_token_s - scheduled_s, per step and the prompt's equivalent of one,",
            first - scheduled,
            np.maximum(floor, prefill_s),
            1 + prefill_steps,
        ),
    ]


def check_request_times(
    frame: pd.DataFrame,
    usable: BoolArray,
    configuration: ServingConfiguration,
    source: Path,
    settings: ValidationSettings = SETTINGS,
) -> None:
    """Refuse a file of requests whose times cannot be seconds, judged by every span whose columns are known.

    Between first and last token lies one step per token, or per `most_tokens_per_step` tokens; from scheduling to the first token
    lies one step at least, and the FLOPs of the computed prompt tokens at peak; from scheduling to the end lie both. The waits before
    are not judged: an idle engine schedules within microseconds, an overloaded one after minutes. A file with these alone is
    accepted in any unit.

    Raises
    ------
    InputError
        If most requests are faster than the hardware allows, or the typical one is far too slow.
    """
    floor = weight_loading_floor_s(configuration)
    for span in _request_spans(frame, configuration, settings):
        known = usable & np.isfinite(span.time_s) & np.isfinite(span.least_s)
        if not known.any():
            continue
        share = float(np.mean(span.time_s[known] < settings.slack * span.least_s[known]))
        if share > settings.impossible_share:
            raise InputError(
                f"{source}: the {span.name} lies far below what {configuration.hardware.name} allows in {share:.0%} of requests: "
                f"median {_ms(float(np.median(span.time_s[known])))}, where {_ms(float(np.median(span.least_s[known])))} is the "
                f"least and reading the weights once takes {_ms(floor)}. Times must be in seconds"
            )
        counted = known & np.isfinite(span.steps)
        if counted.any():
            per_step = float(np.median(span.time_s[counted] / span.steps[counted]))
            _refuse_long(per_step, floor, span.per_step, source, settings)


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
