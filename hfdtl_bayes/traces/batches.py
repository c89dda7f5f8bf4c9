"""Batches of engine steps from tables larger than memory, every one validated.

A batch in which least, greatest and a few comparisons of columns show that nothing can be wrong is taken as it is; any other goes
through the validation of whole tables, row by row. So a clean table costs little, and the rows accepted are those that reading the
table at once would accept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration, prefill_floor_s_per_token, weight_loading_floor_s
from hfdtl_bayes.files import atomic
from hfdtl_bayes.traces.parts import Slice, read_batches
from hfdtl_bayes.traces.plausibility import SETTINGS
from hfdtl_bayes.traces.schema import STEP_SCHEMA
from hfdtl_bayes.traces.table import ROWS_NAMED, Problem
from hfdtl_bayes.traces.validation import LARGEST_ID, derive_steps, validate_steps

FloatArray = NDArray[np.float64]

REJECTED_KEPT = 10_000
"""Rejected rows that are kept, the first ones: enough to see what is wrong, bounded where a whole recording is."""

_PIECE_ROWS = 2**14
"""Rows judged at once: with ten columns they stay near a processor's own cache."""

_COLUMNS = {c.name: c for c in STEP_SCHEMA}
_NO_ROWS = pd.DataFrame()
_BARE = "decode_tokens with context_tokens 0: the KV cache was read after the step"


@dataclass(frozen=True)
class StepReport:
    """What was read of a table of steps, and what was set aside: as `TraceTable` has it, without the rows.

    Attributes
    ----------
    source : Path
    rows, rejected_rows : int
        Rows accepted and rejected.
    rejected : DataFrame
        The first `REJECTED_KEPT` rejected rows as found, with `row` and `reason`.
    problems, notes : tuple of Problem
    derived : tuple of str
    unreadable : tuple of (Path, str)
        Parts left out because they cannot be read, and why.
    """

    source: Path
    rows: int = 0
    rejected_rows: int = 0
    rejected: pd.DataFrame = field(default_factory=lambda: _NO_ROWS)
    problems: tuple[Problem, ...] = ()
    notes: tuple[Problem, ...] = ()
    derived: tuple[str, ...] = ()
    unreadable: tuple[tuple[Path, str], ...] = ()

    def merge(self, other: StepReport) -> StepReport:
        """Return the report of both; `other` comes later in the table."""
        kept = [r for r in (self.rejected, other.rejected) if len(r)]
        return StepReport(
            self.source,
            self.rows + other.rows,
            self.rejected_rows + other.rejected_rows,
            pd.concat(kept, ignore_index=True).iloc[:REJECTED_KEPT] if kept else self.rejected,
            _merged(self.problems, other.problems),
            _merged(self.notes, other.notes),
            tuple(dict.fromkeys(self.derived + other.derived)),
            self.unreadable + other.unreadable,
        )

    def summary(self) -> str:
        """Return what was read, derived, rejected and left out, for a person."""
        lines = [f"{self.source}: {self.rows} rows accepted, {self.rejected_rows} rejected"]
        lines += [f"  rejected {p}" for p in self.problems]
        lines += [f"  derived {d}" for d in self.derived]
        lines += [f"  note {n}" for n in self.notes]
        if self.unreadable:
            lines.append(f"  {len(self.unreadable)} part(s) left out:")
            lines += [f"    {message}" for _, message in self.unreadable]
        return "\n".join(lines)

    def write_rejected(self, folder: Path) -> Path | None:
        """Write the rejected rows that were kept, as `TraceTable.write_rejected` does; None if there are none."""
        if self.rejected.empty:
            return None
        target = Path(folder) / f"{self.source.parent.name}.{self.source.stem}.rejected.csv"
        with atomic(target) as part:
            self.rejected.to_csv(part, index=False)
        return target


def _merged(one: tuple[Problem, ...], other: tuple[Problem, ...]) -> tuple[Problem, ...]:
    found = {p.message: p for p in one}
    for p in other:
        own = found.get(p.message)
        found[p.message] = Problem(p.message, own.count + p.count, (own.rows + p.rows)[:ROWS_NAMED]) if own else p
    return tuple(found.values())


@dataclass(frozen=True)
class StepBatch:
    """Accepted steps of one batch, in order.

    Attributes
    ----------
    frame : DataFrame
        Float64 columns of the schema, `step_id` and `regime` aside unless asked for, and others that were asked for.
    step_id : ndarray of int, shape (n,)
    regime_code : ndarray of int, shape (n,)
    regimes : tuple of str
        What the codes stand for; each once.
    report : StepReport
    """

    frame: pd.DataFrame
    step_id: NDArray[np.int64]
    regime_code: NDArray[np.int64]
    regimes: tuple[str, ...]
    report: StepReport

    def where(self, rows: NDArray[np.bool_]) -> StepBatch:
        """Return some of the steps; the report stays."""
        if rows.all():
            return self
        return StepBatch(self.frame[rows], self.step_id[rows], self.regime_code[rows], self.regimes, self.report)


def step_batches(
    own: Slice,
    columns: Mapping[str, pa.DataType],
    configuration: ServingConfiguration,
    needed: Collection[str],
    source: Path,
    after: int | None = None,
) -> Iterator[StepBatch]:
    """Read a slice of steps and validate it batch by batch.

    Parameters
    ----------
    own : Slice
    columns : mapping of str to DataType
        Columns of the table; one that this part lacks is empty here.
    configuration : ServingConfiguration
    needed : collection of str
        Columns to have in the frames; derived where absent and a formula exists.
    source : Path
        What to call the table.
    after : int, optional
        Highest step number before the slice.

    Yields
    ------
    StepBatch
        Its frame may be overwritten by the next.

    Raises
    ------
    InputError
        If the part cannot be read or a needed column is absent.
    """
    row = own.first_row
    memory = np.empty(0)
    for batch in read_batches(own, list(columns)):
        checked = None
        if all(name in batch.schema.names for name in columns):
            # Fresh memory for every batch, which the system maps page by page, would cost as much as the checks.
            size = len(columns) * batch.num_rows
            memory = memory if memory.size >= size else np.empty(size)
            checked = _plain(batch, configuration, needed, source, row, after, memory)
        if checked is None:
            checked = _validated(batch, columns, configuration, needed, source, row, after)
        row += batch.num_rows
        if len(checked.step_id):
            after = int(checked.step_id[-1])
        yield checked


def _numbers(batch: pa.RecordBatch) -> dict[str, NDArray[Any]] | None:
    """Return the columns of numbers of a batch without gaps; None if one of the schema's has gaps or holds no numbers."""
    found = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if name == "regime":
            continue
        kind = column.type
        if column.null_count or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)) or pa.types.is_uint64(kind):
            return None
        found[name] = column.to_numpy(zero_copy_only=False)
    return found


def _plain(
    batch: pa.RecordBatch,
    configuration: ServingConfiguration,
    needed: Collection[str],
    source: Path,
    row: int,
    after: int | None,
    memory: FloatArray,
) -> StepBatch | None:
    """Return the batch, its frame in `memory`, if nothing in it can be wrong; otherwise None."""
    regime = _regime(batch)
    numbers = _numbers(batch)
    if regime is None or numbers is None or not {"step_id", "step_time_s", "prefill_tokens", "decode_tokens"} <= numbers.keys():
        return None
    ids = numbers.pop("step_id")
    if ids.dtype != np.int64 or ids[0] < 0 or ids[-1] > LARGEST_ID or not (ids[1:] > ids[:-1]).all():
        return None
    if after is not None and ids[0] <= after:
        return None
    block = memory[: len(numbers) * len(ids)].reshape(len(numbers), len(ids))
    least_s, floor_s = weight_loading_floor_s(configuration), prefill_floor_s_per_token(configuration)
    for at in range(0, len(ids), _PIECE_ROWS):
        own = slice(at, at + _PIECE_ROWS)
        for values, column in zip(block, numbers.values(), strict=True):
            values[own] = column[own]
        piece = dict(zip(numbers, block[:, own], strict=True))
        if not (
            _within_schema(piece, numbers) and _possible(piece, configuration.engine.max_num_batched_tokens, least_s, floor_s)
        ):
            return None
    by_name = dict(zip(numbers, block, strict=True))
    frame = pd.DataFrame(block.T, columns=_labels(tuple(numbers)), copy=False)
    derived: list[str] = []
    if any(name in _COLUMNS and name not in by_name for name in needed if name not in {"step_id", "regime"}):
        frame = frame.copy()
        derived = [d for d in derive_steps(frame, configuration) if not d.startswith("regime")]
    codes, names = regime
    if "step_id" in needed:
        frame = frame.assign(step_id=ids)
    if "regime" in needed:
        frame = frame.assign(regime=np.array(names, dtype=object)[codes])
    notes: tuple[Problem, ...] = ()
    context = by_name.get("context_tokens")
    if context is not None and context.min() == 0:
        bare = np.flatnonzero((context == 0) & (by_name["decode_tokens"] > 0))
        notes = (Problem(_BARE, len(bare), tuple(int(r) + row for r in bare[:ROWS_NAMED])),) if len(bare) else ()
    return StepBatch(frame, ids, codes, names, StepReport(source, len(ids), notes=notes, derived=tuple(derived)))


@cache
def _labels(names: tuple[str, ...]) -> pd.Index:
    """Return column labels; made anew for every batch they would cost as much as a column."""
    return pd.Index(names)


def _regime(batch: pa.RecordBatch) -> tuple[NDArray[np.int64], tuple[str, ...]] | None:
    """Return regime codes and their names; None if a row has none or it is not text."""
    if "regime" not in batch.schema.names:
        return np.zeros(batch.num_rows, dtype=np.int64), ("all",)
    column = batch.column("regime")
    if column.null_count or not pa.types.is_dictionary(column.type) or not pa.types.is_string(column.type.value_type):
        return None
    names = column.dictionary.to_pylist()
    if None in names or "" in names or len(set(names)) < len(names):
        return None
    return column.indices.to_numpy().astype(np.int64), tuple(names)


def _within_schema(by_name: Mapping[str, FloatArray], given: Mapping[str, NDArray[Any]]) -> bool:
    for name, values in by_name.items():
        column = _COLUMNS.get(name)
        if column is None:
            continue
        low, high = values.min(), values.max()
        # A comparison with NaN is false.
        above = low > column.minimum if column.exclusive_minimum else low >= column.minimum
        if not (above and high <= column.maximum and np.isfinite(low) and np.isfinite(high)):
            return False
        if column.whole and given[name].dtype.kind == "f" and (np.floor(values) != values).any():
            return False
    return True


def _possible(by_name: Mapping[str, FloatArray], most_tokens: int, least_s: float, token_s: float) -> bool:
    """Return whether every batch is one that an engine runs, in a time that the hardware can do.

    Parameters
    ----------
    by_name : mapping of str to ndarray
        Columns within the schema.
    most_tokens : int
        Largest batch.
    least_s, token_s : float
        Least seconds of a step, and of a prefill token.
    """
    prefill, decode, time = by_name["prefill_tokens"], by_name["decode_tokens"], by_name["step_time_s"]
    tokens = prefill + decode
    if not (tokens.min() > 0 and tokens.max() <= most_tokens):
        return False
    for phase, count in (("prefill_requests", prefill), ("decode_requests", decode)):
        requests = by_name.get(phase)
        # Fewer tokens than requests, or tokens of nobody: the product of whole numbers is smaller only where requests are 0.
        if requests is not None and not ((count >= requests).all() and (count * requests >= count).all()):
            return False
    if time.min() < SETTINGS.slack * least_s:
        return False
    return bool((time >= SETTINGS.slack * token_s * prefill).all())


def _validated(
    batch: pa.RecordBatch,
    columns: Collection[str],
    configuration: ServingConfiguration,
    needed: Collection[str],
    source: Path,
    row: int,
    after: int | None,
) -> StepBatch:
    """Validate a batch as whole tables are."""
    frame = batch.to_pandas(ignore_metadata=True)
    frame = frame.assign(**{name: np.nan for name in columns if name not in frame.columns})
    table = validate_steps(frame, configuration, source, whole=False, after=after)
    codes, names = pd.factorize(table.frame["regime"])
    numbers = [c for c in table.frame.columns if c in needed or (c in _COLUMNS and c not in {"step_id", "regime"})]

    def moved(problems: tuple[Problem, ...]) -> tuple[Problem, ...]:
        return tuple(Problem(p.message, p.count, tuple(r + row for r in p.rows)) for p in problems)

    report = StepReport(
        source,
        len(table.frame),
        len(table.rejected),
        table.rejected.assign(row=table.rejected["row"] + row).iloc[:REJECTED_KEPT],
        moved(table.problems),
        moved(table.notes),
        # How many gaps were filled is known per batch only.
        tuple(d.split(" (in ")[0] for d in table.derived if not d.startswith("regime")),
    )
    ids = table.frame["step_id"].to_numpy(np.int64)
    return StepBatch(table.frame[numbers], ids, codes.astype(np.int64), tuple(str(n) for n in names), report)
