"""Traces as the commands read them: which rows, which configuration, and every rejected row accounted for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from hfdtl_bayes.cli.output import say
from hfdtl_bayes.configuration import ServingConfiguration, read_configuration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.traces import StepReport, TraceStore, TraceTable, read_table, split_by_regime
from hfdtl_bayes.transfer import rows_with_ids


class WatchedStore(TraceStore):
    """A trace store that keeps the tables it reads, so that their rejected rows can be reported."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.tables: list[TraceTable | StepReport] = []

    def steps(self, config_id: str) -> TraceTable:
        """Read, validate and keep the engine steps of one configuration."""
        return self._watched(super().steps(config_id))

    def requests(self, config_id: str) -> TraceTable:
        """Read, validate and keep the request journeys of one configuration."""
        return self._watched(super().requests(config_id))

    def took(self, report: StepReport) -> None:
        """Keep the report of steps that were read in parts."""
        self.tables.append(report)
        say(report.summary())

    def _watched(self, table: TraceTable) -> TraceTable:
        self.tables.append(table)
        say(table.summary())
        return table


def write_rejected(tables: Sequence[TraceTable | StepReport], beside: Path | None) -> dict[str, object]:
    """Write the rejected rows of each table beside a result; returns how many there were and where they are.

    Where there is no file to write them beside, says so.
    """
    files = []
    for table in tables:
        if beside is None:
            if len(table.rejected):
                say(
                    f"{len(table.rejected)} rejected row(s) of {table.source} are not written: there is no output file to put them beside"
                )
            continue
        # An absolute source, so that a table named without its folder is still called after it.
        file = replace(table, source=table.source.absolute()).write_rejected(beside.parent)
        if file is not None:
            files.append(file)
            say(f"{len(table.rejected)} rejected row(s) of {table.source} written to {file}")
    rejected = sum(t.rejected_rows if isinstance(t, StepReport) else len(t.rejected) for t in tables)
    return {"rejected_rows": rejected, "rejected_files": [str(f) for f in files]}


def configuration_of(posterior: LatencyPosterior, config_id: str | None, file: Path | None) -> ServingConfiguration:
    """Return the configuration meant: one from its YAML, one that was fitted, or by default the calibrated target.

    Raises
    ------
    InputError
        If both are given, neither is and there is no target, or the configuration was not fitted.
    """
    if config_id is not None and file is not None:
        raise InputError("give --config (one that was fitted) or --configuration (a YAML file), not both")
    if file is not None:
        return read_configuration(file)
    if config_id is None and posterior.target is None:
        raise InputError(
            f"this posterior has no calibrated target; give --config, one of {', '.join(posterior.config_ids)}, or "
            "--configuration FILE.yaml for one never seen"
        )
    return posterior.configuration(config_id or str(posterior.target))


def calibration_rows(
    frame: pd.DataFrame, quantity: str, *, regimes: Sequence[str], selection: Path | None, max_rows: int | None
) -> pd.DataFrame:
    """Choose calibration rows: those of some regimes, of a selection file, and of these the first in time.

    Parameters
    ----------
    frame : DataFrame
        Usable rows of the target, in time order.
    quantity : str
        Steps are selected by `step_id`, requests by `request_id`.
    regimes : sequence of str
        All if empty.
    selection : path, optional
        A table (CSV or Parquet) with the column of identifiers.
    max_rows : int, optional

    Raises
    ------
    InputError
        If a regime or an identifier is not in the frame, or the selection has no such column.
    """
    if regimes:
        frame, _ = split_by_regime(frame, regimes)
    if selection is not None:
        key = "step_id" if quantity == "step_time" else "request_id"
        table = read_table(selection)
        if key not in table.columns:
            raise InputError(
                f"{selection}: no column {key!r}, which selects rows of a {quantity}; found {', '.join(map(str, table.columns))}"
            )
        wanted = table[key]
        if wanted.empty or wanted.isna().any():
            raise InputError(f"{selection}: column {key!r} is empty or has empty cells; give one {key} per line")
        if key == "step_id":
            frame = rows_with_ids(frame, _whole_numbers(wanted, selection))
        else:
            names = set(wanted.astype(str))
            absent = sorted(names - set(frame[key].astype(str)))
            if absent:
                raise InputError(
                    f"{selection}: {len(absent)} of {len(names)} request_id(s) are not among the usable rows, for example "
                    f"{absent[0]}"
                )
            frame = frame[frame[key].astype(str).isin(names)]
    return frame if max_rows is None else frame.iloc[:max_rows]


def _whole_numbers(values: pd.Series, source: Path) -> np.ndarray:
    numbers = pd.to_numeric(values, errors="coerce")
    bad = numbers.isna() | (numbers % 1 != 0)
    if bad.any():
        raise InputError(f"{source}: step_id must be a whole number, found {values[bad].iloc[0]!r} in row {int(np.argmax(bad))}")
    return numbers.to_numpy(dtype=np.int64)
