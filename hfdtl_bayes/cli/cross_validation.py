"""`cross-validate`: how well transfer will do for a configuration the donors do not know."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfdtl_bayes.cli.options import (
    BLOCK_LENGTH,
    AsJson,
    BlockLength,
    PriorsFile,
    Seed,
    Store,
    block_length_of,
    features_with_priors,
    names_in,
)
from hfdtl_bayes.cli.output import check_file, say, show, table_text, write_table, writing
from hfdtl_bayes.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

TABLE = (".csv", ".parquet")
ROWS = "0,25,50,100,250,500"


def cross_validate(
    store: Store,
    donors: Annotated[str, typer.Option("--donors", help="config_ids of the donors, separated by commas; two at least.")],
    leave_out: Annotated[
        list[str] | None,
        typer.Option(
            "--leave-out",
            help="configuration [default], model, hardware, tp (all donors that share it) or workload (a regime neither donors nor "
            "calibration see). Several by commas, or given again.",
        ),
    ] = None,
    rows: Annotated[
        str, typer.Option("--rows", help="Calibration rows of a left-out configuration, separated by commas.")
    ] = ROWS,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many times calibration rows are drawn.")] = 1,
    single_rows: Annotated[
        bool, typer.Option("--single-rows", help="Draw single rows to calibrate on, in place of whole time blocks.")
    ] = False,
    held_out_fraction: Annotated[
        float, typer.Option("--held-out-fraction", help="Share of each regime's time blocks, its last, to judge by.")
    ] = 0.5,
    quantity: Annotated[str, typer.Option("--quantity", help="step_time, queue_delay or api_delay.")] = "step_time",
    features: Annotated[str, typer.Option("--features", help="Feature set.")] = "roofline",
    priors_file: PriorsFile = None,
    block_length: BlockLength = BLOCK_LENGTH,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Table to write, one line per fold, configuration, rows and seed (.csv, .parquet)."),
    ] = None,
    figure: Annotated[Path | None, typer.Option("--figure", help="Learning curve to draw (.svg, .png).")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Refit without each donor, predict it zero-shot and after some of its rows, and tell the expected transfer error."""
    from hfdtl_bayes.cli.traces import WatchedStore, write_rejected  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.transfer.cross_validation import CrossValidationSettings  # noqa: PLC0415
    from hfdtl_bayes.transfer.cross_validation import cross_validate as run  # noqa: PLC0415

    if out is not None:
        check_file(out, (priors_file,), TABLE)
    if figure is not None:
        check_file(figure, (priors_file, out), (".svg", ".png"))
    settings = CrossValidationSettings(
        rows=_row_counts(rows), seeds=seeds, unit="row" if single_rows else "block", held_out_fraction=held_out_fraction
    )
    priors, chosen = features_with_priors(features, quantity, priors_file)
    watched = WatchedStore(store)
    found = run(
        watched,
        names_in(donors),
        chosen,
        leave_out=[k for text in (leave_out or ["configuration"]) for k in names_in(text)],
        settings=settings,
        priors=priors,
        block_length=block_length_of(block_length),
        seed=seed,
    )
    for skipped in found.skipped:
        say(f"skipped: {skipped}")
    curve = found.learning_curve()
    rejected: dict[str, Any] = {}
    if out is not None:
        with writing(out):
            write_table(found.table, out)
            rejected = write_rejected(watched.tables, out)
    else:
        rejected = write_rejected(watched.tables, None)
    if figure is not None:
        _draw(curve, figure)
    result: dict[str, Any] = {
        "quantity": found.quantity,
        "features": found.features,
        "donors": found.donors,
        "leave_out": found.leave_out,
        "expected_error": curve.to_dict(orient="records"),
        "table": found.table.to_dict(orient="records"),
        "skipped": [asdict(s) for s in found.skipped],
        "folds": [asdict(f) for f in found.folds],
        "settings": asdict(settings),
        "out": out,
        "figure": figure,
        **rejected,
        "seed": seed,
    }
    written = "".join(f"\nwrote {p}" for p in (out, figure) if p is not None)
    show(result, f"{_text(found.table)}\n{found}{written}", as_json=as_json)


def _row_counts(text: str) -> tuple[int, ...]:
    names = names_in(text)
    if not names or not all(n.isdecimal() for n in names):
        raise InputError(f"--rows takes whole numbers from 0 separated by commas, as {ROWS}, found {text!r}")
    return tuple(int(n) for n in names)


def _draw(curve: pd.DataFrame, path: Path) -> None:
    from hfdtl_bayes.report import learning_curve_figure, save_figure  # noqa: PLC0415  (loaded on first use)

    with writing(path):
        save_figure(learning_curve_figure(curve), path)


def _text(table: pd.DataFrame) -> str:
    shown = table[["leave_out", "value", "config", "rows", "seed", "log_score_per_row"]].copy()
    for name in ("mape", "attainable_mape", "crps_relative", "coverage", "block_coverage"):
        shown[f"{name} %"] = 100 * table[name]
    return table_text(shown, "left out and predicted")
