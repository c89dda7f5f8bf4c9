"""Readers of foreign formats: what BLIS and traced vLLM engines write, turned into the tables of a trace store."""

from hfdtl_bayes.traces.readers.assembly import Assembled, assemble
from hfdtl_bayes.traces.readers.batch_summary import read_batch_summary
from hfdtl_bayes.traces.readers.blis_json import (
    CalibratedMetric,
    CalibrateReport,
    read_calibrate,
    read_calibrate_report,
    read_metrics,
    read_results,
)
from hfdtl_bayes.traces.readers.detect import FORMATS, detect, read_files
from hfdtl_bayes.traces.readers.ingestion import Ingested, ingest
from hfdtl_bayes.traces.readers.itl import read_itl
from hfdtl_bayes.traces.readers.otlp import read_otlp
from hfdtl_bayes.traces.readers.recording import Recording, Rejections
from hfdtl_bayes.traces.readers.request_tables import Overheads
from hfdtl_bayes.traces.readers.trace_v2 import read_trace_v2

__all__ = [
    "FORMATS",
    "Assembled",
    "CalibrateReport",
    "CalibratedMetric",
    "Ingested",
    "Overheads",
    "Recording",
    "Rejections",
    "assemble",
    "detect",
    "ingest",
    "read_batch_summary",
    "read_calibrate",
    "read_calibrate_report",
    "read_files",
    "read_itl",
    "read_metrics",
    "read_otlp",
    "read_results",
    "read_trace_v2",
]
