"""Settings of the model: shapes and layer pattern, nothing about devices.

Try alone: ``python -c "from models.config import ModelConfig; print(ModelConfig())"``. Imports no torch.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from models.memory_config import (
    ROTATED,
    SEQUENTIAL,
    ContextConfig,
    GatedSlotConfig,
    Mamba2Config,
    MemoryKind,
    MemoryModuleConfig,
    TitansConfig,
)
from models.rope_config import RopeConfig
from models.section import PositiveInt, Section
from models.stack_config import refused_pattern

__all__ = [
    "ContextConfig",
    "FeedForwardKind",
    "GatedSlotConfig",
    "HierarchicalConfig",
    "LayerKind",
    "Mamba2Config",
    "MemoryKind",
    "MemoryModuleConfig",
    "ModelConfig",
    "PositiveInt",
    "ProductKeysConfig",
    "RopeConfig",
    "Section",
    "TitansConfig",
]

LayerKind = Literal["full", "swa", "memory"]
"""full: causal attention over everything before; swa: sliding window; memory: a memory module (``model.memory``)."""

FeedForwardKind = Literal["dense", "product_keys", "hierarchical"]
"""dense: SwiGLU; product_keys: a memory layer that reads a table of values, in its place or beside it (``model.product_keys``);
hierarchical: SwiGLU with hidden units beside it that are fetched for every document (``model.hierarchical``)."""


class ProductKeysConfig(Section):
    """Memory layers with product keys (arXiv 1907.05242, 2412.09764) in place of feed-forwards or beside them."""

    attach: Literal["replace", "beside"] = "replace"
    """replace: in place of the layer's feed-forward; beside: a dense feed-forward reads the same input, and the two outputs are added."""
    n_keys: PositiveInt = 256
    """Keys of each half of a query; the table has n_keys squared values."""
    heads: PositiveInt = 4
    """Queries per token."""
    top_k: PositiveInt = 32
    """Values that each query reads: those with the largest scores of all."""
    key_dim: Annotated[int, Field(ge=2, multiple_of=2)] | None = None
    """Size of a query, both halves; null means half of d_model, made even."""
    value_dim: PositiveInt | None = None
    """Size of a value; null means d_model."""
    tucker_rank: PositiveInt = 1
    """UltraMem's scores (arXiv 2411.12364): each half has so many sets of keys, and a core that is learned joins them; 1: their sum."""
    expansion: PositiveInt = 1
    """UltraMem's implicit value expansion (arXiv 2411.12364): the table has so many times fewer rows, and each of so many blocks of values
    is the same rows under a linear map of its own; 1: none."""
    shared_table: bool = True
    """All product_keys layers read one table; false gives each its own."""
    gate: Literal["swish", "none"] = "swish"
    """swish: what is read times silu of a projection of the input, and an output projection; none: what is read as it is."""
    qk_norm: bool = False
    """RMSNorm on the halves of queries and keys, each with a learned scale: steadies large learning rates."""


class HierarchicalConfig(Section):
    """Hierarchical memories (arXiv 2510.02375): hidden units of a feed-forward that every document fetches by its clusters."""

    branching: Annotated[tuple[PositiveInt, ...], Field(min_length=1, strict=False)] = (16, 16)
    """Clusters that each cluster is divided into, from the top level down: 16, 16 are 16 clusters of 16 each."""
    units: Annotated[tuple[PositiveInt, ...], Field(min_length=1, strict=False)] = (32, 32)
    """Hidden units per layer that one cluster of each level has; a document fetches those of its clusters of all levels."""
    planned_documents: PositiveInt = 8
    """Documents of different clusters per sequence for which a memory plan makes room; more are read all the same, and need more."""

    @property
    def clusters(self) -> tuple[int, ...]:
        """Clusters of each level."""
        return tuple(math.prod(self.branching[: level + 1]) for level in range(len(self.branching)))

    @property
    def rows(self) -> int:
        """Hidden units of one layer, over all clusters."""
        return sum(count * units for count, units in zip(self.clusters, self.units, strict=True))


class ModelConfig(Section):
    """Shapes of a Llama-style decoder with a layer pattern."""

    d_model: PositiveInt = 128
    """Width of the residual stream."""
    n_heads: PositiveInt = 4
    """Query heads."""
    n_kv_heads: PositiveInt | None = None
    """Key/value heads (grouped-query attention); null means n_heads."""
    head_dim: PositiveInt | None = None
    """Size of an attention head; null means d_model / n_heads."""
    qkv_bias: bool = False
    """Add a bias to the projections of queries, keys and values (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm of every head's query and key before the rotation, one weight for all heads (Qwen3)."""
    d_ff: PositiveInt | None = None
    """Hidden width of the SwiGLU feed-forward; null means 8/3 d_model rounded up to a multiple of 32."""
    layers: Annotated[tuple[LayerKind, ...], Field(min_length=1, strict=False)] = ("swa", "memory")
    """Layer kinds from the input up; repeated until n_layers layers exist."""
    feedforward: Annotated[tuple[FeedForwardKind, ...], Field(min_length=1, strict=False)] = ("dense",)
    """Kinds of feed-forward from the input up; repeated until every layer has one."""
    n_layers: PositiveInt | None = None
    """Number of layers; null means one per entry of layers."""
    window: PositiveInt = 512
    """Tokens a sliding-window layer sees, its own included."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding; null means the tokenizer's vocabulary rounded up to a multiple of 64."""
    tie_embeddings: bool = False
    """Use the embedding matrix as output projection too."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the mean square in RMSNorm."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights; projections back into the residual stream are divided by sqrt(2 n_layers)."""
    rope: RopeConfig = RopeConfig()
    """Rotary position embedding."""
    memory: MemoryModuleConfig = MemoryModuleConfig()
    """The memory architecture."""
    product_keys: ProductKeysConfig = ProductKeysConfig()
    """The memory layers with product keys (kind product_keys of feedforward)."""
    hierarchical: HierarchicalConfig = HierarchicalConfig()
    """The hierarchical memories (kind hierarchical of feedforward)."""

    @model_validator(mode="after")
    def _check_shapes(self) -> ModelConfig:
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}; set head_dim or change one of them")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.kv_heads}")
        if self.attention_head_dim % 2:
            raise ValueError(f"head_dim {self.attention_head_dim} is odd; rotary embedding needs an even size")
        memory_heads = self.memory.n_heads or self.n_heads
        if self.memory.kind in ROTATED and self.memory_key_dim % 2:
            raise ValueError(
                f"memory.head_dim {self.memory_key_dim} is odd; the rotary embedding of memory.kind {self.memory.kind} needs an even size"
            )
        if self.memory.kind == "mamba2":
            self._check_mamba2(memory_heads)
        elif self.memory.head_dim is None and self.d_model % memory_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by memory.n_heads {memory_heads}; set memory.head_dim")
        return self

    def _check_mamba2(self, heads: int) -> None:
        own = self.memory.mamba2
        if heads % own.n_groups:
            raise ValueError(f"memory.n_heads {heads} is not a multiple of memory.mamba2.n_groups {own.n_groups}")
        inner = own.expand * self.d_model
        if inner % heads:
            raise ValueError(
                f"memory.mamba2.expand {own.expand} x d_model {self.d_model} = {inner:g} is not a multiple of memory.n_heads {heads}; "
                "change one of them"
            )

    @model_validator(mode="after")
    def _check_stack(self) -> ModelConfig:
        if self.memory.around_stack and (refused := refused_pattern(self.memory.kind, self.layers, self.feedforward)):
            raise ValueError(refused)
        return self

    @model_validator(mode="after")
    def _check_product_keys(self) -> ModelConfig:
        keys = self.product_keys
        if "product_keys" not in self.feedforward_kinds:
            if keys != ProductKeysConfig():
                raise ValueError("product_keys is set, but no layer has feedforward product_keys; name it there or leave product_keys out")
            return self
        if keys.top_k > keys.n_keys:
            raise ValueError(f"product_keys.top_k {keys.top_k} is larger than product_keys.n_keys {keys.n_keys}; lower it")
        if keys.n_keys**2 >= 2**31:
            raise ValueError(f"product_keys.n_keys {keys.n_keys} squared values cannot be told apart by 31 bits; lower it to 46340")
        if keys.n_keys**2 % keys.expansion:
            raise ValueError(
                f"product_keys.expansion {keys.expansion} does not divide the {keys.n_keys**2} values of n_keys {keys.n_keys}; change it"
            )
        if keys.gate == "none" and self.value_width != self.d_model:
            raise ValueError(
                f"product_keys.value_dim {self.value_width} is not d_model {self.d_model}, and gate none has no output projection; "
                "leave value_dim null or set gate swish"
            )
        return self

    @model_validator(mode="after")
    def _check_hierarchical(self) -> ModelConfig:
        own, readers = self.hierarchical, self.feedforward_kinds.count("hierarchical")
        if not readers:
            if own != HierarchicalConfig():
                raise ValueError("hierarchical is set, but no layer has feedforward hierarchical; name it there or leave hierarchical out")
            return self
        if len(own.branching) != len(own.units):
            raise ValueError(
                f"hierarchical.branching has {len(own.branching)} levels and hierarchical.units {len(own.units)}: "
                "give both one entry a level"
            )
        if readers * own.rows >= 2**31:
            raise ValueError(
                f"hierarchical.branching and units make {readers * own.rows} hidden units, which 31 bits cannot tell apart; lower them"
            )
        return self

    @property
    def kv_heads(self) -> int:
        """Key/value heads after defaults."""
        return self.n_kv_heads or self.n_heads

    @property
    def attention_head_dim(self) -> int:
        """Attention head size after defaults."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def ff_width(self) -> int:
        """Feed-forward width after defaults."""
        return self.d_ff or -(-(8 * self.d_model // 3) // 32) * 32

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """One kind per layer, the pattern repeated and cut to n_layers."""
        n_layers = self.n_layers or len(self.layers)
        return tuple(self.layers[i % len(self.layers)] for i in range(n_layers))

    @property
    def feedforward_kinds(self) -> tuple[FeedForwardKind, ...]:
        """One kind per layer, the pattern repeated and cut."""
        return tuple(self.feedforward[i % len(self.feedforward)] for i in range(len(self.layer_kinds)))

    @property
    def table_shapes(self) -> tuple[tuple[int, int], ...]:
        """(rows, width) of every value table: those of product keys, then that of hierarchical memories, one for all their layers."""
        kinds = self.feedforward_kinds
        readers, hierarchical = kinds.count("product_keys"), kinds.count("hierarchical")
        tables = min(readers, 1) if self.product_keys.shared_table else readers
        found = ((self.table_rows, self.value_width),) * tables
        return (*found, (hierarchical * self.hierarchical.rows, 3 * self.d_model)) if hierarchical else found

    @property
    def query_dim(self) -> int:
        """Size of a product-key query after defaults."""
        return self.product_keys.key_dim or max(2, self.d_model // 4 * 2)

    @property
    def table_rows(self) -> int:
        """Rows of a value table of product keys."""
        return self.product_keys.n_keys**2 // self.product_keys.expansion

    @property
    def value_width(self) -> int:
        """Size of a value of the table after defaults."""
        return self.product_keys.value_dim or self.d_model

    @property
    def has_attention(self) -> bool:
        """Whether any layer attends over tokens of other ranks when a sequence is split."""
        return any(kind != "memory" for kind in self.layer_kinds) or self.memory.attach in ("mag", "mal", "after")

    @property
    def has_sequential_memory(self) -> bool:
        """Whether a memory's state must go from rank to rank in the order of the text."""
        return "memory" in self.layer_kinds and self.memory.kind in SEQUENTIAL

    @property
    def memory_heads(self) -> int:
        """Heads of the memory module after defaults."""
        return self.memory.n_heads or self.n_heads

    @property
    def memory_key_dim(self) -> int:
        """Key size per memory head after defaults."""
        if self.memory.kind == "mamba2":
            return self.memory.mamba2.state_dim
        return self.memory.head_dim or self.d_model // self.memory_heads

    @property
    def memory_value_dim(self) -> int:
        """Value size per memory head after defaults."""
        if self.memory.kind == "mamba2":
            return round(self.memory.mamba2.expand * self.d_model) // self.memory_heads
        return max(1, round(self.memory.expand_v * self.memory_key_dim))
