"""Donors: what richly traced configurations teach about the population that the next configuration comes from.

    python models/donors.py
    python models/donors.py my_store --donors a,b,c --features hfdtl --out reports/mine

Reads the engine steps of a few donors, states what is believed before any data, fits the hierarchical model, and prints what
the data changed. Writes the posterior, which `models/target.py` and `hfdtl-bayes calibrate` take as their prior.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import hfdtl_bayes as hb
from hfdtl_bayes.sample import DONORS, sample_store_path
from hfdtl_bayes.traces import drop_warmup


def main() -> None:
    """Fit the donors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?", default=sample_store_path(), help="trace store [the embedded sample]")
    parser.add_argument("--donors", default=",".join(DONORS), help="config_ids, separated by commas [%(default)s]")
    parser.add_argument("--features", default="roofline", help="feature set [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("reports/donors"), help="folder to write into [%(default)s]")
    parser.add_argument("--draws", type=int, default=500, help="draws per chain, as many again to tune [%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    # The features say what a step's time may depend on; each carries its unit, its formula and a prior.
    features = hb.feature_set(arguments.features, "step_time")
    # Edit the ranges here: how unlike are configurations, how noisy is a step, how far does a machine's speed drift?
    priors = hb.PriorSettings()
    print("What is believed before any data:")
    for sentence in priors.sentences(features):
        print(f"  - {sentence}")

    # Rows become sufficient statistics, one small set per donor; from here on the number of rows costs nothing.
    store = hb.TraceStore(arguments.store)
    statistics = []
    print("\nWhat was read:")
    for donor in arguments.donors.split(","):
        steps = store.steps(donor)
        print(f"  {steps.summary()}")
        steps.write_rejected(arguments.out)
        rows = drop_warmup(steps.frame)
        statistics.append(hb.statistics_from_rows(rows, store.configuration(donor), features))

    # One joint fit: every donor has its own coefficients, drawn from a population whose spread is learnt too.
    settings = hb.SamplerSettings(draws=arguments.draws, tune=arguments.draws)
    posterior = hb.fit(statistics, features, priors, settings, seed=arguments.seed)
    print(f"\n{posterior.convergence()}")

    table = posterior.coefficient_table()
    population = table[table["config"] == "population"].drop(columns="config")
    print("\nThe population (a coefficient of 1 of a physical term means: as fast as the hardware's peak):")
    print(population.round(3).to_string(index=False))

    # A coefficient is informed where its posterior is much narrower than its prior; the others still hold the prior's word.
    print("\nWhat the donors informed (posterior sd / prior sd; near 1 only the prior speaks):")
    for row in population.itertuples():
        feature = features[row.feature]
        print(f"  {row.feature:<20} {row.sd / (feature.prior.sd * feature.reference):5.2f}")

    written = posterior.save(arguments.out / "posterior.nc")
    table.to_csv(arguments.out / "coefficients.csv", index=False)
    print(f"\nwrote {written} and {arguments.out / 'coefficients.csv'}")


if __name__ == "__main__":
    try:
        main()
    except hb.HfdtlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
