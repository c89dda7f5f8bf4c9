"""Which configurations to take, or to trace next, as donors for intended targets known by their configuration alone.

Subsets of the candidates are ranked by the error that the model itself expects of the targets' step times: how far the population's
coefficients, the effects of hardware and a target's own deviation are left open, weighed by the traffic intended
(`donor_information`). That is right as far as the model is: what no feature describes, no choice of donors mends. It needs no trace
of a target, and of a candidate not yet traced only its configuration; so it says what a trace would be worth before it is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import FeatureSet, feature_set
from hfdtl_bayes.model import LatencyPosterior, PriorSettings, fit
from hfdtl_bayes.statistics import DEFAULT_BLOCK_LENGTH, ConfigStatistics, statistics_from_rows
from hfdtl_bayes.traces import TraceStore
from hfdtl_bayes.transfer.calibration import read_trace, require_enough_rows, usable_rows
from hfdtl_bayes.transfer.donor_information import TargetTraffic
from hfdtl_bayes.transfer.donor_search import DonorChoiceSettings, RankingProblem, best_subsets, ranking_problem
from hfdtl_bayes.transfer.evaluation import evaluate
from hfdtl_bayes.transfer.folds import refuse_twins, whole_blocks
from hfdtl_bayes.transfer.sources import kept_statistics

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class DonorRanking:
    """Subsets of candidates, best first, and why.

    Attributes
    ----------
    table : DataFrame, one row per subset
        `size`, `rank` within the size, `donors` (config_ids separated by commas); `expected_error`, by which they are ranked: the mean
        over targets of E|error| / step time of the zero-shot prediction, as a fraction. It is `model_error`, what the model
        alone expects, times `ratio`, how many times as large as expected the error was on the candidates outside the subset (1
        where none is outside, which therefore goes unchecked). The `worst_target` and its `worst_error`, likewise. For the subsets that
        were refitted also `refit_error`, the same from the exact posterior, and `actual_mape` over the targets that have traces,
        noise included; NaN for the others.
    additional : DataFrame, one row per candidate or hypothetical donor not in the best subset
        `donor`, whether it is `traced`, `model_error` of the best subset with it, and the `gain` over it.
    contributions : DataFrame, one row per donor of the best subset and coefficient
        `donor`, `without`: the model's expected error without it, `coefficient`, and `share` of what it takes off the targets' variance.
    floor : float
        The model's expected error if everything shared were known: what the targets' own deviations leave, whatever the donors.
    reasons : tuple of str
        The same in words.
    candidates, targets : tuple of str
    searched : dict of int to str
        By size: "all N subsets" or "greedy with exchanges".
    settings : DonorChoiceSettings
    seed : int
    """

    table: pd.DataFrame
    additional: pd.DataFrame
    contributions: pd.DataFrame
    floor: float
    reasons: tuple[str, ...]
    candidates: tuple[str, ...]
    targets: tuple[str, ...]
    searched: dict[int, str]
    settings: DonorChoiceSettings
    seed: int

    @property
    def best(self) -> tuple[str, ...]:
        """The subset of the smallest expected error."""
        return tuple(str(_best(self.table)["donors"]).split(","))

    def __str__(self) -> str:
        """Return the reasons, one a line."""
        return "\n".join(self.reasons)


def rank_donors(
    store: TraceStore,
    candidates: Sequence[str],
    targets: Sequence[str | ServingConfiguration],
    *,
    sizes: Sequence[int] = (2, 3, 4, 5),
    keep: Sequence[str] = (),
    hypothetical: Sequence[ServingConfiguration] = (),
    traffic: Mapping[str, pd.DataFrame] | None = None,
    features: str | FeatureSet = "roofline",
    priors: PriorSettings | None = None,
    refit: int = 0,
    settings: DonorChoiceSettings | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> DonorRanking:
    """Rank subsets of candidate donors by the expected zero-shot error of intended targets.

    Parameters
    ----------
    store : TraceStore
        Holds the candidates' traces, or statistics.nc in their place.
    candidates : sequence of str
        config_ids, two at least.
    targets : sequence of str or ServingConfiguration
        What is to be predicted: a configuration, or the config_id of one in the store. Their traces, if any, are looked at only to
        compare refits with.
    sizes : sequence of int
        Sizes of subsets; those above the number of candidates are left out.
    keep : sequence of str
        Candidates that every subset must hold: donors there are already.
    hypothetical : sequence of ServingConfiguration
        Configurations not yet traced: what would each add to the best subset?
    traffic : mapping of str to DataFrame, optional
        Batches by config_id of target, columns of a step trace without times; by default its `operating_points`.
    features : str or FeatureSet
        Of step_time.
    priors : PriorSettings, optional
    refit : int
        How many of the best subsets, over all sizes, to refit with the exact engine.
    settings : DonorChoiceSettings, optional
    seed : int
    show_progress : bool

    Returns
    -------
    DonorRanking

    Raises
    ------
    InputError
        If there are fewer than two candidates or no target; if one is listed twice, is a candidate and a target, or a candidate
        under another name; if no size fits; if a feature is not defined for a target.
    UnknownNameError
        If a config_id is not in the store.
    """
    settings = settings or DonorChoiceSettings()
    chosen = feature_set(features, "step_time") if isinstance(features, str) else features
    if chosen.quantity != "step_time":
        raise InputError(
            f"donors are chosen for step_time, whose traffic is known beforehand; the features are of {chosen.quantity}"
        )
    sizes = _check(store, candidates, targets, sizes, keep)
    wanted = [store.configuration(t) if isinstance(t, str) else t for t in targets]
    statistics = [_statistics(store, c, chosen) for c in candidates]
    refuse_twins(statistics)
    _refuse_known(statistics, wanted, hypothetical)
    priors = priors or PriorSettings()
    problem = ranking_problem(
        statistics,
        wanted,
        features=chosen,
        priors=priors,
        settings=settings,
        hypothetical=hypothetical,
        traffic=traffic,
        seed=seed,
        show_progress=show_progress,
    )
    names = [s.config_id for s in statistics]
    kept = [names.index(k) for k in keep]
    lines: list[dict[str, object]] = []
    searched: dict[int, str] = {}
    for size in sizes:
        subsets, searched[size] = best_subsets(problem, size, kept, settings)
        errors, ratios = problem.errors(subsets), problem.ratios(subsets)
        for rank, (subset, own, ratio) in enumerate(zip(subsets, errors, ratios, strict=True), 1):
            worst = int(own.argmax())
            lines.append(
                {
                    "size": size,
                    "rank": rank,
                    "donors": ",".join(names[c] for c in subset),
                    "expected_error": float(own.mean() * ratio),
                    "model_error": float(own.mean()),
                    "ratio": float(ratio),
                    "worst_target": wanted[worst].config_id,
                    "worst_error": float(own[worst] * ratio),
                }
            )
    table = pd.DataFrame(lines).assign(refit_error=np.nan, actual_mape=np.nan)
    best = [names.index(d) for d in str(_best(table)["donors"]).split(",")]
    if refit:
        _refit(table, refit, store, {s.config_id: s for s in statistics}, problem, chosen, priors, settings, seed, show_progress)
    additional, contributions = _additional(problem, best), _contributions(problem, best)
    floor = float(problem.information.floor(problem.targets).mean())
    reasons = _reasons(problem, best, table, additional, contributions, floor)
    ids = tuple(t.config_id for t in wanted)
    return DonorRanking(table, additional, contributions, floor, reasons, tuple(names), ids, searched, settings, seed)


def _check(
    store: TraceStore,
    candidates: Sequence[str],
    targets: Sequence[str | ServingConfiguration],
    sizes: Sequence[int],
    keep: Sequence[str],
) -> list[int]:
    """Refuse what cannot be ranked; returns the sizes that can."""
    for kind, given in (("candidate", list(candidates)), ("target", [t if isinstance(t, str) else t.config_id for t in targets])):
        repeated = sorted({c for c in given if given.count(c) > 1})
        if repeated:
            raise InputError(f"{kind}(s) listed twice: {', '.join(repeated)}; list each once")
    if len(candidates) < 2:
        raise InputError(
            f"choosing donors needs two candidates at least, found {', '.join(candidates) or 'none'}: with one there is nothing to choose, "
            f"and how configurations differ cannot be told. The store holds {', '.join(store.config_ids)}"
        )
    if not targets:
        raise InputError("no target given: donors are good for something; name configurations to predict, or their YAML files")
    strangers = [k for k in keep if k not in candidates]
    if strangers:
        raise InputError(f"donor(s) to keep are not among the candidates: {', '.join(strangers)}; add them to the candidates")
    if not sizes or min(sizes) < 1:
        raise InputError(f"sizes of subsets must be from 1, found {', '.join(map(str, sizes)) or 'none'}")
    found = sorted({s for s in sizes if max(1, len(keep)) <= s <= len(candidates)})
    if not found:
        raise InputError(
            f"no subset of size {', '.join(map(str, sizes))} can be made of {len(candidates)} candidates, {len(keep)} of them to be kept"
        )
    return found


def _refuse_known(
    statistics: Sequence[ConfigStatistics], targets: Sequence[ServingConfiguration], hypothetical: Sequence[ServingConfiguration]
) -> None:
    known = [s.configuration for s in statistics]
    for kind, given in (("target", targets), ("hypothetical donor", hypothetical)):
        for own in given:
            twin = next(
                (c for c in known if own.model_copy(update={"config_id": c.config_id}) == c or own.config_id == c.config_id), None
            )
            if twin is not None:
                raise InputError(
                    f"{kind} {own.config_id!r} is the candidate {twin.config_id!r}"
                    f"{'' if own.config_id == twin.config_id else ' under another name'}; leave it out of one of the two: its own "
                    "rows say more of it than any donor"
                )


def _statistics(store: TraceStore, config_id: str, features: FeatureSet) -> ConfigStatistics:
    kept = kept_statistics(store, config_id, features)
    if kept is not None:
        return kept
    configuration = store.configuration(config_id)
    frame = usable_rows(read_trace(store, config_id, features.quantity).frame, configuration, features)
    require_enough_rows(frame, configuration, features)
    return statistics_from_rows(frame, configuration, features)


def _best(table: pd.DataFrame) -> pd.Series:
    return table.iloc[int(table["expected_error"].to_numpy().argmin())]


def _additional(problem: RankingProblem, best: Sequence[int]) -> pd.DataFrame:
    """Return what each candidate or hypothetical donor would add to a subset."""
    others = [c for c in range(len(problem.statistics)) if c not in best]
    columns = ["donor", "traced", "model_error", "gain"]
    if not others:
        return pd.DataFrame({c: [] for c in columns})
    now, *then = problem.errors([best, *((*best, c) for c in others)]).mean(axis=1)
    lines = [
        (problem.statistics[c].config_id, c < problem.traced, float(e), float(now - e)) for c, e in zip(others, then, strict=True)
    ]
    return pd.DataFrame(lines, columns=columns).sort_values("gain", ascending=False, ignore_index=True)


def _contributions(problem: RankingProblem, best: Sequence[int]) -> pd.DataFrame:
    """Return what each donor of a subset takes off the targets' variance, by coefficient."""
    subsets = [tuple(best), *(tuple(c for c in best if c != out) for out in best)]
    _, *without = problem.errors(subsets).mean(axis=1)
    masks = problem.masks(subsets)
    parts = np.mean([problem.information.by_coefficient(masks, t) for t in problem.targets], axis=0)
    lines = []
    for i, out in enumerate(best):
        gained = parts[i + 1] - parts[0]
        share = gained / max(float(gained.sum()), np.finfo(float).tiny)
        for name, value in zip(problem.information.features.coef_names, share, strict=True):
            lines.append((problem.statistics[out].config_id, float(without[i]), name, float(value)))
    return pd.DataFrame(lines, columns=["donor", "without", "coefficient", "share"])


def _kind(configuration: ServingConfiguration) -> dict[str, str]:
    """Return in which respects configurations are of one kind, in words."""
    tp = configuration.engine.tensor_parallel
    return {
        "hardware": f"on {configuration.hardware.name}",
        "experts": "with experts" if configuration.llm.num_experts > 1 else "dense",
        "parallel": "on several GPUs" if tp > 1 else "on one GPU",
    }


def _reasons(
    problem: RankingProblem,
    best: Sequence[int],
    table: pd.DataFrame,
    additional: pd.DataFrame,
    contributions: pd.DataFrame,
    floor: float,
) -> tuple[str, ...]:
    first = _best(table)
    now = float(first["model_error"])
    wanted = [_kind(t.configuration) for t in problem.targets]
    checked = f", times {first['ratio']:.2f} for what candidates outside showed" if problem.checked else ""
    said = [
        f"best {len(best)}: expected zero-shot error {first['expected_error']:.1%} of the step time, mean over {len(wanted)} target(s)",
        f"by the model {now:.1%}{checked}; {floor:.1%} would be left by any donors, the targets' own deviations",
    ]
    kinds = {problem.statistics[c].config_id: _kind(problem.statistics[c].configuration) for c in best}
    for donor, lines in contributions.groupby("donor", sort=False):
        top = lines.sort_values("share", ascending=False).head(3)
        told = ", ".join(f"{n} ({s:.0%})" for n, s in zip(top["coefficient"], top["share"], strict=True) if s > 0.05)
        alone = [
            f"the only one {word}, as {sum(t[respect] == word for t in wanted)} of the {len(wanted)} target(s)"
            for respect, word in kinds[str(donor)].items()
            if sum(k[respect] == word for k in kinds.values()) == 1 and any(t[respect] == word for t in wanted)
        ]
        because = f"; {', '.join(alone)}" if alone else ""
        said.append(
            f"{donor}: without it {lines['without'].iloc[0]:.1%}; it informs {told or 'every coefficient a little'}{because}"
        )
    if len(additional):
        more = additional.iloc[0]
        what = "" if more["traced"] else ", not yet traced,"
        said.append(
            f"one donor more: {more['donor']}{what} would inform most, {now:.2%} to {more['model_error']:.2%} by the model"
        )
    judged = table.dropna(subset=["refit_error"])
    for _, line in judged.iterrows():
        actual = (
            ""
            if np.isnan(line["actual_mape"])
            else f", measured on the targets' traces {line['actual_mape']:.1%} with their noise"
        )
        said.append(
            f"refitted {line['donors']}: expected {line['expected_error']:.1%}, by the refit {line['refit_error']:.1%}{actual}"
        )
    return tuple(said)


def _refit(
    table: pd.DataFrame,
    count: int,
    store: TraceStore,
    statistics: Mapping[str, ConfigStatistics],
    problem: RankingProblem,
    features: FeatureSet,
    priors: PriorSettings,
    settings: DonorChoiceSettings,
    seed: int,
    show_progress: bool,
) -> None:
    """Fill in what the exact engine, and the targets' own traces, say of the best subsets."""
    frames = {t.configuration.config_id: _judged(store, t.configuration, features, settings) for t in problem.targets}
    for at in table.sort_values("expected_error", kind="stable").index[:count]:
        own = [statistics[d] for d in str(table.loc[at, "donors"]).split(",")]
        posterior = fit(own, features, priors, settings.sampler, seed=seed, show_progress=show_progress)
        table.loc[at, "refit_error"] = np.mean([_posterior_error(posterior, t, seed) for t in problem.targets])
        actual = [
            evaluate(posterior, f, t.configuration, seed=seed).mape
            for t in problem.targets
            if (f := frames[t.configuration.config_id]) is not None
        ]
        if actual:
            table.loc[at, "actual_mape"] = np.mean(actual)


def _posterior_error(posterior: LatencyPosterior, target: TargetTraffic, seed: int) -> float:
    """Return the expected relative error of a target's step times under a fit, E|x'(theta - mean)| / m averaged over traffic."""
    draws = posterior.draws(target.configuration, seed)
    return float(np.abs((draws.theta - draws.mean) @ target.rows.T).mean())


def _judged(
    store: TraceStore, configuration: ServingConfiguration, features: FeatureSet, settings: DonorChoiceSettings
) -> pd.DataFrame | None:
    """Return rows of a target to compare with, if the store holds its steps."""
    own = configuration.config_id
    if own not in store.config_ids or not store.has_table(own, "step_time") or store.configuration(own) != configuration:
        return None
    frame = usable_rows(read_trace(store, own, features.quantity).frame, configuration, features)
    return None if frame.empty else whole_blocks(frame, DEFAULT_BLOCK_LENGTH, settings.judged_rows)
