"""Accuracy on GPU steps: the design's ridge recipe, hfdtl and roofline Bayesian, and scratch fits, side by side.

    python benchmarks/gpu_accuracy.py ../shared/data/gpu_steps [--seeds 1] [--jobs 2] [--targets N] [--out FILE.csv]

Three donors, every other configuration a target. Calibration rows carry noise, test rows do not (`expected_step_time_s`).
Random split: n rows drawn from all regimes, tested on the others. Shift: n rows of conv traffic at concurrency 32 or less,
tested on the other workloads at 64 or more. Prints MAPE in per cent: median, 90th percentile and worst over targets.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.features import feature_set
from hfdtl_bayes.model import ConvergenceSettings, LatencyPosterior, SamplerSettings
from hfdtl_bayes.traces import TraceStore, drop_warmup
from hfdtl_bayes.transfer import calibrate, calibrate_ridge, fit_donors, fit_ridge_donors, scratch_coefficients

DONORS = (
    "llama3-8b_h100-sxm_tp1_vllm0.24.0",
    "mixtral-8x7b_h100-sxm_tp2_vllm0.24.0",
    "llama3-8b_a100-sxm_tp1_vllm0.14.0",
)
RANDOM_N = (25, 100, 500)
SHIFT_N = 50
SETTINGS = SamplerSettings(draws=150, tune=100)
"""Short runs where a joint refit is needed, since only means are scored."""
CONVERGENCE = ConvergenceSettings(max_rhat=1.05, min_ess=100)
"""A hundred effective draws leave means a tenth of a posterior sd; chains of 150 draws let R-hat vary by some hundredths."""
BAYESIAN = ("roofline", "hfdtl")


@dataclass(frozen=True)
class Split:
    """Calibration rows (noisy) and test rows (noise-free) of one target."""

    name: str
    train: pd.DataFrame
    test: pd.DataFrame


def splits(frame: pd.DataFrame, seed: int) -> list[Split]:
    """Return the random and the regime-shift splits of one target."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(frame))
    found = [
        Split(f"random n={n}", frame.iloc[np.sort(order[:n])], frame.iloc[np.sort(order[max(RANDOM_N) :])]) for n in RANDOM_N
    ]
    conv = frame["regime"].str.contains("conv")
    low = frame[conv & (frame["target_concurrency"] <= 32)]
    high = frame[~conv & (frame["target_concurrency"] >= 64)]
    if len(low) >= SHIFT_N and len(high):
        rows = np.sort(rng.choice(len(low), SHIFT_N, replace=False))
        found.append(Split(f"shift n={SHIFT_N}", low.iloc[rows], high))
    return found


def mape(predicted_s: np.ndarray, test: pd.DataFrame) -> float:
    """Return the MAPE in per cent against the noise-free step time."""
    truth = test["expected_step_time_s"].to_numpy()
    return float(100 * np.mean(np.abs(predicted_s - truth) / truth))


@cache
def donors(store: str, seed: int) -> tuple[dict[str, LatencyPosterior], object]:
    """Fit the donors once per process."""
    opened = TraceStore(store)
    fits = {f: fit_donors(opened, DONORS, f, seed=seed, show_progress=False) for f in BAYESIAN}
    ridge = fit_ridge_donors([(drop_warmup(opened.steps(d).frame), opened.configuration(d)) for d in DONORS])
    return fits, ridge


def judge(store: str, target: str, seed: int) -> list[dict[str, object]]:
    """Score every method on every split of one target."""
    opened = TraceStore(store)
    configuration: ServingConfiguration = opened.configuration(target)
    frame = drop_warmup(opened.steps(target).frame)
    fits, ridge = donors(store, seed)

    rows: list[dict[str, object]] = []

    def score(split: Split, name: str, method: str, predicted: np.ndarray, converged: bool | None = None) -> None:
        error = mape(predicted, split.test)
        rows.append({"target": target, "seed": seed, "split": name, "method": method, "mape": error, "converged": converged})

    for split in splits(frame, seed):
        if split.name in (f"random n={RANDOM_N[0]}", f"shift n={SHIFT_N}"):
            name = f"{split.name.split()[0]} n=0"
            for f in BAYESIAN:
                score(split, name, f"{f} Bayesian", fits[f].expected_s(split.test, configuration, seed))
            score(split, name, "ridge recipe", ridge.predict_s(split.test, configuration))
        for f in BAYESIAN:
            fitted = calibrate(fits[f], split.train, configuration, settings=SETTINGS, seed=seed, show_progress=False)
            passed = fitted.convergence(CONVERGENCE).passed
            score(split, split.name, f"{f} Bayesian", fitted.expected_s(split.test, configuration), passed)
        recipe = calibrate_ridge(ridge, split.train, configuration)
        score(split, split.name, "ridge recipe", recipe.predict_s(split.test, configuration))
        for f in BAYESIAN:
            w = scratch_coefficients(split.train, configuration, feature_set(f))
            score(split, split.name, f"{f} scratch", feature_set(f).design(split.test, configuration) @ w)
    return rows


def table(results: pd.DataFrame) -> pd.DataFrame:
    """Return median, p90 and worst MAPE over targets by method and split (each target's mean over seeds first)."""
    per_target = results.groupby(["split", "method", "target"], sort=False)["mape"].mean()
    grouped = per_target.groupby(["split", "method"], sort=False)
    out = pd.DataFrame(
        {"targets": grouped.size(), "median": grouped.median(), "p90": grouped.quantile(0.9), "worst": grouped.max()}
    )
    return out.sort_index()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--seeds", type=int, default=1, help="number of random splits per target")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--targets", type=int, default=None, help="judge only the first N targets")
    parser.add_argument("--out", type=Path, default=None, help="write every score as CSV")
    arguments = parser.parse_args()
    store = str(arguments.store)
    targets = [c for c in TraceStore(store).config_ids if c not in DONORS][: arguments.targets]
    started = time.perf_counter()
    # Fitted here first, so that workers that are forked find the donors in the cache.
    donors(store, 0)
    rows: list[dict[str, object]] = []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        work = [pool.submit(judge, store, t, s) for t in targets for s in range(arguments.seeds)]
        for done, future in enumerate(as_completed(work), 1):
            rows += future.result()
            print(f"\r{done}/{len(work)} targets, {time.perf_counter() - started:.0f} s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    results = pd.DataFrame(rows)
    if arguments.out:
        results.to_csv(arguments.out, index=False)
    print(table(results).round(2).to_markdown())
    checked = results["converged"].dropna()
    limits = f"R-hat <= {CONVERGENCE.max_rhat:g}, ESS >= {CONVERGENCE.min_ess:g}"
    print(f"\n{int(checked.sum())} of {len(checked)} calibrations converged ({limits})")


if __name__ == "__main__":
    main()
