"""`predict`: batches in, latencies with intervals out; for fitted configurations and for those never seen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfdtl_bayes.cli.options import AsJson, PosteriorFile, Seed
from hfdtl_bayes.cli.output import TABLE_SUFFIXES, check_file, show, table_text, warn_unless_converged, write_table, writing
from hfdtl_bayes.errors import InputError

if TYPE_CHECKING:
    from hfdtl_bayes.configuration import ServingConfiguration
    from hfdtl_bayes.traces import TraceTable


def predict(
    posterior_file: PosteriorFile,
    out: Annotated[Path, typer.Option("--out", help="Predictions to write: .parquet or .csv.")],
    steps: Annotated[
        Path | None,
        typer.Argument(help="Batches (for delays: requests) to predict; without them, a grid of what the engine can run."),
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", help="config_id that was fitted; by default the calibrated target.")
    ] = None,
    configuration: Annotated[
        Path | None, typer.Option("--configuration", help="YAML of a configuration never seen: predicted zero-shot.")
    ] = None,
    sources: Annotated[
        bool, typer.Option("--sources", help="Also say where the variance comes from: level of the model, and coefficient.")
    ] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Predict a new observation of each row and its expected value, in seconds, with 95 % intervals."""
    import numpy as np  # noqa: PLC0415  (loaded on first use)

    from hfdtl_bayes.cli.traces import configuration_of, write_rejected  # noqa: PLC0415
    from hfdtl_bayes.features import operating_points  # noqa: PLC0415
    from hfdtl_bayes.model import LatencyPosterior  # noqa: PLC0415

    check_file(out, (posterior_file, steps, configuration), TABLE_SUFFIXES)
    posterior = LatencyPosterior.load(posterior_file)
    warn_unless_converged(posterior.convergence())
    quantity = posterior.feature_set.quantity
    chosen = configuration_of(posterior, config, configuration)
    tables: list[TraceTable] = []
    if steps is not None:
        tables.append(_read(steps, chosen, quantity))
        frame, numbers = tables[0].frame, tables[0].row_numbers
    elif quantity == "step_time":
        frame = operating_points(chosen)
        numbers = np.arange(len(frame))
    else:
        raise InputError(f"a {quantity} is predicted for requests; give a table with {', '.join(posterior.feature_set.columns)}")
    predicted = posterior.predict(frame, chosen, seed=seed).reset_index(drop=True)
    predicted.insert(0, "row", numbers)
    split = None
    if sources:
        from hfdtl_bayes.transfer import variance_sources  # noqa: PLC0415

        split = variance_sources(posterior, frame, chosen, seed=seed)
        # Of the whole variance, sd_s squared, and of that of the expected value, sd_mean_s squared.
        shares = (split.shares().add_prefix("share_"), split.coefficient_shares().add_prefix("mean_share_"))
        predicted = predicted.join([s.reset_index(drop=True) for s in shares])
    if steps is None:
        # Nobody else knows the batches of the grid, so they go with their predictions.
        predicted = predicted.join(frame.drop(columns="step_id"))
    with writing(out):
        write_table(predicted, out)
        rejected = write_rejected(tables, out)
    known = chosen.config_id in posterior.config_ids
    result: dict[str, Any] = {
        "out": out,
        "config_id": chosen.config_id,
        "fitted": known,
        "quantity": quantity,
        "rows": len(predicted),
        **rejected,
        "columns": list(predicted.columns),
        "seed": seed,
    }
    origin = "fitted" if known else "never seen, predicted from the population of donors"
    middle = predicted[["mean_s", "q2.5_s", "q97.5_s"]].median()
    text = (
        f"{len(predicted)} {quantity} predictions of {chosen.config_id} ({origin})\n"
        f"median row: mean {middle['mean_s']:.4g} s, 95 % interval {middle['q2.5_s']:.4g} to {middle['q97.5_s']:.4g} s\n"
        f"wrote {out}"
    )
    if split is not None:
        by_source, by_coefficient = split.table(), split.coefficient_table()
        result |= {"sources": by_source.to_dict(orient="records"), "coefficients": by_coefficient.to_dict(orient="records")}
        titles = ("variance of a new observation; sd relative to the mean", "variance of the expected value by coefficient")
        text += "".join(f"\n\n{table_text(*t)}" for t in zip((by_source, by_coefficient), titles, strict=True))
    show(result, text, as_json=as_json)


def _read(path: Path, configuration: ServingConfiguration, quantity: str) -> TraceTable:
    from hfdtl_bayes.cli.output import say  # noqa: PLC0415
    from hfdtl_bayes.traces import read_requests, read_steps  # noqa: PLC0415  (loaded on first use)

    read = read_steps if quantity == "step_time" else read_requests
    table = read(path, configuration, observed=False)
    say(table.summary())
    return table
