"""Which directions of coefficient space the data decided, and which the prior did.

For a configuration's own coefficients theta_c let V0 be their covariance under the prior alone, before any rows of any
configuration, V1 that given the rows of all OTHER configurations, and V2 the posterior's. Along a combination a'theta the
variance a'V0 a is shared out:

    own rows      (a'V1 a - a'V2 a) / a'V0 a        what was learnt from this configuration
    other rows    (a'V0 a - a'V1 a) / a'V0 a        what was learnt from the others through the population
    prior         a'V2 a / a'V0 a                   what is left

The prior alone is the yardstick for donors and for a calibrated target alike. Compared with the donors' prediction instead, a
direction that donors pinned down would look like the prior's; compared with the prior, it counts as data, and the split says whose.
For a population coefficient there is no V1, and V0 is its prior.

The directions are those of the generalized eigenproblem V2 a = lambda V0 a, so no combination is left less to the prior than the
first nor more than the last. They depend neither on units nor on the scaling of columns. Eigenvectors of nearly equal shares are
arbitrary within their span and mix every name, so within each of four bands of shares they are rotated to simple
structure (varimax: Kaiser 1958, doi:10.1007/BF02289233) with each coefficient counted in its prior sds. The rotation keeps them
uncorrelated under the prior, and every combination in the span stays in the band.

V0 = A S^2 A' + E[tau^2] scale^2 is exact. V1 and V2 are means of exact conditional covariances over the posterior's draws of the
scales, plus the covariance of the conditional means, so no Monte Carlo error of coefficients enters. V1 takes the scales as all
rows together left them. Where the likelihood is not the Gaussian of the statistics, V2 is the covariance of the draws and there is
no V1. The eigenproblem is that of the likelihood-informed subspace: Spantini et al. (2015), doi:10.1137/140977308.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.model.exact import POPULATIONS, ExactDensity, population_loading
from hfdtl_bayes.model.posterior import LatencyPosterior
from hfdtl_bayes.model.priors import PriorSettings, deviation_scale, population_mean, population_sd
from hfdtl_bayes.statistics import config_to_constant

FloatArray = NDArray[np.float64]

POPULATION = "population"


@dataclass(frozen=True)
class DirectionSettings:
    """How directions are found and named, each number with its reason."""

    bands: tuple[float, float, float] = (0.1, 0.5, 0.9)
    """Shares of variance removed by data at which the words change: below a tenth nobody would see that there were data, above nine
    tenths nobody would see the prior."""
    smallest_loading: float = 0.3
    """Coefficients with less than this share of a direction's largest loading may be left out of its name."""
    named_within: float = 0.02
    """They are, as long as the share that data decided of the combination named stays this close to that of the direction."""
    draws: int = 400
    """Draws of the scales to average exact conditional moments over."""

    @property
    def words(self) -> tuple[str, str, str, str]:
        """What each band is called, from the prior's to the data's."""
        return ("the prior", "mostly the prior", "mostly data", "data")

    def band(self, share: float) -> int:
        """Return the band of a share, 0 to 3."""
        return int(np.searchsorted(self.bands, share))


@dataclass(frozen=True)
class Direction:
    """One combination of coefficients, and who decided it.

    Attributes
    ----------
    loadings : tuple of (str, float)
        Coefficient and weight, each coefficient counted in its prior sds; the largest weight is 1. What is not named has none.
    data : float
        1 - posterior variance / prior variance of this combination; below 0 where rows taught that configurations differ more than was
        believed.
    own_rows, other_rows : float or None
        Parts of `data`; None for population coefficients and where they are not known.
    decided_by : {"data", "mostly data", "mostly the prior", "the prior"}
    """

    loadings: tuple[tuple[str, float], ...]
    data: float
    own_rows: float | None
    other_rows: float | None
    decided_by: str

    @property
    def name(self) -> str:
        """The combination as text: "kv_read + 0.6 sequences - 0.3 constant"."""
        said = ""
        for i, (feature, weight) in enumerate(self.loadings):
            size = f"{abs(weight):.1f}"
            sign = ("-" if weight < 0 else "") if i == 0 else (" - " if weight < 0 else " + ")
            said += sign + ("" if size == "1.0" else f"{size} ") + feature
        return said

    def sentence(self) -> str:
        """Return who decided it, in words."""
        share = min(max(self.data, 0.0), 1.0)
        said = f"{self.name}: decided by {self.decided_by}; rows removed {_per_cent(share)} of the prior's variance"
        if self.own_rows is None or self.other_rows is None or share < 0.005:
            return said
        own = min(max(self.own_rows, 0.0), share)
        return f"{said}, {_per_cent(own)} its own and {_per_cent(share - own)} those of other configurations"


def _per_cent(share: float) -> str:
    return "over 99.9 %" if share > 0.999 else f"{100 * share:.3g} %" if share > 0.99 else f"{100 * share:.0f} %"


@dataclass(frozen=True)
class Moments:
    """What is known of some coefficients before and after, in reference units.

    Attributes
    ----------
    names : tuple of str
    prior_mean, posterior_mean : ndarray, shape (K,)
    prior, posterior : ndarray, shape (K, K)
        Covariances.
    others : ndarray, shape (K, K), or None
        Covariance given the rows of all other configurations.
    """

    names: tuple[str, ...]
    prior_mean: FloatArray
    prior: FloatArray
    posterior_mean: FloatArray
    posterior: FloatArray
    others: FloatArray | None


def prior_moments(
    feature_set: FeatureSet, priors: PriorSettings, configuration: ServingConfiguration
) -> tuple[FloatArray, FloatArray]:
    """Return mean and covariance of a configuration's coefficients under the prior alone, shapes (K,) and (K, K).

    A m and A S^2 A' + E[tau^2] scale^2: the deviation's own part and its hardware's add to the same variance. The discrepancy has its own.
    """
    loading = population_loading(feature_set, config_to_constant(feature_set, configuration))
    spread = loading * population_sd(feature_set)
    own = np.concatenate([_tau_square(priors) * deviation_scale(feature_set) ** 2, feature_set.discrepancy_sd**2])
    covariance = spread @ spread.T + np.diag(own)
    return loading @ population_mean(feature_set), covariance


def _tau_square(priors: PriorSettings) -> float:
    """Return the prior mean of tau^2."""
    shape, rate = priors.deviation.gamma_shape, priors.deviation.gamma_rate
    return shape * (shape + 1) / rate**2


def _mixture(mean: FloatArray, covariance: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return mean and covariance of an equal mixture of normals, shapes (S, K) and (S, K, K)."""
    centred = mean - mean.mean(axis=0)
    return mean.mean(axis=0), covariance.mean(axis=0) + centred.T @ centred / len(mean)


def _chosen(posterior: LatencyPosterior, draws: int) -> NDArray[np.int64]:
    count = len(posterior.draws_of("tau"))
    return np.unique(np.linspace(0, count - 1, min(draws, count)).astype(int))


def drawn_coordinates(
    posterior: LatencyPosterior, density: ExactDensity, fitted: Sequence[int], chosen: NDArray[np.int64]
) -> FloatArray:
    """Return chosen draws of a posterior's scales as coordinates of the density of some of its configurations, shape (S, size).

    Parameters
    ----------
    posterior : LatencyPosterior
    density : ExactDensity
        Of the statistics of the configurations `fitted`.
    fitted : sequence of int
        Their indices among the posterior's.
    chosen : ndarray of int, shape (S,)
        Draws.
    """
    tau, share, *populations = (posterior.draws_of(n)[chosen] for n in ("tau", "hardware_share", *POPULATIONS))
    sigma, omega = (posterior.draws_of(n)[chosen][:, fitted] for n in ("sigma", "omega"))
    return density.join(tau, share, sigma, omega, populations)


def conditional_moments(posterior: LatencyPosterior) -> bool:
    """Return whether the posterior's likelihood is the Gaussian of the statistics, so that moments given the scales are exact."""
    return not posterior.rows


def configuration_moments(posterior: LatencyPosterior, config_id: str, draws: int = DirectionSettings.draws) -> Moments:
    """Return what is known of a configuration's own coefficients under the prior, from the other configurations, and now.

    Of its pooled coefficients, that is. Those of the discrepancy are beliefs by construction: what their rows leave open is meant to be
    open, and no fault of the features.

    Parameters
    ----------
    posterior : LatencyPosterior
    config_id : str
    draws : int
        Draws of the scales to average over, evenly spaced.

    Raises
    ------
    InputError
        If the configuration was not fitted.
    """
    own = posterior.configuration(config_id)
    features, priors = posterior.feature_set, posterior.priors
    mean, prior = prior_moments(features, priors, own)
    c = posterior.config_ids.index(config_id)
    names, k = features.pooled_names, len(features.pooled)
    if not conditional_moments(posterior):
        theta = posterior.draws_of("theta")[:, c, :k]
        return Moments(names, mean[:k], prior[:k, :k], theta.mean(axis=0), np.cov(theta.T), None)
    chosen = _chosen(posterior, draws)
    rest = [i for i in range(len(posterior.config_ids)) if i != c]
    statistics = posterior.statistics
    if rest:
        others = ExactDensity([statistics[i] for i in rest], features, priors)
        m1, v1 = others.predictive(drawn_coordinates(posterior, others, rest, chosen), own)
    else:
        tau = posterior.draws_of("tau")[chosen] * deviation_scale(features)
        m1, v1 = np.tile(mean, (len(tau), 1)), np.tile(prior, (len(tau), 1, 1))
        v1[:, range(k), range(k)] += tau**2 - _tau_square(priors) * deviation_scale(features) ** 2
    information, vector = own_information(posterior, c, chosen, m1)
    root = np.linalg.cholesky(v1)
    spread = np.swapaxes(root, 1, 2)
    v2 = root @ np.linalg.inv(np.eye(len(mean)) + spread @ information @ root) @ spread
    m2 = m1 + (v2 @ vector[..., None])[..., 0]
    after_mean, after = _mixture(m2, v2)
    others_only = _mixture(m1, v1)[1]
    return Moments(names, mean[:k], prior[:k, :k], after_mean[:k], after[:k, :k], others_only[:k, :k])


def own_information(
    posterior: LatencyPosterior, c: int, chosen: NDArray[np.int64], centre: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return what the rows of one configuration say of its coefficients, at chosen draws of its noise and drift.

    Parameters
    ----------
    posterior : LatencyPosterior
    c : int
        Index of the configuration among those fitted.
    chosen : ndarray of int, shape (S,)
        Draws.
    centre : ndarray, shape (S, K)
        Coefficients the information vector is taken around.

    Returns
    -------
    matrix : ndarray, shape (S, K, K)
    vector : ndarray, shape (S, K)
    """
    info = ExactDensity([posterior.statistics[c]], posterior.feature_set, posterior.priors).info
    sigma, omega = posterior.draws_of("sigma")[chosen, c], posterior.draws_of("omega")[chosen, c]
    weight = 1.0 / (sigma[:, None] ** 2 + info.multiplier * omega[:, None] ** 2)
    matrix = np.einsum("sj,jkl->skl", weight, info.gram[0])
    vector = np.einsum("sj,jk->sk", weight, info.target[0])
    return matrix, vector - (matrix @ (centre - info.reference[0])[..., None])[..., 0]


def population_moments(posterior: LatencyPosterior, draws: int = DirectionSettings.draws) -> Moments:
    """Return what is known of the population coefficients (beta, gamma, delta) under the prior and now."""
    features = posterior.feature_set
    names = tuple(f.name for f in features.base + features.config + features.residual)
    mean, prior = population_mean(features), np.diag(population_sd(features) ** 2)
    if conditional_moments(posterior):
        density = ExactDensity(posterior.statistics, features, posterior.priors)
        every = list(range(len(posterior.config_ids)))
        moments = density.population(drawn_coordinates(posterior, density, every, _chosen(posterior, draws)))
        after_mean, after = _mixture(*moments)
    else:
        parts = [posterior.draws_of(n) for n, f in (("beta", features.base), ("gamma", features.config)) if f]
        values = np.concatenate([*parts, posterior.draws_of("delta")], axis=1)
        after_mean, after = values.mean(axis=0), np.cov(values.T)
    return Moments(names, mean, prior, after_mean, after, None)


def _varimax(loadings: FloatArray) -> FloatArray:
    """Return the columns of (K, m) rotated to simple structure."""
    rotation = np.eye(loadings.shape[1])
    size = 0.0
    for _ in range(200):
        rotated = loadings @ rotation
        target = rotated**3 - rotated * (rotated**2).mean(axis=0)
        left, singular, right = np.linalg.svd(loadings.T @ target)
        rotation = left @ right
        if singular.sum() <= size * (1 + 1e-10):
            break
        size = float(singular.sum())
    return loadings @ rotation


def directions(moments: Moments, settings: DirectionSettings | None = None) -> tuple[Direction, ...]:
    """Return the directions of coefficient space, what the data decided first.

    Parameters
    ----------
    moments : Moments
        From `configuration_moments` or `population_moments`.
    settings : DirectionSettings, optional
    """
    settings = settings or DirectionSettings()
    sd = np.sqrt(np.diag(moments.prior))
    prior, after = (m / np.outer(sd, sd) for m in (moments.prior, moments.posterior))
    others = None if moments.others is None else moments.others / np.outer(sd, sd)
    # As a correlation matrix the prior is far from singular whatever the units; ascending lambda is descending share of data.
    lam, vectors = eigh(after, prior)
    band = np.array([settings.band(1.0 - v) for v in lam])
    found = []
    for b in np.unique(band):
        rotated = _varimax(vectors[:, band == b])
        found += [_direction(a, prior, after, others, moments.names, settings, settings.words[b]) for a in rotated.T]
    return tuple(sorted(found, key=lambda d: -d.data))


def _direction(
    a: FloatArray,
    prior: FloatArray,
    after: FloatArray,
    others: FloatArray | None,
    names: Sequence[str],
    settings: DirectionSettings,
    decided_by: str,
) -> Direction:
    def left(vector: FloatArray, covariance: FloatArray) -> float:
        return float(vector @ covariance @ vector / (vector @ prior @ vector))

    named = a / a[np.argmax(np.abs(a))]
    exact = left(named, after)
    for k in np.argsort(np.abs(named)):
        fewer = np.where(np.arange(len(a)) == k, 0.0, named)
        if abs(named[k]) < settings.smallest_loading and abs(left(fewer, after) - exact) <= settings.named_within:
            named = fewer
    order = sorted((int(k) for k in np.flatnonzero(named)), key=lambda k: -abs(named[k]))
    data = 1.0 - left(named, after)
    own = None if others is None else left(named, others) - left(named, after)
    return Direction(
        loadings=tuple((names[k], float(named[k])) for k in order),
        data=data,
        own_rows=own,
        other_rows=None if own is None else data - own,
        decided_by=decided_by,
    )
