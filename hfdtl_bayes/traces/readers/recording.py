"""What a reader found in foreign files: facts as recorded, whole nanoseconds, and every line that was set aside.

Nothing is derived here. Clocks stay integers, because wall clocks in nanoseconds have more digits than a float, and because two
formats of one run are to give the same store, not one that is nearly the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

UNKNOWN = int(np.iinfo(np.int64).min)
"""A clock or count that was not recorded, in columns of integers."""
CLOCKS = ("arrival_ns", "queued_ns", "scheduled_ns", "first_token_ns", "finished_ns")
COUNTS = ("prompt_tokens", "output_tokens", "cached_tokens", "preemptions")
EPISODE_COLUMNS = ("first_step", "token_step", "last_step", "prefill_tokens", "computed_before", "held_tokens")
STEP_CLOCKS = ("step_id", "start_ns", "end_ns", "duration_ns")
STEP_VALUES = (
    "prefill_tokens",
    "decode_tokens",
    "prefill_requests",
    "decode_requests",
    "prefill_attention_tokens",
    "prompt_attention_tokens",
    "context_tokens",
    "waiting_requests",
    "running_requests",
    "kv_usage",
)
REJECTED_KEPT = 10_000
"""Rejected lines kept in full, the first ones: enough to see what is wrong, bounded where a whole recording is."""
_SHOWN = 5
_SNIPPET = 200


@dataclass(frozen=True)
class RejectedLine:
    """One line, event or request that was set aside.

    Attributes
    ----------
    file : Path
    line : int
        From 1; 0 where no single line is to blame.
    what : str
        The request or step, where it could be told.
    reason, content : str
        Why, and the first characters of what stood there.
    """

    file: Path
    line: int
    what: str
    reason: str
    content: str = ""

    @property
    def place(self) -> str:
        """Where it is, for a person."""
        return ", ".join(p for p in (f"line {self.line}" if self.line else "", self.what) if p) or self.file.name


@dataclass
class Rejections:
    """Lines set aside while a file is read: all are counted, the first are kept."""

    kept: list[RejectedLine] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, file: Path, line: int, reason: str, *, what: str = "", content: str = "") -> None:
        """Set one line aside."""
        found = RejectedLine(file, line, what, reason, content[:_SNIPPET])
        self.counts[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < _SHOWN:
            places.append(found.place)
        if len(self.kept) < REJECTED_KEPT:
            self.kept.append(found)

    def merge(self, other: Rejections) -> None:
        """Take in what another reader set aside."""
        self.kept = (self.kept + other.kept)[:REJECTED_KEPT]
        self.counts.update(other.counts)
        for reason, places in other.places.items():
            self.places[reason] = (self.places.get(reason, []) + places)[:_SHOWN]

    def __len__(self) -> int:
        """Return how many there were."""
        return self.counts.total()

    def lines(self) -> list[str]:
        """Return one line per reason, with the first places."""
        return [
            f"{count} set aside: {reason} ({'; '.join(self.places[reason])}{'; ...' if count > len(self.places[reason]) else ''})"
            for reason, count in self.counts.items()
        ]

    def frame(self) -> pd.DataFrame:
        """Return those kept as a table with `file`, `line`, `what`, `reason` and `content`."""
        columns = ["file", "line", "what", "reason", "content"]
        return pd.DataFrame([(str(r.file), r.line, r.what, r.reason, r.content) for r in self.kept], columns=columns)


@dataclass(frozen=True)
class Claims:
    """What files say of the server they were recorded on; compared with the configuration.

    Attributes
    ----------
    models : dict of str to str
        Names of the LLM, each with the place where it stands.
    values : dict of str to (number, str)
        Engine settings by the name they have in a configuration, with their place.
    """

    models: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, tuple[float, str]] = field(default_factory=dict)


def empty_requests() -> pd.DataFrame:
    """Return a request table without rows."""
    frame = pd.DataFrame({c: np.zeros(0, dtype=np.int64) for c in (*CLOCKS, *COUNTS)})
    frame.insert(0, "request_id", np.zeros(0, dtype=object))
    return frame.assign(regime=np.zeros(0, dtype=object))


def requests_frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a request table from rows that name what is known; the rest is `UNKNOWN`."""
    if not rows:
        return empty_requests()
    data: dict[str, Any] = {"request_id": np.array([str(r["request_id"]) for r in rows], dtype=object)}
    for name in (*CLOCKS, *COUNTS):
        data[name] = np.array([r.get(name, UNKNOWN) for r in rows], dtype=np.int64)
    data["regime"] = np.array([r.get("regime", "") for r in rows], dtype=object)
    return pd.DataFrame(data)


def empty_steps() -> pd.DataFrame:
    """Return a step table without rows."""
    frame = pd.DataFrame({c: np.zeros(0, dtype=np.int64) for c in STEP_CLOCKS})
    return frame.assign(**{c: np.zeros(0) for c in STEP_VALUES})


def empty_episodes() -> pd.DataFrame:
    """Return a table of episodes without rows; see `traces.reconstruction`."""
    frame = pd.DataFrame({c: np.zeros(0, dtype=np.int64) for c in EPISODE_COLUMNS})
    frame.insert(0, "request_id", np.zeros(0, dtype=object))
    return frame


def empty_chunks() -> pd.DataFrame:
    """Return a table of chunks without rows."""
    none = np.zeros(0, dtype=np.int64)
    return pd.DataFrame({"request_id": np.zeros(0, dtype=object), "chunk_index": none, "time_ns": none})


@dataclass(frozen=True)
class Recording:
    """What was found in the files of one format.

    Attributes
    ----------
    format : str
    files : tuple of Path
    requests : DataFrame
        `request_id`, the clocks in `CLOCKS`, the counts in `COUNTS`, `regime`; integers, `UNKNOWN` where not recorded.
    steps : DataFrame
        `step_id`, `start_ns`, `end_ns`, `duration_ns`, integers; the columns in `STEP_VALUES`, NaN where not recorded.
    episodes : DataFrame
        Stays of requests in the batch by step number, `EPISODE_COLUMNS`; see `traces.reconstruction`.
    chunks : DataFrame
        `request_id`, `chunk_index` from 0 and `time_ns` of output as a client saw it.
    rejections : Rejections
    notes : tuple of str
        What is accepted but worth knowing.
    claims : Claims
    reports : dict
        Aggregates, which no row of a store can hold.
    client_side : bool
        True if first and last token are as a client saw them, with the overheads of a request inside.
    ends_after_last : bool
        Of those, whether the end contains what comes once after the last token.
    """

    format: str
    files: tuple[Path, ...]
    requests: pd.DataFrame = field(default_factory=empty_requests)
    steps: pd.DataFrame = field(default_factory=empty_steps)
    episodes: pd.DataFrame = field(default_factory=empty_episodes)
    chunks: pd.DataFrame = field(default_factory=empty_chunks)
    rejections: Rejections = field(default_factory=Rejections)
    notes: tuple[str, ...] = ()
    claims: Claims = field(default_factory=Claims)
    reports: Mapping[str, Any] = field(default_factory=dict)
    client_side: bool = False
    ends_after_last: bool = True

    @property
    def accepted(self) -> int:
        """Number of requests, steps and chunks that were read."""
        return len(self.requests) + len(self.steps) + len(self.chunks)

    def summary(self) -> str:
        """Return what was read and set aside, for a person."""
        names = ", ".join(str(f) for f in self.files)
        found = [
            f"{len(t)} {n}" for n, t in (("requests", self.requests), ("steps", self.steps), ("chunks", self.chunks)) if len(t)
        ]
        found += [f"report of {name}" for name in self.reports]
        lines = [f"{names} ({self.format}): {', '.join(found) or 'nothing'}"]
        lines += [f"  {line}" for line in self.rejections.lines()]
        lines += [f"  note {note}" for note in self.notes]
        return "\n".join(lines)


def named(items: Iterable[object]) -> str:
    """Return a few of many, and how many there are."""
    shown = [str(i) for i in items]
    return ", ".join(shown[:_SHOWN]) + (f", ... ({len(shown)} in all)" if len(shown) > _SHOWN else "")
