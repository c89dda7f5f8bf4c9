"""Tables of BATCH_SUMMARY events, CSV or Parquet: one row per step, columns named like the attributes or nearly so."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.traces.parts import unreadable
from hfdtl_bayes.traces.readers.lines import is_gzip, last_line_ended
from hfdtl_bayes.traces.readers.recording import STEP_CLOCKS, STEP_VALUES, UNKNOWN, Recording, Rejections
from hfdtl_bayes.traces.store import read_table

_NAMES: dict[str, tuple[str, ...]] = {
    "step_id": ("step_id", "id"),
    "prefill_tokens": ("batch_prefill_tokens", "prefill_tokens", "num_prefill_tokens"),
    "decode_tokens": ("batch_decode_tokens", "decode_tokens", "num_decode_tokens"),
    "prefill_requests": ("batch_num_prefill_reqs", "num_prefill_reqs", "prefill_reqs", "prefill_requests"),
    "decode_requests": ("batch_num_decode_reqs", "num_decode_reqs", "decode_reqs", "decode_requests"),
    "waiting_requests": ("queue_waiting_depth", "waiting_depth", "waiting_requests"),
    "running_requests": ("queue_running_depth", "running_depth", "running_requests"),
    "kv_usage": ("kv_usage_gpu_ratio", "usage_gpu_ratio", "kv_usage"),
    "context_tokens": ("sum_decode_ctx", "context_tokens"),
    "prompt_attention_tokens": ("sum_prefill_ti_si", "prompt_attention_tokens"),
    "prefill_attention_tokens": ("prefill_attention_tokens",),
}
_TIMES: dict[str, tuple[str, ...]] = {
    "start_ns": ("step_ts_start", "ts_start", "start"),
    "end_ns": ("step_ts_end", "ts_end", "end"),
    "duration_ns": ("step_duration", "duration"),
}
_UNITS = {"ns": 1, "us": 1000, "ms": 1_000_000, "s": 1_000_000_000}
_REQUIRED = ("step_id", "start_ns", "prefill_tokens", "decode_tokens")
_HINT = ("batch_num_prefill_reqs", "num_prefill_reqs", "batch_prefill_tokens")
_LARGEST = 2.0**62


@dataclass(frozen=True)
class _Column:
    """A column of the file: what it is here, what it is called there, and its unit in nanoseconds."""

    ours: str
    theirs: str
    unit: int = 1


def _spelt(name: object) -> str:
    return str(name).strip().lower().replace(".", "_")


def looks_like_steps(columns: Sequence[object]) -> bool:
    """Return whether columns are those of a table of steps as the events name them."""
    spelt = {_spelt(c) for c in columns}
    return bool(spelt & {"step_id", "id"}) and bool(spelt & set(_HINT))


def _columns(frame: pd.DataFrame, path: Path) -> dict[str, _Column]:
    spelt = {_spelt(c): str(c) for c in frame.columns}
    found: dict[str, _Column] = {}
    for ours, names in _NAMES.items():
        for name in names:
            if name in spelt:
                found[ours] = _Column(ours, spelt[name])
                break
    for ours, names in _TIMES.items():
        for name, unit in ((f"{n}_{u}", u) for n in names for u in _UNITS):
            if name in spelt:
                found[ours] = _Column(ours, spelt[name], _UNITS[unit])
                break
    missing = [name for name in _REQUIRED if name not in found]
    if missing:
        accepted = {**_NAMES, **{k: tuple(f"{n}_ns|us|ms|s" for n in v) for k, v in _TIMES.items()}}
        raise InputError(
            f"{path}: no column for {', '.join(f'{m} ({" or ".join(accepted[m])})' for m in missing)}; found "
            f"{', '.join(map(str, frame.columns))}. Dots and underscores in names are one"
        )
    return found


def _numbers(frame: pd.DataFrame, column: _Column) -> pd.Series:
    given = frame[column.theirs]
    if pd.api.types.is_integer_dtype(given.dtype) and not given.isna().any():
        return given.astype("int64")
    return pd.to_numeric(given, errors="coerce")


def _clock(values: pd.Series, unit: int) -> np.ndarray:
    """Return nanoseconds; whole numbers stay exact, others are read to the microsecond or better."""
    if values.dtype == np.int64:
        return values.to_numpy() * unit
    scaled = np.rint(values.to_numpy(dtype=float) * unit)
    return np.where(np.isfinite(scaled) & (np.abs(scaled) < _LARGEST), scaled, float(UNKNOWN)).astype(np.int64)


def read_batch_summary(paths: Sequence[Path]) -> Recording:
    """Read tables of steps; several are parts of one recording, in any order.

    Set aside are rows without a whole step number, a start or token counts, with negative values, and step numbers that occur before.

    Raises
    ------
    InputError
        If a file is no table, lacks a column, or no row holds.
    MissingInputError
        If a file does not exist.
    """
    rejections = Rejections()
    parts = [_part(path, rejections) for path in paths]
    steps = pd.concat(parts, ignore_index=True).sort_values("step_id", kind="stable", ignore_index=True)
    again = steps["step_id"].duplicated().to_numpy()
    for step, file, line in zip(*(steps.loc[again, c].tolist() for c in ("step_id", "_file", "_line")), strict=True):
        rejections.add(Path(file), line, "step_id occurs before", what=f"step {step}")
    steps = steps[~again]
    if steps.empty:
        raise InputError("\n  ".join([f"{', '.join(map(str, paths))}: no step holds", *rejections.lines()]))
    return Recording(
        "batch-summary",
        tuple(paths),
        steps=steps[[*STEP_CLOCKS, *STEP_VALUES]].reset_index(drop=True),
        rejections=rejections,
    )


def _gzip_csv(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path, compression="gzip", low_memory=False)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise unreadable(path, error) from None


def _part(path: Path, rejections: Rejections) -> pd.DataFrame:
    text = is_gzip(path) or path.suffix.lower() == ".csv"
    frame = _gzip_csv(path) if is_gzip(path) else read_table(path)
    columns = _columns(frame, path)
    n = len(frame)
    found: dict[str, np.ndarray] = {}
    bad: list[tuple[str, np.ndarray]] = []
    for name in STEP_CLOCKS:
        if name not in columns:
            found[name] = np.full(n, UNKNOWN)
            continue
        values = _numbers(frame, columns[name])
        found[name] = _clock(values, columns[name].unit)
        theirs = columns[name].theirs
        if name in _REQUIRED:
            bad.append((f"{theirs} is missing or not a number", found[name] == UNKNOWN))
        bad.append((f"{theirs} is negative", (found[name] < 0) & (found[name] != UNKNOWN)))
        if name == "step_id":
            bad.append(
                (f"{theirs} is not a whole number", ~np.isin(values.to_numpy(dtype=float) % 1, [0.0]) & (found[name] != UNKNOWN))
            )
    both = (found["start_ns"] != UNKNOWN) & (found["end_ns"] != UNKNOWN)
    bad.append(("the step ends before it starts", both & (found["end_ns"] < found["start_ns"])))
    for name in STEP_VALUES:
        numbers = _numbers(frame, columns[name]).to_numpy(dtype=float) if name in columns else np.full(n, np.nan)
        found[name] = numbers
        if name in columns:
            with np.errstate(invalid="ignore"):
                bad.append((f"{columns[name].theirs} is negative", numbers < 0))
            if name in _REQUIRED:
                bad.append((f"{columns[name].theirs} is missing or not a number", ~np.isfinite(numbers)))
    if text and not is_gzip(path) and not last_line_ended(path):
        # A number that was cut is a number still.
        bad.insert(0, ("the last line is without its end: the file was cut short", np.arange(n) == n - 1))
    out = np.zeros(n, dtype=bool)
    # The first line of a CSV names the columns.
    first = 2 if text else 1
    for reason, mask in bad:
        for row in np.flatnonzero(mask & ~out):
            what = f"step {found['step_id'][row]}" if found["step_id"][row] != UNKNOWN else ""
            rejections.add(path, int(row) + first, reason, what=what, content=",".join(map(str, frame.iloc[row].tolist())))
        out |= mask
    kept = pd.DataFrame({name: values[~out] for name, values in found.items()})
    return kept.assign(_file=str(path), _line=np.flatnonzero(~out) + first)
