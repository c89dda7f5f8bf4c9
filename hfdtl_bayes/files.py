"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary file to write, which takes the place of `path` once the block is left without an error.

    The temporary file lies in the same folder, so that taking the place is one step of the file system, has a name of its own,
    so that two writers do not meet, and the permissions of any new file. Whatever goes wrong, an interruption included, what was
    at `path` stays and nothing else is left. Folders that are missing are made.

    Parameters
    ----------
    path : path
        The file to write.

    Yields
    ------
    Path
        The temporary file, empty.

    Raises
    ------
    OSError
        If the folder cannot be made or written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{secrets.token_hex(8)}.part"
    # Unlike a file of `tempfile`, which is private, it may be read by whom the umask lets.
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder to fill, which takes the place of `path` once the block is left without an error.

    As `atomic`, for a folder: nothing of an earlier one stays in it, and whatever goes wrong the earlier one stays as it was.

    Parameters
    ----------
    path : path
        The folder to write.

    Yields
    ------
    Path
        The temporary folder, empty, beside it.

    Raises
    ------
    OSError
        If the folder cannot be made, or the earlier one not be moved away.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{secrets.token_hex(8)}.part"
    part.mkdir()
    old = path.parent / f".{secrets.token_hex(8)}.old"
    try:
        yield part
        if path.exists():
            path.rename(old)
        try:
            part.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
