"""A serving configuration: one LLM on one kind of hardware under one set of engine knobs."""

from __future__ import annotations

import datetime
import difflib
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hfdtl_bayes.configuration.hardware import Hardware, gpu
from hfdtl_bayes.configuration.llm import LLMArchitecture
from hfdtl_bayes.configuration.quantities import PositiveCount, PositiveQuantity
from hfdtl_bayes.errors import InputError, MissingInputError, UnknownNameError
from hfdtl_bayes.files import atomic

VLLM_NAMES: Mapping[str, str] = {
    "tensor_parallel_size": "tensor_parallel",
    "tp": "tensor_parallel",
    "data_parallel_size": "data_parallel",
    "dp": "data_parallel",
    "enable_expert_parallel": "expert_parallel",
    "ep": "expert_parallel",
    "enable_prefix_caching": "prefix_caching",
    "enable_chunked_prefill": "chunked_prefill",
}
"""vLLM's own names of the engine fields that are called otherwise here."""

_TYPING_ERROR = 0.9  # a key this like a field's name is a slip of the pen: kept as unknown it would silently not count
_DEEPEST_EXTRA = 8
_MOST_EXTRA_VALUES = 10_000
_LONGEST_FOLDER_NAME = 200  # bytes; file systems allow 255, and suffixes are added


def _plain(value: Any, budget: list[int], depth: int = 0) -> Any:
    """Copy plain YAML data; refuse what could not be written back: objects, circles, alias bombs."""
    budget[0] -= 1
    if depth > _DEEPEST_EXTRA or budget[0] < 0:
        raise ValueError("too deeply nested, circular or too large to be an engine setting")
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(k): _plain(v, budget, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, budget, depth + 1) for v in value]
    raise ValueError(f"a value of type {type(value).__name__} is not plain data (text, number, list or mapping)")


def _misspelt(key: str, known: list[str]) -> str:
    """Return what a key should have been called, or the empty string."""
    if key in VLLM_NAMES:
        return f"{key!r} is vLLM's name; call it {VLLM_NAMES[key]!r}"
    near = difflib.get_close_matches(key, known, n=1, cutoff=_TYPING_ERROR)
    return f"unknown key {key!r}; did you mean {near[0]!r}?" if near else ""


class EngineSettings(BaseModel):
    """The knobs of the serving engine that change latency.

    Parameters
    ----------
    kv_capacity_tokens : float
        Tokens the KV cache holds (blocks times block size).
    extra : mapping
        Engine keys this package does not use; kept so that nothing a user wrote is lost. A key that is one of this
        package's own but for a slip, or vLLM's name for it, is refused: kept, it would silently have no effect.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "vllm"
    version: str = "unknown"
    tensor_parallel: PositiveCount = 1
    data_parallel: PositiveCount = 1
    expert_parallel: bool = False
    max_num_seqs: PositiveCount
    max_num_batched_tokens: PositiveCount
    kv_capacity_tokens: PositiveQuantity
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
        known = [name for name in cls.model_fields if name != "extra"]
        kept = {k: v for k, v in data.items() if k in known}
        given = data.get("extra")
        if given is not None and not isinstance(given, Mapping):
            raise ValueError(f"extra must be a mapping, found {type(given).__name__}")
        extra = _plain({**(given or {}), **{k: v for k, v in data.items() if k not in {*known, "extra"}}}, [_MOST_EXTRA_VALUES])
        problems = [f"extra holds {k!r}, a field of its own" for k in extra if k in known or k == "extra"]
        problems += [message for k in extra if k not in known and (message := _misspelt(k, known))]
        if problems:
            raise ValueError("; ".join(problems))
        kept["extra"] = extra
        if isinstance(kept.get("version"), int | float):
            kept["version"] = str(kept["version"])
        return kept


def _is_folder_name(name: str) -> bool:
    if not name.isprintable() or name.strip() != name or name.startswith(".") or "/" in name or "\\" in name:
        return False
    return len(name.encode("utf-8", "surrogatepass")) <= _LONGEST_FOLDER_NAME


class ServingConfiguration(BaseModel):
    """One configuration: an identifier, the LLM, the hardware (per GPU) and the engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config_id: str = Field(min_length=1)
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
                f"accepted are its divisors {', '.join(str(d) for d in range(1, min(heads, 1024) + 1) if heads % d == 0)}"
            )
        if kv_heads % tp and tp % kv_heads:
            problems.append(f"engine.tensor_parallel ({tp}) and llm.num_key_value_heads ({kv_heads}): one must divide the other")
        if not _is_folder_name(self.config_id):
            problems.append(
                f"config_id {self.config_id!r} must be usable as a folder name: printable, at most {_LONGEST_FOLDER_NAME} bytes "
                "in UTF-8, no slash or backslash, no dot or space at its beginning and no space at its end"
            )
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


def explain(error: ValidationError, source: str, kind: str = "serving configuration") -> str:
    """Return what a validation found as one line per problem, with its field."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        found = problem.get("input")
        if problem["type"] == "missing":
            lines.append(f"{where}: missing; add it")
        elif problem["type"] == "extra_forbidden":
            section = where.split(".")[0]
            models: dict[str, type[BaseModel]] = {"llm": LLMArchitecture, "hardware": Hardware}
            model = models.get(section)
            accepted = f"; accepted in `{section}` are {', '.join(model.model_fields)}" if model else ""
            lines.append(f"{where}: unknown key{accepted}")
        elif isinstance(found, Mapping | BaseModel):
            lines.append(f"{where + ': ' if where else ''}{message}")
        else:
            lines.append(f"{where}: {message}, found {reprlib.repr(found)}")
    return f"{source} is not a valid {kind}:\n  - " + "\n  - ".join(lines)


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
    if isinstance(hardware, Mapping) and set(hardware) == {"name"}:
        hardware = hardware["name"]
    if isinstance(hardware, str):
        try:
            data["hardware"] = gpu(hardware)
        except UnknownNameError as error:
            raise UnknownNameError(f"{source}: hardware: {error}") from None
    try:
        return ServingConfiguration.model_validate(data)
    except ValidationError as error:
        raise InputError(explain(error, source)) from None


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
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a configuration: {error}") from None
    try:
        data = yaml.safe_load(text)
    # PyYAML lets the errors of its constructors through: a tag or a date that does not fit its text, nesting too deep.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError) as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    return configuration_from_mapping(data, str(path))


def write_configuration(configuration: ServingConfiguration, path: str | os.PathLike[str]) -> None:
    """Write `configuration.yaml` atomically: whole or not at all."""
    with atomic(path) as part:
        part.write_text(yaml.safe_dump(configuration.dump(), sort_keys=False), encoding="utf-8")
