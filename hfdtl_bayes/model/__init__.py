"""Priors, the PyMC model, the exact engine, sampling, and the posterior with save, load and predict.

`build_model` and `sample_pymc` load PyMC when they are first asked for, which takes seconds; nothing else here does.
"""

from typing import TYPE_CHECKING, Any

from hfdtl_bayes.model.diagnostics import Convergence, ConvergenceSettings, convergence
from hfdtl_bayes.model.exact import ExactDensity, sample_exact
from hfdtl_bayes.model.nuts import SamplerSettings
from hfdtl_bayes.model.posterior import ENGINES, Draws, LatencyPosterior, fit
from hfdtl_bayes.model.priors import PositiveRange, PriorSettings

if TYPE_CHECKING:
    from hfdtl_bayes.model.pymc_engine import sample_pymc
    from hfdtl_bayes.model.pymc_model import build_model

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
    "convergence",
    "fit",
    "sample_exact",
    "sample_pymc",
]


def __getattr__(name: str) -> Any:
    if name == "build_model":
        from hfdtl_bayes.model.pymc_model import build_model  # noqa: PLC0415

        return build_model
    if name == "sample_pymc":
        from hfdtl_bayes.model.pymc_engine import sample_pymc  # noqa: PLC0415

        return sample_pymc
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
