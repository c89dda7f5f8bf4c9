"""Priors, the PyMC model, the exact engine, sampling, and the posterior with save, load and predict.

`build_model`, `build_rows_model`, `sample_pymc` and `sample_rows` load PyMC when they are first asked for, which takes
seconds; nothing else here does.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hfdtl_bayes.model.diagnostics import Convergence, ConvergenceSettings, convergence
from hfdtl_bayes.model.draws import Draws
from hfdtl_bayes.model.exact import ExactDensity
from hfdtl_bayes.model.exact_engine import sample_exact
from hfdtl_bayes.model.identifiability import (
    configuration_moments,
    directions,
    drawn_coordinates,
    own_information,
    population_moments,
)
from hfdtl_bayes.model.posterior import ENGINES, LatencyPosterior, fit
from hfdtl_bayes.model.prior_files import read_priors
from hfdtl_bayes.model.prior_predictive import prior_predictive
from hfdtl_bayes.model.priors import PositiveRange, PriorSettings
from hfdtl_bayes.model.sampling import SamplerSettings
from hfdtl_bayes.model.sensitivity import sensitivity

if TYPE_CHECKING:
    from hfdtl_bayes.model.pymc_engine import sample_pymc
    from hfdtl_bayes.model.pymc_model import build_model
    from hfdtl_bayes.model.rows_engine import sample_rows
    from hfdtl_bayes.model.rows_model import build_rows_model

__all__ = [
    "ENGINES",
    "Convergence",
    "ConvergenceSettings",
    "Draws",
    "ExactDensity",
    "LatencyPosterior",
    "PositiveRange",
    "PriorSettings",
    "SamplerSettings",
    "build_model",
    "build_rows_model",
    "configuration_moments",
    "convergence",
    "directions",
    "drawn_coordinates",
    "fit",
    "own_information",
    "population_moments",
    "prior_predictive",
    "read_priors",
    "sample_exact",
    "sample_pymc",
    "sample_rows",
    "sensitivity",
]


# Where each name that needs PyMC lives.
_LAZY = {
    "build_model": "pymc_model",
    "build_rows_model": "rows_model",
    "sample_pymc": "pymc_engine",
    "sample_rows": "rows_engine",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
