"""Queue delay (alpha): how long requests wait, in two parts, and how long they take to reach the queue.

    python models/queue_delay.py
    python models/queue_delay.py my_store --donors a,b,c --target d --regimes calib --out reports/mine

`queue_delay` (queued to scheduled) is two-part: a request that finds a free slot waits less than a step, whatever the load; one
that finds none waits for those ahead of it, in proportion to their number. Fitted together the zeros drown the rest, and a
relative error of nothing means nothing. So the first part is a rule (the feature set's `support`), checked here, and only the second a
model that is fitted and scored. `api_delay` (arrival to queued) is about the rest of the running step and belongs to every request.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import pandas as pd

import hfdtl_bayes as hb
from hfdtl_bayes.export import idle_api_delay_s
from hfdtl_bayes.features import response
from hfdtl_bayes.sample import DONORS, TARGET, sample_store_path
from hfdtl_bayes.traces import drop_warmup, split_by_regime
from hfdtl_bayes.transfer import calibrate_delays, score_delays


def check_the_rule(frame: pd.DataFrame, configuration: hb.ServingConfiguration) -> None:
    """Print how often finding no free slot tells which requests wait longer than a step."""
    features, requests = hb.feature_set("roofline", "queue_delay"), drop_warmup(frame)
    no_slot = features.supported(requests, configuration)
    step_s = features.noise_floor(configuration)
    waited = response(requests, "queue_delay") > step_s
    print(
        f"  {configuration.config_id}: {no_slot.mean():.0%} of {len(requests)} requests find no free slot; that tells who waits longer "
        f"than a step ({1e3 * step_s:.0f} ms) in {(no_slot == waited).mean():.1%} of cases"
    )


def main() -> None:
    """Fit, calibrate and score both delays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?", default=sample_store_path(), help="trace store [the embedded sample]")
    parser.add_argument("--donors", default=",".join(DONORS), help="config_ids, separated by commas [%(default)s]")
    parser.add_argument("--target", default=TARGET, help="config_id of the target [%(default)s]")
    parser.add_argument("--regimes", default="calib", help="regimes to calibrate on [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("reports/queue_delay"), help="folder to write into [%(default)s]")
    parser.add_argument("--draws", type=int, default=1500, help="draws per chain, as many again to tune [%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    settings = hb.SamplerSettings(draws=arguments.draws, tune=arguments.draws)
    store = hb.TraceStore(arguments.store)
    configuration = store.configuration(arguments.target)
    config_ids = (*arguments.donors.split(","), arguments.target)

    # Rows that are set aside are shown with their reasons and kept beside the result.
    tables = {config_id: store.requests(config_id) for config_id in config_ids}
    for table in tables.values():
        print(table.summary())
        table.write_rejected(arguments.out)
    warnings.simplefilter("ignore", hb.RejectedRowsWarning)  # just shown

    for quantity in ("queue_delay", "api_delay"):
        print(f"\n{quantity}")
        if quantity == "queue_delay":
            for config_id in config_ids:
                check_the_rule(tables[config_id].frame, store.configuration(config_id))
        donors = hb.fit_donors(store, arguments.donors.split(","), quantity=quantity, settings=settings, seed=arguments.seed)
        print(f"  donors: {donors.convergence()}")

        # Slopes are in reference steps of each configuration, so that a fast engine's queue teaches about a slow one's.
        journeys, held_out = split_by_regime(drop_warmup(tables[arguments.target].frame), arguments.regimes.split(","))
        target = calibrate_delays(donors, journeys, configuration, settings=settings, seed=arguments.seed)
        print(f"  target: {target.convergence()}")
        table = target.coefficient_table()
        print(table[table["config"] == arguments.target].drop(columns="config").round(2).to_string(index=False))

        print("  on requests of the other regimes, who waits and how long apart, then the mean delay of each load:")
        for name, model in (("zero-shot", donors), (f"{len(journeys)} journeys, {len(target.calibration_rows)} fitted", target)):
            found = score_delays(model, held_out, configuration, seed=arguments.seed)
            print(f"  {name}: {found}\n{found.by_load.round(3).to_string()}")
        print(f"  wrote {target.save(arguments.out / f'{quantity}.nc')}")

    # BLIS's alpha0 is neither: it simulates the waits for the running step and for a slot itself, and wants the lag when idle.
    idle_s = idle_api_delay_s(tables[arguments.target].frame)
    print(f"\nBLIS alpha0 of {arguments.target}: {'too few idle requests' if idle_s is None else f'{1e6 * idle_s:.0f} us'}")


if __name__ == "__main__":
    try:
        main()
    except hb.HfdtlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
