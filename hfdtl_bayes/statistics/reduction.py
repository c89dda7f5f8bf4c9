"""The reduction of runs of steps to factors that can be joined: what every worker does, on one machine or many.

A run gives the factors of its whole blocks, and the rows of its first and last block as they are: the neighbours may hold the rest
of these, and the weight of a row depends on its whole block. Joining is associative, so the same function serves batches within a
slice of a table, slices within the table and partitions on a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import StatisticsError
from hfdtl_bayes.features import FeatureSet, response
from hfdtl_bayes.statistics.factors import Rows, block_factors
from hfdtl_bayes.statistics.pilot import config_to_constant, constant_s
from hfdtl_bayes.statistics.scaling import Downweighted, RowScaling, count_downweighted
from hfdtl_bayes.statistics.sufficient import ConfigStatistics, Stratum, split_blocks, triangle_of
from hfdtl_bayes.traces import WARMUP_REGIMES, Parts, Slice, StepBatch, StepReport, step_batches

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Edge:
    """The rows of a block that may go on beyond the slice.

    Attributes
    ----------
    regime : str
    number : int
        step_id // block length.
    design : ndarray, shape (m, K)
    observed : ndarray, shape (m,)
        Both in seconds, not scaled yet: weights need the whole block.
    """

    regime: str
    number: int
    design: FloatArray
    observed: FloatArray

    def continued_by(self, other: Edge) -> bool:
        """Return whether `other`, the next block, is the rest of this one."""
        return (self.regime, self.number) == (other.regime, other.number)

    def join(self, other: Edge) -> Edge:
        """Return the block of both."""
        both = np.concatenate([self.design, other.design]), np.concatenate([self.observed, other.observed])
        return Edge(self.regime, self.number, *both)


@dataclass(frozen=True)
class Sums:
    """What whole blocks add to the statistics; factors are stacked, not yet reduced to one.

    Attributes
    ----------
    factors : dict of int to (int, tuple of ndarray)
        By multiplier: number of independent rows, and matrices that together have their Gram matrix, each shape (., K + 1).
    rows, blocks : int
    log_scale_sum, total_s : float
    downweighted : Downweighted
    """

    factors: dict[int, tuple[int, tuple[FloatArray, ...]]] = field(default_factory=dict)
    rows: int = 0
    blocks: int = 0
    log_scale_sum: float = 0.0
    total_s: float = 0.0
    downweighted: Downweighted = field(default_factory=Downweighted)

    def merge(self, other: Sums) -> Sums:
        """Return the sums of both."""
        factors = dict(self.factors)
        for m, (count, own) in other.factors.items():
            before, stacked = factors.get(m, (0, ()))
            factors[m] = (before + count, stacked + own)
        return Sums(
            factors,
            self.rows + other.rows,
            self.blocks + other.blocks,
            self.log_scale_sum + other.log_scale_sum,
            self.total_s + other.total_s,
            self.downweighted.merge(other.downweighted),
        )

    def reduced(self) -> Sums:
        """Return the same with one factor per multiplier."""
        return replace(
            self, factors={m: (count, (np.linalg.qr(np.vstack(own), mode="r"),)) for m, (count, own) in self.factors.items()}
        )


@dataclass(frozen=True)
class Partial:
    """A run of steps, reduced but for its first and last block.

    Attributes
    ----------
    report : StepReport
    sums : Sums
        Of the blocks between first and last.
    first, last : Edge, optional
        No first: no rows. No last: one block only.
    last_id : int, optional
        Highest step number accepted.
    """

    report: StepReport
    sums: Sums = field(default_factory=Sums)
    first: Edge | None = None
    last: Edge | None = None
    last_id: int | None = None

    def reduced(self) -> Partial:
        """Return the same with one factor per multiplier, which is small to keep and to send."""
        return replace(self, sums=self.sums.reduced())


@dataclass(frozen=True)
class Reduction:
    """How rows become statistics: what every worker has to know.

    Attributes
    ----------
    configuration : ServingConfiguration
    feature_set : FeatureSet
    block_length : int
    scaling : RowScaling
    """

    configuration: ServingConfiguration
    feature_set: FeatureSet
    block_length: int
    scaling: RowScaling

    def slice(self, parts: Parts, own: Slice, after: int | None = None) -> Partial:
        """Reduce one slice of a table; `after` is the highest step number before it, where it matters.

        Raises
        ------
        InputError
            If the part cannot be read or a column is missing.
        """
        found = Partial(StepReport(parts.source))
        room = np.empty(0)
        for batch in step_batches(own, parts.columns, self.configuration, self.feature_set.columns, parts.source, after):
            size = (len(self.feature_set.varying) + 2) * len(batch.step_id)
            room = room if room.size >= size else np.empty(size)
            found = self.join(found, self.batch(batch, room))
        return replace(found.reduced(), last_id=after if found.last_id is None else found.last_id)

    def batch(self, batch: StepBatch, room: FloatArray) -> Partial:
        """Reduce accepted steps; warm-up and what the features do not describe is left out.

        Parameters
        ----------
        batch : StepBatch
        room : ndarray, shape ((K + 2) n or more,)
            Overwritten.
        """
        last_id = int(batch.step_id[-1]) if len(batch.step_id) else None
        if not set(WARMUP_REGIMES).isdisjoint(batch.regimes):
            batch = batch.where(~np.isin(batch.regime_code, [i for i, r in enumerate(batch.regimes) if r in WARMUP_REGIMES]))
        if self.feature_set.support is not None and len(batch.step_id):
            batch = batch.where(self.feature_set.supported(batch.frame, self.configuration))
        if not len(batch.step_id):
            return Partial(batch.report, last_id=last_id)
        starts = _block_starts(batch, self.block_length)
        ends = np.append(starts[1:], len(batch.step_id))
        height, length = len(self.feature_set.varying) + 2, len(batch.step_id)
        columns = room[: height * length].reshape(height, length)
        expansion = self.feature_set.distinct_columns(batch.frame, self.configuration, columns[1:])
        rows = Rows(columns[: len(expansion) + 1], expansion, response(batch.frame, self.feature_set.quantity))

        def edge(i: int) -> Edge:
            own = rows[starts[i] : ends[i]]
            regime = batch.regimes[batch.regime_code[starts[i]]]
            return Edge(regime, int(batch.step_id[starts[i]]) // self.block_length, own.design, own.observed.copy())

        if len(starts) == 1:
            return Partial(batch.report, first=edge(0), last_id=last_id)
        sums, first, last = Sums(), edge(0), edge(-1)
        if len(starts) > 2:
            inner = slice(starts[1], starts[-1])
            names = np.array(batch.regimes, dtype=object)
            sizes = np.diff(starts[1:])
            sums = self.blocks(rows[inner], sizes, lambda: names[batch.regime_code[inner]])
        return Partial(batch.report, sums, first, last, last_id)

    def join(self, one: Partial, other: Partial) -> Partial:
        """Join two runs of steps of which the second follows the first."""
        report = one.report.merge(other.report)
        last_id = one.last_id if other.last_id is None else other.last_id
        if one.first is None or other.first is None:
            return replace(other if one.first is None else one, report=report, last_id=last_id)
        end = one.last or one.first
        if end.continued_by(other.first):
            between, first = end.join(other.first), one.first
            if one.last is None:
                return Partial(report, other.sums, between, other.last, last_id)
            if other.last is None:
                return Partial(report, one.sums, first, between, last_id)
            closed = [between]
        else:
            closed = [e for e in (one.last, other.first if other.last else None) if e is not None]
        sums = one.sums.merge(other.sums)
        for edge in closed:
            sums = sums.merge(self._edge(edge))
        return Partial(report, sums, one.first, other.last or other.first, last_id)

    def _edge(self, edge: Edge) -> Sums:
        regimes = np.full(len(edge.observed), edge.regime, dtype=object)
        return self.blocks(Rows.of(edge.design, edge.observed), np.array([len(edge.observed)]), lambda: regimes)

    def blocks(self, rows: Rows, sizes: NDArray[np.int64], regimes: Callable[[], NDArray[np.object_]]) -> Sums:
        """Reduce whole blocks.

        Parameters
        ----------
        rows : Rows, n rows
            Used up: their columns are overwritten.
        sizes : ndarray of int, shape (B,)
            Rows of each block, adding up to n.
        regimes : callable
            Gives the regime of each row, shape (n,); called if a row is down-weighted.
        """
        starts, observed, fitted = np.cumsum(sizes) - sizes, rows.observed, rows.fitted(self.scaling.pilot)
        scale, weight = self.scaling.rows_of_blocks(fitted, observed, starts, sizes)
        sums = Sums({}, len(observed), len(sizes), float(np.log(scale).sum()), float(observed.sum()))
        if weight.min() == 1:
            return replace(sums, factors=block_factors(rows, self.scaling.pilot, fitted, scale, sizes))
        # Blocks with a down-weighted row are few, and rotated as `split_blocks` says.
        low = np.minimum.reduceat(weight, starts) < 1
        among = np.repeat(low, sizes)
        weighted = rows[among]
        scaled = np.column_stack([weighted.design, weighted.observed]) / scale[among, None]
        split = split_blocks(scaled, np.repeat(np.arange(low.sum()), sizes[low]), weight[among])
        mean_s = np.maximum(fitted, self.scaling.floor_s)
        sums = replace(
            sums,
            factors={m: (len(own), (own,)) for m, own in split},
            downweighted=count_downweighted(observed, mean_s, weight, regimes()),
        )
        if not low.all():
            plain = block_factors(rows[~among], self.scaling.pilot, fitted[~among], scale[~among], sizes[~low])
            sums = sums.merge(Sums(plain))
        return sums

    def statistics(self, found: Partial, startup: int = 0) -> ConfigStatistics:
        """Return the statistics of a whole table.

        Raises
        ------
        StatisticsError
            If no row is left.
        """
        configuration, features = self.configuration, self.feature_set
        if found.first is None:
            raise StatisticsError(
                f"configuration {configuration.config_id!r}: no rows to fit in {found.report.source}: {found.report.rows} accepted, "
                f"{found.report.rejected_rows} rejected, and none of them steady serving"
            )
        sums = found.sums
        for edge in (found.first, found.last):
            if edge is not None:
                sums = sums.merge(self._edge(edge))
        return ConfigStatistics(
            configuration=configuration,
            feature_set=features.name,
            quantity=features.quantity,
            coef_names=features.coef_names,
            scaling=self.scaling,
            block_length=self.block_length,
            constant_s=constant_s(features, configuration),
            config_row=config_to_constant(features, configuration),
            rows=sums.rows,
            blocks=sums.blocks,
            log_scale_sum=sums.log_scale_sum,
            total_s=sums.total_s,
            downweighted=replace(sums.downweighted, startup_rows=startup),
            strata=tuple(_stratum(m, *sums.factors[m]) for m in sorted(sums.factors)),
        )


def _block_starts(batch: StepBatch, length: int) -> NDArray[np.int64]:
    """Return the first row of each block of `length` steps, or fewer where the regime changes."""
    ids = batch.step_id
    if ids[-1] - ids[0] == len(ids) - 1:
        # No step is missing.
        inner = np.arange(ids[0] // length + 1, ids[-1] // length + 1) * length - ids[0]
    else:
        number = np.floor_divide(ids, length)
        inner = np.flatnonzero(number[1:] != number[:-1]) + 1
    if len(batch.regimes) > 1:
        inner = np.union1d(inner, np.flatnonzero(batch.regime_code[1:] != batch.regime_code[:-1]) + 1)
    return np.append(0, inner)


def _stratum(multiplier: int, count: int, factors: Iterable[FloatArray]) -> Stratum:
    stacked = np.vstack(list(factors))
    # Columns that depend on others may have been left out of every factor; row j is to belong to column j all the same.
    triangle = triangle_of(np.vstack([stacked, np.zeros((stacked.shape[1], stacked.shape[1]))]))
    if count < triangle.shape[1]:
        # Fewer rows than columns: as many rows as there are, those of the independent columns first.
        kept = triangle[triangle.any(axis=1)][:count]
        triangle = np.zeros((count, triangle.shape[1]))
        triangle[: len(kept)] = kept
    return Stratum(multiplier, count, triangle)
