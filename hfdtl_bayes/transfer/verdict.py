"""The first verdict on a calibrated target: accept, collect more, expand the residual, or retrain as a donor."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binom

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.transfer.conflict import population_conflict
from hfdtl_bayes.transfer.evaluation import HeldOut, attainable_mape, error_sd, evaluate


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
    """Where noise alone exceeds the limit no model can meet it: then the error may be this many times the attainable. The
    attainable is taken at the noise of the noisiest donor where the target's is larger, since a fit that misses its own rows takes
    the misfit for noise."""
    rmse_limit_s: float | None = None
    """Limit of the root mean squared error in seconds; none by default, since it depends on the use."""
    min_probability: float = 0.9
    """Probability that the held-out error is below the limit, by block bootstrap, for an accept."""
    min_coverage: float = 0.85
    """Below this share of rows, 95 % intervals are not to be trusted: the error is not only large but unannounced."""
    coverage_level: float = 0.01
    """The blocks inside their intervals must be no fewer than 95 % intervals explain at this level (binomial): with few blocks one
    miss is no evidence. Blocks share the error of the coefficients, so where the calibration reaches little the test is too
    strict; the reach is a check of its own."""
    conflict_level: float = 0.001
    """Probability of so unusual a member of the population below which the target is called unlike the donors."""
    max_mean_uncertainty: float = 0.10
    """Relative sd of the expected value, median over the held-out rows, above which the calibration does not reach the traffic
    asked about: as much as the whole error may be."""
    bootstrap: int = 1000
    """Block bootstrap resamples: Monte Carlo error of a probability below 0.016."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot be met or mean nothing.

        Raises
        ------
        InputError
            Names the setting, what was found and what is accepted.
        """
        for name in ("min_probability", "min_coverage", "coverage_level", "conflict_level"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} must lie between 0 and 1, found {getattr(self, name)}")
        for name in ("mape_limit", "attainable_slack", "max_mean_uncertainty", "bootstrap"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be a positive number, found {getattr(self, name)}")
        if self.rmse_limit_s is not None and not 0 < self.rmse_limit_s < float("inf"):
            raise InputError(f"rmse_limit_s must be a positive number of seconds, found {self.rmse_limit_s}")


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


def probability_below(held_out: HeldOut, limit: float, resamples: int, seed: int, *, rmse: bool = False) -> float:
    """Return the probability that the MAPE (or the RMSE in seconds) is below `limit`.

    By a bootstrap of whole time blocks within regimes, since rows of one block share the machine's speed.
    """
    rng = np.random.default_rng(seed)
    errors = np.zeros(resamples)
    rows = np.zeros(resamples)
    for _, own in held_out.block_errors.groupby("regime"):
        index = rng.integers(0, len(own), size=(resamples, len(own)))
        errors += own["squared" if rmse else "error"].to_numpy()[index].sum(axis=1)
        rows += own["size" if rmse else "rows"].to_numpy()[index].sum(axis=1)
    usable = rows > 0
    if not usable.any():
        return 0.0
    score = errors[usable] / rows[usable]
    return float(np.mean((np.sqrt(score) if rmse else score) < limit))


def verdict(
    posterior: LatencyPosterior,
    held_out_rows: pd.DataFrame,
    configuration: ServingConfiguration,
    settings: VerdictSettings | None = None,
    *,
    calibration_rows: pd.DataFrame | None = None,
    block_length: int | None = None,
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
    block_length : int, optional
        As in `evaluate`.
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
    own_sd = error_sd(posterior, configuration)
    donor_sd = max((error_sd(posterior, posterior.configuration(d)) for d in posterior.donors), default=own_sd)
    limit = max(settings.mape_limit, settings.attainable_slack * attainable_mape(min(own_sd, donor_sd)))
    probability = probability_below(held_out, limit, settings.bootstrap, seed)
    inside, blocks = int(held_out.block_errors["inside"].sum()), held_out.blocks
    chance = float(binom.cdf(inside, blocks, 0.95))
    needed = f"needed {settings.min_probability:g}"
    checks = [
        Check("convergence", convergence.passed, str(convergence)),
        Check(
            "accuracy",
            probability >= settings.min_probability,
            f"held-out MAPE {held_out.mape:.1%} on {held_out.rows} rows, P(below {limit:.1%}) = {probability:.3f}, {needed}; "
            f"attainable {held_out.attainable_mape:.1%}",
        ),
        Check(
            "coverage",
            held_out.coverage >= settings.min_coverage and chance >= settings.coverage_level,
            f"95 % intervals hold {held_out.coverage:.1%} of rows and {inside} of {blocks} block means (chance {chance:.2g})",
        ),
        Check(
            "reach of the calibration",
            held_out.mean_uncertainty <= settings.max_mean_uncertainty,
            f"the coefficients leave the expected value open by {held_out.mean_uncertainty:.1%} (sd, median over rows)",
        ),
    ]
    if settings.rmse_limit_s is not None:
        below = probability_below(held_out, settings.rmse_limit_s, settings.bootstrap, seed, rmse=True)
        message = f"held-out RMSE {held_out.rmse_s:.3g} s, P(below {settings.rmse_limit_s:.3g} s) = {below:.3f}, {needed}"
        checks.append(Check("rmse", below >= settings.min_probability, message))
    if posterior.target == configuration.config_id and posterior.donors:
        conflict = population_conflict(posterior)
        message = (
            f"a member of the donors' population would look as unusual with probability {conflict.p_value:.2g}; "
            f"{conflict.coefficient} stands out most, by {conflict.z:.1f} sds"
        )
        checks.append(Check("kinship with the donors", conflict.p_value >= settings.conflict_level, message))
        spread = float(np.quantile(np.hypot(*posterior.new_errors(np.random.default_rng([seed, 4]))), 0.975))
        message = f"relative error sd {own_sd:.1%}; 97.5 % of configurations like these lie below {spread:.1%}"
        checks.append(Check("noise like the donors'", own_sd <= spread, message))
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
    kin = passed.get("kinship with the donors", True)
    if not passed["convergence"]:
        how = "--engine exact" if posterior.engine == "conditional" else "--draws 4000 --target-accept 0.99"
        return Outcome.SAMPLE_AGAIN, f"Nothing may be concluded from these draws: calibrate again, for example with {how}."
    if passed["accuracy"] and passed["coverage"] and passed["reach of the calibration"] and passed.get("rmse", True):
        said = "The coefficients may be used for traffic like the held-out regimes."
        aside = " They differ from the donors', so these donors would predict this configuration badly without its own rows."
        return Outcome.ACCEPT, said if kin else said + aside
    if not kin:
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
        f"Calibrate on traffic like {worst!r}, where the error is largest ({float(held_out.by_regime['mape'].max()):.1%}): "
        f"as many rows again ({rows}) from there.",
    )
