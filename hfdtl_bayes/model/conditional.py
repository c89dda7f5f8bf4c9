"""A new configuration's posterior from the donors' draws and its statistics alone: exact conditionals, importance weights.

Each draw s of the donors' scales psi_s = (tau, rho, sigma, omega of the donors, typical noise and drift) gives the new
configuration's coefficients in closed form, theta | psi_s ~ Normal(m_s, V_s), the donors' rows already taken into account. With G and h
the information of its own rows at its noise and drift (sigma, omega),

    theta | psi_s, sigma, omega, rows ~ Normal(P^-1 (V_s^-1 m_s + h), P^-1),    P = V_s^-1 + G
    L_s(sigma, omega) = p(rows | psi_s, sigma, omega) = |V_s P|^(-1/2) exp(-(m_s' V_s^-1 m_s + rss - |P^(-1/2) (V_s^-1 m_s + h)|^2) / 2) ...

and one Cholesky factor of P bordered by that vector holds it all. (sigma, omega) is drawn for each s from a density q_s (see
`error_grid`), and the pair counts with weight

    w_s = p(sigma, omega | psi_s) L_s(sigma, omega) / q_s(sigma, omega),

so the weighted draws are from the joint posterior of donors and target, the one a joint refit samples. Of the noises and drifts psi_s has
only the donors' own: what is typical of them and how they spread is integrated out of the prior of (sigma, omega)
(`error_population`) and drawn afterwards, which leaves the weights half as uneven. Weights are smoothed (PSIS,
Vehtari et al. 2024, arXiv:1507.02646), draws are resampled systematically within each chain, in order, so that copies lie side by
side and R-hat and ESS see them. Then theta is drawn exactly, and population, hardware and donors move with it by Matheron's rule: a
joint draw X, theta* from before the rows becomes X + Cov(X, theta) V_s^-1 (theta - theta*), a draw from after (Journel & Huijbregts
1978; Doucet 2010).

Last, the scales move given all the rest (`scale_moves`), so that copies of a draw differ in them too (a resample-move step, Gilks &
Berzuini 2001, doi:10.1111/1467-9868.00280). Where few draws carry the weight, copies of each are made and moved before any is weighed. What
that cannot mend is reported, and a joint refit is the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from arviz_stats.base import array_stats
from numpy.typing import NDArray

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.model.diagnostics import Reweighting, effective_share
from hfdtl_bayes.model.error_grid import propose
from hfdtl_bayes.model.exact import ExactDensity, Information
from hfdtl_bayes.model.layout import check_statistics, posterior_tree
from hfdtl_bayes.model.moments import reference_errors
from hfdtl_bayes.model.new_configuration import NewConfiguration, ScalePool, move_scales
from hfdtl_bayes.model.posterior import LatencyPosterior
from hfdtl_bayes.model.sampling import SamplerRun, SamplerSettings
from hfdtl_bayes.statistics import ConfigStatistics

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_FEWEST_EFFECTIVE = 0.4
"""Share of the effective draws asked for below which copies have not been seen to make up for what is missing."""


@dataclass(frozen=True)
class ConditionalSettings:
    """When reweighted draws may be used."""

    max_pareto_k: float = 0.7
    """Above it the weights' variance is as good as infinite and no number of draws helps (Vehtari et al. 2024)."""
    min_effective: float = 1000.0
    """Effective number of the donors' draws under the weights. `ConvergenceSettings.min_ess` asks for 400 of the worst of a hundred
    quantities, and in the tails that one has down to 0.4 of it, as draws of a chain are not independent to begin with."""
    first_draws: int = 2000
    """Draws weighed first, evenly spaced, all of them only where these are too few; and most draws of the posterior. What an update
    costs is proportional."""
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
        for name in ("first_draws", "max_copies"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, found {getattr(self, name)}")


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
    rows, reference = scaled_information(own, donors, prior.density.scale)
    sigma, omega = reference_errors(own, donors.priors)
    start = float(np.log(sigma)), float(np.log(omega)) if prior.has_drift else 0.0
    total = len(prior.draws["tau"])
    stride = max(1, total // settings.first_draws)
    kept = total // prior.chains // stride
    weighed = _weigh(prior, rows, reference, start, (stride, 1), kept, seed)
    if stride > 1 and weighed.effective < settings.min_effective:
        weighed = _weigh(prior, rows, reference, start, (1, 1), kept, seed)
    short = settings.min_effective / weighed.effective
    if short > 1 and settings.min_effective <= total and short * _FEWEST_EFFECTIVE <= 1 and settings.max_copies > 1:
        # Copies differ in scales given coefficients only, so each adds less than the one before.
        copies = min(settings.max_copies, int(np.ceil(1.7 * short**3)))
        weighed = _weigh(prior, rows, reference, start, (1, copies), kept, seed)
    variables = _variables(prior, own, weighed, reference, np.random.default_rng([seed, 8]))
    converged = prior.convergence
    used = len(weighed.pool.parent) // weighed.key[1]
    # Draws that were reweighted before are worth fewer than they are.
    effective = weighed.effective * effective_share(donors.tree)
    found = Reweighting(weighed.pareto_k, effective, used, weighed.key[1], str(converged), converged.passed)
    tree = _tree(variables, [*donors.statistics, own], donors, prior.chains, found)
    posterior = LatencyPosterior(tree, donors.feature_set, donors.priors, (*donors.statistics, own), own.config_id, seed)
    return Conditioned(posterior, found, found.reason(settings.max_pareto_k, settings.min_effective))


@dataclass(frozen=True)
class _Weighed:
    """Resampled draws of a pool: which, their noise and drift, the factor of their coefficients, and how good the weights were."""

    pool: ScalePool
    key: tuple[int, int]
    chosen: IntArray
    sigma: FloatArray
    omega: FloatArray
    left: FloatArray
    pareto_k: float
    effective: float


def _weigh(
    prior: NewConfiguration,
    rows: Information,
    reference: FloatArray,
    start: tuple[float, float],
    key: tuple[int, int],
    kept: int,
    seed: int,
) -> _Weighed:
    """Weigh a pool of draws, and resample `kept` of each chain."""
    rng = np.random.default_rng([seed, 7])
    pool = prior.pool(*key).around(reference)
    average = pool.average()
    multiplier = float(rows.multiplier[0, rows.count[0].argmax()])
    errors = propose(lambda a, b: average.factor(rows, a, b)[1], pool.errors, start, multiplier, rng)
    left, log_likelihood = pool.factor(rows, errors.log_sigma, errors.log_omega)
    weights, pareto_k, effective = smoothed(errors.log_prior + log_likelihood - errors.log_proposal, prior.chains, key[1])
    chosen = resampled(weights, kept, rng)
    sigma, omega = np.exp(errors.log_sigma[chosen]), np.exp(errors.log_omega[chosen])
    return _Weighed(pool, key, chosen, sigma, omega, left[chosen], pareto_k, effective)


def scaled_information(own: ConfigStatistics, donors: LatencyPosterior, scale: FloatArray) -> tuple[Information, FloatArray]:
    """Return the information of a configuration's rows for coefficients divided by `scale`, and the reference it is around."""
    info = ExactDensity([own], donors.feature_set, donors.priors).info
    gram = info.gram * (scale[:, None] * scale)
    multiplier = info.multiplier if donors.priors.drift is not None else np.zeros_like(info.multiplier)
    scaled = Information(gram, info.target * scale, info.square, info.count, multiplier, info.reference)
    return scaled, info.reference[0] / scale


def smoothed(log_weights: FloatArray, chains: int, copies: int) -> tuple[FloatArray, float, float]:
    """Return smoothed weights by chain, shape (chains, N / chains), each summing to one, Pareto k, and the effective draws.

    The effective number is of the donors' draws, the weights of copies added up: copies share much of their parent.
    """
    # ArviZ's function takes log likelihoods to leave out, whose negative are the log weights.
    smoothed, pareto_k = array_stats.psislw(-log_weights)
    by_chain = np.asarray(smoothed).reshape(chains, -1)
    by_chain = np.exp(by_chain - by_chain.max(axis=1, keepdims=True))
    by_chain = by_chain / by_chain.sum(axis=1, keepdims=True)
    parents = by_chain.reshape(-1, copies).sum(axis=1) / chains
    return by_chain, float(pareto_k), float(1.0 / (parents**2).sum())


def resampled(weights: FloatArray, draws: int, rng: np.random.Generator) -> IntArray:
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
    k, pooled, scale = density.count_coef, density.count_pooled, density.pooled_scale
    scaled = reference + _back_substituted(left[:, :k, :k], left[:, k, :k] + rng.standard_normal((len(chosen), k)))
    # A draw of theta from before its rows, made from this draw's population, so that both move together.
    share = own["hardware_share"][:, None]
    shared_sd, own_sd = np.sqrt(share) * tau * scale, np.sqrt(1 - share) * tau * scale
    before = prior.centre[parent, :pooled] + own_sd * rng.standard_normal(tau.shape)
    new_effect = np.zeros((len(chosen), 0, pooled))
    if prior.hardware is None:
        new_effect = (shared_sd * rng.standard_normal(tau.shape))[:, None]
        before = before + new_effect[:, 0]
    # The discrepancy is its own: nothing moves with it, and it moves with no other.
    step = np.matvec(pool.precision[chosen], scaled[:, :pooled] - before / scale)
    moves = (prior.gains(*weighed.key, chosen) @ step[..., None])[..., 0]
    if prior.hardware is None:
        new_effect = new_effect + (shared_sd**2 * step / scale)[:, None]
    sizes = [own[n].shape[1] if n in own else 0 for n in ("beta", "gamma", "delta")]
    count_hardware = len(density.hardware_names)
    *population, effects, thetas = np.split(moves, np.cumsum([*sizes, count_hardware * pooled]), axis=1)
    for name, move in zip(("beta", "gamma", "delta"), population, strict=True):
        if name in own:
            own[name] = own[name] + move
    effect = np.concatenate([own["hardware_effect"] + effects.reshape(-1, count_hardware, pooled), new_effect], axis=1)
    names = [*density.hardware_names, *([prior.configuration.hardware.name] if prior.hardware is None else [])]
    effect = effect[:, np.argsort(names)]
    theta = np.concatenate(
        [own["theta"] + thetas.reshape(-1, density.count_config, k), (scaled * density.scale)[:, None]], axis=1
    )
    own |= {"hardware_effect": effect, "theta": theta}
    own["sigma"] = np.column_stack([own["sigma"], weighed.sigma])
    if prior.has_drift:
        own["omega"] = np.column_stack([own["omega"], weighed.omega])
    # A draw of the posterior, all of it; the scales move on given the rest, so that draws resampled twice differ in them too.
    own = move_scales(own, [*prior.donors.statistics, statistics], prior.donors, rng)
    shared_sd = np.sqrt(own["hardware_share"])[:, None] * own["tau"] * scale
    own["hardware_effect_z"] = own["hardware_effect"] / shared_sd[:, None]
    return {n: v for n, v in own.items() if prior.has_drift or not n.startswith("omega")}


def _back_substituted(left: FloatArray, right: FloatArray) -> FloatArray:
    """Solve L' x = right for many lower triangles, shapes (N, K, K) and (N, K): one pass over rows of L for all of them."""
    out = right.copy()
    for j in range(right.shape[1] - 1, -1, -1):
        out[:, j] /= left[:, j, j]
        out[:, :j] -= left[:, j, :j] * out[:, j, None]
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
    run = SamplerRun(np.zeros((chains * draws, 0)), stats, "importance resampling of the donors' draws")
    tree = posterior_tree(variables, run, statistics, donors.feature_set, SamplerSettings(draws, 50, chains), "conditional")
    tree["sample_stats"].attrs = {
        "engine": "conditional",
        "sampler": run.sampler,
        "draws": draws,
        "chains": chains,
        "reweighting": found.dump(),
    }
    return tree
