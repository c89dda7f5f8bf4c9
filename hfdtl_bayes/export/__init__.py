"""Exports for BLIS, checked before they are written."""

from hfdtl_bayes.export.alpha import idle_api_delay_s, queueing_alpha_s
from hfdtl_bayes.export.blis import blis_vectors
from hfdtl_bayes.export.card import CoefficientCard, card_schema, coefficient_card, parse_card, read_card
from hfdtl_bayes.export.ensemble import Ensemble, blis_ensemble, read_ensemble, write_ensemble
from hfdtl_bayes.export.files import (
    FileVectors,
    blis_flags,
    blis_hardware_config,
    blis_yaml,
    parse_blis_file,
    parse_blis_yaml,
    write_text,
)
from hfdtl_bayes.export.fleet import write_fleet
from hfdtl_bayes.export.go_source import GoSource, go_source
from hfdtl_bayes.export.older_backends import BACKENDS, BLACKBOX, CROSSMODEL
from hfdtl_bayes.export.step_time import blis_step_time_us
from hfdtl_bayes.export.vectors import (
    ALPHA_LABELS,
    BETA_LABELS,
    TRAINED_PHYSICS,
    Backend,
    BlisVectors,
    ExportSettings,
    check_vectors,
)

__all__ = [
    "ALPHA_LABELS",
    "BACKENDS",
    "BETA_LABELS",
    "BLACKBOX",
    "CROSSMODEL",
    "TRAINED_PHYSICS",
    "Backend",
    "BlisVectors",
    "CoefficientCard",
    "Ensemble",
    "ExportSettings",
    "FileVectors",
    "GoSource",
    "blis_ensemble",
    "blis_flags",
    "blis_hardware_config",
    "blis_step_time_us",
    "blis_vectors",
    "blis_yaml",
    "card_schema",
    "check_vectors",
    "coefficient_card",
    "go_source",
    "idle_api_delay_s",
    "parse_blis_file",
    "parse_blis_yaml",
    "parse_card",
    "queueing_alpha_s",
    "read_card",
    "read_ensemble",
    "write_ensemble",
    "write_fleet",
    "write_text",
]
