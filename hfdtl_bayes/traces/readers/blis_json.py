"""JSON of BLIS: metrics of `run`, results of `replay`, reports of `calibrate`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfdtl_bayes.errors import InputError, MissingInputError
from hfdtl_bayes.traces.readers.recording import UNKNOWN, Recording, Rejections, requests_frame
from hfdtl_bayes.traces.readers.whole_numbers import request_name, whole

CALIBRATED = ("ttft", "e2e", "itl")
_LEFT = ("still_queued", "still_running", "dropped_unservable", "timed_out_requests")


@dataclass(frozen=True)
class CalibratedMetric:
    """How well BLIS reproduced one metric, as `blis calibrate` reports it.

    Attributes
    ----------
    mape : float
        Mean absolute error of single requests, a fraction (BLIS writes fractions, not per cent).
    pearson_r : float
    bias_direction, quality : str
    count : int
        Requests compared.
    mean_error : float
        |mean simulated - mean measured| / mean measured, a fraction.
    real_mean_s, sim_mean_s : float
    """

    mape: float
    pearson_r: float
    bias_direction: str
    quality: str
    count: int
    mean_error: float
    real_mean_s: float
    sim_mean_s: float


@dataclass(frozen=True)
class CalibrateReport:
    """A report of `blis calibrate`, whose exit code is 0 even where a threshold is exceeded.

    Attributes
    ----------
    source : Path
    matched, requests : int
        Pairs compared, and requests of the trace.
    metrics : dict of str to CalibratedMetric
        By "ttft", "e2e" and "itl", those that are there.
    """

    source: Path
    matched: int
    requests: int
    metrics: Mapping[str, CalibratedMetric]


def _load(path: Path) -> Any:
    if not path.exists():
        raise MissingInputError(f"no file at {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: line {error.lineno}: not JSON, {error.msg.lower()}; a file that was cut short must be written again"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def _number(data: Mapping[str, Any], name: str, least: float = 0.0) -> float:
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {'missing' if value is None else 'not a number'}")
    if value < least:
        raise ValueError(f"{name} is negative")
    return float(value)


def _nanoseconds(seconds: float) -> int:
    """Return whole nanoseconds of a time that BLIS wrote in seconds or milliseconds, from whole microseconds of its own."""
    return round(seconds * 1e6) * 1000


def _of_metrics(item: Mapping[str, Any]) -> dict[str, Any]:
    arrival = _nanoseconds(_number(item, "arrived_at"))
    ttft, e2e = _number(item, "ttft_ms"), _number(item, "e2e_ms")
    found: dict[str, Any] = {
        "request_id": str(item["requestID"]) if "requestID" in item else "",
        "arrival_ns": arrival,
        "prompt_tokens": whole(item.get("num_prefill_tokens"), "num_prefill_tokens", 1),
        "output_tokens": whole(item.get("num_decode_tokens"), "num_decode_tokens"),
    }
    if not found["request_id"]:
        raise ValueError("requestID is missing")
    if e2e > 0 and ttft > e2e + 1e-9:
        raise ValueError("ttft_ms is above e2e_ms")
    if ttft > 0:
        found["first_token_ns"] = arrival + _nanoseconds(ttft * 1e-3)
        # A request that was scheduled has a first token; 0 is then a delay, else it says that there was none.
        if "scheduling_delay_ms" in item:
            found["scheduled_ns"] = arrival + _nanoseconds(_number(item, "scheduling_delay_ms") * 1e-3)
    if e2e > 0:
        found["finished_ns"] = arrival + _nanoseconds(e2e * 1e-3)
    return found


def _collected(
    path: Path, items: Any, kind: str, of: Any, rejections: Rejections, seen: set[str], rows: list[dict[str, Any]]
) -> None:
    if not isinstance(items, list):
        raise InputError(f"{path}: {kind} is a list of requests, found {type(items).__name__}")
    for place, item in enumerate(items):
        content = json.dumps(item)
        if not isinstance(item, Mapping):
            rejections.add(path, 0, "not an object", what=f"request at place {place}", content=content)
            continue
        name = item.get("requestID", item.get("request_id", f"at place {place}"))
        try:
            found = of(item)
        except ValueError as error:
            rejections.add(path, 0, str(error), what=f"request {name}", content=content)
            continue
        if found["request_id"] in seen:
            rejections.add(path, 0, "the request occurs before", what=f"request {name}", content=content)
            continue
        seen.add(found["request_id"])
        rows.append(found)


def _refuse_none(paths: Sequence[Path], rows: list[dict[str, Any]], rejections: Rejections) -> None:
    if not rows:
        raise InputError("\n  ".join([f"{', '.join(map(str, paths))}: no request holds", *rejections.lines()]))


def read_metrics(paths: Sequence[Path]) -> Recording:
    """Read the JSON of `blis run --metrics-path`: requests, and aggregates that go to `reports`.

    Raises
    ------
    InputError
        If a file is not such JSON, or no request holds.
    MissingInputError
    """
    rejections, rows, seen, notes = Rejections(), list[dict[str, Any]](), set[str](), list[str]()
    reports: dict[str, Any] = {}
    for path in paths:
        data = _load(path)
        if not isinstance(data, Mapping) or "requests" not in data:
            raise InputError(
                f"{path}: metrics of a run hold requests; found {_kind(data)}. Was it written by blis run --metrics-path?"
            )
        _collected(path, data["requests"], "requests", _of_metrics, rejections, seen, rows)
        reports[path.name] = {k: v for k, v in data.items() if k != "requests"}
        left = {k: data[k] for k in _LEFT if isinstance(data.get(k), int) and data[k] > 0}
        completed, injected = data.get("completed_requests"), data.get("injected_requests")
        if left or (isinstance(completed, int) and isinstance(injected, int) and completed < injected):
            shown = ", ".join(f"{k} {v}" for k, v in left.items()) or "none said where they are"
            notes.append(f"{completed} of {injected} injected requests were completed ({shown}): the rest is not in this file")
    _refuse_none(paths, rows, rejections)
    return Recording(
        "blis-metrics",
        tuple(paths),
        requests=requests_frame(rows),
        rejections=rejections,
        notes=tuple(notes),
        reports=reports,
        client_side=True,
    )


def _of_results(item: Mapping[str, Any]) -> dict[str, Any]:
    ttft, e2e = whole(item.get("ttft_us"), "ttft_us"), whole(item.get("e2e_us"), "e2e_us")
    if e2e and ttft > e2e:
        raise ValueError("ttft_us is above e2e_us")
    return {
        "request_id": request_name(whole(item.get("request_id"), "request_id")),
        # Durations: the arrival is in the trace that was replayed.
        "first_token_ns": ttft * 1000 if ttft else UNKNOWN,
        "finished_ns": e2e * 1000 if e2e else UNKNOWN,
        "prompt_tokens": whole(item.get("input_tokens"), "input_tokens", 1),
        "output_tokens": whole(item.get("output_tokens"), "output_tokens"),
    }


def read_results(paths: Sequence[Path]) -> Recording:
    """Read the JSON of `blis replay --results-path`; first and last token count from each request's arrival.

    Raises
    ------
    InputError
        If a file is not such JSON, or no request holds.
    MissingInputError
    """
    rejections, rows, seen = Rejections(), list[dict[str, Any]](), set[str]()
    for path in paths:
        _collected(path, _load(path), "results of a replay", _of_results, rejections, seen, rows)
    _refuse_none(paths, rows, rejections)
    return Recording("blis-results", tuple(paths), requests=requests_frame(rows), rejections=rejections, client_side=True)


def read_calibrate_report(path: Path) -> CalibrateReport:
    """Read the JSON of `blis calibrate --report`.

    Raises
    ------
    InputError
        If it is not one; naming the metric and the field.
    MissingInputError
    """
    data = _load(path)
    metrics = data.get("metrics") if isinstance(data, Mapping) else None
    if not isinstance(metrics, Mapping) or not any(m in metrics for m in CALIBRATED):
        raise InputError(f"{path}: a report of blis calibrate holds metrics of {', '.join(CALIBRATED)}; found {_kind(data)}")
    found = {}
    for name in CALIBRATED:
        if name not in metrics:
            continue
        try:
            found[name] = _calibrated(metrics[name])
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: metrics.{name}: {error}; accepted is what blis calibrate --report writes") from None
    info = data.get("trace_info")
    info = info if isinstance(info, Mapping) else {}
    try:
        matched, requests = (whole(info.get(k, 0), f"trace_info.{k}") for k in ("matched_pairs", "num_requests"))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    return CalibrateReport(path, matched, requests, found)


def _calibrated(metric: Mapping[str, Any]) -> CalibratedMetric:
    workload, request = metric.get("workload_level"), metric.get("request_level")
    if not isinstance(workload, Mapping) or not isinstance(request, Mapping):
        raise ValueError("workload_level or request_level is missing")
    return CalibratedMetric(
        mape=_number(request, "mape"),
        pearson_r=_number(request, "pearson_r", -1.0),
        bias_direction=str(request.get("bias_direction", "")),
        quality=str(request.get("quality", "")),
        count=whole(metric.get("count", 0), "count"),
        mean_error=abs(_number(workload, "mean_percent_error", -math.inf)),
        real_mean_s=_number(workload, "real_mean") * 1e-6,
        sim_mean_s=_number(workload, "sim_mean") * 1e-6,
    )


def read_calibrate(paths: Sequence[Path]) -> Recording:
    """Read reports of `blis calibrate` as a recording without rows; see `read_calibrate_report`."""
    reports = {}
    for path in paths:
        report = read_calibrate_report(path)
        reports[path.name] = {
            "matched": report.matched,
            "requests": report.requests,
            "metrics": {name: vars(metric) for name, metric in report.metrics.items()},
        }
    return Recording("blis-calibrate", tuple(paths), reports=reports)


def _kind(data: Any) -> str:
    return (
        f"an object with {', '.join(list(map(str, data))[:8]) or 'nothing'}"
        if isinstance(data, Mapping)
        else f"a {type(data).__name__}"
    )
