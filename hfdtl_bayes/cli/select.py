"""`select`: which rows of a target's traces to calibrate on, for the traffic that will be predicted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfdtl_bayes.cli.options import BLOCK_LENGTH, AsJson, PosteriorFile, Seed, Store, block_length_of, names_in
from hfdtl_bayes.cli.output import TABLE_SUFFIXES, check_file, say, show, table_text, warn_unless_converged, writing
from hfdtl_bayes.errors import InputError, MissingInputError

if TYPE_CHECKING:
    import pandas as pd

    from hfdtl_bayes.cli.traces import WatchedStore
    from hfdtl_bayes.model import LatencyPosterior

# Repeated because importing them would load ArviZ for --help; a test keeps them equal.
DRAWS, MISFIT, ACQUISITION = 16, 0.02, "deployment"

_OUT_OF_REACH = 0.5
"""Share of the mix's variance out of the pool's reach, or left were all of the pool measured, from which this is said aloud."""


def select(
    posterior_file: PosteriorFile,
    store: Store,
    config: Annotated[str, typer.Option("--config", help="config_id of the target in the store.")],
    budget: Annotated[int | None, typer.Option("--budget", help="Most rows to choose.")] = None,
    budget_s: Annotated[float | None, typer.Option("--budget-seconds", help="Most seconds of GPU time they may take.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Table to write (CSV), for `calibrate --rows`.")] = Path("selection.csv"),
    acquisition: Annotated[
        str,
        typer.Option(
            "--acquisition",
            help="deployment (variance of the deployment mix removed), epig (information on steps of the mix), information (on the "
            "coefficients), variance, or a baseline: random, stratified, residual.",
        ),
    ] = ACQUISITION,
    deployment: Annotated[
        str | None,
        typer.Option(
            "--deployment",
            help="Traffic that will be predicted: a table of its steps (Parquet or CSV), or regimes of the store's traces separated by "
            "commas. By default the rows chosen from.",
        ),
    ] = None,
    regimes: Annotated[
        str | None, typer.Option("--regimes", help="Regimes to choose from, separated by commas; all by default.")
    ] = None,
    per_second: Annotated[bool, typer.Option("--per-second", help="Choose by gain per second of GPU time.")] = False,
    cost: Annotated[
        str | None, typer.Option("--cost", help="Column of the seconds that a row costs; its expected time by default.")
    ] = None,
    per_bin: Annotated[
        int, typer.Option("--per-bin", min=0, help="Rows wanted of each occupied bin of queue depth and KV usage.")
    ] = 0,
    misfit: Annotated[
        float,
        typer.Option(
            "--misfit",
            min=0.0,
            help="Relative sd of what the features get wrong, shared by steps of one size; 0 trusts them, and is faster.",
        ),
    ] = MISFIT,
    block_length: Annotated[
        str, typer.Option("--block-length", help="Steps that share one drift of the machine's speed.")
    ] = BLOCK_LENGTH,
    figure: Annotated[
        Path | None,
        typer.Option(
            "--figure", help="Map to write (SVG or PNG): where predictions are uncertain, and what was picked, step by step."
        ),
    ] = None,
    draws: Annotated[int, typer.Option("--draws", min=1, help="Draws of the scales that gains are averaged over.")] = DRAWS,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Choose the rows that tell most of the traffic to be predicted; no step time is read but by the residual rule."""
    from hfdtl_bayes.cli.traces import WatchedStore, write_rejected  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.design import SelectionSettings, select_rows  # noqa: PLC0415
    from hfdtl_bayes.model import LatencyPosterior  # noqa: PLC0415
    from hfdtl_bayes.transfer import read_trace, usable_rows  # noqa: PLC0415

    steps_per_block = block_length_of(block_length)
    if steps_per_block == "auto":
        raise InputError(
            "--block-length auto is found from step times, which choosing rows does not read; give a number of steps"
        )
    check_file(out, (posterior_file,), (".csv",))
    if figure is not None:
        check_file(figure, (posterior_file,), (".svg", ".png"))
    posterior = LatencyPosterior.load(posterior_file)
    warn_unless_converged(posterior.convergence())
    watched = WatchedStore(store)
    configuration = watched.configuration(config)
    every = usable_rows(read_trace(watched, config, posterior.feature_set.quantity).frame, configuration, posterior.feature_set)
    pool = _of_regimes(every, names_in(regimes), "--regimes") if regimes is not None else every
    mix = None if deployment is None else _deployment(deployment, every, posterior, watched, config)
    settings = SelectionSettings(draws=draws, per_bin=per_bin, misfit=misfit, block_length=steps_per_block)
    found = select_rows(
        posterior,
        pool,
        configuration,
        budget,
        acquisition=acquisition,
        deployment=mix,
        budget_s=budget_s,
        cost=cost,
        per_second=per_second,
        settings=settings,
        seed=seed,
    )
    with writing(out):
        found.write(out)
        rejected = write_rejected(watched.tables, out)
    if figure is not None:
        from hfdtl_bayes.report import save_figure, uncertainty_map  # noqa: PLC0415  (loaded on first use)

        with writing(figure):
            save_figure(uncertainty_map(posterior, found, pool, configuration, mix, settings=settings, seed=seed), figure)
    if found.unreachable > _OUT_OF_REACH:
        say(f"warning: {found.unreachable:.0%} of the deployment mix's variance is of what no row of the pool has anything of")
    left = (found.pool_sd / found.expected_sd[0]) ** 2
    # Of a calibrated target much may be known already, and little left to learn says nothing of the pool.
    if left > _OUT_OF_REACH and posterior.target != config:
        say(
            f"warning: were all {len(pool)} rows of the pool measured, {left:.0%} of the deployment mix's variance would be left (sd "
            f"{found.pool_sd:.1%}): this pool teaches little of that traffic, however its rows are chosen; measure traffic more like it"
        )
    table = found.to_frame()
    result: dict[str, Any] = {
        "out": out,
        **({} if figure is None else {"figure": figure}),
        "config_id": config,
        "acquisition": str(found.acquisition),
        "rows": len(found),
        "pool_rows": len(pool),
        "deployment_rows": len(pool if mix is None else mix),
        "unit": found.unit,
        "expected_mape_before": found.expected_mape[0],
        "expected_mape": found.expected_mape[-1],
        "pool_sd": found.pool_sd,
        "unreachable": found.unreachable,
        "cost_s": float(found.cost_s.sum()),
        **rejected,
        "seed": seed,
        "selection": table.to_dict(orient="records"),
    }
    show(result, f"{table_text(table, f'rows of {config}, gains in {found.unit}')}\n{found}\nwrote {out}", as_json=as_json)


def _of_regimes(frame: pd.DataFrame, names: list[str], option: str) -> pd.DataFrame:
    known = sorted(set(frame["regime"]))
    unknown = [n for n in names if n not in known]
    if unknown or not names:
        raise InputError(f"{option}: unknown regime(s) {', '.join(unknown) or '(none given)'}; the trace has {', '.join(known)}")
    return frame[frame["regime"].isin(names)]


def _deployment(text: str, every: pd.DataFrame, posterior: LatencyPosterior, watched: WatchedStore, config: str) -> pd.DataFrame:
    """Return the deployment mix: a table of steps, or rows of the trace by regime."""
    from hfdtl_bayes.traces import read_requests, read_steps  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.transfer import usable_rows  # noqa: PLC0415

    path, configuration = Path(text), watched.configuration(config)
    if path.suffix not in TABLE_SUFFIXES:
        return _of_regimes(every, names_in(text), "--deployment")
    if not path.exists():
        raise MissingInputError(f"--deployment {path} does not exist; give a table of steps, or names of regimes")
    read = read_steps if posterior.feature_set.quantity == "step_time" else read_requests
    table = read(path, configuration, observed=False)
    say(table.summary())
    return usable_rows(table.frame, configuration, posterior.feature_set)
