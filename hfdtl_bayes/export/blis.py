"""BLIS coefficient vectors from a posterior of step times.

Within one configuration the eleven basis functions of trained-physics span six directions (weights, layers and the constant are all
constants there), so the coefficients of those constants are not told apart: all of it goes into the per-step term b7, and
b3, b5 and b8 are zero. A vector is therefore valid for its configuration only, where it gives the same step times.

A posterior of the backend's own basis (`blis-physics` for trained-physics) is exported as it is; only coefficients with a negative
posterior mean are brought to zero, the others refitted in the posterior's own metric. Any other posterior is projected: the
non-negative coefficients whose step times are closest to the posterior mean over the configuration's traffic. Closest in relative terms,
because errors are relative: it is the Kullback-Leibler projection of the posterior's predictive onto BLIS's model (Piironen & Vehtari
2017, doi:10.1007/s11222-016-9649-y). What that loses is stated, and refused above a limit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration, weight_loading_floor_s
from hfdtl_bayes.errors import ExportError
from hfdtl_bayes.export.noise_free import NoiseFree, noise_free_coefficients
from hfdtl_bayes.export.projection import closest_in_metric, closest_predictions
from hfdtl_bayes.export.vectors import MICRO, TRAINED_PHYSICS, Backend, BlisVectors, ExportSettings, check_vectors
from hfdtl_bayes.features import FeatureSet, operating_points
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.statistics import own_prior

FloatArray = NDArray[np.float64]

FLOOR_SHARE = 0.5
"""Steps below this share of the time to read the weights are impossible: where single draws of a wide posterior ask for them, they are
exported as this long. The replay and the validation of traces draw the same line."""


def blis_vectors(
    posterior: LatencyPosterior,
    configuration: ServingConfiguration,
    traffic: pd.DataFrame | None = None,
    *,
    alpha0_s: float = 0.0,
    alpha_us: tuple[float, float, float] | None = None,
    backend: Backend = TRAINED_PHYSICS,
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
        traffic, that grid decides only what the traffic leaves open. Step times are not read but to see whether the recording is of a
        simulator without noise; see `noise_free_coefficients`.
    alpha0_s : float
        Idle delay from arrival to queue, seconds; see `idle_api_delay_s`.
    alpha_us : tuple of float, optional
        All three alphas in BLIS's microseconds, in the place of `alpha0_s`. Mind that a1 is per request in trained-physics and per input
        token in the older backends; see `queueing_alpha_s`.
    backend : Backend
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
    projector = Projector.of(posterior, configuration, traffic, backend=backend, settings=settings, seed=seed)
    theta = posterior.draws(configuration, seed).mean
    notes: tuple[str, ...] = ()
    if projector.exact and traffic is not None and "step_time_s" in traffic.columns:
        found = noise_free_coefficients(projector.own * MICRO, traffic["step_time_s"].to_numpy(float) * MICRO)
        if found is not None:
            theta, notes = found.centre, (_noise_free_note(projector, found),)
    vectors = projector.vectors(theta, alpha_us or (alpha0_s * MICRO, 0.0, 0.0))
    vectors = replace(vectors, notes=(*vectors.notes, *notes))
    check_vectors(vectors, settings)
    return vectors


def _noise_free_note(projector: Projector, found: NoiseFree) -> str:
    low, high = projector.in_blis_units(found.low), projector.in_blis_units(found.high)
    bounds = ", ".join(f"{n} {a:.6g} to {b:.6g}" for n, a, b in zip(projector.backend.beta, low, high, strict=True))
    return f"the recording has no noise: whole microseconds allow {bounds}, and the middle of that is exported"


@dataclass(frozen=True)
class Projector:
    """One configuration's way from coefficients of a posterior to those of a backend; made once, used for the mean and for draws.

    Attributes
    ----------
    configuration : ServingConfiguration
    backend : Backend
    settings : ExportSettings
    own, own_grid : ndarray, shapes (n, K) and (g, K)
        The posterior's design of the batches the vector is judged on, and of the grid.
    design, grid : ndarray, shapes (n, J) and (g, J)
        The backend's.
    covariance : ndarray, shape (K, K)
        Of the posterior's coefficients.
    exact : bool
        True if the posterior's features are the backend's basis.
    has_traffic : bool
        False if the batches are the grid itself.
    """

    configuration: ServingConfiguration
    backend: Backend
    settings: ExportSettings
    own: FloatArray
    own_grid: FloatArray
    design: FloatArray
    grid: FloatArray
    covariance: FloatArray
    exact: bool
    has_traffic: bool

    @classmethod
    def of(
        cls,
        posterior: LatencyPosterior,
        configuration: ServingConfiguration,
        traffic: pd.DataFrame | None = None,
        *,
        backend: Backend = TRAINED_PHYSICS,
        settings: ExportSettings | None = None,
        seed: int = 0,
    ) -> Projector:
        """Return the projector of a posterior; arguments and errors as `blis_vectors`."""
        features = posterior.feature_set
        if features.quantity != "step_time":
            raise ExportError(f"BLIS betas are step times, this posterior is of {features.quantity}; fit --quantity step_time")
        grid = operating_points(configuration)
        frame = grid if traffic is None else traffic
        if frame.empty:
            raise ExportError(f"no traffic to export {configuration.config_id!r} for; give at least one batch, or none at all")
        theta = posterior.draws(configuration, seed).theta
        return cls(
            configuration=configuration,
            backend=backend,
            settings=settings or ExportSettings(),
            own=features.design(frame, configuration),
            own_grid=features.design(grid, configuration),
            design=backend.basis.design(frame, configuration),
            grid=backend.basis.design(grid, configuration),
            covariance=np.atleast_2d(np.cov(theta, rowvar=False)),
            exact=tuple(f.compute for f in features.varying) == tuple(f.compute for f in backend.basis.varying),
            has_traffic=traffic is not None,
        )

    @cached_property
    def used(self) -> NDArray[np.bool_]:
        """Terms that are not zero in every batch, shape (J,): the others (communication at tp = 1) are not informed, nor exported."""
        return np.asarray((np.abs(self.grid) > 0).any(axis=0) | (np.abs(self.design) > 0).any(axis=0))

    @cached_property
    def expected_sd(self) -> FloatArray:
        """Posterior sd of the expected time of each batch, seconds, shape (n,); the same whichever draw is expressed."""
        return np.asarray(np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", self.own, self.covariance, self.own), 0.0)))

    def vectors(
        self, theta: FloatArray, alpha_us: tuple[float, float, float] = (0.0, 0.0, 0.0), *, floor: bool = False
    ) -> BlisVectors:
        """Express one vector of the posterior's coefficients; not checked against the limits of `ExportSettings`.

        Parameters
        ----------
        theta : ndarray, shape (K,)
        alpha_us : tuple of float
        floor : bool
            True to take batches for which the coefficients give less than half the time to read the weights, or nothing, as taking that
            long; by default a mean that is not positive is refused.

        Raises
        ------
        ExportError
            If a step time is not positive, or not finite.
        """
        mean = self.own @ theta
        least = FLOOR_SHARE * weight_loading_floor_s(self.configuration) if floor else 0.0
        if not (np.isfinite(mean).all() and ((mean > 0).all() or floor)):
            raise ExportError(
                f"the posterior mean of {self.configuration.config_id!r} is not positive in {int((~(mean > 0)).sum())} of {len(mean)} "
                "batches; calibrate on more rows, or export for traffic like that calibrated on (--traffic)"
            )
        target = np.maximum(mean, least)
        coefficients, free = self._project(theta, target, least)
        difference = np.abs(self.design @ coefficients / target - 1)
        zeroed = {n for n, f, w in zip(self.backend.basis.coef_names, free, coefficients, strict=True) if f < 0 and w <= 0}
        length = self.backend.length(self.configuration)
        return BlisVectors(
            configuration=self.configuration,
            alpha=alpha_us,
            beta=self.in_blis_units(coefficients)[:length],
            projection_error=float(difference.mean()),
            worst_projection_error=float(difference.max()),
            clipped=tuple(n for n in self.backend.beta if self.backend.feature_of[n] in zeroed),
            rows=len(mean),
            posterior_sd=float((self.expected_sd / target).mean()),
            notes=_notes(self.configuration, self.backend),
            not_told_apart=tuple(n for n in self.backend.beta[:length] if n in self.not_told_apart),
            backend=self.backend,
        )

    def _project(self, theta: FloatArray, target: FloatArray, least: float) -> tuple[FloatArray, FloatArray]:
        """Return the backend's coefficients in reference units with all of them >= 0, and without that constraint, shapes (J,)."""
        used = self.used
        weights, free = np.zeros(len(used)), np.zeros(len(used))
        if self.exact and (target == self.own @ theta).all():
            covariance = self.covariance[np.ix_(used, used)]
            weights[used], free[used] = closest_in_metric(theta[used], covariance)
            return weights, free
        parts = [(self.design[:, used], target, 1.0)]
        if self.has_traffic:
            far = np.maximum(self.own_grid @ theta, least)
            sane = far > 0
            parts.append((self.grid[sane][:, used], far[sane], self.settings.outside_weight))
        prior_mean, prior_sd = own_prior(self.backend.basis, self.configuration)
        weights[used], free[used] = closest_predictions(parts, prior_mean[used], prior_sd[used], self.settings.tie_breaker)
        return weights, free

    @cached_property
    def not_told_apart(self) -> frozenset[str]:
        """Labels of betas whose single value these batches do not show; those of terms that are zero in all of them included.

        Config features fold into the constant, so neither they nor it are told apart.
        """
        apart = told_apart(self.backend.basis, self.design, self.configuration, self.settings)
        found = {f.name for f in self.backend.basis.config} | {n for n, told in apart.items() if not told}
        if self.backend.basis.config_row(self.configuration).any():
            found.add(self.backend.basis.residual[0].name)
        return frozenset(n for n in self.backend.beta if self.backend.feature_of[n] in found)

    def in_blis_units(self, coefficients: FloatArray) -> tuple[float, ...]:
        """Return coefficients in reference units, shape (J,), as betas in BLIS's order and units; config features are zero."""
        basis, backend = self.backend.basis, self.backend
        physical = dict(zip(basis.coef_names, coefficients * basis.references, strict=True))
        return tuple(
            float(physical.get(backend.feature_of[n], 0.0)) * (MICRO if n in backend.in_microseconds else 1.0)
            for n in backend.beta
        )


def told_apart(
    basis: FeatureSet, design: FloatArray, configuration: ServingConfiguration, settings: ExportSettings | None = None
) -> dict[str, bool]:
    """Return by coefficient, config features folded into the constant, whether batches show its single value.

    It does if knowing the expected time of every batch to the relative error `ExportSettings.told_apart` would remove more than half of
    the prior's variance of it, the others being as uncertain as their priors are: a coefficient whose change another would have to
    follow by many prior sds is told apart from it.

    Parameters
    ----------
    basis : FeatureSet
    design : ndarray, shape (n, J)
        Of the basis.
    configuration : ServingConfiguration
    settings : ExportSettings, optional
    """
    settings = settings or ExportSettings()
    prior_mean, prior_sd = own_prior(basis, configuration)
    size = np.maximum(design @ np.maximum(prior_mean, 0.0), FLOOR_SHARE * weight_loading_floor_s(configuration))
    columns = design * prior_sd / size[:, None]
    precision = columns.T @ columns / (len(columns) * settings.told_apart**2) + np.eye(len(basis.coef_names))
    left = np.diag(np.linalg.inv(precision))
    return {name: bool(share < 0.5) for name, share in zip(basis.coef_names, left, strict=True)}


def _notes(configuration: ServingConfiguration, backend: Backend) -> tuple[str, ...]:
    """Return the limits of use of a configuration's vectors."""
    if backend.name != TRAINED_PHYSICS.name:
        return (
            f"for this configuration only, and for BLIS of a version that has --latency-model {backend.name}",
            "a1 is per input token here; in trained-physics it is once per request",
        )
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
