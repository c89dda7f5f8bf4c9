"""A validated trace table: the rows that hold, the rows set aside with their reasons, and what was derived."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.files import atomic

ROWS_NAMED = 5
"""Row numbers quoted per problem in messages: enough to look them up, few enough for one line."""


@dataclass(frozen=True)
class Problem:
    """One kind of problem in one file: what, how many rows, and the first few row numbers (from 0)."""

    message: str
    count: int
    rows: tuple[int, ...]

    def __str__(self) -> str:
        """Return one line for a person."""
        rows = ", ".join(map(str, self.rows)) + (", ..." if self.count > len(self.rows) else "")
        return f"{self.count} row(s): {self.message} (row {rows})"


def problem(message: str, mask: NDArray[np.bool_]) -> Problem:
    """Count the rows of a mask and name the first few."""
    rows = np.flatnonzero(mask)
    return Problem(message, len(rows), tuple(int(r) for r in rows[:ROWS_NAMED]))


@dataclass(frozen=True)
class TraceTable:
    """The valid rows of one trace file and everything that was set aside.

    Attributes
    ----------
    frame : DataFrame
        Valid rows, schema columns first where known or derivable, other columns kept; index 0..n-1.
    rejected : DataFrame
        Rejected rows as found, with their row number in the file (`row`, from 0) and the `reason`. A column of the
        file that has one of these two names is called ``<name>_in_file`` here.
    problems : tuple of Problem
        Why rows were rejected; a row may count under several.
    derived : tuple of str
        Columns that were derived, with the formula.
    source : Path
    notes : tuple of Problem
        Rows that are accepted but worth a look.
    """

    frame: pd.DataFrame
    rejected: pd.DataFrame
    problems: tuple[Problem, ...]
    derived: tuple[str, ...]
    source: Path
    notes: tuple[Problem, ...] = ()

    @property
    def row_numbers(self) -> NDArray[np.int64]:
        """Row numbers in the file, from 0, of the accepted rows."""
        every = np.arange(len(self.frame) + len(self.rejected))
        return np.setdiff1d(every, self.rejected["row"].to_numpy()) if len(self.rejected) else every

    def summary(self) -> str:
        """Return what was read, derived and rejected, for a person."""
        lines = [f"{self.source}: {len(self.frame)} rows accepted, {len(self.rejected)} rejected"]
        lines += [f"  rejected {p}" for p in self.problems]
        lines += [f"  derived {d}" for d in self.derived]
        lines += [f"  note {n}" for n in self.notes]
        return "\n".join(lines)

    def write_rejected(self, folder: str | os.PathLike[str]) -> Path | None:
        """Write the rejected rows to ``<folder>/<config_id>.<table>.rejected.csv`` atomically; None if there are none.

        A table that lies in no folder of its own is called by its own name only.
        """
        if self.rejected.empty:
            return None
        names = [name for name in (self.source.parent.name, self.source.stem) if name]
        target = Path(folder) / f"{'.'.join(names)}.rejected.csv"
        with atomic(target) as part:
            self.rejected.to_csv(part, index=False)
        return target
