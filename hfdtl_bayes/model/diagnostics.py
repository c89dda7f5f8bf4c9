"""Sampler diagnostics in one place: whether draws may be used at all."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import arviz_stats
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
    max_pareto_k: float = 0.7
    """Pareto k of importance weights, where draws were reweighted: above it their variance is as good as infinite (Vehtari et al.
    2024, arXiv:1507.02646)."""


@dataclass(frozen=True)
class Reweighting:
    """How the draws of a fit of donors were weighed by a target's rows.

    Attributes
    ----------
    pareto_k : float
        Shape of the weights' upper tail.
    effective : float
        Effective number of the donors' draws under the weights.
    draws : int
        The donors' draws.
    copies : int
        Copies made of each before weighing.
    donors : str
        Convergence of the donors' own draws, in words.
    donors_passed : bool
    """

    pareto_k: float
    effective: float
    draws: int
    copies: int
    donors: str
    donors_passed: bool

    def __str__(self) -> str:
        """Return a clause for a person."""
        said = "" if self.donors_passed else f"; of the donors' own draws: {self.donors}"
        copied = f", {self.copies} copies of each" if self.copies > 1 else ""
        return f"the donors' draws reweighted, Pareto k {self.pareto_k:.2f}, {self.effective:.0f} of {self.draws} effective{copied}{said}"

    def reason(self, max_pareto_k: float, min_effective: float) -> str:
        """Return why the weighted draws are not to be used; empty if they are."""
        if not self.pareto_k <= max_pareto_k:
            return f"Pareto k of the donors' draws is {self.pareto_k:.2f}, above {max_pareto_k:g}"
        if not self.effective >= min_effective:
            return f"only {self.effective:.0f} of the donors' {self.draws} draws are effective, {min_effective:.0f} needed"
        return "" if self.donors_passed else f"the donors' own draws: {self.donors}"

    def dump(self) -> str:
        """Return it as JSON, since netCDF attributes hold no truth values."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Reweighting:
        """Read what `dump` wrote."""
        return cls(**json.loads(text))


def effective_share(tree: xr.DataTree) -> float:
    """Return which share of a posterior's draws was effective when they were reweighted, 1 if they never were.

    Resampled draws look alike whatever they are worth; weights of a second reweighting do not show what the first one cost.
    """
    attributes = tree["sample_stats"].attrs
    found = Reweighting.load(attributes["reweighting"]) if "reweighting" in attributes else None
    return 1.0 if found is None else min(1.0, found.effective / found.draws)


@dataclass(frozen=True)
class Convergence:
    """The worst diagnostics over all quantities of a posterior.

    `reweighting` is there where draws of donors were conditioned on a target's rows instead of sampled anew; `note` says what else a
    reader should know, such as why a target was refitted.
    """

    rhat: float
    ess_bulk: float
    ess_tail: float
    divergences: int
    draws: int
    passed: bool
    reweighting: Reweighting | None = None
    note: str = ""

    def __str__(self) -> str:
        """Return one line for a person."""
        said = "converged" if self.passed else "NOT converged"
        return (
            f"{said}: worst R-hat {self.rhat:.3f}, worst ESS bulk {self.ess_bulk:.0f} and tail {self.ess_tail:.0f} of "
            f"{self.draws} draws, {self.divergences} divergent{'; ' if self.reweighting else ''}{self.reweighting or ''}"
            f"{'; ' if self.note else ''}{self.note}"
        )


def mixing(tree: xr.DataTree) -> tuple[float, float, float]:
    """Return the worst R-hat, bulk ESS and tail ESS over all parameters: what `convergence` spends its time on."""
    posterior = tree["posterior"].to_dataset()

    def worst(dataset: xr.Dataset, largest: bool) -> float:
        # Not a number, where draws are none or all the same, is the worst of all: maximum and minimum let it through.
        values = np.concatenate([v.to_numpy().ravel() for v in dataset.data_vars.values()])
        return float(values.max() if largest else values.min())

    with np.errstate(invalid="ignore", divide="ignore"):
        rhat = worst(arviz_stats.rhat(posterior), True)
        bulk = worst(arviz_stats.ess(posterior, method="bulk"), False)
        tail = worst(arviz_stats.ess(posterior, method="tail"), False)
    return rhat, bulk, tail


def convergence(
    tree: xr.DataTree, settings: ConvergenceSettings | None = None, mixed: tuple[float, float, float] | None = None
) -> Convergence:
    """Compute the worst R-hat, effective sample sizes and divergences of a posterior.

    Parameters
    ----------
    tree : DataTree
        With groups `posterior` and `sample_stats`.
    settings : ConvergenceSettings, optional
    mixed : tuple of float, optional
        What `mixing` returned for these draws, where it is known.
    """
    settings = settings or ConvergenceSettings()
    rhat, bulk, tail = mixing(tree) if mixed is None else mixed
    diverging = tree["sample_stats"]["diverging"]
    divergences, draws = int(diverging.sum()), int(diverging.size)
    effective = bulk >= settings.min_ess and tail >= settings.min_ess
    passed = rhat <= settings.max_rhat and effective and divergences <= settings.max_divergent_share * draws
    attributes = tree["sample_stats"].attrs
    found = Reweighting.load(attributes["reweighting"]) if "reweighting" in attributes else None
    if found is not None:
        passed = passed and found.pareto_k <= settings.max_pareto_k and found.donors_passed
    return Convergence(rhat, bulk, tail, divergences, draws, passed, found, str(attributes.get("note", "")))
