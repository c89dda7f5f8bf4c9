"""What a simulation serves: recorded requests, the same in every run, or traffic that each run draws anew."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError, MissingInputError
from hfdtl_bayes.replay import Requests, Traffic
from hfdtl_bayes.traces import TraceTable, read_requests

if TYPE_CHECKING:
    from hfdtl_bayes.traces.readers.recording import Recording

TRAFFIC_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Workload:
    """Requests, or kinds of traffic that are simulated one by one, each on an engine that was empty before.

    Attributes
    ----------
    requests : Requests or None
    traffic : tuple of Traffic
        Names are the phases of the result.
    """

    requests: Requests | None = None
    traffic: tuple[Traffic, ...] = ()

    def __post_init__(self) -> None:
        """Refuse both, none, and two of one name.

        Raises
        ------
        InputError
            Saying which.
        """
        if (self.requests is None) == (not self.traffic):
            raise InputError("a workload is either requests or traffic; give one of the two")
        names = [t.name for t in self.traffic]
        repeated = sorted({n for n in names if names.count(n) > 1})
        if repeated:
            raise InputError(f"traffic {', '.join(repeated)} occurs more than once; names are the phases of the result")

    @property
    def random(self) -> bool:
        """Whether runs differ in their requests."""
        return bool(self.traffic)

    @property
    def parts(self) -> tuple[Requests | Traffic, ...]:
        """What is replayed, each part by itself."""
        return (self.requests,) if self.requests is not None else self.traffic

    def __str__(self) -> str:
        """Return a few words for a person."""
        if self.requests is not None:
            return f"{len(self.requests)} requests as given"
        return f"traffic drawn anew in each run: {', '.join(t.name for t in self.traffic)}"


def requests_from_zero(table: TraceTable, *, concurrency: int | None = None) -> Requests:
    """Return the requests of a table on a clock that begins with the first arrival.

    Raises
    ------
    InputError
        If arrivals or output lengths are missing in some rows, or a value is not accepted.
    """
    frame = table.frame
    if "arrival_s" not in frame.columns or frame["arrival_s"].isna().any():
        raise InputError(
            f"{table.source}: {'no arrival_s' if 'arrival_s' not in frame.columns else 'some rows lack arrival_s'}; a simulation needs to "
            "know when each request was sent"
        )
    if "output_tokens" not in frame.columns or frame["output_tokens"].isna().any():
        raise InputError(
            f"{table.source}: output_tokens are missing; a simulation needs to know how many tokens each request generates"
        )
    try:
        return Requests.from_frame(frame.assign(arrival_s=frame["arrival_s"] - frame["arrival_s"].min()), concurrency=concurrency)
    except InputError as error:
        raise InputError(f"{table.source}: {error}") from None


def read_workload(path: str | os.PathLike[str], configuration: ServingConfiguration) -> tuple[Workload, TraceTable | None]:
    """Read a workload by the suffix of its file; returns it, and the table of requests if it was one.

    Parameters
    ----------
    path : path
        YAML: a list of traffic as `plan --deployment` takes it (`hfdtl_bayes.design.traffic_files`). Parquet or CSV: requests as in a
        trace store. A CSV with a YAML of the same name beside it that says ``trace_version``: TraceV2 of BLIS.
    configuration : ServingConfiguration
        Whose requests they are.

    Raises
    ------
    MissingInputError
        If there is no such file.
    InputError
        If it cannot be read as what it is.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingInputError(f"no workload at {path}; give a YAML of traffic, a table of requests, or the CSV of a TraceV2")
    if path.suffix in TRAFFIC_SUFFIXES:
        from hfdtl_bayes.design.traffic_files import read_traffic  # noqa: PLC0415  (loaded on first use)

        return Workload(traffic=tuple(t for t, _ in read_traffic(path))), None
    if _trace_header(path) is not None:
        from hfdtl_bayes.traces.readers.trace_v2 import read_trace_v2  # noqa: PLC0415

        return Workload(requests=_of_recording(read_trace_v2([path]), path)), None
    table = read_requests(path, configuration, observed=False)
    return Workload(requests=requests_from_zero(table)), table


def _of_recording(recording: Recording, path: Path) -> Requests:
    """Return the requests of a TraceV2, which counts in whole nanoseconds here."""
    if len(recording.rejections):
        raise InputError("\n  ".join([f"{path}: a simulation needs every request that was sent", *recording.rejections.lines()]))
    found = recording.requests
    return Requests.from_frame(
        pd.DataFrame(
            {
                "request_id": found["request_id"],
                "arrival_s": (found["arrival_ns"] - found["arrival_ns"].min()) / 1e9,
                "prompt_tokens": found["prompt_tokens"],
                "output_tokens": found["output_tokens"],
                "regime": found["regime"],
            }
        )
    )


def _trace_header(path: Path) -> Path | None:
    """Return the header beside the CSV of a TraceV2; None for any other file."""
    beside: Sequence[Path] = [path.with_suffix(s) for s in TRAFFIC_SUFFIXES] if path.suffix == ".csv" else []
    for found in beside:
        if found.is_file() and "trace_version" in found.read_text(encoding="utf-8", errors="replace"):
            return found
    return None
