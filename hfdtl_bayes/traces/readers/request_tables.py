"""Requests of several formats put together, with a client's clocks freed of what no step contains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.traces.readers.recording import CLOCKS, COUNTS, UNKNOWN, Recording, Rejections, empty_requests

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Overheads:
    """Times of a request that no step contains, in microseconds, as BLIS adds them; its alpha of trained-physics.

    They are taken off what a client saw: first token = first chunk - per_token, end = end - output_tokens * per_token - after_last,
    chunk i = its time - (i + 1) * per_token. Cut to whole microseconds, as BLIS does. The last chunk in a TraceV2 that BLIS generated
    is without after_last, which its metrics and results contain.

    Attributes
    ----------
    before_queue_us : float or None
        From arrival to the queue, BLIS's alpha0; None where it is not known. Then `queued_s` is not known either, nor `scheduled_s`
        where the files do not say it.
    after_last_us, per_token_us : float
        BLIS's alpha1 and alpha2.
    """

    before_queue_us: float | None = None
    after_last_us: float = 0.0
    per_token_us: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is no time.

        Raises
        ------
        InputError
        """
        for name, value in vars(self).items():
            if value is not None and not (math.isfinite(value) and 0 <= value < 1e12):
                raise InputError(f"{name} of the overheads is {value}; accepted are microseconds from 0")


@dataclass
class Assembly:
    """What the parts of one assembly share: for whom it is, and what they set aside and found."""

    configuration: ServingConfiguration
    source: Path
    rejections: Rejections = field(default_factory=Rejections)
    notes: list[str] = field(default_factory=list)


def joined_requests(recordings: Sequence[Recording], overheads: Overheads, work: Assembly) -> pd.DataFrame:
    """Return all requests, the client's clocks without the overheads, in the order in which they came.

    Raises
    ------
    InputError
        If there are results of a replay without the trace that was replayed.
    """
    by_format = {r.format: r for r in recordings if len(r.requests)}
    results = by_format.pop("blis-results", None)
    frames = [_freed(r, overheads) for r in by_format.values()]
    if results is not None and not frames:
        raise InputError(
            f"{results.files[0]}: results of a replay hold no arrivals; name the TraceV2 that was replayed as well (its CSV)"
        )
    if not frames:
        return empty_requests()
    joined = _joined(frames)
    if results is not None:
        joined = _with_results(joined, _freed(results, overheads), results, work)
    if any(r.client_side for r in by_format.values()) and overheads.before_queue_us is not None:
        lag = int(overheads.before_queue_us) * 1000
        known = (joined["queued_ns"] != UNKNOWN) | (joined["arrival_ns"] == UNKNOWN)
        joined["queued_ns"] = joined["queued_ns"].where(known, joined["arrival_ns"] + lag)
    if not work.configuration.engine.prefix_caching:
        joined["cached_tokens"] = joined["cached_tokens"].where(joined["cached_tokens"] != UNKNOWN, 0)
    came = np.where(joined["queued_ns"] != UNKNOWN, joined["queued_ns"], joined["arrival_ns"])
    order = np.lexsort((joined["arrival_ns"].to_numpy(), came))
    return joined.iloc[order].reset_index(drop=True)


def _joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the requests of several formats; what the first does not know another may."""
    every = pd.concat(frames, ignore_index=True)
    if len(frames) == 1:
        return every
    names = pd.Index(every["request_id"].unique())
    columns: dict[str, Any] = {"request_id": names.to_numpy()}
    for name in (*CLOCKS, *COUNTS):
        first = every[every[name] != UNKNOWN].groupby("request_id")[name].first()
        columns[name] = first.reindex(names, fill_value=UNKNOWN).to_numpy()
    labels = every[every["regime"] != ""].groupby("request_id")["regime"].first()
    columns["regime"] = labels.reindex(names, fill_value="").to_numpy()
    return pd.DataFrame(columns)


def _freed(recording: Recording, overheads: Overheads) -> pd.DataFrame:
    """Return the requests of a recording, a client's clocks without what no step contains."""
    requests = recording.requests
    if not recording.client_side:
        return requests
    per_token = int(overheads.per_token_us) * 1000
    after = int(overheads.after_last_us) * 1000 if recording.ends_after_last else 0
    out = np.maximum(requests["output_tokens"].to_numpy(), 0)
    return requests.assign(
        first_token_ns=_less(requests["first_token_ns"], np.full(len(requests), per_token)),
        finished_ns=_less(requests["finished_ns"], out * per_token + after),
    )


def _less(column: pd.Series, by: IntArray) -> pd.Series:
    return column.where(column == UNKNOWN, column - by)


def _with_results(requests: pd.DataFrame, freed: pd.DataFrame, results: Recording, work: Assembly) -> pd.DataFrame:
    """Give each request the outcome that a replay had; those without one are set aside."""
    outcome = freed.set_index("request_id")
    absent = ~requests["request_id"].isin(outcome.index)
    for name in requests.loc[absent, "request_id"]:
        work.rejections.add(
            results.files[0], 0, "in the trace but not in the results: the replay dropped it", what=f"request {name}"
        )
    extra = ~outcome.index.isin(requests["request_id"])
    for name in outcome.index[extra]:
        work.rejections.add(results.files[0], 0, "in the results but not in the trace", what=f"request {name}")
    requests = requests[~absent].reset_index(drop=True)
    own = outcome.loc[requests["request_id"]]
    for clock in ("first_token_ns", "finished_ns"):
        lasted = own[clock].to_numpy()
        requests[clock] = np.where(
            lasted == UNKNOWN, UNKNOWN, requests["arrival_ns"].to_numpy() + np.where(lasted == UNKNOWN, 0, lasted)
        )
    requests["scheduled_ns"] = UNKNOWN
    work.notes.append(f"first and last token are those of the replay in {results.files[0]}, not the trace's")
    return requests


def joined_chunks(recordings: Sequence[Recording], overheads: Overheads, work: Assembly, requests: pd.DataFrame) -> pd.DataFrame:
    """Return the chunks of all files at the ends of steps, those of requests that are not known set aside.

    Raises
    ------
    InputError
        If there are chunks and no requests, whose prompts they need.
    """
    chunks = pd.concat([r.chunks for r in recordings], ignore_index=True)
    if chunks.empty:
        return chunks
    source = next(r.files[0] for r in recordings if len(r.chunks))
    if requests.empty:
        raise InputError(f"{source}: an ITL file holds no prompts; name the TraceV2 it belongs to as well (its CSV)")
    strange = ~chunks["request_id"].isin(requests["request_id"])
    for name, count in chunks.loc[strange, "request_id"].value_counts().items():
        work.rejections.add(source, 0, "chunks of a request that is not in the trace", what=f"request {name}: {count} chunks")
    per_token = int(overheads.per_token_us) * 1000
    chunks = chunks[~strange].reset_index(drop=True)
    return chunks.assign(time_ns=chunks["time_ns"] - (chunks["chunk_index"] + 1) * per_token)
