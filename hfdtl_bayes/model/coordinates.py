"""Coordinates in which the sampler moves: group effects partially non-centered along what the data know of each direction.

A configuration with many rows pins some directions of its coefficients down to one part in ten thousand and leaves others to
the prior, so neither the centered nor the non-centered form samples well. With D the group sds and W the weights of
the pseudo-rows, both at fixed reference values, let D R'WR D = V diag(h) V'. Then, for the population mean mu_c,

    theta_c = mu_c + D V a,    a_j = g_j^2 (b_j - h_j (V' D^-1 mu_c)_j) + g_j eta_cj,    b = V' D R'W z,
    g_j = (1 / t_j^2 + h_j)^(-1/2),    t_j^2 = sum_k V_kj^2 (D_now / D)_k^2

has eta_c standard normal and independent of everything else at the reference (and wherever all D move together), and
nearly so around it: centered along directions the data decide (h large), non-centered where they are silent (h = 0).
The model is the same in any coordinates; only the sampler's path differs. After Papaspiliopoulos, Roberts & Skold
(2007), doi:10.1214/088342307000000014, and Gorinova, Moore & Hoffman (2020), arXiv:1906.03028.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pymc as pm
import pytensor.tensor as pt
from numpy.typing import NDArray
from pymc.distributions.transforms import Transform

from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.model.moments import reference_errors
from hfdtl_bayes.model.priors import PriorSettings, deviation_scale
from hfdtl_bayes.statistics import ConfigStatistics, pseudo_rows

FloatArray = NDArray[np.float64]

DATA_NAMES = ("eta_directions", "eta_information", "eta_target", "eta_reference_sd")


def reference_coordinates(
    statistics: Sequence[ConfigStatistics], feature_set: FeatureSet, priors: PriorSettings
) -> dict[str, FloatArray]:
    """Compute the fixed arrays of the coordinates, by the names in `DATA_NAMES`.

    Returns
    -------
    dict
        eta_directions V (C, K, K), eta_information h (C, K), eta_target b (C, K), eta_reference_sd D (C, K).
    """
    sd = np.concatenate([priors.deviation.gamma_median * deviation_scale(feature_set), feature_set.discrepancy_sd])
    directions, information, target = [], [], []
    for own in statistics:
        sigma, omega = reference_errors(own, priors)
        rows = pseudo_rows([own])
        root_weight = (sigma**2 + rows.multiplier * omega**2) ** -0.5
        scaled = rows.r * root_weight[:, None] * sd
        _, singular, transposed = np.linalg.svd(scaled, full_matrices=True)
        h = np.zeros(len(sd))
        h[: len(singular)] = singular**2
        directions.append(transposed.T)
        information.append(h)
        target.append(transposed @ (scaled.T @ (root_weight * rows.z)))
    stacked = (np.array(directions), np.array(information), np.array(target), np.tile(sd, (len(statistics), 1)))
    return dict(zip(DATA_NAMES, stacked, strict=True))


@dataclass(frozen=True)
class _Geometry:
    """The pieces of the map at given population mean and group sds, all of shape (C, K) but `directions`."""

    mu: pt.TensorVariable
    reference_sd: pt.TensorVariable
    directions: pt.TensorVariable
    mean: pt.TensorVariable
    log_width: pt.TensorVariable

    @classmethod
    def of(cls, inputs: tuple[pt.TensorVariable, ...]) -> _Geometry:
        mu, sd, directions, information, target, reference_sd = inputs[-2 - len(DATA_NAMES) :]
        stretch = (directions**2 * ((sd / reference_sd) ** 2)[:, :, None]).sum(axis=1)
        variance = 1.0 / (1.0 / stretch + information)
        population = (directions * (mu / reference_sd)[:, :, None]).sum(axis=1)
        return cls(mu, reference_sd, directions, variance * (target - information * population), 0.5 * pt.log(variance))


class PartialNonCentering(Transform):  # type: ignore[misc]  # PyMC is untyped
    """The map between theta and the coordinates eta; the inputs are those of `group_effects`."""

    name = "eta"
    ndim_supp = 1

    def backward(self, value: pt.TensorVariable, *inputs: pt.TensorVariable) -> pt.TensorVariable:
        """Return theta from eta."""
        g = _Geometry.of(inputs)
        along = g.mean + pt.exp(g.log_width) * value
        return g.mu + g.reference_sd * (g.directions * along[:, None, :]).sum(axis=2)

    def forward(self, value: pt.TensorVariable, *inputs: pt.TensorVariable) -> pt.TensorVariable:
        """Return eta from theta."""
        g = _Geometry.of(inputs)
        along = (g.directions * ((value - g.mu) / g.reference_sd)[:, :, None]).sum(axis=1)
        return (along - g.mean) * pt.exp(-g.log_width)

    def log_jac_det(self, value: pt.TensorVariable, *inputs: pt.TensorVariable) -> pt.TensorVariable:
        """Return the log determinant of d theta / d eta per configuration, shape (C,)."""
        g = _Geometry.of(inputs)
        return (g.log_width + pt.log(g.reference_sd)).sum(axis=-1)


def group_effects(
    name: str, mu: pt.TensorVariable, sd: pt.TensorVariable, data: dict[str, pt.TensorVariable], dims: tuple[str, str]
) -> pt.TensorVariable:
    """Return theta ~ Normal(mu, sd), shape (C, K), sampled in the coordinates eta.

    A `pm.Normal` whose transform reads data is not possible in PyMC 6 (a transform sees only its variable's own inputs), so
    the normal is written out here with the arrays among its inputs.
    """

    def logp(value: pt.TensorVariable, mu: pt.TensorVariable, sd: pt.TensorVariable, *_: Any) -> pt.TensorVariable:
        return pm.logp(pm.Normal.dist(mu, sd), value).sum(axis=-1)

    def random(mu: FloatArray, sd: FloatArray, *_: Any, rng: np.random.Generator | None = None, size: Any = None) -> FloatArray:
        shape = np.shape(mu) if size is None else (*size, np.shape(mu)[-1])
        return np.asarray((rng or np.random.default_rng()).normal(mu, sd, size=shape))

    return pm.CustomDist(
        name,
        mu,
        pt.broadcast_to(sd, mu.shape),
        *(data[n] for n in DATA_NAMES),
        logp=logp,
        random=random,
        signature="(k),(k),(k,k),(k),(k),(k)->(k)",
        default_transform=PartialNonCentering(),
        dims=dims,
    )
