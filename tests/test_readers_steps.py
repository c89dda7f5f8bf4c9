"""Steps: their composition rebuilt against a simulated engine, their times, and tables of them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfdtl_bayes.configuration import ServingConfiguration, weight_loading_floor_s
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.replay import Requests, replay
from hfdtl_bayes.sample import TARGET, sample_store_path
from hfdtl_bayes.traces import TraceStore
from hfdtl_bayes.traces.readers import read_batch_summary
from hfdtl_bayes.traces.readers.clock_order import increasing
from hfdtl_bayes.traces.readers.recording import UNKNOWN, empty_steps
from hfdtl_bayes.traces.readers.step_frames import clusters
from hfdtl_bayes.traces.readers.step_times import busy_after, step_times
from hfdtl_bayes.traces.reconstruction import Episodes, compose

SAMPLE = TraceStore(sample_store_path()).configuration(TARGET)
FLOOR_NS = round(weight_loading_floor_s(SAMPLE) * 1e9)
REBUILT = (
    "prefill_tokens", "decode_tokens", "prefill_requests", "decode_requests", "prefill_attention_tokens", "prompt_attention_tokens",
    "context_tokens",
)  # fmt: skip


def engine(budget: int, *, chunked: bool = True) -> ServingConfiguration:
    knobs = {
        "max_num_seqs": 6, "max_num_batched_tokens": budget, "kv_capacity_tokens": 1e6, "prefix_caching": True, "chunked_prefill": chunked,
    }  # fmt: skip
    return SAMPLE.model_copy(update={"engine": SAMPLE.engine.model_copy(update=knobs)})


def stays(requests: pd.DataFrame, *, known_start: bool) -> Episodes:
    """What the events of each request say, where a step takes one second: step k is from k to k + 1."""
    when = {c: requests[c].to_numpy() for c in ("queued_s", "scheduled_s", "first_token_s", "finished_s")}
    prompt, cached = (requests[c].to_numpy(dtype=np.int64) for c in ("prompt_tokens", "cached_tokens"))
    first = when["scheduled_s"].astype(np.int64)
    return Episodes(
        first_step=first if known_start else np.full(len(first), UNKNOWN),
        token_step=when["first_token_s"].astype(np.int64) - 1,
        last_step=when["finished_s"].astype(np.int64) - 1,
        prefill_tokens=prompt - cached,
        computed_before=cached,
        held_tokens=prompt,
        not_before=when["queued_s"].astype(np.int64),
        queued=np.ones(len(first), dtype=bool),
    )


TRAFFIC = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 60), st.integers(1, 6), st.integers(0, 20)), min_size=1, max_size=12
)


@given(TRAFFIC, st.integers(6, 40), st.booleans(), st.booleans())
def test_composition_is_that_of_a_simulated_engine(
    drawn: list[tuple[int, int, int, int]], budget: int, known_start: bool, recorded: bool
):
    gaps, prompt, output, cached = (np.array(v) for v in zip(*drawn, strict=True))
    run = replay(
        Requests(np.cumsum(gaps).astype(float), prompt, output, cached_tokens=np.minimum(cached, prompt - 1)),
        engine(budget),
        lambda _: 1.0,
    )
    requests = run.requests.sort_values(["queued_s", "request_id"], key=lambda c: c.astype(float), kind="stable")
    steps = run.steps
    ids = steps["start_s"].to_numpy().astype(np.int64)
    tokens = (steps["prefill_tokens"] + steps["decode_tokens"]).to_numpy() if recorded else None
    built = compose(ids, stays(requests, known_start=known_start), budget, slots=6, tokens=tokens)
    assert built.certain.all()
    for name in REBUILT:
        assert getattr(built, name).tolist() == steps[name].tolist(), name
    assert built.first_step.tolist() == requests["scheduled_s"].astype(int).tolist()


def test_a_prompt_that_does_not_come_out_is_marked_not_guessed():
    # 30 tokens cannot have been computed in one step of 10.
    one = np.array([1])
    built = compose(np.arange(4), Episodes(one, one, one + 1, one * 30, one * 0, one * 30, one, one > 0), 10)
    assert built.certain.tolist() == [True, False, True, True]
    assert built.prefill_tokens.tolist() == [0, 0, 0, 0]


# Times.


def steps(start: list[int], duration: list[int], decodes: list[int], ids: list[int] | None = None) -> pd.DataFrame:
    n = len(start)
    frame = empty_steps().reindex(range(n))
    return frame.assign(
        step_id=np.arange(n) if ids is None else np.array(ids), start_ns=np.array(start), end_ns=UNKNOWN, duration_ns=np.array(duration),
        decode_requests=np.array(decodes, dtype=float), waiting_requests=0.0,
    )  # fmt: skip


def timed(frame: pd.DataFrame):
    return step_times(frame, busy_after(frame), SAMPLE, Path("given"))


CYCLE = 3 * FLOOR_NS


def test_a_cycle_is_start_to_start_of_consecutive_busy_steps():
    # The step after the third is of an engine that was idle; the fifth and sixth are not consecutive.
    starts = [0, CYCLE, 2 * CYCLE, 90 * CYCLE, 91 * CYCLE, 95 * CYCLE]
    frame = steps(starts, [UNKNOWN] * 6, [0, 1, 1, 0, 1, 1], ids=[1, 2, 3, 4, 5, 9])
    assert timed(frame).time_ns.tolist() == [CYCLE, CYCLE, UNKNOWN, CYCLE, UNKNOWN, UNKNOWN]
    # Requests left waiting keep it busy as well.
    frame.loc[2, "waiting_requests"] = 2.0
    assert timed(frame).time_ns[2] == 88 * CYCLE


def test_a_duration_that_agrees_with_the_cycle_stands_in_with_the_median_rest():
    starts = [0, CYCLE, 2 * CYCLE, 90 * CYCLE]
    found = timed(steps(starts, [CYCLE - 100] * 4, [0, 1, 1, 0]))
    assert found.time_ns.tolist() == [CYCLE, CYCLE, CYCLE, CYCLE]
    assert (found.cycles, found.durations) == (2, 2)


@pytest.mark.parametrize(
    ("duration", "said"), [(FLOOR_NS // 10, "below the time to read the weights"), (2 * FLOOR_NS, "not the engine's cycle")]
)
def test_a_duration_that_is_not_the_step_is_not_used(duration: int, said: str):
    found = timed(steps([0, CYCLE, 2 * CYCLE, 90 * CYCLE], [duration] * 4, [0, 1, 1, 0]))
    assert found.time_ns.tolist() == [CYCLE, CYCLE, UNKNOWN, UNKNOWN]
    assert any(said in note for note in found.notes)


def test_durations_below_the_floor_without_any_cycle_are_refused():
    frame = steps([0, CYCLE, 2 * CYCLE], [FLOOR_NS // 10] * 3, [1, 1, 1], ids=[1, 5, 9])
    with pytest.raises(InputError, match=r"not the step's time.*100% of the steps.*No two consecutive"):
        timed(frame)


def test_a_pause_is_not_a_step():
    frame = steps([0, CYCLE, 2 * CYCLE, 2 * CYCLE + 61 * 10**9], [UNKNOWN] * 4, [1] * 4)
    found = timed(frame)
    assert found.time_ns.tolist() == [CYCLE, CYCLE, UNKNOWN, UNKNOWN]
    assert any(
        "clock jump or a pause" in message and mask.tolist() == [False, False, True, False] for message, mask in found.problems
    )


@given(st.lists(st.integers(-50, 50), max_size=9))
def test_as_few_stamps_as_can_be_are_set_aside(values: list[int]):
    kept = increasing(np.array(values, dtype=np.int64))
    rest = np.array(values)[kept]
    assert (np.diff(rest) > 0).all()
    # The longest increasing subsequence by trying all subsets.
    subsets = ([v for i, v in enumerate(values) if m >> i & 1] for m in range(2 ** len(values)))
    longest = max(len(subset) for subset in subsets if (np.diff(subset) > 0).all())
    assert kept.sum() == longest


def test_chunks_of_one_step_come_together_and_a_request_has_one_each():
    times, requests = np.array([0, 1, 2, 100, 101, 103]), np.array([1, 2, 3, 1, 3, 1])
    assert clusters(times, requests, 10).tolist() == [0, 0, 0, 1, 1, 2]


# Tables.


def table(**columns: object) -> pd.DataFrame:
    base = {
        "step.id": [3, 1, 2], "step.ts_start_ns": [30, 10, 20], "step.duration_us": [1, 2, 3], "batch.num_prefill_reqs": [0, 1, 0],
        "batch.num_decode_reqs": [1, 0, 1], "batch.prefill_tokens": [0, 9, 0], "batch.decode_tokens": [1, 0, 1], "kv.usage_gpu_ratio": 0.5,
    }  # fmt: skip
    return pd.DataFrame(base | columns)


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "parquet", "underscores"])
def test_tables_in_any_file_and_spelling(tmp_path: Path, kind: str):
    path, frame = tmp_path / f"steps.{'csv' if kind == 'underscores' else kind}", table()
    if kind == "parquet":
        frame.to_parquet(path)
    else:
        frame.columns = [c.replace(".", "_") for c in frame.columns] if kind == "underscores" else frame.columns
        frame.to_csv(path, index=False)
    found = read_batch_summary([path]).steps
    assert found["step_id"].tolist() == [1, 2, 3]
    assert found["start_ns"].tolist() == [10, 20, 30]
    assert found["duration_ns"].tolist() == [2000, 3000, 1000]
    assert found["prefill_tokens"].tolist() == [9, 0, 0]


def test_units_follow_the_name(tmp_path: Path):
    frame = table(ts_start_us=[30, 10, 20]).drop(columns="step.ts_start_ns")
    frame.to_csv(tmp_path / "s.csv", index=False)
    assert read_batch_summary([tmp_path / "s.csv"]).steps["start_ns"].tolist() == [10_000, 20_000, 30_000]


@pytest.mark.parametrize(
    ("column", "values", "reason", "place"),
    [
        ("step.duration_us", [1, -2, 3], "step.duration_us is negative", "line 3; step 1"),
        ("batch.prefill_tokens", [0, None, 0], "batch.prefill_tokens is missing or not a number", "line 3; step 1"),
        ("batch.decode_tokens", [1, 0, -1], "batch.decode_tokens is negative", "line 4; step 2"),
        ("step.id", [3, 1, 3], "step_id occurs before", "line 4; step 3"),
        ("step.ts_end_ns", [40, 9, 30], "the step ends before it starts", "line 3; step 1"),
        ("step.ts_start_ns", [30, "x", 20], "step.ts_start_ns is missing or not a number", "line 3; step 1"),
    ],
)
def test_a_bad_row_is_named_and_the_others_are_read(tmp_path: Path, column: str, values: list, reason: str, place: str):
    table(**{column: values}).to_csv(tmp_path / "s.csv", index=False)
    found = read_batch_summary([tmp_path / "s.csv"])
    assert len(found.steps) == 2
    assert found.rejections.lines() == [f"1 set aside: {reason} ({place.replace('; ', ', ')})"]


def test_tables_that_are_none(tmp_path: Path):
    path = tmp_path / "s.csv"
    table().drop(columns=["step.id", "step.ts_start_ns"]).to_csv(path, index=False)
    with pytest.raises(InputError, match=r"no column for step_id .*start_ns .*found step\.duration_us"):
        read_batch_summary([path])
    table(**{"batch.prefill_tokens": -1}).to_csv(path, index=False)
    with pytest.raises(InputError, match=r"no step holds\n.*3 set aside: batch.prefill_tokens is negative"):
        read_batch_summary([path])
    whole = gzip.compress(table().to_csv(index=False).encode())
    (tmp_path / "cut.csv.gz").write_bytes(whole[:-20])
    with pytest.raises(InputError, match="cut short"):
        read_batch_summary([tmp_path / "cut.csv.gz"])


def test_a_last_row_that_was_cut_is_not_taken(tmp_path: Path):
    path = tmp_path / "s.csv"
    path.write_text(table().to_csv(index=False)[:-3])
    found = read_batch_summary([path])
    assert found.steps["step_id"].tolist() == [1, 3]
    assert found.rejections.lines() == ["1 set aside: the last line is without its end: the file was cut short (line 4, step 2)"]
