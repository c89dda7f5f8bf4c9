"""`follow`: a closed loop against a folder that fills up with trace parts: calibrate, judge, plan, until the verdict accepts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from hfdtl_bayes.cli.options import AsJson, PosteriorFile, Seed, Store
from hfdtl_bayes.cli.output import check_file, say, show, warn_unless_converged, writing
from hfdtl_bayes.errors import InputError

if TYPE_CHECKING:
    from hfdtl_bayes.design.closed_loop import ClosedLoop
    from hfdtl_bayes.design.traffic_plan import TrafficPlan

SAYS_NO = 1

# Repeated because importing FollowSettings would load NumPy for --help; a test keeps them equal.
POLL_S, IDLE_MINUTES = 2.0, 30.0


def follow(
    posterior_file: PosteriorFile,
    store: Store,
    config: Annotated[str, typer.Option("--config", help="config_id of the target; its steps.parquet is the folder of parts.")],
    deployment: DeploymentOption,
    out: Annotated[Path, typer.Option("--out", help="Posterior of the target to write (netCDF), anew after each part.")],
    plan_out: Annotated[Path | None, typer.Option("--plan", help="Next plan to write (JSON), anew after each part.")] = None,
    bench_commands: BenchCommands = None,
    blis_workload: BlisWorkload = None,
    budget_minutes: Budget = None,
    concurrency: Concurrencies = None,
    request_rate: Rates = None,
    prompt_tokens: Prompts = None,
    output_tokens: Outputs = None,
    prefix_tokens: Prefixes = None,
    duration: Durations = None,
    range_ratio: RangeRatio = None,
    mape_limit: MapeLimit = None,
    model: ModelName = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    poll_s: Annotated[float, typer.Option("--poll-seconds", help="Seconds between two looks at the folder.")] = POLL_S,
    idle_minutes: Annotated[float, typer.Option("--idle-minutes", help="End when no part has come for so long.")] = IDLE_MINUTES,
    limit_minutes: Annotated[
        float | None, typer.Option("--limit-minutes", help="End after so long whatever comes; no limit by default.")
    ] = None,
    settle_s: Annotated[
        float, typer.Option("--settle-seconds", help="Set a part aside that cannot be read and has not changed for so long.")
    ] = 10.0,
    gate: Annotated[bool, typer.Option("--gate", help="Exit with code 1 unless the loop ends with accept.")] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Take in trace parts as they come; after each, calibrate, judge and say what traffic to send next. Ends with accept or when time is up.

    Files are written whole: an interruption leaves the posterior and plan of the last part.
    """
    from hfdtl_bayes.design.closed_loop import ClosedLoop  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.design.stopping import AcceptanceSettings  # noqa: PLC0415
    from hfdtl_bayes.design.trace_folder import FollowSettings, PartFolder  # noqa: PLC0415
    from hfdtl_bayes.design.trace_folder import follow as follow_parts  # noqa: PLC0415
    from hfdtl_bayes.design.traffic_plan import deployment_steps, plan_traffic  # noqa: PLC0415
    from hfdtl_bayes.model import LatencyPosterior  # noqa: PLC0415
    from hfdtl_bayes.traces import TraceStore  # noqa: PLC0415
    from hfdtl_bayes.transfer import VerdictSettings  # noqa: PLC0415

    check_file(out, (posterior_file,), (".nc",))
    check_outputs(plan_out, bench_commands, blis_workload, (posterior_file, out))
    donors = LatencyPosterior.load(posterior_file)
    warn_unless_converged(donors.convergence())
    if donors.feature_set.quantity != "step_time":
        raise InputError(f"traffic is planned for step times, and {posterior_file} is of {donors.feature_set.quantity}")
    configuration = TraceStore(store).configuration(config)
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
    thresholds = VerdictSettings() if mape_limit is None else VerdictSettings(mape_limit=mape_limit)
    settings = FollowSettings(poll_s, 60 * idle_minutes, float("inf") if limit_minutes is None else 60 * limit_minutes)
    mix, weights = deployment_steps(donors, configuration, read_deployment(deployment, configuration, donors, None), seed=seed)
    loop = ClosedLoop(donors, configuration, mix, weights, thresholds=thresholds, seed=seed)
    folder = PartFolder(store / config / "steps.parquet", configuration, settle_s=settle_s)

    def next_plan() -> TrafficPlan:
        made = plan_traffic(
            loop.posterior,
            configuration,
            mix,
            weights=weights,
            grid=grid,
            budget_minutes=budget_minutes,
            measured=loop.measured,
            held_out=loop.held_out,
            acceptance=AcceptanceSettings.of(thresholds),
            seed=seed + len(loop.parts),
        )
        write_plan(made, plan_out, bench_commands, blis_workload, model=model, host=host, port=port)
        return made

    plan = next_plan()
    say(f"{plan}\nwaiting for parts in {folder.path}")
    events: list[dict[str, Any]] = []
    end = None
    for event in follow_parts(loop, folder, settings):
        for line in event.said:
            say(line)
        end = event.end
        if not event.parts:
            continue
        for part in event.parts:
            say(part.table.summary())
        events.append(_record(loop, [p.path.name for p in event.parts], sum(len(p.table.rejected) for p in event.parts)))
        if loop.posterior.target is not None:
            # Rows are known by their number in the parts taken, which no store repeats; so they are not named in the file.
            with writing(out):
                replace(loop.posterior, calibration_rows=loop.posterior.calibration_rows[:0]).save(out)
        say(str(loop.verdict) if loop.verdict else f"{loop.rows} rows so far, too few to calibrate on")
        if not loop.accepted:
            plan = next_plan()
            say(str(plan))
    result = {
        "config_id": config,
        "end": str(end),
        "accepted": loop.accepted,
        "rows": loop.rows,
        "parts": loop.parts,
        "events": events,
        "verdict": loop.verdict.as_dict() if loop.verdict else None,
        "out": str(out) if loop.posterior.target is not None else None,
        "minutes_needed": None if loop.accepted else plan.minutes_needed,
        "seed": seed,
    }
    outcome = loop.verdict.outcome if loop.verdict else "none yet"
    show(result, f"{config}: {end} after {len(loop.parts)} part(s), {loop.rows} rows; verdict {outcome}", as_json=as_json)
    if gate and not loop.accepted:
        raise typer.Exit(SAYS_NO)


def _record(loop: ClosedLoop, parts: list[str], rejected: int) -> dict[str, Any]:
    """Return what a look at the folder brought, as plain data."""
    found = loop.verdict
    return {
        "parts": parts,
        "rejected_rows": rejected,
        "rows": loop.rows,
        "outcome": None if found is None else str(found.outcome),
        "probability_below_limit": None if found is None else found.probability_below_limit,
    }
