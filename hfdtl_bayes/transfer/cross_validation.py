"""Cross-validation over donors: how well a configuration is predicted that the fit has not seen, and after a few of its rows.

For each fold the remaining donors are refitted from their statistics with the exact engine, and each configuration left out is predicted
zero-shot and after n of its rows, on time blocks that no n ever sees, the same for every n. Rows are read once and reduced once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import ConvergenceError, InputError, UnknownNameError
from hfdtl_bayes.features import FeatureSet, feature_set
from hfdtl_bayes.model import LatencyPosterior, PriorSettings, SamplerSettings, fit
from hfdtl_bayes.model.conditional import ConditionalSettings
from hfdtl_bayes.model.diagnostics import ConvergenceSettings
from hfdtl_bayes.statistics import DEFAULT_BLOCK_LENGTH, ConfigStatistics, statistics_from_rows
from hfdtl_bayes.traces import TraceStore, split_by_blocks
from hfdtl_bayes.transfer.calibration import read_trace, require_enough_rows, usable_rows
from hfdtl_bayes.transfer.conditioning import calibrate_statistics
from hfdtl_bayes.transfer.crps import crps
from hfdtl_bayes.transfer.evaluation import evaluate
from hfdtl_bayes.transfer.folds import LEAVE_OUT, Fold, Skipped, drawing_order, plan_folds, refuse_twins, whole_blocks
from hfdtl_bayes.transfer.held_out_score import held_out_score, thinned
from hfdtl_bayes.transfer.scores import left_out_score
from hfdtl_bayes.transfer.sources import kept_statistics
from hfdtl_bayes.transfer.transfer_error import TransferError, transfer_error


@dataclass(frozen=True)
class CrossValidationSettings:
    """How a cross-validation is run."""

    rows: tuple[int, ...] = (0, 25, 50, 100, 250, 500)
    """Calibration rows of a left-out configuration; 0 is zero-shot."""
    seeds: int = 1
    """How many times calibration rows are drawn; the held-out rows stay the same."""
    unit: Literal["block", "row"] = "block"
    """What calibration rows are drawn by: whole time blocks, as a recording yields them, or single rows picked from a long
    recording. Rows of one block share its drift and are often alike, so blocks teach less: it is the careful choice."""
    held_out_fraction: float = 0.5
    """Share of the time blocks of each regime, its last, that are held out. Half: five hundred rows are to be left to draw from in
    recordings of a thousand or two."""
    held_out_rows: int = 1000
    """Most held-out rows to score, in whole blocks evenly spread: their MAPE then has a sampling error of a few per cent of itself."""
    draws: int = 1000
    """Posterior draws that predictions are scored with."""
    sampler: SamplerSettings = field(default_factory=lambda: SamplerSettings(draws=250))
    """Of the refits: half the usual draws, since means and 95 % intervals are scored and no quantile further out."""
    joint: SamplerSettings = field(default_factory=lambda: SamplerSettings(draws=150, tune=100))
    """Of a joint refit, where donors' draws cannot be conditioned on a target's rows."""
    weights: ConditionalSettings = field(default_factory=lambda: ConditionalSettings(min_effective=300))
    """When conditioned draws may be used. Three hundred effective draws leave a mean a seventeenth of a posterior sd, which is small
    beside the differences between configurations."""
    convergence: ConvergenceSettings = field(default_factory=lambda: ConvergenceSettings(max_rhat=1.05, min_ess=100))
    """Limits for these short chains: a hundred effective draws leave a mean a tenth of a posterior sd."""
    spread: float = 0.6
    """Sd between configurations of the log of the error that transfer adds, believed before any is seen: a factor of 1.8. Zero-shot on
    GPU steps it was 0.34 to 0.96 for eighty sets of two to four donors, 0.6 on average (benchmarks/donor_choice.py)."""
    spread_worth: float = 4.0
    """How many configurations that belief is worth; 0 for none. Four, for it varied by a third between sets of donors."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot be run.

        Raises
        ------
        InputError
            Names the setting, what was found and what is accepted.
        """
        object.__setattr__(self, "rows", tuple(sorted(set(self.rows))))
        if not self.rows or self.rows[0] < 0:
            raise InputError(f"rows must be numbers of calibration rows from 0, at least one, found {self.rows}")
        for name in ("seeds", "held_out_rows", "draws"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.unit not in ("block", "row"):
            raise InputError(f"unit must be 'block' or 'row', found {self.unit!r}")
        if not 0 < self.held_out_fraction < 1:
            raise InputError(f"held_out_fraction must lie between 0 and 1, found {self.held_out_fraction}")
        if not (0 < self.spread < float("inf") and 0 <= self.spread_worth < float("inf")):
            raise InputError(
                f"spread must be positive and spread_worth not negative, found {self.spread} and {self.spread_worth}"
            )


@dataclass(frozen=True)
class CrossValidation:
    """The outcome of a cross-validation.

    Attributes
    ----------
    table : DataFrame, one row per fold, configuration, number of rows and seed
        `leave_out` and `value` name the fold, `config` the configuration predicted, `donors` how many are left. `rows`, `seed`;
        `held_out_rows` and `held_out_blocks`; `log_score`, the joint log density in seconds of the held-out rows, its Monte Carlo
        `log_score_error`, and `log_score_per_row`; `mape`, `rmse_s`, `bias`, `coverage` of rows and `block_coverage` of
        95 % intervals, `attainable_mape`, `mean_uncertainty` as of `HeldOut`; `crps_s` and `crps_relative`; `engine`, and whether
        its draws `converged`.
    skipped : tuple of Skipped
        What could not be scored, and why.
    folds : tuple of Fold
        Those that were refitted.
    donors : tuple of str
    features, quantity : str
    settings : CrossValidationSettings
    seed : int
    """

    table: pd.DataFrame
    skipped: tuple[Skipped, ...]
    folds: tuple[Fold, ...]
    donors: tuple[str, ...]
    features: str
    quantity: str
    settings: CrossValidationSettings
    seed: int

    @property
    def leave_out(self) -> tuple[str, ...]:
        """What was left out, of `LEAVE_OUT`, where a fold could be scored."""
        return tuple(dict.fromkeys(self.table["leave_out"]))

    def error(self, rows: int = 0, leave_out: str | None = None) -> TransferError:
        """Return the expected transfer error for a new configuration, and its uncertainty.

        Parameters
        ----------
        rows : int
            Calibration rows of it.
        leave_out : str, optional
            Which folds to learn it from; by default the first asked for. "configuration" answers for one more of the kind that
            the donors are, "model" for an LLM none of them serves, and so on.

        Raises
        ------
        InputError
            If no configuration was scored so.
        """
        kind = leave_out or self.leave_out[0]
        own = self.table[(self.table["leave_out"] == kind) & (self.table["rows"] == rows)]
        if own.empty:
            raise InputError(
                f"no configuration was predicted after {rows} rows leaving out {kind}; there are rows "
                f"{', '.join(map(str, self.settings.rows))} and leaving out {', '.join(self.leave_out)}"
            )
        # A configuration may be left out in several folds (once for each workload): its own mean counts once.
        logs = own[["mape", "attainable_mape"]].apply(np.log).groupby(own["config"], sort=False).mean()
        mape = {str(c): float(np.exp(v)) for c, v in logs["mape"].items()}
        attainable = np.exp(logs["attainable_mape"].to_numpy(dtype=float))
        return transfer_error(mape, attainable, rows, spread=self.settings.spread, worth=self.settings.spread_worth)

    def learning_curve(self) -> pd.DataFrame:
        """Return the expected transfer error by number of rows, one row per way of leaving out and number.

        Columns `leave_out`, those of `TransferError`, and means over configurations of `coverage`, `block_coverage`,
        `crps_relative` and `log_score_per_row`.
        """
        lines: list[dict[str, Any]] = []
        means = ["coverage", "block_coverage", "crps_relative", "log_score_per_row"]
        for kind in self.leave_out:
            of_kind = self.table[self.table["leave_out"] == kind]
            for rows in sorted({int(n) for n in of_kind["rows"]}):
                average = of_kind[of_kind["rows"] == rows].groupby("config")[means].mean().mean()
                numbers = {str(name): float(value) for name, value in average.items()}
                lines.append({"leave_out": kind, **asdict(self.error(rows, kind)), **numbers})
        return pd.DataFrame(lines)

    def sentences(self) -> tuple[str, ...]:
        """Return what was found in plain words, what was skipped included."""
        said = [
            f"leaving out {kind}: {self.error(int(n), kind)}"
            for kind in self.leave_out
            for n in sorted({int(n) for n in self.table.loc[self.table["leave_out"] == kind, "rows"]})
        ]
        said += [f"skipped: {s}" for s in self.skipped]
        failed = self.table[~self.table["converged"]]
        if len(failed):
            said.append(f"{len(failed)} of {len(self.table)} scores rest on draws that have not converged (column converged)")
        return tuple(said)

    def __str__(self) -> str:
        """Return the sentences, one a line."""
        return "\n".join(self.sentences())


@dataclass(frozen=True)
class _Donor:
    """A configuration with its statistics and, unless only these are kept, its rows; `pool` to calibrate from, `held` to judge by."""

    configuration: ServingConfiguration
    statistics: ConfigStatistics
    frame: pd.DataFrame | None
    pool: pd.DataFrame | None = None
    held: pd.DataFrame | None = None
    reason: str = ""


@dataclass
class _Run:
    """What folds share: rows, statistics and posteriors that are computed once."""

    donors: dict[str, _Donor]
    features: FeatureSet
    priors: PriorSettings | None
    settings: CrossValidationSettings
    blocks: dict[str, Any]
    seed: int
    show_progress: bool
    fits: dict[tuple[tuple[str, ...], str | None], LatencyPosterior] = field(default_factory=dict)
    scores: dict[tuple[tuple[str, ...], str | None, str], tuple[list[dict[str, Any]], list[str]]] = field(default_factory=dict)


def cross_validate(
    store: TraceStore,
    donors: Sequence[str],
    features: str | FeatureSet = "roofline",
    quantity: str = "step_time",
    *,
    leave_out: str | Collection[str] = "configuration",
    settings: CrossValidationSettings | None = None,
    priors: PriorSettings | None = None,
    block_length: int | Literal["auto"] = DEFAULT_BLOCK_LENGTH,
    outlier_cutoff: float | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> CrossValidation:
    """Refit the donors without each in turn, and predict it zero-shot and after some of its rows.

    Parameters
    ----------
    store : TraceStore
    donors : sequence of str
        config_ids, two at least, no two of them the same configuration. One of which only statistics.nc is kept helps to predict the
        others and is not predicted itself.
    features, quantity, priors, block_length, outlier_cutoff
        As in `fit_donors`.
    leave_out : str or collection of str
        "configuration"; or "model", "hardware", "tp": with all donors that share it; or "workload": every configuration and every
        regime at once, donors and calibration rows without that regime, predictions of it alone. Several give a
        table with all of them.
    settings : CrossValidationSettings, optional
    seed : int
        The same seed gives the same result.
    show_progress : bool

    Returns
    -------
    CrossValidation

    Raises
    ------
    InputError
        If there are fewer than two donors, one is listed twice or is another under a second name, a number of rows is more than
        any configuration has, or nothing is left that could be scored; says why.
    UnknownNameError
        If a donor, the feature set or what to leave out is not known.
    """
    settings = settings or CrossValidationSettings()
    kinds = [leave_out] if isinstance(leave_out, str) else list(dict.fromkeys(leave_out))
    unknown = [k for k in kinds if k not in LEAVE_OUT]
    if unknown or not kinds:
        raise UnknownNameError(f"cannot leave out {', '.join(unknown) or 'nothing'}; accepted are {', '.join(LEAVE_OUT)}")
    repeated = sorted({d for d in donors if list(donors).count(d) > 1})
    if repeated:
        raise InputError(f"donor(s) listed twice: {', '.join(repeated)}; list each once")
    if len(donors) < 2:
        raise InputError(
            f"cross-validation needs two donors at least, found {', '.join(donors) or 'none'}: with one there is nothing to predict it from, "
            f"and how transfer will do cannot be said. The store holds {', '.join(store.config_ids)}"
        )
    chosen = feature_set(features, quantity) if isinstance(features, str) else features
    blocks = {"block_length": block_length, "outlier_cutoff": outlier_cutoff}
    known = {d: _donor(store, d, chosen, settings, blocks) for d in donors}
    refuse_twins([d.statistics for d in known.values()])
    _refuse_rows_nobody_has(known, kinds, settings)
    run = _Run(known, chosen, priors, settings, blocks, seed, show_progress)
    lines: list[dict[str, Any]] = []
    skipped: list[Skipped] = []
    done: list[Fold] = []
    regimes = {c: list(pd.unique(d.frame["regime"])) for c, d in known.items() if d.frame is not None}
    for kind in kinds:
        folds, without = plan_folds(kind, [d.configuration for d in known.values()], regimes)
        skipped += without
        for fold in folds:
            found, reasons = _fold(run, fold)
            lines += found
            skipped += reasons
            if found:
                done.append(fold)
    if not lines:
        raise InputError(
            "nothing could be predicted, so there is no transfer error to tell: " + "; ".join(dict.fromkeys(map(str, skipped)))
        )
    return CrossValidation(
        pd.DataFrame(lines),
        tuple(dict.fromkeys(skipped)),
        tuple(done),
        tuple(donors),
        chosen.name,
        chosen.quantity,
        settings,
        seed,
    )


def _refuse_rows_nobody_has(known: dict[str, _Donor], kinds: Sequence[str], settings: CrossValidationSettings) -> None:
    """Refuse numbers of rows that no configuration leaves beside those held out, before anything is fitted."""
    left: dict[str, int] = {}
    for c, d in known.items():
        if d.pool is not None and any(k != "workload" for k in kinds):
            left[c] = len(d.pool)
        if d.frame is not None and "workload" in kinds:
            left[c] = max(left.get(c, 0), len(d.frame) - int(d.frame["regime"].value_counts().min()))
    absent = [n for n in settings.rows if n > max(left.values(), default=n)]
    if absent:
        raise InputError(
            f"no configuration has {', '.join(map(str, absent))} rows to calibrate on beside those held out (left are "
            f"{', '.join(f'{c} {n}' for c, n in left.items())}); ask for fewer rows, hold out less (held_out_fraction), or record more"
        )


def _donor(
    store: TraceStore, config_id: str, features: FeatureSet, settings: CrossValidationSettings, blocks: dict[str, Any]
) -> _Donor:
    kept = kept_statistics(store, config_id, features)
    if kept is not None:
        return _Donor(kept.configuration, kept, None, reason="only its statistics are kept, and rows are needed to judge by")
    configuration = store.configuration(config_id)
    frame = usable_rows(read_trace(store, config_id, features.quantity).frame, configuration, features)
    require_enough_rows(frame, configuration, features)
    statistics = statistics_from_rows(frame, configuration, features, **blocks)
    try:
        pool, held = split_by_blocks(frame, settings.held_out_fraction, statistics.block_length)
    except InputError as error:
        return _Donor(configuration, statistics, frame, reason=f"no held-out block is left to judge by: {error}")
    return _Donor(configuration, statistics, frame, pool, whole_blocks(held, statistics.block_length, settings.held_out_rows))


def _fold(run: _Run, fold: Fold) -> tuple[list[dict[str, Any]], list[Skipped]]:
    """Score the configurations a fold leaves out."""
    statistics, reasons = _statistics(run, fold)
    skipped = [Skipped(fold.leave_out, fold.value, c, reason) for c, reason in reasons.items()]
    wanted = [c for c in fold.left_out if run.donors[c].frame is not None]
    skipped += [Skipped(fold.leave_out, fold.value, c, run.donors[c].reason) for c in fold.left_out if c not in wanted]
    if not statistics:
        return [], [*skipped, Skipped(fold.leave_out, fold.value, "", "no donor is left to predict from")]
    if not wanted:
        return [], skipped
    key = tuple(s.config_id for s in statistics), fold.regime
    try:
        if key not in run.fits:
            run.fits[key] = fit(
                statistics, run.features, run.priors, run.settings.sampler, seed=run.seed, show_progress=run.show_progress
            )
    except ConvergenceError as error:
        return [], [*skipped, Skipped(fold.leave_out, fold.value, "", f"the remaining donors could not be fitted: {error}")]
    lines = []
    for config_id in wanted:
        if (*key, config_id) not in run.scores:
            run.scores[*key, config_id] = _configuration(run, run.fits[key], run.donors[config_id], fold.regime)
        found, why = run.scores[*key, config_id]
        named = {"leave_out": fold.leave_out, "value": fold.value, "config": config_id, "donors": len(statistics)}
        lines += [{**named, **line} for line in found]
        skipped += [Skipped(fold.leave_out, fold.value, config_id, reason) for reason in why]
    return lines, skipped


def _statistics(run: _Run, fold: Fold) -> tuple[list[ConfigStatistics], dict[str, str]]:
    """Return the statistics of a fold's donors, and why some are not among them."""
    found, reasons = [], {}
    for d in fold.donors:
        own = run.donors[d]
        if fold.regime is None or (own.frame is not None and fold.regime not in set(own.frame["regime"])):
            found.append(own.statistics)
        elif own.frame is None:
            reasons[d] = f"as a donor: only its statistics are kept, which may hold rows of {fold.regime}"
        else:
            frame = own.frame[own.frame["regime"] != fold.regime]
            if len(frame) < len(run.features.pooled):
                reasons[d] = f"as a donor: {len(frame)} rows are left without {fold.regime}, too few to fit"
            else:
                # Reduced anew, for the row scale and which rows are outliers are also learned from the rows.
                found.append(statistics_from_rows(frame, own.configuration, run.features, **run.blocks))
    return found, reasons


def _configuration(
    run: _Run, donors: LatencyPosterior, own: _Donor, regime: str | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Score one left-out configuration at every number of rows; returns the scores, and why some are missing."""
    settings, length = run.settings, own.statistics.block_length
    assert own.frame is not None
    if regime is None:
        if own.pool is None or own.held is None:
            return [], [own.reason]
        pool, held = own.pool, own.held
    else:
        inside = own.frame["regime"] == regime
        pool, held = own.frame[~inside], whole_blocks(own.frame[inside], length, settings.held_out_rows)
    cutoff = own.statistics.scaling.cutoff
    lines, reasons = [], []
    for n in settings.rows:
        if n > len(pool):
            reasons.append(f"{n} calibration rows are asked for and {len(pool)} are left beside those held out")
            continue
        for s in range(settings.seeds if n else 1):
            posterior = donors
            try:
                if n:
                    rng = np.random.default_rng([run.seed, 17, s])
                    rows = pool.iloc[np.sort(drawing_order(pool, length, settings.unit, rng)[:n])]
                    drawn = statistics_from_rows(
                        rows, own.configuration, run.features, block_length=length, outlier_cutoff=cutoff
                    )
                    posterior = calibrate_statistics(
                        donors, drawn, limits=settings.weights, settings=settings.joint, seed=run.seed, show_progress=False
                    )
                lines.append({"rows": n, "seed": s, **_scored(posterior, held, own.configuration, length, settings, run.seed)})
            except (InputError, ConvergenceError) as error:
                reasons.append(f"after {n} rows: {error}")
    return lines, reasons


def _scored(
    posterior: LatencyPosterior,
    held: pd.DataFrame,
    configuration: ServingConfiguration,
    block_length: int,
    settings: CrossValidationSettings,
    seed: int,
) -> dict[str, Any]:
    # Draws were conditioned only where their weights could be relied upon and the donors' own had converged.
    converged = posterior.engine == "conditional" or posterior.convergence(settings.convergence).passed
    # The row scale is what the posterior expects, as in its predictions: no held-out row has a say in its own density.
    pilot = posterior.draws(configuration, seed).mean
    rows = statistics_from_rows(held, configuration, posterior.feature_set, block_length=block_length, pilot=pilot)
    if posterior.target is None:
        score, error = left_out_score(posterior, rows, seed=seed)
    else:
        score, error = held_out_score(posterior, rows, draws=settings.draws)
    few = thinned(posterior, settings.draws)
    found = evaluate(few, held, configuration, block_length=block_length, seed=seed)
    crps_s, crps_relative = crps(few, held, configuration, seed=seed)
    return {
        "held_out_rows": found.rows,
        "held_out_blocks": found.blocks,
        "log_score": score,
        "log_score_error": error,
        "log_score_per_row": score / found.rows,
        "mape": found.mape,
        "rmse_s": found.rmse_s,
        "bias": found.bias,
        "crps_s": crps_s,
        "crps_relative": crps_relative,
        "coverage": found.coverage,
        "block_coverage": found.block_coverage,
        "attainable_mape": found.attainable_mape,
        "mean_uncertainty": found.mean_uncertainty,
        "engine": posterior.engine,
        "converged": converged,
    }
