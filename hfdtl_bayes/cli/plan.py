"""`plan`: what traffic to send next to a live target, and how many minutes until a verdict is expected to accept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hfdtl_bayes.cli.deployment import (
    BenchCommands,
    BlisWorkload,
    Budget,
    Concurrencies,
    DeploymentOption,
    Durations,
    Host,
    MapeLimit,
    ModelName,
    Outputs,
    Port,
    Prefixes,
    Prompts,
    RangeRatio,
    Rates,
    check_outputs,
    grid_of,
    read_deployment,
    write_plan,
)
from hfdtl_bayes.cli.options import AsJson, PosteriorFile, Seed
from hfdtl_bayes.cli.output import show, warn_unless_converged
from hfdtl_bayes.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from hfdtl_bayes.configuration import ServingConfiguration
    from hfdtl_bayes.model import LatencyPosterior


def plan(
    posterior_file: PosteriorFile,
    where: Annotated[
        Path, typer.Argument(metavar="STORE|CONFIGURATION.yaml", help="Trace store that holds the target, or its YAML alone.")
    ],
    deployment: DeploymentOption,
    config: Annotated[
        str | None, typer.Option("--config", help="config_id of the target in the store; by default the calibrated one.")
    ] = None,
    budget_minutes: Budget = None,
    concurrency: Concurrencies = None,
    request_rate: Rates = None,
    prompt_tokens: Prompts = None,
    output_tokens: Outputs = None,
    prefix_tokens: Prefixes = None,
    duration: Durations = None,
    range_ratio: RangeRatio = None,
    mape_limit: MapeLimit = None,
    out: Annotated[Path | None, typer.Option("--out", help="Plan to write (JSON).")] = None,
    bench_commands: BenchCommands = None,
    blis_workload: BlisWorkload = None,
    model: ModelName = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Choose traffic by what it tells of the deployment's predictions per second, given what is known."""
    from hfdtl_bayes.design.stopping import AcceptanceSettings  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.design.traffic_plan import plan_traffic  # noqa: PLC0415
    from hfdtl_bayes.model import LatencyPosterior  # noqa: PLC0415

    check_outputs(out, bench_commands, blis_workload, (posterior_file, where))
    posterior = LatencyPosterior.load(posterior_file)
    warn_unless_converged(posterior.convergence())
    configuration, recorded, held_out = _target(posterior, where, config)
    grid = grid_of(
        configuration,
        {
            "--concurrency": concurrency,
            "--request-rate": request_rate,
            "--prompt-tokens": prompt_tokens,
            "--output-tokens": output_tokens,
            "--prefix-tokens": prefix_tokens,
            "--duration": duration,
        },
        range_ratio,
    )
    found = plan_traffic(
        posterior,
        configuration,
        read_deployment(deployment, configuration, posterior, recorded),
        grid=grid,
        budget_minutes=budget_minutes,
        measured=recorded if posterior.target == configuration.config_id else None,
        held_out=held_out,
        acceptance=AcceptanceSettings() if mape_limit is None else AcceptanceSettings(mape_limit=mape_limit),
        seed=seed,
    )
    written = write_plan(found, out, bench_commands, blis_workload, model=model, host=host, port=port)
    lines = [str(found), *(f"wrote {path}" for path in written)]
    show({**found.as_dict(), "written": [str(p) for p in written], "seed": seed}, "\n".join(lines), as_json=as_json)


def _target(
    posterior: LatencyPosterior, where: Path, config: str | None
) -> tuple[ServingConfiguration, pd.DataFrame | None, pd.DataFrame | None]:
    """Return the target's configuration, its usable rows if there are any, and of a calibrated one those that judge it."""
    from hfdtl_bayes.cli.traces import WatchedStore, write_rejected  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.configuration import read_configuration  # noqa: PLC0415
    from hfdtl_bayes.transfer import held_out_rows, read_trace, usable_rows  # noqa: PLC0415

    if not where.is_dir():
        configuration = read_configuration(where)
        if config not in (None, configuration.config_id):
            raise InputError(f"{where} describes {configuration.config_id!r}, not {config!r}; leave --config out")
        return configuration, None, None
    store = WatchedStore(where)
    name = config or posterior.target
    if name is None:
        raise InputError(f"this posterior has no calibrated target; give --config, one of {', '.join(store.config_ids)}")
    configuration = store.configuration(name)
    if not store.has_table(name, "step_time"):
        return configuration, None, None
    rows = usable_rows(read_trace(store, name, "step_time").frame, configuration, posterior.feature_set)
    write_rejected(store.tables, None)
    if posterior.target != name:
        return configuration, rows, None
    try:
        return configuration, rows, held_out_rows(posterior, rows)[1]
    except InputError:
        # Every block was calibrated on: nothing judges yet.
        return configuration, rows, None
