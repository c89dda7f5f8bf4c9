"""`ingest`: files that BLIS or a traced vLLM wrote, turned into a trace store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hfdtl_bayes.cli.options import AsJson
from hfdtl_bayes.cli.output import check_folder, say, show, writing
from hfdtl_bayes.errors import InputError

if TYPE_CHECKING:
    from hfdtl_bayes.configuration import ServingConfiguration


def ingest(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Files of one run: OTLP JSON lines, TraceV2 CSV (its YAML beside it), ITL, tables of BATCH_SUMMARY, metrics of blis run, "
            "results of blis replay, reports of blis calibrate. Several of a format are parts of one recording."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Trace store to write into: a folder.")],
    configuration: Annotated[
        Path | None, typer.Option("--configuration", help="YAML of the configuration that was recorded.")
    ] = None,
    config_id: Annotated[
        str | None,
        typer.Option(
            "--config-id",
            help="Name of the configuration in the store; without --configuration its YAML is STORE/<config_id>/configuration.yaml.",
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            help="auto judges each file by its content; or otlp, batch-summary, trace-v2, itl, blis-metrics, blis-results, blis-calibrate.",
        ),
    ] = "auto",
    before_queue_us: Annotated[
        float | None,
        typer.Option(
            "--before-queue-us",
            help="For files with a client's clocks: microseconds from arrival to queue, BLIS's alpha0; without it the queue is not known.",
        ),
    ] = None,
    after_last_us: Annotated[
        float, typer.Option("--after-last-us", help="The same: microseconds after the last token, BLIS's alpha1.")
    ] = 0.0,
    per_token_us: Annotated[
        float, typer.Option("--per-token-us", help="The same: microseconds per output token, BLIS's alpha2.")
    ] = 0.0,
    served_model_name: Annotated[
        str | None, typer.Option("--served-model-name", help="Name the server gave the LLM, if not the configuration's.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the store holds of this configuration.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn traces of BLIS or vLLM into a trace store; what cannot be used is counted, named and kept aside."""
    from hfdtl_bayes.traces.readers import Overheads  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.traces.readers import ingest as ingest_files  # noqa: PLC0415

    check_folder(out)
    chosen = _configuration(configuration, config_id, out)
    overheads = Overheads(before_queue_us, after_last_us, per_token_us)
    with writing(out):
        found = ingest_files(
            files,
            chosen,
            out,
            format=format,
            overheads=overheads,
            served_model_name=served_model_name,
            overwrite=overwrite,
        )
        say(found.summary())
        rejected_files = found.write_rejected(out)
    if found.rejected:
        say(f"{found.rejected} record(s) set aside, written to {', '.join(map(str, rejected_files))}")
    result = {
        "out": found.folder,
        "config": chosen.config_id,
        "formats": {str(f): r.format for r in found.recordings for f in r.files},
        "rows": found.rows,
        "notes": [*(n for r in found.recordings for n in r.notes), *found.assembled.notes],
        "reports": {name: report for r in found.recordings for name, report in r.reports.items()},
        "rejected_rows": found.rejected,
        "rejected_files": [str(f) for f in rejected_files],
    }
    rows = ", ".join(f"{count} {name}" for name, count in found.rows.items())
    show(result, f"{chosen.config_id}: {rows}; {found.rejected} set aside\nwrote {found.folder}", as_json=as_json)


def _configuration(file: Path | None, config_id: str | None, store: Path) -> ServingConfiguration:
    from hfdtl_bayes.configuration import configuration_from_mapping, read_configuration  # noqa: PLC0415  (loaded on first use)

    if file is None and config_id is None:
        raise InputError("give --configuration FILE.yaml, or --config-id of a configuration that the store holds")
    if file is None:
        return read_configuration(store / str(config_id) / "configuration.yaml")
    found = read_configuration(file)
    return found if config_id is None else configuration_from_mapping({**found.dump(), "config_id": config_id}, str(file))
