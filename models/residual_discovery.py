"""Residual discovery: what a latency model lacks, whether it carries over, and what it means for BLIS and Go.

    python models/residual_discovery.py
    python models/residual_discovery.py my_store --donors a,b,c --features hfdtl --out reports/mine

Reads the engine steps of a few configurations, adds a candidate of your own to the package's library, and looks for terms that the
feature set lacks: probable on the rows, and better on a configuration or on time blocks left out. If something is found, the donors are
fitted with and without it. Edit `own_candidate` to test an idea.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

import hfdtl_bayes as hb
from hfdtl_bayes.cli.output import plain
from hfdtl_bayes.features import Level, PriorRange
from hfdtl_bayes.sample import DONORS, sample_store_path
from hfdtl_bayes.transfer import DiscoverySettings


def own_candidate() -> hb.Feature:
    """Return an idea to test: a step pays for every prompt it starts, however short."""

    def prompts(frame: pd.DataFrame, _configuration: hb.ServingConfiguration):
        return frame["prefill_requests"].to_numpy(float)

    # Nothing is believed of it but its size: 90 % within a millisecond per prompt, either way.
    return hb.Feature(
        "prompts",
        Level.RESIDUAL,
        "request",
        "prefill_requests",
        prompts,
        PriorRange(-1, 1),
        ("prefill_requests",),
        1e-3,
    )


def main() -> None:
    """Look for missing terms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?", default=sample_store_path(), help="trace store [the embedded sample]")
    parser.add_argument("--donors", default=",".join(DONORS), help="config_ids, or a single target's [%(default)s]")
    parser.add_argument("--features", default="roofline", help="feature set that may lack something [%(default)s]")
    parser.add_argument("--max-terms", type=int, default=3, help="terms named at most [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("reports/discovery"), help="folder to write into [%(default)s]")
    parser.add_argument("--draws", type=int, default=500, help="draws per chain of the fits with and without [%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    hb.register_candidate(own_candidate(), meaning="a step pays for every prompt it starts", go="float64(prompts)", replace=True)
    store, donors = hb.TraceStore(arguments.store), arguments.donors.split(",")
    settings = DiscoverySettings(max_terms=arguments.max_terms)
    found = hb.discover(store, donors, arguments.features, settings=settings, seed=arguments.seed)
    print(f"{len(found.tested)} candidates tested on {sum(found.rows.values())} steps of {', '.join(found.config_ids)}:")
    for sentence in found.sentences():
        print(f"  - {sentence}")

    if found.terms:
        # The extended set is a feature set like any other. Registered under its name, saved posteriors of it can be loaded.
        extended = hb.register_feature_set(found.feature_set, replace=True)
        sampler = hb.SamplerSettings(draws=arguments.draws)
        posterior = hb.fit_donors(store, donors, extended, settings=sampler, seed=arguments.seed)
        table = posterior.coefficient_table()
        print(f"\n{posterior.convergence()}")
        print(table[table["feature"].isin([t.name for t in found.terms])].round(3).to_string(index=False))
        print(f"wrote {posterior.save(arguments.out / 'posterior.nc')}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    written = arguments.out / "discovery.json"
    written.write_text(json.dumps(plain(found.as_dict()), indent=2) + "\n")
    print(f"wrote {written}")


if __name__ == "__main__":
    try:
        main()
    except hb.HfdtlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
