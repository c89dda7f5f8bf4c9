"""Sampler diagnostics in one place: whether draws may be used at all."""

from __future__ import annotations

from dataclasses import dataclass

import arviz as az
import numpy as np
import xarray as xr


@dataclass(frozen=True)
class ConvergenceSettings:
    """Limits, after Vehtari et al. (2021), doi:10.1214/20-BA1221."""

    max_rhat: float = 1.02
    """Rank-normalised R-hat of the worst quantity. The usual 1.01 is meant for one quantity; this is the largest of about a
    hundred, whose Monte Carlo error at two thousand draws reaches beyond 1.01 in perfect chains."""
    min_ess: float = 400.0
    """Bulk and tail effective draws of the worst quantity: enough for stable 95 % intervals."""
    max_divergent_share: float = 0.002
    """Divergent transitions: a few in thousands come from step size, more from a part not explored."""


@dataclass(frozen=True)
class Convergence:
    """The worst diagnostics over all quantities of a posterior."""

    rhat: float
    ess_bulk: float
    ess_tail: float
    divergences: int
    draws: int
    passed: bool

    def __str__(self) -> str:
        """Return one line for a person."""
        said = "converged" if self.passed else "NOT converged"
        return (
            f"{said}: worst R-hat {self.rhat:.3f}, worst ESS bulk {self.ess_bulk:.0f} and tail {self.ess_tail:.0f} of "
            f"{self.draws} draws, {self.divergences} divergent"
        )


def convergence(tree: xr.DataTree, settings: ConvergenceSettings | None = None) -> Convergence:
    """Compute the worst R-hat, effective sample sizes and divergences of a posterior.

    Parameters
    ----------
    tree : DataTree
        With groups `posterior` and `sample_stats`.
    settings : ConvergenceSettings, optional
    """
    settings = settings or ConvergenceSettings()
    posterior = tree["posterior"].to_dataset()

    def worst(dataset: xr.Dataset, largest: bool) -> float:
        # Not a number, where draws are none or all the same, is the worst of all: maximum and minimum let it through.
        values = np.concatenate([v.to_numpy().ravel() for v in dataset.data_vars.values()])
        return float(values.max() if largest else values.min())

    with np.errstate(invalid="ignore", divide="ignore"):
        rhat = worst(az.rhat(posterior), True)
        bulk = worst(az.ess(posterior, method="bulk"), False)
        tail = worst(az.ess(posterior, method="tail"), False)
    diverging = tree["sample_stats"]["diverging"]
    divergences, draws = int(diverging.sum()), int(diverging.size)
    effective = bulk >= settings.min_ess and tail >= settings.min_ess
    passed = rhat <= settings.max_rhat and effective and divergences <= settings.max_divergent_share * draws
    return Convergence(rhat, bulk, tail, divergences, draws, passed)
