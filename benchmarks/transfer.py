"""How well transfer works: ours beside the design's recipe, fits of the target alone and boosting; intervals and verdicts with it.

    OMP_NUM_THREADS=1 python benchmarks/transfer.py ../shared/data/gpu_steps ../shared/data/vllm_cpu [--donor-sets standard five two ...]
        [--seeds 1] [--jobs 2] [--targets N] [--no-reference] [--discrepancy] [--out FILE.csv]

Every configuration that is no donor is a target, given 0, 10, 25, 50, 100, 250 or 500 of its rows. Composed GPU steps: calibration rows
carry 5 % noise, errors are against the noise-free time. Rows are drawn at random; or from concurrency 32 and below, tested at 64 and above;
or from chat, tested on summarisation; or from decode-only steps, tested on steps with prefill; or from light chat, tested on heavy code and
summarisation. Recorded engine: tested on the last 30 % of every regime's time blocks; or calibrated at loads up to 0.5, tested from 0.85. The
standard donors run everything; for other sets (`transfer_splits.DONOR_SETS`) ours runs at 0 and 50 rows. With --discrepancy also the
feature set `roofline-discrepancy`.

Tables, MAPE in per cent, median over targets (90th percentile, worst):

- accuracy, with two references (see `transfer_methods`): `floor` is the features fitted to all noise-free rows of the target, `oracle prior`
  a fit whose prior was taken from the coefficients of all configurations of other models. They say what the features and 5 % noise leave.
- what issue "Transfer" asks for, and what is reached; and whether ours is ever worse than the best of zero-shot, scratch (both feature sets)
  and boosting, the best chosen after the fact, target by target, so chance alone makes some ratios exceed 1;
- configurations unlike any donor (their GPU, or experts by the dozen) beside the rest;
- coverage of 95 % intervals of noisy test rows (at most 30 time blocks of 20 steps, evenly spread) and of the blocks' means; and the
  relative sd of the expected value;
- the verdict at 50 rows, against the true held-out MAPE. `test`: it sees noisy rows of the traffic asked about; `own`: only the rest of the
  traffic it was calibrated on, and the batches of the traffic asked about without their times (benchmarks/verdict.py has more);
- the recorded engine: MAPE over the attainable one, which is what the target's own coefficients, fitted to all its rows (test rows
  included, non-negative relative least squares), leave on the same test rows: noise, drift and misfit. Its noise-free times are not known.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import transfer_methods
from transfer_splits import COUNTS, DONOR_SETS, Split, mape, splits, spread_blocks, unlike

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.features import feature_set
from hfdtl_bayes.model import ConvergenceSettings, LatencyPosterior, SamplerSettings
from hfdtl_bayes.traces import TraceStore, drop_warmup
from hfdtl_bayes.transfer import (
    RidgeRecipe,
    calibrate,
    calibrate_ridge,
    evaluate,
    fit_donors,
    fit_ridge_donors,
    scratch_coefficients,
    verdict,
)

SETTINGS = SamplerSettings(draws=150, tune=100)
"""Short runs where a joint refit is needed; their intervals have some hundredths of Monte Carlo error."""
CONVERGENCE = ConvergenceSettings(max_rhat=1.05, min_ess=100)
"""A hundred effective draws leave means a tenth of a posterior sd; chains of 150 draws let R-hat vary by some hundredths."""

FEATURES = ("roofline", "hfdtl")
DISCREPANCY = "roofline-discrepancy"
FEW_COUNTS = (25, 50, 100, 500)
"""Numbers of rows at which feature sets other than the default are fitted: their joint refits would take most of the time."""
OURS = "ours, roofline"
RECIPE, BOOSTING, FLOOR, ORACLE = "design's recipe", "boosting", "floor", "oracle prior"
METHODS = (OURS, f"ours, {DISCREPANCY}", "ours, hfdtl", "scratch, roofline", "scratch, hfdtl", BOOSTING, RECIPE, ORACLE, FLOOR)
ALONE = ("scratch, roofline", "scratch, hfdtl", BOOSTING)

OTHER_SETS_COUNT = 50
VERDICT_COUNT = 50
JUDGED_BLOCKS = 30
BAD, GOOD = 12.0, 8.0
"""True MAPE above which a verdict must not accept, and below which it must not refuse."""
TOLERATED = 1.1
"""Times the best alternative's MAPE that ours may be."""
ATTAINABLE = 1.15
"""Times the attainable MAPE that ours may be on the recorded engine."""
COVERED = (0.92, 0.98)


@dataclass(frozen=True)
class Case:
    """One target of one set of donors, and the seed its rows are drawn with."""

    store: str
    donors: str
    target: str
    seed: int
    reference: bool
    discrepancy: bool

    @property
    def name(self) -> str:
        """Name of the store."""
        return Path(self.store).name


@cache
def fitted_donors(store: str, chosen: str, discrepancy: bool) -> tuple[dict[str, LatencyPosterior], RidgeRecipe]:
    """Fit a set of donors, once per process."""
    opened, ids = TraceStore(store), DONOR_SETS[Path(store).name][chosen]
    names = FEATURES if chosen == "standard" else FEATURES[:1]
    names += (DISCREPANCY,) if discrepancy else ()
    fits = {f: fit_donors(opened, ids, f, show_progress=False) for f in names}
    return fits, fit_ridge_donors([(drop_warmup(opened.steps(d).frame), opened.configuration(d)) for d in ids])


def judged(posterior: LatencyPosterior, split: Split, configuration: ServingConfiguration, seed: int) -> dict[str, object]:
    """Score a posterior on a test: error of the expected value, coverage of its intervals."""
    found = evaluate(posterior, spread_blocks(split.test, JUDGED_BLOCKS), configuration, seed=seed)
    return {
        "mape": mape(posterior.expected_s(split.test, configuration, seed), split.test),
        "coverage": found.coverage,
        "block_coverage": found.block_coverage,
        "uncertainty": found.mean_uncertainty,
        "engine": posterior.engine,
        # What is conditioned has passed the diagnostics of its weights, or would have been refitted.
        "converged": np.nan if posterior.engine == "conditional" else posterior.convergence(CONVERGENCE).passed,
    }


def verdicts(
    posterior: LatencyPosterior, split: Split, train: pd.DataFrame, configuration: ServingConfiguration, seed: int
) -> dict[str, object]:
    """Return the verdict on rows of the test, and on what is left of the pool, told only the batches of the test."""
    test = spread_blocks(split.test, JUDGED_BLOCKS)
    left = spread_blocks(split.pool[~split.pool.index.isin(train.index)], JUDGED_BLOCKS)
    known = verdict(posterior, test, configuration, calibration_rows=train, seed=seed)
    told = verdict(posterior, left, configuration, calibration_rows=train, intended_rows=test, seed=seed)
    return {"verdict_test": str(known.outcome), "verdict_own": str(told.outcome)}


def ours(case: Case, split: Split, configuration: ServingConfiguration) -> Iterator[dict[str, object]]:
    """Yield the scores of the hierarchical model: zero-shot, then at every number of rows."""
    fits, _ = fitted_donors(case.store, case.donors, case.discrepancy)
    for f, fitted in fits.items():
        yield {"n": 0, "method": f"ours, {f}", **judged(fitted, split, configuration, case.seed)}
        counts = COUNTS if f == "roofline" else FEW_COUNTS
        for n in counts if case.donors == "standard" else (OTHER_SETS_COUNT,):
            if n > len(split.pool):
                continue
            train = split.drawn(n, case.seed)
            posterior = calibrate(fitted, train, configuration, settings=SETTINGS, seed=case.seed, show_progress=False)
            row = {"n": n, "method": f"ours, {f}", **judged(posterior, split, configuration, case.seed)}
            if n == VERDICT_COUNT and f == "roofline" and case.donors == "standard":
                row |= verdicts(posterior, split, train, configuration, case.seed)
            yield row


def rivals(case: Case, split: Split, configuration: ServingConfiguration) -> Iterator[dict[str, object]]:
    """Yield the scores of the recipe, of fits of the target alone, and of boosting."""
    _, recipe = fitted_donors(case.store, case.donors, case.discrepancy)
    yield {"n": 0, "method": RECIPE, "mape": mape(recipe.predict_s(split.test, configuration), split.test)}
    for n in COUNTS:
        if n > len(split.pool):
            continue
        train = split.drawn(n, case.seed)
        predicted = {
            f"scratch, {f}": feature_set(f).design(split.test, configuration)
            @ scratch_coefficients(train, configuration, feature_set(f))
            for f in FEATURES
        }
        predicted[BOOSTING] = transfer_methods.boosted_s(train, split.test)
        predicted[RECIPE] = calibrate_ridge(recipe, train, configuration).predict_s(split.test, configuration)
        yield from ({"n": n, "method": m, "mape": mape(p, split.test)} for m, p in predicted.items())


def references(case: Case, split: Split, frame: pd.DataFrame, configuration: ServingConfiguration) -> Iterator[dict[str, object]]:
    """Yield what the features leave, and what a prior from all other models leaves."""
    oracle = transfer_methods.oracle(case.store)
    theta = transfer_methods.full_fit(frame, configuration, oracle.features)
    floor = mape(oracle.features.design(split.test, configuration) @ theta, split.test)
    for n in (0, *COUNTS):
        if n > len(split.pool):
            continue
        predicted = oracle.predict_s(split.drawn(n, case.seed) if n else None, split.test, configuration)
        yield {"n": n, "method": ORACLE, "mape": mape(predicted, split.test)}
        yield {"n": n, "method": FLOOR, "mape": floor}


def judge(case: Case) -> list[dict[str, object]]:
    """Score every method on every split of one target."""
    opened = TraceStore(case.store)
    configuration, frame = opened.configuration(case.target), drop_warmup(opened.steps(case.target).frame)
    composed, features = "expected_step_time_s" in frame.columns, feature_set("roofline")
    kind = unlike(configuration, [opened.configuration(d) for d in DONOR_SETS[case.name][case.donors]])
    found: list[dict[str, object]] = []
    for split in splits(case.name, frame, case.seed):
        common = {"store": case.name, "donors": case.donors, "target": case.target, "seed": case.seed, "unlike": kind}
        common |= {"split": split.name, "shift": split.shift}
        if not composed:
            best = scratch_coefficients(frame, configuration, features)
            common["attainable"] = mape(features.design(split.test, configuration) @ best, split.test)
        rows = [*ours(case, split, configuration)]
        if case.donors == "standard":
            rows += rivals(case, split, configuration)
            if composed and case.reference:
                rows += references(case, split, frame, configuration)
        found += [common | row for row in rows]
    return found


def over_targets(values: pd.Series) -> str:
    """Return 'median (90th percentile, worst)'."""

    def short(value: float, digits: int) -> str:
        return f"{value:.0f}" if value >= 100 else f"{value:.{digits}g}"

    return f"{short(values.median(), 3)} ({short(values.quantile(0.9), 2)}, {short(values.max(), 2)})"


def per_target(results: pd.DataFrame, value: str = "mape") -> pd.DataFrame:
    """Return one row per target, split, method and n: the mean over seeds."""
    keys = ["store", "donors", "split", "shift", "method", "n", "target", "unlike"]
    return results.groupby(keys, sort=False, as_index=False)[value].mean()


def in_order(table: pd.DataFrame, split_order: Sequence[str]) -> pd.DataFrame:
    """Sort a table indexed by split and method as they are listed, not by name."""
    place = {name: i for i, name in enumerate([*split_order, *METHODS])}
    return table.sort_index(key=lambda index: index.map(place))


def accuracy(results: pd.DataFrame) -> pd.DataFrame:
    """Return MAPE over targets, splits and methods down, numbers of rows across; for one store and set of donors."""
    scored = per_target(results)
    cells = scored.pivot_table(index=["split", "method"], columns="n", values="mape", aggfunc=over_targets).fillna("")
    return in_order(cells, pd.unique(results["split"]))


def against_best(results: pd.DataFrame) -> pd.DataFrame:
    """Return ours over the best of zero-shot, scratch and boosting, target by target: columns split, n, target, ratio, best."""
    scored = per_target(results)
    wide = scored.pivot_table(index=["split", "n", "target"], columns="method", values="mape", sort=False).reset_index()
    zero = wide[wide["n"] == 0].set_index(["split", "target"])[OURS]
    rows = wide[wide["n"] > 0].copy()
    rows["zero-shot"] = zero.reindex(pd.MultiIndex.from_frame(rows[["split", "target"]])).to_numpy()
    others = rows[["zero-shot", *(m for m in ALONE if m in rows.columns)]]
    rows["best"] = others.idxmin(axis=1)
    rows["ratio"] = rows[OURS] / others.min(axis=1)
    return rows[["split", "n", "target", "ratio", "best"]].reset_index(drop=True)


def never_worse(results: pd.DataFrame) -> pd.DataFrame:
    """Summarise `against_best` by split and n."""
    ratios = against_best(results)
    grouped = ratios.groupby(["split", "n"], sort=False)
    worst = ratios.loc[grouped["ratio"].idxmax()].set_index(["split", "n"])
    table = pd.DataFrame(
        {
            "targets": grouped.size(),
            f"within {TOLERATED:g}": grouped["ratio"].agg(lambda r: f"{(r <= TOLERATED).mean():.0%}"),
            "median ratio": grouped["ratio"].median().round(2),
            "worst": grouped["ratio"].max().round(2),
        }
    )
    return table.join(worst[["target", "best"]].rename(columns={"target": "worst target", "best": "beaten by"}))


def requirements(results: pd.DataFrame) -> pd.DataFrame:
    """Return what is asked of ours on composed steps, and what is reached; results of the standard donors."""
    scored = per_target(results)
    scored = scored[scored["method"] == OURS]
    rows = []

    def add(title: str, chosen: pd.DataFrame, median: float, worst: float | None) -> None:
        if chosen.empty:
            return
        got = (chosen["mape"].median(), chosen["mape"].max())
        met = got[0] <= median and (worst is None or got[1] <= worst)
        asked = f"median <= {median:g}" + ("" if worst is None else f", worst <= {worst:g}")
        rows.append({"what": title, "asked": asked, "median": got[0], "worst": got[1], "met": "yes" if met else "no"})

    random = scored[~scored["shift"]]
    add("zero-shot", random[random["n"] == 0], 6.0, 30.0)
    add("25 rows", random[random["n"] == 25], 1.8, None)
    add("100 rows", random[random["n"] == 100], 1.5, None)
    for name in pd.unique(scored.loc[scored["shift"], "split"]):
        add(f"50 rows, {name}", scored[(scored["split"] == name) & (scored["n"] == 50)], 1.8, 10.0)
    return pd.DataFrame(rows).round(2)


def unlike_donors(results: pd.DataFrame) -> pd.DataFrame:
    """Return the MAPE of ours over targets unlike any donor beside the rest, by split and n, and the ratio of medians."""
    scored = per_target(results)
    scored = scored[scored["method"] == OURS]
    scored = scored.assign(unlike=scored["unlike"].replace("", "like a donor"))
    groups = {"like a donor": scored["unlike"] == "like a donor", "unlike any": scored["unlike"] != "like a donor"}
    groups |= {kind: scored["unlike"] == kind for kind in sorted(set(scored["unlike"]) - {"like a donor"})}
    cells = {}
    for name, chosen in groups.items():
        grouped = scored[chosen].groupby(["split", "n"], sort=False)["mape"]
        cells[f"{name} ({scored.loc[chosen, 'target'].nunique()})"] = grouped.agg(over_targets)
        if name == "unlike any":
            medians = scored[groups["like a donor"]].groupby(["split", "n"], sort=False)["mape"].median()
            cells["ratio"] = (grouped.median() / medians).round(2)
    return pd.DataFrame(cells)


def intervals(results: pd.DataFrame) -> pd.DataFrame:
    """Return the coverage of 95 % intervals by split, method and n."""
    low, high = COVERED
    own = results[results["coverage"].notna()]
    rows, blocks = per_target(own, "coverage"), per_target(own, "block_coverage")
    keys = ["split", "method", "n"]
    grouped = rows.groupby(keys)["coverage"]
    table = pd.DataFrame(
        {
            "rows": grouped.mean(),
            "block means": blocks.groupby(keys)["block_coverage"].mean(),
            f"targets {low:.0%} to {high:.0%}": grouped.agg(lambda c: ((c >= low) & (c <= high)).mean()),
            f"targets below {low:.0%}": grouped.agg(lambda c: (c < low).mean()),
            "worst target": grouped.min(),
            "sd of the mean": per_target(own, "uncertainty").groupby(keys)["uncertainty"].median(),
        }
    )
    return in_order((100 * table).round(1), pd.unique(results["split"]))


def truth(error: float) -> str:
    """Return the class of a true held-out MAPE that a verdict is measured by."""
    if error > BAD:
        return f"> {BAD:g} %"
    return f"< {GOOD:g} %" if error < GOOD else "between"


def confusion(results: pd.DataFrame, judged_on: str) -> pd.DataFrame:
    """Return counts of verdicts by kind of split and true MAPE, and the share not accepted; `judged_on` is test or own."""
    column = f"verdict_{judged_on}"
    own = results[results.get(column, pd.Series(index=results.index, dtype=object)).notna()]
    if own.empty:
        return pd.DataFrame()
    split = np.where(own["shift"], "shifts", "random")
    counts = pd.crosstab([split, own["mape"].map(truth)], own[column], rownames=["split", "true MAPE"], colnames=[None])
    accepted = counts.get("accept", 0)
    return counts.assign(**{"not accepted": ((1 - accepted / counts.sum(axis=1)) * 100).round(1)})


def attained(results: pd.DataFrame) -> pd.DataFrame:
    """Return MAPE over the attainable MAPE by split, method and n: median and worst over targets, and the share within the limit."""
    scored = per_target(results).merge(per_target(results, "attainable"))
    scored["ratio"] = scored["mape"] / scored["attainable"]

    def cell(ratios: pd.Series) -> str:
        return f"{ratios.median():.2f} ({ratios.max():.2f}), {(ratios <= ATTAINABLE).sum()}/{len(ratios)}"

    cells = scored.pivot_table(index=["split", "method"], columns="n", values="ratio", aggfunc=cell).fillna("")
    return in_order(cells, pd.unique(results["split"]))


def report(results: pd.DataFrame) -> str:
    """Return all tables as markdown."""
    parts = []

    def add(title: str, table: pd.DataFrame, index: bool = True) -> None:
        if len(table):
            flat = table.reset_index() if index else table
            parts.append(f"## {title}\n\n{flat.to_markdown(index=False)}")

    for (store, donors), own in results.groupby(["store", "donors"], sort=False):
        title, composed = f"{store}, {donors} donors", own.get("attainable", pd.Series(dtype=float)).isna().all()
        add(f"{title}: MAPE in %, median (p90, worst) over {own['target'].nunique()} targets, by rows", accuracy(own))
        if donors == "standard" and composed:
            add(f"{title}: asked and reached", requirements(own), index=False)
        if donors == "standard":
            add(f"{title}: ours over the best of zero-shot, scratch and boosting", never_worse(own))
        if not composed:
            add(f"{title}: MAPE over the attainable, median (worst), targets within {ATTAINABLE:g}", attained(own))
        if composed:
            add(f"{title}: unlike any donor, ours", unlike_donors(own))
        add(f"{title}: coverage of 95 % intervals in %", intervals(own))
        for judged_on in ("test", "own") if composed else ():
            add(f"{title}: verdicts at {VERDICT_COUNT} rows, judged on {judged_on} traffic", confusion(own, judged_on))
    calibrated = results[(results["n"] > 0) & results["engine"].notna()]
    refitted = calibrated["converged"].dropna()
    limits = f"R-hat <= {CONVERGENCE.max_rhat:g}, ESS >= {CONVERGENCE.min_ess:g}"
    parts.append(
        f"{len(calibrated)} calibrations, {len(refitted)} of them by a joint refit, of which {int(refitted.sum())} converged ({limits})."
    )
    return "\n\n".join(parts)


def run(cases: Sequence[Case], jobs: int) -> pd.DataFrame:
    """Judge all cases, in processes of their own."""
    started = time.perf_counter()
    for store, donors, discrepancy in dict.fromkeys((c.store, c.donors, c.discrepancy) for c in cases):
        # Fitted here first, so that workers that are forked find them in the cache.
        fitted_donors(store, donors, discrepancy)
        if any(c.reference for c in cases) and Path(store).name == "gpu_steps":
            transfer_methods.oracle(store)
    with ProcessPoolExecutor(jobs) as pool:
        work = [pool.submit(judge, c) for c in cases]
        for done, future in enumerate(as_completed(work), 1):
            future.result()
            print(f"\r{done}/{len(work)} targets, {time.perf_counter() - started:.0f} s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return pd.DataFrame([row for future in work for row in future.result()])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--donor-sets", nargs="+", default=None, help="names in transfer_splits.DONOR_SETS; all by default")
    parser.add_argument("--seeds", type=int, default=1, help="number of draws of rows per target")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--targets", type=int, default=None, help="only so many targets of each store, evenly spread")
    parser.add_argument("--reference", action=argparse.BooleanOptionalAction, default=True, help="floor and oracle prior")
    parser.add_argument("--discrepancy", action="store_true", help="the feature set roofline-discrepancy as well")
    parser.add_argument("--out", type=Path, default=None, help="write every score as CSV")
    arguments = parser.parse_args()
    unknown = [str(p) for p in arguments.stores if p.name not in DONOR_SETS]
    if unknown:
        parser.error(f"no donors are set for {', '.join(unknown)}; the stores known are {', '.join(DONOR_SETS)}")
    known = dict.fromkeys(s for p in arguments.stores for s in DONOR_SETS[p.name])
    strange = [s for s in arguments.donor_sets or () if s not in known]
    if strange:
        parser.error(f"no donor set {', '.join(strange)}; known are {', '.join(known)}")
    cases = []
    for path in arguments.stores:
        for name, ids in DONOR_SETS[path.name].items():
            if name not in (arguments.donor_sets or known):
                continue
            targets = [c for c in TraceStore(path).config_ids if c not in ids]
            if arguments.targets is not None:
                spread = np.linspace(0, len(targets) - 1, min(arguments.targets, len(targets)))
                targets = [targets[i] for i in spread.round().astype(int)]
            cases += [
                Case(str(path), name, t, s, arguments.reference, arguments.discrepancy)
                for t in targets
                for s in range(arguments.seeds)
            ]
    results = run(cases, arguments.jobs)
    if arguments.out:
        results.to_csv(arguments.out, index=False)
    print(report(results))


if __name__ == "__main__":
    main()
