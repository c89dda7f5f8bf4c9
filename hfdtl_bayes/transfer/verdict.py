"""The first verdict on a calibrated target: accept, collect more, expand the residual, or retrain as a donor."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import pandas as pd

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.statistics import DEFAULT_BLOCK_LENGTH
from hfdtl_bayes.transfer.evaluation import HeldOut, evaluate


class Outcome(StrEnum):
    """What to do next."""

    ACCEPT = "accept"
    COLLECT_MORE = "collect_more"
    EXPAND_RESIDUAL = "expand_residual"
    RETRAIN_AS_DONOR = "retrain_as_donor"
    SAMPLE_AGAIN = "sample_again"
    """The sampler has not converged, so nothing may be concluded."""


@dataclass(frozen=True)
class VerdictSettings:
    """Thresholds, each with its reason."""

    mape_limit: float = 0.10
    """What BLIS's guide promises its users for requests."""
    attainable_slack: float = 1.3
    """Where noise alone exceeds the limit no model can meet it: then the error may be this many times the attainable."""
    min_probability: float = 0.9
    """Probability that the held-out MAPE is below the limit, by block bootstrap, for an accept."""
    min_coverage: float = 0.85
    """Below this, 95 % intervals are not to be trusted: the error is not only large but unannounced."""
    conflict_z: float = 4.0
    """A coefficient this many group sds from the population is no member of it: about 1 in 16,000 by chance."""
    bootstrap: int = 1000
    """Block bootstrap resamples: Monte Carlo error of a probability below 0.016."""


@dataclass(frozen=True)
class Check:
    """One check: whether it passed, what it found, what follows."""

    name: str
    passed: bool
    message: str


@dataclass(frozen=True)
class Verdict:
    """The outcome, the checks behind it, and the recommendation in plain words."""

    config_id: str
    outcome: Outcome
    recommendation: str
    checks: tuple[Check, ...]
    held_out: HeldOut
    probability_below_limit: float
    limit: float

    @property
    def accepted(self) -> bool:
        """True for `accept`."""
        return self.outcome is Outcome.ACCEPT

    def __str__(self) -> str:
        """Return the verdict as lines for a person."""
        lines = [f"{self.config_id}: {self.outcome.upper()}. {self.recommendation}"]
        lines += [f"  [{'ok' if c.passed else '!!'}] {c.name}: {c.message}" for c in self.checks]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as plain data for JSON."""
        held = {k: v for k, v in asdict(self.held_out).items() if not isinstance(v, pd.DataFrame)}
        held["by_regime"] = self.held_out.by_regime.reset_index().to_dict(orient="records")
        return {
            "config_id": self.config_id,
            "outcome": str(self.outcome),
            "recommendation": self.recommendation,
            "probability_below_limit": self.probability_below_limit,
            "limit": self.limit,
            "checks": [asdict(c) for c in self.checks],
            "held_out": held,
        }


def probability_below(held_out: HeldOut, limit: float, resamples: int, seed: int) -> float:
    """Return the probability that the MAPE is below `limit`, by a bootstrap of whole time blocks within regimes."""
    rng = np.random.default_rng(seed)
    errors = np.zeros(resamples)
    rows = np.zeros(resamples)
    for _, own in held_out.block_errors.groupby("regime"):
        index = rng.integers(0, len(own), size=(resamples, len(own)))
        errors += own["error"].to_numpy()[index].sum(axis=1)
        rows += own["rows"].to_numpy()[index].sum(axis=1)
    usable = rows > 0
    return float(np.mean(errors[usable] / rows[usable] < limit)) if usable.any() else 0.0


def deviation_z(posterior: LatencyPosterior, config_id: str) -> pd.Series:
    """Return how far each coefficient lies from the population, in group sds: posterior mean of |theta - A phi| / (tau scale).

    The scale includes the posterior sd of the difference, so that a coefficient nobody informed cannot stand out.
    """
    configuration = posterior.configuration(config_id)
    c = posterior.config_ids.index(config_id)
    difference = posterior.draws_of("theta")[:, c] - posterior.population_draws(configuration)
    tau = np.median(posterior.deviation_sd(configuration), axis=0)
    z = np.abs(difference.mean(axis=0)) / np.hypot(tau, difference.std(axis=0))
    return pd.Series(z, index=list(posterior.feature_set.coef_names))


def verdict(
    posterior: LatencyPosterior,
    held_out_rows: pd.DataFrame,
    configuration: ServingConfiguration,
    settings: VerdictSettings | None = None,
    *,
    calibration_rows: pd.DataFrame | None = None,
    block_length: int = DEFAULT_BLOCK_LENGTH,
    seed: int = 0,
) -> Verdict:
    """Judge a calibrated target on rows it was not calibrated on.

    Parameters
    ----------
    posterior : LatencyPosterior
    held_out_rows : DataFrame
        Validated rows of other time blocks or regimes than the calibration's.
    configuration : ServingConfiguration
    settings : VerdictSettings, optional
    calibration_rows : DataFrame, optional
        The rows calibrated on; with them a lack of fit is told from an extrapolation that fails.
    block_length : int
    seed : int

    Raises
    ------
    InputError
        If there are no rows to judge, or the target was not fitted.
    """
    settings = settings or VerdictSettings()
    if configuration.config_id not in posterior.config_ids:
        raise InputError(
            f"{configuration.config_id!r} was not fitted; this posterior holds {', '.join(posterior.config_ids)}. Calibrate it first"
        )
    held_out = evaluate(posterior, held_out_rows, configuration, block_length=block_length, seed=seed)
    convergence = posterior.convergence()
    limit = max(settings.mape_limit, settings.attainable_slack * held_out.attainable_mape)
    probability = probability_below(held_out, limit, settings.bootstrap, seed)
    z = deviation_z(posterior, configuration.config_id)
    covered = min(held_out.coverage, held_out.block_coverage) >= settings.min_coverage
    checks = [
        Check("convergence", convergence.passed, str(convergence)),
        Check(
            "accuracy",
            probability >= settings.min_probability,
            f"held-out MAPE {held_out.mape:.1%} on {held_out.rows} rows, P(below {limit:.1%}) = {probability:.2f}; "
            f"attainable {held_out.attainable_mape:.1%}",
        ),
        Check(
            "coverage",
            covered,
            f"95 % intervals hold {held_out.coverage:.1%} of rows and {held_out.block_coverage:.1%} of block means",
        ),
        Check(
            "kinship with the donors",
            bool(z.max() < settings.conflict_z),
            f"{z.idxmax()} lies {z.max():.1f} group sds from the population, the most of all coefficients",
        ),
    ]
    in_sample = None
    if calibration_rows is not None and len(calibration_rows):
        in_sample = evaluate(posterior, calibration_rows, configuration, block_length=block_length, seed=seed)
        fits = in_sample.mape <= limit
        checks.append(
            Check("fit to the calibration rows", fits, f"MAPE {in_sample.mape:.1%} on {in_sample.rows} rows, limit {limit:.1%}")
        )
    outcome, recommendation = _decide(checks, held_out, in_sample, limit, posterior, configuration.config_id)
    return Verdict(configuration.config_id, outcome, recommendation, tuple(checks), held_out, probability, limit)


def _decide(
    checks: list[Check],
    held_out: HeldOut,
    in_sample: HeldOut | None,
    limit: float,
    posterior: LatencyPosterior,
    config_id: str,
) -> tuple[Outcome, str]:
    passed = {c.name: c.passed for c in checks}
    worst = held_out.by_regime["mape"].idxmax()
    if not passed["convergence"]:
        return Outcome.SAMPLE_AGAIN, "Sample again with more tuning draws; nothing may be concluded from these."
    if passed["accuracy"] and passed["coverage"]:
        return Outcome.ACCEPT, "The coefficients may be used for traffic like the held-out regimes."
    if not passed["kinship with the donors"]:
        return (
            Outcome.RETRAIN_AS_DONOR,
            "This configuration is unlike the donors: trace it richly and make it a donor itself.",
        )
    if in_sample is not None and in_sample.mape > limit:
        return (
            Outcome.EXPAND_RESIDUAL,
            "Not even the calibration rows are fitted: a residual feature is missing. Plot the errors against each feature.",
        )
    rows = next(s.rows for s in posterior.statistics if s.config_id == config_id)
    return (
        Outcome.COLLECT_MORE,
        f"Calibrate on traffic like {worst!r}, where the error is largest ({held_out.by_regime.loc[worst, 'mape']:.1%}): "
        f"as many rows again ({rows}) from there.",
    )
