"""Held-out accuracy and coverage, beside what any model could reach."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import FeatureSet, response
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.statistics import DEFAULT_BLOCK_LENGTH
from hfdtl_bayes.traces import time_blocks

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class HeldOut:
    """Accuracy of predictions on rows that were not used for calibration.

    Attributes
    ----------
    rows, blocks : int
    mape : float
        Mean absolute percentage error of the expected value, as a fraction. For delays, over the rows that waited longer
        than the floor only.
    rmse_s : float
    bias : float
        (sum of predictions - sum of observations) / sum of observations.
    coverage : float
        Share of rows inside their 95 % predictive interval.
    block_coverage : float
        Share of time blocks whose mean lies inside its 95 % predictive interval.
    attainable_mape : float
        What is left when the mean is known exactly: see `attainable_mape`, at the posterior's relative error sd.
    mean_uncertainty : float
        Median over rows of the relative sd of the expected value: how much the coefficients leave open.
    by_regime : DataFrame
        rows, mape, rmse_s, bias, coverage, block_coverage per regime.
    block_errors : DataFrame
        Per block: `regime`; `rows` that count for the MAPE and `error`, the sum of their absolute percentage errors; `size`, all
        rows, `squared`, the sum of their squared errors, and `rows_inside`, how many lie inside their interval; whether its mean
        lies `inside` its own. What the block bootstrap
        resamples.
    """

    rows: int
    blocks: int
    mape: float
    rmse_s: float
    bias: float
    coverage: float
    block_coverage: float
    attainable_mape: float
    mean_uncertainty: float
    by_regime: pd.DataFrame
    block_errors: pd.DataFrame

    def __str__(self) -> str:
        """Return one line for a person."""
        return (
            f"{self.rows} held-out rows: MAPE {self.mape:.1%} (attainable {self.attainable_mape:.1%}), RMSE {self.rmse_s:.3g} s, "
            f"bias {self.bias:+.1%}, 95 % intervals cover {self.coverage:.1%} of rows, {self.block_coverage:.1%} of blocks"
        )


def percentage_errors(observed: FloatArray, predicted: FloatArray) -> FloatArray:
    """Return |predicted - observed| / observed, shape (n,)."""
    return np.asarray(np.abs(predicted - observed) / observed)


def attainable_mape(error_sd: float) -> float:
    """Return the mean absolute percentage error of the true mean itself, as a fraction, when errors have this relative sd.

    For observations lognormal around their mean with coefficient of variation cv, E|m / y - 1| = exp(s^2) (2 Phi(3 s / 2) - 1) -
    (2 Phi(s / 2) - 1), s^2 = log(1 + cv^2): about 0.8 cv for small cv. No prediction of the mean can do better; one below the
    mean, made for this score, can by a little.
    """
    s = float(np.sqrt(np.log1p(error_sd**2)))
    return float(np.exp(s**2) * (2 * norm.cdf(1.5 * s) - 1) - (2 * norm.cdf(0.5 * s) - 1))


def error_sd(posterior: LatencyPosterior, configuration: ServingConfiguration, seed: int = 0) -> float:
    """Return the posterior median of a configuration's relative error sd, noise and drift together; fitted or never seen."""
    draws = posterior.draws(configuration, seed)
    return float(np.median(np.hypot(draws.sigma, draws.omega)))


def scored_rows(observed: FloatArray, features: FeatureSet, configuration: ServingConfiguration) -> NDArray[np.bool_]:
    """Return which rows percentage errors are taken over, shape (n,): all steps, but only delays longer than the floor."""
    floor = 0.0 if features.quantity == "step_time" else features.noise_floor(configuration)
    return np.asarray(observed > floor)


def fitted_block_length(posterior: LatencyPosterior, config_id: str | None) -> int:
    """Return the steps per time block that a configuration was fitted with; the default for one that was not."""
    return next((s.block_length for s in posterior.statistics if s.config_id == config_id), DEFAULT_BLOCK_LENGTH)


def evaluate(
    posterior: LatencyPosterior,
    frame: pd.DataFrame,
    configuration: ServingConfiguration,
    *,
    block_length: int | None = None,
    seed: int = 0,
) -> HeldOut:
    """Compare predictions with held-out rows.

    Parameters
    ----------
    posterior : LatencyPosterior
    frame : DataFrame
        Validated rows not used for calibration, in time order.
    configuration : ServingConfiguration
    block_length : int, optional
        Steps per time block; by default those the configuration was fitted with, which its drift belongs to.
    seed : int

    Raises
    ------
    InputError
        If there are no rows to judge.
    """
    if frame.empty:
        raise InputError(f"no held-out rows of {configuration.config_id!r} to judge; keep some regimes or blocks aside")
    observed = response(frame, posterior.feature_set.quantity)
    predicted = posterior.predict(frame, configuration, seed=seed)
    blocks = time_blocks(frame, block_length or fitted_block_length(posterior, configuration.config_id))
    block_means = posterior.predict_block_means(frame, configuration, blocks, seed=seed)
    judged = pd.DataFrame(
        {
            "regime": frame["regime"].to_numpy(),
            "block": blocks,
            "observed": observed,
            "mean_s": predicted["mean_s"].to_numpy(),
            "inside": (observed >= predicted["q2.5_s"].to_numpy()) & (observed <= predicted["q97.5_s"].to_numpy()),
        }
    )
    scored = scored_rows(observed, posterior.feature_set, configuration)
    judged["scored"] = scored
    if not scored.any():
        floor = posterior.feature_set.noise_floor(configuration)
        raise InputError(f"no held-out row of {configuration.config_id!r} waited longer than {floor:.3g} s: nothing to judge")
    judged["error"] = 0.0
    judged["squared"] = (judged["mean_s"] - judged["observed"]) ** 2
    judged.loc[scored, "error"] = percentage_errors(observed[scored], judged["mean_s"].to_numpy()[scored])
    means = judged.groupby("block").agg(
        regime=("regime", "first"),
        rows=("scored", "sum"),
        error=("error", "sum"),
        squared=("squared", "sum"),
        size=("squared", "size"),
        observed=("observed", "mean"),
        rows_inside=("inside", "sum"),
    )
    means["inside"] = (means["observed"] >= block_means["q2.5_s"]) & (means["observed"] <= block_means["q97.5_s"])

    def measures(rows: pd.DataFrame, block_rows: pd.DataFrame) -> dict[str, float]:
        return {
            "rows": len(rows),
            "mape": rows.loc[rows["scored"], "error"].mean(),
            "rmse_s": float(np.sqrt(np.mean((rows["mean_s"] - rows["observed"]) ** 2))),
            "bias": rows["mean_s"].sum() / rows["observed"].sum() - 1.0,
            "coverage": rows["inside"].mean(),
            "block_coverage": block_rows["inside"].mean(),
        }

    overall = measures(judged, means)
    by_regime = pd.DataFrame(
        {r: measures(judged[judged["regime"] == r], means[means["regime"] == r]) for r in pd.unique(judged["regime"])}
    ).T.rename_axis("regime")
    return HeldOut(
        rows=len(frame),
        blocks=len(means),
        mape=float(overall["mape"]),
        rmse_s=float(overall["rmse_s"]),
        bias=float(overall["bias"]),
        coverage=float(overall["coverage"]),
        block_coverage=float(overall["block_coverage"]),
        attainable_mape=attainable_mape(error_sd(posterior, configuration, seed)),
        mean_uncertainty=float(
            np.median(predicted["sd_mean_s"] / posterior.scale_s(predicted["mean_s"].to_numpy(), configuration))
        ),
        by_regime=by_regime,
        block_errors=means[["regime", "rows", "error", "squared", "size", "rows_inside", "inside"]].reset_index(),
    )
