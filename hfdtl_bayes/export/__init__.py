"""Exports for BLIS, checked before they are written."""

from hfdtl_bayes.export.blis import (
    BETA_LABELS,
    BlisVectors,
    ExportSettings,
    blis_flags,
    blis_vectors,
    blis_yaml,
    check_vectors,
    idle_api_delay_s,
    write_text,
)

__all__ = [
    "BETA_LABELS",
    "BlisVectors",
    "ExportSettings",
    "blis_flags",
    "blis_vectors",
    "blis_yaml",
    "check_vectors",
    "idle_api_delay_s",
    "write_text",
]
