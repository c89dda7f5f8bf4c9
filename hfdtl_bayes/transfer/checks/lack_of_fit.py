"""Lack of fit: what the features miss, by score tests along each coefficient, square and product of features.

A missing term adds gamma c to the mean, c a column divided by the scale. Under gamma = 0 rows have residuals r around the posterior
mean m, and the score test needs no fit of gamma (Rao 1948):

    u = c' M^-1 r0 = c' Sigma^-1 r,     i = c' M^-1 c = c' Sigma^-1 c - (c' Sigma^-1 Z) C (Z' Sigma^-1 c),     u^2 / i ~ chi-square(1),

with r0 the error of the prediction before these rows, M = Z V Z' + Sigma its covariance and C = (V^-1 + Z' Sigma^-1 Z)^-1 that of the
coefficients after them: the donors' prior counts as it should, and no free slope takes up what the donors would not believe. Sigma
holds noise and the drift shared by the rows of a block, so thousands of rows that drift together are no evidence. Calibration and
held-out rows are tested together, after the coefficients have learnt from both: what is left no calibration can mend. Of the held-out
rows alone it is tested whether the slope of a feature differs from the calibrated one. p-values are averaged over the draws of noise
and drift, and adjusted for the number of candidates (Holm 1979).

A significant term may be worth nothing: gain is the mean absolute percentage error it would save, the estimate gamma = u / i shrunk by
1 - i / u^2, as it was chosen for its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import chi2, norm

from hfdtl_bayes.transfer.checks.check import Check, Status
from hfdtl_bayes.transfer.checks.evidence import ErrorForms, Evidence, Traffic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FloatArray = NDArray[np.float64]

NAME = "lack of fit"
SLOPES = "slopes on the held-out rows"

COLUMNS = ("prefill_tokens", "decode_tokens", "context_tokens", "kv_usage", "waiting_requests")
"""Trace columns whose squares and products are tried beside those of the features."""

_CLIP = 8.0
"""Residuals beyond so many robust sds are cut: pauses of the machine are outliers, not a shape of the mean."""


@dataclass(frozen=True)
class LackOfFitSettings:
    """When a term is called missing."""

    level: float = 0.01
    """Of the test of all candidates together."""
    min_gain: float = 0.01
    """A term that saves less than one point of MAPE is not worth a feature."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Score tests of candidate columns.

    Attributes
    ----------
    names : tuple of str
    score, information : ndarray, shape (q,)
        u and i, averaged over the draws of noise and drift.
    p_value : ndarray, shape (q,)
        Of each candidate alone.
    """

    names: tuple[str, ...]
    score: FloatArray
    information: FloatArray
    p_value: FloatArray

    @property
    def z(self) -> FloatArray:
        """Signed root of the statistic, shape (q,)."""
        return np.asarray(self.score / np.sqrt(self.information))

    @property
    def estimate(self) -> FloatArray:
        """Gamma, shape (q,)."""
        return np.asarray(self.score / self.information)

    @property
    def adjusted(self) -> FloatArray:
        """p-values adjusted by Holm's method, shape (q,)."""
        order = np.argsort(self.p_value)
        steps = self.p_value[order] * np.arange(len(order), 0, -1)
        out = np.empty(len(order))
        out[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
        return out


def candidate_columns(evidence: Evidence, parts: list[Traffic]) -> tuple[tuple[str, ...], list[FloatArray]]:
    """Return names and values, in seconds, of squares and products of features and of trace columns, an (n, q) array for each part.

    A product of two features in seconds is divided by the mean scale of all rows, so it is in seconds too; trace columns are divided by
    their mean over all rows first. Columns that are not in every part, not finite or the same in all rows are left out.
    """
    typical = float(np.concatenate([t.scale for t in parts]).mean())
    ends = np.cumsum([len(t.scale) for t in parts])[:-1]
    design = np.concatenate([t.relative_design * t.scale[:, None] for t in parts])
    columns: dict[str, FloatArray] = {n: design[:, k] / typical for k, n in enumerate(evidence.pooled_names)}
    for name in (n for n in COLUMNS if all(n in t.frame.columns for t in parts)):
        value = np.concatenate([t.frame[name].to_numpy(dtype=float) for t in parts])
        columns[name] = value / max(float(np.mean(np.abs(value))), 1e-300)
    varying = [n for n, v in columns.items() if np.isfinite(v).all() and np.ptp(v) > 1e-9 * float(np.abs(v).max())]
    own = {n: columns[n] for n in varying if n in COLUMNS}
    for a, b in combinations_with_replacement(varying, 2):
        if (a in COLUMNS) == (b in COLUMNS):
            own[f"{a}^2" if a == b else f"{a} * {b}"] = columns[a] * columns[b]
    values = np.column_stack(list(own.values())) * typical if own else np.empty((len(design), 0))
    return tuple(own), np.split(values, ends)


def _clipped(residual: FloatArray) -> FloatArray:
    middle = float(np.median(residual))
    reach = _CLIP * 1.4826 * float(np.median(np.abs(residual - middle)))
    return np.clip(residual, middle - reach, middle + reach) if reach > 0 else residual


def score_tests(
    evidence: Evidence, names: tuple[str, ...], parts: list[tuple[Traffic, FloatArray]], seen: int
) -> tuple[Scores, FloatArray]:
    """Test candidate columns on parts of the traffic, the first `seen` of which the posterior has learnt from.

    Parameters
    ----------
    evidence : Evidence
    names : tuple of str, length q
    parts : list of (Traffic, ndarray of shape (n, q))
        Rows and their candidate columns, in seconds.
    seen : int
        The coefficients are updated with the rows of the other parts.

    Returns
    -------
    Scores
    update : ndarray, shape (K,)
        By how much the coefficients change through the rows of the other parts.
    """
    k, q = len(evidence.mean), len(names)
    forms = [
        ErrorForms(np.column_stack([t.relative_design, c / t.scale[:, None], _clipped(t.residual)]), t.block) for t, c in parts
    ]
    prior = np.linalg.pinv(evidence.covariance, hermitian=True)
    score, information, update, p = np.zeros(q), np.zeros(q), np.zeros(k), np.zeros(q)
    design, candidate = slice(0, k), slice(k, k + q)
    for sigma, omega in zip(evidence.sigma, evidence.omega, strict=True):
        grams = [f.at(float(sigma), float(omega)) for f in forms]
        new = sum((g for g in grams[seen:]), np.zeros_like(grams[0]))
        every = sum((g for g in grams), np.zeros_like(grams[0]))
        covariance = np.linalg.inv(prior + new[design, design])
        change = covariance @ new[design, -1]
        own_score = every[candidate, -1] - every[candidate, design] @ change
        loaded = every[candidate, design]
        own = np.diag(every[candidate, candidate]) - ((loaded @ covariance) * loaded).sum(axis=1)
        own = np.maximum(own, 1e-9 * np.diag(every[candidate, candidate]) + 1e-300)
        score += own_score
        information += own
        update += change
        p += chi2.sf(own_score**2 / own, 1)
    count = len(evidence.sigma)
    return Scores(names, score / count, information / count, p / count), update / count


def check_lack_of_fit(evidence: Evidence, settings: LackOfFitSettings | None = None) -> Check:
    """Look for a term that calibration and held-out rows together say is missing."""
    settings = settings or LackOfFitSettings()
    known = [t for t in (evidence.calibration, evidence.held_out) if t is not None]
    if not known:
        return Check(NAME, Status.CANNOT_SAY, "there are no rows whose times could be compared with the fit")
    seen = int(evidence.calibration is not None)
    names, columns = candidate_columns(evidence, known)
    if not names:
        return Check(NAME, Status.CANNOT_SAY, "no feature varies over the rows, so none can be told to be missing")
    scores, update = score_tests(evidence, names, list(zip(known, columns, strict=True)), seen)
    gain = _gains(evidence, scores, known[-1], columns[-1], update)
    adjusted = scores.adjusted
    table = pd.DataFrame(
        {"term": names, "z": scores.z, "p_value": scores.p_value, "p_adjusted": adjusted, "gain": gain}
    ).sort_values("p_value", ignore_index=True, kind="stable")
    missing = table[(table["p_adjusted"] < settings.level) & (table["gain"] >= settings.min_gain)]
    if len(missing):
        best = missing.sort_values("gain").iloc[-1]
        status = Status.FAIL
        message = (
            f"{best['term']} is missing (adjusted p {best['p_adjusted']:.2g} of {len(names)} candidates): about "
            f"{100 * best['gain']:.1f} points of MAPE"
        )
        advice = f"Add a residual feature along {best['term']}: it would save about {100 * best['gain']:.1f} points of MAPE."
    elif adjusted.min() < settings.level:
        first = table.iloc[0]
        status, advice = Status.WARN, ""
        message = (
            f"{first['term']} is missing (adjusted p {first['p_adjusted']:.2g} of {len(names)} candidates), but would save less than "
            f"{100 * settings.min_gain:g} point of MAPE"
        )
    else:
        status, advice = Status.PASS, ""
        message = (
            f"none of {len(names)} squares and products of features is missed; the smallest adjusted p is {adjusted.min():.2g}"
        )

    def draw(axes: Axes) -> None:
        shown = table.head(12)
        axes.barh(np.arange(len(shown))[::-1], 100 * shown["gain"], color="#2a6ebb")
        axes.set_yticks(
            np.arange(len(shown))[::-1], [f"{n} (z {z:+.1f})" for n, z in zip(shown["term"], shown["z"], strict=True)]
        )
        axes.tick_params(axis="y", labelsize=7)
        axes.set_xlabel("MAPE saved, points")

    return Check(NAME, status, message, advice, table, draw)


def _gains(evidence: Evidence, scores: Scores, traffic: Traffic, columns: FloatArray, update: FloatArray) -> FloatArray:
    """Return the points of MAPE, as a fraction, that each term would save on the last part of the traffic, shape (q,)."""
    noise, drift = evidence.error_variance
    z = traffic.relative_design
    residual = traffic.residual - z @ update
    relative = traffic.scale / np.maximum(traffic.observed, 1e-300)
    form = ErrorForms(np.column_stack([z, columns / traffic.scale[:, None]]), traffic.block).at(np.sqrt(noise), np.sqrt(drift))
    k = z.shape[1]
    inverse = np.linalg.inv(np.linalg.pinv(evidence.covariance, hermitian=True) + form[:k, :k])
    # What the other coefficients would give way by, were the term added.
    alone = columns / traffic.scale[:, None] - z @ (inverse @ form[:k, k:])
    shrink = np.maximum(1.0 - 1.0 / np.maximum(scores.z**2, 1.0), 0.0)
    after = np.abs((residual[:, None] - alone * scores.estimate) * relative[:, None])[traffic.scored].mean(axis=0)
    before = float(np.abs(residual * relative)[traffic.scored].mean())
    return np.asarray(shrink * (before - after))


def check_slopes(evidence: Evidence, settings: LackOfFitSettings | None = None) -> Check:
    """Look for features whose slope on the held-out rows is not the calibrated one.

    The table has, per coefficient, the shift as a share of its size, its z, and the shifts that would be detected with a power of 80
    and 95 %.
    """
    settings = settings or LackOfFitSettings()
    held = evidence.held_out
    if held is None:
        return Check(SLOPES, Status.CANNOT_SAY, "there are no held-out rows to compare the slopes with")
    design = held.relative_design * held.scale[:, None]
    present = np.flatnonzero((design[:, : len(evidence.pooled_names)] != 0).any(axis=0))
    names = tuple(evidence.names[k] for k in present)
    scores, _ = score_tests(evidence, names, [(held, design[:, present])], 0)
    size = np.maximum(np.abs(evidence.mean[present]), 1e-300)
    # Bonferroni, as the smallest of all has to pass in Holm's method.
    critical = norm.isf(settings.level / (2 * len(names)))
    table = pd.DataFrame(
        {
            "coefficient": names,
            "shift": scores.estimate / size,
            "z": scores.z,
            "p_value": scores.p_value,
            "p_adjusted": scores.adjusted,
            "detectable_80": (critical + norm.ppf(0.80)) / np.sqrt(scores.information) / size,
            "detectable_95": (critical + norm.ppf(0.95)) / np.sqrt(scores.information) / size,
        }
    ).sort_values("p_value", ignore_index=True, kind="stable")
    first = table.iloc[0]
    if first["p_adjusted"] >= settings.level:
        message = f"no slope differs from the calibrated one; the smallest adjusted p is {first['p_adjusted']:.2g}"
        return Check(SLOPES, Status.PASS, message, "", table)
    message = (
        f"{first['coefficient']} costs {first['shift']:+.0%} against the calibrated slope, alone or through what goes with it "
        f"(adjusted p {first['p_adjusted']:.2g})"
    )
    return Check(SLOPES, Status.WARN, message, f"Calibrate on rows that vary in {first['coefficient']}.", table)
