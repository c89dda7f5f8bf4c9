"""A target calibrated while its traffic arrives: rows are added, removed and added again in labelled parts.

    stream = TargetStream.start(donors, configuration, first_rows)          # the first rows fix the scale of errors
    for chunk in traffic:                                                   # chunks of any size
        stream.add(usable_rows(chunk, configuration, donors.feature_set), "today")
        posterior = stream.posterior(seed=1)
        print(posterior.predict(batches, configuration)["mean_s"], posterior.convergence())
    stream.remove("today")                                                  # as if it had never come; `restore` brings it back

What is kept of a part is its sufficient statistics and the rows of its last, still open drift block, so memory does not grow with rows
but for their labels. Chunks may end anywhere: a block is reduced when the next one begins, and until then counts as it stands.
Statistics are those of all rows at once, up to rounding. A part is removed by merging the parts that stay: nothing is
subtracted, so nothing is lost to cancellation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import pandas as pd

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError, UnknownNameError
from hfdtl_bayes.features import response
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.statistics import DEFAULT_BLOCK_LENGTH, ConfigStatistics, RowScaling, statistics_from_rows
from hfdtl_bayes.traces import time_blocks
from hfdtl_bayes.transfer.conditioning import calibrate_statistics


@dataclass(frozen=True)
class _Part:
    """One labelled part: statistics of its closed blocks, the rows of the open one, and the labels of all its rows."""

    closed: ConfigStatistics | None
    open: pd.DataFrame
    rows: tuple[pd.Index[Any], ...]


class TargetStream:
    """The statistics of one target, row by row, and its posterior at any moment.

    Parts are recordings of their own: no drift block spans two of them, whatever their step numbers. Within one, rows come in time order.

    Parameters
    ----------
    donors : LatencyPosterior
    configuration : ServingConfiguration
        The target's.
    scaling : RowScaling
        What errors are relative to, fixed for all rows to come; of earlier statistics of this configuration, or from `start`.
    block_length : int
        Steps per drift block.

    Raises
    ------
    InputError
        If the target is one of the donors, or the block length is below 1.
    """

    def __init__(
        self,
        donors: LatencyPosterior,
        configuration: ServingConfiguration,
        scaling: RowScaling,
        *,
        block_length: int = DEFAULT_BLOCK_LENGTH,
    ) -> None:
        if configuration.config_id in donors.donors:
            raise InputError(f"target {configuration.config_id!r} is also a donor of this posterior; its rows would count twice")
        if block_length < 1:
            raise InputError(f"block_length must be at least 1 row, found {block_length}")
        self.donors, self.configuration, self.scaling, self.block_length = donors, configuration, scaling, block_length
        self._parts: dict[str, _Part] = {}
        self._aside: dict[str, _Part] = {}

    @classmethod
    def start(
        cls,
        donors: LatencyPosterior,
        configuration: ServingConfiguration,
        rows: pd.DataFrame,
        *,
        label: str = "start",
        block_length: int = DEFAULT_BLOCK_LENGTH,
        outlier_cutoff: float | None = None,
    ) -> TargetStream:
        """Fit the scaling to the first rows, and add them as a part.

        Parameters
        ----------
        donors, configuration, block_length
            As for the class.
        rows : DataFrame
            Usable rows, validated, in time order; a hundred are plenty.
        label : str
        outlier_cutoff : float, optional
            Robust sds beyond which a row is down-weighted; the first donor's by default.
        """
        cutoff = donors.donor_statistics[0].scaling.cutoff if outlier_cutoff is None else outlier_cutoff
        own = statistics_from_rows(rows, configuration, donors.feature_set, block_length=block_length, outlier_cutoff=cutoff)
        stream = cls(donors, configuration, own.scaling, block_length=block_length)
        stream.add(rows, label)
        return stream

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the parts that count, in the order they came."""
        return tuple(self._parts)

    @property
    def removed(self) -> tuple[str, ...]:
        """Labels of the parts set aside, which `restore` brings back."""
        return tuple(self._aside)

    def add(self, rows: pd.DataFrame, label: str) -> None:
        """Add rows to a part, a new one or one that counts already. Either all of them are taken or none.

        Parameters
        ----------
        rows : DataFrame
            Usable rows of this target, validated, in time order, later than those the part has. None is fine.
        label : str

        Raises
        ------
        InputError
            If columns are missing or not finite, other columns come than before, or a step is not later than the one before it.
        StatisticsError
            If the quantity is not finite in a row.
        """
        if rows.empty:
            return
        part = self._parts.get(label) or _Part(None, rows.iloc[:0], ())
        self._check(rows, part, label)
        joined = pd.concat([part.open, rows]) if len(part.open) else rows
        blocks = time_blocks(joined, self.block_length)
        last = int(np.searchsorted(blocks, blocks[-1]))
        closed = part.closed
        # Reduced before anything is kept: rows that cannot be are refused here, those of the open block too.
        self._reduced(joined.iloc[last:])
        if last:
            whole = self._reduced(joined.iloc[:last])
            closed = whole if closed is None else closed.merge(whole)
        self._parts[label] = _Part(closed, joined.iloc[last:].copy(), (*part.rows, rows.index))

    def _check(self, rows: pd.DataFrame, part: _Part, label: str) -> None:
        whose = f"rows of {self.configuration.config_id!r}, part {label!r}"
        if "regime" not in rows.columns:
            raise InputError(f"{whose}: no column regime; give validated rows, such as TraceStore.steps returns")
        # Read before rows are held back in an open block, so that a bad row is refused with its chunk.
        response(rows, self.donors.feature_set.quantity)
        if part.rows and ("step_id" in rows.columns) != ("step_id" in part.open.columns):
            raise InputError(
                f"{whose}: step_id is in some chunks and not in others; blocks are cut by it, so give it in all or none"
            )
        if "step_id" not in rows.columns:
            return
        steps = rows["step_id"].to_numpy()
        if len(part.open):
            steps = np.concatenate([part.open["step_id"].to_numpy()[-1:], steps])
        backwards = np.flatnonzero(np.diff(steps) <= 0)
        if len(backwards):
            at = backwards[0]
            raise InputError(
                f"{whose}: step {steps[at + 1]} comes after step {steps[at]}; rows come in time order and once. For another recording "
                "take another label"
            )

    def _reduced(self, rows: pd.DataFrame) -> ConfigStatistics:
        return statistics_from_rows(
            rows, self.configuration, self.donors.feature_set, block_length=self.block_length, scaling=self.scaling
        )

    def remove(self, label: str) -> None:
        """Set a part aside: it counts no more, until `restore` brings it back.

        Raises
        ------
        UnknownNameError
            If no part of this label counts.
        """
        if label not in self._parts:
            raise UnknownNameError(f"no part {label!r} to remove; counting are {', '.join(self._parts) or 'none'}")
        self._aside[label] = self._parts.pop(label)

    def restore(self, label: str) -> None:
        """Count a part again that was set aside.

        Raises
        ------
        UnknownNameError
            If no part of this label is aside.
        InputError
            If rows came under its label since: they would be of two recordings.
        """
        if label not in self._aside:
            raise UnknownNameError(f"no part {label!r} to restore; set aside are {', '.join(self._aside) or 'none'}")
        if label in self._parts:
            raise InputError(
                f"rows came under {label!r} since it was set aside; remove these or take another label for them first"
            )
        self._parts[label] = self._aside.pop(label)

    @property
    def statistics(self) -> ConfigStatistics:
        """Statistics of all rows that count, open blocks as they stand.

        Raises
        ------
        InputError
            If no row counts.
        """
        if not self._parts:
            raise InputError(f"no rows of {self.configuration.config_id!r} yet; add some")
        # By label, so that a part removed and restored leaves not even another rounding.
        pieces = (piece for _, part in sorted(self._parts.items()) for piece in self._pieces(part))
        return reduce(ConfigStatistics.merge, pieces)

    def _pieces(self, part: _Part) -> Iterable[ConfigStatistics]:
        if part.closed is not None:
            yield part.closed
        yield self._reduced(part.open)

    def posterior(self, *, seed: int = 0, **options: Any) -> LatencyPosterior:
        """Return the target's posterior given all rows that count: what calibrating on them afresh gives.

        Parameters
        ----------
        seed : int
        **options
            As in `calibrate_statistics`: engine, limits, settings, show_progress.

        Raises
        ------
        InputError
            If fewer rows count than there are coefficients.
        """
        own = self.statistics
        needed = len(self.donors.feature_set.pooled)
        if own.rows < needed:
            raise InputError(
                f"{own.rows} row(s) of {own.config_id!r} count, {needed} are needed for as many coefficients; add more first, "
                "or predict it zero-shot from the donors"
            )
        rows = np.concatenate([np.asarray(i) for part in self._parts.values() for i in part.rows])
        if not np.issubdtype(rows.dtype, np.integer) or len(np.unique(rows)) < len(rows):
            # Labels that several chunks have say of no row whether it was calibrated on.
            rows = np.zeros(0)
        return replace(calibrate_statistics(self.donors, own, seed=seed, **options), calibration_rows=rows.astype(np.int64))
