"""A new configuration's posterior from the donors' draws and its statistics alone: exact conditionals, importance weights.

Each draw s of the donors' scales psi_s = (tau, rho, sigma, omega of the donors, typical noise and drift) gives the new
configuration's coefficients in closed form, theta | psi_s ~ Normal(m_s, V_s), the donors' rows already taken into account. With G and h
the information of its own rows at its noise and drift (sigma, omega),

    theta | psi_s, sigma, omega, rows ~ Normal(P^-1 (V_s^-1 m_s + h), P^-1),    P = V_s^-1 + G
    L_s(sigma, omega) = p(rows | psi_s, sigma, omega) = |V_s P|^(-1/2) exp(-(m_s' V_s^-1 m_s + rss - |P^(-1/2) (V_s^-1 m_s + h)|^2) / 2) ...

and one Cholesky factor of P bordered by that vector holds it all. (sigma, omega) is drawn for each s from a density q_s (see
`error_grid`), and the pair counts with weight

    w_s = p(sigma, omega | psi_s) L_s(sigma, omega) / q_s(sigma, omega),

so the weighted draws are from the joint posterior of donors and target, the one a joint refit samples. Weights are smoothed (PSIS,
Vehtari et al. 2024, arXiv:1507.02646), draws are resampled systematically within each chain, in order, so that copies lie side by
side and R-hat and ESS see them. Then theta is drawn exactly, and population, hardware and donors move with it by Matheron's rule: a
joint draw X, theta* from before the rows becomes X + Cov(X, theta) V_s^-1 (theta - theta*), a draw from after (Journel & Huijbregts
1978; Doucet 2010).

Last, the scales move given all the rest (`scale_moves`), so that copies of a draw differ in them too (a resample-move step, Gilks &
Berzuini 2001, doi:10.1111/1467-9868.00280). Where few draws carry the weight, copies of each are made and moved before any is weighed. What
that cannot mend is reported, and a joint refit is the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr
from arviz_stats.base import array_stats
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.model.diagnostics import Convergence, Reweighting
from hfdtl_bayes.model.error_grid import ErrorPrior, propose
from hfdtl_bayes.model.exact import ExactDensity, Information, population_loading
from hfdtl_bayes.model.layout import check_statistics, hardware_index, posterior_tree
from hfdtl_bayes.model.moments import reference_errors
from hfdtl_bayes.model.nuts import NutsRun, SamplerSettings
from hfdtl_bayes.model.posterior import LatencyPosterior
from hfdtl_bayes.model.priors import deviation_scale
from hfdtl_bayes.model.scale_moves import move_group_sds, move_population
from hfdtl_bayes.statistics import ConfigStatistics

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

GAUSSIAN_ENGINES = ("exact", "pymc")
"""Engines whose draws are of the model with Gaussian errors, which the closed forms here are of."""

_POPULATIONS = ("sigma_typical", "sigma_spread", "omega_typical", "omega_spread")


@dataclass(frozen=True)
class ConditionalSettings:
    """When reweighted draws may be used."""

    max_pareto_k: float = 0.7
    """Above it the weights' variance is as good as infinite and no number of draws helps (Vehtari et al. 2024)."""
    min_effective: float = 750.0
    """Effective number of the donors' draws under the weights. Near twice what `ConvergenceSettings.min_ess` asks of the worst quantity,
    because draws of a chain are not independent to begin with."""
    max_copies: int = 8
    """Most copies made of each draw before giving up: as many again cost a fraction of a second, once per target."""

    def __post_init__(self) -> None:
        """Refuse limits that cannot be met or mean nothing.

        Raises
        ------
        InputError
            Names the setting and what is accepted.
        """
        if not 0 < self.max_pareto_k <= 1:
            raise InputError(f"max_pareto_k must lie between 0 and 1, found {self.max_pareto_k}")
        if not 0 < self.min_effective < float("inf"):
            raise InputError(f"min_effective must be a positive number of draws, found {self.min_effective}")
        if self.max_copies < 1:
            raise InputError(f"max_copies must be at least 1, found {self.max_copies}")


def why_not_conditional(donors: LatencyPosterior) -> str | None:
    """Return why the draws of a fit cannot be conditioned on a target's rows; None if they can."""
    if donors.target is not None:
        return f"its draws already know the rows of {donors.target!r}, which a new target must not inherit"
    if donors.engine not in GAUSSIAN_ENGINES:
        return f"its draws are of engine {donors.engine!r}, whose errors are not Gaussian"
    return None


@dataclass(frozen=True)
class _Pool:
    """Draws of the scales with what they say of the target, coefficients divided by the deviation scale; leading dimension N.

    Attributes
    ----------
    parent : ndarray of int, shape (N,)
        The donors' draw each goes back to; copies lie side by side.
    scales : dict
        tau, hardware_share, sigma, omega and the populations of the last two, by the names of the posterior.
    x : ndarray, shape (N, size)
        The same in the coordinates of `ExactDensity`.
    precision : ndarray, shape (N, K, K)
        V^-1.
    vector : ndarray, shape (N, K)
        V^-1 m.
    square, log_det : ndarray, shape (N,)
        m' V^-1 m and log |V^-1|.
    errors : ErrorPrior
    """

    parent: IntArray
    scales: dict[str, FloatArray]
    x: FloatArray
    precision: FloatArray
    vector: FloatArray
    square: FloatArray
    log_det: FloatArray
    errors: ErrorPrior

    def factor(self, rows: Information, log_sigma: FloatArray, log_omega: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the Cholesky factor of P bordered by V^-1 m + h, (N, K + 1, K + 1), and log L, (N,), both at (sigma, omega)."""
        n, k = max(len(self.precision), len(log_sigma)), rows.target.shape[-1]
        variance = np.exp(2 * log_sigma)[:, None] + rows.multiplier[0] * np.exp(2 * log_omega)[:, None]
        weight = 1.0 / variance
        bordered = np.empty((n, k + 1, k + 1))
        np.add((weight @ rows.gram[0].reshape(-1, k * k)).reshape(-1, k, k), self.precision, out=bordered[:, :k, :k])
        np.add(weight @ rows.target[0], self.vector, out=bordered[:, k, :k])
        np.add(weight @ rows.square[0], self.square, out=bordered[:, k, k])
        bordered[:, :k, k] = 0.0
        left = np.linalg.cholesky(bordered)
        diagonal = np.diagonal(left, axis1=1, axis2=2)
        log_likelihood = 0.5 * self.log_det - np.log(diagonal[:, :k]).sum(axis=1) - 0.5 * diagonal[:, k] ** 2
        return left, log_likelihood - 0.5 * np.log(variance) @ rows.count[0]


class NewConfiguration:
    """What a fit of donors says of one configuration it has not seen: everything of the update that no row enters.

    Parameters
    ----------
    donors : LatencyPosterior
    configuration : ServingConfiguration

    Raises
    ------
    InputError
        If the draws cannot be conditioned on a target's rows (see `why_not_conditional`), or the configuration is a donor.
    """

    def __init__(self, donors: LatencyPosterior, configuration: ServingConfiguration) -> None:
        reason = why_not_conditional(donors)
        if reason:
            raise InputError(f"this fit cannot be conditioned on a target's rows: {reason}. Calibrate with engine 'exact'")
        if configuration.config_id in donors.config_ids:
            raise InputError(f"{configuration.config_id!r} is a donor of this fit; its rows would count twice")
        self.donors, self.configuration = donors, configuration
        self.density = ExactDensity(donors.statistics, donors.feature_set, donors.priors)
        # Without drift its draws are zero, which the closed forms take as they are.
        names = {*map(str, donors.tree["posterior"].data_vars), "omega", "omega_typical", "omega_spread"}
        self.draws = {n: donors.draws_of(n) for n in sorted(names)}
        self.chains = donors.tree["posterior"].sizes["chain"]
        self.hardware = self._known_hardware()
        self._pools: dict[int, _Pool] = {}

    def _known_hardware(self) -> int | None:
        name = self.configuration.hardware.name
        return self.density.hardware_names.index(name) if name in self.density.hardware_names else None

    @cached_property
    def convergence(self) -> Convergence:
        """Diagnostics of the donors' own draws, which reweighting cannot mend."""
        return self.donors.convergence()

    @cached_property
    def centre(self) -> FloatArray:
        """Draws of what the configuration's coefficients deviate from, shape (S, K): A phi, and its hardware's effect if known."""
        return self.donors.population_draws(self.configuration)

    def pool(self, copies: int) -> _Pool:
        """Return the donors' draws, or so many copies of each."""
        if copies not in self._pools:
            # Only the largest is worth keeping beside the plain one.
            self._pools = {c: p for c, p in self._pools.items() if c == 1} | {copies: self._make_pool(copies)}
        return self._pools[copies]

    def _make_pool(self, copies: int) -> _Pool:
        own = self.draws
        parent = np.repeat(np.arange(len(own["tau"])), copies)
        scales = {n: own[n][parent] for n in ("tau", "hardware_share", "sigma", "omega", *_POPULATIONS)}
        if copies > 1:
            coefficients = {n: own[n][parent] for n in ("beta", "gamma", "delta", "hardware_effect", "theta") if n in own}
            rng = np.random.default_rng([self.donors.seed, 11, copies])
            moved = _moved(scales | coefficients, self.donors.statistics, self.donors, rng)
            scales = {n: moved[n] for n in scales}
        populations = [scales[n] for n in _POPULATIONS]
        x = self.density.join(scales["tau"], scales["hardware_share"], scales["sigma"], scales["omega"], populations)
        mean, covariance = self.density.predictive(x, self.configuration)
        scale = self.density.scale
        mean = mean / scale
        precision = np.linalg.inv(covariance / (scale[:, None] * scale))
        precision = 0.5 * (precision + np.swapaxes(precision, 1, 2))
        vector = (precision @ mean[..., None])[..., 0]
        errors = ErrorPrior(np.log(populations[0]), populations[1], *self._drift_prior(*populations[2:]))
        return _Pool(
            parent, scales, x, precision, vector, (mean * vector).sum(axis=1), np.linalg.slogdet(precision)[1], errors
        )  # fmt: skip

    def _drift_prior(self, typical: FloatArray, spread: FloatArray) -> tuple[FloatArray, FloatArray]:
        # Without drift omega is drawn from a prior of its own, enters nothing and is dropped.
        return (np.log(typical), spread) if self.has_drift else (np.zeros(len(typical)), np.ones(len(typical)))

    @property
    def has_drift(self) -> bool:
        """Whether the priors allow for drift."""
        return self.donors.priors.drift is not None

    @cached_property
    def _all_gains(self) -> FloatArray:
        return self._gains(self.pool(1).x)

    def _gains(self, x: FloatArray) -> FloatArray:
        """Return covariances of everything fitted with theta / scale, shape (N, rows, K): population, hardware, donors."""
        k = self.density.count_coef
        parts = self.density.covariance_with(x, self.configuration)
        return np.concatenate([v.reshape(len(x), -1, k) for v in parts.values()], axis=1) / self.density.scale

    def gains(self, copies: int, chosen: IntArray) -> FloatArray:
        """Return `_gains` of chosen draws of a pool; of the donors' own draws they are kept."""
        if copies == 1:
            return np.asarray(self._all_gains[chosen])
        once, back = np.unique(chosen, return_inverse=True)
        return np.asarray(self._gains(self.pool(copies).x[once])[back])


@dataclass(frozen=True)
class Conditioned:
    """The outcome of an update: the posterior, and whether its weights can be relied upon.

    Attributes
    ----------
    posterior : LatencyPosterior
    reweighting : Reweighting
        Pareto k, effective draws, copies, and what the donors' own convergence was.
    reason : str
        Why the draws are not to be used; empty if they are.
    """

    posterior: LatencyPosterior
    reweighting: Reweighting
    reason: str


def condition(
    prior: NewConfiguration, own: ConfigStatistics, settings: ConditionalSettings | None = None, *, seed: int = 0
) -> Conditioned:
    """Condition a fit of donors on the rows of a new configuration.

    Parameters
    ----------
    prior : NewConfiguration
        Kept by the caller, later updates of the same configuration take a fraction of the first one's time.
    own : ConfigStatistics
        Of the configuration's rows.
    settings : ConditionalSettings, optional
    seed : int
        The same seed gives the same draws.

    Raises
    ------
    StatisticsError
        If the statistics do not belong to the donors' feature set.
    InputError
        If they are of another configuration than `prior`.
    """
    settings = settings or ConditionalSettings()
    donors = prior.donors
    check_statistics([*donors.statistics, own], donors.feature_set)
    if own.configuration != prior.configuration:
        raise InputError(f"these are statistics of {own.config_id!r}, prepared was {prior.configuration.config_id!r}")
    rows, reference = _scaled_rows(own, donors, prior.density.scale)
    sigma, omega = reference_errors(own, donors.priors)
    start = float(np.log(sigma)), float(np.log(omega)) if prior.has_drift else 0.0
    weighed = _weigh(prior, rows, reference, start, 1, seed)
    needed = int(np.ceil(1.2 * settings.min_effective / weighed.effective))
    if 1 < needed <= settings.max_copies:
        weighed = _weigh(prior, rows, reference, start, needed, seed)
    variables = _variables(prior, own, weighed, reference, np.random.default_rng([seed, 8]))
    converged = prior.convergence
    found = Reweighting(
        weighed.pareto_k, weighed.effective, len(prior.draws["tau"]), weighed.copies, str(converged), converged.passed
    )
    tree = _tree(variables, [*donors.statistics, own], donors, prior.chains, found)
    posterior = LatencyPosterior(tree, donors.feature_set, donors.priors, (*donors.statistics, own), own.config_id, seed)
    return Conditioned(posterior, found, found.reason(settings.max_pareto_k, settings.min_effective))


@dataclass(frozen=True)
class _Weighed:
    """Resampled draws of a pool: which, their noise and drift, the factor of their coefficients, and how good the weights were."""

    pool: _Pool
    copies: int
    chosen: IntArray
    sigma: FloatArray
    omega: FloatArray
    left: FloatArray
    pareto_k: float
    effective: float


def _weigh(
    prior: NewConfiguration, rows: Information, reference: FloatArray, start: tuple[float, float], copies: int, seed: int
) -> _Weighed:
    rng = np.random.default_rng([seed, 7])
    pool = _around(prior.pool(copies), reference)
    average = _averaged(pool)
    multiplier = float(rows.multiplier[0, rows.count[0].argmax()])
    errors = propose(lambda a, b: average.factor(rows, a, b)[1], pool.errors, start, multiplier, rng)
    left, log_likelihood = pool.factor(rows, errors.log_sigma, errors.log_omega)
    weights, pareto_k, effective = _smoothed(errors.log_prior + log_likelihood - errors.log_proposal, prior.chains, copies)
    chosen = _resampled(weights, weights.shape[1] // copies, rng)
    sigma, omega = np.exp(errors.log_sigma[chosen]), np.exp(errors.log_omega[chosen])
    return _Weighed(pool, copies, chosen, sigma, omega, left[chosen], pareto_k, effective)


def _scaled_rows(own: ConfigStatistics, donors: LatencyPosterior, scale: FloatArray) -> tuple[Information, FloatArray]:
    """Return the information of a configuration's rows for coefficients divided by `scale`, and the reference it is around."""
    info = ExactDensity([own], donors.feature_set, donors.priors).info
    gram = info.gram * (scale[:, None] * scale)
    multiplier = info.multiplier if donors.priors.drift is not None else np.zeros_like(info.multiplier)
    scaled = Information(gram, info.target * scale, info.square, info.count, multiplier, info.reference)
    return scaled, info.reference[0] / scale


def _around(pool: _Pool, reference: FloatArray) -> _Pool:
    """Return a pool whose means are taken relative to `reference`, as the rows' information is, so that nothing cancels."""
    shift = (pool.precision.reshape(-1, len(reference)) @ reference).reshape(pool.vector.shape)
    square = pool.square - 2 * (pool.vector @ reference) + shift @ reference
    return _Pool(
        pool.parent, pool.scales, pool.x, pool.precision, pool.vector - shift, np.maximum(square, 0.0), pool.log_det, pool.errors
    )  # fmt: skip


def _averaged(pool: _Pool) -> _Pool:
    """Return one draw that stands for all: mean and covariance of the coefficients averaged over a hundred of them."""
    keep = np.unique(np.linspace(0, len(pool.x) - 1, 100).astype(int))
    covariance = np.linalg.inv(pool.precision[keep])
    mean = (covariance @ pool.vector[keep][..., None])[..., 0]
    precision = np.linalg.inv(covariance.mean(axis=0) + np.cov(mean.T, bias=True))
    vector = precision @ mean.mean(axis=0)
    return _Pool(
        pool.parent[:1], {}, pool.x[:1], precision[None], vector[None], np.array([mean.mean(axis=0) @ vector]),
        np.linalg.slogdet(precision)[1][None], pool.errors,
    )  # fmt: skip


def _smoothed(log_weights: FloatArray, chains: int, copies: int) -> tuple[FloatArray, float, float]:
    """Return smoothed weights by chain, shape (chains, N / chains), each summing to one, Pareto k, and the effective draws.

    The effective number is of the donors' draws, the weights of copies added up: copies share much of their parent.
    """
    # ArviZ's function takes log likelihoods to leave out, whose negative are the log weights.
    smoothed, pareto_k = array_stats.psislw(-log_weights)
    by_chain = np.exp(smoothed - smoothed.max()).reshape(chains, -1)
    by_chain = by_chain / np.maximum(by_chain.sum(axis=1, keepdims=True), np.finfo(float).tiny)
    parents = by_chain.reshape(-1, copies).sum(axis=1) / chains
    return by_chain, float(pareto_k), float(1.0 / (parents**2).sum())


def _resampled(weights: FloatArray, draws: int, rng: np.random.Generator) -> IntArray:
    """Return indices of `draws` draws of each chain, shape (chains * draws,), by systematic resampling in order."""
    chains, length = weights.shape
    edges = np.cumsum(weights, axis=1)
    edges /= edges[:, -1:]
    points = (np.arange(draws) + rng.random((chains, 1))) / draws
    found = [
        np.minimum(np.searchsorted(e, p), length - 1) + c * length for c, (e, p) in enumerate(zip(edges, points, strict=True))
    ]
    return np.concatenate(found)


def _variables(
    prior: NewConfiguration,
    statistics: ConfigStatistics,
    weighed: _Weighed,
    reference: FloatArray,
    rng: np.random.Generator,
) -> dict[str, FloatArray]:
    """Return draws of everything by name, one for each resampled draw of the scales."""
    density, pool, chosen, left = prior.density, weighed.pool, weighed.chosen, weighed.left
    parent = pool.parent[chosen]
    own = {n: v[parent] for n, v in prior.draws.items()} | {n: v[chosen] for n, v in pool.scales.items()}
    tau = own["tau"]
    k, scale = density.count_coef, density.scale
    scaled = reference + _back_substituted(left[:, :k, :k], left[:, k, :k] + rng.standard_normal((len(chosen), k)))
    # A draw of theta from before its rows, made from this draw's population, so that both move together.
    share = own["hardware_share"][:, None]
    shared_sd, own_sd = np.sqrt(share) * tau * scale, np.sqrt(1 - share) * tau * scale
    before = prior.centre[parent] + own_sd * rng.standard_normal(tau.shape)
    new_effect = np.zeros((len(chosen), 0, k))
    if prior.hardware is None:
        new_effect = (shared_sd * rng.standard_normal(tau.shape))[:, None]
        before = before + new_effect[:, 0]
    step = (pool.precision[chosen] @ (scaled - before / scale)[..., None])[..., 0]
    moves = (prior.gains(weighed.copies, chosen) @ step[..., None])[..., 0]
    if prior.hardware is None:
        new_effect = new_effect + (shared_sd**2 * step / scale)[:, None]
    sizes = [own[n].shape[1] if n in own else 0 for n in ("beta", "gamma", "delta")]
    count_hardware = len(density.hardware_names)
    *population, effects, thetas = np.split(moves, np.cumsum([*sizes, count_hardware * k]), axis=1)
    for name, move in zip(("beta", "gamma", "delta"), population, strict=True):
        if name in own:
            own[name] = own[name] + move
    effect = np.concatenate([own["hardware_effect"] + effects.reshape(-1, count_hardware, k), new_effect], axis=1)
    names = [*density.hardware_names, *([prior.configuration.hardware.name] if prior.hardware is None else [])]
    effect = effect[:, np.argsort(names)]
    theta = np.concatenate([own["theta"] + thetas.reshape(-1, density.count_config, k), (scaled * scale)[:, None]], axis=1)
    own |= {"hardware_effect": effect, "theta": theta}
    own["sigma"] = np.column_stack([own["sigma"], weighed.sigma])
    if prior.has_drift:
        own["omega"] = np.column_stack([own["omega"], weighed.omega])
    # A draw of the posterior, all of it; the scales move on given the rest, so that draws resampled twice differ in them too.
    own = _moved(own, [*prior.donors.statistics, statistics], prior.donors, rng)
    shared_sd = np.sqrt(own["hardware_share"])[:, None] * own["tau"] * scale
    own["hardware_effect_z"] = own["hardware_effect"] / shared_sd[:, None]
    return {n: v for n, v in own.items() if prior.has_drift or not n.startswith("omega")}


def _moved(
    own: dict[str, FloatArray], statistics: Sequence[ConfigStatistics], donors: LatencyPosterior, rng: np.random.Generator
) -> dict[str, FloatArray]:
    """Return draws by name with tau, hardware_share and the populations of noise and drift moved given everything else."""
    priors, scale = donors.priors, deviation_scale(donors.feature_set)
    population = np.concatenate([own[n] for n in ("beta", "gamma", "delta") if n in own], axis=1)
    loading = np.array([population_loading(donors.feature_set, s.config_row) for s in statistics])
    centre = (population @ loading.reshape(-1, population.shape[1]).T).reshape(len(population), len(statistics), -1)
    deviations = own["theta"] - centre - own["hardware_effect"][:, hardware_index(statistics)]
    tau, share = move_group_sds(
        own["tau"], own["hardware_share"], deviations / scale, own["hardware_effect"] / scale, priors, rng
    )
    own = own | {"tau": tau, "hardware_share": share}
    for name, middle, spread in (("sigma", priors.noise, priors.noise_spread), ("omega", priors.drift, priors.drift_spread)):
        if middle is not None:
            typical, between = f"{name}_typical", f"{name}_spread"
            own[typical], own[between] = move_population(own[name], own[between], middle, spread, rng)
    return own


def _back_substituted(left: FloatArray, right: FloatArray) -> FloatArray:
    """Solve L' x = right for many lower triangles, shapes (N, K, K) and (N, K): one pass over columns for all of them."""
    out = np.empty_like(right)
    k = right.shape[1]
    for j in range(k - 1, -1, -1):
        rest = right[:, j] - (left[:, j + 1 :, j] * out[:, j + 1 :]).sum(axis=1)
        out[:, j] = rest / left[:, j, j]
    return out


def _tree(
    variables: dict[str, FloatArray],
    statistics: list[ConfigStatistics],
    donors: LatencyPosterior,
    chains: int,
    found: Reweighting,
) -> xr.DataTree:
    """Assemble the groups of a fit; sample_stats keep how the donors' draws were reweighted."""
    draws = len(variables["tau"]) // chains
    stats = xr.Dataset({"diverging": (("chain", "draw"), np.zeros((chains, draws), dtype=bool))})
    run = NutsRun(np.zeros((chains * draws, 0)), stats, "importance resampling of the donors' draws")
    tree = posterior_tree(variables, run, statistics, donors.feature_set, SamplerSettings(draws, 50, chains), "conditional")
    tree["sample_stats"].attrs = {
        "engine": "conditional",
        "sampler": run.sampler,
        "draws": draws,
        "chains": chains,
        "reweighting": found.dump(),
    }
    return tree
