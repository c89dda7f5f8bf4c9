"""The verdict on a calibrated target: accept, collect more, expand the residual, or retrain as a donor - or no verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

import numpy as np
import pandas as pd

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.transfer.checks import (
    JUDGED,
    AccuracySettings,
    Check,
    CoverageSettings,
    ErrorSettings,
    Evidence,
    KinshipSettings,
    LackOfFitSettings,
    ReachSettings,
    Status,
    check_accuracy,
    check_convergence,
    check_coverage,
    check_errors,
    check_identity,
    check_judged,
    check_kinship,
    check_lack_of_fit,
    check_reach,
    check_rmse,
    check_slopes,
    make_evidence,
    rows_needed,
)
from hfdtl_bayes.transfer.checks.accuracy import attainable_rmse, held_out_probability
from hfdtl_bayes.transfer.checks.check import records
from hfdtl_bayes.transfer.evaluation import HeldOut, attainable_mape, error_sd, evaluate, fitted_block_length

FIT = "fit to the calibration rows"
_RETRAIN = "This configuration is unlike the donors: trace it richly, calibrate it on all of that, and make it a donor itself (`promote`)."


class Outcome(StrEnum):
    """What to do next."""

    ACCEPT = "accept"
    COLLECT_MORE = "collect_more"
    EXPAND_RESIDUAL = "expand_residual"
    RETRAIN_AS_DONOR = "retrain_as_donor"
    SAMPLE_AGAIN = "sample_again"
    """The sampler has not converged, so nothing may be concluded."""
    CANNOT_SAY = "cannot_say"
    """What a verdict needs is not there; no verdict rather than a wrong one."""


@dataclass(frozen=True)
class VerdictSettings:
    """Thresholds, each with its reason in the settings of its check: the settings of all checks in one flat object.

    Each has the name it has there; `coverage_level`, `conflict_level` and `fit_level` are the levels of the tests of coverage, kinship and
    lack of fit.
    """

    mape_limit: float = AccuracySettings.mape_limit
    attainable_slack: float = AccuracySettings.attainable_slack
    rmse_limit_s: float | None = AccuracySettings.rmse_limit_s
    min_probability: float = AccuracySettings.min_probability
    min_coverage: float = CoverageSettings.min_coverage
    coverage_level: float = CoverageSettings.level
    block_tolerance: float = CoverageSettings.tolerance
    conflict_level: float = KinshipSettings.level
    max_mean_uncertainty: float = ReachSettings.max_mean_uncertainty
    fit_level: float = LackOfFitSettings.level
    min_gain: float = LackOfFitSettings.min_gain
    bootstrap: int = AccuracySettings.bootstrap

    def __post_init__(self) -> None:
        """Refuse settings that cannot be met, mean nothing or contradict each other.

        Raises
        ------
        InputError
            Names the settings, what was found and what is accepted.
        """
        for name in ("min_probability", "min_coverage", "coverage_level", "conflict_level", "fit_level"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} must lie between 0 and 1, found {getattr(self, name)}")
        for name in ("mape_limit", "attainable_slack", "max_mean_uncertainty", "bootstrap", "min_gain"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be a positive number, found {getattr(self, name)}")
        if not 0 <= self.block_tolerance < float("inf"):
            raise InputError(f"block_tolerance must be 0 or a positive number, found {self.block_tolerance}")
        if self.rmse_limit_s is not None and not 0 < self.rmse_limit_s < float("inf"):
            raise InputError(f"rmse_limit_s must be a positive number of seconds, found {self.rmse_limit_s}")
        if self.min_coverage > 0.95:
            raise InputError(
                f"min_coverage {self.min_coverage} contradicts the intervals it is asked of: they promise 0.95; give at most that"
            )
        if self.min_probability < 0.5:
            raise InputError(
                f"min_probability {self.min_probability} would accept errors that are more likely above mape_limit than below; give "
                "0.5 or more, or raise mape_limit"
            )

    @property
    def accuracy(self) -> AccuracySettings:
        """Settings of the check of accuracy."""
        return AccuracySettings(**{f.name: getattr(self, f.name) for f in fields(AccuracySettings)})

    @property
    def coverage(self) -> CoverageSettings:
        """Settings of the check of coverage."""
        return CoverageSettings(self.min_coverage, self.coverage_level, self.block_tolerance)

    @property
    def kinship(self) -> KinshipSettings:
        """Settings of the check of kinship."""
        return KinshipSettings(self.conflict_level)

    @property
    def reach(self) -> ReachSettings:
        """Settings of the check of reach."""
        return ReachSettings(self.max_mean_uncertainty, self.max_mean_uncertainty / 2)

    @property
    def lack_of_fit(self) -> LackOfFitSettings:
        """Settings of the checks of lack of fit and of slopes."""
        return LackOfFitSettings(self.fit_level, self.min_gain)


@dataclass(frozen=True)
class Verdict:
    """The outcome, the checks behind it, and the recommendation in plain words.

    `held_out` is None, and `probability_below_limit` not a number, where there were no rows to judge by.
    """

    config_id: str
    outcome: Outcome
    recommendation: str
    checks: tuple[Check, ...]
    held_out: HeldOut | None
    probability_below_limit: float
    limit: float

    @property
    def accepted(self) -> bool:
        """True for `accept`."""
        return self.outcome is Outcome.ACCEPT

    def check(self, name: str) -> Check | None:
        """Return the check of a name, None if it was not made."""
        return next((c for c in self.checks if c.name == name), None)

    def __str__(self) -> str:
        """Return the verdict as lines for a person."""
        marks = {Status.PASS: "ok", Status.WARN: "~~", Status.FAIL: "!!", Status.CANNOT_SAY: "??"}
        lines = [f"{self.config_id}: {self.outcome.upper()}. {self.recommendation}"]
        lines += [f"  [{marks[c.status]}] {c.name}: {c.message}" for c in self.checks]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as plain data for JSON."""
        held = None
        if self.held_out is not None:
            held = {k: v for k, v in asdict(self.held_out).items() if not isinstance(v, pd.DataFrame)}
            held["by_regime"] = records(self.held_out.by_regime.reset_index())
        return {
            "config_id": self.config_id,
            "outcome": str(self.outcome),
            "recommendation": self.recommendation,
            "probability_below_limit": self.probability_below_limit if np.isfinite(self.probability_below_limit) else None,
            "limit": self.limit,
            "checks": [c.as_dict() for c in self.checks],
            "held_out": held,
        }


def verdict(
    posterior: LatencyPosterior,
    held_out_rows: pd.DataFrame | None,
    configuration: ServingConfiguration,
    settings: VerdictSettings | None = None,
    *,
    calibration_rows: pd.DataFrame | None = None,
    intended_rows: pd.DataFrame | None = None,
    block_length: int | None = None,
    seed: int = 0,
) -> Verdict:
    """Judge a calibrated target on rows it was not calibrated on.

    Without held-out rows nothing is accepted: kinship with the donors, the fit to the calibration rows, the reach of the calibration
    and left-out blocks of it may speak against the target, and otherwise the outcome is `cannot_say`.

    Parameters
    ----------
    posterior : LatencyPosterior
    held_out_rows : DataFrame or None
        Validated rows of other time blocks or regimes than the calibration's; None where there are none.
    configuration : ServingConfiguration
    settings : VerdictSettings, optional
    calibration_rows : DataFrame, optional
        The rows calibrated on; with them a lack of fit is told from an extrapolation that fails.
    intended_rows : DataFrame, optional
        Batches of the traffic that is to be predicted, if it is other than the held-out rows. Times are not read. Where it has much more
        of a feature than any row at hand, nothing is accepted.
    block_length : int, optional
        As in `evaluate`.
    seed : int

    Raises
    ------
    InputError
        If a frame of rows is given and empty, a feature is not defined for a row, the target was not fitted, or its rows are those of a
        donor.
    """
    settings = settings or VerdictSettings()
    if configuration.config_id not in posterior.config_ids:
        raise InputError(
            f"{configuration.config_id!r} was not fitted; this posterior holds {', '.join(posterior.config_ids)}. Calibrate it first"
        )
    if intended_rows is not None and intended_rows.empty:
        raise InputError(f"no intended rows of {configuration.config_id!r}; give batches of the traffic to be predicted, or none")
    scores = None
    if held_out_rows is not None:
        scores = evaluate(posterior, held_out_rows, configuration, block_length=block_length, seed=seed)
    own_sd = error_sd(posterior, configuration)
    donor_sd = max((error_sd(posterior, posterior.configuration(d)) for d in posterior.donors), default=own_sd)
    floor = attainable_mape(min(own_sd, donor_sd))
    limit = max(settings.mape_limit, settings.attainable_slack * floor)
    evidence = make_evidence(
        posterior,
        configuration,
        calibration=calibration_rows,
        held_out=held_out_rows,
        intended=intended_rows,
        scores=scores,
        limit=limit,
        block_length=block_length or fitted_block_length(posterior, configuration.config_id),
    )
    checks = _checks(evidence, settings, seed)
    outcome, recommendation = _decide(checks, evidence, settings, floor)
    probability = held_out_probability(evidence, settings.accuracy, seed=seed)
    return Verdict(configuration.config_id, outcome, recommendation, tuple(checks.values()), scores, probability, limit)


def _checks(evidence: Evidence, settings: VerdictSettings, seed: int) -> dict[str, Check]:
    """Return all checks that apply, by name, in the order they are shown."""
    made = [
        check_convergence(evidence),
        check_accuracy(evidence, settings.accuracy, seed=seed),
        check_coverage(evidence, settings.coverage),
        check_reach(evidence, settings.reach),
    ]
    if evidence.held_out is not None and evidence.intended is not evidence.held_out:
        made.append(check_judged(evidence))
    if settings.rmse_limit_s is not None:
        made.append(check_rmse(evidence, settings.accuracy, seed=seed))
    if evidence.posterior.target == evidence.configuration.config_id and evidence.posterior.donors:
        made.append(check_kinship(evidence, settings.kinship))
        made.append(check_errors(evidence, ErrorSettings()))
        identity = check_identity(evidence)
        if identity.status is not Status.PASS:
            made.append(identity)
    if evidence.calibration is not None:
        made.append(_fit(evidence))
    made.append(check_lack_of_fit(evidence, settings.lack_of_fit))
    if evidence.held_out is not None:
        made.append(check_slopes(evidence, settings.lack_of_fit))
    return {c.name: c for c in made}


def _fit(evidence: Evidence) -> Check:
    """Judge the MAPE on the calibration rows themselves."""
    seen = evidence.calibration
    assert seen is not None
    scored = seen.scored
    if not scored.any():
        return Check(FIT, Status.CANNOT_SAY, "no calibration row waited longer than the floor")
    error = np.abs(seen.observed - seen.expected)[scored] / seen.observed[scored]
    table = pd.DataFrame({"regime": seen.regime[scored], "mape": error}).groupby("regime", sort=False).mean().reset_index()
    mape = float(error.mean())
    message = f"MAPE {mape:.1%} on {len(seen.observed)} rows, limit {evidence.limit:.1%}"
    if mape <= evidence.limit:
        return Check(FIT, Status.PASS, message, "", table)
    return Check(FIT, Status.FAIL, message, "Not even the calibration rows are fitted: a residual feature is missing.", table)


def _decide(checks: dict[str, Check], evidence: Evidence, settings: VerdictSettings, floor: float) -> tuple[Outcome, str]:
    """Return what follows from the checks; the first reason that applies."""
    status = {name: c.status for name, c in checks.items()}
    if status["convergence"] is Status.FAIL:
        return Outcome.SAMPLE_AGAIN, checks["convergence"].recommendation
    twin = checks.get("the target is not a donor")
    if twin is not None:
        return Outcome.CANNOT_SAY, f"{twin.message[0].upper()}{twin.message[1:]}. {twin.recommendation}"
    impossible = _impossible(evidence, settings, floor)
    if impossible:
        return Outcome.CANNOT_SAY, impossible
    kin = checks.get("kinship with the donors")
    stranger = kin is not None and kin.status is Status.FAIL
    if evidence.held_out is None:
        return _without_rows(checks, evidence, stranger)
    if status["accuracy"] is Status.CANNOT_SAY:
        return Outcome.CANNOT_SAY, checks["accuracy"].recommendation
    needed = [checks[n] for n in ("accuracy", "coverage", "reach of the calibration", "rmse") if n in checks]
    other = checks.get(JUDGED)
    if all(c.passed for c in needed) and other is not None and not other.passed:
        return (
            Outcome.CANNOT_SAY,
            f"The held-out rows are predicted well, but are other traffic than is asked about. {other.recommendation}",
        )
    if all(c.passed for c in needed):
        said = "The coefficients may be used for traffic like the held-out regimes."
        aside = " They differ from the donors', so these donors would predict this configuration badly without its own rows."
        return Outcome.ACCEPT, said + aside if stranger else said
    if status["accuracy"] is Status.FAIL and checks["accuracy"].recommendation and all(c.passed for c in needed[1:]):
        return Outcome.COLLECT_MORE, checks["accuracy"].recommendation
    return _refused(checks, evidence, settings, stranger)


def _impossible(evidence: Evidence, settings: VerdictSettings, floor: float) -> str:
    """Return why nothing could ever meet the limits; empty if something could."""
    if evidence.limit < floor:
        return (
            f"The limits contradict each other: a MAPE below {evidence.limit:.2%} is asked for, and noise alone leaves {floor:.1%} when the "
            f"mean is known exactly. Set mape_limit above that, or attainable_slack above 1."
        )
    if settings.rmse_limit_s is not None and evidence.held_out is not None and settings.rmse_limit_s < attainable_rmse(evidence):
        return (
            f"The limits contradict each other: an RMSE below {settings.rmse_limit_s:.3g} s is asked for, and noise alone leaves "
            f"{attainable_rmse(evidence):.3g} s when the mean is known exactly, while MAPE may be {evidence.limit:.1%}. Raise rmse_limit_s."
        )
    return ""


def _without_rows(checks: dict[str, Check], evidence: Evidence, stranger: bool) -> tuple[Outcome, str]:
    """Return what calibration traffic alone can say: reasons against, never an accept."""
    missing = checks["lack of fit"]
    fit = checks.get(FIT)
    if missing.status is Status.FAIL:
        return Outcome.EXPAND_RESIDUAL, missing.recommendation
    if fit is not None and fit.status is Status.FAIL:
        return Outcome.EXPAND_RESIDUAL, fit.recommendation
    if stranger:
        return Outcome.RETRAIN_AS_DONOR, _RETRAIN
    reach = checks["reach of the calibration"]
    if reach.status is Status.FAIL or checks["accuracy"].status is Status.FAIL:
        return Outcome.COLLECT_MORE, reach.recommendation or checks["accuracy"].recommendation
    return (
        Outcome.CANNOT_SAY,
        "Nothing speaks against these coefficients, and nothing was measured on traffic they were not calibrated on: record some time "
        "blocks of the traffic to be predicted and hold them out.",
    )


def _refused(checks: dict[str, Check], evidence: Evidence, settings: VerdictSettings, stranger: bool) -> tuple[Outcome, str]:
    """Return what would mend a target that is not good enough."""
    if stranger:
        return Outcome.RETRAIN_AS_DONOR, _RETRAIN
    missing, fit = checks["lack of fit"], checks.get(FIT)
    if missing.status is Status.FAIL:
        return Outcome.EXPAND_RESIDUAL, missing.recommendation
    if fit is not None and fit.status is Status.FAIL:
        return (
            Outcome.EXPAND_RESIDUAL,
            "Not even the calibration rows are fitted: a residual feature is missing. `discover` looks for it.",
        )
    assert evidence.scores is not None
    assert evidence.held_out is not None
    by_regime = evidence.scores.by_regime["mape"]
    worst = by_regime.idxmax()
    more = rows_needed(evidence, evidence.held_out, settings.min_probability)
    said = f"Calibrate on traffic like {worst!r}, where the error is largest ({float(by_regime.max()):.1%}): "
    if more.rows is None:
        return Outcome.COLLECT_MORE, said + "no number of rows is expected to suffice by itself, so watch the lack of fit."
    if more.regime == worst:
        return Outcome.COLLECT_MORE, said + f"about {more.rows} rows from there are expected to suffice."
    return Outcome.COLLECT_MORE, said + f"about {more.rows} rows of {more.regime!r} are expected to suffice."
