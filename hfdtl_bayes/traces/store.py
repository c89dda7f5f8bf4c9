"""The trace store: one folder per configuration with its YAML, its steps and its requests."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from hfdtl_bayes.configuration import ServingConfiguration, read_configuration, write_configuration
from hfdtl_bayes.errors import InputError, MissingInputError, UnknownNameError
from hfdtl_bayes.files import atomic_folder
from hfdtl_bayes.traces.batches import StepReport
from hfdtl_bayes.traces.parts import part_files, refuse_empty, unreadable
from hfdtl_bayes.traces.table import TraceTable
from hfdtl_bayes.traces.validation import validate_requests, validate_steps


def _read_parquet(path: Path) -> pa.Table:
    try:
        # The folders above the file are not to become columns.
        return _index_as_columns(pq.read_table(path, partitioning=None))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise unreadable(path, error) from None


def _index_as_columns(table: pa.Table) -> pa.Table:
    """Turn a named index, which pandas stores as a range in the metadata, back into the column it was."""
    described = (table.schema.pandas_metadata or {}).get("index_columns", [])
    for index in (i for i in described if isinstance(i, dict) and i.get("kind") == "range" and i.get("name")):
        numbers = range(index["start"], index["stop"], index["step"])
        if index["name"] not in table.column_names and len(numbers) == table.num_rows:
            table = table.append_column(index["name"], pa.array(numbers, type=pa.int64()))
    return table.replace_schema_metadata(None)


def _read_parts(folder: Path) -> pa.Table:
    """Read a folder of parts in their order; columns a part lacks are empty there, whole numbers give way to fractions."""
    parts = part_files(folder)
    for part in parts:
        refuse_empty(part)
    tables = [_read_parquet(part) for part in parts]
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(
            f"{folder}: the parts do not fit together: {error}. Give a column the same type in all of them"
        ) from None


def read_table(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a trace table as found: a Parquet file, a folder of Parquet parts (in the order of their steps or numbers), or a CSV file.

    Raises
    ------
    MissingInputError
        If nothing is at `path`.
    InputError
        If it is empty, cut short or not a table.
    """
    path = Path(path)
    if not path.exists():
        raise MissingInputError(f"no trace table at {path}")
    refuse_empty(path)
    if path.suffix.lower() == ".csv" and path.is_file():
        try:
            return pd.read_csv(path, low_memory=False)
        except (OSError, ValueError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
            raise unreadable(path, error) from None
    table = _read_parts(path) if path.is_dir() else _read_parquet(path)
    try:
        frame: pd.DataFrame = table.to_pandas(ignore_metadata=True)
    except (pa.ArrowException, ValueError) as error:
        raise unreadable(path, error) from None
    return frame


def read_steps(path: str | os.PathLike[str], configuration: ServingConfiguration, *, observed: bool = True) -> TraceTable:
    """Read and validate engine steps; parameters and errors as `read_table` and `validate_steps`."""
    return validate_steps(read_table(path), configuration, path, observed=observed)


def read_requests(path: str | os.PathLike[str], configuration: ServingConfiguration, *, observed: bool = True) -> TraceTable:
    """Read and validate request journeys; parameters and errors as `read_table` and `validate_requests`."""
    return validate_requests(read_table(path), configuration, path, observed=observed)


class TraceStore:
    """A folder of configurations with their traces.

    Parameters
    ----------
    path : path
        ``path/<config_id>/configuration.yaml`` with ``steps.parquet`` (a file or a folder of parts, or ``steps.csv``)
        and ``requests.parquet`` (or ``.csv``) beside it.

    Raises
    ------
    MissingInputError
        If the folder does not exist or holds no configuration.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise MissingInputError(f"no trace store at {self.path}: not a folder")
        self.config_ids: tuple[str, ...] = tuple(
            sorted(p.parent.name for p in self.path.glob("*/configuration.yaml") if not p.parent.name.startswith("."))
        )
        if not self.config_ids:
            raise MissingInputError(
                f"no trace store at {self.path}: no <config_id>/configuration.yaml inside; found "
                f"{', '.join(sorted(p.name for p in self.path.iterdir())[:10]) or 'nothing'}"
            )

    def _folder(self, config_id: str) -> Path:
        if config_id not in self.config_ids:
            raise UnknownNameError(
                f"configuration {config_id!r} is not in the trace store {self.path}; it holds {', '.join(self.config_ids)}"
            )
        return self.path / config_id

    def configuration(self, config_id: str) -> ServingConfiguration:
        """Read one configuration.

        Raises
        ------
        UnknownNameError
            If the store does not hold it.
        InputError
            If the file is not valid, or names another configuration than its folder.
        """
        path = self._folder(config_id) / "configuration.yaml"
        configuration = read_configuration(path)
        if configuration.config_id != config_id:
            raise InputError(f"{path}: config_id is {configuration.config_id!r} but the folder is {config_id!r}; make them equal")
        return configuration

    def _table(self, config_id: str, table: str) -> Path:
        folder = self._folder(config_id)
        for name in (f"{table}.parquet", f"{table}.csv"):
            if (folder / name).exists():
                return folder / name
        raise MissingInputError(f"{folder} holds no {table}.parquet or {table}.csv")

    def steps_path(self, config_id: str) -> Path:
        """Return where the engine steps of one configuration are."""
        return self._table(config_id, "steps")

    def has_table(self, config_id: str, quantity: str) -> bool:
        """Return whether the store holds the table in which a quantity is observed."""
        name = "steps" if quantity == "step_time" else "requests"
        return any((self._folder(config_id) / f"{name}.{suffix}").exists() for suffix in ("parquet", "csv"))

    def took(self, report: StepReport) -> None:
        """Take note of steps that were read in parts; a store that keeps account of its tables does something here."""

    def steps(self, config_id: str) -> TraceTable:
        """Read and validate the engine steps of one configuration."""
        path = self._table(config_id, "steps")
        return read_steps(path, self.configuration(config_id))

    def requests(self, config_id: str) -> TraceTable:
        """Read and validate the request journeys of one configuration."""
        path = self._table(config_id, "requests")
        return read_requests(path, self.configuration(config_id))


def write_store(
    path: str | os.PathLike[str],
    configuration: ServingConfiguration,
    steps: pd.DataFrame | None,
    requests: pd.DataFrame | None = None,
    *,
    more: Mapping[str, pd.DataFrame | str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write one configuration into a trace store atomically; returns its folder.

    Parameters
    ----------
    path, configuration, steps, requests
    more : mapping of str to DataFrame or str, optional
        Further files of the folder by name: tables, stored as Parquet, and texts.
    overwrite : bool
        True to replace what the store holds of this configuration. A folder with nothing but a configuration.yaml is always filled.

    Raises
    ------
    InputError
        If the configuration is already there, or a table cannot be stored as Parquet: nothing is written.
    """
    target = Path(path) / configuration.config_id
    held = sorted(p.name for p in target.iterdir()) if target.is_dir() else []
    if target.exists() and not overwrite and held != ["configuration.yaml"]:
        raise InputError(f"{target} exists already; choose another config_id or remove it first")
    with atomic_folder(target) as part:
        write_configuration(configuration, part / "configuration.yaml")
        for name, table in (("steps", steps), ("requests", requests)):
            if table is not None:
                _write_parquet(table, part / f"{name}.parquet", target)
        for name, content in (more or {}).items():
            if isinstance(content, str):
                (part / name).write_text(content, encoding="utf-8")
            else:
                _write_parquet(content, part / name, target)
    return target


def _write_parquet(table: pd.DataFrame, path: Path, target: Path) -> None:
    try:
        table.to_parquet(path, index=False, compression="zstd")
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise InputError(f"{target / path.name}: the table cannot be stored as Parquet: {error}") from None
