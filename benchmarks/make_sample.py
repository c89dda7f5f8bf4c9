"""Make the sample of real traces that ships with the package.

    python benchmarks/make_sample.py ../shared/data/vllm_cpu hfdtl_bayes/sample/store

Keeps the columns of the schema and nothing else; writes into a folder that must not hold these configurations yet. The same
recordings give the same files.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from hfdtl_bayes.sample import DONORS, TARGET
from hfdtl_bayes.traces import REQUEST_SCHEMA, STEP_SCHEMA, TraceStore, read_table, write_store


def make_sample(source: Path, target: Path) -> Iterator[Path]:
    """Copy the demo's donors and target from a trace store; yields the folder of each once it is written."""
    store = TraceStore(source)
    for config_id in sorted((*DONORS, TARGET)):
        tables = {}
        for name, schema in (("steps", STEP_SCHEMA), ("requests", REQUEST_SCHEMA)):
            table = read_table(source / config_id / f"{name}.parquet")
            tables[name] = table[[c.name for c in schema if c.name in table.columns]]
        yield write_store(target, store.configuration(config_id), tables["steps"], tables["requests"])


def main() -> None:
    """Copy the chosen configurations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    for folder in make_sample(arguments.source, arguments.target):
        print(folder, sum(p.stat().st_size for p in folder.iterdir()), "bytes")


if __name__ == "__main__":
    main()
