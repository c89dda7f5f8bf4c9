"""Closed loop: plan traffic, record it, calibrate, judge, plan again, until the verdict accepts.

    python models/closed_loop.py
    python models/closed_loop.py my_store --donors a,b,c --target d --deployment heavy --out reports/mine

What would be sent to a live engine is shown first: a plan of traffic that the target has never seen, as commands for vLLM's benchmark. Then
the loop is run with the target's recording standing in for the engine: each regime, cut into segments of some steps, is traffic that can be
sent, and sending it yields its real rows in order. Against a real engine the same loop is `hfdtl-bayes follow`: it takes parts of a trace as
they appear in a folder, and writes the next plan after each.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import hfdtl_bayes as hb
from hfdtl_bayes.design.bench_commands import bench_script
from hfdtl_bayes.design.closed_loop import ClosedLoop
from hfdtl_bayes.design.simulated_loop import recorded_segments
from hfdtl_bayes.design.traffic_plan import plan_traffic
from hfdtl_bayes.sample import DONORS, TARGET, sample_store_path


def main() -> None:
    """Run the loop until it accepts, the recording is used up, or it was long enough."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?", default=sample_store_path(), help="trace store [the embedded sample]")
    parser.add_argument("--donors", default=",".join(DONORS), help="config_ids, separated by commas [%(default)s]")
    parser.add_argument("--posterior", type=Path, help="a donors' posterior to use instead of fitting --donors")
    parser.add_argument("--target", default=TARGET, help="config_id of the target [%(default)s]")
    parser.add_argument("--deployment", default="load0.85,load1.2", help="regimes that will be predicted [%(default)s]")
    parser.add_argument("--segment", type=int, default=60, help="steps that are sent at once [%(default)s]")
    parser.add_argument("--most", type=int, default=50, help="segments after which to give up [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("reports/closed_loop"), help="folder to write into [%(default)s]")
    parser.add_argument("--draws", type=int, default=500, help="draws per chain of the donors [%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    store = hb.TraceStore(arguments.store)
    if arguments.posterior:
        donors = hb.LatencyPosterior.load(arguments.posterior)
    else:
        settings = hb.SamplerSettings(draws=arguments.draws)
        donors = hb.fit_donors(store, arguments.donors.split(","), settings=settings, seed=arguments.seed)
    print(f"donors {', '.join(donors.donors)}: {donors.convergence()}")

    configuration = store.configuration(arguments.target)
    rows = hb.usable_rows(store.steps(arguments.target).frame, configuration, donors.feature_set)
    deployment = rows[rows["regime"].isin(arguments.deployment.split(","))]

    # What one would send to a live engine, knowing nothing of it but its YAML and the donors.
    plan = plan_traffic(donors, configuration, deployment, seed=arguments.seed)
    print(f"\n{plan}")
    if plan.segments:
        print(bench_script(plan))

    # The loop. `measure` is the engine: here it looks the rows up, elsewhere it sends traffic and reads the trace.
    left = {s.name: s for s in recorded_segments(rows, rows=arguments.segment, by=("regime",))}
    loop, spent_s = ClosedLoop(donors, configuration, deployment, seed=arguments.seed), 0.0
    while left and not loop.accepted and len(loop.parts) < arguments.most:
        path = loop.plan(list(left.values()))
        if not path.chosen:
            # A verdict is expected to accept, and does not yet: more of the traffic that tells most.
            path = loop.plan(list(left.values()), stop=False)
        measured = left.pop(list(left)[path.chosen[0]])
        spent_s += measured.cost_s
        loop.take(measured.steps, measured.name)
        said = (
            f"{loop.verdict.outcome}, P(MAPE < {loop.verdict.limit:.1%}) = {loop.verdict.probability_below_limit:.2f}"
            if loop.verdict
            else "-"
        )
        print(f"{measured.name}: {loop.rows} rows, {spent_s:.1f} s; expected error {path.standings[1].error:.1%}; verdict {said}")

    print(f"\n{loop.verdict}")
    print(f"wrote {loop.posterior.save(arguments.out / 'posterior.nc')}")


if __name__ == "__main__":
    try:
        main()
    except hb.HfdtlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
