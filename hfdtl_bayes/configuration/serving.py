"""A serving configuration: one LLM on one kind of hardware under one set of engine knobs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hfdtl_bayes.configuration.hardware import Hardware, gpu
from hfdtl_bayes.configuration.llm import LLMArchitecture
from hfdtl_bayes.errors import InputError, MissingInputError


class EngineSettings(BaseModel):
    """The knobs of the serving engine that change latency.

    Parameters
    ----------
    kv_capacity_tokens : float
        Tokens the KV cache holds (blocks times block size).
    extra : mapping
        Engine keys this package does not use; kept so that nothing a user wrote is lost.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "vllm"
    version: str = "unknown"
    tensor_parallel: int = Field(default=1, gt=0)
    data_parallel: int = Field(default=1, gt=0)
    expert_parallel: bool = False
    max_num_seqs: int = Field(gt=0)
    max_num_batched_tokens: int = Field(gt=0)
    kv_capacity_tokens: float = Field(gt=0)
    prefix_caching: bool = False
    chunked_prefill: bool = True
    cpu_offload: bool = False
    dtype: str = "bfloat16"
    extra: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _keep_unknown_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = set(cls.model_fields)
        kept = {k: v for k, v in data.items() if k in known}
        kept["extra"] = {**data.get("extra", {}), **{k: v for k, v in data.items() if k not in known}}
        if isinstance(kept.get("version"), int | float):
            kept["version"] = str(kept["version"])
        return kept


class ServingConfiguration(BaseModel):
    """One configuration: an identifier, the LLM, the hardware (per GPU) and the engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config_id: str = Field(min_length=1, max_length=200)
    llm: LLMArchitecture
    hardware: Hardware
    engine: EngineSettings

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        tp, heads, kv_heads = (
            self.engine.tensor_parallel,
            self.llm.num_attention_heads,
            self.llm.num_key_value_heads,
        )
        problems = []
        if heads % tp:
            problems.append(
                f"engine.tensor_parallel ({tp}) does not divide llm.num_attention_heads ({heads}); "
                f"accepted are its divisors {', '.join(str(d) for d in range(1, heads + 1) if heads % d == 0)}"
            )
        if kv_heads % tp and tp % kv_heads:
            problems.append(f"engine.tensor_parallel ({tp}) and llm.num_key_value_heads ({kv_heads}): one must divide the other")
        if "/" in self.config_id or self.config_id in {".", ".."}:
            problems.append(f"config_id {self.config_id!r} must be usable as a folder name: no '/'")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def dump(self) -> dict[str, Any]:
        """Return the configuration as plain data in the layout of `configuration.yaml`."""
        data = self.model_dump()
        data["engine"].update(data["engine"].pop("extra"))
        return data


def weight_loading_floor_s(configuration: ServingConfiguration) -> float:
    """Physical lower bound of a step: the always-active weights read once at peak bandwidth, in seconds.

    always_active_params * weight_bytes_per_param / (tensor_parallel * memory_bandwidth).
    """
    llm = configuration.llm
    size = llm.always_active_params * llm.weight_bytes_per_param
    return size / configuration.engine.tensor_parallel / configuration.hardware.memory_bandwidth


def prefill_floor_s_per_token(configuration: ServingConfiguration) -> float:
    """Physical lower bound of the time per prefilled token: its FLOPs at peak, in seconds.

    flops_per_token (less the output head, which runs once per request) / (tensor_parallel * peak FLOP/s).
    """
    llm, hardware = configuration.llm, configuration.hardware
    peak = max(hardware.peak_flops, hardware.peak_flops_fp8 if llm.weight_bytes_per_param <= 1 else 0.0)
    flops = 2.0 * (llm.active_matmul_params - llm.head_params)
    return flops / configuration.engine.tensor_parallel / peak


def _explain(error: ValidationError, source: str) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        found = problem.get("input")
        if problem["type"] == "missing":
            lines.append(f"{where}: missing; add it")
        elif problem["type"] == "extra_forbidden":
            section = where.split(".")[0]
            model = {"llm": LLMArchitecture, "hardware": Hardware}.get(section)
            accepted = f"; accepted in `{section}` are {', '.join(model.model_fields)}" if model else ""
            lines.append(f"{where}: unknown key{accepted}")
        elif isinstance(found, Mapping | BaseModel):
            lines.append(f"{where + ': ' if where else ''}{message}")
        else:
            lines.append(f"{where}: {message}, found {found!r}")
    return f"{source} is not a valid serving configuration:\n  - " + "\n  - ".join(lines)


def configuration_from_mapping(data: Mapping[str, Any], source: str = "configuration") -> ServingConfiguration:
    """Build a configuration from plain data; `hardware` may be the name of a GPU of the catalogue.

    Parameters
    ----------
    data : mapping
        The layout of `configuration.yaml`.
    source : str
        What to call it in messages.

    Raises
    ------
    InputError
        With every problem found, one line each.
    UnknownNameError
        If `hardware` names an unknown GPU.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"{source}: expected a mapping with config_id, llm, hardware and engine, found {type(data).__name__}")
    data = dict(data)
    hardware = data.get("hardware")
    if isinstance(hardware, str):
        data["hardware"] = gpu(hardware)
    elif isinstance(hardware, Mapping) and set(hardware) == {"name"}:
        data["hardware"] = gpu(str(hardware["name"]))
    try:
        return ServingConfiguration.model_validate(data)
    except ValidationError as error:
        raise InputError(_explain(error, source)) from None


def read_configuration(path: str | os.PathLike[str]) -> ServingConfiguration:
    """Read `configuration.yaml`.

    Raises
    ------
    MissingInputError
        If the file does not exist.
    InputError
        If it is not YAML or not a valid configuration; every problem is listed with its field.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MissingInputError(f"no configuration at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a configuration: {error}") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    return configuration_from_mapping(data, str(path))


def write_configuration(configuration: ServingConfiguration, path: str | os.PathLike[str]) -> None:
    """Write `configuration.yaml` atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        yaml.safe_dump(configuration.dump(), stream, sort_keys=False)
    Path(temporary).replace(path)
