"""`compare`: coefficient sets against each other on the same traces."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfdtl_bayes.cli.options import AsJson, Seed, names_in
from hfdtl_bayes.cli.output import TABLE_SUFFIXES, check_file, say, show, table_text, warn_unless_converged, write_table, writing
from hfdtl_bayes.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from hfdtl_bayes.export.comparison import CoefficientSet


def compare(
    sets: Annotated[
        list[str],
        typer.Argument(
            help="Two or more: posteriors (.nc), coefficient cards (.json), BLIS files (.yaml), ensembles (folders), and shipped for the "
            "vectors in BLIS's defaults."
        ),
    ],
    store: Annotated[Path, typer.Option("--store", help="Trace store with steps of the configuration.")],
    config: Annotated[
        str | None, typer.Option("--config", help="config_id of the store; by default the target of the first posterior.")
    ] = None,
    regimes: Annotated[str | None, typer.Option("--regimes", help="Compare on these regimes only, comma-separated.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Table of what moved: .csv or .parquet.")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Show the errors of each set by regime, and which coefficient moved by how many posterior sds."""
    from hfdtl_bayes.cli.traces import WatchedStore, write_rejected  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.export.comparison import compare_coefficients, read_coefficients  # noqa: PLC0415
    from hfdtl_bayes.features import feature_set  # noqa: PLC0415
    from hfdtl_bayes.traces import split_by_regime  # noqa: PLC0415
    from hfdtl_bayes.transfer import usable_rows  # noqa: PLC0415

    if out is not None:
        check_file(out, tuple(Path(s) for s in sets), TABLE_SUFFIXES)
    found = [s for source in sets for s in read_coefficients(source, seed)]
    for s in found:
        if s.posterior is not None:
            warn_unless_converged(s.posterior.convergence())
    chosen = config or next((s.posterior.target for s in found if s.posterior is not None and s.posterior.target), None)
    if chosen is None:
        raise InputError("no posterior with a calibrated target among the sets; give --config, a configuration of the store")
    watched = WatchedStore(store)
    configuration = watched.configuration(chosen)
    # Rows every set can predict: the features of all kinds support every step.
    frame = usable_rows(watched.steps(chosen).frame, configuration, feature_set("roofline"))
    frame, seen = _unseen(frame, found, chosen)
    if regimes:
        frame, _ = split_by_regime(frame, names_in(regimes))
    compared = compare_coefficients(found, frame, configuration)
    result: dict[str, Any] = {
        "config_id": chosen,
        "reference": compared.reference,
        "sets": [{"name": s.name, "kind": s.kind} for s in found],
        "errors": compared.errors.to_dict(orient="records"),
        "moves": compared.moves.to_dict(orient="records"),
        "sentence": compared.sentence(),
        "calibrated_on_these_rows": seen,
        "out": out,
        "seed": seed,
    }
    if out is not None:
        with writing(out):
            write_table(compared.moves, out)
    result |= write_rejected(watched.tables, out)
    text = [
        compared.sentence(),
        table_text(compared.errors, "errors"),
        table_text(compared.moves, f"moved from {compared.reference}"),
    ]
    show(result, "\n\n".join(text), as_json=as_json)


def _unseen(frame: pd.DataFrame, sets: list[CoefficientSet], config_id: str) -> tuple[pd.DataFrame, list[str]]:
    """Return rows that no posterior was calibrated on, and which sets have been fitted to these rows nonetheless."""
    from hfdtl_bayes.transfer import held_out_rows  # noqa: PLC0415  (loaded on first use)

    seen = []
    unseen = frame
    for s in sets:
        if s.posterior is None or config_id not in s.posterior.config_ids:
            continue
        try:
            if s.posterior.target != config_id:
                raise InputError("a donor is fitted to all of its rows")
            _, rows = held_out_rows(s.posterior, frame)
            unseen = unseen[unseen.index.isin(rows.index)]
        except InputError as error:
            seen.append(s.name)
            say(f"{s.name} is judged on rows it was fitted to: {error}")
    return unseen, seen
