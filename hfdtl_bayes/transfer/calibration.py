"""Donors in, a target calibrated: statistics of validated traces, and donors' draws conditioned on, or refitted with, the target."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError, RejectedRowsWarning
from hfdtl_bayes.features import FeatureSet, feature_set, response
from hfdtl_bayes.model import LatencyPosterior, PriorSettings, SamplerSettings, fit
from hfdtl_bayes.model.likelihoods import check_likelihood
from hfdtl_bayes.statistics import (
    DEFAULT_BLOCK_LENGTH,
    DEFAULT_ROWS_PER_CONFIG,
    scaled_rows,
    statistics_from_rows,
)
from hfdtl_bayes.traces import TraceStore, TraceTable, drop_warmup, time_blocks
from hfdtl_bayes.transfer.conditioning import calibrate_statistics
from hfdtl_bayes.transfer.donors import with_discounts_of_donors
from hfdtl_bayes.transfer.evaluation import fitted_block_length
from hfdtl_bayes.transfer.sources import check_data_engine, kept_statistics, streamed_statistics

_PACKAGE = str(Path(__file__).parents[1])


def read_trace(store: TraceStore, config_id: str, quantity: str) -> TraceTable:
    """Read the table a quantity is observed in: steps for step_time, requests for the delays.

    Warns
    -----
    RejectedRowsWarning
        With the table's summary, if rows of it were rejected.
    """
    table = store.steps(config_id) if quantity == "step_time" else store.requests(config_id)
    if len(table.rejected):
        # Said of the line outside the package that wanted the rows.
        warnings.warn(table.summary(), RejectedRowsWarning, skip_file_prefixes=(_PACKAGE,))
    return table


def usable_rows(frame: pd.DataFrame, configuration: ServingConfiguration, features: FeatureSet) -> pd.DataFrame:
    """Return the rows to fit and to judge by.

    No warm-up; only rows the feature set supports (for queue_delay, requests that found no free slot); for api_delay only requests
    whose arrival is known.
    """
    frame = drop_warmup(frame)
    if features.quantity == "api_delay" and "arrival_s" in frame.columns:
        frame = frame[frame["arrival_s"].notna()]
    return frame[features.supported(frame, configuration)]


def require_enough_rows(frame: pd.DataFrame, configuration: ServingConfiguration, features: FeatureSet) -> None:
    """Refuse fewer rows than coefficients.

    Raises
    ------
    InputError
        Says how many rows there are and how many are needed.
    """
    needed = len(features.pooled)
    if len(frame) < needed:
        raise InputError(
            f"configuration {configuration.config_id!r} has {len(frame)} usable row(s) for the {needed} coefficients of feature "
            f"set {features.name!r}; give at least {needed}, better a few hundred, or predict it zero-shot from the donors"
        )


def fit_donors(
    store: TraceStore,
    donors: Sequence[str],
    features: str | FeatureSet = "roofline",
    quantity: str = "step_time",
    *,
    max_rows: int | None = None,
    block_length: int | Literal["auto"] = DEFAULT_BLOCK_LENGTH,
    outlier_cutoff: float | None = None,
    priors: PriorSettings | None = None,
    discounts: Mapping[str, float] | None = None,
    settings: SamplerSettings | None = None,
    engine: str = "exact",
    likelihood: str = "gaussian",
    rows_per_config: int = DEFAULT_ROWS_PER_CONFIG,
    engine_data: str = "memory",
    scheduler: str | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> LatencyPosterior:
    """Fit the population to donors of a trace store.

    A donor of which the store holds no traces but statistics.nc, written by `write_statistics`, is taken from there.

    Parameters
    ----------
    store : TraceStore
    donors : sequence of str
        config_ids, each once.
    features : str or FeatureSet
        Name of a feature set, or one as it is (with a user's prior ranges, say), whose quantity then counts.
    quantity : {"step_time", "queue_delay", "api_delay"}
    max_rows : int, optional
        Rows of each donor to use, the first in time; all by default.
    block_length : int or "auto"
        Steps per drift block; "auto" chooses for each donor.
    outlier_cutoff : float, optional
        Robust sds beyond which a row is down-weighted, infinity for never; by default 8 for steps and infinity for delays, see
        `OUTLIER_CUTOFFS`.
    priors, settings, engine, likelihood, seed, show_progress
        As in `fit`.
    discounts : mapping of str to float, optional
        For how much of a donor some donors count, in (0, 1]: old engine versions, composed recordings. See `PriorSettings.discounts`.
    rows_per_config : int
        Most rows of one donor that the engine "rows" sees: whole time blocks, evenly spread (`scaled_rows`). No row of them is
        down-weighted.
    engine_data : {"memory", "arrow", "dask"}
        How steps are read: at once, or in one pass over Parquet parts larger than memory, in threads or on a Dask cluster.
    scheduler : str, optional
        Address of the Dask scheduler.

    Returns
    -------
    LatencyPosterior

    Raises
    ------
    InputError
        If a donor is listed twice, none is given, a trace cannot be used, or a discount is of no donor or outside (0, 1].
    UnknownNameError
        If a donor or the feature set is unknown.

    Warns
    -----
    RejectedRowsWarning
        Per donor that has rejected rows, with the summary of its table.
    """
    if not donors:
        raise InputError(f"no donor given; choose some of {', '.join(store.config_ids)}")
    repeated = sorted({d for d in donors if list(donors).count(d) > 1})
    if repeated:
        raise InputError(f"donor(s) listed twice: {', '.join(repeated)}; list each once")
    chosen = feature_set(features, quantity) if isinstance(features, str) else features
    check_likelihood(likelihood, engine)
    check_data_engine(engine_data, scheduler, engine, max_rows)
    priors = with_discounts_of_donors(priors or PriorSettings(), discounts or {}, donors)
    blocks: dict[str, Any] = {"block_length": block_length, "outlier_cutoff": outlier_cutoff}
    kept = {d: s for d in donors if (s := kept_statistics(store, d, chosen)) is not None}
    if kept and engine == "rows":
        raise InputError(f"only statistics are kept of {', '.join(kept)}, and the engine rows needs rows; give their traces")
    if engine_data != "memory":
        for d in (d for d in donors if d not in kept):
            kept[d] = streamed_statistics(store, d, chosen, engine_data=engine_data, scheduler=scheduler, **blocks)
    frames = {d: _donor_rows(store, d, chosen, max_rows=max_rows) for d in donors if d not in kept}
    sampler: dict[str, Any] = {"engine": engine, "likelihood": likelihood, "seed": seed, "show_progress": show_progress}
    if engine == "rows":
        rows = [
            scaled_rows(f, store.configuration(d), chosen, block_length=block_length, rows=rows_per_config, seed=seed)
            for d, f in frames.items()
        ]
        return fit([r.statistics for r in rows], chosen, priors, settings, rows=rows, **sampler)
    for d, f in frames.items():
        kept[d] = statistics_from_rows(f, store.configuration(d), chosen, **blocks)
    statistics = [kept[d] for d in donors]
    return fit(statistics, chosen, priors, settings, **sampler)


def _donor_rows(store: TraceStore, config_id: str, features: FeatureSet, *, max_rows: int | None) -> pd.DataFrame:
    configuration = store.configuration(config_id)
    frame = usable_rows(read_trace(store, config_id, features.quantity).frame, configuration, features)
    frame = frame if max_rows is None else frame.iloc[:max_rows]
    require_enough_rows(frame, configuration, features)
    return frame


def calibrate(
    donors: LatencyPosterior,
    rows: pd.DataFrame,
    configuration: ServingConfiguration,
    *,
    block_length: int | Literal["auto"] = DEFAULT_BLOCK_LENGTH,
    outlier_cutoff: float | None = None,
    settings: SamplerSettings | None = None,
    engine: str = "auto",
    likelihood: str | None = None,
    rows_per_config: int = DEFAULT_ROWS_PER_CONFIG,
    seed: int = 0,
    show_progress: bool = True,
) -> LatencyPosterior:
    """Calibrate a target: the joint posterior of donors and target given the rows of both.

    By default in milliseconds, by conditioning the donors' draws on the target's statistics; where that cannot be relied upon, donors and
    target are refitted jointly, and `LatencyPosterior.convergence` says so and why.

    Parameters
    ----------
    donors : LatencyPosterior
        A fit of donors; a target it may already hold is replaced.
    rows : DataFrame
        The target's calibration rows, validated, in time order.
    configuration : ServingConfiguration
        The target's.
    block_length : int or "auto"
        As in `fit_donors`.
    outlier_cutoff : float, optional
        As in `fit_donors`; the first donor's by default.
    settings : SamplerSettings, optional
        For a refit; conditioning yields draws of the donors' draws.
    engine : {"auto", "conditional", "exact", "pymc", "rows"}
        "conditional" never refits, "exact", "pymc" and "rows" always do; see `calibrate_statistics`. "auto" takes "rows" where the donors
        were fitted so.
    seed, show_progress
        As in `fit`.
    likelihood : str, optional
        As in `fit`; the donors' by default.
    rows_per_config : int
        Most rows of the target that the engine "rows" sees, as in `fit_donors`.

    Returns
    -------
    LatencyPosterior
        With `target` set.

    Raises
    ------
    InputError
        If the target is one of the donors, has fewer rows than there are coefficients, or is to be fitted with the engine "rows" to
        donors that were not.
    """
    if configuration.config_id in donors.donors:
        raise InputError(
            f"target {configuration.config_id!r} is also a donor of this posterior ({', '.join(donors.donors)}); its rows would "
            "count twice. Fit the donors without it, or predict it as it is"
        )
    require_enough_rows(rows, configuration, donors.feature_set)
    likelihood = donors.likelihood if likelihood is None else likelihood
    if engine == "auto" and (donors.donor_rows or likelihood != "gaussian"):
        engine = "rows"
    check_likelihood(likelihood, engine)
    if engine == "rows":
        sampler: dict[str, Any] = {"engine": engine, "likelihood": likelihood, "seed": seed, "show_progress": show_progress}
        sampler["target"] = configuration.config_id
        if not donors.donor_rows:
            raise InputError(
                f"the donors {', '.join(donors.donors)} were fitted from statistics and their rows are not kept; to calibrate with the "
                'engine "rows", fit them with it too'
            )
        chosen = scaled_rows(rows, configuration, donors.feature_set, block_length=block_length, rows=rows_per_config, seed=seed)
        every = [*donors.donor_rows, chosen]
        statistics = [r.statistics for r in every]
        fitted = fit(statistics, donors.feature_set, donors.priors, settings, rows=every, **sampler)
        return replace(fitted, calibration_rows=chosen.index)
    return calibrate_by_statistics(
        donors,
        rows,
        configuration,
        block_length=block_length,
        outlier_cutoff=outlier_cutoff,
        engine=engine,
        settings=settings,
        seed=seed,
        show_progress=show_progress,
    )


def calibrate_by_statistics(
    donors: LatencyPosterior,
    rows: pd.DataFrame,
    configuration: ServingConfiguration,
    *,
    block_length: int | Literal["auto"] = DEFAULT_BLOCK_LENGTH,
    outlier_cutoff: float | None = None,
    engine: str = "auto",
    settings: SamplerSettings | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> LatencyPosterior:
    """Calibrate a target from the statistics of its usable rows, however few: what `calibrate` does once it has judged the rows.

    Parameters and result are those of `calibrate`; engines are those of `calibrate_statistics`.
    """
    cutoff = donors.donor_statistics[0].scaling.cutoff if outlier_cutoff is None else outlier_cutoff
    own = statistics_from_rows(rows, configuration, donors.feature_set, block_length=block_length, outlier_cutoff=cutoff)
    fitted = calibrate_statistics(donors, own, engine=engine, settings=settings, seed=seed, show_progress=show_progress)
    return replace(fitted, calibration_rows=rows.index.to_numpy(dtype=np.int64))


def calibration_rows_of(posterior: LatencyPosterior, frame: pd.DataFrame) -> pd.DataFrame:
    """Return those of a target's usable rows that it was calibrated on.

    Raises
    ------
    InputError
        If it is not known which they are, or the frame does not hold them.
    """
    target = next((s for s in posterior.statistics if s.config_id == posterior.target), None)
    if target is not None and not len(posterior.calibration_rows):
        raise InputError(
            f"which rows {posterior.target!r} was calibrated on is not known: it was calibrated from statistics, of {target.rows} rows. "
            "Judge it on a recording made since with `evaluate`, or calibrate it on rows in memory"
        )
    rows = frame[frame.index.isin(posterior.calibration_rows)]
    _require_unchanged(posterior, rows)
    return rows


def held_out_rows(
    posterior: LatencyPosterior, frame: pd.DataFrame, block_length: int | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split a target's usable rows into those it was calibrated on and those that may judge it.

    A time block that holds a calibration row judges nothing: its other rows share the machine's speed with that row. Blocks
    have the length the target was calibrated with, unless another is given.

    Returns
    -------
    calibration, held_out : DataFrame

    Raises
    ------
    InputError
        If no block is left to judge with, or the frame does not hold the rows that were calibrated on.
    """
    used = frame.index.isin(calibration_rows_of(posterior, frame).index)
    blocks = time_blocks(frame, block_length or fitted_block_length(posterior, posterior.target))
    aside = ~np.isin(blocks, np.unique(blocks[used]))
    if not aside.any():
        raise InputError(
            f"every time block of {posterior.target!r} holds rows it was calibrated on, so none is left to judge with; calibrate on "
            "some regimes or on the first rows only (--regimes, --max-rows), or judge by the calibration rows alone (--calibration-only)"
        )
    return frame[used], frame[aside]


def _require_unchanged(posterior: LatencyPosterior, rows: pd.DataFrame) -> None:
    """Refuse rows that are not those the target was calibrated on: the trace changed since, and would be split wrongly."""
    own = next((s for s in posterior.statistics if s.config_id == posterior.target), None)
    if own is None or not len(posterior.calibration_rows):
        return
    same = len(rows) == own.rows
    if same:
        design = posterior.feature_set.design(rows, own.configuration)
        observed, blocks = response(rows, posterior.feature_set.quantity), time_blocks(rows, own.block_length)
        log_scale = float(np.log(own.scaling.rows(design, observed, blocks)[0]).sum())
        same = bool(np.isclose(log_scale, own.log_scale_sum, rtol=1e-9, atol=1e-6))
    if not same:
        raise InputError(
            f"the trace of {posterior.target!r} is not the one it was calibrated on: {len(rows)} of its {own.rows} calibration rows are "
            "found, or they hold other values. Give the same store, or calibrate again"
        )


def rows_with_ids(frame: pd.DataFrame, step_ids: Sequence[int] | np.ndarray) -> pd.DataFrame:
    """Return the rows with the given step ids, in the frame's order.

    Raises
    ------
    InputError
        If an id is not in the frame.
    """
    wanted = np.unique(np.asarray(step_ids))
    absent = np.setdiff1d(wanted, frame["step_id"].to_numpy())
    if len(absent):
        raise InputError(
            f"{len(absent)} of {len(wanted)} selected step_id(s) are not among the usable rows, for example {absent[0]:.0f}"
        )
    return frame[frame["step_id"].isin(wanted)]
