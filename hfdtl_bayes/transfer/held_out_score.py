"""Joint log score of held-out rows of a configuration that some of its rows were calibrated on.

With psi a draw of all scales given donors and calibration rows, noise and drift (sigma, omega) of the target among them, the target's
coefficients are Gaussian: V = L L' and m from the donors, G and h the information of the calibration rows around a reference r,

    theta | psi, rows ~ Normal(m + L M^-1 L' (h - G (m - r)), L M^-1 L'),    M = I + L' G L

so the held-out rows given psi are jointly Gaussian too (`marginal_log_density`), and their predictive density is the average over
draws. It is the score of all of them at once: errors that rows share, be it a coefficient or the drift of a block, count once.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.model import ExactDensity, LatencyPosterior, drawn_coordinates
from hfdtl_bayes.statistics import ConfigStatistics
from hfdtl_bayes.transfer.scores import log_mean, marginal_log_density

FloatArray = NDArray[np.float64]

DEFAULT_DRAWS = 1000
"""Draws that the density is averaged over, evenly spaced."""


def held_out_score(posterior: LatencyPosterior, held_out: ConfigStatistics, *, draws: int = DEFAULT_DRAWS) -> tuple[float, float]:
    """Return the joint log density in seconds of held-out rows of the calibrated target.

    Parameters
    ----------
    posterior : LatencyPosterior
        Of donors and a target, with Gaussian errors; by conditioning or by a joint refit.
    held_out : ConfigStatistics
        Of rows of the target in time blocks that hold no calibration row.
    draws : int
        Most posterior draws to use.

    Returns
    -------
    score : float
    error : float
        Monte Carlo standard error of the score.

    Raises
    ------
    InputError
        If no target was calibrated, the rows are of another configuration, or errors are not Gaussian.
    """
    own = next((s for s in posterior.statistics if s.config_id == posterior.target), None)
    if own is None or own.configuration != held_out.configuration:
        raise InputError(
            f"the posterior is calibrated for {posterior.target or 'no target'}, the held-out rows are of {held_out.config_id!r}; for a "
            "configuration that the fit does not know, take left_out_score"
        )
    if posterior.likelihood != "gaussian":
        raise InputError(f"errors are {posterior.likelihood}; only Gaussian ones can be integrated out in closed form")
    total = posterior.draws_of("tau").shape[0]
    chosen = np.unique(np.linspace(0, total - 1, min(draws, total)).astype(int))
    of_donors = [c for c, s in enumerate(posterior.statistics) if s is not own]
    target = posterior.statistics.index(own)
    donors = ExactDensity(posterior.donor_statistics, posterior.feature_set, posterior.priors)
    mean, covariance = donors.predictive(drawn_coordinates(posterior, donors, of_donors, chosen), own.configuration)
    with np.errstate(divide="ignore"):
        log_sigma, log_omega = (np.log(posterior.draws_of(n)[chosen, target]) for n in ("sigma", "omega"))
    mean, covariance = _given_rows(posterior, own, mean, covariance, log_sigma, log_omega)
    info = ExactDensity([held_out], posterior.feature_set, posterior.priors).info
    score, error = log_mean(marginal_log_density(info, mean, covariance, log_sigma, log_omega))
    return score - held_out.log_scale_sum, error


def _given_rows(
    posterior: LatencyPosterior,
    own: ConfigStatistics,
    mean: FloatArray,
    covariance: FloatArray,
    log_sigma: FloatArray,
    log_omega: FloatArray,
) -> tuple[FloatArray, FloatArray]:
    """Return mean (S, K) and covariance (S, K, K) of the target's coefficients once its own rows are known as well."""
    info = ExactDensity([own], posterior.feature_set, posterior.priors).info
    weight = 1.0 / (np.exp(2 * log_sigma)[:, None] + info.multiplier[0] * np.exp(2 * log_omega)[:, None])
    gram = np.einsum("sj,jkl->skl", weight, info.gram[0])
    left = weight @ info.target[0] - np.matvec(gram, mean - info.reference[0])
    root = np.linalg.cholesky(covariance)
    transposed = np.swapaxes(root, 1, 2)
    inner = np.linalg.inv(np.eye(mean.shape[1]) + transposed @ gram @ root)
    after = root @ inner @ transposed
    return mean + np.matvec(after, left), 0.5 * (after + np.swapaxes(after, 1, 2))


def thinned(posterior: LatencyPosterior, draws: int) -> LatencyPosterior:
    """Return the posterior with at most about `draws` of its draws, evenly spaced along its chains: what scores cost follows them."""
    sizes = posterior.tree["posterior"].sizes
    step = max(1, sizes["chain"] * sizes["draw"] // draws)
    if step == 1:
        return posterior
    tree = posterior.tree.copy()
    tree["posterior"] = posterior.tree["posterior"].isel(draw=slice(None, None, step))
    return replace(posterior, tree=tree)
