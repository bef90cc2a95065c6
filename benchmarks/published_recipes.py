"""Runs of other systems that ``plan_published.py`` compares with: what their settings are, and the sizes that follow.

Legend: T tokens of one rank, S of the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Shape:
    """A decoder."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    gated: bool = True
    """SwiGLU (three matrices) or GELU (two)."""
    qk_norm: bool = False

    @property
    def q(self) -> int:
        """Width of the queries."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.head_dim

    @property
    def attention_parameters(self) -> int:
        """Of one layer."""
        return self.width * (2 * self.q + 2 * self.kv)

    @property
    def mlp_parameters(self) -> int:
        """Of one layer."""
        return (3 if self.gated else 2) * self.width * self.ffn

    @property
    def layer_parameters(self) -> int:
        """Of one layer, norms left out."""
        return self.attention_parameters + self.mlp_parameters

    @property
    def parameters(self) -> int:
        """All, norms left out."""
        return self.layers * self.layer_parameters + (1 if self.tied else 2) * self.vocab * self.width

    def model_flops(self, tokens: int) -> float:
        """Of one sequence's forward and backward: 6 per matrix parameter and token, 6 S^2 Hq D per layer (``models/flops.py``)."""
        matrices = self.layers * self.layer_parameters + self.vocab * self.width
        return 6.0 * matrices * tokens + 6.0 * tokens**2 * self.q * self.layers


@dataclass(frozen=True)
class Recipe:
    """A run of one of the systems."""

    system: Literal["alst", "trl", "memo"]
    shape: Shape
    device: str
    gpus: int
    tokens: int
    """Of the sequence."""
    sp: int
    """Ranks that share a sequence."""
    attention: str = "flash2"
    tiled_loss: bool = True
    """Also stands for the fused kernels (norm, rotation, SwiGLU) that ALST switches on with it."""
    tiled_mlp: bool = False
    offload_checkpoints: bool = False
    offload_parameters: bool = False
    repeats_keys: bool = False
    """Hugging Face's ``sdpa``: keys and values are copied for every query head before torch's FlashAttention 2 sees them."""
    swap: bool = True
    """MEMO's swapping; False: full recomputation."""
    host_bytes: float = 1.9e12
    """Of one node."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of the bf16 tensors of one layer on one rank."""

    hidden: float
    q: float
    kv: float
    """Keys (or values) as the rank computes them."""
    kv_attended: float
    """Keys (or values) as its attention sees them: after Ulysses' exchange, repeated where there are more ranks than heads."""
    ffn: float
    same_heads: bool
    """Attention of one rank sees as many key heads as query heads."""


def sizes_of(recipe: Recipe) -> Sizes:
    shape, tokens = recipe.shape, recipe.tokens / recipe.sp
    local_kv_heads = max(1.0, shape.kv_heads / recipe.sp) if recipe.system == "alst" else shape.kv_heads / recipe.sp
    if recipe.repeats_keys:
        local_kv_heads = shape.heads / recipe.sp
    attended = recipe.tokens * local_kv_heads * shape.head_dim * 2
    width, q, kv, ffn = (tokens * n * 2 for n in (shape.width, shape.q, shape.kv, shape.ffn))
    return Sizes(width, q, kv, attended, ffn, same_heads=shape.heads / recipe.sp <= local_kv_heads)


SKELETAL = {"input": 1, "attention": 1, "others": 14}
"""MEMO, section 2: tensors of one layer in units of b s h elements."""
