"""A target's posterior from its statistics: by conditioning the donors' draws, or by a joint refit where that cannot be relied upon."""

from __future__ import annotations

from hfdtl_bayes.errors import InputError, UnknownNameError
from hfdtl_bayes.model import ENGINES, LatencyPosterior, SamplerSettings, fit
from hfdtl_bayes.model.conditional import ConditionalSettings, condition
from hfdtl_bayes.model.new_configuration import NewConfiguration, why_not_conditional
from hfdtl_bayes.statistics import ConfigStatistics

CALIBRATION_ENGINES = ("auto", "conditional", *ENGINES)

_KEPT = 4
"""Targets whose preparation is kept: each holds some ten to fifty megabytes."""
_prepared: list[NewConfiguration] = []


def prepared(donors: LatencyPosterior, own: ConfigStatistics) -> NewConfiguration:
    """Return what the donors say of a configuration, kept for the last few: calibrating it again takes a fraction of the time."""
    for found in _prepared:
        # The draws themselves, not their values: a posterior is never changed in place.
        if found.donors.tree is donors.tree and found.configuration == own.configuration:
            return found
    made = NewConfiguration(donors, own.configuration)
    _prepared.append(made)
    del _prepared[:-_KEPT]
    return made


def calibrate_statistics(
    donors: LatencyPosterior,
    own: ConfigStatistics,
    *,
    engine: str = "auto",
    limits: ConditionalSettings | None = None,
    settings: SamplerSettings | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> LatencyPosterior:
    """Calibrate a target from its sufficient statistics.

    Parameters
    ----------
    donors : LatencyPosterior
        A fit of donors; a target it may already hold is replaced.
    own : ConfigStatistics
        The target's.
    engine : {"auto", "conditional", "exact", "pymc"}
        "conditional" conditions the donors' draws on the target (see `hfdtl_bayes.model.conditional`), whatever its diagnostics.
        "auto" does so too, and refits donors and target jointly with "exact" where the weights degenerate, the donors'
        own draws have not converged or cannot be conditioned; the reason is in `LatencyPosterior.convergence`. The
        others refit.
    limits : ConditionalSettings, optional
        When reweighted draws may be used.
    settings : SamplerSettings, optional
        For a refit; conditioning yields as many draws as the donors have.
    seed, show_progress
        As in `fit`.

    Returns
    -------
    LatencyPosterior
        With `target` set.

    Raises
    ------
    UnknownNameError
        If there is no such engine.
    InputError
        If the target is one of the donors, or "conditional" is asked of draws that cannot be conditioned.
    StatisticsError
        If the statistics are of another feature set.
    """
    if engine not in CALIBRATION_ENGINES:
        raise UnknownNameError(f"unknown engine {engine!r}; known are {', '.join(CALIBRATION_ENGINES)}")
    if own.config_id in donors.donors:
        raise InputError(
            f"target {own.config_id!r} is also a donor of this posterior ({', '.join(donors.donors)}); its rows would "
            "count twice. Fit the donors without it, or predict it as it is"
        )
    note = ""
    if engine in ("auto", "conditional"):
        reason = why_not_conditional(donors)
        if engine == "conditional" or reason is None:
            prior = prepared(donors, own)
            if engine == "auto" and not prior.convergence.passed:
                reason = f"the donors' own draws: {prior.convergence}"
            else:
                found = condition(prior, own, limits, seed=seed)
                if engine == "conditional" or not found.reason:
                    return found.posterior
                reason = found.reason
        engine, note = "exact", f"refitted jointly with the donors, since {reason}"
    statistics = [*donors.donor_statistics, own]
    fitted = fit(
        statistics,
        donors.feature_set,
        donors.priors,
        settings,
        target=own.config_id,
        engine=engine,
        seed=seed,
        show_progress=show_progress,
    )
    if note:
        fitted.tree["sample_stats"].attrs["note"] = note
    return fitted
