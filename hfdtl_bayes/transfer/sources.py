"""Where the statistics of a configuration come from: its rows in memory, its Parquet parts in one pass, a cluster, or a file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

from hfdtl_bayes.errors import InputError, RejectedRowsWarning, UnknownNameError
from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.statistics import (
    DEFAULT_BLOCK_LENGTH,
    ConfigStatistics,
    RowScaling,
    read_statistics,
    statistics_from_parquet,
    statistics_on_dask,
)
from hfdtl_bayes.traces import TraceStore

DATA_ENGINES = ("memory", "arrow", "dask")

_PACKAGE = str(Path(__file__).parents[1])


def check_data_engine(engine_data: str, scheduler: str | None, engine: str, max_rows: int | None = None) -> None:
    """Refuse what does not go together, before anything is read.

    Raises
    ------
    UnknownNameError
        If there is no such data engine.
    InputError
        If a scheduler is missing or of no use, or single rows are asked for where only their statistics are made.
    """
    if engine_data not in DATA_ENGINES:
        raise UnknownNameError(f"unknown data engine {engine_data!r}; known are {', '.join(DATA_ENGINES)}")
    if engine_data == "dask" and not scheduler:
        raise InputError("--engine-data dask needs --scheduler ADDRESS, as tcp://HOST:8786; start one with `dask scheduler`")
    if engine_data != "dask" and scheduler:
        raise InputError(f"--scheduler is of no use with --engine-data {engine_data}; give --engine-data dask, or leave it out")
    if engine_data != "memory" and (engine == "rows" or max_rows is not None):
        what = "the engine rows" if engine == "rows" else "--max-rows"
        raise InputError(f"{what} takes single rows, of which --engine-data {engine_data} keeps none; use --engine-data memory")


def streamed_statistics(
    store: TraceStore,
    config_id: str,
    features: FeatureSet,
    *,
    engine_data: str = "arrow",
    scheduler: str | None = None,
    block_length: int | Literal["auto"] = DEFAULT_BLOCK_LENGTH,
    outlier_cutoff: float | None = None,
    scaling: RowScaling | None = None,
) -> ConfigStatistics:
    """Reduce the steps of one configuration of a store without holding them.

    Parameters
    ----------
    store : TraceStore
    config_id : str
    features : FeatureSet
    engine_data : {"arrow", "dask"}
        In threads on this machine, or on a cluster.
    scheduler : str, optional
        Address of the Dask scheduler.
    block_length, outlier_cutoff, scaling
        As in `statistics_from_parquet`.

    Raises
    ------
    InputError
        If the table cannot be used, or has fewer usable rows than there are coefficients.

    Warns
    -----
    RejectedRowsWarning
        If rows or parts were set aside, with the summary.
    """
    configuration, path = store.configuration(config_id), store.steps_path(config_id)
    options = {"block_length": block_length, "outlier_cutoff": outlier_cutoff, "scaling": scaling}
    if engine_data == "dask":
        found = statistics_on_dask(path, configuration, features, scheduler=str(scheduler), **options)  # type: ignore[arg-type]
    else:
        found = statistics_from_parquet(path, configuration, features, **options)  # type: ignore[arg-type]
    store.took(found.report)
    if found.report.rejected_rows or found.report.unreadable:
        warnings.warn(found.report.summary(), RejectedRowsWarning, skip_file_prefixes=(_PACKAGE,))
    if found.statistics.rows < len(features.pooled):
        raise InputError(
            f"configuration {config_id!r} has {found.statistics.rows} usable row(s) for the {len(features.pooled)} coefficients of "
            f"feature set {features.name!r}; give more traces, or predict it zero-shot from the donors"
        )
    return found.statistics


def kept_statistics(store: TraceStore, config_id: str, features: FeatureSet) -> ConfigStatistics | None:
    """Return the statistics that stand in a store in place of traces, STORE/<config_id>/statistics.nc; None if traces are there.

    Raises
    ------
    InputError
        If they are of another configuration, feature set or quantity.
    """
    path = store.path / config_id / "statistics.nc"
    if config_id not in store.config_ids or not path.is_file() or store.has_table(config_id, features.quantity):
        return None
    found = read_statistics(path).statistics
    own = (found.feature_set, found.quantity)
    if own != (features.name, features.quantity):
        raise InputError(f"{path} is of features {own[0]} for {own[1]}, and {features.name} for {features.quantity} is asked for")
    if found.configuration != store.configuration(config_id):
        raise InputError(f"{path} was made with another configuration than {path.parent / 'configuration.yaml'}; make it again")
    return found
