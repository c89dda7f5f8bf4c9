"""The Parquet parts of a table: in which order they come, and slices of them that can be read apart.

A table larger than memory is read as slices, runs of row groups of one part. Which slices there are depends on the files alone, so
what is computed from them does not depend on how many workers share them.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hfdtl_bayes.errors import InputError, MissingInputError, UnreadablePartError

SLICE_ROWS = 2**19
"""Rows from which a slice is long enough: a second or less of work, so that workers finish together."""
BATCH_ROWS = 2**17
"""Rows decoded at once: a megabyte per column. A batch has a fixed cost of about a millisecond, so many rows share it."""


@dataclass(frozen=True)
class Slice:
    """A run of row groups of one part.

    Attributes
    ----------
    path : Path
    first_group, groups : int
        Row groups `first_group` to `first_group + groups - 1`.
    first_row, rows : int
        Place of the first row in the whole table, from 0, and number of rows.
    """

    path: Path
    first_group: int
    groups: int
    first_row: int
    rows: int


@dataclass(frozen=True)
class Parts:
    """A table in Parquet parts, as their footers describe it.

    Attributes
    ----------
    source : Path
        The file, or the folder of parts.
    columns : dict of str to DataType
        Columns that any part holds, of those asked for, and their types.
    slices : tuple of Slice
        In the order of the table.
    rows : int
    increasing : bool
        True if the footers prove that every slice has higher step numbers than those before it.
    unreadable : tuple of (Path, str)
        Parts whose footer cannot be read, and why.
    """

    source: Path
    columns: dict[str, pa.DataType]
    slices: tuple[Slice, ...]
    rows: int
    increasing: bool
    unreadable: tuple[tuple[Path, str], ...] = ()


def unreadable(path: Path, error: Exception) -> UnreadablePartError:
    """Return the error of a file that is not a table, or no longer one."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UnreadablePartError(
        f"{path} cannot be read as a table: {reason}. A recording that was cut short must be recorded or copied again"
    )


def refuse_empty(path: Path) -> None:
    """Refuse a file of 0 bytes.

    Raises
    ------
    UnreadablePartError
    """
    if path.is_file() and path.stat().st_size == 0:
        raise UnreadablePartError(f"{path} is empty (0 bytes); record it again")


def part_files(folder: Path) -> list[Path]:
    """List the Parquet parts of a folder in order.

    By the numbers in their names, part-2 before part-10; but where the footers say that the parts hold different ranges of `step_id`, by
    these: parts are also named at random.

    Raises
    ------
    InputError
        If there are none.
    """
    parts = sorted((p for p in folder.glob("*.parquet") if not p.name.startswith((".", "_"))), key=_part_order)
    if not parts:
        raise InputError(f"{folder} is a folder without .parquet parts")
    ranges = []
    for part in parts:
        try:
            ranges.append(_id_ranges(pq.read_metadata(part)))
        except (pa.ArrowException, OSError, ValueError):
            return parts
    filled = [(min(low for low, _ in r), max(high for _, high in r), part) for r, part in zip(ranges, parts, strict=True) if r]
    if any(r is None for r in ranges) or not _disjoint(sorted((low, high) for low, high, _ in filled)):
        return parts
    empty = [part for r, part in zip(ranges, parts, strict=True) if not r]
    return [part for *_, part in sorted(filled)] + empty


def _part_order(path: Path) -> list[tuple[int, str]]:
    """Sort key that counts: part-2 before part-10, as writers number their parts without leading zeros."""
    return [(int(digits or -1), text) for digits, text in re.findall(r"(\d{1,18})|(\D+|\d)", path.name)]


def _id_ranges(metadata: pq.FileMetaData) -> list[tuple[int, int]] | None:
    """Return least and highest step number of each row group that has rows; None if the footer does not say."""
    names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    if "step_id" not in names:
        return None
    ranges = []
    for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
        if not group.num_rows:
            continue
        found = group.column(names.index("step_id")).statistics
        if found is None or not found.has_min_max or not isinstance(found.min, int):
            return None
        ranges.append((found.min, found.max))
    return ranges


def _disjoint(ranges: list[tuple[int, int]]) -> bool:
    return all(high < low for (_, high), (low, _) in itertools.pairwise(ranges))


def open_parts(path: str | os.PathLike[str], columns: Collection[str], *, keep_going: bool = False) -> Parts:
    """Read the footers of a Parquet file or folder of parts.

    Parameters
    ----------
    path : path
    columns : collection of str
        Columns to read, where a part has them.
    keep_going : bool
        True to name parts that cannot be read in the result, False to refuse them.

    Raises
    ------
    MissingInputError
        If nothing is at `path`.
    InputError
        If it is a CSV file, no part holds a row, a part cannot be read (unless `keep_going`), or a column has types that do not fit.
    """
    path = Path(path)
    if not path.exists():
        raise MissingInputError(f"no trace table at {path}")
    if path.is_file() and path.suffix.lower() == ".csv":
        raise InputError(
            f"{path} is CSV, which cannot be read in parts; store it as Parquet, or read it with --engine-data memory"
        )
    schemas: list[pa.Schema] = []
    slices: list[Slice] = []
    ranges: list[tuple[int, int]] | None = []
    skipped: list[tuple[Path, str]] = []
    at = 0
    for part in part_files(path) if path.is_dir() else [path]:
        try:
            refuse_empty(part)
            metadata = pq.read_metadata(part)
            schema = metadata.schema.to_arrow_schema()
        except InputError as error:
            skipped.append((part, str(error)))
            continue
        except (pa.ArrowException, OSError, ValueError) as error:
            skipped.append((part, str(unreadable(part, error))))
            continue
        _refuse_hidden_index(part, schema)
        schemas.append(pa.schema([f.with_nullable(True).remove_metadata() for f in schema if f.name in columns]))
        own = _id_ranges(metadata)
        ranges = None if ranges is None or own is None else ranges + own
        for found in _slices(part, metadata, at):
            slices.append(found)
            at += found.rows
    if skipped and not keep_going:
        raise UnreadablePartError(
            skipped[0][1] if len(skipped) == 1 else f"{skipped[0][1]}; {len(skipped) - 1} more part(s) like it"
        )
    if not at:
        left = f"; {len(skipped)} part(s) cannot be read, for example {skipped[0][1]}" if skipped else ""
        raise InputError(f"{path}: no rows; a trace needs at least one engine step{left}")
    try:
        together = pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"{path}: the parts do not fit together: {error}. Give a column the same type in all of them") from None
    increasing = ranges is not None and _disjoint(ranges)
    return Parts(path, {f.name: f.type for f in together}, tuple(slices), at, increasing, tuple(skipped))


def _refuse_hidden_index(path: Path, schema: pa.Schema) -> None:
    described = (schema.pandas_metadata or {}).get("index_columns", [])
    hidden = [i["name"] for i in described if isinstance(i, dict) and i.get("kind") == "range" and i.get("name")]
    if "step_id" in hidden and "step_id" not in schema.names:
        raise InputError(f"{path}: step_id is stored as pandas' index, not as a column; write it with frame.reset_index()")


def _slices(path: Path, metadata: pq.FileMetaData, at: int) -> Iterator[Slice]:
    first, rows = 0, 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        if rows >= SLICE_ROWS or (group == metadata.num_row_groups - 1 and rows):
            yield Slice(path, first, group + 1 - first, at, rows)
            first, at, rows = group + 1, at + rows, 0


def read_batches(own: Slice, columns: Collection[str], batch_rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
    """Read a slice in batches, in one thread; text comes as a dictionary.

    Raises
    ------
    UnreadablePartError
        If the part cannot be read.
    """
    try:
        schema = pq.read_schema(own.path)
        text = [f.name for f in schema if f.name in columns and (pa.types.is_string(f.type) or pa.types.is_large_string(f.type))]
        with pq.ParquetFile(own.path, read_dictionary=text) as file:
            groups = list(range(own.first_group, own.first_group + own.groups))
            held = [c for c in columns if c in schema.names]
            yield from file.iter_batches(batch_rows, groups, held, use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise unreadable(own.path, error) from None
