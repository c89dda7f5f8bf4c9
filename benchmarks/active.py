"""Learning curves of every rule that chooses rows: error on the deployment mix against rows and against seconds of GPU time.

    OMP_NUM_THREADS=1 python benchmarks/active.py ../shared/data/gpu_steps ../shared/data/vllm_cpu [--seeds 3] [--targets N] [--jobs 2]
        [--quick] [--features roofline] [--out FILE.csv]

Every configuration that is no donor is a target. Rows to calibrate it on are chosen from a pool whose traffic is not that of the deployment
mix (`transfer_splits` has the shifts; besides, all traffic as the pool and one heavy regime as the mix), without labels but for the
residual rule, up to 200. At each count the target is calibrated on the rows chosen so far, by conditioning the donors' draws
(`calibrate_by_statistics`, engine "conditional": what `calibrate` does wherever the weights allow it, never a joint refit), and scored by
the MAPE of the expected value on the mix, against the noise-free time where that is known.

A seed draws 70 % of the pool (whole time blocks of the recorded engine), so that rules without chance vary too, and the random rules'
rows. The first seed runs all rules, further seeds those of the requirement. `/s` chooses by gain per second; `misfit 0` trusts the features
(`SelectionSettings.misfit`). `residual` is the original design's rule: a first fit to 10 random rows, then the largest absolute
residuals, all labels of the pool known.

With --out, scores are written after every target, and a run that is begun again goes on where it ended. --quick: one seed, every sixth
target, the rules of the requirement.

Tables, in per cent (`active_tables`): MAPE by rows and by GPU seconds with 90 % intervals over targets and seeds; rows and seconds until a
rule has the error of 200 random rows; what issue "Active learning" asks; what the model itself expected, which says how much of a
difference is information and how much misfit; and targets where the rule is worse than random by more than noise.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from active_tables import GOAL, MOST, RANDOM, RESIDUAL, report
from transfer_splits import DONOR_SETS, HEAVY, HEAVY_LOAD, Split, load, mape, splits

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.design import Acquisition, SelectionSettings, select_rows
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.files import atomic
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.statistics import DEFAULT_BLOCK_LENGTH
from hfdtl_bayes.traces import TraceStore, time_blocks
from hfdtl_bayes.transfer import fit_donors, usable_rows
from hfdtl_bayes.transfer.calibration import calibrate_by_statistics

COUNTS = (10, 25, 50, 100, MOST)
"""Numbers of rows at which targets are calibrated."""

FIRST = 10
"""Random rows of the first fit that the residual rule needs."""
KEPT = 0.7
"""Share of a pool that a seed draws."""
RANDOM_DRAWS = 4
"""Times that random rows are drawn per seed: what is compared with them should not owe to their luck."""
SETTINGS = SelectionSettings(mix_rows=32)
"""A quarter of the default's rows for EPIG, which takes a quarter of the time."""

GAINS = (Acquisition.DEPLOYMENT, Acquisition.EPIG, Acquisition.INFORMATION, Acquisition.VARIANCE)


@dataclass(frozen=True)
class Rule:
    """A way to choose rows."""

    acquisition: Acquisition
    per_second: bool = False
    trusting: bool = False
    """Whether the features are trusted: no misfit in the choice."""

    @property
    def name(self) -> str:
        """As the tables have it."""
        return f"{self.acquisition}{'/s' if self.per_second else ''}{', misfit 0' if self.trusting else ''}"


RULES = (
    *(Rule(a) for a in (*GAINS, Acquisition.RANDOM, Acquisition.STRATIFIED, Acquisition.RESIDUAL)),
    *(Rule(a, per_second=True) for a in GAINS),
    Rule(Acquisition.DEPLOYMENT, trusting=True),
)
KEY = ("store", "features", "target", "seed", "every_rule")
"""Columns that say which case a score is of."""

ASKED = tuple(r for r in RULES if r.name in (GOAL, RANDOM, RESIDUAL))
"""Rules that the requirement speaks of."""


@dataclass(frozen=True)
class Case:
    """One target, the seed its rows are drawn with, whether all rules run, and the feature set."""

    store: str
    target: str
    seed: int
    every_rule: bool
    features: str

    @property
    def key(self) -> tuple[str, str, str, int, bool]:
        """What tells it from other cases, wherever the store lies: the columns `KEY`."""
        return Path(self.store).name, self.features, self.target, self.seed, self.every_rule


@dataclass(frozen=True, eq=False)
class Chosen:
    """Rows in the order they were chosen, as positions in the pool, and the error expected of the mix before any and after each."""

    rows: np.ndarray
    expected_mape: np.ndarray


@cache
def fitted_donors(store: str, features: str) -> LatencyPosterior:
    """Fit the standard donors, once per process."""
    return fit_donors(TraceStore(store), DONOR_SETS[Path(store).name]["standard"], features, show_progress=False)


def scenarios(store: str, frame: pd.DataFrame, seed: int) -> list[Split]:
    """Return pools and deployment mixes of other traffic; of the recorded engine also the same traffic later."""
    made = [s for s in splits(store, frame, seed) if s.shift or store == "vllm_cpu"]
    if store == "vllm_cpu":
        held = made[0].test
        heavy = held[held["regime"].map(load) >= HEAVY_LOAD]
        return [*made, Split("all traffic to high load", made[0].pool, heavy)] if len(heavy) else made
    half = np.random.default_rng([seed, 2]).random(len(frame)) < 0.5
    heavy = frame[~half & (frame["regime"] == "arxiv") & (frame["target_concurrency"] >= HEAVY)]
    return [*made, Split("all traffic to heavy summarisation", frame[half], heavy)] if len(heavy) else made


def drawn_pool(pool: pd.DataFrame, seed: int, *, whole_blocks: bool) -> pd.DataFrame:
    """Return a random share of a pool, no less than `MOST` rows if it has them, in time order."""
    rng = np.random.default_rng([seed, 3])
    units = time_blocks(pool, DEFAULT_BLOCK_LENGTH) if whole_blocks else np.arange(len(pool))
    known, sizes = np.unique(units, return_counts=True)
    order = rng.permutation(len(known))
    wanted = min(max(KEPT * len(pool), MOST), len(pool))
    stop = int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1
    return pool[np.isin(units, known[order[:stop]])]


def chosen(
    rule: Rule,
    donors: LatencyPosterior,
    pool: pd.DataFrame,
    deployment: pd.DataFrame,
    configuration: ServingConfiguration,
    seed: int,
) -> Chosen:
    """Choose rows of a pool by a rule, as positions in it."""
    budget, posterior, start = min(MOST, len(pool)), donors, np.zeros(0, dtype=np.int64)
    if rule.acquisition is Acquisition.RESIDUAL:
        start = np.random.default_rng([seed, 4]).permutation(len(pool))[:FIRST]
        first = pool.iloc[np.sort(start)]
        posterior = calibrate_by_statistics(donors, first, configuration, engine="conditional", seed=seed)
    found = select_rows(
        posterior,
        pool,
        configuration,
        budget - len(start),
        acquisition=rule.acquisition,
        deployment=deployment,
        per_second=rule.per_second,
        settings=replace(SETTINGS, misfit=0.0) if rule.trusting else SETTINGS,
        seed=seed,
    )
    expected = np.full(budget + 1, np.nan) if len(start) else found.expected_mape
    return Chosen(np.concatenate([start, pool.index.get_indexer(found.index)]), expected)


def curve(
    picked: Chosen,
    donors: LatencyPosterior,
    pool: pd.DataFrame,
    test: pd.DataFrame,
    configuration: ServingConfiguration,
    seed: int,
) -> list[dict[str, object]]:
    """Return the scores at every number of rows."""
    seconds = np.cumsum(pool["step_time_s"].to_numpy()[picked.rows])
    found = []
    for n in (n for n in COUNTS if n <= len(picked.rows)):
        rows = pool.iloc[np.sort(picked.rows[:n])]
        fit = calibrate_by_statistics(donors, rows, configuration, engine="conditional", seed=seed)
        error = mape(fit.expected_s(test, configuration), test)
        found.append({"n": n, "gpu_s": seconds[n - 1], "mape": error, "expected": 100 * picked.expected_mape[n]})
    return found


def judge(case: Case) -> list[dict[str, object]]:
    """Score every rule on every scenario of one target."""
    store, features, target, seed, every_rule = case.key
    opened, donors = TraceStore(case.store), fitted_donors(case.store, features)
    configuration = opened.configuration(target)
    frame = usable_rows(opened.steps(target).frame, configuration, donors.feature_set)
    found: list[dict[str, object]] = []
    for split in scenarios(store, frame, seed):
        pool = drawn_pool(split.pool, seed, whole_blocks=store == "vllm_cpu")
        if len(pool) < MOST:
            continue
        common: dict[str, object] = {**dict(zip(KEY, case.key, strict=True)), "scenario": split.name}
        try:
            common["reach"] = reach(donors, pool, split.test, configuration, seed)
        except InputError as error:
            print(f"\n{target}, {split.name}: {error}", file=sys.stderr)
            continue
        for rule in RULES if every_rule else ASKED:
            for draw in range(RANDOM_DRAWS if rule.acquisition is Acquisition.RANDOM else 1):
                picked = chosen(rule, donors, pool, split.test, configuration, RANDOM_DRAWS * seed + draw)
                rows = curve(picked, donors, pool, split.test, configuration, seed)
                found += [common | {"rule": rule.name, "draw": draw} | row for row in rows]
    return found


def reach(
    donors: LatencyPosterior, pool: pd.DataFrame, test: pd.DataFrame, configuration: ServingConfiguration, seed: int
) -> float:
    """Return the share of the mix's variance that the whole pool would remove, as the model has it before any label."""
    found = select_rows(donors, pool, configuration, 1, acquisition=RANDOM, deployment=test, settings=SETTINGS, seed=seed)
    return float(1.0 - (found.pool_sd / found.expected_sd[0]) ** 2)


def done(path: Path | None) -> pd.DataFrame:
    """Return the scores that an earlier run has written."""
    return pd.read_csv(path) if path is not None and path.exists() else pd.DataFrame()


def run(cases: Sequence[Case], jobs: int, out: Path | None) -> pd.DataFrame:
    """Judge all cases that are not judged yet, in processes of their own."""
    started, kept = time.perf_counter(), done(out)
    known = set(kept[[*KEY]].itertuples(index=False, name=None)) if len(kept) else set()
    cases = [c for c in cases if c.key not in known]
    for store, features in dict.fromkeys((c.store, c.features) for c in cases):
        # Fitted here first, so that workers that are forked find them in the cache.
        fitted_donors(store, features)
    with ProcessPoolExecutor(jobs) as pool:
        work = [pool.submit(judge, c) for c in cases]
        for count, future in enumerate(as_completed(work), 1):
            kept = pd.concat([kept, pd.DataFrame(future.result())], ignore_index=True)
            if out is not None:
                with atomic(out) as part:
                    kept.to_csv(part, index=False)
            print(f"\r{count}/{len(work)} targets, {time.perf_counter() - started:.0f} s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return kept


def cases_of(stores: Sequence[Path], targets: int | None, seeds: int, features: str, *, quick: bool) -> list[Case]:
    """Return what is to be judged: seed by seed, so that a run cut short has whole seeds."""
    made = []
    for seed in range(1 if quick else seeds):
        for store in stores:
            ids = [c for c in TraceStore(store).config_ids if c not in DONOR_SETS[store.name]["standard"]]
            wanted = min(len(ids), targets or (-(-len(ids) // 6) if quick else len(ids)))
            spread = np.unique(np.linspace(0, len(ids) - 1, wanted).round().astype(int))
            made += [Case(str(store), ids[i], seed, seed == 0 and not quick, features) for i in spread]
    return made


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, default=3, help="times that pools and random rows are drawn")
    parser.add_argument("--targets", type=int, default=None, help="only so many targets of each store, evenly spread")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one seed, every sixth target, the rules of the requirement")
    parser.add_argument("--features", default="roofline", help="feature set of the donors")
    parser.add_argument("--out", type=Path, default=None, help="write every score as CSV, and go on from those it has")
    arguments = parser.parse_args()
    unknown = [str(p) for p in arguments.stores if p.name not in DONOR_SETS]
    if unknown:
        parser.error(f"no donors are set for {', '.join(unknown)}; the stores known are {', '.join(DONOR_SETS)}")
    if arguments.seeds < 1 or (arguments.targets is not None and arguments.targets < 1):
        parser.error("--seeds and --targets must be at least 1")
    cases = cases_of(arguments.stores, arguments.targets, arguments.seeds, arguments.features, quick=arguments.quick)
    print(report(run(cases, arguments.jobs, arguments.out)))


if __name__ == "__main__":
    main()
