"""The architecture of a large language model, and the work and bytes that follow from it."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hfdtl_bayes.configuration.quantities import BytesEach, Count, CountOrDerived, PositiveCount, Quantity

_UNQUANTISED_BYTES = 2.0


class LLMArchitecture(BaseModel):
    """A decoder-only transformer: dense or mixture of experts; multi-head, grouped-query or multi-query attention.

    Parameters
    ----------
    intermediate_size : int
        FFN width of a dense layer, with a gate: three matrices. An FFN of two matrices is described by the gated one
        of the same size, two thirds as wide. For a mixture of experts without `moe_intermediate_size` it is the width
        of one routed expert, which is how Mixtral-like models are described.
    num_moe_layers : int, optional
        Layers whose FFN is a mixture of experts; all of them by default when `num_experts` > 0.
    shared_expert_intermediate_size : int
        Summed FFN width of the experts every token passes through; 0 if there are none.
    weight_bytes_per_param : float
        2 for BF16 and FP16, 1 for FP8 and INT8, about 0.52 for INT4 with group scales. It holds for the matrices of
        the layers; embedding, output head and norms stay at 2 bytes or more, as quantised checkpoints leave them.
    params_total, params_active, flops_per_token, weight_bytes, kv_bytes_per_token : float
        Derived where absent (or 0); a given value wins. FLOPs and bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    num_layers: PositiveCount
    hidden_size: PositiveCount
    num_attention_heads: PositiveCount
    num_key_value_heads: PositiveCount
    head_dim: PositiveCount
    intermediate_size: PositiveCount
    vocab_size: PositiveCount
    num_experts: Count = 0
    num_experts_per_token: Count = 0
    num_moe_layers: CountOrDerived = -1
    moe_intermediate_size: CountOrDerived = -1
    shared_expert_intermediate_size: Count = 0
    tie_word_embeddings: bool = False
    weight_bytes_per_param: BytesEach = 2.0
    kv_bytes_per_element: BytesEach = 2.0
    max_context_tokens: PositiveCount
    params_total: Quantity = 0.0
    params_active: Quantity = 0.0
    flops_per_token: Quantity = 0.0
    weight_bytes: Quantity = 0.0
    kv_bytes_per_token: Quantity = 0.0

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        problems = []
        if self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"num_key_value_heads ({self.num_key_value_heads}) must divide num_attention_heads ({self.num_attention_heads})"
            )
        if self.num_experts == 0 and self.num_experts_per_token > 0:
            problems.append("num_experts_per_token is given but num_experts is 0")
        if self.num_experts > 0 and not 1 <= self.num_experts_per_token <= self.num_experts:
            problems.append(
                f"num_experts_per_token ({self.num_experts_per_token}) must lie between 1 and num_experts ({self.num_experts})"
            )
        if self.num_moe_layers > self.num_layers:
            problems.append(f"num_moe_layers ({self.num_moe_layers}) exceeds num_layers ({self.num_layers})")
        if self.params_total and self.params_active > self.params_total:
            problems.append(f"params_active ({self.params_active:g}) exceeds params_total ({self.params_total:g})")
        if problems:
            raise ValueError("; ".join(problems))
        put = object.__setattr__
        if self.num_moe_layers == -1 or self.num_experts == 0:
            put(self, "num_moe_layers", self.num_layers if self.num_experts else 0)
        if self.moe_intermediate_size == -1 or self.num_experts == 0:
            put(self, "moe_intermediate_size", self.intermediate_size if self.num_experts else 0)
        put(self, "params_total", self.params_total or float(self._derived_total_params()))
        put(self, "params_active", self.params_active or float(self._derived_active_params()))
        put(self, "flops_per_token", self.flops_per_token or 2.0 * self.active_matmul_params)
        put(self, "weight_bytes", self.weight_bytes or self._derived_weight_bytes())
        put(self, "kv_bytes_per_token", self.kv_bytes_per_token or self._derived_kv_bytes_per_token())
        return self

    @property
    def is_moe(self) -> bool:
        """True for a mixture of experts."""
        return self.num_experts > 0

    @property
    def num_dense_layers(self) -> int:
        """Layers with an ordinary FFN: num_layers - num_moe_layers."""
        return self.num_layers - self.num_moe_layers

    @property
    def head_params(self) -> int:
        """Parameters of the output head: hidden_size * vocab_size."""
        return self.hidden_size * self.vocab_size

    @property
    def attention_params_per_layer(self) -> int:
        """Q, K, V and output projections: hidden * head_dim * (2 * heads + 2 * kv_heads)."""
        return self.hidden_size * self.head_dim * (2 * self.num_attention_heads + 2 * self.num_key_value_heads)

    @property
    def dense_ffn_params(self) -> int:
        """Gate, up and down of one dense layer: 3 * hidden * intermediate."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def expert_params(self) -> int:
        """Gate, up and down of ONE routed expert: 3 * hidden * moe_intermediate."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def shared_expert_params(self) -> int:
        """Gate, up and down of the shared experts of one MoE layer: 3 * hidden * shared width."""
        return 3 * self.hidden_size * self.shared_expert_intermediate_size

    @property
    def router_params(self) -> int:
        """Router of one MoE layer: hidden * num_experts."""
        return self.hidden_size * self.num_experts

    @property
    def always_active_params(self) -> int:
        """Parameters every token passes through, without head and embedding.

        layers * attention + dense layers * FFN + MoE layers * (shared experts + router).
        """
        moe = self.num_moe_layers * (self.shared_expert_params + self.router_params)
        return self.num_layers * self.attention_params_per_layer + self.num_dense_layers * self.dense_ffn_params + moe

    @property
    def active_matmul_params(self) -> int:
        """Parameters multiplied per token, head included: always active + MoE layers * k * expert + head."""
        routed = self.num_moe_layers * self.num_experts_per_token * self.expert_params
        return self.always_active_params + routed + self.head_params

    @property
    def unquantised_params(self) -> int:
        """Parameters that quantised checkpoints leave at 16 bits: embedding, output head and norms.

        (1 if tied, else 2) * hidden * vocab + (2 * layers + 1) * hidden.
        """
        tables = 1 if self.tie_word_embeddings else 2
        return tables * self.head_params + (2 * self.num_layers + 1) * self.hidden_size

    def _derived_total_params(self) -> int:
        routed = self.num_moe_layers * self.num_experts * self.expert_params
        return self.always_active_params + routed + self.unquantised_params

    def _derived_weight_bytes(self) -> float:
        wide = min(float(self.unquantised_params), self.params_total)
        narrow = self.params_total - wide
        return narrow * self.weight_bytes_per_param + wide * max(self.weight_bytes_per_param, _UNQUANTISED_BYTES)

    def _derived_active_params(self) -> int:
        idle = self.num_moe_layers * (self.num_experts - self.num_experts_per_token) * self.expert_params
        embedding = 0 if self.tie_word_embeddings else self.head_params  # a lookup, not a product
        return self._derived_total_params() - idle - embedding

    def _derived_kv_bytes_per_token(self) -> float:
        return 2.0 * self.num_layers * self.num_key_value_heads * self.head_dim * self.kv_bytes_per_element
