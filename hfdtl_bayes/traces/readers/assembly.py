"""Recordings in foreign formats put together to the tables of a trace store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.traces.readers.claims import check_claims
from hfdtl_bayes.traces.readers.clock_order import increasing
from hfdtl_bayes.traces.readers.queueing import state_at_queueing
from hfdtl_bayes.traces.readers.recording import CLOCKS, COUNTS, EPISODE_COLUMNS, UNKNOWN, Recording, Rejections, named
from hfdtl_bayes.traces.readers.request_tables import Assembly, Overheads, joined_chunks, joined_requests
from hfdtl_bayes.traces.readers.step_frames import StepFrame, steps_of_chunks, steps_of_journeys
from hfdtl_bayes.traces.readers.step_times import busy_after, step_times
from hfdtl_bayes.traces.reconstruction import Composition, Episodes, compose

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

_SERVER_SIDE, _CLIENT_SIDE = ("otlp",), ("trace-v2", "itl", "blis-results", "blis-metrics")
_REBUILT = ("context_tokens", "prefill_attention_tokens", "prompt_attention_tokens")
_COMPLETE = 0.99
"""Share of batches that the requests must account for to be all that were served: single steps may be missing at the edges."""
_REBUILT_FROM_ALL = (
    "no batches were recorded: they are rebuilt from the requests, which must be all that were served. A sample of requests, as of "
    "--journey-tracing-sample-rate below 1, gives batches that are too small"
)
_COUNTED = ("prefill_tokens", "decode_tokens", "prefill_requests", "decode_requests")


@dataclass(frozen=True)
class Assembled:
    """Tables of a trace store, not yet validated.

    Attributes
    ----------
    steps, requests : DataFrame or None
        Columns of `STEP_SCHEMA` and `REQUEST_SCHEMA`, seconds from the first clock of the recording.
    client_requests : DataFrame or None
        Requests without the scheduler's clocks, which `requests` cannot hold: `request_id`, `arrival_s`, `first_token_s`, `finished_s`,
        `prompt_tokens`, `output_tokens`, `cached_tokens`.
    origin_ns : int
        The clock of the files at second 0.
    rejections : Rejections
        Steps and requests set aside while putting together; those set aside by the readers are in the recordings.
    notes : tuple of str
    """

    steps: pd.DataFrame | None
    requests: pd.DataFrame | None
    client_requests: pd.DataFrame | None
    origin_ns: int
    rejections: Rejections
    notes: tuple[str, ...]


def assemble(
    recordings: Sequence[Recording],
    configuration: ServingConfiguration,
    *,
    overheads: Overheads | None = None,
    served_model_name: str | None = None,
) -> Assembled:
    """Put recordings together.

    Parameters
    ----------
    recordings : sequence of Recording
        Of one run of one configuration, in formats whose clocks are one.
    configuration : ServingConfiguration
    overheads : Overheads, optional
    served_model_name : str, optional
        The name under which the server served the LLM, where it is another than the configuration's.

    Returns
    -------
    Assembled

    Raises
    ------
    InputError
        If the recordings are of another model or other settings than the configuration says, have different clocks, or hold no rows.
    """
    overheads = overheads or Overheads()
    check_claims(recordings, configuration, served_model_name)
    _check_clocks(recordings)
    work = Assembly(configuration, recordings[0].files[0])
    requests = joined_requests(recordings, overheads, work)
    chunks = joined_chunks(recordings, overheads, work, requests)
    tables = [r.steps for r in recordings if len(r.steps)]
    episodes = pd.concat([r.episodes for r in recordings], ignore_index=True)
    if len(tables) > 1:
        tables = [_one_table(tables, work)]
    found: StepFrame | None = None
    if tables:
        found = StepFrame(tables[0], np.ones(len(tables[0]), dtype=bool))
    elif len(chunks):
        found = steps_of_chunks(chunks, requests)
    elif len(episodes) and (episodes["first_step"] != UNKNOWN).any():
        found = steps_of_journeys(requests, episodes)
    if found is None and requests.empty:
        reports = [name for r in recordings for name in r.reports]
        raise InputError(
            f"{named(f for r in recordings for f in r.files)}: no step and no request to put in a store"
            + (
                f"; {', '.join(reports)} hold(s) aggregates only. Ingest the trace they were made from, with them"
                if reports
                else ""
            )
        )
    steps = None
    if found is not None and len(found.steps):
        steps, requests = _steps(found, requests, episodes, work, recorded=bool(tables))
    return _in_seconds(steps, requests, work)


def _check_clocks(recordings: Sequence[Recording]) -> None:
    server = [r for r in recordings if r.format in _SERVER_SIDE]
    client = [r for r in recordings if r.format in _CLIENT_SIDE]
    if server and client:
        raise InputError(
            f"{server[0].files[0]} ({server[0].format}) has the clock of the engine and {client[0].files[0]} ({client[0].format}) that of a "
            "client; they cannot be put in one store. Ingest them apart, under two names"
        )


def _one_table(tables: Sequence[pd.DataFrame], work: Assembly) -> pd.DataFrame:
    steps = pd.concat(tables, ignore_index=True).sort_values("step_id", kind="stable", ignore_index=True)
    again = steps["step_id"].duplicated().to_numpy()
    for step in steps.loc[again, "step_id"]:
        work.rejections.add(work.source, 0, "the step is in two of the files", what=f"step {step}")
    return steps[~again].reset_index(drop=True)


# Steps.


def _steps(
    found: StepFrame, requests: pd.DataFrame, episodes: pd.DataFrame, work: Assembly, *, recorded: bool
) -> tuple[pd.DataFrame | None, pd.DataFrame]:
    """Return the steps with their times, what was rebuilt of them filled in; and the requests with what the steps say of them."""
    steps, certain, decoding = found.steps, found.certain, found.decoding
    timed = (steps["start_ns"] != UNKNOWN).to_numpy()
    kept = timed.copy()
    kept[timed] = increasing(steps.loc[timed, "start_ns"].to_numpy())
    _set_aside(work, steps, timed & ~kept, "it starts before the step before it: a clock jump")
    _set_aside(work, steps, ~timed, "when it started is not known: the engine may have been idle before it")
    configuration = work.configuration
    stays = _episodes(found, requests, episodes, kept)
    complete = True
    if stays is not None:
        observed = (steps["prefill_tokens"] + steps["decode_tokens"]).to_numpy(dtype=float) if recorded else None
        built = compose(
            steps["step_id"].to_numpy(),
            stays,
            configuration.engine.max_num_batched_tokens,
            slots=configuration.engine.max_num_seqs,
            chunked=configuration.engine.chunked_prefill,
            tokens=observed,
            decoding=decoding,
        )
        requests = _scheduled(requests, stays, built, steps)
        if configuration.engine.prefix_caching and (requests["cached_tokens"] == UNKNOWN).any():
            work.notes.append("hits in the prefix cache are not recorded: prompts count as computed whole")
        if recorded:
            steps, complete = _filled(steps, built, work)
        else:
            steps = steps.assign(**{name: getattr(built, name) for name in (*_COUNTED, *_REBUILT)})
            certain = certain & built.certain
            work.notes.append(_REBUILT_FROM_ALL)
            # Whoever was queued by the start of a step and is scheduled in none up to it waits.
            steps = steps.assign(waiting_requests=_waiting(steps, requests))
    _set_aside(work, steps, kept & ~certain, "what was computed in it does not follow from the requests")
    rows = np.flatnonzero(kept & certain)
    busy = busy_after(steps)
    consecutive = np.zeros(len(rows), dtype=bool)
    consecutive[:-1] = np.diff(rows) == 1
    times = step_times(steps.iloc[rows].reset_index(drop=True), busy[rows] & consecutive, configuration, work.source)
    work.notes += times.notes
    work.notes.append(f"step times: {times.cycles} from the start of the next step, {times.durations} from the step's own end")
    steps = steps.iloc[rows].assign(time_ns=times.time_ns).reset_index(drop=True)
    for reason, mask in times.problems:
        _set_aside(work, steps, mask, reason)
    state = state_at_queueing(steps, requests, complete=complete)
    requests = requests.assign(**state) if state else requests
    steps = steps[times.time_ns != UNKNOWN].reset_index(drop=True)
    return (_with_regime(steps, requests) if len(steps) else None), requests


def _set_aside(work: Assembly, steps: pd.DataFrame, mask: BoolArray, reason: str) -> None:
    for step in steps["step_id"].to_numpy()[mask].tolist():
        work.rejections.add(work.source, 0, reason, what=f"step {step}")


def _starts_if_whole(steps: pd.DataFrame, kept: BoolArray) -> IntArray | None:
    """Return where each step starts if the table is whole, None if steps are missing: times do not say the step then."""
    if not kept.all() or (np.diff(steps["step_id"].to_numpy()) != 1).any():
        return None
    return steps["start_ns"].to_numpy()


def _episodes(found: StepFrame, requests: pd.DataFrame, episodes: pd.DataFrame, kept: BoolArray) -> Episodes | None:
    """Return the stays of all requests by step number; None if there is nothing that could tell."""
    steps = found.steps
    ids = steps["step_id"].to_numpy()
    if len(episodes):
        order = pd.Series(np.arange(len(requests)), index=requests["request_id"].to_numpy())
        episodes = episodes[episodes["request_id"].isin(order.index)]
        episodes = episodes.iloc[np.argsort(order.reindex(episodes["request_id"]).to_numpy(), kind="stable")]
        own = {c: episodes[c].to_numpy() for c in EPISODE_COLUMNS}
        nothing = np.zeros(len(episodes), dtype=bool)
        return Episodes(**own, not_before=np.full(len(episodes), UNKNOWN), queued=nothing)
    if requests.empty:
        return None
    n = len(requests)
    unknown = np.full(n, UNKNOWN)
    prompt = requests["prompt_tokens"].to_numpy()
    cached = np.maximum(requests["cached_tokens"].to_numpy(), 0)
    queued, arrival = requests["queued_ns"].to_numpy(), requests["arrival_ns"].to_numpy()
    since = np.where(queued != UNKNOWN, queued, arrival)
    if found.token_step is not None and found.last_step is not None:
        names = requests["request_id"]
        token = found.token_step.reindex(names, fill_value=UNKNOWN).to_numpy(dtype=np.int64)
        last = found.last_step.reindex(names, fill_value=UNKNOWN).to_numpy(dtype=np.int64)
        first = unknown
        # The first step that starts when the request is there; a step starts at the latest when the one before it ends.
        ends = steps["end_ns"].to_numpy()
        begins = steps["start_ns"].to_numpy().copy()
        begins[1:] = np.where(begins[1:] == UNKNOWN, ends[:-1], begins[1:])
        not_before = 1 + np.searchsorted(begins, since, "left")
    else:
        starts = _starts_if_whole(steps, kept)
        if starts is None:
            return None
        first, token, last = unknown.copy(), unknown.copy(), unknown.copy()
        # A request is scheduled at the start of a step, gets its tokens at the end of one, which may be the start of the next.
        _step_at(first, requests["scheduled_ns"], ids, starts, "right")
        _step_at(token, requests["first_token_ns"], ids, starts, "left")
        _step_at(last, requests["finished_ns"], ids, starts, "left")
        row = np.minimum(np.searchsorted(starts, since, "left"), len(ids) - 1)
        not_before = ids[row]
    return Episodes(first, token, last, prompt - cached, cached, prompt, not_before, queued != UNKNOWN)


def _step_at(into: IntArray, clock: pd.Series, ids: IntArray, starts: IntArray, side: Literal["left", "right"]) -> None:
    at = clock.to_numpy()
    row = np.searchsorted(starts, at, side) - 1
    fits = (at != UNKNOWN) & (row >= 0)
    into[fits] = ids[row[fits]]


def _filled(steps: pd.DataFrame, built: Composition, work: Assembly) -> tuple[pd.DataFrame, bool]:
    """Fill in what journeys say of steps, where they account for every request and token of a step; and whether they do for nearly all."""
    given = {name: steps[name].to_numpy(dtype=float) for name in _COUNTED}
    tokens = built.prefill_tokens + built.decode_tokens == given["prefill_tokens"] + given["decode_tokens"]
    theirs = given["prefill_requests"] + given["decode_requests"]
    requests = np.isnan(theirs) | (built.prefill_requests + built.decode_requests == theirs)
    agrees = built.certain & tokens & requests
    steps = steps.copy()
    moved = agrees & (built.prefill_tokens != given["prefill_tokens"])
    for name in _COUNTED:
        # A prompt computed anew after a preemption counts as decode in vLLM's summary.
        steps[name] = np.where(agrees, getattr(built, name), given[name])
    for name in _REBUILT:
        own = steps[name].to_numpy(dtype=float)
        steps[name] = np.where(np.isnan(own) & agrees, getattr(built, name), own)
    work.notes.append(
        f"context and attention of {agrees.sum()} of {len(steps)} steps rebuilt from the requests"
        + ("" if agrees.all() else "; the requests do not account for the other batches")
    )
    if moved.any():
        work.notes.append(
            f"{moved.sum()} steps: prompts computed anew after a preemption, counted as decode in the file, are prefill"
        )
    return steps, float(agrees.mean()) >= _COMPLETE


def _scheduled(requests: pd.DataFrame, stays: Episodes, built: Composition, steps: pd.DataFrame) -> pd.DataFrame:
    """Give requests whose scheduling was not recorded the start of the step in which they were first computed."""
    if len(stays) != len(requests) or (requests["scheduled_ns"] != UNKNOWN).all():
        return requests
    ids, starts = steps["step_id"].to_numpy(), steps["start_ns"].to_numpy()
    row = np.minimum(np.searchsorted(ids, built.first_step), len(ids) - 1)
    found = (built.first_step != UNKNOWN) & (ids[row] == built.first_step) & (starts[row] != UNKNOWN) & built.certain[row]
    scheduled = requests["scheduled_ns"].to_numpy()
    return requests.assign(scheduled_ns=np.where((scheduled == UNKNOWN) & found, starts[row], scheduled))


def _waiting(steps: pd.DataFrame, requests: pd.DataFrame) -> NDArray[np.float64]:
    queued, scheduled = requests["queued_ns"].to_numpy(), requests["scheduled_ns"].to_numpy()
    if requests.empty or (queued == UNKNOWN).any() or (scheduled == UNKNOWN).any():
        return np.full(len(steps), np.nan)
    start = steps["start_ns"].to_numpy()
    return (np.searchsorted(np.sort(queued), start, "right") - np.searchsorted(np.sort(scheduled), start, "right")).astype(float)


def _with_regime(steps: pd.DataFrame, requests: pd.DataFrame) -> pd.DataFrame:
    """Label steps with the regime of the request that came last before them, where any request has one."""
    if requests.empty or not (requests["regime"] != "").any():
        return steps
    came = np.where(requests["queued_ns"] != UNKNOWN, requests["queued_ns"], requests["arrival_ns"])
    row = np.clip(np.searchsorted(came, steps["start_ns"].to_numpy(), "right") - 1, 0, None)
    regimes = requests["regime"].to_numpy()[row]
    return steps.assign(regime=np.where(regimes == "", "all", regimes))


# Out.


def _seconds(values: pd.Series, origin: int) -> NDArray[np.float64]:
    known = (values != UNKNOWN).to_numpy()
    return np.where(known, (values.to_numpy() - np.where(known, origin, 0)) / 1e9, np.nan)


def _without_gaps(steps: pd.DataFrame) -> pd.DataFrame:
    """Drop BLIS's attention where it is not known of every step: unlike the columns of the schema, nothing derives it row by row."""
    known = steps["prompt_attention_tokens"].where(steps["prefill_tokens"] != 0, 0.0)
    return steps.assign(prompt_attention_tokens=known if known.notna().all() else np.nan)


def _in_seconds(steps: pd.DataFrame | None, requests: pd.DataFrame, work: Assembly) -> Assembled:
    stamps = [requests[c] for c in CLOCKS] + ([steps["start_ns"]] if steps is not None else [])
    known = np.concatenate([s[s != UNKNOWN].to_numpy() for s in stamps])
    origin = int(known.min()) if len(known) else 0
    out_steps = None
    if steps is not None:
        steps = _without_gaps(steps)
        out_steps = pd.DataFrame(
            {
                "step_id": steps["step_id"],
                "start_s": _seconds(steps["start_ns"], origin),
                "step_time_s": steps["time_ns"] / 1e9,
                **{
                    c: steps[c]
                    for c in (*_COUNTED, *_REBUILT, "waiting_requests", "running_requests", "kv_usage")
                    if steps[c].notna().any()
                },
            }
        )
        if "regime" in steps.columns:
            out_steps["regime"] = steps["regime"]
    if requests.empty:
        return Assembled(out_steps, None, None, origin, work.rejections, tuple(work.notes))
    table: dict[str, Any] = {"request_id": requests["request_id"]}
    table |= {f"{c.removesuffix('_ns')}_s": _seconds(requests[c], origin) for c in CLOCKS}
    for name in COUNTS:
        table[name] = requests[name].where(requests[name] != UNKNOWN).astype(float)
    for name in ("waiting_requests", "running_requests", "kv_usage"):
        if name in requests.columns:
            table[name] = requests[name]
    frame = pd.DataFrame(table)
    if (requests["regime"] != "").any():
        frame["regime"] = requests["regime"].where(requests["regime"] != "", "all")
    frame = frame.loc[:, frame.notna().any() | frame.columns.isin(["queued_s", "scheduled_s"])]
    whole = (frame["queued_s"].notna() & frame["scheduled_s"].notna()).to_numpy()
    if whole.any():
        for name in frame.loc[~whole, "request_id"]:
            work.rejections.add(work.source, 0, "when it was queued or scheduled is not known", what=f"request {name}")
        return Assembled(out_steps, frame[whole].reset_index(drop=True), None, origin, work.rejections, tuple(work.notes))
    work.notes.append(
        "when requests were queued and scheduled is not known, so they go to client_requests.parquet; give --before-queue-us (BLIS's "
        "alpha0) and an ITL file or steps to have them in requests.parquet"
    )
    frame = frame.loc[:, frame.notna().any()]
    return Assembled(out_steps, None, frame, origin, work.rejections, tuple(work.notes))
