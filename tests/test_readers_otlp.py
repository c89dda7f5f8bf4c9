"""OTLP as JSON lines: worked by hand, damaged in every way, and as a round trip of any journeys."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recording_writers import attribute, open_run, otlp_line

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError, MissingInputError
from hfdtl_bayes.sample import TARGET, sample_store_path
from hfdtl_bayes.traces import TraceStore
from hfdtl_bayes.traces.readers import assemble, read_otlp
from hfdtl_bayes.traces.readers.journeys import known_names
from hfdtl_bayes.traces.readers.lines import text_lines
from hfdtl_bayes.traces.readers.recording import UNKNOWN

SAMPLE = TraceStore(sample_store_path()).configuration(TARGET)


def with_knobs(**knobs: object) -> ServingConfiguration:
    return SAMPLE.model_copy(update={"engine": SAMPLE.engine.model_copy(update=knobs)})


ROOMY = with_knobs(max_num_seqs=8, max_num_batched_tokens=64, kv_capacity_tokens=16_000.0, prefix_caching=False)


def event(name: str, at_ns: int, step: int, done: int = 0, prompt: int = 10, output: int = 0, **more: object) -> tuple[str, dict]:
    values: dict[str, object] = {
        "ts.monotonic": at_ns / 1e9,
        "ts.monotonic_ns": at_ns,
        "scheduler.step": step,
        "prefill.done_tokens": done,
        "prefill.total_tokens": prompt,
        "decode.done_tokens": output,
        "decode.max_tokens": 64,
        "num_preemptions": 0,
    }
    return f"journey.{name}", values | {k.replace("__", "."): v for k, v in more.items()}


def core_line(request: str, *events: tuple[str, dict]) -> str:
    return otlp_line("vllm.scheduler", "llm_core", list(events), gen_ai__request__id=request)


def api_line(request: str, arrived_s: float, departed_s: float | None = None, **more: object) -> str:
    events = [("api.ARRIVED", {"event.ts.monotonic": arrived_s})]
    events += [("api.DEPARTED", {"event.ts.monotonic": departed_s})] if departed_s is not None else []
    return otlp_line("vllm.api", "llm_request", events, gen_ai__request__id=request, **more)


def step_line(
    step: int, start_ns: int, duration_us: int, prefill: tuple[int, int], decode: tuple[int, int], **more: object
) -> str:
    """One BATCH_SUMMARY; prefill and decode are tokens and requests."""
    values = {
        "step.id": step, "step.ts_start_ns": start_ns, "step.ts_end_ns": start_ns + duration_us * 1000, "step.duration_us": duration_us,
        "queue.running_depth": prefill[1] + decode[1], "queue.waiting_depth": 0, "batch.num_prefill_reqs": prefill[1],
        "batch.num_decode_reqs": decode[1], "batch.scheduled_tokens": prefill[0] + decode[0], "batch.prefill_tokens": prefill[0],
        "batch.decode_tokens": decode[0], "batch.num_finished": 0, "batch.num_preempted": 0, "kv.usage_gpu_ratio": 0.25,
        "kv.blocks_total_gpu": 100, "kv.blocks_free_gpu": 75,
    }  # fmt: skip
    return otlp_line("vllm.scheduler.step", "scheduler_steps", [("step.BATCH_SUMMARY", values | more)])


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def journey(
    request: str,
    queued: int,
    scheduled: tuple[int, int],
    token: tuple[int, int],
    finished: tuple[int, int],
    prompt: int,
    output: int,
) -> str:
    """A request that was never preempted."""
    return core_line(
        request,
        event("QUEUED", queued, scheduled[0] - 1, prompt=prompt),
        event("SCHEDULED", scheduled[1], scheduled[0], prompt=prompt, schedule__kind="FIRST"),
        event("FIRST_TOKEN", token[1], token[0], done=prompt, prompt=prompt, output=1),
        event("FINISHED", finished[1], finished[0], done=prompt, prompt=prompt, output=output, finish__status="length"),
    )  # fmt: skip


# Worked by hand.


def test_times_ids_and_counts_of_one_request(tmp_path: Path):
    lines = [
        journey("cmpl-1-0-ab12", 1_500_000_000, (1, 1_500_000_001), (1, 1_600_000_000), (3, 1_800_000_000), 10, 3),
        api_line("cmpl-1", 1.25, 1.9, gen_ai__request__model=SAMPLE.llm.name),
    ]
    found = read_otlp([written(tmp_path / "a.json", *lines)])
    (row,) = found.requests.to_dict("records")
    assert row == {
        "request_id": "cmpl-1", "arrival_ns": 1_250_000_000, "queued_ns": 1_500_000_000, "scheduled_ns": 1_500_000_001,
        "first_token_ns": 1_600_000_000, "finished_ns": 1_800_000_000, "prompt_tokens": 10, "output_tokens": 3, "cached_tokens": 0,
        "preemptions": 0, "regime": "",
    }  # fmt: skip
    assert found.episodes.to_dict("records") == [
        {
            "request_id": "cmpl-1",
            "first_step": 1,
            "token_step": 1,
            "last_step": 3,
            "prefill_tokens": 10,
            "computed_before": 0,
            "held_tokens": 10,
        }
    ]
    assert list(found.claims.models) == [SAMPLE.llm.name]
    assert len(found.rejections) == 0


def test_seconds_serve_where_there_are_no_nanoseconds_and_numbers_may_be_numbers(tmp_path: Path):
    line = journey("r", 1_500_000_000, (1, 1_500_000_000), (1, 1_600_000_000), (1, 1_600_000_000), 10, 1)
    data = json.loads(line)
    for e in data["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["events"]:
        e["attributes"] = [a for a in e["attributes"] if a["key"] != "ts.monotonic_ns"]
        for a in e["attributes"]:
            if "intValue" in a["value"]:
                a["value"] = {"intValue": int(a["value"]["intValue"])}
    plain = read_otlp([written(tmp_path / "a.json", line)])
    other = read_otlp([written(tmp_path / "b.json", json.dumps(data))])
    assert other.requests.equals(plain.requests)


def test_longest_known_name_and_only_where_it_stands_for_one():
    assert known_names(["a-1-0-x", "a-0-x", "b-0-x", "c-0-y", "c-1-y"], ["a", "a-1", "c"]) == {"a-1-0-x": "a-1", "a-0-x": "a"}


def test_preemption_and_resume(tmp_path: Path):
    # Steps 1-2: A and B prefill (6 and 4) and decode; B is preempted in step 4 with three tokens and resumed in step 6.
    # It computes 4 + 3 tokens anew, which brings its fourth in step 6; it finishes with five in step 7.
    ms = 20_000_000
    a = journey("a", 0, (1, 0), (1, ms), (6, 6 * ms), 6, 6)
    b = core_line(
        "b",
        event("QUEUED", 0, 0, prompt=4),
        event("SCHEDULED", 0, 1, prompt=4, schedule__kind="FIRST"),
        event("FIRST_TOKEN", ms, 1, done=4, prompt=4, output=1),
        event("PREEMPTED", 3 * ms, 4, done=4, prompt=4, output=3, num_preemptions=1),
        event("SCHEDULED", 5 * ms, 6, done=4, prompt=4, output=3, schedule__kind="RESUME"),
        event("FINISHED", 7 * ms, 7, done=4, prompt=4, output=5),
    )
    # vLLM's summary calls the recomputed prompt of step 6 decode, since B has output.
    batches = [
        ((10, 2), (0, 0)),
        ((0, 0), (2, 2)),
        ((0, 0), (2, 2)),
        ((0, 0), (1, 1)),
        ((0, 0), (1, 1)),
        ((0, 0), (8, 2)),
        ((0, 0), (1, 1)),
    ]
    steps = [step_line(k + 1, k * ms, 20_000, *batch) for k, batch in enumerate(batches)]
    found = read_otlp([written(tmp_path / "a.json", a, b, *steps)])
    assert found.requests.set_index("request_id")["preemptions"].to_dict() == {"a": 0, "b": 1}
    stays = found.episodes[found.episodes["request_id"] == "b"].to_numpy()[:, 1:].tolist()
    assert stays == [[1, 1, 3, 4, 0, 4], [6, 6, 7, 7, 0, 7]]
    out = assemble([found], ROOMY)
    assert out.steps is not None
    columns = [
        "prefill_tokens",
        "prefill_requests",
        "decode_tokens",
        "decode_requests",
        "context_tokens",
        "prefill_attention_tokens",
    ]
    assert out.steps[columns].to_numpy().tolist() == [
        [10, 2, 0, 0, 0, 6 * 3 + 4 * 2],
        [0, 0, 2, 2, 6 + 4, 0],
        [0, 0, 2, 2, 7 + 5, 0],
        [0, 0, 1, 1, 8, 0],
        [0, 0, 1, 1, 9, 0],
        [7, 1, 1, 1, 10, 7 * 3.5],
        [0, 0, 1, 1, 7, 0],
    ]
    assert any("counted as decode" in note for note in out.notes)


@pytest.mark.parametrize("after", [0, 1])
def test_snapshots_give_the_composition_whether_they_count_the_step_or_not(tmp_path: Path, after: int):
    def snapshot(request: str, tokens: int, computed: int, prompt: int, output: int) -> tuple[str, dict]:
        return "step.REQUEST_SNAPSHOT", {
            "step.id": 7, "request.id": request, "request.phase": "DECODE" if output else "PREFILL", "request.num_prompt_tokens": prompt,
            "request.num_computed_tokens": computed + after * tokens, "request.num_output_tokens": output, "request.num_preemptions": 0,
            "request.scheduled_tokens_this_step": tokens,
        }  # fmt: skip

    snapshots = [snapshot("p", 8, 16, 30, 0), snapshot("d", 1, 12, 10, 3), snapshot("e", 1, 20, 20, 1)]
    lines = [step_line(7, 0, 20_000, (8, 1), (2, 2)), otlp_line("vllm.scheduler.step", "scheduler_steps", snapshots)]
    row = read_otlp([written(tmp_path / "a.json", *lines)]).steps.iloc[0]
    assert row["context_tokens"] == 12 + 20
    assert row["prefill_attention_tokens"] == 8 * (16 + 4)
    assert row["prompt_attention_tokens"] == 8 * (30 + 4)


def test_stock_spans_become_requests(tmp_path: Path):
    own = {
        "gen_ai.request.id": "s", "gen_ai.latency.e2e": 2.0, "gen_ai.latency.time_to_first_token": 0.5, "gen_ai.latency.time_in_queue": 0.125,
        "gen_ai.latency.time_in_model_prefill": 0.25, "gen_ai.usage.prompt_tokens": 12, "gen_ai.usage.completion_tokens": 5,
    }  # fmt: skip
    data = json.loads(otlp_line("vllm", "llm_request", []))
    span = data["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    span |= {"startTimeUnixNano": "1700000000000000000", "attributes": [attribute(k, v) for k, v in own.items()]}
    (row,) = read_otlp([written(tmp_path / "a.json", json.dumps(data))]).requests.to_dict("records")
    t = 1_700_000_000_000_000_000
    assert [row[c] - t for c in ("arrival_ns", "queued_ns", "scheduled_ns", "first_token_ns", "finished_ns")] == [
        0, 125_000_000, 250_000_000, 500_000_000, 2_000_000_000,
    ]  # fmt: skip


# Bad input: each named by line or request, the rest read.

GOOD = journey("good", 0, (1, 0), (1, 20_000_000), (2, 40_000_000), 10, 2)


@pytest.mark.parametrize(
    ("line", "reason", "place"),
    [
        (GOOD[:200], "not an OTLP object: cut short", "line 2"),
        ('{"resourceSpans": 7}', "not an OTLP object", "line 2"),
        ("not json at all", "not an OTLP object", "line 2"),
        (step_line(1, 5_000, 3, (1, 1), (0, 0), **{"step.ts_end_ns": 4_999}), "step.ts_end_ns is before step.ts_start_ns", "step 1"),
        (step_line(1, -5, 3, (1, 1), (0, 0)), "step.ts_start_ns is negative", "step 1"),
        (step_line(1, 5_000, 3, (1, 1), (0, 0), **{"step.duration_us": -7}), "step.duration_us is negative", "step 1"),
        (step_line(1, 5_000, 3, (1, 1), (0, 0), **{"batch.prefill_tokens": "many"}), "batch.prefill_tokens is not a whole number", "step 1"),
        (step_line(1, 5_000, 3, (1, 1), (0, 0), **{"kv.usage_gpu_ratio": 25.0}), "kv.usage_gpu_ratio is not between 0 and 1", "step 1"),
        (
            core_line("r", event("QUEUED", 9, 0), event("SCHEDULED", 19, 1), event("FINISHED", 29, 1, output=-1)),
            "decode.done_tokens is negative",
            "request r FINISHED",
        ),
        (core_line("r", event("QUEUED", 9, 0)), "no SCHEDULED", "request r"),
        (core_line("r", event("SCHEDULED", 9, 1), event("FINISHED", 10, 1)), "no QUEUED", "request r"),
        (core_line("r", event("QUEUED", 9, 0), event("FIRST_TOKEN", 10, 1)), "FIRST_TOKEN of a request that is not scheduled", "request r"),
        (
            core_line("r", event("QUEUED", 9_000_000_000, 0), event("SCHEDULED", 5, 1), event("FINISHED", 9_100_000_000, 2, output=1)),
            "SCHEDULED is stamped before the event before it: a clock jump",
            "request r",
        ),
        (core_line("r", event("QUEUED", 9, 0), event("QUEUED", 10, 0)), "QUEUED occurs twice at different times", "request r"),
        (api_line("lonely", 3.0), "at the API only", "request lonely"),
    ],
    ids=range(15),
)  # fmt: skip
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, line: str, reason: str, place: str):
    other = GOOD.replace("good", "other")
    found = read_otlp([written(tmp_path / "a.json", GOOD, line, other)])
    assert {"good", "other"} <= set(found.requests["request_id"]) <= {"good", "other", "r"}
    (shown,) = found.rejections.lines()
    assert shown.startswith(f"1 set aside: {reason}")
    assert "line 2" in shown
    assert place in shown
    assert found.rejections.frame()["file"].tolist() == [str(tmp_path / "a.json")]


def test_two_lines_written_into_each_other_give_the_whole_one(tmp_path: Path):
    other = GOOD.replace("good", "other")
    found = read_otlp([written(tmp_path / "a.json", GOOD[:150] + other, GOOD.replace("good", "third"))])
    assert found.requests["request_id"].tolist() == ["other", "third"]
    assert len(found.rejections) == 1
    glued = read_otlp([written(tmp_path / "b.json", GOOD + other)])
    assert (glued.requests["request_id"].tolist(), len(glued.rejections)) == (["good", "other"], 0)


def test_an_object_that_turns_out_wrong_is_read_once(tmp_path: Path):
    data = json.loads(GOOD)
    data["resourceSpans"].append({"scopeSpans": [{"name": "no spans"}]})
    found = read_otlp([written(tmp_path / "a.json", json.dumps(data), step_line(1, 0, 20_000, (10, 1), (0, 0)))])
    assert found.requests["request_id"].tolist() == ["good"]
    assert found.rejections.lines() == ["1 set aside: not an OTLP object (KeyError: 'spans') (line 1)"]


def test_a_request_without_an_end_is_kept_and_named(tmp_path: Path):
    cut = core_line("cut", event("QUEUED", 0, 0), event("SCHEDULED", 0, 1), event("FIRST_TOKEN", 20_000_000, 1, output=1))
    found = read_otlp([written(tmp_path / "a.json", GOOD, cut)])
    assert found.requests.set_index("request_id").loc["cut", "finished_ns"] == UNKNOWN
    assert any("without an end" in n and "cut" in n for n in found.notes)


def test_no_file_nothing_in_it_and_nothing_of_use(tmp_path: Path):
    with pytest.raises(MissingInputError, match="no trace file"):
        read_otlp([tmp_path / "none.json"])
    (tmp_path / "empty.json").write_bytes(b"")
    with pytest.raises(InputError, match=r"empty \(0 bytes\)"):
        read_otlp([tmp_path / "empty.json"])
    with pytest.raises(InputError, match=r"no step and no request holds"):
        read_otlp([written(tmp_path / "other.json", otlp_line("other", "span", [("else", {})]))])


def test_one_export_twice_is_one_and_two_engines_are_refused(tmp_path: Path):
    steps = [step_line(k, k * 20_000_000, 20_000, (0, 0), (1, 1)) for k in range(1, 11)]
    twice = read_otlp([written(tmp_path / "a.json", *steps, steps[3])])
    assert len(twice.steps) == 10
    assert "exported twice" in twice.rejections.lines()[0]
    others = [step_line(k, 7 + k * 30_000_000, 30_000, (0, 0), (2, 2)) for k in range(1, 11)]
    with pytest.raises(InputError, match=r"several engines, or one that was restarted.*\n.*step 1\b"):
        read_otlp([written(tmp_path / "b.json", *steps, *others)])


# Properties.

PIECES = [
    journey(f"r{i}", i * 10**6, (i + 1, i * 2 * 10**7 + 1), (i + 1, i * 2 * 10**7 + 9), (i + 3, i * 2 * 10**7 + 40), 5 + i, 3)
    for i in range(4)
]
PIECES += [step_line(k, k * 20_000_000, 20_000, (5, 1), (0, 0)) for k in range(1, 5)]
WHOLE = ("\n".join(PIECES) + "\n").encode()


@given(st.integers(1, len(WHOLE)), st.booleans())
def test_a_file_cut_anywhere_gives_the_lines_before_the_cut(tmp_path_factory: pytest.TempPathFactory, cut: int, packed: bool):
    path = tmp_path_factory.mktemp("cut") / "a.json"
    path.write_bytes(gzip.compress(WHOLE[:cut]) if packed else WHOLE[:cut])
    # A last line that lacks only its end is whole.
    whole = sum(1 for end in itertools.accumulate(len(p) + 1 for p in PIECES) if end - 1 <= cut)
    if not whole:
        with pytest.raises(InputError, match="no step and no request holds"):
            read_otlp([path])
        return
    found = read_otlp([path])
    assert len(found.requests) + len(found.steps) == whole
    assert len(found.rejections) == (
        0 if WHOLE[:cut].rstrip(b"\n") in (b"\n".join(p.encode() for p in PIECES[:k]) for k in range(9)) else 1
    )


@given(st.integers(20, 10_000))
@settings(max_examples=20)
def test_a_gzip_file_cut_anywhere_gives_what_it_holds(tmp_path_factory: pytest.TempPathFactory, cut: int):
    rng = np.random.default_rng(1)
    # Text that does not pack well, so that the file has something to cut.
    lines = [p.replace('"llm_core"', f'"llm_core{rng.bytes(500).hex()}"') for p in PIECES]
    packed = gzip.compress("\n".join(lines).encode(), mtime=0)
    cut = min(cut, len(packed) - 1)
    path = tmp_path_factory.mktemp("cut") / "a.json.gz"
    path.write_bytes(packed[:cut])
    # Less than a line of the first block is no line.
    with contextlib.suppress(InputError):
        assert any("cut short" in line for line in read_otlp([path]).rejections.lines())
    with pytest.raises(InputError, match="cut short"):
        list(text_lines(path))


@given(st.permutations(range(len(PIECES))), st.integers(0, len(PIECES)))
def test_order_of_lines_and_parts_does_not_matter(tmp_path_factory: pytest.TempPathFactory, order: list[int], split: int):
    folder = tmp_path_factory.mktemp("order")
    plain = read_otlp([written(folder / "whole.json", *PIECES)])
    shuffled = [PIECES[i] for i in order]
    files = [written(folder / f"{k}.json", *part) for k, part in enumerate((shuffled[:split], shuffled[split:])) if part]
    found = read_otlp(files)
    assert found.steps.equals(plain.steps)
    own = found.requests.sort_values("request_id", ignore_index=True)
    assert own.equals(plain.requests.sort_values("request_id", ignore_index=True))


@given(
    st.lists(
        st.tuples(st.integers(1, 500), st.integers(1, 40), *[st.integers(0, 10**9)] * 4),
        min_size=1, max_size=6,
    )
)  # fmt: skip
def test_round_trip_of_any_journeys_with_their_events_in_lines_of_their_own(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple]
):
    lines, expected = [], {}
    for i, (prompt, output, *waits) in enumerate(drawn):
        queued, scheduled, token, finished = np.cumsum(waits).tolist()
        expected[f"r{i}"] = (queued, scheduled, token, finished, prompt, output)
        events = [
            event("QUEUED", queued, 3, prompt=prompt),
            event("SCHEDULED", scheduled, 4, prompt=prompt),
            event("FIRST_TOKEN", token, 4, done=prompt, prompt=prompt, output=1),
            event("FINISHED", finished, 3 + output, done=prompt, prompt=prompt, output=output),
        ]
        lines.append([core_line(f"r{i}", e) for e in events])
    # Events of all requests interleaved: all QUEUED, then all SCHEDULED, ...
    mixed = [line for kind in zip(*lines, strict=True) for line in kind]
    found = read_otlp([written(tmp_path_factory.mktemp("trip") / "a.json", *mixed)])
    columns = ["queued_ns", "scheduled_ns", "first_token_ns", "finished_ns", "prompt_tokens", "output_tokens"]
    assert {r["request_id"]: tuple(r[c] for c in columns) for r in found.requests.to_dict("records")} == expected


# Recorded.


def test_journeys_alone_give_the_steps_they_are_stamped_in(shared_data: Path, tmp_path: Path):
    run = open_run(shared_data / "blis_runs" / "A_llama-3.1-8b-instruct_H100_tp1")
    with gzip.open(run.folder / "noisy.traces.json.gz", "rt") as file:
        lines = [line.rstrip("\n") for line in file]
    whole = assemble([read_otlp([written(tmp_path / "all.json", *lines)])], run.configuration).steps
    alone = assemble(
        [read_otlp([written(tmp_path / "alone.json", *(x for x in lines if "BATCH_SUMMARY" not in x))])], run.configuration
    ).steps
    assert alone is not None
    assert whole is not None
    # 300 first tokens and 300 ends, of 6018 steps; those between whose neighbours are stamped too have a time.
    assert 250 < len(alone) < 600
    columns = ["prefill_tokens", "decode_tokens", "context_tokens", "prefill_attention_tokens", "step_time_s"]
    same = whole.set_index("step_id").loc[alone["step_id"], columns]
    assert np.array_equal(alone[columns].to_numpy(), same.to_numpy())


def test_sampled_steps_use_the_consecutive_ones(shared_data: Path, tmp_path: Path):
    run = open_run(shared_data / "blis_runs" / "A_llama-3.1-8b-instruct_H100_tp1")
    with gzip.open(run.folder / "noisy.traces.json.gz", "rt") as file:
        steps = [line.rstrip("\n") for line in file if "BATCH_SUMMARY" in line]
    kept = np.random.default_rng(0).random(len(steps)) < 0.1
    # The scheduler's own time in place of the step's, as vLLM's tracing writes it.
    lines = [line for line, k in zip(steps, kept, strict=True) if k]
    lines = [_with_duration(line, 700) for line in lines]
    found = assemble([read_otlp([written(tmp_path / "a.json", *lines)])], run.configuration)
    assert found.steps is not None
    raw = run.steps()
    row = np.flatnonzero(kept)
    pairs = [i for i, j in itertools.pairwise(row) if j == i + 1 and raw["num_decode_reqs"].iloc[j] > 0]
    assert found.steps["step_id"].tolist() == (np.array(pairs) + 1).tolist()
    assert np.rint(found.steps["step_time_s"] * 1e6).tolist() == raw["duration_us"].iloc[pairs].tolist()
    assert any("below the time to read the weights" in n and "scheduler's work" in n for n in found.notes)
    # No two consecutive: nothing is left, and the reason is the duration.
    with pytest.raises(
        InputError, match=r"step.duration_us is not the step's time.*below the time to read the weights once .* ms on H100"
    ):
        assemble([read_otlp([written(tmp_path / "b.json", *(_with_duration(x, 700) for x in steps[::2]))])], run.configuration)


def test_a_sample_of_steps_or_of_journeys_gives_what_it_holds(shared_data: Path, tmp_path: Path):
    run = open_run(shared_data / "blis_runs" / "B_llama-3.1-70b-instruct_A100-80_tp4")
    with gzip.open(run.folder / "noisy.traces.json.gz", "rt") as file:
        lines = [line.rstrip("\n") for line in file]
    rng = np.random.default_rng(0)
    raw = run.steps().set_index("step_id")
    steps = [x for x in lines if "BATCH_SUMMARY" not in x or rng.random() < 0.3]
    some = assemble([read_otlp([written(tmp_path / "steps.json", *steps)])], run.configuration).steps
    assert some is not None
    assert 3_000 < len(some) < 4_200
    same = raw.loc[some["step_id"]]
    assert some["context_tokens"].tolist() == same["sum_decode_ctx"].tolist()
    assert some["prompt_attention_tokens"].tolist() == same["sum_prefill_ti_si"].tolist()
    # Of three journeys in ten no batch follows but those that happen to be whole; the queue at queueing does not follow at all.
    journeys = [x for x in lines if "BATCH_SUMMARY" in x or rng.random() < 0.3]
    few = assemble([read_otlp([written(tmp_path / "journeys.json", *journeys)])], run.configuration)
    assert few.steps is not None
    assert few.requests is not None
    assert len(few.steps) == len(raw)
    known = few.steps["context_tokens"].notna().to_numpy()
    assert 0 < known.sum() < len(raw) / 4
    assert few.steps["context_tokens"][known].tolist() == raw["sum_decode_ctx"][known].tolist()
    assert "prompt_attention_tokens" not in few.steps.columns
    assert "waiting_requests" not in few.requests.columns
    assert any("do not account for the other batches" in note for note in few.notes)


def _with_duration(line: str, microseconds: int) -> str:
    data = json.loads(line)
    (only,) = data["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["events"]
    for a in only["attributes"]:
        if a["key"] == "step.duration_us":
            a["value"] = {"intValue": str(microseconds)}
    return json.dumps(data)
