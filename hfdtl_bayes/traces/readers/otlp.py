"""OTLP traces as JSON lines, plain or gzip: journeys of requests, arrivals at the API, steps of the scheduler.

A line is parsed and forgotten; what stays in memory is a few integers per step and per event of a request. A line that is cut short
or holds two that were written into each other is set aside, and what follows is read on.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic_core import from_json

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.traces.readers.journeys import Event, Kind, journeys_of
from hfdtl_bayes.traces.readers.lines import CutShortError, text_lines
from hfdtl_bayes.traces.readers.recording import STEP_VALUES, UNKNOWN, Claims, Recording, Rejections, empty_steps
from hfdtl_bayes.traces.readers.snapshots import Snapshots
from hfdtl_bayes.traces.readers.spans import request_of_span
from hfdtl_bayes.traces.readers.whole_numbers import whole

Attributes = Mapping[str, Mapping[str, Any]]

_SUMMARY = ("step.id", "step.ts_start_ns", "step.ts_end_ns", "step.duration_us", "queue.running_depth", "queue.waiting_depth",
            "batch.num_prefill_reqs", "batch.num_decode_reqs", "batch.prefill_tokens", "batch.decode_tokens")  # fmt: skip
_NEEDED = frozenset(_SUMMARY) - {"step.ts_end_ns", "step.duration_us", "queue.running_depth", "queue.waiting_depth"}
_JOURNEY = {f"journey.{k.name}": k for k in (Kind.QUEUED, Kind.SCHEDULED, Kind.FIRST_TOKEN, Kind.PREEMPTED, Kind.FINISHED)}
_API = {f"api.{k.name}": k for k in (Kind.ARRIVED, Kind.DEPARTED, Kind.ABORTED)}
_MODEL_KEYS = ("gen_ai.response.model", "gen_ai.request.model")
_WIDTH = len(_SUMMARY) + 2  # with the number of the file and the line


def _value(attribute: Mapping[str, Any]) -> Any:
    """Return the value of an attribute, whatever its type is called."""
    return next(iter(attribute.values()))


def integer(attributes: Attributes, name: str) -> int:
    """Return an attribute as a whole number from 0.

    Raises
    ------
    ValueError
        If it is missing or none; the message names it.
    """
    found = attributes.get(name)
    if found is None:
        raise ValueError(f"{name} is missing")
    return whole(_value(found), name)


def _optional(attributes: Attributes, name: str) -> int:
    return integer(attributes, name) if name in attributes else UNKNOWN


@dataclass
class _Reader:
    """Everything read so far."""

    rejections: Rejections = field(default_factory=Rejections)
    summaries: array[int] = field(default_factory=lambda: array("q"))
    kv_usage: array[float] = field(default_factory=lambda: array("d"))
    core: dict[str, list[Event]] = field(default_factory=dict)
    api: dict[str, list[Event]] = field(default_factory=dict)
    spans: list[tuple[dict[str, Any], Path, int]] = field(default_factory=list)
    snapshots: Snapshots = field(default_factory=Snapshots)
    models: dict[str, str] = field(default_factory=dict)
    path: Path = Path()
    file: int = 0
    line: int = 0

    def read(self, path: Path, file: int) -> None:
        self.path, self.file = path, file
        try:
            for self.line, raw in text_lines(path):
                try:
                    data = from_json(raw)
                except ValueError:
                    self.damaged(raw)
                else:
                    self.sound(data, raw)
        except CutShortError as error:
            self.rejections.add(path, 0, str(error))

    def sound(self, data: Any, raw: bytes | str) -> None:
        """Read an object that is whole; if it is no OTLP after all, what was read of it before stays."""
        try:
            self.document(data)
        except (ValueError, TypeError, KeyError, AttributeError, LookupError) as error:
            text = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw
            self.reject(f"not an OTLP object ({type(error).__name__}: {error})", content=text)

    def damaged(self, raw: bytes) -> None:
        """Read the whole objects of a line that is more or less than one, and set the rest aside."""
        text = raw.decode("utf-8", "replace").strip()
        decoder = json.JSONDecoder()
        while text:
            try:
                data, end = decoder.raw_decode(text)
                if not isinstance(data, dict):
                    raise ValueError("no object")
            except (ValueError, RecursionError):
                # The beginning of an object that another was written into: what follows may be whole.
                self.reject("not an OTLP object: cut short, or two lines written into each other", content=text)
                end = text.find('{"resourceSpans"', 1)
                if end < 0:
                    return
            else:
                self.sound(data, text)
            text = text[end:].lstrip(" ,\t")

    def document(self, data: Any) -> None:
        for resource in data["resourceSpans"]:
            described = resource.get("resource")
            if described:
                self.claim(described.get("attributes"))
            for scope in resource["scopeSpans"]:
                for span in scope["spans"]:
                    self.span(span)

    def claim(self, attributes: Sequence[Mapping[str, Any]] | None) -> None:
        for attribute in attributes or ():
            if attribute["key"] in _MODEL_KEYS:
                self.models.setdefault(str(_value(attribute["value"])), f"{self.path}, line {self.line}")

    def span(self, span: Mapping[str, Any]) -> None:
        events = span.get("events") or ()
        own = span.get("attributes") or ()
        request = ""
        if own:
            self.claim(own)
            request = next((str(_value(a["value"])) for a in own if a["key"] == "gen_ai.request.id"), "")
        for event in events:
            name = event["name"]
            attributes = {a["key"]: a["value"] for a in event.get("attributes") or ()}
            if name == "step.BATCH_SUMMARY":
                self.guarded(self.summary, attributes, "step.id")
            elif name in _JOURNEY:
                self.request_event(self.core, _JOURNEY[name], request, attributes)
            elif name in _API:
                self.request_event(self.api, _API[name], request, attributes)
            elif name == "step.REQUEST_SNAPSHOT":
                self.guarded(self.snapshots.add, attributes, "step.id")
        if own and not events and span.get("name") == "llm_request":
            self.stock(span, own, request)

    def guarded(self, read: Callable[[Attributes], None], attributes: Attributes, key: str) -> None:
        try:
            read(attributes)
        except (ValueError, TypeError, StopIteration, AttributeError) as error:
            named = attributes.get(key)
            what = f"step {_value(named)}" if named else ""
            self.reject(str(error) or "not an event of a step", what=what, content=str(attributes))

    def summary(self, attributes: Attributes) -> None:
        try:
            row = [int(attributes[name]["intValue"]) for name in _SUMMARY]
            slow = min(row) < 0 or max(row) >= 2**62
        except (KeyError, ValueError, TypeError):
            slow = True
        if slow:
            row = [(integer if name in _NEEDED else _optional)(attributes, name) for name in _SUMMARY]
        if row[2] != UNKNOWN and row[2] < row[1]:
            raise ValueError("step.ts_end_ns is before step.ts_start_ns")
        usage = attributes.get("kv.usage_gpu_ratio")
        share = float(_value(usage)) if usage else np.nan
        if not (0 <= share <= 1 or np.isnan(share)):
            raise ValueError("kv.usage_gpu_ratio is not between 0 and 1")
        self.summaries.extend((*row, self.file, self.line))
        self.kv_usage.append(share)

    def request_event(self, into: dict[str, list[Event]], kind: Kind, request: str, attributes: Attributes) -> None:
        try:
            if not request:
                raise ValueError("gen_ai.request.id is missing")
            into.setdefault(request, []).append(_event(kind, attributes, self.file, self.line))
        except (ValueError, TypeError, StopIteration, AttributeError) as error:
            self.reject(str(error), what=f"request {request or 'unknown'} {kind.name}", content=str(attributes))

    def stock(self, span: Mapping[str, Any], own: Sequence[Mapping[str, Any]], request: str) -> None:
        attributes = {a["key"]: _value(a["value"]) for a in own}
        if "gen_ai.latency.e2e" not in attributes:
            return
        try:
            self.spans.append((request_of_span(request, span, attributes), self.path, self.line))
        except ValueError as error:
            self.reject(str(error), what=f"request {request or 'unknown'}", content=str(attributes))

    def reject(self, reason: str, *, what: str = "", content: str = "") -> None:
        self.rejections.add(self.path, self.line, reason, what=what, content=content)


def _event(kind: Kind, attributes: Attributes, file: int, line: int) -> Event:
    if "ts.monotonic_ns" in attributes:
        at = integer(attributes, "ts.monotonic_ns")
    else:
        stamp = attributes.get("ts.monotonic") or attributes.get("event.ts.monotonic")
        if stamp is None:
            raise ValueError("ts.monotonic is missing")
        seconds = float(_value(stamp))
        if not 0 <= seconds < 9e9:
            raise ValueError("ts.monotonic is not a number of seconds from 0")
        at = round(seconds * 1e9)
    status = attributes.get("finish.status")
    return Event(
        at,
        kind,
        _optional(attributes, "scheduler.step"),
        _optional(attributes, "prefill.done_tokens"),
        _optional(attributes, "prefill.total_tokens"),
        _optional(attributes, "decode.done_tokens"),
        _optional(attributes, "num_preemptions"),
        str(_value(status)) if status else "",
        file,
        line,
    )


def _steps(reader: _Reader, paths: Sequence[Path]) -> pd.DataFrame:
    """Return the steps in the order of their numbers; a number that occurs again is set aside."""
    if not reader.kv_usage:
        return empty_steps()
    table = np.frombuffer(reader.summaries, dtype=np.int64).reshape(-1, _WIDTH)
    order = np.argsort(table[:, 0], kind="stable")
    table, usage = table[order], np.frombuffer(reader.kv_usage, dtype=float)[order]
    again = np.zeros(len(table), dtype=bool)
    again[1:] = table[1:, 0] == table[:-1, 0]
    same = np.zeros(len(table), dtype=bool)
    same[1:] = (table[1:, : len(_SUMMARY)] == table[:-1, : len(_SUMMARY)]).all(axis=1)
    for row in np.flatnonzero(again):
        reason = (
            "the step was exported twice"
            if same[row]
            else "its number occurs before with other content: two engines, or a restart"
        )
        reader.rejections.add(paths[table[row, -2]], int(table[row, -1]), reason, what=f"step {table[row, 0]}")
    if (again & ~same).sum() > len(table) // 4:
        raise InputError(
            "\n  ".join(
                [
                    f"{', '.join(map(str, paths))}: step numbers repeat with other content: several engines, or one that was restarted, "
                    "in one recording. Ingest them apart",
                    *reader.rejections.lines(),
                ]
            )
        )
    table, usage = table[~again], usage[~again]
    columns = dict(zip(_SUMMARY, table.T, strict=False))

    def known(name: str) -> np.ndarray:
        return np.where(columns[name] == UNKNOWN, np.nan, columns[name].astype(float))

    duration = columns["step.duration_us"]
    values = {
        "prefill_tokens": known("batch.prefill_tokens"),
        "decode_tokens": known("batch.decode_tokens"),
        "prefill_requests": known("batch.num_prefill_reqs"),
        "decode_requests": known("batch.num_decode_reqs"),
        "waiting_requests": known("queue.waiting_depth"),
        "running_requests": known("queue.running_depth"),
        "kv_usage": usage,
    }
    frame = pd.DataFrame(
        {
            "step_id": columns["step.id"],
            "start_ns": columns["step.ts_start_ns"],
            "end_ns": columns["step.ts_end_ns"],
            "duration_ns": np.where(duration == UNKNOWN, UNKNOWN, duration * 1000),
            **{name: values.get(name, np.full(len(table), np.nan)) for name in STEP_VALUES},
        }
    )
    return reader.snapshots.fill(frame)


def read_otlp(paths: Sequence[Path]) -> Recording:
    """Read OTLP JSON lines; several files are parts of one recording, in any order.

    Raises
    ------
    InputError
        If no file holds an event this package reads, or the files hold several engines.
    MissingInputError
        If a file does not exist.
    """
    reader = _Reader()
    for number, path in enumerate(paths):
        reader.read(path, number)
    steps = _steps(reader, paths)
    found = journeys_of(reader.core, reader.api, reader.spans, paths, reader.rejections)
    if steps.empty and found.requests.empty:
        raise InputError(
            "\n  ".join(
                [
                    f"{', '.join(map(str, paths))}: no step and no request holds; accepted are the scopes vllm.scheduler, vllm.api and "
                    "vllm.scheduler.step, or stock llm_request spans",
                    *reader.rejections.lines(),
                ]
            )
        )
    return Recording(
        "otlp",
        tuple(paths),
        requests=found.requests,
        steps=steps,
        episodes=found.episodes,
        rejections=reader.rejections,
        notes=found.notes,
        claims=Claims(reader.models),
    )
