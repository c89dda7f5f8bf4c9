"""What a row is worth: acquisition functions, each a closed form given the scales, averaged over S draws of them.

With M the covariance of the coefficients, x and e a row's design and noise variance (both given the rows chosen before in its block, see
`belief`), v = x'Mx, and the deployment mix rows x_j of weight w_j, all relative to the expected step time:

    information   1/2 log(1 + v / e)                              nats the row is expected to tell of the coefficients (Lindley 1956)
    deployment    x'M T M x / (e + v),   T = sum w_j x_j x_j'     what goes of the mean relative variance of the mix (V- or I-optimality)
    epig          sum w_j -1/2 log(1 - r_j^2),                    nats it is expected to tell of a step of the mix,
                  r_j^2 = (x'M x_j)^2 / ((e + v)(e_j + x_j'M x_j))      r_j their correlation (Bickford Smith et al. 2023, arXiv:2304.08151)
    variance      v                                               predictive variance of the expected value

`random`, `stratified` and `residual` are what these are measured against; they know no gain.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


class Acquisition(StrEnum):
    """How rows are chosen."""

    DEPLOYMENT = "deployment"
    """The most of the deployment mix's relative variance removed."""
    EPIG = "epig"
    """The most expected information on steps of the deployment mix."""
    INFORMATION = "information"
    """The most expected information on the coefficients."""
    VARIANCE = "variance"
    """The largest relative predictive variance."""
    RANDOM = "random"
    """Rows at random."""
    STRATIFIED = "stratified"
    """Rows at random, each bin of queue depth and KV usage in turn."""
    RESIDUAL = "residual"
    """The largest absolute residuals of the fit at hand, as the original design has it; needs labels."""

    @property
    def baseline(self) -> bool:
        """Whether it is one of the rules that the others are measured against, which need no model of what a row tells."""
        return self in (Acquisition.RANDOM, Acquisition.STRATIFIED, Acquisition.RESIDUAL)

    @property
    def lazy(self) -> bool:
        """Whether rows of other blocks can only lower a row's gain, so that old gains bound new ones."""
        return self in (Acquisition.INFORMATION, Acquisition.VARIANCE)


def information_gain(variance: FloatArray, noise: FloatArray) -> FloatArray:
    """Return the expected information on the coefficients in nats, shape (n,).

    Parameters
    ----------
    variance : ndarray, shape (n, S)
        v.
    noise : ndarray, shape (n, S) or (S,)
        e.
    """
    return np.asarray(0.5 * np.log1p(variance / noise).mean(axis=1))


def variance_reduction(reduced: FloatArray, variance: FloatArray, noise: FloatArray) -> FloatArray:
    """Return what goes of the mean relative variance of the mix, shape (n,).

    Parameters
    ----------
    reduced : ndarray, shape (n, S)
        x'M T M x.
    variance, noise : ndarray, shape (n, S)
        v and e.
    """
    return np.asarray((reduced / (noise + variance)).mean(axis=1))


def predictive_information(correlation_square: FloatArray, weights: FloatArray) -> FloatArray:
    """Return the expected information on a step of the mix in nats, shape (n,).

    Parameters
    ----------
    correlation_square : ndarray, shape (n, J, S)
        r_j^2.
    weights : ndarray, shape (J,)
    """
    return np.asarray(-0.5 * np.einsum("njs,j->n", np.log1p(-correlation_square), weights) / correlation_square.shape[2])


def predictive_information_bound(
    first_order: FloatArray, variance: FloatArray, noise: FloatArray, share: FloatArray
) -> FloatArray:
    """Return an upper bound of `predictive_information`, shape (n,), from quadratic forms alone.

    -log(1 - r) <= r g(R) for r <= R with g(R) = -log(1 - R) / R increasing, and r_j^2 <= v / (e + v) times the largest share of the mean in
    the variance of a step of the mix, as |x'M x_j|^2 <= v v_j.

    Parameters
    ----------
    first_order : ndarray, shape (n, S)
        sum w_j r_j^2.
    variance, noise : ndarray, shape (n, S)
    share : ndarray, shape (S,)
        max_j v_j / (e_j + v_j).
    """
    most = np.maximum(share * variance / (noise + variance), 1e-12)
    return np.asarray((0.5 * first_order * -np.log1p(-most) / most).mean(axis=1))
