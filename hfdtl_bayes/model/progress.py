"""Progress of sampling, shown where it can be: a bar in a terminal or notebook, a line per quarter in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Advance(Protocol):
    """Call once per draw."""

    def __call__(self) -> None:
        """Count one draw."""


class _Lines:
    """Progress for a log: one line each time another quarter is done, none for work that is over in a moment."""

    def __init__(self, label: str, total: int, quiet_s: float) -> None:
        self.label, self.total, self.quiet_s = label, total, quiet_s
        self.done, self.quarters, self.start = 0, 0, time.monotonic()

    def __call__(self) -> None:
        self.done += 1
        quarters = 4 * self.done // self.total
        if quarters == self.quarters:
            return
        self.quarters = quarters
        elapsed = time.monotonic() - self.start
        if elapsed < self.quiet_s:
            return
        left = elapsed * (self.total - self.done) / self.done
        print(f"{self.label}: {25 * quarters} %, {elapsed:.0f} s, about {left:.0f} s left", file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: int, *, enabled: bool = True, quiet_s: float = 2.0) -> Iterator[Advance]:
    """Show the progress of `total` draws on standard error while the block runs.

    Parameters
    ----------
    label : str
    total : int
    enabled : bool
        False shows nothing.
    quiet_s : float
        A log gets no line before this many seconds.
    """
    if not enabled:
        yield lambda: None
        return
    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        yield _Lines(label, total, quiet_s)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)
