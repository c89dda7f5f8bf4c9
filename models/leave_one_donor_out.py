"""How well will the next configuration be predicted? Leave out each donor in turn, and see how well the others foretell it.

    python models/leave_one_donor_out.py [STORE] [--donors ID,ID,ID] [--leave-out configuration,model] [--out reports/leave_one_out]

A donor that is left out is what a new configuration will be: unknown to the fit. It is predicted from its configuration alone
(zero-shot) and after 25, 50, 100, ... of its own rows, always judged on the same time blocks that none of them comes from. The
spread over donors left out is the only honest guess of the spread over configurations to come, and with three donors a rough one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import hfdtl_bayes as hb
from hfdtl_bayes.report import learning_curve_figure, save_figure
from hfdtl_bayes.sample import DONORS, sample_store_path


def main() -> None:
    """Cross-validate donors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?", default=sample_store_path(), help="trace store [the embedded sample]")
    parser.add_argument("--donors", default=",".join(DONORS), help="config_ids, separated by commas [%(default)s]")
    parser.add_argument("--features", default="roofline", help="feature set [%(default)s]")
    parser.add_argument("--leave-out", default="configuration", help="configuration, model, hardware, tp, workload [%(default)s]")
    parser.add_argument("--rows", default="0,25,50,100,250,500", help="calibration rows [%(default)s]")
    parser.add_argument("--seeds", type=int, default=1, help="how many times calibration rows are drawn [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("reports/leave_one_out"), help="folder to write into [%(default)s]")
    parser.add_argument("--draws", type=int, default=250, help="draws per chain of each refit [%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    # Half of the time blocks of every regime, the last ones, are kept to judge by; calibration rows are whole blocks of the rest.
    settings = hb.CrossValidationSettings(
        rows=tuple(int(n) for n in arguments.rows.split(",")),
        seeds=arguments.seeds,
        sampler=hb.SamplerSettings(draws=arguments.draws),
    )
    found = hb.cross_validate(
        hb.TraceStore(arguments.store),
        arguments.donors.split(","),
        arguments.features,
        leave_out=arguments.leave_out.split(","),
        settings=settings,
        seed=arguments.seed,
    )

    # Each donor by itself: is one of them unlike the others?
    shown = found.table.pivot_table(index=["leave_out", "config"], columns="rows", values="mape", sort=False)
    print(f"\nHeld-out MAPE (%) by calibration rows:\n{(100 * shown).round(1).to_string()}")

    # Intervals are right if their coverage is; joint log scores tell whether they are right together. Higher is better.
    means = found.table.groupby(["leave_out", "rows"])[["coverage", "block_coverage", "log_score_per_row"]].mean()
    print(f"\nCoverage of 95 % intervals, and log score in nats per row:\n{means.round(3).to_string()}")

    print(f"\n{found}")
    first, last = (found.error(n) for n in (min(settings.rows), max(settings.rows)))
    if last.typical < 1.15 * last.attainable:
        print(f"\nAfter {last.rows} rows what is left is noise: nothing more is to be gained from rows like these.")
    elif last.typical > 0.8 * first.typical:
        print(f"\n{last.rows} rows hardly help: what is missing is not data but a feature, or a donor of another kind.")

    arguments.out.mkdir(parents=True, exist_ok=True)
    found.table.to_csv(arguments.out / "scores.csv", index=False)
    drawn = save_figure(learning_curve_figure(found.learning_curve()), arguments.out / "learning_curve.svg")
    print(f"\nwrote {arguments.out / 'scores.csv'} and {drawn}")


if __name__ == "__main__":
    try:
        main()
    except hb.HfdtlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
