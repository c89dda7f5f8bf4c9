"""Events of requests put together: the clocks of each request, and its stays in the batch.

A stay (an episode) begins when a request is scheduled and ends when it finishes or is preempted. FIRST_TOKEN is stamped once in the life
of a request, so where a resumed request ended its recomputation follows from the tokens it has: one a step from there on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from hfdtl_bayes.traces.plausibility import SETTINGS
from hfdtl_bayes.traces.readers.recording import (
    EPISODE_COLUMNS,
    UNKNOWN,
    Rejections,
    empty_episodes,
    named,
    requests_frame,
)

_TOLERANCE_NS = round(SETTINGS.clock_tolerance_s * 1e9)


class Kind(IntEnum):
    """Kinds of events, in the order in which they happen at one instant."""

    ARRIVED = 0
    QUEUED = 1
    PREEMPTED = 2
    SCHEDULED = 3
    FIRST_TOKEN = 4
    FINISHED = 5
    DEPARTED = 6
    ABORTED = 7


class Event(NamedTuple):
    """One event of a request; counts are `UNKNOWN` where the event does not say."""

    at_ns: int
    kind: Kind
    step: int
    prefill_done: int
    prefill_total: int
    decode_done: int
    preemptions: int
    status: str
    file: int
    line: int


class JourneyError(ValueError):
    """The events of a request do not make a journey; the message says why, `line` and `file` where."""

    def __init__(self, message: str, event: Event) -> None:
        super().__init__(message)
        self.event = event


@dataclass(frozen=True)
class Journeys:
    """Requests and episodes as tables of a `Recording`."""

    requests: pd.DataFrame
    episodes: pd.DataFrame
    notes: tuple[str, ...]


@dataclass
class _Journey:
    """What the events of one request tell, built event by event."""

    clocks: dict[str, int] = field(default_factory=dict)
    prompt: int = UNKNOWN
    output: int = UNKNOWN
    cached: int = UNKNOWN
    preemptions: int = 0
    episodes: list[tuple[int, ...]] = field(default_factory=list)
    # The open episode: step, tokens held when its prefill is done, computed before, output before, step of its first token.
    opened: tuple[int, int, int, int] | None = None
    token_step: int = UNKNOWN

    def take(self, event: Event) -> None:
        if event.kind is Kind.QUEUED:
            self.first("queued_ns", event)
            if event.prefill_total != UNKNOWN:
                self.prompt = event.prefill_total
        elif event.kind is Kind.SCHEDULED:
            self.schedule(event)
        elif event.kind is Kind.FIRST_TOKEN:
            if self.opened is None:
                raise JourneyError("FIRST_TOKEN of a request that is not scheduled: an event is missing, or a clock jump", event)
            self.first("first_token_ns", event)
            self.token_step = event.step
        elif event.kind is Kind.PREEMPTED:
            if self.opened is None:
                raise JourneyError("PREEMPTED, but not scheduled: an event is missing, or a clock jump", event)
            self.close(event, last=event.step - 1 if event.step != UNKNOWN else UNKNOWN)
            self.preemptions += 1
        elif event.kind is Kind.FINISHED:
            self.first("finished_ns", event)
            if event.decode_done != UNKNOWN:
                self.output = event.decode_done
            if self.opened is not None:
                self.close(event, last=event.step)

    def first(self, clock: str, event: Event) -> None:
        if clock in self.clocks:
            raise JourneyError(f"{event.kind.name} occurs twice at different times: two requests of one id", event)
        self.clocks[clock] = event.at_ns

    def schedule(self, event: Event) -> None:
        if self.opened is not None or "finished_ns" in self.clocks:
            raise JourneyError("SCHEDULED while running or finished: an event is missing, or a clock jump", event)
        if self.prompt == UNKNOWN and event.prefill_total != UNKNOWN:
            self.prompt = event.prefill_total
        before = max(event.decode_done, 0)
        computed = 0
        if "scheduled_ns" not in self.clocks:
            self.clocks["scheduled_ns"] = event.at_ns
            # Computed before the first step: found in the prefix cache.
            if event.prefill_done != UNKNOWN:
                computed = self.cached = event.prefill_done
        self.opened = (event.step, self.prompt + before if self.prompt != UNKNOWN else UNKNOWN, computed, before)
        self.token_step = UNKNOWN

    def close(self, event: Event | None, last: int) -> None:
        assert self.opened is not None
        step, held, computed, before = self.opened
        if event is not None and self.token_step == UNKNOWN and UNKNOWN not in (event.decode_done, last):
            gained = event.decode_done - before
            self.token_step = last - gained + 1 if gained > 0 else UNKNOWN
        prefill = held - computed if held != UNKNOWN else UNKNOWN
        self.episodes.append((step, self.token_step, last, prefill, computed, held))
        self.opened = None


def _in_order(events: Iterable[Event]) -> list[Event]:
    """Return events without those exported twice, by step where all say theirs, else by time."""
    once = {event[:-2]: event for event in events}.values()
    if all(e.step != UNKNOWN for e in once):
        return sorted(once, key=lambda e: (e.step, e.at_ns, e.kind))
    return sorted(once, key=lambda e: (e.at_ns, e.kind))


def _journey(events: Sequence[Event]) -> _Journey:
    """Put the scheduler's events of one request together.

    Raises
    ------
    JourneyError
        If they do not make a journey.
    """
    found = _Journey()
    ordered = _in_order(events)
    latest = ordered[0].at_ns
    for event in ordered:
        if event.at_ns < latest - _TOLERANCE_NS:
            raise JourneyError(f"{event.kind.name} is stamped before the event before it: a clock jump", event)
        latest = max(latest, event.at_ns)
        found.take(event)
    if found.opened is not None:
        found.close(None, UNKNOWN)
    for clock, name in (("queued_ns", "QUEUED"), ("scheduled_ns", "SCHEDULED")):
        if clock not in found.clocks:
            raise JourneyError(f"no {name}: the recording began later, or ended before", ordered[-1])
    if found.prompt in (UNKNOWN, 0):
        raise JourneyError("no prompt length (prefill.total_tokens)", ordered[-1])
    return found


def known_names(suffixed: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Return the name without its suffix of each suffixed request id, where that name is known and stands for one request only.

    The scheduler calls ``cmpl-7`` of the API ``cmpl-7-0-a1b2c3``. The longest known name wins, so that ``a-1`` is not taken for ``a``.
    """
    names = set(known)
    found: dict[str, str] = {}
    for own in suffixed:
        name = own
        while name not in names and "-" in name:
            name = name.rpartition("-")[0]
        if name in names:
            found[own] = name
    counts: dict[str, int] = {}
    for name in found.values():
        counts[name] = counts.get(name, 0) + 1
    return {own: name for own, name in found.items() if counts[name] == 1}


def _stock(rows: list[dict[str, Any]], spans: Sequence[tuple[dict[str, Any], Path, int]], rejections: Rejections) -> list[str]:
    """Add the requests of stock spans where there are no journeys; returns what is to be said of it."""
    if rows:
        return [f"{len(spans)} stock request spans left out: their clock is not the journeys'"] if spans else []
    seen: set[str] = set()
    for row, path, line in spans:
        if row["request_id"] in seen:
            rejections.add(path, line, "the request occurs before", what=f"request {row['request_id']}")
            continue
        seen.add(row["request_id"])
        rows.append(row)
    return []


def journeys_of(
    core: Mapping[str, Sequence[Event]],
    api: Mapping[str, Sequence[Event]],
    spans: Sequence[tuple[dict[str, Any], Path, int]],
    paths: Sequence[Path],
    rejections: Rejections,
) -> Journeys:
    """Put the events of all requests together.

    Parameters
    ----------
    core, api : mapping of request id to events
        Of the scheduler and of the API server, whose ids lack the scheduler's suffix.
    spans : sequence of (request, Path, line)
        Requests of stock spans, taken only where there are no journeys: their clock is another.
    paths : sequence of Path
        The files, by the number in the events.
    rejections : Rejections
        Takes the requests that are no journeys.

    Returns
    -------
    Journeys
    """
    names = known_names(core, api)
    rows: list[dict[str, Any]] = []
    stays: list[tuple[Any, ...]] = []
    unfinished, aborted = [], []
    for own, events in core.items():
        name = names.get(own, own)
        try:
            found = _journey(events)
        except JourneyError as error:
            rejections.add(paths[error.event.file], error.event.line, str(error), what=f"request {name}")
            continue
        row: dict[str, Any] = {"request_id": name, "prompt_tokens": found.prompt, "output_tokens": found.output}
        row |= {"cached_tokens": found.cached, "preemptions": found.preemptions, **found.clocks}
        for event in api.get(name, ()):
            if event.kind is Kind.ARRIVED:
                row["arrival_ns"] = min(event.at_ns, row.get("arrival_ns", event.at_ns))
            elif event.kind is Kind.ABORTED:
                aborted.append(name)
        if "finished_ns" not in found.clocks:
            unfinished.append(name)
        rows.append(row)
        stays += [(name, *stay) for stay in found.episodes]
    with_core = set(names.values()) | set(core)
    for name, events in api.items():
        if name not in with_core and (core or not spans):
            first = events[0]
            rejections.add(
                paths[first.file],
                first.line,
                "at the API only: never reached the scheduler, or was not sampled",
                what=f"request {name}",
            )
    notes = _stock(rows, spans, rejections)
    if unfinished:
        notes.append(f"{len(unfinished)} request(s) without an end, kept as unfinished: {named(unfinished)}")
    if aborted:
        notes.append(f"{len(aborted)} request(s) aborted: {named(aborted)}")
    episodes = pd.DataFrame(stays, columns=["request_id", *EPISODE_COLUMNS]) if stays else empty_episodes()
    return Journeys(requests_frame(rows), episodes.astype(dict.fromkeys(EPISODE_COLUMNS, np.int64)), tuple(notes))
