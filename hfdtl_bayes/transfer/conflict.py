"""Prior-data conflict: whether a target's data look like a member of the population the donors describe.

With the target left out, the donors predict its coefficients as Normal(mu, V) given the scales; its rows carry the information H and
b about them. In coordinates where V is the identity the rows' statistic b has the prior predictive Normal(0, H + H^2), so along
each direction the data decide, b_j^2 / (h_j + h_j^2) is a chi-square of one degree of freedom if the target is a member. The
p-value is averaged over the posterior of the scales (a mixed predictive check).

Box (1980), doi:10.2307/2982063; Evans & Moshonov (2006), doi:10.1214/06-BA129; Marshall & Spiegelhalter (2007), doi:10.1214/07-BA218.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import chi2, ncx2

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.model import ExactDensity, LatencyPosterior, drawn_coordinates, own_information

FloatArray = NDArray[np.float64]

_INFORMED = 1.0
"""A direction counts once the rows know as much about it as the donors' prediction does."""

_NAMED = 0.3
"""Coefficients with less than this share of a direction's largest loading are left out of its name."""

EVERYTHING = "everything"


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
    by_direction : DataFrame
        The directions that the rows decide, at the average of the draws, most unusual first: `direction` as a combination of
        coefficients, each counted in sds of the donors' prediction; `information`, how many times more the rows know of it than the
        donors do; `z`, how far it lies from their prediction; `p_value`, of this direction alone.
    detectable : DataFrame
        Per coefficient, and for all of them together: the multiplicative `shift_80` and `shift_95`, above 1, that would bring the
        p-value below `level` with a probability of 80 and 95 %, were the target otherwise as predicted.
    """

    p_value: float
    directions: float
    coefficient: str
    z: float
    by_direction: pd.DataFrame = field(default_factory=pd.DataFrame, compare=False, repr=False)
    detectable: pd.DataFrame = field(default_factory=pd.DataFrame, compare=False, repr=False)


def population_conflict(posterior: LatencyPosterior, *, draws: int = 200, level: float = 0.001) -> Conflict:
    """Compare a calibrated target with what its donors alone predict for it.

    Parameters
    ----------
    posterior : LatencyPosterior
        With a target.
    draws : int
        Draws of the scales to average over, evenly spaced.
    level : float
        Of the test that the detectable shifts are of.

    Raises
    ------
    InputError
        If the posterior has no target or no donor.
    """
    if posterior.target is None or not posterior.donors:
        raise InputError("a conflict check needs donors and a target; this posterior holds " + ", ".join(posterior.config_ids))
    target = posterior.config_ids.index(posterior.target)
    others = [i for i in range(len(posterior.config_ids)) if i != target]
    chosen = np.unique(np.linspace(0, len(posterior.draws_of("tau")) - 1, draws).astype(int))
    density = ExactDensity(posterior.donor_statistics, posterior.feature_set, posterior.priors)
    x = drawn_coordinates(posterior, density, others, chosen)
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
    names = posterior.feature_set.coef_names
    average = _Average(mean.mean(axis=0), covariance.mean(axis=0), information.mean(axis=0), vector.mean(axis=0))
    return Conflict(
        p_value,
        float(degrees.mean()),
        names[worst],
        float(z[worst]),
        average.directions(names),
        average.detectable(names, level),
    )


@dataclass(frozen=True, eq=False)
class _Average:
    """The donors' prediction and the rows' information at the average of the draws, in reference units."""

    mean: FloatArray
    covariance: FloatArray
    information: FloatArray
    vector: FloatArray

    def _eigen(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return root of V, information h of each direction, and the directions in coordinates where V is the identity."""
        root = np.linalg.cholesky(self.covariance)
        h, directions = np.linalg.eigh(root.T @ self.information @ root)
        return root, h, directions

    def directions(self, names: tuple[str, ...]) -> pd.DataFrame:
        root, h, directions = self._eigen()
        b = directions.T @ (root.T @ self.vector)
        informed = np.flatnonzero(h > _INFORMED)
        z = b[informed] / np.sqrt(h[informed] + h[informed] ** 2)
        # Coefficients along a direction of the data, each in sds of the donors' prediction.
        along = (root @ directions[:, informed]) / np.sqrt(np.diag(self.covariance))[:, None]
        said = [_combination(names, along[:, j] * np.sign(z[j] or 1.0)) for j in range(len(informed))]
        table = pd.DataFrame(
            {"direction": said, "information": h[informed], "z": np.abs(z), "p_value": chi2.sf(z**2, 1)},
            index=range(len(informed)),
        )
        return table.sort_values("z", ascending=False, ignore_index=True)

    def detectable(self, names: tuple[str, ...], level: float) -> pd.DataFrame:
        root, h, directions = self._eigen()
        informed = h > _INFORMED
        degrees = int(informed.sum())
        if not degrees:
            return pd.DataFrame(columns=["shift_80", "shift_95"], index=pd.Index([], name="coefficient"))
        critical = chi2.isf(level, degrees)

        def needed(power: float) -> float:
            """Return the non-centrality at which the test has this power."""
            return float(brentq(lambda x: ncx2.sf(critical, degrees, x) - power, 1e-6, 1e4))

        shifts = np.vstack([np.diag(self.mean), self.mean])
        delta = np.linalg.solve(root, shifts.T).T @ directions
        # In a direction of information h a shift delta moves the statistic by h delta, whose sd is sqrt(h + h^2).
        per_square = (delta[:, informed] ** 2 * (h / (1.0 + h))[informed]).sum(axis=1)
        with np.errstate(divide="ignore"):
            found = {f"shift_{p}": 1.0 + np.sqrt(needed(p / 100) / per_square) for p in (80, 95)}
        return pd.DataFrame(found, index=pd.Index([*names, EVERYTHING], name="coefficient"))


def _combination(names: tuple[str, ...], weights: FloatArray) -> str:
    """Return a combination of coefficients as text, the largest first."""
    weights = weights / np.abs(weights).max()
    said = []
    for k in np.argsort(-np.abs(weights)):
        if abs(weights[k]) >= _NAMED:
            said.append(f"{'-' if weights[k] < 0 else '+'} {abs(weights[k]):.1f} {names[k]}")
    return " ".join(said).removeprefix("+ ")
