"""Serving configurations: YAML in, YAML out, consistency, physical floors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hfdtl_bayes.configuration import (
    EngineSettings,
    ServingConfiguration,
    configuration_from_mapping,
    prefill_floor_s_per_token,
    read_configuration,
    weight_loading_floor_s,
    write_configuration,
)
from hfdtl_bayes.errors import HfdtlError, InputError, MissingInputError, UnknownNameError

LLM: dict[str, Any] = {
    "name": "llama3-8b", "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256, "max_context_tokens": 8192,
}  # fmt: skip
ENGINE: dict[str, Any] = {"max_num_seqs": 256, "max_num_batched_tokens": 2048, "kv_capacity_tokens": 400_000.0}


def document(**change: Any) -> dict[str, Any]:
    return {"config_id": "a", "llm": dict(LLM), "hardware": "h100", "engine": dict(ENGINE)} | change


def configuration(**change: Any) -> ServingConfiguration:
    return configuration_from_mapping(document(**change))


def test_a_gpu_may_be_named_or_described() -> None:
    named = configuration(hardware="H100").hardware
    assert configuration(hardware={"name": "h100_sxm"}).hardware == named
    assert configuration(hardware=named.model_dump()).hardware == named


def test_derived_physics_may_be_overridden() -> None:
    llm = configuration(llm={**LLM, "params_total": 9e9, "flops_per_token": 1e10, "kv_bytes_per_token": 5.0}).llm
    assert (llm.params_total, llm.flops_per_token, llm.kv_bytes_per_token) == (9e9, 1e10, 5.0)
    assert llm.weight_bytes == 18e9  # follows from what was given


def test_floors_are_the_weights_once_and_the_flops_at_peak() -> None:
    one, two = configuration(), configuration(engine={**ENGINE, "tensor_parallel": 2})
    # 6.979e9 layer parameters of Llama-3-8B: 2 bytes each at 3.35 TB/s; 2 FLOP each at 989 TFLOP/s.
    assert weight_loading_floor_s(one) == pytest.approx(6.979e9 * 2 / 3.35e12, rel=1e-3)
    assert prefill_floor_s_per_token(one) == pytest.approx(6.979e9 * 2 / 989e12, rel=1e-3)
    assert weight_loading_floor_s(two) == pytest.approx(weight_loading_floor_s(one) / 2)
    fp8 = configuration(llm={**LLM, "weight_bytes_per_param": 1.0})
    assert weight_loading_floor_s(fp8) == pytest.approx(weight_loading_floor_s(one) / 2)
    assert prefill_floor_s_per_token(fp8) == pytest.approx(6.979e9 * 2 / 1979e12, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llm": {**LLM, "num_layers": 0}}, "llm.num_layers: Input should be greater than 0, found 0"),
        ({"llm": {**LLM, "num_layers": True}}, "llm.num_layers: a number is needed, not true or false"),
        ({"llm": {**LLM, "num_layers": 10**12}}, "llm.num_layers: Input should be less than or equal to"),
        ({"llm": {**LLM, "params_total": float("inf")}}, "llm.params_total: Input should be a finite number"),
        ({"llm": {**LLM, "params_total": 1e9, "params_active": 2e9}}, "params_active .* exceeds params_total"),
        ({"llm": {k: v for k, v in LLM.items() if k != "vocab_size"}}, "llm.vocab_size: missing; add it"),
        ({"llm": {**LLM, "layers": 3}}, "llm.layers: unknown key; accepted in `llm` are name, num_layers"),
        ({"llm": {**LLM, "num_key_value_heads": 7}}, "must divide num_attention_heads"),
        ({"llm": {**LLM, "num_experts_per_token": 2}}, "num_experts is 0"),
        ({"llm": {**LLM, "num_experts": 8, "num_experts_per_token": 2, "num_moe_layers": 33}}, "exceeds num_layers"),
        (
            {"engine": {**ENGINE, "tensor_parallel": 3}},
            r"tensor_parallel \(3\) does not divide .* accepted are its divisors 1, 2, 4",
        ),
        ({"engine": {**ENGINE, "kv_capacity_tokens": float("nan")}}, "engine.kv_capacity_tokens"),
        ({"engine": {**ENGINE, "tensor_paralel": 2}}, "did you mean 'tensor_parallel'"),
        ({"engine": {**ENGINE, "tensor_parallel_size": 2}}, "vLLM's name; call it 'tensor_parallel'"),
        ({"engine": {**ENGINE, "extra": 5}}, "extra must be a mapping"),
        ({"engine": {**ENGINE, "extra": {"max_num_seqs": 5}}}, "a field of its own"),
        ({"engine": None}, "engine: "),
        ({"hardware": 5}, "hardware: "),
        ({"config_id": "a/b"}, "usable as a folder name"),
        ({"config_id": ".hidden"}, "usable as a folder name"),
        ({"config_id": "line\nbreak"}, "usable as a folder name"),
        ({"config_id": "ä" * 150}, "usable as a folder name"),
        ({"unknown": 1}, "unknown: unknown key"),
        ({1: 2}, "not a valid serving configuration"),
    ],
)
def test_inconsistent_configurations_name_the_field(change: dict[Any, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        configuration_from_mapping({**document(), **change})


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(InputError) as caught:
        configuration(llm={**LLM, "num_layers": -1, "layers": 3}, engine={**ENGINE, "max_num_seqs": "many"})
    message = str(caught.value)
    assert all(part in message for part in ("llm.num_layers", "llm.layers", "engine.max_num_seqs", "found 'many'"))


def test_an_unknown_gpu_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "configuration.yaml"
    path.write_text(yaml.safe_dump(document(hardware="h1000")))
    with pytest.raises(UnknownNameError, match=r"configuration\.yaml: hardware: unknown GPU 'h1000'"):
        read_configuration(path)


@pytest.mark.parametrize(
    "text",
    [
        "", "- 1", "a: [", "a: !!int x", "a: !!bool x", "a: !!timestamp x", "a: !!int ''", "a: 2020-99-99", "{a: b}: c", "\t",
        "[" * 3000, "a: !!python/object:os.system {}", "config_id: &a [*a]", "engine: &a {x: *a}\nconfig_id: a", "\x00",
    ],
)  # fmt: skip
def test_text_that_is_no_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "configuration.yaml").write_text(text)
    with pytest.raises(InputError, match=r"configuration\.yaml"):
        read_configuration(tmp_path / "configuration.yaml")


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "config_id: *a11", "engine: {bomb: *a11}"]))
    with pytest.raises(InputError, match="too large to be an engine setting"):
        read_configuration(tmp_path / "c.yaml")


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no configuration at"):
        read_configuration(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        read_configuration(tmp_path)
    (tmp_path / "latin1.yaml").write_bytes("name: ä".encode("latin-1"))
    with pytest.raises(InputError, match="cannot be read"):
        read_configuration(tmp_path / "latin1.yaml")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
positive = st.floats(1e-3, 1e30)


@given(
    config_id=st.text(st.characters(categories=["L", "N"], include_characters="._-+ "), min_size=1, max_size=40).filter(
        lambda s: s.strip() == s and not s.startswith(".")
    ),
    llm=st.fixed_dictionaries(
        {"name": names, "num_layers": st.integers(1, 200), "weight_bytes_per_param": st.sampled_from([0.53, 1.0, 2.0])}
    ),
    overrides=st.dictionaries(st.sampled_from(["weight_bytes", "flops_per_token", "kv_bytes_per_token"]), positive),
    bandwidth=positive,
    capacity=positive,
    extra=st.dictionaries(st.sampled_from(["gpu_memory_utilization", "seed", "compile", "über"]), plain),
)
def test_writing_and_reading_is_exact(
    tmp_path_factory: pytest.TempPathFactory,
    config_id: str,
    llm: dict[str, Any],
    overrides: dict[str, float],
    bandwidth: float,
    capacity: float,
    extra: dict[str, Any],
) -> None:
    given_hardware = {**configuration().hardware.model_dump(), "memory_bandwidth": bandwidth}
    written = configuration(
        config_id=config_id,
        llm={**LLM, **llm, **overrides},
        hardware=given_hardware,
        engine={**ENGINE, "kv_capacity_tokens": capacity, **extra},
    )
    path = tmp_path_factory.mktemp("yaml") / "configuration.yaml"
    write_configuration(written, path)
    assert read_configuration(path) == written
    assert [p.name for p in path.parent.iterdir()] == ["configuration.yaml"]


@settings(max_examples=200)
@given(
    section=st.sampled_from(["config_id", "llm", "hardware", "engine", "extra"]),
    key=st.sampled_from(sorted({*LLM, *ENGINE, "name", "peak_flops", "extra", "version", "unheard_of"})),
    value=plain | st.just(float("nan")),
    replace_section=st.booleans(),
)
def test_any_yaml_gives_a_configuration_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, section: str, key: str, value: Any, replace_section: bool
) -> None:
    data = document()
    if replace_section or not isinstance(data.get(section), dict):
        data[section] = value
    else:
        data[section][key] = value
    path = tmp_path_factory.mktemp("yaml") / "c.yaml"
    path.write_text(yaml.safe_dump(data))
    try:
        found: object = read_configuration(path)
    except HfdtlError as error:
        found = str(error)
    assert isinstance(found, ServingConfiguration) or "c.yaml" in str(found)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_gives_one_clear_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("yaml") / "c.yaml"
    path.write_text(text, newline="")
    with pytest.raises(InputError, match=r"c\.yaml"):
        read_configuration(path)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "configuration.yaml"
    write_configuration(configuration(), path)
    before = path.read_bytes()
    # A value that YAML cannot write, past the validation: the writing itself must fail.
    engine = EngineSettings(**ENGINE).model_copy(update={"extra": {"thing": object()}})
    broken = configuration().model_copy(update={"engine": engine})
    with pytest.raises(yaml.YAMLError):
        write_configuration(broken, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["configuration.yaml"]


def test_every_recorded_configuration_reads_and_round_trips(shared_data: Path, tmp_path: Path) -> None:
    paths = sorted(shared_data.glob("*/*/configuration.yaml"))
    assert len(paths) >= 63
    for path in paths:
        read = read_configuration(path)
        write_configuration(read, tmp_path / "c.yaml")
        assert read_configuration(tmp_path / "c.yaml") == read


def test_derived_physics_agrees_with_the_recordings(shared_data: Path) -> None:
    for path in sorted(shared_data.glob("*/*/configuration.yaml")):
        data = yaml.safe_load(path.read_text())
        stated = {k: data["llm"].pop(k) for k in ("params_total", "flops_per_token", "weight_bytes", "kv_bytes_per_token")}
        data["llm"].pop("params_active")
        llm = configuration_from_mapping(data).llm
        assert llm.kv_bytes_per_token == stated["kv_bytes_per_token"], path
        if data["llm"]["name"] in {"llama3-8b", "llama3-70b", "mixtral-8x7b", "qwen3-30b-a3b", "qwen3-32b", "llama2-7b"}:
            assert llm.params_total == pytest.approx(stated["params_total"], rel=1e-3), path
            assert llm.flops_per_token == pytest.approx(stated["flops_per_token"], rel=1e-3), path
            assert llm.weight_bytes == pytest.approx(stated["weight_bytes"], rel=1e-3), path
