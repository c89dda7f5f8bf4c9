"""`discover`: which terms a latency model lacks, what they are worth, and what naming them means for BLIS and Go.

A feature set and a library of candidates go in, with the traces of some configurations: donors, or a single target. Out come the terms
that the traces show to be missing, each with the set of candidates it cannot be told from, its size, what it gains on held-out
rows, whether BLIS's basis holds it, and its expression in Go. How they are found: `term_search`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import nnls

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import Feature, FeatureSet, Level, Quantity, feature_set
from hfdtl_bayes.features.candidates import Candidate, as_candidate, candidate, candidate_names
from hfdtl_bayes.model import PriorSettings
from hfdtl_bayes.statistics import DEFAULT_BLOCK_LENGTH
from hfdtl_bayes.traces import TraceStore, time_blocks
from hfdtl_bayes.transfer.calibration import read_trace, require_enough_rows, usable_rows
from hfdtl_bayes.transfer.term_evidence import Model, Problem, Traces
from hfdtl_bayes.transfer.term_search import DiscoverySettings, Found, Search, search
from hfdtl_bayes.transfer.term_validation import STRETCH, Gain, together

FloatArray = NDArray[np.float64]
Recording = tuple[pd.DataFrame, ServingConfiguration]

_DRAWS = 400
_ROUNDING = 1e7
"""Condition index above which nothing but rounding error tells columns apart."""


@dataclass(frozen=True)
class TermSize:
    """How large a term is in one configuration.

    Attributes
    ----------
    mean, sd : float
        Of its coefficient there, given the scales at their mode, in the coefficient's unit.
    active : float
        Share of steps in which the term is not zero.
    share : float
        Mean over those steps of coefficient * column / observed.
    """

    mean: float
    sd: float
    active: float
    share: float


@dataclass(frozen=True)
class Term:
    """A term that the feature set lacks.

    Attributes
    ----------
    name, unit, formula, meaning, go : str
        Of the candidate; `unit` is that of the coefficient.
    one_of : tuple of (str, float)
        Candidates the rows cannot tell it from, itself first, with their posterior probability.
    log_bayes_factor : float
    mean, sd : float
        Of the population's coefficient, given the scales at their mode.
    sizes : dict of str to TermSize
        By config_id.
    gains : dict of str to Gain
        On held-out rows, beside all other terms; by config_id.
    blis : str
        The beta whose basis holds it; empty if none.
    """

    name: str
    unit: str
    formula: str
    meaning: str
    go: str
    one_of: tuple[tuple[str, float], ...]
    log_bayes_factor: float
    mean: float
    sd: float
    sizes: dict[str, TermSize]
    gains: dict[str, Gain]
    blis: str

    @property
    def gain(self) -> Gain:
        """Gain over all configurations."""
        return together(list(self.gains.values()))

    def sentence(self) -> str:
        """Return what was found, in words."""
        others = [f"{n} ({p:.0%})" for n, p in self.one_of[1:]]
        which = f", or in its place {', '.join(others)}: the rows cannot tell them apart" if others else ""
        shares = [s.share for s in self.sizes.values() if s.active > 0]
        size = (
            f"{100 * min(shares):+.1f} to {100 * max(shares):+.1f} % of the time of the steps that have it"
            if shares
            else "absent"
        )
        unit = "" if self.unit == "1" else f" {self.unit}"
        return (
            f"{self.name} = {self.formula}{which}. Coefficient {self.mean:.3g} +- {self.sd:.2g}{unit}, {size}; log Bayes factor "
            f"{self.log_bayes_factor:.1f}; held-out MAPE {self.gain.points:+.2f} +- {self.gain.points_se:.2f} points better, log "
            f"density {self.gain.nats:+.0f} +- {self.gain.nats_se:.0f}"
        )

    def consequence(self) -> str:
        """Return what it means for BLIS and Go, in words."""
        held = (
            f"BLIS's basis holds it or one close to it ({self.blis})"
            if self.blis
            else "BLIS's basis has no such term: its Go needs"
        )
        go = f"{' ' if not self.blis else '; in Go '}beta * {self.go}" if self.go else " one (no expression stated)"
        if abs(self.mean) < 2 * self.sd and len(self.sizes) > 1:
            said = "Its sign is not known of other configurations. Where positive"
        else:
            said = "If it is real" if self.mean > 0 else "Its coefficient is negative, the opposite of"
        means = f" {said}: {self.meaning}." if self.meaning else ""
        return f"{held}{go}.{means}"


@dataclass(frozen=True)
class Discovery:
    """What a feature set lacks on the traces of some configurations.

    Attributes
    ----------
    features, quantity : str
    config_ids : tuple of str
    rows : dict of str to int
    terms : tuple of Term
        Empty if nothing is missing that the candidates could tell.
    rejected : tuple of Found
        Probable on these rows, no better on held-out ones.
    not_tested : dict of str to str
        Candidates left out, with the reason.
    dropped : dict of str to str
        Terms found on the way and not needed, with the reason.
    tested : tuple of str
    probability : float
        Of something still missing among the candidates, beside the terms; even odds before.
    more : bool
        Whether the search ended for its limit, with something still missing.
    explained : float
        Share that the terms account for of all that the candidates together tell beyond the features.
    gains : dict of str to Gain
        Of all terms together, by config_id.
    blis_error, blis_error_before : float or None
        Mean relative difference between step times with the terms, or without, and the closest vector on BLIS's basis: what an export
        loses. None if the traces lack a column of that basis, or for delays.
    feature_set : FeatureSet
        The features with the terms, to fit.
    settings : DiscoverySettings
    """

    features: str
    quantity: str
    config_ids: tuple[str, ...]
    rows: dict[str, int]
    terms: tuple[Term, ...]
    rejected: tuple[Found, ...]
    not_tested: dict[str, str]
    dropped: dict[str, str]
    tested: tuple[str, ...]
    probability: float
    more: bool
    explained: float
    gains: dict[str, Gain]
    blis_error: float | None
    blis_error_before: float | None
    feature_set: FeatureSet
    settings: DiscoverySettings

    @property
    def gain(self) -> Gain | None:
        """Gain of all terms together; None without terms."""
        return together(list(self.gains.values())) if self.gains else None

    def sentences(self) -> tuple[str, ...]:
        """Return the outcome in words."""
        if self.gain is None:
            said = [f"nothing is missing from {self.features} that {len(self.tested)} candidates could tell on {self._where()}"]
            said[0] += f" (probability {self.probability:.2g})" if not self.rejected else ""
        else:
            g = self.gain
            said = [
                f"{self.features} lacks {len(self.terms)} term(s) on {self._where()}: held-out MAPE {g.mape_before:.2%} -> {g.mape:.2%}; "
                f"they account for {self.explained:.0%} of what all candidates tell"
            ]
        for t in self.terms:
            said += [t.sentence(), t.consequence()]
        if self.terms and self.blis_error is not None and self.blis_error_before is not None:
            said.append(
                f"closest vector on BLIS's basis: off by {self.blis_error:.2%} of the step time with the terms, "
                f"{self.blis_error_before:.2%} without: what an export loses"
            )
        said += [
            f"not named: {f.name} (log Bayes factor {f.log_bayes_factor:.1f}), which does not improve held-out rows: MAPE "
            f"{f.gain.points:+.2f} +- {f.gain.points_se:.2f} points better, log density {f.gain.nats:+.0f} +- {f.gain.nats_se:.0f}"
            for f in self.rejected
        ]
        said += [f"not needed: {n}; {reason}" for n, reason in self.dropped.items()]
        if self.more:
            said.append("more is missing than was named; allow more terms, or write the feature set anew")
        reasons: dict[str, list[str]] = {}
        for n, reason in self.not_tested.items():
            reasons.setdefault(reason, []).append(n)
        said += [f"not tested: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
        return tuple(said)

    def _where(self) -> str:
        return f"{len(self.config_ids)} configuration(s)" if len(self.config_ids) > 1 else f"{self.config_ids[0]!r}"

    def __str__(self) -> str:
        """Return the outcome in words, a line each."""
        return "\n".join(self.sentences())

    def as_dict(self) -> dict[str, Any]:
        """Return the result as plain data for JSON."""

        def gain(g: Gain) -> dict[str, Any]:
            return {**asdict(g), "points": g.points, "points_se": g.points_se}

        def found(f: Term | Found) -> dict[str, Any]:
            return {
                "name": f.name,
                "one_of": [{"name": n, "probability": p} for n, p in f.one_of],
                "log_bayes_factor": f.log_bayes_factor,
                "gain": gain(f.gain),
                "gain_by_config": {c: gain(g) for c, g in f.gains.items()},
            }

        def term(t: Term) -> dict[str, Any]:
            own = {k: getattr(t, k) for k in ("unit", "formula", "meaning", "go", "blis", "mean", "sd")}
            return {**found(t), **own, "by_config": {c: asdict(s) for c, s in t.sizes.items()}, "consequence": t.consequence()}

        return {
            **{k: getattr(self, k) for k in ("features", "quantity", "config_ids", "rows", "tested", "not_tested", "dropped")},
            **{k: getattr(self, k) for k in ("probability", "more", "explained", "blis_error", "blis_error_before")},
            "terms": [term(t) for t in self.terms],
            "rejected": [found(f) for f in self.rejected],
            "gain": None if self.gain is None else gain(self.gain),
            "sentences": self.sentences(),
            "settings": asdict(self.settings),
        }


def discover(
    traces: TraceStore | Sequence[Recording],
    configs: Sequence[str] | None = None,
    features: str | FeatureSet = "roofline",
    quantity: Quantity = "step_time",
    *,
    candidates: Sequence[str | Feature | Candidate] | None = None,
    block_length: int = DEFAULT_BLOCK_LENGTH,
    priors: PriorSettings | None = None,
    settings: DiscoverySettings | None = None,
    seed: int = 0,
) -> Discovery:
    """Find what is missing from a feature set on the traces of some configurations.

    Parameters
    ----------
    traces : TraceStore, or sequence of (DataFrame, ServingConfiguration)
        A store, or the usable rows of each configuration in time order.
    configs : sequence of str, optional
        config_ids to look at, all by default: donors together, or a single target.
    features : str or FeatureSet
        With a FeatureSet its quantity counts.
    quantity : {"step_time", "queue_delay", "api_delay"}
    candidates : sequence of str, Feature or Candidate, optional
        By name (`candidate_names`) or as they are; by default all that are registered for the quantity.
    block_length : int
        Steps per drift block.
    priors : PriorSettings, optional
    settings : DiscoverySettings, optional
    seed : int
        Of the draws that sizes and the share `explained` are computed from; the choice of terms depends on it only where projection
        drops one by a hair.

    Returns
    -------
    Discovery

    Raises
    ------
    InputError
        If no configuration is left, one is named twice, a trace has too few rows to hold some out, or a candidate asked for by name
        cannot be computed from the columns there are.
    UnknownNameError
        If a configuration, the feature set or a candidate is unknown.
    """
    chosen = feature_set(features, quantity) if isinstance(features, str) else features
    settings = settings or DiscoverySettings()
    asked = candidates is not None
    library = _library(candidates if candidates is not None else candidate_names(chosen.quantity), chosen.quantity)
    recordings = _recordings(traces, configs, chosen)
    _require_blocks(recordings, block_length)
    usable, not_tested = usable_candidates(library, chosen, recordings, asked=asked)
    columns = [*chosen.features, *(c.feature for c in usable)]
    read = [Traces.of(f, c, columns, block_length) for f, c in recordings]
    problem = Problem.of(chosen, usable, read, priors)
    found = search(problem, settings, seed=seed)
    not_tested |= {n: _collinear(v) for n, v in found.collinear.items()}
    by_name = {c.name: c for c in usable}
    terms = [f.name for f in found.terms]
    extended = chosen
    if terms:
        own = chosen.features + tuple(by_name[t].feature for t in terms)
        extended = replace(chosen, name="+".join([chosen.name, *terms]), features=own)
    return Discovery(
        features=chosen.name,
        quantity=chosen.quantity,
        config_ids=tuple(c.config_id for _, c in recordings),
        rows={c.config_id: len(f) for f, c in recordings},
        terms=_terms(problem, found, by_name, seed),
        rejected=found.rejected,
        not_tested=not_tested,
        dropped=found.dropped,
        tested=found.tested,
        probability=found.probability,
        more=found.more,
        explained=found.explained,
        gains=found.gains,
        blis_error=_blis_error(problem, found.final, seed) if terms else None,
        blis_error_before=_blis_error(problem, found.base, seed) if terms else None,
        feature_set=extended,
        settings=settings,
    )


def _collinear(index: float) -> str:
    said = f"{index:.0f}" if index < _ROUNDING else "beyond rounding error"
    return f"a combination of the features in these rows (condition index {said})"


def _library(asked: Sequence[str | Feature | Candidate], quantity: Quantity) -> list[Candidate]:
    found = []
    for a in asked:
        if isinstance(a, str):
            found.append(candidate(a, quantity))
        else:
            found.append(as_candidate(a, quantity=quantity) if isinstance(a, Feature) else a)
    if not found:
        raise InputError(f"no candidate to test; known for {quantity} are {', '.join(candidate_names(quantity))}")
    names = [c.name for c in found]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise InputError(f"candidate(s) given twice: {', '.join(repeated)}; give each once")
    other = [c.name for c in found if c.quantity != quantity]
    if other:
        raise InputError(
            f"candidate(s) {', '.join(other)} explain another quantity than {quantity}; choose among {', '.join(candidate_names(quantity))}"
        )
    return found


def _recordings(traces: TraceStore | Sequence[Recording], configs: Sequence[str] | None, features: FeatureSet) -> list[Recording]:
    if isinstance(traces, TraceStore):
        wanted = list(traces.config_ids if configs is None else configs)
        repeated = sorted({c for c in wanted if wanted.count(c) > 1})
        if repeated:
            raise InputError(f"configuration(s) named twice: {', '.join(repeated)}; name each once")
        read = [(traces.configuration(c), c) for c in wanted]
        found = [(usable_rows(read_trace(traces, i, features.quantity).frame, c, features), c) for c, i in read]
    else:
        ids = [c.config_id for _, c in traces]
        repeated = sorted({i for i in ids if ids.count(i) > 1})
        if repeated:
            raise InputError(f"configuration(s) given twice: {', '.join(repeated)}; give the rows of each once")
        unknown = sorted(set(configs or ()) - set(ids))
        if unknown:
            raise InputError(f"no rows of {', '.join(unknown)} are given; there are {', '.join(ids)}")
        found = [(f, c) for f, c in traces if configs is None or c.config_id in configs]
    if not found:
        raise InputError("no configuration to look at; name at least one")
    for frame, configuration in found:
        require_enough_rows(frame, configuration, features)
    return found


def _require_blocks(recordings: Sequence[Recording], block_length: int) -> None:
    """Refuse traces of which nothing would be left to judge a term by."""
    # Two stretches are the fewest whose scatter says anything; a configuration alone is also calibrated on two.
    needed = STRETCH * (4 if len(recordings) == 1 else 3)
    for frame, configuration in recordings:
        blocks = int(time_blocks(frame, block_length)[-1]) + 1
        if blocks < needed:
            raise InputError(
                f"configuration {configuration.config_id!r} has {len(frame)} usable rows in {blocks} time blocks, too few to hold some out "
                f"and judge a term by them; give at least {needed} blocks of {block_length}, or leave it out"
            )


def usable_candidates(
    library: Sequence[Candidate], features: FeatureSet, recordings: Sequence[Recording], *, asked: bool = False
) -> tuple[list[Candidate], dict[str, str]]:
    """Split candidates into those that can be tested and those that cannot, with the reason.

    Raises
    ------
    InputError
        If a candidate is not finite somewhere, or lacks a column and was `asked` for by name.
    """
    own = {f.name for f in features.features}
    kept: list[Candidate] = []
    reasons: dict[str, str] = {}
    for c in library:
        f = c.feature
        lacking = {i.config_id: [n for n in f.columns if n not in frame.columns] for frame, i in recordings}
        lacking = {i: m for i, m in lacking.items() if m}
        if c.name in own:
            reasons[c.name] = f"a feature of {features.name} already"
        elif lacking:
            config, columns = next(iter(lacking.items()))
            reason = f"needs the column(s) {', '.join(columns)}, which the trace of {config!r} does not have"
            if asked:
                raise InputError(f"candidate {c.name!r} {reason}; record it, or do not ask for this candidate")
            reasons[c.name] = reason
        else:
            why = _unusable(f, recordings)
            if why is None:
                kept.append(c)
            else:
                reasons[c.name] = why
    return kept, reasons


def _unusable(feature: Feature, recordings: Sequence[Recording]) -> str | None:
    """Return why rows tell nothing of a feature; None if they may."""
    values = []
    for frame, configuration in recordings:
        rows = None if feature.level is Level.CONFIG else frame
        column = np.atleast_1d(np.asarray(feature.compute(rows, configuration), dtype=float)) * feature.reference
        if not np.isfinite(column).all():
            raise InputError(
                f"candidate {feature.name!r} is not finite in {int((~np.isfinite(column)).sum())} row(s) of "
                f"{configuration.config_id!r}: {feature.formula}; check its formula and the columns {', '.join(feature.columns)}"
            )
        values.append(column)
    if not any(v.any() for v in values):
        return "zero in every row of these traces"
    if feature.level is Level.CONFIG and len(recordings) < 3:
        return f"constant within a configuration: {len(recordings)} configuration(s) cannot tell it from the constant"
    return None


def _terms(problem: Problem, found: Search, candidates: dict[str, Candidate], seed: int) -> tuple[Term, ...]:
    """Describe the terms of a search by the coefficients at the mode of the scales."""
    if not found.terms:
        return ()
    final = found.final
    features = final.density.feature_set
    order = [f.name for f in (*features.base, *features.config, *features.residual)]
    mean, covariance = (v[0] for v in final.density.population(final.mode[None]))
    theta = final.density.draw(np.repeat(final.mode[None], _DRAWS, axis=0), np.random.default_rng(seed))["theta"]
    described = []
    for f in found.terms:
        c = candidates[f.name]
        size, place = c.feature.reference, order.index(f.name)
        centre, sd = float(mean[place]) * size, float(np.sqrt(covariance[place, place])) * size
        sizes = {}
        for i, t in enumerate(problem.traces):
            column = t.column(problem.candidate(f.name).feature)
            own, spread = centre, sd
            if f.name in features.coef_names:
                drawn = theta[:, i, features.coef_names.index(f.name)] * size
                own, spread = float(drawn.mean()), float(drawn.std())
            there = column != 0
            share = float(np.mean(own * column[there] / problem.observed(t)[there])) if there.any() else 0.0
            sizes[t.configuration.config_id] = TermSize(own, spread, float(there.mean()), share)
        described.append(
            Term(
                name=f.name,
                unit=c.feature.coefficient_unit,
                formula=c.feature.formula,
                meaning=c.meaning,
                go=c.go,
                one_of=f.one_of,
                log_bayes_factor=f.log_bayes_factor,
                mean=centre,
                sd=sd,
                sizes=sizes,
                gains=f.gains,
                blis=c.blis,
            )
        )
    return tuple(described)


def _blis_error(problem: Problem, fitted: Model, seed: int) -> float | None:
    """Return the mean relative difference between fitted step times and the closest non-negative vector on BLIS's basis."""
    basis = feature_set("blis-physics")
    frames = [t.frame for t in problem.traces]
    if problem.features.quantity != "step_time" or any(c not in f.columns for f in frames for c in basis.columns):
        return None
    theta = fitted.density.draw(np.repeat(fitted.mode[None], _DRAWS, axis=0), np.random.default_rng(seed))["theta"].mean(axis=0)
    errors = []
    for t, own in zip(problem.traces, theta, strict=True):
        predicted = fitted.density.feature_set.design(t.frame, t.configuration) @ own
        kept = predicted > 0
        design = basis.design(t.frame[kept], t.configuration) / predicted[kept, None]
        triangle = np.linalg.qr(np.column_stack([design, np.ones(int(kept.sum()))]), mode="r")
        length = np.maximum(np.linalg.norm(triangle[:, :-1], axis=0), 1e-300)
        closest = nnls(triangle[:, :-1] / length, triangle[:, -1])[0] / length
        errors.append(float(np.mean(np.abs(design @ closest - 1.0))))
    return float(np.mean(errors))
