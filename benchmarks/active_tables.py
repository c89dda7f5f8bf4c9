"""Tables of benchmarks/active.py: learning curves with intervals, rows needed, and what issue "Active learning" asks.

Scores are MAPE in per cent. A table's figure is the median over targets of a target's mean over seeds and draws; intervals are its 5 and 95 %
points when targets, and seeds within each, are drawn again with replacement.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

GOAL, RANDOM, RESIDUAL = "deployment", "random", "residual"
"""The rules that the requirement speaks of."""

MOST, FEW = 200, 50
"""Rows that random sampling takes, and at most those that the goal-oriented rule may take for the same error."""

WITHIN_REACH = 0.5
"""Share of the mix's variance that the whole pool must be expected to remove for the mix to count as one that the pool can teach."""

WORSE = 2.0
"""Standard errors by which a rule is worse than random by more than noise; 2.3 % of equal rules would be."""

RESAMPLES = 400


def matrix(scores: pd.DataFrame, value: str = "mape") -> np.ndarray:
    """Return the mean over draws by target and seed, shape (targets, seeds); NaN where a seed was not run."""
    return scores.pivot_table(index="target", columns="seed", values=value, aggfunc="mean").to_numpy(dtype=float)


def resampled(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return medians over targets of means over seeds, targets and their seeds drawn with replacement, shape (RESAMPLES,).

    The same seed draws the same targets and seeds for every rule, so that differences of rules are paired.
    """
    rng = np.random.default_rng(seed)
    targets, seeds = values.shape
    rows = rng.integers(targets, size=(RESAMPLES, targets))
    columns = rng.integers(seeds, size=(RESAMPLES, targets, seeds))
    drawn = values[rows[:, :, None], columns]
    weight = np.isfinite(drawn).sum(axis=2)
    means = np.where(weight > 0, np.nansum(drawn, axis=2) / np.maximum(weight, 1), np.nan)
    return np.asarray(np.nanmedian(means, axis=1))


def typical(values: np.ndarray) -> float:
    """Return the median over targets of the mean over seeds."""
    return float(np.median(np.nanmean(values, axis=1)))


def short(value: float) -> str:
    """Return three digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def with_interval(values: np.ndarray) -> str:
    """Return 'median [5 %, 95 %]'."""
    low, high = np.quantile(resampled(values), (0.05, 0.95))
    return f"{short(typical(values))} [{short(low)}, {short(high)}]"


def by_scenario_and_rule(scores: pd.DataFrame, cells: Callable[[pd.DataFrame], dict[object, str]]) -> pd.DataFrame:
    """Return a row per scenario and rule, in the order they come."""
    rows = []
    for scenario, within in scores.groupby("scenario", sort=False):
        for rule, own in within.groupby("rule", sort=False):
            rows.append({"scenario": scenario, "rule": rule, **cells(own)})
    return pd.DataFrame(rows)


def by_rows(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the learning curves against numbers of rows."""
    return by_scenario_and_rule(scores, lambda own: {int(n): with_interval(matrix(at)) for n, at in own.groupby("n")})


def at_seconds(scores: pd.DataFrame) -> pd.DataFrame:
    """Return scores at the seconds that random rows take on average for the same target and seed: `n` is the number of random rows.

    Between counts curves are straight in logarithms; below its first count and beyond its last a rule has the score it has there.
    """
    keys = ["scenario", "target", "seed"]
    budgets = scores[scores["rule"] == RANDOM].groupby([*keys, "n"])["gpu_s"].mean()
    rows = []
    for at, own in scores.groupby([*keys, "rule", "draw"], sort=False):
        budget = budgets.loc[at[:3]]
        curve = own.sort_values("n")
        found = np.exp(np.interp(np.log(budget), np.log(curve["gpu_s"]), np.log(curve["mape"])))
        rows += [
            dict(zip((*keys, "rule", "draw"), at, strict=True)) | {"n": n, "mape": m}
            for n, m in zip(budget.index, found, strict=True)
        ]
    return pd.DataFrame(rows)


def crossing(x: np.ndarray, errors: np.ndarray, limit: float) -> float:
    """Return the x at which a curve first is at the limit or below, straight in logarithms; infinity if it never is."""
    below = np.flatnonzero(errors <= limit)
    if not len(below):
        return float("inf")
    k = int(below[0])
    if k == 0:
        return float(x[0])
    share = np.log(errors[k - 1] / limit) / np.log(errors[k - 1] / errors[k])
    return float(np.exp(np.log(x[k - 1]) + share * np.log(x[k] / x[k - 1])))


def median_curve(scores: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return counts, median MAPE and median GPU seconds at each."""
    counts = np.sort(scores["n"].unique())
    at = [scores[scores["n"] == n] for n in counts]
    return counts, np.array([typical(matrix(a)) for a in at]), np.array([typical(matrix(a, "gpu_s")) for a in at])


def needed(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the rows, and the seconds as a share of random's, at which a rule's median has the error of `MOST` random rows."""
    rows = []
    for scenario, within in scores.groupby("scenario", sort=False):
        _, errors, seconds = median_curve(within[within["rule"] == RANDOM])
        limit, most_s = float(errors[-1]), float(seconds[-1])
        for rule, own in within.groupby("rule", sort=False):
            n, e, s = median_curve(own)
            found, found_s = crossing(n, e, limit), crossing(s, e, limit)
            rows.append(
                {
                    "scenario": scenario,
                    "rule": rule,
                    "rows": f"> {n[-1]}" if np.isinf(found) else f"{'<= ' if found == n[0] else ''}{found:.0f}",
                    "seconds, % of random's": "never" if np.isinf(found_s) else f"{100 * found_s / most_s:.0f}",
                }
            )
    return pd.DataFrame(rows)


def against_random(scores: pd.DataFrame, rule: str, n: int) -> pd.DataFrame:
    """Return for each scenario and target the ratio of geometric mean errors to random's, and by how many standard errors it is above 1.

    The sd of one score's logarithm is that within targets, over seeds and draws, pooled over the targets of a scenario; a rule run with one
    seed is taken to vary as random rows do.
    """
    at = scores[(scores["n"] == n) & scores["rule"].isin([rule, RANDOM])]
    at = at.assign(log=np.log(at["mape"]))
    rows = []
    for scenario, within in at.groupby("scenario", sort=False):
        groups = {r: own.groupby("target")["log"] for r, own in within.groupby("rule")}
        if set(groups) != {rule, RANDOM}:
            continue
        variance = {
            r: float(((g.count() - 1) * g.var().fillna(0)).sum() / max((g.count() - 1).sum(), 1)) for r, g in groups.items()
        }
        if (groups[rule].count() < 2).all():
            variance[rule] = variance[RANDOM]
        difference = groups[rule].mean() - groups[RANDOM].mean()
        error = np.sqrt(variance[rule] / groups[rule].count() + variance[RANDOM] / groups[RANDOM].count())
        rows.append(
            pd.DataFrame({"scenario": scenario, "target": difference.index, "ratio": np.exp(difference), "z": difference / error})
        )
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=["scenario", "target", "ratio", "z"])


def asked(scores: pd.DataFrame) -> pd.DataFrame:
    """Return what the requirement asks by scenario, over all of them, and over targets and scenarios whose pool can teach the mix."""
    parts = [(str(name), own) for name, own in scores.groupby("scenario", sort=False)]
    # A target counts once per scenario where scenarios are taken together.
    together = scores.assign(target=scores["scenario"] + ": " + scores["target"])
    parts += [("all", together), ("all within reach", together[together["reach"] >= WITHIN_REACH])]
    rows = []
    for name, own in parts:
        few, most = own[own["n"] == FEW], own[own["n"] == MOST]
        goal, random = few[few["rule"] == GOAL], most[most["rule"] == RANDOM]
        if goal.empty or random.empty:
            continue
        a, b = matrix(goal), matrix(random)
        ratio = resampled(a) / resampled(b)
        counts, errors, _ = median_curve(own[own["rule"] == GOAL])
        found = crossing(counts, errors, typical(b))
        compared = {rule: against_random(own, rule, FEW) for rule in (GOAL, RESIDUAL)}
        residual = few[few["rule"] == RESIDUAL]
        low, high = np.quantile(ratio, (0.05, 0.95))
        rows.append(
            {
                "pool to mix": name,
                "targets": len(a),
                "reach": round(float(own.groupby("target")["reach"].mean().median()), 2),
                f"random, {FEW}": with_interval(matrix(few[few["rule"] == RANDOM])),
                f"random, {MOST}": with_interval(b),
                f"{GOAL}, {FEW}": with_interval(a),
                f"{RESIDUAL}, {FEW}": with_interval(matrix(residual)) if len(residual) else "",
                "ratio": f"{typical(a) / typical(b):.2f} [{low:.2f}, {high:.2f}]",
                "met": "yes" if typical(a) <= typical(b) else "no",
                "rows needed": f"> {MOST}" if np.isinf(found) else f"{found:.0f}",
                **{f"{r} worse": f"{int((c['z'] > WORSE).sum())}/{len(c)}" for r, c in compared.items()},
            }
        )
    return pd.DataFrame(rows)


def expectations(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the error the model expected before any label beside the one found, for random rows and the goal-oriented rule."""
    at = scores[scores["n"].isin((FEW, MOST)) & scores["rule"].isin((RANDOM, GOAL))]

    def cells(own: pd.DataFrame) -> dict[object, str]:
        return {
            int(n): f"{typical(matrix(a, 'expected')):.2f} / {typical(matrix(a)):.2f}" for n, a in own.groupby("n")
        }  # fmt: skip

    return by_scenario_and_rule(at, cells)


def worse(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the targets on which the goal-oriented rule is worse than random rows by more than noise, worst first."""
    parts = []
    for n in (FEW, MOST):
        found = against_random(scores, GOAL, n)
        found = found.merge(scores.groupby(["scenario", "target"], as_index=False)["reach"].mean())
        parts.append(found[found["z"] > WORSE].assign(n=n))
    table = pd.concat(parts, ignore_index=True).sort_values(["n", "ratio"], ascending=[True, False], ignore_index=True)
    return table[["n", "scenario", "target", "reach", "ratio", "z"]].round(2)


def report(results: pd.DataFrame) -> str:
    """Return all tables as markdown."""
    parts = []
    for (store, features), own in results.groupby(["store", "features"], sort=False):
        first = own[own["every_rule"]] if own["every_rule"].any() else own
        counts = f"{own['target'].nunique()} targets, {own['seed'].nunique()} seed(s)"
        for title, table in (
            (f"what is asked, MAPE on the deployment mix in %, {counts}", asked(own)),
            ("rows, and seconds of GPU time, at which the median is that of random rows at most; first seed", needed(first)),
            ("the error the model expected / the error found", expectations(own)),
            (f"targets where {GOAL} is worse than random by {WORSE:g} standard errors", worse(own)),
            ("MAPE by rows", by_rows(own)),
            ("MAPE at the GPU seconds of so many random rows", by_rows(at_seconds(own))),
        ):
            if len(table):
                parts.append(f"## {store}, {features}: {title}\n\n{table.to_markdown(index=False)}")
    return "\n\n".join(parts)
