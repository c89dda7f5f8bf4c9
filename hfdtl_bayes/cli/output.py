"""What leaves the program: results on stdout, words on stderr, files written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfdtl_bayes.errors import HfdtlError, InputError
from hfdtl_bayes.files import atomic

if TYPE_CHECKING:
    import pandas as pd

    from hfdtl_bayes.model import Convergence

TABLE_SUFFIXES = (".parquet", ".csv")


def say(message: str) -> None:
    """Print words for a person on stderr."""
    print(message, file=sys.stderr, flush=True)


def warn_unless_converged(convergence: Convergence) -> None:
    """Say on stderr that a fit has not converged, whatever is done with it, and what to type."""
    if not convergence.passed:
        say(
            f"warning: {convergence}. Conclude nothing from these draws; fit or calibrate again, for example with "
            f"{'--engine exact' if convergence.reweighting else '--draws 4000 --target-accept 0.99'}"
        )


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: NumPy scalars and arrays as numbers and lists, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value


def show(result: Mapping[str, Any], text: str = "", *, as_json: bool) -> None:
    """Print a result on stdout: as one JSON object, or as text for a person."""
    print(json.dumps(plain(result), indent=2, allow_nan=False) if as_json else text, flush=True)


def table_text(rows: pd.DataFrame, title: str) -> str:
    """Return a table as text, as wide as it needs to be; floats with four digits."""
    from rich.console import Console  # noqa: PLC0415  (loaded on first use)
    from rich.table import Table  # noqa: PLC0415

    table = Table(title=title, title_justify="left", header_style="bold")
    numeric = [rows[c].dtype.kind in "fi" for c in rows.columns]
    for name, number in zip(rows.columns, numeric, strict=True):
        table.add_column(str(name), justify="right" if number else "left", no_wrap=True)
    for row in rows.itertuples(index=False):
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row))
    console = Console(width=200, color_system=None, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


def _check_parent(path: Path) -> None:
    existing = next(p for p in path.absolute().parents if p.exists())
    if not existing.is_dir():
        raise InputError(f"{path} cannot be written: {existing} is a file, not a folder; choose another --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written: no permission in {existing}; choose another --out or mend its permissions")


def check_file(path: Path, inputs: Sequence[Path | None] = (), suffixes: Collection[str] = ()) -> Path:
    """Refuse an output file that could not be written, before any work is done for it; returns the path.

    Raises
    ------
    InputError
        If it is a folder, lies in a place that cannot be written, would replace an input, or has another suffix.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; --out takes the name of a file")
    if suffixes and path.suffix not in suffixes:
        raise InputError(f"{path} ends in {path.suffix or 'nothing'!r}; the format follows the suffix: {' or '.join(suffixes)}")
    for given in inputs:
        if given is not None and given.exists() and path.exists() and path.samefile(given):
            raise InputError(f"--out {path} would replace the input {given}; choose another name")
    _check_parent(path)
    return path


def check_folder(path: Path) -> Path:
    """Refuse an output folder that could not be written; returns the path.

    Raises
    ------
    InputError
        If it is a file or lies in a place that cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; --out takes the name of a folder")
    _check_parent(path / "anything")
    return path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says when a file cannot be written into one error.

    Raises
    ------
    InputError
        For any OSError inside the block: a full disk, a quota, permissions.
    """
    try:
        yield
    except HfdtlError:
        # Some of these refine an OSError (a missing input) and carry their own message.
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}; what was there is unchanged") from None


def write_table(frame: pd.DataFrame, path: Path) -> Path:
    """Write a table as Parquet or CSV, by suffix, atomically; returns its path."""
    with atomic(path) as part:
        if path.suffix == ".csv":
            frame.to_csv(part, index=False)
        else:
            frame.to_parquet(part, index=False, compression="zstd")
    return path
