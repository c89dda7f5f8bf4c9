"""Where the spread of simulated results comes from: coefficients, the machine's speed, or the requests that happened to come.

Every member of an ensemble, one draw of coefficients and overheads, is run with `W` workloads and `Z` courses of the machine's speed, all
its own: y[d, w, z]. The seeds depend on member, workload and course alone, so two configurations or settings that are compared meet
the same requests and the same weather (common random numbers). With

    y = mu + c_d + w_dw + z_dz + e_dwz

the mean squares of the nested analysis of variance give the four variances, which add up to that of a single run (law of total
variance): E[MS_e] = e, E[MS_w] = e + Z w, E[MS_z] = e + W z, E[MS_c] = e + Z w + W z + W Z c. With one workload for all (recorded
requests) w is zero and e is part of z. An estimate below zero is taken as zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Components:
    """Variances of one metric by source, in its unit squared.

    Attributes
    ----------
    coefficients : float
        What more or better calibration rows can shrink: overheads of requests and the drift during calibration with it.
    speed : float
        Drift of the machine and noise of its steps: what no measurement of the coefficients can.
    workload : float
        Which requests come when.
    together : float
        Speed and workload acting on each other; part of `speed` where the requests are given.
    """

    coefficients: float
    speed: float
    workload: float
    together: float

    @property
    def total(self) -> float:
        """Variance of a single run."""
        return self.coefficients + self.speed + self.workload + self.together

    def shares(self) -> dict[str, float]:
        """Return the share of each source in the total; NaN where nothing varies."""
        total = self.total
        return {k: v / total if total > 0 else float("nan") for k, v in vars(self).items()}


def variance_components(values: FloatArray) -> Components:
    """Divide the variance of a metric.

    Parameters
    ----------
    values : ndarray, shape (D, W, Z)
        Members, workloads of each, courses of the speed of each. D at least 2. With Z = 1 the variance by speed cannot be told from
        that of the workload (W > 1) or the coefficients (W = 1), where it then stays.
    """
    d, w, z = values.shape
    member = values.mean(axis=(1, 2))
    by_w, by_z = values.mean(axis=2), values.mean(axis=1)
    ms_c = w * z * float(np.square(member - member.mean()).sum()) / (d - 1)
    ms_w = z * float(np.square(by_w - member[:, None]).sum()) / (d * (w - 1)) if w > 1 else 0.0
    ms_z = w * float(np.square(by_z - member[:, None]).sum()) / (d * (z - 1)) if z > 1 else 0.0
    ms_e = 0.0
    if w > 1 and z > 1:
        rest = values - by_w[:, :, None] - by_z[:, None, :] + member[:, None, None]
        ms_e = float(np.square(rest).sum()) / (d * (w - 1) * (z - 1))
    return Components(
        coefficients=max(ms_c - ms_w - ms_z + ms_e, 0.0) / (w * z),
        speed=max(ms_z - ms_e, 0.0) / w,
        workload=max(ms_w - ms_e, 0.0) / z,
        together=ms_e,
    )


def expected_values(values: FloatArray, components: Components) -> FloatArray:
    """Return draws of the expected value of a metric given the coefficients, shape (D,).

    The means of the members, drawn in to the spread that is the coefficients' own: a mean of few runs has that of its runs as well.
    The spread is not taken below the Monte Carlo error of the mean of all, below which an estimate of zero says nothing.
    """
    member = values.mean(axis=(1, 2))
    spread = float(member.var(ddof=1))
    own = max(components.coefficients, spread / len(member))
    kept = np.sqrt(own / spread) if spread > 0 else 0.0
    return np.asarray(member.mean() + min(kept, 1.0) * (member - member.mean()))
