"""Does the expected error by which `choose-donors` ranks agree with the actual one? Random subsets of donors on GPU steps.

    python benchmarks/donor_choice.py ../shared/data/gpu_steps [--candidates 12] [--subsets 40] [--sizes 2..5] [--out FILE.csv]

Candidates are drawn at random, all other configurations are targets. Each random subset is refitted with the exact engine and predicts
every target zero-shot; the MAPE is against the noise-free step time (`expected_step_time_s`). Prints Spearman's rank correlation over
subsets of the same size between expected and actual error, averaged over all targets and for single targets (the median of
them), and what the subset ranked first does against the average one and the best there was.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from hfdtl_bayes.features import feature_set
from hfdtl_bayes.model import PriorSettings, SamplerSettings, fit
from hfdtl_bayes.statistics import statistics_from_rows
from hfdtl_bayes.traces import TraceStore, drop_warmup
from hfdtl_bayes.transfer import DonorChoiceSettings
from hfdtl_bayes.transfer.donor_search import ranking_problem

SAMPLER = SamplerSettings(draws=100, tune=100)
"""Only the mean of zero-shot predictions is scored."""
TEST_ROWS = 300


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--candidates", type=int, default=12)
    parser.add_argument("--subsets", type=int, default=40)
    parser.add_argument("--sizes", default="2..5")
    parser.add_argument("--scales", default="posterior", choices=("posterior", "prior"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="write every pair of errors as CSV")
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    store, features, priors = TraceStore(arguments.store), feature_set("roofline", "step_time"), PriorSettings()
    candidates = [str(c) for c in np.sort(rng.choice(store.config_ids, arguments.candidates, replace=False))]
    targets = [c for c in store.config_ids if c not in candidates]
    frames = {c: drop_warmup(store.steps(c).frame) for c in store.config_ids}
    configurations = {c: store.configuration(c) for c in store.config_ids}
    statistics = [statistics_from_rows(frames[c], configurations[c], features) for c in candidates]
    tests = {t: frames[t].iloc[np.linspace(0, len(frames[t]) - 1, TEST_ROWS).astype(int)] for t in targets}

    started = time.perf_counter()
    settings = DonorChoiceSettings(scales=arguments.scales)
    wanted = [configurations[t] for t in targets]
    problem = ranking_problem(statistics, wanted, traffic=tests, features=features, priors=priors, settings=settings)
    low, _, high = arguments.sizes.partition("..")
    sizes = list(range(int(low), int(high or low) + 1))
    subsets = sorted(
        {tuple(sorted(rng.choice(len(candidates), rng.choice(sizes), replace=False))) for _ in range(arguments.subsets)}
    )
    by_model, ratios = problem.errors(subsets), problem.ratios(subsets)
    print(f"{len(subsets)} subsets ranked for {len(targets)} targets in {time.perf_counter() - started:.1f} s", file=sys.stderr)

    lines = []
    for done, (subset, own, ratio) in enumerate(zip(subsets, by_model, ratios, strict=True), 1):
        posterior = fit([statistics[c] for c in subset], features, priors, SAMPLER, seed=arguments.seed, show_progress=False)
        for target, error in zip(targets, own, strict=True):
            truth = tests[target]["expected_step_time_s"].to_numpy()
            predicted = posterior.expected_s(tests[target], configurations[target])
            name = ",".join(candidates[c] for c in subset)
            actual = float(np.mean(np.abs(predicted - truth) / truth))
            line = {"size": len(subset), "donors": name, "target": target, "actual": actual}
            lines.append({**line, "checked": error * ratio, "model": error})
        print(f"\r{done}/{len(subsets)} refits, {time.perf_counter() - started:.0f} s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    results = pd.DataFrame(lines)
    if arguments.out:
        results.to_csv(arguments.out, index=False)
    report(results)


def report(results: pd.DataFrame) -> None:
    """Print how expected and actual errors of subsets agree, checked on candidates outside and by the model alone."""
    found = []
    for size, own in [*results.groupby("size"), ("all", results)]:
        mean = own.groupby("donors")[["checked", "model", "actual"]].mean()
        if len(mean) < 4:
            continue
        for kind in ("checked", "model"):
            single = [spearmanr(t[kind], t["actual"])[0] for _, t in own.groupby("target")]
            found.append(
                {
                    "size": size,
                    "subsets": len(mean),
                    "expected error": kind,
                    "Spearman, mean over targets": spearmanr(mean[kind], mean["actual"])[0],
                    "Spearman, single targets (median)": np.median(single),
                    "expected %": 100 * mean[kind].mean(),
                    "actual %": 100 * mean["actual"].mean(),
                    "actual of the one ranked first %": 100 * mean.loc[mean[kind].idxmin(), "actual"],
                    "of the best %": 100 * mean["actual"].min(),
                    "of the worst %": 100 * mean["actual"].max(),
                }
            )
    print(pd.DataFrame(found).round(2).to_markdown(index=False))


if __name__ == "__main__":
    main()
