"""The PyMC engine: sampling the PyMC model with nutpie's NUTS, compiled once per feature set.

PyMC's log density and gradient are compiled to machine code by PyTensor's Numba backend, which keeps the result on disk, and handed
to nutpie as a function. The number of configurations and of pseudo-rows is free, so donors, donors with a target, and a
thousand simulated data sets share one compilation. (`nutpie.compile_pymc_model` compiles two more wrappers in every process, about
15 s for this model, and keeps none of it.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import xarray as xr
from pytensor.compile.mode import Mode
from pytensor.graph.replace import vectorize_graph

from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.model.layout import check_statistics, hardware_names, posterior_tree
from hfdtl_bayes.model.moments import reference_errors
from hfdtl_bayes.model.nuts import run_nuts
from hfdtl_bayes.model.priors import PriorSettings
from hfdtl_bayes.model.progress import progress
from hfdtl_bayes.model.pymc_model import build_model, model_data
from hfdtl_bayes.model.sampling import SamplerRun, SamplerSettings
from hfdtl_bayes.statistics import ConfigStatistics


@dataclass(frozen=True)
class CompiledModel:
    """The log density of one feature set and prior, for any number of configurations and rows."""

    model: pm.Model
    names: tuple[str, ...]
    density: Callable[..., list[np.ndarray]]
    constrain: Callable[..., list[np.ndarray]]
    outputs: tuple[str, ...]


_COMPILED: dict[tuple[FeatureSet, PriorSettings], CompiledModel] = {}
_LOCK = threading.Lock()


def compile_model(model: pm.Model) -> CompiledModel:
    """Compile the log density and its gradient to machine code; the sizes of data stay free."""
    values = model.value_vars
    log_density = model.logp()
    gradient = pt.grad(log_density, values)
    density = pytensor.function(values, [log_density, *gradient], mode="NUMBA")
    density.trust_input = True
    outputs = [v for v in model.unobserved_value_vars if v not in values]
    named = [v for v in values if model.values_to_rvs[v].name == v.name]
    batched = [pt.tensor(v.name, shape=(None, *v.type.shape), dtype=v.dtype) for v in values]
    vectorized = vectorize_graph(outputs, dict(zip(values, batched, strict=True)))
    # All draws at once through NumPy: no compilation for what runs once.
    constrain = pytensor.function(
        batched,
        [*(batched[values.index(v)] for v in named), *vectorized],
        mode=Mode(linker="py", optimizer="fast_compile"),
    )
    return CompiledModel(model, tuple(v.name for v in values), density, constrain, tuple(v.name for v in [*named, *outputs]))


def starting_point(
    statistics: Sequence[ConfigStatistics], feature_set: FeatureSet, priors: PriorSettings
) -> dict[str, np.ndarray]:
    """Return the centre of the starting points: prior medians, with noise and drift near their moment estimates."""
    count, k = len(statistics), len(feature_set.pooled)
    # Without drift omega is zero and its start is not used.
    errors = np.log(np.maximum([reference_errors(s, priors) for s in statistics], 1e-9))
    return {
        "theta_eta__": np.zeros((count, len(feature_set.varying))),
        "sigma_log__": errors[:, 0],
        "omega_log__": errors[:, 1],
        "tau_log__": np.full(k, np.log(priors.deviation.gamma_median)),
        "hardware_share_logodds__": np.array(0.0),
        "hardware_effect_z": np.zeros((len(hardware_names(statistics)), k)),
        "sigma_typical_log__": np.array(errors[:, 0].mean()),
        "omega_typical_log__": np.array(errors[:, 1].mean()),
        "sigma_spread_log__": np.array(priors.noise_spread.log_mean),
        "omega_spread_log__": np.array(priors.drift_spread.log_mean),
        "beta": np.array([f.prior.mean for f in feature_set.base]),
        "gamma": np.array([f.prior.mean for f in feature_set.config]),
        "delta": np.array([f.prior.mean for f in feature_set.residual]),
    }


def sample_pymc(
    statistics: Sequence[ConfigStatistics],
    feature_set: FeatureSet,
    priors: PriorSettings | None = None,
    settings: SamplerSettings | None = None,
    *,
    seed: int = 0,
    show_progress: bool = True,
    label: str = "sampling",
) -> xr.DataTree:
    """Sample the posterior of several configurations.

    Parameters
    ----------
    statistics : sequence of ConfigStatistics
    feature_set : FeatureSet
    priors : PriorSettings, optional
    settings : SamplerSettings, optional
    seed : int
        The same seed gives the same draws.
    show_progress : bool
    label : str
        What the progress bar calls the work.

    Returns
    -------
    DataTree
        Groups `posterior` (chain, draw, ...), `sample_stats`, `observed_data`.

    Raises
    ------
    StatisticsError
        If the statistics cannot be fitted together.
    ConvergenceError
        If the sampler cannot start or breaks down.
    """
    priors, settings = priors or PriorSettings(), settings or SamplerSettings()
    check_statistics(statistics, feature_set)
    data = model_data(statistics, feature_set, priors)
    with _LOCK:
        compiled = _COMPILED.get((feature_set, priors))
        if compiled is None:
            with progress(f"compiling the model of {feature_set.name}", 1, enabled=show_progress):
                compiled = _COMPILED[feature_set, priors] = compile_model(build_model(statistics, feature_set, priors))
        start = starting_point(statistics, feature_set, priors)
        run, variables = run_compiled(compiled, data, start, settings, seed=seed, label=label, show_progress=show_progress)
    return posterior_tree(variables, run, statistics, feature_set, settings, "pymc")


def run_compiled(
    compiled: CompiledModel,
    data: Mapping[str, np.ndarray],
    start: Mapping[str, np.ndarray],
    settings: SamplerSettings,
    *,
    seed: int,
    label: str,
    show_progress: bool,
) -> tuple[SamplerRun, dict[str, np.ndarray]]:
    """Sample a compiled model with its data replaced.

    Parameters
    ----------
    compiled : CompiledModel
    data : mapping
        Value of every `pm.Data` by name.
    start : mapping
        Centre of the starting points, by name of the unconstrained variable; may hold more than the model has.
    settings : SamplerSettings
    seed, label, show_progress
        As in `run_nuts`.

    Returns
    -------
    run : SamplerRun
    variables : dict
        Draws of every variable by name, shape (chains * draws, ...).
    """
    for name, value in data.items():
        compiled.model[name].set_value(np.ascontiguousarray(value))
    values = [np.asarray(start[name], dtype=float) for name in compiled.names]
    shapes = [v.shape for v in values]
    sizes = [int(np.prod(shape)) for shape in shapes]
    ends = np.cumsum(sizes)
    slices = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    centre = np.concatenate([v.ravel() for v in values])

    def log_density(x: np.ndarray) -> tuple[float, np.ndarray]:
        parts = [x[s].reshape(shape) for s, shape in zip(slices, shapes, strict=True)]
        value, *gradient = compiled.density(*parts)
        return float(value), np.concatenate([np.ravel(g) for g in gradient])

    run = run_nuts(log_density, centre, settings, seed=seed, label=label, show_progress=show_progress)
    arrays = compiled.constrain(*(run.x[:, s].reshape(-1, *shape) for s, shape in zip(slices, shapes, strict=True)))
    return run, dict(zip(compiled.outputs, arrays, strict=True))
