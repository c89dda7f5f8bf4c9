"""Whether two samplers draw from one posterior: problems to ask them, and differences in units of their Monte Carlo error.

Every scalar of the posterior is compared in its mean, its variance and at its 5, 50 and 95 % points. All five are differences of
two means of a function of the draws: the value, its squared distance from the pooled mean, and whether it lies below the pooled
quantile; so each has a standard error from effective sample sizes, or from independent chains where there are many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import arviz as az
import numpy as np
import pandas as pd
import xarray as xr
from gibbs import sample_gibbs
from numpy.typing import NDArray
from scipy.stats import t as student
from simulation import (
    BENT,
    PRIORS,
    THREE,
    TINY,
    Parameters,
    Simulated,
    batches,
    configuration,
    draw_parameters,
    observe,
    pilot_of,
)

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.model import (
    ConvergenceSettings,
    PositiveRange,
    PriorSettings,
    SamplerSettings,
    convergence,
    sample_exact,
    sample_pymc,
    sample_rows,
)
from hfdtl_bayes.statistics import scaled_rows

FloatArray = NDArray[np.float64]
Draws = Mapping[str, FloatArray]
"""Draws by name, shape (chain, draw, ...)."""

# --- Problems. ---

Change = Callable[[Parameters], Parameters]


def unchanged(truth: Parameters) -> Parameters:
    return truth


def made(
    seed: int,
    configurations: Sequence[ServingConfiguration] = THREE,
    rows: Sequence[int] | int = (60, 40, 80),
    *,
    block: int = 10,
    priors: PriorSettings = PRIORS,
    truth: Change = unchanged,
    traffic: Callable[[pd.DataFrame], pd.DataFrame] = lambda frame: frame,
    features: FeatureSet = TINY,
) -> Simulated:
    """A data set from the prior, with the truth or the traffic changed where a case asks for it."""
    rng = np.random.default_rng([seed, 77])
    drawn = truth(draw_parameters(rng, configurations, features, PRIORS))
    counts = [rows] * len(configurations) if isinstance(rows, int) else rows
    frames = tuple(
        observe(rng, traffic(batches(rng, n)), own, features, drawn["theta"][c], drawn["sigma"][c], drawn["omega"][c], block)
        for c, (own, n) in enumerate(zip(configurations, counts, strict=True))
    )
    return Simulated(tuple(configurations), features, priors, drawn, frames, block)


def many(count: int, kinds: int = 3) -> tuple[ServingConfiguration, ...]:
    gpus = ("H100", "L4", "A100", "B200")
    return tuple(configuration(f"c{i}", gpus[i % kinds], 2 ** (i % 4)) for i in range(count))


def equal_decode(truth: Parameters) -> Parameters:
    """The coefficient of decode tokens is the same in every configuration."""
    theta = truth["theta"].copy()
    theta[:, 1] = 0.9
    return truth | {"theta": theta}


def equal_everything(truth: Parameters) -> Parameters:
    return truth | {"theta": np.tile([1.1, 0.9, 1.6], (len(truth["theta"]), 1))}


def without_drift(truth: Parameters) -> Parameters:
    return truth | {"omega": np.zeros_like(truth["omega"])}


def no_decode(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(decode_tokens=0)


def collinear(frame: pd.DataFrame) -> pd.DataFrame:
    """Decode tokens follow prefill tokens to one part in a thousand."""
    wobble = 1 + 1e-3 * np.sin(np.arange(len(frame)))
    return frame.assign(decode_tokens=0.1 * (frame["prefill_tokens"] + 30) * wobble)


DOWN_TO_ZERO = replace(PRIORS, deviation=PositiveRange(0.001, 0.7))
"""Group sds may be next to nothing."""
NO_DRIFT = replace(PRIORS, drift=None)

NAMED: Mapping[str, Callable[[], Simulated]] = {
    "three configurations, two hardware": lambda: made(1),
    "two donors": lambda: made(2, THREE[:2], 50),
    "one configuration": lambda: made(4, THREE[:1], 70),
    "a coefficient equal in all": lambda: made(5, many(5), 400, truth=equal_decode),
    "nearly collinear features": lambda: made(6, traffic=collinear),
    "an absent feature": lambda: made(7, traffic=no_decode),
    "few blocks": lambda: made(8, THREE[:2], (12, 25)),
    "no drift in the data": lambda: made(9, rows=200, truth=without_drift),
    "drift switched off": lambda: made(13, rows=60, priors=NO_DRIFT, truth=without_drift),
    "short blocks": lambda: made(10, rows=60, block=3),
    "fewer rows than coefficients beside many": lambda: made(11, rows=(1, 2, 90)),
    "discrepancies": lambda: made(33, many(4, 2), (20, 300, 60, 900), features=BENT),
}
"""Problems of the fast test, the first; the slow one has all."""

NAMED_SLOW: Mapping[str, Callable[[], Simulated]] = {
    "twenty donors": lambda: made(3, many(20), 40),
    "30 rows in one donor, 1e6 in another": lambda: made(21, THREE[:2], (30, 1_000_000)),
    "30 rows in one donor, 2e4 in another": lambda: made(32, THREE[:2], (30, 20_000)),
    "a coefficient equal in all, many rows": lambda: made(22, many(4), 2000, truth=equal_decode),
    "blocks of one row": lambda: made(28, rows=40, block=1),
    "each on its own hardware": lambda: made(12, [configuration(n, n) for n in ("L4", "H100", "A100")], 50),
    "one row": lambda: made(23, THREE[:1], 1),
    "two donors on one hardware, many rows": lambda: made(24, (THREE[0], THREE[1]), 3000),
    "nearly collinear features, many rows": lambda: made(25, rows=2000, traffic=collinear),
    "no drift in the data, few blocks": lambda: made(26, rows=20, truth=without_drift),
    "twenty donors on one hardware": lambda: made(27, many(20, 1), 100),
    "drift switched off in data that have it": lambda: made(29, rows=(300, 100, 50), priors=NO_DRIFT),
    "group sds free to vanish": lambda: made(30, many(4), 300, priors=DOWN_TO_ZERO, truth=equal_everything),
    "a group sd free to vanish": lambda: made(31, many(4), 1500, priors=DOWN_TO_ZERO, truth=equal_decode),
}


def random_problem(seed: int) -> Simulated:
    """One to six configurations on one to four kinds of hardware, five to eight hundred rows each, blocks of 1 to 40.

    Every third has discrepancies.
    """
    rng = np.random.default_rng([seed, 78])
    own = many(int(rng.integers(1, 7)), int(rng.integers(1, 5)))
    rows = np.exp(rng.uniform(np.log(5), np.log(800), len(own))).astype(int)
    return made(
        1000 + seed, own, [int(n) for n in rows], block=int(rng.integers(1, 41)), features=BENT if seed % 3 == 2 else TINY
    )


RANDOM = {f"random {i}": i for i in range(34)}
FUNNELS = ("group sds free to vanish", "a group sd free to vanish", "one row")
"""Funnels of PyMC's coordinates: of coefficients around their population where a group sd may vanish, which diverge whatever the step,
and of noise and drift around their typical values where one row says nothing of either, which mix slowly. PyMC's draws are
compared only if its diagnostics pass; the exact engine's always are."""


@cache
def problem(name: str) -> Simulated:
    if name in RANDOM:
        return random_problem(RANDOM[name])
    return (NAMED if name in NAMED else NAMED_SLOW)[name]()


# --- Comparison. ---

POINTS = (0.05, 0.5, 0.95)
FUNCTIONS = ("mean", "variance", *(f"{p:.0%} point" for p in POINTS))


def unconstrained(name: str, values: FloatArray) -> FloatArray:
    """Scales in their logarithm, the share in its log odds: their tails are those of a normal."""
    if name == "hardware_share":
        return np.log(values) - np.log1p(-values)
    return np.log(values) if name.startswith(("tau", "sigma", "omega")) else values


def labelled(draws: Draws) -> tuple[list[str], FloatArray]:
    """Every scalar of the posterior, (chain, draw, V)."""
    names, columns = [], []
    for name in sorted(draws):
        values = unconstrained(name, np.asarray(draws[name], dtype=float))
        entries = [f"{name}{list(i) if i else ''}" for i in np.ndindex(values.shape[2:])]
        names += entries
        columns.append(values.reshape(*values.shape[:2], len(entries)))
    return names, np.concatenate(columns, axis=2)


MANY_CHAINS = 50


def mean_and_error(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean over chains and draws and its standard error, from (chain, draw, F)."""
    mean = values.mean(axis=(0, 1))
    if len(values) >= MANY_CHAINS:
        return mean, values.mean(axis=1).std(axis=0, ddof=1) / np.sqrt(len(values))
    dataset = xr.Dataset({"f": (("chain", "draw", "entry"), values)})
    return mean, az.mcse(dataset, method="mean")["f"].to_numpy()


@dataclass(frozen=True)
class Agreement:
    """Differences of two samplers on one problem in standard errors, (V, 5), and which is which."""

    problem: str
    entries: tuple[str, ...]
    z: FloatArray

    @property
    def worst(self) -> str:
        v, f = np.unravel_index(np.abs(self.z).argmax(), self.z.shape)
        return f"{self.problem}: {FUNCTIONS[f]} of {self.entries[v]}, {self.z[v, f]:+.1f} standard errors"


def compare(name: str, one: Draws, other: Draws) -> Agreement:
    """Compare two samplers' draws of all variables."""
    (entries, a), (others, b) = labelled(one), labelled(other)
    assert entries == others, "the samplers have other variables"
    pooled = np.concatenate([a.reshape(-1, len(entries)), b.reshape(-1, len(entries))])
    middle, spread, points = pooled.mean(axis=0), pooled.std(axis=0), np.quantile(pooled, POINTS, axis=0)

    def functions(x: FloatArray) -> tuple[FloatArray, FloatArray]:
        standard = (x - middle) / spread
        columns = np.stack([standard, standard**2, *(1.0 * (x < p) for p in points)], axis=-1)
        mean, error = mean_and_error(columns.reshape(*x.shape[:2], -1))
        return mean.reshape(-1, len(FUNCTIONS)), error.reshape(-1, len(FUNCTIONS))

    (mean, error), (other_mean, other_error) = functions(a), functions(b)
    return Agreement(name, tuple(entries), (mean - other_mean) / np.hypot(error, other_error))


DEGREES = 60
"""Standard errors are estimates themselves, worth at least so many degrees of freedom."""


@dataclass(frozen=True)
class Verdict:
    """All comparisons together: the smallest p-value times their number, and the root mean square of the differences.

    The root mean square is 1 where samplers agree and standard errors are right; `excess` is how far its square lies above 1, in
    standard errors over problems.
    """

    p: float
    worst: str
    root_mean_square: float
    excess: float
    count: int

    def __str__(self) -> str:
        return (
            f"{self.count} comparisons, root mean square {self.root_mean_square:.3f} (excess {self.excess:+.1f}), "
            f"corrected p {self.p:.2g} at {self.worst}"
        )


def judge(found: Sequence[Agreement]) -> Verdict:
    count = sum(a.z.size for a in found)
    worst = max(found, key=lambda a: np.abs(a.z).max())
    p = min(1.0, count * 2 * float(student.sf(np.abs(worst.z).max(), DEGREES)))
    squares = np.array([(a.z**2).mean() for a in found])
    error = squares.std(ddof=1) / np.sqrt(len(squares)) if len(squares) > 1 else np.inf
    return Verdict(p, worst.worst, float(np.sqrt(squares.mean())), float((squares.mean() - 1) / error), count)


# --- Samplers. ---


@dataclass(frozen=True)
class Sampled:
    """Draws and what the sampler's own diagnostics say of them."""

    draws: Draws
    usable: bool
    said: str


USABLE = ConvergenceSettings(max_rhat=1.03, min_ess=200, max_divergent_share=0.01)
"""Enough draws for standard errors to mean something, and no sign of a part not explored."""
EXACT = SamplerSettings(draws=200, tune=100, chains=8, target_accept=0.95)
NUTS = SamplerSettings(draws=500, tune=250, chains=2, target_accept=0.95)


def longer(settings: SamplerSettings) -> SamplerSettings:
    return replace(settings, draws=4 * settings.draws, tune=2 * settings.tune, target_accept=0.99)


def usable(run: Callable[[SamplerSettings], xr.DataTree], settings: SamplerSettings) -> Sampled:
    """Run a sampler, once more and for longer if its diagnostics say that these draws must not be used."""
    for attempt in (settings, longer(settings)):
        tree = run(attempt)
        found = convergence(tree, USABLE)
        if found.passed:
            break
    draws = {str(n): v.to_numpy() for n, v in tree["posterior"].to_dataset().data_vars.items()}
    return Sampled(draws, found.passed, str(found))


def by_exact(data: Simulated, settings: SamplerSettings) -> xr.DataTree:
    return sample_exact(data.statistics, data.features, data.priors, settings, seed=11, show_progress=False)


def by_pymc(data: Simulated, settings: SamplerSettings) -> xr.DataTree:
    return sample_pymc(data.statistics, data.features, data.priors, settings, seed=13, show_progress=False)


def by_rows(data: Simulated, settings: SamplerSettings) -> xr.DataTree:
    rows = [
        scaled_rows(f, c, data.features, block_length=data.block, pilot=pilot_of(data.features, c), rows=None)
        for f, c in zip(data.frames, data.configurations, strict=True)
    ]
    return sample_rows(rows, data.features, data.priors, settings, seed=14, show_progress=False)


ENGINES = {"exact": (by_exact, EXACT), "pymc": (by_pymc, NUTS), "rows": (by_rows, NUTS)}


@cache
def sampled(engine: str, name: str) -> Sampled:
    if engine == "gibbs":
        return Sampled(gibbs(name), True, "")
    run, settings = ENGINES[engine]
    return usable(lambda s: run(problem(name), s), settings)


@cache
def gibbs(name: str, seed: int = 12) -> Draws:
    data = problem(name)
    return sample_gibbs(data.statistics, data.features, data.priors, seed=seed)
