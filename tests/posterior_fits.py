"""One fit of three configurations through the package's own pipeline, shared by the tests of the posterior."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
from simulation import BLOCK, PRIORS, THREE, TINY, batches, scaled_errors

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.model import LatencyPosterior, SamplerSettings, fit
from hfdtl_bayes.statistics import statistics_from_rows

TRUTH = {
    "one": ((1.1, 0.9, 1.7), 0.08, 0.10),
    "two": ((1.3, 0.8, 1.4), 0.06, 0.15),
    "three": ((0.9, 1.2, 1.5), 0.12, 0.07),
}
"""Coefficients, noise and drift of each configuration."""

SAMPLER = SamplerSettings(draws=300, tune=200, chains=2)


def traffic(own: ServingConfiguration, seed: int, count: int) -> pd.DataFrame:
    """Steps whose errors are relative to their true mean."""
    rng = np.random.default_rng(seed)
    theta, sigma, omega = TRUTH[own.config_id]
    frame = batches(rng, count)
    errors = scaled_errors(rng, frame["step_id"].to_numpy() // BLOCK, sigma, omega)
    return frame.assign(step_time_s=TINY.design(frame, own) @ np.array(theta) * (1 + errors))


@cache
def three_fitted() -> LatencyPosterior:
    """Posterior of 12,000 steps of each configuration, "three" as the target."""
    statistics = [
        statistics_from_rows(traffic(own, 100 + i, 12_000), own, TINY, block_length=BLOCK) for i, own in enumerate(THREE)
    ]
    return fit(statistics, TINY, PRIORS, SAMPLER, target="three", seed=5, show_progress=False)
