"""Whether the Gaussian default is justified: row-level likelihoods on real traces, by left-out blocks, held-out accuracy and coefficients.

    python benchmarks/likelihoods.py ../shared/data/vllm_cpu ../shared/data/gpu_steps [--rows 800] [--draws 500] [--out FILE.csv]

Of every regime of a few configurations the last 30 % of the time blocks are held out. All likelihoods are fitted jointly to the same rows of
the rest: whole blocks, evenly spread, at most so many per configuration. Beside them stands the Gaussian with outlying rows
down-weighted. Prints per store what each likelihood's left-out blocks score (nats behind the best, paired standard error),
and on held-out rows MAPE, CRPS, coverage of 95 % intervals and how wide they are; then how far each moves the coefficients.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import transfer_splits

from hfdtl_bayes import sample
from hfdtl_bayes.features import feature_set
from hfdtl_bayes.model import LatencyPosterior, SamplerSettings, fit
from hfdtl_bayes.model.likelihoods import SHAPES
from hfdtl_bayes.statistics import DEFAULT_BLOCK_LENGTH, scaled_rows, statistics_from_rows
from hfdtl_bayes.traces import TraceStore, split_by_blocks
from hfdtl_bayes.transfer import evaluate, read_trace, usable_rows
from hfdtl_bayes.transfer.crps import crps
from hfdtl_bayes.transfer.scores import compare_fits

CONFIGURATIONS = {"vllm_cpu": (*sample.DONORS, sample.TARGET), "gpu_steps": transfer_splits.DONORS}
CUTOFF = 5.0
"""Robust sds beyond which the weighted Gaussian down-weights a row."""


def held_out(posterior: LatencyPosterior, parts: dict[str, tuple[pd.DataFrame, pd.DataFrame]]) -> dict[str, float]:
    """Average over configurations what held-out rows say."""
    rows = []
    for config_id, (_, test) in parts.items():
        own = posterior.configuration(config_id)
        found = evaluate(posterior, test, own)
        predicted = posterior.predict(test, own)
        rows.append(
            {
                "mape": 100 * found.mape,
                "crps": 100 * crps(posterior, test, own)[1],
                "rows inside": 100 * found.coverage,
                "blocks inside": 100 * found.block_coverage,
                "width": float(((predicted["q97.5_s"] - predicted["q2.5_s"]) / predicted["mean_s"]).median()),
            }
        )
    return dict(pd.DataFrame(rows).mean())


def moved(posterior: LatencyPosterior, gaussian: LatencyPosterior) -> dict[str, float]:
    """How far coefficients lie from the Gaussian's, in its posterior sds, and how wide they are in comparison."""
    theta, base = posterior.draws_of("theta"), gaussian.draws_of("theta")
    shift = np.abs(theta.mean(axis=0) - base.mean(axis=0)) / base.std(axis=0)
    worst = np.unravel_index(shift.argmax(), shift.shape)
    name = f"{posterior.config_ids[worst[0]]} {posterior.feature_set.coef_names[worst[1]]}"
    ratio = float(np.median(theta.std(axis=0) / base.std(axis=0)))
    return {"median shift": float(np.median(shift)), "largest shift": float(shift.max()), "where": name, "sd ratio": ratio}


def compare(path: Path, rows: int, settings: SamplerSettings) -> pd.DataFrame:
    """Fit and score every likelihood on one store."""
    store, features = TraceStore(path), feature_set("roofline", "step_time")
    parts, seen, weighted = {}, [], []
    for config_id in CONFIGURATIONS[path.name]:
        own = store.configuration(config_id)
        frame = usable_rows(read_trace(store, config_id, "step_time").frame, own, features)
        train, test = split_by_blocks(frame, 0.3, DEFAULT_BLOCK_LENGTH)
        parts[config_id] = (train, test)
        seen.append(scaled_rows(train, own, features, rows=rows))
        weighted.append(statistics_from_rows(train.loc[seen[-1].index], own, features, outlier_cutoff=CUTOFF))
        print(f"  {seen[-1]}; {len(test)} held out", flush=True)
    statistics = [r.statistics for r in seen]
    fits = {"gaussian": fit(statistics, features, settings=settings, show_progress=False)}
    for name in SHAPES:
        if name != "gaussian":
            fits[name] = fit(
                statistics, features, settings=settings, engine="rows", likelihood=name, rows=seen, show_progress=False
            )
    table = compare_fits(fits, seen)
    fits["gaussian, weighted"] = fit(weighted, features, settings=settings, show_progress=False)
    for name, posterior in fits.items():
        shape = {n: float(posterior.draws_of(n).mean()) for n in SHAPES[posterior.likelihood]}
        print(f"  {name}: {posterior.convergence()} {', '.join(f'{n} {v:.3g}' for n, v in shape.items())}", flush=True)
    judged = pd.DataFrame({n: held_out(p, parts) | moved(p, fits["gaussian"]) for n, p in fits.items()}).T
    return table.join(judged, how="outer").sort_values("behind").rename_axis("likelihood")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--rows", type=int, default=800, help="most rows per configuration")
    parser.add_argument("--draws", type=int, default=500, help="draws per chain, two chains, as many again to tune")
    parser.add_argument("--out", type=Path, default=None, help="write the tables as CSV")
    arguments = parser.parse_args()
    unknown = [str(p) for p in arguments.stores if p.name not in CONFIGURATIONS]
    if unknown:
        parser.error(f"no configurations are set for {', '.join(unknown)}; the stores known are {', '.join(CONFIGURATIONS)}")
    settings = SamplerSettings(draws=arguments.draws, tune=arguments.draws, chains=2)
    tables = {}
    for path in arguments.stores:
        print(path.name, flush=True)
        tables[path.name] = compare(path, arguments.rows, settings)
        print(tables[path.name].to_markdown(floatfmt=".3g"), flush=True)
    if arguments.out:
        pd.concat(tables, names=["store"]).to_csv(arguments.out)


if __name__ == "__main__":
    main()
