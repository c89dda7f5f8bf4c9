"""`export`: a posterior as BLIS takes it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfdtl_bayes.cli.options import AsJson, PosteriorFile, Seed
from hfdtl_bayes.cli.output import check_file, say, show, warn_unless_converged, writing

if TYPE_CHECKING:
    from hfdtl_bayes.cli.traces import WatchedStore
    from hfdtl_bayes.configuration import ServingConfiguration
    from hfdtl_bayes.traces import StepReport, TraceTable


class Format(StrEnum):
    """What can be written."""

    BLIS_YAML = "blis-yaml"
    BLIS_FLAGS = "blis-flags"


def export(
    posterior_file: PosteriorFile,
    format: Annotated[Format, typer.Option("--format", help="YAML for --defaults-filepath, or flags of blis run and replay.")],
    out: Annotated[Path | None, typer.Option("--out", help="File to write; by default stdout.")] = None,
    config: Annotated[
        str | None, typer.Option("--config", help="config_id that was fitted; by default the calibrated target.")
    ] = None,
    configuration: Annotated[Path | None, typer.Option("--configuration", help="YAML of a configuration never seen.")] = None,
    traffic: Annotated[
        Path | None, typer.Option("--traffic", help="Batches the vector is to be right for; by default all the engine can run.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            "--store", help="Trace store of the configuration: its steps are the traffic, its idle requests give alpha0."
        ),
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Export the coefficients of one configuration to BLIS's trained-physics backend, checked."""
    from hfdtl_bayes.cli.traces import WatchedStore, configuration_of, write_rejected  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.export import blis_flags, blis_vectors, blis_yaml, write_text  # noqa: PLC0415
    from hfdtl_bayes.model import LatencyPosterior  # noqa: PLC0415
    from hfdtl_bayes.traces import drop_warmup, read_steps  # noqa: PLC0415

    if out is not None:
        check_file(out, (posterior_file, configuration, traffic))
    posterior = LatencyPosterior.load(posterior_file)
    warn_unless_converged(posterior.convergence())
    chosen = configuration_of(posterior, config, configuration)
    watched = WatchedStore(store) if store is not None else None
    tables: list[TraceTable | StepReport] = watched.tables if watched is not None else []
    frame = None
    if traffic is not None:
        table = read_steps(traffic, chosen, observed=False)
        say(table.summary())
        tables.append(table)
        frame = table.frame
    elif watched is not None:
        frame = drop_warmup(watched.steps(chosen.config_id).frame)
    alpha0_s = _alpha0(watched, chosen)
    vectors = blis_vectors(posterior, chosen, frame, alpha0_s=alpha0_s, seed=seed)
    text = blis_yaml(vectors) if format is Format.BLIS_YAML else blis_flags(vectors)
    result: dict[str, Any] = {**vectors.as_dict(), "format": str(format), "out": out, "text": text, "seed": seed}
    say(vectors.summary())
    if out is None:
        result |= write_rejected(tables, None)
        show(result, text.rstrip("\n"), as_json=as_json)
    else:
        with writing(out):
            write_text(text, out)
            result |= write_rejected(tables, out)
        show(result, f"wrote {out}", as_json=as_json)


def _alpha0(watched: WatchedStore | None, configuration: ServingConfiguration) -> float:
    """Return the idle delay from arrival to queue in seconds, 0 where no requests tell."""
    from hfdtl_bayes.errors import MissingInputError  # noqa: PLC0415
    from hfdtl_bayes.export import idle_api_delay_s  # noqa: PLC0415

    if watched is None:
        return 0.0
    try:
        requests = watched.requests(configuration.config_id).frame
    except MissingInputError:
        say("no requests in the store: alpha0 is exported as 0")
        return 0.0
    delay = idle_api_delay_s(requests)
    if delay is None:
        say("no arrivals, or fewer than five requests that found the engine idle: alpha0 is exported as 0")
        return 0.0
    return delay
