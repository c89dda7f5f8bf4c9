"""What an answer owes to the priors: refits and power-scaling agree with each other and with the fit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from posterior_fits import three_fitted, traffic
from scipy.stats import gamma, multivariate_normal
from simulation import BLOCK, PRIORS, THREE, TINY, batches, configuration, error_covariance, pilot_of

from hfdtl_bayes.errors import InputError, UnknownNameError
from hfdtl_bayes.features import PriorRange
from hfdtl_bayes.model import LatencyPosterior, PositiveRange, PriorSettings, SamplerSettings, fit
from hfdtl_bayes.model.sensitivity import (
    ALPHAS,
    GOOD_K,
    SCALES,
    Sensitivity,
    log_likelihood,
    log_priors,
    power_weights,
    refit,
    scaled_priors,
    sensitivity,
)
from hfdtl_bayes.statistics import statistics_from_rows

SAMPLER = SamplerSettings(draws=250, tune=150)
NEW = configuration("new", "B200", 2)
STEPS = batches(np.random.default_rng(4), 3).assign(batch=["small", "middle", "large"])
FRAMES = [traffic(own, 40 + i, 60) for i, own in enumerate(THREE[:2])]


@cache
def two_donors() -> LatencyPosterior:
    """Two donors of sixty steps each: much is left to the prior."""
    statistics = [
        statistics_from_rows(f, own, TINY, block_length=BLOCK, pilot=pilot_of(TINY, own))
        for f, own in zip(FRAMES, THREE[:2], strict=True)
    ]
    return fit(statistics, TINY, PRIORS, SAMPLER, seed=3, show_progress=False)


@cache
def answer() -> Sensitivity:
    return sensitivity(two_donors(), NEW, batches=STEPS)


def test_the_same_priors_give_the_same_fit() -> None:
    posterior = two_donors()
    assert all(scaled_priors(posterior.priors, scale, 1.0) == posterior.priors for scale in SCALES)
    again = refit(posterior, scaled_priors(posterior.priors, "deviation", 1.0))
    assert again.tree["posterior"].to_dataset().equals(posterior.tree["posterior"].to_dataset())


def test_a_scale_is_multiplied_and_nothing_else() -> None:
    found = scaled_priors(PRIORS, "deviation", 2.0)
    assert found == replace(PRIORS, deviation=PositiveRange(2 * PRIORS.deviation.low, 2 * PRIORS.deviation.high))
    with pytest.raises(UnknownNameError, match="unknown scale 'noise'; those to vary are deviation, noise_spread, drift_spread"):
        scaled_priors(PRIORS, "noise", 2.0)


def test_the_table_has_every_scale_factor_and_batch() -> None:
    found = answer()
    keys = found.predictions[["scale", "factor", "batch"]].drop_duplicates()
    assert len(keys) == len(found.predictions) == len(SCALES) * 3 * len(STEPS)
    own = found.predictions[found.predictions["factor"] == 1.0]
    assert (own[["mean_ratio", "width_ratio", "width_row_ratio"]] == 1.0).all(axis=None)
    predicted = two_donors().predict(STEPS, NEW)
    np.testing.assert_array_equal(own["mean_s"][:3], predicted["mean_s"])
    np.testing.assert_allclose(own["width_s"][:3], predicted["q97.5_mean_s"] - predicted["q2.5_mean_s"])
    assert not found.fitted
    coefficients = found.coefficients
    assert set(coefficients["feature"]) == {f.name for f in TINY.features}
    assert (coefficients.loc[coefficients["factor"] == 1.0, "shift"] == 0).all()


def test_more_deviation_widens_what_is_said_of_a_new_configuration() -> None:
    found = answer()
    wide, narrow = (found.predictions.query("scale == 'deviation' and factor == @f")["width_ratio"] for f in (2.0, 0.5))
    assert (wide > 1.3).all()
    assert (narrow < 0.9).all()
    said = found.sentences()
    assert len(said) == 2 * len(SCALES) + 1 + (not found.converged)
    doubled = next(s for s in said if s.startswith("doubling the range of the deviations between configurations: "))
    assert f"the zero-shot 95 % intervals of the expected time of new widen by {100 * (np.median(wide) - 1):.0f} % (+" in doubled
    assert any(s.startswith("differences of up to 6% between two widths") for s in said)


def powered(priors: PriorSettings, prior: str, alpha: float) -> PriorSettings:
    """The settings whose prior is the given one to a power, in the sampler's coordinates."""
    if prior == "hardware_share":
        return replace(priors, hardware_share=alpha * priors.hardware_share)
    r: PositiveRange = getattr(priors, prior)
    if prior == "deviation":
        # In the logarithm x of tau the log density is shape x - rate exp(x).
        tempered = gamma(alpha * r.gamma_shape, scale=1 / (alpha * r.gamma_rate))
        return replace(priors, deviation=PositiveRange(*map(float, tempered.ppf([0.05, 0.95]))))
    middle, half = np.log(r.low * r.high) / 2, np.log(r.high / r.low) / 2 / np.sqrt(alpha)
    return replace(priors, **{prior: PositiveRange(float(np.exp(middle - half)), float(np.exp(middle + half)))})


@pytest.mark.parametrize(
    ("prior", "alpha"), [("deviation", 0.7), ("deviation", 1.25), ("noise", 2.0), ("drift_spread", 0.5), ("hardware_share", 0.5)]
)
def test_reweighted_draws_are_those_of_a_refit(prior: str, alpha: float) -> None:
    posterior = two_donors()
    weights, k = power_weights(log_priors(posterior)[prior], alpha)
    assert k < GOOD_K
    assert weights.sum() == pytest.approx(1.0)
    refitted = refit(posterior, powered(posterior.priors, prior, alpha), seed=11)
    size = 1 / (weights**2).sum()
    moved = 0.0
    for name in ("tau", "hardware_share", "sigma", "omega", "sigma_typical", "omega_spread", "beta", "delta"):
        mine, other = (
            np.log(p.draws_of(name)) if name not in ("beta", "delta") else p.draws_of(name) for p in (posterior, refitted)
        )
        mine, other = (v.reshape(len(v), -1) for v in (mine, other))
        mean, sd = weights @ mine, other.std(axis=0)
        # Draws are not independent, so a standard error may be twice that of as many independent ones; five of them.
        error = 5 * 2 * np.sqrt(1 / size + 1 / len(other))
        np.testing.assert_allclose((mean - other.mean(axis=0)) / sd, 0.0, atol=error)
        spread = np.sqrt(weights @ (mine - mean) ** 2)
        np.testing.assert_allclose(spread / sd, 1.0, atol=error)
        moved = max(moved, float(np.abs(mine.std(axis=0) / sd - 1.0).max()))
    # The comparison would notice: without weights at least one spread is elsewhere.
    assert moved > 0.02


def test_ranges_of_coefficients_to_a_power_are_those_of_a_refit() -> None:
    posterior, alpha = two_donors(), 0.7
    weights, k = power_weights(log_priors(posterior)["population"], alpha)
    assert k < GOOD_K
    half = {f.name: (f.prior.high - f.prior.low) / 2 / np.sqrt(alpha) for f in TINY.features}
    wider = {f.name: PriorRange(f.prior.mean - half[f.name], f.prior.mean + half[f.name]) for f in TINY.features}
    # Group sds are relative to the larger of prior mean and sd; these means are the larger, so the deviations keep their prior.
    features = TINY.with_priors(wider)
    refitted = fit(posterior.statistics, features, PRIORS, SAMPLER, seed=12, show_progress=False)
    error = 5 * 2 * np.sqrt((weights**2).sum() + 1 / 2000)
    for name in ("beta", "gamma", "delta"):
        mine, other = posterior.draws_of(name), refitted.draws_of(name)
        mean = weights @ mine
        np.testing.assert_allclose((mean - other.mean(axis=0)) / other.std(axis=0), 0.0, atol=error)
        np.testing.assert_allclose(np.sqrt(weights @ (mine - mean) ** 2) / other.std(axis=0), 1.0, atol=error)


def test_the_likelihood_is_that_of_the_rows() -> None:
    """Differences between draws against the multivariate normal of all rows, drift in the covariance."""
    posterior = two_donors()
    found = log_likelihood(posterior)[::400]
    for c, (frame, own) in enumerate(zip(FRAMES, THREE[:2], strict=True)):
        design = TINY.design(frame, own)
        scale = np.maximum(design @ pilot_of(TINY, own), 1e-3)
        expected = []
        for i in range(0, len(posterior.draws_of("tau")), 400):
            theta, sigma, omega = (posterior.draws_of(n)[i, c] for n in ("theta", "sigma", "omega"))
            covariance = error_covariance(frame["step_id"].to_numpy() // BLOCK, sigma, omega)
            residual = (frame["step_time_s"].to_numpy() - design @ theta) / scale
            expected.append(multivariate_normal(np.zeros(len(frame)), covariance).logpdf(residual))
        np.testing.assert_allclose(np.diff(found[:, c]), np.diff(expected), atol=1e-6)


def test_power_scaling_stands_beside_the_refits() -> None:
    power = answer().power
    names = ("deviation", "hardware_share", "noise", "noise_spread", "drift", "drift_spread", "population", "likelihood")
    assert tuple(power["prior"].unique()) == names
    assert (power["psense"] >= 0).all()
    with_k = power[power["prior"] != "likelihood"]
    for alpha in ALPHAS:
        usable = with_k[f"k_{alpha:g}"] <= GOOD_K
        assert (with_k[f"sd_ratio_{alpha:g}"].notna() == usable).all()
    # What the deviations are believed to be matters more than anything believed of noise.
    sense = power.groupby("prior")["psense"].max()
    assert sense["deviation"] > 2 * max(sense["noise"], sense["noise_spread"])


def test_the_target_is_what_a_calibrated_posterior_is_asked_about() -> None:
    posterior = three_fitted()
    found = sensitivity(posterior, batches=STEPS, scales=("deviation",), factors=(2.0,))
    assert (found.config_id, found.fitted) == ("three", True)
    assert set(found.coefficients["feature"]) == set(TINY.coef_names)
    # Twelve thousand steps leave the prior nothing to say.
    assert found.predictions["width_ratio"].between(0.85, 1.15).all()
    assert (found.coefficients["shift"].abs() < 0.3).all()


def test_without_drift_its_spread_is_not_varied() -> None:
    posterior = two_donors()
    still = refit(posterior, replace(posterior.priors, drift=None), settings=SamplerSettings(draws=100, tune=100, chains=2))
    found = sensitivity(still, NEW, batches=STEPS, factors=(2.0,))
    assert set(found.predictions["scale"]) == {"deviation", "noise_spread"}
    assert not set(found.power["prior"]) & {"drift", "drift_spread"}


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(InputError, match="no calibrated target; give a configuration to predict"):
        sensitivity(two_donors())
    with pytest.raises(UnknownNameError, match="unknown scale 'tau'"):
        sensitivity(two_donors(), NEW, batches=STEPS, scales=("tau",))
