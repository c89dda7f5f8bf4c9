"""How much an answer owes to the priors: refits at half, one and two times each scale, and power-scaling beside them.

With two to five donors the data hardly say how unlike the next configuration will be, so the priors of the between-configuration
spreads are part of every zero-shot answer. Two ways show how large a part, on what a user reads: times of typical batches and
coefficients.

**Refits.** The range of a spread (`deviation`, `noise_spread`, `drift_spread`) is multiplied by a factor and the exact engine
runs again on the same statistics with the same seed.

**Power-scaling.** The draws are reweighted as if one prior counted alpha times, w = p(psi)^(alpha - 1), smoothed by PSIS, whose Pareto k
says whether the weights can be used. In the coordinates the sampler moves in, a lognormal range to the power of alpha is one with its
log sd divided by sqrt(alpha), a Beta(a, a) is a Beta(alpha a, alpha a), a normal has its sd divided by sqrt(alpha). The prior of
coefficients given the scales is the model, not a choice made here, and stays. Beside it stands the sensitivity of ArviZ's `psense`, a
derivative at alpha = 1, for each prior and for the likelihood. Kallioinen et al. (2024), doi:10.1007/s11222-023-10366-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError, UnknownNameError
from hfdtl_bayes.features import typical_batches
from hfdtl_bayes.model.exact import ExactDensity
from hfdtl_bayes.model.identifiability import conditional_moments
from hfdtl_bayes.model.posterior import LatencyPosterior, fit
from hfdtl_bayes.model.priors import PositiveRange, PriorSettings, population_mean, population_sd
from hfdtl_bayes.model.sampling import SamplerSettings

FloatArray = NDArray[np.float64]

SCALES = ("deviation", "noise_spread", "drift_spread")
"""Priors of the spreads between configurations, which few donors leave to the prior."""

FACTORS = (0.5, 1.0, 2.0)
ALPHAS = (0.8, 1.25)
"""Powers near enough to 1 that weights in a dozen dimensions can be used."""
GOOD_K = 0.7
"""Pareto k up to which smoothed weights can be used; Vehtari et al. (2024), arXiv:1507.02646."""

_SAID = {
    "deviation": "the range of the deviations between configurations",
    "noise_spread": "the range of the spread of noise",
    "drift_spread": "the range of the spread of drift",
}
_FACTOR_SAID = {0.5: "halving", 2.0: "doubling"}


@dataclass(frozen=True)
class Sensitivity:
    """What an answer owes to the priors.

    Attributes
    ----------
    config_id : str
        Configuration the batches are predicted for.
    fitted : bool
        False if it is predicted zero-shot.
    predictions : DataFrame
        A row per scale, factor and batch: `mean_s` and `width_s` of the expected time and `width_row_s` of a new observation (95 %
        intervals), and their ratio to factor 1: `mean_ratio`, `width_ratio`, `width_row_ratio`.
    coefficients : DataFrame
        A row per scale, factor and coefficient: `mean`, `sd` in physical units, `shift` of the mean in sds at factor 1, `sd_ratio`. The
        configuration's own coefficients if it was fitted, otherwise the population's.
    power : DataFrame
        A row per prior and batch: `psense` of the expected time, and for each alpha `mean_ratio`, `sd_ratio` (not a number where the
        weights cannot be used) and `k`. The likelihood has a `psense` only.
    noise : float
        Relative difference of two widths that may be Monte Carlo error.
    converged : bool
        Whether every refit passed its convergence check.
    """

    config_id: str
    fitted: bool
    predictions: pd.DataFrame
    coefficients: pd.DataFrame
    power: pd.DataFrame
    noise: float
    converged: bool

    def sentences(self) -> tuple[str, ...]:
        """Return what it comes to, in words."""
        kind = "95 % intervals" if self.fitted else "zero-shot 95 % intervals"
        said = []
        changed = self.predictions[self.predictions["factor"] != 1.0]
        for scale, factor in changed[["scale", "factor"]].drop_duplicates().itertuples(index=False):
            part = changed[(changed["scale"] == scale) & (changed["factor"] == factor)]
            width, mean = part["width_ratio"] - 1, (part["mean_ratio"] - 1).abs().max()
            row = float(np.median(part["width_row_ratio"] - 1))
            verb = _FACTOR_SAID.get(float(factor), f"{float(factor):g} times")
            said.append(
                f"{verb} {_SAID[str(scale)]}: the {kind} of the expected time of {self.config_id} {_changes(float(np.median(width)))} "
                f"({_signed(width.min())} to {_signed(width.max())} over {len(part)} batches), those of a new observation "
                f"{_changes(row)}, the means move by at most {100 * mean:.1f} %"
            )
        if said:
            said.append(f"differences of up to {self.noise:.0%} between two widths may be Monte Carlo error")
        if not self.converged:
            said.append("not every refit has converged; fit with more draws before this is relied on")
        return tuple(said)


def _signed(change: float) -> str:
    return f"{round(100 * change):+d} %"


def _changes(change: float) -> str:
    if abs(change) < 0.005:
        return "stay as they are"
    return f"{'widen' if change > 0 else 'narrow'} by {100 * abs(change):.0f} %"


def scaled_priors(priors: PriorSettings, scale: str, factor: float) -> PriorSettings:
    """Return priors with one range multiplied by a factor.

    Raises
    ------
    UnknownNameError
        If it is not one of `SCALES`.
    """
    if scale not in SCALES:
        raise UnknownNameError(f"unknown scale {scale!r}; those to vary are {', '.join(SCALES)}")
    r: PositiveRange = getattr(priors, scale)
    changed: dict[str, Any] = {scale: PositiveRange(r.low * factor, r.high * factor)}
    return replace(priors, **changed)


def refit(
    posterior: LatencyPosterior,
    priors: PriorSettings,
    *,
    settings: SamplerSettings | None = None,
    seed: int | None = None,
    show_progress: bool = False,
) -> LatencyPosterior:
    """Fit a posterior's statistics again with other priors, by the exact engine.

    Parameters
    ----------
    posterior : LatencyPosterior
    priors : PriorSettings
    settings : SamplerSettings, optional
        Those the posterior was sampled with by default.
    seed : int, optional
        The posterior's by default.
    show_progress : bool

    Raises
    ------
    InputError
        If the posterior's likelihood is not the Gaussian of the statistics: another model would be fitted.
    """
    _require_gaussian(posterior)
    if settings is None:
        used, names = posterior.tree["sample_stats"].attrs, [f.name for f in fields(SamplerSettings)]
        # Draws conditioned on a target's rows were not sampled, and have no such settings.
        stated: dict[str, Any] = {n: type(getattr(SamplerSettings(), n))(used[n]) for n in names if n in used}
        settings = SamplerSettings(**stated) if len(stated) == len(names) else SamplerSettings()
    again = fit(
        posterior.statistics,
        posterior.feature_set,
        priors,
        settings,
        target=posterior.target,
        seed=posterior.seed if seed is None else seed,
        show_progress=show_progress,
    )
    return replace(again, calibration_rows=posterior.calibration_rows)


def _require_gaussian(posterior: LatencyPosterior) -> None:
    if not conditional_moments(posterior):
        raise InputError(
            "sensitivity refits with the exact engine, whose errors are Gaussian; this posterior was fitted on rows. Fit the same "
            "donors with --engine exact"
        )


def log_priors(posterior: LatencyPosterior) -> dict[str, FloatArray]:
    """Return the log prior density of each draw by prior, shapes (S,), up to constants, in the sampler's coordinates.

    By the names of `PriorSettings`, and `population` for the coefficients (beta, gamma, delta).
    """
    priors, features = posterior.priors, posterior.feature_set

    def of_range(name: str, r: PositiveRange) -> FloatArray:
        z = (np.log(posterior.draws_of(name)) - r.log_mean) / r.log_sd
        return np.asarray(-0.5 * (z**2).reshape(len(z), -1).sum(axis=1))

    tau, share = posterior.draws_of("tau"), posterior.draws_of("hardware_share")
    found = {
        "deviation": (priors.deviation.gamma_shape * np.log(tau) - priors.deviation.gamma_rate * tau).sum(axis=1),
        "hardware_share": priors.hardware_share * (np.log(share) + np.log1p(-share)),
        "noise": of_range("sigma_typical", priors.noise),
        "noise_spread": of_range("sigma_spread", priors.noise_spread),
    }
    if priors.drift is not None:
        found |= {"drift": of_range("omega_typical", priors.drift), "drift_spread": of_range("omega_spread", priors.drift_spread)}
    parts = [posterior.draws_of(n) for n, f in (("beta", features.base), ("gamma", features.config)) if f]
    phi = np.concatenate([*parts, posterior.draws_of("delta")], axis=1)
    z = (phi - population_mean(features)) / population_sd(features)
    return found | {"population": -0.5 * (z**2).sum(axis=1)}


def log_likelihood(posterior: LatencyPosterior) -> FloatArray:
    """Return the log likelihood of each configuration's rows at each draw, shape (S, C), up to constants."""
    info = ExactDensity(posterior.statistics, posterior.feature_set, posterior.priors).info
    sigma, omega = (posterior.draws_of(n)[..., None] for n in ("sigma", "omega"))
    away = posterior.draws_of("theta") - info.reference
    square = (
        np.einsum("sck,cjkl,scl->scj", away, info.gram, away) - 2 * np.einsum("sck,cjk->scj", away, info.target) + info.square
    )
    variance = sigma**2 + info.multiplier * omega**2
    return np.asarray(-0.5 * (info.count * np.log(variance) + square / variance).sum(axis=2))


def power_weights(log_prior: FloatArray, alpha: float) -> tuple[FloatArray, float]:
    """Return weights of the draws as if a prior counted alpha times, and the Pareto k of their smoothing.

    Parameters
    ----------
    log_prior : ndarray, shape (S,)
    alpha : float

    Returns
    -------
    weights : ndarray, shape (S,)
        Sum to 1.
    k : float
        Above `GOOD_K` the weights rest on too few draws to be used.
    """
    from arviz_stats.base import array_stats  # noqa: PLC0415  (loads for a second)

    # It takes the negative of log weights: its usual input is the likelihood of what is left out.
    smoothed, k = array_stats.psislw((1.0 - alpha) * log_prior)
    weights = np.exp(smoothed - np.max(smoothed))
    return weights / weights.sum(), float(k)


def sensitivity(
    posterior: LatencyPosterior,
    configuration: ServingConfiguration | None = None,
    *,
    batches: pd.DataFrame | None = None,
    scales: Sequence[str] = SCALES,
    factors: Sequence[float] = FACTORS,
    settings: SamplerSettings | None = None,
    show_progress: bool = False,
) -> Sensitivity:
    """Refit at several sizes of each scale and reweight the draws, and compare predictions and coefficients.

    Parameters
    ----------
    posterior : LatencyPosterior
    configuration : ServingConfiguration, optional
        Fitted or never seen; the calibrated target by default.
    batches : DataFrame, optional
        Rows to predict, what each is called in a column `batch`; by default `typical_batches`.
    scales : sequence of str
        Some of `SCALES`; that of the drift is left out where there is none.
    factors : sequence of float
        1 is always among them.
    settings : SamplerSettings, optional
        Of the refits; those of the posterior by default.
    show_progress : bool

    Returns
    -------
    Sensitivity

    Raises
    ------
    InputError
        If there is no configuration to predict, the posterior was fitted on rows, or the quantity is a delay and there are no batches.
    UnknownNameError
        If a scale is unknown.
    """
    _require_gaussian(posterior)
    if configuration is None:
        if posterior.target is None:
            raise InputError("this posterior has no calibrated target; give a configuration to predict")
        configuration = posterior.configuration(posterior.target)
    if batches is None:
        if posterior.feature_set.quantity != "step_time":
            raise InputError(
                f"a {posterior.feature_set.quantity} is predicted for requests; give batches with "
                f"{', '.join(posterior.feature_set.columns)}"
            )
        batches = typical_batches(configuration)
    if posterior.priors.drift is None:
        scales = [s for s in scales if s != "drift_spread"]
    names = [str(n) for n in batches["batch"]] if "batch" in batches.columns else [f"row {i}" for i in range(len(batches))]
    described = configuration.config_id if configuration.config_id in posterior.config_ids else "population"
    now = _answer(posterior, configuration, batches, names, described)
    predictions, coefficients, converged = [], [], posterior.convergence().passed
    for scale in scales:
        for factor in sorted({1.0, *map(float, factors)}):
            priors = scaled_priors(posterior.priors, scale, factor)
            answer = now
            if factor != 1.0:
                fitted = refit(posterior, priors, settings=settings, show_progress=show_progress)
                converged &= fitted.convergence().passed
                answer = _answer(fitted, configuration, batches, names, described)
            predicted, own = answer
            ratios = predicted[["mean_s", "width_s", "width_row_s"]] / now[0][["mean_s", "width_s", "width_row_s"]]
            ratios.columns = pd.Index(["mean_ratio", "width_ratio", "width_row_ratio"])
            predictions.append(predicted.join(ratios).assign(scale=scale, factor=factor))
            compared = own.assign(shift=(own["mean"] - now[1]["mean"]) / now[1]["sd"], sd_ratio=own["sd"] / now[1]["sd"])
            coefficients.append(compared.assign(scale=scale, factor=factor))
    return Sensitivity(
        config_id=configuration.config_id,
        fitted=described != "population",
        predictions=_first(pd.concat(predictions, ignore_index=True), "scale", "factor"),
        coefficients=_first(pd.concat(coefficients, ignore_index=True), "scale", "factor"),
        power=_power(posterior, configuration, batches, names),
        # The width between the 2.5 and 97.5 % points of n draws of a normal has a relative error of 0.97 / sqrt(n).
        noise=2.0 * np.sqrt(2.0) * 0.97 / np.sqrt(len(posterior.draws_of("tau"))),
        converged=converged,
    )


def _first(frame: pd.DataFrame, *names: str) -> pd.DataFrame:
    return frame[[*names, *(c for c in frame.columns if c not in names)]]


def _answer(
    posterior: LatencyPosterior, configuration: ServingConfiguration, batches: pd.DataFrame, names: Sequence[str], described: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return what a user reads: predictions of the batches, and the coefficients."""
    predicted = posterior.predict(batches, configuration)
    table = pd.DataFrame(
        {
            "batch": names,
            "mean_s": predicted["mean_s"].to_numpy(),
            "width_s": (predicted["q97.5_mean_s"] - predicted["q2.5_mean_s"]).to_numpy(),
            "width_row_s": (predicted["q97.5_s"] - predicted["q2.5_s"]).to_numpy(),
        }
    )
    every = posterior.coefficient_table()
    own = every[every["config"] == described][["feature", "unit", "mean", "sd"]].reset_index(drop=True)
    return table, own


def _power(
    posterior: LatencyPosterior, configuration: ServingConfiguration, batches: pd.DataFrame, names: Sequence[str]
) -> pd.DataFrame:
    """Return power-scaling of each prior, and of the likelihood, on the expected time of each batch."""
    import arviz as az  # noqa: PLC0415  (loads for a second)

    features = posterior.feature_set
    expected = posterior.draws(configuration).theta @ features.design(batches, configuration).T
    chains, draws = (posterior.tree["posterior"].sizes[d] for d in ("chain", "draw"))

    def shaped(values: FloatArray, *dims: str) -> tuple[tuple[str, ...], FloatArray]:
        return ("chain", "draw", *dims), values.reshape(chains, draws, *values.shape[1:])

    priors = log_priors(posterior)
    tree = xr.DataTree.from_dict(
        {
            "posterior": xr.Dataset({"expected": shaped(expected, "batch")}),
            "log_prior": xr.Dataset({n: shaped(v) for n, v in priors.items()}),
            "log_likelihood": xr.Dataset({"rows": shaped(log_likelihood(posterior), "config")}),
        }
    )
    mean, sd = expected.mean(axis=0), expected.std(axis=0)
    rows = []
    for name, log_prior in priors.items():
        sense = az.psense(tree, group="prior", group_var_names=[name])["expected"].to_numpy()
        columns: dict[str, FloatArray | float] = {}
        for alpha in ALPHAS:
            weights, k = power_weights(log_prior, alpha)
            moved = weights @ expected
            spread = np.sqrt(weights @ (expected - moved) ** 2)
            usable = 1.0 if k <= GOOD_K else np.nan
            columns[f"mean_ratio_{alpha:g}"], columns[f"sd_ratio_{alpha:g}"] = usable * moved / mean, usable * spread / sd
            columns[f"k_{alpha:g}"] = k
        rows.append(pd.DataFrame({"prior": name, "batch": names, "psense": sense, **columns}))
    sense = az.psense(tree, group="likelihood")["expected"].to_numpy()
    rows.append(pd.DataFrame({"prior": "likelihood", "batch": names, "psense": sense}))
    return pd.concat(rows, ignore_index=True)
