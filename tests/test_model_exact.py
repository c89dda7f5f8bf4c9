"""The exact engine's density and conditional draws against the same Gaussian written out in dense matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal, localcontext
from itertools import combinations

import arviz as az
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import betaln, expit, gammaln, log_expit
from scipy.stats import gamma, multivariate_normal, norm
from simulation import (
    BENT,
    PRIORS,
    THREE,
    TINY,
    Dense,
    Parameters,
    Simulated,
    bent_features,
    configuration,
    dense,
    deviation_size,
    group_sd_prior,
    hardware_of,
    loading,
    observe,
    own_spread,
    simulate,
    tiny_features,
)

from hfdtl_bayes.errors import InputError, StatisticsError
from hfdtl_bayes.model import ExactDensity, PositiveRange, PriorSettings, SamplerSettings, sample_exact
from hfdtl_bayes.model.layout import VARIABLE_DIMS
from hfdtl_bayes.statistics import ConfigStatistics, Stratum

FloatArray = NDArray[np.float64]

K = len(TINY.varying)
FEW = SamplerSettings(draws=50, tune=50, chains=2)

PROBLEMS = {
    "three configurations, two hardware": simulate(1),
    "one configuration": simulate(2, THREE[:1], rows=(50,)),
    "two configurations, one hardware": simulate(3, THREE[:2], rows=(30, 50)),
    "three configurations, three hardware": simulate(4, [configuration(n, n) for n in ("L4", "H100", "A100")], rows=30),
    "two rows": simulate(5, THREE[:1], rows=(2,)),
    "fewer rows than coefficients beside many": simulate(6, rows=(1, 2, 90)),
    "blocks of one row": simulate(7, rows=20, block=1),
    "discrepancies": simulate(8, features=BENT),
    "discrepancies, few rows": simulate(9, rows=(1, 3, 20), features=BENT),
    "discrepancies, one configuration": simulate(10, THREE[:1], rows=(50,), features=BENT),
}


def engine(data: Simulated, statistics: Sequence[ConfigStatistics] | None = None) -> ExactDensity:
    return ExactDensity(data.statistics if statistics is None else statistics, data.features, data.priors)


def scales_at(density: ExactDensity, x: FloatArray) -> Parameters:
    log_tau, logit, log_sigma, log_omega, *_ = density.split(x)
    return {"tau": np.exp(log_tau), "hardware_share": expit(logit), "sigma": np.exp(log_sigma), "omega": np.exp(log_omega)}


def log_prior(density: ExactDensity, x: FloatArray, priors: PriorSettings) -> float:
    """Log prior density of the unconstrained coordinates: logarithms of Gammas and lognormals, and a Beta in its log odds."""

    def normal(value: FloatArray, r: PositiveRange) -> float:
        low, high = np.log(r.low), np.log(r.high)
        return float(norm.logpdf(value, (low + high) / 2, (high - low) / 2 / norm.ppf(0.95)).sum())

    log_tau, logit, log_sigma, log_omega, sigma_typical, sigma_spread, omega_typical, omega_spread = density.split(x)
    a = priors.hardware_share
    shape, rate = group_sd_prior(priors.deviation)
    # log_tau itself is the derivative of the change of variables.
    value = float((gamma(shape, scale=1 / rate).logpdf(np.exp(log_tau)) + log_tau).sum())
    value += a * (log_expit(logit) + log_expit(-logit)) - betaln(a, a)
    value += normal(sigma_typical, priors.noise) + normal(sigma_spread, priors.noise_spread)
    value += normal(omega_typical, priors.drift) + normal(omega_spread, priors.drift_spread)
    value += norm.logpdf(log_sigma, sigma_typical, np.exp(sigma_spread)).sum()
    return float(value + norm.logpdf(log_omega, omega_typical, np.exp(omega_spread)).sum())


def points(density: ExactDensity, seed: int, count: int = 6, width: float = 0.8) -> list[FloatArray]:
    rng = np.random.default_rng(seed)
    return [density.start + width * rng.standard_normal(density.size) for _ in range(count)]


@pytest.mark.parametrize("name", PROBLEMS)
def test_density_is_the_multivariate_normal_of_all_rows_times_the_prior(name: str) -> None:
    data = PROBLEMS[name]
    density = engine(data)
    differences = []
    for x in points(density, 10):
        joint = dense(data, scales_at(density, x))
        rows = multivariate_normal.logpdf(joint.observed, joint.mean, joint.covariance)
        differences.append(density.log_density(x)[0] - rows - log_prior(density, x, data.priors))
    np.testing.assert_allclose(differences, differences[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradient_is_that_of_the_density(name: str) -> None:
    density = engine(PROBLEMS[name])
    for x in points(density, 11, count=3):
        value, gradient = density.log_density(x)
        step = 1e-4
        rounding = 1e-5 + 20 * np.finfo(float).eps * abs(value) / step
        for i in range(density.size):
            high, low = x.copy(), x.copy()
            high[i] += step
            low[i] -= step
            expected = (density.log_density(high)[0] - density.log_density(low)[0]) / (2 * step)
            assert gradient[i] == pytest.approx(expected, rel=1e-5, abs=rounding), f"coordinate {i}"


class Basis:
    """Stands in for a generator: draw 0 gets zeros, draw 1 + i a one as its i-th normal, so that a linear map shows itself."""

    def __init__(self) -> None:
        self.used = 0

    def standard_normal(self, shape: tuple[int, ...]) -> FloatArray:
        size = int(np.prod(shape[1:]))
        out = np.zeros((shape[0], size))
        out[1 + self.used + np.arange(size), np.arange(size)] = 1.0
        self.used += size
        return out.reshape(shape)


def drawn(density: ExactDensity, x: FloatArray, rng: np.random.Generator | Basis, count: int) -> FloatArray:
    """Draws of (population, hardware effects, theta) as rows, in the order of `Dense`."""
    values = density.draw(np.tile(x, (count, 1)), rng)  # type: ignore[arg-type]
    return np.hstack([values[n].reshape(count, -1) for n in ("population", "hardware_effect", "theta")])


@pytest.mark.parametrize("name", PROBLEMS)
def test_coefficients_have_their_exact_conditional_mean_and_covariance(name: str) -> None:
    """A draw is mean + L eps; both are read off exactly and compared with the conditional of the dense Gaussian."""
    data = PROBLEMS[name]
    density = engine(data)
    for x in points(density, 12, count=3):
        joint = dense(data, scales_at(density, x))
        mean, covariance = joint.conditional()
        basis = Basis()
        out = drawn(density, x, basis, 1 + len(mean))
        assert basis.used == len(mean)
        factor = out[1:] - out[0]
        sd = np.sqrt(np.diag(covariance))
        np.testing.assert_allclose((out[0] - mean) / sd, 0, atol=1e-6)
        np.testing.assert_allclose(factor.T @ factor / np.outer(sd, sd), covariance / np.outer(sd, sd), atol=1e-6)


def test_draws_with_a_real_generator_have_these_moments() -> None:
    data = PROBLEMS["three configurations, two hardware"]
    density = engine(data)
    x, count = points(density, 13, count=1)[0], 20_000
    mean, covariance = dense(data, scales_at(density, x)).conditional()
    out = drawn(density, x, np.random.default_rng(14), count)
    sd = np.sqrt(np.diag(covariance))
    standard = (out - mean) / sd
    assert np.abs(standard.mean(axis=0)).max() < 5 / np.sqrt(count)
    assert np.abs(np.cov(standard.T) - covariance / np.outer(sd, sd)).max() < 5 * np.sqrt(2 / count)


@pytest.mark.parametrize("gpu", ["H100", "L4", "B200"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_new_configuration_has_its_exact_predictive_mean_and_covariance(name: str, gpu: str) -> None:
    """theta = A phi + w_h + e with (phi, w) given the rows; w_h is known only if a fitted configuration runs on it."""
    data = PROBLEMS[name]
    density, own = engine(data), configuration("new", gpu, 4)
    names, _ = hardware_of(data.configurations)
    for x in points(density, 19, count=2):
        scales = scales_at(density, x)
        mean, covariance = dense(data, scales).conditional()
        own_sd = scales["tau"] * deviation_size(data.features)
        share = float(scales["hardware_share"])
        k = len(data.features.varying)
        make = np.zeros((k, len(mean)))
        make[:, :4] = loading(data.features, own)
        if gpu in names:
            at = 4 + names.index(gpu) * K
            make[:, at : at + K] = np.eye(k, K)
            own_sd = np.sqrt(1 - share) * own_sd
        variance = own_spread(own_sd, data.features) ** 2
        found_mean, found_covariance = density.predictive(x[None], own)
        expected = make @ covariance @ make.T + np.diag(variance)
        sd = np.sqrt(np.diag(expected))
        np.testing.assert_allclose((found_mean[0] - make @ mean) / sd, 0, atol=1e-6)
        np.testing.assert_allclose(found_covariance[0] / np.outer(sd, sd), expected / np.outer(sd, sd), atol=1e-6)
        # And what its coefficients would say of everything fitted.
        parts = density.covariance_with(x[None], own)
        assert list(parts) == ["population", "hardware_effect", "theta"]
        found = np.concatenate([v[0].reshape(-1, k) for v in parts.values()])
        every = np.outer(np.sqrt(np.diag(covariance)), sd)
        np.testing.assert_allclose(found / every, covariance @ make.T / every, atol=1e-6)


@pytest.mark.parametrize("name", PROBLEMS)
def test_levels_of_a_fitted_configuration_add_up_to_its_conditional(name: str) -> None:
    data = PROBLEMS[name]
    density, k = engine(data), len(data.features.varying)
    for x in points(density, 23, count=2):
        mean, covariance = dense(data, scales_at(density, x)).conditional()
        for c, own in enumerate(data.configurations):
            at = len(mean) - (len(data.configurations) - c) * k
            of = slice(at, at + k)
            found, levels = density.levels(x[None], own, fitted=c)
            sd = np.sqrt(np.diag(covariance)[of])
            np.testing.assert_allclose((found[0] - mean[of]) / sd, 0, atol=1e-6)
            total = (levels.population + levels.hardware + levels.own)[0]
            np.testing.assert_allclose(total / np.outer(sd, sd), covariance[of, of] / np.outer(sd, sd), atol=1e-6)
            # What is left of the discrepancy once the pooled coefficients are known.
            schur = np.zeros((k, k))
            inner = np.linalg.inv(covariance[of, of])[K:, K:]
            schur[K:, K:] = np.linalg.inv(inner) if k > K else 0.0
            np.testing.assert_allclose(levels.discrepancy[0] / np.outer(sd, sd), schur / np.outer(sd, sd), atol=1e-6)


@pytest.mark.parametrize("sd", [1e-5, 1e-7])
def test_a_discrepancy_that_is_believed_to_be_nothing_is_none(sd: float) -> None:
    data = PROBLEMS["discrepancies"]
    with_none = ExactDensity(replace(data, features=TINY).statistics, TINY, PRIORS)
    bent = bent_features(sd)
    with_small = ExactDensity(replace(data, features=bent).statistics, bent, PRIORS)
    x = np.array(points(with_none, 29))
    one, two = with_none.log_density(x), with_small.log_density(x)
    # The reference is another one, and with it what is left out of the log density.
    np.testing.assert_allclose(two[0] - two[0][0], one[0] - one[0][0], atol=1e-6)
    np.testing.assert_allclose(two[1], one[1], atol=1e-6 * np.abs(one[1]).max())
    for found, expected in zip(with_small.population(x), with_none.population(x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_a_planted_bend_is_recovered() -> None:
    """Many rows with little noise: each configuration's own bend, though nothing is shared and half of them have the other sign."""
    own = [configuration(f"c{i}", "H100" if i % 2 else "L4", 2**i) for i in range(4)]
    base = simulate(31, own, BENT, PRIORS, rows=1500)
    bends = np.array([[0.3, -0.1], [-0.25, 0.2], [0.1, 0.3], [-0.2, -0.3]])
    theta = np.column_stack([base.truth["theta"][:, :K], bends])
    rng = np.random.default_rng(32)
    frames = tuple(observe(rng, f, c, BENT, theta[i], 0.02, 0.01) for i, (f, c) in enumerate(zip(base.frames, own, strict=True)))
    data = replace(base, frames=frames)
    tree = sample_exact(data.statistics, BENT, PRIORS, SamplerSettings(200, 200, 2), seed=5, show_progress=False)
    drawn_theta = tree["posterior"]["theta"].to_numpy().reshape(-1, *theta.shape)
    mean, sd = drawn_theta.mean(axis=0), drawn_theta.std(axis=0)
    assert (np.abs(mean - theta) < 4 * sd).all()
    # Both together are nearly the constant; how much they differ is what rows tell, and is not left to the belief of 0.28.
    bend = drawn_theta[..., K] - drawn_theta[..., K + 1]
    assert (bend.std(axis=0) < 0.03).all()
    assert np.abs(bend.mean(axis=0) - (bends[:, 0] - bends[:, 1])).max() < 0.08


def test_the_effects_of_hardware_are_their_scores_times_their_sd() -> None:
    data = PROBLEMS["three configurations, two hardware"]
    density = engine(data)
    x = np.array(points(density, 15))
    values = density.draw(x, np.random.default_rng(0))
    sd = np.sqrt(values["hardware_share"])[:, None] * values["tau"] * density.scale
    np.testing.assert_allclose(values["hardware_effect"], sd[:, None] * values["hardware_effect_z"], rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1024.0, 1e6])
@pytest.mark.parametrize("which", range(4))
def test_units_change_numbers_but_no_meaning(which: int, scale: float) -> None:
    """Another reference of one feature, its prior restated: the same density, the same coefficients in physical units."""
    references = [2e-5, 1e-4, 2e-3, 5e-3]
    changed = [r * scale if i == which else r for i, r in enumerate(references)]
    data = PROBLEMS["three configurations, two hardware"]
    other = replace(data, features=tiny_features(references=changed))
    one, two = engine(data), engine(other)
    for x in points(one, 31, count=2):
        (value, gradient), (other_value, other_gradient) = one.log_density(x), two.log_density(x)
        assert other_value == pytest.approx(value, rel=1e-9)
        np.testing.assert_allclose(other_gradient, gradient, rtol=1e-6, atol=1e-6)
        coefficients, others = (d.draw(x[None], np.random.default_rng(0))["population"][0] for d in (one, two))
        np.testing.assert_allclose(others * changed, coefficients * references, rtol=1e-6)
        thetas = [
            d.draw(x[None], np.random.default_rng(0))["theta"][0] * f.references for d, f in ((one, TINY), (two, other.features))
        ]
        np.testing.assert_allclose(thetas[1], thetas[0], rtol=1e-6)


def test_rows_without_noise_are_fitted() -> None:
    data = PROBLEMS["three configurations, two hardware"]
    frames = tuple(f.assign(step_time_s=TINY.design(f, c) @ [1.1, 0.9, 1.5]) for f, c in zip(data.frames, THREE, strict=True))
    noiseless = replace(data, frames=frames)
    density = engine(noiseless)
    for x in [density.start, *points(density, 32, count=3)]:
        value, gradient = density.log_density(x)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
    # In a few steps per draw: a density of few digits would send NUTS through its longest paths.
    tree = sample_exact(noiseless.statistics, TINY, PriorSettings(), FEW, show_progress=False)
    assert float(tree["sample_stats"]["n_steps"].mean()) < 60
    np.testing.assert_allclose(tree["posterior"]["theta"].mean(("chain", "draw")), np.tile([1.1, 0.9, 1.5], (3, 1)), rtol=1e-5)


# --- Limits, against sixty digits. ---


def decimals(values: FloatArray) -> NDArray[np.object_]:
    return np.vectorize(Decimal, otypes=[object])(np.asarray(values, dtype=float))


def marginal_in_sixty_digits(
    data: Simulated,
    statistics: Sequence[ConfigStatistics],
    density: ExactDensity,
    x: FloatArray,
    move: tuple[int, str] = (0, "0"),
) -> Decimal:
    """Log density of the factors' rows with coefficients integrated out, by LDL' of their dense covariance; no 2 pi.

    `move` adds to one coordinate in full precision.
    """
    with localcontext() as context:
        context.prec = 60
        full = decimals(x)
        full[move[0]] += Decimal(move[1])
        log_tau, log_odds, log_sigma, log_omega, *_ = density.split(full)
        logit = log_odds.item()
        share = 1 / (1 + (-logit).exp())
        rest = 1 / (1 + logit.exp())
        sd = np.array([v.exp() for v in log_tau]) * decimals(density.scale)
        joint = dense(replace(data, frames=tuple(f.iloc[:1] for f in data.frames)), _UNIT | _ones(len(statistics), len(sd)))
        count, k = len(statistics), len(sd)
        hardware = len({c.hardware.name for c in data.configurations})
        population = len(joint.latent_mean) - (hardware + count) * k
        make = decimals(joint.make)
        features = data.features
        prior_sd = decimals(np.array([f.prior.sd for f in features.base + features.config + features.residual]))
        variance = np.concatenate([prior_sd**2, np.tile(share * sd**2, hardware), np.tile(rest * sd**2, count)])
        prior_mean = decimals(np.array([f.prior.mean for f in features.base + features.config + features.residual]))
        mean = make[:, :population] @ prior_mean
        covariance = (make * variance) @ make.T
        designs, observed, errors = [], [], []
        log_determinant = Decimal(0)
        for c, own in enumerate(statistics):
            for stratum in own.strata:
                error = (2 * log_sigma[c]).exp() + stratum.multiplier * (2 * log_omega[c]).exp()
                block = np.full((len(stratum.triangle), len(mean)), Decimal(0))
                at = population + (hardware + c) * k
                block[:, at : at + k] = decimals(stratum.triangle[:, :k])
                designs.append(block)
                observed.append(decimals(stratum.triangle[:, k]))
                errors += [error] * len(stratum.triangle)
                log_determinant += (stratum.count - len(stratum.triangle)) * error.ln()
        design = np.vstack(designs)
        left = np.concatenate(observed) - design @ mean
        matrix = design @ covariance @ design.T
        n = len(left)
        matrix[np.arange(n), np.arange(n)] += np.array(errors)
        square = Decimal(0)
        for i in range(n):
            pivot = matrix[i, i]
            log_determinant += pivot.ln()
            square += left[i] ** 2 / pivot
            column = matrix[i + 1 :, i] / pivot
            left[i + 1 :] -= column * left[i]
            matrix[i + 1 :, i + 1 :] -= column[:, None] * matrix[i, i + 1 :][None, :]
        return -(log_determinant + square) / 2


_UNIT: Parameters = {"hardware_share": np.array(0.5)}


def _ones(count: int, k: int) -> Parameters:
    return {"tau": np.ones(k), "sigma": np.ones(count), "omega": np.ones(count)}


def many_rows(statistics: Sequence[ConfigStatistics], factor: int) -> tuple[ConfigStatistics, ...]:
    """The same rows `factor` times over."""
    return tuple(
        replace(
            own,
            rows=own.rows * factor,
            strata=tuple(Stratum(s.multiplier, s.count * factor, s.triangle * np.sqrt(factor)) for s in own.strata),
        )
        for own in statistics
    )


def with_columns(statistics: Sequence[ConfigStatistics], change: FloatArray) -> tuple[ConfigStatistics, ...]:
    """The statistics of the rows with their design multiplied by `change` from the right; their coefficients stay as they were.

    y' = y + X (change - 1) t, with t of ordinary size.
    """
    full = np.eye(len(change) + 1)
    full[:-1, :-1] = change
    full[:-1, -1] = (change - np.eye(len(change))) @ np.array([1.1, 0.9, 1.6])
    return tuple(
        replace(own, strata=tuple(Stratum(s.multiplier, s.count, s.triangle @ full) for s in own.strata)) for own in statistics
    )


TAU, SHARE = slice(0, K), K
BASIC = PROBLEMS["three configurations, two hardware"]
NO_DECODE = np.diag([1.0, 0.0, 1.0])


def collinear(part: float) -> FloatArray:
    """The second column becomes the first plus `part` of itself."""
    return np.array([[1.0, 1.0, 0.0], [0.0, part, 0.0], [0.0, 0.0, 1.0]])


def limit(name: str) -> tuple[Simulated, tuple[ConfigStatistics, ...], dict[int | slice, float]]:
    basic = BASIC.statistics
    return {
        "tau of one in a million": (BASIC, basic, {TAU: np.log(1e-6)}),
        "tau of one in a million, a million rows": (BASIC, many_rows(basic, 20_000), {TAU: np.log(1e-6)}),
        "one tau tiny": (BASIC, basic, {1: np.log(1e-9)}),
        "tau of a thousand": (BASIC, basic, {TAU: np.log(1e3)}),
        "share near 0": (BASIC, basic, {SHARE: -40.0}),
        "share near 1": (BASIC, basic, {SHARE: 40.0}),
        "share as near 0 as numbers go": (BASIC, basic, {SHARE: -600.0}),
        "share as near 1 as numbers go": (BASIC, basic, {SHARE: 600.0}),
        "share near 1, a million rows": (BASIC, many_rows(basic, 20_000), {SHARE: 30.0}),
        "a million rows": (BASIC, many_rows(basic, 20_000), {}),
        "a million rows, little noise": (BASIC, many_rows(basic, 20_000), {slice(K + 1, K + 7): np.log(3e-3)}),
        "a column of zeros": (BASIC, with_columns(basic, NO_DECODE), {}),
        "nearly collinear": (BASIC, with_columns(basic, collinear(1e-5)), {}),
        "very nearly collinear": (BASIC, with_columns(basic, collinear(1e-9)), {}),
        "nearly collinear, a million rows": (BASIC, with_columns(many_rows(basic, 20_000), collinear(1e-5)), {}),
        "very nearly collinear, a million rows": (BASIC, with_columns(many_rows(basic, 20_000), collinear(1e-9)), {}),
        "a column of next to nothing": (BASIC, with_columns(basic, np.diag([1.0, 1e-9, 1.0])), {}),
        "no drift": (BASIC, basic, {slice(K + 4, K + 7): np.log(1e-8)}),
        "drift a thousand times the noise": (BASIC, basic, {slice(K + 1, K + 4): np.log(1e-3), slice(K + 4, K + 7): 0.0}),
        "two rows": (PROBLEMS["two rows"], PROBLEMS["two rows"].statistics, {}),
    }[name]


LIMITS = (
    "tau of one in a million",
    "tau of one in a million, a million rows",
    "one tau tiny",
    "tau of a thousand",
    "share near 0",
    "share near 1",
    "share as near 0 as numbers go",
    "share as near 1 as numbers go",
    "share near 1, a million rows",
    "a million rows",
    "a million rows, little noise",
    "a column of zeros",
    "a column of next to nothing",
    "nearly collinear",
    "very nearly collinear",
    "nearly collinear, a million rows",
    "very nearly collinear, a million rows",
    "no drift",
    "drift a thousand times the noise",
    "two rows",
)


@pytest.mark.parametrize("name", LIMITS)
def test_density_and_gradient_are_right_in_the_limits(name: str) -> None:
    data, statistics, fixed = limit(name)
    density = engine(data, statistics)
    values, expected, last = [], [], np.zeros(0)
    for x in points(density, 16, count=2, width=0.3):
        for where, value in fixed.items():
            x[where] = value
        value, gradient = density.log_density(x)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
        values.append(value - log_prior(density, x, data.priors))
        expected.append(float(marginal_in_sixty_digits(data, statistics, density, x)))
        last = x
    # The prior's constants differ from those of the engine by one number, that of any other problem of this size.
    constant = prior_constant(density, data.priors)
    np.testing.assert_allclose(np.array(values) - constant, expected, rtol=1e-12, atol=1e-6)
    _, gradient = density.log_density(last)
    prior_gradient = prior_slope(density, last, data.priors)
    step = "1e-12"
    with localcontext() as context:
        context.prec = 60
        slope = [
            float(
                (
                    marginal_in_sixty_digits(data, statistics, density, last, (i, step))
                    - marginal_in_sixty_digits(data, statistics, density, last, (i, "-" + step))
                )
                / (2 * Decimal(step))
            )
            for i in range(density.size - 4)
        ]
    np.testing.assert_allclose((gradient - prior_gradient)[:-4], slope, rtol=1e-5, atol=1e-3)


def prior_constant(density: ExactDensity, priors: PriorSettings) -> float:
    """The engine leaves out the normalising constants of the prior."""
    a, half = priors.hardware_share, 0.5 * np.log(2 * np.pi)
    sds = [priors.noise.log_sd, priors.noise_spread.log_sd, priors.drift.log_sd, priors.drift_spread.log_sd]
    shape, rate = group_sd_prior(priors.deviation)
    of_tau = density.count_coef * (gammaln(shape) - shape * np.log(rate))
    return float(of_tau + np.log(sds).sum() + len(sds) * half + betaln(a, a) + 2 * density.count_config * half)


def prior_slope(density: ExactDensity, x: FloatArray, priors: PriorSettings) -> FloatArray:
    step = 1e-4
    out = np.zeros(density.size)
    for i in range(density.size):
        high, low = x.copy(), x.copy()
        high[i] += step
        low[i] -= step
        out[i] = (log_prior(density, high, priors) - log_prior(density, low, priors)) / (2 * step)
    return out


@pytest.mark.parametrize("name", LIMITS)
def test_draws_are_finite_in_the_limits(name: str) -> None:
    data, statistics, fixed = limit(name)
    density = engine(data, statistics)
    x = np.array(points(density, 17, count=50, width=0.3))
    for where, value in fixed.items():
        x[:, where] = value
    for variable, values in density.draw(x, np.random.default_rng(18)).items():
        assert np.isfinite(values).all(), variable


def test_a_silent_column_leaves_its_coefficient_to_the_prior() -> None:
    """With no row that has decode tokens, the population's coefficient of them has its prior mean and sd."""
    density = engine(BASIC, with_columns(BASIC.statistics, NO_DECODE))
    x = density.start
    out = drawn(density, x, Basis(), 1 + 4 + 6 + 9)
    decode = TINY["decode"].prior
    assert out[0, 1] == pytest.approx(decode.mean, rel=1e-9)
    assert np.linalg.norm(out[1:, 1] - out[0, 1]) == pytest.approx(decode.sd, rel=1e-9)


@given(seed=st.integers(0, 2**31), rows=st.lists(st.integers(1, 25), min_size=1, max_size=3), block=st.integers(1, 12))
def test_density_equals_the_dense_one_on_any_problem(seed: int, rows: list[int], block: int) -> None:
    data = simulate(seed, THREE[: len(rows)], rows=rows, block=block)
    density = engine(data)
    found = []
    for x in points(density, seed, count=2):
        joint = dense(data, scales_at(density, x))
        expected = multivariate_normal.logpdf(joint.observed, joint.mean, joint.covariance) + log_prior(density, x, PRIORS)
        found.append(density.log_density(x)[0] - expected)
    assert found[0] == pytest.approx(found[1], abs=1e-6)


# --- The sampled posterior's outward form. ---


def test_a_fit_has_the_names_and_dimensions_of_the_layout() -> None:
    tree = sample_exact(BASIC.statistics, TINY, PRIORS, FEW, seed=1, show_progress=False)
    posterior = tree["posterior"].to_dataset()
    assert {n: v.dims for n, v in posterior.data_vars.items()} == {n: ("chain", "draw", *d) for n, d in VARIABLE_DIMS.items()}
    assert list(posterior["coef"].to_numpy()) == list(TINY.coef_names)
    assert list(posterior["config"].to_numpy()) == ["one", "two", "three"]
    assert list(posterior["hardware"].to_numpy()) == ["H100", "L4"]
    for name in ("tau", "sigma", "omega", "sigma_typical", "omega_spread"):
        assert (posterior[name] > 0).all()
    again = sample_exact(BASIC.statistics, TINY, PRIORS, FEW, seed=1, show_progress=False)
    other = sample_exact(BASIC.statistics, TINY, PRIORS, FEW, seed=2, show_progress=False)
    assert again["posterior"].to_dataset().identical(posterior)
    assert not other["posterior"].to_dataset().equals(posterior)


def test_arviz_gives_every_entry_its_own_name() -> None:
    """Its summary takes labels and values in different orders of dimensions; the layout's order keeps them together."""
    data = simulate(20, THREE[:2], rows=30)
    posterior = sample_exact(data.statistics, TINY, PRIORS, FEW, show_progress=False)["posterior"].to_dataset()
    summary = az.summary(posterior, round_to="none")["mean"]
    assert len(summary) == sum(v[0, 0].size for v in posterior.data_vars.values())
    for label, mean in summary.items():
        name, _, entry = str(label).removesuffix("]").partition("[")
        values = posterior[name]
        where = dict(zip(values.dims[2:], entry.split(", "), strict=True)) if entry else {}
        assert float(mean) == pytest.approx(float(values.sel(where).mean()), rel=1e-6), label


def test_statistics_that_do_not_belong_together_are_refused() -> None:
    one, two, _ = BASIC.statistics
    with pytest.raises(StatisticsError, match="no configuration to fit"):
        sample_exact([], TINY)
    with pytest.raises(StatisticsError, match="named twice: one"):
        sample_exact([one, two, one], TINY)
    for other in (
        replace(two, feature_set="other"),
        replace(two, quantity="api_delay"),
        replace(two, coef_names=("a", "b", "c")),
    ):
        with pytest.raises(StatisticsError, match=r"statistics of 'two' are of feature set .* build both with the same set"):
            sample_exact([one, other], TINY)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"draws": 49}, "at least 50"),
        ({"tune": 0}, "at least 50"),
        ({"chains": 1}, "chains"),
        ({"target_accept": 1.0}, "0.5 and 1"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_judged_are_refused(bad: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplerSettings(**bad)


def test_dense_conditional_is_that_of_textbooks() -> None:
    """The yardstick itself, on two correlated normals: E[a | b] = rho sd_a / sd_b b, Var = (1 - rho^2) sd_a^2."""
    covariance = np.array([[4.0, 1.5], [1.5, 1.0]])
    yardstick = Dense(np.eye(2), np.zeros(2), covariance, np.array([[0.0, 1.0]]), np.array([2.0]), np.zeros((1, 1)))
    mean, left = yardstick.conditional()
    np.testing.assert_allclose(mean, [3.0, 2.0])
    np.testing.assert_allclose(left, [[4.0 - 2.25, 0.0], [0.0, 0.0]], atol=1e-12)


def test_problems_differ() -> None:
    for a, b in combinations(PROBLEMS.values(), 2):
        assert len(a.frames) != len(b.frames) or not a.frames[0].equals(b.frames[0])
