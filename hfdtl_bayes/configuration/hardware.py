"""Accelerators: what one of them can do at peak, and a catalogue of those in use for serving.

All figures are per GPU and for dense (not sparse) arithmetic. Interconnect bandwidth is per direction: NVLink
where the board has it, otherwise PCIe x16, because that is what an all-reduce is limited by.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from hfdtl_bayes.configuration.quantities import PositiveQuantity, Quantity
from hfdtl_bayes.errors import UnknownNameError

_GIB = 2.0**30


class Hardware(BaseModel):
    """Peak figures of one accelerator.

    Parameters
    ----------
    peak_flops : float
        Dense BF16/FP16 peak, FLOP/s.
    memory_bandwidth : float
        Byte/s.
    memory_bytes : float
        Capacity, bytes.
    interconnect_bandwidth : float
        To another accelerator of the same node, byte/s per direction.
    peak_flops_fp8 : float
        Dense FP8 peak, FLOP/s; 0 where the hardware has none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    peak_flops: PositiveQuantity
    memory_bandwidth: PositiveQuantity
    memory_bytes: PositiveQuantity
    interconnect_bandwidth: PositiveQuantity
    peak_flops_fp8: Quantity = 0.0


@dataclass(frozen=True)
class CatalogueEntry:
    """One GPU of the catalogue with the source of its figures."""

    hardware: Hardware
    source: str
    aliases: tuple[str, ...] = ()


# Other names of the same boards: what people write, and what drivers report.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "a100_sxm": ("a100", "a100_80", "a100_80gb", "a100_80gb_sxm", "a100_sxm_80gb", "a100_sxm4_80gb"),
    "a100_sxm_40gb": ("a100_40", "a100_40gb", "a100_40gb_sxm", "a100_sxm4_40gb"),
    "a100_pcie": ("a100_pcie_80gb", "a100_80gb_pcie"),
    "a100_pcie_40gb": ("a100_40gb_pcie",),
    "h100_sxm": ("h100", "h100_80gb", "h100_sxm5", "h100_sxm_80gb", "h100_sxm5_80gb", "h100_80gb_hbm3"),
    "h100_pcie": ("h100_pcie_80gb", "h100_80gb_pcie"),
    "h200_sxm": ("h200", "h200_141gb", "h200_sxm_141gb"),
    "b200_sxm": ("b200",),
    "rtx_pro_6000": (
        "rtx_pro_6000_blackwell",
        "rtx_pro_6000_blackwell_workstation_edition",
        "rtx_pro_6000_blackwell_server_edition",
    ),
    "v100_sxm": ("v100", "v100_sxm2", "v100_sxm2_32gb"),
}


def _entry(
    name: str, bf16_tflops: float, fp8_tflops: float, bandwidth_tbs: float, memory_gib: float, link_gbs: float, source: str
) -> CatalogueEntry:
    hardware = Hardware(
        name=name,
        peak_flops=bf16_tflops * 1e12,
        peak_flops_fp8=fp8_tflops * 1e12,
        memory_bandwidth=bandwidth_tbs * 1e12,
        memory_bytes=memory_gib * _GIB,
        interconnect_bandwidth=link_gbs * 1e9,
    )
    return CatalogueEntry(hardware, source, _ALIASES.get(name, ()))


# Datasheets quote most tensor figures "with sparsity"; the dense figures below are half of those. NVLink is quoted
# as the sum of both directions; below is one direction. GDDR6 boards lose a sixteenth of their memory to ECC, which is
# on by default on data-centre cards: 45 of 48 GiB, 22.5 of 24, 15 of 16.
CATALOGUE: tuple[CatalogueEntry, ...] = (
    _entry("a100_sxm", 312, 0, 2.039, 80, 300, "NVIDIA A100 Tensor Core GPU datasheet (80GB SXM)"),
    _entry("a100_sxm_40gb", 312, 0, 1.555, 40, 300, "NVIDIA A100 Tensor Core GPU datasheet (40GB SXM)"),
    _entry("a100_pcie", 312, 0, 1.935, 80, 32, "NVIDIA A100 Tensor Core GPU datasheet (80GB PCIe, PCIe Gen4)"),
    _entry("a100_pcie_40gb", 312, 0, 1.555, 40, 32, "NVIDIA A100 Tensor Core GPU datasheet (40GB PCIe, PCIe Gen4)"),
    _entry("h100_sxm", 989, 1979, 3.35, 80, 450, "NVIDIA H100 Tensor Core GPU datasheet (SXM)"),
    _entry("h100_pcie", 756, 1513, 2.0, 80, 64, "NVIDIA H100 PCIe product brief (PCIe Gen5)"),
    _entry("h100_nvl", 835, 1671, 3.9, 94, 300, "NVIDIA H100 Tensor Core GPU datasheet (NVL)"),
    _entry("h200_sxm", 989, 1979, 4.8, 141, 450, "NVIDIA H200 Tensor Core GPU datasheet (SXM)"),
    _entry("b200_sxm", 2250, 4500, 7.7, 180, 900, "NVIDIA Blackwell datasheet (HGX B200, per GPU; DGX B200 rounds to 8 TB/s)"),
    _entry("l40s", 362.05, 733, 0.864, 45, 32, "NVIDIA L40S datasheet (48GB with ECC, PCIe Gen4)"),
    _entry("l40", 181.05, 362, 0.864, 45, 32, "NVIDIA L40 datasheet (48GB with ECC, PCIe Gen4)"),
    _entry("l4", 121, 242.5, 0.300, 22.5, 32, "NVIDIA L4 datasheet (24GB with ECC, PCIe Gen4)"),
    _entry("a10", 125, 0, 0.600, 22.5, 32, "NVIDIA A10 datasheet (24GB with ECC, PCIe Gen4)"),
    _entry("a10g", 70, 0, 0.600, 22.5, 32, "NVIDIA A10G datasheet, as in AWS EC2 G5 (24GB with ECC, PCIe Gen4)"),
    _entry("rtx_4090", 165.2, 330.3, 1.008, 24, 32, "NVIDIA Ada GPU Architecture whitepaper (FP32 accumulate, PCIe Gen4)"),
    _entry("rtx_pro_6000", 503.8, 1007.6, 1.792, 96, 64, "NVIDIA RTX Blackwell PRO whitepaper (FP32 accumulate, PCIe Gen5)"),
    _entry("mi300x", 1307.4, 2614.9, 5.3, 192, 64, "AMD Instinct MI300X datasheet (link: one of 7 per GPU, one direction)"),
    _entry("v100_sxm", 125, 0, 0.900, 32, 150, "NVIDIA V100 datasheet (32GB SXM2, FP16)"),
    _entry("t4", 65, 0, 0.320, 15, 16, "NVIDIA T4 datasheet (FP16, 16GB with ECC, PCIe Gen3)"),
)


def _key(name: str) -> str:
    """Reduce a name to letters, digits and underscores, without the makers' words that drivers put before it."""
    key = re.sub(r"[^a-z0-9]+", "_", name.strip().lower()).strip("_")
    return re.sub(r"^((nvidia|amd|instinct|geforce|tesla)_)+", "", key)


_BY_KEY = {_key(n): e for e in CATALOGUE for n in (e.hardware.name, *e.aliases)}


def gpu_names() -> tuple[str, ...]:
    """Return the names of the catalogue."""
    return tuple(e.hardware.name for e in CATALOGUE)


def catalogue_entry(name: str) -> CatalogueEntry:
    """Look a GPU up by name or alias; case, spaces and punctuation do not matter.

    Raises
    ------
    UnknownNameError
        If the name is not in the catalogue; the message lists those that are, closest first.
    """
    key = _key(name)
    if key in _BY_KEY:
        return _BY_KEY[key]
    near = difflib.get_close_matches(key, list(_BY_KEY), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise UnknownNameError(
        f"unknown GPU {name!r}: {hint}known are {', '.join(gpu_names())}. For any other accelerator write its figures "
        "(peak_flops, memory_bandwidth, memory_bytes, interconnect_bandwidth) under `hardware:` in the configuration"
    )


def gpu(name: str) -> Hardware:
    """Return the peak figures of a GPU of the catalogue.

    Raises
    ------
    UnknownNameError
        As `catalogue_entry`.
    """
    return catalogue_entry(name).hardware
