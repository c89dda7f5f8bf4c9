"""Real traces that ship with the package: four configurations of vLLM on a CPU."""

from __future__ import annotations

from pathlib import Path

DONORS = ("c01_llama-s_base", "c11_moe_base", "c13_qwen-s_base")
"""Donors of the demo: a small dense LLM, a mixture of experts, and one in Qwen's style."""

TARGET = "c09_llama-m_base"
"""Target of the demo: a larger dense LLM, four times slower per step than the donors."""


def sample_store_path() -> Path:
    """Return the folder of the embedded trace store."""
    return Path(__file__).parent / "store"
