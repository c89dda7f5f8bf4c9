"""Moment estimates of noise and drift: where samplers start, and how rows are weighed before anything is sampled."""

from __future__ import annotations

import numpy as np

from hfdtl_bayes.model.priors import PriorSettings
from hfdtl_bayes.statistics import ConfigStatistics, pseudo_rows


def reference_errors(statistics: ConfigStatistics, priors: PriorSettings) -> tuple[float, float]:
    """Return moment estimates of (sigma, omega) of one configuration, the prior's median where it has too few rows.

    Without drift every stratum tells of sigma, and omega is zero.
    """
    rows = pseudo_rows([statistics])
    typical = float(np.exp(priors.noise.log_mean))
    within = (rows.rss_multiplier == 0) | (priors.drift is None)
    sigma = float(np.sqrt(rows.rss[within].sum() / rows.dof[within].sum())) if within.any() else typical
    sigma = max(sigma, 1e-6)
    if priors.drift is None:
        return sigma, 0.0
    between = ~within
    omega = float(np.exp(priors.drift.log_mean))
    if between.any() and rows.dof[between].sum() >= 3:
        excess = rows.rss[between].sum() - rows.dof[between].sum() * sigma**2
        weight = float((rows.dof[between] * rows.rss_multiplier[between]).sum())
        omega = float(np.sqrt(max(excess / weight, (0.1 * sigma) ** 2 / weight)))
    return sigma, omega
