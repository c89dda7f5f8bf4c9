"""Delays from few request journeys: each configuration of a store a target of the others, zero-shot and calibrated.

    python benchmarks/delays.py ../shared/data/vllm_cpu [--features roofline hfdtl] [--donors three|others] [--quantities queue_delay
        api_delay] [--targets N] [--seed 0] [--out FILE.csv]

n journeys are n requests, whether they waited or not. Random: n of the first 100 of a permutation, the others are judged. Shift: n requests
of loads up to 0.5 of capacity, those of 0.85 and more are judged. Methods: `Bayesian` (calibrated from the donors), `least squares`
(the target alone, non-negative, relative errors), `constant` (the mean delay of the calibration rows). The last two need a row
that the rule lets wait, or there is nothing to fit: `fitted` counts the targets that had one. All methods share the rule who waits.

Prints, for the requests that waited: MAPE and median absolute percentage error (median over targets, MAPE also worst), CRPS relative to
their mean delay (a point forecast's is its absolute error), coverage of 95 % intervals (mean over targets). For mean delays by load,
both parts together: error relative to the mean delay (median and worst over targets), share of loads within their 95 % intervals.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from hfdtl_bayes import sample
from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import RejectedRowsWarning
from hfdtl_bayes.features import FeatureSet, feature_set, response
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.traces import TraceStore, drop_warmup
from hfdtl_bayes.transfer import calibrate_delays, fit_donors, score_delays, scratch_coefficients, usable_rows

COUNTS = (0, 10, 25, 50, 100)
LOW, HIGH = ("load0.15", "load0.4", "load0.5"), ("load0.85", "load1.2", "load2.0")


@cache
def donors(store: str, names: tuple[str, ...], features: str, quantity: str, seed: int) -> LatencyPosterior:
    """Fit donors once."""
    return fit_donors(TraceStore(store), names, features, quantity, seed=seed, show_progress=False)


def donors_of(target: str, every: tuple[str, ...], kind: str) -> tuple[str, ...]:
    """Return the donors of a target: all others, or the sample's three with its target in the place of one that is judged."""
    if kind == "others":
        return tuple(c for c in every if c != target)
    return tuple(sample.TARGET if d == target else d for d in sample.DONORS)


def splits(requests: pd.DataFrame, seed: int) -> list[tuple[str, int, pd.DataFrame, pd.DataFrame]]:
    """Return (split, n, calibration journeys, judged requests) of one target."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(requests))
    rest = requests.iloc[np.sort(order[max(COUNTS) :])]
    low, high = (requests[requests["regime"].isin(r)] for r in (LOW, HIGH))
    first = rng.permutation(len(low))
    found = [("random", n, requests.iloc[np.sort(order[:n])], rest) for n in COUNTS]
    return found + [("shift", n, low.iloc[np.sort(first[:n])], high) for n in COUNTS if n <= len(low)]


def point_scores(
    predicted: np.ndarray, judged: pd.DataFrame, features: FeatureSet, own: ServingConfiguration
) -> dict[str, float]:
    """Score a point forecast of the requests that the rule lets wait as `score_delays` does."""
    observed, told = response(judged, features.quantity), features.supported(judged, own)
    waited = observed > features.noise_floor(own)
    scored = told & waited
    errors = np.abs(predicted - observed)[scored]
    frame = pd.DataFrame(
        {"regime": judged["regime"], "p": np.where(told, predicted, 0.0), "o": np.where(told | waited, observed, 0.0)}
    )
    means = frame.groupby("regime")[["p", "o"]].mean()
    return {
        "waiting": int(scored.sum()),
        "mape": float((errors / observed[scored]).mean()) if scored.any() else np.nan,
        "median_ape": float(np.median(errors / observed[scored])) if scored.any() else np.nan,
        "crps": float(errors.mean() / observed[scored].mean()) if scored.any() else np.nan,
        "mean_error": float((means["p"] - means["o"]).abs().sum() / means["o"].sum()) if means["o"].sum() > 0 else np.nan,
    }


def judge(store: str, target: str, kind: str, set_name: str, quantity: str, seed: int) -> list[dict[str, object]]:
    """Score every method on every split of one target."""
    opened, features = TraceStore(store), feature_set(set_name, quantity)
    own, requests = opened.configuration(target), drop_warmup(opened.requests(target).frame)
    fit = donors(store, donors_of(target, opened.config_ids, kind), set_name, quantity, seed)
    rows: list[dict[str, object]] = []
    for split, n, journeys, judged in splits(requests, seed):
        usable = usable_rows(journeys, own, features)
        base = {"features": set_name, "quantity": quantity, "target": target, "split": split, "n": n, "usable": len(usable)}
        fitted = calibrate_delays(fit, journeys, own, seed=seed, show_progress=False) if len(usable) else fit
        found = score_delays(fitted, judged, own, seed=seed)
        scores = {
            k: getattr(found, k) for k in ("waiting", "mape", "median_ape", "crps", "coverage", "mean_error", "loads_covered")
        }
        rule = {"right": found.rule.right, "missed_s": found.rule.missed_s} if found.rule else {}
        rows.append(base | {"method": "Bayesian", "engine": fitted.engine} | scores | rule)
        if n and len(usable):
            scratch = features.design(judged, own) @ scratch_coefficients(usable, own, features)
            constant = np.full(len(judged), response(usable, quantity).mean())
            for method, predicted in (("least squares", scratch), ("constant", constant)):
                rows.append(base | {"method": method} | point_scores(predicted, judged, features, own))
    return rows


def table(results: pd.DataFrame) -> pd.DataFrame:
    """Summarise over targets; shares in per cent."""

    def summary(g: pd.DataFrame) -> pd.Series:
        share = 100 * g[["mape", "median_ape", "crps", "coverage", "mean_error", "loads_covered"]]
        return pd.Series(
            {
                "fitted": int(g["mape"].notna().sum()),
                "rows": g["usable"].median(),
                "MAPE": share["mape"].median(),
                "worst MAPE": share["mape"].max(),
                "median APE": share["median_ape"].median(),
                "CRPS": share["crps"].median(),
                "coverage": share["coverage"].mean(),
                "load error": share["mean_error"].median(),
                "worst load error": share["mean_error"].max(),
                "loads inside": share["loads_covered"].mean(),
            }
        )

    keys = ["features", "quantity", "split", "n", "method"]
    return results.groupby(keys, sort=False).apply(summary, include_groups=False).reset_index()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--features", nargs="+", default=["roofline", "hfdtl"])
    parser.add_argument("--quantities", nargs="+", default=["queue_delay", "api_delay"])
    parser.add_argument(
        "--donors", choices=["three", "others"], default="three", help="three of the sample, or all other configurations"
    )
    parser.add_argument("--targets", type=int, default=None, help="judge only the first N targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="write every score as CSV")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", RejectedRowsWarning)
    targets = TraceStore(arguments.store).config_ids[: arguments.targets]
    rows = []
    for set_name in arguments.features:
        for quantity in arguments.quantities:
            for i, target in enumerate(targets, 1):
                rows += judge(str(arguments.store), target, arguments.donors, set_name, quantity, arguments.seed)
                print(f"\r{set_name} {quantity} {i}/{len(targets)}", end="", file=sys.stderr, flush=True)
                if arguments.out:
                    pd.DataFrame(rows).to_csv(arguments.out, index=False)
    print(file=sys.stderr)
    results = pd.DataFrame(rows)
    print(table(results).round(1).to_markdown(index=False))
    rules = results[(results["method"] == "Bayesian") & results["right"].notna()] if "right" in results else results.iloc[:0]
    for (set_name, split), own in rules.groupby(["features", "split"], sort=False):
        right = 100 * own.groupby("target")["right"].mean()
        print(
            f"{set_name}, {split}: the rule tells who waits in {right.min():.1f} to {right.max():.1f} % of a target's requests "
            f"(median {right.median():.1f}); those it misses are {100 * own['missed_s'].max():.1f} % of the delay at worst"
        )


if __name__ == "__main__":
    main()
