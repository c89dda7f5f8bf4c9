"""`verdict`: whether a target's coefficients may be used."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from hfdtl_bayes.cli.options import AsJson, PosteriorFile, Seed, Store
from hfdtl_bayes.cli.output import show
from hfdtl_bayes.errors import InputError

SAYS_NO = 1


def verdict(
    posterior_file: PosteriorFile,
    store: Store,
    config: Annotated[
        str | None, typer.Option("--config", help="config_id of the target; by default the calibrated one.")
    ] = None,
    gate: Annotated[bool, typer.Option("--gate", help="Exit with code 1 unless the verdict is accept.")] = False,
    calibration_only: Annotated[
        bool,
        typer.Option("--calibration-only", help="Judge by the rows calibrated on, where there are no others. Never accepts."),
    ] = False,
    mape_limit: Annotated[
        float | None, typer.Option("--mape-limit", help="Held-out MAPE to stay below, as a fraction [0.1].")
    ] = None,
    attainable_slack: Annotated[
        float | None,
        typer.Option("--attainable-slack", help="Where noise alone exceeds the limit: multiple of the attainable [1.3]."),
    ] = None,
    rmse_limit_s: Annotated[
        float | None, typer.Option("--rmse-limit-s", help="Root mean squared error to stay below, in seconds [none].")
    ] = None,
    min_probability: Annotated[
        float | None, typer.Option("--min-probability", help="Probability needed of an error below the limit [0.9].")
    ] = None,
    min_coverage: Annotated[
        float | None, typer.Option("--min-coverage", help="Share of rows needed in their 95 % interval [0.85].")
    ] = None,
    coverage_level: Annotated[
        float | None, typer.Option("--coverage-level", help="Level of the test of the blocks in their intervals [0.01].")
    ] = None,
    block_tolerance: Annotated[
        float | None,
        typer.Option("--block-tolerance", help="Relative error of a block's mean that is no reason against use [0.05]."),
    ] = None,
    conflict_level: Annotated[
        float | None,
        typer.Option("--conflict-level", help="Probability below which the target is called unlike the donors [0.001]."),
    ] = None,
    max_mean_uncertainty: Annotated[
        float | None, typer.Option("--max-mean-uncertainty", help="Relative sd allowed of the expected value [0.1].")
    ] = None,
    fit_level: Annotated[
        float | None, typer.Option("--fit-level", help="Level of the tests of missing terms and of slopes [0.01].")
    ] = None,
    min_gain: Annotated[
        float | None,
        typer.Option("--min-gain", help="MAPE a missing term must save to be worth a feature, as a fraction [0.01]."),
    ] = None,
    bootstrap: Annotated[int | None, typer.Option("--bootstrap", help="Resamples of time blocks [1000].")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Judge a calibrated target on the rows of the store that it was not calibrated on."""
    from hfdtl_bayes.cli.traces import WatchedStore, write_rejected  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.model import LatencyPosterior  # noqa: PLC0415
    from hfdtl_bayes.transfer import (  # noqa: PLC0415
        VerdictSettings,
        calibration_rows_of,
        held_out_rows,
        read_trace,
        usable_rows,
    )
    from hfdtl_bayes.transfer import verdict as judge  # noqa: PLC0415

    thresholds: dict[str, Any] = {
        "mape_limit": mape_limit,
        "attainable_slack": attainable_slack,
        "rmse_limit_s": rmse_limit_s,
        "min_probability": min_probability,
        "min_coverage": min_coverage,
        "coverage_level": coverage_level,
        "block_tolerance": block_tolerance,
        "conflict_level": conflict_level,
        "max_mean_uncertainty": max_mean_uncertainty,
        "fit_level": fit_level,
        "min_gain": min_gain,
        "bootstrap": bootstrap,
    }
    settings = VerdictSettings(**{k: v for k, v in thresholds.items() if v is not None})
    posterior = LatencyPosterior.load(posterior_file)
    if posterior.target is None:
        raise InputError(f"{posterior_file} holds donors and no calibrated target; run calibrate first")
    if config not in (None, posterior.target):
        raise InputError(f"{posterior_file} is calibrated for {posterior.target!r}, not {config!r}; calibrate {config!r} first")
    quantity = posterior.feature_set.quantity
    watched = WatchedStore(store)
    configuration = watched.configuration(posterior.target)
    frame = usable_rows(read_trace(watched, posterior.target, quantity).frame, configuration, posterior.feature_set)
    held_out: Any = None
    if calibration_only:
        calibration = calibration_rows_of(posterior, frame)
    else:
        calibration, held_out = held_out_rows(posterior, frame)
    found = judge(posterior, held_out, configuration, settings, calibration_rows=calibration, seed=seed)
    result = {
        **found.as_dict(),
        "accepted": found.accepted,
        "quantity": quantity,
        **write_rejected(watched.tables, None),
        "settings": asdict(settings),
        "seed": seed,
    }
    show(result, f"{found}\n  {found.held_out}" if found.held_out else str(found), as_json=as_json)
    if gate and not found.accepted:
        raise typer.Exit(SAYS_NO)
