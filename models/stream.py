"""Stream: a target calibrated while its traffic arrives, chunk by chunk, and what one kind of traffic taught taken back.

    python models/stream.py
    python models/stream.py my_store --donors a,b,c --target d --chunk 50 --out reports/mine

Fits the donors (or takes the posterior `models/donors.py` wrote), fixes the scale of errors on the first chunk, and adds the
target's steps as they were recorded, each regime a part of its own. After every few chunks it says what the posterior expects of a
heavy batch. The first of these posteriors is left as it is and watched: does it still predict what comes after it? The test may be
looked at after every block. Then one regime is removed and restored: its traffic leaves no trace, and comes back without a row being read.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import hfdtl_bayes as hb
from hfdtl_bayes.sample import DONORS, TARGET, sample_store_path
from hfdtl_bayes.transfer import TargetStream, TrafficMonitor


def main() -> None:
    """Calibrate the target as its rows come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?", default=sample_store_path(), help="trace store [the embedded sample]")
    parser.add_argument("--donors", default=",".join(DONORS), help="config_ids, separated by commas [%(default)s]")
    parser.add_argument("--posterior", type=Path, help="a donors' posterior to use instead of fitting --donors")
    parser.add_argument("--target", default=TARGET, help="config_id of the target [%(default)s]")
    parser.add_argument("--chunk", type=int, default=64, help="steps that arrive at once [%(default)s]")
    parser.add_argument("--every", type=int, default=4, help="chunks between two posteriors [%(default)s]")
    parser.add_argument("--remove", help="regime to take back in the end [the last one]")
    parser.add_argument("--out", type=Path, default=Path("reports/stream"), help="folder to write into [%(default)s]")
    parser.add_argument("--draws", type=int, default=500, help="draws per chain of the donors, and of refits [%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    settings = hb.SamplerSettings(draws=arguments.draws)

    store = hb.TraceStore(arguments.store)
    if arguments.posterior:
        donors = hb.LatencyPosterior.load(arguments.posterior)
    else:
        donors = hb.fit_donors(store, arguments.donors.split(","), settings=settings, seed=arguments.seed)
    print(f"donors {', '.join(donors.donors)}: {donors.convergence()}")

    configuration = store.configuration(arguments.target)
    rows = hb.usable_rows(store.steps(arguments.target).frame, configuration, donors.feature_set)
    heavy = rows.nlargest(1, "step_time_s")
    print(f"zero-shot, the slowest step of the recording: {said(donors, heavy, configuration)}")

    # The loop of a collector that sees steps as they are made; here they come from the recording.
    stream = TargetStream.start(donors, configuration, rows[: arguments.chunk], label=str(rows["regime"].iloc[0]))
    posterior, monitor = donors, None
    for number, begin in enumerate(range(arguments.chunk, len(rows), arguments.chunk), 1):
        chunk = rows[begin : begin + arguments.chunk]
        for regime, part in chunk.groupby("regime", sort=False):
            stream.add(part, str(regime))
        if monitor:
            monitor.add(chunk)
        if number % arguments.every and begin + arguments.chunk < len(rows):
            continue
        started = time.perf_counter()
        posterior = stream.posterior(seed=arguments.seed, settings=settings)
        took = 1000 * (time.perf_counter() - started)
        monitor = monitor or TrafficMonitor(posterior, configuration)
        how = "" if posterior.engine == "conditional" else " (refitted)"
        print(f"{stream.statistics.rows:5d} steps, {took:.0f} ms{how}: {said(posterior, heavy, configuration)}")
    print(posterior.convergence())
    print(f"the first of these posteriors: {monitor}")

    # Was that regime normal traffic? Without it the posterior is what it would have been had it never come.
    removed = arguments.remove or stream.labels[-1]
    if len(stream.labels) > 1:
        stream.remove(removed)
        without = stream.posterior(seed=arguments.seed, settings=settings)
        print(f"without {removed}: {stream.statistics.rows} steps: {said(without, heavy, configuration)}")
        stream.restore(removed)
    print(f"wrote {posterior.save(arguments.out / 'posterior.nc')}")


def said(posterior: hb.LatencyPosterior, batch: object, configuration: hb.ServingConfiguration) -> str:
    """Return what a posterior expects of a batch, in words."""
    expected = posterior.predict(batch, configuration).iloc[0]
    return (
        f"{1000 * expected['mean_s']:.1f} ms, 95 % {1000 * expected['q2.5_mean_s']:.1f} to {1000 * expected['q97.5_mean_s']:.1f}"
    )


if __name__ == "__main__":
    try:
        main()
    except hb.HfdtlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
