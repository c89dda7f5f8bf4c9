"""How long everything about transfer takes for a fleet of targets: choosing donors, cross-validation, and each target's journey.

    python benchmarks/transfer_time.py ../shared/data/gpu_steps [--rows 50] [--targets N] [--processes 2] [--seed 0]

Donors are ranked among six candidates (all subsets of two to five) for all targets together, cross-validated by configuration, GPU and
workload, and fitted. Then each target, as a planner meets it: predicted zero-shot with the sources of its variance, calibrated on
rows of light chat traffic, judged on blocks of heavy other traffic (all checks), and searched for missing terms; `processes` targets at once.
Prints wall-clock seconds of each part and of all.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pandas as pd
from transfer_splits import DONORS, gpu_splits, spread_blocks

from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.traces import TraceStore, drop_warmup
from hfdtl_bayes.transfer import calibrate, cross_validate, discover, fit_donors, rank_donors, variance_sources, verdict

CANDIDATES = (
    *DONORS,
    "llama3-70b_b200-sxm_tp2_vllm0.24.0",
    "qwen3-30b-a3b_h100-sxm_tp2_vllm0.24.0",
    "qwen3-14b_h100-sxm_tp2_vllm0.24.0",
)
SHIFT = "light chat to heavy others"
HELD_OUT_BLOCKS = 20


@contextmanager
def timed(parts: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of a block to a part."""
    start = time.perf_counter()
    yield
    parts[name] = parts.get(name, 0.0) + time.perf_counter() - start


@cache
def opened(store: str, seed: int) -> tuple[TraceStore, LatencyPosterior]:
    """Return a store and its donors' fit, once per process."""
    read = TraceStore(store)
    return read, fit_donors(read, DONORS, seed=seed, show_progress=False)


def journey(store: str, target: str, rows: int, seed: int) -> dict[str, float]:
    """Take one target from its configuration to a verdict and a search for missing terms; seconds by part."""
    traces, donors = opened(store, seed)
    parts: dict[str, float] = {}
    configuration = traces.configuration(target)
    frame = drop_warmup(traces.steps(target).frame)
    split = next(s for s in gpu_splits(frame, seed) if s.name == SHIFT)
    train, test = split.drawn(rows, seed), spread_blocks(split.test, HELD_OUT_BLOCKS)
    with timed(parts, "zero-shot"):
        donors.predict(test, configuration)
        variance_sources(donors, test, configuration)
    with timed(parts, "calibrate"):
        posterior = calibrate(donors, train, configuration, seed=seed)
        posterior.predict(test, configuration)
    with timed(parts, "verdict"):
        verdict(posterior, test, configuration, calibration_rows=train, intended_rows=split.test, seed=seed)
    with timed(parts, "discover"):
        discover([(frame, configuration)], seed=seed)
    return parts


def main() -> None:
    """Measure a fleet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--targets", type=int, help="look at so many targets, all by default")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    store = str(asked.store)
    traces = TraceStore(store)
    targets = [c for c in traces.config_ids if c not in DONORS][: asked.targets]
    start = time.perf_counter()
    parts: dict[str, float] = {}
    with timed(parts, "choose-donors"):
        rank_donors(traces, CANDIDATES, [t for t in targets if t not in CANDIDATES], seed=asked.seed, show_progress=False)
    with timed(parts, "cross-validate"):
        kinds = ("configuration", "hardware", "workload")
        cross_validate(traces, DONORS, leave_out=kinds, seed=asked.seed, show_progress=False)
    with timed(parts, "fit and all targets"), ProcessPoolExecutor(asked.processes) as pool:
        work = [pool.submit(journey, store, t, asked.rows, asked.seed) for t in targets]
        own = pd.DataFrame([w.result() for w in work], index=targets)
    total = time.perf_counter() - start
    print(f"{len(targets)} targets, {asked.processes} processes: {total:.1f} s in all")
    print(pd.Series(parts, name="wall s").round(1).to_string())
    print("\nseconds per target:")
    print(own.agg(["median", "max", "sum"]).round(2).to_string())


if __name__ == "__main__":
    main()
