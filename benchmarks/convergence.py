"""Whether the sampler converges on all recordings: donors, and every target calibrated by a joint refit, in full.

    python benchmarks/convergence.py ../shared/data/gpu_steps ../shared/data/vllm_cpu [--engine exact] [--jobs 2] [--targets N] \
        [--features roofline hfdtl] [--quantities step_time queue_delay] [--rows N] [--out FILE.csv]

Every fit uses the settings a user gets by default. A fit passes with no divergence, R-hat of at most 1.01 and 400 effective draws, bulk
and tail, in every parameter. Prints the worst values of each store, feature set and quantity, then every fit that fails, with
the parameter that is worst. Exit status 1 if any fails.

Chance alone puts the largest R-hat of a hundred parameters of 8 chains about 10 / ESS above 1 (with m half-chains the excess is
about (F - 1) m / (2 ESS), F the largest of a hundred variance ratios on m - 1 degrees of freedom, near 2.2), so this limit asks
for about a thousand effective draws where the other asks for 400.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path

import arviz as az
import numpy as np
import pandas as pd
import transfer_splits
import xarray as xr

from hfdtl_bayes import sample
from hfdtl_bayes.errors import HfdtlError, RejectedRowsWarning
from hfdtl_bayes.features import feature_set
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.traces import TraceStore
from hfdtl_bayes.transfer import calibrate, fit_donors, read_trace, usable_rows

DONORS = {"vllm_cpu": sample.DONORS, "gpu_steps": transfer_splits.DONORS}
FEATURES = ("roofline", "hfdtl")
QUANTITIES = ("step_time", "queue_delay")
MAX_RHAT, MIN_ESS = 1.01, 400.0

Case = tuple[str, str, str, str]
"""Store, feature set, quantity, engine."""


@cache
def donors(case: Case) -> LatencyPosterior:
    """Fit the donors once per process."""
    store, features, quantity, engine = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RejectedRowsWarning)
        return fit_donors(TraceStore(store), DONORS[Path(store).name], features, quantity, engine=engine, show_progress=False)


def extreme(values: xr.Dataset, largest: bool) -> tuple[float, str]:
    """Return the worst value over all parameters, not a number being the worst of all, and whose it is."""
    worst, name = -np.inf, ""
    for variable, array in values.data_vars.items():
        for index in np.ndindex(array.shape):
            value = float(array.to_numpy()[index])
            badness = np.inf if np.isnan(value) else value if largest else -value
            if badness > worst:
                labels = [str(array[d].to_numpy()[i]) for d, i in zip(array.dims, index, strict=True)]
                worst, name = badness, f"{variable}[{', '.join(labels)}]" if labels else str(variable)
    return (worst if largest else -worst), name


def diagnosed(posterior: LatencyPosterior) -> dict[str, object]:
    """Return divergences and the worst diagnostics over all parameters, with the parameters' names."""
    draws = posterior.tree["posterior"].to_dataset()
    rhat, rhat_of = extreme(az.rhat(draws), True)
    bulk, bulk_of = extreme(az.ess(draws, method="bulk"), False)
    tail, tail_of = extreme(az.ess(draws, method="tail"), False)
    divergent = int(posterior.tree["sample_stats"]["diverging"].sum())
    passed = divergent == 0 and rhat <= MAX_RHAT and min(bulk, tail) >= MIN_ESS
    where = rhat_of if rhat > MAX_RHAT else bulk_of if bulk < MIN_ESS else tail_of
    return {"passed": passed, "divergent": divergent, "rhat": rhat, "ess_bulk": bulk, "ess_tail": tail, "worst_parameter": where}


def judge(case: Case, target: str | None, rows: int | None) -> dict[str, object]:
    """Fit the donors, or calibrate one target on its first rows, and diagnose the sampler."""
    store, features, quantity, _ = case
    found: dict[str, object] = {
        "store": Path(store).name,
        "features": features,
        "quantity": quantity,
        "target": target or "(donors)",
    }
    try:
        fitted = donors(case)
        if target is not None:
            opened = TraceStore(store)
            configuration = opened.configuration(target)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RejectedRowsWarning)
                frame = read_trace(opened, target, quantity).frame
            frame = usable_rows(frame, configuration, feature_set(features, quantity))
            fitted = calibrate(fitted, frame.iloc[:rows], configuration, engine=case[3], show_progress=False)
    except HfdtlError as error:
        return found | {"passed": None, "worst_parameter": f"not fitted: {error}"}
    return found | {"rows": fitted.statistics[-1].rows, "blocks": fitted.statistics[-1].blocks} | diagnosed(fitted)


def cases(arguments: argparse.Namespace) -> list[tuple[Case, list[str]]]:
    """Return every case with its targets; requests only where they are recorded."""
    found = []
    for path in arguments.stores:
        opened = TraceStore(path)
        for quantity in arguments.quantities:
            known = [c for c in opened.config_ids if quantity == "step_time" or (path / c / "requests.parquet").exists()]
            if not set(DONORS[path.name]) <= set(known):
                continue
            targets = [c for c in known if c not in DONORS[path.name]][: arguments.targets]
            found += [((str(path), f, quantity, arguments.engine), targets) for f in arguments.features]
    return found


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--features", nargs="+", default=FEATURES, choices=FEATURES)
    parser.add_argument("--quantities", nargs="+", default=QUANTITIES, choices=QUANTITIES)
    parser.add_argument("--engine", default="exact", choices=("exact", "pymc"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--targets", type=int, default=None, help="only the first N targets of each case")
    parser.add_argument(
        "--rows", type=int, default=None, help="calibrate on the first N usable rows of each target; all by default"
    )
    parser.add_argument("--out", type=Path, default=None, help="write the diagnostics of every fit as CSV")
    arguments = parser.parse_args()
    unknown = [str(p) for p in arguments.stores if p.name not in DONORS]
    if unknown:
        parser.error(f"no donors are set for {', '.join(unknown)}; the stores known are {', '.join(DONORS)}")
    found = []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        work = [pool.submit(judge, case, t, arguments.rows) for case, targets in cases(arguments) for t in (None, *targets)]
        for done, future in enumerate(as_completed(work), 1):
            found.append(future.result())
            print(f"\r{done}/{len(work)} fits", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    results = pd.DataFrame(found).sort_values(["store", "features", "quantity", "target"])
    if arguments.out:
        results.to_csv(arguments.out, index=False)
    fitted = results[results["passed"].notna()]
    worst = fitted.groupby(["store", "features", "quantity"]).agg(
        fits=("target", "size"),
        passed=("passed", "sum"),
        divergent=("divergent", "sum"),
        rhat=("rhat", "max"),
        ess_bulk=("ess_bulk", "min"),
        ess_tail=("ess_tail", "min"),
    )
    print(worst.round({"rhat": 4, "ess_bulk": 0, "ess_tail": 0}).to_markdown())
    refused = results[results["passed"].isna()]
    for _, row in refused.iterrows():
        print(f"\n{row['store']} {row['features']} {row['quantity']} {row['target']}: {row['worst_parameter']}")
    failed = fitted[~fitted["passed"].astype(bool)]
    print(f"\n{len(failed)} of {len(fitted)} fits fail (no divergence, R-hat <= {MAX_RHAT:g}, ESS >= {MIN_ESS:g}).")
    if len(failed):
        print(failed.drop(columns=["store", "passed"]).round({"rhat": 4, "ess_bulk": 0, "ess_tail": 0}).to_markdown(index=False))
    return int(len(failed) > 0)


if __name__ == "__main__":
    sys.exit(main())
