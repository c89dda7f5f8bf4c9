"""Likelihoods: whether errors are Gaussian, as the default says, and what another answer would change.

    python models/likelihoods.py
    python models/likelihoods.py my_store --donors a,b,c --rows 1000 --out reports/mine

The default likelihood is Gaussian around the mean, with a drift that the steps of one time block share; only it has sufficient
statistics. Here it is checked on a subsample of rows against heavier tails (Student-t, a share of outliers) and a skewed one
(lognormal): each is fitted to the same rows, and judged by how well it foretells time blocks left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

import hfdtl_bayes as hb
from hfdtl_bayes.model.likelihoods import SHAPES
from hfdtl_bayes.sample import DONORS, sample_store_path
from hfdtl_bayes.statistics import scaled_rows
from hfdtl_bayes.traces import drop_warmup
from hfdtl_bayes.transfer import compare_likelihoods


def main() -> None:
    """Compare likelihoods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?", default=sample_store_path(), help="trace store [the embedded sample]")
    parser.add_argument("--donors", default=",".join(DONORS), help="config_ids, separated by commas [%(default)s]")
    parser.add_argument("--features", default="roofline", help="feature set [%(default)s]")
    parser.add_argument("--likelihoods", default=",".join(SHAPES), help="those to compare [%(default)s]")
    parser.add_argument("--rows", type=int, default=600, help="most rows per donor, whole time blocks [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("reports/likelihoods"), help="folder to write into [%(default)s]")
    parser.add_argument("--draws", type=int, default=500, help="draws per chain, as many again to tune [%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    # A row-level fit costs time in proportion to its rows, so it sees some: whole blocks, evenly spread over the recording.
    features = hb.feature_set(arguments.features, "step_time")
    store, rows = hb.TraceStore(arguments.store), []
    print("What the fits see:")
    for donor in arguments.donors.split(","):
        frame = drop_warmup(store.steps(donor).frame)
        rows.append(scaled_rows(frame, store.configuration(donor), features, rows=arguments.rows, seed=arguments.seed))
        print(f"  {rows[-1]}")

    settings = hb.SamplerSettings(draws=arguments.draws, tune=arguments.draws, chains=2)
    names = arguments.likelihoods.split(",")
    table, fits = compare_likelihoods(rows, features, settings=settings, likelihoods=names, seed=arguments.seed)
    for name, posterior in fits.items():
        shape = ", ".join(f"{n} {posterior.draws_of(n).mean():.3g}" for n in SHAPES[name])
        print(f"\n{name}: {posterior.convergence()}{f'; {shape}' if shape else ''}")

    # elpd: nats of log density, in seconds, of every block given all others; behind: paired by block, with its standard error.
    print(f"\nTime blocks left out, best likelihood first:\n{table.round(1).to_string()}")
    best = str(table.index[0])
    if "gaussian" in fits and best != "gaussian":
        lost, error = table.loc["gaussian", ["behind", "se_behind"]]
        print(f"\nThe Gaussian is {lost:.0f} nats behind {best}, {lost / max(error, 1e-12):.1f} standard errors.")
        # What it means: by how many of its own sds each coefficient moves if the better likelihood is believed.
        base, other = (fits[n].draws_of("theta") for n in ("gaussian", best))
        moved = np.abs(other.mean(axis=0) - base.mean(axis=0)) / base.std(axis=0)
        print(f"Coefficients move by {np.median(moved):.2f} of their sds (median), at most by {moved.max():.1f}:")
        for c, k in np.argwhere(moved > 1):
            print(
                f"  {fits[best].config_ids[c]} {features.coef_names[k]}: {base[:, c, k].mean():.3g} -> {other[:, c, k].mean():.3g}"
            )
    elif best == "gaussian":
        print("\nNone foretells left-out blocks better than the Gaussian.")

    arguments.out.mkdir(parents=True, exist_ok=True)
    table.rename_axis("likelihood").to_csv(arguments.out / "likelihoods.csv")
    written = fits[best].save(arguments.out / "posterior.nc")
    print(f"\nwrote {written} ({best}) and {arguments.out / 'likelihoods.csv'}")


if __name__ == "__main__":
    try:
        main()
    except hb.HfdtlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
