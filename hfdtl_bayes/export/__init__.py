"""Exports for BLIS, checked before they are written."""

from hfdtl_bayes.export.blis import blis_vectors, idle_api_delay_s
from hfdtl_bayes.export.files import blis_flags, blis_hardware_config, blis_yaml, parse_blis_yaml, write_text
from hfdtl_bayes.export.step_time import blis_step_time_us
from hfdtl_bayes.export.vectors import ALPHA_LABELS, BETA_LABELS, BlisVectors, ExportSettings, check_vectors

__all__ = [
    "ALPHA_LABELS",
    "BETA_LABELS",
    "BlisVectors",
    "ExportSettings",
    "blis_flags",
    "blis_hardware_config",
    "blis_step_time_us",
    "blis_vectors",
    "blis_yaml",
    "check_vectors",
    "idle_api_delay_s",
    "parse_blis_yaml",
    "write_text",
]
