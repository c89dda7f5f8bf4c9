"""Validation of engine steps: each kind of bad input gives one clear error or a counted, visible rejection."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfdtl_bayes.configuration import ServingConfiguration, configuration_from_mapping, weight_loading_floor_s
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.traces import STEP_SCHEMA, TraceStore, TraceTable, read_steps, schema_table, validate_steps

CAPACITY = 400_000.0
CONFIGURATION: ServingConfiguration = configuration_from_mapping(
    {
        "config_id": "llama3-8b_h100",
        "llm": {
            "name": "llama3-8b", "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256, "max_context_tokens": 8192,
        },
        "hardware": "h100",
        "engine": {"max_num_seqs": 256, "max_num_batched_tokens": 2048, "kv_capacity_tokens": CAPACITY},
    }
)  # fmt: skip
FLOOR = weight_loading_floor_s(CONFIGURATION)  # 4.2 ms


def steps(rows: int = 40) -> pd.DataFrame:
    """Realistic steps: decoding, with a prefill of 500 tokens in every fourth."""
    i = np.arange(rows)
    prefill = np.where(i % 4 == 0, 500, 0)
    return pd.DataFrame(
        {
            "step_id": i + 10,
            "start_s": 5.0 + 0.012 * i,
            "step_time_s": 0.008 + 0.00002 * prefill + 0.0001 * (i % 3),
            "prefill_tokens": prefill,
            "decode_tokens": 20 + i % 5,
            "prefill_requests": (prefill > 0).astype(int),
            "decode_requests": 20 + i % 5,
            "prefill_attention_tokens": prefill**2 / 2,
            "context_tokens": 20_000.0 + i,
            "waiting_requests": i % 3,
            "running_requests": 20 + i % 5 + (prefill > 0),
            "kv_usage": (20_000.0 + i) / CAPACITY,
            "regime": np.where(i < rows // 2, "low", "high"),
        }
    )


def validate(frame: pd.DataFrame, **options: Any) -> TraceTable:
    return validate_steps(frame, CONFIGURATION, "store/llama3-8b_h100/steps.parquet", **options)


def spoil(column: str, row: int, value: Any) -> pd.DataFrame:
    frame = steps().astype({column: object})
    frame.loc[row, column] = value
    return frame


def test_good_steps_pass_unchanged() -> None:
    table = validate(steps())
    pd.testing.assert_frame_equal(table.frame, steps(), check_dtype=False)
    assert table.rejected.empty
    assert not table.problems + table.notes
    assert table.derived == ()
    assert table.frame["step_id"].dtype == np.int64
    assert list(table.row_numbers) == list(range(40))
    assert "40 rows accepted, 0 rejected" in table.summary()


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("step_time_s", np.nan, "step_time_s is missing"),
        ("step_time_s", None, "step_time_s is missing"),
        ("step_time_s", -0.01, "step_time_s is not above 0 s"),
        ("step_time_s", 0.0, "step_time_s is not above 0 s"),
        ("step_time_s", np.inf, "step_time_s is infinite"),
        ("step_time_s", "fast", "step_time_s is not a number"),
        ("step_time_s", [0.01], "step_time_s is not a number"),
        ("step_time_s", 0.4 * FLOOR, "below 0.5 of the time to read the weights once"),
        ("kv_usage", 1.01, "kv_usage is above 1"),
        ("kv_usage", -0.01, "kv_usage is below 0"),
        ("kv_usage", "full", "kv_usage is not a number"),
        ("kv_usage", np.inf, "kv_usage is infinite"),
        ("prefill_tokens", -1, "prefill_tokens is below 0 token"),
        ("prefill_tokens", 12.5, "prefill_tokens is not a whole number"),
        ("prefill_tokens", np.nan, "prefill_tokens is missing"),
        ("prefill_tokens", 2048, "more tokens than max_num_batched_tokens, 2048"),
        ("prefill_tokens", 0, "fewer prefill_tokens than prefill_requests"),
        ("decode_tokens", 23.5, "decode_tokens is not a whole number"),
        ("decode_tokens", -3, "decode_tokens is below 0 token"),
        ("decode_tokens", 3, "fewer decode_tokens than decode_requests"),
        ("decode_requests", 0, "decode_tokens without a request"),
        ("prefill_requests", 0, "prefill_tokens without a request"),
        ("prefill_requests", 0.5, "prefill_requests is not a whole number"),
        ("waiting_requests", np.nan, "waiting_requests is missing"),
        ("waiting_requests", -1, "waiting_requests is below 0 request"),
        ("context_tokens", -5, "context_tokens is below 0 token"),
        ("step_id", np.nan, "step_id is missing"),
        ("step_id", np.inf, "step_id is infinite"),
        ("step_id", 17.5, "step_id is not a whole number"),
        ("step_id", -4, "step_id is below 0"),
        ("step_id", 17, "step_id occurs before"),
        ("step_id", 12, "step_id occurs before"),
        ("step_id", "first", "step_id is not a number"),
        ("start_s", np.inf, "start_s is infinite"),
    ],
)
def test_one_bad_value_rejects_its_row_and_no_other(column: str, value: Any, reason: str) -> None:
    frame = spoil(column, 8, value)  # row 8 has prefill
    table = validate(frame)
    assert list(table.rejected["row"]) == [8]
    assert reason in table.rejected["reason"].iloc[0]
    assert len(table.frame) == 39
    assert 8 not in table.row_numbers
    assert [p.count for p in table.problems] == [1] * len(table.problems)
    assert any(reason in p.message and p.rows == (8,) for p in table.problems)
    assert reason in table.summary()


def test_a_prefill_faster_than_the_peak_is_rejected() -> None:
    frame = steps()
    frame.loc[[8, 12], ["prefill_tokens", "step_time_s"]] = [2000, 0.01]  # at 989 TFLOP/s this takes 28 ms
    table = validate(frame)
    assert list(table.rejected["row"]) == [8, 12]
    assert set(table.rejected["reason"]) == {"prefill is faster than the peak of h100_sxm by more than 2 times"}


def test_rows_with_several_problems_name_them_all_and_the_first_rows_are_quoted() -> None:
    frame = steps()
    frame.loc[5, ["step_time_s", "kv_usage"]] = [-1.0, 3.0]
    frame.loc[10:19, "kv_usage"] = 2.0
    table = validate(frame)
    assert table.rejected["reason"].iloc[0] == "step_time_s is not above 0 s; kv_usage is above 1"
    assert "11 row(s): kv_usage is above 1 (row 5, 10, 11, 12, 13, ...)" in table.summary()


def test_step_numbers_are_judged_among_good_rows_only() -> None:
    frame = steps()
    frame.loc[3, ["step_id", "step_time_s"]] = [10**6, -1.0]  # bad for another reason: rows after it are not "decreasing"
    frame.loc[20, "step_id"] = 5
    table = validate(frame)
    assert list(table.rejected["row"]) == [3, 20]
    assert table.rejected["reason"].iloc[1] == "step_id decreases"


def test_step_numbers_beyond_the_precision_of_a_float_stay_apart() -> None:
    frame = steps()
    frame["step_id"] += 2**60
    assert list(validate(frame).frame["step_id"]) == list(frame["step_id"])


def test_decoding_without_context_is_accepted_and_noted() -> None:
    frame = steps()
    frame.loc[[4, 7], "context_tokens"] = 0.0
    table = validate(frame)
    assert len(table.frame) == 40
    assert table.notes[0].rows == (4, 7)
    assert "note 2 row(s): decode_tokens with context_tokens 0" in table.summary()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.iloc[:0], "no rows"),
        (lambda f: f.drop(columns="step_time_s"), r"missing required column\(s\) step_time_s \[s\]; found step_id"),
        (lambda f: f.drop(columns=["step_id", "decode_tokens"]), r"step_id \[1\], decode_tokens \[token\]"),
        (lambda f: f.rename(columns={"step_time_s": "step_time_ms"}), r"step_time_s \[s\] \(rename step_time_ms\?\)"),
        (lambda f: pd.concat([f, f[["kv_usage"]]], axis=1), "kv_usage occur twice"),
        (lambda f: f.assign(step_time_s=f.step_time_s * 1e3), "milliseconds or microseconds given as seconds"),
        (lambda f: f.assign(step_time_s=f.step_time_s * 1e6), "milliseconds or microseconds given as seconds"),
        (lambda f: f.assign(step_time_s=f.step_time_s / 1e3), "below the time to read the weights once .* in 100% of rows"),
        (lambda f: f.assign(step_time_s=0.0006), "times only the scheduler"),  # vLLM's step.duration_us
        (lambda f: f.assign(prefill_tokens=2000, prefill_requests=1), "prefill is faster than the peak of h100_sxm"),
        (lambda f: f.assign(kv_usage=f.kv_usage * 100), "looks like per cent"),
        (lambda f: f.assign(step_time_s="fast"), "column step_time_s holds no numbers, found for example 'fast'"),
        (lambda f: f.assign(step_time_s=pd.to_timedelta(f.step_time_s, unit="s")), "step_time_s is of type timedelta64"),
        (lambda f: f.assign(prefill_tokens=f.prefill_tokens > 0), "prefill_tokens is of type bool"),
        (lambda f: f.assign(step_time_s=np.nan), "every row was rejected:\n  - 40 row"),
        (lambda f: f.assign(decode_tokens=0, decode_requests=0, prefill_tokens=0, prefill_requests=0), "a flush step"),
    ],
)
def test_a_file_that_cannot_be_used_gives_one_error(change: Callable[[pd.DataFrame], pd.DataFrame], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        validate(change(steps()))
    assert "store/llama3-8b_h100/steps.parquet" in str(caught.value)


def test_half_the_rows_in_another_unit_are_rejected_or_refused() -> None:
    frame = steps()
    frame.loc[:10, "step_time_s"] /= 1e3
    table = validate(frame)
    assert list(table.rejected["row"]) == list(range(11))
    frame.loc[:25, "step_time_s"] /= 1e3
    with pytest.raises(InputError, match="below the time to read the weights"):
        validate(frame)


def test_absent_columns_are_derived_and_it_is_said() -> None:
    required = [c.name for c in STEP_SCHEMA if c.required]
    table = validate(steps()[[*required, "kv_usage"]])
    frame = table.frame
    assert list(frame["prefill_requests"]) == [float(p > 0) for p in frame["prefill_tokens"]]
    assert frame["decode_requests"].equals(frame["decode_tokens"])
    assert np.allclose(frame["prefill_attention_tokens"], frame["prefill_tokens"] ** 2 / 2)
    assert np.allclose(frame["context_tokens"], frame["kv_usage"] * CAPACITY)
    assert frame["running_requests"].equals(frame["prefill_requests"] + frame["decode_requests"])
    assert set(frame["regime"]) == {"all"}
    assert [d.split(" = ")[0] for d in table.derived] == [
        "prefill_requests", "decode_requests", "prefill_attention_tokens", "context_tokens", "running_requests", "regime",
    ]  # fmt: skip
    assert "derived context_tokens = kv_usage * kv_capacity_tokens" in table.summary()


def test_kv_usage_follows_from_the_context() -> None:
    frame = steps().drop(columns="kv_usage")
    frame.loc[3, "context_tokens"] = 2 * CAPACITY  # shared prefixes count once in the cache
    table = validate(frame)
    assert table.frame["kv_usage"].iloc[0] == 20_000 / CAPACITY
    assert table.frame["kv_usage"].iloc[3] == 1.0
    assert table.derived == ("kv_usage = min(1, context_tokens / kv_capacity_tokens)",)


def test_without_cache_columns_nothing_is_invented() -> None:
    table = validate(steps().drop(columns=["kv_usage", "context_tokens"]))
    assert not {"kv_usage", "context_tokens"} & set(table.frame.columns)


def test_gaps_in_a_derivable_column_are_filled_and_counted() -> None:
    frame = steps().astype({"decode_requests": float})
    frame.loc[[2, 3], "context_tokens"] = np.nan
    frame.loc[[5], "decode_requests"] = np.nan
    frame.loc[[6], ["kv_usage", "context_tokens"]] = np.nan
    frame.loc[[7], "regime"] = None
    table = validate(frame)
    assert list(table.rejected["row"]) == [6]  # neither is known: nothing to derive from
    assert table.frame["context_tokens"].iloc[2] == frame["kv_usage"].iloc[2] * CAPACITY
    assert any(d.startswith("context_tokens") and d.endswith("(in 2 of 40 rows)") for d in table.derived)
    assert any(d.startswith("decode_requests") and d.endswith("(in 1 of 40 rows)") for d in table.derived)
    assert table.frame["regime"].iloc[6] == "all"


def test_an_empty_optional_column_is_an_absent_one() -> None:
    table = validate(steps().assign(kv_usage=np.nan, start_s=None, waiting_requests=np.nan))
    assert len(table.frame) == 40
    assert np.allclose(table.frame["kv_usage"], table.frame["context_tokens"] / CAPACITY)
    assert "waiting_requests" not in table.frame.columns


def test_unknown_columns_are_kept_as_they_are() -> None:
    frame = steps().assign(kernel_time_s=np.nan, note="text", row=7, reason="mine")
    frame.loc[3, "step_time_s"] = -1
    table = validate(frame)
    assert list(table.frame["note"]) == ["text"] * 39
    assert table.frame["kernel_time_s"].isna().all()
    assert list(table.frame["row"]) == [7] * 39
    assert table.rejected.iloc[0][["row", "row_in_file", "reason_in_file"]].tolist() == [3, 7, "mine"]


def test_batches_to_predict_need_neither_times_nor_numbers() -> None:
    frame = steps().drop(columns=["step_id", "step_time_s", "start_s"])
    assert list(validate(frame, observed=False).frame["step_id"]) == list(range(40))
    implausible = steps().assign(step_time_s=1e9)
    assert len(validate(implausible, observed=False).frame) == 40
    with pytest.raises(InputError, match="decode_tokens"):
        validate(frame.drop(columns="decode_tokens"), observed=False)


def test_rejected_rows_are_written_beside_the_result_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = steps()
    frame.loc[[3, 9], "kv_usage"] = 2.0
    table = validate(frame)
    written = table.write_rejected(tmp_path / "reports")
    assert written is not None
    assert written.name == "llama3-8b_h100.steps.rejected.csv"
    back = pd.read_csv(written)
    assert list(back["row"]) == [3, 9]
    assert list(back["reason"]) == ["kv_usage is above 1"] * 2
    pd.testing.assert_frame_equal(
        back.drop(columns=["row", "reason"]), frame.loc[[3, 9]].reset_index(drop=True), check_dtype=False
    )

    before = written.read_bytes()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        table.write_rejected(tmp_path / "reports")
    assert written.read_bytes() == before
    assert [p.name for p in written.parent.iterdir()] == [written.name]
    assert validate(steps()).write_rejected(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


def test_the_schema_table_lists_every_column_with_its_unit() -> None:
    text = schema_table(STEP_SCHEMA)
    assert all(f"| {c.name} | {c.unit} |" in text for c in STEP_SCHEMA)


bad_values = st.sampled_from([np.nan, np.inf, -np.inf, -1.0, 0.0, 0.5, 1.0, 3.0, 1e-9, 1e4, 1e18, "text", None])
changes = st.lists(st.tuples(st.integers(0, 39), st.sampled_from([c.name for c in STEP_SCHEMA]), bad_values), max_size=30)


@settings(max_examples=150)
@given(changes=changes, dropped=st.sets(st.sampled_from([c.name for c in STEP_SCHEMA if not c.required])))
def test_no_row_is_lost_and_accepted_rows_are_accepted_again(changes: list[tuple[int, str, Any]], dropped: set[str]) -> None:
    frame = steps().astype(object)
    for row, column, value in changes:
        frame.loc[row, column] = value
    frame = frame.drop(columns=sorted(dropped))
    try:
        table = validate(frame)
    except InputError:
        return
    rows = sorted([*table.row_numbers, *table.rejected["row"]])
    assert rows == list(range(40))
    assert len(table.frame) == len(table.row_numbers)
    # What was given and accepted is unchanged: step numbers identify the rows.
    accepted = frame.iloc[table.row_numbers]
    assert list(table.frame["step_id"]) == [int(i) for i in accepted["step_id"]]
    assert list(table.frame["step_time_s"]) == [float(t) for t in accepted["step_time_s"]]
    needed = [c for c in STEP_SCHEMA if c.name in table.frame.columns and c.dtype != "str" and not c.may_be_missing]
    assert np.isfinite(table.frame[[c.name for c in needed]].to_numpy(dtype=float)).all()
    assert all(table.rejected["reason"] != "")

    again = validate(table.frame)
    pd.testing.assert_frame_equal(again.frame, table.frame)
    assert again.rejected.empty
    assert again.derived == ()


@pytest.mark.parametrize("recordings", ["vllm_cpu", "gpu_steps"])
def test_every_recording_validates(shared_data: Path, recordings: str) -> None:
    store = TraceStore(shared_data / recordings)
    assert len(store.config_ids) >= {"vllm_cpu": 11, "gpu_steps": 52}[recordings]
    for config_id in store.config_ids:
        table = store.steps(config_id)
        assert table.rejected.empty, table.summary()  # these were cleaned of flush steps when they were made
        again = validate_steps(table.frame, store.configuration(config_id), config_id)
        pd.testing.assert_frame_equal(again.frame, table.frame)
        if recordings == "vllm_cpu":
            assert [d.split(" = ")[0] for d in table.derived] == ["prefill_attention_tokens"]
            assert all("read after the step" in n.message and n.count < 0.02 * len(table.frame) for n in table.notes)


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e3, 1e6])
def test_every_recording_is_refused_in_a_wrong_unit(shared_data: Path, factor: float) -> None:
    for recordings in ("vllm_cpu", "gpu_steps"):
        store = TraceStore(shared_data / recordings)
        for config_id in store.config_ids[:: 1 if recordings == "vllm_cpu" else 6]:
            table = store.steps(config_id)
            wrong = table.frame.assign(step_time_s=table.frame["step_time_s"] * factor)
            message = "below the time to read the weights" if factor < 1 else "given as seconds"
            with pytest.raises(InputError, match=message):
                validate_steps(wrong, store.configuration(config_id), config_id)


def test_the_published_trap_is_refused(shared_data: Path) -> None:
    """vLLM's step.duration_us times the scheduler only: 0.3 to 1.1 ms in the median on H100, below the weight loading."""
    store = TraceStore(shared_data / "gpu_steps")
    frame = store.steps("llama3-8b_h100-sxm_tp1_vllm0.24.0").frame
    scheduler_only = frame.assign(step_time_s=np.geomspace(0.2e-3, 1.5e-3, len(frame)))
    with pytest.raises(InputError, match=r"step\.duration_us, which times only the scheduler"):
        validate_steps(scheduler_only, store.configuration("llama3-8b_h100-sxm_tp1_vllm0.24.0"), "raw")


def test_a_file_is_validated_as_it_is_read(shared_data: Path) -> None:
    folder = shared_data / "vllm_cpu" / "c01_llama-s_base"
    store = TraceStore(shared_data / "vllm_cpu")
    table = read_steps(folder / "steps.parquet", store.configuration("c01_llama-s_base"))
    pd.testing.assert_frame_equal(table.frame, store.steps("c01_llama-s_base").frame)
    original = pd.read_parquet(folder / "steps.parquet")
    assert table.frame["elapsed_s"].equals(original["elapsed_s"])  # a column of its own, kept
