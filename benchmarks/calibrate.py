"""Calibrating a target in a running process: where the time goes, how good the weights are, how far it is from a joint refit.

    python benchmarks/calibrate.py ../shared/data/vllm_cpu ../shared/data/gpu_steps [--targets N] [--refit] [--repeat 5] [--out FILE.csv]

For each target and 25, 100, 500 and 5000 of its rows: seconds of CPU and of the wall for the statistics and for the posterior, with the
preparation of a target (once per process, no row enters) apart; Pareto k, effective draws, and whether `engine="auto"`
refits. With --refit also the joint refit: its seconds in the same run, and the largest difference of a posterior mean in
posterior sds with the ratio of sds, over the target's coefficients, noise and drift. Run it on one core (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import transfer_splits

from hfdtl_bayes import sample
from hfdtl_bayes.model import LatencyPosterior, fit
from hfdtl_bayes.model.conditional import condition
from hfdtl_bayes.model.new_configuration import NewConfiguration
from hfdtl_bayes.statistics import statistics_from_rows
from hfdtl_bayes.traces import TraceStore
from hfdtl_bayes.transfer import fit_donors, usable_rows

DONORS = {"vllm_cpu": sample.DONORS, "gpu_steps": transfer_splits.DONORS}
COUNTS = (25, 100, 500, 5000)


def timed(work: Callable[[], Any], repeat: int = 1) -> tuple[Any, float, float]:
    """Return the last result, and the median CPU and wall milliseconds of several runs."""
    cpu, wall = [], []
    for _ in range(repeat):
        started, began = time.process_time(), time.perf_counter()
        result = work()
        cpu.append(time.process_time() - started)
        wall.append(time.perf_counter() - began)
    return result, 1000 * float(np.median(cpu)), 1000 * float(np.median(wall))


def differences(one: LatencyPosterior, other: LatencyPosterior) -> tuple[float, float]:
    """Return the largest difference of means in sds, and the ratio of sds furthest from one, over the target's own parameters."""
    shifts, ratios = [], []
    for name in ("theta", "sigma", "omega"):
        a, b = one.draws_of(name)[:, -1], other.draws_of(name)[:, -1]
        shifts.append(np.abs(a.mean(axis=0) - b.mean(axis=0)) / b.std(axis=0))
        ratios.append(a.std(axis=0) / b.std(axis=0))
    ratio = np.concatenate([np.atleast_1d(r) for r in ratios])
    return float(max(np.max(s) for s in shifts)), float(ratio[np.abs(np.log(ratio)).argmax()])


def judge(donors: LatencyPosterior, store: TraceStore, target: str, *, refit: bool, repeat: int) -> list[dict[str, Any]]:
    """Calibrate one target at every number of rows."""
    configuration = store.configuration(target)
    frame = usable_rows(store.steps(target).frame, configuration, donors.feature_set)
    prior = NewConfiguration(donors, configuration)
    rows = []
    for count in COUNTS:
        if count > COUNTS[0] and len(frame) < count / 2:
            continue
        own_rows = frame.iloc[:count]
        own, statistics_cpu, statistics_wall = timed(
            lambda r=own_rows: statistics_from_rows(r, configuration, donors.feature_set), repeat
        )
        # The first update of a target prepares it; what is left of later ones is what a running process pays.
        _, first_cpu, _ = timed(lambda s=own: condition(prior, s, seed=1))
        found, cpu, wall = timed(lambda s=own: condition(prior, s, seed=1), repeat)
        row = {
            "target": target,
            "rows": len(own_rows),
            "statistics_ms": statistics_cpu,
            "posterior_ms": cpu,
            "total_wall_ms": statistics_wall + wall,
            "preparation_ms": first_cpu - cpu,
            "pareto_k": found.reweighting.pareto_k,
            "effective": found.reweighting.effective,
            "draws": found.reweighting.draws,
            "copies": found.reweighting.copies,
            "refits": bool(found.reason),
            "passed": found.posterior.convergence().passed,
        }
        if refit:
            joint, refit_cpu, _ = timed(
                lambda s=own: fit(
                    [*donors.statistics, s], donors.feature_set, donors.priors, target=target, seed=2, show_progress=False
                )
            )
            row["refit_ms"] = refit_cpu
            row["shift_sds"], row["sd_ratio"] = differences(found.posterior, joint)
        rows.append(row)
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--targets", type=int, default=None, help="only so many targets of each store, evenly spread")
    parser.add_argument("--refit", action="store_true", help="compare with the joint refit")
    parser.add_argument("--repeat", type=int, default=5, help="runs whose median is taken")
    parser.add_argument("--out", type=Path, default=None, help="write every line as CSV")
    arguments = parser.parse_args()
    unknown = [str(p) for p in arguments.stores if p.name not in DONORS]
    if unknown:
        parser.error(f"no donors are set for {', '.join(unknown)}; the stores known are {', '.join(DONORS)}")
    every = []
    for path in arguments.stores:
        store = TraceStore(path)
        donors = fit_donors(store, DONORS[path.name], show_progress=False)
        print(f"{path.name}: donors {donors.convergence()}")
        targets = [c for c in store.config_ids if c not in donors.donors]
        if arguments.targets is not None:
            targets = targets[:: max(1, len(targets) // arguments.targets)][: arguments.targets]
        for done, target in enumerate(targets, 1):
            found = judge(donors, store, target, refit=arguments.refit, repeat=arguments.repeat)
            every += [{"store": path.name, **row} for row in found]
            print(f"\r{done}/{len(targets)} targets", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    results = pd.DataFrame(every)
    if arguments.out:
        results.to_csv(arguments.out, index=False)
    results["rows asked"] = pd.cut(results["rows"], [0, *COUNTS], labels=COUNTS)
    by = results.groupby(["store", "rows asked"], observed=True)
    table = by[["statistics_ms", "posterior_ms", "total_wall_ms", "preparation_ms", "pareto_k", "effective"]].median().round(2)
    table["refits"] = by["refits"].sum().astype(str) + " of " + by.size().astype(str)
    kept = results[~results["refits"]].groupby(["store", "rows asked"], observed=True)
    table["passed of kept"] = kept["passed"].sum()
    if arguments.refit:
        table["refit_ms"] = by["refit_ms"].median().round(0)
        table["median shift in sds"] = kept["shift_sds"].median().round(3)
        table["worst shift in sds"] = kept["shift_sds"].max().round(3)
    print(table.T.to_markdown())


if __name__ == "__main__":
    main()
