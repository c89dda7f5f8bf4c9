"""Simulation-based calibration of both engines and of predictions for configurations never seen.

Family-wise error rate of each test: 0.001, over all quantities and tests of uniformity together; the seeds are fixed. Each test also
feeds in errors of the kind an engine might make, which must be noticed at the same level.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from calibration import (
    EXACT,
    NEW,
    PYMC,
    Engine,
    Places,
    kept_draws,
    new_truths,
    p_values,
    place,
    places_of,
    predictive_places,
    replications,
    smallest_p,
    stacked,
)
from scipy.stats import norm
from simulation import BENT, TINY, Simulated

from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.model import ExactDensity

LEVEL = 1e-3


@dataclass(frozen=True)
class Ranks:
    """Places of the true values under the engine, and under two that are wrong on purpose."""

    right: Places
    no_drift: Places
    group_reused: Places


def without_drift(draws: dict[str, np.ndarray], data: Simulated, seed: int) -> dict[str, np.ndarray]:
    """Draws of an engine that samples the scales well but forgets the drift when it draws coefficients."""
    density = ExactDensity(data.statistics, data.features, data.priors)
    populations = [draws[f"{n}_{what}"] for n in ("sigma", "omega") for what in ("typical", "spread")]
    forgotten = np.full_like(draws["omega"], 1e-6)
    x = density.join(draws["tau"], draws["hardware_share"], draws["sigma"], forgotten, populations)
    return density.draw(x, np.random.default_rng(seed))


def ranks(engine: Engine, count: int, seed: int, features: FeatureSet = TINY) -> Ranks:
    right, no_drift, reused = [], [], []
    for i, (data, posterior, rng) in enumerate(replications(engine, count, seed, features)):
        truths = new_truths(data, rng)
        draws = kept_draws(engine, posterior.tree)
        own = places_of(data, draws, data.truth, rng)
        right.append(own | predictive_places(engine, posterior, data, truths, rng, i))
        forgetful = without_drift(draws, data, i)
        no_drift.append({"theta": place(rng, forgetful["theta"], data.truth["theta"])})
        # The configuration never seen taken for a fitted one on the same hardware.
        slopes = slice(0, len(TINY.base))
        theta = draws["theta"][:, 0, slopes]
        reused.append({"theta": place(rng, theta, truths[NEW[0].config_id][0][slopes])})
    return Ranks(stacked(right), stacked(no_drift), stacked(reused))


QUANTITIES = 3 + 1 + 3 + 1 + 6 + 6 + 9 + 3 + 3 + 4 + 1 + len(NEW) * (3 + 1 + 1 + 1)
"""Of population, tau, share, effects twice, theta, noise, drift, their population, the likelihood; of each new configuration."""


DISCREPANCIES = 2 * (3 + len(NEW))
"""More quantities where there are two discrepancies: of each configuration, fitted or new."""


def check(found: Ranks, more: int = 0) -> None:
    assert len(found.right) == QUANTITIES + more
    p, worst = smallest_p(found.right)
    assert p > LEVEL, f"ranks of {worst} are not uniform: corrected p = {p:.2g}"
    for wrong in (found.no_drift, found.group_reused):
        # Corrected as if all quantities had been looked at.
        assert smallest_p(wrong)[0] * len(found.right) / len(wrong) < LEVEL


def test_exact_engine_is_calibrated() -> None:
    check(ranks(EXACT, 300, 41))


@pytest.mark.slow
def test_exact_engine_is_calibrated_with_discrepancies() -> None:
    check(ranks(EXACT, 200, 45, BENT), DISCREPANCIES)


@pytest.mark.slow
def test_exact_engine_is_calibrated_over_many_data_sets() -> None:
    check(ranks(EXACT, 1000, 42))


@pytest.mark.slow
def test_pymc_engine_is_calibrated() -> None:
    check(ranks(PYMC, 150, 43))


@pytest.mark.parametrize("count", [150, 300])
def test_the_test_of_uniformity_has_its_error_rate_and_its_power(count: int) -> None:
    rng = np.random.default_rng(44)
    uniform = np.array([p_values(rng.random(count)) for _ in range(1500)])
    for level in (0.01, 0.1):
        rate = (uniform < level).mean(axis=0)
        assert np.abs(rate - level).max() < 4 * np.sqrt(level / 1500)
    # Normal scores half or twice as wide as they should be, or shifted by one and a half sds.
    z = rng.standard_normal(count)
    for wrong in (norm.cdf(2 * z), norm.cdf(0.5 * z), norm.cdf(z + 1.5)):
        assert min(p_values(wrong)) < LEVEL / 3 / QUANTITIES
