"""The set of donors as it grows and ages: targets promoted, donors forgotten or discounted, two sets combined.

A posterior keeps the sufficient statistics of every configuration it was fitted to, so none of this reads a trace again. The joint
posterior of donors and target is, as a density, the posterior of the enlarged set of donors: only who is called the target differs. So
its draws are those of the promoted fit wherever they may be used at all, and where not, statistics alone give a refit in seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import fingerprint, fingerprint_differences
from hfdtl_bayes.model import LatencyPosterior, PriorSettings, SamplerSettings, fit
from hfdtl_bayes.model.conditional import ConditionalSettings
from hfdtl_bayes.model.forgetting import reweighted_without
from hfdtl_bayes.model.new_configuration import GAUSSIAN_ENGINES
from hfdtl_bayes.model.posterior import feature_card
from hfdtl_bayes.statistics import ConfigStatistics

_NO_ROWS = np.zeros(0, dtype=np.int64)


def promote(
    posterior: LatencyPosterior,
    statistics: ConfigStatistics | None = None,
    *,
    limits: ConditionalSettings | None = None,
    settings: SamplerSettings | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> LatencyPosterior:
    """Make a calibrated target one of the donors, from statistics alone.

    The draws are kept, for they already are of the posterior of the enlarged set of donors. Where they are not to be relied upon, or the
    target comes with more rows than it was calibrated on, all are refitted; `LatencyPosterior.convergence` says which and why.

    Parameters
    ----------
    posterior : LatencyPosterior
        With a target.
    statistics : ConfigStatistics, optional
        Of all rows of the target that are to count, those it was calibrated on among them. To add rows recorded since, merge the posterior's
        own statistics with theirs (`ConfigStatistics.merge`).
    limits : ConditionalSettings, optional
        When reweighted draws may be kept.
    settings : SamplerSettings, optional
        Of a refit.
    seed, show_progress
        As in `fit`.

    Returns
    -------
    LatencyPosterior
        Of the donors and the former target, which is the last donor; without a target.

    Raises
    ------
    InputError
        If there is no target, it is a donor's configuration under another name, or the statistics are of another configuration, another
        feature set, or of fewer rows than the target was calibrated on.
    """
    if posterior.target is None:
        raise InputError(
            f"this posterior holds donors alone ({', '.join(posterior.donors)}), so there is no target to promote; calibrate one first"
        )
    own = next(s for s in posterior.statistics if s.config_id == posterior.target)
    _refuse_twins([own], posterior.donor_statistics, "the donors")
    if statistics is not None:
        _check_more_rows(posterior, own, statistics)
        every = [*posterior.donor_statistics, statistics]
        note = f"{own.config_id} promoted to donor and refitted with {statistics.rows} rows in place of {own.rows}"
        return _refitted(posterior, every, note, settings, seed=seed, show_progress=show_progress)
    reason = _why_not_kept(posterior, limits or ConditionalSettings())
    if reason:
        every = [*posterior.donor_statistics, own]
        note = f"{own.config_id} promoted to donor and refitted, since {reason}"
        return _refitted(posterior, every, note, settings, seed=seed, show_progress=show_progress)
    return _noted(
        replace(posterior, target=None, calibration_rows=_NO_ROWS),
        f"{own.config_id} promoted to donor, its posterior's draws kept",
    )


def _why_not_kept(posterior: LatencyPosterior, limits: ConditionalSettings) -> str:
    """Return why the draws of a posterior are not to be kept; empty if they may be."""
    found = posterior.convergence()
    reason = found.reweighting.reason(limits.max_pareto_k, limits.min_effective) if found.reweighting else ""
    return reason or ("" if found.passed else f"its draws have {found}")


def _check_more_rows(posterior: LatencyPosterior, own: ConfigStatistics, more: ConfigStatistics) -> None:
    if posterior.likelihood != "gaussian":
        raise InputError(
            f"the posterior has {posterior.likelihood} errors, for which statistics are not sufficient; promote it with the rows it holds, "
            "or fit all donors anew from their rows"
        )
    if more.config_id != own.config_id or more.configuration != own.configuration:
        raise InputError(
            f"the statistics are of {more.config_id!r}{'' if more.config_id != own.config_id else ' with another configuration'}, the target "
            f"is {own.config_id!r}; give statistics of the same configuration"
        )
    if (more.feature_set, more.quantity, more.coef_names) != (own.feature_set, own.quantity, own.coef_names):
        raise InputError(
            f"the statistics are of feature set {more.feature_set!r} ({more.quantity}), the posterior of {own.feature_set!r} "
            f"({own.quantity}); make them again with the posterior's"
        )
    if more.rows < own.rows:
        raise InputError(
            f"the statistics hold {more.rows} rows, fewer than the {own.rows} that {own.config_id!r} was calibrated on; give those of all "
            "its rows. If these are rows recorded since, merge them with the others first"
        )


def forget(
    posterior: LatencyPosterior,
    donor: str,
    *,
    refit: bool = False,
    limits: ConditionalSettings | None = None,
    settings: SamplerSettings | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> LatencyPosterior:
    """Return the posterior without one of its donors, from the statistics of the others.

    Its draws are reweighted (`hfdtl_bayes.model.forgetting`), or all but the donor refitted where the weights degenerate;
    `LatencyPosterior.convergence` says which and why. Both are the posterior of a fresh fit without it.

    Parameters
    ----------
    posterior : LatencyPosterior
        A target it holds stays the target.
    donor : str
        config_id.
    refit : bool
        Refit in any case.
    limits : ConditionalSettings, optional
        When reweighted draws may be used.
    settings : SamplerSettings, optional
        Of a refit.
    seed, show_progress
        As in `fit`.

    Raises
    ------
    InputError
        If it is no donor of this posterior, the only one, or its target.
    """
    if donor not in posterior.donors:
        what = "the calibrated target" if donor == posterior.target else "not fitted here"
        hint = "; what its donors alone say is in the file it was calibrated from" if donor == posterior.target else ""
        raise InputError(f"{donor!r} is {what}, not a donor; donors are {', '.join(posterior.donors)}{hint}")
    if len(posterior.donors) == 1:
        raise InputError(f"{donor!r} is the only donor of this posterior; without it nothing is left to transfer from")
    statistics = [s for s in posterior.statistics if s.config_id != donor]
    reason = "a refit was asked for" if refit else _why_not_reweighted(posterior)
    if not reason:
        found = reweighted_without(posterior, donor, limits, seed=seed)
        reason = found.reason or _why_not_kept(found.posterior, limits or ConditionalSettings())
        if not reason:
            return _noted(found.posterior, f"donor {donor} forgotten")
    note = f"donor {donor} forgotten and the others refitted, since {reason}"
    left = _refitted(posterior, statistics, note, settings, target=posterior.target, seed=seed, show_progress=show_progress)
    return replace(left, calibration_rows=posterior.calibration_rows)


def _why_not_reweighted(posterior: LatencyPosterior) -> str:
    if posterior.rows or posterior.engine not in GAUSSIAN_ENGINES:
        return f"draws of engine {posterior.engine!r} are not of Gaussian errors on statistics"
    converged = posterior.convergence()
    return "" if converged.passed else f"its draws have {converged}"


def combine_donors(
    one: LatencyPosterior,
    other: LatencyPosterior,
    *,
    discounts: Mapping[str, float] | None = None,
    settings: SamplerSettings | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> LatencyPosterior:
    """Return the posterior of the donors of two fits together, refitted from their statistics.

    Two posteriors of different donors have the prior in common and cannot be multiplied; statistics can be fitted together.

    Parameters
    ----------
    one, other : LatencyPosterior
        Of donors alone, with Gaussian errors, the same features and the same priors. Discounts of their donors are kept.
    discounts : mapping of str to float, optional
        For how much of a donor some of them are to count.
    settings, seed, show_progress
        As in `fit`.

    Raises
    ------
    InputError
        If one holds a target or errors that are not Gaussian, if features, units or priors differ, a donor is in both, or the same
        configuration or the same rows are in both under two names.
    """
    for posterior in (one, other):
        if posterior.target is not None:
            raise InputError(
                f"one of the posteriors holds the target {posterior.target!r}; promote it first, or give the file of its donors alone"
            )
        if posterior.likelihood != "gaussian":
            raise InputError(
                f"the posterior of {', '.join(posterior.donors)} has {posterior.likelihood} errors, for which statistics are not "
                "sufficient; fit its donors with Gaussian errors, or all donors anew from their rows"
            )
    _check_same_features(one, other)
    _check_same_priors(one, other)
    both = sorted(set(one.donors) & set(other.donors))
    if both:
        raise InputError(
            f"donor(s) {', '.join(both)} are in both posteriors, and their rows would count twice; forget them in one of the two first"
        )
    _refuse_twins(other.statistics, one.statistics, "the other posterior")
    every = [*one.statistics, *other.statistics]
    priors = one.priors.with_discounts(dict(other.priors.discounts))
    priors = with_discounts_of_donors(priors, discounts or {}, [s.config_id for s in every])
    note = f"donors of two fits combined: {', '.join(one.donors)} and {', '.join(other.donors)}"
    return _refitted(one, every, note, settings, priors=priors, seed=seed, show_progress=show_progress)


def _check_same_features(one: LatencyPosterior, other: LatencyPosterior) -> None:
    a, b = one.feature_set, other.feature_set
    if (a.name, a.quantity) != (b.name, b.quantity):
        raise InputError(
            f"the posteriors have different features: {a.name} for {a.quantity} and {b.name} for {b.quantity}; fit both with the same"
        )
    cards = feature_card(a), feature_card(b)
    for name in {**cards[0], **cards[1]}:
        mine, theirs = (card.get(name, {}) for card in cards)
        differing = [field for field in {**mine, **theirs} if mine.get(field) != theirs.get(field)]
        if differing:
            field = differing[0]
            raise InputError(
                f"the posteriors have a different {field} of feature {name}: {mine.get(field)} and {theirs.get(field)}; fit both with the "
                "same features and priors"
            )
    changed = fingerprint_differences(fingerprint(a), fingerprint(b))
    if changed:
        raise InputError(f"the posteriors have different formulas of {', '.join(changed)}; fit both with the same")


def _check_same_priors(one: LatencyPosterior, other: LatencyPosterior) -> None:
    # Discounts are of donors, which differ anyway.
    a, b = (p.priors.discounts_of(()) for p in (one, other))
    if a != b:
        said = zip(a.sentences(one.feature_set), b.sentences(other.feature_set), strict=False)
        mine, theirs = next((pair for pair in said if pair[0] != pair[1]), ("there is drift", "there is none"))
        raise InputError(f'the posteriors have different priors: "{mine}" and "{theirs}"; fit both with the same')


def _refuse_twins(some: Sequence[ConfigStatistics], others: Sequence[ConfigStatistics], where: str) -> None:
    """Refuse a configuration, or rows, that others have under another name.

    Raises
    ------
    InputError
        Names both.
    """
    for own in some:
        for other in others:
            same_rows = own.rows == other.rows and own.total_s == other.total_s and own.log_scale_sum == other.log_scale_sum
            renamed = own.configuration.model_copy(update={"config_id": other.config_id})
            if renamed == other.configuration or same_rows:
                what = "the same rows" if same_rows else "the same configuration"
                raise InputError(
                    f"{own.config_id!r} is {what} as {other.config_id!r} of {where} under another name, and would pass for a second "
                    "configuration that behaves alike; leave one out, or merge the rows of both under one name"
                )


def _refitted(
    posterior: LatencyPosterior,
    statistics: Sequence[ConfigStatistics],
    note: str,
    settings: SamplerSettings | None,
    *,
    priors: PriorSettings | None = None,
    target: str | None = None,
    seed: int,
    show_progress: bool,
) -> LatencyPosterior:
    """Fit statistics, or the rows a posterior holds of the same configurations where its errors are not Gaussian."""
    rows = (
        []
        if posterior.likelihood == "gaussian"
        else [r for r in posterior.rows if r.config_id in {s.config_id for s in statistics}]
    )
    fitted = fit(
        statistics,
        posterior.feature_set,
        posterior.priors if priors is None else priors,
        settings,
        target=target,
        engine="rows" if rows else "exact",
        likelihood=posterior.likelihood,
        rows=rows,
        seed=seed,
        show_progress=show_progress,
    )
    return _noted(fitted, note)


def _noted(posterior: LatencyPosterior, note: str) -> LatencyPosterior:
    """Return the posterior with words on its origin, which its convergence shows; the one given stays as it is."""
    tree = posterior.tree.copy()
    attributes = tree["sample_stats"].attrs
    tree["sample_stats"].attrs = {**attributes, "note": "; ".join(filter(None, (attributes.get("note"), note)))}
    return replace(posterior, tree=tree)


# --- Discounts. ---

_VERSION_RULE = re.compile(r"version<(.*)")
_VERSION = re.compile(r"v?(\d+(?:\.\d+)*)")


def with_discounts_of_donors(priors: PriorSettings, discounts: Mapping[str, float], donors: Sequence[str]) -> PriorSettings:
    """Return the priors with discounts, all of which must be of donors.

    Raises
    ------
    InputError
        If one is not, or lies outside (0, 1].
    """
    priors = priors.with_discounts(discounts)
    unknown = [c for c in {**dict(priors.discounts), **discounts} if c not in donors]
    if unknown:
        raise InputError(
            f"discount of {', '.join(map(repr, unknown))}, not among the donors {', '.join(donors)}; give it for a donor"
        )
    return priors


def discounts_from(rules: Sequence[str], configurations: Sequence[ServingConfiguration]) -> dict[str, float]:
    """Return for how much of a donor each discounted one counts.

    Parameters
    ----------
    rules : sequence of str
        "ID=0.5" for one donor, "version<0.20=0.5" for all donors whose engine is of an older version than 0.20. Of several rules for
        one donor that with its ID holds, then the smallest number.
    configurations : sequence of ServingConfiguration
        Of the donors.

    Raises
    ------
    InputError
        If a rule cannot be read, is of no donor, its number lies outside (0, 1], or a donor's version is not known.
    """
    by_version: dict[str, float] = {}
    by_name: dict[str, float] = {}
    names = [c.config_id for c in configurations]
    for rule in rules:
        what, _, number = rule.rpartition("=")
        try:
            share = float(number)
        except ValueError:
            what = ""
        if not what:
            raise InputError(
                f"discount {rule!r} cannot be read; give DONOR=NUMBER or version<VERSION=NUMBER, for example old-h100=0.5 or version<0.20=0.5"
            )
        if not 0 < share <= 1:
            raise InputError(f"discount {rule!r}: the number must lie in (0, 1]; 1 counts the donor in full, 0.5 as half a donor")
        if what in names:
            if what in by_name:
                raise InputError(f"discount of {what!r} is given twice; give it once")
            by_name[what] = share
            continue
        older = _VERSION_RULE.fullmatch(what)
        if older is None:
            raise InputError(f"discount {rule!r}: {what!r} is not among the donors {', '.join(names)}")
        limit = _version(older[1], f"discount {rule!r}")
        matched = [c.config_id for c in configurations if _version(c.engine.version, f"donor {c.config_id!r}") < limit]
        if not matched:
            versions = ", ".join(f"{c.config_id} {c.engine.version}" for c in configurations)
            raise InputError(f"discount {rule!r}: no donor has an engine that old ({versions}); leave it out")
        by_version |= {c: min(share, by_version.get(c, 1.0)) for c in matched}
    return by_version | by_name


def _version(text: str, where: str) -> tuple[int, ...]:
    found = _VERSION.match(text.strip())
    if found is None:
        raise InputError(
            f"{where}: the engine version {text!r} cannot be compared; versions look like 0.19.1. Write it to the configuration, or discount "
            "donors by name"
        )
    numbers = [int(n) for n in found[1].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
