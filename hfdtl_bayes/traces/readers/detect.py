"""Which format a file is in, from its first bytes; a name alone says little, as everything here ends in .json or .csv."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hfdtl_bayes.errors import InputError, UnknownNameError
from hfdtl_bayes.traces.readers.batch_summary import looks_like_steps, read_batch_summary
from hfdtl_bayes.traces.readers.blis_json import CALIBRATED, read_calibrate, read_metrics, read_results
from hfdtl_bayes.traces.readers.itl import COLUMNS as ITL_COLUMNS
from hfdtl_bayes.traces.readers.itl import read_itl
from hfdtl_bayes.traces.readers.lines import first_bytes
from hfdtl_bayes.traces.readers.otlp import read_otlp
from hfdtl_bayes.traces.readers.recording import Recording
from hfdtl_bayes.traces.readers.trace_v2 import read_trace_v2

HEADER = "trace-v2-header"
"""The YAML of a TraceV2: read with the CSV beside it, not by itself."""


@dataclass(frozen=True)
class Format:
    """A format that can be read."""

    name: str
    meaning: str
    read: Callable[[Sequence[Path]], Recording]


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("otlp", "OTLP JSON lines, plain or gzip: journey, api and step events, or stock vLLM request spans", read_otlp),
        Format("batch-summary", "table of BATCH_SUMMARY events, CSV or Parquet", read_batch_summary),
        Format("trace-v2", "TraceV2 of blis observe or run: CSV with its YAML header beside it", read_trace_v2),
        Format("itl", "ITL file of blis observe: request_id, chunk_index, timestamp_us", read_itl),
        Format("blis-metrics", "JSON of blis run --metrics-path", read_metrics),
        Format("blis-results", "JSON of blis replay --results-path, with the TraceV2 that was replayed", read_results),
        Format("blis-calibrate", "JSON of blis calibrate --report: aggregates, no rows", read_calibrate),
    )
}


def _listing() -> str:
    return "; ".join(f"{f.name} ({f.meaning})" for f in FORMATS.values())


def format_named(name: str) -> Format:
    """Return a format by its name.

    Raises
    ------
    UnknownNameError
        If there is none of that name.
    """
    if name not in FORMATS:
        raise UnknownNameError(f"format {name!r} is not known; known are auto and {', '.join(FORMATS)}")
    return FORMATS[name]


def detect(path: Path) -> str:
    """Return the name of the format of a file, or `HEADER`.

    Raises
    ------
    InputError
        If it is in none of the formats.
    MissingInputError
        If there is no file.
    """
    head = first_bytes(path)
    found: str | None
    if head.startswith(b"PAR1"):
        found = _parquet(path)
    else:
        text = head.decode("utf-8-sig", "replace")
        begun = text.lstrip()
        found = _json(begun) if begun[:1] in ("{", "[") else _lines(text.splitlines())
    if found is None:
        raise InputError(
            f"{path}: not in a format this package reads; it begins with {head[:60]!r}. Accepted are {_listing()}. "
            "Name it with --format to see what is wrong with it"
        )
    return found


def _parquet(path: Path) -> str | None:
    try:
        names = pq.read_schema(path).names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}; was it cut short?") from None
    return "batch-summary" if looks_like_steps(names) else None


def _json(text: str) -> str | None:
    """Judge by the keys that come first; the beginning of a long file is no whole JSON."""
    if '"resourceSpans"' in text:
        return "otlp"
    if text.startswith("["):
        return "blis-results" if '"ttft_us"' in text or '"e2e_us"' in text else None
    if '"completed_requests"' in text or '"requestID"' in text or '"instance_id"' in text:
        return "blis-metrics"
    try:
        keys = list(json.loads(text))
    except ValueError:
        keys = []
    if '"request_level"' in text or '"workload_level"' in text or (keys and {"metrics", *CALIBRATED} & set(keys)):
        return "blis-calibrate"
    return None


def _lines(lines: Sequence[str]) -> str | None:
    if not lines:
        return None
    columns = [c.strip() for c in next(csv.reader([lines[0]]), [])]
    if tuple(columns) == ITL_COLUMNS:
        return "itl"
    if {"arrival_time_us", "send_time_us"} & set(columns):
        return "trace-v2"
    if len(columns) > 1 and looks_like_steps(columns):
        return "batch-summary"
    return HEADER if any(line.startswith("trace_version:") for line in lines) else None


def read_files(paths: Sequence[Path], format: str = "auto") -> list[Recording]:
    """Read files; those of one format are parts of one recording.

    Parameters
    ----------
    paths : sequence of Path
    format : str
        Of all files, or "auto" to judge each by its content.

    Returns
    -------
    list of Recording
        One per format, in the order of the files.

    Raises
    ------
    InputError
        If a file is given twice, or is not in the format.
    UnknownNameError
    MissingInputError
    """
    if not paths:
        raise InputError("no files to read; name at least one")
    resolved = [p.resolve() for p in paths]
    twice = [p for i, p in enumerate(paths) if resolved[i] in resolved[:i]]
    if twice:
        raise InputError(f"{twice[0]} is given twice; name each part once")
    groups: dict[str, list[Path]] = {}
    headers = []
    for path in paths:
        found = format_named(format).name if format != "auto" else detect(path)
        if found == HEADER or (found == "trace-v2" and path.suffix in (".yaml", ".yml")):
            headers.append(path)
        else:
            groups.setdefault(found, []).append(path)
    beside = {p.resolve().with_suffix("") for p in groups.get("trace-v2", [])}
    lonely = [h for h in headers if h.resolve().with_suffix("") not in beside]
    if lonely:
        raise InputError(f"{lonely[0]} is the header of a TraceV2; name its CSV too, {lonely[0].with_suffix('.csv')}")
    return [FORMATS[name].read(files) for name, files in groups.items()]
