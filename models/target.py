"""Target: a new configuration calibrated on little, calm traffic, then asked about the traffic that matters.

    python models/target.py
    python models/target.py my_store --donors a,b,c --target d --regimes low --max-rows 200 --out reports/mine

Fits the donors (or takes the posterior `models/donors.py` wrote), predicts the target without any of its data, calibrates it on
a few rows of low load, and judges both on the regimes held out. Ends with the verdict and the coefficients for BLIS.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import hfdtl_bayes as hb
from hfdtl_bayes.export import idle_api_delay_s, write_text
from hfdtl_bayes.sample import DONORS, TARGET, sample_store_path
from hfdtl_bayes.traces import TraceTable, drop_warmup, split_by_regime


def shown(table: TraceTable, out: Path) -> TraceTable:
    """Print what was read, and keep the rows that were set aside, with their reasons, beside the result."""
    print(table.summary())
    table.write_rejected(out)
    return table


def main() -> None:
    """Calibrate the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?", default=sample_store_path(), help="trace store [the embedded sample]")
    parser.add_argument("--donors", default=",".join(DONORS), help="config_ids, separated by commas [%(default)s]")
    parser.add_argument("--posterior", type=Path, help="a donors' posterior to use instead of fitting --donors")
    parser.add_argument("--target", default=TARGET, help="config_id of the target [%(default)s]")
    parser.add_argument("--regimes", default="calib,load0.15,load0.5", help="regimes to calibrate on [%(default)s]")
    parser.add_argument("--max-rows", type=int, default=300, help="first rows of them to use [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("reports/target"), help="folder to write into [%(default)s]")
    parser.add_argument("--draws", type=int, default=500, help="draws per chain, as many again to tune [%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    settings = hb.SamplerSettings(draws=arguments.draws, tune=arguments.draws)

    store = hb.TraceStore(arguments.store)
    if arguments.posterior:
        donors = hb.LatencyPosterior.load(arguments.posterior)
    else:
        for donor in arguments.donors.split(","):
            shown(store.steps(donor), arguments.out)
        warnings.simplefilter("ignore", hb.RejectedRowsWarning)  # just shown
        donors = hb.fit_donors(store, arguments.donors.split(","), settings=settings, seed=arguments.seed)
    print(f"donors {', '.join(donors.donors)}: {donors.convergence()}")

    # Calibrate on calm traffic: what is cheap to record. Everything else is held out, and no time block is on both sides.
    configuration = store.configuration(arguments.target)
    rows = drop_warmup(shown(store.steps(arguments.target), arguments.out).frame)
    calm, _ = split_by_regime(rows, arguments.regimes.split(","))
    posterior = hb.calibrate(donors, calm[: arguments.max_rows], configuration, settings=settings, seed=arguments.seed)
    print(f"{arguments.target}: {posterior.convergence()}")

    # Zero-shot, the target is one more draw from the donors' population; calibrated, its own rows have spoken.
    calibration, held_out = hb.held_out_rows(posterior, rows)
    for name, model in (("zero-shot", donors), (f"calibrated on {len(calibration)} rows", posterior)):
        found = hb.evaluate(model, held_out, configuration, seed=arguments.seed)
        print(f"\n{name}: {found}")
        print((100 * found.by_regime[["mape", "bias", "coverage", "block_coverage"]]).round(1).add_suffix(" %").to_string())

    # The verdict weighs accuracy, intervals and kinship with the donors. Its thresholds are yours to set.
    thresholds = hb.VerdictSettings()
    judged = hb.verdict(posterior, held_out, configuration, thresholds, calibration_rows=calibration, seed=arguments.seed)
    print(f"\n{judged}")

    written = [posterior.save(arguments.out / "posterior.nc")]

    # For BLIS: the posterior mean on its own basis, right for this traffic; alpha0 is the lag of requests that met an idle
    # engine.
    alpha0_s = idle_api_delay_s(shown(store.requests(arguments.target), arguments.out).frame) or 0.0
    vectors = hb.blis_vectors(posterior, configuration, rows, alpha0_s=alpha0_s)
    print(f"\n{vectors.summary()}\n{hb.blis_flags(vectors)}")
    written.append(write_text(hb.blis_yaml(vectors), arguments.out / "blis.yaml"))
    print(f"wrote {', '.join(map(str, written))}")


if __name__ == "__main__":
    try:
        main()
    except hb.HfdtlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
