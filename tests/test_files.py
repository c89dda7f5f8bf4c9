"""A file is written whole or not at all."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from hfdtl_bayes.files import atomic


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "a.txt"
    with atomic(target) as part:
        assert part.parent == target.parent
        part.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert os.listdir(target.parent) == ["a.txt"]
    with atomic(str(target)) as part:
        part.write_text("newer")
        assert target.read_text() == "new"
    assert target.read_text() == "newer"


def write_half(path: Path, error: type[BaseException]) -> None:
    with atomic(path) as part:
        part.write_text("half")
        raise error


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_an_interruption_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a.txt").write_text("old")
    for name in ("a.txt", "b.txt"):
        with pytest.raises(error):
            write_half(tmp_path / name, error)
    assert os.listdir(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError), atomic(tmp_path / "folder") as part:
        part.write_text("new")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_folder_that_cannot_be_made_is_the_system_s_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises((FileExistsError, NotADirectoryError)), atomic(tmp_path / "file" / "a"):
        pass


def test_the_block_may_write_the_file_anew(tmp_path: Path) -> None:
    """As libraries do that make their own file and rename it."""
    with atomic(tmp_path / "a") as part:
        part.unlink()
        part.write_text("again")
    assert (tmp_path / "a").read_text() == "again"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with atomic(tmp_path / "a") as part:
            part.write_text("x")
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode) == 0o666 & ~umask


def test_the_longest_name_that_a_folder_takes_can_be_written(tmp_path: Path) -> None:
    with atomic(tmp_path / ("x" * 255)) as part:
        part.write_text("x")
    assert [len(n) for n in os.listdir(tmp_path)] == [255]


def test_writers_at_the_same_time_do_not_meet(tmp_path: Path) -> None:
    both = threading.Barrier(4)

    def write(number: int) -> None:
        with atomic(tmp_path / "a") as part:
            both.wait()
            part.write_text(str(number) * 100_000)
            both.wait()

    writers = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    text = (tmp_path / "a").read_text()
    assert len(text) == 100_000
    assert len(set(text)) == 1
    assert os.listdir(tmp_path) == ["a"]
