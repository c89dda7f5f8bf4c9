"""Statistics on a Dask cluster of real processes on this machine: as in memory, with a worker lost and a part damaged."""

from __future__ import annotations

import builtins
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from distributed import Client, LocalCluster
from test_statistics_streaming import ONE, SCALING, assert_equal, assert_identical, damaged, recording, write

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import feature_set
from hfdtl_bayes.sample import TARGET, sample_store_path
from hfdtl_bayes.statistics import statistics_from_parquet, statistics_from_rows, statistics_on_dask
from hfdtl_bayes.traces import TraceStore, drop_warmup

# What Dask itself leaves open while it closes; nothing of this package holds a socket.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

FEATURES = feature_set("blis-blackbox")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None, silence_logs=50
    ) as own:
        yield own


def test_a_cluster_gives_the_statistics_of_the_rows(cluster: LocalCluster, tmp_path: Path) -> None:
    """Blocks are cut by parts and row groups; the tree has three levels."""
    frame = recording(1, 30_000, 3, gaps=True)
    path = write(tmp_path, frame, list(range(333, 30_000, 397)), group=1000)
    found = statistics_on_dask(path, ONE, FEATURES, scheduler=cluster.scheduler_address, scaling=SCALING)
    assert_equal(found.statistics, statistics_from_rows(drop_warmup(frame), ONE, FEATURES, scaling=SCALING))
    again = statistics_on_dask(path, ONE, FEATURES, scheduler=cluster.scheduler_address, scaling=SCALING)
    assert_identical(again.statistics, found.statistics)


def test_the_default_features_travel_to_the_workers(cluster: LocalCluster) -> None:
    store = TraceStore(sample_store_path())
    configuration = store.configuration(TARGET)
    path = sample_store_path() / TARGET / "steps.parquet"
    features = feature_set("roofline")
    found = statistics_on_dask(path, configuration, features, scheduler=cluster.scheduler_address)
    assert_equal(found.statistics, statistics_from_parquet(path, configuration, features).statistics)
    assert found.report.rejected_rows == len(store.steps(TARGET).rejected)


def test_a_lost_worker_costs_its_work_and_nothing_else(cluster: LocalCluster, tmp_path: Path) -> None:
    path = write(tmp_path, recording(2, 60_000), list(range(500, 60_000, 500)))
    with Client(cluster, set_as_default=False) as client:
        pids = list(client.run(os.getpid).values())

        def kill() -> None:
            # Once results lie on the workers.
            while not any(client.has_what().values()):
                time.sleep(0.01)
            os.kill(pids[0], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        found = statistics_on_dask(path, ONE, FEATURES, scheduler=client, scaling=SCALING)
        killer.join()
        deadline = time.monotonic() + 60
        while len(client.run(os.getpid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert pids[0] not in client.run(os.getpid).values()
    assert_identical(
        found.statistics, statistics_on_dask(path, ONE, FEATURES, scheduler=cluster.scheduler_address, scaling=SCALING).statistics
    )
    assert_equal(found.statistics, statistics_from_rows(recording(2, 60_000), ONE, FEATURES, scaling=SCALING))


@pytest.mark.parametrize("how", ["cut short", "0 bytes", "pages of zeros"])
def test_a_damaged_part_is_named_and_the_rest_kept(cluster: LocalCluster, tmp_path: Path, how: str) -> None:
    second = damaged(tmp_path, how)
    frame = recording(12, 3000)
    found = statistics_on_dask(tmp_path, ONE, FEATURES, scheduler=cluster.scheduler_address, scaling=SCALING)
    assert [path for path, _ in found.report.unreadable] == [second]
    assert "1 part(s) left out" in found.report.summary()
    assert second.name in found.report.summary()
    assert found.report.rows == 2000
    rest = frame[(frame.index < 1000) | (frame.index >= 2000)]
    assert_equal(found.statistics, statistics_from_rows(rest, ONE, FEATURES, scaling=SCALING))


def test_steps_that_repeat_across_parts_are_rejected_as_on_one_machine(cluster: LocalCluster, tmp_path: Path) -> None:
    frame = recording(3, 400)
    frame.loc[300:, "step_id"] = np.arange(250, 350)
    path = write(tmp_path, frame, [100, 300], group=40)
    found = statistics_on_dask(path, ONE, FEATURES, scheduler=cluster.scheduler_address, scaling=SCALING)
    own = statistics_from_parquet(path, ONE, FEATURES, scaling=SCALING)
    assert found.report.rejected_rows == own.report.rejected_rows == 50
    assert_equal(found.statistics, own.statistics)


def test_a_missing_column_and_a_table_without_a_sound_part_are_errors(cluster: LocalCluster, tmp_path: Path) -> None:
    path = write(tmp_path, recording(4, 100).drop(columns="decode_tokens"), [])
    with pytest.raises(InputError, match="decode_tokens"):
        statistics_on_dask(path, ONE, FEATURES, scheduler=cluster.scheduler_address)
    (tmp_path / "part-0.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"1 part\(s\) cannot be read"):
        statistics_on_dask(path, ONE, FEATURES, scheduler=cluster.scheduler_address)


def test_no_scheduler_and_no_dask_are_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, recording(5, 100), [])
    monkeypatch.setattr("hfdtl_bayes.statistics.distributed.CONNECT_S", 0.5)
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{own.getsockname()[1]}"
    with pytest.raises(InputError, match=r"no Dask scheduler answers at 'tcp://127\.0\.0\.1.*dask scheduler"):
        statistics_on_dask(path, ONE, FEATURES, scheduler=address)
    with pytest.raises(InputError, match="no Dask scheduler answers at 'nonsense://'"):
        statistics_on_dask(path, ONE, FEATURES, scheduler="nonsense://")
    real = builtins.__import__

    def without_dask(name: str, *rest: object) -> object:
        if name.split(".", maxsplit=1)[0] in {"dask", "distributed"}:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_dask)
    monkeypatch.delitem(sys.modules, "distributed")
    with pytest.raises(InputError, match=r"pip install 'hfdtl-bayes\[dask\]'"):
        statistics_on_dask(path, ONE, FEATURES, scheduler=address)
