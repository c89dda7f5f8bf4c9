"""Where the variance of a prediction comes from: which level of the model, and which coefficient.

The model is a chain: scales psi = (tau, rho, sigma, omega), population phi, effect of the hardware w_h, the configuration's own coefficients
theta, drift of a time block, noise of a row. With x the design of a row and s its error scale, the law of total variance taken down the
chain, everything given the rows that were fitted,

    Var(y) = Var(E[x'theta | psi])                  scales
           + E Var(E[x'theta | phi, psi])           population
           + E Var(E[x'theta | w_h, phi, psi])      hardware
           + E Var(E[x'theta | own deviation, w_h, phi, psi])       configuration
           + E Var(x'theta | own deviation, w_h, phi, psi)          discrepancy
           + E[omega^2] s^2 + E[sigma^2] s^2        drift, noise

Each part is what knowing that level exactly would remove on average, if all above it were known. The first five are quadratic forms
x'Mx with one matrix each: closed forms given the scales (`ExactDensity.levels`) averaged over their posterior draws, so no Monte Carlo
error of coefficients enters. Scales act on the variance mostly through what they let the levels below do (E[tau^2] is in hardware and
configuration); their own part is only how far they move the expected value.

By coefficient: with V the sum of these matrices, x_k (V x)_k = Cov(x_k theta_k, x'theta) adds up to x'Vx over k (Euler's
allocation). It is negative for a coefficient whose error the others make good; how much of x'Vx would go if theta_k were known,
(V x)_k^2 / (V_kk x'Vx), is never negative and does not add up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.model import ExactDensity, LatencyPosterior, drawn_coordinates

FloatArray = NDArray[np.float64]

COEFFICIENT_SOURCES = ("scales", "population", "hardware", "configuration", "discrepancy")
"""What makes the expected value uncertain, from the top of the model down. The discrepancy is what is believed of the features' misfit and
not yet known from the configuration's rows; zero where the feature set has none."""

SOURCES = (*COEFFICIENT_SOURCES, "drift", "noise")
"""All sources, in the order of the law of total variance."""


_TINY = float(np.finfo(float).tiny)


@dataclass(frozen=True)
class VarianceSources:
    """The predictive variance of rows, or of means of blocks of them, by source and by coefficient.

    Attributes
    ----------
    config_id : str
    fitted : bool
        Whether the configuration's own rows were fitted; False if it is predicted zero-shot.
    by_source : DataFrame, n rows
        Seconds squared, a column for each of `SOURCES`. All zero in rows outside the feature set's support.
    by_coefficient : DataFrame, n rows
        Seconds squared, a column for each coefficient: its part of the variance of the expected value, the sum of `COEFFICIENT_SOURCES`.
        Negative where it makes good what others get wrong. The constant holds the config features; the discrepancy is one column.
    removed_if_known : DataFrame, n rows
        Share of the variance of the expected value that would go if the coefficient were known exactly; these do not add up.
    scale_s : ndarray, shape (n,)
        What errors are relative to, seconds.
    """

    config_id: str
    fitted: bool
    by_source: pd.DataFrame
    by_coefficient: pd.DataFrame
    removed_if_known: pd.DataFrame
    scale_s: FloatArray

    @property
    def total(self) -> pd.Series:
        """Variance of a new observation, seconds squared: `sd_s` of `LatencyPosterior.predict` squared, less its Monte Carlo error."""
        return self.by_source.sum(axis=1)

    def shares(self) -> pd.DataFrame:
        """Return the share of each source in the variance of each row; they add up to one, or are zero where there is none."""
        total = self.total
        return self.by_source.div(total.where(total > 0, 1.0), axis=0)

    def coefficient_shares(self) -> pd.DataFrame:
        """Return the share of each coefficient in the variance of each row's expected value; they add up to one where there is any."""
        total = self.by_coefficient.sum(axis=1)
        return self.by_coefficient.div(total.where(total > 0, 1.0), axis=0)

    def _relative(self, variances: pd.DataFrame) -> pd.Series:
        """Return variances relative to the square of the scale, mean over rows: a long step counts no more than a short one."""
        known = self.scale_s > 0
        # Where the features describe no row at all, nothing is uncertain.
        return pd.Series(variances[known].div(self.scale_s[known] ** 2, axis=0).mean()).fillna(0.0)

    def table(self) -> pd.DataFrame:
        """Return one row per source over all rows: `source`, `share` of the mean relative variance, `sd` relative to the step or delay."""
        relative = self._relative(self.by_source)
        share = relative / max(float(relative.sum()), _TINY)
        return pd.DataFrame({"source": share.index, "share": share.to_numpy(), "sd": np.sqrt(relative.to_numpy())})

    def coefficient_table(self) -> pd.DataFrame:
        """Return one row per coefficient over all rows, the largest first.

        `coefficient`; `share` of the mean relative variance of the expected value; `removed_if_known`, what would go of it.
        """
        relative = self._relative(self.by_coefficient)
        expected = self.by_coefficient.sum(axis=1)
        removed = self._relative(self.removed_if_known.mul(expected, axis=0))
        total = max(float(relative.sum()), _TINY)
        found = pd.DataFrame(
            {"coefficient": relative.index, "share": relative.to_numpy() / total, "removed_if_known": removed.to_numpy() / total}
        )
        return found.sort_values("removed_if_known", ascending=False, ignore_index=True)

    def __str__(self) -> str:
        """Return one sentence: the sources of at least a hundredth, the largest first, and the coefficient that matters most."""
        if not (self.scale_s > 0).any():
            return f"no row of {self.config_id} is described by the features, so nothing has a variance"
        own = self.table().sort_values("share", ascending=False)
        said = ", ".join(f"{name} {share:.0%}" for name, share in zip(own["source"], own["share"], strict=True) if share >= 0.01)
        first = self.coefficient_table().iloc[0]
        known = "fitted" if self.fitted else "never seen"
        return (
            f"predictive variance of {self.config_id} ({known}): {said}; knowing {first['coefficient']} exactly would remove "
            f"{first['removed_if_known']:.0%} of what the coefficients leave open"
        )


def coefficient_covariances(posterior: LatencyPosterior, configuration: ServingConfiguration) -> dict[str, FloatArray]:
    """Return the covariance of a configuration's coefficients by source, shape (K, K) each, in reference units.

    Parameters
    ----------
    posterior : LatencyPosterior
    configuration : ServingConfiguration
        One that was fitted, or a new one from the population.

    Returns
    -------
    dict
        By `COEFFICIENT_SOURCES`; they add up to the covariance of the coefficients.

    Raises
    ------
    InputError
        If the posterior is of rows (engine "rows"), whose likelihood has no closed form; or a configuration of this name was
        fitted but differs.
    """
    if posterior.rows:
        raise InputError(
            f"the sources of the variance are closed forms of Gaussian errors, and this posterior is of the engine rows "
            f"({posterior.likelihood}); fit it with the engine exact"
        )
    fitted = None
    if configuration.config_id in posterior.config_ids:
        fitted = posterior.config_ids.index(configuration.config_id)
        if posterior.configuration(configuration.config_id) != configuration:
            raise InputError(
                f"configuration {configuration.config_id!r} differs from the one of that name that was fitted; give the new one "
                "another config_id"
            )
    density = ExactDensity(posterior.statistics, posterior.feature_set, posterior.priors)
    every = np.arange(len(posterior.draws_of("tau")))
    x = drawn_coordinates(posterior, density, range(len(posterior.config_ids)), every)
    mean, levels = density.levels(x, configuration, fitted)
    centred = mean - mean.mean(axis=0)
    by_level = (levels.population, levels.hardware, levels.own - levels.discrepancy, levels.discrepancy)
    parts = (centred.T @ centred / len(mean), *(v.mean(axis=0) for v in by_level))
    return dict(zip(COEFFICIENT_SOURCES, parts, strict=True))


def variance_sources(
    posterior: LatencyPosterior,
    frame: pd.DataFrame,
    configuration: ServingConfiguration,
    *,
    blocks: NDArray[np.int64] | None = None,
    seed: int = 0,
) -> VarianceSources:
    """Split the predictive variance of rows by where it comes from.

    Parameters
    ----------
    posterior : LatencyPosterior
        Of donors, or with a calibrated target.
    frame : DataFrame, n rows
        Batch compositions: the columns the feature set reads.
    configuration : ServingConfiguration
        Fitted, or never seen: then its coefficients are a draw from the population.
    blocks : ndarray of int, shape (n,), optional
        Split the variance of the mean of each block instead, whose rows share one drift, as in `predict_block_means`.
    seed : int
        That of `predict`: noise and drift of a configuration never seen are drawn.

    Returns
    -------
    VarianceSources
        With the frame's index, or the numbers of the blocks.

    Raises
    ------
    InputError
        If there are no rows, columns are missing or not finite, blocks do not belong to the rows, or the posterior is of rows.
    """
    if frame.empty:
        raise InputError(f"no rows of {configuration.config_id!r} whose variance could be split; give at least one")
    features = posterior.feature_set
    covariances = coefficient_covariances(posterior, configuration)
    draws = posterior.draws(configuration, seed)
    supported = features.supported(frame, configuration)
    design = np.where(supported[:, None], features.design(frame, configuration), 0.0)
    scale = np.where(supported, posterior.scale_s(design @ draws.mean, configuration), 0.0)
    index = frame.index
    # Weights of s^2 in the variances of drift and noise: one for a row, and for a mean what is shared and what averages out.
    drift_square, noise_square = scale**2, scale**2
    if blocks is not None:
        if len(blocks) != len(frame):
            raise InputError(f"{len(blocks)} block numbers were given for {len(frame)} rows; give one for each row")
        numbers, of, counts = np.unique(blocks, return_inverse=True, return_counts=True)
        index = pd.Index(numbers, name="block")
        averaged = np.zeros((len(numbers), design.shape[1]))
        np.add.at(averaged, of, design)
        design = averaged / counts[:, None]
        noise_square = np.bincount(of, scale**2) / counts**2
        scale = np.bincount(of, scale) / counts
        drift_square = scale**2
    columns = {name: ((design @ m) * design).sum(axis=1) for name, m in covariances.items()}
    columns["drift"] = float(np.mean(draws.omega**2)) * drift_square
    columns["noise"] = float(np.mean(draws.sigma**2)) * noise_square
    total = np.sum(list(covariances.values()), axis=0)
    along = design @ total
    variance = (along * design).sum(axis=1)
    denominator = np.diag(total) * variance[:, None]
    removed = np.divide(along**2, denominator, out=np.zeros_like(along), where=denominator > 0)
    names, parts = list(features.pooled_names), along * design
    if features.discrepancy:
        # One source, whatever its number of coefficients: known together.
        k = len(names)
        names.append("discrepancy")
        together = np.vecdot(along[:, k:], np.linalg.solve(total[k:, k:], along[:, k:].T).T)
        known = np.divide(together, variance, out=np.zeros_like(variance), where=variance > 0)
        removed = np.column_stack([removed[:, :k], known])
        parts = np.column_stack([parts[:, :k], parts[:, k:].sum(axis=1)])
    return VarianceSources(
        configuration.config_id,
        configuration.config_id in posterior.config_ids,
        pd.DataFrame(columns, index=index),
        pd.DataFrame(parts, index=index, columns=names),
        pd.DataFrame(removed, index=index, columns=names),
        scale,
    )
