"""The trace store: schema, validation, reading and writing, splits."""

from hfdtl_bayes.traces.batches import StepBatch, StepReport, step_batches
from hfdtl_bayes.traces.parts import Parts, Slice, open_parts, read_batches
from hfdtl_bayes.traces.plausibility import ValidationSettings
from hfdtl_bayes.traces.schema import REQUEST_SCHEMA, STEP_SCHEMA, Column, schema_table
from hfdtl_bayes.traces.splits import WARMUP_REGIMES, drop_warmup, split_by_blocks, split_by_regime, time_blocks
from hfdtl_bayes.traces.store import TraceStore, read_requests, read_steps, read_table, write_store
from hfdtl_bayes.traces.table import Problem, TraceTable
from hfdtl_bayes.traces.validation import validate_requests, validate_steps

__all__ = [
    "REQUEST_SCHEMA",
    "STEP_SCHEMA",
    "WARMUP_REGIMES",
    "Column",
    "Parts",
    "Problem",
    "Slice",
    "StepBatch",
    "StepReport",
    "TraceStore",
    "TraceTable",
    "ValidationSettings",
    "drop_warmup",
    "open_parts",
    "read_batches",
    "read_requests",
    "read_steps",
    "read_table",
    "schema_table",
    "split_by_blocks",
    "split_by_regime",
    "step_batches",
    "time_blocks",
    "validate_requests",
    "validate_steps",
    "write_store",
]
