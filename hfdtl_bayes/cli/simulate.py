"""`simulate`: what a workload will see, with error bars, from an ensemble of posterior draws."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfdtl_bayes.cli.options import AsJson, PosteriorFile, Seed
from hfdtl_bayes.cli.output import (
    TABLE_SUFFIXES,
    check_file,
    say,
    show,
    table_text,
    warn_unless_converged,
    write_table,
    writing,
)
from hfdtl_bayes.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from hfdtl_bayes.cli.traces import WatchedStore
    from hfdtl_bayes.configuration import ServingConfiguration
    from hfdtl_bayes.model import LatencyPosterior
    from hfdtl_bayes.simulation import OverheadDraws, Simulation, SpeedDrift

# Defaults of EnsembleSettings, MetricSettings, ReplaySettings and BlisSettings, repeated because importing them would load NumPy for
# --help; a test keeps them equal.
MEMBERS, WORKLOADS, SPEEDS, PERCENTILES, BLOCK_TOKENS, TIMEOUT_S = 100, 2, 2, "50,90,99", 16, 600.0


class SimulationEngine(StrEnum):
    """What serves the workload."""

    BUILTIN = "builtin"
    BLIS = "blis"


def simulate(
    posterior_file: PosteriorFile,
    workload: Annotated[
        Path,
        typer.Argument(
            help="YAML list of traffic (requests per second or in flight, prompt and output lengths); a table of requests (Parquet or "
            "CSV, as in a trace store); or the CSV of a TraceV2, its header beside it."
        ),
    ],
    config: Annotated[
        str | None, typer.Option("--config", help="config_id that was fitted; by default the calibrated target.")
    ] = None,
    configuration: Annotated[Path | None, typer.Option("--configuration", help="YAML of a configuration never seen.")] = None,
    engine: Annotated[
        SimulationEngine, typer.Option("--engine", help="builtin (this package's replay of vLLM's batching) or blis.")
    ] = SimulationEngine.BUILTIN,
    blis: Annotated[Path | None, typer.Option("--blis", help="With --engine blis: the binary.")] = None,
    workload_spec: Annotated[
        bool, typer.Option("--workload-spec", help="With --engine blis: the workload is a file for `blis run --workload-spec`.")
    ] = False,
    store: Annotated[
        Path | None,
        typer.Option(
            "--store",
            help="Trace store of the fitted configurations: their steps show how long the machine's speed drifts, their requests what "
            "a request costs outside its steps. Without it, drift is in independent blocks and overheads are zero.",
        ),
    ] = None,
    client_side: Annotated[
        bool, typer.Option("--client-side", help="Latencies as the client sees them: with the delays behind the engine.")
    ] = False,
    draws: Annotated[int, typer.Option("--draws", min=2, help="Posterior draws.")] = MEMBERS,
    workloads: Annotated[int, typer.Option("--workloads", min=1, help="Drawings of the traffic per posterior draw.")] = WORKLOADS,
    speeds: Annotated[int, typer.Option("--speeds", min=1, help="Courses of the machine's speed per posterior draw.")] = SPEEDS,
    percentiles: Annotated[str, typer.Option("--percentiles", help="Of the latencies, separated by commas.")] = PERCENTILES,
    slo_ttft_s: Annotated[float | None, typer.Option("--slo-ttft-s", help="Objective: time to first token, seconds.")] = None,
    slo_itl_s: Annotated[float | None, typer.Option("--slo-itl-s", help="Objective: mean time between tokens, seconds.")] = None,
    slo_e2e_s: Annotated[float | None, typer.Option("--slo-e2e-s", help="Objective: time to last token, seconds.")] = None,
    block_tokens: Annotated[
        int, typer.Option("--block-tokens", min=1, help="Tokens per block of the KV cache (vLLM's block_size).")
    ] = BLOCK_TOKENS,
    jobs: Annotated[int, typer.Option("--jobs", min=0, help="With --engine blis: processes at a time; 0 for one per core.")] = 0,
    timeout: Annotated[float, typer.Option("--timeout", help="With --engine blis: seconds that one run may take.")] = TIMEOUT_S,
    out: Annotated[Path | None, typer.Option("--out", help="Table of metrics to write (Parquet or CSV).")] = None,
    steps_out: Annotated[
        Path | None,
        typer.Option("--steps-out", help="Steps of the run at the posterior mean to write: --deployment of select and plan."),
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Simulate a workload: latencies, throughput and objectives attained, with intervals, and what would narrow them."""
    from hfdtl_bayes.cli.traces import WatchedStore, configuration_of, write_rejected  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.model import LatencyPosterior  # noqa: PLC0415
    from hfdtl_bayes.model.progress import progress  # noqa: PLC0415
    from hfdtl_bayes.replay import ReplaySettings  # noqa: PLC0415
    from hfdtl_bayes.simulation import EnsembleSettings, MetricSettings, Objectives, read_workload  # noqa: PLC0415
    from hfdtl_bayes.simulation import simulate as simulate_builtin  # noqa: PLC0415

    if (engine is SimulationEngine.BLIS) != (blis is not None):
        raise InputError("--engine blis needs --blis PATH, the binary; with --engine builtin there is none. Give both or neither")
    if workload_spec and engine is not SimulationEngine.BLIS:
        raise InputError(
            "--workload-spec is a file of BLIS; give --engine blis --blis PATH, or the workload as a YAML list of traffic"
        )
    for path in (out, steps_out):
        if path is not None:
            check_file(path, (posterior_file, workload), TABLE_SUFFIXES)
    if steps_out is not None and workload_spec:
        raise InputError(
            "--steps-out: of a workload file of BLIS no steps are known here; give the workload as traffic or requests"
        )
    settings = EnsembleSettings(draws, workloads, speeds)
    metrics = MetricSettings(_percentiles(percentiles), Objectives(slo_ttft_s, slo_itl_s, slo_e2e_s))
    posterior = LatencyPosterior.load(posterior_file)
    warn_unless_converged(posterior.convergence())
    chosen = configuration_of(posterior, config, configuration)
    watched = WatchedStore(store) if store is not None else None
    drift, overheads = _seen_in(watched, posterior, chosen, client_side, seed)
    say(str(drift))
    with progress("simulating", draws) as advance:
        if engine is SimulationEngine.BLIS:
            from hfdtl_bayes.simulation.blis_engine import BlisSettings, simulate_with_blis  # noqa: PLC0415

            assert blis is not None
            found = simulate_with_blis(
                posterior, chosen, workload if workload_spec else read_workload(workload, chosen)[0], blis, drift=drift,
                overheads=overheads, settings=settings, metrics=metrics, blis=BlisSettings(jobs, timeout, block_tokens), seed=seed,
                on_member=advance,
            )  # fmt: skip
        else:
            served, table = read_workload(workload, chosen)
            if table is not None:
                say(table.summary())
            found = simulate_builtin(
                posterior, chosen, served, drift=drift, overheads=overheads, settings=settings, metrics=metrics,
                replay_settings=ReplaySettings(block_tokens=block_tokens), seed=seed, on_member=advance,
            )  # fmt: skip
    found = found.named(posterior_file=str(posterior_file), steps_file=str(steps_out or "STEPS.parquet"))
    for failure in found.failed[:3]:
        say(f"a run failed: {failure}")
    written = []
    for path, frame in ((out, found.table), (steps_out, found.steps)):
        if path is not None:
            with writing(path):
                written.append(write_table(frame, path))
    tables = watched.tables if watched is not None else []
    result: dict[str, Any] = {**found.as_dict(), "written": [str(p) for p in written], **write_rejected(tables, out)}
    show(result, _words(found), as_json=as_json)


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(p) for p in text.split(",") if p.strip())
    except ValueError:
        raise InputError(f"--percentiles takes numbers from 0 to 100 separated by commas, found {text!r}") from None


def _seen_in(
    watched: WatchedStore | None, posterior: LatencyPosterior, configuration: ServingConfiguration, client_side: bool, seed: int
) -> tuple[SpeedDrift, OverheadDraws]:
    """Return drift and overheads as far as a trace store shows them."""
    from hfdtl_bayes.replay import RequestOverheads  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.simulation import OverheadDraws, SpeedDrift, overhead_draws, speed_drift  # noqa: PLC0415
    from hfdtl_bayes.transfer import calibration_rows_of, usable_rows  # noqa: PLC0415
    from hfdtl_bayes.transfer.evaluation import fitted_block_length  # noqa: PLC0415

    length = fitted_block_length(posterior, configuration.config_id)
    if watched is None:
        return SpeedDrift.blocks_only(length), OverheadDraws.fixed(RequestOverheads())
    fitted = [c for c in posterior.config_ids if c in watched.config_ids]
    if not fitted:
        raise InputError(
            f"{watched.path} holds none of the fitted configurations {', '.join(posterior.config_ids)}; give the store they were fitted "
            "from, or none"
        )
    recorded: list[tuple[ServingConfiguration, pd.DataFrame]] = []
    calibrated_on = None
    for name in fitted:
        steps = usable_rows(watched.steps(name).frame, posterior.configuration(name), posterior.feature_set)
        if name == posterior.target:
            steps = calibration_rows_of(posterior, steps)
            calibrated_on = steps if name == configuration.config_id else None
        recorded.append((posterior.configuration(name), steps))
    journeys = {name: watched.requests(name).frame for name in fitted if watched.has_table(name, "api_delay")}
    drift = speed_drift(posterior, recorded, calibrated_on=calibrated_on, block_length=length)
    return drift, overhead_draws(journeys, configuration.config_id, client_side=client_side, seed=seed)


def _words(found: Simulation) -> str:
    """Return the result for a person: latencies in milliseconds, each with where its spread comes from, and what to do."""
    import pandas as pd  # noqa: PLC0415  (loaded on first use)

    rows = []
    for row in found.table.to_dict(orient="records"):
        name = str(row["metric"])
        seconds = name.endswith("_s") and not name.endswith("per_s")
        unit = 1e3 if seconds else 1.0
        total = row["sd"] ** 2
        shares = {k: row[f"sd_{k}"] ** 2 / total if total > 0 else 0.0 for k in ("coefficients", "speed", "workload")}
        rows.append(
            {
                "phase": row["phase"],
                "metric": name.removesuffix("_s") + " (ms)" if seconds else name,
                "mean": row["mean"] * unit,
                "2.5 %": row["q2.5"] * unit,
                "97.5 %": row["q97.5"] * unit,
                "mean known to": f"{row['q2.5_mean'] * unit:.4g} .. {row['q97.5_mean'] * unit:.4g}",
                **{k: f"{v:.0%}" for k, v in shares.items()},
            }
        )
    title = (
        f"{found.config_id} on {found.engine}: {found.workload}; {len(found.runs)} runs of {found.settings.members} draws. 95 % of runs; "
        "share of their variance by source"
    )
    lines = [table_text(pd.DataFrame(rows), title)]
    if found.failed:
        lines.append(f"{len(found.failed)} run(s) failed and are left out")
    lines += [f"{p}/{m}: {found.next_measurement(p, m)}" for p, m in found.headline()]
    return "\n".join(lines)
