"""Validation of request journeys: clocks, units, unfinished requests, requests to predict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_traces_validation import CONFIGURATION

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.traces import REQUEST_SCHEMA, TraceStore, TraceTable, validate_requests


def requests(rows: int = 20) -> pd.DataFrame:
    i = np.arange(rows)
    arrival = 100.0 + 0.5 * i
    return pd.DataFrame(
        {
            "request_id": [f"r{k}" for k in i],
            "arrival_s": arrival,
            "queued_s": arrival + 0.02,
            "scheduled_s": arrival + 0.05,
            "first_token_s": arrival + 0.3,
            "finished_s": arrival + 0.3 + 0.012 * (10 + i),
            "prompt_tokens": 100 + i,
            "output_tokens": 11 + i,
            "cached_tokens": 0 * i,
            "waiting_requests": i % 4,
            "running_requests": i % 7,
            "kv_usage": 0.01 * i,
            "preemptions": 0 * i,
            "regime": "low",
        }
    )


def validate(frame: pd.DataFrame, **options: Any) -> TraceTable:
    return validate_requests(frame, CONFIGURATION, "store/a/requests.parquet", **options)


def test_good_requests_pass_unchanged() -> None:
    table = validate(requests())
    pd.testing.assert_frame_equal(table.frame, requests(), check_dtype=False)
    assert table.rejected.empty


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("request_id", None, "request_id is missing"),
        ("request_id", "r2", "request_id occurs before"),
        ("queued_s", np.nan, "queued_s is missing"),
        ("queued_s", np.inf, "queued_s is infinite"),
        ("queued_s", 0.0, "queued_s is before arrival_s"),
        ("scheduled_s", 0.0, "scheduled_s is before queued_s"),
        ("first_token_s", 0.0, "first_token_s is before scheduled_s"),
        ("finished_s", 0.0, "finished_s is before first_token_s"),
        ("finished_s", "late", "finished_s is not a number"),
        ("prompt_tokens", -1, "prompt_tokens is below 0 token"),
        ("prompt_tokens", 10.5, "prompt_tokens is not a whole number"),
        ("cached_tokens", 1000, "cached_tokens exceeds prompt_tokens"),
        ("kv_usage", 1.5, "kv_usage is above 1"),
        ("waiting_requests", np.nan, "waiting_requests is missing"),
    ],
)
def test_one_bad_value_rejects_its_row_and_no_other(column: str, value: Any, reason: str) -> None:
    frame = requests().astype({column: object})
    frame.loc[6, column] = value
    table = validate(frame)
    assert list(table.rejected["row"]) == [6]
    assert reason in table.rejected["reason"].iloc[0]


@pytest.mark.parametrize("column", ["arrival_s", "first_token_s", "finished_s", "output_tokens", "cached_tokens"])
def test_what_is_not_known_of_every_request_may_be_missing(column: str) -> None:
    frame = requests().astype({column: float})
    frame.loc[[2, 5], column] = np.nan
    assert len(validate(frame).frame) == 20
    assert len(validate(frame.drop(columns=column)).frame) == 20


def test_clocks_of_two_processes_may_disagree_by_a_millisecond() -> None:
    frame = requests()
    frame.loc[3, "queued_s"] = frame.loc[3, "arrival_s"] - 0.0009
    frame.loc[4, "queued_s"] = frame.loc[4, "arrival_s"] - 0.0011
    assert list(validate(frame).rejected["row"]) == [4]


TIMES = ["arrival_s", "queued_s", "scheduled_s", "first_token_s", "finished_s"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.iloc[:0], "no rows"),
        (lambda f: f.drop(columns=["queued_s", "scheduled_s"]), r"queued_s \[s\], scheduled_s \[s\]"),
        (lambda f: f.assign(**{c: f[c] * 1e3 for c in TIMES}), "time per output token is 12 s, .* given as seconds"),
        (lambda f: f.assign(**{c: f[c] / 1e3 for c in TIMES}), "time per output token, .* Times must be in seconds"),
        (lambda f: f.assign(kv_usage=30.0), "looks like per cent"),
    ],
)
def test_a_file_that_cannot_be_used_gives_one_error(change: Callable[[pd.DataFrame], pd.DataFrame], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        validate(change(requests()))
    assert "store/a/requests.parquet" in str(caught.value)


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        (["first_token_s"], "time of service, finished_s - scheduled_s"),
        (["first_token_s", "cached_tokens"], "time of service, finished_s - scheduled_s"),
        (["finished_s"], "time to the first token, first_token_s - scheduled_s"),
        (["finished_s", "output_tokens"], "time to the first token, first_token_s - scheduled_s"),
    ],
)
@pytest.mark.parametrize(("factor", "ending"), [(1e3, "given as seconds"), (1e-3, "Times must be in seconds")])
def test_a_wrong_unit_shows_in_whatever_times_are_known(absent: list[str], message: str, factor: float, ending: str) -> None:
    frame = requests().drop(columns=absent)
    assert len(validate(frame).frame) == 20
    wrong = frame.assign(**{c: frame[c] * factor for c in TIMES if c in frame})
    with pytest.raises(InputError, match=f"{message}.*{ending}"):
        validate(wrong)


def test_long_waits_and_short_answers_to_long_prompts_are_seconds() -> None:
    # Overload: minutes in the queue. Summaries: 30,000 tokens of prompt and one of answer, served in 8 s.
    frame = requests().drop(columns="first_token_s").assign(prompt_tokens=30_000, output_tokens=1)
    frame["scheduled_s"] = frame["queued_s"] + 600.0
    frame["finished_s"] = frame["scheduled_s"] + 8.0
    assert len(validate(frame).frame) == 20


def test_prompts_from_the_prefix_cache_cost_nothing() -> None:
    caching = CONFIGURATION.model_copy(update={"engine": CONFIGURATION.engine.model_copy(update={"prefix_caching": True})})
    frame = requests().drop(columns="first_token_s").assign(prompt_tokens=30_000, output_tokens=2)
    # 30,000 tokens of 16 GFLOP take half a second at an H100's peak.
    frame["finished_s"] = frame["scheduled_s"] + 0.05
    with pytest.raises(InputError, match="time of service"):
        validate_requests(frame.assign(cached_tokens=0), caching)
    for accepted in (frame.assign(cached_tokens=29_984), frame.drop(columns="cached_tokens")):
        assert len(validate_requests(accepted, caching).frame) == 20


def test_aborted_requests_are_not_judged() -> None:
    frame = requests().drop(columns="first_token_s").assign(output_tokens=0)
    frame["finished_s"] = frame["scheduled_s"]
    assert len(validate(frame).frame) == 20


def test_requests_to_predict_need_no_clocks() -> None:
    frame = requests().drop(columns=[*TIMES, "request_id"])
    assert len(validate(frame, observed=False).frame) == 20
    assert len(validate(requests().assign(finished_s=0.0), observed=False).frame) == 20
    with pytest.raises(InputError, match="prompt_tokens"):
        validate(frame.drop(columns="prompt_tokens"), observed=False)


@settings(max_examples=100)
@given(
    changes=st.lists(
        st.tuples(
            st.integers(0, 19),
            st.sampled_from([c.name for c in REQUEST_SCHEMA]),
            st.sampled_from([np.nan, np.inf, -1.0, 0.5, 1.0, 101.0, "text", None]),
        ),
        max_size=20,
    )
)
def test_no_row_is_lost_and_accepted_rows_are_accepted_again(changes: list[tuple[int, str, Any]]) -> None:
    frame = requests().astype(object)
    for row, column, value in changes:
        frame.loc[row, column] = value
    try:
        table = validate(frame)
    except InputError:
        return
    assert sorted([*table.row_numbers, *table.rejected["row"]]) == list(range(20))
    assert list(table.frame["request_id"]) == [str(v) for v in frame["request_id"].iloc[table.row_numbers]]
    again = validate(table.frame)
    pd.testing.assert_frame_equal(again.frame, table.frame)
    assert again.rejected.empty


def test_every_recorded_request_validates_and_a_wrong_unit_is_refused(shared_data: Path) -> None:
    store = TraceStore(shared_data / "vllm_cpu")
    for config_id in store.config_ids:
        table = store.requests(config_id)
        assert table.rejected.empty, table.summary()
        for factor in (1e-6, 1e3, 1e6):
            wrong = table.frame.assign(**{c: table.frame[c] * factor for c in TIMES})
            with pytest.raises(InputError, match="time per output token"):
                validate_requests(wrong, store.configuration(config_id), config_id)


@pytest.mark.parametrize(
    "absent", [["first_token_s"], ["first_token_s", "cached_tokens"], ["finished_s", "output_tokens"]], ids="+".join
)
def test_recorded_requests_without_some_times_validate_and_a_wrong_unit_is_refused(shared_data: Path, absent: list[str]) -> None:
    store = TraceStore(shared_data / "vllm_cpu")
    for config_id in store.config_ids:
        configuration = store.configuration(config_id)
        frame = store.requests(config_id).frame.drop(columns=absent, errors="ignore")
        assert validate_requests(frame, configuration, config_id).rejected.empty
        for factor in (1e-6, 1e-3, 1e3, 1e6):
            wrong = frame.assign(**{c: frame[c] * factor for c in TIMES if c in frame})
            with pytest.raises(InputError, match=r"time of service|time to the first token"):
                validate_requests(wrong, configuration, config_id)


def test_waits_alone_tell_no_unit(shared_data: Path) -> None:
    store = TraceStore(shared_data / "vllm_cpu")
    for config_id in store.config_ids:
        frame = store.requests(config_id).frame.drop(columns=["first_token_s", "finished_s", "output_tokens"])
        # A wait of microseconds on an idle engine and one of minutes under overload are both real.
        wrong = frame.assign(**{c: frame[c] * 1e3 for c in TIMES if c in frame})
        assert len(validate_requests(wrong, store.configuration(config_id), config_id).frame) == len(frame)
