"""The trace store: one folder per configuration with its YAML, its steps and its requests."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from hfdtl_bayes.configuration import ServingConfiguration, read_configuration, write_configuration
from hfdtl_bayes.errors import InputError, MissingInputError, UnknownNameError
from hfdtl_bayes.traces.table import TraceTable, validate_requests, validate_steps


def read_table(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a trace table as found: a Parquet file, a folder of Parquet parts (in name order), or a CSV file.

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
    if path.is_file() and path.stat().st_size == 0:
        raise InputError(f"{path} is empty (0 bytes); record it again")
    try:
        if path.is_dir():
            parts = sorted(p for p in path.iterdir() if p.suffix == ".parquet")
            if not parts:
                raise InputError(f"{path} is a folder without .parquet parts")
            table: pa.Table = ds.dataset([str(p) for p in parts], format="parquet").to_table()
            return table.to_pandas()
        if path.suffix == ".csv":
            return pd.read_csv(path)
        return pq.read_table(path).to_pandas()
    except (pa.ArrowException, OSError, pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path} cannot be read as a table: {reason}. A recording that was cut short must be recorded or copied again"
        ) from None


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
        self.config_ids: tuple[str, ...] = tuple(sorted(p.parent.name for p in self.path.glob("*/configuration.yaml")))
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
    steps: pd.DataFrame,
    requests: pd.DataFrame | None = None,
) -> Path:
    """Write one configuration into a trace store atomically; returns its folder.

    Raises
    ------
    InputError
        If the configuration is already there: nothing is overwritten.
    """
    store = Path(path)
    store.mkdir(parents=True, exist_ok=True)
    target = store / configuration.config_id
    if target.exists():
        raise InputError(f"{target} exists already; choose another config_id or remove it first")
    temporary = Path(tempfile.mkdtemp(dir=store, prefix=".part-"))
    try:
        write_configuration(configuration, temporary / "configuration.yaml")
        steps.to_parquet(temporary / "steps.parquet", index=False, compression="zstd")
        if requests is not None:
            requests.to_parquet(temporary / "requests.parquet", index=False, compression="zstd")
        temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    target.chmod(0o755)
    return target
