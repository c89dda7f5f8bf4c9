"""`fit` and `calibrate`: traces in, a posterior file out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfdtl_bayes.cli.options import (
    BLOCK_LENGTH,
    CHAINS,
    DRAWS,
    ROWS_PER_CONFIG,
    TARGET_ACCEPT,
    TUNE,
    AsJson,
    BlockLength,
    CalibrationEngine,
    Chains,
    Discounts,
    Draws,
    Engine,
    EngineData,
    Likelihood,
    PosteriorFile,
    PriorsFile,
    RowsPerConfig,
    Scheduler,
    Seed,
    Store,
    TargetAccept,
    Tune,
    block_length_of,
    features_with_priors,
    names_in,
    sampler_settings,
)
from hfdtl_bayes.cli.output import check_file, say, show, table_text, warn_unless_converged, writing
from hfdtl_bayes.errors import InputError

if TYPE_CHECKING:
    from hfdtl_bayes.cli.traces import WatchedStore
    from hfdtl_bayes.model import LatencyPosterior


def fit(
    store: Store,
    donors: Annotated[str, typer.Option("--donors", help="config_ids of the donors, separated by commas.")],
    out: Annotated[Path, typer.Option("--out", help="Posterior file to write (netCDF).")],
    quantity: Annotated[
        str, typer.Option("--quantity", help="step_time, queue_delay (scheduled - queued) or api_delay (queued - arrival).")
    ] = "step_time",
    features: Annotated[
        str,
        typer.Option(
            "--features",
            help="Feature set: roofline, roofline-discrepancy, hfdtl, blis-physics, blis-blackbox or a registered one.",
        ),
    ] = "roofline",
    priors_file: PriorsFile = None,
    discounts: Discounts = None,
    max_rows: Annotated[int | None, typer.Option("--max-rows", min=1, help="First rows of each donor to use.")] = None,
    block_length: BlockLength = BLOCK_LENGTH,
    outlier_cutoff: Annotated[
        float | None,
        typer.Option(
            "--outlier-cutoff",
            help="Robust sds beyond which a row counts for less; inf: every row counts in full. By default 8 for steps, inf for delays.",
        ),
    ] = None,
    draws: Draws = DRAWS,
    tune: Tune = TUNE,
    chains: Chains = CHAINS,
    target_accept: TargetAccept = TARGET_ACCEPT,
    engine: Engine = "exact",
    likelihood: Likelihood = None,
    rows_per_config: RowsPerConfig = ROWS_PER_CONFIG,
    engine_data: EngineData = "memory",
    scheduler: Scheduler = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Fit the population of configurations to donors with rich traces."""
    from hfdtl_bayes.cli.traces import WatchedStore  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.transfer import discounts_from, fit_donors  # noqa: PLC0415

    check_file(out, (priors_file,))
    steps_per_block = block_length_of(block_length)
    watched = WatchedStore(store)
    priors, chosen = features_with_priors(features, quantity, priors_file)
    names = names_in(donors)
    shares = discounts_from(discounts, [watched.configuration(d) for d in names]) if discounts else {}
    posterior = fit_donors(
        watched,
        names,
        chosen,
        quantity,
        priors=priors,
        discounts=shares,
        max_rows=max_rows,
        block_length=steps_per_block,
        outlier_cutoff=outlier_cutoff,
        settings=sampler_settings(draws, tune, chains, target_accept),
        engine=engine,
        likelihood=likelihood or "gaussian",
        rows_per_config=rows_per_config,
        engine_data=engine_data,
        scheduler=scheduler,
        seed=seed,
    )
    _finish(posterior, watched, out, "population", as_json=as_json)


def calibrate(
    posterior_file: PosteriorFile,
    store: Store,
    config: Annotated[str, typer.Option("--config", help="config_id of the target in the store.")],
    out: Annotated[Path, typer.Option("--out", help="Posterior file to write (netCDF).")],
    max_rows: Annotated[
        int | None, typer.Option("--max-rows", min=1, help="Use the first rows only, of those chosen otherwise.")
    ] = None,
    rows: Annotated[
        Path | None, typer.Option("--rows", help="Table with the step_id (delays: request_id) of each row to use.")
    ] = None,
    regimes: Annotated[str | None, typer.Option("--regimes", help="Regimes to use, separated by commas.")] = None,
    block_length: BlockLength = BLOCK_LENGTH,
    outlier_cutoff: Annotated[
        float | None,
        typer.Option("--outlier-cutoff", help="Robust sds beyond which a row counts for less; as the donors' by default."),
    ] = None,
    draws: Draws = DRAWS,
    tune: Tune = TUNE,
    chains: Chains = CHAINS,
    target_accept: TargetAccept = TARGET_ACCEPT,
    engine: CalibrationEngine = "auto",
    likelihood: Likelihood = None,
    rows_per_config: RowsPerConfig = ROWS_PER_CONFIG,
    engine_data: EngineData = "memory",
    scheduler: Scheduler = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Calibrate a target: a few of its rows, with the donors' posterior as its prior."""
    from hfdtl_bayes.cli.traces import WatchedStore, calibration_rows  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.model import LatencyPosterior  # noqa: PLC0415
    from hfdtl_bayes.transfer import calibrate as calibrate_target  # noqa: PLC0415
    from hfdtl_bayes.transfer import calibrate_statistics, read_trace, usable_rows  # noqa: PLC0415
    from hfdtl_bayes.transfer.sources import check_data_engine, streamed_statistics  # noqa: PLC0415

    check_file(out, (posterior_file, rows))
    steps_per_block = block_length_of(block_length)
    donors = LatencyPosterior.load(posterior_file)
    quantity = donors.feature_set.quantity
    watched = WatchedStore(store)
    check_data_engine(engine_data, scheduler, engine, max_rows)
    sampler = sampler_settings(draws, tune, chains, target_accept)
    if engine_data != "memory":
        if rows is not None or regimes is not None:
            raise InputError(f"--rows and --regimes choose single rows, of which --engine-data {engine_data} keeps none")
        cutoff = donors.donor_statistics[0].scaling.cutoff if outlier_cutoff is None else outlier_cutoff
        own = streamed_statistics(
            watched,
            config,
            donors.feature_set,
            engine_data=engine_data,
            scheduler=scheduler,
            block_length=steps_per_block,
            outlier_cutoff=cutoff,
        )
        _finish(
            calibrate_statistics(donors, own, engine=engine, settings=sampler, seed=seed), watched, out, config, as_json=as_json
        )
        return
    frame = usable_rows(read_trace(watched, config, quantity).frame, watched.configuration(config), donors.feature_set)
    chosen = calibration_rows(frame, quantity, regimes=names_in(regimes), selection=rows, max_rows=max_rows)
    posterior = calibrate_target(
        donors,
        chosen,
        watched.configuration(config),
        block_length=steps_per_block,
        outlier_cutoff=outlier_cutoff,
        settings=sampler,
        engine=engine,
        likelihood=likelihood,
        rows_per_config=rows_per_config,
        seed=seed,
    )
    _finish(posterior, watched, out, config, as_json=as_json)


def _finish(posterior: LatencyPosterior, watched: WatchedStore, out: Path, described: str, *, as_json: bool) -> None:
    """Save a posterior, account for rejected rows, and show what was found."""
    from hfdtl_bayes.cli.traces import write_rejected  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.statistics import outlier_sentence  # noqa: PLC0415
    from hfdtl_bayes.statistics.collinearity import design_condition  # noqa: PLC0415

    with writing(out):
        posterior.save(out)
        rejected = write_rejected(watched.tables, out)
    convergence = posterior.convergence()
    warn_unless_converged(convergence)
    added = [s for s in posterior.statistics if posterior.target in (None, s.config_id)]
    untold = {s.config_id: design_condition(s, posterior.feature_set).warnings() for s in added}
    for config_id, sentences in untold.items():
        for sentence in sentences:
            say(f"warning: {config_id}: {sentence}")
    every = posterior.coefficient_table()
    table = every[every["config"] == described].drop(columns="config")
    worth = posterior.effective_rows()
    used = {s.config_id: s.rows for s in posterior.statistics}
    result: dict[str, Any] = {
        "out": out,
        "quantity": posterior.feature_set.quantity,
        "features": posterior.feature_set.name,
        "donors": posterior.donors,
        "target": posterior.target,
        "rows": used,
        "discounts": dict(posterior.priors.discounts),
        "effective_rows": [asdict(e) for e in worth],
        "downweighted": {s.config_id: {**asdict(s.downweighted), "total_s": s.total_s} for s in posterior.statistics},
        "outlier_cutoff": {s.config_id: s.scaling.cutoff for s in posterior.statistics},
        "likelihood": posterior.likelihood,
        "rows_seen": [str(r) for r in posterior.rows],
        **rejected,
        "seed": posterior.seed,
        "input_hash": posterior.input_hash,
        "convergence": asdict(convergence),
        "not_told_apart": untold,
        "coefficients": table.to_dict(orient="records"),
    }
    accounts = [*map(str, worth), *filter(None, map(outlier_sentence, posterior.statistics))]
    kind = f"{posterior.feature_set.quantity}, features {posterior.feature_set.name}"
    seen = f"{posterior.likelihood} likelihood of rows, {'; '.join(map(str, posterior.rows))}\n" if posterior.rows else ""
    told = "".join(f"{line}\n" for line in [*accounts, *posterior.priors.discount_sentences()])
    text = (
        f"{table_text(table, f'{kind}: coefficients of {described}')}\n"
        f"rows: {', '.join(f'{c} {n}' for c, n in used.items())}\n{told}{seen}{convergence}\nwrote {out}"
    )
    show(result, text, as_json=as_json)
