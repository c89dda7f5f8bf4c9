"""`simulate`: a workload served by an ensemble of posterior draws, and what that says with error bars.

A run draws coefficients and overheads, a course of the machine's speed and, where it is traffic, requests; `simulation.variance` says how
these are arranged. What comes out has two kinds of interval: of a run (what one would measure, once) and of the expected value given the
coefficients (what calibration can still narrow).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import HfdtlError, InputError
from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.replay import ReplaySettings, RequestOverheads, Requests, Traffic, replay, step_time_function
from hfdtl_bayes.simulation.attribution import LEVEL, OVERHEADS, Attribution, NextMeasurement, attribute, next_measurement
from hfdtl_bayes.simulation.metrics import ALL, MetricSettings, run_metrics
from hfdtl_bayes.simulation.overheads import OverheadDraws
from hfdtl_bayes.simulation.speed import DriftingStepTime, SpeedDrift
from hfdtl_bayes.simulation.variance import Components, expected_values, variance_components
from hfdtl_bayes.simulation.workload import Workload

FloatArray = NDArray[np.float64]
Metrics = Mapping[tuple[str, str], float]

MEMBERS = 100
"""Draws of an ensemble: with two courses of the speed each, the 2.5 % point of a run is known to about a seventh of an sd."""
_QUANTILES = (0.025, 0.5, 0.975)
_MOST_FAILED = 0.5
"""Share of runs that fail from which what is left is no sample of the posterior."""


@dataclass(frozen=True)
class EnsembleSettings:
    """How many runs: `members` draws, each with `workloads` drawings of traffic (one for given requests) and `speeds` courses."""

    members: int = MEMBERS
    workloads: int = 2
    speeds: int = 2

    def __post_init__(self) -> None:
        """Refuse too few.

        Raises
        ------
        InputError
            Naming the field.
        """
        for name, least in (("members", 2), ("workloads", 1), ("speeds", 1)):
            value = getattr(self, name)
            if not (value == int(value) and value >= least):
                raise InputError(f"{name} is {value}; accepted are whole numbers from {least}")


@dataclass(frozen=True)
class RunPlan:
    """One run: its place in the ensemble, the draws it takes, and the seeds of what else is random.

    Attributes
    ----------
    member, workload, speed : int
    draw : int
        Of the posterior.
    overheads : RequestOverheads
    workload_seed : int
    speed_seed : tuple of int
    level : float
        Relative error of all step times of this member: what the drift during calibration left in the coefficients.
    """

    member: int
    workload: int
    speed: int
    draw: int
    overheads: RequestOverheads
    workload_seed: int
    speed_seed: tuple[int, ...]
    level: float = 0.0


class Engine(Protocol):
    """What serves a workload once and returns its metrics."""

    def __call__(self, plan: RunPlan) -> Metrics:
        """Serve it.

        Raises
        ------
        HfdtlError
            If this run fails; others go on.
        """
        ...


@dataclass(frozen=True)
class Simulation:
    """What an ensemble of runs found.

    Attributes
    ----------
    config_id : str
    engine : str
        "builtin" or "blis".
    workload : str
        In words.
    settings : EnsembleSettings
    runs : DataFrame
        One row per run that was made: `member`, `workload`, `speed`, `draw`, and a column per (phase, metric).
    at_mean : dict
        Metrics of the run at the posterior mean, without noise and drift, by (phase, metric); empty where it was not made.
    seconds : DataFrame
        Per member what each coefficient adds to the mean step of the run at the mean, and the overheads of a request; seconds.
    steps : DataFrame
        Steps of the run at the mean: the deployment mix for `select` and `plan`; empty for BLIS.
    drift : SpeedDrift
    features : FeatureSet
        Of the posterior.
    failed : tuple of str
        What went wrong in the runs that were not made.
    seed : int
    names : dict of str to str
        Files that commands are to name, see `named`.
    """

    config_id: str
    engine: str
    workload: str
    settings: EnsembleSettings
    runs: pd.DataFrame
    at_mean: Metrics
    seconds: pd.DataFrame
    steps: pd.DataFrame
    drift: SpeedDrift
    features: FeatureSet
    failed: tuple[str, ...] = ()
    seed: int = 0
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def metrics(self) -> list[tuple[str, str]]:
        """(phase, metric) in the order of the runs."""
        return [(str(c[0]), str(c[1])) for c in self.runs.columns if isinstance(c, tuple)]

    def values(self, phase: str, metric: str) -> tuple[FloatArray, NDArray[np.int64]]:
        """Return a metric, shape (D, W, Z), of the members of which every run was made and has it, and their numbers.

        Raises
        ------
        InputError
            If there is no such metric, or fewer than two members are whole.
        """
        if (phase, metric) not in self.runs.columns:
            known = sorted({f"{p}/{m}" for p, m in self.metrics})
            raise InputError(f"no metric {phase}/{metric}; this simulation has {', '.join(known)}")
        w = max(int(self.runs["workload"].max()) + 1, 1)
        z = max(int(self.runs["speed"].max()) + 1, 1)
        ordered = self.runs.sort_values(["member", "workload", "speed"])
        ordered = ordered[ordered[[(phase, metric)]].notna().to_numpy()[:, 0]]
        counts = ordered["member"].value_counts()
        whole = ordered[ordered["member"].isin(counts.index[counts == w * z])]
        members = whole["member"].to_numpy(dtype=np.int64)[:: w * z]
        if len(members) < 2:
            raise InputError(f"{phase}/{metric}: fewer than two members have all their runs; give more --draws")
        return whole[[(phase, metric)]].to_numpy(dtype=float).reshape(len(members), w, z), members

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per (phase, metric).

        `mean`, `q2.5`, `q50`, `q97.5` of a run; `q2.5_mean`, `q97.5_mean` of the expected value given the coefficients; `sd` of a run
        and its parts `sd_coefficients`, `sd_speed`, `sd_workload`, `sd_together`; `at_mean`.
        """
        rows = []
        for phase, metric in self.metrics:
            values, _ = self.values(phase, metric)
            parts = variance_components(values)
            low, middle, high = np.quantile(values, _QUANTILES)
            low_mean, high_mean = np.quantile(expected_values(values, parts), (0.025, 0.975))
            rows.append(
                {
                    "phase": phase,
                    "metric": metric,
                    "mean": float(values.mean()),
                    "q2.5": float(low),
                    "q50": float(middle),
                    "q97.5": float(high),
                    "q2.5_mean": float(low_mean),
                    "q97.5_mean": float(high_mean),
                    "sd": float(np.sqrt(parts.total)),
                    **{f"sd_{name}": float(np.sqrt(v)) for name, v in vars(parts).items()},
                    "at_mean": self.at_mean.get((phase, metric), float("nan")),
                }
            )
        return pd.DataFrame(rows)

    def components(self, phase: str, metric: str) -> Components:
        """Return the variance of a metric by source."""
        return variance_components(self.values(phase, metric)[0])

    def attribution(self, phase: str, metric: str) -> Attribution:
        """Return which coefficients carry the variance between members."""
        values, members = self.values(phase, metric)
        seconds = self.seconds.loc[members]
        return attribute(list(seconds.columns), seconds.to_numpy(dtype=float), values.mean(axis=(1, 2)))

    def next_measurement(self, phase: str, metric: str) -> NextMeasurement:
        """Say what would shrink the interval of a metric most."""
        values, _ = self.values(phase, metric)
        return next_measurement(
            metric if phase == ALL else f"{metric} of {phase}",
            float(values.mean()),
            variance_components(values),
            self.attribution(phase, metric),
            self.features,
            config_id=self.config_id,
            **self.names,
        )

    def named(self, *, posterior_file: str, steps_file: str) -> Simulation:
        """Return the same with the files that commands are to name."""
        return replace(self, names={"posterior_file": posterior_file, "steps_file": steps_file})

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        headline = self.headline()
        return {
            "config_id": self.config_id,
            "engine": self.engine,
            "workload": self.workload,
            "members": self.settings.members,
            "workloads": int(self.runs["workload"].max()) + 1,
            "speeds": int(self.runs["speed"].max()) + 1,
            "runs": len(self.runs),
            "failed": list(self.failed),
            "drift": {**self.drift.mean(), "block_length": self.drift.block_length, "sources": list(self.drift.sources)},
            "metrics": self.table.to_dict(orient="records"),
            "next": [
                {
                    "phase": p,
                    "metric": m,
                    "shares": self.components(p, m).shares(),
                    "coefficients": dict(self.attribution(p, m).shares),
                    "explained": self.attribution(p, m).explained,
                    **self.next_measurement(p, m).as_dict(),
                }
                for p, m in headline
            ],
            "seed": self.seed,
        }

    def headline(self) -> list[tuple[str, str]]:
        """Return the mean latencies of the whole run, or of each phase where phases are runs of their own."""
        means = [(p, m) for p, m in self.metrics if m in ("ttft_mean_s", "itl_mean_s", "e2e_mean_s")]
        whole = [pm for pm in means if pm[0] == ALL]
        return whole or means


def run_plans(
    posterior: LatencyPosterior,
    configuration: ServingConfiguration,
    workload: Workload,
    overheads: OverheadDraws,
    drift: SpeedDrift,
    settings: EnsembleSettings,
    seed: int,
) -> list[list[RunPlan]]:
    """Return the runs of an ensemble, by member.

    Seeds are made of numbers alone, not of the configuration.
    """
    found = posterior.draws(configuration, seed)
    total = len(found.theta)
    rng = np.random.default_rng([seed, 11])
    draws = rng.permutation(total)[np.arange(settings.members) % total]
    alphas = rng.integers(0, len(overheads), settings.members)
    workloads = settings.workloads if workload.random else 1
    levels = [drift.level(float(found.omega[k]), np.random.default_rng([seed, 14, d])) for d, k in enumerate(draws)]
    return [
        [
            RunPlan(
                d,
                w,
                z,
                int(draws[d]),
                overheads.draw(int(alphas[d])),
                int(np.random.default_rng([seed, 12, d, w]).integers(2**31)),
                (seed, 13, d, z),
                levels[d],
            )
            for w in range(workloads)
            for z in range(settings.speeds)
        ]
        for d in range(settings.members)
    ]


def serve(
    part: Requests | Traffic, metrics: MetricSettings, served: Callable[[Requests | Traffic], pd.DataFrame]
) -> dict[tuple[str, str], float]:
    """Serve one part of a workload and return its metrics; those of traffic under its name."""
    found = run_metrics(served(part), metrics)
    if isinstance(part, Requests):
        return found
    return {(part.name, name): value for (phase, name), value in found.items() if phase == ALL}


def simulate(
    posterior: LatencyPosterior,
    configuration: ServingConfiguration,
    workload: Workload,
    *,
    drift: SpeedDrift | None = None,
    overheads: OverheadDraws | None = None,
    settings: EnsembleSettings | None = None,
    metrics: MetricSettings | None = None,
    replay_settings: ReplaySettings | None = None,
    seed: int = 0,
    on_member: Callable[[], None] | None = None,
) -> Simulation:
    """Serve a workload with the replay of this package, by an ensemble of posterior draws.

    Parameters
    ----------
    posterior : LatencyPosterior
        Of step_time.
    configuration : ServingConfiguration
        Fitted, or never seen.
    workload : Workload
    drift : SpeedDrift, optional
        How the machine's speed drifts over time, see `speed_drift`; by default in independent blocks, as the model has it, which is too
        sure of long phases on machines that drift for longer.
    overheads : OverheadDraws, optional
        By default none.
    settings : EnsembleSettings, optional
    metrics : MetricSettings, optional
    replay_settings : ReplaySettings, optional
        Its overheads are not used.
    seed : int
    on_member : callable, optional
        Called after each member.

    Raises
    ------
    InputError
        If the posterior is not of step_time, or the workload cannot be served by this configuration.
    """
    settings, metrics = settings or EnsembleSettings(), metrics or MetricSettings()
    drift, overheads = drift or SpeedDrift.blocks_only(), overheads or OverheadDraws.fixed(RequestOverheads())
    base, draws = replay_settings or ReplaySettings(), posterior.draws(configuration, seed)
    plans = run_plans(posterior, configuration, workload, overheads, drift, settings, seed)

    at_mean: dict[tuple[str, str], float] = {}
    mean_steps = []
    expected = step_time_function(posterior, configuration, seed=seed)

    def with_overheads(own: RequestOverheads) -> ReplaySettings:
        return replace(base, overheads=own)

    def at_the_mean(part: Requests | Traffic) -> pd.DataFrame:
        run = replay(part, configuration, expected, seed=seed, settings=with_overheads(overheads.mean()))
        mean_steps.append(run.steps)
        return run.requests

    for part in workload.parts:
        at_mean |= serve(part, metrics, at_the_mean)
    steps = pd.concat(mean_steps, ignore_index=True)

    rows: list[dict[Any, Any]] = []
    for member in plans:
        function = step_time_function(posterior, configuration, draw=member[0].draw, seed=seed)
        sigma, omega = float(draws.sigma[member[0].draw]), float(draws.omega[member[0].draw])
        for plan in member:
            found: dict[tuple[str, str], float] = {}
            for k, part in enumerate(workload.parts):
                path = drift.path(omega, sigma, np.random.default_rng([*plan.speed_seed, k]), level=plan.level)

                def drifting(
                    part: Requests | Traffic, path: Any = path, plan: RunPlan = plan, function: Any = function
                ) -> pd.DataFrame:
                    step_time = DriftingStepTime(function, path)
                    run = replay(part, configuration, step_time, seed=plan.workload_seed, settings=with_overheads(plan.overheads))
                    return run.requests

                found |= serve(part, metrics, drifting)
            rows.append(_row(plan, found))
        if on_member is not None:
            on_member()
    seconds = coefficient_seconds(posterior, configuration, steps, plans, seed)
    return Simulation(
        configuration.config_id, "builtin", str(workload), settings, _frame(rows), at_mean, seconds, steps, drift,
        posterior.feature_set, seed=seed,
    )  # fmt: skip


def coefficient_seconds(
    posterior: LatencyPosterior, configuration: ServingConfiguration, steps: pd.DataFrame, plans: list[list[RunPlan]], seed: int
) -> pd.DataFrame:
    """Return, per member, the seconds each coefficient adds to the mean of some steps, and the overheads of a request before its queue."""
    theta = posterior.draws(configuration, seed).theta
    design = posterior.feature_set.design(steps, configuration).mean(axis=0)
    members = [plan[0] for plan in plans]
    found = pd.DataFrame(
        theta[[m.draw for m in members]] * design,
        columns=list(posterior.feature_set.coef_names),
        index=[m.member for m in members],
    )
    found[LEVEL] = [m.level * float((theta @ design).mean()) for m in members]
    found[OVERHEADS] = [m.overheads.before_queue_s + m.overheads.after_finish_s for m in members]
    return found


def collect(
    engine: Engine, plans: list[list[RunPlan]], pool_map: Callable[..., Any], on_member: Callable[[], None] | None = None
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Make runs that may fail; returns those that did not, and what went wrong in the others.

    Parameters
    ----------
    engine : Engine
    plans : list of list of RunPlan
        By member.
    pool_map : callable
        `map`, or that of an executor.
    on_member : callable, optional
        Called after each member.

    Raises
    ------
    InputError
        If half of the runs and more fail: what is left would be a selection, not a sample.
    """

    def member_runs(member: list[RunPlan]) -> list[tuple[RunPlan, Metrics | str]]:
        found: list[tuple[RunPlan, Metrics | str]] = []
        for plan in member:
            try:
                found.append((plan, engine(plan)))
            except HfdtlError as error:
                found.append((plan, f"draw {plan.draw}, workload {plan.workload}, speed {plan.speed}: {error}"))
        return found

    rows: list[dict[Any, Any]] = []
    failed: list[str] = []
    for member in pool_map(member_runs, plans):
        for plan, found in member:
            if isinstance(found, str):
                failed.append(found)
            else:
                rows.append(_row(plan, found))
        if on_member is not None:
            on_member()
    if len(failed) >= _MOST_FAILED * (len(failed) + len(rows)):
        raise InputError(f"{len(failed)} of {len(failed) + len(rows)} runs failed, the first: {failed[0]}")
    return _frame(rows), tuple(failed)


def _row(plan: RunPlan, found: Metrics) -> dict[Any, Any]:
    return {"member": plan.member, "workload": plan.workload, "speed": plan.speed, "draw": plan.draw, **dict(found)}


def _frame(rows: list[dict[Any, Any]]) -> pd.DataFrame:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    values: dict[Any, list[Any]] = {name: [row.get(name, float("nan")) for row in rows] for name in columns}
    # Phases and metrics are kept as pairs, not as a second level of columns.
    return pd.DataFrame(values, columns=pd.Index(columns, tupleize_cols=False))
