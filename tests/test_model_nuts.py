"""The one place that runs a sampler: right on a known density, unharmed where a trajectory overflows, silent about it."""

from __future__ import annotations

import numpy as np
import pytest

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.model import SamplerSettings
from hfdtl_bayes.model.nuts import run_nuts

SETTINGS = SamplerSettings(draws=500, tune=200, chains=2)


def _normal(x: np.ndarray) -> tuple[float, np.ndarray]:
    scale = np.array([1.0, 10.0, 0.1])
    return float(-0.5 * np.sum((x / scale) ** 2)), -x / scale**2


def test_draws_follow_the_density() -> None:
    run = run_nuts(_normal, np.zeros(3), SETTINGS, seed=1, label="x", show_progress=False)
    np.testing.assert_allclose(run.x.std(axis=0), [1, 10, 0.1], rtol=0.15)
    np.testing.assert_allclose(run.x.mean(axis=0) / [1, 10, 0.1], 0, atol=0.15)
    assert run.sample_stats.sizes == {"chain": 2, "draw": 500}


def test_the_same_seed_gives_the_same_draws() -> None:
    first, again, other = (run_nuts(_normal, np.zeros(3), SETTINGS, seed=s, label="x", show_progress=False).x for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("beyond", ["nan", "overflow", "singular"])
def test_where_numbers_break_down_the_density_is_zero(beyond: str) -> None:
    # A wide normal that cannot be computed beyond 5: draws stay inside and nothing is said (warnings are errors here).
    def density(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = float(-0.5 * x @ x / 16), -x / 16
        if np.abs(x).max() > 5:
            if beyond == "singular":
                np.linalg.inv(np.zeros((2, 2)))
            return (np.nan, gradient) if beyond == "nan" else (float(np.exp(np.array(1e4))), gradient)
        return value, gradient

    run = run_nuts(density, np.zeros(2), SETTINGS, seed=1, label="x", show_progress=False)
    assert np.abs(run.x).max() <= 5
    assert run.x.std() > 1.5


@pytest.mark.parametrize(("name", "value"), [("draws", 10), ("tune", 0), ("chains", 1), ("thin", 0), ("target_accept", 1.0)])
def test_settings_that_cannot_be_judged_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name):
        SamplerSettings(**{name: value})
