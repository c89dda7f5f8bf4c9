"""Plan, measure, calibrate, judge, plan again: the loop that ends with a verdict.

    loop = ClosedLoop(donors, configuration, deployment)
    while not loop.accepted:
        segment = loop.plan(candidates).chosen[0]        # or plan_traffic(loop.posterior, ...), for traffic that is to be sent
        loop.take(measure(candidates[segment]))
    print(loop.verdict)

Rows come in parts, each a recording of its own whose step numbers may start anew: they are renumbered so that no drift block spans two parts.
Of every part some time blocks judge and never calibrate (`judging_rows`); a block keeps its side for good, so nothing judged is ever
calibrated on. After each part the donors' draws are conditioned on all calibrating rows afresh, which is exact and takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.design.segments import (
    Expectations,
    Segment,
    SegmentPath,
    SegmentSettings,
    choose_segments,
    deployment_aim,
    feature_seconds,
    judging_rows,
    planning_belief,
    segment_effects,
)
from hfdtl_bayes.design.stopping import AcceptanceSettings, JudgedBlocks
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.transfer import Verdict, VerdictSettings, calibrate, usable_rows
from hfdtl_bayes.transfer import verdict as judge
from hfdtl_bayes.transfer.checks import JudgedSettings, known_amounts

FloatArray = NDArray[np.float64]


def expectations_of(
    posterior: LatencyPosterior,
    configuration: ServingConfiguration,
    deployment: pd.DataFrame,
    *,
    weights: Sequence[float] | FloatArray | None = None,
    measured: pd.DataFrame | None = None,
    held_out: pd.DataFrame | None = None,
    settings: SegmentSettings | None = None,
    acceptance: AcceptanceSettings | None = None,
    seed: int = 0,
) -> Expectations:
    """Return what is expected of segments, from where a target stands.

    Parameters
    ----------
    posterior : LatencyPosterior
        Of donors, or with the target calibrated.
    configuration : ServingConfiguration
    deployment : DataFrame
        Steps of the traffic whose predictions matter, times not needed.
    weights : array, shape (J,), optional
        Of each row; equal by default.
    measured : DataFrame, optional
        All rows of the target at hand, calibrated on or not.
    held_out : DataFrame, optional
        Those that judge.
    settings, acceptance, seed

    Raises
    ------
    InputError
        If the posterior is not of step times, the deployment mix is empty or not described by the features, or its weights do not fit.
    """
    if posterior.feature_set.quantity != "step_time":
        raise InputError(f"traffic is planned for step times, and this posterior is of {posterior.feature_set.quantity}")
    settings, acceptance = settings or SegmentSettings(), acceptance or AcceptanceSettings()
    belief = planning_belief(posterior, configuration, settings, seed=seed)
    known = np.zeros(len(posterior.feature_set.coef_names))
    if measured is not None and len(measured):
        known = known_amounts(feature_seconds(posterior, measured, configuration), JudgedSettings.min_rows)
    judged = JudgedBlocks.none()
    if held_out is not None and len(held_out):
        judged = JudgedBlocks.of(posterior, held_out, configuration, block_length=settings.block_length, seed=seed)
    return Expectations(
        belief,
        deployment_aim(posterior, deployment, configuration, belief, weights, settings),
        acceptance,
        acceptance.limits(posterior, belief.sigma, belief.omega),
        known,
        judged,
        seed,
    )


@dataclass
class ClosedLoop:
    """A target under calibration.

    Parameters
    ----------
    donors : LatencyPosterior
    configuration : ServingConfiguration
        The target's.
    deployment : DataFrame
        Steps of the traffic that is to be predicted; times not needed.
    weights : array, shape (J,), optional
        Of each row of it, for plans; the verdict looks at every row alike.
    settings : SegmentSettings
    thresholds : VerdictSettings
    seed : int
    """

    donors: LatencyPosterior
    configuration: ServingConfiguration
    deployment: pd.DataFrame
    weights: FloatArray | None = None
    settings: SegmentSettings = field(default_factory=SegmentSettings)
    thresholds: VerdictSettings = field(default_factory=VerdictSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        """Start with nothing of the target.

        Raises
        ------
        InputError
            If the target is one of the donors, or the deployment mix is empty.
        """
        name = self.configuration.config_id
        if name in self.donors.donors:
            raise InputError(f"target {name!r} is also a donor of this posterior; its rows would count twice")
        if self.deployment.empty:
            raise InputError(f"the deployment mix of {name!r} is empty; give at least one step")
        self.posterior = self.donors
        self.verdict: Verdict | None = None
        self.parts: list[str] = []
        self.calibration, self.held_out = pd.DataFrame(), pd.DataFrame()
        self._next_step, self._current = 0, True

    @property
    def rows(self) -> int:
        """Number of usable rows taken in."""
        return len(self.calibration) + len(self.held_out)

    @property
    def accepted(self) -> bool:
        """Whether the last verdict is `accept`."""
        return self.verdict is not None and self.verdict.accepted

    @property
    def measured(self) -> pd.DataFrame:
        """All rows taken in."""
        return pd.concat([self.calibration, self.held_out]) if self.rows else pd.DataFrame()

    def take(self, steps: pd.DataFrame, label: str) -> Verdict | None:
        """Add a part, calibrate and judge; returns the verdict, None while there are too few rows for one.

        Parameters and errors are those of `add`.
        """
        self.add(steps, label)
        return self.update()

    def add(self, steps: pd.DataFrame, label: str) -> None:
        """Add the rows of one part, to be calibrated on and judged by at the next `update`.

        Parameters
        ----------
        steps : DataFrame
            Validated steps in time order, such as `read_steps` returns; warm-up may be among them.
        label : str
            What to call the part.

        Raises
        ------
        InputError
            If a column is missing; nothing is added then.
        """
        own = usable_rows(steps, self.configuration, self.donors.feature_set).copy()
        self.parts.append(label)
        if own.empty:
            return
        length = self.settings.block_length
        own["step_id"] = own["step_id"] - own["step_id"].iloc[0] // length * length + self._next_step
        self._next_step = int(own["step_id"].iloc[-1]) // length * length + length
        own.index = pd.RangeIndex(self.rows, self.rows + len(own))
        judges = judging_rows(own, self.settings)
        self.calibration = pd.concat([self.calibration, own[~judges]])
        self.held_out = pd.concat([self.held_out, own[judges]])
        self._current = False

    def update(self) -> Verdict | None:
        """Calibrate and judge if parts were added since; returns the verdict, None while there are too few rows for one."""
        if self._current or len(self.calibration) < len(self.donors.feature_set.coef_names):
            return self.verdict
        self.posterior = calibrate(
            self.donors,
            self.calibration,
            self.configuration,
            block_length=self.settings.block_length,
            seed=self.seed,
            show_progress=False,
        )
        self.verdict = judge(
            self.posterior,
            self.held_out if len(self.held_out) else None,
            self.configuration,
            self.thresholds,
            calibration_rows=self.calibration,
            intended_rows=self.deployment,
            seed=self.seed,
        )
        self._current = True
        return self.verdict

    def expectations(self) -> Expectations:
        """Return what is expected of segments from here."""
        return expectations_of(
            self.posterior,
            self.configuration,
            self.deployment,
            weights=self.weights,
            measured=self.measured,
            held_out=self.held_out,
            settings=self.settings,
            acceptance=AcceptanceSettings.of(self.thresholds),
            seed=self.seed,
        )

    def plan(
        self, candidates: Sequence[Segment], *, budget_s: float = float("inf"), repeat: bool = False, stop: bool = True
    ) -> SegmentPath:
        """Choose among segments; parameters and errors as `choose_segments`."""
        found = self.expectations()
        effects = segment_effects(self.posterior, candidates, self.configuration, found.belief, self.settings)
        return choose_segments(found, effects, self.settings, budget_s=budget_s, repeat=repeat, stop=stop)
