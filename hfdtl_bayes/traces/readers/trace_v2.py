"""TraceV2 of `blis observe` and `blis run`: a YAML header and a CSV that BLIS reads by position; whole microseconds.

BLIS does not read the names in the first line of the CSV, only the order of the columns. So a first line whose names are in another
order, or unknown, describes a file that BLIS would misread: it is refused.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hfdtl_bayes.errors import InputError, MissingInputError
from hfdtl_bayes.traces.readers.lines import CutShortError, text_lines
from hfdtl_bayes.traces.readers.recording import Claims, Recording, Rejections, requests_frame
from hfdtl_bayes.traces.readers.whole_numbers import request_name, whole

VERSIONS = (2, 3)
COLUMNS = (
    "request_id", "client_id", "tenant_id", "slo_class", "vllm_priority", "session_id", "round_index", "prefix_group", "prefix_length",
    "streaming", "input_tokens", "output_tokens", "text_tokens", "image_tokens", "audio_tokens", "video_tokens", "reason_ratio", "model",
    "deadline_us", "slo_target_us", "server_input_tokens", "arrival_time_us", "send_time_us", "first_chunk_time_us",
    "last_chunk_time_us", "num_chunks", "status", "error_message", "finish_reason", "x_request_id", "adapter", "think_time_us",
)  # fmt: skip
OPTIONAL = frozenset({"vllm_priority", "slo_target_us", "x_request_id", "adapter", "think_time_us"})
_READ = ("request_id", "prefix_length", "input_tokens", "output_tokens", "server_input_tokens", "arrival_time_us", "send_time_us",
         "first_chunk_time_us", "last_chunk_time_us", "num_chunks")  # fmt: skip
_MODES = ("real", "generated", "replayed")
_SERVER = {"tensor_parallel": "tensor_parallel", "max_num_seqs": "max_num_seqs"}
_HEADER_KEYS = frozenset({
    "trace_version", "time_unit", "created_at", "mode", "warm_up_requests", "workload_seed", "workload_spec", "server", "network",
    "session_context_growth",
})  # fmt: skip


@dataclass(frozen=True)
class TraceHeader:
    """What the YAML beside a TraceV2 says.

    Attributes
    ----------
    version : int
    mode : str
        "real", "generated" by BLIS, or "replayed".
    warm_up_requests : int
        Requests at the beginning that are not to be judged.
    server : dict
        Settings of the server, as far as they are given.
    source : Path
    """

    version: int
    mode: str
    warm_up_requests: int
    server: Mapping[str, Any]
    source: Path


def header_path(csv_path: Path) -> Path:
    """Return where the header of a CSV lies: beside it, with the suffix .yaml or .yml.

    Raises
    ------
    MissingInputError
        If there is none.
    """
    stem = csv_path.with_suffix("") if csv_path.suffix == ".gz" else csv_path
    for suffix in (".yaml", ".yml"):
        if (found := stem.with_suffix(suffix)).is_file():
            return found
    raise MissingInputError(
        f"{csv_path}: no header beside it, {stem.with_suffix('.yaml')}; a TraceV2 is the pair of both: copy it there"
    )


def read_header(path: Path) -> TraceHeader:
    """Read the YAML header.

    Raises
    ------
    InputError
        If it is not one, of a version this package does not know, or not in microseconds.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (
        OSError,
        ValueError,
        yaml.YAMLError,
        LookupError,
        AttributeError,
        TypeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise InputError(f"{path} cannot be read as the header of a TraceV2: {error}") from None
    if not isinstance(data, Mapping) or "trace_version" not in data:
        raise InputError(f"{path} is not the header of a TraceV2: no trace_version")
    unknown = sorted(str(k) for k in data if k not in _HEADER_KEYS)
    if unknown:
        raise InputError(
            f"{path}: unknown key(s) {', '.join(unknown)}; BLIS refuses them too. Known are {', '.join(sorted(_HEADER_KEYS))}"
        )
    version, unit, mode = data["trace_version"], data.get("time_unit", "microseconds"), data.get("mode", "real")
    if version not in VERSIONS:
        raise InputError(f"{path}: trace_version is {version!r}; accepted are {' and '.join(map(str, VERSIONS))}")
    if unit not in ("microseconds", "us"):
        raise InputError(f"{path}: time_unit is {unit!r}; accepted is microseconds")
    if mode not in _MODES:
        raise InputError(f"{path}: mode is {mode!r}; accepted are {', '.join(_MODES)}")
    server = data.get("server") or {}
    if not isinstance(server, Mapping):
        raise InputError(f"{path}: server is {server!r}; accepted is a mapping of the server's settings")
    try:
        warm_up = whole(data.get("warm_up_requests", 0), "warm_up_requests")
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    return TraceHeader(int(version), str(mode), warm_up, dict(server), path)


def _columns(path: Path, head: str) -> tuple[str, ...]:
    found = tuple(name.strip() for name in next(csv.reader([head]), []))
    unknown = [name for name in found if name not in COLUMNS]
    missing = [name for name in COLUMNS if name not in found and name not in OPTIONAL]
    if unknown or missing:
        parts = [f"unknown column(s) {', '.join(unknown)}"] if unknown else []
        parts += [f"missing column(s) {', '.join(missing)}"] if missing else []
        raise InputError(
            f"{path}: line 1: {'; '.join(parts)}. Accepted are {', '.join(COLUMNS)}; optional {', '.join(sorted(OPTIONAL))}"
        )
    if list(found) != [name for name in COLUMNS if name in found]:
        raise InputError(
            f"{path}: line 1: the columns are in another order than {', '.join(n for n in COLUMNS if n in found)}. BLIS reads them by "
            "position, so it would misread this file; write them in this order"
        )
    return found


def _records(path: Path, rejections: Rejections) -> tuple[list[tuple[int, dict[str, str]]], int]:
    """Return the fields of each line by column, with its number, and how many lines had another number of fields."""
    stream = text_lines(path)
    _, head = next(stream)  # a file that is cut short before its first end of a line says so by itself
    columns = _columns(path, head.decode("utf-8-sig", "replace"))
    records, wrong = [], 0
    pending, begun = "", 0
    try:
        for line, raw in stream:
            text = raw.decode("utf-8", "replace")
            # A quoted error message may hold line breaks.
            joined = f"{pending}\n{text}" if pending else text
            if joined.count('"') % 2 and len(joined) < csv.field_size_limit():
                pending, begun = joined, begun or line
                continue
            number, pending, begun = begun or line, "", 0
            if not joined.strip():
                continue
            fields = next(csv.reader(io.StringIO(joined, newline="")), [])
            if len(fields) != len(columns):
                wrong += 1
                rejections.add(
                    path, number, f"another number of fields than the {len(columns)} columns of line 1", content=joined
                )
                continue
            records.append((number, dict(zip(columns, fields, strict=True))))
    except CutShortError as error:
        rejections.add(path, 0, str(error))
    if pending:
        wrong += 1
        rejections.add(path, begun, "a quotation mark that is not closed: the file was cut short", content=pending)
    return records, wrong


def _request(record: Mapping[str, str], header: TraceHeader) -> dict[str, Any]:
    """Turn a line into a request, in nanoseconds.

    Raises
    ------
    ValueError
        Saying what is wrong with it.
    """
    values = {name: whole(record[name], name) for name in _READ}
    status = record["status"].strip()
    if status not in ("", "ok"):
        raise ValueError(f"status {status}")
    arrival, send = values["arrival_time_us"], values["send_time_us"]
    first, last = values["first_chunk_time_us"], values["last_chunk_time_us"]
    # What the server counted holds what a template added; BLIS counts the shared prefix apart.
    prompt = values["server_input_tokens"] or values["prefix_length"] + values["input_tokens"]
    if prompt < 1:
        raise ValueError("input_tokens is 0")
    sent = send or arrival
    found: dict[str, Any] = {
        "request_id": request_name(values["request_id"]),
        "arrival_ns": sent * 1000,
        "prompt_tokens": prompt,
        "output_tokens": values["output_tokens"],
    }
    streamed = record["streaming"].strip().lower() not in ("false", "0", "f") or header.mode != "real"
    if first and first < sent:
        raise ValueError("first_chunk_time_us is before send_time_us")
    if last and last < max(first, sent):
        raise ValueError("last_chunk_time_us is before first_chunk_time_us or send_time_us")
    if first and streamed:
        found["first_token_ns"] = first * 1000
    if last:
        found["finished_ns"] = last * 1000
    return found


def read_trace_v2(paths: Sequence[Path]) -> Recording:
    """Read the CSV files of TraceV2, each with its YAML header beside it; several are parts of one recording.

    Set aside are lines with another number of fields, values that are no whole numbers from 0, clocks in the wrong order, requests
    that failed and requests that occur before.

    Raises
    ------
    InputError
        If a header or a first line is not one, the versions or modes of the parts differ, or no line holds.
    MissingInputError
        If a file or its header does not exist.
    """
    rejections = Rejections()
    headers = [read_header(header_path(path)) for path in paths]
    _one_recording(headers)
    rows: list[dict[str, Any]] = []
    models: dict[str, str] = {}
    values: dict[str, tuple[float, str]] = {}
    seen: set[str] = set()
    unfinished = []
    for path, header in zip(paths, headers, strict=True):
        _claims_of(header, models, values)
        records, wrong = _records(path, rejections)
        if wrong > len(records):
            raise InputError(
                "\n  ".join([f"{path}: most lines have another number of fields than line 1 names columns", *rejections.lines()])
            )
        for place, (line, record) in enumerate(records):
            what = f"request {record['request_id']}"
            try:
                found = _request(record, header)
            except ValueError as error:
                rejections.add(path, line, str(error), what=what, content=",".join(record.values()))
                continue
            if found["request_id"] in seen:
                rejections.add(path, line, "request_id occurs before", what=what, content=",".join(record.values()))
                continue
            seen.add(found["request_id"])
            if record["model"].strip():
                models.setdefault(record["model"].strip(), f"{path}, line {line}")
            if place < header.warm_up_requests:
                found["regime"] = "warmup"
            if "finished_ns" not in found:
                unfinished.append(found["request_id"])
            rows.append(found)
    if not rows:
        raise InputError("\n  ".join([f"{', '.join(map(str, paths))}: no request holds", *rejections.lines()]))
    notes = [f"{len(unfinished)} request(s) without an end, for example {unfinished[0]}"] if unfinished else []
    if headers[0].mode != "real":
        notes.append(f"mode is {headers[0].mode}: the times are a simulation's")
    return Recording(
        "trace-v2",
        tuple(paths),
        requests=requests_frame(rows),
        rejections=rejections,
        notes=tuple(notes),
        claims=Claims(models, values),
        client_side=True,
        # Measured: BLIS writes last_chunk_time_us = arrival + E2E - alpha1.
        ends_after_last=headers[0].mode == "real",
    )


def _one_recording(headers: Sequence[TraceHeader]) -> None:
    for other in headers[1:]:
        for name in ("version", "mode"):
            if getattr(other, name) != getattr(headers[0], name):
                raise InputError(
                    f"{other.source}: {'trace_version' if name == 'version' else name} is {getattr(other, name)!r} but "
                    f"{headers[0].source} has {getattr(headers[0], name)!r}; these are not parts of one recording. Ingest them apart"
                )


def _claims_of(header: TraceHeader, models: dict[str, str], values: dict[str, tuple[float, str]]) -> None:
    if header.server.get("model"):
        models.setdefault(str(header.server["model"]), f"{header.source}, server.model")
    for theirs, ours in _SERVER.items():
        given = header.server.get(theirs)
        if isinstance(given, int | float) and given > 0:
            values.setdefault(ours, (float(given), f"{header.source}, server.{theirs}"))
