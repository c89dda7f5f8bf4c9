"""Closed loops against recordings: GPU seconds until the verdict accepts, planned traffic against random traffic.

    python benchmarks/closed_loop.py ../shared/data/gpu_steps [--seeds 5] [--every 1] [--features roofline] [--mape-limit 0.1]

Every configuration but the donors is a target that nothing is known of but its YAML. What can be sent is its recording: cells of a
regime and a number of requests in flight, in segments of at most 40 consecutive rows, which cost the sum of their step times.
Deployment is the heavy traffic of code and summarisation (64 in flight and more). The loop plans one segment, takes its rows,
calibrates, judges, and plans again; random traffic draws the segments in a random order and is judged by the same verdict. Ends with the
share of targets on which the plan takes fewer GPU seconds than the median of random orders, and with the true error on the deployment
mix when the loops end (against noise-free times where the recording has them).
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from transfer_splits import DONORS, HEAVY, mape

import hfdtl_bayes as hb
from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.design.simulated_loop import SimulatedLoop, recorded_segments, simulate_loop

_MIX_ROWS = 500
"""Rows of the deployment mix that plans and verdicts look at; errors are measured on all."""


def loops(
    donors: hb.LatencyPosterior,
    frame: pd.DataFrame,
    configuration: ServingConfiguration,
    thresholds: hb.VerdictSettings,
    seeds: int,
) -> tuple[pd.DataFrame, list[SimulatedLoop]]:
    """Return the deployment mix, and the planned loop with the random ones after it."""
    deployment = frame[(frame["regime"] != "conv") & (frame["target_concurrency"] >= HEAVY)]
    seen = deployment.iloc[np.unique(np.linspace(0, len(deployment) - 1, _MIX_ROWS).astype(int))]
    segments = recorded_segments(frame)
    rules = [("planned", 0), *(("random", seed) for seed in range(seeds))]
    return deployment, [
        simulate_loop(donors, configuration, segments, seen, rule=rule, thresholds=thresholds, seed=seed) for rule, seed in rules
    ]


def main() -> None:
    """Run the loops and print a row per target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--seeds", type=int, default=5, help="random orders per target [%(default)s]")
    parser.add_argument("--every", type=int, default=1, help="take every so manieth target [%(default)s]")
    parser.add_argument("--features", default="roofline")
    parser.add_argument("--mape-limit", type=float, default=hb.VerdictSettings.mape_limit)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", hb.RejectedRowsWarning)
    started = time.perf_counter()
    store = hb.TraceStore(arguments.store)
    donors = hb.fit_donors(store, DONORS, arguments.features, seed=1, show_progress=False)
    thresholds = hb.VerdictSettings(mape_limit=arguments.mape_limit)
    table = []
    for name in [c for c in store.config_ids if c not in DONORS][:: arguments.every]:
        configuration = store.configuration(name)
        frame = hb.usable_rows(store.steps(name).frame, configuration, donors.feature_set)
        deployment, (planned, *random) = loops(donors, frame, configuration, thresholds, arguments.seeds)
        errors = [mape(r.posterior.expected_s(deployment, configuration), deployment) for r in (planned, *random)]
        table.append(
            {
                "target": name,
                "accepted": planned.accepted,
                "planned_s": planned.gpu_s,
                "random_s": float(np.median([r.gpu_s for r in random])),
                "random_fastest_s": min(r.gpu_s for r in random),
                "random_accepted": float(np.mean([r.accepted for r in random])),
                "segments": len(planned.segments),
                "random_segments": float(np.median([len(r.segments) for r in random])),
                "rows": planned.rows,
                "mape": errors[0],
                "random_mape": float(np.median(errors[1:])),
                "random_worst_mape": max(errors[1:]),
                "wins": float(np.mean([planned.accepted and planned.gpu_s < r.gpu_s for r in random])),
            }
        )
        print(" ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in table[-1].values()), flush=True)
    report(pd.DataFrame(table), arguments.mape_limit)
    print(f"{time.perf_counter() - started:.0f} s")


def report(found: pd.DataFrame, limit: float) -> None:
    """Print the summary over targets."""
    sooner = (found["planned_s"] < found["random_s"]) & found["accepted"]
    above = {name: int((found[name] > 100 * limit).sum()) for name in ("mape", "random_worst_mape")}
    lines = [
        f"\n{len(found)} targets: planned accepted on {found['accepted'].sum()}, random in {found['random_accepted'].mean():.0%} of runs",
        f"fewer GPU seconds than the median random order on {sooner.sum()} of {len(found)} ({sooner.mean():.0%}), than a single one in "
        f"{found['wins'].mean():.0%} of pairs",
        f"GPU seconds to the end, median over targets: {found['planned_s'].median():.2f} planned, {found['random_s'].median():.2f} random; "
        f"ratio {(found['random_s'] / found['planned_s']).median():.1f}",
        f"true MAPE on the deployment mix at the end, %: planned {found['mape'].median():.2f} (worst {found['mape'].max():.2f}), random "
        f"{found['random_mape'].median():.2f} (worst of all runs {found['random_worst_mape'].max():.2f})",
        f"targets above {100 * limit:g} %: {above['mape']} planned, {above['random_worst_mape']} in any random run",
    ]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
