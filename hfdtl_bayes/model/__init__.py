"""Priors, the PyMC model, sampling, and the posterior with save, load and predict."""

from hfdtl_bayes.model.diagnostics import Convergence, ConvergenceSettings, convergence
from hfdtl_bayes.model.posterior import Draws, LatencyPosterior, fit
from hfdtl_bayes.model.priors import PositiveRange, PriorSettings
from hfdtl_bayes.model.pymc_model import build_model
from hfdtl_bayes.model.sampling import SamplerSettings, sample

__all__ = [
    "Convergence",
    "ConvergenceSettings",
    "Draws",
    "LatencyPosterior",
    "PositiveRange",
    "PriorSettings",
    "SamplerSettings",
    "build_model",
    "convergence",
    "fit",
    "sample",
]
