"""Serving configurations: LLM architecture, hardware, engine knobs, and the physics that follows from them."""

from hfdtl_bayes.configuration.hardware import CATALOGUE, CatalogueEntry, Hardware, catalogue_entry, gpu, gpu_names
from hfdtl_bayes.configuration.huggingface import configuration_from_huggingface, llm_from_huggingface
from hfdtl_bayes.configuration.llm import LLMArchitecture
from hfdtl_bayes.configuration.serving import (
    EngineSettings,
    ServingConfiguration,
    configuration_from_mapping,
    prefill_floor_s_per_token,
    read_configuration,
    weight_loading_floor_s,
    write_configuration,
)

__all__ = [
    "CATALOGUE",
    "CatalogueEntry",
    "EngineSettings",
    "Hardware",
    "LLMArchitecture",
    "ServingConfiguration",
    "catalogue_entry",
    "configuration_from_huggingface",
    "configuration_from_mapping",
    "gpu",
    "gpu_names",
    "llm_from_huggingface",
    "prefill_floor_s_per_token",
    "read_configuration",
    "weight_loading_floor_s",
    "write_configuration",
]
