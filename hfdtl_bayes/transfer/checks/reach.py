"""How far the calibration reaches: leverage of the traffic asked about against the traffic calibrated on.

The posterior variance of the expected value of a row, relative, is z' C z: small where calibration or donors say what the row costs,
large where neither does. Split over coefficients as z_k (C z)_k, which sums to it, it names what drives it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from hfdtl_bayes.transfer.checks.check import Check, Status
from hfdtl_bayes.transfer.checks.evidence import Evidence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "reach of the calibration"


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
