"""Statistics of a table on a Dask cluster: a partition per slice of the table, joined in a tree.

The slices, their order and the way they are reduced are those of `streaming`, so the result is the same up to the order of
floating-point sums. The parts must be at the same path for every worker. A worker that is lost costs the slices it held, which
others then reduce again. A part that cannot be read is left out, named in the report, and the rest kept: on a cluster a table is
often too large to be made again for one part. Reading on one machine refuses it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError, StatisticsError, UnreadablePartError
from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.statistics.dependence import DEFAULT_BLOCK_LENGTH
from hfdtl_bayes.statistics.reduction import Partial, Reduction
from hfdtl_bayes.statistics.scaling import RowScaling
from hfdtl_bayes.statistics.streaming import PILOT_ROWS, StreamedStatistics, prepare, table_columns
from hfdtl_bayes.traces import Parts, Slice, StepReport, open_parts

if TYPE_CHECKING:
    from distributed import Client

CONNECT_S = 10.0
"""Seconds after which a scheduler that does not answer is not there."""
_FAN_IN = 8
"""Partial results joined by one task."""
_RETRIES = 3
"""Times a partition is tried again where its worker died."""


@contextmanager
def _connected(scheduler: str | Client) -> Iterator[Client]:
    try:
        from distributed import Client  # noqa: PLC0415  (an optional extra)
    except ImportError:
        raise InputError(
            "Dask is not installed, which --engine-data dask needs; install it with pip install 'hfdtl-bayes[dask]', or use "
            "--engine-data arrow on one machine"
        ) from None
    if isinstance(scheduler, Client):
        yield scheduler
        return
    try:
        client = Client(scheduler, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise InputError(
            f"no Dask scheduler answers at {scheduler!r} within {CONNECT_S:g} s ({type(error).__name__}); start one with `dask scheduler` "
            "and workers with `dask worker ADDRESS`, and give --scheduler tcp://HOST:8786"
        ) from None
    try:
        yield client
    finally:
        client.close()


def statistics_on_dask(
    path: str | os.PathLike[str],
    configuration: ServingConfiguration,
    feature_set: FeatureSet,
    *,
    scheduler: str | Client,
    block_length: int | Literal["auto"] = DEFAULT_BLOCK_LENGTH,
    outlier_cutoff: float | None = None,
    scaling: RowScaling | None = None,
    pilot_rows: int = PILOT_ROWS,
) -> StreamedStatistics:
    """Reduce engine steps to sufficient statistics on a Dask cluster.

    Parameters
    ----------
    path, configuration, feature_set, block_length, outlier_cutoff, scaling, pilot_rows
        As in `statistics_from_parquet`.
    scheduler : str or Client
        Address of the scheduler, as tcp://HOST:8786, or a client connected to it.

    Returns
    -------
    StreamedStatistics
        Parts that could not be read are in `report.unreadable`.

    Raises
    ------
    InputError
        If Dask is not installed, the scheduler does not answer, no part can be read, or what `statistics_from_parquet` refuses.
    StatisticsError
        If no row is left, or a partition kills every worker that takes it.
    """
    parts = open_parts(path, table_columns(feature_set), keep_going=True)
    with _connected(scheduler) as client:
        reduction, sampled, startup = prepare(
            parts, configuration, feature_set, block_length, outlier_cutoff, scaling, pilot_rows, keep_going=True
        )
        found = _on_cluster(client, reduction, parts)
    report = replace(found.report, unreadable=parts.unreadable + found.report.unreadable)
    if not report.rows and report.unreadable:
        raise InputError(f"{parts.source}: no part can be read, for example {report.unreadable[0][1]}")
    found = replace(found, report=report)
    return StreamedStatistics(reduction.statistics(found, startup), report, sampled)


def _on_cluster(client: Client, reduction: Reduction, parts: Parts) -> Partial:
    from distributed import KilledWorker  # noqa: PLC0415  (an optional extra)

    table = replace(parts, slices=(), unreadable=())
    level: list[Any] = []
    for own in parts.slices:
        # Where step numbers may repeat or decrease from slice to slice, each has to know the highest before it.
        before = level[-1] if level and not parts.increasing else None
        level.append(client.submit(_slice, reduction, table, own, before, pure=False, retries=_RETRIES))
    while len(level) > 1:
        groups = [level[i : i + _FAN_IN] for i in range(0, len(level), _FAN_IN)]
        level = [client.submit(_joined, reduction, group, pure=False, retries=_RETRIES) for group in groups]
    try:
        found: Partial = level[0].result()
    except KilledWorker as error:
        raise StatisticsError(
            f"{parts.source}: a partition killed {_RETRIES + 1} workers that took it ({error.task}); they may lack memory: a slice needs "
            "a few hundred megabytes"
        ) from None
    finally:
        client.cancel(level)
    return found


def _slice(reduction: Reduction, table: Parts, own: Slice, before: Partial | None) -> Partial:
    after = None if before is None else before.last_id
    try:
        return reduction.slice(table, own, after)
    except UnreadablePartError as error:
        return Partial(StepReport(table.source, unreadable=((own.path, str(error)),)), last_id=after)


def _joined(reduction: Reduction, partials: list[Partial]) -> Partial:
    found = partials[0]
    for partial in partials[1:]:
        found = reduction.join(found, partial)
    return found.reduced()
