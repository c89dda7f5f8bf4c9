"""Recorded engines replayed by an ensemble that was calibrated on low load only: errors of phase means, and what the intervals cover.

    python benchmarks/end_to_end.py ../shared/data/vllm_cpu [--draws 100] [--donors sample|others] [--blocks-only] [--out FILE.csv]

Each configuration but those that share prefixes (c06) or starve for KV cache (c14) is a target. Donors are the sample's three, the fourth of
the sample in the place of the target where that is one of them (`sample`), or all other targets (`others`). The target is calibrated on
the phases calib, load0.15 and load0.5; then all its recorded requests are replayed, one continuous run from the first to the last, by
draws of the posterior. The drift of the machine's speed is seen on the donors' recordings and the target's low load, the overheads on
their requests.

Prints, per load and metric, medians over phases of the absolute error of the phase mean in per cent, for the run at the posterior mean (no
noise, no drift), for the median of the ensemble, and for the run at the posterior mean in which every phase is given the speed it was
recorded at: what the drift is to blame for. Beside them what the ensemble itself expects that error to be. Then how many phase means lie
inside the ensemble's 95 % intervals, and their widths.
"""

from __future__ import annotations

import argparse
import sys
from bisect import bisect_right
from pathlib import Path

import numpy as np
import pandas as pd

from hfdtl_bayes import sample
from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.replay import Batch, ReplaySettings, Requests, StepTime, replay, step_time_function
from hfdtl_bayes.simulation import EnsembleSettings, SpeedDrift, Workload, overhead_draws, run_metrics, simulate, speed_drift
from hfdtl_bayes.simulation.workload import requests_from_zero
from hfdtl_bayes.traces import TraceStore
from hfdtl_bayes.transfer import calibrate, fit_donors, usable_rows

LOW = ("calib", "load0.15", "load0.5")
LEFT_OUT = ("c06", "c14")
LOADS = {"load0.15": "0.15-0.5", "load0.5": "0.15-0.5", "load0.85": "0.85-1.2", "load1.2": "0.85-1.2", "load2.0": "2.0"}
"""Groups of the requirement; calib (a closed burst) and load0.4 (after the overload) are counted in the coverage."""
METRICS = ("ttft_mean_s", "itl_mean_s", "e2e_mean_s")
SETTINGS = ReplaySettings(block_tokens=32)


class PhaseSpeeds:
    """Expected step times, times the factor that was recorded in the phase of the moment."""

    def __init__(self, expected: StepTime, starts: list[float], factors: list[float]) -> None:
        self.expected, self.starts, self.factors = expected, starts, factors

    def __call__(self, batch: Batch) -> float:
        """Return the expected time of a step."""
        return self.expected(batch)

    def at(self, batch: Batch, start_s: float) -> float:
        """Return the time of a step of that moment."""
        return self.expected(batch) * self.factors[max(bisect_right(self.starts, start_s) - 1, 0)]


def own_speeds(
    posterior: LatencyPosterior, configuration: ServingConfiguration, steps: pd.DataFrame, requests: pd.DataFrame
) -> PhaseSpeeds:
    """Return step times that are right on average in every phase."""
    expected = posterior.expected_s(steps, configuration)
    starts = requests.groupby("regime")["arrival_s"].min().sort_values()
    factors = []
    for regime in starts.index:
        own = (steps["regime"] == regime).to_numpy()
        factors.append(float(steps["step_time_s"].to_numpy()[own].sum() / expected[own].sum()) if own.any() else 1.0)
    return PhaseSpeeds(step_time_function(posterior, configuration), (starts - requests["arrival_s"].min()).tolist(), factors)


def judge(store: TraceStore, target: str, donors: LatencyPosterior, draws: int, blocks_only: bool, seed: int) -> pd.DataFrame:
    """Return one row per phase and metric of one target."""
    configuration = store.configuration(target)
    steps, table = store.steps(target).frame, store.requests(target)
    rows = usable_rows(steps, configuration, donors.feature_set)
    low = rows[rows["regime"].isin(LOW)]
    posterior = calibrate(donors, low, configuration, seed=seed, show_progress=False)
    recorded = [(donors.configuration(d), store.steps(d).frame) for d in donors.donors]
    drift = (
        SpeedDrift.blocks_only() if blocks_only else speed_drift(posterior, [*recorded, (configuration, low)], calibrated_on=low)
    )
    journeys = {d: store.requests(d).frame for d in donors.donors}
    journeys[target] = table.frame[table.frame["regime"].isin(LOW)]
    overheads = overhead_draws(journeys, target, seed=seed)
    workload = Workload(requests=requests_from_zero(table))
    found = simulate(
        posterior,
        configuration,
        workload,
        drift=drift,
        overheads=overheads,
        settings=EnsembleSettings(members=draws),
        replay_settings=SETTINGS,
        seed=seed,
    )
    observed = run_metrics(table.frame)
    assert isinstance(workload.requests, Requests)
    own = run_metrics(
        replay(
            workload.requests,
            configuration,
            own_speeds(posterior, configuration, steps, table.frame),
            settings=ReplaySettings(block_tokens=SETTINGS.block_tokens, overheads=overheads.mean()),
        ).requests
    )
    result = found.table[found.table["metric"].isin(METRICS) & (found.table["phase"] != "all")].copy()
    keys = list(zip(result["phase"], result["metric"], strict=True))
    result["observed"] = [observed[k] for k in keys]
    result["own_speed"] = [own[k] for k in keys]
    draws_of = [found.values(*k)[0] for k in keys]
    result["own_error"] = [float(np.median(np.abs(v / np.median(v) - 1))) for v in draws_of]
    result["target"] = target
    omega = float(posterior.draws(configuration).omega.mean())
    print(f"{target}: omega {omega:.3f}; {drift}; unseen level {omega * drift.mean()['unseen_level']:.3f}", file=sys.stderr)
    return result


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--donors", choices=["sample", "others"], default="sample")
    parser.add_argument("--blocks-only", action="store_true", help="drift in independent blocks, as the model has it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="write every phase and metric as CSV")
    arguments = parser.parse_args()
    store = TraceStore(arguments.store)
    targets = [c for c in store.config_ids if not c.startswith(LEFT_OUT)]
    fitted: dict[tuple[str, ...], LatencyPosterior] = {}
    parts = []
    for target in targets:
        pool = [*sample.DONORS, sample.TARGET] if arguments.donors == "sample" else targets
        donors = tuple(d for d in pool if d != target)[: len(sample.DONORS) if arguments.donors == "sample" else None]
        if donors not in fitted:
            fitted[donors] = fit_donors(store, donors, seed=arguments.seed, show_progress=False)
        parts.append(judge(store, target, fitted[donors], arguments.draws, arguments.blocks_only, arguments.seed))
    rows = pd.concat(parts, ignore_index=True)
    if arguments.out:
        rows.to_csv(arguments.out, index=False)
    rows["load"] = rows["phase"].map(LOADS).fillna(rows["phase"])
    for column, name in (("at_mean", "posterior mean"), ("q50", "ensemble's median"), ("own_speed", "each phase's own speed")):
        rows["error"] = 100 * (rows[column] / rows["observed"] - 1).abs()
        table = rows.pivot_table(index="load", columns="metric", values="error", aggfunc="median")[list(METRICS)]
        print(f"median absolute error of phase means, per cent: {name}\n{table.round(1).to_markdown()}\n")
    own = 100 * rows.pivot_table(index="load", columns="metric", values="own_error", aggfunc="median")[list(METRICS)]
    print(f"median absolute error that the ensemble expects of its own median, per cent\n{own.round(1).to_markdown()}\n")
    rows["inside"] = (rows["observed"] >= rows["q2.5"]) & (rows["observed"] <= rows["q97.5"])
    rows["width"] = (rows["q97.5"] - rows["q2.5"]) / rows["q50"]
    for column, name in (
        ("inside", "share of phase means inside 95 % intervals"),
        ("width", "median width of the intervals, relative"),
    ):
        how = "mean" if column == "inside" else "median"
        print(
            f"{name}\n{rows.pivot_table(index='load', columns='metric', values=column, aggfunc=how)[list(METRICS)].round(3).to_markdown()}\n"
        )
    outside = rows[~rows["inside"]]
    print(
        f"inside: {int(rows['inside'].sum())} of {len(rows)} phase means ({rows['inside'].mean():.1%}), {rows['target'].nunique()} targets"
    )
    said = (f"{t} {p} {m}" for t, p, m in zip(outside["target"], outside["phase"], outside["metric"], strict=True))
    print("outside: " + ("; ".join(said) or "none"))
    shares = np.square(rows[["sd_coefficients", "sd_speed"]]).div(np.square(rows["sd"]), axis=0)
    print(
        f"share of the variance of a run by coefficients {shares['sd_coefficients'].median():.0%}, by speed {shares['sd_speed'].median():.0%}"
    )


if __name__ == "__main__":
    main()
