"""Steps where none were recorded: from the chunks of output that clients saw, or from the step numbers and stamps of journeys."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.traces.readers.recording import STEP_VALUES, UNKNOWN

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]

CLUSTER_SHARE = 0.25
"""Chunks of one step reach the clients within this share of the median time between chunks: a step's output leaves at once, steps are
a whole cycle apart."""


@dataclass(frozen=True)
class StepFrame:
    """Steps, and what is known of them beside the columns of a recording.

    Attributes
    ----------
    steps : DataFrame
        As `Recording.steps`; `start_ns` may be unknown.
    certain : ndarray of bool
        False where requests computed that did not say so.
    decoding : (ndarray, ndarray) or None
        Decoding requests and their context, where counted.
    token_step, last_step : Series of int or None
        Of each request, by id, where the chunks tell.
    """

    steps: pd.DataFrame
    certain: BoolArray
    decoding: tuple[FloatArray, FloatArray] | None = None
    token_step: pd.Series | None = None
    last_step: pd.Series | None = None


def _frame(step_id: IntArray, start: IntArray, end: IntArray) -> pd.DataFrame:
    known = (start != UNKNOWN) & (end != UNKNOWN)
    frame = pd.DataFrame(
        {"step_id": step_id, "start_ns": start, "end_ns": end, "duration_ns": np.where(known, end - start, UNKNOWN)}
    )
    return frame.assign(**dict.fromkeys(STEP_VALUES, np.nan))


def clusters(times: IntArray, requests: IntArray, tolerance: int) -> IntArray:
    """Return which step each chunk came from, counted from 0; chunks in the order of time.

    A step is over when the next chunk comes more than `tolerance` after its first, or from a request that has had its chunk.
    """
    found = np.zeros(len(times), dtype=np.int64)
    number, begun = -1, 0
    seen: set[int] = set()
    for i, (at, request) in enumerate(zip(times.tolist(), requests.tolist(), strict=True)):
        if number < 0 or at - begun > tolerance or request in seen:
            number += 1
            begun = at
            seen.clear()
        seen.add(request)
        found[i] = number
    return found


def steps_of_chunks(chunks: pd.DataFrame, requests: pd.DataFrame) -> StepFrame:
    """Find the steps in which chunks were produced.

    Every decoding request gets one chunk a step, so the moments at which chunks come are the ends of the steps. A step after an idle
    engine begins when its request is queued; where that is not known its start is not either.

    Parameters
    ----------
    chunks : DataFrame
        `request_id`, `chunk_index`, `time_ns`: ends of steps.
    requests : DataFrame
        As `Recording.requests`, with `queued_ns` where known.
    """
    known = requests.set_index("request_id")
    chunks = chunks[chunks["request_id"].isin(known.index)].sort_values(["request_id", "chunk_index"], kind="stable")
    gaps = chunks.groupby("request_id")["time_ns"].diff().dropna()
    tolerance = int(CLUSTER_SHARE * gaps.median()) if len(gaps) else 0
    chunks = chunks.sort_values("time_ns", kind="stable")
    codes, names = pd.factorize(chunks["request_id"])
    number = clusters(chunks["time_ns"].to_numpy(), codes.astype(np.int64), tolerance)
    n = int(number[-1]) + 1 if len(number) else 0
    end = chunks["time_ns"].groupby(number).min().to_numpy(dtype=np.int64)
    index = chunks["chunk_index"].to_numpy()
    decodes = index >= 1
    prompt = known["prompt_tokens"].reindex(names).to_numpy()[codes]
    decode_requests = np.bincount(number[decodes], minlength=n).astype(float)
    context = np.bincount(number[decodes], (prompt + index - 1)[decodes], minlength=n)
    of_first = pd.Series(number[~decodes] + 1, index=chunks["request_id"].to_numpy()[~decodes])
    of_last = pd.Series(number + 1, index=chunks["request_id"].to_numpy()).groupby(level=0).max()
    start = np.full(n, UNKNOWN)
    start[1:] = np.where(decode_requests[1:] > 0, end[:-1], UNKNOWN)
    queued = known["queued_ns"].reindex(of_first.index).to_numpy()
    alone = decode_requests[of_first.to_numpy() - 1] == 0
    for step, at in zip(of_first.to_numpy()[alone].tolist(), queued[alone].tolist(), strict=True):
        if at != UNKNOWN:
            before = int(end[step - 2]) if step > 1 else at
            begun = max(at, before)
            start[step - 1] = begun if start[step - 1] == UNKNOWN else min(begun, int(start[step - 1]))
    frame = _frame(np.arange(1, n + 1), start, end)
    certain = _certain(end, known, chunks)
    return StepFrame(frame, certain, (decode_requests, context.astype(float)), of_first, of_last)


def _certain(end: IntArray, known: pd.DataFrame, chunks: pd.DataFrame) -> BoolArray:
    """Mark the steps in the life of requests whose chunks are not one per token: they computed unseen."""
    counts = chunks["request_id"].value_counts().reindex(known.index).fillna(0).to_numpy()
    output = known["output_tokens"].to_numpy()
    silent = counts != output
    certain = np.ones(len(end), dtype=bool)
    for begun, ended in known[["arrival_ns", "finished_ns"]].to_numpy()[silent].tolist():
        low = int(np.searchsorted(end, begun, "left")) if begun != UNKNOWN else 0
        high = int(np.searchsorted(end, ended, "right")) if ended != UNKNOWN else len(end)
        certain[low:high] = False
    return certain


def steps_of_journeys(requests: pd.DataFrame, episodes: pd.DataFrame) -> StepFrame:
    """Find the steps that events of journeys are stamped in: SCHEDULED at the start of one, FIRST_TOKEN and FINISHED at the end.

    Steps without an event have no times and are not returned; which requests were in them is known all the same.
    """
    by_id = requests.set_index("request_id")
    stays = episodes.groupby("request_id", sort=False)
    first, last = stays.first(), stays.last()
    clocks = by_id.reindex(first.index)
    starts = pd.Series(clocks["scheduled_ns"].to_numpy(), index=first["first_step"].to_numpy())
    ends = pd.concat(
        [
            pd.Series(clocks["first_token_ns"].to_numpy(), index=first["token_step"].to_numpy()),
            pd.Series(clocks["finished_ns"].to_numpy(), index=last["last_step"].to_numpy()),
        ]
    )
    # Where a request was preempted before its first token, its first token came in a later stay.
    starts, ends = (s[(s.to_numpy() != UNKNOWN) & (s.index.to_numpy() != UNKNOWN)] for s in (starts, ends))
    starts, ends = starts.groupby(level=0).min(), ends.groupby(level=0).min()
    step_id = np.union1d(starts.index.to_numpy(), ends.index.to_numpy()).astype(np.int64)
    start = starts.reindex(step_id, fill_value=UNKNOWN).to_numpy(dtype=np.int64).copy()
    end = ends.reindex(step_id, fill_value=UNKNOWN).to_numpy(dtype=np.int64).copy()
    follows = np.zeros(len(step_id), dtype=bool)
    follows[1:] = (np.diff(step_id) == 1) & _decodes(step_id[1:], episodes)
    rows = np.flatnonzero(follows)
    start[rows] = np.where(start[rows] == UNKNOWN, end[rows - 1], start[rows])
    end[rows - 1] = np.where(end[rows - 1] == UNKNOWN, start[rows], end[rows - 1])
    frame = _frame(step_id, start, end)
    open_from = episodes.loc[episodes["last_step"] == UNKNOWN, ["first_step", "token_step"]].max(axis=1)
    certain = np.ones(len(step_id), dtype=bool)
    if len(open_from):
        # What came of a request without an end is not known after its last event.
        certain &= step_id <= int(open_from.min())
    return StepFrame(frame, certain)


def _decodes(steps: IntArray, episodes: pd.DataFrame) -> BoolArray:
    known = episodes[episodes["token_step"] != UNKNOWN]
    token = np.sort(known["token_step"].to_numpy())
    last = known["last_step"].to_numpy()
    last = np.sort(np.where(last == UNKNOWN, 2**62, last))
    return np.searchsorted(token, steps, "left") > np.searchsorted(last, steps, "left")
