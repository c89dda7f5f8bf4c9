"""Segments of traffic: what each would tell, measured whole, and the greedy choice of several.

A segment is a stretch of traffic of which the steps are known but for their times: replayed, or recorded. What its steps tell adds to
what those of other segments tell, since no drift block spans two of them: with J_g the information of segment g (`Belief.information`)
the covariance after a set A is (V^-1 + sum over A of J_g)^-1. So every candidate is evaluated exactly, given what was chosen before.

Not all steps calibrate: a verdict asks for time blocks that judge, so of the blocks of each segment some are kept for that
(`judging_rows`). Two things then stand between a target and its use for a deployment mix, both shares of the mix's time:

    error      sqrt(2 / pi) times the root mean square relative sd of its expected step times: what calibration leaves open
    unjudged   time it spends on larger amounts of a feature than any step at hand has, of which nothing was measured (`check_judged`)

A segment's gain is what it takes off their sum; of the unjudged time only what exceeds half of what a verdict tolerates counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.design.belief import DEFAULT_DRAWS, Belief, belief_of
from hfdtl_bayes.design.candidates import MISFIT_KNOTS, misfit_columns, relative_design
from hfdtl_bayes.design.greedy import MEAN_ABSOLUTE, DeploymentMix, mix_weights
from hfdtl_bayes.design.stopping import AcceptanceSettings, JudgedBlocks, PlannedBlocks, simulated_probabilities
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.statistics import DEFAULT_BLOCK_LENGTH
from hfdtl_bayes.traces import time_blocks
from hfdtl_bayes.transfer.checks import JudgedSettings, known_amounts

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

EMPTY = "there is no traffic to choose from; give a grid with at least one rate or concurrency, prompt, output and duration"

_TRUSTED_SHARE = 0.5
"""Of the unjudged share that a verdict tolerates, what a plan leaves: coefficients move, and with them the shares of time."""


@dataclass(frozen=True)
class SegmentSettings:
    """How segments are evaluated and chosen."""

    draws: int = DEFAULT_DRAWS
    """Draws of the scales that expectations are averaged over."""
    mix_rows: int = 128
    """Rows of the deployment mix that stand for it one by one; its mean square error is of all."""
    block_length: int = DEFAULT_BLOCK_LENGTH
    """Steps that share a drift of the machine's speed."""
    judging_every: int = 4
    """Every so manieth time block judges and does not calibrate. A verdict needs a handful of blocks, calibration most of the rows."""
    misfit: float = 0.02
    """Relative sd of what the features get wrong, a smooth bend over the tokens of a step that steps of one size share: about what the
    roofline leaves on GPUs. Without it, cheap traffic of one kind would seem to tell all of every other. Not used where the feature set
    has a discrepancy of its own; 0 trusts the features."""
    most_segments: int = 12
    """Segments of one plan at most: after some of them it is time to calibrate and to plan anew."""
    smallest_reach: float = 0.01
    """Share of the deployment mix's variance that all candidates together must be able to remove; less is no traffic for that mix."""

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing.

        Raises
        ------
        InputError
            Names the setting and what is accepted.
        """
        for name, least in (("draws", 1), ("mix_rows", 1), ("block_length", 1), ("judging_every", 2), ("most_segments", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, found {getattr(self, name)}")
        if not 0 <= self.misfit < float("inf"):
            raise InputError(f"misfit must be a relative sd of 0 or more, found {self.misfit}")
        if not 0 <= self.smallest_reach < 1:
            raise InputError(f"smallest_reach must be a share from 0 to below 1, found {self.smallest_reach}")


@dataclass(frozen=True, eq=False)
class Segment:
    """A stretch of traffic that may be sent.

    Attributes
    ----------
    name : str
    steps : DataFrame
        Its steps in time order: the columns that the feature set reads, `step_id` and `regime`; times are not read.
    cost_s : float
        Seconds that the target is occupied by it.
    """

    name: str
    steps: pd.DataFrame
    cost_s: float

    def __post_init__(self) -> None:
        """Refuse segments that cost nothing.

        Raises
        ------
        InputError
            If the cost is not a positive number.
        """
        if not 0 < self.cost_s < float("inf"):
            raise InputError(f"segment {self.name!r} costs {self.cost_s} s; accepted are finite numbers of seconds above 0")


def judging_rows(frame: pd.DataFrame, settings: SegmentSettings) -> NDArray[np.bool_]:
    """Return which rows of one segment judge and do not calibrate, shape (n,): the second of every `judging_every` time blocks."""
    blocks = time_blocks(frame, settings.block_length)
    if not len(blocks):
        return np.zeros(0, dtype=bool)
    return np.asarray((blocks - blocks[0]) % settings.judging_every == 1)


def planning_belief(
    posterior: LatencyPosterior, configuration: ServingConfiguration, settings: SegmentSettings, *, seed: int = 0
) -> Belief:
    """Return what is known of a configuration, misfit of the features included; parameters and errors as `belief_of`."""
    belief = belief_of(posterior, configuration, draws=settings.draws, seed=seed)
    if posterior.feature_set.discrepancy or not settings.misfit:
        return belief
    return belief.with_misfit(MISFIT_KNOTS, settings.misfit)


def _design(
    posterior: LatencyPosterior, frame: pd.DataFrame, configuration: ServingConfiguration, belief: Belief, what: str
) -> FloatArray:
    """Return relative designs, shape (n, K), with the columns of misfit after them if the belief has it."""
    count = len(posterior.feature_set.coef_names)
    design, expected = relative_design(posterior, frame, configuration, belief.scale[:count], what)
    return design if len(belief.scale) == count else np.column_stack([design, misfit_columns(frame, expected)])


@dataclass(frozen=True, eq=False)
class DeploymentAim:
    """The deployment mix as segments are measured by it.

    Attributes
    ----------
    mix : DeploymentMix
    seconds : ndarray, shape (J, K)
        Expected time that each coefficient adds to each row of the mix.
    weights : ndarray, shape (J,)
    total_s : float
        Weighted expected time of a row.
    """

    mix: DeploymentMix
    seconds: FloatArray
    weights: FloatArray
    total_s: float

    def error(self, covariance: FloatArray) -> FloatArray:
        """Return the expected relative error of the mix given covariances of the coefficients, shape (...) for (..., S, K, K)."""
        mean_square = (self.mix.moments * covariance.mean(axis=-3)).sum(axis=(-2, -1))
        return np.asarray(MEAN_ABSOLUTE * np.sqrt(np.maximum(mean_square, 0.0)))

    def unjudged(self, known_s: FloatArray) -> FloatArray:
        """Return the share of the mix's time beyond the largest times known of each coefficient, shape (...) for (..., K)."""
        beyond = np.maximum(self.seconds - known_s[..., None, :], 0.0).sum(axis=-1)
        # Coefficients may be negative, and then their times add up to more than a row takes.
        return np.asarray(np.minimum(beyond @ self.weights / self.total_s, 1.0))

    def median_sd(self, covariance: FloatArray) -> float:
        """Return the median over the mix of the relative sd of the expected value, averaged over draws: the reach of a calibration."""
        return float(np.median(np.sqrt(self.mix.variances(covariance).mean(axis=1))))


def deployment_aim(
    posterior: LatencyPosterior,
    frame: pd.DataFrame,
    configuration: ServingConfiguration,
    belief: Belief,
    weights: Sequence[float] | FloatArray | None,
    settings: SegmentSettings,
) -> DeploymentAim:
    """Return a deployment mix as arrays.

    Raises
    ------
    InputError
        If it is empty, the features do not describe a row, or the weights do not fit.
    """
    design = _design(posterior, frame, configuration, belief, "the deployment mix")
    mix = DeploymentMix.of(design, mix_weights(weights, len(frame)), settings.mix_rows)
    # The rows that stand for it one by one carry the time of the mix, too.
    chosen = frame.iloc[mix.rows]
    seconds = feature_seconds(posterior, chosen, configuration)
    total = float(np.abs(posterior.expected_s(chosen, configuration)) @ mix.weights)
    return DeploymentAim(mix, seconds, mix.weights, total)


def feature_seconds(posterior: LatencyPosterior, frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
    """Return the expected time that each coefficient adds to rows, without sign, seconds, shape (n, K)."""
    mean = posterior.draws(configuration).mean
    return np.asarray(np.abs(posterior.feature_set.design(frame, configuration) * mean))


@dataclass(frozen=True, eq=False)
class SegmentEffect:
    """What a segment would bring.

    Attributes
    ----------
    information : ndarray, shape (S, K, K)
        Of its calibrating rows.
    known_s : ndarray, shape (K,)
        Largest time that each coefficient adds to any of its rows.
    judging : PlannedBlocks
        Its rows that judge.
    cost_s : float
    """

    information: FloatArray
    known_s: FloatArray
    judging: PlannedBlocks
    cost_s: float


def segment_effects(
    posterior: LatencyPosterior,
    segments: Sequence[Segment],
    configuration: ServingConfiguration,
    belief: Belief,
    settings: SegmentSettings,
) -> list[SegmentEffect]:
    """Return what each segment would bring.

    Raises
    ------
    InputError
        If there are none, one has no steps, or the features do not describe a step.
    """
    if not segments:
        raise InputError(EMPTY)
    for segment in segments:
        if segment.steps.empty:
            raise InputError(f"segment {segment.name!r} has no steps; leave it out")
    # All at once: features and the posterior's mean have a cost per call.
    joined = pd.concat([s.steps for s in segments], ignore_index=True)
    designs = _design(posterior, joined, configuration, belief, "the traffic")
    seconds = feature_seconds(posterior, joined, configuration)
    made, at = [], 0
    for segment in segments:
        own = slice(at, at + len(segment.steps))
        at += len(segment.steps)
        design, blocks = designs[own], time_blocks(segment.steps, settings.block_length)
        judges = judging_rows(segment.steps, settings)
        made.append(
            SegmentEffect(
                belief.information(design[~judges], blocks[~judges]),
                known_amounts(seconds[own], JudgedSettings.min_rows),
                PlannedBlocks(design[judges], blocks[judges], np.full(int(judges.sum()), segment.name, dtype=object)),
                segment.cost_s,
            )
        )
    return made


@dataclass(frozen=True)
class Standing:
    """Where things are, before or after a segment.

    Attributes
    ----------
    error : float
        Expected relative error of the deployment mix's expected times.
    unjudged : float
        Share of the mix's time beyond what any step at hand has.
    median_sd : float
        Median over the mix of the relative sd of the expected value.
    probability : float
        Expected probability, by the verdict, that the held-out MAPE is below its limit; 0 where nothing judges yet.
    chance : float
        Chance that this probability will be as large as the verdict asks.
    """

    error: float
    unjudged: float
    median_sd: float
    probability: float
    chance: float

    def accepted(self, settings: AcceptanceSettings) -> bool:
        """Return whether a verdict is expected to accept."""
        return (
            self.chance >= settings.min_chance
            and self.unjudged <= settings.max_unjudged_share
            and self.median_sd <= settings.max_mean_uncertainty
        )


@dataclass(frozen=True, eq=False)
class SegmentPath:
    """Segments in the order they are to be sent.

    Attributes
    ----------
    chosen : tuple of int
        Which candidates; one may come more than once.
    gains : tuple of float
        What each takes off the sum of error and unjudged share when it comes.
    standings : tuple of Standing
        Before any, and after each.
    limits : Standing
        Were every candidate sent without end: nothing in the grid gets further.
    """

    chosen: tuple[int, ...]
    gains: tuple[float, ...]
    standings: tuple[Standing, ...]
    limits: Standing


class Expectations:
    """Standings and gains of sets of segments, for one belief, deployment mix and verdict.

    Parameters
    ----------
    belief : Belief
    aim : DeploymentAim
    acceptance : AcceptanceSettings
    limits : ndarray, shape (S,)
        MAPE to stay below, if noise and drift are as in each draw.
    known_s : ndarray, shape (K,)
        Most time that each coefficient adds to several rows at hand (`known_amounts`).
    judged : JudgedBlocks
        Blocks at hand that judge.
    seed : int
    """

    def __init__(
        self,
        belief: Belief,
        aim: DeploymentAim,
        acceptance: AcceptanceSettings,
        limits: FloatArray,
        known_s: FloatArray,
        judged: JudgedBlocks,
        seed: int,
    ) -> None:
        self.belief, self.aim, self.acceptance, self.limits = belief, aim, acceptance, limits
        self.known_s, self.judged, self.seed = known_s, judged, seed

    def covariance(self, information: FloatArray) -> FloatArray:
        """Return the covariance of the coefficients, shape (..., S, K, K), given information beyond the posterior's."""
        factor = self.belief.factor
        return np.asarray(factor @ self.belief.given(information) @ np.swapaxes(factor, 1, 2))

    def open_share(self, information: FloatArray, known_s: FloatArray) -> FloatArray:
        """Return the error plus the unjudged share that counts, shape (...)."""
        excess = self.aim.unjudged(known_s) - _TRUSTED_SHARE * self.acceptance.max_unjudged_share
        return np.asarray(self.aim.error(self.covariance(information)) + np.maximum(excess, 0.0))

    def standing(self, information: FloatArray, known_s: FloatArray, planned: Sequence[PlannedBlocks]) -> Standing:
        """Return where things would be."""
        covariance = self.covariance(information)
        simulated = simulated_probabilities(
            covariance,
            self.belief.sigma,
            self.belief.omega,
            planned,
            self.judged,
            self.limits,
            replicates=self.acceptance.replicates,
            seed=self.seed,
        )
        return Standing(
            float(self.aim.error(covariance)),
            float(self.aim.unjudged(known_s)),
            self.aim.median_sd(covariance),
            float(simulated.mean()),
            float((simulated >= self.acceptance.min_probability).mean()),
        )


def choose_segments(
    expectations: Expectations,
    effects: Sequence[SegmentEffect],
    settings: SegmentSettings,
    *,
    budget_s: float = float("inf"),
    repeat: bool = True,
    stop: bool = True,
) -> SegmentPath:
    """Choose segments one after the other, each by its gain per second given those before.

    Parameters
    ----------
    expectations : Expectations
    effects : sequence of SegmentEffect
    settings : SegmentSettings
    budget_s : float
        Most seconds.
    repeat : bool
        Whether a segment may be sent again: its traffic with another seed.
    stop : bool
        Whether to end as soon as a verdict is expected to accept.

    Raises
    ------
    InputError
        If there is no candidate, the budget is below the cheapest one, or all of them together tell next to nothing of the mix.
    """
    if not effects:
        raise InputError(EMPTY)
    cost = np.array([e.cost_s for e in effects])
    if cost.min() > budget_s:
        raise InputError(
            f"the budget of {budget_s:.3g} s is smaller than one segment: the shortest of the grid takes {cost.min():.3g} s. Give more "
            "minutes, or shorter durations"
        )
    every = np.stack([e.information for e in effects])
    known = np.stack([e.known_s for e in effects])
    limits = _limits(expectations, effects, every, settings)
    information = np.zeros(every.shape[1:])
    known_s = expectations.known_s
    planned: list[PlannedBlocks] = []
    chosen: list[int] = []
    gains: list[float] = []
    standings = [expectations.standing(information, known_s, planned)]
    left, spent = np.ones(len(effects), dtype=bool), 0.0
    while len(chosen) < settings.most_segments and not (stop and standings[-1].accepted(expectations.acceptance)):
        allowed = left & (cost <= budget_s - spent)
        if not allowed.any():
            break
        before = float(expectations.open_share(information, known_s))
        after = expectations.open_share(information + every, np.maximum(known_s, known))
        best = int(np.argmax(np.where(allowed, (before - after) / cost, -np.inf)))
        chosen.append(best)
        gains.append(float(before - after[best]))
        information = information + every[best]
        known_s = np.maximum(known_s, known[best])
        planned.append(effects[best].judging)
        spent += float(cost[best])
        left[best] = repeat
        standings.append(expectations.standing(information, known_s, planned))
    return SegmentPath(tuple(chosen), tuple(gains), tuple(standings), limits)


_ENDLESS = 1e6
"""Times that every candidate is sent to see what none of them can reach: drift and noise are then averaged away."""


def _limits(
    expectations: Expectations, effects: Sequence[SegmentEffect], every: FloatArray, settings: SegmentSettings
) -> Standing:
    """Return where sending everything without end would lead.

    Raises
    ------
    InputError
        If nothing is measured yet and all candidates together remove next to none of the mix's variance, or there is none.
    """
    nothing = np.zeros(every.shape[1:])
    before = float(expectations.aim.error(expectations.covariance(nothing)))
    total = every.sum(axis=0)
    once = float(expectations.aim.error(expectations.covariance(total)))
    if not before > 0:
        raise InputError(
            f"nothing of the deployment mix of {expectations.belief.config_id!r} is uncertain, so there is no traffic to plan for it"
        )
    removed = 1.0 - (once / before) ** 2
    # Of a target measured well already, little is left to remove.
    if removed < settings.smallest_reach and not expectations.known_s.any():
        raise InputError(
            f"the deployment mix lies outside what this traffic can measure on {expectations.belief.config_id!r}: all its segments "
            f"together would remove {removed:.2%} of the variance of its expected times. Give a grid with traffic more like the deployment's"
        )
    known = np.maximum(expectations.known_s, np.max([e.known_s for e in effects], axis=0))
    return expectations.standing(total * _ENDLESS, known, [e.judging for e in effects])
