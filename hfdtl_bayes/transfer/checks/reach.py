"""How far the calibration reaches: leverage of the traffic asked about against the traffic calibrated on.

The posterior variance of the expected value of a row, relative, is z' C z: small where calibration or donors say what the row costs,
large where neither does. Split over coefficients as z_k (C z)_k, which sums to it, it names what drives it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.transfer.checks.check import Check, Status
from hfdtl_bayes.transfer.checks.evidence import Evidence, Traffic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FloatArray = NDArray[np.float64]

NAME = "reach of the calibration"
JUDGED = "held-out rows like those asked about"


@dataclass(frozen=True)
class ReachSettings:
    """How open the expected value may be."""

    max_mean_uncertainty: float = 0.10
    """Relative sd of the expected value, median over the rows asked about, above which the calibration does not reach them: as much as
    the whole error may be."""
    warn_mean_uncertainty: float = 0.05
    """Above this the calibration is a large part of the error."""


def check_reach(evidence: Evidence, settings: ReachSettings | None = None) -> Check:
    """Compare what is known of the intended traffic with what is known of the calibrated one."""
    settings = settings or ReachSettings()
    asked, seen = evidence.intended, evidence.calibration
    if asked is None:
        return Check(
            NAME,
            Status.CANNOT_SAY,
            "which traffic is to be predicted is not said",
            "Give batches of it, times need not be known.",
        )
    sd = evidence.mean_sd(asked)
    z = asked.relative_design
    parts = (z * (z @ evidence.covariance)).mean(axis=0)
    share = parts / max(parts.sum(), 1e-300)
    table = pd.DataFrame({"coefficient": evidence.names, "share_of_variance": share})
    found = float(np.median(sd))
    driver = evidence.names[int(np.argmax(share))]
    message = f"the coefficients leave the expected value open by {found:.1%} (sd, median over rows), most of all {driver}"
    if seen is not None:
        own = evidence.mean_sd(seen)
        seconds, known = z * asked.scale[:, None], seen.relative_design * seen.scale[:, None]
        largest = known.max(axis=0)
        table["largest_calibrated_s"] = largest
        table["largest_asked_s"] = seconds.max(axis=0)
        table["rows_beyond"] = (seconds > 1.001 * np.maximum(largest, 0.0)).mean(axis=0)
        beyond = table["rows_beyond"].to_numpy()
        message += f"; {np.median(own):.1%} on the calibrated rows"
        if beyond.max() > 0.5:
            k = int(np.argmax(beyond))
            message += f"; {beyond[k]:.0%} of the rows have more {evidence.names[k]} than any calibrated one"
    status, advice = Status.PASS, ""
    if found > settings.max_mean_uncertainty:
        status, advice = Status.FAIL, f"Calibrate on rows with more {driver}, like those asked about."
    elif found > settings.warn_mean_uncertainty:
        status, advice = Status.WARN, f"Rows with more {driver} would sharpen the predictions most."

    def draw(axes: Axes) -> None:
        axes.plot(asked.expected, sd, ".", color="#d1610a", markersize=3, label="asked about")
        if seen is not None:
            axes.plot(seen.expected, evidence.mean_sd(seen), ".", color="#2a6ebb", markersize=3, label="calibrated on")
        axes.set_xlabel("expected time, s")
        axes.set_ylabel("relative sd of the expected value")
        axes.legend(fontsize=8)

    return Check(NAME, status, message, advice, table, draw)


@dataclass(frozen=True)
class JudgedSettings:
    """How unlike the held-out rows the intended traffic may be."""

    max_unjudged_share: float = 0.10
    """Share of the time of the rows asked about that comes from larger amounts of a feature than any row at hand has, above which errors
    measured on the rows at hand say nothing of them: as much as the whole error may be."""
    min_rows: int = 5
    """How many rows must have an amount for it to be known. One long prompt among light steps says next to nothing of heavy ones:
    with a single row, closed loops on GPU steps ended in `accept` at a true error of 14 % for two targets of 49."""


def known_amounts(seconds: FloatArray, rows: int) -> FloatArray:
    """Return the most time of each feature that at least so many rows have, shape (K,); of fewer rows their least.

    Parameters
    ----------
    seconds : ndarray, shape (n, K)
        Time that each row spends on each feature.
    rows : int
    """
    place = max(len(seconds) - rows, 0)
    return np.asarray(np.partition(seconds, place, axis=0)[place])


def check_judged(evidence: Evidence, settings: JudgedSettings | None = None) -> Check:
    """Compare the intended traffic, where it is other than the held-out rows, with the rows whose times are known.

    With a_k the most time that feature k has in at least `min_rows` held-out or calibration rows, a row asked about that spends b_k on it
    has sum over k of max(b_k - a_k, 0) that nothing was measured of.
    """
    settings = settings or JudgedSettings()
    asked, held = evidence.intended, evidence.held_out
    if asked is None or held is None:
        return Check(JUDGED, Status.CANNOT_SAY, "there are no held-out rows, or which traffic is to be predicted is not said")

    def seconds(traffic: Traffic) -> FloatArray:
        return np.abs(traffic.relative_design * traffic.scale[:, None] * evidence.mean)

    measured = [seconds(t) for t in (held, evidence.calibration) if t is not None]
    known = known_amounts(np.vstack(measured), settings.min_rows)
    beyond = np.maximum(seconds(asked) - known, 0.0)
    parts = beyond.sum(axis=0) / np.abs(asked.expected).sum()
    table = pd.DataFrame({"coefficient": evidence.names, "share_of_time_beyond": parts, "known_s": known})
    share, driver = float(parts.sum()), evidence.names[int(np.argmax(parts))]
    message = f"{share:.0%} of the time asked about comes from larger amounts of a feature than the rows at hand have"
    if share <= settings.max_unjudged_share:
        return Check(JUDGED, Status.PASS, message, "", table)
    advice = f"Hold out some time blocks of the traffic asked about; most of all of {driver} nothing like it was measured."
    return Check(JUDGED, Status.FAIL, f"{message}, most of all {driver}", advice, table)
