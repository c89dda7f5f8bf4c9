"""Discounted donors: the power of a donor's marginal likelihood, in both engines, against the same Gaussian in dense matrices."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from agreement import EXACT, NUTS, compare, judge, made, many
from numpy.typing import NDArray
from scipy.stats import multivariate_normal
from simulation import PRIORS, THREE, TINY, Simulated, dense, deviation_size, simulate
from test_model_exact import engine, log_prior, points, scales_at

from hfdtl_bayes.errors import UnknownNameError
from hfdtl_bayes.features import register_feature_set, registry
from hfdtl_bayes.model import ExactDensity, LatencyPosterior, build_model, convergence, fit, sample_exact, sample_pymc

FloatArray = NDArray[np.float64]

SHARES = {"one": 0.3, "three": 0.6}
COUNTS = np.array([0.3, 1.0, 0.6])
DATA = simulate(41, rows=(25, 30, 40))
DISCOUNTED = replace(DATA, priors=PRIORS.with_discounts(SHARES))
K = len(TINY.varying)


class Pieces:
    """Rows as y = mean + H s + X e + errors: s what is shared (population, hardware), e the deviations of the configurations."""

    def __init__(self, data: Simulated, x: FloatArray) -> None:
        density = engine(data)
        joint = dense(data, scales_at(density, x))
        # From the latent vector (population, hardware, theta) back to the independent pieces that `make` mixes.
        back = np.linalg.inv(joint.make)
        variance = np.diag(back @ joint.latent_covariance @ back.T)
        shared = len(variance) - len(data.configurations) * K
        loaded = joint.rows @ joint.make
        self.shared_variance = variance[:shared]
        self.shared_mean = (back @ joint.latent_mean)[:shared]
        self.h, own = loaded[:, :shared], loaded[:, shared:]
        self.observed = joint.observed
        # Given what is shared, rows of different configurations are independent.
        self.given = own * variance[shared:] @ own.T + joint.error_covariance
        self.sizes = [len(f) for f in data.frames]
        self.parts = [slice(int(end - n), int(end)) for n, end in zip(self.sizes, np.cumsum(self.sizes), strict=True)]
        self.joint, self.make = joint, joint.make

    def log_density(self, counts: FloatArray) -> float:
        """Log of the integral over what is shared of the product of powers.

        N(y; m, V)^a = N(y; m, V / a) times |V|^((1 - a) / 2) and a constant.
        """
        covariance, more = self.h * self.shared_variance @ self.h.T, 0.0
        for part, a in zip(self.parts, counts, strict=True):
            covariance[part, part] += self.given[part, part] / a
            more += 0.5 * (1 - a) * np.linalg.slogdet(self.given[part, part])[1]
        return float(multivariate_normal.logpdf(self.observed, self.h @ self.shared_mean, covariance) + more)

    def shared(self, counts: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Posterior mean and covariance of what is shared."""
        precision, vector = np.diag(1 / self.shared_variance), self.shared_mean / self.shared_variance
        for part, a in zip(self.parts, counts, strict=True):
            weighed = a * np.linalg.solve(self.given[part, part], self.h[part])
            precision = precision + self.h[part].T @ weighed
            vector = vector + weighed.T @ self.observed[part]
        covariance = np.linalg.inv(precision)
        return covariance @ vector, covariance


@pytest.mark.parametrize("data", [DISCOUNTED, replace(DISCOUNTED, priors=PRIORS)], ids=["discounted", "in full"])
def test_density_is_that_of_powers_of_marginal_likelihoods(data: Simulated) -> None:
    density = engine(data)
    counts = COUNTS if data.priors.discounts else np.ones(3)
    at = points(density, 1)
    found = [float(density.log_density(x)[0]) for x in at]
    expected = [Pieces(data, x).log_density(counts) + log_prior(density, x, data.priors) for x in at]
    np.testing.assert_allclose(np.diff(found), np.diff(expected), rtol=1e-8, atol=1e-7)


def test_gradient_is_that_of_the_density() -> None:
    density = engine(DISCOUNTED)
    for x in points(density, 2):
        step = 1e-5 * np.eye(density.size)
        numeric = (density.log_density(x + step)[0] - density.log_density(x - step)[0]) / 2e-5
        np.testing.assert_allclose(density.log_density(x)[1], numeric, rtol=1e-5, atol=1e-5)


def test_draws_are_of_what_is_shared_and_of_coefficients_given_it_and_all_rows() -> None:
    density = engine(DISCOUNTED)
    x = points(density, 3)[0]
    pieces = Pieces(DATA, x)
    mean, covariance = pieces.shared(COUNTS)
    draws = density.draw(np.tile(x, (40_000, 1)), np.random.default_rng(5))
    population = draws["population"]
    p = population.shape[1]
    own_mean, own_covariance = (v[0] for v in density.population(x[None]))
    np.testing.assert_allclose(own_mean, mean[:p], rtol=1e-7)
    np.testing.assert_allclose(own_covariance, covariance[:p, :p], rtol=1e-6, atol=1e-12)

    def close(values: FloatArray, mean: FloatArray, covariance: FloatArray) -> None:
        sd = np.sqrt(np.diag(covariance))
        z = (values.mean(axis=0) - mean) / (sd / np.sqrt(len(values)))
        assert np.abs(z).max() < 4.5
        np.testing.assert_allclose(np.cov(values.T) / np.outer(sd, sd), covariance / np.outer(sd, sd), atol=0.04)

    close(np.concatenate([population, draws["hardware_effect"].reshape(len(population), -1)], axis=1), mean, covariance)
    # theta = A s + e; given s, e follows all rows of its configuration.
    for c, part in enumerate(pieces.parts):
        at = slice(len(mean) + c * K, len(mean) + (c + 1) * K)
        rows = pieces.joint.rows[part, at]
        loading = pieces.make[at, : len(mean)]
        back = np.linalg.inv(pieces.make)
        variance = np.diag(back @ pieces.joint.latent_covariance @ back.T)[at]
        gain = np.linalg.solve(pieces.given[part, part], rows * variance).T
        slope = loading - gain @ pieces.h[part]
        centre = slope @ mean + gain @ pieces.observed[part]
        close(draws["theta"][:, c], centre, slope @ covariance @ slope.T + np.diag(variance) - gain @ rows * variance)


def test_a_donor_that_counts_for_nothing_is_forgotten() -> None:
    density = engine(replace(DATA, priors=PRIORS.with_discounts({"two": 1e-9})))
    others = ExactDensity([DATA.statistics[i] for i in (0, 2)], TINY, PRIORS)
    at = points(density, 4)
    found, expected = [], []
    for x in at:
        log_tau, logit, log_sigma, log_omega, *populations = density.split(x)
        less = np.concatenate([log_tau, [logit], log_sigma[[0, 2]], log_omega[[0, 2]], populations])
        own = 0.0
        for value, typical, log_spread in ((log_sigma[1], *populations[:2]), (log_omega[1], *populations[2:])):
            own += -0.5 * ((value - typical) / np.exp(log_spread)) ** 2 - log_spread
        found.append(float(density.log_density(x)[0]))
        expected.append(float(others.log_density(less)[0]) + own)
    np.testing.assert_allclose(np.diff(found), np.diff(expected), rtol=1e-6, atol=1e-5)


def test_rows_by_the_ten_thousand_do_not_undo_a_discount() -> None:
    """Coefficients pinned by their rows are one draw each from the population, worth a / tau^2 of information about its centre."""
    many_rows = simulate(43, many(2), rows=40_000)
    share = 0.25
    density = engine(replace(many_rows, priors=PRIORS.with_discounts({"c0": share})))
    x = density.start.copy()
    x[K] = -30.0  # no part of the deviation is common to a hardware
    tau = np.exp(x[:K]) * deviation_size(TINY)
    loadings = [density.loading[c] / density.sd for c in (0, 1)]
    information = np.diag(1 / density.sd**2)
    for loading, a in zip(loadings, (share, 1.0), strict=True):
        information = information + loading.T @ (loading * (a / tau**2)[:, None])
    _, covariance = density.population(x[None])
    np.testing.assert_allclose(covariance[0], np.linalg.inv(information), rtol=2e-3, atol=1e-4)


def test_the_pymc_model_adds_the_same_power() -> None:
    model = build_model(DISCOUNTED.statistics, TINY, DISCOUNTED.priors)
    values = {
        v.name: 0.3 * np.random.default_rng(7).standard_normal(model.initial_point()[v.name].shape) for v in model.value_vars
    }
    values |= {n: values[n] - 2 for n in values if n.startswith(("tau", "sigma", "omega"))}
    named = {
        n: model[n] for n in ("theta", "tau", "hardware_share", "hardware_effect", "beta", "gamma", "delta", "sigma", "omega")
    }
    outputs = model.replace_rvs_by_values([*model.potentials, *named.values()])
    found = model.compile_fn(outputs, inputs=model.value_vars, mode="FAST_COMPILE", point_fn=True, on_unused_input="ignore")(
        values
    )
    potentials, drawn = found[:2], dict(zip(named, found[2:], strict=True))
    assert len(model.potentials) == 2
    density = engine(DATA)
    populations = [np.ones(1)] * 4
    scales = (drawn["tau"][None], drawn["hardware_share"][None], drawn["sigma"][None], drawn["omega"][None], populations)
    pieces = Pieces(DATA, density.join(*scales)[0])
    shared = np.concatenate([drawn["beta"], drawn["gamma"], drawn["delta"], drawn["hardware_effect"].ravel()])
    # Up to a constant of the rows, which the difference between two points does not have.
    other = dict(drawn)
    moved = {**values, "beta": values["beta"] + 0.4}
    again = model.compile_fn(outputs, inputs=model.value_vars, mode="FAST_COMPILE", point_fn=True, on_unused_input="ignore")(
        moved
    )
    other_shared = np.concatenate(
        [again[2 + list(named).index("beta")], other["gamma"], other["delta"], other["hardware_effect"].ravel()]
    )
    for potential, second, config_id in zip(potentials, again[:2], ("one", "three"), strict=True):
        c = [own.config_id for own in THREE].index(config_id)
        part = pieces.parts[c]
        logs = [
            multivariate_normal.logpdf(pieces.observed[part], pieces.h[part] @ s, pieces.given[part, part])
            for s in (shared, other_shared)
        ]
        assert second - potential == pytest.approx((SHARES[config_id] - 1) * (logs[1] - logs[0]), rel=1e-6)


@pytest.mark.slow
def test_engines_agree_with_donors_discounted() -> None:
    data, priors = made(5), PRIORS.with_discounts({"one": 0.7, "three": 0.1})
    exact = sample_exact(data.statistics, TINY, priors, EXACT, seed=11, show_progress=False)
    nuts = sample_pymc(data.statistics, TINY, priors, NUTS, seed=13, show_progress=False)
    assert convergence(exact).rhat < 1.03
    assert convergence(nuts).rhat < 1.03
    draws = [{str(n): v.to_numpy() for n, v in t["posterior"].to_dataset().data_vars.items()} for t in (exact, nuts)]
    verdict = judge([compare("discounted", *draws)])
    assert verdict.p > 1e-3, str(verdict)
    assert verdict.root_mean_square < 1.2, str(verdict)


def fitted(target: str | None = None, **more: object) -> LatencyPosterior:
    return fit(DATA.statistics, TINY, DISCOUNTED.priors, EXACT, target=target, show_progress=False, **more)


def test_a_posterior_file_keeps_discounts_and_a_fit_those_of_its_donors(tmp_path: Path) -> None:
    posterior = fitted()
    register_feature_set(TINY)
    try:
        again = LatencyPosterior.load(posterior.save(tmp_path / "p.nc"))
        # A file from before there were discounts: every donor counts in full.
        fit(DATA.statistics, TINY, PRIORS, EXACT, show_progress=False).save(tmp_path / "full.nc")
        with xr.open_datatree(tmp_path / "full.nc", engine="h5netcdf") as opened:
            tree = opened.load()
        header = json.loads(tree.attrs["hfdtl_bayes"])
        assert header["priors"].pop("discounts") == []
        tree.attrs["hfdtl_bayes"] = json.dumps(header)
        tree.to_netcdf(tmp_path / "old.nc", engine="h5netcdf")
        assert LatencyPosterior.load(tmp_path / "old.nc").priors == PRIORS
    finally:
        registry._SETS.pop((TINY.name, TINY.quantity), None)
    assert again.priors == posterior.priors == DISCOUNTED.priors
    assert fitted("three").priors.discounts == (("one", 0.3),)
    less = fit(DATA.statistics[:2], TINY, DISCOUNTED.priors, EXACT, show_progress=False)
    assert less.priors.discounts == (("one", 0.3),)
    with pytest.raises(UnknownNameError, match=r'engine "rows" cannot discount donors \(one, three\)'):
        fitted(engine="rows")
