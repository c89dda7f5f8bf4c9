"""What BLIS writes: TraceV2, ITL files, metrics, results and reports; golden values of recorded runs, and every way to be wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hfdtl_bayes.errors import InputError, MissingInputError, UnknownNameError
from hfdtl_bayes.traces.readers import (
    detect,
    read_calibrate_report,
    read_files,
    read_itl,
    read_metrics,
    read_results,
    read_trace_v2,
)
from hfdtl_bayes.traces.readers.recording import UNKNOWN
from hfdtl_bayes.traces.readers.trace_v2 import COLUMNS, OPTIONAL

A = "A_llama-3.1-8b-instruct_H100_tp1"
BB1 = "BB1_llama-3.1-8b-instruct_H100_tp2"
HEADER = {"trace_version": 3, "time_unit": "microseconds", "mode": "real", "warm_up_requests": 0, "workload_seed": 7}


def line(number: int, **values: object) -> dict[str, object]:
    row: dict[str, object] = dict.fromkeys(COLUMNS, "")
    row |= {
        "request_id": number, "client_id": "c", "round_index": 0, "prefix_length": 0, "streaming": "true", "input_tokens": 100,
        "output_tokens": 5, "text_tokens": 0, "image_tokens": 0, "audio_tokens": 0, "video_tokens": 0, "reason_ratio": 0,
        "deadline_us": 0, "server_input_tokens": 0, "arrival_time_us": 1000 * number, "send_time_us": 1000 * number + 10,
        "first_chunk_time_us": 1000 * number + 500, "last_chunk_time_us": 1000 * number + 900, "num_chunks": 5, "status": "ok",
    }  # fmt: skip
    return row | values


def trace(
    folder: Path, *rows: dict[str, object], name: str = "t", columns: tuple[str, ...] | None = None, **header: object
) -> Path:
    columns = columns or tuple(c for c in COLUMNS if c not in OPTIONAL)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(HEADER | header))
    with (folder / f"{name}.csv").open("w", newline="") as file:
        out = csv.DictWriter(file, columns, extrasaction="ignore")
        out.writeheader()
        out.writerows(rows)
    return folder / f"{name}.csv"


# Recorded.


def test_a_recorded_trace(shared_data: Path):
    found = read_trace_v2([shared_data / "blis_runs" / A / "clean.trace.csv"])
    assert len(found.requests) == 300
    first = found.requests.iloc[0].to_dict()
    assert first["request_id"] == "request_0"
    assert [first[c] for c in ("arrival_ns", "first_token_ns", "finished_ns")] == [9_002_000, 34_209_000, 1_705_073_000]
    assert [first[c] for c in ("prompt_tokens", "output_tokens", "queued_ns")] == [488, 248, UNKNOWN]
    assert len(found.rejections) == 0


def test_recorded_metrics_and_their_aggregates(shared_data: Path):
    found = read_metrics([shared_data / "blis_runs" / BB1 / "metrics.json"])
    first = found.requests.iloc[0].to_dict()
    assert [first[c] for c in ("request_id", "prompt_tokens", "output_tokens")] == ["request_0", 609, 124]
    assert first["arrival_ns"] == 333_333_000
    since = [first[c] - first["arrival_ns"] for c in ("scheduled_ns", "first_token_ns", "finished_ns")]
    assert since == [3_740_000, 23_216_000, 1_106_700_000]
    assert found.reports["metrics.json"]["e2e_mean_ms"] == 1169.174945


def test_recorded_results(shared_data: Path):
    first = read_results([shared_data / "blis_runs" / A / "replay_true.results.json"]).requests.iloc[0].to_dict()
    assert [first[c] for c in ("request_id", "first_token_ns", "finished_ns")] == ["request_0", 25_207_000, 1_696_876_000]


def test_a_recorded_report_is_in_fractions(shared_data: Path):
    report = read_calibrate_report(shared_data / "blis_runs" / A / "calibration_true.json")
    assert (report.matched, report.requests) == (300, 300)
    e2e = report.metrics["e2e"]
    assert (e2e.mape, e2e.pearson_r) == (0.01113786409325073, 0.999968074755963)
    assert (e2e.quality, e2e.bias_direction) == ("excellent", "under-predict")
    assert (e2e.count, e2e.mean_error, e2e.real_mean_s) == (300, 0.0004166026279975776, pytest.approx(0.9860795533333333))


def test_formats_are_told_by_content(shared_data: Path, tmp_path: Path):
    runs = shared_data / "blis_runs"
    expected = {
        f"{A}/noisy.traces.json.gz": "otlp",
        f"{A}/clean.steps.csv.gz": "batch-summary",
        f"{A}/clean.trace.csv": "trace-v2",
        f"{A}/replay_true.results.json": "blis-results",
        f"{A}/calibration_true.json": "blis-calibrate",
        f"{BB1}/metrics.json": "blis-metrics",
    }
    assert {name: detect(runs / name) for name in expected} == expected
    (tmp_path / "x.json").write_text("request_id,chunk_index,timestamp_us\n0,0,1\n")
    assert detect(tmp_path / "x.json") == "itl"
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"x.csv: not in a format this package reads.*begins with b'a,b.*Accepted are otlp"):
        detect(tmp_path / "x.csv")
    with pytest.raises(UnknownNameError, match="format 'otpl' is not known; known are auto and otlp, batch-summary"):
        read_files([tmp_path / "x.csv"], "otpl")


# TraceV2.


def test_optional_columns_may_be_there_or_not(tmp_path: Path):
    rows = [line(k) for k in range(3)]
    plain = read_trace_v2([trace(tmp_path, *rows)]).requests
    every = read_trace_v2([trace(tmp_path, *rows, name="every", columns=COLUMNS)]).requests
    some = tuple(c for c in COLUMNS if c not in {"adapter", "vllm_priority"})
    assert plain.equals(every)
    assert plain.equals(read_trace_v2([trace(tmp_path, *rows, name="some", columns=some)]).requests)


def test_what_the_server_counted_wins_and_a_prefix_is_added(tmp_path: Path):
    rows = [
        line(0, prefix_length=40),
        line(1, prefix_length=40, server_input_tokens=150),
        line(2, streaming="false"),
        line(3, last_chunk_time_us=0),
    ]
    found = read_trace_v2([trace(tmp_path, *rows, warm_up_requests=1)])
    assert found.requests["prompt_tokens"].tolist() == [140, 150, 100, 100]
    assert found.requests["regime"].tolist() == ["warmup", "", "", ""]
    assert found.requests["arrival_ns"].tolist() == [10_000, 1_010_000, 2_010_000, 3_010_000]
    # Nobody saw the first token of what was not streamed.
    assert found.requests["first_token_ns"].tolist()[2] == UNKNOWN
    assert found.requests["finished_ns"].tolist()[3] == UNKNOWN
    assert any("without an end" in n and "request_3" in n for n in found.notes)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"input_tokens": -3}, "input_tokens is negative"),
        ({"input_tokens": "12.5"}, "input_tokens is not a whole number"),
        ({"input_tokens": 0}, "input_tokens is 0"),
        ({"arrival_time_us": "99999999999999999999"}, "arrival_time_us is not a whole number"),
        ({"first_chunk_time_us": 1}, "first_chunk_time_us is before send_time_us"),
        ({"last_chunk_time_us": 1400}, "last_chunk_time_us is before first_chunk_time_us"),
        ({"status": "timeout", "error_message": 'said "no", twice'}, "status timeout"),
        ({"request_id": 0}, "request_id occurs before"),
    ],
)
def test_a_bad_request_is_named_and_the_others_are_read(tmp_path: Path, values: dict, reason: str):
    found = read_trace_v2([trace(tmp_path, line(0), line(1, **values), line(2))])
    assert found.requests["request_id"].tolist() == ["request_0", "request_2"]
    (shown,) = found.rejections.lines()
    assert shown.startswith(f"1 set aside: {reason}")
    assert f"line 3, request {values.get('request_id', 1)}" in shown


def test_wrong_column_counts(tmp_path: Path):
    path = trace(tmp_path, *(line(k) for k in range(4)))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2] + ",7", *lines[3:]]) + "\n")
    found = read_trace_v2([path])
    assert len(found.requests) == 3
    assert found.rejections.lines() == ["1 set aside: another number of fields than the 27 columns of line 1 (line 3)"]
    path.write_text("\n".join([lines[0], lines[1], *(x + ",7" for x in lines[2:])]) + "\n")
    with pytest.raises(InputError, match=r"most lines have another number of fields(.|\n)*3 set aside.*line 3; line 4; line 5"):
        read_trace_v2([path])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: (*c[:3], "extra", *c[3:]), r"line 1: unknown column\(s\) extra"),
        (lambda c: tuple(x for x in c if x != "output_tokens"), r"missing column\(s\) output_tokens"),
        (lambda c: (c[1], c[0], *c[2:]), r"another order.*BLIS reads them by position"),
    ],
)
def test_a_first_line_that_blis_would_misread_is_refused(tmp_path: Path, change, message: str):
    columns = change(tuple(c for c in COLUMNS if c not in OPTIONAL))
    with pytest.raises(InputError, match=message):
        read_trace_v2([trace(tmp_path, line(0), columns=columns)])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"trace_version": 4}, "trace_version is 4; accepted are 2 and 3"),
        ({"time_unit": "ms"}, "time_unit is 'ms'; accepted is microseconds"),
        ({"mode": "guessed"}, "mode is 'guessed'; accepted are real, generated, replayed"),
        ({"gpu": "H100"}, r"unknown key\(s\) gpu; BLIS refuses them too"),
        ({"warm_up_requests": -1}, "warm_up_requests is negative"),
        ({"server": "vllm"}, "server is 'vllm'; accepted is a mapping"),
    ],
)
def test_bad_headers(tmp_path: Path, header: dict, message: str):
    with pytest.raises(InputError, match=message):
        read_trace_v2([trace(tmp_path, line(0), **header)])


def test_a_trace_without_its_header_and_mixed_versions(tmp_path: Path):
    path = trace(tmp_path, line(0))
    other = trace(tmp_path, line(1), name="other", trace_version=2)
    with pytest.raises(
        InputError, match=r"other.yaml: trace_version is 2 but .*t.yaml has 3; these are not parts of one recording"
    ):
        read_trace_v2([path, other])
    path.with_suffix(".yaml").unlink()
    with pytest.raises(MissingInputError, match=r"no header beside it, .*t.yaml"):
        read_trace_v2([path])


def test_parts_are_one_recording(tmp_path: Path):
    whole = read_trace_v2([trace(tmp_path, *(line(k) for k in range(6)), name="whole")]).requests
    parts = [trace(tmp_path, *(line(k) for k in ks), name=f"p{ks[0]}") for ks in ((0, 1), (2, 3, 4, 5))]
    assert read_trace_v2(parts).requests.equals(whole)


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=12)


@given(
    st.lists(
        st.tuples(st.integers(0, 10**12), *[st.integers(0, 10**9)] * 2, st.integers(1, 10**6), st.integers(0, 10**5), TEXT),
        min_size=1, max_size=6,
    )
)  # fmt: skip
def test_round_trip_of_any_trace(tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple]):
    rows, expected = [], []
    for k, (arrival, first, last, prompt, output, text) in enumerate(drawn):
        times = (arrival + 1, arrival + 1 + first, arrival + 1 + first + last)
        rows.append(
            line(k, arrival_time_us=arrival, send_time_us=times[0], first_chunk_time_us=times[1], last_chunk_time_us=times[2],
                 input_tokens=prompt, output_tokens=output, client_id=text, error_message=text + '"\n"')
        )  # fmt: skip
        expected.append((f"request_{k}", *(t * 1000 for t in times), prompt, output))
    found = read_trace_v2([trace(tmp_path_factory.mktemp("trip"), *rows)])
    columns = ["request_id", "arrival_ns", "first_token_ns", "finished_ns", "prompt_tokens", "output_tokens"]
    assert [tuple(r) for r in found.requests[columns].to_numpy().tolist()] == expected


@given(st.integers(0, 2000))
def test_a_trace_cut_anywhere_never_gives_a_wrong_request(tmp_path_factory: pytest.TempPathFactory, cut: int):
    path = trace(tmp_path_factory.mktemp("cut"), *(line(k) for k in range(8)))
    whole = read_trace_v2([path]).requests
    path.write_bytes(path.read_bytes()[:cut])
    try:
        found = read_trace_v2([path]).requests
    except InputError:
        return
    # The last column is a text, which may be cut unseen; nothing that is read may.
    assert found.equals(whole.iloc[: len(found)])


# ITL.


def test_chunks_and_bad_ones(tmp_path: Path):
    path = tmp_path / "i.csv"
    path.write_text("request_id,chunk_index,timestamp_us\n0,1,300\n0,0,200\n1,0,250\n1,1,240\n0,2,x\n0,1,300\n1,2\n1,-1,5\n")
    found = read_itl([path])
    assert found.chunks.to_numpy().tolist() == [["request_0", 0, 200_000], ["request_0", 1, 300_000], ["request_1", 0, 250_000]]
    assert sorted(found.rejections.lines()) == [
        "1 set aside: a chunk before the one before it: a clock jump (line 5, request_1 chunk 1)",
        "1 set aside: another number of fields than 3 (line 8)",
        "1 set aside: chunk_index is negative (line 9)",
        "1 set aside: the chunk occurs before (line 7, request_0 chunk 1)",
        "1 set aside: timestamp_us is not a whole number (line 6)",
    ]
    path.write_text("request_id,chunk,timestamp_us\n0,1,300\n")
    with pytest.raises(InputError, match=r"line 1 is 'request_id,chunk,timestamp_us'; an ITL file begins with"):
        read_itl([path])


@given(st.integers(1, 200))
def test_chunks_cut_anywhere_are_never_wrong(tmp_path_factory: pytest.TempPathFactory, cut: int):
    path = tmp_path_factory.mktemp("cut") / "i.csv"
    path.write_text(
        "request_id,chunk_index,timestamp_us\n" + "".join(f"{r},{c},{1000 * c + r}\n" for r in range(4) for c in range(4))
    )
    whole = read_itl([path]).chunks.to_numpy().tolist()
    path.write_bytes(path.read_bytes()[:cut])
    try:
        found = read_itl([path])
    except InputError:
        return
    assert found.chunks.to_numpy().tolist() == whole[: len(found.chunks)]
    assert len(found.rejections) == (0 if path.read_bytes().endswith(b"\n") else 1)


# JSON.


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ttft_ms": -1}, "ttft_ms is negative"),
        ({"ttft_ms": 900, "e2e_ms": 800}, "ttft_ms is above e2e_ms"),
        ({"num_prefill_tokens": 0}, "num_prefill_tokens is below 1"),
        ({"arrived_at": "soon"}, "arrived_at is not a number"),
        ({"requestID": "request_0"}, "the request occurs before"),
    ],
)
def test_bad_metrics_are_named_and_the_others_read(tmp_path: Path, change: dict, reason: str):
    good = {
        "arrived_at": 0.5,
        "num_prefill_tokens": 9,
        "num_decode_tokens": 4,
        "ttft_ms": 20.0,
        "e2e_ms": 80.0,
        "scheduling_delay_ms": 1.0,
    }
    requests = [good | {"requestID": f"request_{k}"} for k in range(3)]
    requests[1] |= change
    data = {"completed_requests": 3, "injected_requests": 5, "still_queued": 2, "requests": requests}
    (tmp_path / "m.json").write_text(json.dumps(data))
    found = read_metrics([tmp_path / "m.json"])
    assert found.requests["request_id"].tolist() == ["request_0", "request_2"]
    assert found.rejections.lines()[0] == f"1 set aside: {reason} (request {requests[1]['requestID']})"
    assert found.notes == ("3 of 5 injected requests were completed (still_queued 2): the rest is not in this file",)


def test_json_that_is_cut_short_or_something_else(tmp_path: Path, shared_data: Path):
    path = tmp_path / "r.json"
    text = (shared_data / "blis_runs" / A / "replay_true.results.json").read_text()
    path.write_text(text[:500])
    with pytest.raises(InputError, match=r"line \d+: not JSON.*cut short"):
        read_results([path])
    path.write_text('{"metrics": {"e2e": {"request_level": {"mape": 0.1}}}}')
    with pytest.raises(InputError, match=r"metrics.e2e: workload_level or request_level is missing"):
        read_calibrate_report(path)
    path.write_text('{"metrics": {}}')
    with pytest.raises(InputError, match=r"holds metrics of ttft, e2e, itl; found an object with metrics"):
        read_calibrate_report(path)
    path.write_text("[]")
    with pytest.raises(InputError, match=r"metrics of a run hold requests; found a list"):
        read_metrics([path])
    with pytest.raises(MissingInputError):
        read_metrics([tmp_path / "none.json"])
