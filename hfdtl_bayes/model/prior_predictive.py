"""What the priors say in latency: configurations drawn from the prior alone, their step times held against the hardware and traces.

A range of a coefficient is hard to judge, a time in milliseconds is not. Given the prior alone a configuration's coefficients are

    theta = A (m + S xi) + tau scale eta        xi, eta ~ Normal(0, I),    tau ~ its prior

(the part shared on its hardware and its own add to tau^2), noise and drift are drawn around typical values drawn themselves, and a
batch with design row x takes x'theta. Plain NumPy; nothing is compiled. After Gabry et al. (2019), doi:10.1111/rssa.12378.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration, prefill_floor_s_per_token, weight_loading_floor_s
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import FeatureSet, response, typical_batches
from hfdtl_bayes.model.draws import Draws
from hfdtl_bayes.model.exact import population_loading
from hfdtl_bayes.model.priors import PositiveRange, PriorSettings, deviation_scale, population_mean, population_sd
from hfdtl_bayes.statistics import config_to_constant

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class PriorCheckSettings:
    """When a prior predictive is called out, each limit with its reason."""

    draws: int = 4000
    """Configurations drawn: a probability of 5 % is known to 0.3 %."""
    negative: float = 0.05
    """Probability of a negative time above which it is called out: normal priors always leave some."""
    below_floor: float = 0.25
    """The same for a time that the hardware cannot do. Priors straddle the ideal on purpose, for peak figures are not exact."""
    slow_ratio: float = 30.0
    """Times the hardware's floor that count as implausibly slow: the slowest engines recorded stay below a tenth of peak only
    where the host dominates, and those steps are short."""
    slow_from_s: float = 0.1
    """Steps shorter than this are never called slow, because the host's overhead dominates small models."""
    slow: float = 0.05
    """Probability of an implausibly slow time above which it is called out."""
    outside: float = 0.01
    """Data and prior are said to disagree if the observed total lies in the outer part of this size of the prior's: a good prior is
    accused once in a hundred configurations."""
    most_rows: int = 2000
    """Observed rows looked at, evenly spaced."""


@dataclass(frozen=True)
class Observed:
    """Where observed rows lie in what the prior predicts for just those batches.

    Attributes
    ----------
    rows : int
        Looked at.
    inside_90 : float
        Share of rows inside the central 90 % of a new observation. Rows of one configuration share its coefficients, so even a perfect
        prior does not hold 90 % of one configuration's rows.
    total : float
        Share of configurations drawn from the prior whose expected time for all these rows together is below the time observed;
        noise averages out of a total, so it tells what single rows cannot.
    """

    rows: int
    inside_90: float
    total: float


@dataclass(frozen=True)
class PriorPredictive:
    """What the prior says of a configuration.

    Attributes
    ----------
    table : DataFrame
        One row per batch: `batch`, `floor_s` (what the hardware needs at least), `q5_s`, `q50_s`, `q95_s` of the expected time,
        `q5_row_s`, `q95_row_s` of a new observation, `p_negative`, `p_below_floor`, `p_slow` of the expected time.
    flags : tuple of str
        What looks impossible, in words; empty if nothing does.
    observed : Observed or None
    """

    table: pd.DataFrame
    flags: tuple[str, ...]
    observed: Observed | None = None


def hardware_floor_s(frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
    """Return the least time a batch takes on the hardware, shape (n,), in seconds.

    The larger of memory, always-active weights and the KV cache of all contexts read once at peak bandwidth, and compute, FLOPs of
    all tokens at peak.
    """
    llm, tp = configuration.llm, configuration.engine.tensor_parallel
    kv = frame["context_tokens"].to_numpy(float) * llm.kv_bytes_per_token / tp / configuration.hardware.memory_bandwidth
    tokens = frame["prefill_tokens"].to_numpy(float) + frame["decode_tokens"].to_numpy(float)
    compute = prefill_floor_s_per_token(configuration) * tokens
    return np.asarray(np.maximum(weight_loading_floor_s(configuration) + kv, compute))


def prior_draws(
    configuration: ServingConfiguration,
    feature_set: FeatureSet,
    priors: PriorSettings | None = None,
    *,
    draws: int = PriorCheckSettings.draws,
    seed: int = 0,
) -> Draws:
    """Draw a configuration's coefficients, noise and drift from the prior alone.

    Parameters
    ----------
    configuration : ServingConfiguration
    feature_set : FeatureSet
    priors : PriorSettings, optional
    draws : int
    seed : int

    Returns
    -------
    Draws
        `mean` is the prior mean itself.
    """
    priors = priors or PriorSettings()
    rng = np.random.default_rng([seed, 4])
    loading = population_loading(feature_set, config_to_constant(feature_set, configuration))
    mean, sd = population_mean(feature_set), population_sd(feature_set)

    def positive(r: PositiveRange, *shape: int) -> FloatArray:
        return np.exp(r.log_mean + r.log_sd * rng.standard_normal((draws, *shape)))

    phi = mean + sd * rng.standard_normal((draws, len(mean)))
    tau = rng.gamma(priors.deviation.gamma_shape, 1 / priors.deviation.gamma_rate, (draws, len(feature_set.pooled)))
    deviation = tau * deviation_scale(feature_set) * rng.standard_normal(tau.shape)
    discrepancy = feature_set.discrepancy_sd * rng.standard_normal((draws, len(feature_set.discrepancy)))
    own = np.concatenate([deviation, discrepancy], axis=1)

    def error(typical: PositiveRange | None, spread: PositiveRange) -> FloatArray:
        if typical is None:
            return np.zeros(draws)
        return positive(typical) * np.exp(positive(spread) * rng.standard_normal(draws))

    sigma, omega = error(priors.noise, priors.noise_spread), error(priors.drift, priors.drift_spread)
    return Draws(phi @ loading.T + own, loading @ mean, sigma, omega, False)


def prior_predictive(
    configuration: ServingConfiguration,
    feature_set: FeatureSet,
    priors: PriorSettings | None = None,
    *,
    batches: pd.DataFrame | None = None,
    observed: pd.DataFrame | None = None,
    settings: PriorCheckSettings | None = None,
    seed: int = 0,
) -> PriorPredictive:
    """Predict batches of a configuration from the prior alone, and say what looks impossible.

    Parameters
    ----------
    configuration : ServingConfiguration
    feature_set : FeatureSet
        Of any quantity; of delays, `batches` must be given.
    priors : PriorSettings, optional
    batches : DataFrame, optional
        Rows to predict; what each is called may stand in a column `batch`. By default `typical_batches`.
    observed : DataFrame, optional
        Usable rows of this configuration, to see where they lie in the prediction of just those rows.
    settings : PriorCheckSettings, optional
    seed : int

    Raises
    ------
    InputError
        If the quantity is a delay and there are no batches, or columns are missing.
    """
    settings, priors = settings or PriorCheckSettings(), priors or PriorSettings()
    if batches is None:
        if feature_set.quantity != "step_time":
            raise InputError(
                f"a {feature_set.quantity} is predicted for requests; give rows with {', '.join(feature_set.columns)}"
            )
        batches = typical_batches(configuration)
    drawn = prior_draws(configuration, feature_set, priors, draws=settings.draws, seed=seed)
    rng = np.random.default_rng([seed, 5])
    expected, rows = _predicted(drawn, batches, configuration, feature_set, rng)
    names = batches["batch"] if "batch" in batches.columns else pd.Series([f"row {i}" for i in range(len(batches))])
    table = pd.DataFrame({"batch": names.to_numpy()})
    physical = feature_set.quantity == "step_time"
    floor = hardware_floor_s(batches, configuration) if physical else np.zeros(len(batches))
    table["floor_s"] = floor
    table[["q5_s", "q50_s", "q95_s"]] = np.quantile(expected, (0.05, 0.5, 0.95), axis=0).T
    table[["q5_row_s", "q95_row_s"]] = np.quantile(rows, (0.05, 0.95), axis=0).T
    table["p_negative"] = (expected < 0).mean(axis=0)
    table["p_below_floor"] = (expected < floor).mean(axis=0)
    slow = (expected > settings.slow_ratio * floor) & (expected > settings.slow_from_s) if physical else np.zeros_like(expected)
    table["p_slow"] = slow.mean(axis=0)
    where = None
    if observed is not None:
        where = _observed(drawn, observed, configuration, feature_set, settings, rng)
    return PriorPredictive(table, _flags(table, where, settings, physical=physical), where)


def _predicted(
    drawn: Draws, frame: pd.DataFrame, configuration: ServingConfiguration, feature_set: FeatureSet, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Return draws of the expected value of each row and of a new observation, shapes (S, n); errors are relative to the mean."""
    design = feature_set.design(frame, configuration)
    expected = drawn.theta @ design.T
    scale = np.maximum(design @ drawn.mean, feature_set.noise_floor(configuration))
    error = np.hypot(drawn.sigma, drawn.omega)[:, None] * rng.standard_normal(expected.shape)
    return expected, expected + scale * error


def _observed(
    drawn: Draws,
    frame: pd.DataFrame,
    configuration: ServingConfiguration,
    feature_set: FeatureSet,
    settings: PriorCheckSettings,
    rng: np.random.Generator,
) -> Observed:
    chosen = np.unique(np.linspace(0, len(frame) - 1, min(len(frame), settings.most_rows)).astype(int))
    part = frame.iloc[chosen]
    expected, rows = _predicted(drawn, part, configuration, feature_set, rng)
    seen = response(part, feature_set.quantity)
    below = (rows < seen).mean(axis=0)
    inside = float(np.mean((below >= 0.05) & (below <= 0.95)))
    return Observed(len(part), inside, float(np.mean(expected.sum(axis=1) < seen.sum())))


def _flags(table: pd.DataFrame, observed: Observed | None, settings: PriorCheckSettings, *, physical: bool) -> tuple[str, ...]:
    said = []
    for row in table.to_dict(orient="records"):
        name = row["batch"]
        if row["p_negative"] > settings.negative:
            said.append(
                f"{name}: the prior allows a negative time with probability {row['p_negative']:.0%}; raise its lower bounds"
            )
        if physical and row["p_below_floor"] - row["p_negative"] > settings.below_floor:
            said.append(
                f"{name}: faster than the hardware ({row['floor_s'] * 1e3:.3g} ms at least) with probability "
                f"{row['p_below_floor']:.0%}; raise the lower bounds or check the hardware's figures"
            )
        if row["p_slow"] > settings.slow:
            said.append(
                f"{name}: over {settings.slow_ratio:g} times what the hardware needs with probability {row['p_slow']:.0%}; lower the "
                "upper bounds"
            )
    if observed is not None and not settings.outside / 2 <= observed.total <= 1 - settings.outside / 2:
        share, side = (observed.total, "faster") if observed.total < 0.5 else (1 - observed.total, "slower")
        said.append(
            f"the {observed.rows} observed rows together are {side} than the prior expects: at most {share:.1%} of configurations drawn from "
            "it are as extreme; prior and data disagree"
        )
    return tuple(said)
