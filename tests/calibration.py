"""Simulation-based calibration: whether the ranks of true values among posterior draws are uniform.

If parameters are drawn from the prior and rows from the model, the true value of anything is one more draw from the posterior,
so its rank among the draws is uniform: of parameters, of predictions of configurations never seen, and of functions of
parameters and data such as the likelihood. After Talts et al. (2018), arXiv:1804.06788, and Modrak et al. (2023),
doi:10.1214/23-BA1404.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import chi2, kstest, norm
from simulation import BLOCK, THREE, TINY, Parameters, Simulated, batches, configuration, draw_new, pilot_of, simulate

from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.model import LatencyPosterior, SamplerSettings, fit

FloatArray = NDArray[np.float64]
Places = dict[str, FloatArray]

NEW = (configuration("new on known hardware", "H100", 4), configuration("new on new hardware", "B200", 1))


@dataclass(frozen=True)
class Engine:
    """An engine with settings for many short fits, and how many draws it takes for one that is nearly independent of the last."""

    name: str
    settings: SamplerSettings
    thin: int

    def fit(self, data: Simulated, seed: int) -> LatencyPosterior:
        return fit(data.statistics, data.features, data.priors, self.settings, engine=self.name, seed=seed, show_progress=False)

    def kept(self, draws: FloatArray) -> FloatArray:
        return draws[:: self.thin]


EXACT = Engine("exact", SamplerSettings(draws=50, tune=50, chains=8, target_accept=0.8), 4)
"""Chains move in step, so many short ones cost little more than one; of 400 draws the worst parameter has 130 to 290 effective ones."""
PYMC = Engine("pymc", SamplerSettings(draws=100, tune=150, chains=2, target_accept=0.8), 8)


def log_likelihood(data: Simulated, theta: FloatArray, sigma: FloatArray, omega: FloatArray) -> FloatArray:
    """Log density of all rows for many draws, shape (S,); theta (S, C, K), sigma and omega (S, C).

    A block of m rows with sum T and sum of squares Q of its scaled errors: m - 1 contrasts of variance sigma^2 share Q - T^2 / m,
    and T / sqrt(m) has variance sigma^2 + m omega^2.
    """
    total = np.zeros(len(theta))
    for c, (own, frame) in enumerate(zip(data.configurations, data.frames, strict=True)):
        design = data.features.design(frame, own)
        scale = np.maximum(design @ pilot_of(data.features, own), data.features.noise_floor(own))
        errors = (frame["step_time_s"].to_numpy() - theta[:, c] @ design.T) / scale
        blocks = frame["step_id"].to_numpy() // data.block
        for b in np.unique(blocks):
            inside = errors[:, blocks == b]
            m = inside.shape[1]
            between = inside.sum(axis=1) ** 2 / m
            within = (inside**2).sum(axis=1) - between
            variance = sigma[:, c] ** 2 + m * omega[:, c] ** 2
            total -= 0.5 * (2 * (m - 1) * np.log(sigma[:, c]) + within / sigma[:, c] ** 2 + np.log(variance) + between / variance)
    return total


def place(rng: np.random.Generator, draws: FloatArray, truth: FloatArray | float) -> FloatArray:
    """Where the truth lies among draws (S, ...), in (0, 1): its rank, spread evenly over its class, so uniform exactly."""
    below = (draws < truth).sum(axis=0)
    return np.asarray((below + rng.random(np.shape(truth))) / (len(draws) + 1))


def places_of(data: Simulated, draws: Mapping[str, FloatArray], truth: Parameters, rng: np.random.Generator) -> Places:
    """Places of every parameter and of the likelihood; `draws` by name, leading dimension S."""
    out = {name: place(rng, draws[name], true) for name, true in truth.items()}
    names = ("theta", "sigma", "omega")
    true = log_likelihood(data, *(truth[n][None] for n in names))
    out["likelihood"] = place(rng, log_likelihood(data, *(draws[n] for n in names)), true[0])
    return out


def new_truths(data: Simulated, rng: np.random.Generator) -> dict[str, tuple[FloatArray, float, float]]:
    """Coefficients, noise and drift of the configurations never seen."""
    return {own.config_id: draw_new(rng, data.truth, own, data.configurations, data.features) for own in NEW}


def predictive_places(
    engine: Engine,
    posterior: LatencyPosterior,
    data: Simulated,
    truths: Mapping[str, tuple[FloatArray, float, float]],
    rng: np.random.Generator,
    seed: int,
) -> Places:
    """Places of the coefficients, noise and drift of configurations never seen, and of one new row of each."""
    out = {}
    for own in NEW:
        theta, sigma, omega = truths[own.config_id]
        draws = posterior.draws(own, seed)
        assert not draws.known
        design = data.features.design(batches(rng, 1), own)[0]
        scale = max(float(design @ pilot_of(data.features, own)), data.features.noise_floor(own))
        observed = design @ theta + scale * np.hypot(sigma, omega) * rng.standard_normal()
        predicted = draws.theta @ design
        predicted = predicted + scale * np.hypot(draws.sigma, draws.omega) * rng.standard_normal(len(predicted))
        out[f"{own.config_id}: theta"] = place(rng, engine.kept(draws.theta), theta)
        out[f"{own.config_id}: sigma"] = place(rng, engine.kept(draws.sigma), sigma)
        out[f"{own.config_id}: omega"] = place(rng, engine.kept(draws.omega), omega)
        out[f"{own.config_id}: row"] = place(rng, engine.kept(predicted), observed)
    return out


def kept_draws(engine: Engine, tree: xr.DataTree) -> dict[str, FloatArray]:
    posterior = tree["posterior"].to_dataset()
    return {str(n): engine.kept(v.to_numpy().reshape(-1, *v.shape[2:])) for n, v in posterior.data_vars.items()}


def replications(
    engine: Engine, count: int, seed: int, features: FeatureSet = TINY
) -> Iterator[tuple[Simulated, LatencyPosterior, np.random.Generator]]:
    for i in range(count):
        data = simulate([seed, i], THREE, features)
        assert data.block == BLOCK
        yield data, engine.fit(data, i), np.random.default_rng([seed, i, 1])


def stacked(places: list[Places]) -> Places:
    """Places of one name over replications, flattened to one column per entry."""
    out = {}
    for name in places[0]:
        columns = np.array([p[name] for p in places]).reshape(len(places), -1)
        out |= {f"{name}[{i}]" if columns.shape[1] > 1 else name: columns[:, i] for i in range(columns.shape[1])}
    return out


def p_values(places: FloatArray) -> tuple[float, float, float]:
    """Exact two-sided p-values of uniform places: too high or low, too spread or narrow, any other shape.

    With z the normal scores, sum z / sqrt(n) is standard normal, sum z^2 chi-square with n degrees of freedom; the last is
    Kolmogorov's.
    """
    z, n = norm.ppf(places), len(places)
    middle = 2 * norm.sf(abs(z.sum()) / np.sqrt(n))
    width = 2 * min(chi2.cdf((z**2).sum(), n), chi2.sf((z**2).sum(), n))
    return float(middle), float(width), float(kstest(places, "uniform").pvalue)


def smallest_p(places: Places) -> tuple[float, str]:
    """The smallest p-value over all quantities and tests, corrected for their number (Bonferroni), and whose it is."""
    found = {name: min(p_values(values)) for name, values in places.items()}
    worst = min(found, key=lambda n: found[n])
    return min(1.0, 3 * len(found) * found[worst]), worst
