"""A second opinion on the posterior: Gibbs sampling of the same model, for many chains or many data sets at once.

Nothing is shared with the engines. The coefficients are one dense Gaussian vector given the scales, drawn by perturbation
(Papandreou & Yuille 2010): with prior N(0, I) on u, rows z = X u + e and Q = I + X'X, the solution of Q u = e0 + X'(z + e1) for
standard normal e0 and e1 is a draw from the conditional. Each scale is then moved by slice sampling (Neal 2003,
doi:10.1214/aos/1056562461) along its own conditional, once with coefficients held and once with their standardised values held,
which mixes whichever of the two is strongly identified (Yu & Meng 2011, doi:10.1198/jcgs.2011.203main).

The rows of each stratum enter as its triangular factor T, through the residuals T [-theta, 1]: no Gram matrix is taken before the
weights are known, and nothing is eliminated by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit
from simulation import deviation_size, group_sd_prior

from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.model import PositiveRange, PriorSettings
from hfdtl_bayes.statistics import ConfigStatistics

FloatArray = NDArray[np.float64]
State = dict[str, FloatArray]

Z90 = 1.6448536269514722
WIDTH = 4.0
"""Width of the first interval of a slice, in the logarithm of a scale: wider than any of their conditionals, so that it is never
stepped out; the sampler is right whatever it is."""


@dataclass(frozen=True)
class Rows:
    """The rows of C configurations; D data sets of one shape, one for each chain, or one for all of them (D = 1)."""

    triangle: FloatArray
    """(D, C, J, K + 1, K + 1): the factor of each stratum, padded with zeros."""
    count: FloatArray
    """(C, J): rows of each stratum, 0 where there is none."""
    multiplier: FloatArray
    """(C, J): of the drift variance."""
    loading: FloatArray
    """(C, K, P): A_c, how the population makes up a configuration's centre."""
    hardware: NDArray[np.int64]
    """(C,): index of each configuration's hardware."""

    @property
    def design(self) -> FloatArray:
        """(D, C, J, K + 1, K)"""
        return self.triangle[..., :-1]

    @property
    def observed(self) -> FloatArray:
        """(D, C, J, K + 1)"""
        return self.triangle[..., -1]


def rows_of(data_sets: Sequence[Sequence[ConfigStatistics]], features: FeatureSet) -> Rows:
    """Stack the statistics of data sets that have configurations and strata in common."""
    first = data_sets[0]
    k, depth = len(features.varying), max(len(s.strata) for s in first)
    triangle = np.zeros((len(data_sets), len(first), depth, k + 1, k + 1))
    count, multiplier = np.zeros((len(first), depth)), np.zeros((len(first), depth))
    for d, statistics in enumerate(data_sets):
        for c, own in enumerate(statistics):
            for j, s in enumerate(own.strata):
                triangle[d, c, j, : len(s.triangle)] = s.triangle
                shape = (float(s.count), float(s.multiplier))
                assert d == 0 or shape == (count[c, j], multiplier[c, j]), "data sets of one shape only"
                count[c, j], multiplier[c, j] = shape
    base, config = len(features.base), len(features.config)
    pooled = base + len(features.residual)
    loading = np.zeros((len(first), k, pooled + config))
    for c, own in enumerate(first):
        for i in range(pooled):
            loading[c, i, i if i < base else i + config] = 1.0
        loading[c, base, base : base + config] = own.config_row
    names = sorted({s.configuration.hardware.name for s in first})
    hardware = np.array([names.index(s.configuration.hardware.name) for s in first])
    return Rows(triangle, count, multiplier, loading, hardware)


def slice_move(
    log_density: Callable[[FloatArray], FloatArray], x: FloatArray, rng: np.random.Generator, width: float = WIDTH
) -> FloatArray:
    """Move every entry of x along its own density by one slice, shrinking from an interval of `width` laid around it at random."""
    level = log_density(x) - rng.standard_exponential(x.shape)
    low = x - width * rng.random(x.shape)
    high = low + width
    out, open_ = x.copy(), np.ones(x.shape, dtype=bool)
    for _ in range(200):
        proposal = low + (high - low) * rng.random(x.shape)
        inside = log_density(np.where(open_, proposal, out)) >= level
        out = np.where(open_ & inside, proposal, out)
        open_ &= ~inside
        if not open_.any():
            return out
        low = np.where(open_ & (proposal < x), proposal, low)
        high = np.where(open_ & (proposal >= x), proposal, high)
    raise AssertionError("a slice shrank to nothing: the density of the point itself is not reproducible")


def normal(x: FloatArray, r: PositiveRange) -> FloatArray:
    """Log density, up to a constant, of the logarithm x of a scale whose 5 % and 95 % points are the range."""
    middle, width = np.log(r.low * r.high) / 2, np.log(r.high / r.low) / 2 / Z90
    return -0.5 * ((x - middle) / width) ** 2


class Gibbs:
    """The sampler of one problem.

    Parameters
    ----------
    rows : Rows
    features : FeatureSet
    priors : PriorSettings
        Without drift where `priors.drift` is None.
    chains : int
        As many as data sets where there is more than one.
    seed : int
    """

    def __init__(self, rows: Rows, features: FeatureSet, priors: PriorSettings, chains: int, seed: int) -> None:
        assert len(rows.triangle) in (1, chains)
        ordered = features.base + features.config + features.residual
        self.rows, self.features, self.priors, self.chains = rows, features, priors, chains
        self.mean = np.array([f.prior.mean for f in ordered])
        self.sd = np.array([f.prior.sd for f in ordered])
        self.size = deviation_size(features)
        self.fixed = np.array([f.prior.sd for f in features.discrepancy])
        self.shape, self.rate = group_sd_prior(priors.deviation)
        self.rng = np.random.default_rng(seed)
        self.count_hardware = int(rows.hardware.max()) + 1
        self.errors = [("sigma", priors.noise, priors.noise_spread)]
        if priors.drift is not None:
            self.errors.append(("omega", priors.drift, priors.drift_spread))

    # --- Starting points: the prior. ---

    def start(self) -> State:
        """Draw the scales from their prior; coefficients are drawn in the first sweep before they are read."""
        rng, s = self.rng, self.chains

        def drawn(r: PositiveRange, *shape: int) -> FloatArray:
            middle, width = np.log(r.low * r.high) / 2, np.log(r.high / r.low) / 2 / Z90
            return middle + width * rng.standard_normal((s, *shape))

        a = self.priors.hardware_share
        share = rng.beta(a, a, s)
        tau = rng.gamma(self.shape, 1 / self.rate, (s, len(self.size)))
        state = {"tau": np.log(tau), "logit": np.log(share) - np.log1p(-share)}
        for name, typical, spread in self.errors:
            state[f"{name}_typical"], state[f"{name}_spread"] = drawn(typical), drawn(spread)
            z = rng.standard_normal((s, len(self.rows.count)))
            state[name] = state[f"{name}_typical"][:, None] + np.exp(state[f"{name}_spread"])[:, None] * z
        return state

    # --- Pieces of the model. All scales are logarithms, the share its log odds. ---

    def variance(self, state: State) -> FloatArray:
        """Error variance of each stratum, (S, C, J)."""
        out = np.exp(2 * state["sigma"])[..., None] + np.zeros_like(self.rows.multiplier)
        return out + self.rows.multiplier * np.exp(2 * state["omega"])[..., None] if "omega" in state else out

    def deviation_sds(self, state: State) -> tuple[FloatArray, FloatArray]:
        """Sds of own and of shared deviations, (S, K)."""
        total = np.exp(state["tau"]) * self.size
        logit = state["logit"][:, None]
        return total * np.exp(0.5 * log_expit(-logit)), total * np.exp(0.5 * log_expit(logit))

    def spread(self, own: FloatArray, shared: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Sds of all coefficients, (S, K): of discrepancies the own is given and there is none in common."""
        more = (len(own), len(self.fixed))
        return np.hstack([own, np.broadcast_to(self.fixed, more)]), np.hstack([shared, np.zeros(more)])

    def log_prior_of_tau(self, x: FloatArray) -> FloatArray:
        """Log density, up to a constant, of the logarithm x of a Gamma variable."""
        return self.shape * x - self.rate * np.exp(x)

    def coefficients(self, state: State) -> FloatArray:
        """Theta of every configuration, (S, C, K)."""
        own, shared = self.spread(*self.deviation_sds(state))
        population = self.mean + self.sd * state["population_z"]
        centre = np.einsum("ckp,sp->sck", self.rows.loading, population)
        return centre + shared[:, None] * state["hardware_z"][:, self.rows.hardware] + own[:, None] * state["own_z"]

    def residuals(self, theta: FloatArray) -> FloatArray:
        """Residuals of the factors' rows, (S, C, J, K + 1)."""
        return self.rows.observed - (self.rows.design @ theta[:, :, None, :, None])[..., 0]

    def log_errors(self, variance: FloatArray, square: FloatArray) -> FloatArray:
        """Log likelihood of each configuration, (S, C), from squared residuals per stratum."""
        return -0.5 * (self.rows.count * np.log(variance) + square / variance).sum(axis=-1)

    # --- Moves. ---

    def move_coefficients(self, state: State) -> None:
        """Draw population, hardware effects and own coefficients together given all scales."""
        own, shared = self.spread(*self.deviation_sds(state))
        s, (c, k, p) = self.chains, self.rows.loading.shape
        h = self.count_hardware
        weight = 1 / np.sqrt(self.variance(state))[..., None]
        # Rows of all configurations against the independent standard normals (population, hardware, own) behind them.
        make = np.zeros((s, c, k, p + (h + c) * k))
        make[..., :p] = self.rows.loading * self.sd
        at = np.arange(k)
        for i, hardware in enumerate(self.rows.hardware):
            make[:, i, at, p + hardware * k + at] = shared
            make[:, i, at, p + (h + i) * k + at] = own
        design = weight[..., None] * self.rows.design
        design = design.reshape(s, c, -1, k)
        left = weight * (self.rows.observed - (self.rows.design @ (self.rows.loading @ self.mean)[:, None, :, None])[..., 0])
        left = left.reshape(s, c, -1) + self.rng.standard_normal((s, c, design.shape[2]))
        gram = np.swapaxes(design, -1, -2) @ design
        lifted = (gram @ make).reshape(s, c * k, -1)
        flat = make.reshape(s, c * k, -1)
        precision = np.swapaxes(flat, -1, -2) @ lifted
        diagonal = np.arange(precision.shape[-1])
        precision[:, diagonal, diagonal] += 1.0
        score = (np.swapaxes(design, -1, -2) @ left[..., None]).reshape(s, c * k, 1)
        right = (np.swapaxes(flat, -1, -2) @ score)[..., 0] + self.rng.standard_normal((s, len(diagonal)))
        u = np.linalg.solve(precision, right[..., None])[..., 0]
        state["population_z"] = u[:, :p]
        state["hardware_z"] = u[:, p : p + h * k].reshape(s, h, k)
        state["own_z"] = u[:, p + h * k :].reshape(s, c, k)

    def move_deviations_held(self, state: State) -> None:
        """Move tau and the share with the deviations themselves held."""
        own, shared = self.deviation_sds(state)
        pooled = slice(0, len(self.size))
        own_square = ((own[:, None] * state["own_z"][..., pooled]) ** 2).sum(axis=1) / self.size**2
        shared_square = ((shared[:, None] * state["hardware_z"][..., pooled]) ** 2).sum(axis=1) / self.size**2
        c, h, k = len(self.rows.count), self.count_hardware, len(self.size)
        before_own, before_shared = own, shared
        share = expit(state["logit"])[:, None]
        square = own_square / (1 - share) + shared_square / share

        def of_tau(x: FloatArray) -> FloatArray:
            return self.log_prior_of_tau(x) - (c + h) * x - 0.5 * square * np.exp(-2 * x)

        state["tau"] = slice_move(of_tau, state["tau"], self.rng)
        scaled = np.exp(-2 * state["tau"])
        own_total, shared_total = (own_square * scaled).sum(axis=1), (shared_square * scaled).sum(axis=1)
        a = self.priors.hardware_share

        def of_share(x: FloatArray) -> FloatArray:
            one, rest = log_expit(x), log_expit(-x)
            out = (a - 0.5 * h * k) * one + (a - 0.5 * c * k) * rest
            return out - 0.5 * shared_total * np.exp(-one) - 0.5 * own_total * np.exp(-rest)

        state["logit"] = slice_move(of_share, state["logit"], self.rng)
        own, shared = self.deviation_sds(state)
        state["own_z"][..., pooled] *= (before_own / own)[:, None]
        state["hardware_z"][..., pooled] *= (before_shared / shared)[:, None]

    def move_scores_held(self, state: State) -> None:
        """Move tau and the share with the standardised deviations held, so that the coefficients move with them."""
        variance = self.variance(state)[..., None]
        own, shared = self.deviation_sds(state)
        pooled = slice(0, len(self.size))
        own_part = own[:, None] * state["own_z"][..., pooled]
        shared_part = shared[:, None] * state["hardware_z"][:, self.rows.hardware][..., pooled]
        left = self.residuals(self.coefficients(state))
        for k in range(len(self.size)):
            # Residuals are a straight line in tau.
            line = self.rows.design[..., k] * (own_part + shared_part)[:, :, None, k, None]
            square = (line**2 / variance).sum(axis=(1, 2, 3))
            cross = (line * left / variance).sum(axis=(1, 2, 3))
            now = state["tau"][:, k].copy()

            def density(x: FloatArray, now: FloatArray = now, s: FloatArray = square, b: FloatArray = cross) -> FloatArray:
                step = np.expm1(x - now)
                return self.log_prior_of_tau(x) + b * step - 0.5 * s * step**2

            state["tau"][:, k] = slice_move(density, now, self.rng)
            grown = np.exp(state["tau"][:, k] - now)
            left = left - (grown - 1)[:, None, None, None] * line
            own_part[..., k] *= grown[:, None]
            shared_part[..., k] *= grown[:, None]
        own_line, shared_line = (
            (self.rows.design[..., pooled] @ part[:, :, None, :, None])[..., 0] for part in (own_part, shared_part)
        )
        lines = np.stack([own_line, shared_line], axis=-1)
        squares = np.einsum("scjra,scjrb->sab", lines / variance[..., None], lines)
        crosses = (lines * (left / variance)[..., None]).sum(axis=(1, 2, 3))
        now, a = state["logit"].copy(), self.priors.hardware_share

        def of_share(x: FloatArray) -> FloatArray:
            steps = np.stack(
                [np.expm1(0.5 * (log_expit(-x) - log_expit(-now))), np.expm1(0.5 * (log_expit(x) - log_expit(now)))], axis=-1
            )
            quadratic = np.einsum("sa,sab,sb->s", steps, squares, steps)
            return a * (log_expit(x) + log_expit(-x)) + (crosses * steps).sum(axis=-1) - 0.5 * quadratic

        state["logit"] = slice_move(of_share, now, self.rng)

    def move_errors(self, state: State) -> None:
        """Move noise and drift of each configuration, and their populations."""
        square = (self.residuals(self.coefficients(state)) ** 2).sum(axis=-1)
        for name, typical, spread in self.errors:
            self.move_error(state, square, name, typical, spread)

    def move_error(self, state: State, square: FloatArray, name: str, typical: PositiveRange, spread: PositiveRange) -> None:
        """Move one kind of error: each configuration's, then its population with these held and with their scores held."""
        middle, between = f"{name}_typical", f"{name}_spread"

        def at(values: FloatArray) -> FloatArray:
            return self.log_errors(self.variance(state | {name: values}), square)

        def scores(values: FloatArray, m: FloatArray, x: FloatArray) -> FloatArray:
            return (values - m[:, None]) * np.exp(-x)[:, None]

        def held(m: FloatArray, x: FloatArray) -> FloatArray:
            values = state[name]
            return -0.5 * (scores(values, m, x) ** 2).sum(axis=1) - values.shape[1] * x

        state[name] = slice_move(
            lambda values: at(values) - 0.5 * scores(values, state[middle], state[between]) ** 2, state[name], self.rng
        )
        state[middle] = slice_move(lambda m: normal(m, typical) + held(m, state[between]), state[middle], self.rng)
        state[between] = slice_move(lambda x: normal(x, spread) + held(state[middle], x), state[between], self.rng)
        z = scores(state[name], state[middle], state[between])

        def along(m: FloatArray, x: FloatArray) -> FloatArray:
            return at(m[:, None] + np.exp(x)[:, None] * z).sum(axis=1)

        state[middle] = slice_move(lambda m: normal(m, typical) + along(m, state[between]), state[middle], self.rng)
        state[between] = slice_move(lambda x: normal(x, spread) + along(state[middle], x), state[between], self.rng)
        state[name] = state[middle][:, None] + np.exp(state[between])[:, None] * z

    def sweep(self, state: State) -> None:
        """Move everything once, in place."""
        self.move_coefficients(state)
        self.move_deviations_held(state)
        self.move_scores_held(state)
        self.move_errors(state)

    # --- Draws by the names of the posterior. ---

    def variables(self, state: State) -> State:
        """Return every variable of the posterior, by its name, (S, ...)."""
        _, shared = self.deviation_sds(state)
        population = self.mean + self.sd * state["population_z"]
        base, config = len(self.features.base), len(self.features.config)
        beta, gamma, delta = np.split(population, [base, base + config], axis=1)
        out = {"beta": beta, "gamma": gamma, "delta": delta} if config else {"beta": beta, "delta": delta}
        out |= {"tau": np.exp(state["tau"]), "hardware_share": expit(state["logit"]), "theta": self.coefficients(state)}
        effect = state["hardware_z"][..., : len(self.size)]
        out |= {"hardware_effect_z": effect, "hardware_effect": shared[:, None] * effect}
        for name, _, _ in self.errors:
            out |= {n: np.exp(state[n]) for n in (name, f"{name}_typical", f"{name}_spread")}
        return {name: np.array(values) for name, values in out.items()}

    def run(self, burn: int, keep: int, thin: int = 1) -> State:
        """Start at the prior, drop `burn` sweeps, keep every thin-th of the following; draws by name, (S, keep, ...)."""
        state = self.start()
        for _ in range(burn):
            self.sweep(state)
        kept = []
        for _ in range(keep):
            for _ in range(thin):
                self.sweep(state)
            kept.append(self.variables(state))
        return {name: np.stack([k[name] for k in kept], axis=1) for name in kept[0]}


def sample_gibbs(
    statistics: Sequence[ConfigStatistics],
    features: FeatureSet,
    priors: PriorSettings,
    *,
    chains: int = 100,
    burn: int = 50,
    keep: int = 80,
    seed: int = 0,
) -> State:
    """Sample the posterior of one problem; draws by name, (chains, keep, ...)."""
    return Gibbs(rows_of([statistics], features), features, priors, chains, seed).run(burn, keep)
