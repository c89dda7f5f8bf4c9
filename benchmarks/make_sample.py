"""Make the sample of real traces that ships with the package.

    python benchmarks/make_sample.py ../shared/data/vllm_cpu hfdtl_bayes/sample/store

Keeps the columns of the schema and nothing else; writes into a folder that must not hold these configurations yet.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hfdtl_bayes.traces import REQUEST_SCHEMA, STEP_SCHEMA, TraceStore, read_table, write_store

CONFIGURATIONS = ("c01_llama-s_base", "c09_llama-m_base", "c11_moe_base", "c13_qwen-s_base")


def main() -> None:
    """Copy the chosen configurations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    store = TraceStore(arguments.source)
    for config_id in CONFIGURATIONS:
        tables = {}
        for name, schema in (("steps", STEP_SCHEMA), ("requests", REQUEST_SCHEMA)):
            table = read_table(arguments.source / config_id / f"{name}.parquet")
            tables[name] = table[[c.name for c in schema if c.name in table.columns]]
        folder = write_store(arguments.target, store.configuration(config_id), tables["steps"], tables["requests"])
        print(folder, sum(p.stat().st_size for p in folder.iterdir()), "bytes")


if __name__ == "__main__":
    main()
