"""Statistics of tables larger than memory, in one pass over their Parquet parts.

Slices of the table are reduced apart, in any number of threads, and joined in their order (see `reduction`). The slices
depend on the files alone, so the result does not depend on the number of threads, to the last bit.

The scale of a row needs the pilot, so the pilot is fitted before the pass, on rows spread over the table. It decides only what
errors are relative to; statistics with the same scaling as `statistics_from_rows` are equal to it up to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError, StatisticsError, UnreadablePartError
from hfdtl_bayes.features import FeatureSet, response
from hfdtl_bayes.statistics.dependence import DEFAULT_BLOCK_LENGTH, choose_block_length
from hfdtl_bayes.statistics.pilot import check_scaling, fit_row_scaling, startup_rows
from hfdtl_bayes.statistics.reduction import Partial, Reduction
from hfdtl_bayes.statistics.scaling import RowScaling
from hfdtl_bayes.statistics.sufficient import ConfigStatistics
from hfdtl_bayes.traces import (
    STEP_SCHEMA,
    Parts,
    StepReport,
    drop_warmup,
    open_parts,
    read_batches,
    time_blocks,
    validate_steps,
)

PILOT_ROWS = 50_000
"""Rows the pilot is fitted on: its coefficients are then known to a few parts in a thousand, and errors of the scale cancel to
first order."""
_STRETCHES = 16
"""Places from which these rows are taken."""


@dataclass(frozen=True)
class StreamedStatistics:
    """Statistics of a table, and the account of its rows.

    Attributes
    ----------
    statistics : ConfigStatistics
    report : StepReport
    pilot_rows : int
        Rows the scaling was fitted on; 0 if it was given.
    """

    statistics: ConfigStatistics
    report: StepReport
    pilot_rows: int


def statistics_from_parquet(
    path: str | os.PathLike[str],
    configuration: ServingConfiguration,
    feature_set: FeatureSet,
    *,
    block_length: int | Literal["auto"] = DEFAULT_BLOCK_LENGTH,
    outlier_cutoff: float | None = None,
    scaling: RowScaling | None = None,
    pilot_rows: int = PILOT_ROWS,
    workers: int | None = None,
) -> StreamedStatistics:
    """Reduce engine steps to sufficient statistics without holding them: one pass, in bounded memory.

    The same rows are accepted as by reading the whole table, and with the same scaling the statistics are those of
    `statistics_from_rows` up to rounding. Memory is bounded by the workers (some tens of megabytes each) and, where blocks are
    longer than a slice, by the rows of one block.

    Parameters
    ----------
    path : path
        A Parquet file or a folder of parts.
    configuration : ServingConfiguration
    feature_set : FeatureSet
        For `step_time`.
    block_length, outlier_cutoff, scaling
        As in `statistics_from_rows`.
    pilot_rows : int
        The scaling is fitted on this many rows at most, evenly spread: the first rows of evenly spread row groups, or stretches
        of every row group where there are few.
    workers : int, optional
        Threads; by default as many as there are processors. Of no influence on the result.

    Returns
    -------
    StreamedStatistics

    Raises
    ------
    MissingInputError
        If nothing is at `path`.
    InputError
        If the file or a part cannot be read, which is then named; if the unit of a column is wrong; if a column is missing.
    StatisticsError
        If no row is left, or the scaling does not fit the features.
    """
    parts = open_parts(path, table_columns(feature_set))
    # Factors of a few thousand rows gain nothing from threads of their own, and lose tenfold where these contend with the workers.
    with threadpool_limits(1, user_api="blas"):
        reduction, sampled, startup = prepare(
            parts, configuration, feature_set, block_length, outlier_cutoff, scaling, pilot_rows
        )
        found = _reduced(reduction, parts, workers)
        return StreamedStatistics(reduction.statistics(found, startup), found.report, sampled)


def _reduced(reduction: Reduction, parts: Parts, workers: int | None) -> Partial:
    """Reduce all slices in order, in threads."""
    found = Partial(StepReport(parts.source))
    workers = min(workers or os.cpu_count() or 1, len(parts.slices))
    if workers == 1 or not parts.increasing:
        # Where step numbers may repeat or decrease from slice to slice, each has to know the highest before it.
        for own in parts.slices:
            found = reduction.join(found, reduction.slice(parts, own, found.last_id))
    else:
        pool = ThreadPoolExecutor(workers, thread_name_prefix="statistics")
        try:
            for partial in pool.map(lambda own: reduction.slice(parts, own), parts.slices):
                found = reduction.join(found, partial)
        finally:
            pool.shutdown(cancel_futures=True)
    return found


def table_columns(feature_set: FeatureSet) -> set[str]:
    """Return the columns to read: those the features need, and all that rows are judged by.

    Raises
    ------
    InputError
        If the feature set explains a delay, which is observed in requests.
    """
    if feature_set.quantity != "step_time":
        raise InputError(
            f"{feature_set.quantity} is observed in requests, which are read in memory: they are hundreds of times fewer than steps. "
            "Use --engine-data memory"
        )
    return {c.name for c in STEP_SCHEMA} | set(feature_set.columns)


def prepare(
    parts: Parts,
    configuration: ServingConfiguration,
    feature_set: FeatureSet,
    block_length: int | Literal["auto"],
    outlier_cutoff: float | None,
    scaling: RowScaling | None,
    pilot_rows: int,
    *,
    keep_going: bool = False,
) -> tuple[Reduction, int, int]:
    """Fix how the rows of a table are reduced: judge its units and fit the scaling on a sample of it, unless it is given.

    Returns
    -------
    Reduction
    pilot_rows : int
        Rows the scaling was fitted on.
    startup : int
        Start-up rows, of those sampled at the very start.
    """
    if block_length != "auto" and block_length < 1:
        raise InputError(f"block_length must be at least 1 row, found {block_length}")
    stretches = list(_sample(parts, pilot_rows, keep_going))
    if not stretches:
        raise UnreadablePartError(f"{parts.source}: none of the parts sampled can be read")
    # Refuses wrong units, and columns that are missing.
    frame = validate_steps(pd.concat(stretches, ignore_index=True), configuration, parts.source).frame
    if scaling is not None:
        check_scaling(scaling, feature_set, configuration)
        if block_length == "auto":
            raise StatisticsError(
                f"configuration {configuration.config_id!r}: with a given scaling the block length is that of the statistics it is "
                'from, not "auto"'
            )
        return Reduction(configuration, feature_set, block_length, scaling), 0, 0
    frame = drop_warmup(frame)
    frame = frame[feature_set.supported(frame, configuration)]
    if frame.empty:
        raise StatisticsError(
            f"configuration {configuration.config_id!r}: none of the {sum(map(len, stretches))} rows sampled of {parts.source} is "
            "steady serving, so no scale can be fitted; sample more rows, or give the scaling of earlier statistics"
        )
    design, observed = feature_set.design(frame, configuration), response(frame, feature_set.quantity)
    blocks = time_blocks(frame, DEFAULT_BLOCK_LENGTH if block_length == "auto" else block_length)
    scaling = fit_row_scaling(design, observed, blocks, feature_set, configuration, outlier_cutoff)
    if block_length == "auto":
        residuals = (observed - design @ scaling.pilot) / scaling.rows(design, observed, blocks)[0]
        block_length = choose_block_length(residuals, frame).length
        blocks = time_blocks(frame, block_length)
        scaling = fit_row_scaling(design, observed, blocks, feature_set, configuration, outlier_cutoff)
    start = slice(0, len(frame) if parts.rows <= pilot_rows else len(stretches[0]))
    startup = startup_rows(scaling, design[start], observed[start])
    return Reduction(configuration, feature_set, block_length, scaling), len(frame), startup


def _sample(parts: Parts, rows: int, keep_going: bool) -> Iterator[pd.DataFrame]:
    """Yield all rows of a small table, or stretches of consecutive rows from evenly spread places, in order."""
    every = parts.rows <= rows
    wanted = min(_STRETCHES, max(len(parts.slices), 4))
    chosen = range(len(parts.slices)) if every else np.unique(np.linspace(0, len(parts.slices) - 1, wanted).round().astype(int))
    each = -(-wanted // len(chosen))
    length = max(rows // (each * len(chosen)), 1)
    for own in (parts.slices[i] for i in chosen):
        at, places = 0, [k * own.rows // each for k in range(each)]
        try:
            for batch in read_batches(own, list(parts.columns), length):
                if every or at + batch.num_rows > places[0]:
                    frame = batch.to_pandas(ignore_metadata=True)
                    yield frame.assign(**{c: np.nan for c in parts.columns if c not in frame.columns})
                    places = places if every else places[1:]
                at += batch.num_rows
                if not places:
                    break
        except UnreadablePartError:
            if not keep_going:
                raise
