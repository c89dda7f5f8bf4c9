"""`statistics` and `merge`: traces in, statistics files out, so that machines that hold traces send kilobytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfdtl_bayes.cli.options import BLOCK_LENGTH, AsJson, BlockLength, EngineData, Scheduler, Store, block_length_of
from hfdtl_bayes.cli.output import check_file, show, writing
from hfdtl_bayes.errors import InputError

if TYPE_CHECKING:
    from hfdtl_bayes.statistics import ConfigStatistics


def statistics(
    store: Store,
    config: Annotated[str, typer.Option("--config", help="config_id in the store.")],
    out: Annotated[Path, typer.Option("--out", help="Statistics file to write (netCDF).")],
    features: Annotated[str, typer.Option("--features", help="Feature set, for step_time.")] = "roofline",
    pilot_from: Annotated[
        Path | None,
        typer.Option(
            "--pilot-from", help="Statistics file whose row scale and block length to use, so that the two can be merged."
        ),
    ] = None,
    block_length: BlockLength = BLOCK_LENGTH,
    outlier_cutoff: Annotated[
        float | None,
        typer.Option("--outlier-cutoff", help="Robust sds beyond which a row counts for less; inf: every row in full."),
    ] = None,
    engine_data: EngineData = "arrow",
    scheduler: Scheduler = None,
    as_json: AsJson = False,
) -> None:
    """Reduce the steps of one configuration to a statistics file, which `merge` adds up and `fit` takes for traces.

    `fit` takes it from STORE/<config_id>/statistics.nc where the store holds no traces of that configuration.
    """
    from hfdtl_bayes.cli.traces import WatchedStore, write_rejected  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.features import feature_set  # noqa: PLC0415
    from hfdtl_bayes.statistics import read_statistics, statistics_from_rows, write_statistics  # noqa: PLC0415
    from hfdtl_bayes.transfer import read_trace, usable_rows  # noqa: PLC0415
    from hfdtl_bayes.transfer.sources import check_data_engine, streamed_statistics  # noqa: PLC0415

    check_file(out, (pilot_from,))
    check_data_engine(engine_data, scheduler, "exact")
    chosen = feature_set(features)
    watched = WatchedStore(store)
    options: dict[str, Any] = {"block_length": block_length_of(block_length), "outlier_cutoff": outlier_cutoff}
    if pilot_from is not None:
        earlier = read_statistics(pilot_from).statistics
        if (earlier.config_id, earlier.feature_set, earlier.quantity) != (config, chosen.name, chosen.quantity):
            raise InputError(
                f"--pilot-from {pilot_from} is of {earlier.config_id!r}, features {earlier.feature_set} for {earlier.quantity}; a row "
                f"scale is of use for the same configuration and features only, here {config!r} and {chosen.name}"
            )
        options = {"block_length": earlier.block_length, "scaling": earlier.scaling}
    if engine_data == "memory":
        configuration = watched.configuration(config)
        frame = usable_rows(read_trace(watched, config, chosen.quantity).frame, configuration, chosen)
        own = statistics_from_rows(frame, configuration, chosen, **options)
    else:
        own = streamed_statistics(watched, config, chosen, engine_data=engine_data, scheduler=scheduler, **options)
    with writing(out):
        write_statistics(out, own, chosen)
        rejected = write_rejected(watched.tables, out)
    _show(own, out, rejected, as_json=as_json)


def merge(
    files: Annotated[list[Path], typer.Argument(help="Statistics files of one configuration, of different rows.")],
    out: Annotated[Path, typer.Option("--out", help="Statistics file to write (netCDF).")],
    as_json: AsJson = False,
) -> None:
    """Add up statistics files of one configuration; time blocks must not be cut between them."""
    from hfdtl_bayes.features import feature_set  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.statistics import merge_statistics, read_statistics, write_statistics  # noqa: PLC0415

    check_file(out, files)
    merged = merge_statistics([read_statistics(f) for f in files])
    with writing(out):
        write_statistics(out, merged, feature_set(merged.feature_set, merged.quantity))
    _show(merged, out, {"files": [str(f) for f in files]}, as_json=as_json)


def _show(own: ConfigStatistics, out: Path, more: dict[str, Any], *, as_json: bool) -> None:
    result = {
        "out": out,
        "config": own.config_id,
        "features": own.feature_set,
        "quantity": own.quantity,
        "rows": own.rows,
        "blocks": own.blocks,
        "block_length": own.block_length,
        "downweighted_rows": own.downweighted.rows,
        **more,
    }
    text = (
        f"{own.config_id}: {own.rows} rows in {own.blocks} time blocks of up to {own.block_length} steps, {own.downweighted.rows} "
        f"down-weighted; features {own.feature_set} for {own.quantity}\nwrote {out}"
    )
    show(result, text, as_json=as_json)
