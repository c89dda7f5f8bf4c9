"""Lines of text files, plain or gzip, one at a time; a file that was cut short gives what it holds and says so."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

from hfdtl_bayes.errors import InputError, MissingInputError

_GZIP = b"\x1f\x8b"
_CHUNK = 1 << 20
_LONGEST_LINE = 1 << 28
"""A line longer than 256 MB is no record of a trace: it would fill the memory instead."""


class CutShortError(InputError):
    """A gzip file ends before its end, or is damaged; the lines before are sound."""


def _check(path: Path) -> None:
    if not path.exists():
        raise MissingInputError(f"no trace file at {path}")
    if path.is_dir():
        raise InputError(f"{path} is a folder; name the files in it")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty (0 bytes); record it again")


def is_gzip(path: Path) -> bool:
    """Return whether a file is packed; its name may say otherwise.

    Raises
    ------
    MissingInputError, InputError
        If there is no file, or nothing in it.
    """
    _check(path)
    with path.open("rb") as file:
        return file.read(2) == _GZIP


def last_line_ended(path: Path) -> bool:
    """Return whether a plain file ends with the end of a line."""
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) in (b"\n", b"\r")


def _blocks(path: Path) -> Iterator[bytes]:
    packed = is_gzip(path)
    with path.open("rb") as file:
        if not packed:
            while block := file.read(_CHUNK):
                yield block
            return
        unzip = zlib.decompressobj(wbits=31)
        try:
            while block := file.read(_CHUNK):
                while block:
                    if unzip.eof:  # files may be glued together
                        unzip = zlib.decompressobj(wbits=31)
                    yield unzip.decompress(block)
                    block = unzip.unused_data
        except zlib.error as error:
            raise CutShortError(f"{path}: the gzip data is damaged: {error}") from None
        if not unzip.eof:
            raise CutShortError(f"{path}: the gzip data ends before its end; the file was cut short")


def text_lines(path: Path, *, ended: bool = False) -> Iterator[tuple[int, bytes]]:
    """Give the lines of a file with their numbers from 1, without their ends.

    Parameters
    ----------
    path : Path
    ended : bool
        True where a line that was cut short may look whole, as one that ends in a number does: a last line without its end is then
        damage, not a line.

    Raises
    ------
    MissingInputError
        If nothing is at `path`.
    CutShortError
        After the last whole line, if a gzip file is cut short or damaged, or the last line is without its end where `ended` is asked.
    InputError
        If the file is empty, a folder, or holds a line too long to be a record.
    """
    _check(path)
    number, rest = 0, b""
    damage: CutShortError | None = None
    blocks = _blocks(path)
    while True:
        try:
            block = next(blocks, None)
        except CutShortError as error:
            damage, block = error, None
        if block is None:
            break
        lines = (rest + block).split(b"\n") if rest else block.split(b"\n")
        rest = lines.pop()
        if len(rest) > _LONGEST_LINE:
            raise InputError(
                f"{path}: line {number + len(lines) + 1} is longer than {_LONGEST_LINE >> 20} MB; give one record per line"
            )
        for line in lines:
            number += 1
            yield number, line.rstrip(b"\r")
    if damage is None and rest and ended:
        damage = CutShortError(f"{path}: line {number + 1}, the last, is without its end; the file was cut short")
    if damage is not None:
        raise damage
    if rest:
        yield number + 1, rest.rstrip(b"\r")


def first_bytes(path: Path, count: int = 1 << 16) -> bytes:
    """Return the beginning of a file, unpacked; less of it where it is damaged.

    Raises
    ------
    MissingInputError, InputError
        If there is no file, or nothing in it.
    """
    _check(path)
    found = b""
    try:
        for block in _blocks(path):
            found += block
            if len(found) >= count:
                break
    except CutShortError:
        pass
    return found[:count]
