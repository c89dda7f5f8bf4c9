"""What a fit looks like whatever engine made it: names, dimensions and coordinates of the posterior's variables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import xarray as xr

from hfdtl_bayes.errors import InputError, StatisticsError
from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.model.likelihoods import SHAPES
from hfdtl_bayes.model.sampling import SamplerRun, SamplerSettings
from hfdtl_bayes.statistics import ConfigStatistics, pseudo_rows

# In this order the dimensions of the whole dataset come as (config, hardware, coef, ...), the order in which variables have them.
# ArviZ 1.3 labels the rows of `az.summary` by the dataset's order but fills them by the variable's: theta would be transposed.
VARIABLE_DIMS: Mapping[str, tuple[str, ...]] = {
    "sigma": ("config",),
    "omega": ("config",),
    "hardware_effect_z": ("hardware", "pooled_coef"),
    "hardware_effect": ("hardware", "pooled_coef"),
    "theta": ("config", "coef"),
    "tau": ("pooled_coef",),
    "hardware_share": (),
    "beta": ("base",),
    "gamma": ("config_feature",),
    "delta": ("residual",),
    "sigma_typical": (),
    "sigma_spread": (),
    "omega_typical": (),
    "omega_spread": (),
}
"""Variables of the posterior and their dimensions after chain and draw; coefficients in reference units."""

SHAPE_DIMS: Mapping[str, tuple[str, ...]] = {"nu": (), "outlier_share": (), "outlier_ratio": ()}
"""Variables that only some likelihoods of rows have."""

ALL_DIMS: Mapping[str, tuple[str, ...]] = {**VARIABLE_DIMS, **SHAPE_DIMS}


def in_order(posterior: xr.Dataset) -> xr.Dataset:
    """Return the posterior with its variables in the order of `ALL_DIMS`, which ArviZ's summaries need."""
    return xr.Dataset({name: posterior[name] for name in ALL_DIMS if name in posterior}, attrs=posterior.attrs)


def check_statistics(statistics: Sequence[ConfigStatistics], feature_set: FeatureSet) -> None:
    """Refuse statistics that cannot be fitted together.

    Raises
    ------
    StatisticsError
        If there are none, a configuration is named twice, or columns, feature set or quantity differ.
    """
    if not statistics:
        raise StatisticsError("no configuration to fit; name at least one donor")
    names = [s.config_id for s in statistics]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise StatisticsError(f"configuration(s) named twice: {', '.join(repeated)}; name each donor or target once")
    for s in statistics:
        if (s.feature_set, s.quantity, s.coef_names) != (feature_set.name, feature_set.quantity, feature_set.coef_names):
            raise StatisticsError(
                f"statistics of {s.config_id!r} are of feature set {s.feature_set!r} ({s.quantity}), the model is of "
                f"{feature_set.name!r} ({feature_set.quantity}); build both with the same set"
            )


def hardware_names(statistics: Sequence[ConfigStatistics]) -> tuple[str, ...]:
    """Return the names of the hardware of the configurations, sorted, each once."""
    return tuple(sorted({s.configuration.hardware.name for s in statistics}))


def hardware_index(statistics: Sequence[ConfigStatistics]) -> np.ndarray:
    """Return the index into `hardware_names` of each configuration, shape (C,)."""
    names = hardware_names(statistics)
    return np.array([names.index(s.configuration.hardware.name) for s in statistics])


def coordinate_values(statistics: Sequence[ConfigStatistics], feature_set: FeatureSet) -> dict[str, list[str]]:
    """Return the labels of every dimension."""
    return {
        "config": [s.config_id for s in statistics],
        "base": [f.name for f in feature_set.base],
        "config_feature": [f.name for f in feature_set.config],
        "residual": [f.name for f in feature_set.residual],
        "coef": list(feature_set.coef_names),
        "pooled_coef": list(feature_set.pooled_names),
        "hardware": list(hardware_names(statistics)),
    }


def check_posterior(
    posterior: xr.Dataset,
    statistics: Sequence[ConfigStatistics],
    feature_set: FeatureSet,
    likelihood: str = "gaussian",
    *,
    drift: bool = True,
) -> None:
    """Refuse draws that do not belong to these statistics and this feature set: entries are read by position.

    Raises
    ------
    InputError
        If a variable is missing, has other dimensions or is not finite, or if labels differ or stand in another order.
    """
    expected = {name: labels for name, labels in coordinate_values(statistics, feature_set).items() if labels}
    for name, dims in {**VARIABLE_DIMS, **{n: SHAPE_DIMS[n] for n in SHAPES[likelihood]}}.items():
        if any(d not in expected for d in dims) or (name.startswith("omega") and not drift):
            continue
        if name not in posterior or posterior[name].dims != ("chain", "draw", *dims):
            raise InputError(f"there are no draws of {name} ({', '.join(('chain', 'draw', *dims))})")
        if not np.isfinite(posterior[name].to_numpy()).all():
            raise InputError(f"draws of {name} are not finite")
    for name, labels in expected.items():
        found = [str(v) for v in posterior[name].to_numpy()] if name in posterior.coords else []
        if found != labels:
            raise InputError(
                f"the draws have for {name}, in this order, {', '.join(found) or 'nothing'}, not {', '.join(labels)}"
            )


def posterior_tree(
    variables: Mapping[str, np.ndarray],
    run: SamplerRun,
    statistics: Sequence[ConfigStatistics],
    feature_set: FeatureSet,
    settings: SamplerSettings,
    engine: str,
) -> xr.DataTree:
    """Assemble the groups of a fit.

    Parameters
    ----------
    variables : mapping
        Draws by name, shape (chains * draws, ...), those of `ALL_DIMS` that the feature set and likelihood have.
    run : SamplerRun
    statistics : sequence of ConfigStatistics
    feature_set : FeatureSet
    settings : SamplerSettings
    engine : str
        Recorded with the sampler's statistics.

    Returns
    -------
    DataTree
        Groups `posterior` (chain, draw, ...), `sample_stats`, `observed_data`.
    """
    coords: dict[str, Any] = {"chain": np.arange(settings.chains), "draw": np.arange(settings.draws)}
    coords |= coordinate_values(statistics, feature_set)
    posterior = {}
    for name, dims in ALL_DIMS.items():
        if name not in variables or 0 in variables[name].shape[1:]:
            continue
        values = np.ascontiguousarray(variables[name])
        shaped = values.reshape(settings.chains, settings.draws, *values.shape[1:])
        posterior[name] = (("chain", "draw", *dims), shaped)
    used = {d for dims, _ in posterior.values() for d in dims}
    stats = run.sample_stats.copy()
    stats.attrs = {"engine": engine, "sampler": run.sampler, **asdict(settings)}
    rows = pseudo_rows(statistics)
    return xr.DataTree.from_dict(
        {
            "posterior": xr.Dataset(posterior, coords={k: v for k, v in coords.items() if k in used}),
            "sample_stats": stats,
            "observed_data": xr.Dataset({"z": ("pseudo_row", rows.z), "rss": ("stratum", rows.rss)}),
        }
    )
