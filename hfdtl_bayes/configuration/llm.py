"""The architecture of a large language model, and the work and bytes that follow from it."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class LLMArchitecture(BaseModel):
    """A decoder-only transformer: dense or mixture of experts; multi-head, grouped-query or multi-query attention.

    Parameters
    ----------
    intermediate_size : int
        FFN width of a dense layer. For a mixture of experts without `moe_intermediate_size` it is the width of one
        routed expert, which is how Mixtral-like models are described.
    num_moe_layers : int, optional
        Layers whose FFN is a mixture of experts; all of them by default when `num_experts` > 0.
    shared_expert_intermediate_size : int
        Summed FFN width of the experts every token passes through; 0 if there are none.
    weight_bytes_per_param : float
        2 for BF16 and FP16, 1 for FP8 and INT8, about 0.55 for INT4 with group scales.
    params_total, params_active, flops_per_token, weight_bytes, kv_bytes_per_token : float
        Derived where absent (or 0); a given value wins. FLOPs and bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    num_experts: int = Field(default=0, ge=0)
    num_experts_per_token: int = Field(default=0, ge=0)
    num_moe_layers: int = Field(default=-1, ge=-1)
    moe_intermediate_size: int = Field(default=-1, ge=-1)
    shared_expert_intermediate_size: int = Field(default=0, ge=0)
    tie_word_embeddings: bool = False
    weight_bytes_per_param: float = Field(default=2.0, gt=0, le=8)
    kv_bytes_per_element: float = Field(default=2.0, gt=0, le=8)
    max_context_tokens: int = Field(gt=0)
    params_total: float = Field(default=0.0, ge=0)
    params_active: float = Field(default=0.0, ge=0)
    flops_per_token: float = Field(default=0.0, ge=0)
    weight_bytes: float = Field(default=0.0, ge=0)
    kv_bytes_per_token: float = Field(default=0.0, ge=0)

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
        put(self, "weight_bytes", self.weight_bytes or self.params_total * self.weight_bytes_per_param)
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

    def _derived_total_params(self) -> int:
        embedding = 0 if self.tie_word_embeddings else self.head_params
        norms = (2 * self.num_layers + 1) * self.hidden_size
        routed = self.num_moe_layers * self.num_experts * self.expert_params
        return self.always_active_params + routed + self.head_params + embedding + norms

    def _derived_active_params(self) -> int:
        idle = self.num_moe_layers * (self.num_experts - self.num_experts_per_token) * self.expert_params
        embedding = 0 if self.tie_word_embeddings else self.head_params  # a lookup, not a product
        return self._derived_total_params() - idle - embedding

    def _derived_kv_bytes_per_token(self) -> float:
        return 2.0 * self.num_layers * self.num_key_value_heads * self.head_dim * self.kv_bytes_per_element
