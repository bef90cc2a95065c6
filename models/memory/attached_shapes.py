"""What the attention beside a memory adds to its layer, from shapes. Plain integers, imports no torch.

Legend: n tokens of all rows, e bytes of a computed value, w of a wide one, d width of the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.config import ModelConfig


def attention_small(config: ModelConfig) -> int:
    """Biases of attention's projections and weights of its heads' norms."""
    size = config.attention_head_dim
    biases = (config.n_heads + 2 * config.kv_heads) * size if config.qkv_bias else 0
    return biases + (2 * size if config.qk_norm else 0)


@dataclass(frozen=True)
class AttachedShapes:
    """Attention of one layer of ``model.memory.attach`` mag, mal or after."""

    attach: str
    d_model: int
    query_width: int
    key_width: int
    heads: int
    window: int
    small: int = 0
    """Biases of attention's projections and weights of its heads' norms."""

    @staticmethod
    def of(config: ModelConfig) -> AttachedShapes:
        """Of a model's memory layers."""
        size = config.attention_head_dim
        widths = (config.n_heads * size, config.kv_heads * size)
        return AttachedShapes(config.memory.attach, config.d_model, *widths, config.n_heads, config.window, attention_small(config))

    def matmul_parameters(self) -> int:
        """Query, key, value, output; MAG's own output projection."""
        return self.d_model * (2 * self.query_width + 2 * self.key_width + (self.d_model if self.attach == "mag" else 0))

    def other_parameters(self) -> int:
        """Norms, two of MAG, one of the others, and attention's small ones."""
        return self.d_model * (2 if self.attach == "mag" else 1) + self.small

    def flops_forward(self, tokens: int) -> float:
        """Per token, the window full."""
        return 2 * self.matmul_parameters() + 4 * self.query_width * self._keys(tokens)

    def flops_backward(self, tokens: int) -> float:
        """Per token: five products of scores' size for two."""
        return 4 * self.matmul_parameters() + 10 * self.query_width * self._keys(tokens)

    def mixing_flops(self, tokens: int) -> float:
        """Forward and backward per token outside projections, as ``models/flops.py`` counts a sliding window."""
        return 12.0 * self.query_width * self._keys(tokens)

    def _keys(self, tokens: int) -> float:
        full = min(self.window, tokens)
        return (full * (full + 1) / 2 + (tokens - full) * full) / tokens

    def saved_bytes(self, rows: int, tokens: int, e: int, w: int, tiled: bool) -> int:
        """Kept beside what the memory keeps: queries, keys, values, output and log-sum-exp; of MAG what attention and memory gave and
        their product, of the others the normed stream, what was normed and a statistic. Where tiles are made again attention is too."""
        inside = (2 * self.query_width + 2 * self.key_width) * e + self.heads * w
        joined = 3 * self.d_model * e if self.attach == "mag" else 2 * self.d_model * e + w
        return rows * tokens * (joined + (0 if tiled else inside))

    def halo_bytes(self, rows: int, e: int) -> int:
        """Keys and values of a window sent to the next rank."""
        return rows * (self.window - 1) * 2 * self.key_width * e
