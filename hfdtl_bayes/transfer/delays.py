"""Delays of requests (alpha): calibrated from few journeys, and scored in the two parts they consist of.

A request's `queue_delay` is two questions. Who waits: the feature set's `support`, a rule without parameters (no slot was free). And how
long those who wait wait: the fitted model. A relative error of a delay of nothing means nothing, so each part has a score of its
own, and only the mean delay of all requests at one load, which planners ask for, takes both together. `api_delay` has the second
part only.

The mean over the n requests of a regime, of which the rule lets those in W wait, is predicted as

    (sum over W of x_i'theta) / n + sum over drift blocks B of d_B (sum over B of s_i) / n + (sum over W of s_i eps_i) / n

and those outside W as nothing. What the rule gets wrong has no place in that interval, so misses of the rule show as regimes outside.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import FeatureSet, response
from hfdtl_bayes.model import LatencyPosterior, SamplerSettings
from hfdtl_bayes.model.draws import Draws
from hfdtl_bayes.traces import drop_warmup, time_blocks
from hfdtl_bayes.transfer.calibration import calibrate_by_statistics, usable_rows
from hfdtl_bayes.transfer.crps import crps
from hfdtl_bayes.transfer.evaluation import fitted_block_length, percentage_errors

FloatArray = NDArray[np.float64]

DELAYS = ("queue_delay", "api_delay")
"""Quantities that are observed on requests."""


@dataclass(frozen=True)
class WaitRule:
    """How well a rule tells which requests wait longer than the floor, one reference step.

    Attributes
    ----------
    requests, waited : int
        All, and those that waited longer than the floor.
    false_waits : int
        Told to wait and did not.
    missed_waits : int
        Waited and were told not to.
    missed_s : float
        Their delay, summed, as a share of that of all requests: what the rule's misses cost.
    """

    requests: int
    waited: int
    false_waits: int
    missed_waits: int
    missed_s: float

    @property
    def right(self) -> float:
        """Share of requests told rightly."""
        return 1.0 - (self.false_waits + self.missed_waits) / self.requests


@dataclass(frozen=True)
class DelayScores:
    """Accuracy of predicted delays, who waits and how long apart.

    Attributes
    ----------
    config_id, quantity : str
    rule : WaitRule or None
        Who waits; None where the feature set has no rule, so that every request is modelled.
    waiting : int
        Requests the second part is scored over: they waited longer than the floor, and the rule said that they would.
    mape, median_ape : float
        Mean and median absolute percentage error of the expected delay over them, as fractions; NaN if there are none.
    crps_s, crps : float
        Mean continuous ranked probability score over them, in seconds and relative to their mean delay.
    coverage : float
        Share of them inside their 95 % predictive interval.
    by_load : DataFrame
        Per regime, in the order of the requests, both parts together: `requests`; `waited`, of them; `told`, those the rule lets
        wait; `observed_s` and `predicted_s`, mean delays; `sd_s`, `q2.5_s`, `q97.5_s` of the mean (never below zero); whether the
        observed mean lies `inside`. Delays up to the floor of requests told not to wait count as none in `observed_s`.
    """

    config_id: str
    quantity: str
    rule: WaitRule | None
    waiting: int
    mape: float
    median_ape: float
    crps_s: float
    crps: float
    coverage: float
    by_load: pd.DataFrame

    @property
    def loads_covered(self) -> float:
        """Share of regimes whose mean lies inside its interval, of those in which somebody waited or was told to; NaN if none."""
        some = self.by_load[(self.by_load["waited"] > 0) | (self.by_load["told"] > 0)]
        return float(some["inside"].mean()) if len(some) else float("nan")

    @property
    def mean_error(self) -> float:
        """Error of the mean delay by load: sum over regimes of |predicted - observed| over the sum observed, NaN without any delay."""
        total = float(self.by_load["observed_s"].sum())
        return (
            float((self.by_load["predicted_s"] - self.by_load["observed_s"]).abs().sum()) / total if total > 0 else float("nan")
        )

    def __str__(self) -> str:
        """Return a few sentences for a person."""
        said = f"{self.quantity} of {self.config_id}: "
        if self.rule is not None:
            r = self.rule
            said += f"who waits is told rightly for {r.right:.1%} of {r.requests} requests ({r.false_waits} false, {r.missed_waits} missed); "
        if not self.waiting:
            return said + "no request waited longer than a step where it was told to, so how long is not judged"
        return (
            f"{said}{self.waiting} that waited: MAPE {self.mape:.1%}, median {self.median_ape:.1%}, CRPS {self.crps:.1%} of the mean "
            f"delay, 95 % intervals cover {self.coverage:.1%}; mean delay by load off by {self.mean_error:.1%}, "
            f"{self.loads_covered:.0%} of the loads inside their intervals"
        )


def require_delay(features: FeatureSet) -> None:
    """Refuse a quantity that requests do not have.

    Raises
    ------
    InputError
        If it is the step time.
    """
    if features.quantity not in DELAYS:
        raise InputError(
            f"this posterior is of {features.quantity}; delays are scored and calibrated on a fit of {' or '.join(DELAYS)} "
            "(--quantity, quantity=)"
        )


def calibrate_delays(
    donors: LatencyPosterior,
    requests: pd.DataFrame,
    configuration: ServingConfiguration,
    *,
    engine: str = "auto",
    settings: SamplerSettings | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> LatencyPosterior:
    """Calibrate a target's delay from journeys of requests, however few of them waited.

    Of a hundred requests perhaps twenty wait. `calibrate` asks for as many rows as there are coefficients; conditioning the donors'
    prediction is exact with a single one, and says by its intervals how much one is worth.

    Parameters
    ----------
    donors : LatencyPosterior
        Of the delay.
    requests : DataFrame
        Validated, in time order, those that did not wait among them.
    configuration : ServingConfiguration
        The target's.
    engine : {"auto", "conditional", "exact", "pymc"}
    settings : SamplerSettings, optional
        Both as in `calibrate_statistics`.
    seed, show_progress
        As in `fit`.

    Returns
    -------
    LatencyPosterior
        With `target` set.

    Raises
    ------
    InputError
        If the donors are of step times, none of the requests can be used, the target is a donor, or a feature is not
        defined for it.
    """
    features = donors.feature_set
    require_delay(features)
    rows = usable_rows(requests, configuration, features)
    if rows.empty:
        why = "found all slots taken" if features.support is not None else "has a known arrival"
        raise InputError(
            f"none of the {len(requests)} requests of {configuration.config_id!r} {why}, so they say nothing of its "
            f"{features.quantity}; record some at a load near capacity, or predict it zero-shot from the donors"
        )
    return calibrate_by_statistics(
        donors, rows, configuration, engine=engine, settings=settings, seed=seed, show_progress=show_progress
    )


def score_delays(
    posterior: LatencyPosterior,
    requests: pd.DataFrame,
    configuration: ServingConfiguration,
    *,
    block_length: int | None = None,
    seed: int = 0,
) -> DelayScores:
    """Compare predicted delays with observed ones.

    Parameters
    ----------
    posterior : LatencyPosterior
        Of a delay, calibrated on the configuration or not (zero-shot).
    requests : DataFrame
        All requests of the time that is judged, validated, in time order and not used for calibration. Warm-up is left out.
    configuration : ServingConfiguration
    block_length : int, optional
        Modelled requests per drift block; by default those the configuration was fitted with.
    seed : int

    Raises
    ------
    InputError
        If the posterior is of step times, there are no requests, a column is missing or a feature is not defined.
    """
    features = posterior.feature_set
    require_delay(features)
    requests = drop_warmup(requests)
    if features.quantity == "api_delay":
        requests = requests[requests["arrival_s"].notna()] if "arrival_s" in requests.columns else requests
    if requests.empty:
        raise InputError(f"no request of {configuration.config_id!r} to judge after warm-up; give some that were held out")
    observed = response(requests, features.quantity)
    floor = features.noise_floor(configuration)
    told, waited = features.supported(requests, configuration), observed > floor
    rule = None
    if features.support is not None:
        missed = waited & ~told
        rule = WaitRule(
            len(requests),
            int(waited.sum()),
            int((told & ~waited).sum()),
            int(missed.sum()),
            float(observed[missed].sum() / max(observed.sum(), np.finfo(float).tiny)),
        )
    scored = requests[told & waited]
    found = dict.fromkeys(("mape", "median_ape", "crps_s", "crps", "coverage"), float("nan"))
    if len(scored):
        predicted, own = posterior.predict(scored, configuration, seed=seed), observed[told & waited]
        errors = percentage_errors(own, predicted["mean_s"].to_numpy())
        found["mape"], found["median_ape"] = float(errors.mean()), float(np.median(errors))
        found["crps_s"], found["crps"] = crps(posterior, scored, configuration, seed=seed)
        found["coverage"] = float(np.mean((own >= predicted["q2.5_s"]) & (own <= predicted["q97.5_s"])))
    length = block_length or fitted_block_length(posterior, configuration.config_id)
    counted = np.where(told | waited, observed, 0.0)
    by_load = _by_load(posterior, requests, configuration, told, length, seed)
    regimes = requests["regime"].to_numpy()
    by_load.insert(1, "waited", [int(waited[regimes == r].sum()) for r in by_load.index])
    by_load.insert(3, "observed_s", [float(counted[regimes == r].mean()) for r in by_load.index])
    inside = (by_load["observed_s"] >= by_load["q2.5_s"]) & (by_load["observed_s"] <= by_load["q97.5_s"])
    return DelayScores(
        configuration.config_id, features.quantity, rule, len(scored), **found, by_load=by_load.assign(inside=inside)
    )  # fmt: skip


def _by_load(
    posterior: LatencyPosterior,
    requests: pd.DataFrame,
    configuration: ServingConfiguration,
    told: NDArray[np.bool_],
    block_length: int,
    seed: int,
) -> pd.DataFrame:
    """Return the predicted mean delay of each regime with its interval."""
    draws = posterior.draws(configuration, seed)
    rng = np.random.default_rng([seed, 3])
    waiting = requests[told]
    design = posterior.feature_set.design(waiting, configuration) if len(waiting) else np.zeros((0, len(draws.mean)))
    scale = posterior.scale_s(design @ draws.mean, configuration)
    blocks = time_blocks(waiting, block_length)
    rows = {}
    for regime in pd.unique(requests["regime"]):
        count = int((requests["regime"] == regime).sum())
        own = (waiting["regime"] == regime).to_numpy()
        mean = _sum_draws(draws, design[own], scale[own], blocks[own], rng) / count
        low, high = np.quantile(mean, (0.025, 0.975))
        rows[regime] = {
            "requests": count,
            "told": int(own.sum()),
            "predicted_s": float(design[own].sum(axis=0) @ draws.mean / count),
            "sd_s": float(mean.std()),
            "q2.5_s": max(float(low), 0.0),
            "q97.5_s": max(float(high), 0.0),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("regime")


def _sum_draws(
    draws: Draws, design: FloatArray, scale: FloatArray, blocks: NDArray[np.int64], rng: np.random.Generator
) -> FloatArray:
    """Draw the sum of new delays of some requests, those of one block with one drift, shape (S,)."""
    if not len(design):
        return np.zeros(len(draws.theta))
    _, of, sizes = np.unique(blocks, return_inverse=True, return_counts=True)
    if draws.likelihood != "gaussian":
        return np.asarray(draws.block_means(draws.theta @ design.T, scale, of, rng) @ sizes)
    drift = np.square(draws.omega) * np.square(np.bincount(of, scale)).sum()
    noise = np.square(draws.sigma) * np.square(scale).sum()
    return np.asarray(draws.theta @ design.sum(axis=0) + np.sqrt(drift + noise) * rng.standard_normal(len(draws.sigma)))
