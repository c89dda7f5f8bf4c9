"""The search for donors: what subsets of candidates are judged by, and which of them are the best.

All subsets of a size are judged where they are few enough; otherwise the best is sought greedily, then one donor at a time is exchanged
while it helps (Fedorov's exchange, as in the design of experiments), which need not find the best of all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import FeatureSet, operating_points
from hfdtl_bayes.model import ExactDensity, PriorSettings, SamplerSettings, fit
from hfdtl_bayes.model.exact import POPULATIONS
from hfdtl_bayes.statistics import DEFAULT_BLOCK_LENGTH, ConfigStatistics, statistics_from_rows
from hfdtl_bayes.transfer.donor_information import DonorInformation, DonorScales, TargetTraffic

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_SMALLEST_ERROR = 1e-6
"""Relative error below which a prediction is as good as exact."""


@dataclass(frozen=True)
class DonorChoiceSettings:
    """How donors are ranked."""

    scales: Literal["posterior", "prior"] = "posterior"
    """Where tau, the share of hardware, noise and drift come from: a fit of all candidates, some seconds, or the middles of their
    prior ranges, for which nothing is fitted."""
    checked: bool = True
    """Whether the error the model expects is multiplied by how far it was off, for the same subset, on candidates outside it: observed over
    expected error there, the geometric mean. Without it the ranking says what each donor
    informs, not whether it misleads: on GPU steps that ranked subsets the wrong way round for many targets at once (benchmarks/
    donor_choice.py)."""
    scale_draws: int = 8
    """Posterior draws of the scales: subsets rank alike with more."""
    traffic_rows: int = 60
    """Most rows of a target's traffic to average over, evenly spread."""
    max_subsets: int = 20_000
    """Beyond so many subsets of one size, the best is searched greedily and by exchanges."""
    kept: int = 20
    """Subsets of each size in the result."""
    hypothetical_rows: int = 1000
    """Rows that a candidate not yet traced is taken to yield, drawn from its operating points in time blocks of the usual length."""
    judged_rows: int = 1000
    """Most rows of a target's trace, where there is one, to compare a refit with."""
    sampler: SamplerSettings = field(default_factory=lambda: SamplerSettings(draws=100, tune=100))
    """Of the fit of all candidates, which only the scales are read from, and of refits, of which only means are."""

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing.

        Raises
        ------
        InputError
            Names the setting, what was found and what is accepted.
        """
        if self.scales not in ("posterior", "prior"):
            raise InputError(f"scales must be 'posterior' or 'prior', found {self.scales!r}")
        for name in ("scale_draws", "traffic_rows", "max_subsets", "kept", "hypothetical_rows", "judged_rows"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, found {getattr(self, name)}")


@dataclass(frozen=True)
class RankingProblem:
    """Everything a ranking is computed from.

    Attributes
    ----------
    statistics : tuple of ConfigStatistics
        Of the candidates, then of hypothetical donors.
    information : DonorInformation
    targets : tuple of TargetTraffic
    witnesses : tuple of TargetTraffic
        The candidates, which check the subsets that they are not in.
    checked : bool
        As of `DonorChoiceSettings`.
    """

    statistics: tuple[ConfigStatistics, ...]
    information: DonorInformation
    targets: tuple[TargetTraffic, ...]
    witnesses: tuple[TargetTraffic, ...]
    checked: bool = True

    @property
    def traced(self) -> int:
        """Number of candidates, those with statistics of their own."""
        return len(self.witnesses)

    def errors(self, subsets: Sequence[Sequence[int]]) -> FloatArray:
        """Return the errors that the model expects of subsets, given as indices of candidates, shape (M, T)."""
        return self.information.errors(self.masks(subsets), self.targets)

    def ratios(self, subsets: Sequence[Sequence[int]]) -> FloatArray:
        """Return how many times as large as expected the error was on the candidates outside each subset, shape (M,).

        The geometric mean over them and one candidate more of ratio 1, so that a single one does not say everything. Geometric, since
        one that is unlike all others counts against every subset without it.
        """
        if not self.checked:
            return np.ones(len(subsets))
        observed, expected = self.information.observed(self.masks(subsets), self.witnesses)
        logs = np.log(np.maximum(observed, _SMALLEST_ERROR) / expected)
        return np.asarray(np.exp(np.nansum(logs, axis=1) / (np.isfinite(logs).sum(axis=1) + 1)))

    def scores(self, subsets: Sequence[Sequence[int]]) -> FloatArray:
        """Return what subsets are ranked by, shape (M,): the expected error, averaged over targets and checked."""
        return np.asarray(self.errors(subsets).mean(axis=1) * self.ratios(subsets))

    def masks(self, subsets: Sequence[Sequence[int]]) -> BoolArray:
        """Return subsets as a table of which candidates they hold, shape (M, C)."""
        chosen = np.zeros((len(subsets), len(self.statistics)), dtype=bool)
        for row, subset in zip(chosen, subsets, strict=True):
            row[list(subset)] = True
        return chosen


def ranking_problem(
    statistics: Sequence[ConfigStatistics],
    targets: Sequence[ServingConfiguration],
    *,
    features: FeatureSet,
    priors: PriorSettings,
    settings: DonorChoiceSettings,
    hypothetical: Sequence[ServingConfiguration] = (),
    traffic: Mapping[str, pd.DataFrame] | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> RankingProblem:
    """Return what any subset of candidates is judged by; parameters as of `rank_donors`, of the candidates only their statistics.

    Raises
    ------
    InputError
        If a target's traffic has no rows, or a feature is not defined for a target.
    """
    scales, populations = _scales(statistics, features, priors, settings, seed, show_progress)
    density = ExactDensity(statistics, features, priors)
    x = density.join(scales.tau, scales.share, scales.sigma, scales.omega, populations)

    def expected(configuration: ServingConfiguration) -> FloatArray:
        return np.asarray(density.predictive(x, configuration)[0].mean(axis=0))

    def relative(own: ServingConfiguration, frame: pd.DataFrame, coefficients: FloatArray) -> TargetTraffic:
        frame = frame.iloc[np.unique(np.linspace(0, len(frame) - 1, settings.traffic_rows).round().astype(int))]
        design = features.design(frame, own)
        mean = np.maximum(design @ coefficients, features.noise_floor(own))
        return TargetTraffic(own, design / mean[:, None])

    wanted = []
    for own in targets:
        frame = (traffic or {}).get(own.config_id)
        frame = operating_points(own) if frame is None else frame
        if frame.empty:
            raise InputError(
                f"the traffic of target {own.config_id!r} has no rows; give batches, or leave it out for operating points"
            )
        wanted.append(relative(own, frame, expected(own)))
    witnesses = tuple(
        relative(s.configuration, operating_points(s.configuration), own)
        for s, own in zip(statistics, density.info.reference, strict=True)
    )
    imagined = [_imagined(h, expected(h), features, settings, seed) for h in hypothetical]
    if imagined:
        # A candidate nobody has measured is as noisy as the typical one.
        typical = [np.repeat(p[:, None], len(imagined), axis=1) for p in (populations[0], populations[2])]
        sigma, omega = (np.hstack([known, new]) for known, new in zip((scales.sigma, scales.omega), typical, strict=True))
        scales = DonorScales(scales.tau, scales.share, sigma, omega)
    every = (*statistics, *imagined)
    information = DonorInformation(every, features, priors, scales)
    return RankingProblem(every, information, tuple(wanted), witnesses, settings.checked)


def _imagined(
    configuration: ServingConfiguration, coefficients: FloatArray, features: FeatureSet, settings: DonorChoiceSettings, seed: int
) -> ConfigStatistics:
    """Return statistics that a donor not yet traced would yield; of the times only what is expected, which no covariance depends on."""
    rng = np.random.default_rng([seed, 21])
    frame = operating_points(configuration)
    frame = frame.iloc[rng.integers(0, len(frame), settings.hypothetical_rows)]
    frame = frame.assign(step_id=np.arange(len(frame)), regime="hypothetical")
    design = features.design(frame, configuration)
    times = np.maximum(design @ coefficients, features.noise_floor(configuration))
    return statistics_from_rows(
        frame.assign(step_time_s=times), configuration, features, block_length=DEFAULT_BLOCK_LENGTH, pilot=coefficients
    )


def _scales(
    statistics: Sequence[ConfigStatistics],
    features: FeatureSet,
    priors: PriorSettings,
    settings: DonorChoiceSettings,
    seed: int,
    show_progress: bool,
) -> tuple[DonorScales, list[FloatArray]]:
    """Return scales to judge at, and the typical noise and drift with their spreads, shape (S,) each."""
    count, k = len(statistics), len(features.pooled)
    if settings.scales == "prior":
        ranges = (priors.noise, priors.noise_spread, priors.drift, priors.drift_spread)
        medians = [np.exp([r.log_mean]) if r else np.zeros(1) for r in ranges]
        tau = np.full((1, k), priors.deviation.gamma_median)
        sigma, omega = (np.full((1, count), m[0]) for m in (medians[0], medians[2]))
        return DonorScales(tau, np.array([0.5]), sigma, omega), medians
    fitted = fit(statistics, features, priors, settings.sampler, seed=seed, show_progress=show_progress)
    total = len(fitted.draws_of("tau"))
    at = np.unique(np.linspace(0, total - 1, min(settings.scale_draws, total)).round().astype(int))
    tau, share, sigma, omega = (fitted.draws_of(n)[at] for n in ("tau", "hardware_share", "sigma", "omega"))
    populations = [fitted.draws_of(n)[at] for n in POPULATIONS]
    return DonorScales(tau, share, sigma, omega), populations


def best_subsets(
    problem: RankingProblem, size: int, keep: Sequence[int], settings: DonorChoiceSettings
) -> tuple[list[tuple[int, ...]], str]:
    """Return the best subsets of one size, best first, and how they were searched."""
    free = [c for c in range(problem.traced) if c not in keep]
    count = math.comb(len(free), size - len(keep))
    if count <= settings.max_subsets:
        every = [tuple(sorted((*keep, *more))) for more in itertools.combinations(free, size - len(keep))]
        searched = f"all {count} subsets"
    else:
        every, searched = exchanged(problem, size, keep, free), "greedy with exchanges"
    order = np.argsort(problem.scores(every), kind="stable")[: settings.kept]
    return [every[i] for i in order], searched


def exchanged(problem: RankingProblem, size: int, keep: Sequence[int], free: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the subset found by adding the best donor in turn, then exchanging one while it helps; with all its neighbours."""
    chosen = tuple(keep)
    while len(chosen) < size:
        grown = [(*chosen, c) for c in free if c not in chosen]
        chosen = grown[int(problem.scores(grown).argmin())]
    best = float(problem.scores([chosen])[0])
    while True:
        swapped = [(*(d for d in chosen if d != out), c) for out in chosen if out not in keep for c in free if c not in chosen]
        if not swapped:
            return [tuple(sorted(chosen))]
        errors = problem.scores(swapped)
        if errors.min() >= best * (1 - 1e-9):
            return [tuple(sorted(s)) for s in (chosen, *swapped)]
        chosen, best = swapped[int(errors.argmin())], float(errors.min())
