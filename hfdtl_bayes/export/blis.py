"""BLIS coefficient vectors for its trained-physics backend, from a posterior of step times.

Within one configuration BLIS's eleven basis functions span six directions (weights, layers and the constant are all
constants there), so the coefficients of those constants are not told apart: all of it goes into the per-step term b7, and
b3, b5 and b8 are zero. A vector is therefore valid for its configuration only, where it gives the same step times.

A posterior of feature set `blis-physics` is exported as it is; only coefficients with a negative posterior mean are brought
to zero, the others refitted in the posterior's own metric. Any other posterior is projected: the non-negative coefficients
whose step times are closest, in relative terms, to the posterior mean over the configuration's traffic. What that loses is
stated, and refused above a limit.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import ExportError
from hfdtl_bayes.export.projection import closest_in_metric, closest_predictions
from hfdtl_bayes.export.vectors import (
    BETA_LABELS,
    FEATURE_OF_BETA,
    IN_MICROSECONDS,
    MICRO,
    BlisVectors,
    ExportSettings,
    check_vectors,
)
from hfdtl_bayes.features import FeatureSet, feature_set, operating_points
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.statistics import own_prior

FloatArray = NDArray[np.float64]

_FEWEST_IDLE = 5
"""Requests that found the engine idle below which their median says little."""


def idle_api_delay_s(requests: pd.DataFrame) -> float | None:
    """Return the median of queued - arrival over requests that found the engine idle, in seconds.

    This is BLIS's alpha0. The plain mean of queued - arrival contains the wait for the running step, which BLIS simulates
    itself, and would count it twice. So would an `api_delay` posterior asked about an empty queue: no trace column says how
    much of the running step was left, and its constant takes the mean of that up (10 to 40 ms on recorded engines whose idle
    delay is 1 to 4 ms). That is why alpha0 is taken from the requests themselves.

    A request found the engine idle if nothing ran or waited when it was queued; where the trace does not say, if every
    earlier request had finished when it arrived.

    Parameters
    ----------
    requests : DataFrame
        Rows of a request trace.

    Returns
    -------
    float or None
        None if arrivals are not recorded, idleness cannot be told, or fewer than five requests found the engine idle.
    """
    if not {"arrival_s", "queued_s"} <= set(requests.columns):
        return None
    if {"running_requests", "waiting_requests"} <= set(requests.columns):
        idle = (requests["running_requests"] == 0) & (requests["waiting_requests"] == 0)
    elif "finished_s" in requests.columns:
        requests = requests.sort_values("arrival_s")
        # A request that never finished keeps the engine busy for all we know.
        busy_until = requests["finished_s"].fillna(np.inf).cummax().shift(fill_value=-np.inf)
        idle = requests["arrival_s"] > busy_until
    else:
        return None
    delay = (requests["queued_s"] - requests["arrival_s"])[idle].dropna()
    return float(max(delay.median(), 0.0)) if len(delay) >= _FEWEST_IDLE else None


def blis_vectors(
    posterior: LatencyPosterior,
    configuration: ServingConfiguration,
    traffic: pd.DataFrame | None = None,
    *,
    alpha0_s: float = 0.0,
    settings: ExportSettings | None = None,
    seed: int = 0,
) -> BlisVectors:
    """Express the posterior mean of one configuration as BLIS coefficients.

    Parameters
    ----------
    posterior : LatencyPosterior
        Of step_time.
    configuration : ServingConfiguration
        Fitted, or never seen.
    traffic : DataFrame, optional
        Batches the vector is to be right for and is judged on; by default a grid over all batches the engine can run. With
        traffic, that grid decides only what the traffic leaves open.
    alpha0_s : float
        Idle delay from arrival to queue, seconds; see `idle_api_delay_s`.
    settings : ExportSettings, optional
    seed : int
        For a configuration never seen.

    Returns
    -------
    BlisVectors
        Checked.

    Raises
    ------
    ExportError
        If the posterior is not of step_time, its mean is not positive on the traffic, the projection loses more than the
        limit, or a value is not finite, negative or beyond any sane magnitude.
    InputError
        If a column of the traffic is missing or not finite.
    """
    settings = settings or ExportSettings()
    if posterior.feature_set.quantity != "step_time":
        raise ExportError(
            f"BLIS betas are step times, this posterior is of {posterior.feature_set.quantity}; fit --quantity step_time"
        )
    grid = operating_points(configuration)
    frame = grid if traffic is None else traffic
    if frame.empty:
        raise ExportError(f"no traffic to export {configuration.config_id!r} for; give at least one batch, or none at all")
    theta = posterior.draws(configuration, seed).theta
    own = posterior.feature_set.design(frame, configuration)
    mean = own @ theta.mean(axis=0)
    if not (np.isfinite(mean).all() and (mean > 0).all()):
        raise ExportError(
            f"the posterior mean of {configuration.config_id!r} is not positive in {int((~(mean > 0)).sum())} of {len(frame)} "
            "batches; calibrate on more rows, or export for traffic like that calibrated on (--traffic)"
        )
    basis = feature_set("blis-physics")
    design = basis.design(frame, configuration)
    # A term that is zero in every batch (communication at tp = 1) is not informed, and not exported.
    used = (np.abs(basis.design(grid, configuration)) > 0).any(axis=0) | (np.abs(design) > 0).any(axis=0)
    if posterior.feature_set is basis:
        weights, free = closest_in_metric(theta[:, used].mean(axis=0), np.cov(theta[:, used], rowvar=False))
    else:
        parts = [(design[:, used], mean, 1.0)]
        if traffic is not None:
            far = posterior.feature_set.design(grid, configuration) @ theta.mean(axis=0)
            sane = far > 0
            parts.append((basis.design(grid[sane], configuration)[:, used], far[sane], settings.outside_weight))
        prior_mean, prior_sd = own_prior(basis, configuration)
        weights, free = closest_predictions(parts, prior_mean[used], prior_sd[used], settings.tie_breaker)
    coefficients = np.zeros(len(used))
    coefficients[used] = weights
    negative = np.zeros(len(used), dtype=bool)
    negative[used] = (free < 0) & (weights <= 0)
    difference = np.abs(design @ coefficients / mean - 1)
    sd = np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", own, np.atleast_2d(np.cov(theta, rowvar=False)), own), 0.0))
    vectors = BlisVectors(
        configuration=configuration,
        alpha=(alpha0_s * MICRO, 0.0, 0.0),
        beta=_in_blis_units(coefficients, basis, 11 if configuration.engine.data_parallel > 1 else 10),
        projection_error=float(difference.mean()),
        worst_projection_error=float(difference.max()),
        clipped=tuple(n for n in BETA_LABELS if FEATURE_OF_BETA[n] in set(np.array(basis.coef_names)[negative])),
        rows=len(frame),
        posterior_sd=float((sd / mean).mean()),
        notes=_notes(configuration),
    )
    check_vectors(vectors, settings)
    return vectors


def _in_blis_units(coefficients: FloatArray, basis: FeatureSet, length: int) -> tuple[float, ...]:
    physical = dict(zip(basis.coef_names, coefficients * basis.references, strict=True))
    return tuple(
        float(physical.get(FEATURE_OF_BETA[label], 0.0)) * (MICRO if label in IN_MICROSECONDS else 1.0)
        for label in BETA_LABELS[:length]
    )


def _notes(configuration: ServingConfiguration) -> tuple[str, ...]:
    """Return the limits of use of a configuration's vectors."""
    llm, tp = configuration.llm, configuration.engine.tensor_parallel
    hardware = configuration.hardware
    notes = [
        "for this configuration only: weight loading, layers and MoE layers do not vary in it and stand in b7 (b3, b5, b8 = 0)",
        f"for hardware of {hardware.peak_flops / 1e12:g} TFLOP/s and {hardware.memory_bandwidth / 1e12:g} TB/s: give BLIS these "
        "figures with --hardware-config",
    ]
    if llm.num_key_value_heads % tp:
        notes.append(
            f"{llm.num_key_value_heads} KV heads are not divisible by tp {tp}: BLIS may refuse to run this configuration"
        )
    if llm.is_moe and 0 < llm.num_moe_layers < llm.num_layers:
        notes.append(
            f"BLIS counts MoE layers from interleave_moe_layer_step; the vector is for {llm.num_moe_layers} of {llm.num_layers}"
        )
    return tuple(notes)
