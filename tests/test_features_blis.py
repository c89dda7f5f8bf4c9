"""BLIS's basis, proved on recordings of BLIS itself with known coefficients, and by hand where there are none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from blis_recordings import BLACKBOX_RUNS, RUNS, blackbox_steps, blis_hardware, run_configuration, run_steps

from hfdtl_bayes.configuration import ServingConfiguration, configuration_from_mapping
from hfdtl_bayes.export import blis_step_time_us
from hfdtl_bayes.features import feature_set
from hfdtl_bayes.features.blis import prefill_attended

PHYSICS = feature_set("blis-physics")
COLUMNS = {
    "prefill_compute": "x_pf_compute",
    "decode_compute": "x_dc_compute",
    "weight_loading": "x_weight",
    "tp_communication": "x_tp",
    "layers": "x_L",
    "scheduled_requests": "x_B",
    "moe_layers": "x_nmoe",
    "prefill_kv_write": "x_pf_kv",
    "decode_kv_read": "x_dc_kv",
    "expert_dispatch": "x_ep",
}


@pytest.fixture(scope="module", params=RUNS)
def run(request: pytest.FixtureRequest, shared_data: Path) -> tuple[dict, pd.DataFrame, pd.DataFrame]:
    folder = shared_data / "blis_runs" / request.param
    return (json.loads((folder / "truth.json").read_text()), *run_steps(folder))


def test_every_basis_column_is_blis_own(run: tuple[dict, pd.DataFrame, pd.DataFrame]) -> None:
    truth, raw, frame = run
    configuration = run_configuration(truth)
    for name, column in COLUMNS.items():
        feature = PHYSICS[name]
        ours = np.broadcast_to(np.asarray(feature.compute(frame, configuration), dtype=float), len(raw))
        unit = 1e6 if feature.unit == "s" else 1.0
        # BLIS's columns are written to six decimals of a microsecond.
        np.testing.assert_allclose(ours * unit, raw[column], rtol=0, atol=6e-7, err_msg=name)


def test_every_step_time_is_blis_own_to_the_microsecond(run: tuple[dict, pd.DataFrame, pd.DataFrame]) -> None:
    truth, raw, frame = run
    ours = blis_step_time_us(truth["beta_true"], frame, run_configuration(truth))
    np.testing.assert_array_equal(ours, raw["duration_us"])


def test_the_basis_has_six_directions_within_one_configuration(run: tuple[dict, pd.DataFrame, pd.DataFrame]) -> None:
    truth, _, frame = run
    design = PHYSICS.design(frame, run_configuration(truth))
    size = np.linalg.norm(design, axis=0)
    assert np.linalg.matrix_rank(design[:, size > 0] / size[size > 0], tol=1e-9) == 6


@pytest.mark.parametrize("name", BLACKBOX_RUNS)
def test_blackbox_steps_are_blis_own(name: str, shared_data: Path) -> None:
    folder = shared_data / "blis_runs" / name
    truth = json.loads((folder / "truth.json").read_text())
    steps = blackbox_steps(folder)
    frame = steps[["prefill_tokens", "decode_tokens"]]
    blackbox = feature_set("blis-blackbox")
    constant, per_prefill, per_decode = np.array(truth["beta_true"]) * 1e-6
    physical = dict(zip(("prefill_tokens", "decode_tokens", "constant"), (per_prefill, per_decode, constant), strict=True))
    coefficients = np.array([physical[n] for n in blackbox.coef_names]) / blackbox.references
    ours = np.trunc(blackbox.design(frame, _interleaved()) @ coefficients * 1e6)
    np.testing.assert_array_equal(ours, steps["duration_us"])


def _interleaved(**engine: object) -> ServingConfiguration:
    """An interleaved FP8 mixture of experts with a shared expert, TP 2; head_dim is not hidden / heads."""
    llm = {
        "name": "interleaved", "num_layers": 6, "hidden_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 16, "intermediate_size": 200, "moe_intermediate_size": 50, "shared_expert_intermediate_size": 40,
        "vocab_size": 1000, "num_experts": 16, "num_experts_per_token": 2, "num_moe_layers": 2, "weight_bytes_per_param": 1.0,
        "kv_bytes_per_element": 1.0, "max_context_tokens": 4096,
    }  # fmt: skip
    hardware = blis_hardware("H100") | {"peak_flops": 1e12, "peak_flops_fp8": 2e12, "memory_bandwidth": 4e9}
    knobs = {"tensor_parallel": 2, "max_num_seqs": 8, "max_num_batched_tokens": 512, "kv_capacity_tokens": 8192, **engine}
    return configuration_from_mapping({"config_id": "i", "llm": llm, "hardware": hardware, "engine": knobs})


BATCH = pd.DataFrame(
    {
        "prefill_tokens": [30.0],
        "prefill_requests": [1.0],
        "decode_tokens": [3.0],
        "decode_requests": [3.0],
        "context_tokens": [700.0],
        "prefill_attention_tokens": [450.0],
    }
)


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        # dh = 96 // 8 = 12, dkv = 48, d*(2d+2dkv) = 96*288 = 27648; FP8 peak 2e12, 4e9 byte/s, KV 2 bytes.
        (
            1,
            {
                # [6*2*30*27648/2 + 6*4*4*12*(450+900) + 2*(30*2/2)*6*96*50 + 2*30*6*96*40/2 + 4*30*6*96*200/2] / 2e12
                "prefill_compute": (4976640 + 1555200 + 1728000 + 691200 + 6912000) / 2e12,
                # [6*2*3*27648/2 + 6*4*4*12*700 + 2*(3*2/2)*6*96*50 + 2*3*6*96*40/2 + 4*3*6*96*200/2] / 2e12
                "decode_compute": (497664 + 806400 + 172800 + 69120 + 691200) / 2e12,
                # [6*27648/2 + 2*(16/2)*3*96*50 + 2*3*96*40/2 + 4*3*96*200/2] * 1 byte / 4e9
                "weight_loading": (82944 + 230400 + 11520 + 115200) / 4e9,
                # (6 + 4 + 2) * 33*96*2*2*(1/2) / 4e9
                "tp_communication": 12 * 6336 / 4e9,
                "prefill_kv_write": 6 * 2 * 24 * 30 * 2 / 4e9,
                "decode_kv_read": 6 * 2 * 24 * 2 * 703 / 4e9,
                "expert_dispatch": 0.0,
                "moe_layers": 2.0,
            },
        ),
        (
            2,
            {
                # Everything of the attention and dense layers halves again; experts are spread over 4 GPUs.
                "prefill_compute": (2488320 + 777600 + 864000 + 345600 + 3456000) / 2e12,
                "decode_compute": (248832 + 403200 + 86400 + 34560 + 345600) / 2e12,
                "weight_loading": (82944 + 115200 + 11520 + 115200) / 4e9,
                "tp_communication": 10 * 6336 / 2 / 4e9,
                "prefill_kv_write": 6 * 2 * 12 * 30 * 2 / 4e9,
                "decode_kv_read": 6 * 2 * 12 * 2 * 703 / 4e9,
                # 2 * (33/2) * (3/4) * 2*96*2 / 4e9
                "expert_dispatch": 2 * 16.5 * 0.75 * 384 / 4e9,
                "moe_layers": 2.0,
            },
        ),
    ],
)
def test_interleaved_fp8_and_data_parallel_by_hand(parallel: int, expected: dict[str, float]) -> None:
    configuration = _interleaved(data_parallel=parallel)
    for name, value in expected.items():
        ours = float(np.asarray(PHYSICS[name].compute(BATCH, configuration)).item())
        assert ours == pytest.approx(value, rel=1e-12), name


def test_only_one_byte_weights_use_the_fp8_peak() -> None:
    eight = _interleaved()
    four = eight.model_copy(update={"llm": eight.llm.model_copy(update={"weight_bytes_per_param": 0.5})})
    compute = PHYSICS["prefill_compute"].compute
    np.testing.assert_allclose(np.asarray(compute(BATCH, four)), 2 * np.asarray(compute(BATCH, eight)))


def test_a_step_without_decode_reads_no_kv() -> None:
    batch = BATCH.assign(decode_tokens=0.0, decode_requests=0.0)
    assert float(np.asarray(PHYSICS["decode_kv_read"].compute(batch, _interleaved())).item()) == 0.0


@pytest.mark.parametrize(
    ("chunks", "exact"),
    [
        ([(0, 300, 300)], True),  # one whole prompt
        ([(0, 300, 300), (0, 40, 40), (0, 7, 7)], True),  # several whole prompts of unlike length
        ([(200, 100, 300)], True),  # the last chunk of one prompt
        ([(100, 100, 300)], False),  # a chunk with more to come
    ],
)
def test_attention_of_whole_prompts_from_the_columns_of_a_trace(chunks: list[tuple[int, int, int]], exact: bool) -> None:
    done, tokens, prompt = np.array(chunks, dtype=float).T
    frame = pd.DataFrame(
        {
            "prefill_tokens": [tokens.sum()],
            "prefill_requests": [float(len(chunks))],
            "prefill_attention_tokens": [np.sum(tokens * (done + tokens / 2))],
        }
    )
    truth = float(np.sum(tokens * (prompt + tokens / 2)))
    ours = float(prefill_attended(frame)[0])
    if exact:
        assert ours == pytest.approx(truth, rel=1e-12)
    else:
        assert 0.5 * truth < ours < truth
