"""Statistics of 1e5 to 1e8 rows straight from Parquet, against what Arrow and DuckDB need to sum the same columns.

    python benchmarks/scale.py [--rows 1e5 1e6 1e7 1e8] [--part-rows 1e6] [--workers N] [--folder DIR] [--out FILE.csv]

Writes a folder of Parquet parts as a recorder would (Zstandard; Llama-3-8B on one H100 under changing load, three regimes, drift
of 5 % over blocks of 20 steps, noise of 5 %), runs every reader on it in a process of its own, and deletes it. Printed are wall
seconds, CPU seconds and peak memory of the process and its children (the sum of their resident sets), and the ratio to
Arrow's sum. Every reader runs twice and the faster run counts, so that all find the files in the page cache alike. Imports are not
counted; the pilot fit is, it belongs to the statistics. The statistics also read the regime, which cannot be summed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from hfdtl_bayes.configuration import ServingConfiguration, configuration_from_mapping
from hfdtl_bayes.files import atomic

NUMBERS = (
    "step_id", "step_time_s", "prefill_tokens", "decode_tokens", "prefill_requests", "decode_requests", "prefill_attention_tokens",
    "context_tokens",
)  # fmt: skip
REGIMES = ("conv", "code", "arxiv")
LOAD_STEPS = 500
"""Steps over which the number of running requests stays about the same."""


def configuration() -> ServingConfiguration:
    """Return Llama-3-8B on one H100."""
    return configuration_from_mapping(
        {
            "config_id": "llama3-8b-h100",
            "llm": {
                "name": "llama3-8b", "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
                "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256, "max_context_tokens": 131072,
            },
            "hardware": {
                "name": "h100_sxm", "peak_flops": 989e12, "memory_bandwidth": 3.35e12, "memory_bytes": 80 * 2**30,
                "interconnect_bandwidth": 450e9,
            },
            "engine": {"max_num_seqs": 256, "max_num_batched_tokens": 2048, "kv_capacity_tokens": 450_912},
        }
    )  # fmt: skip


def steps(first: int, count: int, seed: int) -> pa.Table:
    """Return `count` engine steps from number `first` on: batches as chunked prefill makes them, times near the roofline's."""
    rng = np.random.default_rng([seed, first])
    regime = rng.integers(len(REGIMES))
    level = np.repeat(rng.integers(1, 250, -(-count // LOAD_STEPS)), LOAD_STEPS)[:count]
    decode = np.clip(rng.poisson(level), 1, 250)
    context = decode * rng.integers(100, 1500, count)
    prefills = np.where(rng.random(count) < 0.5, rng.geometric(0.6, count), 0)
    full = rng.random(count) < 0.6
    prefill = np.where(prefills > 0, np.where(full, 2048 - decode, np.maximum(rng.integers(1, 1700, count), prefills)), 0)
    pairs = prefill * (rng.integers(0, 2000, count) + prefill / (2.0 * np.maximum(prefills, 1)))
    mean = 5.5e-3 + 18e-6 * prefill + 9e-9 * pairs / 32 + 40e-9 * context + 40e-6 * (decode + prefills)
    drift = np.repeat(rng.standard_normal(count // 20 + 2), 20)[first % 20 :][:count]
    seconds = mean * (1 + 0.05 * drift + 0.05 * rng.standard_normal(count)).clip(0.7)
    return pa.table(
        {
            "step_id": np.arange(first, first + count),
            "step_time_s": seconds,
            "prefill_tokens": prefill,
            "decode_tokens": decode,
            "prefill_requests": prefills,
            "decode_requests": decode,
            "prefill_attention_tokens": pairs,
            "context_tokens": context,
            "regime": pa.DictionaryArray.from_arrays(np.full(count, 0, np.int32), [REGIMES[regime]]),
        }
    )


def write_part(folder: str, number: int, rows: int, count: int) -> int:
    """Write one part; returns its size in bytes."""
    path = Path(folder) / f"part-{number}.parquet"
    pq.write_table(steps(number * rows, count, 1), path, compression="zstd")
    return path.stat().st_size


def write_parts(folder: Path, rows: int, part: int, workers: int) -> int:
    """Write `rows` steps as parts of `part` rows; returns their size in bytes."""
    sizes = [min(part, rows - at) for at in range(0, rows, part)]
    with ProcessPoolExecutor(workers) as pool:
        return sum(pool.map(write_part, [str(folder)] * len(sizes), range(len(sizes)), [part] * len(sizes), sizes))


def by_arrow(folder: str, workers: int) -> int:
    """Sum the columns of numbers with Arrow's dataset reader; returns the rows."""
    pa.set_cpu_count(workers)
    sums = dict.fromkeys(NUMBERS, 0.0)
    rows = 0
    for batch in ds.dataset(folder, format="parquet").to_batches(columns=list(NUMBERS)):
        rows += batch.num_rows
        for name in NUMBERS:
            sums[name] += pc.sum(batch.column(name)).as_py() or 0
    return rows


def by_duckdb(folder: str, workers: int) -> int:
    """Sum the columns of numbers with DuckDB; returns the rows."""
    import duckdb  # noqa: PLC0415  (loaded in the process that is measured)

    duckdb.sql(f"SET threads = {workers}")
    sums = ", ".join(f"sum({name})" for name in NUMBERS)
    found = duckdb.sql(f"SELECT count(*), {sums} FROM '{folder}/*.parquet'").fetchall()
    return int(found[0][0])


def by_statistics(folder: str, workers: int) -> int:
    """Reduce the steps to statistics of the default features; returns the rows."""
    from hfdtl_bayes.features import feature_set  # noqa: PLC0415
    from hfdtl_bayes.statistics import statistics_from_parquet  # noqa: PLC0415

    return statistics_from_parquet(folder, configuration(), feature_set("roofline"), workers=workers).statistics.rows


READERS: dict[str, Callable[[str, int], int]] = {"arrow": by_arrow, "duckdb": by_duckdb, "statistics": by_statistics}
RUNS = 2


def measure(reader: str, folder: str, workers: int) -> dict[str, float]:
    """Run a reader in this process; returns rows, and seconds of the fastest run."""
    fastest = {"wall_s": float("inf"), "cpu_s": float("inf")}
    rows = 0
    for _ in range(RUNS):
        wall, cpu = time.perf_counter(), time.process_time()
        rows = READERS[reader](folder, workers)
        taken = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        fastest = min(fastest, taken, key=lambda t: t["wall_s"])
    return {"rows": rows, **fastest}


def watched(reader: str, folder: Path, workers: int) -> dict[str, float]:
    """Run a reader in a process of its own, and watch the memory of it and its children every 20 ms."""
    words = [sys.executable, __file__, "--reader", reader, "--folder", str(folder), "--workers", str(workers)]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    peak = 0
    tree = psutil.Process(running.pid)
    while running.poll() is None:
        with contextlib.suppress(psutil.Error):
            peak = max(peak, sum(p.memory_info().rss for p in (tree, *tree.children(recursive=True))))
        time.sleep(0.02)
    if running.returncode:
        raise SystemExit(f"{reader} failed with exit code {running.returncode}")
    assert running.stdout is not None
    return {"reader": reader, **json.loads(running.stdout.read()), "peak_mb": peak / 2**20}


def main() -> None:
    """Run the benchmark, or one reader of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, nargs="+", default=[1e5, 1e6, 1e7, 1e8])
    parser.add_argument("--part-rows", type=float, default=1e6, help="rows of a part")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=None, help="where the parts are written, and deleted; a temporary folder")
    parser.add_argument("--out", type=Path, default=None, help="CSV to write")
    parser.add_argument("--reader", choices=READERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reader:
        print(json.dumps(measure(options.reader, str(options.folder), options.workers)))
        return
    table = []
    for count in map(int, options.rows):
        folder = Path(tempfile.mkdtemp(prefix="hfdtl-scale-", dir=options.folder))
        try:
            size = write_parts(folder, count, int(options.part_rows), options.workers)
            found = [watched(reader, folder, options.workers) for reader in READERS]
        finally:
            shutil.rmtree(folder)
        assert all(f["rows"] == count for f in found), found
        fastest = min(f["wall_s"] for f in found if f["reader"] != "statistics")
        for f in found:
            f |= {
                "file_mb": size / 2**20,
                "ratio_to_arrow": f["wall_s"] / found[0]["wall_s"],
                "ratio_to_faster": f["wall_s"] / fastest,
            }
            f["cpu_ratio_to_arrow"] = f["cpu_s"] / found[0]["cpu_s"]
        table += found
        print(pd.DataFrame(found).to_markdown(index=False, floatfmt=".4g"), flush=True)
    if options.out:
        with atomic(options.out) as part:
            pd.DataFrame(table).to_csv(part, index=False)


if __name__ == "__main__":
    main()
