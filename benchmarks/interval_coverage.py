"""Coverage of 95 % predictive intervals on held-out time blocks, each configuration a target of three donors in turn.

    python benchmarks/interval_coverage.py ../shared/data/vllm_cpu ../shared/data/gpu_steps [--jobs 2] [--targets N] [--out FILE.csv]

Of every regime the last 30 % of its time blocks are held out and the rest calibrates. Prints, per store, the share of
held-out rows and of held-out block means inside their intervals, averaged over targets, with their spread.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path

import gpu_accuracy
import pandas as pd

from hfdtl_bayes import sample
from hfdtl_bayes.model import LatencyPosterior, SamplerSettings
from hfdtl_bayes.statistics import DEFAULT_BLOCK_LENGTH
from hfdtl_bayes.traces import TraceStore, drop_warmup, split_by_blocks
from hfdtl_bayes.transfer import calibrate, evaluate, fit_donors

DONORS = {"vllm_cpu": sample.DONORS, "gpu_steps": gpu_accuracy.DONORS}
SETTINGS = SamplerSettings(draws=400, tune=250, chains=2)


@cache
def donors(store: str) -> LatencyPosterior:
    """Fit the donors once per process."""
    return fit_donors(TraceStore(store), DONORS[Path(store).name], show_progress=False)


def judge(store: str, target: str, held_out: float) -> dict[str, object]:
    """Calibrate one target on its earlier blocks and score its later ones."""
    opened = TraceStore(store)
    configuration = opened.configuration(target)
    frame = drop_warmup(opened.steps(target).frame)
    train, test = split_by_blocks(frame, held_out, DEFAULT_BLOCK_LENGTH)
    fitted = calibrate(donors(store), train, configuration, settings=SETTINGS, show_progress=False)
    found = evaluate(fitted, test, configuration)
    return {
        "store": Path(store).name,
        "target": target,
        "rows": found.rows,
        "blocks": found.blocks,
        "row_coverage": found.coverage,
        "block_coverage": found.block_coverage,
        "mape": found.mape,
        "attainable_mape": found.attainable_mape,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--held-out", type=float, default=0.3, help="share of each regime's blocks held out")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--targets", type=int, default=None, help="judge only the first N targets of each store")
    parser.add_argument("--out", type=Path, default=None, help="write every score as CSV")
    arguments = parser.parse_args()
    unknown = [str(p) for p in arguments.stores if p.name not in DONORS]
    if unknown:
        parser.error(f"no donors are set for {', '.join(unknown)}; the stores known are {', '.join(DONORS)}")
    work = []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for path in arguments.stores:
            ids = TraceStore(path).config_ids
            targets = [c for c in ids if c not in DONORS[path.name]][: arguments.targets]
            work += [pool.submit(judge, str(path), t, arguments.held_out) for t in targets]
        rows = []
        for done, future in enumerate(as_completed(work), 1):
            rows.append(future.result())
            print(f"\r{done}/{len(work)} targets", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    results = pd.DataFrame(rows).sort_values(["store", "target"])
    if arguments.out:
        results.to_csv(arguments.out, index=False)
    measured = ["row_coverage", "block_coverage", "mape", "attainable_mape"]
    summary = results.groupby("store")[measured].agg(["mean", "min", "max"])
    print((100 * summary).round(1).T.to_markdown())


if __name__ == "__main__":
    main()
