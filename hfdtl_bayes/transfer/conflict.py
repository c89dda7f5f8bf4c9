"""Prior-data conflict: whether a target's data look like a member of the population the donors describe.

With the target left out, the donors predict its coefficients as Normal(mu, V) given the scales; its rows carry the information H and
b about them. In coordinates where V is the identity the rows' statistic b has the prior predictive Normal(0, H + H^2), so along
each direction the data decide, b_j^2 / (h_j + h_j^2) is a chi-square of one degree of freedom if the target is a member. The
p-value is averaged over the posterior of the scales (a mixed predictive check).

Box (1980), doi:10.2307/2982063; Evans & Moshonov (2006), doi:10.1214/06-BA129; Marshall & Spiegelhalter (2007), doi:10.1214/07-BA218.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.model import ExactDensity, LatencyPosterior, own_information

_INFORMED = 1.0
"""A direction counts once the rows know as much about it as the donors' prediction does."""


@dataclass(frozen=True)
class Conflict:
    """How well a target's rows fit the donors' prediction of it.

    Attributes
    ----------
    p_value : float
        Probability that a member of the population would look at least as unusual.
    directions : float
        Number of directions of coefficient space the rows decide, averaged over draws.
    coefficient : str
        The coefficient that stands out most.
    z : float
        Its distance from the donors' prediction, in sds of that prediction and the data together.
    """

    p_value: float
    directions: float
    coefficient: str
    z: float


def population_conflict(posterior: LatencyPosterior, *, draws: int = 200) -> Conflict:
    """Compare a calibrated target with what its donors alone predict for it.

    Parameters
    ----------
    posterior : LatencyPosterior
        With a target.
    draws : int
        Draws of the scales to average over, evenly spaced.

    Raises
    ------
    InputError
        If the posterior has no target or no donor.
    """
    if posterior.target is None or not posterior.donors:
        raise InputError("a conflict check needs donors and a target; this posterior holds " + ", ".join(posterior.config_ids))
    target = posterior.config_ids.index(posterior.target)
    others = [i for i in range(len(posterior.config_ids)) if i != target]
    tau = posterior.draws_of("tau")
    chosen = np.unique(np.linspace(0, len(tau) - 1, draws).astype(int))
    population = ("sigma_typical", "sigma_spread", "omega_typical", "omega_spread")
    density = ExactDensity(posterior.donor_statistics, posterior.feature_set, posterior.priors)
    sigma, omega = posterior.draws_of("sigma")[chosen], posterior.draws_of("omega")[chosen]
    x = density.join(
        tau[chosen],
        posterior.draws_of("hardware_share")[chosen],
        sigma[:, others],
        omega[:, others],
        [posterior.draws_of(n)[chosen] for n in population],
    )
    mean, covariance = density.predictive(x, posterior.configuration(posterior.target))
    information, vector = own_information(posterior, target, chosen, mean)
    root = np.linalg.cholesky(covariance)
    spread = np.swapaxes(root, 1, 2)
    h, directions = np.linalg.eigh(spread @ information @ root)
    b = (np.swapaxes(directions, 1, 2) @ (spread @ vector[..., None]))[..., 0]
    informed = h > _INFORMED
    safe = np.where(informed, h, 1.0)
    statistic = np.where(informed, b**2 / (safe + safe**2), 0.0).sum(axis=1)
    degrees = informed.sum(axis=1)
    p_value = float(np.mean(np.where(degrees > 0, chi2.sf(statistic, np.maximum(degrees, 1)), 1.0)))
    # In units of coefficients: the posterior mean less the prediction, against the sd such a difference has under the model.
    gain = np.where(informed, 1.0 / (1.0 + safe), 0.0)
    shift = (root @ (directions @ (gain * b)[..., None]))[..., 0]
    along = root @ directions
    sd = np.sqrt((along**2 * np.where(informed, safe / (1.0 + safe), 0.0)[:, None, :]).sum(axis=2))
    z = np.median(np.abs(shift) / np.where(sd > 0, sd, np.inf), axis=0)
    worst = int(np.argmax(z))
    return Conflict(p_value, float(degrees.mean()), posterior.feature_set.coef_names[worst], float(z[worst]))
