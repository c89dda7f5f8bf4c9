"""Simulations with error bars: workloads served by ensembles of posterior draws, on the replay of this package or on BLIS."""

from hfdtl_bayes.simulation.attribution import Attribution, NextMeasurement
from hfdtl_bayes.simulation.ensemble import EnsembleSettings, Simulation, simulate
from hfdtl_bayes.simulation.metrics import MetricSettings, Objectives, run_metrics
from hfdtl_bayes.simulation.overheads import OverheadDraws, OverheadSettings, overhead_draws
from hfdtl_bayes.simulation.speed import SpeedDrift, SpeedSettings, speed_drift
from hfdtl_bayes.simulation.variance import Components, variance_components
from hfdtl_bayes.simulation.workload import Workload, read_workload, requests_from_zero

__all__ = [
    "Attribution",
    "Components",
    "EnsembleSettings",
    "MetricSettings",
    "NextMeasurement",
    "Objectives",
    "OverheadDraws",
    "OverheadSettings",
    "Simulation",
    "SpeedDrift",
    "SpeedSettings",
    "Workload",
    "overhead_draws",
    "read_workload",
    "requests_from_zero",
    "run_metrics",
    "simulate",
    "speed_drift",
    "variance_components",
]
