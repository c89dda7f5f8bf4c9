"""Validation of trace tables: every problem is collected, counted and shown once per file; no row is lost silently."""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.traces.plausibility import (
    ROW_BY_ROW,
    SETTINGS,
    BoolArray,
    check_request_times,
    check_share_of_one,
    impossible_steps,
)
from hfdtl_bayes.traces.schema import REQUEST_SCHEMA, STEP_SCHEMA, Column
from hfdtl_bayes.traces.table import Problem, TraceTable, problem

Rejections = list[tuple[str, BoolArray]]

_CLOCKS = ("arrival_s", "queued_s", "scheduled_s", "first_token_s", "finished_s")
LARGEST_ID = 2**62  # beyond, int64 is about to overflow and float64 long since counts in hundreds


def _require_columns(frame: pd.DataFrame, schema: Sequence[Column], source: Path, optional: Sequence[str] = ()) -> None:
    found = [str(c) for c in frame.columns]
    repeated = sorted({c for c in found if found.count(c) > 1})
    if repeated:
        raise InputError(f"{source}: column(s) {', '.join(repeated)} occur twice; keep one of each")
    missing = [c for c in schema if c.required and c.name not in found and c.name not in optional]
    if not missing:
        return
    free = [name for name in found if name not in {c.name for c in schema}]
    parts = []
    for column in missing:
        near = difflib.get_close_matches(column.name, free, n=1, cutoff=0.6)
        parts.append(f"{column.name} [{column.unit}]" + (f" (rename {near[0]}?)" if near else ""))
    raise InputError(f"{source}: missing required column(s) {', '.join(parts)}; found {', '.join(found)}. Times are in seconds")


def _numbers(column: pd.Series, accepted: str, source: Path) -> pd.Series:
    """Return a column as float64, not-a-number where there is no number; whole int64 columns stay exact."""
    kind = column.dtype
    if pd.api.types.is_bool_dtype(kind) or pd.api.types.is_datetime64_any_dtype(kind) or pd.api.types.is_timedelta64_dtype(kind):
        raise InputError(f"{source}: column {column.name} is of type {kind}; accepted is {accepted}")
    if pd.api.types.is_signed_integer_dtype(kind) and not column.isna().any():
        return column.astype("int64")
    if not pd.api.types.is_numeric_dtype(kind):
        scalar = column.map(lambda v: v if isinstance(v, str | int | float) or pd.api.types.is_number(v) else None)
        column = pd.to_numeric(scalar.astype(object).where(scalar.notna(), None), errors="coerce")
    return column.astype("float64")


def _convert(
    frame: pd.DataFrame, schema: Sequence[Column], source: Path, *, whole: bool = True
) -> tuple[pd.DataFrame, Rejections]:
    """Convert the columns of the schema; return with them the rows that hold text where a number is accepted."""
    frame = frame.reset_index(drop=True).copy()
    frame.columns = pd.Index([str(c) for c in frame.columns])
    rejections: Rejections = []
    for column in schema:
        if column.name not in frame.columns:
            continue
        given = frame[column.name]
        absent = given.isna().to_numpy()
        if whole and not column.required and absent.all():
            frame = frame.drop(columns=column.name)  # an empty column is an absent one
            continue
        if column.dtype == "str":
            frame[column.name] = given.astype(object).where(~absent, "").astype(str)
            if column.required:
                rejections.append((f"{column.name} is missing", absent))
            continue
        accepted = f"a number in {column.unit}" if column.unit != "1" else "a number"
        numbers = _numbers(given, accepted, source)
        text = numbers.isna().to_numpy() & ~absent
        if whole and text.all():
            raise InputError(
                f"{source}: column {column.name} holds no numbers, found for example {given.iloc[0]!r}; accepted is {accepted}"
            )
        rejections.append((f"{column.name} is not a number", text))
        frame[column.name] = numbers
    return frame, rejections


def _range_rejections(frame: pd.DataFrame, schema: Sequence[Column]) -> Rejections:
    bad: Rejections = []
    for column in schema:
        if column.name not in frame.columns or column.dtype == "str":
            continue
        values = frame[column.name].to_numpy(dtype=float)
        finite, unit = np.isfinite(values), "" if column.unit == "1" else f" {column.unit}"
        if not column.may_be_missing:
            bad.append((f"{column.name} is missing", np.isnan(values)))
        bad.append((f"{column.name} is infinite", np.isinf(values)))
        with np.errstate(invalid="ignore"):
            below = values <= column.minimum if column.exclusive_minimum else values < column.minimum
            fraction = np.mod(values, 1.0) != 0
        if np.isfinite(column.minimum):
            limit = "not above" if column.exclusive_minimum else "below"
            bad.append((f"{column.name} is {limit} {column.minimum:g}{unit}", below & finite))
        if np.isfinite(column.maximum):
            bad.append((f"{column.name} is above {column.maximum:g}{unit}", (values > column.maximum) & finite))
        if column.whole:
            bad.append((f"{column.name} is not a whole number", fraction & finite))
    return bad


def _union(rejections: Rejections, rows: int) -> BoolArray:
    return np.any([mask for _, mask in rejections], axis=0) if rejections else np.zeros(rows, dtype=bool)


def _assemble(
    original: pd.DataFrame,
    frame: pd.DataFrame,
    rejections: Rejections,
    derived: Sequence[str],
    notes: Rejections,
    schema: Sequence[Column],
    source: Path,
    *,
    whole: bool = True,
) -> TraceTable:
    reason = np.full(len(frame), "", dtype=object)
    problems: dict[str, Problem] = {}
    for message, mask in rejections:
        if mask.any():
            problems[message] = problem(message, mask)
            reason[mask] = [f"{r}; {message}" if r else message for r in reason[mask]]
    out = reason != ""
    if whole and out.all():
        listing = "\n  - ".join(str(p) for p in problems.values())
        raise InputError(f"{source}: every row was rejected:\n  - {listing}")
    rejected = original.reset_index(drop=True)[out].copy()
    rejected.columns = pd.Index([f"{c}_in_file" if c in {"row", "reason"} else str(c) for c in rejected.columns])
    rejected.insert(0, "reason", reason[out])
    rejected.insert(0, "row", np.flatnonzero(out))
    order = [c.name for c in schema if c.name in frame.columns]
    order += [c for c in frame.columns if c not in order]
    kept = frame.loc[~out, order].reset_index(drop=True)
    for column in schema:
        if column.name in kept.columns and column.dtype != "str":
            kept[column.name] = kept[column.name].astype(column.dtype)
    shown = tuple(problem(message, mask & ~out) for message, mask in notes if (mask & ~out).any())
    return TraceTable(kept, rejected.reset_index(drop=True), tuple(problems.values()), tuple(derived), source, shown)


class _Deriver:
    """Fills absent columns, and gaps in present ones, by the formula of the schema, and remembers what it did."""

    def __init__(self, frame: pd.DataFrame, schema: Sequence[Column]) -> None:
        self.frame = frame
        self.formulas = {c.name: c.derivation for c in schema}
        self.derived: list[str] = []

    def has(self, name: str) -> bool:
        return name in self.frame.columns

    def fill(self, name: str, values: pd.Series) -> None:
        if not self.has(name):
            self.frame[name] = values
            self.derived.append(f"{name} = {self.formulas[name]}")
            return
        column = self.frame[name]
        gaps = column == "" if isinstance(values.iloc[0], str) else column.isna() & values.notna()
        if gaps.any():
            self.frame[name] = column.where(~gaps, values)
            self.derived.append(f"{name} = {self.formulas[name]} (in {int(gaps.sum())} of {len(gaps)} rows)")


def derive_steps(frame: pd.DataFrame, configuration: ServingConfiguration) -> list[str]:
    """Fill absent columns of steps, and gaps in present ones, in place; return what was done."""
    derive = _Deriver(frame, STEP_SCHEMA)
    derive.fill("prefill_requests", (frame["prefill_tokens"] > 0).astype(float))
    derive.fill("decode_requests", frame["decode_tokens"].astype(float))
    requests = frame["prefill_requests"].clip(lower=1)
    derive.fill("prefill_attention_tokens", frame["prefill_tokens"].astype(float) ** 2 / (2 * requests))
    capacity = configuration.engine.kv_capacity_tokens
    given_usage = frame["kv_usage"] if derive.has("kv_usage") else None
    if derive.has("context_tokens"):
        derive.fill("kv_usage", (frame["context_tokens"] / capacity).clip(upper=1.0))
    if given_usage is not None:
        derive.fill("context_tokens", given_usage * capacity)
    derive.fill("running_requests", frame["prefill_requests"] + frame["decode_requests"])
    derive.fill("regime", pd.Series("all", index=frame.index))
    return derive.derived


def _composition_rejections(frame: pd.DataFrame, configuration: ServingConfiguration) -> Rejections:
    """Find batches no engine runs: no token, more tokens than the budget, fewer tokens than requests, tokens of nobody."""
    budget = configuration.engine.max_num_batched_tokens
    tokens = frame["prefill_tokens"] + frame["decode_tokens"]
    bad = [
        ("no token was computed (a flush step)", tokens == 0),
        (
            f"more tokens than max_num_batched_tokens, {budget}: a whole prompt was credited to its last chunk, as vLLM does "
            "without --enable-logging-iteration-details",
            tokens > budget,
        ),
    ]
    for phase in ("prefill", "decode"):
        count, requests = frame[f"{phase}_tokens"], frame[f"{phase}_requests"]
        bad.append((f"{phase}_tokens without a request: {phase}_requests is 0", (count > 0) & (requests == 0)))
        bad.append((f"fewer {phase}_tokens than {phase}_requests: each computes one at least", count < requests))
    return [(message, mask.to_numpy(dtype=bool)) for message, mask in bad]


def _id_rejections(ids: pd.Series, fine: BoolArray, after: int | None = None) -> Rejections:
    """Find step numbers that occur before or decrease, among the rows that are otherwise fine; all are to come after `after`."""
    values = ids[fine].to_numpy()
    duplicate, decreasing = np.zeros(len(ids), dtype=bool), np.zeros(len(ids), dtype=bool)
    if len(values):
        before = values[0] - 1 if after is None else after
        highest = np.maximum.accumulate(np.concatenate([[before], values]))[:-1]
        again = pd.Series(values).duplicated().to_numpy() | (values == before)
        duplicate[fine], decreasing[fine] = again, (values < highest) & ~again
    return [("step_id occurs before in the file", duplicate), ("step_id decreases", decreasing)]


def validate_steps(
    frame: pd.DataFrame,
    configuration: ServingConfiguration,
    source: str | os.PathLike[str] = "steps",
    *,
    observed: bool = True,
    whole: bool = True,
    after: int | None = None,
) -> TraceTable:
    """Validate engine steps.

    Rejected, row by row, are values outside the schema, batches no engine runs, steps faster than the hardware, and
    step numbers that repeat or decrease. Accepted with a note are decoding steps with no context: engines report the KV
    cache after the step, when the last request has left it.

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
    whole : bool
        False for a batch of a larger table: rows are judged one by one and all may be rejected, for what is wrong with most rows of
        a batch may be right for most of the table.
    after : int, optional
        Highest step number of the batches before.

    Returns
    -------
    TraceTable

    Raises
    ------
    InputError
        If the file as a whole cannot be used: empty, a required column missing or twice, a wrong unit, no valid row.
    """
    source = Path(source)
    if frame.empty:
        raise InputError(f"{source}: no rows; a trace needs at least one engine step")
    _require_columns(frame, STEP_SCHEMA, source, () if observed else ("step_id", "step_time_s"))
    schema = STEP_SCHEMA if observed else tuple(c for c in STEP_SCHEMA if c.name != "step_time_s")
    converted, rejections = _convert(frame, schema, source, whole=whole)
    if "step_id" not in converted.columns:
        converted["step_id"] = np.arange(len(converted))
    if whole:
        check_share_of_one(converted, "kv_usage", source)
    derived = derive_steps(converted, configuration)
    rejections += _range_rejections(converted, schema)
    rejections += _composition_rejections(converted, configuration)
    rejections.append(("step_id is too large", (converted["step_id"] > LARGEST_ID).to_numpy()))
    if observed:
        settings = SETTINGS if whole else ROW_BY_ROW
        rejections += impossible_steps(converted, ~_union(rejections, len(converted)), configuration, source, settings)
    rejections += _id_rejections(converted["step_id"], ~_union(rejections, len(converted)), after)
    notes: Rejections = []
    if "context_tokens" in converted.columns:
        bare = (converted["decode_tokens"] > 0) & (converted["context_tokens"] == 0)
        notes.append(("decode_tokens with context_tokens 0: the KV cache was read after the step", bare.to_numpy()))
    return _assemble(frame, converted, rejections, derived, notes, schema, source, whole=whole)


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
    _require_columns(frame, REQUEST_SCHEMA, source, () if observed else ("request_id", *_CLOCKS))
    schema = REQUEST_SCHEMA if observed else tuple(c for c in REQUEST_SCHEMA if c.name not in _CLOCKS)
    converted, rejections = _convert(frame, schema, source)
    if "request_id" not in converted.columns:
        converted["request_id"] = np.arange(len(converted)).astype(str)
    check_share_of_one(converted, "kv_usage", source)
    derive = _Deriver(converted, REQUEST_SCHEMA)
    derive.fill("regime", pd.Series("all", index=converted.index))
    rejections += _range_rejections(converted, schema)
    clocks = [name for name in _CLOCKS if observed and name in converted.columns]
    for earlier, later in itertools.pairwise(clocks):
        wrong = converted[later] < converted[earlier] - SETTINGS.clock_tolerance_s
        rejections.append((f"{later} is before {earlier}", wrong.to_numpy(dtype=bool)))
    if "cached_tokens" in converted.columns:
        excess = converted["cached_tokens"] > converted["prompt_tokens"]
        rejections.append(("cached_tokens exceeds prompt_tokens", excess.to_numpy(dtype=bool)))
    fine = ~_union(rejections, len(converted))
    if observed:
        check_request_times(converted, fine, configuration, source)
    repeated = np.zeros(len(converted), dtype=bool)
    repeated[fine] = converted.loc[fine, "request_id"].duplicated().to_numpy()
    rejections.append(("request_id occurs before in the file", repeated))
    return _assemble(frame, converted, rejections, derive.derived, [], schema, source)
