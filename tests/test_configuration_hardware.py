"""The catalogue of GPUs against figures of their makers' datasheets."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from hfdtl_bayes.configuration import CATALOGUE, Hardware, catalogue_entry, gpu, gpu_names
from hfdtl_bayes.errors import UnknownNameError

TERA, GIGA, GIB = 1e12, 1e9, 2.0**30


@pytest.mark.parametrize(
    ("name", "bf16", "fp8", "bandwidth", "memory_gib", "link"),
    [
        # Dense TFLOP/s (half of what is printed "with sparsity"), TB/s, GiB, GB/s in one direction.
        ("a100_sxm", 624 / 2, 0, 2.039, 80, 600 / 2),
        ("a100_sxm_40gb", 624 / 2, 0, 1.555, 40, 600 / 2),
        ("a100_pcie", 624 / 2, 0, 1.935, 80, 64 / 2),
        ("a100_pcie_40gb", 624 / 2, 0, 1.555, 40, 64 / 2),
        ("h100_sxm", 1979 / 2, 3958 / 2, 3.35, 80, 900 / 2),
        ("h100_pcie", 1513 / 2, 3026 / 2, 2.0, 80, 128 / 2),
        ("h200_sxm", 1979 / 2, 3958 / 2, 4.8, 141, 900 / 2),
        ("b200_sxm", 4500 / 2, 9000 / 2, 7.7, 180, 1800 / 2),
        ("l40s", 362.05, 1466 / 2, 0.864, 48 * 15 / 16, 64 / 2),
        ("l4", 242 / 2, 485 / 2, 0.300, 24 * 15 / 16, 64 / 2),
        ("a10", 250 / 2, 0, 0.600, 24 * 15 / 16, 64 / 2),
        ("rtx_4090", 165.2, 660.6 / 2, 1.008, 24, 64 / 2),
        ("rtx_pro_6000", 1007.6 / 2, 2015.2 / 2, 1.792, 96, 128 / 2),
        ("mi300x", 2614.9 / 2, 5229.8 / 2, 5.3, 192, 128 / 2),
    ],
)
def test_figures_are_those_of_the_datasheet(
    name: str, bf16: float, fp8: float, bandwidth: float, memory_gib: float, link: float
) -> None:
    entry = catalogue_entry(name)
    hardware = entry.hardware
    assert hardware.peak_flops == pytest.approx(bf16 * TERA, rel=2e-3)
    assert hardware.peak_flops_fp8 == pytest.approx(fp8 * TERA, rel=2e-3)
    assert hardware.memory_bandwidth == pytest.approx(bandwidth * TERA, rel=1e-6)
    assert hardware.memory_bytes == pytest.approx(memory_gib * GIB, rel=1e-6)
    assert hardware.interconnect_bandwidth == pytest.approx(link * GIGA, rel=1e-6)
    assert "datasheet" in entry.source or "whitepaper" in entry.source or "brief" in entry.source


@pytest.mark.parametrize(
    ("name", "tflops_peak", "tb_per_s"),
    [("H100", 989.5, 3.35), ("A100-SXM", 312, 2.039), ("A100-80", 312, 2.039), ("L40S", 362.05, 0.864)],
)
def test_figures_agree_with_those_of_blis(name: str, tflops_peak: float, tb_per_s: float) -> None:
    assert gpu(name).peak_flops == pytest.approx(tflops_peak * TERA, rel=1e-3)
    assert gpu(name).memory_bandwidth == pytest.approx(tb_per_s * TERA)


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        # What nvidia-smi and rocm-smi print.
        ("NVIDIA A100-SXM4-80GB", "a100_sxm"),
        ("NVIDIA A100-SXM4-40GB", "a100_sxm_40gb"),
        ("NVIDIA A100 80GB PCIe", "a100_pcie"),
        ("NVIDIA A100-PCIE-40GB", "a100_pcie_40gb"),
        ("NVIDIA H100 80GB HBM3", "h100_sxm"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H100 NVL", "h100_nvl"),
        ("NVIDIA H200", "h200_sxm"),
        ("NVIDIA B200", "b200_sxm"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx_pro_6000"),
        ("AMD Instinct MI300X", "mi300x"),
        ("Tesla V100-SXM2-32GB", "v100_sxm"),
        ("Tesla T4", "t4"),
    ],
)
def test_names_as_drivers_report_them(reported: str, name: str) -> None:
    assert gpu(reported).name == name


def test_every_entry_is_found_by_its_names_and_no_name_means_two() -> None:
    names = [n for e in CATALOGUE for n in (e.hardware.name, *e.aliases)]
    assert len(set(names)) == len(names)
    for entry in CATALOGUE:
        for name in (entry.hardware.name, *entry.aliases):
            assert gpu(name.upper().replace("_", " ")) == entry.hardware


def test_an_unknown_gpu_lists_the_known_ones_and_the_way_out() -> None:
    with pytest.raises(UnknownNameError) as caught:
        gpu("H1OO")
    message = str(caught.value)
    assert "did you mean h100" in message
    assert all(name in message for name in gpu_names())
    assert "peak_flops" in message
    assert isinstance(caught.value, LookupError)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "fast"])
def test_peak_figures_must_be_positive_and_finite(value: object) -> None:
    with pytest.raises(ValidationError, match="peak_flops"):
        Hardware.model_validate({**gpu("h100").model_dump(), "peak_flops": value})
