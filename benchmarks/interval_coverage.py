"""What drift, outliers and the block length do to error bars: each configuration a target of three donors in turn.

    python benchmarks/interval_coverage.py ../shared/data/vllm_cpu [--variants drift no-drift ...] [--split blocks] [--jobs 2]
        [--targets N] [--out FILE.csv]

Variants: `drift` (the default model), `no-drift` (errors independent), `cutoff-C` (rows beyond C robust sds down-weighted, inf
for none), `block-N` and `block-auto` (steps per drift block). Split `blocks` holds out the last 30 % of the time blocks of
every regime, `regimes` the later half of the regimes. Prints, per store and variant, averages over targets in per cent:
coverage of 95 % intervals of held-out rows, of means of blocks of 20 steps and of means of whole regimes; MAPE; bias of the
mean; bias over targets in absolute value; share of rows and of time down-weighted. And, from two fits to the first and the
second half of every regime, by how many posterior sds the target's coefficients differ: |m1 - m2| / sqrt(v1 + v2), root mean
square and largest. Were the error bars right this would be about 1, or less where the prior is shared.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import transfer_splits

from hfdtl_bayes import sample
from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.features import response
from hfdtl_bayes.model import LatencyPosterior, PriorSettings, SamplerSettings
from hfdtl_bayes.statistics import DEFAULT_BLOCK_LENGTH
from hfdtl_bayes.traces import TraceStore, drop_warmup, split_by_blocks, split_by_regime, time_blocks
from hfdtl_bayes.transfer import calibrate, evaluate, fit_donors

DONORS = {"vllm_cpu": sample.DONORS, "gpu_steps": transfer_splits.DONORS}
SETTINGS = SamplerSettings(draws=250, tune=150)
VARIANTS = ("drift", "no-drift", "cutoff-inf", "cutoff-3", "cutoff-5", "cutoff-8", "block-10", "block-40", "block-auto")


def options(variant: str) -> dict[str, object]:
    """Return the arguments of fit_donors and calibrate that a variant stands for."""
    kind, _, value = variant.partition("-")
    if kind == "cutoff":
        return {"outlier_cutoff": float(value)}
    if kind == "block":
        return {"block_length": value if value == "auto" else int(value)}
    return {}


@cache
def donors(store: str, variant: str) -> LatencyPosterior:
    """Fit the donors once per process and variant."""
    priors = PriorSettings(drift=None) if variant == "no-drift" else None
    return fit_donors(
        TraceStore(store), DONORS[Path(store).name], priors=priors, settings=SETTINGS, show_progress=False, **options(variant)
    )


def target_fit(store: str, variant: str, rows: pd.DataFrame, configuration: ServingConfiguration) -> LatencyPosterior:
    """Calibrate a target on some of its rows."""
    fitted = donors(store, variant)
    return calibrate(fitted, rows, configuration, settings=SETTINGS, show_progress=False, **options(variant))


def regime_coverage(fitted: LatencyPosterior, frame: pd.DataFrame, configuration: ServingConfiguration, block: int) -> float:
    """Return the share of regimes whose mean lies in its 95 % interval, under the model: every block its own drift."""
    draws, rng = fitted.draws(configuration), np.random.default_rng(0)
    design, observed = fitted.feature_set.design(frame, configuration), response(frame, fitted.feature_set.quantity)
    scale = fitted.scale_s(design @ draws.mean, configuration)
    blocks, inside = time_blocks(frame, block), []
    for regime in pd.unique(frame["regime"]):
        own = (frame["regime"] == regime).to_numpy()
        sums = np.bincount(blocks[own], scale[own])
        sd = np.sqrt(draws.omega**2 * (sums**2).sum() + draws.sigma**2 * (scale[own] ** 2).sum()) / own.sum()
        means = draws.theta @ design[own].mean(axis=0) + sd * rng.standard_normal(len(sd))
        low, high = np.quantile(means, (0.025, 0.975))
        inside.append(low <= observed[own].mean() <= high)
    return float(np.mean(inside))


def half_differences(store: str, variant: str, frame: pd.DataFrame, configuration: ServingConfiguration) -> np.ndarray:
    """Return by how many posterior sds each coefficient that data speak of differs between halves of every regime."""
    parts = [frame.groupby("regime").cumcount(), frame["regime"].map(frame["regime"].value_counts())]
    first = (parts[0] < parts[1] / 2).to_numpy()
    fits = [target_fit(store, variant, frame[half], configuration) for half in (first, ~first)]
    theta = [f.draws(configuration).theta for f in fits]
    used = (fits[0].feature_set.design(frame, configuration) != 0).any(axis=0)
    difference = theta[0].mean(axis=0) - theta[1].mean(axis=0)
    return np.asarray(np.abs(difference / np.hypot(theta[0].std(axis=0), theta[1].std(axis=0)))[used])


def judge(store: str, target: str, variant: str, split: str, held_out: float, halves: bool) -> dict[str, object]:
    """Calibrate one target on part of its rows and score the rest."""
    opened = TraceStore(store)
    configuration = opened.configuration(target)
    frame = drop_warmup(opened.steps(target).frame)
    regimes = list(pd.unique(frame["regime"]))
    if split == "blocks":
        train, test = split_by_blocks(frame, held_out, DEFAULT_BLOCK_LENGTH)
    else:
        train, test = split_by_regime(frame, regimes[: (len(regimes) + 1) // 2])
    fitted = target_fit(store, variant, train, configuration)
    own = fitted.statistics[-1]
    found = evaluate(fitted, test, configuration)
    apart = half_differences(store, variant, frame, configuration) if halves else np.array([np.nan])
    return {
        "store": Path(store).name,
        "variant": variant,
        "target": target,
        "block_length": own.block_length,
        "rows": 100 * found.coverage,
        "block means": 100 * found.block_coverage,
        "regime means": 100 * regime_coverage(fitted, test, configuration, own.block_length),
        "MAPE": 100 * found.mape,
        "bias": 100 * found.bias,
        "|bias|": 100 * abs(found.bias),
        "rows down": 100 * own.downweighted.rows / own.rows,
        "time down": 100 * own.downweighted.time_s / own.total_s,
        "excess": 100 * own.downweighted.excess_s / own.total_s,
        "halves rms": float(np.sqrt(np.mean(apart**2))),
        "halves max": float(apart.max()),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument(
        "--variants", nargs="+", default=["drift", "no-drift"], help=f"some of {', '.join(VARIANTS)}, or other numbers"
    )
    parser.add_argument("--split", choices=["blocks", "regimes"], default="blocks")
    parser.add_argument("--held-out", type=float, default=0.3, help="share of each regime's blocks held out")
    parser.add_argument("--halves", action=argparse.BooleanOptionalAction, default=True, help="fit halves of each regime as well")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--targets", type=int, default=None, help="judge only the first N targets of each store")
    parser.add_argument("--out", type=Path, default=None, help="write every score as CSV")
    arguments = parser.parse_args()
    unknown = [str(p) for p in arguments.stores if p.name not in DONORS]
    if unknown:
        parser.error(f"no donors are set for {', '.join(unknown)}; the stores known are {', '.join(DONORS)}")
    work = []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for path in arguments.stores:
            ids = TraceStore(path).config_ids
            targets = [c for c in ids if c not in DONORS[path.name]][: arguments.targets]
            for variant in arguments.variants:
                work += [
                    pool.submit(judge, str(path), t, variant, arguments.split, arguments.held_out, arguments.halves)
                    for t in targets
                ]
        rows = []
        for done, future in enumerate(as_completed(work), 1):
            rows.append(future.result())
            print(f"\r{done}/{len(work)} fits", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    results = pd.DataFrame(rows).sort_values(["store", "variant", "target"])
    if arguments.out:
        results.to_csv(arguments.out, index=False)
    measured = [c for c in results.columns if c not in ("store", "variant", "target")]
    summary = results.groupby(["store", "variant"])[measured].mean()
    print(
        summary.loc[[(p.name, v) for p in arguments.stores for v in arguments.variants]]
        .round(2)
        .reset_index()
        .to_markdown(index=False)
    )


if __name__ == "__main__":
    main()
