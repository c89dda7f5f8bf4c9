"""Statistics straight from Parquet: those of the rows, whatever the parts, their order and the number of workers."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import THREE, TINY, tiny_features

import hfdtl_bayes.traces.parts as parts_module
from hfdtl_bayes.errors import InputError, MissingInputError, StatisticsError
from hfdtl_bayes.features import Feature, Level, PriorRange, feature_set
from hfdtl_bayes.sample import TARGET, sample_store_path
from hfdtl_bayes.statistics import ConfigStatistics, RowScaling, statistics_from_parquet, statistics_from_rows
from hfdtl_bayes.traces import STEP_SCHEMA, TraceStore, drop_warmup, open_parts, read_steps, validate_steps

ONE = THREE[0]
SCALING = RowScaling(np.array([1.1, 0.9, 1.4]), 1e-3)
ROBUST = replace(SCALING, cutoff=3.0, row_sd=0.05, block_sd=0.05)


def recording(seed: int, count: int, regimes: int = 1, gaps: bool = False) -> pd.DataFrame:
    """Valid steps of `ONE`, with outliers, regimes in stretches, and perhaps gaps in their numbers."""
    rng = np.random.default_rng(seed)
    prefill = rng.integers(0, 800, count) * (rng.random(count) < 0.6)
    decode = rng.integers(1, 60, count)
    mean = 2e-5 * prefill + 1e-4 * decode + 7e-3
    noise = 1 + 0.05 * rng.standard_normal(count) + 0.5 * (rng.random(count) < 0.03)
    names = np.sort(rng.integers(0, regimes, count))
    return pd.DataFrame(
        {
            "step_id": np.cumsum(rng.choice([1, 1, 1, 30], count)) if gaps else np.arange(count),
            "step_time_s": mean * noise,
            "prefill_tokens": prefill,
            "decode_tokens": decode,
            "prefill_requests": (prefill > 0).astype(np.int32),
            "context_tokens": decode * rng.integers(1, 500, count),
            "regime": [("warmup", "steady", "burst")[i + (regimes < 3)] for i in names],
        }
    )


def write(folder: Path, frame: pd.DataFrame, cuts: list[int], group: int = 10_000, names: list[str] | None = None) -> Path:
    edges = [0, *sorted(cuts), len(frame)]
    for i, (a, b) in enumerate(pairwise(edges)):
        table = pa.Table.from_pandas(frame.iloc[a:b], preserve_index=False)
        pq.write_table(table, folder / f"{names[i] if names else f'part-{i}'}.parquet", row_group_size=group)
    return folder


def in_memory(path: Path, scaling: RowScaling, block: int, features=TINY) -> ConfigStatistics:
    return statistics_from_rows(drop_warmup(read_steps(path, ONE).frame), ONE, features, scaling=scaling, block_length=block)


def assert_equal(one: ConfigStatistics, other: ConfigStatistics, rtol: float = 1e-9) -> None:
    assert (one.rows, one.blocks, one.block_length) == (other.rows, other.blocks, other.block_length)
    assert [(s.multiplier, s.count) for s in one.strata] == [(s.multiplier, s.count) for s in other.strata]
    np.testing.assert_allclose([one.log_scale_sum, one.total_s], [other.log_scale_sum, other.total_s], rtol=rtol)
    assert one.downweighted.rows == other.downweighted.rows
    assert one.downweighted.by_regime == other.downweighted.by_regime
    np.testing.assert_allclose(one.downweighted.excess_s, other.downweighted.excess_s, rtol=rtol)
    for a, b in zip(one.strata, other.strata, strict=True):
        assert a.triangle.shape == b.triangle.shape
        np.testing.assert_allclose(a.triangle, b.triangle, rtol=rtol, atol=rtol * np.abs(b.triangle).max())
        gram = b.triangle.T @ b.triangle
        np.testing.assert_allclose(a.triangle.T @ a.triangle, gram, rtol=rtol, atol=rtol * np.abs(gram).max())


def assert_identical(one: ConfigStatistics, other: ConfigStatistics) -> None:
    assert (one.log_scale_sum, one.total_s, one.downweighted) == (other.log_scale_sum, other.total_s, other.downweighted)
    for a, b in zip(one.strata, other.strata, strict=True):
        np.testing.assert_array_equal(a.triangle, b.triangle)


@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 400),
    cuts=st.lists(st.integers(0, 400), max_size=5),
    group=st.sampled_from([1, 7, 50, 1000]),
    batch=st.sampled_from([1, 3, 40, 1000]),
    slice_rows=st.sampled_from([1, 60, 1000]),
    block=st.sampled_from([1, 2, 7, 20, 1000]),
    regimes=st.integers(1, 3),
    gaps=st.booleans(),
    robust=st.booleans(),
)
@settings(max_examples=20)
def test_any_chunking_gives_the_statistics_of_the_rows(
    seed: int,
    count: int,
    cuts: list[int],
    group: int,
    batch: int,
    slice_rows: int,
    block: int,
    regimes: int,
    gaps: bool,
    robust: bool,
) -> None:
    frame = recording(seed, count, regimes, gaps)
    scaling = ROBUST if robust else SCALING
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = write(Path(folder), frame, [min(c, count) for c in cuts], group)
        patch.setattr(parts_module, "SLICE_ROWS", slice_rows)
        patch.setattr(parts_module.read_batches, "__defaults__", (batch,))
        if (frame["regime"] == "warmup").all():
            with pytest.raises(StatisticsError, match="none of them steady"):
                statistics_from_parquet(path, ONE, TINY, scaling=scaling, block_length=block)
            return
        found = statistics_from_parquet(path, ONE, TINY, scaling=scaling, block_length=block, workers=2)
        alone = statistics_from_parquet(path, ONE, TINY, scaling=scaling, block_length=block, workers=1)
        assert_equal(found.statistics, in_memory(path, scaling, block))
        assert_identical(found.statistics, alone.statistics)
        assert found.report.rows == count


def test_weights_and_dependence_matter_in_these_rows() -> None:
    """The property above could not fail if no row were down-weighted, and blocks joined or not were the same."""
    frame = recording(1, 400, 2)
    plain = statistics_from_rows(frame, ONE, TINY, scaling=SCALING)
    assert statistics_from_rows(frame, ONE, TINY, scaling=ROBUST).downweighted.rows > 5
    cut = statistics_from_rows(frame.iloc[:210], ONE, TINY, scaling=SCALING).merge(
        statistics_from_rows(frame.iloc[210:], ONE, TINY, scaling=SCALING)
    )
    assert cut.blocks == plain.blocks + 1


@given(order=st.permutations(range(6)), seed=st.integers(0, 1000))
@settings(max_examples=15)
def test_parts_named_at_random_come_in_the_order_of_their_steps(order: list[int], seed: int) -> None:
    frame = recording(seed, 300)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), frame, [13, 60, 61, 200, 290], names=[f"c{i}f" for i in order])
        found = statistics_from_parquet(path, ONE, TINY, scaling=SCALING)
        assert found.report.rejected_rows == 0
        assert_identical(found.statistics, statistics_from_parquet(path, ONE, TINY, scaling=SCALING, workers=1).statistics)
        assert_equal(found.statistics, statistics_from_rows(frame, ONE, TINY, scaling=SCALING))
        assert_equal(found.statistics, in_memory(path, SCALING, 20))


def test_the_pilot_of_a_small_table_is_that_of_its_rows(tmp_path: Path) -> None:
    frame = recording(2, 3000, 3)
    path = write(tmp_path, frame, [700, 2100], group=300)
    found = statistics_from_parquet(path, ONE, TINY)
    whole = statistics_from_rows(drop_warmup(read_steps(path, ONE).frame), ONE, TINY)
    assert found.pilot_rows == whole.rows
    assert found.statistics.scaling.difference(whole.scaling) is None
    assert_equal(found.statistics, whole)


def test_the_pilot_of_a_large_table_is_fitted_on_rows_from_all_over(tmp_path: Path) -> None:
    """Prefill comes late, and dear: a pilot of the first rows alone would not know what it costs."""
    frame = recording(3, 60_000)
    late = frame.index >= 30_000
    frame["prefill_tokens"] = np.where(late, frame["prefill_tokens"], 0)
    frame["prefill_requests"] = (frame["prefill_tokens"] > 0).astype(int)
    mean = 6e-5 * frame["prefill_tokens"] + 1e-4 * frame["decode_tokens"] + 7e-3
    frame["step_time_s"] = mean * (1 + 0.05 * np.random.default_rng(3).standard_normal(60_000))
    path = write(tmp_path, frame, [20_000, 40_000], group=5000)
    found = statistics_from_parquet(path, ONE, TINY, pilot_rows=4000)
    assert 2000 <= found.pilot_rows <= 4000
    np.testing.assert_allclose(found.statistics.scaling.pilot * TINY.references, [6e-5, 1e-4, 7e-3], rtol=0.03)
    first = statistics_from_rows(frame[~late], ONE, TINY).scaling.pilot
    assert first[0] * TINY.references[0] < 4e-5


@pytest.mark.parametrize("factor", [2.0**-20, 8.0])
def test_a_unit_rescales_its_column_exactly(tmp_path: Path, factor: float) -> None:
    references = [2e-5, 1e-4, 2e-3, 5e-3]
    path = write(tmp_path, recording(4, 500), [333])
    before = statistics_from_parquet(path, ONE, TINY, scaling=SCALING).statistics
    after_set = tiny_features(references=[references[0] * factor, *references[1:]])
    pilot = SCALING.pilot / [factor, 1.0, 1.0]
    after = statistics_from_parquet(path, ONE, after_set, scaling=replace(SCALING, pilot=pilot)).statistics
    assert after.log_scale_sum == before.log_scale_sum
    for a, b in zip(after.strata, before.strata, strict=True):
        # Powers of two: not a bit of the mantissa may change, but for the rounding of norms.
        np.testing.assert_allclose(
            a.triangle, b.triangle * [factor, 1.0, 1.0, 1.0], rtol=1e-13, atol=1e-15 * np.abs(b.triangle).max()
        )


@pytest.mark.parametrize("cuts", [[], [100, 555]], ids=["one part", "three parts"])
def test_real_rows_and_every_feature_set(tmp_path: Path, cuts: list[int]) -> None:
    """Of a dense model: some columns are zero or a multiple of another, and all have their rows in the triangle."""
    configuration = TraceStore(sample_store_path()).configuration(TARGET)
    raw = pd.read_parquet(sample_store_path() / TARGET / "steps.parquet")
    path = write(tmp_path, raw, cuts)
    table = validate_steps(raw, configuration)
    for name in ("roofline", "hfdtl", "hfdtl-interactions", "blis-physics", "blis-blackbox"):
        features = feature_set(name)
        found = statistics_from_parquet(path, configuration, features)
        assert_equal(found.statistics, statistics_from_rows(drop_warmup(table.frame), configuration, features))
        assert found.report.rejected_rows == len(table.rejected)
        assert [(p.message, p.count) for p in found.report.notes] == [(p.message, p.count) for p in table.notes]


def test_a_user_s_feature_of_any_column(tmp_path: Path) -> None:
    """Columns beside the schema, text among them, reach a formula as they do in memory."""
    frame = recording(5, 200, 2).assign(my_counter=np.arange(200) % 7)
    own = Feature(
        "mine", Level.BASE, "1", "my_counter in burst",
        lambda f, _c: f["my_counter"].to_numpy(float) * (f["regime"] == "burst").to_numpy() + (f["step_id"] > 50),
        PriorRange(0, 1), ("my_counter", "regime", "step_id"), 1e-3,
    )  # fmt: skip
    features = replace(TINY, name="own", features=(TINY.features[0], own, *TINY.features[1:]))
    path = write(tmp_path, frame, [77])
    scaling = RowScaling(np.array([1.1, 0.1, 0.9, 1.4]), 1e-3)
    assert_equal(statistics_from_parquet(path, ONE, features, scaling=scaling).statistics, in_memory(path, scaling, 20, features))


DAMAGES = {
    "missing": ("step_time_s", np.nan),
    "infinite": ("step_time_s", np.inf),
    "negative": ("prefill_tokens", -5),
    "fraction": ("decode_tokens", 2.5),
    "impossible": ("step_time_s", 1e-12),
    "no tokens": (["prefill_tokens", "decode_tokens"], 0),
    "over budget": ("prefill_tokens", 5000),
    "tokens of nobody": ("prefill_requests", 900),
    "repeated step": ("step_id", 11),
    "no context": ("context_tokens", np.nan),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_rejected_rows_are_those_of_the_whole_table_and_kept_aside(tmp_path: Path, damage: str) -> None:
    column, value = DAMAGES[damage]
    frame = recording(6, 500).astype({"prefill_tokens": float, "decode_tokens": float, "prefill_requests": float})
    if damage == "tokens of nobody":
        frame["prefill_tokens"] = np.maximum(frame["prefill_tokens"], 1)
        frame["prefill_requests"] = 1.0
    frame.loc[[150, 151, 333], column] = value
    path = write(tmp_path, frame, [200, 401], group=100)
    table = read_steps(path, ONE)
    found = statistics_from_parquet(path, ONE, TINY, scaling=SCALING)
    assert list(found.report.rejected["row"]) == list(table.rejected["row"]) == [150, 151, 333]
    if damage != "repeated step":
        # Of an earlier batch only the highest number is known: there a repeated step "decreases".
        assert list(found.report.rejected["reason"]) == list(table.rejected["reason"])
        assert {(p.message, p.count, p.rows) for p in found.report.problems} == {
            (p.message, p.count, p.rows) for p in table.problems
        }
    assert found.report.rejected_rows == 3
    assert "497 rows accepted, 3 rejected" in found.report.summary()
    assert_equal(found.statistics, statistics_from_rows(table.frame, ONE, TINY, scaling=SCALING))
    written = found.report.write_rejected(tmp_path / "out")
    assert written is not None
    assert len(pd.read_csv(written)) == 3


def test_steps_that_repeat_across_parts_are_rejected_as_in_memory(tmp_path: Path) -> None:
    frame = recording(7, 400)
    frame.loc[300:, "step_id"] = np.arange(250, 350)
    path = write(tmp_path, frame, [100, 300], group=40)
    table = read_steps(path, ONE)
    assert len(table.rejected) == 50
    found = statistics_from_parquet(path, ONE, TINY, scaling=SCALING)
    assert list(found.report.rejected["row"]) == list(table.rejected["row"])
    assert_equal(found.statistics, statistics_from_rows(table.frame, ONE, TINY, scaling=SCALING))


def test_rejected_rows_are_kept_up_to_a_bound_and_counted_beyond(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfdtl_bayes.traces.batches.REJECTED_KEPT", 10)
    frame = recording(8, 1000)
    frame.loc[frame.index % 4 == 0, "step_time_s"] = np.nan
    found = statistics_from_parquet(write(tmp_path, frame, [500], group=100), ONE, TINY, scaling=SCALING)
    assert found.report.rejected_rows == 250
    assert list(found.report.rejected["row"]) == list(range(0, 40, 4))
    assert found.report.problems[0].count == 250


def test_absent_columns_are_derived_as_in_memory(tmp_path: Path) -> None:
    frame = recording(9, 300).drop(columns=["context_tokens", "prefill_requests", "regime"]).assign(kv_usage=0.25)
    path = write(tmp_path, frame, [150])
    features, scaling = feature_set("roofline"), RowScaling(np.ones(10), 1e-3)
    found = statistics_from_parquet(path, ONE, features, scaling=scaling)
    assert_equal(found.statistics, in_memory(path, scaling, 20, features))
    assert any(d.startswith("context_tokens = kv_usage") for d in found.report.derived)


def test_a_part_with_other_columns_and_types_is_read_as_in_memory(tmp_path: Path) -> None:
    frame = recording(10, 300)
    write(tmp_path, frame.iloc[:100], [])
    other = frame.iloc[100:200].drop(columns="prefill_requests").astype({"decode_tokens": np.float32}).assign(extra="text")
    pq.write_table(pa.Table.from_pandas(other, preserve_index=False), tmp_path / "part-1.parquet")
    pq.write_table(pa.Table.from_pandas(frame.iloc[200:], preserve_index=False), tmp_path / "part-2.parquet")
    assert_equal(statistics_from_parquet(tmp_path, ONE, TINY, scaling=SCALING).statistics, in_memory(tmp_path, SCALING, 20))


def test_an_empty_part_is_no_harm(tmp_path: Path) -> None:
    frame = recording(11, 100)
    write(tmp_path, frame, [0, 60, 60, 100])
    assert len(list(tmp_path.iterdir())) == 5
    assert_equal(
        statistics_from_parquet(tmp_path, ONE, TINY, scaling=SCALING).statistics,
        statistics_from_rows(frame, ONE, TINY, scaling=SCALING),
    )


def damaged(folder: Path, how: str) -> Path:
    """Three parts of which the second cannot be read."""
    write(folder, recording(12, 3000), [1000, 2000])
    second = folder / "part-1.parquet"
    content = second.read_bytes()
    if how == "cut short":
        second.write_bytes(content[: len(content) // 2])
    elif how == "0 bytes":
        second.write_bytes(b"")
    else:
        second.write_bytes(content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :])
    return second


@pytest.mark.parametrize("how", ["cut short", "0 bytes", "pages of zeros"])
def test_a_part_that_cannot_be_read_is_named_and_refused(tmp_path: Path, how: str) -> None:
    second = damaged(tmp_path, how)
    with pytest.raises(InputError, match=f"{second.name}.*record"):
        statistics_from_parquet(tmp_path, ONE, TINY)


def test_bad_input_gives_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no trace table"):
        statistics_from_parquet(tmp_path / "nowhere", ONE, TINY)
    with pytest.raises(InputError, match=r"without \.parquet parts"):
        statistics_from_parquet(tmp_path, ONE, TINY)
    (tmp_path / "steps.csv").write_text("step_id\n")
    with pytest.raises(InputError, match="is CSV"):
        statistics_from_parquet(tmp_path / "steps.csv", ONE, TINY)
    with pytest.raises(InputError, match="observed in requests"):
        statistics_from_parquet(tmp_path, ONE, feature_set("roofline", "queue_delay"))
    frame = recording(13, 100)

    def one(name: str, changed: pd.DataFrame, **options: object) -> None:
        pq.write_table(pa.Table.from_pandas(changed, preserve_index=False), tmp_path / f"{name}.parquet")
        statistics_from_parquet(tmp_path / f"{name}.parquet", ONE, TINY, **options)

    with pytest.raises(InputError, match=r"missing required column.*prefill_tokens"):
        one("a", frame.drop(columns="prefill_tokens"))
    with pytest.raises(InputError, match="milliseconds"):
        one("b", frame.assign(step_time_s=frame["step_time_s"] * 1e6))
    with pytest.raises(InputError, match="no rows"):
        one("c", frame.iloc[:0])
    with pytest.raises(InputError, match="every row was rejected"):
        one("d", frame.assign(step_time_s=-1.0))
    with pytest.raises(StatisticsError, match="3 finite coefficients"):
        one("e", frame, scaling=RowScaling(np.ones(4), 1e-3))
    with pytest.raises(InputError, match="block_length"):
        one("f", frame, block_length=0)
    frame.set_index(pd.RangeIndex(100, name="step_id")).drop(columns="step_id").to_parquet(tmp_path / "g.parquet")
    with pytest.raises(InputError, match="reset_index"):
        statistics_from_parquet(tmp_path / "g.parquet", ONE, TINY)
    (tmp_path / "h").mkdir()
    write(tmp_path / "h", frame, [])
    pq.write_table(pa.Table.from_pandas(frame.assign(decode_tokens="many")), tmp_path / "h" / "part-1.parquet")
    with pytest.raises(InputError, match="do not fit together"):
        statistics_from_parquet(tmp_path / "h", ONE, TINY)


def test_slices_follow_the_files_and_their_batches_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "SLICE_ROWS", 100)
    path = write(tmp_path, recording(14, 1000), [300], group=60)
    parts = open_parts(path, {c.name for c in STEP_SCHEMA})
    assert [s.rows for s in parts.slices] == [120, 120, 60, 120, 120, 120, 120, 120, 100]
    assert [s.first_row for s in parts.slices] == list(np.cumsum([0, *(s.rows for s in parts.slices)][:-1]))
    assert parts.increasing
    assert max(b.num_rows for b in parts_module.read_batches(parts.slices[0], ["step_id"], 50)) == 50
