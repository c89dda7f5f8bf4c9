"""`ingest`: files in foreign formats in, one configuration of a trace store out, and an account of everything that was set aside."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.files import atomic
from hfdtl_bayes.traces.readers.assembly import Assembled, assemble
from hfdtl_bayes.traces.readers.detect import read_files
from hfdtl_bayes.traces.readers.recording import Recording
from hfdtl_bayes.traces.readers.request_tables import Overheads
from hfdtl_bayes.traces.store import write_store
from hfdtl_bayes.traces.table import TraceTable
from hfdtl_bayes.traces.validation import validate_requests, validate_steps

MOST_SET_ASIDE = 0.5
"""Share of the lines of a file that may be unreadable: where most are, the rest is no fair sample of the recording."""


@dataclass(frozen=True)
class Ingested:
    """What became of the files.

    Attributes
    ----------
    folder : Path
        Of the configuration in the store.
    recordings : tuple of Recording
    assembled : Assembled
    tables : tuple of TraceTable
        Steps and requests as validated; their rejected rows are not in the store.
    """

    folder: Path
    recordings: tuple[Recording, ...]
    assembled: Assembled
    tables: tuple[TraceTable, ...]

    @property
    def rejected(self) -> int:
        """Lines, steps and requests set aside, by whatever stage."""
        lines = sum(len(r.rejections) for r in self.recordings) + len(self.assembled.rejections)
        return lines + sum(len(t.rejected) for t in self.tables)

    @property
    def rows(self) -> dict[str, int]:
        """Rows written, by table."""
        found = {t.source.stem: len(t.frame) for t in self.tables}
        if self.assembled.client_requests is not None:
            found["client_requests"] = len(self.assembled.client_requests)
        return found

    def summary(self) -> str:
        """Return what was read, derived and set aside, for a person."""
        lines = [r.summary() for r in self.recordings]
        lines += [f"  {line}" for line in self.assembled.rejections.lines()]
        lines += [f"  note {note}" for note in self.assembled.notes]
        return "\n".join(lines + [t.summary() for t in self.tables])

    def write_rejected(self, folder: Path) -> list[Path]:
        """Write what was set aside into a folder, as CSV, each file whole; returns the files."""
        files = [f for t in self.tables if (f := t.write_rejected(folder)) is not None]
        parts = [r.rejections.frame() for r in self.recordings] + [self.assembled.rejections.frame()]
        parts = [p for p in parts if len(p)]
        lines = folder / f"{self.folder.name}.ingest.rejected.csv"
        if parts:
            with atomic(lines) as part:
                pd.concat(parts, ignore_index=True).to_csv(part, index=False)
            files.append(lines)
        # What was set aside of a recording that this one has replaced.
        earlier = [lines, *(folder / f"{self.folder.name}.{t}.rejected.csv" for t in ("steps", "requests"))]
        for path in earlier:
            if path not in files:
                path.unlink(missing_ok=True)
        return files


def ingest(
    files: Sequence[str | os.PathLike[str]],
    configuration: ServingConfiguration,
    out: str | os.PathLike[str],
    *,
    format: str = "auto",
    overheads: Overheads | None = None,
    served_model_name: str | None = None,
    overwrite: bool = False,
) -> Ingested:
    """Turn files into one configuration of a trace store, whole or not at all.

    Parameters
    ----------
    files : sequence of path
        Of one run, in one or several formats; several of a format are parts of one recording.
    configuration : ServingConfiguration
        That was recorded; it names the folder.
    out : path
        The store.
    format : str
        Of all files; "auto" judges each by its content.
    overheads : Overheads, optional
        What a client's clocks hold beside the engine's steps.
    served_model_name : str, optional
    overwrite : bool
        True to put the new configuration in the place of one that is there.

    Returns
    -------
    Ingested

    Raises
    ------
    InputError
        If a file is in no known format, most of its lines cannot be read, nothing is left to store, the recording is of another
        configuration, or the store holds this one already; nothing is written.
    MissingInputError
        If a file does not exist.
    """
    recordings = tuple(read_files([Path(f) for f in files], format))
    for recording in recordings:
        lost = len(recording.rejections)
        if lost > MOST_SET_ASIDE * (lost + recording.accepted):
            raise InputError(
                "\n  ".join(
                    [
                        f"{', '.join(map(str, recording.files))}: {lost} of {lost + recording.accepted} records cannot be read, more than "
                        f"{MOST_SET_ASIDE:.0%}; what is left is no fair sample",
                        *recording.rejections.lines(),
                    ]
                )
            )
    assembled = assemble(recordings, configuration, overheads=overheads, served_model_name=served_model_name)
    folder = Path(out) / configuration.config_id
    steps = requests = None
    tables = []
    if assembled.steps is not None:
        table = validate_steps(assembled.steps, configuration, folder / "steps.parquet")
        steps = assembled.steps.iloc[table.row_numbers]
        tables.append(_own(table))
    if assembled.requests is not None:
        table = validate_requests(assembled.requests, configuration, folder / "requests.parquet")
        requests = assembled.requests.iloc[table.row_numbers]
        tables.append(_own(table))
    if steps is None and requests is None and assembled.client_requests is None:
        raise InputError("\n  ".join([f"{files[0]}: nothing is left to store", *assembled.rejections.lines(), *assembled.notes]))
    record = json.dumps(_facts(recordings, assembled), indent=2, default=str) + "\n"
    more: dict[str, pd.DataFrame | str] = {"ingest.json": record}
    if assembled.client_requests is not None:
        more["client_requests.parquet"] = assembled.client_requests
    write_store(out, configuration, steps, requests, more=more, overwrite=overwrite)
    return Ingested(folder, recordings, assembled, tuple(tables))


def _own(table: TraceTable) -> TraceTable:
    """Return the table without what reading the store derives again."""
    return replace(table, derived=())


def _facts(recordings: Sequence[Recording], assembled: Assembled) -> dict[str, Any]:
    """Return where a store comes from, for the record kept beside its tables."""
    rejections = [*(r.rejections for r in recordings), assembled.rejections]
    return {
        "files": {str(f): r.format for r in recordings for f in r.files},
        "clock_origin_ns": assembled.origin_ns,
        "notes": [*(n for r in recordings for n in r.notes), *assembled.notes],
        "set_aside": {reason: count for found in rejections for reason, count in found.counts.items()},
        "reports": {name: report for r in recordings for name, report in r.reports.items()},
    }
