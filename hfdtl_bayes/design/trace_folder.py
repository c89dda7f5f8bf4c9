"""A folder that fills up with trace parts, and a closed loop that follows it.

A recorder writes Parquet parts. One that cannot be read may still be being written: it is waited for while it changes, and set aside,
aloud and once, when it has not changed for a while. It is read again should it change after all. A part is taken once; changing it
later changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.design.closed_loop import ClosedLoop
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.traces import TraceTable, read_steps
from hfdtl_bayes.traces.parts import part_files

_Stamp = tuple[int, int]


@dataclass(frozen=True)
class NewPart:
    """A part that was read.

    Attributes
    ----------
    path : Path
    table : TraceTable
    """

    path: Path
    table: TraceTable


class PartFolder:
    """The parts of one configuration's steps, each given out once.

    Parameters
    ----------
    path : Path
        The folder, such as STORE/ID/steps.parquet; it may appear later.
    configuration : ServingConfiguration
    settle_s : float
        Seconds without a change after which a part that cannot be read is set aside.
    clock : callable
        Seconds, increasing.

    Raises
    ------
    InputError
        If a file lies at `path`.
    """

    def __init__(
        self,
        path: Path,
        configuration: ServingConfiguration,
        *,
        settle_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if path.is_file():
            raise InputError(
                f"{path} is a file, which is read once; a folder of Parquet parts can be followed. Calibrate on the file, or write parts"
            )
        if not settle_s >= 0:
            raise InputError(f"settle_s must be 0 or more seconds, found {settle_s}")
        self.path, self.configuration = path, configuration
        self._settle_s, self._clock = settle_s, clock
        self._taken: set[Path] = set()
        self._seen: dict[Path, tuple[_Stamp, float]] = {}
        self._aside: dict[Path, _Stamp] = {}

    def poll(self) -> tuple[list[NewPart], list[str]]:
        """Return parts that came since the last call, in order, and what is to be said of those that cannot be read."""
        made: list[NewPart] = []
        said: list[str] = []
        for path in self._parts():
            stamp = _stamp(path)
            if path in self._taken or stamp is None or self._aside.get(path) == stamp:
                continue
            try:
                table = read_steps(path, self.configuration)
            except InputError as error:
                if self._settled(path, stamp):
                    self._aside[path] = stamp
                    said.append(f"part set aside: {error}")
                continue
            self._taken.add(path)
            self._aside.pop(path, None)
            made.append(NewPart(path, table))
        return made, said

    def _parts(self) -> list[Path]:
        try:
            return part_files(self.path) if self.path.is_dir() else []
        except InputError:
            return []

    def _settled(self, path: Path, stamp: _Stamp) -> bool:
        """Return whether a part has not changed for a while."""
        now = self._clock()
        last, since = self._seen.get(path, (None, now))
        if last != stamp:
            since = now
        self._seen[path] = (stamp, since)
        return now - since >= self._settle_s


def _stamp(path: Path) -> _Stamp | None:
    """Return size and time of change; None if the file has gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


class LoopEnd(StrEnum):
    """Why a loop that follows a folder ended."""

    ACCEPTED = "accepted"
    NOTHING_CAME = "nothing came"
    OUT_OF_TIME = "out of time"


@dataclass(frozen=True)
class LoopEvent:
    """What happened: parts taken in, something to say, or the end.

    Attributes
    ----------
    parts : tuple of NewPart
        Taken in; the loop's verdict is of all so far.
    said : tuple of str
        For a person.
    end : LoopEnd or None
        Set in the last event.
    """

    parts: tuple[NewPart, ...] = ()
    said: tuple[str, ...] = ()
    end: LoopEnd | None = None


@dataclass(frozen=True)
class FollowSettings:
    """How long to wait for what."""

    poll_s: float = 2.0
    """Seconds between two looks at the folder: short beside a segment of traffic."""
    idle_s: float = 1800.0
    """Seconds without a new part after which the loop ends: half an hour, time to start a server."""
    limit_s: float = field(default=float("inf"))
    """Seconds in all after which the loop ends; none by default."""

    def __post_init__(self) -> None:
        """Refuse times that are none.

        Raises
        ------
        InputError
            Names the setting.
        """
        for name in ("poll_s", "idle_s", "limit_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be a positive number of seconds, found {getattr(self, name)}")


def follow(
    loop: ClosedLoop,
    folder: PartFolder,
    settings: FollowSettings | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[LoopEvent]:
    """Take parts into a loop as they come, until its verdict accepts or time is up.

    Parameters
    ----------
    loop : ClosedLoop
    folder : PartFolder
    settings : FollowSettings, optional
    clock, sleep : callable
        The time, and how to let it pass.

    Yields
    ------
    LoopEvent
        After each look at the folder that found something, and at the end. What a caller does meanwhile, such as to plan, counts as time.
    """
    settings = settings or FollowSettings()
    started = last = clock()
    while True:
        parts, said = folder.poll()
        for part in parts:
            loop.add(part.table.frame, part.path.name)
        if parts:
            loop.update()
            last = clock()
        end = LoopEnd.ACCEPTED if loop.accepted else None
        if end is None and clock() - started >= settings.limit_s:
            end = LoopEnd.OUT_OF_TIME
        if end is None and clock() - last >= settings.idle_s:
            end = LoopEnd.NOTHING_CAME
        if parts or said or end:
            yield LoopEvent(tuple(parts), tuple(said), end)
        if end:
            return
        sleep(settings.poll_s)
