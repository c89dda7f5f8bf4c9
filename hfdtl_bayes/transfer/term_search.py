"""The search for terms a model lacks: forward by Bayes factors, checked on held-out rows, swapped and pruned to what is needed.

At each step every candidate not excluded has prior probability 1 / J, and "one of them is missing" is weighed against "none is":
the mean of their Bayes factors against a limit B. While nothing is missing that mean has expectation 1 under the model and its
prior, whatever the number of candidates and however they correlate, so by Markov's inequality it passes B with probability at most
1 / B: the limit is one on the whole look, not on a single candidate. (An e-value; Vovk & Wang 2021, doi:10.1214/20-AOS2020. With
the scales at their mode it is so approximately.) Candidates that rows cannot tell apart share their posterior probability: the
smallest set that holds 95 % of it is what is named, "one of these" (credible sets as of Wang et al. 2020, doi:10.1111/rssb.12388).

Each term found must also make held-out rows more probable (`term_validation`). A later term may explain an earlier one better:
each is then swapped where another in its place is more probable by B. At last terms are dropped that are not needed: by evidence, on
held-out rows, or by projection. For that, draws of a reference model with all candidates are projected to the terms kept; what
share of the discrepancy between reference and features alone they account for is also reported (Piironen, Paasiniemi & Vehtari 2020,
doi:10.1214/20-EJS1711).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import Level
from hfdtl_bayes.model import ExactDensity
from hfdtl_bayes.statistics import ConfigStatistics
from hfdtl_bayes.transfer.term_evidence import Model, Problem, chosen_statistics, model, overlap, screen, weighed_rows
from hfdtl_bayes.transfer.term_validation import Gain, held_out_gains, together

FloatArray = NDArray[np.float64]

_DRAWS = 64
_DOUBT = 3.0
"""Nats by which screening near the limit may understate: candidates are refined from there on."""


@dataclass(frozen=True)
class DiscoverySettings:
    """Thresholds of the search, each with its reason."""

    max_terms: int = 3
    """Terms named at most: a model that lacks more is better written anew than patched."""
    bayes_factor: float = 20.0
    """What the mean Bayes factor of all candidates must exceed: something is then named where nothing is missing in at most one look of
    twenty."""
    set_probability: float = 0.95
    """Posterior probability that the set named as "one of these" holds."""
    same: float = 0.98
    """Correlation, of what the features leave of two candidates, from which rows cannot tell them apart: the two belong to one set."""
    refined: int = 4
    """Candidates whose scales are found anew at each step; the others keep the screening's value."""
    calibration_rows: int = 400
    """Rows of a left-out configuration that its coefficients are updated on: enough that held-out rows tell of the term and not of
    how uncertain everything else still is."""
    improvement: float = 1.0
    """Standard errors by which the log density or the MAPE of held-out blocks must improve: more than its uncertainty. The Bayes factor
    guards against naming something where nothing is; this guards against what holds on the fitted rows only."""
    collinear: float = 1e-6
    """Share of a candidate's square left by the features below which the two are one: a condition index of 1000."""
    not_needed: float = 0.01
    """Share of what the terms explain of the reference model that a term must account for."""
    max_rejected: int = 3
    """Candidates that may fail on held-out rows before the search gives up."""

    def __post_init__(self) -> None:
        """Refuse thresholds that cannot be met or mean nothing.

        Raises
        ------
        InputError
            Says which and what is accepted.
        """
        for name, low, high in (
            ("max_terms", 1, 10), ("bayes_factor", 1, np.inf), ("set_probability", 0.5, 1), ("same", 0, 1), ("refined", 1, np.inf),
            ("calibration_rows", 1, np.inf), ("improvement", 0, np.inf), ("collinear", 0, 1), ("not_needed", 0, 1),
            ("max_rejected", 0, np.inf),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"{name} of a discovery must lie between {low:g} and {high:g}, found {value}")


@dataclass(frozen=True)
class Found:
    """A term, or a set of which one is, and what speaks for it.

    Attributes
    ----------
    name : str
        The most probable.
    one_of : tuple of (str, float)
        Candidates that the rows cannot tell from it, with their posterior probability given that one is missing; itself first.
    log_bayes_factor : float
        Of "one of the candidates" against "none", at the step at which it was found.
    gains : dict of str to Gain
        By config_id, on held-out rows.
    """

    name: str
    one_of: tuple[tuple[str, float], ...]
    log_bayes_factor: float
    gains: dict[str, Gain]

    @property
    def gain(self) -> Gain:
        """Gain over all configurations."""
        return together(list(self.gains.values()))


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes
    ----------
    terms : tuple of Found
        Accepted, each with its gain beside all the others.
    rejected : tuple of Found
        Probable in these rows, not better on held-out ones.
    dropped : dict of str to str
        Terms found on the way and not needed in the end, with the reason.
    collinear : dict of str to float
        Candidates that are a combination of features: their condition index.
    probability : float
        Of "one of the candidates is missing" at the last look, prior odds even.
    more : bool
        Whether the search ended for its limit, with something still missing.
    explained : float
        Share of the discrepancy between a model with all candidates and the features alone that the terms account for; NaN where the
        two do not differ.
    gains : dict of str to Gain
        Of all terms together against none.
    base, final : Model
        Without and with the terms, on the row scale of the features with the terms.
    tested : tuple of str
    statistics : tuple of ConfigStatistics
    """

    terms: tuple[Found, ...]
    rejected: tuple[Found, ...]
    dropped: dict[str, str]
    collinear: dict[str, float]
    probability: float
    more: bool
    explained: float
    gains: dict[str, Gain]
    base: Model
    final: Model
    tested: tuple[str, ...]
    statistics: tuple[ConfigStatistics, ...]


@dataclass(frozen=True)
class _Look:
    names: tuple[str, ...]
    log_bayes_factors: FloatArray
    correlation: FloatArray

    @property
    def log_mean(self) -> float:
        """Log of the mean Bayes factor."""
        return float(np.logaddexp.reduce(self.log_bayes_factors) - np.log(len(self.names))) if self.names else -np.inf

    def one_of(self, settings: DiscoverySettings) -> tuple[tuple[str, float], ...]:
        """Return the credible set with what rows cannot tell from its first, most probable first."""
        weight = np.exp(self.log_bayes_factors - np.logaddexp.reduce(self.log_bayes_factors))
        order = np.argsort(-weight, kind="stable")
        count = int(np.searchsorted(np.cumsum(weight[order]), settings.set_probability)) + 1
        same = np.abs(self.correlation[order[0]]) > settings.same
        return tuple((self.names[i], float(weight[i])) for k, i in enumerate(order) if k < count or same[i])


def _look(
    problem: Problem, full: Sequence[ConfigStatistics], base: Model, names: Sequence[str], settings: DiscoverySettings
) -> tuple[_Look, dict[str, float]]:
    """Weigh candidates beside a model; returns also those that are combinations of its features, with their condition index."""
    by_row = [n for n in names if problem.candidate(n).feature.level is not Level.CONFIG]
    rows = overlap(full, base, by_row)
    collinear = {n: float(1 / np.sqrt(max(v, 1e-30))) for n, v in zip(by_row, rows.left, strict=True) if v < settings.collinear}
    kept = [n for n in names if n not in collinear]
    factors = screen(problem, full, base, kept)
    if kept and np.logaddexp.reduce(factors) - np.log(len(kept)) > np.log(settings.bayes_factor) - _DOUBT:
        for i in np.argsort(-factors)[: settings.refined]:
            factors[i] = model(problem, full, [*base.terms, kept[i]]).log_evidence - base.log_evidence
    correlation = np.eye(len(kept))
    place = [i for i, n in enumerate(kept) if n in by_row]
    inside = [by_row.index(kept[i]) for i in place]
    correlation[np.ix_(place, place)] = rows.correlation[np.ix_(inside, inside)]
    return _Look(tuple(kept), factors, correlation), collinear


def _swapped(
    problem: Problem, full: Sequence[ConfigStatistics], found: list[Found], names: Sequence[str], settings: DiscoverySettings
) -> list[Found]:
    """Replace terms for which another candidate stands more probably, given the others found."""
    terms = [f.name for f in found]
    value = model(problem, full, terms).log_evidence
    for i in range(len(found) - 1):
        rest = [t for t in terms if t != terms[i]]
        without = model(problem, full, rest)
        look, _ = _look(problem, full, without, [n for n in names if n not in rest], settings)
        best = look.one_of(settings)
        better = float(look.log_bayes_factors.max()) + without.log_evidence - value
        if best[0][0] != terms[i] and better > np.log(settings.bayes_factor):
            terms[i], value = best[0][0], value + better
            found[i] = Found(terms[i], best, look.log_mean, {})
    return found


def search(problem: Problem, settings: DiscoverySettings, *, seed: int = 0) -> Search:
    """Search for the terms that a problem's features lack.

    Parameters
    ----------
    problem : Problem
    settings : DiscoverySettings
    seed : int
        Of the draws that are projected.
    """
    names = [c.name for c in problem.candidates]
    found: list[Found] = []
    rejected: list[Found] = []
    collinear: dict[str, float] = {}
    excluded: set[str] = set()
    full = problem.statistics()
    current = model(problem, full, ())
    limit = float(np.log(settings.bayes_factor))
    more, log_mean = False, -np.inf
    while True:
        terms = [f.name for f in found]
        look, dependent = _look(problem, full, current, [n for n in names if n not in excluded and n not in terms], settings)
        collinear |= {n: v for n, v in dependent.items() if not found}
        log_mean = look.log_mean
        if log_mean <= limit:
            break
        if len(found) == settings.max_terms or len(rejected) > settings.max_rejected:
            more = len(found) == settings.max_terms
            break
        one_of = look.one_of(settings)
        name = one_of[0][0]
        gains = held_out_gains(problem, full, terms, [*terms, name], settings.calibration_rows)
        new = Found(name, one_of, log_mean, gains)
        if not new.gain.improves(settings.improvement):
            rejected.append(new)
            excluded |= {n for n, _ in one_of}
            continue
        found.append(new)
        # What failed may help beside the new term.
        excluded.clear()
        full = problem.statistics([f.name for f in found])
        found = _swapped(problem, full, found, [n for n in names if n not in excluded], settings)
        current = model(problem, full, [f.name for f in found])
    found, dropped = _pruned(problem, full, found, settings, seed)
    terms = [f.name for f in found]
    if not found:
        full = problem.statistics()
    base, final = model(problem, full, ()), model(problem, full, terms)
    return Search(
        terms=tuple(found),
        rejected=tuple({f.name: f for f in rejected if f.name not in {*terms, *dropped}}.values()),
        dropped=dropped,
        collinear=collinear,
        probability=float(1 / (1 + np.exp(-np.clip(log_mean, -700, 700)))),
        more=more,
        explained=explained_share(problem, full, final, [n for n in names if n not in collinear], seed) if found else 0.0,
        gains=held_out_gains(problem, full, (), terms, settings.calibration_rows) if found else {},
        base=base,
        final=final,
        tested=tuple(n for n in names if n not in collinear),
        statistics=full,
    )


def _pruned(
    problem: Problem, full: Sequence[ConfigStatistics], found: list[Found], settings: DiscoverySettings, seed: int
) -> tuple[list[Found], dict[str, str]]:
    """Drop terms that the others make needless, the least needed first; the gains of those kept are beside all others."""
    dropped: dict[str, str] = {}
    names = [c.name for c in problem.candidates]
    while found:
        terms = [f.name for f in found]
        kept = model(problem, full, terms)
        share = explained_share(problem, full, kept, names, seed) if len(found) > 1 else np.nan
        checked, reasons = [], {}
        for f in found:
            rest = [t for t in terms if t != f.name]
            if not rest and not dropped and f.gains:
                # The step that found it was this very comparison, on the scale of the features alone.
                checked.append((np.inf, f))
                continue
            without = model(problem, full, rest)
            factor = kept.log_evidence - without.log_evidence
            new = Found(
                f.name, f.one_of, f.log_bayes_factor, held_out_gains(problem, full, rest, terms, settings.calibration_rows)
            )
            lost = 1.0 - explained_share(problem, full, without, names, seed) / share if share > 0 else 1.0
            beside = f"beside {', '.join(rest)} " if rest else ""
            if factor <= np.log(settings.bayes_factor):
                reasons[f.name] = f"{beside}its Bayes factor is {np.exp(factor):.3g}"
            elif not new.gain.improves(settings.improvement):
                reasons[f.name] = f"{beside}it does not improve held-out rows"
            elif lost < settings.not_needed:
                reasons[f.name] = f"projection: {', '.join(rest)} account for all but {lost:.1%} of what all terms explain"
            checked.append((factor, new))
        if not reasons:
            return [f for _, f in checked], dropped
        worst = min((c for c in checked if c[1].name in reasons), key=lambda c: c[0])[1].name
        dropped[worst] = reasons[worst]
        found = [f for f in found if f.name != worst]
    return [], dropped


def explained_share(
    problem: Problem, full: Sequence[ConfigStatistics], kept: Model, names: Sequence[str], seed: int = 0
) -> float:
    """Return the share of the discrepancy between a reference with all candidates and the features alone that a model accounts for.

    Draws of the reference's coefficients given the scales are projected one by one: with Gaussian errors of the same covariance
    the model closest in Kullback-Leibler divergence has the least-squares fit to the reference's means, and the divergence is half the
    squared distance left, in units of the error. 1 - (mean divergence of the model) / (that of the features alone).
    """
    others = [n for n in names if n not in kept.terms and problem.candidate(n).feature.level is not Level.CONFIG]
    reference = problem.extended([*kept.terms, *others])
    statistics = [chosen_statistics(s, reference) for s in full]
    density = ExactDensity(statistics, reference, problem.priors)
    added = density.count_pooled - kept.density.count_pooled
    at = np.insert(kept.mode, kept.density.count_pooled, np.full(added, np.log(problem.priors.deviation.gamma_median)))
    theta = density.draw(np.repeat(at[None], _DRAWS, axis=0), np.random.default_rng(seed))["theta"]
    sigma, omega = kept.errors
    left = np.zeros(2)
    for c, s in enumerate(statistics):
        rows = weighed_rows(s, reference, sigma[c], omega[c])
        means = rows @ theta[:, c].T
        for i, inside in enumerate((problem.features.coef_names, kept.density.feature_set.coef_names)):
            own = rows[:, [s.coef_names.index(n) for n in inside]]
            length = np.linalg.norm(own, axis=0)
            basis, values, _ = np.linalg.svd(own[:, length > 0] / length[length > 0], full_matrices=False)
            basis = basis[:, values > 1e-9 * values[0]]
            left[i] += float(((means - basis @ (basis.T @ means)) ** 2).sum())
    return float(1.0 - left[1] / left[0]) if left[0] > 0 else float("nan")
