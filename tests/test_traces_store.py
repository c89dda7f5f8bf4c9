"""The trace store: Parquet files, folders of parts, CSV, what is cut short or foreign, exact round trips."""

from __future__ import annotations

import io
import itertools
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_traces_requests import requests
from test_traces_validation import CONFIGURATION, steps

from hfdtl_bayes.configuration import write_configuration
from hfdtl_bayes.errors import InputError, MissingInputError, UnknownNameError
from hfdtl_bayes.traces import TraceStore, read_table, write_store


def write_parts(frame: pd.DataFrame, folder: Path, cuts: list[int], name: str = "part-{}.parquet") -> None:
    folder.mkdir()
    edges = [0, *sorted(cuts), len(frame)]
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        frame.iloc[start:stop].to_parquet(folder / name.format(number), index=False)


def test_writing_and_reading_is_exact(tmp_path: Path) -> None:
    frame, journeys = steps().assign(kernel_time_s=np.pi, note="ü"), requests()
    folder = write_store(tmp_path / "store", CONFIGURATION, frame, journeys)
    assert sorted(p.name for p in folder.iterdir()) == ["configuration.yaml", "requests.parquet", "steps.parquet"]
    assert os.access(folder, os.R_OK | os.X_OK)
    store = TraceStore(tmp_path / "store")
    assert store.config_ids == (CONFIGURATION.config_id,)
    assert store.configuration(CONFIGURATION.config_id) == CONFIGURATION
    pd.testing.assert_frame_equal(read_table(folder / "steps.parquet"), frame, check_dtype=False)
    pd.testing.assert_frame_equal(store.steps(CONFIGURATION.config_id).frame, frame, check_dtype=False, check_exact=True)
    pd.testing.assert_frame_equal(store.requests(CONFIGURATION.config_id).frame, journeys, check_dtype=False, check_exact=True)


@given(cuts=st.lists(st.integers(0, 40), max_size=14))
def test_a_folder_of_parts_reads_as_one_file(tmp_path_factory: pytest.TempPathFactory, cuts: list[int]) -> None:
    folder = tmp_path_factory.mktemp("parts")
    steps().to_parquet(folder / "one.parquet", index=False)
    write_parts(steps(), folder / "many.parquet", cuts)
    pd.testing.assert_frame_equal(read_table(folder / "many.parquet"), read_table(folder / "one.parquet"))


@pytest.mark.parametrize("name", ["part-{}.parquet", "part.{}.parquet", "{}.parquet", "part-{:05d}-c000.snappy.parquet"])
def test_parts_are_read_in_the_order_of_their_numbers(tmp_path: Path, name: str) -> None:
    write_parts(steps(), tmp_path / "steps.parquet", list(range(3, 39, 3)), name)  # 13 parts: 10 comes after 2
    assert list(read_table(tmp_path / "steps.parquet")["step_id"]) == list(steps()["step_id"])


def test_a_recording_in_parts_validates_as_in_one_file(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "vllm_cpu" / "c11_moe_base"
    whole = TraceStore(shared_data / "vllm_cpu").steps("c11_moe_base")
    (tmp_path / "c11_moe_base").mkdir()
    (tmp_path / "c11_moe_base" / "configuration.yaml").write_bytes((source / "configuration.yaml").read_bytes())
    write_parts(
        pd.read_parquet(source / "steps.parquet"), tmp_path / "c11_moe_base" / "steps.parquet", list(range(150, 2300, 150))
    )
    parts = TraceStore(tmp_path).steps("c11_moe_base")
    pd.testing.assert_frame_equal(parts.frame, whole.frame)
    assert parts.derived == whole.derived


def test_parts_may_differ_in_columns_and_number_types(tmp_path: Path) -> None:
    folder = tmp_path / "steps.parquet"
    folder.mkdir()
    steps().iloc[:20].astype({"step_id": "int32", "waiting_requests": "int16"}).to_parquet(folder / "0.parquet", index=False)
    steps().iloc[20:].assign(extra=1.5, waiting_requests=2.0).to_parquet(folder / "1.parquet", index=False)
    (folder / "_SUCCESS").touch()
    (folder / ".0.parquet.crc").write_bytes(b"x")
    (folder / "_metadata.parquet").write_bytes(b"x")
    table = read_table(folder)
    assert list(table["step_id"]) == list(steps()["step_id"])
    assert table["extra"].isna().sum() == 20
    assert list(table["waiting_requests"][20:]) == [2.0] * 20


def test_parts_that_do_not_fit_or_are_broken_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "steps.parquet"
    write_parts(steps(), folder, [20])
    steps().assign(step_id="text").to_parquet(folder / "part-1.parquet", index=False)
    with pytest.raises(InputError, match="parts do not fit together"):
        read_table(folder)
    (folder / "part-1.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"part-1\.parquet is empty \(0 bytes\)"):
        read_table(folder)
    (folder / "part-1.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(InputError, match=r"part-1\.parquet cannot be read"):
        read_table(folder)
    for part in folder.iterdir():
        part.unlink()
    with pytest.raises(InputError, match=r"folder without \.parquet parts"):
        read_table(folder)


def test_csv_reads_as_parquet(tmp_path: Path) -> None:
    write_store(tmp_path / "parquet", CONFIGURATION, steps())
    folder = tmp_path / "csv" / CONFIGURATION.config_id
    write_configuration(CONFIGURATION, folder / "configuration.yaml")
    steps().to_csv(folder / "steps.csv", index=False)
    from_csv = TraceStore(tmp_path / "csv").steps(CONFIGURATION.config_id)
    from_parquet = TraceStore(tmp_path / "parquet").steps(CONFIGURATION.config_id)
    pd.testing.assert_frame_equal(from_csv.frame, from_parquet.frame)


def test_csv_with_text_and_a_cut_last_line_loses_those_rows_visibly(tmp_path: Path) -> None:
    folder = tmp_path / CONFIGURATION.config_id
    write_configuration(CONFIGURATION, folder / "configuration.yaml")
    lines = steps().to_csv(index=False).splitlines()
    lines[4] = lines[4].replace("0.0080", "eight ms", 1) if "0.0080" in lines[4] else lines[4].replace("0.008", "eight ms", 1)
    lines[-1] = lines[-1][:8]
    (folder / "steps.csv").write_text("\n".join(lines))
    table = TraceStore(tmp_path).steps(CONFIGURATION.config_id)
    assert list(table.rejected["row"]) == [3, 39]
    assert "step_time_s is not a number" in table.rejected["reason"].iloc[0]


@pytest.mark.parametrize("content", [b"", b"\n", b"\x00\x01\xff\xfe", b'a,b\n1,"2', b"step_id,step_time_s\n"])
def test_csv_that_is_no_table(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / CONFIGURATION.config_id
    write_configuration(CONFIGURATION, folder / "configuration.yaml")
    (folder / "steps.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"steps\.csv"):
        TraceStore(tmp_path).steps(CONFIGURATION.config_id)


def whole_file() -> bytes:
    buffer = io.BytesIO()
    steps().to_parquet(buffer, index=False)
    return buffer.getvalue()


WHOLE = whole_file()


@given(length=st.integers(0, len(WHOLE) - 1))
def test_a_truncated_parquet_file_gives_one_clear_error(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "steps.parquet"
    path.write_bytes(WHOLE[:length])
    with pytest.raises(InputError, match=r"steps\.parquet .*(is empty|cut short)"):
        read_table(path)


def test_a_file_without_rows_gives_one_clear_error(tmp_path: Path) -> None:
    write_store(tmp_path, CONFIGURATION, steps().iloc[:0])
    with pytest.raises(InputError, match=r"steps\.parquet: no rows"):
        TraceStore(tmp_path).steps(CONFIGURATION.config_id)


def test_neither_a_stored_index_nor_the_folders_above_change_the_columns(tmp_path: Path) -> None:
    folder = tmp_path / "run=7"
    folder.mkdir()
    for index in (steps(), steps().iloc[[0, 3, 4, 9]]):  # pandas stores a regular index as a range, another as a column
        index.set_index("step_id").to_parquet(folder / "steps.parquet")
        table = read_table(folder / "steps.parquet")
        assert list(table["step_id"]) == list(index["step_id"])
        assert "run" not in table.columns


def test_dictionary_encoded_labels_are_labels(tmp_path: Path) -> None:
    table = pa.Table.from_pandas(steps().astype({"regime": "category"}), preserve_index=False)
    write_store(tmp_path, CONFIGURATION, steps())
    pq.write_table(table, tmp_path / CONFIGURATION.config_id / "steps.parquet")
    assert list(TraceStore(tmp_path).steps(CONFIGURATION.config_id).frame["regime"]) == list(steps()["regime"])


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="not a folder"):
        TraceStore(tmp_path / "absent")
    (tmp_path / "other").mkdir()
    with pytest.raises(MissingInputError, match="found other"):
        TraceStore(tmp_path)
    write_store(tmp_path, CONFIGURATION, steps())
    store = TraceStore(tmp_path)
    with pytest.raises(UnknownNameError, match=f"it holds {CONFIGURATION.config_id}"):
        store.steps("b")
    with pytest.raises(MissingInputError, match=r"holds no requests\.parquet"):
        store.requests(CONFIGURATION.config_id)
    with pytest.raises(MissingInputError, match="no trace table at"):
        read_table(tmp_path / "absent.parquet")


def test_a_configuration_in_the_folder_of_another_is_refused(tmp_path: Path) -> None:
    write_configuration(CONFIGURATION, tmp_path / "other" / "configuration.yaml")
    with pytest.raises(InputError, match="but the folder is 'other'"):
        TraceStore(tmp_path).configuration("other")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = write_store(tmp_path, CONFIGURATION, steps())
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(InputError, match="exists already"):
        write_store(tmp_path, CONFIGURATION, steps(8))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_write_that_fails_or_is_interrupted_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = CONFIGURATION.model_copy(update={"config_id": "other"})
    write_store(tmp_path, other, steps())
    unstorable = steps().assign(thing=[object()] * 40)
    with pytest.raises(InputError, match=r"steps\.parquet: the table cannot be stored"):
        write_store(tmp_path, CONFIGURATION, unstorable)
    assert [p.name for p in tmp_path.iterdir()] == ["other"]

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pd.DataFrame, "to_parquet", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path, CONFIGURATION, steps())
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_a_write_in_progress_is_not_part_of_the_store(tmp_path: Path) -> None:
    write_store(tmp_path, CONFIGURATION, steps())
    write_configuration(CONFIGURATION, tmp_path / ".part-abc" / "configuration.yaml")
    assert TraceStore(tmp_path).config_ids == (CONFIGURATION.config_id,)
