"""ITL files of `blis observe`: when each chunk of output reached the client. CSV: request_id, chunk_index, timestamp_us."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.traces.readers.lines import CutShortError, text_lines
from hfdtl_bayes.traces.readers.recording import Recording, Rejections
from hfdtl_bayes.traces.readers.whole_numbers import request_name, whole

COLUMNS = ("request_id", "chunk_index", "timestamp_us")


def read_itl(paths: Sequence[Path]) -> Recording:
    """Read ITL files; several are parts of one recording.

    A line with another number of fields, a value that is no whole number from 0, or a chunk that came before the one before it is
    set aside.

    Raises
    ------
    InputError
        If a file has another header, or no line holds.
    """
    rejections = Rejections()
    requests: list[int] = []
    indices: list[int] = []
    times: list[int] = []
    lines: list[int] = []
    files: list[int] = []
    for number, path in enumerate(paths):
        _read(path, number, rejections, requests, indices, times, lines, files)
    frame = pd.DataFrame({"request": requests, "chunk_index": indices, "us": times, "line": lines, "file": files})
    frame = frame.sort_values(["request", "chunk_index", "us"], kind="stable")
    repeated = frame.duplicated(["request", "chunk_index"]).to_numpy()
    same = frame["request"].to_numpy()[1:] == frame["request"].to_numpy()[:-1]
    # A chunk before the one before it: the later index is to blame, since the first chunk of a request has no other witness.
    highest = frame.groupby("request")["us"].cummax().to_numpy()
    early = np.zeros(len(frame), dtype=bool)
    early[1:] = same & (frame["us"].to_numpy()[1:] < highest[:-1])
    for mask, reason in (
        (repeated, "the chunk occurs before"),
        (early & ~repeated, "a chunk before the one before it: a clock jump"),
    ):
        for request, chunk, line, file in frame.loc[mask, ["request", "chunk_index", "line", "file"]].to_numpy().tolist():
            rejections.add(paths[file], line, reason, what=f"{request_name(request)} chunk {chunk}")
    frame = frame[~(repeated | early)]
    if frame.empty:
        raise InputError("\n  ".join([f"{', '.join(map(str, paths))}: no chunk holds", *rejections.lines()]))
    chunks = pd.DataFrame(
        {
            "request_id": np.array([request_name(r) for r in frame["request"]], dtype=object),
            "chunk_index": frame["chunk_index"].to_numpy(dtype=np.int64),
            "time_ns": frame["us"].to_numpy(dtype=np.int64) * 1000,
        }
    )
    return Recording("itl", tuple(paths), chunks=chunks, rejections=rejections, client_side=True)


def _read(
    path: Path,
    number: int,
    rejections: Rejections,
    requests: list[int],
    indices: list[int],
    times: list[int],
    lines: list[int],
    files: list[int],
) -> None:
    stream = text_lines(path, ended=True)
    try:
        _, head = next(stream)
    except CutShortError as error:
        raise InputError(str(error)) from None
    found = [name.strip() for name in head.decode("utf-8", "replace").split(",")]
    if tuple(found) != COLUMNS:
        raise InputError(f"{path}: line 1 is {','.join(found)[:200]!r}; an ITL file begins with {','.join(COLUMNS)!r}")
    try:
        for line, raw in stream:
            if not raw.strip():
                continue
            text = raw.decode("utf-8", "replace")
            fields = next(csv.reader([text]), [])
            if len(fields) != len(COLUMNS):
                rejections.add(path, line, f"another number of fields than {len(COLUMNS)}", content=text)
                continue
            try:
                values = [whole(v, n) for v, n in zip(fields, COLUMNS, strict=True)]
            except ValueError as error:
                rejections.add(path, line, str(error), content=text)
                continue
            requests.append(values[0])
            indices.append(values[1])
            times.append(values[2])
            lines.append(line)
            files.append(number)
    except CutShortError as error:
        rejections.add(path, 0, str(error))
