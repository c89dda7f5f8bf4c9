"""The replay of continuous batching: worked by hand, against a naive engine, and what must hold of any traffic."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from naive_engine import NaiveEngine, NaiveRequest

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.replay import Batch, Lengths, ReplaySettings, RequestOverheads, Requests, Traffic, generate_requests, replay
from hfdtl_bayes.sample import TARGET, sample_store_path
from hfdtl_bayes.traces import TraceStore, validate_requests, validate_steps

SAMPLE = TraceStore(sample_store_path()).configuration(TARGET)
MATCHED = (
    "prefill_tokens",
    "decode_tokens",
    "prefill_requests",
    "prefill_attention_tokens",
    "context_tokens",
    "waiting_requests",
    "running_requests",
    "kv_usage",
)


def with_knobs(**knobs: object) -> ServingConfiguration:
    return SAMPLE.model_copy(update={"engine": SAMPLE.engine.model_copy(update=knobs)})


ROOMY = with_knobs(
    max_num_seqs=4, max_num_batched_tokens=64, kv_capacity_tokens=16_000.0, prefix_caching=False, chunked_prefill=True
)


def one_second(_batch: Batch) -> float:
    return 1.0


def some_time(batch: Batch) -> float:
    return 0.03 + 1e-3 * batch.prefill_tokens + 1e-4 * batch.decode_tokens + 1e-7 * batch.context_tokens


def requests(arrival: list[float], prompt: list[int], output: list[int], **more: object) -> Requests:
    return Requests(np.array(arrival), np.array(prompt), np.array(output), **more)


# Worked by hand.


def test_two_prompts_share_a_budget_of_four():
    own = with_knobs(
        max_num_seqs=2, max_num_batched_tokens=4, kv_capacity_tokens=320.0, chunked_prefill=True, prefix_caching=False
    )
    run = replay(requests([0, 0], [6, 3], [2, 1]), own, one_second)
    # A: 4 tokens; A: 2, B: 2 of 3; A decodes with 6 tokens before it, B: 1.
    expected = [
        # prefill, decode, requests of each, token pairs, BLIS's pairs, context, waiting, running
        (4, 0, 1, 0, 4 * 2, 4 * (6 + 2), 0, 1, 1),
        (4, 0, 2, 0, 2 * (4 + 1) + 2 * 1, 2 * (6 + 1) + 2 * (3 + 1), 0, 0, 2),
        (1, 1, 1, 1, 1 * (2 + 0.5), 1 * (3 + 0.5), 6, 0, 2),
    ]
    assert run.steps[list(Batch._fields[:-1])].to_numpy().tolist() == [list(map(float, row)) for row in expected]
    # 19 usable blocks: one is reserved; one block for each prompt.
    assert run.steps["kv_usage"].tolist() == pytest.approx([1 / 19, 2 / 19, 2 / 19])
    assert run.requests["scheduled_s"].tolist() == [0, 1]
    assert run.requests["first_token_s"].tolist() == [2, 3]
    assert run.requests["finished_s"].tolist() == [3, 3]
    assert run.busy_s == 3


def test_without_chunked_prefill_a_prompt_waits_for_a_budget_that_holds_it():
    own = with_knobs(max_num_seqs=2, max_num_batched_tokens=8, kv_capacity_tokens=320.0, chunked_prefill=False)
    run = replay(requests([0, 0, 0], [6, 3, 1], [2, 2, 1]), own, one_second)
    # The third would fit beside the first but does not pass the second.
    assert run.steps["prefill_tokens"].tolist() == [6, 3, 1]
    assert run.steps["decode_tokens"].tolist() == [0, 1, 1]
    assert run.requests["scheduled_s"].tolist() == [0, 1, 2]


def test_requests_are_seen_between_steps():
    run = replay(requests([0, 0.25, 0.5], [4, 4, 4], [3, 1, 1]), ROOMY, one_second)
    assert run.requests["queued_s"].tolist() == [0, 1, 1]
    assert run.requests[["waiting_requests", "running_requests"]].to_numpy().tolist() == [[0, 0], [0, 1], [1, 1]]
    # An idle engine sees them at once.
    late = replay(requests([0, 7.25], [4, 4], [1, 1]), ROOMY, one_second)
    assert late.steps["start_s"].tolist() == [0, 7.25]


def test_overheads_are_added_as_blis_does():
    overheads = RequestOverheads(0.5, 0.25, after_finish_s=0.125, per_output_token_s=0.0625)
    run = replay(requests([1], [4], [3]), ROOMY, one_second, settings=ReplaySettings(overheads=overheads))
    assert run.steps["start_s"].tolist() == [2.5, 3.5, 4.5]  # 1 + 0.5 + 4 * 0.25
    assert run.ttft_s.tolist() == [2.5 + 0.0625]
    assert run.e2e_s.tolist() == [4.5 + 3 * 0.0625 + 0.125]
    assert run.itl_s.tolist() == [pytest.approx((2 + 2 * 0.0625 + 0.125) / 2)]


def test_whole_microseconds_are_cut_not_rounded():
    overheads = RequestOverheads(before_queue_s=10.9e-6, per_output_token_s=1.9e-6, after_finish_s=2.9e-6)
    rules = ReplaySettings(whole_microseconds=True, overheads=overheads)
    run = replay(requests([0], [4], [3]), ROOMY, lambda _: 7018.99e-6, settings=rules)
    assert run.steps["step_time_s"].tolist() == pytest.approx([7018e-6] * 3, abs=1e-12)
    assert run.ttft_s.tolist() == pytest.approx([10e-6 + 7018e-6 + 1e-6], abs=1e-12)
    assert run.e2e_s.tolist() == pytest.approx([10e-6 + 3 * 7018e-6 + 3e-6 + 2e-6], abs=1e-12)
    # 0.007018 s * 1e6 is 7017.999...: a whole number of microseconds stays what it is; and a step takes one at least.
    whole = replay(requests([0], [4], [1]), ROOMY, lambda _: 0.007018, settings=rules)
    assert whole.steps["step_time_s"].tolist() == pytest.approx([7018e-6], abs=1e-12)
    short = replay(requests([0], [4], [1]), ROOMY, lambda _: 1e-9, settings=rules)
    assert short.steps["step_time_s"].tolist() == [1e-6]


def test_preempted_request_computes_everything_anew():
    # 4 usable blocks of 4 tokens. A (4 + 8) and B (4 + 8) need 3 each at the end.
    own = with_knobs(
        max_num_seqs=2, max_num_batched_tokens=32, kv_capacity_tokens=20.0, prefix_caching=False, chunked_prefill=True
    )
    run = replay(requests([0, 0], [4, 4], [8, 8]), own, one_second, settings=ReplaySettings(block_tokens=4))
    assert run.requests["preemptions"].tolist() == [0, 1]
    # Step 2 gives each a second block; step 6 finds none for a third: B, which has 5 tokens out, makes room and A ends in step 8.
    # Then B computes 4 + 5 tokens at once, which brings its sixth token, and decodes two more.
    assert run.steps["decode_tokens"].tolist() == [0, 2, 2, 2, 2, 1, 1, 1, 0, 1, 1]
    assert run.steps["prefill_tokens"].tolist() == [8, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0]
    assert run.requests["first_token_s"].tolist() == [1, 1]
    assert run.requests["finished_s"].tolist() == [8, 11]


def test_shared_prefix_is_computed_once_and_held_once():
    own = with_knobs(
        max_num_seqs=4, max_num_batched_tokens=256, kv_capacity_tokens=1616.0, prefix_caching=True, chunked_prefill=True
    )
    shared = {"shared_prefix_tokens": np.array([40, 40, 40])}
    run = replay(requests([0, 0, 9], [50, 60, 50], [2, 2, 1], **shared), own, one_second)
    # Two full blocks of 16 are shared, in the same step already and after all have left.
    assert run.requests["cached_tokens"].tolist() == [0, 32, 32]
    assert run.steps["prefill_tokens"].tolist() == [50 + 28, 0, 18]
    assert run.steps["kv_usage"].tolist() == pytest.approx([6 / 100, 6 / 100, 4 / 100])
    off = replay(
        requests([0, 0, 9], [50, 60, 50], [2, 2, 1], **shared),
        with_knobs(prefix_caching=False, max_num_batched_tokens=256),
        one_second,
    )
    assert off.requests["cached_tokens"].tolist() == [0, 0, 0]


def test_a_prompt_that_is_all_prefix_still_computes_its_last_block():
    own = with_knobs(max_num_batched_tokens=256, kv_capacity_tokens=1616.0, prefix_caching=True, chunked_prefill=True)
    run = replay(requests([0, 5], [32, 32], [1, 1], shared_prefix_tokens=np.array([32, 32])), own, one_second)
    assert run.requests["cached_tokens"].tolist() == [0, 16]
    assert run.steps["prefill_tokens"].tolist() == [32, 16]


def test_recorded_cache_hits_are_taken_as_they_are():
    own = with_knobs(prefix_caching=True, max_num_batched_tokens=256)
    run = replay(requests([0, 0], [50, 48], [2, 2], cached_tokens=np.array([32, 48])), own, one_second)
    # One token at least is computed.
    assert run.steps["prefill_tokens"].tolist() == [18 + 1, 0]
    assert run.requests["cached_tokens"].tolist() == [32, 47]


# Against the rules written down naively.

engines = st.fixed_dictionaries(
    {
        "seqs": st.integers(1, 6),
        "budget": st.integers(6, 40),
        "blocks": st.integers(4, 24),
        "size": st.sampled_from([1, 4, 16]),
        "chunked": st.booleans(),
        "caching": st.booleans(),
        "reserve": st.booleans(),
    }
)


@st.composite
def served(draw):
    engine = draw(engines)
    room = engine["blocks"] * engine["size"]
    most = min(room, engine["budget"]) if not engine["chunked"] else room
    count = draw(st.integers(1, 14))
    prefix = draw(st.integers(0, max(min(most - 2, 40), 0)))
    rows = []
    for _ in range(count):
        shared = prefix if draw(st.booleans()) else 0
        prompt = draw(st.integers(shared + 1, max(most // 2, shared + 1)))
        rows.append((draw(st.integers(0, 30)), prompt, draw(st.integers(1, max(most - prompt + 1, 1))), shared))
    rows.sort(key=lambda row: row[0])
    return engine, rows


def naive(engine: dict, rows: list[tuple[int, int, int, int]]) -> tuple[pd.DataFrame, list[NaiveRequest]]:
    own = NaiveEngine(**engine)
    made = [NaiveRequest(i, prompt, output, shared) for i, (_, prompt, output, shared) in enumerate(rows)]
    coming = list(zip([at for at, *_ in rows], made, strict=True))
    found, clock = [], 0
    while True:
        while coming and coming[0][0] <= clock:
            own.waiting.append(coming.pop(0)[1])
        row = own.step()
        if row is None:
            if not coming:
                return pd.DataFrame(found), made
            clock = coming[0][0]
            continue
        found.append({**row, "start_s": clock})
        clock += 1


@settings(max_examples=300)
@given(served())
def test_equals_the_naive_engine(case):
    engine, rows = case
    own = with_knobs(
        max_num_seqs=engine["seqs"],
        max_num_batched_tokens=engine["budget"],
        kv_capacity_tokens=float((engine["blocks"] + 1) * engine["size"]),
        prefix_caching=engine["caching"],
        chunked_prefill=engine["chunked"],
    )
    arrival, prompt, output, shared = (list(v) for v in zip(*rows, strict=True))
    rules = ReplaySettings(block_tokens=engine["size"], reserve_whole_prompt=engine["reserve"])
    run = replay(requests(arrival, prompt, output, shared_prefix_tokens=np.array(shared)), own, one_second, settings=rules)
    steps, made = naive(engine, rows)
    pd.testing.assert_frame_equal(run.steps[["start_s", *MATCHED]], steps[["start_s", *MATCHED]].astype(float), rtol=1e-12)
    assert run.requests["preemptions"].tolist() == [r.preemptions for r in made]
    assert run.requests["cached_tokens"].tolist() == [r.cached for r in made]


def test_naive_cases_reach_what_they_are_for():
    """The cases above are only worth something if they preempt, cut prompts and find prefixes."""
    quiet = settings(max_examples=2000, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    for reached in (
        lambda case: any(r.preemptions > 1 for r in naive(*case)[1]),
        lambda case: any((r.cached or 0) > 0 and r.preemptions for r in naive(*case)[1]),
    ):
        find(served(), reached, settings=quiet)


# What must hold of any traffic.

lengths = st.one_of(
    st.integers(1, 60).map(Lengths.fixed),
    st.tuples(st.integers(1, 30), st.integers(30, 90)).map(lambda b: Lengths.uniform(*b)),
    st.tuples(st.floats(5, 60), st.floats(0, 1)).map(lambda p: Lengths.lognormal(*p, high=120)),
)


@given(
    prompt=lengths, output=lengths, rate=st.none() | st.floats(1, 200), concurrency=st.integers(1, 12), seed=st.integers(0, 99),
    tight=st.booleans(), chunked=st.booleans(), shared=st.integers(0, 40),
)  # fmt: skip
def test_tokens_are_conserved_and_limits_kept(prompt, output, rate, concurrency, seed, tight, chunked, shared):
    own = with_knobs(
        max_num_seqs=8, max_num_batched_tokens=64 if chunked else 320, kv_capacity_tokens=352.0 if tight else 16_000.0,
        chunked_prefill=chunked, prefix_caching=True,
    )  # fmt: skip
    traffic = Traffic(prompt, output, rate, concurrency, shared_prefix_tokens=shared, num_requests=40)
    run = replay(traffic, own, some_time, seed=seed)
    steps, served = run.steps, run.requests
    given_requests = generate_requests(traffic, seed=seed)
    assert served["prompt_tokens"].tolist() == given_requests.prompt_tokens.tolist()
    assert served["finished_s"].notna().all()
    # Limits.
    tokens = steps["prefill_tokens"] + steps["decode_tokens"]
    assert tokens.min() > 0
    assert tokens.max() <= own.engine.max_num_batched_tokens
    assert steps["running_requests"].max() <= own.engine.max_num_seqs
    assert (steps["prefill_requests"] + steps["decode_requests"] <= steps["running_requests"]).all()
    assert steps["kv_usage"].between(0, 1).all()
    # Every token once, but for what was preempted.
    asked = (served["prompt_tokens"] - served["cached_tokens"]).sum()
    if not served["preemptions"].any():
        assert steps["prefill_tokens"].sum() == asked
        assert steps["decode_tokens"].sum() == (served["output_tokens"] - 1).sum()
    else:
        # A token that follows a preemption comes from computing the prompt anew.
        assert 0 <= (served["output_tokens"] - 1).sum() - steps["decode_tokens"].sum() <= served["preemptions"].sum()
    # First come, first served; the engine is never idle while there is work.
    order = served.sort_values(["queued_s", "request_id"], key=lambda c: c.astype(float), kind="stable")
    assert (np.diff(order["scheduled_s"]) >= 0).all()
    gaps = steps["start_s"].to_numpy()[1:] - (steps["start_s"] + steps["step_time_s"]).to_numpy()[:-1]
    for k in np.flatnonzero(gaps > 1e-12):
        start = steps["start_s"].iloc[k + 1]
        assert ((served["arrival_s"] >= start - 1e-12) | (served["finished_s"] <= start)).all()
    # Never more in flight than the client allows.
    events = np.concatenate([served["arrival_s"], served["finished_s"]])
    change = np.concatenate([np.ones(len(served)), -np.ones(len(served))])
    in_flight = np.cumsum(change[np.lexsort((change, events))])
    assert in_flight.max() <= concurrency
    # Traces like any other.
    assert not len(validate_requests(served, own).rejected)
    assert steps["step_time_s"].to_numpy() == pytest.approx(some_time(steps).to_numpy(), rel=1e-9)


def test_same_seed_same_run_and_another_seed_another():
    traffic = Traffic(Lengths.lognormal(80, 0.6), Lengths.around(40, 0.5), request_rate_per_s=20, num_requests=100)
    first, again, other = (replay(traffic, SAMPLE, some_time, seed=s) for s in (3, 3, 4))
    pd.testing.assert_frame_equal(first.steps, again.steps)
    pd.testing.assert_frame_equal(first.requests, again.requests)
    assert len(first.steps) != len(other.steps)


def test_closed_loop_lasts_as_long_as_asked():
    traffic = Traffic(100, 20, concurrency=6, duration_s=120.0)
    run = replay(traffic, SAMPLE, some_time)
    sent = run.requests["arrival_s"]
    assert sent.max() < 120 <= run.requests["finished_s"].max() + 0.5
    # The same requests in the same order as with their number given; always six in flight until the end.
    counted = replay(replace(traffic, duration_s=None, num_requests=len(sent)), SAMPLE, some_time)
    pd.testing.assert_frame_equal(run.requests, counted.requests)
    assert len(sent) > 6 * 64  # more than were drawn at first


def test_open_loop_sends_until_the_duration_ends():
    traffic = Traffic(100, 20, request_rate_per_s=5, duration_s=60.0)
    run = replay(traffic, SAMPLE, some_time)
    assert run.requests["arrival_s"].max() < 60
    assert abs(len(run.requests) - 300) < 5 * np.sqrt(300)


def test_writes_a_trace_store(tmp_path: Path):
    traffic = Traffic(Lengths.uniform(20, 200), 30, request_rate_per_s=10, num_requests=60, name="chat")
    # Slower than the hardware's floor, as validation demands.
    run = replay(traffic, SAMPLE, some_time)
    run.write(tmp_path)
    store = TraceStore(tmp_path)
    steps, served = store.steps(TARGET), store.requests(TARGET)
    assert len(steps.rejected) == len(served.rejected) == 0
    assert set(steps.frame["regime"]) == set(served.frame["regime"]) == {"chat"}
    pd.testing.assert_series_equal(steps.frame["context_tokens"], run.steps["context_tokens"])
    assert not steps.derived
    with pytest.raises(InputError, match="exists already"):
        run.write(tmp_path)
    assert validate_steps(run.steps, SAMPLE).frame.equals(steps.frame)


# Bad input.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: requests([], [], []), "no requests to replay"),
        (lambda: requests([0, 1], [5], [1, 1]), "prompt_tokens has 1 values for 2 requests"),
        (lambda: requests([0], [0], [1]), "request 0: prompt_tokens is 0; accepted are whole numbers from 1"),
        (lambda: requests([0, 1], [5, 5], [1, 2.5]), "request 1: output_tokens is 2.5"),
        (lambda: requests([0], [5], [np.nan]), "request 0: output_tokens is nan"),
        (lambda: requests([0, np.inf], [5, 5], [1, 1]), "request 1: arrival_s is inf"),
        (lambda: requests([2, 1], [5, 5], [1, 1]), "request 1 arrives at 1 s, before request 0 at 2 s; sort"),
        (lambda: requests([0], [5], [1], shared_prefix_tokens=[6]), "shared_prefix_tokens is 6, more than its prompt of 5"),
        (lambda: requests([0], [5], [1], cached_tokens=[-2]), "cached_tokens is -2"),
        (lambda: requests([0, 0], [5, 5], [1, 1], shared_prefix_tokens=[2, 3]), "prefix_group 0 has shared prefixes of 2 lengths"),
        (lambda: requests([0, 0], [5, 5], [1, 1], request_id=["a", "a"]), "request_id 'a' occurs more than once"),
        (lambda: requests([0], [5], [1], concurrency=0), "concurrency is 0"),
        (lambda: requests(["soon"], [5], [1]), "arrival_s of the requests is not a list of numbers"),
        (lambda: Requests.from_frame(pd.DataFrame({"arrival_s": [0.0]})), "need the column.s. prompt_tokens, output_tokens; found arrival_s"),
        (lambda: Traffic(5, 5, num_requests=3), "needs request_rate_per_s .* or concurrency"),
        (lambda: Traffic(5, 5, 1.0), "after duration_s or after num_requests"),
        (lambda: Traffic(5, 5, -1.0, num_requests=3), "request_rate_per_s is -1.0"),
        (lambda: Traffic(5, 5, 1e9, duration_s=1e9), "at most 1e.07 are replayed"),
        (lambda: Traffic(5.5, 5, 1.0, num_requests=3), "low of fixed lengths is 5.5 tokens"),
        (lambda: Traffic(5, 5, 1.0, concurrency=2.5, num_requests=3), "concurrency is 2.5"),
        (lambda: Lengths.uniform(9, 3), "from 9 to 3 tokens are no range"),
        (lambda: Lengths.lognormal(0, 1), "median is to be positive"),
        (lambda: Lengths.around(10, 1.0), "range ratio is 1"),
        (lambda: generate_requests(Traffic(5, 5, concurrency=2, duration_s=3.0)), "depends on the engine"),
        (lambda: generate_requests(Traffic(5, 5, 1e-9, duration_s=1e-3)), "no request arrives within 0.001 s"),
        (lambda: RequestOverheads(before_queue_s=-1), "before_queue_s of the request overheads is -1"),
        (lambda: ReplaySettings(block_tokens=0), "block_tokens is 0"),
        (lambda: replay(requests([0], [5], [1]), with_knobs(max_num_seqs=9, max_num_batched_tokens=8), one_second), "which vLLM refuses"),
        (lambda: replay(requests([0], [5], [1]), with_knobs(kv_capacity_tokens=16.0), one_second), "holds no block of 16 tokens"),
        (lambda: replay(requests([0, 1], [5, 50], [1, 9]), with_knobs(kv_capacity_tokens=64.0), one_second), "'1' comes to 58 tokens"),
        (
            lambda: replay(requests([0], [50], [9]), with_knobs(chunked_prefill=False, max_num_batched_tokens=56), one_second),
            r"max_num_batched_tokens \(56\) must hold it whole",
        ),
        (lambda: replay(requests([0], [5], [1]), ROOMY, lambda _: float("nan")), "step time of step 1 is nan s"),
        (lambda: replay(requests([0], [5], [1]), ROOMY, lambda _: 0.0), "step time of step 1 is 0.0 s"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_requests_cannot_be_changed_behind_the_back_of_their_checks():
    given_prompts = np.array([5, 6])
    made = requests([0, 0], given_prompts, [1, 1])
    given_prompts[0] = -1
    assert made.prompt_tokens.tolist() == [5, 6]
    with pytest.raises(ValueError, match="read-only"):
        made.prompt_tokens[0] = 7


def test_first_requests_do_not_depend_on_how_many_are_drawn():
    traffic = Traffic(Lengths.lognormal(80, 0.6), Lengths.uniform(5, 50), request_rate_per_s=2, num_requests=500)
    many, few = generate_requests(traffic, seed=7), generate_requests(traffic, seed=7, num_requests=40)
    for name in ("arrival_s", "prompt_tokens", "output_tokens"):
        assert getattr(many, name)[:40].tolist() == getattr(few, name).tolist()


def test_traffic_has_the_distributions_it_states():
    traffic = Traffic(
        Lengths.lognormal(200, 0.5), Lengths.around(100, 0.3), request_rate_per_s=4, num_requests=40_000, shared_prefix_tokens=64
    )
    drawn = generate_requests(traffic, seed=1)
    log = np.log(drawn.prompt_tokens - 64)
    assert abs(log.mean() - np.log(200)) < 4 * 0.5 / np.sqrt(40_000) + 1e-3  # rounding to whole tokens
    assert abs(log.std() - 0.5) < 0.01
    assert set(drawn.output_tokens) == set(range(70, 131))
    gaps = np.diff(drawn.arrival_s)
    assert abs(gaps.mean() * 4 - 1) < 4 / np.sqrt(40_000)
    assert abs(gaps.std() * 4 - 1) < 0.05
    assert json.dumps(sorted(set(drawn.regime))) == '["traffic"]'
