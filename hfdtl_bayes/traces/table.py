"""A validated trace table, and the validation: every problem is collected, counted and shown once per file."""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from hfdtl_bayes.configuration import ServingConfiguration, prefill_floor_s_per_token, weight_loading_floor_s
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.traces.schema import REQUEST_SCHEMA, STEP_SCHEMA, Column


@dataclass(frozen=True)
class ValidationSettings:
    """Limits of the validation, each with its reason."""

    impossible_share: float = 0.5
    """A file is refused as having a wrong unit when more than this share of its rows beats the hardware: noise and
    clock jitter explain a few such rows, never half of them."""
    slack: float = 0.5
    """A row counts as impossible below this fraction of the physical floor: peak figures of CPUs and caches are
    only known to about a factor of two."""
    longest_median_step_s: float = 20.0
    """A median step above this is taken for milliseconds given as seconds: a 15 ms step becomes 15 s, and no
    serving engine has a median cycle of 20 s."""
    slowest_floor_ratio: float = 300.0
    """The same for small models: a median this many times the weight-loading floor is a wrong unit, unless it is
    below `shortest_suspect_s`."""
    shortest_suspect_s: float = 1.0
    """A median step of less than a second is never called too long, because host overheads dominate small models."""
    rows_named: int = 5
    """Row numbers quoted per problem in messages."""


SETTINGS = ValidationSettings()


@dataclass(frozen=True)
class Problem:
    """One kind of problem in one file: what, how many rows, and the first few row numbers."""

    message: str
    count: int
    rows: tuple[int, ...]

    def __str__(self) -> str:
        """Return one line for a person."""
        rows = ", ".join(map(str, self.rows)) + (", ..." if self.count > len(self.rows) else "")
        return f"{self.count} row(s): {self.message} (row {rows})"


@dataclass(frozen=True)
class TraceTable:
    """The valid rows of one trace file and everything that was set aside.

    Attributes
    ----------
    frame : DataFrame
        Valid rows, schema columns first where known or derivable, other columns kept; index 0..n-1.
    rejected : DataFrame
        Rejected rows as found, with their row number in the file (`row`, from 0) and the `reason`.
    problems : tuple of Problem
    derived : tuple of str
        Columns that were derived, with the formula.
    source : Path
    """

    frame: pd.DataFrame
    rejected: pd.DataFrame
    problems: tuple[Problem, ...]
    derived: tuple[str, ...]
    source: Path

    @property
    def row_numbers(self) -> np.ndarray:
        """Row numbers in the file, from 0, of the accepted rows."""
        every = np.arange(len(self.frame) + len(self.rejected))
        return np.setdiff1d(every, self.rejected["row"].to_numpy()) if len(self.rejected) else every

    def summary(self) -> str:
        """Return what was read, derived and rejected, for a person."""
        lines = [f"{self.source}: {len(self.frame)} rows accepted, {len(self.rejected)} rejected"]
        lines += [f"  rejected {p}" for p in self.problems]
        lines += [f"  derived {d}" for d in self.derived]
        return "\n".join(lines)

    def write_rejected(self, folder: str | os.PathLike[str]) -> Path | None:
        """Write the rejected rows to ``<folder>/<table>.rejected.csv`` atomically; None if there are none."""
        if self.rejected.empty:
            return None
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{self.source.parent.name}.{self.source.stem}.rejected.csv"
        part = target.with_suffix(".part")
        self.rejected.to_csv(part, index=False)
        part.replace(target)
        return target


def _require_columns(frame: pd.DataFrame, schema: Sequence[Column], source: Path, optional: Sequence[str] = ()) -> None:
    missing = [c for c in schema if c.required and c.name not in frame.columns and c.name not in optional]
    if not missing:
        return
    found = [str(c) for c in frame.columns]
    parts = []
    for column in missing:
        near = difflib.get_close_matches(column.name, found, n=1, cutoff=0.6)
        parts.append(f"{column.name} [{column.unit}]" + (f" (rename {near[0]}?)" if near else ""))
    raise InputError(f"{source}: missing required column(s) {', '.join(parts)}; found {', '.join(found)}. Times are in seconds")


def _convert(frame: pd.DataFrame, schema: Sequence[Column], source: Path) -> pd.DataFrame:
    frame = frame.reset_index(drop=True).copy()
    for column in schema:
        if column.name not in frame.columns:
            continue
        if column.dtype == "str":
            frame[column.name] = frame[column.name].astype(str)
            continue
        numbers = pd.to_numeric(frame[column.name], errors="coerce").astype("float64")
        text = numbers.isna() & frame[column.name].notna()
        if text.all() and len(frame):
            raise InputError(
                f"{source}: column {column.name} holds no numbers, found for example "
                f"{frame[column.name].iloc[0]!r}; accepted is a number in {column.unit}"
            )
        frame[column.name] = numbers
    return frame


def _range_problems(frame: pd.DataFrame, schema: Sequence[Column]) -> list[tuple[str, np.ndarray]]:
    bad: list[tuple[str, np.ndarray]] = []
    for column in schema:
        if column.name not in frame.columns or column.dtype == "str":
            continue
        values = frame[column.name].to_numpy(dtype=float)
        absent = np.isnan(values) if column.required else np.zeros(len(values), dtype=bool)
        bad.append((f"{column.name} is missing or not a number", absent))
        bad.append((f"{column.name} is infinite", np.isinf(values)))
        with np.errstate(invalid="ignore"):
            below = values <= column.minimum if column.exclusive_minimum else values < column.minimum
            above = values > column.maximum
        if np.isfinite(column.minimum):
            limit = "not above" if column.exclusive_minimum else "below"
            bad.append((f"{column.name} is {limit} {column.minimum:g} {column.unit}", below & np.isfinite(values)))
        if np.isfinite(column.maximum):
            bad.append((f"{column.name} is above {column.maximum:g} {column.unit}", above & np.isfinite(values)))
    return bad


def _assemble(
    original: pd.DataFrame,
    frame: pd.DataFrame,
    bad: list[tuple[str, np.ndarray]],
    derived: Sequence[str],
    schema: Sequence[Column],
    source: Path,
) -> TraceTable:
    reason = np.full(len(frame), "", dtype=object)
    problems = []
    for message, mask in bad:
        mask = np.asarray(mask, dtype=bool)
        if mask.any():
            rows = np.flatnonzero(mask)
            problems.append(Problem(message, len(rows), tuple(int(r) for r in rows[: SETTINGS.rows_named])))
            reason[mask] = [f"{r}; {message}" if r else message for r in reason[mask]]
    out = reason != ""
    if out.all():
        listing = "\n  - ".join(str(p) for p in problems)
        raise InputError(f"{source}: every row was rejected:\n  - {listing}")
    rejected = original.reset_index(drop=True)[out].copy()
    rejected.insert(0, "reason", reason[out])
    rejected.insert(0, "row", np.flatnonzero(out))
    order = [c.name for c in schema if c.name in frame.columns]
    order += [c for c in frame.columns if c not in order]
    kept = frame.loc[~out, order].reset_index(drop=True)
    return TraceTable(kept, rejected.reset_index(drop=True), tuple(problems), tuple(derived), source)


def _derive_steps(frame: pd.DataFrame, configuration: ServingConfiguration) -> list[str]:
    derived: list[str] = []
    formulas = {c.name: c.derivation for c in STEP_SCHEMA}

    def put(name: str, values: pd.Series | np.ndarray) -> None:
        frame[name] = values
        derived.append(f"{name} = {formulas[name]}")

    have = set(frame.columns)
    if "prefill_requests" not in have:
        put("prefill_requests", (frame["prefill_tokens"] > 0).astype(float))
    if "decode_requests" not in have:
        put("decode_requests", frame["decode_tokens"])
    if "prefill_attention_tokens" not in have:
        requests = frame["prefill_requests"].clip(lower=1)
        put("prefill_attention_tokens", frame["prefill_tokens"] ** 2 / (2 * requests))
    capacity = configuration.engine.kv_capacity_tokens
    if "context_tokens" not in have and "kv_usage" in have:
        put("context_tokens", frame["kv_usage"] * capacity)
    elif "kv_usage" not in have and "context_tokens" in have:
        put("kv_usage", (frame["context_tokens"] / capacity).clip(upper=1.0))
    if "running_requests" not in have:
        put("running_requests", frame["prefill_requests"] + frame["decode_requests"])
    if "regime" not in have:
        put("regime", np.full(len(frame), "all", dtype=object))
    return derived


def _check_units(frame: pd.DataFrame, configuration: ServingConfiguration, source: Path) -> None:
    """Refuse a file whose step times cannot be seconds on this hardware."""
    time = frame["step_time_s"].to_numpy(dtype=float)
    usable = np.isfinite(time) & (time > 0)
    if not usable.any():
        return
    time = time[usable]
    floor = weight_loading_floor_s(configuration)
    share = float(np.mean(time < SETTINGS.slack * floor))
    if share > SETTINGS.impossible_share:
        raise InputError(
            f"{source}: step_time_s lies below the time to read the weights once ({floor * 1e3:.3g} ms on "
            f"{configuration.hardware.name}, tp {configuration.engine.tensor_parallel}) in {share:.0%} of rows (median "
            f"{np.median(time) * 1e3:.3g} ms). Either the unit is not seconds, or this is vLLM's step.duration_us, which "
            "times only the scheduler. Give the engine's cycle: the start-to-start time of consecutive busy steps"
        )
    prefill = frame["prefill_tokens"].to_numpy(dtype=float)[usable]
    heavy = prefill >= 128
    if heavy.sum() >= 5:
        fastest = prefill_floor_s_per_token(configuration) * prefill[heavy]
        share = float(np.mean(time[heavy] < SETTINGS.slack * fastest))
        if share > SETTINGS.impossible_share:
            raise InputError(
                f"{source}: prefill is faster than the peak of {configuration.hardware.name} in {share:.0%} of the steps "
                f"with 128 or more prefill tokens (median {np.median(prefill[heavy] / time[heavy]):.3g} token/s). Check "
                "that step_time_s is in seconds and prefill_tokens counts computed, not cached, tokens"
            )
    median = float(np.median(time))
    ratio = median / floor
    if median > SETTINGS.longest_median_step_s or (median > SETTINGS.shortest_suspect_s and ratio > SETTINGS.slowest_floor_ratio):
        raise InputError(
            f"{source}: the median step_time_s is {median:.3g} s, {ratio:.3g} times the time to read the weights. These "
            "look like milliseconds or microseconds given as seconds; divide by 1e3 or 1e6"
        )


def validate_steps(
    frame: pd.DataFrame,
    configuration: ServingConfiguration,
    source: str | os.PathLike[str] = "steps",
    *,
    observed: bool = True,
) -> TraceTable:
    """Validate engine steps.

    Parameters
    ----------
    frame : DataFrame
        Rows in recording order, columns as `STEP_SCHEMA`.
    configuration : ServingConfiguration
        For the physical floors and derived columns.
    source : path
        What to call the table in messages.
    observed : bool
        False for batches to predict: `step_time_s` and `step_id` may be absent, and step times are not judged.

    Returns
    -------
    TraceTable

    Raises
    ------
    InputError
        If the file as a whole cannot be used: empty, a required column missing, a wrong unit, or no valid row.
    """
    source = Path(source)
    if frame.empty:
        raise InputError(f"{source}: no rows; a trace needs at least one engine step")
    _require_columns(frame, STEP_SCHEMA, source, () if observed else ("step_id", "step_time_s"))
    schema = STEP_SCHEMA if observed else tuple(c for c in STEP_SCHEMA if c.name != "step_time_s")
    converted = _convert(frame, schema, source)
    if "step_id" not in converted.columns:
        converted["step_id"] = np.arange(len(converted), dtype=float)
    derived = _derive_steps(converted, configuration)
    bad = _range_problems(converted, schema)
    tokens = converted["prefill_tokens"] + converted["decode_tokens"]
    bad.append(("no token was computed (a flush step)", (tokens == 0).to_numpy()))
    ids = converted["step_id"]
    duplicate = ids.duplicated().to_numpy()
    bad.append(("step_id occurs before in the file", duplicate))
    highest = ids.cummax().shift(fill_value=-np.inf)
    bad.append(("step_id decreases", ((ids < highest) & ~duplicate).to_numpy()))
    already = np.any([mask for _, mask in bad], axis=0)
    if observed and not already.all():
        _check_units(converted[~already], configuration, source)
    return _assemble(frame, converted, bad, derived, schema, source)


def validate_requests(
    frame: pd.DataFrame,
    configuration: ServingConfiguration,
    source: str | os.PathLike[str] = "requests",
    *,
    observed: bool = True,
) -> TraceTable:
    """Validate request journeys; parameters, result and errors as `validate_steps`.

    Requests that did not finish are kept. A request scheduled before it was queued, or queued before it arrived, by
    more than a millisecond is rejected: its clocks do not agree. With `observed` false, for requests to predict, the clocks
    and `request_id` may be absent and the clocks are not judged.
    """
    source = Path(source)
    if frame.empty:
        raise InputError(f"{source}: no rows; a request table needs at least one request")
    clocks = ("arrival_s", "queued_s", "scheduled_s", "first_token_s", "finished_s")
    _require_columns(frame, REQUEST_SCHEMA, source, () if observed else ("request_id", *clocks))
    schema = REQUEST_SCHEMA if observed else tuple(c for c in REQUEST_SCHEMA if c.name not in clocks)
    converted = _convert(frame, schema, source)
    derived = []
    if "regime" not in converted.columns:
        converted["regime"] = "all"
        derived.append("regime = 'all'")
    if "request_id" not in converted.columns:
        converted["request_id"] = np.arange(len(converted)).astype(str)
    bad = _range_problems(converted, schema)
    tolerance = 1e-3
    for earlier, later in itertools.pairwise(clocks) if observed else ():
        if earlier in converted.columns and later in converted.columns:
            bad.append((f"{later} is before {earlier}", (converted[later] < converted[earlier] - tolerance).to_numpy()))
    bad.append(("request_id occurs before in the file", converted["request_id"].duplicated().to_numpy()))
    return _assemble(frame, converted, bad, derived, schema, source)
