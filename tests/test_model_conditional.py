"""Donors' draws conditioned on a target: the joint refit's posterior, brute force, and simulation-based calibration say the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from agreement import DEGREES, NO_DRIFT, compare, judge, made, many
from calibration import Places, places_of, smallest_p, stacked
from numpy.typing import NDArray
from scipy.stats import beta, gamma, kstest, multivariate_normal, norm
from scipy.stats import t as student
from simulation import (
    BENT,
    BLOCK,
    PRIORS,
    THREE,
    TINY,
    Simulated,
    configuration,
    dense,
    error_covariance,
    group_sd_prior,
    pilot_of,
    simulate,
    tiny_features,
)

from hfdtl_bayes.errors import InputError, StatisticsError
from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.model import LatencyPosterior, SamplerSettings, fit
from hfdtl_bayes.model.conditional import ConditionalSettings, Conditioned, condition, scaled_information
from hfdtl_bayes.model.error_grid import ErrorPrior, propose
from hfdtl_bayes.model.error_population import ErrorPopulation
from hfdtl_bayes.model.new_configuration import NewConfiguration
from hfdtl_bayes.model.priors import PositiveRange
from hfdtl_bayes.model.scale_moves import move_group_sds
from hfdtl_bayes.statistics import statistics_from_rows

FloatArray = NDArray[np.float64]
LEVEL = 1e-3
SAMPLER = SamplerSettings(draws=500, tune=200, chains=8)
ALL_DRAWS = ConditionalSettings(first_draws=10**6)


def donors_of(data: Simulated, settings: SamplerSettings = SAMPLER, seed: int = 3) -> LatencyPosterior:
    """The fit of all configurations but the last."""
    return fit(data.statistics[:-1], data.features, data.priors, settings, seed=seed, show_progress=False)


def conditioned(
    donors: LatencyPosterior, data: Simulated, settings: ConditionalSettings = ALL_DRAWS, seed: int = 4
) -> Conditioned:
    return condition(NewConfiguration(donors, data.configurations[-1]), data.statistics[-1], settings, seed=seed)


def variables(posterior: LatencyPosterior) -> dict[str, FloatArray]:
    """Draws by name, shape (chain, draw, ...)."""
    return {str(n): v.to_numpy() for n, v in posterior.tree["posterior"].to_dataset().data_vars.items()}


# --- The joint refit. ---

OTHERS = many(3)


def alone(data: Simulated) -> Simulated:
    """Every row of the target in a block of its own: noise and drift cannot be told apart."""
    apart = data.frames[-1].assign(step_id=data.block * data.frames[-1]["step_id"])
    return replace(data, frames=(*data.frames[:-1], apart))


TARGETS = {
    "few rows, a donor's hardware": lambda: made(41, (*OTHERS, configuration("target", "L4", 4)), (60, 40, 80, 6)),
    "many rows, a donor's hardware": lambda: made(42, (*OTHERS, configuration("target", "H100", 2)), (60, 40, 80, 2000)),
    "new hardware between two others": lambda: made(43, (*OTHERS, configuration("target", "B200", 4)), (60, 40, 80, 100)),
    "blocks of one row": lambda: alone(made(44, (*OTHERS, configuration("target", "A100", 4)), (60, 40, 80, 40))),
    "discrepancies": lambda: made(46, (*OTHERS, configuration("target", "H100", 4)), (60, 40, 80, 300), features=BENT),
    "drift switched off": lambda: made(45, (*OTHERS, configuration("target", "Z1", 4)), (60, 40, 80, 60), priors=NO_DRIFT),
}


@cache
def pair(name: str) -> tuple[LatencyPosterior, Conditioned, LatencyPosterior]:
    """The donors, the same conditioned on the target, and the joint refit."""
    data = TARGETS[name]()
    donors = donors_of(data)
    joint = fit(data.statistics, data.features, data.priors, SAMPLER, target="target", seed=5, show_progress=False)
    return donors, conditioned(donors, data), joint


def agree(names: Sequence[str]) -> None:
    found = []
    for name in names:
        _, one, joint = pair(name)
        assert not one.reason, f"{name}: {one.reason}"
        assert one.posterior.config_ids == joint.config_ids
        found.append(compare(name, variables(one.posterior), variables(joint)))
    verdict = judge(found)
    assert verdict.p > LEVEL, str(verdict)
    assert verdict.excess < student.isf(LEVEL, len(found) - 1), str(verdict)


FAST = ("many rows, a donor's hardware", "new hardware between two others", "discrepancies")


def test_draws_agree_with_those_of_a_joint_refit() -> None:
    """Every parameter's mean, variance and quantiles, those of the population and the donors too, in standard errors."""
    agree(FAST)
    # Donors' draws as they were, without the weights, are not the joint posterior: the comparison notices.
    donors, _, joint = pair(FAST[0])
    names = ("beta", "delta", "tau", "hardware_share", "sigma_typical")
    z = compare("unweighted", *({n: variables(p)[n] for n in names} for p in (donors, joint))).z
    assert 2 * student.sf(np.abs(z).max(), DEGREES) * z.size < LEVEL


@pytest.mark.slow
def test_draws_agree_with_those_of_joint_refits_of_all_kinds() -> None:
    agree(tuple(TARGETS))


def test_what_is_kept_of_a_draw_is_that_of_the_density_however_many_there_are() -> None:
    """Draws are eliminated in parts, the last of them shorter."""
    data, (donors, _, _) = TARGETS[FAST[0]](), pair(FAST[0])
    prior = NewConfiguration(donors, data.configurations[-1])
    stride, chosen = 5, np.array([0, 249, 250, 799])
    pool, scale = prior.pool(stride, 1), prior.density.scale
    mean, covariance = prior.density.predictive(pool.x[chosen], prior.configuration)
    np.testing.assert_allclose(np.linalg.inv(pool.precision[chosen]), covariance / np.outer(scale, scale), rtol=1e-6, atol=1e-12)
    solved = np.linalg.solve(pool.precision[chosen], pool.vector[chosen][..., None])[..., 0]
    np.testing.assert_allclose(solved, mean / scale, rtol=1e-6, atol=1e-9)
    expected = prior.density.covariance_with(pool.x[chosen], prior.configuration)["population"] / scale
    np.testing.assert_allclose(prior.gains(stride, 1, chosen)[:, : expected.shape[1]], expected, rtol=1e-9)


# --- Brute force: dense Gaussians, quadrature over noise and drift. ---


@cache
def small(features: FeatureSet = TINY) -> tuple[Simulated, LatencyPosterior]:
    data = simulate(51, THREE, features, PRIORS, (30, 20, 14))
    return data, donors_of(data, SamplerSettings(draws=50, tune=200, chains=2))


def donor_draw(donors: LatencyPosterior, s: int) -> dict[str, FloatArray]:
    """One draw of the scales, the target's noise and drift vanishing."""
    own = {n: donors.draws_of(n)[s] for n in ("tau", "hardware_share", "sigma", "omega")}
    return own | {n: np.append(own[n], 0.0) for n in ("sigma", "omega")}


def predictive_of_rows(
    data: Simulated, donors: LatencyPosterior, s: int
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Mean and covariance of the target's rows given the donors' and the scales, without its own errors, and its theta's."""
    joint = dense(data, donor_draw(donors, s))
    own = slice(sum(len(f) for f in data.frames[:-1]), None)
    others = slice(0, own.start)
    k = len(data.features.varying)
    every = np.vstack([joint.rows, np.eye(len(joint.latent_mean))[-k:]])
    mean, covariance = every @ joint.latent_mean, every @ joint.latent_covariance @ every.T
    noisy = covariance[others, others] + joint.error_covariance[others, others]
    gain = np.linalg.solve(noisy, covariance[others]).T
    mean = mean + gain @ (joint.observed[others] - mean[others])
    covariance = covariance - gain @ covariance[others]
    rows = slice(own.start, len(every) - k)
    return mean[own.start :], covariance[own.start :, own.start :], joint.observed[rows], np.array([len(every) - k - own.start])


@pytest.mark.parametrize("features", [TINY, BENT], ids=["without discrepancy", "with discrepancies"])
def test_the_marginal_likelihood_is_that_of_the_dense_gaussian(features: FeatureSet) -> None:
    data, donors = small(features)
    prior = NewConfiguration(donors, THREE[-1])
    rows, reference = scaled_information(data.statistics[-1], donors, prior.density.scale)
    pool = prior.pool(1, 1).around(reference)
    blocks = data.frames[-1]["step_id"].to_numpy() // BLOCK
    found, expected = [], []
    for sigma, omega in ((0.1, 0.1), (0.02, 0.3), (0.4, 0.004)):
        found.append(pool.factor(rows, np.full(100, np.log(sigma)), np.full(100, np.log(omega)))[1][:5])
        for s in range(5):
            mean, covariance, observed, (n,) = predictive_of_rows(data, donors, s)
            covariance = covariance[:n, :n] + error_covariance(blocks, sigma, omega)
            expected.append(multivariate_normal(mean[:n], covariance).logpdf(observed))
    difference = np.concatenate(found) - expected
    # Up to one constant for all scales: what rotating the rows within blocks and 2 pi leave out.
    np.testing.assert_allclose(difference, difference[0], atol=1e-6)


def test_moments_are_those_of_quadrature_over_noise_and_drift() -> None:
    """The same donors' draws, each with its exact weight and its exact moments of theta."""
    data, donors = small()
    blocks = data.frames[-1]["step_id"].to_numpy() // BLOCK
    grid = np.linspace(np.log(0.005), np.log(3), 33)
    points = [(a, b) for a in grid for b in np.linspace(np.log(0.0005), np.log(3), 33)]
    weights, theta, sigma = [], [], []
    for s in range(100):
        mean, covariance, observed, (n,) = predictive_of_rows(data, donors, s)
        errors = np.array([error_covariance(blocks, np.exp(a), np.exp(b)) for a, b in points])
        noisy = covariance[:n, :n] + errors
        left = observed - mean[:n]
        solved = np.linalg.solve(noisy, np.broadcast_to(left[:, None], (len(points), n, 1)))[..., 0]
        logs = -0.5 * (np.linalg.slogdet(noisy)[1] + solved @ left)
        for i, name in enumerate(("sigma", "omega")):
            middle, spread = np.log(donors.draws_of(f"{name}_typical")[s]), donors.draws_of(f"{name}_spread")[s]
            logs += norm(middle, spread).logpdf([p[i] for p in points])
        weights.append(logs)
        theta.append(mean[n:] + solved @ covariance[n:, :n].T)
        sigma.append([a for a, _ in points])
    weight = np.exp(np.array(weights) - np.max(weights))
    weight /= weight.sum()
    expected = np.append((weight[..., None] * theta).sum(axis=(0, 1)), (weight * sigma).sum())
    found = []
    for seed in range(40):
        posterior = conditioned(donors, data, seed=seed).posterior
        found.append(
            np.append(posterior.draws_of("theta")[:, -1].mean(axis=0), np.log(posterior.draws_of("sigma")[:, -1]).mean())
        )
    error = np.std(found, axis=0, ddof=1) / np.sqrt(len(found))
    # Weights are normalised within each of two chains: a bias of the order of one part in the effective draws of a chain.
    spread = np.append(posterior.draws_of("theta")[:, -1].std(axis=0), np.log(posterior.draws_of("sigma")[:, -1]).std())
    assert np.all(np.abs(np.mean(found, axis=0) - expected) < 4 * error + 0.05 * spread)


def test_the_proposal_finds_the_mass_from_far_away() -> None:
    """The search starts thirty sds of the prior off, where the likelihood is flat."""
    rng = np.random.default_rng(62)
    prior = ErrorPrior.given(np.full((2000, 2), 0.05), np.full((2000, 2), 0.03), PRIORS)

    def likelihood(log_sigma: FloatArray, log_omega: FloatArray) -> FloatArray:
        return -0.5 * (np.maximum(log_sigma, -20.0) - np.log(0.04)) ** 2

    drawn = propose(likelihood, prior, (-40.0, 8.0), 16.0, rng)
    weight = np.exp(drawn.log_prior + likelihood(drawn.log_sigma, drawn.log_omega) - drawn.log_proposal)
    assert (weight.sum() ** 2 / (weight**2).sum()) / len(weight) > 0.85
    # Of omega the rows say nothing, so it stays what the others' make it.
    assert np.average(drawn.log_omega, weights=weight) == pytest.approx(prior.omega.sample(rng).mean(), abs=0.1)


def test_the_proposal_is_the_density_it_says() -> None:
    """Draws weighted by any integrand over q give its integral: here one with a bent ridge, and one that is hardly informed."""
    rng = np.random.default_rng(61)
    count = 20_000
    values = np.exp(np.log([0.1, 0.05, 0.2]) + 0.05 * rng.standard_normal((count, 3)))
    prior = ErrorPrior.given(values, 0.5 * values, PRIORS)

    def ridge(log_sigma: FloatArray, log_omega: FloatArray) -> FloatArray:
        return -0.5 * ((np.log(np.exp(2 * log_sigma) + np.exp(2 * log_omega)) - np.log(0.02)) / 0.02) ** 2

    def flat(log_sigma: FloatArray, log_omega: FloatArray) -> FloatArray:
        return -0.5 * (log_sigma - np.log(0.1)) ** 2

    for target, multiplier in ((ridge, 1.0), (flat, 0.0)):
        drawn = propose(target, prior, (np.log(0.1), np.log(0.1)), multiplier, rng)
        weight = np.exp(drawn.log_prior + target(drawn.log_sigma, drawn.log_omega) - drawn.log_proposal)
        a = np.linspace(np.log(1e-3), np.log(5), 1201)
        # Averaged over fifty draws; the values of all are nearly the same.
        few = prior[np.arange(0, count, count // 50)]
        densities = [
            np.exp([part.log_density(np.full(len(few), at)) for at in a]).mean(axis=1) for part in (few.sigma, few.omega)
        ]
        inside = np.outer(*densities) * np.exp(target(a[:, None], a[None, :]))
        expected = inside.sum() * (a[1] - a[0]) ** 2
        assert weight.mean() == pytest.approx(expected, abs=5 * weight.std() / np.sqrt(count), rel=0.01)
        # And it is a good one: hardly any variance is left.
        assert (weight.sum() ** 2 / (weight**2).sum()) / count > 0.85
        omega = (inside * np.exp(a)).sum() / inside.sum()
        assert np.average(np.exp(drawn.log_omega), weights=weight) == pytest.approx(omega, rel=0.03)


# --- Moves of the scales. ---


def test_moves_leave_the_joint_prior_as_it_is_and_forget_where_they_came_from() -> None:
    rng = np.random.default_rng(71)
    count, k = 4000, 3
    shape, rate = group_sd_prior(PRIORS.deviation)
    tau = rng.gamma(shape, 1 / rate, (count, k))
    share = rng.beta(PRIORS.hardware_share, PRIORS.hardware_share, count)
    deviations = np.sqrt(1 - share)[:, None, None] * tau[:, None] * rng.standard_normal((count, 4, k))
    effects = np.sqrt(share)[:, None, None] * tau[:, None] * rng.standard_normal((count, 2, k))
    new_tau, new_share = move_group_sds(tau, share, deviations, effects, PRIORS, rng)
    for i in range(k):
        assert kstest(new_tau[:, i], gamma(shape, scale=1 / rate).cdf).pvalue > LEVEL
    assert kstest(new_share, beta(PRIORS.hardware_share, PRIORS.hardware_share).cdf).pvalue > LEVEL
    # The deviations still fit: scores are standard normal with the new scales too.
    scores = deviations / (np.sqrt(1 - new_share)[:, None, None] * new_tau[:, None])
    assert kstest(scores[:, 0, 0], "norm").pvalue > LEVEL
    assert kstest((effects / (np.sqrt(new_share)[:, None, None] * new_tau[:, None]))[:, 1, 2], "norm").pvalue > LEVEL
    assert np.corrcoef(np.log(tau[:, 0]), np.log(new_tau[:, 0]))[0, 1] < 0.85


# --- The population of noise and drift. ---

WIDE, NARROW = (PRIORS.noise, PRIORS.noise_spread), (PositiveRange(0.05, 0.06), PositiveRange(0.01, 2.0))


@pytest.mark.parametrize(("typical", "spread"), [WIDE, NARROW])
@pytest.mark.parametrize("values", [[], [0.05], [0.02, 0.03, 0.3], list(np.geomspace(0.01, 0.2, 30))])
def test_another_configurations_noise_is_that_of_quadrature_over_its_population(
    values: list[float], typical: PositiveRange, spread: PositiveRange
) -> None:
    middle = np.linspace(typical.log_mean - 7 * typical.log_sd, typical.log_mean + 7 * typical.log_sd, 1501)[:, None]
    log_spread = np.linspace(spread.log_mean - 6 * spread.log_sd, spread.log_mean + 6 * spread.log_sd, 601)
    logs = norm(typical.log_mean, typical.log_sd).logpdf(middle) + norm(spread.log_mean, spread.log_sd).logpdf(log_spread)
    for value in values:
        logs = logs + norm(middle, np.exp(log_spread)).logpdf(np.log(value))
    weights = np.exp(logs - logs.max())
    at = np.log([0.003, 0.03, 0.055, 0.8])
    expected = [(weights * norm(middle, np.exp(log_spread)).pdf(a)).sum() / weights.sum() for a in at]
    # A grid of typical values resolves no spread below its own step; prior and values leave them next to no mass.
    population = ErrorPopulation.of(np.tile(values, (len(at), 1)).reshape(len(at), -1), typical, spread)
    np.testing.assert_allclose(np.exp(population.log_density(at)), expected, rtol=1e-4, atol=1e-9)


def test_draws_of_the_population_are_its_posterior_and_draws_of_a_value_its_density() -> None:
    """Values simulated from the prior leave scores of what is drawn given them as they were; moments are those of the density."""
    rng = np.random.default_rng(72)
    count = 20_000
    for size in (0, 1, 4):
        spread = np.exp(PRIORS.noise_spread.log_mean + PRIORS.noise_spread.log_sd * rng.standard_normal(count))
        typical = np.exp(PRIORS.noise.log_mean + PRIORS.noise.log_sd * rng.standard_normal(count))
        values = typical[:, None] * np.exp(spread[:, None] * rng.standard_normal((count, size)))
        population = ErrorPopulation.of(values, PRIORS.noise, PRIORS.noise_spread)
        new_typical, new_spread = population.draw(rng)
        for drawn, prior in ((new_typical, PRIORS.noise), (new_spread, PRIORS.noise_spread)):
            assert kstest((np.log(drawn) - prior.log_mean) / prior.log_sd, "norm").pvalue > LEVEL
        for column in values.T:
            scores = (np.log(column) - np.log(new_typical)) / new_spread
            assert kstest(scores, "norm").pvalue > LEVEL
    same = ErrorPopulation.of(np.tile([0.02, 0.03, 0.1], (count, 1)), PRIORS.noise, PRIORS.noise_spread)
    drawn = np.sort(same.sample(rng))
    at = np.linspace(np.log(1e-5), np.log(100), 4001)
    density = np.exp(same[np.zeros(len(at), dtype=np.int64)].log_density(at))
    cumulative = np.cumsum(density) * (at[1] - at[0])
    assert cumulative[-1] == pytest.approx(1, abs=1e-4)
    assert kstest(drawn, lambda v: np.interp(v, at, cumulative)).pvalue > LEVEL


# --- Simulation-based calibration. ---


def ranks(order: Sequence[int], count: int, seed: int, features: FeatureSet = TINY) -> tuple[Places, int]:
    """Places of the truths among draws conditioned on the last of three configurations, and how often weights degenerated.

    Every replication has donors of its own: targets drawn from one fit of donors would share its errors. As in use, where weights
    degenerate all three are refitted.
    """
    settings = SamplerSettings(draws=100, tune=60, chains=8)
    limits = ConditionalSettings(min_effective=150, first_draws=800, max_copies=4)
    configurations = [THREE[i] for i in order]
    found, refits = [], 0
    for i in range(count):
        data = simulate([seed, i], configurations, features, PRIORS, (40, 30, 25))
        one = conditioned(donors_of(data, settings, seed=i), data, limits, seed=i)
        posterior = one.posterior
        # Fits as short as these do not pass for converged, and need not: their ranks are judged.
        if one.reweighting.pareto_k > limits.max_pareto_k or one.reweighting.effective < limits.min_effective:
            refits += 1
            posterior = fit(data.statistics, features, PRIORS, settings, seed=i, show_progress=False)
        draws = {n: v.reshape(-1, *v.shape[2:])[::8] for n, v in variables(posterior).items()}
        found.append(places_of(data, draws, data.truth, np.random.default_rng([seed, i, 1])))
    return stacked(found), refits


def check(order: Sequence[int], count: int, seed: int, features: FeatureSet = TINY) -> None:
    found, refits = ranks(order, count, seed, features)
    p, worst = smallest_p(found)
    assert p > LEVEL, f"ranks of {worst} are not uniform: corrected p = {p:.2g}"
    assert refits < count / 4


def test_conditioning_is_calibrated() -> None:
    """The target on hardware of its own."""
    check((0, 1, 2), 30, 81)


@pytest.mark.slow
@pytest.mark.slow
def test_conditioning_is_calibrated_with_discrepancies() -> None:
    check((0, 2, 1), 200, 83, BENT)


@pytest.mark.slow
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1)], ids=["new hardware", "a donor's hardware"])
def test_conditioning_is_calibrated_over_many_data_sets(order: tuple[int, ...]) -> None:
    check(order, 300, 82)


# --- What degenerates, and what is refused. ---


def far(data: Simulated) -> Simulated:
    """The target's steps ten times as slow as the donors'."""
    slow = data.frames[-1].assign(step_time_s=10 * data.frames[-1]["step_time_s"])
    return replace(data, frames=(*data.frames[:-1], slow))


def test_a_target_far_from_the_population_is_said_to_be() -> None:
    _, donors = small()
    stranger = far(simulate(51, THREE, TINY, PRIORS, (30, 20, 600)))
    found = conditioned(donors, stranger)
    assert found.reason
    convergence = found.posterior.convergence()
    assert found.reason.startswith(("Pareto k", "only"))
    assert not convergence.passed
    assert "the donors' draws reweighted, Pareto k" in str(convergence)


def test_the_same_seed_gives_the_same_draws_and_another_does_not() -> None:
    data, donors = small()
    one, same, other = (conditioned(donors, data, seed=s).posterior for s in (1, 1, 2))
    assert one.tree.identical(same.tree)
    assert not np.array_equal(one.draws_of("theta"), other.draws_of("theta"))
    assert one.seed == 1


def test_what_cannot_be_conditioned_is_refused() -> None:
    data, donors = small()
    held = fit(data.statistics, TINY, PRIORS, SamplerSettings(50, 50, 2), target="three", show_progress=False)
    with pytest.raises(InputError, match="already know the rows of 'three'"):
        NewConfiguration(held, configuration("new"))
    with pytest.raises(InputError, match="'one' is a donor of this fit"):
        NewConfiguration(donors, THREE[0])
    prior = NewConfiguration(donors, configuration("new"))
    with pytest.raises(InputError, match="statistics of 'three', prepared was 'new'"):
        condition(prior, data.statistics[-1])
    other = tiny_features("other")
    strange = statistics_from_rows(data.frames[-1], THREE[-1], other, pilot=pilot_of(other, THREE[-1]))
    with pytest.raises(StatisticsError, match="of feature set 'other'"):
        condition(NewConfiguration(donors, THREE[-1]), strange)


@pytest.mark.parametrize(
    "bad", [{"max_pareto_k": 0}, {"max_pareto_k": 1.2}, {"min_effective": 0}, {"max_copies": 0}, {"first_draws": 0}]
)
def test_limits_that_mean_nothing_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        ConditionalSettings(**bad)
